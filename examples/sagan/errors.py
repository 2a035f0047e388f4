"""What a user can put right."""

from __future__ import annotations

from pathlib import Path


class UserError(ValueError):
    """Something that the user can put right; the message says what was expected and what was found.

    The command line shows the message alone. Any other exception is a fault of the program and keeps its
    traceback.
    """


def is_taken(out: Path, *, besides: str | None = None) -> bool:
    """Whether something lies where a folder is to be written, files whose names begin with ``besides`` apart."""
    if not out.is_dir():
        return out.exists()
    return any(besides is None or not inside.name.startswith(besides) for inside in out.iterdir())


def check_is_new(out: Path) -> None:
    """Raise :class:`UserError` where a folder is to be written and something is there already."""
    if is_taken(out):
        raise UserError(f"out: expected a folder that is not there yet or empty, got {out}")
