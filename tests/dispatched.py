"""Sees the operations of torch that run."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class DispatchedOperations(TorchDispatchMode):
    """Records the operations inside a ``with`` block.

    Attributes:
        names: of the operations, in order.
        largest: the most entries of a tensor that any of them returned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        entries = (leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.largest = max(self.largest, *entries, 0)
        return result
