"""Tells the system which bytes will be read soon, so that it fetches them while an image is decoded.

No thread: two threads in a process that decodes wait for each other, which costs 3 to 11% of the rate.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
# So many files, or stretches of one, are asked for before they are read.
FILES_AHEAD = 16
# Of one stretch at most so many bytes; behind them the system notices by itself that a file is read in order.
MOST_BYTES = 64 * 2**20


def hinted(items: Sequence[Item], hint: Callable[[Item], None]) -> Iterator[Item]:
    """Yield the items; call ``hint`` of each some items before its turn."""
    for item in items[:FILES_AHEAD]:
        hint(item)
    for place, item in enumerate(items, FILES_AHEAD):
        if place < len(items):
            hint(items[place])
        yield item


def will_need(path: Path, start: int = 0, size: int = MOST_BYTES) -> None:
    """Let the system fetch a stretch of a file, where it can; returns at once, and raises nothing."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), start, min(size, MOST_BYTES), os.POSIX_FADV_WILLNEED)
