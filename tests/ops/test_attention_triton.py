"""The Triton attention kernels: what is specific to them, in Triton's interpreter and on a GPU.

``test_attention_backends.py`` compares every backend, this one too, with the reference.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from accuracy import assert_accurate, distance
from test_attention_backends import LAYOUTS, laid_out, sums_of_sizes
from torch import Tensor

pytest.importorskip("triton")

from sagan_layers import functional, triton_support
from sagan_layers.attention import reference, triton_launch
from sagan_layers.attention.autograd import BackwardInputs, GradGrads
from sagan_layers.attention.reference import AttentionInputs
from sagan_layers.torch_support import accumulation_dtype

pytestmark = pytest.mark.usefixtures("_unwritten_memory_is_nan")

interpreted = pytest.mark.skipif(
    not triton_support.INTERPRETED, reason="the kernels are compiled: see the gpu tests"
)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAMES = (
    *("y", "grad_query", "grad_key", "grad_value"),
    *("second-order query", "second-order key", "second-order value", "grad_grad_y"),
)
# Batch, L, S, E, Ev.
SIZES = [
    (1, 1, 1, 1, 1),
    (2, 1, 17, 3, 5),
    (2, 19, 1, 8, 32),
    (1, 67, 35, 7, 31),
    (1, 64, 64, 16, 64),
]


class Case(NamedTuple):
    """The arguments of the three launchers."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_y: Tensor
    grad_grad_query: Tensor
    grad_grad_key: Tensor
    grad_grad_value: Tensor


def case_of(
    sizes: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    *,
    layout: str = "contiguous",
    spread: float = 1.0,
    device: str = "cpu",
) -> Case:
    N, L, S, E, EV = sizes
    queries, keys, values, outputs = (N, L, E), (N, S, E), (N, S, EV), (N, L, EV)

    def random(shape: tuple[int, ...], factor: float = 1.0) -> Tensor:
        return laid_out((torch.randn(shape) * factor).to(dtype).to(device), layout)

    return Case(
        random(queries, spread),
        random(keys, spread),
        random(values),
        *(random(shape) for shape in (outputs, queries, keys, values)),
    )


def run(case: Case, scale: float) -> list[Tensor]:
    """Everything the three launchers return but lse."""
    y, lse = triton_launch.forward(case.query, case.key, case.value, scale)
    inputs = BackwardInputs(case.query, case.key, case.value, y, lse, case.grad_y, scale)
    return [
        y,
        *triton_launch.backward(inputs),
        *triton_launch.double_backward(inputs, GradGrads(*case[4:])),
    ]


def run_reference(case: Case, scale: float, dtype: torch.dtype) -> list[Tensor]:
    """The same by autograd through the reference."""
    *leaves, grad_y = (tensor.to(dtype).detach().requires_grad_() for tensor in case[:4])
    y = reference.attention(*leaves, scale)
    gradients = torch.autograd.grad(y, leaves, grad_y, create_graph=True)
    grad_grads = [tensor.to(dtype) for tensor in case[4:]]
    seconds = torch.autograd.grad(gradients, [*leaves, grad_y], grad_grads)
    return [tensor.detach() for tensor in (y, *gradients, *seconds)]


def sums_of_all_sizes(case: Case, scale: float) -> tuple[list[float], float]:
    """The largest sum of absolute terms behind each result (see ``sums_of_sizes``), and the largest logit."""
    firsts, logit = sums_of_sizes(case[:3], case.grad_y, scale)
    weights = (scale * case.query.double() @ case.key.double().mT).softmax(-1)
    query, key, value, grad_y, grad_grad_query, grad_grad_key, grad_grad_value = (
        tensor.double().abs() for tensor in case
    )

    def centred(sizes: Tensor) -> Tensor:
        return sizes + (weights * sizes).sum(-1, keepdim=True)

    dp = centred(grad_y @ value.mT)
    change = centred(abs(scale) * (grad_grad_query @ key.mT + query @ grad_grad_key.mT))
    ds = abs(scale) * weights * dp
    ds2 = abs(scale) * weights * centred(dp * change + grad_y @ grad_grad_value.mT)
    seconds = (
        ds2 @ key + ds @ grad_grad_key,
        ds2.mT @ query + ds.mT @ grad_grad_query,
        (weights * change).mT @ grad_y,
        (weights * change) @ value + weights @ grad_grad_value,
    )
    return [*firsts, *(total.max().item() for total in seconds)], logit


def assert_as_accurate_as_the_reference(case: Case, scale: float = 1.0) -> None:
    dtype = case.query.dtype
    assert triton_launch.unsupported_reasons(AttentionInputs(*case[:3])) == []
    ours = run(case, scale)
    exact = run_reference(case, scale, torch.float64)
    same_dtype = run_reference(case, scale, dtype)
    sizes, logit = sums_of_all_sizes(case, scale)
    # A logit's own rounding, in the accumulation dtype, is a relative error of the weight.
    unit = torch.finfo(dtype).eps + logit * torch.finfo(accumulation_dtype(dtype)).eps
    assert_accurate(NAMES, ours, same_dtype, exact, [unit * size for size in sizes])
    assert all(result.is_contiguous() for result in ours)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_result_is_as_accurate_as_the_references(
    sizes: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    assert_as_accurate_as_the_reference(case_of(sizes, dtype), 0.7)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_any_strides_are_read_and_nothing_beyond_the_ends(layout: str, dtype: torch.dtype) -> None:
    case = case_of((2, 7, 19, 5, 11), dtype, layout=layout)
    assert_same_bits(run(case, 0.7), run(contiguous(case), 0.7))


def assert_same_bits(first: list[Tensor], second: list[Tensor]) -> None:
    assert all(torch.isfinite(result).all() for result in first)
    assert all(map(torch.equal, first, second))


def contiguous(case: Case) -> Case:
    return Case(*(tensor.contiguous() for tensor in case))


@interpreted
def test_an_expanded_gradient_is_read() -> None:
    case = case_of((2, 7, 19, 5, 11), torch.float32)
    case = case._replace(
        grad_y=torch.ones(()).expand(2, 7, 11), grad_grad_value=torch.ones(()).expand(2, 19, 11)
    )
    assert_as_accurate_as_the_reference(case)


@interpreted
@pytest.mark.parametrize(
    ("widths", "dtype"),
    [(widths, dtype) for dtype in DTYPES[1:] for widths in triton_launch.widths_of(dtype)],
    ids=str,
)
def test_every_tile_of_the_table_computes_the_same(widths: tuple[int, int], dtype: torch.dtype) -> None:
    E, EV = widths
    # More than a block long, where the interpreter's patience allows.
    length = 67 if dtype == torch.bfloat16 and EV <= 64 else 35
    assert_as_accurate_as_the_reference(case_of((1, length, length, E - 3, EV - 1), dtype, spread=E**-0.25))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_chunk_of_the_widest_values_is_written(dtype: torch.dtype) -> None:
    E, EV = triton_launch.widths_of(dtype)[-1]
    query, key, value, *_ = case_of((1, 5, 67, E, EV), dtype, spread=E**-0.25)
    y, _ = triton_launch.forward(query, key, value, 1.0)
    exact = reference.attention(query.double(), key.double(), value.double(), 1.0)
    (size, *_), _ = sums_of_sizes((query, key, value), torch.zeros_like(y), 1.0)
    assert distance(y, exact) <= 4 * torch.finfo(dtype).eps * size


def test_every_tile_of_the_table_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = set()

    class Table(dict[tuple[str, int, int], triton_launch.Tile]):
        def __getitem__(self, key: tuple[str, int, int]) -> triton_launch.Tile:
            taken.add(key)
            return super().__getitem__(key)

    monkeypatch.setattr(triton_launch, "TILES", Table(triton_launch.TILES))
    for kernel in triton_launch.KERNELS:
        for dtype in DTYPES:
            for widths in triton_launch.widths_of(dtype):
                assert list(triton_launch.launches(kernel, dtype, widths, "tf32x3"))
    assert taken == set(triton_launch.TILES)


@interpreted
@pytest.mark.parametrize("scale", [0.0, -0.3, 2.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_any_scale_will_do(dtype: torch.dtype, scale: float) -> None:
    assert_as_accurate_as_the_reference(case_of((1, 19, 23, 5, 11), dtype), scale)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [4.0, 40.0])
def test_saturated_rows_are_as_accurate_as_the_references(dtype: torch.dtype, spread: float) -> None:
    case = case_of((1, 19, 37, 16, 7), dtype, spread=spread)
    logits = case.query.double() @ case.key.double().transpose(1, 2)
    assert logits.abs().max() > 3 * spread**2
    assert_as_accurate_as_the_reference(case)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rows_whose_logits_are_all_far_from_zero_stay_finite(dtype: torch.dtype, sign: float) -> None:
    case = case_of((1, 19, 29, 8, 5), dtype)
    far = torch.full((1, 29, 8), sign * 50.0, dtype=dtype) + case.key
    case = case._replace(query=torch.full_like(case.query, 9.0) + case.query, key=far)
    assert (case.query.double() @ far.double().transpose(1, 2) * sign).min() > 2000
    assert all(torch.isfinite(tensor).all() for tensor in run(case, 1.0))
    assert_as_accurate_as_the_reference(case)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lse_is_the_logarithm_of_the_denominators(dtype: torch.dtype) -> None:
    case = case_of((2, 23, 37, 5, 11), dtype)
    _, lse = triton_launch.forward(case.query, case.key, case.value, 0.7)
    assert lse.dtype == accumulation_dtype(dtype)
    exact = torch.logsumexp(0.7 * case.query.double() @ case.key.double().transpose(1, 2), -1)
    assert distance(lse, exact) <= 1e-5


@interpreted
def test_float16_gradients_beyond_its_range_do_not_overflow_on_the_way() -> None:
    case = case_of((1, 23, 37, 8, 32), torch.float16)
    # As under a loss scale: dS reaches 1e5, results do not.
    case = case._replace(
        key=case.key * 0.01, grad_y=case.grad_y * 16000, grad_grad_value=case.grad_grad_value * 0.01
    )
    dp = case.grad_y.double() @ case.value.double().transpose(1, 2)
    assert dp.abs().max() > 65504
    y, lse = triton_launch.forward(case.query, case.key, case.value, 1.0)
    inputs = BackwardInputs(case.query, case.key, case.value, y, lse, case.grad_y, 1.0)
    got, *_ = triton_launch.backward(inputs)
    exact, plain = (run_reference(case, 1.0, dtype)[1] for dtype in (torch.float64, torch.float16))
    assert torch.isfinite(got).all()
    assert distance(got, exact) <= 2 * distance(plain, exact) + 4e-3 * exact.abs().max()


@interpreted
def test_the_fused_exponent_of_compiled_kernels_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "INTERPRETED", False)
    assert_as_accurate_as_the_reference(case_of((1, 19, 19, 8, 32), torch.float32))


@interpreted
@pytest.mark.parametrize(("setting", "precision"), [("highest", "tf32x3"), ("high", "tf32")])
def test_float32_is_multiplied_as_tf32_where_torch_allows_it(setting: str, precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        assert triton_support.float32_precision() == precision
        assert_as_accurate_as_the_reference(case_of((1, 7, 19, 5, 11), torch.float32))
    finally:
        torch.set_float32_matmul_precision(before)


@interpreted
def test_offsets_beyond_32_bits_are_copied_away(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of((2, 7, 19, 5, 11), torch.float32, layout="channels_first")
    assert not case.query.is_contiguous()
    before = run(case, 1.0)
    copied = []
    contiguous = Tensor.contiguous
    monkeypatch.setattr(triton_launch, "_MAX_OFFSET", 0)
    monkeypatch.setattr(Tensor, "contiguous", lambda tensor: copied.append(tensor) or contiguous(tensor))
    assert_same_bits(before, run(case, 1.0))
    assert any(tensor is case.query for tensor in copied)


def refusal(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> str:
    """What explain_backends says of the kernels for expanded query, key and value of these shapes."""
    tensors = [torch.zeros(1, dtype=dtype, device=device).expand(shape) for shape in shapes]
    return functional.explain_backends(*tensors)["triton"]


def test_another_device_is_refused() -> None:
    reason = "its kernels run on CUDA, and the tensors are on meta"
    assert reason in refusal((1, 4, 3), (1, 4, 3), (1, 4, 2), device="meta")


@interpreted
@pytest.mark.parametrize(
    ("dtype", "E", "EV"), [(torch.bfloat16, 64, 256), (torch.float16, 32, 128), (torch.float32, 32, 128)]
)
def test_widths_beyond_the_table_are_refused_by_name(dtype: torch.dtype, E: int, EV: int) -> None:
    said = refusal((1, 4, E + 1), (1, 4, E + 1), (1, 4, EV + 1), dtype=dtype)
    assert f"serves E up to {E} in {dtype}, got {E + 1}" in said
    assert f"serves Ev up to {EV} in {dtype}, got {EV + 1}" in said


@interpreted
def test_samples_beyond_32_bits_are_refused() -> None:
    said = refusal((1, 2**25, 64), (1, 3, 64), (1, 3, 64))
    assert f"serves samples of less than 2**31 numbers, got {2**25} x 64" in said


GPU_SIZES = [
    (2, 1024, 256, 8, 32),
    (2, 4096, 1024, 16, 64),
    (2, 1024, 256, 32, 128),
    (2, 1024, 1024, 64, 256),
    (1, 1000, 257, 64, 256),
    (3, 131, 70, 5, 11),
    (2, 257, 1, 8, 32),
]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_first", "inside_larger"])
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        (sizes, dtype)
        for dtype in DTYPES[1:]
        for sizes in GPU_SIZES
        if sizes[4] <= triton_launch.widths_of(dtype)[-1][1]
    ],
    ids=str,
)
def test_compiled_kernels_are_as_accurate_as_the_reference(
    sizes: tuple[int, int, int, int, int], dtype: torch.dtype, layout: str
) -> None:
    assert_as_accurate_as_the_reference(case_of(sizes, dtype, layout=layout, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("spread", [4.0, 12.0])
def test_compiled_kernels_are_accurate_on_saturated_rows(dtype: torch.dtype, spread: float) -> None:
    assert_as_accurate_as_the_reference(case_of((2, 509, 251, 16, 64), dtype, spread=spread, device="cuda"))


@pytest.mark.gpu
def test_tf32_is_as_accurate_as_its_rounding() -> None:
    case = case_of((2, 1024, 256, 8, 32), torch.float32, device="cuda")
    precise = run(case, 1.0)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        rough = run(case, 1.0)
    finally:
        torch.set_float32_matmul_precision(before)
    for name, got, wanted in zip(NAMES, rough, precise, strict=True):
        assert distance(got, wanted.double()) <= 2e-2 * wanted.abs().max().item(), name


@pytest.mark.gpu
def test_large_memory_strides_are_read_by_compiled_kernels() -> None:
    """Samples 2**31 numbers apart, and positions that a 32-bit offset does not reach."""
    memory = torch.zeros(2**31 + 2**16, dtype=torch.bfloat16, device="cuda")
    small = case_of((2, 64, 96, 8, 32), torch.bfloat16, device="cuda")
    far_samples = memory.as_strided((2, 96, 32), (2**31, 32, 1))
    far_samples.copy_(small.value)
    wanted = run(small, 1.0)
    got = run(small._replace(value=far_samples), 1.0)
    assert_same_bits(got, wanted)
    memory.zero_()
    far_positions = memory.as_strided((2, 96, 32), (32, 2**31 // 95 // 8 * 8 + 64, 1))
    far_positions.copy_(small.value)
    got = run(small._replace(value=far_positions), 1.0)
    assert_same_bits(got, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_compiled_kernels_repeat_their_bits(dtype: torch.dtype) -> None:
    case = case_of((4, 1024, 256, 16, 64), dtype, device="cuda")
    first = run(case, 1.0)
    for _ in range(3):
        assert_same_bits(first, run(case, 1.0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_launchers_can_be_captured_in_a_cuda_graph(dtype: torch.dtype) -> None:
    case = case_of((2, 256, 64, 8, 32), dtype, device="cuda")
    wanted = run(case, 1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(case, 1.0)
    other = case_of((2, 256, 64, 8, 32), dtype, device="cuda")
    for tensor, values in zip(case, other, strict=True):
        tensor.copy_(values)
    graph.replay()
    fresh = run(case, 1.0)
    assert not torch.equal(results[0], wanted[0])
    assert_same_bits(results, fresh)


@pytest.mark.gpu
def test_more_samples_than_a_second_grid_axis_holds_on_a_gpu() -> None:
    case = case_of((70_000, 2, 3, 1, 1), torch.float32, device="cuda")
    assert_as_accurate_as_the_reference(case)
