"""Launches the Triton kernels of attention: tiles, inputs as the kernels read them, and what to compile ahead of time.

:func:`forward`, :func:`backward` and :func:`double_backward` take and return tensors and know nothing of autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from sagan_layers import triton_support
from sagan_layers.attention.autograd import BackwardInputs, GradGrads
from sagan_layers.attention.reference import AttentionInputs
from sagan_layers.attention.triton_kernels import (
    column_kernel,
    double_column_kernel,
    double_row_kernel,
    forward_kernel,
    row_kernel,
)
from sagan_layers.torch_support import accumulation_dtype
from sagan_layers.triton_support import CompileJob


@dataclass(frozen=True)
class Tile:
    """How a program's work is cut.

    Attributes:
        block_queries: queries a program owns (row kernels) or reads at a time (column kernels).
        block_keys: keys it reads at a time, or owns.
        num_warps: warps of a program.
        num_stages: how many blocks ahead loads are issued.
    """

    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int


# Padded (E, Ev) that kernels are compiled for; inputs take the first that covers both. SAGAN's have Ev = 4 E.
WIDTHS = ((16, 32), (16, 64), (32, 128), (64, 256))
# The widest are for bfloat16: with operands of 32 bits, which float16 takes in backward, they would spill.
WIDTHS_OF_OTHERS = WIDTHS[:-1]

# Wider values are cut into chunks, for the accumulators of a block to fit into registers: by bytes of an operand.
MAX_CHUNK = {2: 128, 4: 64}
# Double-backward kernels need more registers, so they are always split into two launches.
MAX_CHUNK_OF_DOUBLE = 32

# By kernel, padded value width and bytes of an operand (float64, interpreted only, takes float32's). Chosen with
# benchmarks/kernel_resources.py: none spills and each fits on every supported chip.
TILES = {
    ("forward_kernel", 32, 2): Tile(64, 32, 4, 2),
    ("forward_kernel", 64, 2): Tile(64, 64, 4, 2),
    ("forward_kernel", 128, 2): Tile(64, 32, 8, 1),
    ("forward_kernel", 256, 2): Tile(64, 64, 8, 2),
    ("forward_kernel", 32, 4): Tile(64, 32, 4, 2),
    ("forward_kernel", 64, 4): Tile(64, 32, 8, 1),
    ("forward_kernel", 128, 4): Tile(64, 32, 8, 1),
    ("row_kernel", 32, 2): Tile(64, 64, 4, 2),
    ("row_kernel", 64, 2): Tile(64, 64, 4, 2),
    ("row_kernel", 128, 2): Tile(64, 32, 4, 2),
    ("row_kernel", 256, 2): Tile(64, 32, 8, 1),
    ("row_kernel", 32, 4): Tile(32, 32, 4, 2),
    ("row_kernel", 64, 4): Tile(32, 16, 4, 1),
    ("row_kernel", 128, 4): Tile(16, 32, 8, 1),
    ("column_kernel", 32, 2): Tile(32, 64, 4, 2),
    ("column_kernel", 64, 2): Tile(64, 64, 4, 2),
    ("column_kernel", 128, 2): Tile(16, 64, 4, 1),
    ("column_kernel", 256, 2): Tile(16, 64, 4, 1),
    ("column_kernel", 32, 4): Tile(32, 64, 4, 2),
    ("column_kernel", 64, 4): Tile(16, 32, 8, 1),
    ("column_kernel", 128, 4): Tile(16, 64, 4, 1),
    ("double_row_kernel", 32, 2): Tile(64, 32, 4, 1),
    ("double_row_kernel", 64, 2): Tile(32, 32, 4, 1),
    ("double_row_kernel", 128, 2): Tile(32, 32, 8, 1),
    ("double_row_kernel", 256, 2): Tile(16, 16, 2, 1),
    ("double_row_kernel", 32, 4): Tile(16, 16, 8, 1),
    ("double_row_kernel", 64, 4): Tile(16, 16, 8, 1),
    ("double_row_kernel", 128, 4): Tile(16, 16, 8, 1),
    ("double_column_kernel", 32, 2): Tile(32, 64, 4, 1),
    ("double_column_kernel", 64, 2): Tile(32, 64, 4, 1),
    ("double_column_kernel", 128, 2): Tile(32, 32, 4, 1),
    ("double_column_kernel", 256, 2): Tile(16, 16, 8, 1),
    ("double_column_kernel", 32, 4): Tile(16, 32, 4, 1),
    ("double_column_kernel", 64, 4): Tile(16, 16, 4, 1),
    ("double_column_kernel", 128, 4): Tile(16, 16, 8, 1),
}


@dataclass(frozen=True)
class Launch:
    """One way to compile a kernel: everything about it that does not depend on the lengths.

    Attributes:
        kernel: the Triton function.
        tile: its tile.
        constants: its compile-time arguments but EVEN_L and EVEN_S.
        programs_per_block: how many programs share a block, each with its chunk of the value width.
    """

    kernel: Any
    tile: Tile
    constants: dict[str, Any]
    programs_per_block: int


# What a launch computes, where the narrow results and the wide one are computed apart.
_PARTS = {
    "column_kernel": ("WITH_KEY", "WITH_VALUE"),
    "double_row_kernel": ("WITH_QUERY", "WITH_GRAD_Y"),
    "double_column_kernel": ("WITH_KEY", "WITH_VALUE"),
}
_DOUBLE_KERNELS = (double_row_kernel, double_column_kernel)
KERNELS = (forward_kernel, row_kernel, column_kernel, *_DOUBLE_KERNELS)
# What kernels read by its strides: how their names begin, and the letter of the second axis.
_STRIDED = {
    "query": ("query", "l"),
    "key": ("key", "s"),
    "value": ("value", "s"),
    "y": ("y", "l"),
    "grad_y": ("grad", "l"),
    "grad_grad_query": ("a", "l"),
    "grad_grad_key": ("b", "s"),
    "grad_grad_value": ("e", "s"),
}
_MAX_OFFSET = 2**31 - 1


def widths_of(dtype: torch.dtype) -> tuple[tuple[int, int], ...]:
    """Return the padded (E, Ev) that are served in this dtype."""
    return WIDTHS if dtype == torch.bfloat16 else WIDTHS_OF_OTHERS


def unsupported_reasons(inputs: AttentionInputs) -> list[str]:
    """Return why these kernels cannot serve, on a device that runs Triton."""
    query, key, value = inputs
    reasons = triton_support.unsupported_reasons(query, torch.float32, torch.bfloat16, torch.float16)
    widths = query.size(2), value.size(2)
    for name, width, largest in zip(("E", "Ev"), widths, widths_of(query.dtype)[-1], strict=True):
        if width > largest:
            reasons.append(f"serves {name} up to {largest} in {query.dtype}, got {width}")
    longest = max(query.size(1), key.size(1))
    if longest * max(widths) > _MAX_OFFSET:
        reasons.append(f"serves samples of less than 2**31 numbers, got {longest} x {max(widths)}")
    return reasons


def forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return ``softmax(scale * query . key) @ value`` and the logarithm of the softmax's denominators.

    Args:
        query: [N, L, E], N and L not 0.
        key: [N, S, E].
        value: [N, S, Ev].
        scale: factor on the logits.

    Returns:
        y, [N, L, Ev], contiguous, in the dtype of ``value``, and lse, [N, L], float32 (float64 for float64).
    """
    y, lse = value.new_empty((*query.shape[:2], value.size(2))), _rows(query)
    factor, scale = _split_scale(scale, query.dtype)
    tensors = _readable(query=_times(query, factor), key=key, value=value)
    _run(forward_kernel, scale, **tensors, y=y, lse=lse)
    return y, lse


def backward(inputs: BackwardInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, contiguous and in their dtype."""
    query, key, value, y, lse, grad_y, scale = inputs
    assert y is not None
    grad_query, grad_key, grad_value = (_empty(tensor) for tensor in (query, key, value))
    factor, scale = _split_scale(scale, query.dtype)
    shared = _readable(query=_times(query, factor), key=key, value=value, y=y, grad_y=grad_y)
    shared |= {"lse": lse.contiguous(), "weight": _rows(query), "mean_dp": _rows(query)}
    _run(row_kernel, scale, **shared, grad_query=grad_query)
    _run(column_kernel, scale, **shared, grad_key=grad_key, grad_value=grad_value)
    return _times(grad_query, factor), grad_key, grad_value


def double_backward(inputs: BackwardInputs, grad_grads: GradGrads) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and grad_y through what :func:`backward` returned."""
    query, key, value, y, lse, grad_y, scale = inputs
    assert y is not None
    grad_query, grad_key, grad_value, grad_grad_y = (_empty(tensor) for tensor in (query, key, value, grad_y))
    factor, scale = _split_scale(scale, query.dtype)
    shared = _readable(
        query=_times(query, factor),
        key=key,
        value=value,
        y=y,
        grad_y=grad_y,
        grad_grad_query=_times(grad_grads.query, factor),
        grad_grad_key=grad_grads.key,
        grad_grad_value=grad_grads.value,
    )
    shared |= {name: _rows(query) for name in ("weight", "mean_dp", "mean_t", "mean_r")}
    shared["lse"] = lse.contiguous()
    _run(double_row_kernel, scale, **shared, grad_query=grad_query, grad_grad_y=grad_grad_y)
    _run(double_column_kernel, scale, **shared, grad_key=grad_key, grad_value=grad_value)
    return _times(grad_query, factor), grad_key, grad_value, grad_grad_y


def _readable(**tensors: Tensor) -> dict[str, Tensor]:
    """Return the tensors, copied unless positions or channels are adjacent and offsets in a sample have 32 bits.

    Reading anything at all would take the kernels twice the registers.
    """

    def is_readable(tensor: Tensor) -> bool:
        strides = tensor.stride()[1:]
        # The offsets of a block's padding are computed, though not read.
        return 1 in strides and triton_support.sample_span(tensor) + 1024 * max(strides) <= _MAX_OFFSET

    return {name: x if is_readable(x) else x.contiguous() for name, x in tensors.items()}


def _split_scale(scale: float, dtype: torch.dtype) -> tuple[float, float]:
    """Return (factor for query and its grad_grad, positive scale for the kernels); their product is ``scale``.

    Kernels take the maximum of unscaled logits, and a float64 scale would reach them as a float32.
    """
    if dtype == torch.float64 or scale == 0.0:
        return scale, 1.0
    return (-1.0, -scale) if scale < 0 else (1.0, scale)


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else tensor * factor


def _rows(query: Tensor) -> Tensor:
    return torch.empty(query.shape[:2], dtype=accumulation_dtype(query.dtype), device=query.device)


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _run(kernel: Any, scale: float, **tensors: Tensor) -> None:
    """Launch a kernel on those of the tensors that it takes."""
    query, value = tensors["query"], tensors["value"]
    batch, L, E = query.shape
    S, EV = value.shape[1:]
    arguments = {**tensors, "scale": scale, "L": L, "S": S, "E": E, "EV": EV}
    for name, (prefix, length_axis) in _STRIDED.items():
        if name in tensors:
            axes = (f"{prefix}_n", f"{prefix}_{length_axis}", f"{prefix}_e")
            arguments |= dict(zip(axes, tensors[name].stride(), strict=True))
    arguments = {name: argument for name, argument in arguments.items() if name in kernel.arg_names}
    widths = next(pair for pair in widths_of(query.dtype) if pair[0] >= E and pair[1] >= EV)
    for launch in launches(kernel, query.dtype, widths, triton_support.float32_precision()):
        tile = launch.tile
        length, block = (S, tile.block_keys) if "column" in kernel.__name__ else (L, tile.block_queries)
        grid = (batch * triton.cdiv(length, block) * _programs(launch, EV),)
        with triton_support.device_guard(query):
            kernel[grid](
                **arguments,
                **launch.constants,
                EVEN_L=L % tile.block_queries == 0,
                EVEN_S=S % tile.block_keys == 0,
                **triton_support.launch_options(tile),
            )


def launches(
    kernel: Any, dtype: torch.dtype, widths: tuple[int, int], float32_precision: str
) -> Iterator[Launch]:
    """Yield what must be launched for this kernel, in order: the narrow results apart where need be."""
    given, computed = _products(kernel, dtype, float32_precision)
    # What float16 multiplies as TF32 takes the space of float32.
    size = 2 if dtype.itemsize == 2 and computed != "tf32" else 4
    block_e, padded_ev = widths
    double = kernel in _DOUBLE_KERNELS
    block_ev = min(padded_ev, MAX_CHUNK_OF_DOUBLE if double else MAX_CHUNK[size])
    chunks = padded_ev // block_ev
    tile = TILES[kernel.__name__, padded_ev, size]
    constants = {
        "BLOCK_L": tile.block_queries,
        "BLOCK_S": tile.block_keys,
        "BLOCK_E": block_e,
        "BLOCK_EV": block_ev,
        "GIVEN": given,
        "COMPUTED": computed,
        "SUM_DTYPE": triton_support.accumulator(dtype),
        "FUSED": not triton_support.INTERPRETED,
    }
    if kernel is forward_kernel:
        yield Launch(kernel, tile, constants, chunks)
        return
    constants["CHUNKS"] = chunks
    if kernel is row_kernel:
        yield Launch(kernel, tile, constants, 1)
        return
    narrow, wide = _PARTS[kernel.__name__]
    if chunks == 1 and not double:
        yield Launch(kernel, tile, {**constants, narrow: True, wide: True}, 1)
    else:
        yield Launch(kernel, tile, {**constants, narrow: True, wide: False}, 1)
        yield Launch(kernel, tile, {**constants, narrow: False, wide: True}, chunks)


def _products(kernel: Any, dtype: torch.dtype, float32_precision: str) -> tuple[str, str]:
    """Return how inputs are multiplied with inputs, and computed values with inputs."""
    if dtype == torch.float64:
        return "ieee", "ieee"
    if dtype == torch.float32:
        # Second derivatives are rare and suffer from cancellation, so they always use three TF32 products.
        product = "tf32x3" if kernel in _DOUBLE_KERNELS else float32_precision
        return product, product
    if dtype == torch.bfloat16:
        product = "widened" if triton_support.INTERPRETED else "native"
        return product, product
    # A float16 cannot hold gradients under a loss scale, only the forward's probabilities.
    return "native", "native" if kernel is forward_kernel else "tf32"


def _programs(launch: Launch, value_width: int) -> int:
    """Return the number of programs a block takes: the forward kernel counts the chunks that hold something."""
    if launch.kernel is forward_kernel:
        return int(triton.cdiv(value_width, launch.constants["BLOCK_EV"]))
    return launch.programs_per_block


_ELEMENTS = (
    (torch.bfloat16, "bf16", ("tf32x3",)),
    (torch.float16, "fp16", ("tf32x3",)),
    (torch.float32, "fp32", ("tf32x3", "tf32")),
)
_ROW_VALUES = ("lse", "weight", "mean_dp", "mean_t", "mean_r")


def compile_jobs() -> Iterator[CompileJob]:
    """Yield every configuration that the launchers can choose, for compilation without a GPU.

    Each twice: "even" for NCHW feature maps of 16n positions, "masked" for any lengths, and with other gradients.
    """
    for kernel in KERNELS:
        for dtype, element, float32_precisions in _ELEMENTS:
            for precision in float32_precisions[: 1 if kernel in _DOUBLE_KERNELS else None]:
                for widths in widths_of(dtype):
                    for launch in launches(kernel, dtype, widths, precision):
                        for even in (True, False):
                            product = f" {precision}" if dtype == torch.float32 else ""
                            yield _compile_job(launch, widths, element, product, even)


def _compile_job(
    launch: Launch, widths: tuple[int, int], element: str, product: str, even: bool
) -> CompileJob:
    names = launch.kernel.arg_names
    tensors, numbers = names[: names.index("scale")], names[names.index("scale") + 1 : names.index("BLOCK_L")]
    constexprs = {**launch.constants, "FUSED": True, "EVEN_L": even, "EVEN_S": even}
    channels_first = ("query", "key", "value", *(("grad",) if even else ()))
    for name in numbers:
        prefix, _, axis = name.rpartition("_")
        if prefix and axis in (("l", "s") if prefix in channels_first else ("e",)):
            constexprs[name] = 1
    types = {name: "*fp32:16" if name in _ROW_VALUES else f"*{element}:16" for name in tensors}
    types["scale"] = "fp32"
    if widths[0] <= 16:  # the commonest E is 8
        types["E"] = "i32"
    parts = {name: wanted for name, wanted in launch.constants.items() if name.startswith("WITH_")}
    only = "" if all(parts.values()) else " " + next(name for name in parts if parts[name]).lower()
    kernel_name = launch.kernel.__name__.removesuffix("_kernel")
    form = "even" if even else "masked"
    label = f"{kernel_name}{only} {widths[0]}x{widths[1]} {element}{product} {form}"
    number = "i32:16" if even else "i32"
    return triton_support.compile_job(launch.kernel, launch.tile, label, constexprs, types, number)
