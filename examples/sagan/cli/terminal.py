"""What commands print: text from files, which cannot steer a terminal, nor fail for want of a letter."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from typing import TextIO

from sagan.names import printable


class PrintableStream(io.TextIOBase):
    """A text stream that escapes control characters, and characters that its encoding lacks."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text; its newlines and tabs stay."""
        encoding = self._stream.encoding or "utf-8"
        shown = printable(text, keep="\n\t").encode(encoding, "backslashreplace")
        self._stream.write(shown.decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._stream.isatty()


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t")


@contextlib.contextmanager
def printable_output() -> Iterator[None]:
    """Escape what a ``with`` block prints, and what it logs where the program has not configured logging."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_PrintableFormatter())
    with contextlib.redirect_stdout(PrintableStream(sys.stdout)):
        yield
