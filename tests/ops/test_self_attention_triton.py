"""The kernels of the whole self-attention block against float64 autograd of its composition."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d

pytest.importorskip("triton")

from sagan_layers.attention import fused_triton as block
from sagan_layers.attention import reference
from sagan_layers.torch_support import accumulation_dtype

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["y", "x", "wq", "wk", "wv", "wo", "bq", "bk", "bv", "bo", "gamma"]

pytestmark = [
    pytest.mark.usefixtures("_unwritten_memory_is_nan"),
    pytest.mark.skipif(
        not block._INTERPRETED and not torch.cuda.is_available(),
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


class Inputs(NamedTuple):
    """What a launcher takes, before pool_size."""

    x: Tensor
    wq: Tensor
    wk: Tensor
    wv: Tensor
    wo: Tensor | None
    bq: Tensor | None
    bk: Tensor | None
    bv: Tensor | None
    bo: Tensor | None
    gamma: Tensor


def device_of_tests() -> str:
    return "cpu" if block._INTERPRETED else "cuda"


def laid_out(values: Tensor, layout: str) -> Tensor:
    """A map of these values in a layout; NaN around it where it is part of a larger one."""
    if layout == "nchw":
        return values.contiguous()
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "expanded":
        return values[:1, :1, :1, :1].expand_as(values)
    large = values.new_full([size + 3 for size in values.shape], torch.nan)
    if layout == "channels_last_slice":
        large = large.contiguous(memory_format=torch.channels_last)
    inner = large[1:-2, 2:-1, 1:-2, 2:-1]
    inner.copy_(values)
    return inner


def inputs_of(
    case: Case, dtype: torch.dtype, layout: str = "nchw", spread: float = 1.0, gamma: float = 0.7
) -> Inputs:
    def weight(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns) * columns**-0.5).to(dtype).to(device_of_tests())

    def bias(size: int, wanted: bool = True) -> Tensor | None:
        return torch.randn(size).to(dtype).to(device_of_tests()) if case.bias and wanted else None

    N, C, E, EV, H, W = case[:6]
    x = (torch.randn(N, C, H, W) * spread).to(dtype).to(device_of_tests())
    return Inputs(
        laid_out(x, layout),
        weight(E, C),
        weight(E, C),
        weight(EV, C),
        weight(C, EV) if case.out else None,
        bias(E),
        bias(E),
        bias(EV),
        bias(C, case.out),
        torch.tensor(gamma, device=device_of_tests()),
    )


def composed(inputs: Inputs, pool: int) -> Tensor:
    def project(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return conv2d(features, weight[:, :, None, None], bias)

    x = inputs.x
    query, key, value = (
        project(x, w, b) for w, b in zip(inputs[1:4], inputs[5:8], strict=True) if w is not None
    )
    if pool > 1:
        key, value = max_pool2d(key, pool), max_pool2d(value, pool)
    query, key, value = (features.flatten(2).transpose(1, 2) for features in (query, key, value))
    gathered = reference.attention(query, key, value, 1.0).transpose(1, 2)
    gathered = gathered.reshape(x.size(0), -1, *x.shape[2:])
    if inputs.wo is not None:
        gathered = project(gathered, inputs.wo, inputs.bo)
    return x - (0.0 - inputs.gamma * gathered).to(x.dtype)


def by_autograd(inputs: Inputs, grad_y: Tensor, pool: int, dtype: torch.dtype) -> list[Tensor | None]:
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in inputs]
    y = composed(Inputs(*leaves), pool)  # type: ignore[arg-type]
    grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], grad_y.to(dtype)))
    return [y.detach(), *(None if t is None else next(grads) for t in leaves)]


def by_kernels(inputs: Inputs, grad_y: Tensor, pool: int) -> list[Tensor | None]:
    reasons = block.unsupported_reasons(*inputs[:5])
    if reasons and not block._INTERPRETED:
        pytest.skip("; ".join(reasons))
    assert reasons == []
    y, *saved = block.forward(*inputs, pool)
    return [y, *block.backward(grad_y, *inputs, *saved, pool)]


def sums_of_sizes(inputs: Inputs, grad_y: Tensor, pool: int) -> tuple[list[float], float]:
    """The largest sum of absolute terms behind y and each gradient, and that behind a logit.

    Rounding errors are relative to these: where terms cancel, the result itself may be as small as zero, as the
    gradient of the keys' bias always is.
    """
    x, wq, wk, wv, wo, bq, bk, bv, bo, gamma = (None if t is None else t.double() for t in inputs)
    assert x is not None
    assert gamma is not None

    def project(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
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
    matrices = [weight.abs() for weight in (wq, wk, wv) if weight is not None]
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


def assert_accurate(inputs: Inputs, grad_y: Tensor, pool: int) -> None:
    dtype = inputs.x.dtype
    ours = by_kernels(inputs, grad_y, pool)
    exact = by_autograd(inputs, grad_y, pool, torch.float64)
    plain = by_autograd(inputs, grad_y, pool, dtype)
    sizes, logit = sums_of_sizes(inputs, grad_y, pool)
    # A logit's own rounding, in the accumulation dtype, is a relative error of the weight.
    unit = torch.finfo(dtype).eps + logit * torch.finfo(accumulation_dtype(dtype)).eps
    for name, got, same, wanted, size in zip(NAMES, ours, plain, exact, sizes, strict=True):
        if wanted is None:
            assert got is None, name
            continue
        assert got is not None, name
        assert same is not None
        assert got.shape == wanted.shape, name
        assert got.dtype == (inputs.gamma.dtype if name == "gamma" else dtype), name
        assert torch.isfinite(got).all(), name
        error, allowed = ((t.double() - wanted).abs().max().item() for t in (got, same))
        limit = 2 * allowed + 4 * unit * size
        assert error <= limit, f"{name}: {error:.3g} > {limit:.3g} (composition {allowed:.3g})"


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
    inputs = inputs_of(case, dtype)
    assert_accurate(inputs, torch.randn(inputs.x.shape).to(inputs.x), case.pool)


@pytest.mark.skipif(not block._INTERPRETED, reason="float64 is for the interpreter")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_equals_autograd(case: Case) -> None:
    inputs = inputs_of(case, torch.float64)._replace(gamma=torch.tensor(0.7, dtype=torch.float64))
    assert_accurate(inputs, torch.randn_like(inputs.x), case.pool)


@pytest.mark.parametrize("layout", ["channels_last", "slice", "channels_last_slice", "expanded"])
@pytest.mark.parametrize("pool", [1, 2])
def test_inputs_are_read_by_their_strides(layout: str, pool: int) -> None:
    case = Case(2, 16, 2, 8, 9, 6, pool)
    inputs = inputs_of(case, torch.float32, layout)
    assert_accurate(inputs, torch.randn(inputs.x.shape).to(inputs.x), pool)
    dense = [block.forward(*inputs._replace(x=inputs.x.contiguous()), pool)[0]]
    assert torch.equal(block.forward(*inputs, pool)[0], dense[0])


@pytest.mark.parametrize("layout", ["channels_last", "slice", "channels_last_slice", "expanded"])
@pytest.mark.parametrize("pool", [1, 2])
def test_output_gradients_are_read_by_their_strides(layout: str, pool: int) -> None:
    case = Case(2, 16, 2, 8, 9, 6, pool)
    inputs = inputs_of(case, torch.float32)
    assert_accurate(inputs, laid_out(torch.randn(inputs.x.shape).to(inputs.x), layout), pool)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_output_and_input_gradient_have_the_inputs_memory_format(layout: str) -> None:
    inputs = inputs_of(CASES[0], torch.float32, layout)
    y, grad_x = by_kernels(inputs, torch.randn(inputs.x.shape).to(inputs.x), 2)[:2]
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
    halves = {name: (tensor * 2).round() / 2 for name, tensor in inputs._asdict().items() if name[0] in "wb"}
    inputs = inputs._replace(x=quantised, **halves)
    features = conv2d(inputs.x, inputs.wk[:, :, None, None], inputs.bk)
    pooled, places = max_pool2d(features.double(), 2, return_indices=True)
    windows = features.double().unfold(2, 2, 2).unfold(3, 2, 2)
    assert ((windows == pooled[..., None, None]).sum((-1, -2)) > 1).any()
    key_argmax = block.forward(*inputs, 2)[6]
    tap = places // case.W % 2 * 2 + places % case.W % 2
    assert torch.equal(key_argmax.long(), tap.flatten(2).transpose(1, 2))
    assert_accurate(inputs, torch.randn(inputs.x.shape).to(inputs.x), 2)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, in the interpreter
def test_a_nan_in_a_window_wins_as_in_torch() -> None:
    inputs = inputs_of(Case(1, 16, 2, 8, 4, 4, 2), torch.float32)
    inputs.x[0, 3, 1, 2] = torch.nan
    _, _, key, value, *_ = block.forward(*inputs, 2)
    for ours, weight, bias in ((key, inputs.wk, inputs.bk), (value, inputs.wv, inputs.bv)):
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
        y = block.forward(*inputs, case.pool)[0]
        bits = torch.int16 if dtype.itemsize == 2 else torch.int32
        assert torch.equal(y.view(bits), inputs.x.view(bits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_thousands_neither_overflow_nor_lose_accuracy(dtype: torch.dtype) -> None:
    case = Case(1, 16, 16, 8, 6, 6, 2)
    inputs = inputs_of(case, dtype, spread=16.0)
    y, query, key, *_ = block.forward(*inputs, 2)
    logits = query.double() @ key.double().transpose(1, 2)
    assert logits.abs().max() > 1000
    exact = composed(Inputs(*(None if t is None else t.double() for t in inputs)), 2)  # type: ignore[arg-type]
    plain = composed(inputs, 2)
    error, allowed = ((t.double() - exact).abs().max().item() for t in (y, plain))
    assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * exact.abs().max().item()


def test_without_saving_only_the_output_keys_and_values_are_written() -> None:
    inputs = inputs_of(CASES[0], torch.float32)
    saved, bare = block.forward(*inputs, 2), block.forward(*inputs, 2, save=False)
    for place in (0, 2, 3):
        assert torch.equal(saved[place], bare[place])
    assert all(bare[place].numel() == 0 for place in (1, 4, 5, 6, 7))


def test_what_is_saved_is_what_it_is_named() -> None:
    case = CASES[0]
    inputs = inputs_of(case, torch.float32)
    _, query, key, _, attended, lse, key_argmax, value_argmax = block.forward(*inputs, 2)
    logits = query.double() @ key.double().transpose(1, 2)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-6, atol=1e-5)
    assert query.shape == (2, 35, case.E)
    assert attended.shape == (2, 35, case.EV)
    assert key_argmax.shape == (2, 6, case.E)
    assert value_argmax.dtype == torch.uint8
    assert value_argmax.max() <= 3


def test_the_same_input_gives_the_same_bits() -> None:
    inputs = inputs_of(Case(3, 16, 2, 8, 9, 6, 2), torch.float32)
    grad_y = torch.randn(inputs.x.shape).to(inputs.x)
    first, second = (by_kernels(inputs, grad_y, 2) for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None
    )


def test_inputs_are_not_changed() -> None:
    inputs = inputs_of(CASES[0], torch.float32)
    copies = [None if t is None else t.clone() for t in inputs]
    by_kernels(inputs, torch.randn(inputs.x.shape).to(inputs.x), 2)
    assert all(
        torch.equal(a, b) for a, b in zip(inputs, copies, strict=True) if a is not None and b is not None
    )


def test_sums_over_positions_are_shared_by_a_bounded_number_of_programs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = inputs_of(Case(5, 24, 3, 12, 9, 9, 2), torch.float32)
    for programs in (1, 3, 1000):  # one program for all, an uneven share, more than there is to do
        monkeypatch.setattr(block, "WEIGHT_GRADIENT_PROGRAMS", programs)
        assert_accurate(inputs, torch.randn(inputs.x.shape).to(inputs.x), 2)


@pytest.mark.parametrize("width_class", block.ATTENTION_TILES)
def test_every_tile_is_right(width_class: int) -> None:
    case = Case(1, width_class + 8, width_class // 4, width_class - 8, 9, 8, 2)
    inputs = inputs_of(case, torch.bfloat16)
    assert block._width_class(case.E, case.EV) == width_class
    assert_accurate(inputs, torch.randn(inputs.x.shape).to(inputs.x), 2)


@pytest.mark.parametrize("even", [True, False])
def test_masks_are_dropped_where_nothing_lies_outside(even: bool) -> None:
    case = Case(1, 64, 16, 64, 16, 16, 2) if even else Case(1, 63, 15, 63, 15, 15, 2)
    inputs = inputs_of(case, torch.float32)
    assert_accurate(inputs, torch.randn(inputs.x.shape).to(inputs.x), 2)


def test_wide_keys_beside_narrow_values_are_served() -> None:
    case = Case(1, 24, 32, 8, 6, 5, 2)
    inputs = inputs_of(case, torch.float32)
    assert_accurate(inputs, torch.randn(inputs.x.shape).to(inputs.x), 2)


# --- refusals -----------------------------------------------------------------------------------------------------


SERVED = Case(2, 16, 8, 8, 7, 5, 2)


def refused(case: Case = SERVED, dtype: torch.dtype = torch.bfloat16, **given: Tensor) -> list[str]:
    return block.unsupported_reasons(*inputs_of(case, dtype)._replace(**given)[:5])


def test_what_cannot_be_served_is_refused_with_the_reason() -> None:
    assert refused() == []
    assert refused(SERVED._replace(C=1032)) == ["C = 1032 is more than 1024"]
    assert refused(SERVED._replace(E=72)) == ["E = 72 is more than 64"]
    assert refused(SERVED._replace(EV=264)) == ["Ev = 264 is more than 256"]
    assert refused(x=inputs_of(SERVED, torch.bfloat16).x[:0]) == ["the input is empty"]
    assert refused(wo=torch.randn(16, 8, device=device_of_tests()).half()) == [
        "input and weights differ in dtype"
    ]
    assert refused(x=torch.randn(2, 16, 7, 5, device=device_of_tests()).to(torch.complex64)) == [
        "serves torch.bfloat16 and torch.float16, got torch.complex64",
        "input and weights differ in dtype",
    ]
    far = torch.empty_strided((1, 16, 7, 5), (1, 2**28, 5, 1), dtype=torch.bfloat16, device="meta")
    assert "a sample spans 2**31 elements or more" in refused(x=far)
    assert "it runs on CUDA devices, the input is on meta" in refused(x=far)


@pytest.mark.parametrize(
    ("change", "dtype"),
    [({}, torch.float32), ({}, torch.float64), *(({name: 9}, torch.float16) for name in ("C", "E", "EV"))],
    ids=str,
)
def test_compiled_kernels_refuse_wide_elements_and_odd_widths(
    change: dict[str, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = SERVED._replace(**change)
    inputs = inputs_of(case, dtype)
    monkeypatch.setattr(block, "_INTERPRETED", False)
    widths = f"serves widths that are multiples of 8, got C = {case.C}, E = {case.E}, Ev = {case.EV}"
    wanted = widths if change else f"serves torch.bfloat16 and torch.float16, got {dtype}"
    assert wanted in block.unsupported_reasons(*inputs[:5])


def test_compiled_kernels_without_output_projection_refuse_masked_widths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = [inputs_of(Case(1, C, 8, C, 4, 4, 2, out=False), torch.float16)[:5] for C in (24, 32)]
    monkeypatch.setattr(block, "_INTERPRETED", False)
    reason = "without an output projection serves powers of two from 16 as Ev, got 24"
    assert reason in block.unsupported_reasons(*inputs[0])
    assert not any("projection" in reason for reason in block.unsupported_reasons(*inputs[1]))


def test_float32_products_are_as_torch_has_been_told() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert block._float32_precision() == "tf32x3"
        torch.set_float32_matmul_precision("high")
        assert block._float32_precision() == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


def test_every_tile_and_kernel_is_among_what_is_compiled_ahead_of_time() -> None:
    jobs = list(block.compile_jobs())
    labels = [label for *_, label in jobs]
    assert len(set(labels)) == len(labels)
    tiles = {tile for *_, tile, _ in jobs}
    for table in (
        block.PROJECTION_TILES,
        block.ATTENTION_TILES,
        block.INPUT_GRADIENT_TILES,
        block.WEIGHT_GRADIENT_TILES,
    ):
        assert tiles >= set(table.values())
    for kernel, signature, constexprs, tile, _ in jobs:
        assert list(signature) == list(kernel.arg_names)
        assert {name for name, kind in signature.items() if kind == "constexpr"} == set(constexprs)
        assert dataclasses.is_dataclass(tile)


# --- real sizes ---------------------------------------------------------------------------------------------------


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
    if reasons := block.unsupported_reasons(*inputs[:5]):
        pytest.skip("; ".join(reasons))
    grad_y = laid_out(torch.randn(inputs.x.shape).to(inputs.x), layout)
    assert_accurate(inputs, grad_y, case.pool)
