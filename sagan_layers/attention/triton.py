"""Attention without its [L, S] matrix: Triton kernels and the plain functions that launch them.

:func:`forward`, :func:`backward` and :func:`double_backward` take and return tensors and know nothing of
autograd. Every kernel owns a block of queries (and walks over the keys) or a block of keys (and walks over the
queries), so memory is linear in L + S, nothing is added atomically, and the same input gives the same bits.

Notation, c the scale: P = softmax(c q k^T), G = grad_y, dP = G v^T, D = rowsum(P dP), dS = P (dP - D). For the
second order, with the cotangents a, b, e of dq, dk, dv: T = c (a k^T + q b^T), t = rowsum(P T), U = G e^T,
R = (dP - D)(T - t) + U, r = rowsum(P R).

Three things keep saturated rows (P of 0 and 1, usual without 1/sqrt(E)) as accurate as the reference:

- P is recomputed as exp(c q k^T - lse), and a float32 lse of thousands is only known to 1e-4. The row kernels sum
  the P they recompute and divide by the sum.
- Every mean over keys (D, t, r) is first estimated and then corrected by the mean of what is left, so that
  dP - D, T - t and R - r vanish where they should, also when products are rounded to bfloat16.
- A product has the same bits in the row and in the column kernel, where its operands change sides.
"""
# Kernels are not Python for a type checker, and Triton ships no types.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)


# --- what the kernels share -------------------------------------------------------------------------------------


@triton.jit
def _scalar(number, DTYPE: tl.constexpr):
    """Return the number as a scalar of the dtype; the interpreter hands kernels plain Python numbers."""
    return tl.full((), 1.0, DTYPE) * number


@triton.jit
def _load(base, rows, columns, row_stride, column_stride, row_count, width, EVEN: tl.constexpr):
    """Load a block of rows; what lies outside reads as zero and is never touched."""
    mask = columns[None, :] < width
    if not EVEN:
        mask = mask & (rows[:, None] < row_count)
    # Offsets of 32 bits take half the registers of pointers.
    offsets = rows[:, None] * row_stride + columns[None, :] * column_stride
    return tl.load(base + offsets, mask=mask, other=0.0)


@triton.jit
def _load_row(base, rows, row_count, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(base + rows)
    return tl.load(base + rows, mask=rows < row_count, other=0.0)


@triton.jit
def _rounded(x, dtype: tl.constexpr, PRODUCT: tl.constexpr):
    """Return x in a narrower dtype, rounded to nearest even as GPUs do; the interpreter would cut bfloat16."""
    if PRODUCT == "upcast" and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _store(base, rows, columns, row_count, width, block, PRODUCT: tl.constexpr):
    """Store a block of rows of a contiguous [rows, width] matrix."""
    mask = (rows[:, None] < row_count) & (columns[None, :] < width)
    block = _rounded(block, base.dtype.element_ty, PRODUCT)
    tl.store(base + (rows[:, None] * width + columns[None, :]), block, mask=mask)


@triton.jit
def _tf32(x):
    """Return x rounded to the 10 bits of mantissa that TF32 keeps; tensor cores would cut, twice as far off."""
    return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _dot(a, b, PRODUCT: tl.constexpr, SWAPPED: tl.constexpr):
    """Return a @ b accumulated in float32; ``SWAPPED`` if b's side stands left in the row kernel's product."""
    if PRODUCT == "native":
        return tl.dot(a, b)
    elif PRODUCT == "upcast":
        # The interpreter cannot multiply bfloat16.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif PRODUCT == "tf32":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32")
    elif PRODUCT == "tf32x3":
        a_high = _tf32(a)
        b_high = _tf32(b)
        a_low = _tf32(a - a_high)
        b_low = _tf32(b - b_high)
        # The small terms first: tensor cores truncate as they add.
        if SWAPPED:
            small = tl.dot(a_high, b_low, input_precision="tf32")
            small = tl.dot(a_low, b_high, small, input_precision="tf32")
        else:
            small = tl.dot(a_low, b_high, input_precision="tf32")
            small = tl.dot(a_high, b_low, small, input_precision="tf32")
        return tl.dot(a_high, b_high, small, input_precision="tf32")
    else:
        return tl.dot(a, b, input_precision="ieee", out_dtype=a.dtype)


@triton.jit
def _logits(a, b, PRODUCT: tl.constexpr, SWAPPED: tl.constexpr):
    """Return a @ b, in full float32 for narrow ones where TF32 is not allowed.

    An exponential makes P's relative error of their error. Over 16 wide the sums' own rounding prevails.
    """
    if PRODUCT == "tf32x3" and a.shape[1] <= 16:
        a_high = _tf32(a)
        b_high = _tf32(b)
        a_mid = _tf32(a - a_high)
        b_mid = _tf32(b - b_high)
        a_low = a - a_high - a_mid
        b_low = b - b_high - b_mid
        if SWAPPED:
            small = tl.dot(a_high, b_low, input_precision="tf32")
            small = tl.dot(a_low, b_high, small, input_precision="tf32")
            small = tl.dot(a_mid, b_mid, small, input_precision="tf32")
            small = tl.dot(a_high, b_mid, small, input_precision="tf32")
            small = tl.dot(a_mid, b_high, small, input_precision="tf32")
        else:
            small = tl.dot(a_low, b_high, input_precision="tf32")
            small = tl.dot(a_high, b_low, small, input_precision="tf32")
            small = tl.dot(a_mid, b_mid, small, input_precision="tf32")
            small = tl.dot(a_mid, b_high, small, input_precision="tf32")
            small = tl.dot(a_high, b_mid, small, input_precision="tf32")
        return tl.dot(a_high, b_high, small, input_precision="tf32")
    else:
        return _dot(a, b, PRODUCT, SWAPPED)


@triton.jit
def _add_product(accumulator, computed, given, PRODUCT: tl.constexpr):
    """Return accumulator + computed @ given, where ``given`` are values of an input tensor."""
    if PRODUCT == "native":
        return tl.dot(computed.to(given.dtype), given, accumulator)
    elif PRODUCT == "upcast":
        return accumulator + _dot(_rounded(computed, given.dtype, PRODUCT), given, PRODUCT, False)
    elif PRODUCT == "tf32":
        return tl.dot(computed, given.to(tl.float32), accumulator, input_precision="tf32")
    else:
        # Added once a block and rounded to nearest, not truncated at every step.
        return accumulator + _dot(computed, given, PRODUCT, False)


@triton.jit
def _exp2_of_difference(x, shift, factor, FUSED: tl.constexpr):
    """Return 2 ** ((x - shift) * factor)."""
    if FUSED:
        # One instruction a value before the exponential. An interpreter without one that rounds once is inaccurate.
        return tl.exp2(tl.fma(x, factor, -(shift * factor)))
    return tl.exp2((x - shift) * factor)


@triton.jit
def _wide_dot(
    left,
    right,
    left_rows,
    right_rows,
    left_row_stride,
    left_column_stride,
    right_row_stride,
    right_column_stride,
    left_count,
    right_count,
    width,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    EVEN_LEFT: tl.constexpr,
    EVEN_RIGHT: tl.constexpr,
    PRODUCT: tl.constexpr,
    SWAPPED: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
):
    """Return left @ right^T for widths too large to be held at once."""
    total = tl.zeros([left_rows.shape[0], right_rows.shape[0]], SUM_DTYPE)
    # Not unrolled: chunks that the caller's loop does not change would be kept in registers throughout.
    for chunk in range(CHUNKS):
        columns = chunk * BLOCK + tl.arange(0, BLOCK)
        a = _load(left, left_rows, columns, left_row_stride, left_column_stride, left_count, width, EVEN_LEFT)
        b = _load(
            right, right_rows, columns, right_row_stride, right_column_stride, right_count, width, EVEN_RIGHT
        )
        total += _dot(a, tl.trans(b), PRODUCT, SWAPPED)
    return total


# --- kernels ----------------------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
    query,
    key,
    value,
    y,
    lse,
    scale,
    L,
    S,
    E,
    EV,
    query_n,
    query_l,
    query_e,
    key_n,
    key_s,
    key_e,
    value_n,
    value_s,
    value_e,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_EV: tl.constexpr,
    EVEN_L: tl.constexpr,
    EVEN_S: tl.constexpr,
    GIVEN: tl.constexpr,
    COMPUTED: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Compute y and lse of a block of queries, for one chunk of the value width."""
    chunks = tl.cdiv(EV, BLOCK_EV)
    blocks = tl.cdiv(L, BLOCK_L)
    program = tl.program_id(0)
    chunk = program % chunks
    rows = (program // chunks % blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
    sample = (program // chunks // blocks).to(tl.int64)
    query += sample * query_n
    key += sample * key_n
    value += sample * value_n
    narrow = tl.arange(0, BLOCK_E)
    wide = chunk * BLOCK_EV + tl.arange(0, BLOCK_EV)
    c = _scalar(scale, SUM_DTYPE)
    factor = c * LOG2_E

    q = _load(query, rows, narrow, query_l, query_e, L, E, EVEN_L)
    largest = tl.full([BLOCK_L], float("-inf"), SUM_DTYPE)
    total = tl.zeros([BLOCK_L], SUM_DTYPE)
    weighted = tl.zeros([BLOCK_L, BLOCK_EV], SUM_DTYPE)
    for start in range(0, S, BLOCK_S):
        keys = start + tl.arange(0, BLOCK_S)
        k = _load(key, keys, narrow, key_s, key_e, S, E, EVEN_S)
        v = _load(value, keys, wide, value_s, value_e, S, EV, EVEN_S)
        s = _logits(q, tl.trans(k), GIVEN, False)
        if not EVEN_S:
            s = tl.where(keys[None, :] < S, s, float("-inf"))
        # Finite from the first block on: it has at least one key.
        now_largest = tl.maximum(largest, tl.max(s, 1))
        p = _exp2_of_difference(s, now_largest[:, None], factor, FUSED)
        shrink = _exp2_of_difference(largest, now_largest, factor, FUSED)
        total = total * shrink + tl.sum(p, 1)
        weighted = _add_product(weighted * shrink[:, None], p, v, COMPUTED)
        largest = now_largest
    _store(y + sample * L * EV, rows, wide, L, EV, weighted / total[:, None], GIVEN)
    natural = largest * c + tl.log(total)
    if chunk == 0:
        tl.store(lse + sample * L + rows, natural, mask=rows < L)


@triton.jit
def _row_kernel(
    query,
    key,
    value,
    y,
    lse,
    grad_y,
    dq,
    weight,
    mean_dp,
    scale,
    L,
    S,
    E,
    EV,
    query_n,
    query_l,
    query_e,
    key_n,
    key_s,
    key_e,
    value_n,
    value_s,
    value_e,
    y_n,
    y_l,
    y_e,
    grad_n,
    grad_l,
    grad_e,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_EV: tl.constexpr,
    CHUNKS: tl.constexpr,
    EVEN_L: tl.constexpr,
    EVEN_S: tl.constexpr,
    GIVEN: tl.constexpr,
    COMPUTED: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Compute dq of a block of queries, and for the column kernel D and what P must be multiplied by to sum to one."""
    blocks = tl.cdiv(L, BLOCK_L)
    program = tl.program_id(0)
    rows = (program % blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
    sample = (program // blocks).to(tl.int64)
    query += sample * query_n
    key += sample * key_n
    value += sample * value_n
    y += sample * y_n
    grad_y += sample * grad_n
    narrow = tl.arange(0, BLOCK_E)
    wide = tl.arange(0, BLOCK_EV)
    c = _scalar(scale, SUM_DTYPE)
    factor = c * LOG2_E

    q = _load(query, rows, narrow, query_l, query_e, L, E, EVEN_L)
    shift = _load_row(lse + sample * L, rows, L, EVEN_L) / c
    g = _load(grad_y, rows, wide, grad_l, grad_e, L, EV, EVEN_L)
    out = _load(y, rows, wide, y_l, y_e, L, EV, EVEN_L)
    estimate = tl.sum(g.to(SUM_DTYPE) * out.to(SUM_DTYPE), 1)
    for chunk in tl.static_range(1, CHUNKS):
        columns = chunk * BLOCK_EV + wide
        g_chunk = _load(grad_y, rows, columns, grad_l, grad_e, L, EV, EVEN_L)
        out = _load(y, rows, columns, y_l, y_e, L, EV, EVEN_L)
        estimate += tl.sum(g_chunk.to(SUM_DTYPE) * out.to(SUM_DTYPE), 1)
    total = tl.zeros([BLOCK_L], SUM_DTYPE)
    left = tl.zeros([BLOCK_L], SUM_DTYPE)
    weighted = tl.zeros([BLOCK_L, BLOCK_E], SUM_DTYPE)
    key_sum = tl.zeros([BLOCK_L, BLOCK_E], SUM_DTYPE)
    for start in range(0, S, BLOCK_S):
        keys = start + tl.arange(0, BLOCK_S)
        k = _load(key, keys, narrow, key_s, key_e, S, E, EVEN_S)
        s = _logits(q, tl.trans(k), GIVEN, False)
        if not EVEN_S:
            s = tl.where(keys[None, :] < S, s, float("-inf"))
        p = _exp2_of_difference(s, shift[:, None], factor, FUSED)
        if CHUNKS == 1:
            v = _load(value, keys, wide, value_s, value_e, S, EV, EVEN_S)
            dp = _dot(g, tl.trans(v), GIVEN, False)
        else:
            dp = _wide_dot(
                grad_y,
                value,
                rows,
                keys,
                grad_l,
                grad_e,
                value_s,
                value_e,
                L,
                S,
                EV,
                BLOCK_EV,
                CHUNKS,
                EVEN_L,
                EVEN_S,
                GIVEN,
                False,
                SUM_DTYPE,
            )
        ds = p * (dp - estimate[:, None])
        total += tl.sum(p, 1)
        left += tl.sum(ds, 1)
        weighted = _add_product(weighted, ds, k, COMPUTED)
        key_sum = _add_product(key_sum, p, k, COMPUTED)
    normalise = 1.0 / total
    left *= normalise
    gradient = (weighted - left[:, None] * key_sum) * (normalise * c)[:, None]
    _store(dq + sample * L * E, rows, narrow, L, E, gradient, GIVEN)
    tl.store(weight + sample * L + rows, normalise, mask=rows < L)
    tl.store(mean_dp + sample * L + rows, estimate + left, mask=rows < L)


@triton.jit
def _column_kernel(
    query,
    key,
    value,
    lse,
    grad_y,
    weight,
    mean_dp,
    dk,
    dv,
    scale,
    L,
    S,
    E,
    EV,
    query_n,
    query_l,
    query_e,
    key_n,
    key_s,
    key_e,
    value_n,
    value_s,
    value_e,
    grad_n,
    grad_l,
    grad_e,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_EV: tl.constexpr,
    CHUNKS: tl.constexpr,
    WITH_DK: tl.constexpr,
    WITH_DV: tl.constexpr,
    EVEN_L: tl.constexpr,
    EVEN_S: tl.constexpr,
    GIVEN: tl.constexpr,
    COMPUTED: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Compute dk of a block of keys, and dv (of one chunk of the value width a program unless dk is wanted too)."""
    parts = 1 if WITH_DK else CHUNKS
    blocks = tl.cdiv(S, BLOCK_S)
    program = tl.program_id(0)
    keys = (program // parts % blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    sample = (program // parts // blocks).to(tl.int64)
    query += sample * query_n
    key += sample * key_n
    value += sample * value_n
    grad_y += sample * grad_n
    narrow = tl.arange(0, BLOCK_E)
    wide = (program % parts) * BLOCK_EV + tl.arange(0, BLOCK_EV)
    c = _scalar(scale, SUM_DTYPE)
    factor = c * LOG2_E

    k = _load(key, keys, narrow, key_s, key_e, S, E, EVEN_S)
    if WITH_DK and CHUNKS == 1:
        v = _load(value, keys, wide, value_s, value_e, S, EV, EVEN_S)
    grad_k = tl.zeros([BLOCK_S, BLOCK_E], SUM_DTYPE)
    grad_v = tl.zeros([BLOCK_S, BLOCK_EV], SUM_DTYPE)
    for start in range(0, L, BLOCK_L):
        rows = start + tl.arange(0, BLOCK_L)
        q = _load(query, rows, narrow, query_l, query_e, L, E, EVEN_L)
        shift = _load_row(lse + sample * L, rows, L, EVEN_L) / c
        normalise = _load_row(weight + sample * L, rows, L, EVEN_L)
        s = _logits(k, tl.trans(q), GIVEN, True)
        if not (EVEN_L and EVEN_S):
            s = tl.where((keys[:, None] < S) & (rows[None, :] < L), s, float("-inf"))
        p = _exp2_of_difference(s, shift[None, :], factor, FUSED) * normalise[None, :]
        if WITH_DV or CHUNKS == 1:
            g = _load(grad_y, rows, wide, grad_l, grad_e, L, EV, EVEN_L)
        if WITH_DV:
            grad_v = _add_product(grad_v, p, g, COMPUTED)
        if WITH_DK:
            if CHUNKS == 1:
                dp = _dot(v, tl.trans(g), GIVEN, True)
            else:
                dp = _wide_dot(
                    value,
                    grad_y,
                    keys,
                    rows,
                    value_s,
                    value_e,
                    grad_l,
                    grad_e,
                    S,
                    L,
                    EV,
                    BLOCK_EV,
                    CHUNKS,
                    EVEN_S,
                    EVEN_L,
                    GIVEN,
                    True,
                    SUM_DTYPE,
                )
            ds = p * (dp - _load_row(mean_dp + sample * L, rows, L, EVEN_L)[None, :])
            grad_k = _add_product(grad_k, ds, q, COMPUTED)
    if WITH_DK:
        _store(dk + sample * S * E, keys, narrow, S, E, grad_k * c, GIVEN)
    if WITH_DV:
        _store(dv + sample * S * EV, keys, wide, S, EV, grad_v, GIVEN)


@triton.jit
def _double_row_kernel(
    query,
    key,
    value,
    y,
    lse,
    grad_y,
    grad_dq,
    grad_dk,
    grad_dv,
    grad_query,
    grad_grad_y,
    weight,
    mean_dp,
    mean_t,
    mean_r,
    scale,
    L,
    S,
    E,
    EV,
    query_n,
    query_l,
    query_e,
    key_n,
    key_s,
    key_e,
    value_n,
    value_s,
    value_e,
    y_n,
    y_l,
    y_e,
    grad_n,
    grad_l,
    grad_e,
    a_n,
    a_l,
    a_e,
    b_n,
    b_s,
    b_e,
    e_n,
    e_s,
    e_e,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_EV: tl.constexpr,
    CHUNKS: tl.constexpr,
    WITH_QUERY: tl.constexpr,
    WITH_GRAD_Y: tl.constexpr,
    EVEN_L: tl.constexpr,
    EVEN_S: tl.constexpr,
    GIVEN: tl.constexpr,
    COMPUTED: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Gradients of query and grad_y of a block of queries, and for the column kernel D, t, r and P's factor.

    Where the value width comes in chunks, a first launch does the query and the row values, a second one grad_y.
    """
    parts = 1 if WITH_QUERY else CHUNKS
    blocks = tl.cdiv(L, BLOCK_L)
    program = tl.program_id(0)
    rows = (program // parts % blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
    sample = (program // parts // blocks).to(tl.int64)
    query += sample * query_n
    key += sample * key_n
    value += sample * value_n
    y += sample * y_n
    grad_y += sample * grad_n
    grad_dq += sample * a_n
    grad_dk += sample * b_n
    grad_dv += sample * e_n
    narrow = tl.arange(0, BLOCK_E)
    wide = (program % parts) * BLOCK_EV + tl.arange(0, BLOCK_EV)
    c = _scalar(scale, SUM_DTYPE)
    factor = c * LOG2_E

    q = _load(query, rows, narrow, query_l, query_e, L, E, EVEN_L)
    a = _load(grad_dq, rows, narrow, a_l, a_e, L, E, EVEN_L)
    shift = _load_row(lse + sample * L, rows, L, EVEN_L) / c
    if WITH_QUERY:
        g = _load(grad_y, rows, wide, grad_l, grad_e, L, EV, EVEN_L)
        out = _load(y, rows, wide, y_l, y_e, L, EV, EVEN_L)
        d = tl.sum(g.to(SUM_DTYPE) * out.to(SUM_DTYPE), 1)
        for chunk in tl.static_range(1, CHUNKS):
            columns = chunk * BLOCK_EV + wide
            g_chunk = _load(grad_y, rows, columns, grad_l, grad_e, L, EV, EVEN_L)
            out = _load(y, rows, columns, y_l, y_e, L, EV, EVEN_L)
            d += tl.sum(g_chunk.to(SUM_DTYPE) * out.to(SUM_DTYPE), 1)
        total = tl.zeros([BLOCK_L], SUM_DTYPE)
        left = tl.zeros([BLOCK_L], SUM_DTYPE)
        t = tl.zeros([BLOCK_L], SUM_DTYPE)
        r = tl.zeros([BLOCK_L], SUM_DTYPE)
        for start in range(0, S, BLOCK_S):
            keys = start + tl.arange(0, BLOCK_S)
            k = _load(key, keys, narrow, key_s, key_e, S, E, EVEN_S)
            b = _load(grad_dk, keys, narrow, b_s, b_e, S, E, EVEN_S)
            s = _logits(q, tl.trans(k), GIVEN, False)
            if not EVEN_S:
                s = tl.where(keys[None, :] < S, s, float("-inf"))
            p = _exp2_of_difference(s, shift[:, None], factor, FUSED)
            if CHUNKS == 1:
                v = _load(value, keys, wide, value_s, value_e, S, EV, EVEN_S)
                e = _load(grad_dv, keys, wide, e_s, e_e, S, EV, EVEN_S)
                dp = _dot(g, tl.trans(v), GIVEN, False)
                u = _dot(g, tl.trans(e), GIVEN, False)
            else:
                dp = _wide_dot(
                    grad_y,
                    value,
                    rows,
                    keys,
                    grad_l,
                    grad_e,
                    value_s,
                    value_e,
                    L,
                    S,
                    EV,
                    BLOCK_EV,
                    CHUNKS,
                    EVEN_L,
                    EVEN_S,
                    GIVEN,
                    False,
                    SUM_DTYPE,
                )
                u = _wide_dot(
                    grad_y,
                    grad_dv,
                    rows,
                    keys,
                    grad_l,
                    grad_e,
                    e_s,
                    e_e,
                    L,
                    S,
                    EV,
                    BLOCK_EV,
                    CHUNKS,
                    EVEN_L,
                    EVEN_S,
                    GIVEN,
                    False,
                    SUM_DTYPE,
                )
            change = c * (_dot(a, tl.trans(k), GIVEN, False) + _dot(q, tl.trans(b), GIVEN, False))
            centred = dp - d[:, None]
            total += tl.sum(p, 1)
            left += tl.sum(p * centred, 1)
            t += tl.sum(p * change, 1)
            r += tl.sum(p * (centred * change + u), 1)
        normalise = 1.0 / total
        left *= normalise
        t *= normalise
        r = r * normalise - left * t
        d += left
    else:
        normalise = _load_row(weight + sample * L, rows, L, EVEN_L)
        t = _load_row(mean_t + sample * L, rows, L, EVEN_L)

    t_left = tl.zeros([BLOCK_L], SUM_DTYPE)
    r_left = tl.zeros([BLOCK_L], SUM_DTYPE)
    weighted = tl.zeros([BLOCK_L, BLOCK_E], SUM_DTYPE)
    key_sum = tl.zeros([BLOCK_L, BLOCK_E], SUM_DTYPE)
    wide_sum = tl.zeros([BLOCK_L, BLOCK_EV], SUM_DTYPE)
    for start in range(0, S, BLOCK_S):
        keys = start + tl.arange(0, BLOCK_S)
        k = _load(key, keys, narrow, key_s, key_e, S, E, EVEN_S)
        b = _load(grad_dk, keys, narrow, b_s, b_e, S, E, EVEN_S)
        s = _logits(q, tl.trans(k), GIVEN, False)
        if not EVEN_S:
            s = tl.where(keys[None, :] < S, s, float("-inf"))
        p = _exp2_of_difference(s, shift[:, None], factor, FUSED)
        change = c * (_dot(a, tl.trans(k), GIVEN, False) + _dot(q, tl.trans(b), GIVEN, False)) - t[:, None]
        weighted_change = p * change
        if WITH_GRAD_Y or CHUNKS == 1:
            v = _load(value, keys, wide, value_s, value_e, S, EV, EVEN_S)
            e = _load(grad_dv, keys, wide, e_s, e_e, S, EV, EVEN_S)
        if WITH_GRAD_Y:
            wide_sum = _add_product(wide_sum, weighted_change, v, COMPUTED)
            wide_sum = _add_product(wide_sum, p, e, COMPUTED)
        if WITH_QUERY:
            if CHUNKS == 1:
                dp = _dot(g, tl.trans(v), GIVEN, False)
                u = _dot(g, tl.trans(e), GIVEN, False)
            else:
                dp = _wide_dot(
                    grad_y,
                    value,
                    rows,
                    keys,
                    grad_l,
                    grad_e,
                    value_s,
                    value_e,
                    L,
                    S,
                    EV,
                    BLOCK_EV,
                    CHUNKS,
                    EVEN_L,
                    EVEN_S,
                    GIVEN,
                    False,
                    SUM_DTYPE,
                )
                u = _wide_dot(
                    grad_y,
                    grad_dv,
                    rows,
                    keys,
                    grad_l,
                    grad_e,
                    e_s,
                    e_e,
                    L,
                    S,
                    EV,
                    BLOCK_EV,
                    CHUNKS,
                    EVEN_L,
                    EVEN_S,
                    GIVEN,
                    False,
                    SUM_DTYPE,
                )
            ds = p * (dp - d[:, None])
            ds2 = ds * change + p * (u - r[:, None])
            t_left += tl.sum(weighted_change, 1)
            r_left += tl.sum(ds2, 1)
            weighted = _add_product(weighted, ds2, k, COMPUTED)
            weighted = _add_product(weighted, ds, b, COMPUTED)
            key_sum = _add_product(key_sum, p, k, COMPUTED)
    t_left *= normalise
    if WITH_GRAD_Y:
        wide_sum *= normalise[:, None]
        if WITH_QUERY:
            wide_sum -= t_left[:, None] * _load(y, rows, wide, y_l, y_e, L, EV, EVEN_L).to(SUM_DTYPE)
        _store(grad_grad_y + sample * L * EV, rows, wide, L, EV, wide_sum, GIVEN)
    if WITH_QUERY:
        r_left *= normalise
        gradient = (weighted - r_left[:, None] * key_sum) * (normalise * c)[:, None]
        _store(grad_query + sample * L * E, rows, narrow, L, E, gradient, GIVEN)
        inside = rows < L
        tl.store(weight + sample * L + rows, normalise, mask=inside)
        tl.store(mean_dp + sample * L + rows, d, mask=inside)
        tl.store(mean_t + sample * L + rows, t + t_left, mask=inside)
        tl.store(mean_r + sample * L + rows, r + r_left, mask=inside)


@triton.jit
def _double_column_kernel(
    query,
    key,
    value,
    lse,
    grad_y,
    grad_dq,
    grad_dk,
    grad_dv,
    weight,
    mean_dp,
    mean_t,
    mean_r,
    grad_key,
    grad_value,
    scale,
    L,
    S,
    E,
    EV,
    query_n,
    query_l,
    query_e,
    key_n,
    key_s,
    key_e,
    value_n,
    value_s,
    value_e,
    grad_n,
    grad_l,
    grad_e,
    a_n,
    a_l,
    a_e,
    b_n,
    b_s,
    b_e,
    e_n,
    e_s,
    e_e,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_EV: tl.constexpr,
    CHUNKS: tl.constexpr,
    WITH_KEY: tl.constexpr,
    WITH_VALUE: tl.constexpr,
    EVEN_L: tl.constexpr,
    EVEN_S: tl.constexpr,
    GIVEN: tl.constexpr,
    COMPUTED: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Gradients of a block of keys, and of their values (one chunk of the width unless the keys' is wanted too)."""
    parts = 1 if WITH_KEY else CHUNKS
    blocks = tl.cdiv(S, BLOCK_S)
    program = tl.program_id(0)
    keys = (program // parts % blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    sample = (program // parts // blocks).to(tl.int64)
    query += sample * query_n
    key += sample * key_n
    value += sample * value_n
    grad_y += sample * grad_n
    grad_dq += sample * a_n
    grad_dk += sample * b_n
    grad_dv += sample * e_n
    narrow = tl.arange(0, BLOCK_E)
    wide = (program % parts) * BLOCK_EV + tl.arange(0, BLOCK_EV)
    c = _scalar(scale, SUM_DTYPE)
    factor = c * LOG2_E

    k = _load(key, keys, narrow, key_s, key_e, S, E, EVEN_S)
    b = _load(grad_dk, keys, narrow, b_s, b_e, S, E, EVEN_S)
    if WITH_KEY and CHUNKS == 1:
        v = _load(value, keys, wide, value_s, value_e, S, EV, EVEN_S)
        e = _load(grad_dv, keys, wide, e_s, e_e, S, EV, EVEN_S)
    key_sum = tl.zeros([BLOCK_S, BLOCK_E], SUM_DTYPE)
    value_sum = tl.zeros([BLOCK_S, BLOCK_EV], SUM_DTYPE)
    for start in range(0, L, BLOCK_L):
        rows = start + tl.arange(0, BLOCK_L)
        q = _load(query, rows, narrow, query_l, query_e, L, E, EVEN_L)
        a = _load(grad_dq, rows, narrow, a_l, a_e, L, E, EVEN_L)
        shift = _load_row(lse + sample * L, rows, L, EVEN_L) / c
        normalise = _load_row(weight + sample * L, rows, L, EVEN_L)
        t = _load_row(mean_t + sample * L, rows, L, EVEN_L)
        s = _logits(k, tl.trans(q), GIVEN, True)
        if not (EVEN_L and EVEN_S):
            s = tl.where((keys[:, None] < S) & (rows[None, :] < L), s, float("-inf"))
        p = _exp2_of_difference(s, shift[None, :], factor, FUSED) * normalise[None, :]
        change = c * (_dot(k, tl.trans(a), GIVEN, True) + _dot(b, tl.trans(q), GIVEN, True)) - t[None, :]
        if WITH_VALUE or CHUNKS == 1:
            g = _load(grad_y, rows, wide, grad_l, grad_e, L, EV, EVEN_L)
        if WITH_VALUE:
            value_sum = _add_product(value_sum, p * change, g, COMPUTED)
        if WITH_KEY:
            if CHUNKS == 1:
                dp = _dot(v, tl.trans(g), GIVEN, True)
                u = _dot(e, tl.trans(g), GIVEN, True)
            else:
                dp = _wide_dot(
                    value,
                    grad_y,
                    keys,
                    rows,
                    value_s,
                    value_e,
                    grad_l,
                    grad_e,
                    S,
                    L,
                    EV,
                    BLOCK_EV,
                    CHUNKS,
                    EVEN_S,
                    EVEN_L,
                    GIVEN,
                    True,
                    SUM_DTYPE,
                )
                u = _wide_dot(
                    grad_dv,
                    grad_y,
                    keys,
                    rows,
                    e_s,
                    e_e,
                    grad_l,
                    grad_e,
                    S,
                    L,
                    EV,
                    BLOCK_EV,
                    CHUNKS,
                    EVEN_S,
                    EVEN_L,
                    GIVEN,
                    True,
                    SUM_DTYPE,
                )
            ds = p * (dp - _load_row(mean_dp + sample * L, rows, L, EVEN_L)[None, :])
            ds2 = ds * change + p * (u - _load_row(mean_r + sample * L, rows, L, EVEN_L)[None, :])
            key_sum = _add_product(key_sum, ds2, q, COMPUTED)
            key_sum = _add_product(key_sum, ds, a, COMPUTED)
    if WITH_KEY:
        _store(grad_key + sample * S * E, keys, narrow, S, E, key_sum * c, GIVEN)
    if WITH_VALUE:
        _store(grad_value + sample * S * EV, keys, wide, S, EV, value_sum, GIVEN)


# --- tiles and widths -------------------------------------------------------------------------------------------


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
LARGEST_CHUNK = {2: 128, 4: 64}
# The double kernels hold so much more that they always go in two launches, too.
LARGEST_CHUNK_OF_DOUBLE = 32

# By kernel, padded value width and bytes of an operand (float64, interpreted only, takes float32's). Chosen with
# benchmarks/kernel_resources.py: none spills and each fits on every supported chip.
TILES = {
    ("_forward_kernel", 32, 2): Tile(64, 32, 4, 2),
    ("_forward_kernel", 64, 2): Tile(64, 64, 4, 2),
    ("_forward_kernel", 128, 2): Tile(64, 32, 8, 1),
    ("_forward_kernel", 256, 2): Tile(64, 64, 8, 2),
    ("_forward_kernel", 32, 4): Tile(64, 32, 4, 2),
    ("_forward_kernel", 64, 4): Tile(64, 32, 8, 1),
    ("_forward_kernel", 128, 4): Tile(64, 32, 8, 1),
    ("_row_kernel", 32, 2): Tile(64, 64, 4, 2),
    ("_row_kernel", 64, 2): Tile(64, 64, 4, 2),
    ("_row_kernel", 128, 2): Tile(64, 32, 4, 2),
    ("_row_kernel", 256, 2): Tile(64, 32, 8, 1),
    ("_row_kernel", 32, 4): Tile(32, 32, 4, 2),
    ("_row_kernel", 64, 4): Tile(32, 16, 4, 1),
    ("_row_kernel", 128, 4): Tile(16, 32, 8, 1),
    ("_column_kernel", 32, 2): Tile(32, 64, 4, 2),
    ("_column_kernel", 64, 2): Tile(64, 64, 4, 2),
    ("_column_kernel", 128, 2): Tile(16, 64, 4, 1),
    ("_column_kernel", 256, 2): Tile(16, 64, 4, 1),
    ("_column_kernel", 32, 4): Tile(32, 64, 4, 2),
    ("_column_kernel", 64, 4): Tile(16, 32, 8, 1),
    ("_column_kernel", 128, 4): Tile(16, 64, 4, 1),
    ("_double_row_kernel", 32, 2): Tile(64, 32, 4, 1),
    ("_double_row_kernel", 64, 2): Tile(32, 32, 4, 1),
    ("_double_row_kernel", 128, 2): Tile(32, 32, 8, 1),
    ("_double_row_kernel", 256, 2): Tile(16, 16, 2, 1),
    ("_double_row_kernel", 32, 4): Tile(16, 16, 8, 1),
    ("_double_row_kernel", 64, 4): Tile(16, 16, 8, 1),
    ("_double_row_kernel", 128, 4): Tile(16, 16, 8, 1),
    ("_double_column_kernel", 32, 2): Tile(32, 64, 4, 1),
    ("_double_column_kernel", 64, 2): Tile(32, 64, 4, 1),
    ("_double_column_kernel", 128, 2): Tile(32, 32, 4, 1),
    ("_double_column_kernel", 256, 2): Tile(16, 16, 8, 1),
    ("_double_column_kernel", 32, 4): Tile(16, 32, 4, 1),
    ("_double_column_kernel", 64, 4): Tile(16, 16, 4, 1),
    ("_double_column_kernel", 128, 4): Tile(16, 16, 8, 1),
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


def _interpreting() -> bool:
    return not isinstance(_forward_kernel, triton.JITFunction)


def _products(kernel: Any, dtype: torch.dtype, float32_product: str) -> tuple[str, str]:
    """Return how inputs are multiplied with inputs, and computed values with inputs."""
    if dtype == torch.float64:
        return "ieee", "ieee"
    if dtype == torch.float32:
        # Second derivatives are taken of few samples or rarely, and sum what cancels.
        product = "tf32x3" if kernel in _DOUBLE_KERNELS else float32_product
        return product, product
    if dtype == torch.bfloat16:
        product = "upcast" if _interpreting() else "native"
        return product, product
    # A float16 cannot hold gradients under a loss scale, only the forward's probabilities.
    return "native", "native" if kernel is _forward_kernel else "tf32"


def _float32_product() -> str:
    matmul = torch.backends.cuda.matmul
    try:
        allowed = matmul.fp32_precision == "tf32"
    except AttributeError:  # before torch 2.9; afterwards reading allow_tf32 can raise
        allowed = matmul.allow_tf32
    return "tf32" if allowed else "tf32x3"


def _launches(
    kernel: Any, dtype: torch.dtype, widths: tuple[int, int], float32_product: str
) -> Iterator[Launch]:
    """Yield what must be launched for this kernel, in order: the narrow results apart where need be."""
    given, computed = _products(kernel, dtype, float32_product)
    # What float16 multiplies as TF32 takes the space of float32.
    size = 2 if dtype.itemsize == 2 and computed != "tf32" else 4
    block_e, padded_ev = widths
    double = kernel in _DOUBLE_KERNELS
    block_ev = min(padded_ev, LARGEST_CHUNK_OF_DOUBLE if double else LARGEST_CHUNK[size])
    chunks = padded_ev // block_ev
    tile = TILES[kernel.__name__, padded_ev, size]
    constants = {
        "BLOCK_L": tile.block_queries,
        "BLOCK_S": tile.block_keys,
        "BLOCK_E": block_e,
        "BLOCK_EV": block_ev,
        "GIVEN": given,
        "COMPUTED": computed,
        "SUM_DTYPE": tl.float64 if dtype == torch.float64 else tl.float32,
        "FUSED": not _interpreting(),
    }
    if kernel is _forward_kernel:
        yield Launch(kernel, tile, constants, chunks)
        return
    constants["CHUNKS"] = chunks
    if kernel is _row_kernel:
        yield Launch(kernel, tile, constants, 1)
        return
    narrow, wide = _PARTS[kernel.__name__]
    if chunks == 1 and not double:
        yield Launch(kernel, tile, {**constants, narrow: True, wide: True}, 1)
    else:
        yield Launch(kernel, tile, {**constants, narrow: True, wide: False}, 1)
        yield Launch(kernel, tile, {**constants, narrow: False, wide: True}, chunks)


_PARTS = {
    "_column_kernel": ("WITH_DK", "WITH_DV"),
    "_double_row_kernel": ("WITH_QUERY", "WITH_GRAD_Y"),
    "_double_column_kernel": ("WITH_KEY", "WITH_VALUE"),
}
_DOUBLE_KERNELS = (_double_row_kernel, _double_column_kernel)
_KERNELS = (_forward_kernel, _row_kernel, _column_kernel, *_DOUBLE_KERNELS)


def widths_of(dtype: torch.dtype) -> tuple[tuple[int, int], ...]:
    """Return the padded (E, Ev) that are served in this dtype."""
    return WIDTHS if dtype == torch.bfloat16 else WIDTHS_OF_OTHERS


def _run(kernel: Any, tensors: dict[str, Tensor], strided: dict[str, Tensor], scale: float) -> None:
    """Launch a kernel; ``strided`` are the tensors whose strides it takes, by the prefix of their names."""
    query, value = strided["query"], strided["value"]
    batch, L, E = query.shape
    S, EV = value.shape[1:]
    widths = next(pair for pair in widths_of(query.dtype) if pair[0] >= E and pair[1] >= EV)
    strides = {
        f"{prefix}_{axis}": tensor.stride(i)
        for prefix, tensor in strided.items()
        for i, axis in enumerate(("n", _LENGTH_AXIS[prefix], "e"))
    }
    for launch in _launches(kernel, query.dtype, widths, _float32_product()):
        tile = launch.tile
        length, block = (S, tile.block_keys) if "column" in kernel.__name__ else (L, tile.block_queries)
        grid = (batch * triton.cdiv(length, block) * _programs(launch, EV),)
        with torch.cuda.device_of(query):
            kernel[grid](
                **tensors,
                scale=scale,
                L=L,
                S=S,
                E=E,
                EV=EV,
                **strides,
                **launch.constants,
                EVEN_L=L % tile.block_queries == 0,
                EVEN_S=S % tile.block_keys == 0,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                # The same bits in the row and the column kernel: no multiply-adds but those written as such.
                enable_fp_fusion=False,
            )


_LENGTH_AXIS = {"query": "l", "key": "s", "value": "s", "y": "l", "grad": "l", "a": "l", "b": "s", "e": "s"}


def _programs(launch: Launch, value_width: int) -> int:
    """Return the number of programs a block takes: the forward kernel counts the chunks that hold something."""
    if launch.kernel is _forward_kernel:
        return int(triton.cdiv(value_width, launch.constants["BLOCK_EV"]))
    return launch.programs_per_block


# --- launchers --------------------------------------------------------------------------------------------------

_LARGEST_OFFSET = 2**31 - 1


def unsupported_reasons(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    """Return why these kernels cannot serve these tensors, nothing if they can."""
    reasons = []
    served = [torch.float32, torch.bfloat16, torch.float16]
    if _interpreting():
        served.append(torch.float64)
        if query.device.type not in ("cpu", "cuda"):
            reasons.append(f"Triton's interpreter takes CPU and CUDA tensors, got {query.device.type}")
    elif query.device.type != "cuda":
        reasons.append(f"needs a CUDA device, got {query.device.type}")
    elif torch.version.hip is not None:
        reasons.append("needs an NVIDIA GPU, got a ROCm build of torch")
    elif torch.cuda.get_device_capability(query.device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(query.device)
        reasons.append(f"needs compute capability 8.0, got {major}.{minor}")
    if query.dtype not in served:
        reasons.append(f"{query.dtype} is not served")
    widths = max(query.size(2), 1), value.size(2)
    for name, width, largest in zip(("E", "Ev"), widths, widths_of(query.dtype)[-1], strict=True):
        if width > largest:
            reasons.append(f"serves {name} up to {largest} in {query.dtype}, got {width}")
    longest = max(query.size(1), key.size(1))
    if longest * max(widths) > _LARGEST_OFFSET:
        reasons.append(f"serves samples of less than 2**31 numbers, got {longest} x {max(widths)}")
    return reasons


def _readable(tensor: Tensor) -> Tensor:
    """Return the tensor, copied unless positions or channels are adjacent and offsets in a sample have 32 bits.

    Reading anything at all would take the kernels twice the registers.
    """
    strides = tensor.stride()[1:]
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], strides, strict=True))
    # The offsets of a block's padding are computed, though not read.
    return tensor if 1 in strides and span + 1024 * max(strides) <= _LARGEST_OFFSET else tensor.contiguous()


def _split_scale(scale: float, dtype: torch.dtype) -> tuple[float, float]:
    """Return (factor for query and grad_dq, positive scale for the kernels); their product is ``scale``.

    Kernels take the maximum of unscaled logits, and a float64 scale would reach them as a float32.
    """
    if dtype == torch.float64 or scale == 0.0:
        return scale, 1.0
    return (-1.0, -scale) if scale < 0 else (1.0, scale)


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else tensor * factor


def _rows(query: Tensor) -> Tensor:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return torch.empty(query.shape[:2], dtype=dtype, device=query.device)


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)


def forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return ``softmax(scale * query . key) @ value`` and the logarithm of the softmax's denominators.

    Args:
        query: [N, L, E].
        key: [N, S, E].
        value: [N, S, Ev].
        scale: factor on the logits.

    Returns:
        y, [N, L, Ev], contiguous, in the dtype of ``value``, and lse, [N, L], float32 (float64 for float64).
    """
    y, lse = value.new_empty((*query.shape[:2], value.size(2))), _rows(query)
    if lse.numel() == 0:
        return y, lse
    factor, positive = _split_scale(scale, query.dtype)
    query, key, value = (_readable(tensor) for tensor in (_times(query, factor), key, value))
    strided = {"query": query, "key": key, "value": value}
    _run(_forward_kernel, {**strided, "y": y, "lse": lse}, strided, positive)
    return y, lse


def backward(
    query: Tensor, key: Tensor, value: Tensor, y: Tensor, lse: Tensor, grad_y: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, contiguous and in their dtype.

    Args:
        query: [N, L, E].
        key: [N, S, E].
        value: [N, S, Ev].
        y: what :func:`forward` returned.
        lse: what :func:`forward` returned, contiguous.
        grad_y: [N, L, Ev], any strides.
        scale: factor on the logits.
    """
    dq, dk, dv = _empty(query), _empty(key), _empty(value)
    if lse.numel() == 0:
        return dq, _zeros(key), _zeros(value)
    factor, positive = _split_scale(scale, query.dtype)
    query, key, value, y, grad_y = (
        _readable(tensor) for tensor in (_times(query, factor), key, value, y, grad_y)
    )
    inputs = {"query": query, "key": key, "value": value}
    rows = {"weight": _rows(query), "mean_dp": _rows(query)}
    shared = {**inputs, "lse": lse.contiguous(), "grad_y": grad_y, **rows}
    _run(_row_kernel, {**shared, "y": y, "dq": dq}, {**inputs, "y": y, "grad": grad_y}, positive)
    _run(_column_kernel, {**shared, "dk": dk, "dv": dv}, {**inputs, "grad": grad_y}, positive)
    return _times(dq, factor), dk, dv


def double_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    y: Tensor,
    lse: Tensor,
    grad_y: Tensor,
    grad_dq: Tensor,
    grad_dk: Tensor,
    grad_dv: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and grad_y through what :func:`backward` returned.

    Args:
        query: [N, L, E].
        key: [N, S, E].
        value: [N, S, Ev].
        y: what :func:`forward` returned.
        lse: what :func:`forward` returned, contiguous.
        grad_y: [N, L, Ev], what :func:`backward` was given.
        grad_dq: [N, L, E], the gradient of the first result of :func:`backward`.
        grad_dk: [N, S, E], of the second.
        grad_dv: [N, S, Ev], of the third.
        scale: factor on the logits.
    """
    grad_query, grad_key, grad_value = _empty(query), _empty(key), _empty(value)
    grad_grad_y = _empty(grad_y)
    if lse.numel() == 0:
        return grad_query, _zeros(key), _zeros(value), grad_grad_y
    factor, positive = _split_scale(scale, query.dtype)
    query, key, value, y, grad_y, a, b, e = (
        _readable(tensor)
        for tensor in (
            _times(query, factor),
            key,
            value,
            y,
            grad_y,
            _times(grad_dq, factor),
            grad_dk,
            grad_dv,
        )
    )
    inputs = {"query": query, "key": key, "value": value}
    strided = {**inputs, "grad": grad_y, "a": a, "b": b, "e": e}
    shared = {
        **inputs,
        "lse": lse.contiguous(),
        "grad_y": grad_y,
        "grad_dq": a,
        "grad_dk": b,
        "grad_dv": e,
        **{name: _rows(query) for name in ("weight", "mean_dp", "mean_t", "mean_r")},
    }
    outputs = {"grad_query": grad_query, "grad_grad_y": grad_grad_y}
    _run(_double_row_kernel, {**shared, **outputs, "y": y}, {**strided, "y": y}, positive)
    outputs = {"grad_key": grad_key, "grad_value": grad_value}
    _run(_double_column_kernel, {**shared, **outputs}, strided, positive)
    return _times(grad_query, factor), grad_key, grad_value, grad_grad_y


# --- what benchmarks/kernel_resources.py compiles ---------------------------------------------------------------


_ELEMENTS = (
    (torch.bfloat16, "bf16", ("tf32x3",)),
    (torch.float16, "fp16", ("tf32x3",)),
    (torch.float32, "fp32", ("tf32x3", "tf32")),
)
_ROW_VALUES = ("lse", "weight", "mean_dp", "mean_t", "mean_r")


def compile_jobs() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], Tile, str]]:
    """Yield every configuration that the launchers can choose, for compilation without a GPU.

    Each twice: "even" for NCHW feature maps of 16n positions, "masked" for any lengths, and with other gradients.

    Yields:
        (kernel, signature, constexprs, tile, label); ":16" after a type stands for a known multiple of 16.
    """
    for kernel in _KERNELS:
        for dtype, element, float32_products in _ELEMENTS:
            for float32_product in float32_products[: 1 if kernel in _DOUBLE_KERNELS else None]:
                for widths in widths_of(dtype):
                    for launch in _launches(kernel, dtype, widths, float32_product):
                        for even in (True, False):
                            product = f" {float32_product}" if dtype == torch.float32 else ""
                            yield _compile_job(launch, widths, element, product, even)


def _compile_job(
    launch: Launch, widths: tuple[int, int], element: str, product: str, even: bool
) -> tuple[Any, dict[str, str], dict[str, Any], Tile, str]:
    constexprs = {**launch.constants, "FUSED": True, "EVEN_L": even, "EVEN_S": even}
    names = launch.kernel.arg_names
    numbers = names[names.index("scale") + 1 : names.index("BLOCK_L")]
    maps = ("query", "key", "value", *(("grad",) if even else ()))
    for name in numbers:
        prefix, _, axis = name.rpartition("_")
        if prefix and axis in (("l", "s") if prefix in maps else ("e",)):
            constexprs[name] = 1
    signature = {}
    for name in names:
        if name in constexprs:
            signature[name] = "constexpr"
        elif name == "scale":
            signature[name] = "fp32"
        elif name in numbers:
            # The commonest E is 8.
            signature[name] = "i32:16" if even and (name != "E" or widths[0] > 16) else "i32"
        else:
            signature[name] = "*fp32:16" if name in _ROW_VALUES else f"*{element}:16"
    parts = {name: wanted for name, wanted in launch.constants.items() if name.startswith("WITH_")}
    only = "" if all(parts.values()) else " " + next(name for name in parts if parts[name]).lower()
    kernel_name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
    form = "even" if even else "masked"
    label = f"{kernel_name}{only} {widths[0]}x{widths[1]} {element}{product} {form}"
    return launch.kernel, signature, constexprs, launch.tile, label
