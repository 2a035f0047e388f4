"""What a user can put right."""

from __future__ import annotations

from pathlib import Path


class UserError(ValueError):
    """Something that the user can put right; the message says what was expected and what was found.

    The command line shows the message alone. Any other exception is a fault of the program and keeps its
    traceback.
    """


def check_is_new(out: Path) -> None:
    """Raise :class:`UserError` where a folder is to be written and something is there already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out: expected a folder that is not there yet or empty, got {out}")
