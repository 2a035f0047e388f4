"""Tells the system which bytes will be read soon, so that it fetches them while an image is decoded.

No thread as in `sagan.data.prefetch`: beside a decoding thread it costs 3 to 11% of the rate.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
_HINTED_ITEMS = 16
# Of one stretch at most this; behind it the system notices by itself that a file is read in order.
_MAX_HINTED_BYTES = 64 * 2**20


def hinted(items: Sequence[Item], hint: Callable[[Item], None]) -> Iterator[Item]:
    """Yield the items; call ``hint`` with each of them 16 items before its turn."""
    for place in range(len(items) + _HINTED_ITEMS):
        if place < len(items):
            hint(items[place])
        if place >= _HINTED_ITEMS:
            yield items[place - _HINTED_ITEMS]


def will_need(path: Path, start: int = 0, size: int = _MAX_HINTED_BYTES) -> None:
    """Let the system fetch a stretch of a file, if it can; returns at once and never raises."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), start, min(size, _MAX_HINTED_BYTES), os.POSIX_FADV_WILLNEED)
