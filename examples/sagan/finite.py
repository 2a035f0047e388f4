"""The one check that values are finite, before they become pixels, labels, figures or files."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from sagan.errors import UserError


class NotFiniteError(UserError):
    """A value is NaN or infinite."""


def is_finite(value: object) -> bool:
    """Whether a value, such as one read from JSON, is a number that a float can hold."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def check_finite(what: str, tensor: Tensor, *, remedy: str = "") -> None:
    """Raise :class:`NotFiniteError` if an entry is NaN or infinite; the message counts them and ends with a remedy."""
    if not _is_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise NotFiniteError(
            f"{what}: expected finite values, got {bad:,} of {tensor.numel():,} NaN or infinite"
            + (remedy and f"; {remedy}")
        )


def _is_finite(tensor: Tensor) -> bool:
    if tensor.numel() and tensor.is_floating_point():  # ten times as fast as isfinite, and without its memory
        return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())
    return bool(torch.isfinite(tensor).all())
