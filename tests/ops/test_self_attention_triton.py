"""The kernels of the whole self-attention block against float64 autograd of its composition."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from accuracy import assert_accurate
from blocks import inside_larger
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d

pytest.importorskip("triton")

from sagan_layers import functional, triton_support
from sagan_layers.attention import fused_triton_launch as launch
from sagan_layers.attention import reference
from sagan_layers.attention.fused import Saved
from sagan_layers.attention.reference import ProjectionWeights, SelfAttentionInputs
from sagan_layers.torch_support import accumulation_dtype

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["y", "x", "wq", "wk", "wv", "wo", "bq", "bk", "bv", "bo", "gamma"]

pytestmark = [
    pytest.mark.usefixtures("_unwritten_memory_is_nan"),
    pytest.mark.skipif(
        not triton_support.INTERPRETED and not torch.cuda.is_available(),
        reason="needs TRITON_INTERPRET=1 or a CUDA device",
    ),
]


class Case(NamedTuple):
    """Sizes of a block."""

    N: int
    C: int
    E: int
    EV: int
    H: int
    W: int
    pool: int
    out: bool = True
    bias: bool = True


DEVICE = "cpu" if triton_support.INTERPRETED else "cuda"


def laid_out(values: Tensor, layout: str) -> Tensor:
    """A map of these values in a layout; NaN around it where it is part of a larger one."""
    if layout == "nchw":
        return values.contiguous()
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "expanded":
        return values[:1, :1, :1, :1].expand_as(values)
    return inside_larger(
        values, torch.channels_last if layout == "channels_last_slice" else torch.contiguous_format
    )


def inputs_of(
    case: Case, dtype: torch.dtype, layout: str = "nchw", spread: float = 1.0, gamma: float = 0.7
) -> SelfAttentionInputs:
    def weight(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns) * columns**-0.5).to(dtype).to(DEVICE)

    def bias(size: int, wanted: bool = True) -> Tensor | None:
        return torch.randn(size).to(dtype).to(DEVICE) if case.bias and wanted else None

    N, C, E, EV, H, W = case[:6]
    x = (torch.randn(N, C, H, W) * spread).to(dtype).to(DEVICE)
    weights = ProjectionWeights(
        *(weight(E, C), weight(E, C), weight(EV, C), weight(C, EV) if case.out else None),
        *(bias(E), bias(E), bias(EV), bias(C, case.out)),
    )
    return SelfAttentionInputs(laid_out(x, layout), weights, torch.tensor(gamma, device=DEVICE), case.pool)


def gradient_for(inputs: SelfAttentionInputs, layout: str = "nchw") -> Tensor:
    return laid_out(torch.randn(inputs.x.shape).to(inputs.x), layout)


def tensors_of(inputs: SelfAttentionInputs) -> list[Tensor | None]:
    """In the order of NAMES, without y."""
    return [inputs.x, *inputs.projections, inputs.gamma]


def with_tensors(inputs: SelfAttentionInputs, tensors: list[Tensor | None]) -> SelfAttentionInputs:
    x, *weights, gamma = tensors
    return SelfAttentionInputs(x, ProjectionWeights(*weights), gamma, inputs.pool_size)


def in_float64(inputs: SelfAttentionInputs) -> SelfAttentionInputs:
    return with_tensors(inputs, [None if t is None else t.double() for t in tensors_of(inputs)])


def composed(inputs: SelfAttentionInputs) -> Tensor:
    return reference.self_attention_2d(inputs, lambda *tensors: reference.attention(*tensors, 1.0))


def forward(inputs: SelfAttentionInputs, save: bool = True) -> tuple[Tensor, Saved]:
    return launch.forward(inputs, save)


def by_autograd(inputs: SelfAttentionInputs, grad_y: Tensor) -> list[Tensor | None]:
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors_of(inputs)]
    y = composed(with_tensors(inputs, leaves))
    grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], grad_y.to(y.dtype)))
    return [y.detach(), *(None if t is None else next(grads) for t in leaves)]


def by_kernels(inputs: SelfAttentionInputs, grad_y: Tensor) -> list[Tensor | None]:
    reasons = launch.unsupported_reasons(inputs.x, inputs.projections)
    if reasons and not triton_support.INTERPRETED:
        pytest.skip("; ".join(reasons))
    assert reasons == []
    y, saved = forward(inputs)
    return [y, *launch.backward(inputs, saved, grad_y)]


def sums_of_sizes(inputs: SelfAttentionInputs, grad_y: Tensor) -> tuple[list[float], float]:
    """The largest sum of absolute terms behind y and each gradient, and that behind a logit.

    Rounding errors are relative to these: where terms cancel, the result itself may be as small as zero, as the
    gradient of the keys' bias always is.
    """
    x, (wq, wk, wv, wo, bq, bk, bv, bo), gamma, pool = in_float64(inputs)

    def project(weight: Tensor, bias: Tensor | None) -> Tensor:
        return conv2d(x, weight[:, :, None, None], bias).requires_grad_()

    maps = [project(wq, bq), project(wk, bk), project(wv, bv)]
    pooled = [maps[0], *(max_pool2d(features, pool) for features in maps[1:])]
    query, key, value = (features.detach().flatten(2).mT for features in pooled)
    weights = (query @ key.mT).softmax(-1)
    size_of_g = grad_y.double().abs().flatten(2).mT
    attended = weights @ value.abs()
    gathered, grad_attended = attended, gamma.abs() * size_of_g
    if wo is not None:
        gathered = attended @ wo.abs().mT + (0.0 if bo is None else bo.abs())
        grad_attended = grad_attended @ wo.abs()
    dp = grad_attended @ value.abs().mT
    ds = weights * (dp + (weights * dp).sum(-1, keepdim=True))
    of_pooled = (ds @ key.abs(), ds.mT @ query.abs(), weights.mT @ grad_attended)
    of_maps = [
        torch.autograd.grad(after, before, sizes.mT.reshape(after.shape))[0].flatten(2).mT
        if after is not before
        else sizes
        for after, before, sizes in zip(pooled, maps, of_pooled, strict=True)
    ]
    size_of_x = x.abs().flatten(2).mT
    matrices = [weight.abs() for weight in (wq, wk, wv)]
    sums = [
        size_of_x + gamma.abs() * gathered,
        size_of_g + sum(sizes @ weight for sizes, weight in zip(of_maps, matrices, strict=True)),
        *((sizes.mT @ size_of_x).sum(0) for sizes in of_maps),
        gamma.abs() * (size_of_g.mT @ attended).sum(0),
        *(sizes.sum((0, 1)) for sizes in of_maps),
        gamma.abs() * size_of_g.sum((0, 1)),
        (size_of_g * gathered).sum(),
    ]
    return [total.max().item() for total in sums], (query.abs() @ key.abs().mT).max().item()


def assert_as_accurate(inputs: SelfAttentionInputs, grad_y: Tensor | None = None) -> None:
    dtype = inputs.x.dtype
    grad_y = gradient_for(inputs) if grad_y is None else grad_y
    ours, plain = by_kernels(inputs, grad_y), by_autograd(inputs, grad_y)
    exact = by_autograd(in_float64(inputs), grad_y)
    sizes, logit = sums_of_sizes(inputs, grad_y)
    # A logit's own rounding, in the accumulation dtype, is a relative error of the weight.
    unit = torch.finfo(dtype).eps + logit * torch.finfo(accumulation_dtype(dtype)).eps
    assert_accurate(NAMES, ours, plain, exact, [unit * size for size in sizes])


CASES = [
    Case(2, 16, 2, 8, 7, 5, 2),
    Case(1, 24, 3, 24, 9, 6, 1, out=False),
    Case(3, 8, 1, 4, 5, 5, 2, bias=False),
    Case(1, 38, 9, 19, 8, 7, 2),
    Case(2, 32, 16, 32, 6, 10, 2, out=False, bias=False),
    Case(1, 20, 5, 10, 1, 13, 1),
    Case(1, 20, 5, 10, 13, 1, 1, bias=False),
    Case(1, 3, 1, 1, 2, 3, 2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_are_as_accurate_as_the_composition(case: Case, dtype: torch.dtype) -> None:
    assert_as_accurate(inputs_of(case, dtype))


@pytest.mark.skipif(not triton_support.INTERPRETED, reason="float64 is for the interpreter")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_equals_autograd(case: Case) -> None:
    assert_as_accurate(in_float64(inputs_of(case, torch.float64)))


@pytest.mark.parametrize("layout", ["channels_last", "slice", "channels_last_slice", "expanded"])
@pytest.mark.parametrize("pool", [1, 2])
def test_inputs_and_output_gradients_are_read_by_their_strides(layout: str, pool: int) -> None:
    inputs = inputs_of(Case(2, 16, 2, 8, 9, 6, pool), torch.float32, layout)
    assert_as_accurate(inputs)
    dense = inputs._replace(x=inputs.x.contiguous())
    assert torch.equal(forward(inputs)[0], forward(dense)[0])
    assert_as_accurate(dense, gradient_for(inputs, layout))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_output_and_input_gradient_have_the_inputs_memory_format(layout: str) -> None:
    inputs = inputs_of(CASES[0], torch.float32, layout)
    y, grad_x = by_kernels(inputs, gradient_for(inputs))[:2]
    for tensor in (y, grad_x):
        assert tensor is not None
        assert tensor.stride() == inputs.x.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", ["constant", "quantised"])
def test_ties_in_the_pool_route_gradients_as_torch_does(values: str, dtype: torch.dtype) -> None:
    case = Case(2, 8, 2, 4, 7, 6, 2)
    inputs = inputs_of(case, dtype)
    quantised = torch.zeros_like(inputs.x) + 0.5 if values == "constant" else inputs.x.round().clamp(-1, 1)
    # Sums of halves are exact in any order.
    halves = [(tensor * 2).round() / 2 for tensor in inputs.projections]
    inputs = with_tensors(inputs, [quantised, *halves, inputs.gamma])
    weights = inputs.projections
    features = conv2d(inputs.x, weights.key[:, :, None, None], weights.key_bias)
    pooled, places = max_pool2d(features.double(), 2, return_indices=True)
    windows = features.double().unfold(2, 2, 2).unfold(3, 2, 2)
    assert ((windows == pooled[..., None, None]).sum((-1, -2)) > 1).any()
    key_argmax = forward(inputs)[1].key_argmax
    tap = places // case.W % 2 * 2 + places % case.W % 2
    assert torch.equal(key_argmax.long(), tap.flatten(2).transpose(1, 2))
    assert_as_accurate(inputs)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, in the interpreter
def test_a_nan_in_a_window_wins_as_in_torch() -> None:
    inputs = inputs_of(Case(1, 16, 2, 8, 4, 4, 2), torch.float32)
    inputs.x[0, 3, 1, 2] = torch.nan
    weights, saved = inputs.projections, forward(inputs)[1]
    for ours, weight, bias in (
        (saved.key, weights.key, weights.key_bias),
        (saved.value, weights.value, weights.value_bias),
    ):
        wanted = max_pool2d(conv2d(inputs.x, weight[:, :, None, None], bias), 2).flatten(2).transpose(1, 2)
        assert torch.equal(ours.isnan(), wanted.isnan())
        assert ours.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[1]], ids=str)
def test_at_gamma_zero_the_output_is_the_input_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    for gamma in (0.0, -0.0):
        inputs = inputs_of(case, dtype, gamma=gamma)
        inputs.x[:, ::3] = -0.0
        inputs.x[:, 1::3] = 0.0
        y = forward(inputs)[0]
        bits = torch.int16 if dtype.itemsize == 2 else torch.int32
        assert torch.equal(y.view(bits), inputs.x.view(bits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_thousands_neither_overflow_nor_lose_accuracy(dtype: torch.dtype) -> None:
    case = Case(1, 16, 16, 8, 6, 6, 2)
    inputs = inputs_of(case, dtype, spread=16.0)
    y, saved = forward(inputs)
    assert (saved.query.double() @ saved.key.double().mT).abs().max() > 1000
    exact, plain = composed(in_float64(inputs)), composed(inputs)
    assert_accurate("y", [y], [plain], [exact], [torch.finfo(dtype).eps * exact.abs().max().item()])


def test_without_saving_only_the_output_keys_and_values_are_written() -> None:
    inputs = inputs_of(CASES[0], torch.float32)
    (y, saved), (bare_y, bare) = forward(inputs), forward(inputs, save=False)
    assert torch.equal(y, bare_y)
    for name, tensor in bare._asdict().items():
        if name in ("key", "value"):
            assert torch.equal(tensor, getattr(saved, name))
        else:
            assert tensor.numel() == 0


def test_what_is_saved_is_what_it_is_named() -> None:
    case = CASES[0]
    inputs = inputs_of(case, torch.float32)
    _, saved = forward(inputs)
    logits = saved.query.double() @ saved.key.double().mT
    torch.testing.assert_close(saved.lse.double(), logits.logsumexp(-1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(saved.attended, logits.softmax(-1).float() @ saved.value)
    assert saved.query.shape == (2, 35, case.E)
    assert saved.key_argmax.shape == (2, 6, case.E)
    assert saved.value_argmax.dtype == torch.uint8
    assert saved.value_argmax.max() <= 3


def test_the_same_input_gives_the_same_bits_and_is_not_changed() -> None:
    inputs = inputs_of(Case(3, 16, 2, 8, 9, 6, 2), torch.float32)
    copies = [tensor.clone() for tensor in tensors_of(inputs)]
    grad_y = gradient_for(inputs)
    assert all(map(torch.equal, by_kernels(inputs, grad_y), by_kernels(inputs, grad_y)))
    assert all(map(torch.equal, tensors_of(inputs), copies))


def test_sums_over_positions_are_shared_by_a_bounded_number_of_programs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = inputs_of(Case(5, 24, 3, 12, 9, 9, 2), torch.float32)
    for programs in (1, 3, 1000):  # one program for all, an uneven share, more than there is to do
        monkeypatch.setattr(launch, "WEIGHT_GRADIENT_PROGRAMS", programs)
        assert_as_accurate(inputs)


@pytest.mark.parametrize("width_class", launch.ATTENTION_TILES)
def test_every_tile_is_right(width_class: int) -> None:
    case = Case(1, width_class + 8, width_class // 4, width_class - 8, 9, 8, 2)
    assert_as_accurate(inputs_of(case, torch.bfloat16))


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 64, 16, 64, 16, 16, 2),  # where nothing lies outside, masks are dropped
        Case(1, 63, 15, 63, 15, 15, 2),
        Case(1, 24, 32, 8, 6, 5, 2),  # wide keys, narrow values
    ],
    ids=str,
)
def test_masks_do_not_matter(case: Case) -> None:
    assert_as_accurate(inputs_of(case, torch.float32))


SERVED = Case(2, 16, 8, 8, 7, 5, 2)


def refusals(case: Case = SERVED, dtype: torch.dtype = torch.bfloat16, **changes: Tensor) -> list[str]:
    inputs = inputs_of(case, dtype)._replace(**changes)
    return launch.unsupported_reasons(inputs.x, inputs.projections)


def test_what_cannot_be_served_is_refused_with_the_reason() -> None:
    assert refusals() == []
    assert refusals(SERVED._replace(C=1032)) == ["C = 1032 is more than 1024"]
    assert refusals(SERVED._replace(E=72)) == ["E = 72 is more than 64"]
    assert refusals(SERVED._replace(EV=264)) == ["Ev = 264 is more than 256"]
    assert refusals(x=inputs_of(SERVED, torch.bfloat16).x[:0]) == ["the input is empty"]
    far = torch.empty_strided((1, 16, 7, 5), (1, 2**28, 5, 1), dtype=torch.bfloat16, device="meta")
    assert refusals(x=far) == [f"a sample spans {triton_support.MAX_SAMPLE_SPAN} elements or more"]


def test_another_device_is_refused() -> None:
    x, *weights, gamma = (tensor.to("meta") for tensor in tensors_of(inputs_of(SERVED, torch.float32)))
    said = functional.explain_backends(x, *weights[:4], gamma, operation="self_attention_2d")["fused"]
    assert "its kernels run on CUDA, and the tensors are on meta" in said


@pytest.mark.parametrize(
    ("change", "dtype", "reason"),
    [
        ({}, torch.float32, "serves torch.bfloat16, torch.float16, got torch.float32"),
        ({"C": 9}, torch.float16, "serves widths that are multiples of 8, got C = 9, E = 8, Ev = 8"),
        ({"E": 9}, torch.float16, "serves widths that are multiples of 8, got C = 16, E = 9, Ev = 8"),
        ({"EV": 9}, torch.float16, "serves widths that are multiples of 8, got C = 16, E = 8, Ev = 9"),
        (
            {"C": 24, "EV": 24, "out": False},
            torch.float16,
            "without an output projection serves powers of two from 16 as Ev, got 24",
        ),
        ({"C": 32, "EV": 32, "out": False}, torch.float16, None),
    ],
    ids=str,
)
def test_compiled_kernels_refuse_wide_elements_and_odd_widths(
    change: dict[str, int], dtype: torch.dtype, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_support, "INTERPRETED", False)
    assert refusals(SERVED._replace(**change), dtype) == ([] if reason is None else [reason])


def test_every_tile_and_kernel_is_among_what_is_compiled_ahead_of_time() -> None:
    jobs = list(launch.compile_jobs())
    assert len({job.label for job in jobs}) == len(jobs)
    for table in (
        launch.PROJECTION_TILES,
        launch.ATTENTION_TILES,
        launch.UNPROJECTED_ATTENTION_TILES,
        launch.INPUT_GRADIENT_TILES,
        launch.WEIGHT_GRADIENT_TILES,
    ):
        assert {job.tile for job in jobs} >= set(table.values())
    for job in jobs:
        assert list(job.signature) == list(job.kernel.arg_names)
        constants = {name for name, kind in job.signature.items() if kind == "constexpr"}
        assert constants == set(job.constexprs)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(8, 64, 8, 32, 64, 64, 2, bias=False),
        Case(4, 128, 16, 64, 32, 32, 2, bias=False),
        Case(4, 256, 32, 128, 32, 32, 2, bias=False),
        Case(4, 512, 64, 256, 16, 16, 2),
        Case(4, 256, 32, 256, 31, 33, 1, out=False),
        Case(70000, 16, 2, 8, 2, 2, 2),
    ],
    ids=str,
)
def test_real_sizes_are_as_accurate_as_the_composition(case: Case, dtype: torch.dtype, layout: str) -> None:
    inputs = inputs_of(case, dtype, layout)
    assert_as_accurate(inputs, gradient_for(inputs, layout))
