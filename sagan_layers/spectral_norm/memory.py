"""Memory that a layer's large tensors reuse at every step.

glibc returns a large block to the system when it is freed, and the system hands out zeroed pages for the next one.
Faulting in those pages takes longer than all passes over a weight together. So a layer's normalised weight and gradient
go into the memory of the previous step's, once nothing refers to it any more.
"""

from __future__ import annotations

import threading
import weakref

import numpy as np
import torch
from torch import Tensor

# The C library's allocator itself reuses smaller blocks.
_MIN_REUSED_BYTES = 2**20
_ALIGNMENT_BYTES = 64


class ReusedMemory:
    """Memory for one tensor at a time: handed out again once no tensor lies in it."""

    def __init__(self) -> None:
        self._bytes: np.ndarray | None = None
        self._lease: weakref.ref[np.ndarray] | None = None
        self._lock = threading.Lock()

    def empty_like(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor with the strides of ``like``, which is dense."""
        size = like.numel() * dtype.itemsize
        if size < _MIN_REUSED_BYTES:
            return torch.empty_like(like, dtype=dtype)
        with self._lock:
            if self._lease is not None and self._lease() is not None:
                return torch.empty_like(like, dtype=dtype)
            if self._bytes is None or self._bytes.nbytes != size:
                whole = np.empty(size + _ALIGNMENT_BYTES, np.uint8)
                start = -whole.ctypes.data % _ALIGNMENT_BYTES
                self._bytes = whole[start : start + size]
            lease = self._bytes[:]
            # The view lives as long as the storage, and the storage as long as any tensor on it.
            storage = torch.frombuffer(lease, dtype=dtype).untyped_storage()
            self._lease = weakref.ref(lease)
        return torch.empty(0, dtype=dtype).set_(storage, 0, like.shape, like.stride())


class LayerMemory:
    """The memory of a layer's normalised weight and of its gradient."""

    def __init__(self) -> None:
        self.weight = ReusedMemory()
        self.gradient = ReusedMemory()
