"""Spectral normalisation on the CPU in the fewest passes over the weight.

A power iteration reads the weight twice and the division reads it once, in memory order
(:mod:`~sagan_layers.spectral_norm.layout`). Large results go into reused memory
(:mod:`~sagan_layers.spectral_norm.memory`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sagan_layers.spectral_norm import reference
from sagan_layers.spectral_norm.autograd import SpectralNormKernels
from sagan_layers.spectral_norm.layout import layout_of, same_strides
from sagan_layers.spectral_norm.memory import ReusedMemory
from sagan_layers.spectral_norm.reference import (
    SpectralNormOptions,
    SpectralNormResult,
    SpectralNormTask,
    least_norm,
)

# Larger products are split over the threads; torch itself does not split a matrix-vector product.
_MIN_SPLIT_ENTRIES = 2**16
_SPLITS = 8
# Entries of a block for a division that also rounds: few enough to stay in a core's cache.
_ROUNDED_ENTRIES = 2**17
# Outside, squares may overflow or vanish.
_LEAST_SIGMA, _LARGEST_SIGMA = 1e-15, 1e15


def unsupported_reasons(weight: Tensor, dim: int) -> list[str]:
    """Return why it cannot normalise a weight."""
    reasons = []
    if weight.device.type != "cpu":
        reasons.append(f"it runs on the CPU, and the weight is on {weight.device}")
    if weight.dtype not in (torch.float32, torch.float64):
        reasons.append(f"{weight.dtype} would have to be converted whole")
    if weight.layout != torch.strided or not layout_of(weight, dim).is_dense:
        reasons.append("the weight does not fill its memory")
    return reasons


def _normalize(task: SpectralNormTask) -> SpectralNormResult:
    options = task.options
    weight, eps, eps_mode = task.weight.detach(), options.eps, options.eps_mode
    layout = layout_of(weight, options.dim)
    blocks = layout.blocks(weight)
    u, v = task.u.to(weight.dtype), layout.in_memory_order(task.v.to(weight.dtype))
    from_u = options.iterate_from == "u"
    first, second = (u, v) if from_u else (v, u)
    there, back = (_transposed_times, _times) if from_u else (_times, _transposed_times)
    product = None
    for _ in range(options.n_power_iterations):
        second = _unit(there(blocks, first), eps, eps_mode, otherwise=second)
        product = back(blocks, second)
        first = _unit(product, eps, eps_mode, otherwise=first)
    sigma = torch.dot(first, back(blocks, second) if product is None else product)
    u, v = (first, second) if from_u else (second, first)
    divisor = sigma.item()
    if not _LEAST_SIGMA < abs(divisor) < _LARGEST_SIGMA:
        return _normalize_scaled(task._replace(weight=weight))
    normalized = _empty_like(weight, options.dtype, options.memory and options.memory.weight)
    _divide(blocks, divisor if abs(divisor) > least_norm(eps, eps_mode) else 1.0, layout.blocks(normalized))
    v = layout.in_canonical_order(v)
    # The layer overwrites its own u and v in place.
    u, v = (new.clone() if new is old else new for new, old in ((u, task.u), (v, task.v)))
    return SpectralNormResult(normalized, sigma, u, v)


def _normalize_scaled(task: SpectralNormTask) -> SpectralNormResult:
    """Normalise a weight divided by a power of two near its largest entry: no square overflows or vanishes."""
    weight, options = task.weight, task.options
    limits, largest = torch.finfo(weight.dtype), weight.abs().amax().item()
    if not 0 < largest <= limits.max:  # zeros stay zeros, and what is not finite NaN
        return reference.normalize([task])[0]
    scale = 2.0 ** (math.frexp(max(largest, limits.tiny))[1] - 1)
    options = options._replace(eps=options.eps / scale)
    (result,) = reference.normalize([task._replace(weight=weight / scale, options=options)])
    if result.sigma.abs().item() <= least_norm(options.eps, options.eps_mode):
        result = result._replace(weight=weight.to(options.dtype, copy=True))
    return result._replace(sigma=result.sigma * scale)


def _gradient(
    grad: Tensor, weight: Tensor, result: SpectralNormResult, options: SpectralNormOptions
) -> Tensor:
    """Return the weight's gradient in the weight's strides; ``grad`` may have any dtype and strides."""
    sigma = result.sigma.item()
    gradient = _empty_like(weight, weight.dtype, options.memory and options.memory.gradient)
    if not abs(sigma) > least_norm(options.eps, options.eps_mode):
        return gradient.copy_(grad)
    if grad.dtype != gradient.dtype or not same_strides(grad, gradient):
        grad = gradient.copy_(grad)
    layout = layout_of(weight, options.dim)
    grads, normalized = layout.blocks(grad), layout.blocks(result.weight.to(gradient.dtype))
    inner = torch.dot(grads.view(-1), normalized.view(-1)).item()
    out = layout.blocks(gradient)
    before, outputs, after = out.shape
    u, v = result.u, layout.in_memory_order(result.v)
    factors = {"beta": 1 / sigma, "alpha": -inner / sigma}
    if max(map(abs, factors.values())) > torch.finfo(weight.dtype).max:  # torch takes no such number
        return reference.gradient(grad, weight, result, options)
    if before == 1:
        torch.addr(grads[0], u, v, **factors, out=out[0])
    elif after == 1:
        torch.addr(grads[..., 0], v, u, **factors, out=out[..., 0])
    else:
        columns = u.view(1, outputs, 1).expand(before, -1, -1)
        torch.baddbmm(grads, columns, v.view(before, 1, after), **factors, out=out)
    return gradient


KERNELS = SpectralNormKernels(lambda tasks: [_normalize(task) for task in tasks], _gradient)


def _empty_like(like: Tensor, dtype: torch.dtype, memory: ReusedMemory | None) -> Tensor:
    return torch.empty_like(like, dtype=dtype) if memory is None else memory.empty_like(like, dtype)


def _transposed_times(blocks: Tensor, u: Tensor) -> Tensor:
    """Return W^T u in memory order."""
    before, outputs, after = blocks.shape
    if before == 1:
        return _row_times_matrix(u, blocks[0])
    if after == 1:
        return _matrix_times_row(blocks[..., 0], u)
    return torch.bmm(u.expand(before, 1, outputs), blocks).view(-1)


def _times(blocks: Tensor, v: Tensor) -> Tensor:
    """Return W v, v in memory order."""
    before, _, after = blocks.shape
    if before == 1:
        return _matrix_times_row(blocks[0], v)
    if after == 1:
        return _row_times_matrix(v, blocks[..., 0])
    return torch.bmm(v.view(before, 1, after), blocks.transpose(1, 2)).sum(0).view(-1)


def _row_times_matrix(row: Tensor, matrix: Tensor) -> Tensor:
    if not _is_worth_splitting(matrix):
        return torch.mv(matrix.t(), row)
    parts = torch.bmm(row.view(_SPLITS, 1, -1), matrix.view(_SPLITS, -1, matrix.size(1)))
    return parts.sum(0).view(-1)


def _matrix_times_row(matrix: Tensor, row: Tensor) -> Tensor:
    if not _is_worth_splitting(matrix):
        return torch.mv(matrix, row)
    columns = matrix.size(1)
    parts = matrix.view(_SPLITS, -1, columns).transpose(1, 2)
    return torch.bmm(row.expand(_SPLITS, 1, columns), parts).view(-1)


def _is_worth_splitting(matrix: Tensor) -> bool:
    return matrix.size(0) % _SPLITS == 0 and matrix.numel() >= _MIN_SPLIT_ENTRIES


def _unit(vector: Tensor, eps: float, eps_mode: str, otherwise: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(vector, dtype=torch.float64).item()  # as the reference's
    divisor = norm + eps if eps_mode == "add" else max(norm, eps)
    return vector / divisor if norm > least_norm(eps, eps_mode) else otherwise


def _divide(weight: Tensor, divisor: float, out: Tensor) -> None:
    if out.dtype == weight.dtype:
        torch.div(weight, divisor, out=out)
        return
    parts = torch.split(weight.view(-1), _ROUNDED_ENTRIES)
    for part, rounded in zip(parts, torch.split(out.view(-1), _ROUNDED_ENTRIES), strict=True):
        rounded.copy_(part / divisor)
