"""Every attention backend of the dispatch table against the reference and float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from accuracy import assert_accurate, distance
from blocks import inside_larger
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sagan_layers import SelfAttention2d, functional
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
    if layout == "inside_larger":
        return inside_larger(values)
    assert layout == "expanded_batch"
    return values[:1].expand_as(values)


def run(backend: Backend, inputs: Sequence[Tensor], grad_y: Tensor, scale: float) -> list[Tensor]:
    """Output and the gradients of query, key and value."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    y = backend.implementation(*leaves, scale)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y.to(y.dtype))]


def sums_of_sizes(inputs: Sequence[Tensor], grad_y: Tensor, scale: float) -> tuple[list[float], float]:
    """The largest sum of absolute terms behind y and each gradient, and the largest logit.

    Rounding errors are relative to these: where terms cancel, the result itself may be as small as zero.
    """
    query, key, value, grad = (tensor.double() for tensor in (*inputs, grad_y))
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
    backend: Backend, inputs: Sequence[Tensor], grad_y: Tensor, scale: float
) -> None:
    reference_backend = ATTENTION.backends[-1]
    assert reference_backend.name == "reference"
    ours = run(backend, inputs, grad_y, scale)
    same_dtype = run(reference_backend, inputs, grad_y, scale)
    exact = run(reference_backend, tuple(tensor.double() for tensor in inputs), grad_y.double(), scale)
    unit = torch.finfo(inputs[0].dtype).eps
    sizes, logit = sums_of_sizes(inputs, grad_y, scale)
    if inputs[0].dtype == torch.float64:
        unit *= 2  # the exact result is computed in float64 too
    # A logit's own rounding, in the accumulation dtype, is a relative error of the weight.
    unit += logit * torch.finfo(accumulation_dtype(inputs[0].dtype)).eps
    assert_accurate("yqkv", ours, same_dtype, exact, [unit * size for size in sizes])


class Case(NamedTuple):
    """What a case is drawn from."""

    sizes: tuple[int, int, int, int, int]  # N, L, S, E, Ev
    layouts: tuple[str, str, str]
    gradient: str
    scale: float
    spread: float
    seed: int


sizes = st.sampled_from(SIZES)
layouts = st.sampled_from(LAYOUTS)
cases = st.builds(
    Case,
    sizes=st.tuples(st.integers(1, 3), sizes, sizes, sizes, sizes),
    layouts=st.tuples(layouts, layouts, layouts),
    gradient=st.sampled_from(["scalar", *LAYOUTS]),
    scale=st.sampled_from([1.0, 0.125]),
    spread=st.sampled_from([0.1, 1.0, 4.0]),
    seed=st.integers(0, 999),
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [BACKENDS["sdpa"], BACKENDS["chunked"]], ids=lambda backend: backend.name)
@given(case=cases)
@settings(suppress_health_check=[HealthCheck.filter_too_much])
def test_output_and_gradients_are_as_accurate_as_the_references(
    backend: Backend, dtype: torch.dtype, device: str, case: Case
) -> None:
    check_accuracy(backend, dtype, device, case)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(case=cases)
@settings(max_examples=5, suppress_health_check=[HealthCheck.filter_too_much])  # the interpreter is slow
def test_output_and_gradients_of_triton_are_as_accurate_as_the_references(
    dtype: torch.dtype, device: str, case: Case
) -> None:
    check_accuracy(BACKENDS["triton"], dtype, device, case)


def check_accuracy(backend: Backend, dtype: torch.dtype, device: str, case: Case) -> None:
    N, L, S, E, EV = case.sizes
    generator = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inputs = tuple(
        laid_out((draw(*shape) * case.spread).to(dtype).to(device), layout)
        for shape, layout in zip(((N, L, E), (N, S, E), (N, S, EV)), case.layouts, strict=True)
    )
    assume(not backend.unsupported_reasons(AttentionInputs(*inputs)))
    if case.gradient == "scalar":  # what sum() hands back: one number, expanded
        grad_y = torch.ones((), dtype=dtype, device=device).expand(N, L, EV)
    else:
        grad_y = laid_out(draw(N, L, EV).to(dtype).to(device), case.gradient)
    assert_as_accurate_as_the_reference(backend, inputs, grad_y, case.scale)


def drawn(
    backend: Backend, L: int, S: int, E: int, EV: int, dtype: torch.dtype, spread: float = 1.0
) -> list[Tensor]:
    """Query, key, value and a gradient of the output; the test is skipped if the backend refuses them."""
    query, key = (torch.randn(2, length, E).mul(spread).to(dtype) for length in (L, S))
    value, grad_y = (torch.randn(2, length, EV).to(dtype) for length in (S, L))
    if reasons := backend.unsupported_reasons(AttentionInputs(query, key, value)):
        pytest.skip("; ".join(reasons))
    return [query, key, value, grad_y]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_backend
def test_results_are_within_a_few_roundings_of_float64(backend: Backend, dtype: torch.dtype) -> None:
    *inputs, grad_y = drawn(backend, 37, 23, 5, 11, dtype)
    ours = run(backend, inputs, grad_y, 1.0)
    exact = run(backend, tuple(tensor.double() for tensor in inputs), grad_y.double(), 1.0)
    # Half precision is rounded at the end, and on the way where kernels multiply in it; float32 pays for its sums.
    roundings = 0.5 if backend.name == "reference" else 1.0
    bound = {torch.float64: 0.0, torch.float32: 1e-6}.get(dtype, roundings * torch.finfo(dtype).eps + 1e-6)
    for what, got, wanted in zip("yqkv", ours, exact, strict=True):
        assert distance(got, wanted) <= bound * wanted.abs().max().item(), what


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_backend
def test_logits_of_hundreds_neither_overflow_nor_lose_accuracy(backend: Backend, dtype: torch.dtype) -> None:
    *inputs, grad_y = drawn(backend, 19, 29, 16, 7, dtype, spread=12)
    query, key, value = inputs
    logits = query.double() @ key.double().transpose(1, 2)
    assert logits.abs().max() > 1000
    y = backend.implementation(*inputs, 1.0)
    exact = logits.softmax(-1) @ value.double()
    # A float32 logit of 2000 is known to 1e-4, and the weights with it.
    assert distance(y, exact) <= 1e-3 + torch.finfo(dtype).eps * exact.abs().max().item()
    assert_as_accurate_as_the_reference(backend, inputs, grad_y, 1.0)


@pytest.mark.parametrize("inputs_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
@every_backend
def test_autocast_does_not_lower_the_precision(
    backend: Backend, inputs_dtype: torch.dtype, autocast_dtype: torch.dtype
) -> None:
    *inputs, grad_y = drawn(backend, 19, 29, 16, 7, inputs_dtype, spread=12)
    plain = run(backend, inputs, grad_y, 1.0)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    with torch.autocast("cpu", autocast_dtype):
        y = backend.implementation(*leaves, 1.0)
    under_autocast = [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]
    assert all(map(torch.equal, plain, under_autocast))


@every_backend
def test_the_same_input_gives_the_same_bits_and_is_not_changed(backend: Backend) -> None:
    *inputs, grad_y = drawn(backend, 37, 23, 8, 16, torch.float32)
    copies = [tensor.clone() for tensor in inputs]
    first, second = (run(backend, inputs, grad_y, 1.0) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, inputs, copies))


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


INPUTS = torch.ones(1, 4, 3), torch.ones(1, 5, 3), torch.ones(1, 5, 2)
REASONS = "torch.float64 is not served; on a rainy day"


def picky(name: str, served: list[str] | None = None) -> Backend:
    """A backend that refuses float64, and notes when it computes."""

    def attention(*inputs: Any) -> Tensor:
        if served is not None:
            served.append(name)
        return reference.attention(*inputs)

    def unsupported_reasons(inputs: AttentionInputs) -> list[str]:
        return REASONS.split("; ") if inputs.query.dtype == torch.float64 else []

    return Backend(name, attention, unsupported_reasons)


def test_the_reference_is_the_last_of_the_table_and_refuses_nothing() -> None:
    assert ATTENTION.backends[-1].name == "reference"
    for dtype in DTYPES:
        inputs = AttentionInputs(*(tensor.to(dtype) for tensor in INPUTS))
        assert ATTENTION.backends[-1].unsupported_reasons(inputs) == []


def test_a_new_backend_is_one_row_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """It serves when it comes first or is named, and raises with every reason when it cannot."""
    served: list[str] = []
    wide = [tensor.double() for tensor in INPUTS]
    monkeypatch.setattr(ATTENTION, "backends", (picky("picky", served), *ATTENTION.backends))
    assert functional.select_backend(*INPUTS) == "picky"
    assert functional.select_backend(*wide) == "reference"
    functional.attention(*wide)
    functional.attention(*INPUTS, backend="reference")
    assert served == []
    functional.attention(*INPUTS)
    SelfAttention2d(8, backend="picky")(torch.randn(1, 8, 4, 4))
    assert served == ["picky", "picky"]
    for function in (functional.attention, functional.select_backend):
        with pytest.raises(
            ValueError, match=rf"no attention backend serves these inputs \(picky: {REASONS}\)"
        ):
            function(*wide, backend="picky")
    monkeypatch.setattr(ATTENTION, "backends", (picky("first"), picky("second")))
    with pytest.raises(ValueError, match=rf"\(first: {REASONS} \| second: {REASONS}\)"):
        functional.attention(*wide)


def test_a_failure_inside_a_backend_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise RuntimeError("the kernel failed")

    monkeypatch.setattr(ATTENTION, "backends", (Backend("failing", fail), *ATTENTION.backends))
    with pytest.raises(RuntimeError, match="the kernel failed"):
        functional.attention(*INPUTS)
