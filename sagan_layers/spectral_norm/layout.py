"""How a weight lies in memory. Backends read it in memory order; they permute the small v, not the weight."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """How a weight lies in memory.

    Attributes:
        order: its axes, from the largest stride to the smallest.
        sizes: in memory order: the product of the sizes before the axis of the outputs, its size, the product after it.
        rest_sizes: the sizes of the other axes, in the weight's order.
        rest_order: those axes in memory order; None if that is the weight's order.
        is_dense: whether the weight fills its memory.
    """

    order: tuple[int, ...]
    sizes: tuple[int, int, int]
    rest_sizes: tuple[int, ...]
    rest_order: tuple[int, ...] | None
    is_dense: bool

    def blocks(self, tensor: Tensor) -> Tensor:
        """Return a contiguous view [before, outputs, after] of a tensor with this layout."""
        return tensor.permute(self.order).view(self.sizes)

    def in_memory_order(self, v: Tensor) -> Tensor:
        """Return v with its entries in memory order."""
        if self.rest_order is None:
            return v
        return v.view(self.rest_sizes).permute(self.rest_order).reshape(-1)

    def in_canonical_order(self, v: Tensor) -> Tensor:
        """Return v with its entries in the weight's order again."""
        if self.rest_order is None:
            return v
        inverse = [self.rest_order.index(axis) for axis in range(len(self.rest_order))]
        return v.view([self.rest_sizes[axis] for axis in self.rest_order]).permute(inverse).reshape(-1)


def layout_of(weight: Tensor, dim: int) -> Layout:
    """Return the layout of a weight whose outputs lie on the axis ``dim``."""
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
    """Return whether both have the same strides, ignoring axes of size 1."""
    return first.stride() == second.stride() or all(
        size == 1 or one == other
        for size, one, other in zip(first.shape, first.stride(), second.stride(), strict=True)
    )
