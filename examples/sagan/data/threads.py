"""Work over many files on a pool of threads, with an optional progress bar."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def map_ranges(
    function: Callable[[range], Result],
    count: int,
    *,
    threads: int | None,
    progress: bool,
    description: str,
    chunk: int = 64,
) -> Iterator[Result]:
    """Yield `function(range)` for consecutive ranges that cover 0 to count - 1, in order.

    Args:
        function: called on a thread of the pool; Pillow decodes outside of Python's lock, so threads run in
            parallel.
        count: how many items there are.
        threads: size of the pool; None takes one for each CPU this process may use. Files on a
            network may want more.
        progress: draw a bar with tqdm if it is installed.
        description: the bar's label.
        chunk: items in a range; the last range may be shorter.

    Raises:
        ValueError: `threads` is below 1.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"expected threads of at least 1 or None, got {threads}")
    ranges = [range(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    with ExitStack() as stack:
        advance = _progress_bar(stack, count, description) if progress else None
        pool = stack.enter_context(ThreadPoolExecutor(threads or _usable_cpus()))
        for items, result in zip(ranges, pool.map(function, ranges), strict=True):
            if advance is not None:
                advance(len(items))
            yield result


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _progress_bar(stack: ExitStack, total: int, description: str) -> Callable[[int], object] | None:
    try:
        from tqdm import tqdm
    except ImportError:
        logger.info("tqdm is not installed, so there is no progress bar")
        return None
    bar = stack.enter_context(tqdm(total=total, desc=description, unit="img"))
    update: Callable[[int], object] = bar.update
    return update
