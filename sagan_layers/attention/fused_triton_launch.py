"""Launches the Triton kernels of the whole self-attention block, and says what to compile ahead of time.

Attention's own backward is that of :mod:`sagan_layers.attention.triton_launch`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from sagan_layers import triton_support
from sagan_layers.attention import triton_launch
from sagan_layers.attention.autograd import BackwardInputs
from sagan_layers.attention.fused_triton_kernels import (
    attend_kernel,
    input_gradient_kernel,
    project_pool_kernel,
    weight_gradient_kernel,
)
from sagan_layers.attention.reference import ProjectionWeights, SelfAttentionInputs
from sagan_layers.attention.saved import Saved, empty_results
from sagan_layers.torch_support import accumulation_dtype
from sagan_layers.triton_support import CompileJob

MAX_CHANNELS = 1024

# How many programs share the sums of the weights' gradients: two for each multiprocessor of an H100.
WEIGHT_GRADIENT_PROGRAMS = 264


@dataclass(frozen=True)
class Tile:
    """What one program works on.

    Attributes:
        positions: rows of a block: positions, or pooled positions where keys and values are projected.
        channels: channels of the feature map at a time.
        step: keys at a time in attention; columns of the value's gradient at a time in the input's gradient.
        parts: programs that share the columns of keys and values.
        num_warps: warps of a program.
        num_stages: how many blocks ahead loads are issued.
    """

    positions: int
    channels: int
    step: int
    parts: int
    num_warps: int
    num_stages: int


# By width class (see _width_class), for 16-bit elements; the interpreter takes them for wider ones too. Chosen with
# benchmarks/kernel_resources.py: none spills and each fits on every supported chip.
PROJECTION_TILES = {
    64: Tile(64, 64, 0, 1, 8, 2),
    128: Tile(64, 64, 0, 2, 8, 2),
    256: Tile(64, 64, 0, 4, 8, 2),
}
ATTENTION_TILES = {
    64: Tile(128, 64, 64, 1, 8, 2),
    128: Tile(128, 32, 32, 1, 8, 2),
    256: Tile(64, 64, 32, 1, 8, 2),
}
# Where the output is not projected in the same kernel.
UNPROJECTED_ATTENTION_TILES = {
    64: Tile(128, 64, 64, 1, 8, 2),
    128: Tile(64, 64, 32, 1, 8, 2),
    256: Tile(32, 64, 32, 1, 8, 2),
}
INPUT_GRADIENT_TILES = {
    64: Tile(128, 64, 64, 1, 8, 2),
    128: Tile(128, 64, 64, 1, 8, 2),
    256: Tile(128, 64, 64, 1, 8, 2),
}
WEIGHT_GRADIENT_TILES = {
    64: Tile(64, 64, 0, 1, 4, 3),
    128: Tile(64, 64, 0, 2, 4, 2),
    256: Tile(64, 64, 0, 4, 4, 2),
}


def unsupported_reasons(x: Tensor, weights: ProjectionWeights) -> list[str]:
    """Return why these kernels cannot serve, on a device that runs Triton."""
    # With 32-bit operands, the accumulators do not fit into registers.
    reasons = triton_support.unsupported_reasons(x, torch.bfloat16, torch.float16)
    reasons += triton_support.large_sample_reasons(x)
    if x.numel() == 0:
        reasons.append("the input is empty")
    C, E, EV = x.size(1), weights.key.size(0), weights.value.size(0)
    # Backward takes the kernels of attention alone.
    max_width, max_value_width = triton_launch.widths_of(x.dtype)[-1]
    for name, size, largest in (("C", C, MAX_CHANNELS), ("E", E, max_width), ("Ev", EV, max_value_width)):
        if size > largest:
            reasons.append(f"{name} = {size} is more than {largest}")
    if triton_support.INTERPRETED:
        return reasons
    # Loads could not be vectorised; their addresses would exhaust the registers.
    if any(width % 8 for width in (C, E, EV)):
        reasons.append(f"serves widths that are multiples of 8, got C = {C}, E = {E}, Ev = {EV}")
    # There values and features meet in one block, and masks of both would not fit into registers.
    if weights.out is None and _padded(EV) != EV:
        reasons.append(f"without an output projection serves powers of two from 16 as Ev, got {EV}")
    return reasons


def forward(inputs: SelfAttentionInputs, save: bool) -> tuple[Tensor, Saved]:
    """Return the block's output, in the memory format of x, and what backward needs; most of it only with ``save``."""
    x, weights, gamma, pool_size = inputs
    assert isinstance(weights, ProjectionWeights)
    y, saved = empty_results(inputs, save)
    _project_and_pool(x, weights, saved, pool_size)
    N, C, H, W = x.shape
    L, S = H * W, saved.key.size(1)
    E, EV = saved.key.size(2), saved.value.size(2)
    tiles = UNPROJECTED_ATTENTION_TILES if weights.out is None else ATTENTION_TILES
    tile = tiles[_width_class(E, EV)]
    channels, key_width, value_width = min(tile.channels, _padded(C)), _padded(E), _padded(EV)
    width, strides = _grid(1, x, y)
    blocks = triton.cdiv(L, tile.positions)
    _launch(
        attend_kernel, N * blocks, tile,
        x, weights.query.contiguous(), _contiguous(weights.query_bias), saved.key, saved.value,
        _contiguous(weights.out), _contiguous(weights.out_bias), gamma, y,
        *((saved.query, saved.attended, saved.lse) if save else (None, None, None)),
        *strides, C, E, EV, L, width, S, blocks,
        CHANNELS=channels,
        KEYS=tile.step,
        KEY_WIDTH=key_width,
        VALUE_WIDTH=value_width,
        EVEN_POSITIONS=L % tile.positions == 0,
        EVEN_CHANNELS=C % channels == 0,
        EVEN_KEYS=S % tile.step == 0,
        EVEN_KEY_WIDTH=key_width == E,
        EVEN_VALUE_WIDTH=value_width == EV,
    )  # fmt: skip
    return y, saved


def _project_and_pool(x: Tensor, weights: ProjectionWeights, saved: Saved, pool_size: int) -> None:
    """Write keys, values and, where there is room for it, their argmax."""
    N, C = x.shape[:2]
    S, E, EV = *saved.key.shape[1:], saved.value.size(2)
    tile = PROJECTION_TILES[_width_class(E, EV)]
    channels, parts = min(tile.channels, _padded(C)), tile.parts
    key_width, value_width = _padded(E, parts), _padded(EV, parts)
    width, strides = _grid(pool_size, x)
    blocks = triton.cdiv(S, tile.positions)
    _launch(
        project_pool_kernel, N * blocks * parts, tile,
        x, weights.key.contiguous(), weights.value.contiguous(),
        _contiguous(weights.key_bias), _contiguous(weights.value_bias), saved.key, saved.value,
        saved.key_argmax if saved.key_argmax.numel() else None,
        saved.value_argmax if saved.key_argmax.numel() else None,
        *strides, C, E, EV, S, width // pool_size, blocks,
        POOL=pool_size,
        PARTS=parts,
        CHANNELS=channels,
        KEY_WIDTH=key_width,
        VALUE_WIDTH=value_width,
        EVEN_POSITIONS=S % tile.positions == 0,
        EVEN_CHANNELS=C % channels == 0,
        EVEN_WIDTHS=key_width * parts == E and value_width * parts == EV,
    )  # fmt: skip


def backward(inputs: SelfAttentionInputs, saved: Saved, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, the four weights, the four biases and gamma, None where the input is None."""
    x, weights, gamma, pool_size = inputs
    assert isinstance(weights, ProjectionWeights)
    dtype = accumulation_dtype(x.dtype)
    factor = gamma.to(dtype)
    grad_positions = grad_y.flatten(2).transpose(1, 2)  # [N, L, C]
    grad_out = grad_out_bias = None
    if weights.out is None:
        grad_attended = (grad_positions * factor).to(x.dtype).contiguous()
        grad_gamma = (grad_positions * saved.attended).sum(dtype=dtype)
    else:
        scaled = (weights.out * factor).to(x.dtype)
        grad_attended = torch.bmm(grad_positions, scaled.expand(x.size(0), -1, -1))
        sums = _feature_sums(grad_y, None, None, saved.attended, saved, 1).t()  # [C, Ev]
        grad_out = (sums * factor).to(x.dtype)
        grad_gamma = (sums * weights.out).sum()
        if weights.out_bias is not None:
            bias_sums = grad_y.sum((0, 2, 3), dtype=dtype)
            grad_out_bias = (bias_sums * factor).to(weights.out_bias.dtype)
            grad_gamma = grad_gamma + (bias_sums * weights.out_bias).sum()
    grads = triton_launch.backward(
        BackwardInputs(saved.query, saved.key, saved.value, saved.attended, saved.lse, grad_attended, 1.0)
    )
    grad_x = _input_gradient(inputs, saved, grad_y, grads)
    E = saved.key.size(2)
    sums = _feature_sums(x, *grads, saved, pool_size).to(x.dtype)
    grad_weights = sums[:E], sums[E : 2 * E], sums[2 * E :]
    grad_biases = (
        None if bias is None else grad.sum((0, 1), dtype=dtype).to(bias.dtype)
        for bias, grad in zip((weights.query_bias, weights.key_bias, weights.value_bias), grads, strict=True)
    )
    return (
        grad_x,
        *(grad.clone() for grad in grad_weights),
        grad_out,
        *grad_biases,
        grad_out_bias,
        grad_gamma.to(gamma.dtype).reshape(gamma.shape),
    )


def _input_gradient(
    inputs: SelfAttentionInputs, saved: Saved, grad_y: Tensor, grads: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Return the gradient of x, in its memory format, from those of query, key and value."""
    x, weights, _, pool_size = inputs
    assert isinstance(weights, ProjectionWeights)
    N, C, H, W = x.shape
    L, E = grads[0].shape[1:]
    S, EV = grads[2].shape[1:]
    grad_x = torch.empty_like(x)
    tile = INPUT_GRADIENT_TILES[_width_class(E, EV)]
    channels, key_width, value_step = min(tile.channels, _padded(C)), _padded(E), min(tile.step, _padded(EV))
    width, strides = _grid(pool_size, grad_y, grad_x)
    blocks, chunks = triton.cdiv(L, tile.positions), triton.cdiv(C, channels)
    even = L % tile.positions == 0
    _launch(
        input_gradient_kernel, N * blocks * chunks, tile,
        grad_y, *grads, *_argmax(saved, pool_size),
        weights.query.contiguous(), weights.key.contiguous(), weights.value.contiguous(), grad_x,
        *strides, C, E, EV, L, width, S, width // pool_size, blocks, chunks,
        POOL=pool_size,
        CHANNELS=channels,
        KEY_WIDTH=key_width,
        VALUE_STEP=value_step,
        EVEN_POSITIONS=even,
        EVEN_WINDOWS=even and H % pool_size == 0 and W % pool_size == 0,
        EVEN_CHANNELS=C % channels == 0,
        EVEN_KEY_WIDTH=key_width == E,
        EVEN_VALUE_WIDTH=EV % value_step == 0,
    )  # fmt: skip
    return grad_x


def _feature_sums(
    features: Tensor,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor,
    saved: Saved,
    pool_size: int,
) -> Tensor:
    """Sum gradient times feature over samples and positions: [2 E + Ev, C] or [Ev, C], in the accumulation dtype."""
    N, C, H, W = features.shape
    L, (S, EV) = H * W, grad_value.shape[1:]
    E = 0 if grad_key is None else grad_key.size(2)
    tile = WEIGHT_GRADIENT_TILES[_width_class(max(E, 1), EV)]
    channels, parts = min(tile.channels, _padded(C)), tile.parts
    key_width, value_width = _padded(max(E, 1), parts), _padded(EV, parts)
    width, strides = _grid(pool_size, features)
    blocks, chunks = triton.cdiv(L, tile.positions), triton.cdiv(C, channels)
    items = N * blocks
    splits = min(items, max(1, WEIGHT_GRADIENT_PROGRAMS // (chunks * parts)))
    share = triton.cdiv(items, splits)
    splits = triton.cdiv(items, share)
    partial = features.new_empty((splits, 2 * E + EV, C), dtype=accumulation_dtype(features.dtype))
    even = L % tile.positions == 0
    _launch(
        weight_gradient_kernel, splits * chunks * parts, tile,
        features, grad_query, grad_key, grad_value, *_argmax(saved, pool_size), partial,
        *strides, C, E, EV, L, width, S, width // pool_size, blocks, chunks, items, share,
        POOL=pool_size,
        PARTS=parts,
        CHANNELS=channels,
        KEY_WIDTH=key_width,
        VALUE_WIDTH=value_width,
        EVEN_POSITIONS=even,
        EVEN_WINDOWS=even and H % pool_size == 0 and W % pool_size == 0,
        EVEN_CHANNELS=C % channels == 0,
        EVEN_WIDTHS=value_width * parts == EV and E in (0, key_width * parts),
    )  # fmt: skip
    return partial.sum(0)


def _launch(kernel: Any, programs: int, tile: Tile, *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device and in the precision of its first argument, a feature map."""
    x = arguments[0]
    # The interpreter multiplies the bit patterns of bfloat16 if they are left as they are.
    widened = triton_support.INTERPRETED and x.dtype != torch.float32
    with triton_support.device_guard(x):
        kernel[(programs,)](
            *arguments,
            POSITIONS=tile.positions,
            **constants,
            ACCUMULATOR=triton_support.accumulator(x.dtype),
            PRECISION="widened" if widened else triton_support.float32_precision(),
            **triton_support.launch_options(tile),
        )


def _padded(width: int, parts: int = 1) -> int:
    """Return the power of two, at least 16 (what a matrix instruction takes), that holds each of the parts."""
    return max(16, int(triton.next_power_of_2(triton.cdiv(width, parts))))


def _width_class(E: int, EV: int) -> int:
    """Return 64, 128 or 256: the padded width of values, or four times that of keys if that is more."""
    return max(64, 4 * _padded(E), _padded(EV))


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _argmax(saved: Saved, pool_size: int) -> tuple[Tensor | None, Tensor | None]:
    return (saved.key_argmax, saved.value_argmax) if pool_size > 1 else (None, None)


def _grid(pool_size: int, *maps: Tensor) -> tuple[int, list[int]]:
    """Return the width of the maps [N, C, H, W], and the strides of each: sample, channel, row, column.

    Without pooling, maps whose rows follow on one another are seen as a single row, so that offsets stay plain.
    """
    H, W = maps[0].shape[2:]
    strides = [list(tensor.stride()) for tensor in maps]
    if pool_size == 1 and W == 1:
        width, strides = H, [[n, c, 0, row] for n, c, row, _ in strides]
    elif pool_size == 1 and (H == 1 or all(row == W * column for *_, row, column in strides)):
        width, strides = H * W, [[n, c, 0, column] for n, c, _, column in strides]
    else:
        width = W
    return width, [stride for of_map in strides for stride in of_map]


def compile_jobs() -> Iterator[CompileJob]:
    """Yield what to compile ahead of time: every tile, both layouts, with and without masks of sizes and widths.

    float16 differs from bfloat16 by the type of its instructions only, so it is skipped. Widths are the released
    code's, C = 2 Ev = 8 E, at the upper end of each width class, and 8 less, where widths are masked.
    """
    for width_class in ATTENTION_TILES:
        for even, even_widths in ((True, True), (False, True), (False, False)):
            yield from _compile_jobs_of(width_class, even, even_widths)


def _compile_jobs_of(width_class: int, even: bool, even_widths: bool) -> Iterator[CompileJob]:
    """Yield jobs for NCHW with sizes that are multiples of 16, or for channels_last with any sizes and masks."""
    short = 0 if even_widths else 8
    C, E, EV = 2 * width_class - short, width_class // 4 - short, width_class - short
    common = {"C": C, "E": E, "EV": EV, "ACCUMULATOR": triton_support.accumulator(torch.bfloat16)}
    common |= {"PRECISION": "tf32x3", "KEY_WIDTH": _padded(E), "VALUE_WIDTH": _padded(EV)}
    common |= {f"{letter}_{'column' if even else 'channel'}": 1 for letter in "xygf"}
    masks = ("POSITIONS", "WINDOWS", "KEYS", "CHANNELS", "WIDTHS", "KEY_WIDTH", "VALUE_WIDTH")
    common |= {f"EVEN_{name}": even if name in masks[:3] else even_widths for name in masks}

    def job(kernel: Any, tile: Tile, what: str, **given: Any) -> CompileJob:
        constexprs = common | {"POSITIONS": tile.positions, "CHANNELS": tile.channels} | given
        types = dict.fromkeys(_NUMBERS, "i32:16" if even else "i32")
        types |= {"gamma": "*fp32", "lse": "*fp32", "partial": "*fp32"}
        types |= {"key_argmax": "*u8", "value_argmax": "*u8"}
        form = "nchw even" if even else "channels_last masked"
        label = f"{what} C={constexprs['C']} bf16 {form}"
        return triton_support.compile_job(kernel, tile, label, constexprs, types, "*bf16")

    for pool in (1, 2):
        routes: dict[str, Any] = {"POOL": pool}
        if pool == 1:
            routes |= {"key_argmax": None, "value_argmax": None}
        for kernel, tiles, what in (
            (project_pool_kernel, PROJECTION_TILES, "project"),
            (weight_gradient_kernel, WEIGHT_GRADIENT_TILES, "weight gradient"),
        ):
            tile = tiles[width_class]
            widths = {"KEY_WIDTH": _padded(E, tile.parts), "VALUE_WIDTH": _padded(EV, tile.parts)}
            yield job(kernel, tile, f"{what} pool={pool}", **routes, PARTS=tile.parts, **widths)
        tile = INPUT_GRADIENT_TILES[width_class]
        step = min(tile.step, _padded(EV))
        yield job(input_gradient_kernel, tile, f"input gradient pool={pool}", **routes, VALUE_STEP=step)
    tile = ATTENTION_TILES[width_class]
    yield job(attend_kernel, tile, "attend with out", KEYS=tile.step)
    if even_widths:
        tile = UNPROJECTED_ATTENTION_TILES[width_class]
        without = {"C": EV, "out_weight": None, "out_bias": None}
        yield job(attend_kernel, tile, "attend without out", **without, KEYS=tile.step)


# Arguments that are numbers, not pointers: strides, sizes and counts.
_NUMBERS = {f"{letter}_{axis}" for letter in "xygf" for axis in ("sample", "channel", "row", "column")} | {
    *("L", "S", "WIDTH", "S_WIDTH", "blocks", "chunks", "items", "share")
}
