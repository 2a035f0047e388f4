"""Triton kernels for conditional batch norm.

Forward is three kernels: one takes mean and squared deviations, each program for a part of a channel's values; a small
one joins the parts; one normalises, scales, shifts and applies ReLU. Backward mirrors it: sums for each sample and
channel, small kernels that join them, and the gradient of x. The remainder of the mean that its float32 value lacks is
corrected for, so that no digits cancel.

A program works on a tile of channels times positions; its form depends on which of the two are adjacent in memory.
Shape letters: N batch, C channels, L positions.
"""

# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sagan_layers import triton_support
from sagan_layers.conditional_norm.kernels import (
    Average,
    BackwardArguments,
    CoefficientGradients,
    CombineStatistics,
    ConditionalNormInputs,
    ConditionalNormKernels,
    ForwardArguments,
    opaque_unsupported_reasons,
)
from sagan_layers.torch_support import accumulation_dtype
from sagan_layers.triton_support import CompileJob, device_guard, rounded

# How many programs compute the sums: four for each multiprocessor of an H100.
PROGRAMS = 528
# Parts of a channel at most; one program joins them.
MAX_PARTS = 256


@dataclass(frozen=True)
class Tile:
    """What one program works on at a time.

    Attributes:
        channels: how many.
        positions: of each.
        num_warps: warps of a program.
        num_stages: how many blocks ahead loads are issued.
    """

    channels: int
    positions: int
    num_warps: int
    num_stages: int


# For adjacent positions, by the smallest L.
PLANE_TILES = {
    1024: Tile(2, 1024, 4, 2),
    256: Tile(8, 256, 4, 2),
    64: Tile(32, 64, 4, 2),
    1: Tile(128, 16, 4, 2),
}
# For adjacent channels, by the smallest C.
PIXEL_TILES = {
    128: Tile(128, 16, 4, 2),
    64: Tile(64, 32, 8, 2),
    32: Tile(32, 64, 8, 2),
    1: Tile(16, 128, 8, 2),
}
# Channels, and parts or samples, where partial sums are added.
SUM_TILE = Tile(32, 32, 4, 2)


@triton.jit
def _load_tile(base, channel, position, channel_stride, position_stride, mask, ACCUMULATOR: tl.constexpr):
    offsets = channel[:, None] * channel_stride + position[None, :] * position_stride
    return tl.load(base + offsets, mask=mask, other=0).to(ACCUMULATOR)


@triton.jit
def _store_prepared(
    prepared, mean, var, channel, channel_mask, C, EPS: tl.constexpr, ACCUMULATOR: tl.constexpr
):
    """Write the mean as a sum of two numbers, and 1 / standard deviation, which is returned in float64.

    Tiles are computed from these: float64 is slow on most GPUs.
    """
    high = mean.to(ACCUMULATOR)
    low = (mean - high.to(tl.float64)).to(ACCUMULATOR)
    inverse_std = 1.0 / tl.sqrt(var + EPS)
    tl.store(prepared + channel, high, mask=channel_mask)
    tl.store(prepared + C + channel, low, mask=channel_mask)
    tl.store(prepared + 2 * C + channel, inverse_std.to(ACCUMULATOR), mask=channel_mask)
    return low, inverse_std


@triton.jit
def _statistics_kernel(
    x,
    parts,
    x_sample,
    x_channel,
    x_position,
    C,
    L,
    blocks,
    items,
    items_each,
    splits,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """Mean, sum of squared deviations and count of each part of a channel's values, [3, splits, C], float64."""
    pid = tl.program_id(0)
    split = pid % splits
    channel = pid // splits * CHANNELS + tl.arange(0, CHANNELS)
    channel_mask = channel < C
    place = tl.arange(0, POSITIONS)
    first = split * items_each
    # Squares are summed around the mean of the first tile.
    position = first % blocks * POSITIONS + place
    mask = channel_mask[:, None] & (position < L)[None, :]
    sample = x + (first // blocks).to(tl.int64) * x_sample
    tile = _load_tile(sample, channel, position, x_channel, x_position, mask, ACCUMULATOR)
    count = tl.minimum(L - first % blocks * POSITIONS, POSITIONS)
    centre = tl.sum(tile, 1) / count
    sums = tl.zeros((CHANNELS, POSITIONS), ACCUMULATOR)
    squares = tl.zeros((CHANNELS, POSITIONS), ACCUMULATOR)
    count = count * 0
    for item in range(first, tl.minimum(first + items_each, items)):
        block = item % blocks
        position = block * POSITIONS + place
        mask = channel_mask[:, None] & (position < L)[None, :]
        sample = x + (item // blocks).to(tl.int64) * x_sample
        tile = _load_tile(sample, channel, position, x_channel, x_position, mask, ACCUMULATOR)
        centred = tl.where(mask, tile - centre[:, None], 0.0)
        sums += centred
        squares += centred * centred
        count += tl.minimum(L - block * POSITIONS, POSITIONS)
    number = count.to(tl.float64)
    total = tl.sum(sums, 1).to(tl.float64)
    part = parts + split * C + channel
    tl.store(part, centre.to(tl.float64) + total / number, mask=channel_mask)
    deviations = tl.sum(squares, 1).to(tl.float64) - total * total / number
    tl.store(part + splits * C, tl.maximum(deviations, 0.0), mask=channel_mask)
    tl.store(part + 2 * splits * C, number + tl.zeros((CHANNELS,), tl.float64), mask=channel_mask)


@triton.jit
def _join_statistics_kernel(
    parts,
    mean,
    var,
    prepared,
    C,
    splits,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """Mean and biased variance of each channel, [C], from those of its parts; and what tiles need of them."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    channel_mask = channel < C
    row = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, CHANNELS), tl.float64)
    count = tl.zeros((ROWS, CHANNELS), tl.float64)
    for start in range(0, splits, ROWS):
        part = start + row
        mask = (part < splits)[:, None] & channel_mask[None, :]
        offsets = parts + part[:, None] * C + channel[None, :]
        number = tl.load(offsets + 2 * splits * C, mask=mask, other=0)
        total += number * tl.load(offsets, mask=mask, other=0)
        count += number
    # Channels beyond C have a count of 0.
    counted = tl.maximum(tl.sum(count, 0), 1.0)
    joint = tl.sum(total, 0) / counted
    squares = tl.zeros((ROWS, CHANNELS), tl.float64)
    for start in range(0, splits, ROWS):
        part = start + row
        mask = (part < splits)[:, None] & channel_mask[None, :]
        offsets = parts + part[:, None] * C + channel[None, :]
        number = tl.load(offsets + 2 * splits * C, mask=mask, other=0)
        deviation = tl.load(offsets, mask=mask, other=0) - joint[None, :]
        squares += tl.load(offsets + splits * C, mask=mask, other=0) + number * deviation * deviation
    variance = tl.sum(squares, 0) / counted
    tl.store(mean + channel, joint, mask=channel_mask)
    tl.store(var + channel, variance, mask=channel_mask)
    _store_prepared(prepared, joint, variance, channel, channel_mask, C, EPS, ACCUMULATOR)


@triton.jit
def _prepare_kernel(
    mean, var, averages, prepared, C, EPS: tl.constexpr, CHANNELS: tl.constexpr, ACCUMULATOR: tl.constexpr
):
    """What tiles need of mean and variance, and the gradient's slope and offset from the averages: [3 or 5, C]."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    channel_mask = channel < C
    joint = tl.load(mean + channel, mask=channel_mask, other=0)
    variance = tl.load(var + channel, mask=channel_mask, other=1)
    low, inverse_std = _store_prepared(prepared, joint, variance, channel, channel_mask, C, EPS, ACCUMULATOR)
    if averages is not None:
        grad_average = tl.load(averages + channel, mask=channel_mask, other=0) * inverse_std
        product_average = tl.load(averages + C + channel, mask=channel_mask, other=0) * inverse_std
        slope = (product_average * inverse_std).to(ACCUMULATOR)
        tl.store(prepared + 3 * C + channel, slope, mask=channel_mask)
        tl.store(prepared + 4 * C + channel, grad_average.to(ACCUMULATOR) - slope * low, mask=channel_mask)


@triton.jit
def _normalize_kernel(
    x,
    prepared,
    gain,
    bias,
    y,
    x_sample,
    x_channel,
    x_position,
    y_sample,
    y_channel,
    y_position,
    gain_sample,
    gain_channel,
    bias_sample,
    bias_channel,
    C,
    L,
    chunks,
    blocks,
    RELU: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """The normalised map, scaled and shifted for each sample, optionally through ReLU."""
    pid = tl.program_id(0)
    position = pid % blocks * POSITIONS + tl.arange(0, POSITIONS)
    channel = pid // blocks % chunks * CHANNELS + tl.arange(0, CHANNELS)
    sample = (pid // blocks // chunks).to(tl.int64)
    channel_mask = channel < C
    mask = channel_mask[:, None] & (position < L)[None, :]
    high = tl.load(prepared + channel, mask=channel_mask, other=0)
    low = tl.load(prepared + C + channel, mask=channel_mask, other=0)
    inverse_std = tl.load(prepared + 2 * C + channel, mask=channel_mask, other=0)
    scale = tl.load(gain + sample * gain_sample + channel * gain_channel, mask=channel_mask, other=0)
    scale = scale.to(ACCUMULATOR) * inverse_std
    shift = tl.load(bias + sample * bias_sample + channel * bias_channel, mask=channel_mask, other=0)
    shift = shift.to(ACCUMULATOR) - low * scale
    tile = _load_tile(x + sample * x_sample, channel, position, x_channel, x_position, mask, ACCUMULATOR)
    tile = (tile - high[:, None]) * scale[:, None] + shift[:, None]
    if RELU:
        tile = tl.where(tile < 0, 0.0, tile)
    offsets = channel[:, None] * y_channel + position[None, :] * y_position
    tl.store(y + sample * y_sample + offsets, rounded(tile, y.dtype.element_ty), mask=mask)


@triton.jit
def _sums_kernel(
    grad,
    x,
    y,
    mean,
    sums,
    products,
    grad_sample,
    grad_channel,
    grad_position,
    x_sample,
    x_channel,
    x_position,
    y_sample,
    y_channel,
    y_position,
    N,
    C,
    L,
    chunks,
    blocks,
    blocks_each,
    splits,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """The sums of grad and of ``grad * (x - mean)`` over each part of the positions, [splits, N, C].

    The mean is rounded here; :func:`_join_sums_kernel` corrects for it.
    """
    pid = tl.program_id(0)
    split = pid % splits
    channel = pid // splits % chunks * CHANNELS + tl.arange(0, CHANNELS)
    sample = (pid // splits // chunks).to(tl.int64)
    channel_mask = channel < C
    place = tl.arange(0, POSITIONS)
    high = tl.load(mean + channel, mask=channel_mask, other=0).to(ACCUMULATOR)
    grad_sums = tl.zeros((CHANNELS, POSITIONS), ACCUMULATOR)
    product_sums = tl.zeros((CHANNELS, POSITIONS), ACCUMULATOR)
    grad += sample * grad_sample
    x += sample * x_sample
    if y is not None:
        y += sample * y_sample
    first = split * blocks_each
    for block in range(first, tl.minimum(first + blocks_each, blocks)):
        position = block * POSITIONS + place
        mask = channel_mask[:, None] & (position < L)[None, :]
        tile = _load_tile(grad, channel, position, grad_channel, grad_position, mask, ACCUMULATOR)
        if y is not None:
            output = _load_tile(y, channel, position, y_channel, y_position, mask, ACCUMULATOR)
            tile = tl.where(output <= 0, 0.0, tile)
        values = _load_tile(x, channel, position, x_channel, x_position, mask, ACCUMULATOR)
        grad_sums += tile
        product_sums += tile * (values - high[:, None])
    offsets = (split * N + sample) * C + channel
    tl.store(sums + offsets, tl.sum(grad_sums, 1), mask=channel_mask)
    tl.store(products + offsets, tl.sum(product_sums, 1), mask=channel_mask)


@triton.jit
def _join_sums_kernel(
    sums,
    products,
    mean,
    var,
    gain,
    grad_gain,
    grad_bias,
    totals,
    gain_sample,
    gain_channel,
    N,
    C,
    splits,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """Gradients of gain and bias, [N, C], and the sums over N of their products with the gain, [2, C], float64."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    channel_mask = channel < C
    row = tl.arange(0, ROWS)
    joint = tl.load(mean + channel, mask=channel_mask, other=0)
    low = (joint - joint.to(ACCUMULATOR).to(tl.float64)).to(ACCUMULATOR)
    inverse_std = 1.0 / tl.sqrt(tl.load(var + channel, mask=channel_mask, other=1) + EPS)
    grad_total = tl.zeros((ROWS, CHANNELS), tl.float64)
    product_total = tl.zeros((ROWS, CHANNELS), tl.float64)
    for start in range(0, N, ROWS):
        sample = (start + row).to(tl.int64)
        mask = (sample < N)[:, None] & channel_mask[None, :]
        total = tl.zeros((ROWS, CHANNELS), ACCUMULATOR)
        product = tl.zeros((ROWS, CHANNELS), ACCUMULATOR)
        for split in range(splits):
            offsets = (split * N + sample)[:, None] * C + channel[None, :]
            total += tl.load(sums + offsets, mask=mask, other=0)
            product += tl.load(products + offsets, mask=mask, other=0)
        product = (product - low[None, :] * total) * inverse_std.to(ACCUMULATOR)[None, :]
        offsets = sample[:, None] * C + channel[None, :]
        tl.store(grad_bias + offsets, total, mask=mask)
        tl.store(grad_gain + offsets, product, mask=mask)
        factor = tl.load(
            gain + sample[:, None] * gain_sample + channel[None, :] * gain_channel, mask=mask, other=0
        ).to(ACCUMULATOR)
        grad_total += (factor * total).to(tl.float64)
        product_total += (factor * product).to(tl.float64)
    tl.store(totals + channel, tl.sum(grad_total, 0), mask=channel_mask)
    tl.store(totals + C + channel, tl.sum(product_total, 0), mask=channel_mask)


@triton.jit
def _gradient_kernel(
    grad,
    x,
    y,
    prepared,
    gain,
    grad_x,
    grad_sample,
    grad_channel,
    grad_position,
    x_sample,
    x_channel,
    x_position,
    y_sample,
    y_channel,
    y_position,
    out_sample,
    out_channel,
    out_position,
    gain_sample,
    gain_channel,
    C,
    L,
    chunks,
    blocks,
    BATCH_STATISTICS: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """The gradient of x, with the terms that come through the batch's statistics unless these are constants."""
    pid = tl.program_id(0)
    position = pid % blocks * POSITIONS + tl.arange(0, POSITIONS)
    channel = pid // blocks % chunks * CHANNELS + tl.arange(0, CHANNELS)
    sample = (pid // blocks // chunks).to(tl.int64)
    channel_mask = channel < C
    mask = channel_mask[:, None] & (position < L)[None, :]
    scale = tl.load(gain + sample * gain_sample + channel * gain_channel, mask=channel_mask, other=0)
    scale = scale.to(ACCUMULATOR) * tl.load(prepared + 2 * C + channel, mask=channel_mask, other=0)
    grad += sample * grad_sample
    tile = _load_tile(grad, channel, position, grad_channel, grad_position, mask, ACCUMULATOR)
    if y is not None:
        y += sample * y_sample
        output = _load_tile(y, channel, position, y_channel, y_position, mask, ACCUMULATOR)
        tile = tl.where(output <= 0, 0.0, tile)
    tile = tile * scale[:, None]
    if BATCH_STATISTICS:
        high = tl.load(prepared + channel, mask=channel_mask, other=0)
        slope = tl.load(prepared + 3 * C + channel, mask=channel_mask, other=0)
        offset = tl.load(prepared + 4 * C + channel, mask=channel_mask, other=0)
        x += sample * x_sample
        values = _load_tile(x, channel, position, x_channel, x_position, mask, ACCUMULATOR)
        tile -= (values - high[:, None]) * slope[:, None] + offset[:, None]
    offsets = channel[:, None] * out_channel + position[None, :] * out_position
    tl.store(grad_x + sample * out_sample + offsets, rounded(tile, grad_x.dtype.element_ty), mask=mask)


def unsupported_reasons(inputs: ConditionalNormInputs) -> list[str]:
    """Return why these kernels cannot serve on a device that runs Triton."""
    dtypes = torch.float32, torch.bfloat16, torch.float16
    reasons = triton_support.unsupported_reasons(inputs.x, *dtypes)
    return reasons + triton_support.large_sample_reasons(inputs.x) + opaque_unsupported_reasons(inputs)


def forward(
    arguments: ForwardArguments, combine: CombineStatistics | None, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Write y; return the mean and biased variance that it was normalised with."""
    x, eps = _map(arguments.x), arguments.eps
    tile = _tile_of(_map(out))
    N, C, L, chunks, blocks = _sizes(x, tile)
    items = N * blocks
    items_each, splits = _parts(items, min(MAX_PARTS, max(1, PROGRAMS // chunks)))
    parts = torch.empty((3, splits, C), dtype=torch.float64, device=x.device)
    mean, var = (torch.empty(C, dtype=torch.float64, device=x.device) for _ in range(2))
    prepared = torch.empty((3, C), dtype=accumulation_dtype(x.dtype), device=x.device)
    with device_guard(x):
        _statistics_kernel[(chunks * splits,)](
            x, parts, *x.stride(), C, L, blocks, items, items_each, splits, **_map_options(x, tile)
        )
        _join_statistics_kernel[(triton.cdiv(C, SUM_TILE.channels),)](
            parts, mean, var, prepared, C, splits, EPS=eps, ROWS=SUM_TILE.positions, **_options(x, SUM_TILE)
        )
    if combine is None:
        _normalize(arguments, prepared, _map(out))
    else:
        mean, var = combine(mean, var)
        normalize(arguments, mean, var, out)
    return mean, var


def normalize(arguments: ForwardArguments, mean: Tensor, var: Tensor, out: Tensor) -> None:
    """Write y for the mean and variance to normalise with."""
    _normalize(arguments, _prepare(mean, var, None, arguments.eps, out), _map(out))


def _prepare(mean: Tensor, var: Tensor, averages: Tensor | None, eps: float, like: Tensor) -> Tensor:
    """Return what the kernels of whole maps read of statistics and averages, in the accumulation dtype."""
    C = mean.size(0)
    rows = 3 if averages is None else 5
    prepared = torch.empty((rows, C), dtype=accumulation_dtype(like.dtype), device=mean.device)
    with device_guard(mean):
        _prepare_kernel[(triton.cdiv(C, SUM_TILE.channels),)](
            mean, var, averages, prepared, C, EPS=eps, **_options(like, SUM_TILE)
        )
    return prepared


def _normalize(arguments: ForwardArguments, prepared: Tensor, y: Tensor) -> None:
    x, gain, bias = _map(arguments.x), arguments.gain, arguments.bias
    tile = _tile_of(y)
    sizes = _sizes(x, tile)
    strides = *x.stride(), *y.stride(), *_strides(gain), *_strides(bias)
    with device_guard(x):
        _normalize_kernel[(sizes.tiles,)](
            x, prepared, gain, bias, y, *strides, *sizes[1:], RELU=arguments.relu, **_map_options(x, tile)
        )


def backward(arguments: BackwardArguments, average: Average, out: Tensor | None) -> CoefficientGradients:
    """Write the gradient of x, if it is needed; return those of gain and bias."""
    maps = [None if tensor is None else _map(tensor) for tensor in arguments[:3]]  # grad_y, x, y
    strides = [stride for x in maps for stride in ((0, 0, 0) if x is None else x.stride())]
    averages = grad_gain = grad_bias = None
    if arguments.needs_sums:
        grad_gain, grad_bias, totals = _sums(arguments, maps, strides)
        if arguments.needs_averages:
            averages = average(totals)
    if out is not None:
        prepared = _prepare(arguments.mean, arguments.var, averages, arguments.eps, out)
        _write_gradient(arguments, maps, strides, prepared, _map(out))
    return CoefficientGradients(grad_gain, grad_bias)


KERNELS = ConditionalNormKernels(forward, normalize, backward)


def _sums(
    arguments: BackwardArguments, maps: list[Tensor | None], strides: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gain and bias, [N, C], and the sums over N of their products with the gain, [2, C]."""
    x, mean, var, gain = _map(arguments.x), arguments.mean, arguments.var, arguments.gain
    tile = _tile_of(x)
    N, C, _, chunks, blocks = sizes = _sizes(x, tile)
    blocks_each, splits = _parts(blocks, max(1, PROGRAMS // (N * chunks)))
    dtype = accumulation_dtype(x.dtype)
    sums, products = torch.empty((2, splits, N, C), dtype=dtype, device=x.device).unbind()
    grad_gain, grad_bias = (torch.empty((N, C), dtype=dtype, device=x.device) for _ in range(2))
    totals = torch.empty((2, C), dtype=torch.float64, device=x.device)
    with device_guard(x):
        _sums_kernel[(N * chunks * splits,)](
            *maps, mean, sums, products, *strides, *sizes, blocks_each, splits, **_map_options(x, tile)
        )
        tensors = sums, products, mean, var, gain, grad_gain, grad_bias, totals
        options = {"EPS": arguments.eps, "ROWS": SUM_TILE.positions, **_options(x, SUM_TILE)}
        _join_sums_kernel[(triton.cdiv(C, SUM_TILE.channels),)](
            *tensors, *_strides(gain), N, C, splits, **options
        )
    return grad_gain, grad_bias, totals


def _write_gradient(
    arguments: BackwardArguments,
    maps: list[Tensor | None],
    strides: list[int],
    prepared: Tensor,
    grad_x: Tensor,
) -> None:
    gain = arguments.gain
    tile = _tile_of(grad_x)
    sizes = _sizes(grad_x, tile)
    strides = [*strides, *grad_x.stride(), *_strides(gain)]
    options = {"BATCH_STATISTICS": arguments.batch_statistics, **_map_options(grad_x, tile)}
    with device_guard(grad_x):
        _gradient_kernel[(sizes.tiles,)](*maps, prepared, gain, grad_x, *strides, *sizes[1:], **options)


def compile_jobs() -> Iterator[CompileJob]:
    """Yield what to compile ahead of time: every tile and dtype, with ReLU, and sizes and strides of 16n or any.

    float16 is not compiled: it differs from bfloat16 only by a conversion.
    """
    tiles = [("nchw", "position", tile) for tile in PLANE_TILES.values()]
    tiles += [("channels_last", "channel", tile) for tile in PIXEL_TILES.values()]
    for element in ("bf16", "fp32"):
        for kernel in (_statistics_kernel, _normalize_kernel, _sums_kernel, _gradient_kernel):
            for layout, adjacent, tile in tiles:
                unit_strides = {f"{name}_{adjacent}": 1 for name in ("x", "y", "grad", "out")}
                for number, sizes in (("i32:16", "even"), ("i32", "any size")):
                    label = f"{layout} {tile.channels}x{tile.positions} {element} {sizes}"
                    yield _compile_job(kernel, tile, label, element, number, unit_strides)
    for kernel in (_join_statistics_kernel, _join_sums_kernel, _prepare_kernel):
        yield _compile_job(kernel, SUM_TILE, "any size", "fp32", "i32", {})


def _compile_job(
    kernel: Any, tile: Tile, label: str, element: str, number: str, unit_strides: dict[str, int]
) -> CompileJob:
    constexprs = {
        "EPS": 1e-5,
        "RELU": True,
        "BATCH_STATISTICS": True,
        "ACCUMULATOR": tl.float32,
        "CHANNELS": tile.channels,
        "POSITIONS": tile.positions,
        "ROWS": tile.positions,
        "gain_channel": 1,
        "bias_channel": 1,
        **unit_strides,
    }
    small = ("gain", "bias", "prepared", "sums", "products", "grad_gain", "grad_bias")
    pointers = {
        **dict.fromkeys(("x", "y", "grad", "grad_x"), f"*{element}"),
        **dict.fromkeys(("parts", "mean", "var", "averages", "totals"), "*fp64"),
        **dict.fromkeys(small, "*fp32"),
    }
    name = kernel.__name__.strip("_").removesuffix("_kernel").replace("_", " ")
    return triton_support.compile_job(kernel, tile, f"{name} {label}", constexprs, pointers, number)


def _map(x: Tensor) -> Tensor:
    """[N, C, *] -> [N, C, L]; a copy only if the positions of x have no common stride."""
    return x.unsqueeze(2) if x.dim() == 2 else x.flatten(2)


def _tile_of(x: Tensor) -> Tile:
    """The tile for a map [N, C, L]."""
    table, size = (PIXEL_TILES, x.size(1)) if x.stride(1) == 1 < x.stride(2) else (PLANE_TILES, x.size(2))
    return next(tile for smallest, tile in table.items() if size >= smallest)


class _Sizes(NamedTuple):
    """The sizes of a map, and how many tiles cover its channels and its positions."""

    N: int
    C: int
    L: int
    chunks: int
    blocks: int

    @property
    def tiles(self) -> int:
        return self.N * self.chunks * self.blocks


def _sizes(x: Tensor, tile: Tile) -> _Sizes:
    N, C, L = x.shape
    return _Sizes(N, C, L, triton.cdiv(C, tile.channels), triton.cdiv(L, tile.positions))


def _parts(items: int, programs: int) -> tuple[int, int]:
    """Return how many items each of at most so many programs takes, and how many programs that makes."""
    each = triton.cdiv(items, min(items, programs))
    return each, triton.cdiv(items, each)


def _strides(coefficients: Tensor) -> tuple[int, int]:
    """Return the strides of samples and channels, for [N, C] or [C]."""
    return (0 if coefficients.dim() == 1 else coefficients.stride(0)), coefficients.stride(-1)


def _options(x: Tensor, tile: Tile) -> dict[str, Any]:
    constexprs = {"CHANNELS": tile.channels, "ACCUMULATOR": triton_support.accumulator(x.dtype)}
    return constexprs | triton_support.launch_options(tile)


def _map_options(x: Tensor, tile: Tile) -> dict[str, Any]:
    return {"POSITIONS": tile.positions, **_options(x, tile)}
