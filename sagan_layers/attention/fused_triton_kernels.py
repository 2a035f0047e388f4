"""Triton kernels of the whole self-attention block, from the feature map to the sum with it.

Forward is two kernels: keys and values are projected and max-pooled without the full-size projections being
written; then, for a block of positions, the query projection, attention over all keys, the output projection
and the sum with the input follow one another on the chip. Backward has one kernel for the input's gradient and
one for the weights', which route the gradients of pooled keys and values by the saved argmax.

Shape letters: N batch, C channels, L positions, S pooled positions, E and Ev widths of keys and values.

A variable that is assigned before and inside a loop must keep its type and shape, so pointers have separate names.
"""
# Kernels are not Python for a type checker, and Triton ships no types.
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from sagan_layers.triton_support import LOG2_E, rounded


@triton.jit
def _load_block(pointers, row_mask, column_mask, EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr):
    """Load a two-axis block, zero where a mask says so; a mask that cannot be false is dropped."""
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
def _load_bias(bias, column, mask, ACCUMULATOR: tl.constexpr):
    return tl.load(bias + column, mask=mask, other=0).to(ACCUMULATOR)[None, :]


@triton.jit
def _add_product(total, left, right, PRECISION: tl.constexpr):
    """Return total + left @ right, in the dtype of total."""
    if PRECISION == "widened":
        left = left.to(total.dtype)
        right = right.to(total.dtype)
        total = tl.dot(left, right, total, input_precision="ieee", out_dtype=total.dtype)
    else:
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def _larger(candidate, best, tap, best_tap, dtype: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """Return the larger values of two, and where they are from; NaN is larger than any number."""
    # Rounded first: values that are equal as the composed form sees them are ties here too.
    candidate = rounded(candidate, dtype).to(ACCUMULATOR)
    better = (candidate > best) | (candidate != candidate)
    return tl.where(better, candidate, best), tl.where(better, tap, best_tap)


@triton.jit
def _window_of(position, row, column, position_mask, S, S_WIDTH, POOL: tl.constexpr):
    """Return the pooled position that each position is part of, its place in that window, and whether it is in any."""
    if POOL > 1:
        pooled = row // POOL * S_WIDTH + column // POOL
        tap = row % POOL * POOL + column % POOL
        # Rows and columns beyond the last complete window took no part in the pooling.
        mask = (row < S // S_WIDTH * POOL) & (column < S_WIDTH * POOL)
    else:
        pooled = position
        tap = position
        mask = position_mask
    return pooled, tap, mask


@triton.jit
def _load_routed(
    gradient, argmax, offsets, tap, row_mask, column_mask,
    EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """Load gradients of pooled features at unpooled positions: zero where another pixel of the window was taken."""
    block = _load_block(gradient + offsets, row_mask, column_mask, EVEN_ROWS, EVEN_COLUMNS)
    if POOL > 1:
        taken = _load_block(argmax + offsets, row_mask, column_mask, EVEN_ROWS, EVEN_COLUMNS)
        block = tl.where(taken.to(tl.int32) == tap[:, None], block, 0.0).to(block.dtype)
    return block


@triton.jit
def project_pool_kernel(
    x, key_weight, value_weight, key_bias, value_bias, key, value, key_argmax, value_argmax,
    x_sample, x_channel, x_row, x_column,
    C: tl.constexpr, E: tl.constexpr, EV: tl.constexpr, S, S_WIDTH, blocks,
    POOL: tl.constexpr, PARTS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    EVEN_POSITIONS: tl.constexpr, EVEN_CHANNELS: tl.constexpr, EVEN_WIDTHS: tl.constexpr,
    ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute keys [N, S, E] and values [N, S, Ev], pooled, and the place in the window that each was taken from."""
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
            pointers = x + pixel[:, None] + channel[None, :] * x_channel
            features = _load_block(pointers, position_mask, channel_mask, EVEN_POSITIONS, EVEN_CHANNELS)
            pointers = key_weight + key_column[None, :] * C + channel[:, None]
            weight = _load_block(pointers, channel_mask, key_mask, EVEN_CHANNELS, EVEN_WIDTHS)
            keys = _add_product(keys, features, weight, PRECISION)
            pointers = value_weight + value_column[None, :] * C + channel[:, None]
            weight = _load_block(pointers, channel_mask, value_mask, EVEN_CHANNELS, EVEN_WIDTHS)
            values = _add_product(values, features, weight, PRECISION)
        if key_bias is not None:
            keys += _load_bias(key_bias, key_column, key_mask, ACCUMULATOR)
        if value_bias is not None:
            values += _load_bias(value_bias, value_column, value_mask, ACCUMULATOR)
        if POOL > 1:
            best_key, key_tap = _larger(keys, best_key, tap, key_tap, dtype, ACCUMULATOR)
            best_value, value_tap = _larger(values, best_value, tap, value_tap, dtype, ACCUMULATOR)
        else:
            best_key = keys
            best_value = values
    key_offset = sample * S * E + position[:, None] * E + key_column[None, :]
    value_offset = sample * S * EV + position[:, None] * EV + value_column[None, :]
    key_mask = position_mask[:, None] & key_mask[None, :]
    value_mask = position_mask[:, None] & value_mask[None, :]
    tl.store(key + key_offset, rounded(best_key, dtype), mask=key_mask)
    tl.store(value + value_offset, rounded(best_value, dtype), mask=value_mask)
    if key_argmax is not None:
        tl.store(key_argmax + key_offset, key_tap.to(tl.uint8), mask=key_mask)
        tl.store(value_argmax + value_offset, value_tap.to(tl.uint8), mask=value_mask)


@triton.jit
def attend_kernel(
    x, query_weight, query_bias, key, value, out_weight, out_bias, gamma, y, query, attended, lse,
    x_sample, x_channel, x_row, x_column, y_sample, y_channel, y_row, y_column,
    C: tl.constexpr, E: tl.constexpr, EV: tl.constexpr, L, WIDTH, S, blocks,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, KEYS: tl.constexpr,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    EVEN_POSITIONS: tl.constexpr, EVEN_CHANNELS: tl.constexpr, EVEN_KEYS: tl.constexpr,
    EVEN_KEY_WIDTH: tl.constexpr, EVEN_VALUE_WIDTH: tl.constexpr,
    ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the block's output y and, where they are wanted, query [N, L, E], attended [N, L, Ev] and lse [N, L]."""
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
        x_pointers = x + pixel[:, None] + channel[None, :] * x_channel
        features = _load_block(x_pointers, position_mask, channel_mask, EVEN_POSITIONS, EVEN_CHANNELS)
        weight_pointers = query_weight + key_column[None, :] * C + channel[:, None]
        weight = _load_block(weight_pointers, channel_mask, key_mask, EVEN_CHANNELS, EVEN_KEY_WIDTH)
        projected = _add_product(projected, features, weight, PRECISION)
    if query_bias is not None:
        projected += _load_bias(query_bias, key_column, key_mask, ACCUMULATOR)
    projected = rounded(projected, dtype)
    if query is not None:
        query_pointers = query + sample * L * E + position[:, None] * E + key_column[None, :]
        tl.store(query_pointers, projected, mask=position_mask[:, None] & key_mask[None, :])

    largest = tl.full((POSITIONS,), float("-inf"), ACCUMULATOR)
    total = tl.zeros((POSITIONS,), ACCUMULATOR)
    gathered = tl.zeros((POSITIONS, VALUE_WIDTH), ACCUMULATOR)
    key += sample * S * E
    value += sample * S * EV
    for start in range(0, S, KEYS):
        place = start + tl.arange(0, KEYS)
        place_mask = place < S
        key_pointers = key + place[None, :] * E + key_column[:, None]
        keys = _load_block(key_pointers, key_mask, place_mask, EVEN_KEY_WIDTH, EVEN_KEYS)
        logits = _add_product(tl.zeros((POSITIONS, KEYS), ACCUMULATOR), projected, keys, PRECISION)
        if not EVEN_KEYS:
            logits = tl.where(place_mask[None, :], logits, float("-inf"))
        higher = tl.maximum(largest, tl.max(logits, 1))
        # Subtracted before the factor of base 2: logits of thousands would lose digits in the product.
        weights = tl.exp2((logits - higher[:, None]) * LOG2_E)
        shrink = tl.exp2((largest - higher) * LOG2_E)
        total = total * shrink + tl.sum(weights, 1)
        largest = higher
        value_pointers = value + place[:, None] * EV + value_column[None, :]
        values = _load_block(value_pointers, place_mask, value_mask, EVEN_KEYS, EVEN_VALUE_WIDTH)
        gathered = _add_product(gathered * shrink[:, None], rounded(weights, dtype), values, PRECISION)
    gathered = gathered / total[:, None]
    averaged = rounded(gathered, dtype)
    if attended is not None:
        attended_pointers = attended + sample * L * EV + position[:, None] * EV + value_column[None, :]
        tl.store(attended_pointers, averaged, mask=position_mask[:, None] & value_mask[None, :])
        tl.store(lse + sample * L + position, largest + tl.log(total), mask=position_mask)

    factor = tl.load(gamma).to(ACCUMULATOR)
    # Subtracted from zero twice: at gamma 0 a plain sum would turn -0.0 into 0.0.
    if out_weight is None:
        mask = position_mask[:, None] & value_mask[None, :]
        features = tl.load(x + pixel[:, None] + value_column[None, :] * x_channel, mask=mask, other=0)
        result = features.to(ACCUMULATOR) - (0.0 - factor * gathered)
        y_pointers = y + y_pixel[:, None] + value_column[None, :] * y_channel
        tl.store(y_pointers, rounded(result, dtype), mask=mask)
    else:
        for start in range(0, C, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)
            channel_mask = channel < C
            weight_pointers = out_weight + channel[None, :] * EV + value_column[:, None]
            weight = _load_block(weight_pointers, value_mask, channel_mask, EVEN_VALUE_WIDTH, EVEN_CHANNELS)
            mixed = _add_product(tl.zeros((POSITIONS, CHANNELS), ACCUMULATOR), averaged, weight, PRECISION)
            if out_bias is not None:
                mixed += _load_bias(out_bias, channel, channel_mask, ACCUMULATOR)
            x_pointers = x + pixel[:, None] + channel[None, :] * x_channel
            features = _load_block(x_pointers, position_mask, channel_mask, EVEN_POSITIONS, EVEN_CHANNELS)
            result = features.to(ACCUMULATOR) - (0.0 - factor * mixed)
            y_pointers = y + y_pixel[:, None] + channel[None, :] * y_channel
            mask = position_mask[:, None] & channel_mask[None, :]
            tl.store(y_pointers, rounded(result, dtype), mask=mask)


@triton.jit
def input_gradient_kernel(
    grad_y, grad_query, grad_key, grad_value, key_argmax, value_argmax,
    query_weight, key_weight, value_weight, grad_x,
    g_sample, g_channel, g_row, g_column, x_sample, x_channel, x_row, x_column,
    C: tl.constexpr, E: tl.constexpr, EV: tl.constexpr, L, WIDTH, S, S_WIDTH, blocks, chunks,
    POOL: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
    KEY_WIDTH: tl.constexpr, VALUE_STEP: tl.constexpr,
    EVEN_POSITIONS: tl.constexpr, EVEN_WINDOWS: tl.constexpr, EVEN_CHANNELS: tl.constexpr,
    EVEN_KEY_WIDTH: tl.constexpr, EVEN_VALUE_WIDTH: tl.constexpr,
    ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the input's gradient: grad_y, and those of query, key and value times their weights."""
    pid = tl.program_id(0)
    chunk = pid % chunks
    block = pid // chunks % blocks
    sample = (pid // chunks // blocks).to(tl.int64)
    position = block * POSITIONS + tl.arange(0, POSITIONS)
    position_mask = position < L
    row = position // WIDTH
    column = position % WIDTH
    pooled, tap, pooled_mask = _window_of(position, row, column, position_mask, S, S_WIDTH, POOL)
    channel = chunk * CHANNELS + tl.arange(0, CHANNELS)
    channel_mask = channel < C
    key_column = tl.arange(0, KEY_WIDTH)
    key_mask = key_column < E

    sums = tl.zeros((POSITIONS, CHANNELS), ACCUMULATOR)
    pointers = grad_query + sample * L * E + position[:, None] * E + key_column[None, :]
    part = _load_block(pointers, position_mask, key_mask, EVEN_POSITIONS, EVEN_KEY_WIDTH)
    weight_offset = key_column[:, None] * C + channel[None, :]
    weight = _load_block(query_weight + weight_offset, key_mask, channel_mask, EVEN_KEY_WIDTH, EVEN_CHANNELS)
    sums = _add_product(sums, part, weight, PRECISION)
    part = _load_routed(
        grad_key, key_argmax, sample * S * E + pooled[:, None] * E + key_column[None, :],
        tap, pooled_mask, key_mask, EVEN_WINDOWS, EVEN_KEY_WIDTH, POOL,
    )  # fmt: skip
    weight = _load_block(key_weight + weight_offset, key_mask, channel_mask, EVEN_KEY_WIDTH, EVEN_CHANNELS)
    sums = _add_product(sums, part, weight, PRECISION)
    for start in range(0, EV, VALUE_STEP):
        value_column = start + tl.arange(0, VALUE_STEP)
        value_mask = value_column < EV
        routed = _load_routed(
            grad_value, value_argmax, sample * S * EV + pooled[:, None] * EV + value_column[None, :],
            tap, pooled_mask, value_mask, EVEN_WINDOWS, EVEN_VALUE_WIDTH, POOL,
        )  # fmt: skip
        column_pointers = value_weight + value_column[:, None] * C + channel[None, :]
        columns = _load_block(column_pointers, value_mask, channel_mask, EVEN_VALUE_WIDTH, EVEN_CHANNELS)
        sums = _add_product(sums, routed, columns, PRECISION)
    through = _load_block(
        grad_y + sample * g_sample + (row * g_row + column * g_column)[:, None] + channel[None, :] * g_channel,
        position_mask, channel_mask, EVEN_POSITIONS, EVEN_CHANNELS,
    )  # fmt: skip
    tl.store(
        grad_x + sample * x_sample + (row * x_row + column * x_column)[:, None] + channel[None, :] * x_channel,
        rounded(through.to(ACCUMULATOR) + sums, grad_x.dtype.element_ty),
        mask=position_mask[:, None] & channel_mask[None, :],
    )  # fmt: skip


@triton.jit
def weight_gradient_kernel(
    features, grad_query, grad_key, grad_value, key_argmax, value_argmax, partial,
    f_sample, f_channel, f_row, f_column,
    C: tl.constexpr, E: tl.constexpr, EV: tl.constexpr, L, WIDTH, S, S_WIDTH, blocks, chunks, items, share,
    POOL: tl.constexpr, PARTS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    EVEN_POSITIONS: tl.constexpr, EVEN_WINDOWS: tl.constexpr, EVEN_CHANNELS: tl.constexpr,
    EVEN_WIDTHS: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one program's share of the sums over positions of gradient times feature, [splits, 2 E + Ev, C].

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
        pooled, tap, pooled_mask = _window_of(position, row, column, position_mask, S, S_WIDTH, POOL)
        maps = features + sample * f_sample
        pointers = maps + (row * f_row + column * f_column)[None, :] + channel[:, None] * f_channel
        block = _load_block(pointers, channel_mask, position_mask, EVEN_CHANNELS, EVEN_POSITIONS)
        if grad_query is not None:
            pointers = grad_query + sample * L * E + position[:, None] * E + key_column[None, :]
            part = _load_block(pointers, position_mask, key_mask, EVEN_POSITIONS, EVEN_WIDTHS)
            query_sum = _add_product(query_sum, block, part, PRECISION)
            part = _load_routed(
                grad_key, key_argmax, sample * S * E + pooled[:, None] * E + key_column[None, :],
                tap, pooled_mask, key_mask, EVEN_WINDOWS, EVEN_WIDTHS, POOL,
            )  # fmt: skip
            key_sum = _add_product(key_sum, block, part, PRECISION)
        part = _load_routed(
            grad_value, value_argmax, sample * S * EV + pooled[:, None] * EV + value_column[None, :],
            tap, pooled_mask, value_mask, EVEN_WINDOWS, EVEN_WIDTHS, POOL,
        )  # fmt: skip
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
