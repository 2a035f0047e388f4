"""Every attention backend of the dispatch table against the reference and float64."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sagan_layers import functional
from sagan_layers.attention import reference
from sagan_layers.attention.reference import AttentionInputs
from sagan_layers.attention.table import ATTENTION
from sagan_layers.backends import Backend
from sagan_layers.torch_support import accumulation_dtype

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LAYOUTS = ["contiguous", "channels_first", "every_other", "inside_larger", "expanded_batch"]
SIZES = [1, 2, 3, 7, 8, 13, 16, 17, 31, 64, 65, 127]

pytestmark = pytest.mark.usefixtures("_unwritten_memory_is_nan")

BACKENDS = {backend.name: backend for backend in ATTENTION.backends}

every_backend = pytest.mark.parametrize("backend", ATTENTION.backends, ids=lambda backend: backend.name)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """A tensor of these values (of its first sample throughout, if expanded) with the strides of a layout."""
    if layout == "contiguous":
        return values.contiguous()
    if layout == "channels_first":  # what flattening an NCHW feature map gives
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "every_other":
        spread = values.new_full((*values.shape[:2], 2 * values.size(2)), torch.nan)
        spread[..., ::2] = values
        return spread[..., ::2]
    if layout == "inside_larger":  # a step over the end of a row, sample or tensor meets NaN
        large = values.new_full([size + 3 for size in values.shape], torch.nan)
        inner = large[1:-2, 2:-1, 1:-2]
        inner.copy_(values)
        return inner
    assert layout == "expanded_batch"
    return values[:1].expand_as(values)


def run(backend: Backend, inputs: tuple[Tensor, ...], cotangent: Tensor, scale: float) -> list[Tensor]:
    """Output and the gradients of query, key and value."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    y = backend.implementation(*leaves, scale)
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent.to(y.dtype))]


def distance(ours: Tensor, exact: Tensor) -> float:
    return (ours.double() - exact).abs().max().item()


def sums_of_sizes(inputs: tuple[Tensor, ...], cotangent: Tensor, scale: float) -> tuple[list[float], float]:
    """The largest sum of absolute terms behind y and each gradient, and the largest logit.

    Rounding errors are relative to these: where terms cancel, the result itself may be as small as zero.
    """
    query, key, value, grad = (tensor.double() for tensor in (*inputs, cotangent))
    logits = scale * query @ key.mT
    weights = logits.softmax(-1)
    grad_weights = grad.abs() @ value.abs().mT
    grad_logits = abs(scale) * weights * (grad_weights + (weights * grad_weights).sum(-1, keepdim=True))
    sums = (
        weights @ value.abs(),
        grad_logits @ key.abs(),
        grad_logits.mT @ query.abs(),
        weights.mT @ grad.abs(),
    )
    return [total.max().item() for total in sums], logits.abs().max().item()


def assert_as_accurate_as_the_reference(
    backend: Backend, inputs: tuple[Tensor, ...], cotangent: Tensor, scale: float
) -> None:
    reference_backend = ATTENTION.backends[-1]
    assert reference_backend.name == "reference"
    ours = run(backend, inputs, cotangent, scale)
    same_dtype = run(reference_backend, inputs, cotangent, scale)
    exact = run(reference_backend, tuple(tensor.double() for tensor in inputs), cotangent.double(), scale)
    unit = torch.finfo(inputs[0].dtype).eps
    sizes, logit = sums_of_sizes(inputs, cotangent, scale)
    if inputs[0].dtype == torch.float64:
        unit *= 2  # what the result is held against was itself computed in float64
    # A logit's own rounding, in the accumulation dtype, is a relative error of the weight.
    unit += logit * torch.finfo(accumulation_dtype(inputs[0].dtype)).eps
    for what, got, plain, wanted, size in zip("yqkv", ours, same_dtype, exact, sizes, strict=True):
        assert got.shape == wanted.shape
        assert got.dtype == inputs[0].dtype
        assert torch.isfinite(got).all(), what
        assert distance(got, wanted) <= 2 * distance(plain, wanted) + 4 * unit * size, what


Case = tuple[int, int, int, int, int, tuple[str, ...], str, float, float, int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch = draw(st.integers(1, 3))
    queries, keys, width, value_width = (draw(st.sampled_from(SIZES)) for _ in range(4))
    layouts = tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(3))
    gradient = draw(st.sampled_from(["scalar", *LAYOUTS]))
    scale = draw(st.sampled_from([1.0, 0.125]))
    spread = draw(st.sampled_from([0.1, 1.0, 4.0]))
    return (
        batch,
        queries,
        keys,
        width,
        value_width,
        layouts,
        gradient,
        scale,
        spread,
        draw(st.integers(0, 999)),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [BACKENDS["sdpa"], BACKENDS["chunked"]], ids=lambda backend: backend.name)
@given(case=cases())
@settings(suppress_health_check=[HealthCheck.filter_too_much])
def test_output_and_gradients_are_as_accurate_as_the_references(
    backend: Backend, dtype: torch.dtype, device: str, case: Case
) -> None:
    check_accuracy(backend, dtype, device, case)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(case=cases())
@settings(max_examples=5, suppress_health_check=[HealthCheck.filter_too_much])  # the interpreter is slow
def test_output_and_gradients_of_triton_are_as_accurate_as_the_references(
    dtype: torch.dtype, device: str, case: Case
) -> None:
    check_accuracy(BACKENDS["triton"], dtype, device, case)


def check_accuracy(backend: Backend, dtype: torch.dtype, device: str, case: Case) -> None:
    batch, queries, keys, width, value_width, layouts, gradient, scale, spread, seed = case
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, queries, width), (batch, keys, width), (batch, keys, value_width))
    inputs = tuple(
        laid_out((torch.randn(shape, generator=generator) * spread).to(dtype).to(device), layout)
        for shape, layout in zip(shapes, layouts, strict=True)
    )
    assume(not backend.unsupported_reasons(AttentionInputs(*inputs)))
    output = (batch, queries, value_width)
    if gradient == "scalar":  # what sum() hands back: one number, expanded
        cotangent = torch.ones((), dtype=dtype, device=device).expand(output)
    else:
        cotangent = laid_out(torch.randn(output, generator=generator).to(dtype).to(device), gradient)
    assert_as_accurate_as_the_reference(backend, inputs, cotangent, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_backend
def test_results_are_within_a_few_roundings_of_float64(backend: Backend, dtype: torch.dtype) -> None:
    inputs = tuple(torch.randn(2, length, width).to(dtype) for length, width in ((37, 5), (23, 5), (23, 11)))
    if reasons := backend.unsupported_reasons(AttentionInputs(*inputs)):
        pytest.skip("; ".join(reasons))
    cotangent = torch.randn(2, 37, 11).to(dtype)
    ours = run(backend, inputs, cotangent, 1.0)
    exact = run(backend, tuple(tensor.double() for tensor in inputs), cotangent.double(), 1.0)
    # Half precision is rounded at the end, and on the way where kernels multiply in it; float32 pays for its sums.
    roundings = 0.5 if backend.name == "reference" else 1.0
    bound = {torch.float64: 0.0, torch.float32: 1e-6}.get(dtype, roundings * torch.finfo(dtype).eps + 1e-6)
    for what, got, wanted in zip("yqkv", ours, exact, strict=True):
        assert distance(got, wanted) <= bound * wanted.abs().max().item(), what


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_backend
def test_logits_of_hundreds_neither_overflow_nor_lose_accuracy(backend: Backend, dtype: torch.dtype) -> None:
    query, key = (torch.randn(2, length, 16).mul(12).to(dtype) for length in (19, 29))
    inputs = (query, key, torch.randn(2, 29, 7).to(dtype))
    if reasons := backend.unsupported_reasons(AttentionInputs(*inputs)):
        pytest.skip("; ".join(reasons))
    logits = query.double() @ key.double().transpose(1, 2)
    assert logits.abs().max() > 1000
    y = backend.implementation(*inputs, 1.0)
    exact = logits.softmax(-1) @ inputs[2].double()
    # A float32 logit of 2000 is known to 1e-4, and the weights with it.
    assert distance(y, exact) <= 1e-3 + torch.finfo(dtype).eps * exact.abs().max().item()
    assert_as_accurate_as_the_reference(backend, inputs, torch.randn(2, 19, 7).to(dtype), 1.0)


@pytest.mark.parametrize("inputs_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
@every_backend
def test_autocast_does_not_lower_the_precision(
    backend: Backend, inputs_dtype: torch.dtype, autocast_dtype: torch.dtype
) -> None:
    query, key = (torch.randn(2, length, 16).mul(12).to(inputs_dtype) for length in (19, 29))
    inputs = (query, key, torch.randn(2, 29, 7).to(inputs_dtype))
    if reasons := backend.unsupported_reasons(AttentionInputs(*inputs)):
        pytest.skip("; ".join(reasons))
    cotangent = torch.randn(2, 19, 7).to(inputs_dtype)
    plain = run(backend, inputs, cotangent, 1.0)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    with torch.autocast("cpu", autocast_dtype):
        y = backend.implementation(*leaves, 1.0)
    under_autocast = [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]
    assert all(torch.equal(*pair) for pair in zip(plain, under_autocast, strict=True))


@every_backend
def test_the_same_input_gives_the_same_bits(backend: Backend) -> None:
    inputs = tuple(torch.randn(2, length, width) for length, width in ((37, 8), (23, 8), (23, 16)))
    if reasons := backend.unsupported_reasons(AttentionInputs(*inputs)):
        pytest.skip("; ".join(reasons))
    cotangent = torch.randn(2, 37, 16)
    first, second = (run(backend, inputs, cotangent, 1.0) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@every_backend
@pytest.mark.parametrize("layout", LAYOUTS[:-1])
def test_gradients_of_first_and_second_order_pass_the_numerical_check(backend: Backend, layout: str) -> None:
    inputs = tuple(
        laid_out(torch.randn(shape, dtype=torch.float64), layout).requires_grad_()
        for shape in ((2, 3, 2), (2, 5, 2), (2, 5, 3))
    )
    # Along one random direction where the interpreter computes: its kernels take a second each.
    fast = backend.name == "triton"
    if reasons := backend.unsupported_reasons(AttentionInputs(*inputs)):
        pytest.skip("; ".join(reasons))

    def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return backend.implementation(query, key, value, 0.7)

    assert torch.autograd.gradcheck(forward, inputs, fast_mode=fast)
    assert torch.autograd.gradgradcheck(forward, inputs, fast_mode=fast)


@every_backend
def test_inputs_are_not_changed(backend: Backend) -> None:
    inputs = tuple(torch.randn(2, length, width) for length, width in ((4, 3), (5, 3), (5, 2)))
    copies = [tensor.clone() for tensor in inputs]
    run(backend, inputs, torch.randn(2, 4, 2), 1.0)
    assert all(torch.equal(*pair) for pair in zip(inputs, copies, strict=True))


def inputs_of(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(1, 4, 3, dtype=dtype),
        torch.randn(1, 5, 3, dtype=dtype),
        torch.randn(1, 5, 2, dtype=dtype),
    )


class Recorder:
    """A backend that refuses some dtypes and remembers what it computed."""

    def __init__(self, name: str, *refused: torch.dtype) -> None:
        self.refused = refused
        self.scales: list[float] = []
        self.backend = Backend(name, self.run, self.unsupported_reasons)

    def unsupported_reasons(self, inputs: AttentionInputs) -> list[str]:
        if inputs.query.dtype in self.refused:
            return [f"{inputs.query.dtype} is not served", "on a rainy day"]
        return []

    def run(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.scales.append(scale)
        return reference.attention(query, key, value, scale)


def test_the_reference_is_the_last_of_the_table_and_refuses_nothing() -> None:
    assert ATTENTION.backends[-1].name == "reference"
    names = [backend.name for backend in ATTENTION.backends]
    assert len(set(names)) == len(names)
    assert "auto" not in names
    for dtype in DTYPES:
        assert ATTENTION.backends[-1].unsupported_reasons(AttentionInputs(*inputs_of(dtype))) == []


@pytest.mark.parametrize("name", ["flash", "", "Reference"])
def test_an_unknown_backend_is_refused_by_name(name: str) -> None:
    for function in (functional.attention, functional.select_backend):
        with pytest.raises(
            ValueError, match=f"backend: expected one of 'auto', .*'reference'.*, got {name!r}"
        ):
            function(*inputs_of(), backend=name)


def test_auto_takes_the_first_backend_without_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    picky = Recorder("picky", torch.float64)
    monkeypatch.setattr(ATTENTION, "backends", (picky.backend, *ATTENTION.backends))
    assert functional.select_backend(*inputs_of()) == "picky"
    assert functional.select_backend(*inputs_of(torch.float64)) == "reference"
    functional.attention(*inputs_of(torch.float64))
    assert picky.scales == []
    functional.attention(*inputs_of(), scale=0.5)
    assert picky.scales == [0.5]


def test_a_named_backend_computes_or_raises_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    picky = Recorder("picky", torch.float64)
    monkeypatch.setattr(ATTENTION, "backends", (picky.backend, *ATTENTION.backends))
    assert functional.select_backend(*inputs_of(), backend="reference") == "reference"
    functional.attention(*inputs_of(), backend="reference")
    assert picky.scales == []
    for function in (functional.attention, functional.select_backend):
        with pytest.raises(
            ValueError,
            match=r"no attention backend serves these inputs "
            r"\(picky: torch.float64 is not served; on a rainy day\)",
        ):
            function(*inputs_of(torch.float64), backend="picky")


def test_when_none_serves_the_reasons_of_all_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    recorders = [Recorder("first", torch.float32), Recorder("second", torch.float32)]
    monkeypatch.setattr(ATTENTION, "backends", tuple(recorder.backend for recorder in recorders))
    reasons = "torch.float32 is not served; on a rainy day"
    with pytest.raises(ValueError, match=rf"\(first: {reasons} \| second: {reasons}\)"):
        functional.attention(*inputs_of())


def test_a_failure_inside_a_backend_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise RuntimeError("the kernel failed")

    failing = replace(Recorder("failing").backend, implementation=fail)
    monkeypatch.setattr(ATTENTION, "backends", (failing, *ATTENTION.backends))
    with pytest.raises(RuntimeError, match="the kernel failed"):
        functional.attention(*inputs_of())


def test_the_module_hands_its_choice_to_the_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    from sagan_layers import SelfAttention2d

    recorder = Recorder("recorder")
    monkeypatch.setattr(ATTENTION, "backends", (*ATTENTION.backends, recorder.backend))
    x = torch.randn(1, 8, 4, 4)
    outputs = []
    for choice in ("auto", "reference", "recorder"):
        torch.manual_seed(0)
        outputs.append(SelfAttention2d(8, gamma_init=1.0, backend=choice)(x))
    assert recorder.scales == [1.0]
    assert all(torch.equal(*pair) for pair in itertools.pairwise(outputs))
