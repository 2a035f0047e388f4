"""Errors that the user can fix, and the checks that raise them."""

from __future__ import annotations

import os
import reprlib
import sys
from collections.abc import Collection
from itertools import islice
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

_MOST_LISTED = 5


class UserError(ValueError):
    """An error that the user can fix. The message says what was expected and what was found.

    The command line shows the message alone. Any other exception is a bug and keeps its traceback.
    """

    exit_code = 2  # wrong options, files or folders


class FailureError(UserError):
    """A failure while running, whatever was given."""

    exit_code = 1


class NotFiniteError(UserError):
    """A value is NaN or infinite."""


def shown(value: object) -> str:
    """Return a short description of any value for a message."""
    if value is None or isinstance(value, (str, bool, float)) or is_int(value):
        return reprlib.repr(value)
    if isinstance(value, int):
        return f"an integer of {value.bit_length()} bits"
    count = f" of {len(value):,}" if isinstance(value, (list, tuple, dict, set)) else ""
    return f"a {type(value).__name__}{count}"


def listed(values: Collection[object]) -> str:
    """Return the first values, and how many more there are, for a message."""
    more = f", and {len(values) - _MOST_LISTED:,} more" if len(values) > _MOST_LISTED else ""
    return f"[{', '.join(map(shown, islice(values, _MOST_LISTED)))}{more}]"


def is_int(value: object) -> bool:
    """Whether a value is an integer of 64 bits, and no bool."""
    return type(value) is int and -(2**63) <= value < 2**63


def is_finite(value: object) -> bool:
    """Whether a value, such as one read from JSON, is a number that a float can hold."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def check_finite(what: str, tensor: Tensor, *, remedy: str = "") -> None:
    """Raise :class:`NotFiniteError` if an entry is NaN or infinite; the message counts them and ends with a remedy."""
    if tensor.numel() and tensor.is_floating_point():  # ten times as fast as isfinite, and without its memory
        sound = torch.stack(torch.aminmax(tensor)).isfinite().all()
    else:
        sound = tensor.isfinite().all()
    if not sound:
        bad = int((~torch.isfinite(tensor)).sum())
        raise NotFiniteError(
            f"{what}: expected finite values, got {bad:,} of {tensor.numel():,} NaN or infinite"
            + (remedy and f"; {remedy}")
        )


def check_at_least(options: object, minimum: int, *names: str) -> None:
    """Raise :class:`UserError` for an option that is set and below the minimum."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not (isinstance(value, (int, float)) and value >= minimum):
            raise UserError(f"{name}: expected at least {minimum}, got {shown(value)}")


def check_choices(options: object) -> None:
    """Raise :class:`UserError` for an option whose type is a ``Literal`` without its value."""
    for name, kind in get_type_hints(type(options)).items():
        choices, value = get_args(kind), getattr(options, name)
        if get_origin(kind) is Literal and value not in choices:
            raise UserError(f"{name}: expected one of {', '.join(map(str, choices))}, got {shown(value)}")


def is_in_use(out: Path, *, ignored_prefix: str | None = None) -> bool:
    """Whether ``out`` exists and is not an empty folder; ignores files whose names begin with a prefix."""
    if not out.is_dir():
        return out.exists()
    return any(ignored_prefix is None or not file.name.startswith(ignored_prefix) for file in out.iterdir())


def check_out_folder(out: Path) -> None:
    """Raise :class:`UserError` if a file is where a folder is to be made, or where one above it is."""
    nearest = next(each for each in (out, *out.absolute().parents) if os.path.lexists(each))
    if not nearest.is_dir():
        raise UserError(
            f"out: expected a folder{'' if nearest == out else f' for {out}'}, got the file {nearest}"
        )


def check_out_file(out: Path) -> None:
    """Raise :class:`UserError` if a folder is where a file is to be written, or a file where its folder is."""
    if out.is_dir():
        raise UserError(f"out: expected a file, got the folder {out}")
    check_out_folder(out.parent)


def check_is_new(out: Path) -> None:
    """Raise :class:`UserError` if ``out`` exists and is not an empty folder."""
    if is_in_use(out):
        raise UserError(f"out: expected a new or empty folder, got {out}")
