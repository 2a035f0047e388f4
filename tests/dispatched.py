"""Sees the operations of torch that run, and what autograd saves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class DispatchedOperations(TorchDispatchMode):
    """Records the operations inside a ``with`` block.

    Attributes:
        names: of the operations, in order.
        largest: the most entries of a tensor that any of them returned.
        allocated_bytes: the size of each new storage, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0
        self.allocated_bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        known = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            self.largest = max(self.largest, tensor.numel())
            if tensor.untyped_storage().data_ptr() not in known:
                self.allocated_bytes.append(tensor.untyped_storage().nbytes())
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """Yield a list to which each tensor that autograd saves inside a ``with`` block is added."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
