"""Triton kernels for the whole self-attention block, from the feature map to the sum with it.

Forward is two kernels: keys and values are projected and max-pooled without the full-size projections being
written; then, for a block of positions, the query projection, attention over all keys, the output projection
and the sum with the input follow one another on the chip. Backward has one kernel for the input's gradient and
one for the weights', which route the gradients of pooled keys and values by the saved argmax.

Shape letters: N batch, C channels, L positions, S pooled positions, E and Ev widths of keys and values.
"""

# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sagan_layers.attention import triton as attention_triton

MAX_CHANNELS = 1024

# How many programs share the sums of the weights' gradients: two for each multiprocessor of an H100.
WEIGHT_GRADIENT_PROGRAMS = 264

_LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Tile:
    """What one program works on.

    Attributes:
        positions: rows of a block: positions, or pooled positions where keys and values are projected.
        channels: channels of the feature map at a time.
        step: keys at a time in attention; columns of the value's gradient at a time in the input's gradient.
        parts: programs that share the columns of keys and values.
        num_warps: warps of a program.
        num_stages: loads in flight.
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


@triton.jit
def _load_block(pointers, row_mask, column_mask, EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr):
    """A two-axis block, zero where a mask says so; a mask that cannot be false is dropped."""
    if EVEN_ROWS and EVEN_COLUMNS:
        block = tl.load(pointers)
    elif EVEN_ROWS:
        block = tl.load(pointers, mask=column_mask[None, :], other=0)
    elif EVEN_COLUMNS:
        block = tl.load(pointers, mask=row_mask[:, None], other=0)
    else:
        block = tl.load(pointers, mask=row_mask[:, None] & column_mask[None, :], other=0)
    return block


@triton.jit
def _add_product(total, left, right, PRECISION: tl.constexpr):
    """Total + left @ right, in the dtype of total."""
    if PRECISION == "widened":
        left = left.to(total.dtype)
        right = right.to(total.dtype)
        total = tl.dot(left, right, total, input_precision="ieee", out_dtype=total.dtype)
    else:
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def _rounded(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """X in a narrower dtype, rounded to nearest even, as GPUs do and the interpreter does not for bfloat16."""
    if PRECISION == "widened" and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _load_routed(
    gradient,
    argmax,
    offsets,
    tap,
    row_mask,
    column_mask,
    EVEN_ROWS: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    POOL: tl.constexpr,
):
    """Gradients of pooled features at unpooled positions: zero where another pixel of the window was taken."""
    block = _load_block(gradient + offsets, row_mask, column_mask, EVEN_ROWS, EVEN_COLUMNS)
    if POOL > 1:
        taken = _load_block(argmax + offsets, row_mask, column_mask, EVEN_ROWS, EVEN_COLUMNS)
        block = tl.where(taken.to(tl.int32) == tap[:, None], block, 0.0).to(block.dtype)
    return block


@triton.jit
def _project_pool_kernel(
    x,
    key_weight,
    value_weight,
    key_bias,
    value_bias,
    key,
    value,
    key_argmax,
    value_argmax,
    x_sample,
    x_channel,
    x_row,
    x_column,
    C: tl.constexpr,
    E: tl.constexpr,
    EV: tl.constexpr,
    S,
    S_WIDTH,
    blocks,
    POOL: tl.constexpr,
    PARTS: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    EVEN_POSITIONS: tl.constexpr,
    EVEN_CHANNELS: tl.constexpr,
    EVEN_WIDTHS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys [N, S, E] and values [N, S, Ev], pooled, with the place in the window that each was taken from."""
    pid = tl.program_id(0)
    part = pid % PARTS
    block = pid // PARTS % blocks
    sample = (pid // PARTS // blocks).to(tl.int64)
    dtype: tl.constexpr = x.dtype.element_ty
    position = block * POSITIONS + tl.arange(0, POSITIONS)
    position_mask = position < S
    key_column = part * KEY_WIDTH + tl.arange(0, KEY_WIDTH)
    key_mask = key_column < E
    value_column = part * VALUE_WIDTH + tl.arange(0, VALUE_WIDTH)
    value_mask = value_column < EV
    x += sample * x_sample
    corner = position // S_WIDTH * POOL * x_row + position % S_WIDTH * POOL * x_column
    best_key = tl.full((POSITIONS, KEY_WIDTH), float("-inf"), ACCUMULATOR)
    best_value = tl.full((POSITIONS, VALUE_WIDTH), float("-inf"), ACCUMULATOR)
    key_tap = tl.zeros((POSITIONS, KEY_WIDTH), tl.int32)
    value_tap = tl.zeros((POSITIONS, VALUE_WIDTH), tl.int32)
    for tap in range(POOL * POOL):
        pixel = corner + tap // POOL * x_row + tap % POOL * x_column
        keys = tl.zeros((POSITIONS, KEY_WIDTH), ACCUMULATOR)
        values = tl.zeros((POSITIONS, VALUE_WIDTH), ACCUMULATOR)
        for start in range(0, C, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)
            channel_mask = channel < C
            features = _load_block(
                x + pixel[:, None] + channel[None, :] * x_channel,
                position_mask,
                channel_mask,
                EVEN_POSITIONS,
                EVEN_CHANNELS,
            )
            weight = _load_block(
                key_weight + key_column[None, :] * C + channel[:, None],
                channel_mask,
                key_mask,
                EVEN_CHANNELS,
                EVEN_WIDTHS,
            )
            keys = _add_product(keys, features, weight, PRECISION)
            weight = _load_block(
                value_weight + value_column[None, :] * C + channel[:, None],
                channel_mask,
                value_mask,
                EVEN_CHANNELS,
                EVEN_WIDTHS,
            )
            values = _add_product(values, features, weight, PRECISION)
        if key_bias is not None:
            keys += tl.load(key_bias + key_column, mask=key_mask, other=0).to(ACCUMULATOR)[None, :]
        if value_bias is not None:
            values += tl.load(value_bias + value_column, mask=value_mask, other=0).to(ACCUMULATOR)[None, :]
        if POOL > 1:
            # Rounded first: values that are equal as the composed form sees them are ties here too.
            keys = _rounded(keys, dtype, PRECISION).to(ACCUMULATOR)
            values = _rounded(values, dtype, PRECISION).to(ACCUMULATOR)
            better = (keys > best_key) | (keys != keys)
            best_key = tl.where(better, keys, best_key)
            key_tap = tl.where(better, tap, key_tap)
            better = (values > best_value) | (values != values)
            best_value = tl.where(better, values, best_value)
            value_tap = tl.where(better, tap, value_tap)
        else:
            best_key = keys
            best_value = values
    key_offset = sample * S * E + position[:, None] * E + key_column[None, :]
    value_offset = sample * S * EV + position[:, None] * EV + value_column[None, :]
    key_mask = position_mask[:, None] & key_mask[None, :]
    value_mask = position_mask[:, None] & value_mask[None, :]
    tl.store(key + key_offset, _rounded(best_key, dtype, PRECISION), mask=key_mask)
    tl.store(value + value_offset, _rounded(best_value, dtype, PRECISION), mask=value_mask)
    if key_argmax is not None:
        tl.store(key_argmax + key_offset, key_tap.to(tl.uint8), mask=key_mask)
        tl.store(value_argmax + value_offset, value_tap.to(tl.uint8), mask=value_mask)


@triton.jit
def _attend_kernel(
    x,
    query_weight,
    query_bias,
    key,
    value,
    out_weight,
    out_bias,
    gamma,
    y,
    query,
    attended,
    lse,
    x_sample,
    x_channel,
    x_row,
    x_column,
    y_sample,
    y_channel,
    y_row,
    y_column,
    C: tl.constexpr,
    E: tl.constexpr,
    EV: tl.constexpr,
    L,
    WIDTH,
    S,
    blocks,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    EVEN_POSITIONS: tl.constexpr,
    EVEN_CHANNELS: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
    EVEN_KEY_WIDTH: tl.constexpr,
    EVEN_VALUE_WIDTH: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The block's output y and, if there is where to, query [N, L, E], attended [N, L, Ev] and lse [N, L]."""
    pid = tl.program_id(0)
    block = pid % blocks
    sample = (pid // blocks).to(tl.int64)
    dtype: tl.constexpr = x.dtype.element_ty
    position = block * POSITIONS + tl.arange(0, POSITIONS)
    position_mask = position < L
    key_column = tl.arange(0, KEY_WIDTH)
    key_mask = key_column < E
    value_column = tl.arange(0, VALUE_WIDTH)
    value_mask = value_column < EV
    x += sample * x_sample
    y += sample * y_sample
    pixel = position // WIDTH * x_row + position % WIDTH * x_column
    y_pixel = position // WIDTH * y_row + position % WIDTH * y_column

    projected = tl.zeros((POSITIONS, KEY_WIDTH), ACCUMULATOR)
    for start in range(0, C, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        channel_mask = channel < C
        features = _load_block(
            x + pixel[:, None] + channel[None, :] * x_channel,
            position_mask,
            channel_mask,
            EVEN_POSITIONS,
            EVEN_CHANNELS,
        )
        weight = _load_block(
            query_weight + key_column[None, :] * C + channel[:, None],
            channel_mask,
            key_mask,
            EVEN_CHANNELS,
            EVEN_KEY_WIDTH,
        )
        projected = _add_product(projected, features, weight, PRECISION)
    if query_bias is not None:
        projected += tl.load(query_bias + key_column, mask=key_mask, other=0).to(ACCUMULATOR)[None, :]
    rounded = _rounded(projected, dtype, PRECISION)
    if query is not None:
        tl.store(
            query + sample * L * E + position[:, None] * E + key_column[None, :],
            rounded,
            mask=position_mask[:, None] & key_mask[None, :],
        )

    largest = tl.full((POSITIONS,), float("-inf"), ACCUMULATOR)
    total = tl.zeros((POSITIONS,), ACCUMULATOR)
    gathered = tl.zeros((POSITIONS, VALUE_WIDTH), ACCUMULATOR)
    key += sample * S * E
    value += sample * S * EV
    for start in range(0, S, KEYS):
        place = start + tl.arange(0, KEYS)
        place_mask = place < S
        keys = _load_block(
            key + place[None, :] * E + key_column[:, None], key_mask, place_mask, EVEN_KEY_WIDTH, EVEN_KEYS
        )
        logits = _add_product(tl.zeros((POSITIONS, KEYS), ACCUMULATOR), rounded, keys, PRECISION)
        if not EVEN_KEYS:
            logits = tl.where(place_mask[None, :], logits, float("-inf"))
        higher = tl.maximum(largest, tl.max(logits, 1))
        # Subtracted before the factor of base 2: logits of thousands would lose digits in the product.
        weights = tl.exp2((logits - higher[:, None]) * _LOG2_E)
        shrink = tl.exp2((largest - higher) * _LOG2_E)
        total = total * shrink + tl.sum(weights, 1)
        largest = higher
        values = _load_block(
            value + place[:, None] * EV + value_column[None, :],
            place_mask,
            value_mask,
            EVEN_KEYS,
            EVEN_VALUE_WIDTH,
        )
        gathered = _add_product(
            gathered * shrink[:, None], _rounded(weights, dtype, PRECISION), values, PRECISION
        )
    gathered = gathered / total[:, None]
    averaged = _rounded(gathered, dtype, PRECISION)
    if attended is not None:
        tl.store(
            attended + sample * L * EV + position[:, None] * EV + value_column[None, :],
            averaged,
            mask=position_mask[:, None] & value_mask[None, :],
        )
        tl.store(lse + sample * L + position, largest + tl.log(total), mask=position_mask)

    factor = tl.load(gamma).to(ACCUMULATOR)
    # Subtracted from zero twice: at gamma 0 a plain sum would turn -0.0 into 0.0.
    if out_weight is None:
        there = position_mask[:, None] & value_mask[None, :]
        features = tl.load(x + pixel[:, None] + value_column[None, :] * x_channel, mask=there, other=0)
        result = features.to(ACCUMULATOR) - (0.0 - factor * gathered)
        result = _rounded(result, dtype, PRECISION)
        tl.store(y + y_pixel[:, None] + value_column[None, :] * y_channel, result, mask=there)
    else:
        for start in range(0, C, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)
            channel_mask = channel < C
            weight = _load_block(
                out_weight + channel[None, :] * EV + value_column[:, None],
                value_mask,
                channel_mask,
                EVEN_VALUE_WIDTH,
                EVEN_CHANNELS,
            )
            mixed = _add_product(tl.zeros((POSITIONS, CHANNELS), ACCUMULATOR), averaged, weight, PRECISION)
            if out_bias is not None:
                mixed += tl.load(out_bias + channel, mask=channel_mask, other=0).to(ACCUMULATOR)[None, :]
            features = _load_block(
                x + pixel[:, None] + channel[None, :] * x_channel,
                position_mask,
                channel_mask,
                EVEN_POSITIONS,
                EVEN_CHANNELS,
            )
            result = features.to(ACCUMULATOR) - (0.0 - factor * mixed)
            tl.store(
                y + y_pixel[:, None] + channel[None, :] * y_channel,
                _rounded(result, dtype, PRECISION),
                mask=position_mask[:, None] & channel_mask[None, :],
            )


@triton.jit
def _input_gradient_kernel(
    grad_y,
    grad_query,
    grad_key,
    grad_value,
    key_argmax,
    value_argmax,
    query_weight,
    key_weight,
    value_weight,
    grad_x,
    g_sample,
    g_channel,
    g_row,
    g_column,
    x_sample,
    x_channel,
    x_row,
    x_column,
    C: tl.constexpr,
    E: tl.constexpr,
    EV: tl.constexpr,
    L,
    WIDTH,
    S,
    S_WIDTH,
    blocks,
    chunks,
    POOL: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_STEP: tl.constexpr,
    EVEN_POSITIONS: tl.constexpr,
    EVEN_WINDOWS: tl.constexpr,
    EVEN_CHANNELS: tl.constexpr,
    EVEN_KEY_WIDTH: tl.constexpr,
    EVEN_VALUE_WIDTH: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The input's gradient: grad_y, and those of query, key and value times their weights."""
    pid = tl.program_id(0)
    chunk = pid % chunks
    block = pid // chunks % blocks
    sample = (pid // chunks // blocks).to(tl.int64)
    position = block * POSITIONS + tl.arange(0, POSITIONS)
    position_mask = position < L
    row = position // WIDTH
    column = position % WIDTH
    if POOL > 1:
        pooled = row // POOL * S_WIDTH + column // POOL
        tap = row % POOL * POOL + column % POOL
        # Rows and columns beyond the last complete window took no part in the pooling.
        pooled_mask = (row < S // S_WIDTH * POOL) & (column < S_WIDTH * POOL)
    else:
        pooled = position
        tap = position
        pooled_mask = position_mask
    channel = chunk * CHANNELS + tl.arange(0, CHANNELS)
    channel_mask = channel < C
    key_column = tl.arange(0, KEY_WIDTH)
    key_mask = key_column < E

    sums = tl.zeros((POSITIONS, CHANNELS), ACCUMULATOR)
    part = _load_block(
        grad_query + sample * L * E + position[:, None] * E + key_column[None, :],
        position_mask,
        key_mask,
        EVEN_POSITIONS,
        EVEN_KEY_WIDTH,
    )
    weight_offset = key_column[:, None] * C + channel[None, :]
    weight = _load_block(query_weight + weight_offset, key_mask, channel_mask, EVEN_KEY_WIDTH, EVEN_CHANNELS)
    sums = _add_product(sums, part, weight, PRECISION)
    part = _load_routed(
        grad_key,
        key_argmax,
        sample * S * E + pooled[:, None] * E + key_column[None, :],
        tap,
        pooled_mask,
        key_mask,
        EVEN_WINDOWS,
        EVEN_KEY_WIDTH,
        POOL,
    )
    weight = _load_block(key_weight + weight_offset, key_mask, channel_mask, EVEN_KEY_WIDTH, EVEN_CHANNELS)
    sums = _add_product(sums, part, weight, PRECISION)
    for start in range(0, EV, VALUE_STEP):
        value_column = start + tl.arange(0, VALUE_STEP)
        value_mask = value_column < EV
        routed = _load_routed(
            grad_value,
            value_argmax,
            sample * S * EV + pooled[:, None] * EV + value_column[None, :],
            tap,
            pooled_mask,
            value_mask,
            EVEN_WINDOWS,
            EVEN_VALUE_WIDTH,
            POOL,
        )
        columns = _load_block(
            value_weight + value_column[:, None] * C + channel[None, :],
            value_mask,
            channel_mask,
            EVEN_VALUE_WIDTH,
            EVEN_CHANNELS,
        )
        sums = _add_product(sums, routed, columns, PRECISION)
    through = _load_block(
        grad_y
        + sample * g_sample
        + (row * g_row + column * g_column)[:, None]
        + channel[None, :] * g_channel,
        position_mask,
        channel_mask,
        EVEN_POSITIONS,
        EVEN_CHANNELS,
    )
    tl.store(
        grad_x
        + sample * x_sample
        + (row * x_row + column * x_column)[:, None]
        + channel[None, :] * x_channel,
        _rounded(through.to(ACCUMULATOR) + sums, grad_x.dtype.element_ty, PRECISION),
        mask=position_mask[:, None] & channel_mask[None, :],
    )


@triton.jit
def _weight_gradient_kernel(
    features,
    grad_query,
    grad_key,
    grad_value,
    key_argmax,
    value_argmax,
    partial,
    f_sample,
    f_channel,
    f_row,
    f_column,
    C: tl.constexpr,
    E: tl.constexpr,
    EV: tl.constexpr,
    L,
    WIDTH,
    S,
    S_WIDTH,
    blocks,
    chunks,
    items,
    share,
    POOL: tl.constexpr,
    PARTS: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    EVEN_POSITIONS: tl.constexpr,
    EVEN_WINDOWS: tl.constexpr,
    EVEN_CHANNELS: tl.constexpr,
    EVEN_WIDTHS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program's share of the sums over positions of gradient times feature, [splits, 2 E + Ev, C].

    Without grad_query (and grad_key) the sums are those of grad_value alone, [splits, Ev, C].
    """
    pid = tl.program_id(0)
    chunk = pid % chunks
    piece = pid // chunks % PARTS
    split = pid // chunks // PARTS
    channel = chunk * CHANNELS + tl.arange(0, CHANNELS)
    channel_mask = channel < C
    key_column = piece * KEY_WIDTH + tl.arange(0, KEY_WIDTH)
    key_mask = key_column < E
    value_column = piece * VALUE_WIDTH + tl.arange(0, VALUE_WIDTH)
    value_mask = value_column < EV
    query_sum = tl.zeros((CHANNELS, KEY_WIDTH), ACCUMULATOR)
    key_sum = tl.zeros((CHANNELS, KEY_WIDTH), ACCUMULATOR)
    value_sum = tl.zeros((CHANNELS, VALUE_WIDTH), ACCUMULATOR)
    for item in range(split * share, tl.minimum(split * share + share, items)):
        sample = (item // blocks).to(tl.int64)
        position = item % blocks * POSITIONS + tl.arange(0, POSITIONS)
        position_mask = position < L
        row = position // WIDTH
        column = position % WIDTH
        if POOL > 1:
            pooled = row // POOL * S_WIDTH + column // POOL
            tap = row % POOL * POOL + column % POOL
            pooled_mask = (row < S // S_WIDTH * POOL) & (column < S_WIDTH * POOL)
        else:
            pooled = position
            tap = position
            pooled_mask = position_mask
        block = _load_block(
            features
            + sample * f_sample
            + (row * f_row + column * f_column)[None, :]
            + channel[:, None] * f_channel,
            channel_mask,
            position_mask,
            EVEN_CHANNELS,
            EVEN_POSITIONS,
        )
        if grad_query is not None:
            part = _load_block(
                grad_query + sample * L * E + position[:, None] * E + key_column[None, :],
                position_mask,
                key_mask,
                EVEN_POSITIONS,
                EVEN_WIDTHS,
            )
            query_sum = _add_product(query_sum, block, part, PRECISION)
            part = _load_routed(
                grad_key,
                key_argmax,
                sample * S * E + pooled[:, None] * E + key_column[None, :],
                tap,
                pooled_mask,
                key_mask,
                EVEN_WINDOWS,
                EVEN_WIDTHS,
                POOL,
            )
            key_sum = _add_product(key_sum, block, part, PRECISION)
        part = _load_routed(
            grad_value,
            value_argmax,
            sample * S * EV + pooled[:, None] * EV + value_column[None, :],
            tap,
            pooled_mask,
            value_mask,
            EVEN_WINDOWS,
            EVEN_WIDTHS,
            POOL,
        )
        value_sum = _add_product(value_sum, block, part, PRECISION)
    key_there = channel_mask[:, None] & key_mask[None, :]
    value_there = channel_mask[:, None] & value_mask[None, :]
    if grad_query is not None:
        partial += split.to(tl.int64) * (2 * E + EV) * C
        key_offset = key_column[None, :] * C + channel[:, None]
        tl.store(partial + key_offset, query_sum, mask=key_there)
        tl.store(partial + E * C + key_offset, key_sum, mask=key_there)
        partial += 2 * E * C
    else:
        partial += split.to(tl.int64) * EV * C
    tl.store(partial + value_column[None, :] * C + channel[:, None], value_sum, mask=value_there)


# Arguments that are numbers, not pointers: strides, sizes and counts.
_NUMBERS = {f"{letter}_{axis}" for letter in "xygf" for axis in ("sample", "channel", "row", "column")} | {
    *("L", "S", "WIDTH", "S_WIDTH", "blocks", "chunks", "items", "share")
}

_INTERPRETED = not isinstance(_attend_kernel, triton.JITFunction)


def unsupported_reasons(
    x: Tensor, query_weight: Tensor, key_weight: Tensor, value_weight: Tensor, out_weight: Tensor | None
) -> list[str]:
    """Return why these kernels cannot serve the inputs of a self-attention block, empty if they can.

    Args:
        x: [N, C, H, W].
        query_weight: [E, C].
        key_weight: [E, C].
        value_weight: [Ev, C].
        out_weight: [C, Ev], or None for no output projection.
    """
    reasons = []
    if x.device.type != "cuda" and not (_INTERPRETED and x.device.type == "cpu"):
        reasons.append(f"it runs on CUDA devices, the input is on {x.device}")
    if x.device.type == "cuda" and not _INTERPRETED and torch.cuda.get_device_capability(x.device) < (8, 0):
        reasons.append("the device is older than compute capability 8.0")
    # Beside operands of 32 bits the accumulators of a whole block do not fit into registers.
    served = (torch.bfloat16, torch.float16, *(torch.float32, torch.float64) * _INTERPRETED)
    if x.dtype not in served:
        reasons.append(f"serves torch.bfloat16 and torch.float16, got {x.dtype}")
    weights = [
        weight for weight in (query_weight, key_weight, value_weight, out_weight) if weight is not None
    ]
    if any(weight.dtype != x.dtype for weight in weights):
        reasons.append("input and weights differ in dtype")
    if any(weight.device != x.device for weight in weights):
        reasons.append("input and weights are on different devices")
    if x.numel() == 0:
        reasons.append("the input is empty")
    # Backward takes the kernels of the core.
    widest, widest_value = attention_triton.widths_of(x.dtype)[-1]
    for name, size, most in (
        ("C", x.size(1), MAX_CHANNELS),
        ("E", key_weight.size(0), widest),
        ("Ev", value_weight.size(0), widest_value),
    ):
        if size > most:
            reasons.append(f"{name} = {size} is more than {most}")
    span = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    if max(span, x[:1].numel()) >= 2**31:
        reasons.append("a sample spans 2**31 elements or more")
    C, E, EV = x.size(1), key_weight.size(0), value_weight.size(0)
    # Loads would be of single elements, and their addresses would take the registers.
    if not _INTERPRETED and any(width % 8 for width in (C, E, EV)):
        reasons.append(f"serves widths that are multiples of 8, got C = {C}, E = {E}, Ev = {EV}")
    # There values and features meet in one block, and masks of both would not fit into registers.
    if not _INTERPRETED and out_weight is None and _padded(EV) != EV:
        reasons.append(f"without an output projection serves powers of two from 16 as Ev, got {EV}")
    return reasons


def forward(
    x: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    out_weight: Tensor | None,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    out_bias: Tensor | None,
    gamma: Tensor,
    pool_size: int,
    *,
    save: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ``x + gamma * (out_weight attended + out_bias)`` and what backward needs.

    Args:
        x: [N, C, H, W], any strides.
        query_weight: [E, C].
        key_weight: [E, C].
        value_weight: [Ev, C].
        out_weight: [C, Ev]; None for the identity, where Ev is C.
        query_bias: [E] or None.
        key_bias: [E] or None.
        value_bias: [Ev] or None.
        out_bias: [C] or None; None without ``out_weight``.
        gamma: a scalar tensor.
        pool_size: side and stride of the max-pool, 1 or 2.
        save: whether to write what only backward needs.

    Returns:
        ``(y, query, key, value, attended, lse, key_argmax, value_argmax)``: y in the memory format of x;
        [N, L, E]; [N, S, E]; [N, S, Ev]; [N, L, Ev]; [N, L], natural logarithm, in the accumulation dtype; and the
        place in its window, uint8, that each element of key and value was taken from. The places are empty
        for ``pool_size`` 1; without ``save`` they, query, attended and lse are.
    """
    assert pool_size in (1, 2)
    assert out_weight is not None or out_bias is None
    N, C, H, W = x.shape
    E, EV = key_weight.size(0), value_weight.size(0)
    L, S = H * W, (H // pool_size) * (W // pool_size)
    places = (N, S) if save and pool_size > 1 else (0, 0)
    y = torch.empty_like(x)
    query = x.new_empty((N, L, E) if save else (0, 0, E))
    key = x.new_empty((N, S, E))
    value = x.new_empty((N, S, EV))
    attended = x.new_empty((N, L, EV) if save else (0, 0, EV))
    lse = x.new_empty((N, L) if save else (0, 0), dtype=_accumulation_dtype(x))
    key_argmax = x.new_empty((*places, E), dtype=torch.uint8)
    value_argmax = x.new_empty((*places, EV), dtype=torch.uint8)
    width_class = _width_class(E, EV)
    with _device_of(x):
        tile = PROJECTION_TILES[width_class]
        channels = min(tile.channels, _padded(C))
        key_width, value_width = _padded(E, tile.parts), _padded(EV, tile.parts)
        width, (x_strides,) = _grid(x) if pool_size == 1 else (W, [x.stride()[2:]])
        blocks = triton.cdiv(S, tile.positions)
        _project_pool_kernel[(N * blocks * tile.parts,)](
            x,
            key_weight.contiguous(),
            value_weight.contiguous(),
            _contiguous(key_bias),
            _contiguous(value_bias),
            key,
            value,
            key_argmax if key_argmax.numel() else None,
            value_argmax if key_argmax.numel() else None,
            x.stride(0),
            x.stride(1),
            *x_strides,
            C,
            E,
            EV,
            S,
            width // pool_size,
            blocks,
            POOL=pool_size,
            PARTS=tile.parts,
            POSITIONS=tile.positions,
            CHANNELS=channels,
            KEY_WIDTH=key_width,
            VALUE_WIDTH=value_width,
            EVEN_POSITIONS=S % tile.positions == 0,
            EVEN_CHANNELS=C % channels == 0,
            EVEN_WIDTHS=key_width * tile.parts == E and value_width * tile.parts == EV,
            **_numerics(x),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=False,
        )
        tile = (UNPROJECTED_ATTENTION_TILES if out_weight is None else ATTENTION_TILES)[width_class]
        channels = min(tile.channels, _padded(C))
        key_width, value_width = _padded(E), _padded(EV)
        width, (x_strides, y_strides) = _grid(x, y)
        blocks = triton.cdiv(L, tile.positions)
        _attend_kernel[(N * blocks,)](
            x,
            query_weight.contiguous(),
            _contiguous(query_bias),
            key,
            value,
            _contiguous(out_weight),
            _contiguous(out_bias),
            gamma,
            y,
            query if save else None,
            attended if save else None,
            lse if save else None,
            x.stride(0),
            x.stride(1),
            *x_strides,
            y.stride(0),
            y.stride(1),
            *y_strides,
            C,
            E,
            EV,
            L,
            width,
            S,
            blocks,
            POSITIONS=tile.positions,
            CHANNELS=channels,
            KEYS=tile.step,
            KEY_WIDTH=key_width,
            VALUE_WIDTH=value_width,
            EVEN_POSITIONS=L % tile.positions == 0,
            EVEN_CHANNELS=C % channels == 0,
            EVEN_KEYS=S % tile.step == 0,
            EVEN_KEY_WIDTH=key_width == E,
            EVEN_VALUE_WIDTH=value_width == EV,
            **_numerics(x),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=False,
        )
    return y, query, key, value, attended, lse, key_argmax, value_argmax


def backward(
    grad_y: Tensor,
    x: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    out_weight: Tensor | None,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    out_bias: Tensor | None,
    gamma: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attended: Tensor,
    lse: Tensor,
    key_argmax: Tensor,
    value_argmax: Tensor,
    pool_size: int,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, the four weights, the four biases and gamma, None where the input is None.

    Args:
        grad_y: [N, C, H, W], any strides.
        x: as in :func:`forward`, like the weights, the biases, gamma and ``pool_size``.
        query_weight: [E, C].
        key_weight: [E, C].
        value_weight: [Ev, C].
        out_weight: [C, Ev] or None.
        query_bias: [E] or None.
        key_bias: [E] or None.
        value_bias: [Ev] or None.
        out_bias: [C] or None.
        gamma: a scalar tensor.
        query: as :func:`forward` returned it, like the rest.
        key: [N, S, E].
        value: [N, S, Ev].
        attended: [N, L, Ev].
        lse: [N, L].
        key_argmax: [N, S, E], empty for ``pool_size`` 1.
        value_argmax: [N, S, Ev], empty for ``pool_size`` 1.
        pool_size: 1 or 2.
    """
    wide = _accumulation_dtype(x)
    factor = gamma.to(wide)
    grad_positions = grad_y.flatten(2).transpose(1, 2)  # [N, L, C]
    grad_out_weight = grad_out_bias = None
    if out_weight is None:
        grad_attended = (grad_positions * factor).to(x.dtype).contiguous()
        grad_gamma = (grad_positions * attended).sum(dtype=wide)
    else:
        scaled = (out_weight * factor).to(x.dtype)
        grad_attended = torch.bmm(grad_positions, scaled.expand(x.size(0), -1, -1))
        sums = _feature_sums(grad_y, None, None, attended, None, None, 1).t()  # [C, Ev]
        grad_out_weight = (sums * factor).to(x.dtype)
        grad_gamma = (sums * out_weight).sum()
        if out_bias is not None:
            bias_sums = grad_y.sum((0, 2, 3), dtype=wide)
            grad_out_bias = (bias_sums * factor).to(out_bias.dtype)
            grad_gamma = grad_gamma + (bias_sums * out_bias).sum()
    grads = attention_triton.backward(query, key, value, attended, lse, grad_attended, 1.0)
    grad_query, grad_key, grad_value = (grad.contiguous() for grad in grads)
    grad_x = _input_gradient(
        x,
        grad_y,
        grad_query,
        grad_key,
        grad_value,
        key_argmax,
        value_argmax,
        query_weight,
        key_weight,
        value_weight,
        pool_size,
    )
    E = query.size(2)
    sums = _feature_sums(x, grad_query, grad_key, grad_value, key_argmax, value_argmax, pool_size)
    grad_weights = sums.to(x.dtype).split([E, E, value.size(2)])
    grad_biases = (
        None if bias is None else grad.sum((0, 1), dtype=wide).to(bias.dtype)
        for bias, grad in zip(
            (query_bias, key_bias, value_bias), (grad_query, grad_key, grad_value), strict=True
        )
    )
    return (
        grad_x,
        *(grad.clone() for grad in grad_weights),
        grad_out_weight,
        *grad_biases,
        grad_out_bias,
        grad_gamma.to(gamma.dtype).reshape(gamma.shape),
    )


def _input_gradient(
    x: Tensor,
    grad_y: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    key_argmax: Tensor,
    value_argmax: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    pool_size: int,
) -> Tensor:
    """[N, C, H, W] in the memory format of x."""
    N, C, H, W = x.shape
    E, EV = grad_key.size(2), grad_value.size(2)
    L, S = grad_query.size(1), grad_key.size(1)
    grad_x = torch.empty_like(x)
    width, strides = (
        (W, [t.stride()[2:] for t in (grad_y, grad_x)]) if pool_size > 1 else _grid(grad_y, grad_x)
    )
    tile = INPUT_GRADIENT_TILES[_width_class(E, EV)]
    channels, key_width = min(tile.channels, _padded(C)), _padded(E)
    value_step = min(tile.step, _padded(EV))
    blocks, chunks = triton.cdiv(L, tile.positions), triton.cdiv(C, channels)
    even = L % tile.positions == 0
    with _device_of(x):
        _input_gradient_kernel[(N * blocks * chunks,)](
            grad_y,
            grad_query,
            grad_key,
            grad_value,
            key_argmax if pool_size > 1 else None,
            value_argmax if pool_size > 1 else None,
            query_weight.contiguous(),
            key_weight.contiguous(),
            value_weight.contiguous(),
            grad_x,
            grad_y.stride(0),
            grad_y.stride(1),
            *strides[0],
            grad_x.stride(0),
            grad_x.stride(1),
            *strides[1],
            C,
            E,
            EV,
            L,
            width,
            S,
            width // pool_size,
            blocks,
            chunks,
            POOL=pool_size,
            POSITIONS=tile.positions,
            CHANNELS=channels,
            KEY_WIDTH=key_width,
            VALUE_STEP=value_step,
            EVEN_POSITIONS=even,
            EVEN_WINDOWS=even and H % pool_size == 0 and W % pool_size == 0,
            EVEN_CHANNELS=C % channels == 0,
            EVEN_KEY_WIDTH=key_width == E,
            EVEN_VALUE_WIDTH=EV % value_step == 0,
            **_numerics(x),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=False,
        )
    return grad_x


def _feature_sums(
    features: Tensor,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor,
    key_argmax: Tensor | None,
    value_argmax: Tensor | None,
    pool_size: int,
) -> Tensor:
    """Sums over samples and positions of gradient times feature, [2 E + Ev, C] or [Ev, C], accumulation dtype."""
    N, C, H, W = features.shape
    L, S = H * W, grad_value.size(1)
    E, EV = 0 if grad_key is None else grad_key.size(2), grad_value.size(2)
    tile = WEIGHT_GRADIENT_TILES[_width_class(max(E, 1), EV)]
    width, (strides,) = (W, [features.stride()[2:]]) if pool_size > 1 else _grid(features)
    channels = min(tile.channels, _padded(C))
    key_width, value_width = _padded(max(E, 1), tile.parts), _padded(EV, tile.parts)
    blocks, chunks = triton.cdiv(L, tile.positions), triton.cdiv(C, channels)
    items = N * blocks
    splits = min(items, max(1, WEIGHT_GRADIENT_PROGRAMS // (chunks * tile.parts)))
    share = triton.cdiv(items, splits)
    splits = triton.cdiv(items, share)
    partial = features.new_empty((splits, 2 * E + EV, C), dtype=_accumulation_dtype(features))
    even = L % tile.positions == 0
    with _device_of(features):
        _weight_gradient_kernel[(splits * chunks * tile.parts,)](
            features,
            grad_query,
            grad_key,
            grad_value,
            key_argmax if pool_size > 1 else None,
            value_argmax if pool_size > 1 else None,
            partial,
            features.stride(0),
            features.stride(1),
            *strides,
            C,
            E,
            EV,
            L,
            width,
            S,
            width // pool_size,
            blocks,
            chunks,
            items,
            share,
            POOL=pool_size,
            PARTS=tile.parts,
            POSITIONS=tile.positions,
            CHANNELS=channels,
            KEY_WIDTH=key_width,
            VALUE_WIDTH=value_width,
            EVEN_POSITIONS=even,
            EVEN_WINDOWS=even and H % pool_size == 0 and W % pool_size == 0,
            EVEN_CHANNELS=C % channels == 0,
            EVEN_WIDTHS=value_width * tile.parts == EV and E in (0, key_width * tile.parts),
            **_numerics(features),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=False,
        )
    return partial.sum(0)


def compile_jobs() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], Tile, str]]:
    """Yield what to compile ahead of time: every tile, both layouts, with and without masks of sizes and widths.

    float16 differs from bfloat16 by the type of its instructions only, and is left out.

    Yields:
        ``(kernel, signature, constexprs, tile, label)``. Widths are the released code's, C = 2 Ev = 8 E, at the
        upper end of each width class, and 8 less, where widths are masked.
    """
    for width_class in ATTENTION_TILES:
        for even, even_widths in ((True, True), (False, True), (False, False)):
            yield from _compile_jobs_of(width_class, even, even_widths)


def _compile_jobs_of(
    width_class: int, even: bool, even_widths: bool
) -> Iterator[tuple[Any, dict[str, str], dict[str, Any], Tile, str]]:
    """Jobs for NCHW with sizes that are multiples of 16, or for channels_last with any sizes and masks."""
    short = 0 if even_widths else 8
    C, E, EV = 2 * width_class - short, width_class // 4 - short, width_class - short
    common = {"C": C, "E": E, "EV": EV, "ACCUMULATOR": tl.float32, "PRECISION": "tf32x3"}
    common |= {f"{letter}_{'column' if even else 'channel'}": 1 for letter in "xygf"}
    pointers = {
        "gamma": "*fp32",
        "lse": "*fp32",
        "partial": "*fp32",
        "key_argmax": "*u8",
        "value_argmax": "*u8",
    }

    def job(
        kernel: Any, tile: Tile, what: str, **given: Any
    ) -> tuple[Any, dict[str, str], dict[str, Any], Tile, str]:
        given = {name: value for name, value in common.items() if name in kernel.arg_names} | given
        masks = {name: even for name in kernel.arg_names if name.startswith("EVEN_")}
        widths = {"EVEN_CHANNELS", "EVEN_WIDTHS", "EVEN_KEY_WIDTH", "EVEN_VALUE_WIDTH"}
        given |= masks | dict.fromkeys(widths & set(masks), even_widths)
        signature = {
            name: "i32" + ":16" * even if name in _NUMBERS else pointers.get(name, "*bf16")
            for name in kernel.arg_names
        }
        signature |= dict.fromkeys(given, "constexpr")
        form = "nchw even" if even else "channels_last masked"
        return kernel, signature, given, tile, f"{what} C={given['C']} bf16 {form}"

    for pool in (1, 2):
        routes: dict[str, Any] = {"POOL": pool} | (
            {"key_argmax": None, "value_argmax": None} if pool == 1 else {}
        )
        tile = PROJECTION_TILES[width_class]
        yield job(
            _project_pool_kernel,
            tile,
            f"project pool={pool}",
            **routes,
            PARTS=tile.parts,
            POSITIONS=tile.positions,
            CHANNELS=tile.channels,
            KEY_WIDTH=_padded(E, tile.parts),
            VALUE_WIDTH=_padded(EV, tile.parts),
        )
        tile = INPUT_GRADIENT_TILES[width_class]
        yield job(
            _input_gradient_kernel,
            tile,
            f"input gradient pool={pool}",
            **routes,
            POSITIONS=tile.positions,
            CHANNELS=tile.channels,
            KEY_WIDTH=_padded(E),
            VALUE_STEP=min(tile.step, _padded(EV)),
        )
        tile = WEIGHT_GRADIENT_TILES[width_class]
        yield job(
            _weight_gradient_kernel,
            tile,
            f"weight gradient pool={pool}",
            **routes,
            PARTS=tile.parts,
            POSITIONS=tile.positions,
            CHANNELS=tile.channels,
            KEY_WIDTH=_padded(E, tile.parts),
            VALUE_WIDTH=_padded(EV, tile.parts),
        )
    for projected in (True, False) if even_widths else (True,):
        tile = (ATTENTION_TILES if projected else UNPROJECTED_ATTENTION_TILES)[width_class]
        yield job(
            _attend_kernel,
            tile,
            f"attend {'with' if projected else 'without'} out",
            **({} if projected else {"C": EV, "out_weight": None, "out_bias": None}),
            POSITIONS=tile.positions,
            CHANNELS=tile.channels,
            KEYS=tile.step,
            KEY_WIDTH=_padded(E),
            VALUE_WIDTH=_padded(EV),
        )


def _padded(width: int, parts: int = 1) -> int:
    """The power of two, at least 16 (what a matrix instruction takes), that holds each of the parts."""
    return max(16, int(triton.next_power_of_2(triton.cdiv(width, parts))))


def _width_class(E: int, EV: int) -> int:
    """64, 128 or 256: the padded width of values, or four times that of keys if that is more."""
    return max(64, 4 * _padded(E), _padded(EV))


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _numerics(x: Tensor) -> dict[str, Any]:
    """What a kernel accumulates in, and how it multiplies."""
    # The interpreter multiplies the bit patterns of bfloat16 if they are left as they are.
    widened = _INTERPRETED and x.dtype != torch.float32
    return {
        "ACCUMULATOR": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "PRECISION": "widened" if widened else _float32_precision(),
    }


def _float32_precision() -> str:
    """TF32 only where torch takes it for its own products; else three of them, as good as float32."""
    matmul = torch.backends.cuda.matmul
    setting = getattr(matmul, "fp32_precision", None)  # torch < 2.9 has only the older switch
    allowed = matmul.allow_tf32 if setting is None else setting == "tf32"
    return "tf32" if allowed else "tf32x3"


def _device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _grid(*maps: Tensor) -> tuple[int, list[tuple[int, int]]]:
    """The width of the maps [N, C, H, W], and of each the strides of rows and columns.

    Maps whose rows follow on one another are seen as a single row, so that offsets stay plain.
    """
    H, W = maps[0].shape[2:]
    if W == 1:
        return H, [(0, tensor.stride(2)) for tensor in maps]
    if H == 1 or all(tensor.stride(2) == W * tensor.stride(3) for tensor in maps):
        return H * W, [(0, tensor.stride(3)) for tensor in maps]
    return W, [(tensor.stride(2), tensor.stride(3)) for tensor in maps]
