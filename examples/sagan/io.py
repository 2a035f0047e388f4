"""Checksums of tensors and modules."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the entries of a tensor as bytes, in the order of its axes."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def module_digest(module: nn.Module) -> str:
    """Return 64 hex digits of a module's parameters and buffers, names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
