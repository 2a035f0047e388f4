"""Conditional batch norm: the module, its functional form, its definition and its backends."""

from sagan_layers.conditional_norm.contexts import (
    frozen_running_statistics,
    standing_statistics,
    synchronize_batch_norm,
)
from sagan_layers.conditional_norm.module import ConditionalBatchNorm2d

__all__ = [
    "ConditionalBatchNorm2d",
    "frozen_running_statistics",
    "standing_statistics",
    "synchronize_batch_norm",
]
