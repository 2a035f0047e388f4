"""The parser and the exit codes of all subcommands."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import tyro

from sagan.names import program_file

T = TypeVar("T")
FAILED = 1  # while running: a full disk, NaNs, a lost process
BAD_USAGE = 2  # wrong options, files or folders
INTERRUPTED = 75  # stopped by a signal; a checkpoint is saved
COLLAPSED = 76  # stopped by a sign of collapse; a checkpoint is saved


def parse(kind: type[T], name: str, arguments: Sequence[str], default: T | None = None) -> T:
    """Parse the options of a subcommand; an unknown option ends the program with a message."""
    program = f"{program_file()} {name}"
    if default is None:
        options = tyro.cli(kind, prog=program, args=list(arguments))
    else:
        options = tyro.cli(kind, prog=program, args=list(arguments), default=default)
    return cast(T, _at_home(options))


def _at_home(value: Any) -> Any:
    """Return options with ``~`` replaced in paths, as a shell does not in ``--out=~/run``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
        changed = {name: new for name, old in found.items() if (new := _at_home(old)) != old}
        return dataclasses.replace(value, **changed) if changed else value
    if isinstance(value, tuple):
        return tuple(_at_home(each) if isinstance(each, Path) else each for each in value)
    if isinstance(value, Path) or (isinstance(value, str) and value.startswith("~/")):
        return type(value)(os.path.expanduser(value))  # noqa: PTH111  (Path.expanduser raises for unknown users)
    return value
