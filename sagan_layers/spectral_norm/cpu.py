"""Spectral normalisation on the CPU in the fewest passes over the weights.

A weight is read as it lies in memory: the small vectors are put into its order, never the weight into theirs.
One power iteration reads it twice and the division once. Fresh memory costs the system more time than these
passes together (it hands out zeroed pages), so weights and gradients of a layer go to the memory of those before
them, once nobody refers to those any more.
"""

from __future__ import annotations

import functools
import math
import threading
import weakref
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sagan_layers.spectral_norm.reference import SpectralNormResult, SpectralNormTask

# Products of at least so many entries are split over the threads, which a matrix-vector product is not.
_SPLIT_ENTRIES = 2**16
_SPLITS = 8
# What is smaller the allocator of the C library keeps by itself.
_REUSED_BYTES = 2**20
_ALIGNMENT = 64
# Entries at a time where a division also rounds: few enough to stay in a core's cache.
_ROUNDED_ENTRIES = 2**17


class ReusedMemory:
    """Memory for one tensor at a time: handed out again once no tensor lies in it."""

    def __init__(self) -> None:
        self._bytes: np.ndarray | None = None
        self._lease: weakref.ref[np.ndarray] | None = None
        self._lock = threading.Lock()

    def empty_like(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor with the strides of ``like``, which is dense."""
        size = like.numel() * dtype.itemsize
        if size < _REUSED_BYTES:
            return torch.empty_like(like, dtype=dtype)
        with self._lock:
            if self._lease is not None and self._lease() is not None:
                return torch.empty_like(like, dtype=dtype)
            if self._bytes is None or self._bytes.nbytes != size:
                whole = np.empty(size + _ALIGNMENT, np.uint8)
                start = -whole.ctypes.data % _ALIGNMENT
                self._bytes = whole[start : start + size]
            lease = self._bytes[:]
            # The storage holds this view, whoever comes to hold the storage.
            storage = torch.frombuffer(lease, dtype=dtype).untyped_storage()
            self._lease = weakref.ref(lease)
        return torch.empty(0, dtype=dtype).set_(storage, 0, like.shape, like.stride())


class LayerMemory:
    """What a layer hands on from one step to the next: the memory of its normalised weight and gradient."""

    def __init__(self) -> None:
        self.weight = ReusedMemory()
        self.gradient = ReusedMemory()


def unsupported_reasons(weight: Tensor, dim: int) -> list[str]:
    """Return why a weight cannot be served, empty if it can."""
    reasons = []
    if weight.device.type != "cpu":
        reasons.append(f"it runs on the CPU, and the weight is on {weight.device}")
    if weight.dtype not in (torch.float32, torch.float64):
        reasons.append(f"{weight.dtype} would have to be converted whole")
    if weight.layout != torch.strided or not layout_of(weight, dim).is_dense:
        reasons.append("the weight does not fill its memory")
    return reasons


def normalize(task: SpectralNormTask) -> SpectralNormResult:
    """Return the normalised weight, sigma and the moved vectors, all without a graph."""
    weight, eps = task.weight.detach(), task.eps
    layout = layout_of(weight, task.dim)
    blocks = layout.blocks(weight)
    u, v = task.u.to(weight.dtype), layout.in_memory_order(task.v.to(weight.dtype))
    product = None
    for _ in range(task.n_power_iterations):
        v = _unit(_transposed_times(blocks, u), eps, otherwise=v)
        product = _times(blocks, v)
        u = _unit(product, eps, otherwise=u)
    sigma = torch.dot(u, _times(blocks, v) if product is None else product)
    memory = task.memory.weight if task.memory is not None else ReusedMemory()
    normalized = memory.empty_like(weight, task.dtype)
    _divide(blocks, _divisor(sigma.item(), eps), layout.blocks(normalized))
    v = layout.in_canonical_order(v)
    # The caller's own will move in place.
    u, v = (own.clone() if own is given else own for own, given in ((u, task.u), (v, task.v)))
    return SpectralNormResult(normalized, sigma, u, v)


def gradient(
    grad: Tensor, weight: Tensor, result: SpectralNormResult, dim: int, eps: float, memory: ReusedMemory
) -> Tensor:
    """Return the gradient of the weight, in its dtype and strides, u and v taken as constants.

    Args:
        grad: the gradient of the normalised weight, in any dtype and strides.
        weight: for its dtype and strides; its values are not read, so it may have changed.
        result: what :func:`normalize` returned.
        dim: the axis of the outputs.
        eps: as in forward.
        memory: where the gradient goes.
    """
    sigma = result.sigma.item()
    gradient = memory.empty_like(weight, weight.dtype)
    if not abs(sigma) > eps:
        return gradient.copy_(grad)
    if grad.dtype != gradient.dtype or not same_strides(grad, gradient):
        grad = gradient.copy_(grad)
    layout = layout_of(weight, dim)
    grads, normalized = layout.blocks(grad), layout.blocks(result.weight.to(gradient.dtype))
    inner = torch.dot(grads.view(-1), normalized.view(-1)).item()
    out = layout.blocks(gradient)
    before, outputs, after = out.shape
    u, v = result.u, layout.in_memory_order(result.v)
    factors = {"beta": 1 / sigma, "alpha": -inner / sigma}
    if before == 1:
        torch.addr(grads[0], u, v, **factors, out=out[0])
    elif after == 1:
        torch.addr(grads[..., 0], v, u, **factors, out=out[..., 0])
    else:
        columns = u.view(1, outputs, 1).expand(before, -1, -1)
        torch.baddbmm(grads, columns, v.view(before, 1, after), **factors, out=out)
    return gradient


class Layout(NamedTuple):
    """How a weight lies in memory.

    Attributes:
        order: its axes from the one with the largest stride to the one with the smallest.
        sizes: of the axes before the outputs, the outputs and the axes after them, in that order.
        rest_sizes: the sizes of the axes beside the outputs, in their own order.
        rest_order: those axes as they follow on one another in memory; None for their own order.
        is_dense: whether it fills its memory.
    """

    order: tuple[int, ...]
    sizes: tuple[int, int, int]
    rest_sizes: tuple[int, ...]
    rest_order: tuple[int, ...] | None
    is_dense: bool

    def blocks(self, tensor: Tensor) -> Tensor:
        """Return a view of a tensor that lies so: [before, outputs, after], contiguous."""
        return tensor.permute(self.order).view(self.sizes)

    def in_memory_order(self, v: Tensor) -> Tensor:
        """Put the entries of v into the order of the memory."""
        if self.rest_order is None:
            return v
        return v.view(self.rest_sizes).permute(self.rest_order).reshape(-1)

    def in_canonical_order(self, v: Tensor) -> Tensor:
        """Undo :meth:`in_memory_order`."""
        if self.rest_order is None:
            return v
        inverse = [self.rest_order.index(axis) for axis in range(len(self.rest_order))]
        return v.view([self.rest_sizes[axis] for axis in self.rest_order]).permute(inverse).reshape(-1)


def layout_of(weight: Tensor, dim: int) -> Layout:
    """Return how a weight with this axis of outputs lies in memory."""
    return _layout(weight.shape, weight.stride(), dim)


@functools.lru_cache(maxsize=1024)
def _layout(shape: tuple[int, ...], strides: tuple[int, ...], dim: int) -> Layout:
    order = sorted(range(len(shape)), key=lambda axis: (-strides[axis], axis))
    expected, is_dense = 1, True
    for axis in reversed(order):
        is_dense = is_dense and (shape[axis] == 1 or strides[axis] == expected)
        expected *= shape[axis]
    place = order.index(dim)
    before, after = (math.prod(shape[axis] for axis in part) for part in (order[:place], order[place + 1 :]))
    rest = [axis for axis in range(len(shape)) if axis != dim]
    rest_order = tuple(rest.index(axis) for axis in order if axis != dim)
    return Layout(
        tuple(order),
        (before, shape[dim], after),
        tuple(shape[axis] for axis in rest),
        None if list(rest_order) == sorted(rest_order) else rest_order,
        is_dense,
    )


def same_strides(first: Tensor, second: Tensor) -> bool:
    """Whether equal places of both are equally far into their memory; axes of one entry have any stride."""
    return first.stride() == second.stride() or all(
        size == 1 or one == other
        for size, one, other in zip(first.shape, first.stride(), second.stride(), strict=True)
    )


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
    return matrix.size(0) % _SPLITS == 0 and matrix.numel() >= _SPLIT_ENTRIES


def _unit(vector: Tensor, eps: float, otherwise: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(vector).item()
    return vector / (norm + eps) if norm > eps else otherwise


def _divisor(sigma: float, eps: float) -> float:
    return sigma if abs(sigma) > eps else 1.0


def _divide(weight: Tensor, divisor: float, out: Tensor) -> None:
    if out.dtype == weight.dtype:
        torch.div(weight, divisor, out=out)
        return
    parts = torch.split(weight.view(-1), _ROUNDED_ENTRIES)
    for part, rounded in zip(parts, torch.split(out.view(-1), _ROUNDED_ENTRIES), strict=True):
        rounded.copy_(part / divisor)
