"""The parser and the exit codes of all subcommands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import tyro

T = TypeVar("T")
# Exit codes besides 0, 1 (an error with a message) and 2 (wrong arguments).
INTERRUPTED = 75  # stopped by a signal; a checkpoint is saved
COLLAPSED = 76  # stopped by a sign of collapse; a checkpoint is saved


def parse(kind: type[T], name: str, arguments: Sequence[str], default: T | None = None) -> T:
    """Parse the options of a subcommand; an unknown option ends the program with a message."""
    program = f"imagenet_sagan.py {name}"
    if default is None:
        return tyro.cli(kind, prog=program, args=list(arguments))
    return tyro.cli(kind, prog=program, args=list(arguments), default=default)
