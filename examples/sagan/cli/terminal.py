"""What commands print: text from files, which cannot steer a terminal, nor fail for want of a letter."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from sagan.names import printable


class PrintableStream(io.TextIOBase):
    """A text stream that escapes control characters."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text; its newlines and tabs stay."""
        self._stream.write(printable(text, keep="\n\t"))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._stream.isatty()


class _LastingFile(io.FileIO):
    """A pipe or terminal that may go away, as in ``| head``; what is written after that is dropped."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            return len(data)


def outlive_the_terminal() -> None:
    """Let the program go on, for what it writes to files, when nobody reads its output any more.

    Each line is written at once, also to a file: a job's log shows what it does now, and all of it if it is killed.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell
            file, encoding = io.FileIO(os.devnull, "w"), "utf-8"
        else:
            stream.flush()
            file, encoding = _LastingFile(stream.fileno(), "w", closefd=False), stream.encoding
        text = io.TextIOWrapper(io.BufferedWriter(file), encoding, "backslashreplace", line_buffering=True)
        setattr(sys, name, text)


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
