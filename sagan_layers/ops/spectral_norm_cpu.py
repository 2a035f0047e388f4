"""Spectral normalisation on the CPU in the fewest passes over the weights.

A weight is read as it lies in memory: the small vectors are put into its order, never the weight into theirs.
One power iteration reads it twice and the division once. Fresh memory costs the system more time than these
passes together (it hands out zeroed pages), so weights and gradients of a layer go to the memory of those before
them, once nobody refers to those any more.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sagan_layers.ops import reference
from sagan_layers.ops.reference import SpectralNormResult, SpectralNormTask

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
            # The tensor's storage holds this view, whoever else comes to hold the storage.
            tensor = torch.frombuffer(lease, dtype=dtype)
            self._lease = weakref.ref(lease)
        return tensor.as_strided(like.shape, like.stride())


class LayerMemory:
    """What a layer hands on from one step to the next: the memory of its normalised weight and gradient."""

    def __init__(self) -> None:
        self.weight = ReusedMemory()
        self.gradient = ReusedMemory()


def reasons_against(weight: Tensor, dim: int) -> list[str]:
    """Return why a weight cannot be served, empty if it can."""
    reasons = []
    if weight.device.type != "cpu":
        reasons.append(f"it runs on the CPU, and the weight is on {weight.device}")
    if weight.dtype not in (torch.float32, torch.float64):
        reasons.append(f"{weight.dtype} would have to be converted whole")
    if weight.layout != torch.strided or not _is_dense(weight):
        reasons.append("the weight does not fill its memory")
    return reasons


def normalize(task: SpectralNormTask) -> SpectralNormResult:
    """Return the normalised weight, sigma and the moved vectors, all without a graph."""
    weight = task.weight.detach()
    matrix = _Matrix(weight, task.dim)
    u, v = task.u.to(weight.dtype, copy=True), matrix.in_memory_order(task.v.to(weight.dtype, copy=True))
    product = None
    for _ in range(task.n_power_iterations):
        v = reference.unit(matrix.transposed_times(u), task.eps, otherwise=v)
        product = matrix.times(v)
        u = reference.unit(product, task.eps, otherwise=u)
    sigma = torch.dot(u, matrix.times(v) if product is None else product)
    memory = task.memory.weight if task.memory is not None else ReusedMemory()
    normalized = memory.empty_like(weight, task.dtype)
    _divide(weight, reference.spectral_divisor(sigma, task.eps), normalized)
    return SpectralNormResult(normalized, sigma, u, matrix.in_canonical_order(v))


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
    matrix = _Matrix(gradient, dim)
    source = grad
    if grad.dtype != gradient.dtype or not _same_layout(grad, gradient):
        source = gradient.copy_(grad)
    if not abs(sigma) > eps:
        return gradient.copy_(source)
    normalized = result.weight.to(gradient.dtype)
    inner = torch.dot(_flat(source, matrix.order), _flat(normalized, matrix.order)).item()
    v = matrix.in_memory_order(result.v)
    matrix.write_sum(source, 1 / sigma, result.u, v, -inner / sigma)
    return gradient


class _Matrix:
    """A dense weight as it lies in memory: [before, outputs, after], the axes before and after the outputs."""

    def __init__(self, weight: Tensor, dim: int) -> None:
        self.order = _memory_order(weight)
        self.blocks = self._blocked(weight, dim)
        rest = [axis for axis in range(weight.dim()) if axis != dim]
        self._rest_sizes = [weight.size(axis) for axis in rest]
        self._rest_order = [rest.index(axis) for axis in self.order if axis != dim]
        self._dim = dim

    def _blocked(self, weight: Tensor, dim: int) -> Tensor:
        place = self.order.index(dim)
        sizes = [weight.size(axis) for axis in self.order]
        return weight.permute(self.order).view(
            math.prod(sizes[:place]), sizes[place], math.prod(sizes[place + 1 :])
        )

    def in_memory_order(self, v: Tensor) -> Tensor:
        """Put the entries of v, one for each place beside the outputs, into the order of the memory."""
        return v.view(self._rest_sizes).permute(self._rest_order).reshape(-1)

    def in_canonical_order(self, v: Tensor) -> Tensor:
        """Undo :meth:`in_memory_order`."""
        sizes = [self._rest_sizes[axis] for axis in self._rest_order]
        inverse = sorted(range(len(sizes)), key=self._rest_order.__getitem__)
        return v.view(sizes).permute(inverse).reshape(-1)

    def transposed_times(self, u: Tensor) -> Tensor:
        """Return W^T u in memory order."""
        before, outputs, after = self.blocks.shape
        if before == 1:
            return _row_times_matrix(u, self.blocks[0])
        if after == 1:
            return _matrix_times_row(self.blocks.view(before, outputs), u)
        return torch.bmm(u.expand(before, 1, outputs), self.blocks).view(-1)

    def times(self, v: Tensor) -> Tensor:
        """Return W v, v in memory order."""
        before, outputs, after = self.blocks.shape
        if before == 1:
            return _matrix_times_row(self.blocks[0], v)
        if after == 1:
            return _row_times_matrix(v, self.blocks.view(before, outputs))
        return torch.bmm(v.view(before, 1, after), self.blocks.transpose(1, 2)).sum(0).view(-1)

    def write_sum(self, source: Tensor, factor: float, u: Tensor, v: Tensor, coefficient: float) -> None:
        """Write ``factor * source + coefficient * u v^T`` over this; ``source`` has the same strides."""
        blocks = self._blocked(source, self._dim)
        before, outputs, after = blocks.shape
        if before == 1:
            torch.addr(blocks[0], u, v, beta=factor, alpha=coefficient, out=self.blocks[0])
        elif after == 1:
            out = self.blocks.view(before, outputs)
            torch.addr(blocks.view(before, outputs), v, u, beta=factor, alpha=coefficient, out=out)
        else:
            columns, rows = u.view(1, outputs, 1).expand(before, -1, -1), v.view(before, 1, after)
            torch.baddbmm(blocks, columns, rows, beta=factor, alpha=coefficient, out=self.blocks)


def _row_times_matrix(row: Tensor, matrix: Tensor) -> Tensor:
    rows, columns = matrix.shape
    if not _is_worth_splitting(matrix):
        return torch.mv(matrix.t(), row)
    parts = torch.bmm(row.view(_SPLITS, 1, -1), matrix.view(_SPLITS, rows // _SPLITS, columns))
    return parts.sum(0).view(-1)


def _matrix_times_row(matrix: Tensor, row: Tensor) -> Tensor:
    rows, columns = matrix.shape
    if not _is_worth_splitting(matrix):
        return torch.mv(matrix, row)
    blocks = matrix.view(_SPLITS, rows // _SPLITS, columns).transpose(1, 2)
    return torch.bmm(row.expand(_SPLITS, 1, columns), blocks).view(-1)


def _is_worth_splitting(matrix: Tensor) -> bool:
    return matrix.size(0) % _SPLITS == 0 and matrix.numel() >= _SPLIT_ENTRIES


def _divide(weight: Tensor, divisor: Tensor, out: Tensor) -> None:
    if out.dtype == weight.dtype:
        torch.div(weight, divisor, out=out)
        return
    order = _memory_order(weight)
    for part, rounded in zip(
        _flat(weight, order).split(_ROUNDED_ENTRIES), _flat(out, order).split(_ROUNDED_ENTRIES), strict=True
    ):
        rounded.copy_(part / divisor)


def _flat(tensor: Tensor, order: Sequence[int]) -> Tensor:
    return tensor.permute(*order).view(-1)


def _memory_order(tensor: Tensor) -> list[int]:
    """Return the axes from the one with the largest stride to the one with the smallest."""
    return sorted(range(tensor.dim()), key=lambda axis: (-tensor.stride(axis), axis))


def _is_dense(tensor: Tensor) -> bool:
    return tensor.permute(_memory_order(tensor)).is_contiguous()


def _same_layout(first: Tensor, second: Tensor) -> bool:
    """Whether equal places of both are equally far into their memory; axes of one entry have any stride."""
    return all(
        size == 1 or strides[0] == strides[1]
        for size, *strides in zip(first.shape, first.stride(), second.stride(), strict=True)
    )
