"""Triton kernels for conditional batch norm.

Forward is three kernels: programs take mean and squared deviations of a share of a channel's values each, a small
one puts the shares together, and one normalises, scales, shifts and applies ReLU. Backward is the same the other way
round: sums for each sample and channel, small kernels that put them together, and the gradient of x. What the mean's
float32 value lacks is made up for, so that no digits cancel.

A feature map is a block of channels times positions for a program; the tile follows from which of the two lie next to
each other in memory. Shape letters: N batch, C channels, L positions.
"""

# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sagan_layers.attention.fused_triton import _device_of, _rounded
from sagan_layers.torch_support import accumulation_dtype

# How many programs share the sums: four for each multiprocessor of an H100.
PROGRAMS = 528
# Shares of a channel, at the most; one program puts them together.
MAX_SHARES = 256


@dataclass(frozen=True)
class Tile:
    """What one program works on at a time.

    Attributes:
        channels: how many.
        positions: of each.
        num_warps: warps of a program.
        num_stages: loads in flight.
    """

    channels: int
    positions: int
    num_warps: int
    num_stages: int


# Where positions lie next to each other: by the least L.
PLANE_TILES = {
    1024: Tile(2, 1024, 4, 2),
    256: Tile(8, 256, 4, 2),
    64: Tile(32, 64, 4, 2),
    1: Tile(128, 16, 4, 2),
}
# Where channels do: by the least C.
PIXEL_TILES = {
    128: Tile(128, 16, 4, 2),
    64: Tile(64, 32, 8, 2),
    32: Tile(32, 64, 8, 2),
    1: Tile(16, 128, 8, 2),
}
# Shares or samples, and channels, where partial sums are added up.
SUM_TILE = Tile(32, 32, 4, 2)


@triton.jit
def _load_tile(base, channel, position, channel_stride, position_stride, mask, ACCUMULATOR: tl.constexpr):
    offsets = channel[:, None] * channel_stride + position[None, :] * position_stride
    return tl.load(base + offsets, mask=mask, other=0).to(ACCUMULATOR)


@triton.jit
def _store_prepared(
    prepared, mean, var, channel, channel_mask, C, EPS: tl.constexpr, ACCUMULATOR: tl.constexpr
):
    """Write the mean as a sum of two numbers, and one over the standard deviation, which is returned in float64.

    Tiles are computed from these alone: float64 is slow on most GPUs.
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
    shares,
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
    """Of each share of a channel's values mean, sum of squared deviations and count, [3, splits, C], float64."""
    pid = tl.program_id(0)
    split = pid % splits
    channel = pid // splits * CHANNELS + tl.arange(0, CHANNELS)
    channel_mask = channel < C
    place = tl.arange(0, POSITIONS)
    first = split * items_each
    # Squares are summed around the mean of the first tile.
    position = first % blocks * POSITIONS + place
    tile = _load_tile(
        x + (first // blocks).to(tl.int64) * x_sample,
        channel,
        position,
        x_channel,
        x_position,
        channel_mask[:, None] & (position < L)[None, :],
        ACCUMULATOR,
    )
    here = tl.minimum(L - first % blocks * POSITIONS, POSITIONS)
    guess = tl.sum(tile, 1) / here
    sums = tl.zeros((CHANNELS, POSITIONS), ACCUMULATOR)
    squares = tl.zeros((CHANNELS, POSITIONS), ACCUMULATOR)
    count = here * 0
    for item in range(first, tl.minimum(first + items_each, items)):
        block = item % blocks
        position = block * POSITIONS + place
        mask = channel_mask[:, None] & (position < L)[None, :]
        tile = _load_tile(
            x + (item // blocks).to(tl.int64) * x_sample,
            channel,
            position,
            x_channel,
            x_position,
            mask,
            ACCUMULATOR,
        )
        centred = tl.where(mask, tile - guess[:, None], 0.0)
        sums += centred
        squares += centred * centred
        count += tl.minimum(L - block * POSITIONS, POSITIONS)
    number = count.to(tl.float64)
    total = tl.sum(sums, 1).to(tl.float64)
    share = shares + split * C + channel
    tl.store(share, guess.to(tl.float64) + total / number, mask=channel_mask)
    deviations = tl.sum(squares, 1).to(tl.float64) - total * total / number
    tl.store(share + splits * C, tl.maximum(deviations, 0.0), mask=channel_mask)
    tl.store(share + 2 * splits * C, number + tl.zeros((CHANNELS,), tl.float64), mask=channel_mask)


@triton.jit
def _join_statistics_kernel(
    shares,
    mean,
    var,
    prepared,
    C,
    splits,
    EPS: tl.constexpr,
    SHARES: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """Mean and biased variance of each channel, [C], from those of its shares; and what is prepared of them."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    channel_mask = channel < C
    row = tl.arange(0, SHARES)
    total = tl.zeros((SHARES, CHANNELS), tl.float64)
    count = tl.zeros((SHARES, CHANNELS), tl.float64)
    for start in range(0, splits, SHARES):
        share = start + row
        mask = (share < splits)[:, None] & channel_mask[None, :]
        offsets = shares + share[:, None] * C + channel[None, :]
        number = tl.load(offsets + 2 * splits * C, mask=mask, other=0)
        total += number * tl.load(offsets, mask=mask, other=0)
        count += number
    # Channels that are none have a count of 0.
    counted = tl.maximum(tl.sum(count, 0), 1.0)
    joint = tl.sum(total, 0) / counted
    squares = tl.zeros((SHARES, CHANNELS), tl.float64)
    for start in range(0, splits, SHARES):
        share = start + row
        mask = (share < splits)[:, None] & channel_mask[None, :]
        offsets = shares + share[:, None] * C + channel[None, :]
        number = tl.load(offsets + 2 * splits * C, mask=mask, other=0)
        apart = tl.load(offsets, mask=mask, other=0) - joint[None, :]
        squares += tl.load(offsets + splits * C, mask=mask, other=0) + number * apart * apart
    variance = tl.sum(squares, 0) / counted
    tl.store(mean + channel, joint, mask=channel_mask)
    tl.store(var + channel, variance, mask=channel_mask)
    _store_prepared(prepared, joint, variance, channel, channel_mask, C, EPS, ACCUMULATOR)


@triton.jit
def _prepare_kernel(
    mean, var, averages, prepared, C, EPS: tl.constexpr, CHANNELS: tl.constexpr, ACCUMULATOR: tl.constexpr
):
    """What is prepared of mean and variance, and of averages the slope and offset of the gradient: [3 or 5, C]."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    channel_mask = channel < C
    joint = tl.load(mean + channel, mask=channel_mask, other=0)
    variance = tl.load(var + channel, mask=channel_mask, other=1)
    low, inverse_std = _store_prepared(prepared, joint, variance, channel, channel_mask, C, EPS, ACCUMULATOR)
    if averages is not None:
        of_grad = tl.load(averages + channel, mask=channel_mask, other=0) * inverse_std
        of_product = tl.load(averages + C + channel, mask=channel_mask, other=0) * inverse_std
        slope = (of_product * inverse_std).to(ACCUMULATOR)
        tl.store(prepared + 3 * C + channel, slope, mask=channel_mask)
        tl.store(prepared + 4 * C + channel, of_grad.to(ACCUMULATOR) - slope * low, mask=channel_mask)


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
    PRECISION: tl.constexpr,
):
    """The normalised map, scaled and shifted for each sample, and ReLU of it if asked."""
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
    tl.store(y + sample * y_sample + offsets, _rounded(tile, y.dtype.element_ty, PRECISION), mask=mask)


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
    """Of each share of the positions the sums of grad and of ``grad * (x - mean)``, [splits, N, C].

    The mean is rounded here; :func:`_join_sums_kernel` makes up for it.
    """
    pid = tl.program_id(0)
    split = pid % splits
    channel = pid // splits % chunks * CHANNELS + tl.arange(0, CHANNELS)
    sample = (pid // splits // chunks).to(tl.int64)
    channel_mask = channel < C
    place = tl.arange(0, POSITIONS)
    high = tl.load(mean + channel, mask=channel_mask, other=0).to(ACCUMULATOR)
    of_grad = tl.zeros((CHANNELS, POSITIONS), ACCUMULATOR)
    of_product = tl.zeros((CHANNELS, POSITIONS), ACCUMULATOR)
    first = split * blocks_each
    for block in range(first, tl.minimum(first + blocks_each, blocks)):
        position = block * POSITIONS + place
        mask = channel_mask[:, None] & (position < L)[None, :]
        tile = _load_tile(
            grad + sample * grad_sample, channel, position, grad_channel, grad_position, mask, ACCUMULATOR
        )
        if y is not None:
            output = _load_tile(
                y + sample * y_sample, channel, position, y_channel, y_position, mask, ACCUMULATOR
            )
            tile = tl.where(output <= 0, 0.0, tile)
        values = _load_tile(
            x + sample * x_sample, channel, position, x_channel, x_position, mask, ACCUMULATOR
        )
        of_grad += tile
        of_product += tile * (values - high[:, None])
    offsets = (split * N + sample) * C + channel
    tl.store(sums + offsets, tl.sum(of_grad, 1), mask=channel_mask)
    tl.store(products + offsets, tl.sum(of_product, 1), mask=channel_mask)


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
    SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """Gradients of gain and bias, [N, C], and the sums over N of their products with the gain, [2, C], float64."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    channel_mask = channel < C
    row = tl.arange(0, SAMPLES)
    joint = tl.load(mean + channel, mask=channel_mask, other=0)
    low = (joint - joint.to(ACCUMULATOR).to(tl.float64)).to(ACCUMULATOR)
    inverse_std = 1.0 / tl.sqrt(tl.load(var + channel, mask=channel_mask, other=1) + EPS)
    of_grad = tl.zeros((SAMPLES, CHANNELS), tl.float64)
    of_product = tl.zeros((SAMPLES, CHANNELS), tl.float64)
    for start in range(0, N, SAMPLES):
        sample = (start + row).to(tl.int64)
        mask = (sample < N)[:, None] & channel_mask[None, :]
        total = tl.zeros((SAMPLES, CHANNELS), ACCUMULATOR)
        product = tl.zeros((SAMPLES, CHANNELS), ACCUMULATOR)
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
        of_grad += (factor * total).to(tl.float64)
        of_product += (factor * product).to(tl.float64)
    tl.store(totals + channel, tl.sum(of_grad, 0), mask=channel_mask)
    tl.store(totals + C + channel, tl.sum(of_product, 0), mask=channel_mask)


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
    to_sample,
    to_channel,
    to_position,
    gain_sample,
    gain_channel,
    C,
    L,
    chunks,
    blocks,
    GIVEN: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of x; if statistics were given, they are constants."""
    pid = tl.program_id(0)
    position = pid % blocks * POSITIONS + tl.arange(0, POSITIONS)
    channel = pid // blocks % chunks * CHANNELS + tl.arange(0, CHANNELS)
    sample = (pid // blocks // chunks).to(tl.int64)
    channel_mask = channel < C
    mask = channel_mask[:, None] & (position < L)[None, :]
    scale = tl.load(gain + sample * gain_sample + channel * gain_channel, mask=channel_mask, other=0)
    scale = scale.to(ACCUMULATOR) * tl.load(prepared + 2 * C + channel, mask=channel_mask, other=0)
    tile = _load_tile(
        grad + sample * grad_sample, channel, position, grad_channel, grad_position, mask, ACCUMULATOR
    )
    if y is not None:
        output = _load_tile(
            y + sample * y_sample, channel, position, y_channel, y_position, mask, ACCUMULATOR
        )
        tile = tl.where(output <= 0, 0.0, tile)
    tile = tile * scale[:, None]
    if not GIVEN:
        high = tl.load(prepared + channel, mask=channel_mask, other=0)
        slope = tl.load(prepared + 3 * C + channel, mask=channel_mask, other=0)
        offset = tl.load(prepared + 4 * C + channel, mask=channel_mask, other=0)
        values = _load_tile(
            x + sample * x_sample, channel, position, x_channel, x_position, mask, ACCUMULATOR
        )
        tile -= (values - high[:, None]) * slope[:, None] + offset[:, None]
    offsets = channel[:, None] * to_channel + position[None, :] * to_position
    tl.store(
        grad_x + sample * to_sample + offsets, _rounded(tile, grad_x.dtype.element_ty, PRECISION), mask=mask
    )


_INTERPRETED = not isinstance(_normalize_kernel, triton.JITFunction)
# Offsets within a sample have 32 bits, those of a tile's padding included.
_LARGEST_OFFSET = 2**31 - 2**16


def unsupported_reasons(x: Tensor) -> list[str]:
    """Return why these kernels cannot serve a feature map [N, C, *], empty if they can."""
    reasons = []
    if x.device.type != "cuda" and not (_INTERPRETED and x.device.type == "cpu"):
        reasons.append(f"it runs on CUDA devices, the input is on {x.device}")
    served = (torch.float32, torch.bfloat16, torch.float16, *(torch.float64,) * _INTERPRETED)
    if x.dtype not in served:
        reasons.append(f"{x.dtype} is not served")
    if x.device.type == "cuda" and not _INTERPRETED and torch.cuda.get_device_capability(x.device) < (8, 0):
        reasons.append("the device is older than compute capability 8.0")
    span = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    if max(span, x[:1].numel()) >= _LARGEST_OFFSET:
        reasons.append(f"a sample spans {_LARGEST_OFFSET} elements or more")
    return reasons


def forward(
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    eps: float,
    relu: bool,
    combine: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
    to: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write y; return the mean and biased variance that it was normalised with, both [C], float64.

    Args:
        x: [N, C, *], any strides.
        gain: [N, C] or [C].
        bias: [N, C] or [C].
        eps: added to the variance.
        relu: whether negative values of y are replaced by 0.
        combine: takes mean and variance of x and returns those to use, if they are to be of more than x.
        to: where y goes, contiguous or channels_last.
    """
    values = _map(x)
    N, C, L = values.shape
    tile = _tile_of(_map(to))
    chunks, blocks = triton.cdiv(C, tile.channels), triton.cdiv(L, tile.positions)
    items_each, splits = _shared(N * blocks, min(MAX_SHARES, max(1, PROGRAMS // chunks)))
    shares = torch.empty((3, splits, C), dtype=torch.float64, device=x.device)
    mean, var = (torch.empty(C, dtype=torch.float64, device=x.device) for _ in range(2))
    prepared = torch.empty((3, C), dtype=accumulation_dtype(x.dtype), device=x.device)
    with _device_of(x):
        _statistics_kernel[(chunks * splits,)](
            values,
            shares,
            *values.stride(),
            C,
            L,
            blocks,
            N * blocks,
            items_each,
            splits,
            CHANNELS=tile.channels,
            POSITIONS=tile.positions,
            **_accumulator(x),
            **_options(tile),
        )
        _join_statistics_kernel[(triton.cdiv(C, SUM_TILE.channels),)](
            shares,
            mean,
            var,
            prepared,
            C,
            splits,
            EPS=eps,
            SHARES=SUM_TILE.positions,
            CHANNELS=SUM_TILE.channels,
            **_accumulator(x),
            **_options(SUM_TILE),
        )
    if combine is None:
        _normalize(values, prepared, gain, bias, relu, _map(to))
    else:
        mean, var = combine(mean, var)
        normalize(x, mean, var, gain, bias, eps, relu, to)
    return mean, var


def normalize(
    x: Tensor, mean: Tensor, var: Tensor, gain: Tensor, bias: Tensor, eps: float, relu: bool, to: Tensor
) -> None:
    """Write y for a given mean and variance."""
    _normalize(_map(x), _prepared(mean, var, None, eps, to), gain, bias, relu, _map(to))


def _prepared(mean: Tensor, var: Tensor, averages: Tensor | None, eps: float, like: Tensor) -> Tensor:
    """Return what the kernels of whole maps read of statistics and averages, in the compute dtype."""
    C = mean.size(0)
    prepared = torch.empty(
        (3 if averages is None else 5, C), dtype=accumulation_dtype(like.dtype), device=mean.device
    )
    with _device_of(mean):
        _prepare_kernel[(triton.cdiv(C, SUM_TILE.channels),)](
            mean,
            var,
            averages,
            prepared,
            C,
            EPS=eps,
            CHANNELS=SUM_TILE.channels,
            **_accumulator(like),
            **_options(SUM_TILE),
        )
    return prepared


def _normalize(
    values: Tensor, prepared: Tensor, gain: Tensor, bias: Tensor, relu: bool, result: Tensor
) -> None:
    N, C, L = values.shape
    tile = _tile_of(result)
    chunks, blocks = triton.cdiv(C, tile.channels), triton.cdiv(L, tile.positions)
    with _device_of(values):
        _normalize_kernel[(N * chunks * blocks,)](
            values,
            prepared,
            gain,
            bias,
            result,
            *values.stride(),
            *result.stride(),
            *_strides(gain),
            *_strides(bias),
            C,
            L,
            chunks,
            blocks,
            RELU=relu,
            CHANNELS=tile.channels,
            POSITIONS=tile.positions,
            **_accumulator(values),
            **_precision(),
            **_options(tile),
        )


def backward(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gain: Tensor,
    eps: float,
    average: Callable[[Tensor], Tensor] | None,
    of_coefficients: bool,
    to: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Write the gradient of x; return those of gain and bias for each sample, [N, C] in the compute dtype.

    Args:
        grad_y: as x, any strides.
        x: [N, C, *], any strides.
        y: the output if it went through ReLU, else None.
        mean: [C], float64.
        var: [C], float64.
        gain: [N, C] or [C].
        eps: added to the variance.
        average: takes sums over this batch, [2, C], and returns averages over all values of a channel; None if mean
            and variance were given.
        of_coefficients: whether the gradients of gain and bias are wanted.
        to: where the gradient of x goes, contiguous or channels_last; None if it is not wanted.
    """
    grad, values = _map(grad_y), _map(x)
    output = None if y is None else _map(y)
    maps = (grad, values, output)
    strides = [stride for tensor in maps for stride in ((0, 0, 0) if tensor is None else tensor.stride())]
    averages = grad_gain = grad_bias = None
    if of_coefficients or average is not None:
        grad_gain, grad_bias, totals = _sums(maps, strides, mean, var, gain, eps)
        averages = None if average is None else average(totals)
    if to is not None:
        prepared = _prepared(mean, var, averages, eps, to)
        _write_gradient(maps, strides, prepared, gain, average is None, _map(to))
    return grad_gain, grad_bias


def _sums(
    maps: tuple[Tensor, Tensor, Tensor | None],
    strides: list[int],
    mean: Tensor,
    var: Tensor,
    gain: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gain and bias, [N, C], and the sums over N of their products with the gain, [2, C]."""
    x = maps[1]
    N, C, L = x.shape
    tile = _tile_of(x)
    chunks, blocks = triton.cdiv(C, tile.channels), triton.cdiv(L, tile.positions)
    blocks_each, splits = _shared(blocks, max(1, PROGRAMS // (N * chunks)))
    dtype = accumulation_dtype(x.dtype)
    sums, products = torch.empty((2, splits, N, C), dtype=dtype, device=x.device).unbind()
    grad_gain, grad_bias = (torch.empty((N, C), dtype=dtype, device=x.device) for _ in range(2))
    totals = torch.empty((2, C), dtype=torch.float64, device=x.device)
    with _device_of(x):
        _sums_kernel[(N * chunks * splits,)](
            *maps,
            mean,
            sums,
            products,
            *strides,
            N,
            C,
            L,
            chunks,
            blocks,
            blocks_each,
            splits,
            CHANNELS=tile.channels,
            POSITIONS=tile.positions,
            **_accumulator(x),
            **_options(tile),
        )
        _join_sums_kernel[(triton.cdiv(C, SUM_TILE.channels),)](
            sums,
            products,
            mean,
            var,
            gain,
            grad_gain,
            grad_bias,
            totals,
            *_strides(gain),
            N,
            C,
            splits,
            EPS=eps,
            SAMPLES=SUM_TILE.positions,
            CHANNELS=SUM_TILE.channels,
            **_accumulator(x),
            **_options(SUM_TILE),
        )
    return grad_gain, grad_bias, totals


def _write_gradient(
    maps: tuple[Tensor, Tensor, Tensor | None],
    strides: list[int],
    prepared: Tensor,
    gain: Tensor,
    given: bool,
    to: Tensor,
) -> None:
    N, C, L = to.shape
    tile = _tile_of(to)
    chunks, blocks = triton.cdiv(C, tile.channels), triton.cdiv(L, tile.positions)
    with _device_of(to):
        _gradient_kernel[(N * chunks * blocks,)](
            *maps,
            prepared,
            gain,
            to,
            *strides,
            *to.stride(),
            *_strides(gain),
            C,
            L,
            chunks,
            blocks,
            GIVEN=given,
            CHANNELS=tile.channels,
            POSITIONS=tile.positions,
            **_accumulator(to),
            **_precision(),
            **_options(tile),
        )


def compile_jobs() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], Tile, str]]:
    """Yield what to compile ahead of time: every tile and dtype, with ReLU, and sizes and strides of 16n or any.

    float16 differs from bfloat16 by a conversion only, and is left out.

    Yields:
        (kernel, signature, constexprs, tile, label); ":16" after a type stands for a known multiple of 16.
    """
    tiles = [(tile, "position") for tile in PLANE_TILES.values()]
    tiles += [(tile, "channel") for tile in PIXEL_TILES.values()]
    for element in ("bf16", "fp32"):
        for kernel in (_statistics_kernel, _normalize_kernel, _sums_kernel, _gradient_kernel):
            for tile, adjacent in tiles:
                sizes = {"CHANNELS": tile.channels, "POSITIONS": tile.positions}
                form = "nchw" if adjacent == "position" else "channels_last"
                for even in (True, False):
                    label = (
                        f"{form} {tile.channels}x{tile.positions} {element} {'even' if even else 'any size'}"
                    )
                    yield _compile_job(kernel, tile, sizes, element, adjacent, even, label)
    sizes = {"CHANNELS": SUM_TILE.channels, "SHARES": SUM_TILE.positions, "SAMPLES": SUM_TILE.positions}
    for kernel in (_join_statistics_kernel, _join_sums_kernel, _prepare_kernel):
        yield _compile_job(kernel, SUM_TILE, sizes, "fp32", "", False, "any size")


def _compile_job(
    kernel: Any, tile: Tile, sizes: dict[str, int], element: str, adjacent: str, even: bool, label: str
) -> tuple[Any, dict[str, str], dict[str, Any], Tile, str]:
    given: dict[str, Any] = {
        "EPS": 1e-5,
        "RELU": True,
        "GIVEN": False,
        "ACCUMULATOR": tl.float32,
        "PRECISION": "ieee",
        **sizes,
    }
    given |= {f"{name}_{adjacent}": 1 for name in ("x", "y", "grad", "to") if adjacent}
    given |= {"gain_channel": 1, "bias_channel": 1}
    given = {name: value for name, value in given.items() if name in kernel.arg_names}
    pointers = dict.fromkeys(("x", "y", "grad", "grad_x"), f"*{element}")
    pointers |= dict.fromkeys(("shares", "mean", "var", "averages", "totals"), "*fp64")
    pointers |= dict.fromkeys(
        ("gain", "bias", "prepared", "sums", "products", "grad_gain", "grad_bias"), "*fp32"
    )
    signature = {name: pointers.get(name, "i32" + ":16" * even) for name in kernel.arg_names}
    signature |= dict.fromkeys(given, "constexpr")
    name = kernel.__name__.strip("_").removesuffix("_kernel").replace("_", " ")
    return kernel, signature, given, tile, f"{name} {label}"


def _map(x: Tensor) -> Tensor:
    """[N, C, *] -> [N, C, L], copied only if the positions of x have no common stride."""
    return x.unsqueeze(2) if x.dim() == 2 else x.flatten(2)


def _tile_of(x: Tensor) -> Tile:
    """The tile for a map [N, C, L]."""
    table, size = (PIXEL_TILES, x.size(1)) if x.stride(1) == 1 < x.stride(2) else (PLANE_TILES, x.size(2))
    return next(tile for least, tile in table.items() if size >= least)


def _shared(items: int, programs: int) -> tuple[int, int]:
    """Return how many items each of at most so many programs takes, and how many programs that makes."""
    each = triton.cdiv(items, min(items, programs))
    return each, triton.cdiv(items, each)


def _strides(coefficients: Tensor) -> tuple[int, int]:
    """Of samples and channels, for [N, C] or [C]."""
    return (0 if coefficients.dim() == 1 else coefficients.stride(0)), coefficients.stride(-1)


def _accumulator(x: Tensor) -> dict[str, Any]:
    return {"ACCUMULATOR": tl.float64 if x.dtype == torch.float64 else tl.float32}


def _precision() -> dict[str, str]:
    # The interpreter rounds to bfloat16 in a way of its own, see _rounded.
    return {"PRECISION": "widened" if _INTERPRETED else "ieee"}


def _options(tile: Tile) -> dict[str, Any]:
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": False}
