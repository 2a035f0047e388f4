"""The Triton attention kernels: what is specific to them, in Triton's interpreter and on a GPU.

``test_attention_backends.py`` holds every backend, this one too, to the reference.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from test_attention_backends import LAYOUTS, distance, laid_out, sums_of_sizes
from torch import Tensor

pytest.importorskip("triton")

from sagan_layers.attention import reference
from sagan_layers.attention import triton as attention_triton
from sagan_layers.torch_support import accumulation_dtype

pytestmark = pytest.mark.usefixtures("_unwritten_memory_is_nan")

interpreted = pytest.mark.skipif(
    not attention_triton._interpreting(), reason="the kernels are compiled: see the gpu tests"
)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAMES = ("y", "dq", "dk", "dv", "gQ", "gK", "gV", "gG")
# Batch, L, S, E, Ev.
SIZES = [
    (1, 1, 1, 1, 1),
    (2, 1, 17, 3, 5),
    (2, 19, 1, 8, 32),
    (1, 67, 35, 7, 31),
    (1, 64, 64, 16, 64),
]


class Case(NamedTuple):
    """Inputs of the three launchers but those that one hands to the next."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_y: Tensor
    grad_dq: Tensor
    grad_dk: Tensor
    grad_dv: Tensor


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
    inputs = case.query, case.key, case.value
    y, lse = attention_triton.forward(*inputs, scale)
    gradients = attention_triton.backward(*inputs, y, lse, case.grad_y, scale)
    return [y, *gradients, *attention_triton.double_backward(*inputs, y, lse, *case[3:], scale)]


def run_reference(case: Case, scale: float, dtype: torch.dtype) -> list[Tensor]:
    """The same by autograd through the reference."""
    *leaves, grad_y = (tensor.to(dtype).detach().requires_grad_() for tensor in case[:4])
    y = reference.attention(*leaves, scale)
    gradients = torch.autograd.grad(y, leaves, grad_y, create_graph=True)
    cotangents = [tensor.to(dtype) for tensor in case[4:]]
    seconds = torch.autograd.grad(gradients, [*leaves, grad_y], cotangents)
    return [tensor.detach() for tensor in (y, *gradients, *seconds)]


def sums_of_all_sizes(case: Case, scale: float) -> tuple[list[float], float]:
    """The largest sum of absolute terms behind each result (see ``sums_of_sizes``), and the largest logit."""
    firsts, logit = sums_of_sizes(case[:3], case.grad_y, scale)
    query, key, value, grad_y, grad_dq, grad_dk, grad_dv = (tensor.double() for tensor in case)
    weights = (scale * query @ key.mT).softmax(-1)
    query, key, value, grad_y, grad_dq, grad_dk, grad_dv = (
        tensor.abs() for tensor in (query, key, value, grad_y, grad_dq, grad_dk, grad_dv)
    )

    def centred(sizes: Tensor) -> Tensor:
        return sizes + (weights * sizes).sum(-1, keepdim=True)

    dp = centred(grad_y @ value.mT)
    change = centred(abs(scale) * (grad_dq @ key.mT + query @ grad_dk.mT))
    ds = abs(scale) * weights * dp
    ds2 = abs(scale) * weights * centred(dp * change + grad_y @ grad_dv.mT)
    seconds = (
        ds2 @ key + ds @ grad_dk,
        ds2.mT @ query + ds.mT @ grad_dq,
        (weights * change).mT @ grad_y,
        (weights * change) @ value + weights @ grad_dv,
    )
    return [*firsts, *(total.max().item() for total in seconds)], logit


def assert_as_accurate_as_the_reference(case: Case, scale: float = 1.0) -> None:
    dtype = case.query.dtype
    ours = run(case, scale)
    exact = run_reference(case, scale, torch.float64)
    same_dtype = run_reference(case, scale, dtype)
    sizes, logit = sums_of_all_sizes(case, scale)
    # A logit's own rounding, in the accumulation dtype, is a relative error of the weight.
    unit = torch.finfo(dtype).eps + logit * torch.finfo(accumulation_dtype(dtype)).eps
    for name, got, plain, wanted, size in zip(NAMES, ours, same_dtype, exact, sizes, strict=True):
        assert got.shape == wanted.shape
        assert got.dtype == dtype
        assert got.is_contiguous()
        assert torch.isfinite(got).all(), name
        bound = 2 * distance(plain, wanted) + 4 * unit * size
        assert distance(got, wanted) <= bound, f"{name}: {distance(got, wanted):.2e} > {bound:.2e}"


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
    assert all(
        torch.isfinite(one).all() and torch.equal(one, other)
        for one, other in zip(first, second, strict=True)
    )


def contiguous(case: Case) -> Case:
    return Case(*(tensor.contiguous() for tensor in case))


@interpreted
def test_an_expanded_gradient_is_read() -> None:
    case = case_of((2, 7, 19, 5, 11), torch.float32)
    case = case._replace(grad_y=torch.ones(()).expand(2, 7, 11), grad_dv=torch.ones(()).expand(2, 19, 11))
    assert_as_accurate_as_the_reference(case)


@interpreted
@pytest.mark.parametrize(
    ("widths", "dtype"),
    [(widths, dtype) for dtype in DTYPES[1:] for widths in attention_triton.widths_of(dtype)],
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
    E, EV = attention_triton.widths_of(dtype)[-1]
    query, key, value, *_ = case_of((1, 5, 67, E, EV), dtype, spread=E**-0.25)
    y, _ = attention_triton.forward(query, key, value, 1.0)
    exact = reference.attention(query.double(), key.double(), value.double(), 1.0)
    (size, *_), _ = sums_of_sizes((query, key, value), torch.zeros_like(y), 1.0)
    assert distance(y, exact) <= 4 * torch.finfo(dtype).eps * size


def test_every_tile_of_the_table_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = set()

    class Table(dict[tuple[str, int, int], attention_triton.Tile]):
        def __getitem__(self, key: tuple[str, int, int]) -> attention_triton.Tile:
            taken.add(key)
            return super().__getitem__(key)

    monkeypatch.setattr(attention_triton, "TILES", Table(attention_triton.TILES))
    for kernel in attention_triton._KERNELS:
        for dtype in DTYPES:
            for widths in attention_triton.widths_of(dtype):
                assert list(attention_triton._launches(kernel, dtype, widths, "tf32x3"))
    assert taken == set(attention_triton.TILES)


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
    _, lse = attention_triton.forward(case.query, case.key, case.value, 0.7)
    assert lse.dtype == accumulation_dtype(dtype)
    exact = torch.logsumexp(0.7 * case.query.double() @ case.key.double().transpose(1, 2), -1)
    assert distance(lse, exact) <= 1e-5


@interpreted
def test_float16_gradients_beyond_its_range_do_not_overflow_on_the_way() -> None:
    case = case_of((1, 23, 37, 8, 32), torch.float16)
    # As under a loss scale: dS reaches 1e5, results do not.
    case = case._replace(key=case.key * 0.01, grad_y=case.grad_y * 16000, grad_dv=case.grad_dv * 0.01)
    dp = case.grad_y.double() @ case.value.double().transpose(1, 2)
    assert dp.abs().max() > 65504
    y, lse = attention_triton.forward(case.query, case.key, case.value, 1.0)
    ours = attention_triton.backward(case.query, case.key, case.value, y, lse, case.grad_y, 1.0)
    exact = run_reference(case, 1.0, torch.float64)
    plain = run_reference(case, 1.0, torch.float16)
    for got, same, wanted in zip(ours[:1], plain[1:2], exact[1:2], strict=True):
        assert torch.isfinite(got).all()
        assert distance(got, wanted) <= 2 * distance(same, wanted) + 4e-3 * wanted.abs().max()


@interpreted
@pytest.mark.parametrize("sizes", [(0, 3, 5, 2, 4), (2, 0, 5, 2, 4)], ids=str)
def test_nothing_is_launched_for_no_samples_or_queries(
    sizes: tuple[int, int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_triton, "_run", None)
    case = case_of(sizes, torch.float32)
    results = run(case, 1.0)
    for got, wanted in zip(results, run_reference(case, 1.0, torch.float64), strict=True):
        assert torch.equal(got.double(), wanted)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_same_input_gives_the_same_bits(dtype: torch.dtype) -> None:
    case = case_of((1, 19, 19, 8, 32), dtype)
    assert_same_bits(run(case, 1.0), run(case, 1.0))


@interpreted
def test_the_fused_exponent_of_compiled_kernels_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_triton, "_interpreting", lambda: False)
    assert_as_accurate_as_the_reference(case_of((1, 19, 19, 8, 32), torch.float32))


@interpreted
@pytest.mark.parametrize(("precision", "product"), [("highest", "tf32x3"), ("high", "tf32")])
def test_float32_is_multiplied_as_tf32_where_torch_allows_it(precision: str, product: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert attention_triton._float32_product() == product
        assert_as_accurate_as_the_reference(case_of((1, 7, 19, 5, 11), torch.float32))
    finally:
        torch.set_float32_matmul_precision(before)


@interpreted
def test_offsets_beyond_32_bits_are_copied_away(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of((2, 7, 19, 5, 11), torch.float32, layout="channels_first")
    assert not case.query.is_contiguous()
    before = run(case, 1.0)
    monkeypatch.setattr(attention_triton, "_LARGEST_OFFSET", 0)
    assert attention_triton._readable(case.query).is_contiguous()
    assert_same_bits(before, run(case, 1.0))


# --- refusals ---------------------------------------------------------------------------------------------------


def tensors(E: int = 3, EV: int = 2, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    return [torch.empty(1, 4, width, dtype=dtype, device=device) for width in (E, E, EV)]


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_interpreter_serves_every_dtype_and_width_of_the_table(dtype: torch.dtype) -> None:
    for widths in attention_triton.widths_of(dtype):
        assert attention_triton.unsupported_reasons(*tensors(*widths, dtype)) == []


@interpreted
def test_another_device_is_refused() -> None:
    (reason,) = attention_triton.unsupported_reasons(*tensors(device="meta"))
    assert reason == "Triton's interpreter takes CPU and CUDA tensors, got meta"


def test_widths_beyond_the_table_are_refused_by_name() -> None:
    for dtype, E, EV in ((torch.bfloat16, 64, 256), (torch.float16, 32, 128), (torch.float32, 32, 128)):
        reasons = attention_triton.unsupported_reasons(*tensors(E + 1, EV + 1, dtype))
        assert f"serves E up to {E} in {dtype}, got {E + 1}" in reasons
        assert f"serves Ev up to {EV} in {dtype}, got {EV + 1}" in reasons


def test_samples_beyond_32_bits_are_refused() -> None:
    query, key = (torch.empty(1).expand(1, length, 64) for length in (2**25, 3))
    assert (
        f"serves samples of less than 2**31 numbers, got {2**25} x 64"
        in attention_triton.unsupported_reasons(query, key, key)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e5m2], ids=str)
def test_a_dtype_is_refused_by_compiled_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_triton, "_interpreting", lambda: False)
    assert f"{dtype} is not served" in attention_triton.unsupported_reasons(*tensors(dtype=dtype))


def test_compiled_kernels_need_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_triton, "_interpreting", lambda: False)
    assert attention_triton.unsupported_reasons(*tensors()) == ["needs a CUDA device, got cpu"]


class CudaLookalike:
    """What reasons_against looks at of a tensor, on a GPU that is not there."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        self.dtype = torch.float32

    def size(self, axis: int) -> int:
        return 4


def test_older_gpus_and_rocm_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lookalikes = [CudaLookalike() for _ in range(3)]
    monkeypatch.setattr(attention_triton, "_interpreting", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, reasons in (
        ((7, 5), ["needs compute capability 8.0, got 7.5"]),
        ((8, 0), []),
        ((9, 0), []),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, answer=capability: answer)
        assert attention_triton.unsupported_reasons(*lookalikes) == reasons
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert attention_triton.unsupported_reasons(*lookalikes) == [
        "needs an NVIDIA GPU, got a ROCm build of torch"
    ]


# --- on a GPU ---------------------------------------------------------------------------------------------------

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
        if sizes[4] <= attention_triton.widths_of(dtype)[-1][1]
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
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))
    memory.zero_()
    far_positions = memory.as_strided((2, 96, 32), (32, 2**31 // 95 // 8 * 8 + 64, 1))
    far_positions.copy_(small.value)
    got = run(small._replace(value=far_positions), 1.0)
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_compiled_kernels_repeat_their_bits(dtype: torch.dtype) -> None:
    case = case_of((4, 1024, 256, 16, 64), dtype, device="cuda")
    first = run(case, 1.0)
    assert all(torch.equal(*pair) for _ in range(3) for pair in zip(first, run(case, 1.0), strict=True))


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
    assert all(torch.equal(*pair) for pair in zip(results, fresh, strict=True))


@pytest.mark.gpu
def test_more_samples_than_a_second_grid_axis_holds_on_a_gpu() -> None:
    case = case_of((70_000, 2, 3, 1, 1), torch.float32, device="cuda")
    assert_as_accurate_as_the_reference(case)
