"""Attention in blocks of queries: plain torch on any device, memory linear in L + S, first and second order.

A block is as many rows of the weights as fit into a CPU's cache together with a few intermediates, or several whole
samples if they are small. Backward computes the weights again, unless forward was allowed to save them.
docs/attention.md derives the formulas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sagan_layers.attention.autograd import (
    AttentionKernels,
    BackwardInputs,
    GradGrads,
    register_attention,
)
from sagan_layers.attention.reference import AttentionInputs
from sagan_layers.torch_support import (
    accumulation_dtype,
    is_known,
    needs_plain_operations,
    tracing_reasons,
    without_autocast,
)

# With fewer weights per sample the reference is as fast on a CPU.
FEW_WEIGHTS = 2**18
# Up to this size the weights of the whole batch are saved for backward: computing them again would cost more. Half
# precision has a higher limit, because its logits are computed in float32.
MAX_SAVED_BYTES = 2**24
MAX_SAVED_BYTES_OF_HALF = 2**25

# Entries of one block of weights (4 MiB in float32).
BLOCK_ENTRIES = 2**20
# A product of narrow matrices uses one core; several products at once use more.
FEW_SAMPLES = 4
# Fewer rows would starve the products.
MIN_ROWS = 128
# With fewer entries in total, blocks cost more than they save.
WHOLE_ENTRIES = 2**19

Block = tuple[slice, slice]


def unsupported_reasons(inputs: AttentionInputs) -> list[str]:
    """Return why this backend cannot serve."""
    return tracing_reasons()


def not_preferred_reasons(inputs: AttentionInputs) -> list[str]:
    """Return why "auto" takes the reference, although this backend could serve."""
    query, key, _ = inputs
    if needs_plain_operations():
        return ["a tracer or forward mode needs plain operations"]
    if query.device.type not in ("cpu", "cuda"):
        return [f"it was never tried on {query.device.type}"]
    few = is_known(query.size(1) * key.size(1) < FEW_WEIGHTS)
    if few and query.dtype in (torch.float32, torch.float64):
        return [f"with fewer than {FEW_WEIGHTS} weights per sample 'reference' is as fast"]
    return []


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return attention with derivatives of every order, its weights saved for backward while they are few."""
    size = query.size(0) * query.size(1) * key.size(1) * query.element_size()
    save_weights = (
        torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in (query, key, value))
        and is_known(size <= (MAX_SAVED_BYTES_OF_HALF if query.element_size() == 2 else MAX_SAVED_BYTES))
    )
    return _attention(query, key, value, scale, save_weights)


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, save_weights: bool
) -> tuple[Tensor, Tensor]:
    """Return the output, [N, L, Ev], and the weights, [N, L, S], or an empty tensor unless they are saved."""
    N, L, S, Ev = *query.shape[:2], *value.shape[1:]
    if save_weights and N * L * S <= WHOLE_ENTRIES:
        return _forward_whole(query, key, value, scale)
    y = value.new_empty(N, L, Ev)
    shape, dtype = saved_form(query, key, value, scale, save_weights)
    saved = query.new_empty(shape, dtype=dtype)
    with without_autocast(query.device):
        softmax = _Softmax(query, key, scale)
        value = value.to(dtype).contiguous()
        for block in _blocks(N, L, S):
            weights = softmax(block, out=saved[block] if save_weights else None)
            if y.dtype == weights.dtype:
                _matmul(weights, value[block[0]], out=y[block])
            else:
                y[block] = weights @ value[block[0]]
    return y, saved


def saved_form(
    query: Tensor, key: Tensor, value: Tensor, scale: float, save_weights: bool
) -> tuple[Sequence[int], torch.dtype]:
    """Return shape and dtype of what :func:`forward` saves for backward."""
    shape = (query.size(0), query.size(1), key.size(1)) if save_weights else (query.size(0), 0)
    return shape, _matrix_dtype(query)


def backward(inputs: BackwardInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    query, key, value, _, saved, grad_y, scale = inputs
    N, L, S = *query.shape[:2], key.size(1)
    if saved.numel() and N * L * S <= WHOLE_ENTRIES:
        return _backward_whole(inputs)
    dtype = _matrix_dtype(query)
    with without_autocast(query.device):
        softmax = None if saved.numel() else _Softmax(query, key, scale)
        key_t, value_t = (_channels_first(tensor, dtype) for tensor in (key, value))
        query_t, grad_t = query.to(dtype).mT, grad_y.to(dtype).mT
        # Channels-first results: such products with narrow results are several times faster on a CPU.
        grad_query = query_t.new_empty(query_t.shape)
        grad_key, grad_value = _Sum(key_t, L), _Sum(value_t, L)
        scratch = query_t.new_empty(_largest(N, L, S))
        for block in _blocks(N, L, S):
            n, rows = block
            weights = saved[block] if softmax is None else softmax(block)
            grad_logits = _view(scratch, weights.shape)
            grad_value.add(n, grad_t[n, :, rows], weights)
            _matmul(grad_t[n, :, rows].mT, value_t[n], out=grad_logits)
            _softmax_backward_(grad_logits, weights)
            _matmul(key_t[n], grad_logits.mT, out=grad_query[n, :, rows])
            grad_key.add(n, query_t[n, :, rows], grad_logits)
        results = _scaled(grad_query, scale), _scaled(grad_key.total, scale), grad_value.total
        grad_q, grad_k, grad_v = (result.to(query.dtype).mT for result in results)
        return grad_q, grad_k, grad_v


def _forward_whole(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    wide = accumulation_dtype(query.dtype)
    with without_autocast(query.device):
        logits = torch.bmm(query.to(wide), key.to(wide).mT)
        weights = torch.softmax(logits * scale if scale != 1.0 else logits, -1).to(_matrix_dtype(query))
        return torch.bmm(weights, value.to(weights.dtype)).to(value.dtype), weights


def _backward_whole(inputs: BackwardInputs) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, _, weights, grad_y, scale = inputs
    q, k, v, g = (tensor.to(weights.dtype).mT for tensor in (query, key, value, grad_y))
    with without_autocast(query.device):
        grad_logits = torch.bmm(g.mT, v)
        _softmax_backward_(grad_logits, weights)
        gradients = (
            _scaled(torch.bmm(k, grad_logits.mT), scale),
            _scaled(torch.bmm(q, grad_logits), scale),
            torch.bmm(g, weights),
        )
    grad_q, grad_k, grad_v = (gradient.to(query.dtype).mT for gradient in gradients)
    return grad_q, grad_k, grad_v


def double_backward(inputs: BackwardInputs, grad_grads: GradGrads) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and grad_y, given those of what :func:`backward` returned."""
    query, key, value, _, _, grad_y, scale = inputs
    N, L, S = *query.shape[:2], key.size(1)
    dtype = accumulation_dtype(query.dtype)
    with without_autocast(query.device):
        softmax = _Softmax(query, key, scale)
        key_t, value_t, grad_grad_key_t, grad_grad_value_t = (
            _channels_first(tensor, dtype) for tensor in (key, value, grad_grads.key, grad_grads.value)
        )
        query_t, grad_grad_query_t, grad_y_t = (
            tensor.to(dtype).mT for tensor in (query, grad_grads.query, grad_y)
        )
        grad_query, grad_grad_y = query_t.new_empty(query_t.shape), grad_y_t.new_empty(grad_y_t.shape)
        grad_key, grad_key_through_logits, grad_value = _Sum(key_t, L), _Sum(key_t, L), _Sum(value_t, L)
        scratch = query_t.new_empty(4, _largest(N, L, S))
        for block in _blocks(N, L, S):
            n, rows = block
            weights = softmax(block, wide=True)
            q, a, g = (tensor[n, :, rows] for tensor in (query_t, grad_grad_query_t, grad_y_t))
            tangent, grad_weights, second, product = (_view(flat, weights.shape) for flat in scratch)
            # The logits' derivative along grad_grad_query and grad_grad_key, centred over the keys.
            _matmul(a.mT, key_t[n], out=tangent)
            _matmul(q.mT, grad_grad_key_t[n], out=product)
            tangent.add_(product).mul_(scale)
            tangent.sub_(_row_sums(weights, tangent, product))
            _matmul(g.mT, value_t[n], out=grad_weights)
            grad_weights.sub_(_row_sums(weights, grad_weights, product))
            _matmul(g.mT, grad_grad_value_t[n], out=second)
            second.addcmul_(grad_weights, tangent)
            second.sub_(_row_sums(weights, second, product)).mul_(weights)
            grad_logits = grad_weights.mul_(weights)
            weight_tangent = tangent.mul_(weights)
            grad_grad_y[n, :, rows] = value_t[n] @ weight_tangent.mT + grad_grad_value_t[n] @ weights.mT
            grad_value.add(n, g, weight_tangent)
            grad_query[n, :, rows] = key_t[n] @ second.mT + grad_grad_key_t[n] @ grad_logits.mT
            grad_key.add(n, q, second)
            grad_key_through_logits.add(n, a, grad_logits)
        total = grad_key.total.add_(grad_key_through_logits.total)
        results = _scaled(grad_query, scale), _scaled(total, scale), grad_value.total, grad_grad_y
        grad_q, grad_k, grad_v, grad_g = (result.to(query.dtype).mT for result in results)
        return grad_q, grad_k, grad_v, grad_g


class _Softmax:
    """Computes a block of the weights, in the accumulation dtype and then in the one of the matrix products."""

    def __init__(self, query: Tensor, key: Tensor, scale: float) -> None:
        wide = accumulation_dtype(query.dtype)
        self.query = query.to(wide)
        self.key = key.to(wide) * scale if scale != 1.0 else key.to(wide)
        self.key = self.key.contiguous()
        self.dtype = _matrix_dtype(query)
        N, L, S = *query.shape[:2], key.size(1)
        entries = _largest(N, L, S)
        self.logits = self.query.new_empty(entries)
        self.narrow = self.logits if self.dtype == wide else query.new_empty(entries, dtype=self.dtype)

    def __call__(self, block: Block, *, out: Tensor | None = None, wide: bool = False) -> Tensor:
        n, _ = block
        query = self.query[block]
        shape = torch.Size((*query.shape[:2], self.key.size(1)))
        same = wide or self.dtype == self.logits.dtype
        in_place = same and out is not None and out.is_contiguous()
        logits = out if in_place and out is not None else _view(self.logits, shape)
        _matmul(query, self.key[n].mT, out=logits)
        torch.ops.aten._softmax.out(logits, -1, False, out=logits)
        if out is None:
            return logits if same else _view(self.narrow, shape).copy_(logits)
        return out if in_place else out.copy_(logits)


class _Sum:
    """Sums over the blocks of queries of each sample, [N, width, S]."""

    def __init__(self, like: Tensor, L: int) -> None:
        S = like.size(2)
        self.in_one_block = _block_size(len(like), L, S)[1] == L
        # Several blocks are added up in the accumulation dtype.
        dtype = like.dtype if self.in_one_block else accumulation_dtype(like.dtype)
        self.total = like.new_empty(like.shape, dtype=dtype)
        if not self.in_one_block:
            self.total.zero_()

    def add(self, n: slice, left: Tensor, right: Tensor) -> None:
        total = self.total[n]
        if self.in_one_block:
            _matmul(left, right, out=total)
        elif total.dtype != left.dtype:
            total.add_(left @ right)
        elif total.size(0) == 1:
            total[0].addmm_(left[0], right[0])
        else:
            total.baddbmm_(left, right)


def _matrix_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of the matrix products: a CPU has fast ones for bfloat16, and float16's range is too small."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


def _block_size(N: int, L: int, S: int) -> tuple[int, int]:
    """Return samples and queries of a block: several whole samples, or rows of a few."""
    if L * S * FEW_SAMPLES <= BLOCK_ENTRIES:
        return min(N, BLOCK_ENTRIES // (L * S)), L
    samples = max(1, min(N, FEW_SAMPLES, BLOCK_ENTRIES // (MIN_ROWS * S)))
    return samples, min(L, max(BLOCK_ENTRIES // (samples * S), MIN_ROWS))


def _blocks(N: int, L: int, S: int) -> Iterator[Block]:
    """Yield the samples and queries of each block."""
    samples, rows = _block_size(N, L, S)
    for n in range(0, N, samples):
        for start in range(0, L, rows):
            yield slice(n, min(n + samples, N)), slice(start, min(start + rows, L))


def _largest(N: int, L: int, S: int) -> int:
    """Return the entries of the first block, which no other exceeds."""
    samples, rows = _block_size(N, L, S)
    return samples * rows * S


def _view(flat: Tensor, shape: torch.Size) -> Tensor:
    return flat[: shape.numel()].view(shape)


def _softmax_backward_(grad: Tensor, weights: Tensor) -> None:
    """Turn the gradient of the weights into that of the logits, in place."""
    if grad.dtype == torch.bfloat16 and grad.size(-1) < 32:
        # Torch's fused form takes one number at a time on rows as short as this.
        wide = grad.float()
        grad.copy_(wide.sub_((wide * weights).sum(-1, keepdim=True)).mul_(weights))
    else:
        torch.ops.aten._softmax_backward_data.out(grad, weights, -1, grad.dtype, grad_input=grad)


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1.0 else tensor.mul_(scale)


def _channels_first(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).mT.contiguous()


def _row_sums(weights: Tensor, other: Tensor, scratch: Tensor) -> Tensor:
    return torch.mul(weights, other, out=scratch).sum(-1, keepdim=True)


def _matmul(left: Tensor, right: Tensor, *, out: Tensor) -> None:
    """Write left @ right; a single sample takes torch.mm, which is faster than torch.bmm."""
    if not out.is_contiguous():
        out.copy_(left @ right)
    elif out.size(0) == 1:
        torch.mm(left[0], right[0], out=out[0])
    else:
        torch.bmm(left, right, out=out)


_attention = register_attention(
    "chunked",
    AttentionKernels(forward, backward, double_backward, saved_form, channels_first=True, reads_output=False),
)
