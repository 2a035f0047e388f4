"""What the user reads where a library of an extra is missing."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shlex
from collections.abc import Iterator
from pathlib import Path


def missing(what: str, libraries: str, extra: str) -> str:
    """Return that something needs libraries of an extra, and the command that installs them."""
    return f"{what} needs {libraries}, which the extra {extra} installs: {_install_command(extra)}"


def _install_command(extra: str) -> str:
    try:
        importlib.metadata.version("sagan-layers")
    except importlib.metadata.PackageNotFoundError:
        return f"pip install -e {shlex.quote(f'{Path(__file__).parents[2]}[{extra}]')}"
    return f"pip install 'sagan-layers[{extra}]'"  # pip leaves the installed package as it is


@contextlib.contextmanager
def needs(what: str, libraries: str, extra: str) -> Iterator[None]:
    """Raise ``UserError`` where the imports of a ``with`` block find a library missing.

    Example:
        >>> with needs("reading parquet files", "pyarrow", "parquet"):
        ...     import pyarrow
    """
    from sagan.errors import UserError  # it needs torch, which the program's start may find missing

    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(missing(what, libraries, extra)) from error
