"""Triton kernels of attention without its [L, S] matrix.

Every kernel owns a block of queries (and walks over the keys) or a block of keys (and walks over the
queries), so memory is linear in L + S, nothing is added atomically, and the same input gives the same bits.

Notation, c the scale: P = softmax(c q k^T), G = grad_y, dP = G v^T, D = rowsum(P dP), dS = P (dP - D). For the
second order, with a, b, e the gradients of dq, dk, dv: T = c (a k^T + q b^T), t = rowsum(P T), U = G e^T,
R = (dP - D)(T - t) + U, r = rowsum(P R).

Three things keep saturated rows (P of 0 and 1, usual without 1/sqrt(E)) as accurate as the reference:

- P is recomputed as exp(c q k^T - lse), and a float32 lse of thousands is only known to 1e-4. The row kernels sum
  the P they recompute and divide by the sum.
- Every mean over keys (D, t, r) is first estimated and then corrected by the mean of what is left, so that
  dP - D, T - t and R - r vanish where they should, also when products are rounded to bfloat16.
- A product has the same bits in the row and in the column kernel, where its operands change sides.
"""
# Kernels are not Python for a type checker, and Triton ships no types.
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from sagan_layers.triton_support import LOG2_E, rounded


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
def _store(base, rows, columns, row_count, width, block):
    """Store a block of rows of a contiguous [rows, width] matrix."""
    mask = (rows[:, None] < row_count) & (columns[None, :] < width)
    block = rounded(block, base.dtype.element_ty)
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
    elif PRODUCT == "widened":
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
    elif PRODUCT == "widened":
        return accumulator + _dot(rounded(computed, given.dtype), given, PRODUCT, False)
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
    left, right, left_rows, right_rows,
    left_row_stride, left_column_stride, right_row_stride, right_column_stride, left_count, right_count, width,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    EVEN_LEFT: tl.constexpr, EVEN_RIGHT: tl.constexpr, PRODUCT: tl.constexpr, SWAPPED: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
):  # fmt: skip
    """Return left @ right^T for widths too large to be held at once."""
    total = tl.zeros([left_rows.shape[0], right_rows.shape[0]], SUM_DTYPE)
    # Not unrolled: the compiler would hold chunks that the caller's loop does not change in registers throughout.
    for chunk in range(CHUNKS):
        columns = chunk * BLOCK + tl.arange(0, BLOCK)
        a = _load(left, left_rows, columns, left_row_stride, left_column_stride, left_count, width, EVEN_LEFT)
        b = _load(
            right, right_rows, columns, right_row_stride, right_column_stride, right_count, width, EVEN_RIGHT
        )
        total += _dot(a, tl.trans(b), PRODUCT, SWAPPED)
    return total


@triton.jit
def forward_kernel(
    query, key, value, y, lse,
    scale, L, S, E, EV,
    query_n, query_l, query_e, key_n, key_s, key_e, value_n, value_s, value_e,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
    EVEN_L: tl.constexpr, EVEN_S: tl.constexpr,
    GIVEN: tl.constexpr, COMPUTED: tl.constexpr, SUM_DTYPE: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
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
    _store(y + sample * L * EV, rows, wide, L, EV, weighted / total[:, None])
    natural = largest * c + tl.log(total)
    if chunk == 0:
        tl.store(lse + sample * L + rows, natural, mask=rows < L)


@triton.jit
def row_kernel(
    query, key, value, y, lse, grad_y, grad_query, weight, mean_dp,
    scale, L, S, E, EV,
    query_n, query_l, query_e, key_n, key_s, key_e, value_n, value_s, value_e, y_n, y_l, y_e,
    grad_n, grad_l, grad_e,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
    CHUNKS: tl.constexpr, EVEN_L: tl.constexpr, EVEN_S: tl.constexpr,
    GIVEN: tl.constexpr, COMPUTED: tl.constexpr, SUM_DTYPE: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
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
                grad_y, value, rows, keys, grad_l, grad_e, value_s, value_e,
                L, S, EV, BLOCK_EV, CHUNKS, EVEN_L, EVEN_S, GIVEN, False, SUM_DTYPE,
            )  # fmt: skip
        ds = p * (dp - estimate[:, None])
        total += tl.sum(p, 1)
        left += tl.sum(ds, 1)
        weighted = _add_product(weighted, ds, k, COMPUTED)
        key_sum = _add_product(key_sum, p, k, COMPUTED)
    normalise = 1.0 / total
    left *= normalise
    gradient = (weighted - left[:, None] * key_sum) * (normalise * c)[:, None]
    _store(grad_query + sample * L * E, rows, narrow, L, E, gradient)
    tl.store(weight + sample * L + rows, normalise, mask=rows < L)
    tl.store(mean_dp + sample * L + rows, estimate + left, mask=rows < L)


@triton.jit
def column_kernel(
    query, key, value, lse, grad_y, weight, mean_dp, grad_key, grad_value,
    scale, L, S, E, EV,
    query_n, query_l, query_e, key_n, key_s, key_e, value_n, value_s, value_e,
    grad_n, grad_l, grad_e,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
    CHUNKS: tl.constexpr, WITH_KEY: tl.constexpr, WITH_VALUE: tl.constexpr, EVEN_L: tl.constexpr, EVEN_S: tl.constexpr,
    GIVEN: tl.constexpr, COMPUTED: tl.constexpr, SUM_DTYPE: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Compute dk of a block of keys, and dv (of one chunk of the value width a program unless dk is wanted too)."""
    parts = 1 if WITH_KEY else CHUNKS
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
    if WITH_KEY and CHUNKS == 1:
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
        if WITH_VALUE or CHUNKS == 1:
            g = _load(grad_y, rows, wide, grad_l, grad_e, L, EV, EVEN_L)
        if WITH_VALUE:
            grad_v = _add_product(grad_v, p, g, COMPUTED)
        if WITH_KEY:
            if CHUNKS == 1:
                dp = _dot(v, tl.trans(g), GIVEN, True)
            else:
                dp = _wide_dot(
                    value, grad_y, keys, rows, value_s, value_e, grad_l, grad_e,
                    S, L, EV, BLOCK_EV, CHUNKS, EVEN_S, EVEN_L, GIVEN, True, SUM_DTYPE,
                )  # fmt: skip
            ds = p * (dp - _load_row(mean_dp + sample * L, rows, L, EVEN_L)[None, :])
            grad_k = _add_product(grad_k, ds, q, COMPUTED)
    if WITH_KEY:
        _store(grad_key + sample * S * E, keys, narrow, S, E, grad_k * c)
    if WITH_VALUE:
        _store(grad_value + sample * S * EV, keys, wide, S, EV, grad_v)


@triton.jit
def double_row_kernel(
    query, key, value, y, lse, grad_y, grad_grad_query, grad_grad_key, grad_grad_value,
    grad_query, grad_grad_y, weight, mean_dp, mean_t, mean_r,
    scale, L, S, E, EV,
    query_n, query_l, query_e, key_n, key_s, key_e, value_n, value_s, value_e, y_n, y_l, y_e,
    grad_n, grad_l, grad_e, a_n, a_l, a_e, b_n, b_s, b_e, e_n, e_s, e_e,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
    CHUNKS: tl.constexpr, WITH_QUERY: tl.constexpr, WITH_GRAD_Y: tl.constexpr,
    EVEN_L: tl.constexpr, EVEN_S: tl.constexpr,
    GIVEN: tl.constexpr, COMPUTED: tl.constexpr, SUM_DTYPE: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
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
    grad_grad_query += sample * a_n
    grad_grad_key += sample * b_n
    grad_grad_value += sample * e_n
    narrow = tl.arange(0, BLOCK_E)
    wide = (program % parts) * BLOCK_EV + tl.arange(0, BLOCK_EV)
    c = _scalar(scale, SUM_DTYPE)
    factor = c * LOG2_E

    q = _load(query, rows, narrow, query_l, query_e, L, E, EVEN_L)
    a = _load(grad_grad_query, rows, narrow, a_l, a_e, L, E, EVEN_L)
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
            b = _load(grad_grad_key, keys, narrow, b_s, b_e, S, E, EVEN_S)
            s = _logits(q, tl.trans(k), GIVEN, False)
            if not EVEN_S:
                s = tl.where(keys[None, :] < S, s, float("-inf"))
            p = _exp2_of_difference(s, shift[:, None], factor, FUSED)
            if CHUNKS == 1:
                v = _load(value, keys, wide, value_s, value_e, S, EV, EVEN_S)
                e = _load(grad_grad_value, keys, wide, e_s, e_e, S, EV, EVEN_S)
                dp = _dot(g, tl.trans(v), GIVEN, False)
                u = _dot(g, tl.trans(e), GIVEN, False)
            else:
                dp = _wide_dot(
                    grad_y, value, rows, keys, grad_l, grad_e, value_s, value_e,
                    L, S, EV, BLOCK_EV, CHUNKS, EVEN_L, EVEN_S, GIVEN, False, SUM_DTYPE,
                )  # fmt: skip
                u = _wide_dot(
                    grad_y, grad_grad_value, rows, keys, grad_l, grad_e, e_s, e_e,
                    L, S, EV, BLOCK_EV, CHUNKS, EVEN_L, EVEN_S, GIVEN, False, SUM_DTYPE,
                )  # fmt: skip
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
        b = _load(grad_grad_key, keys, narrow, b_s, b_e, S, E, EVEN_S)
        s = _logits(q, tl.trans(k), GIVEN, False)
        if not EVEN_S:
            s = tl.where(keys[None, :] < S, s, float("-inf"))
        p = _exp2_of_difference(s, shift[:, None], factor, FUSED)
        change = c * (_dot(a, tl.trans(k), GIVEN, False) + _dot(q, tl.trans(b), GIVEN, False)) - t[:, None]
        weighted_change = p * change
        if WITH_GRAD_Y or CHUNKS == 1:
            v = _load(value, keys, wide, value_s, value_e, S, EV, EVEN_S)
            e = _load(grad_grad_value, keys, wide, e_s, e_e, S, EV, EVEN_S)
        if WITH_GRAD_Y:
            wide_sum = _add_product(wide_sum, weighted_change, v, COMPUTED)
            wide_sum = _add_product(wide_sum, p, e, COMPUTED)
        if WITH_QUERY:
            if CHUNKS == 1:
                dp = _dot(g, tl.trans(v), GIVEN, False)
                u = _dot(g, tl.trans(e), GIVEN, False)
            else:
                dp = _wide_dot(
                    grad_y, value, rows, keys, grad_l, grad_e, value_s, value_e,
                    L, S, EV, BLOCK_EV, CHUNKS, EVEN_L, EVEN_S, GIVEN, False, SUM_DTYPE,
                )  # fmt: skip
                u = _wide_dot(
                    grad_y, grad_grad_value, rows, keys, grad_l, grad_e, e_s, e_e,
                    L, S, EV, BLOCK_EV, CHUNKS, EVEN_L, EVEN_S, GIVEN, False, SUM_DTYPE,
                )  # fmt: skip
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
        _store(grad_grad_y + sample * L * EV, rows, wide, L, EV, wide_sum)
    if WITH_QUERY:
        r_left *= normalise
        gradient = (weighted - r_left[:, None] * key_sum) * (normalise * c)[:, None]
        _store(grad_query + sample * L * E, rows, narrow, L, E, gradient)
        inside = rows < L
        tl.store(weight + sample * L + rows, normalise, mask=inside)
        tl.store(mean_dp + sample * L + rows, d, mask=inside)
        tl.store(mean_t + sample * L + rows, t + t_left, mask=inside)
        tl.store(mean_r + sample * L + rows, r + r_left, mask=inside)


@triton.jit
def double_column_kernel(
    query, key, value, lse, grad_y, grad_grad_query, grad_grad_key, grad_grad_value,
    weight, mean_dp, mean_t, mean_r, grad_key, grad_value,
    scale, L, S, E, EV,
    query_n, query_l, query_e, key_n, key_s, key_e, value_n, value_s, value_e,
    grad_n, grad_l, grad_e, a_n, a_l, a_e, b_n, b_s, b_e, e_n, e_s, e_e,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
    CHUNKS: tl.constexpr, WITH_KEY: tl.constexpr, WITH_VALUE: tl.constexpr, EVEN_L: tl.constexpr, EVEN_S: tl.constexpr,
    GIVEN: tl.constexpr, COMPUTED: tl.constexpr, SUM_DTYPE: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
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
    grad_grad_query += sample * a_n
    grad_grad_key += sample * b_n
    grad_grad_value += sample * e_n
    narrow = tl.arange(0, BLOCK_E)
    wide = (program % parts) * BLOCK_EV + tl.arange(0, BLOCK_EV)
    c = _scalar(scale, SUM_DTYPE)
    factor = c * LOG2_E

    k = _load(key, keys, narrow, key_s, key_e, S, E, EVEN_S)
    b = _load(grad_grad_key, keys, narrow, b_s, b_e, S, E, EVEN_S)
    if WITH_KEY and CHUNKS == 1:
        v = _load(value, keys, wide, value_s, value_e, S, EV, EVEN_S)
        e = _load(grad_grad_value, keys, wide, e_s, e_e, S, EV, EVEN_S)
    key_sum = tl.zeros([BLOCK_S, BLOCK_E], SUM_DTYPE)
    value_sum = tl.zeros([BLOCK_S, BLOCK_EV], SUM_DTYPE)
    for start in range(0, L, BLOCK_L):
        rows = start + tl.arange(0, BLOCK_L)
        q = _load(query, rows, narrow, query_l, query_e, L, E, EVEN_L)
        a = _load(grad_grad_query, rows, narrow, a_l, a_e, L, E, EVEN_L)
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
                    value, grad_y, keys, rows, value_s, value_e, grad_l, grad_e,
                    S, L, EV, BLOCK_EV, CHUNKS, EVEN_S, EVEN_L, GIVEN, True, SUM_DTYPE,
                )  # fmt: skip
                u = _wide_dot(
                    grad_grad_value, grad_y, keys, rows, e_s, e_e, grad_l, grad_e,
                    S, L, EV, BLOCK_EV, CHUNKS, EVEN_S, EVEN_L, GIVEN, True, SUM_DTYPE,
                )  # fmt: skip
            ds = p * (dp - _load_row(mean_dp + sample * L, rows, L, EVEN_L)[None, :])
            ds2 = ds * change + p * (u - _load_row(mean_r + sample * L, rows, L, EVEN_L)[None, :])
            key_sum = _add_product(key_sum, ds2, q, COMPUTED)
            key_sum = _add_product(key_sum, ds, a, COMPUTED)
    if WITH_KEY:
        _store(grad_key + sample * S * E, keys, narrow, S, E, key_sum * c)
    if WITH_VALUE:
        _store(grad_value + sample * S * EV, keys, wide, S, EV, value_sum)
