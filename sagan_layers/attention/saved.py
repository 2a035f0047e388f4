"""What the kernels of the whole block save for their backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sagan_layers.attention.reference import ProjectionWeights, SelfAttentionInputs
from sagan_layers.torch_support import accumulation_dtype


class Saved(NamedTuple):
    """What forward saves for backward; without ``save`` all but key and value are empty.

    Attributes:
        query: [N, L, E].
        key: [N, S, E].
        value: [N, S, Ev].
        attended: [N, L, Ev].
        lse: [N, L], the natural logarithm of the softmax's denominators, in the accumulation dtype.
        key_argmax: [N, S, E], uint8: the position in its window of each key; empty without pooling.
        value_argmax: [N, S, Ev], the same for values.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attended: Tensor
    lse: Tensor
    key_argmax: Tensor
    value_argmax: Tensor


def empty_results(inputs: SelfAttentionInputs, save: bool) -> tuple[Tensor, Saved]:
    """Return tensors like those of the kernels' forward, not computed."""
    x, weights, _, pool_size = inputs
    assert isinstance(weights, ProjectionWeights)
    N, _, H, W = x.shape
    E, Ev = weights.key.size(0), weights.value.size(0)
    S = (H // pool_size) * (W // pool_size)
    positions = (N, H * W) if save else (0, 0)
    pooled = (N, S) if save and pool_size > 1 else (0, 0)
    saved = Saved(
        query=x.new_empty((*positions, E)),
        key=x.new_empty((N, S, E)),
        value=x.new_empty((N, S, Ev)),
        attended=x.new_empty((*positions, Ev)),
        lse=x.new_empty(positions, dtype=accumulation_dtype(x.dtype)),
        key_argmax=x.new_empty((*pooled, E), dtype=torch.uint8),
        value_argmax=x.new_empty((*pooled, Ev), dtype=torch.uint8),
    )
    return torch.empty_like(x), saved
