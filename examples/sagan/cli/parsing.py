"""What the subcommands share: parsing, checks of numbers, exit codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import tyro

from sagan.errors import UserError

T = TypeVar("T")
# Exit codes besides 0, 1 (an error, in plain words) and 2 (wrong arguments).
INTERRUPTED = 75  # stopped by a signal; a checkpoint is saved
COLLAPSED = 76  # stopped by a sign of collapse; a checkpoint is saved


def parse(kind: type[T], name: str, arguments: Sequence[str], default: T | None = None) -> T:
    """Parse the options of a subcommand; unknown ones end the program with a message."""
    program = f"imagenet_sagan.py {name}"
    if default is None:
        return tyro.cli(kind, prog=program, args=list(arguments))
    return tyro.cli(kind, prog=program, args=list(arguments), default=default)


def check_positive(command: object, *names: str) -> None:
    """Raise :class:`UserError` for an option that is set and below 1."""
    for name in names:
        value = getattr(command, name)
        if value is not None and value < 1:
            raise UserError(f"{name}: expected at least 1, got {value}")
