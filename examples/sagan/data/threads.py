"""Work over many files on a pool of threads, with an optional progress bar."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Item = TypeVar("Item")


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
        pool = stack.enter_context(ThreadPoolExecutor(threads or usable_cpus()))
        for items, result in zip(ranges, pool.map(function, ranges), strict=True):
            if advance is not None:
                advance(len(items))
            yield result


def usable_cpus() -> int:
    """Return how many CPUs this process may use."""
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


def read_ahead(items: Iterable[Item], count: int) -> Iterator[Item]:
    """Yield the items, taking up to `count` of them ahead on a thread of their own.

    What taking an item raises is raised here in its place. Closing or dropping the iterator ends the thread.
    """
    taken: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=count)
    closed = threading.Event()

    def put(is_item: bool, value: object) -> None:
        while not closed.is_set():
            try:
                return taken.put((is_item, value), timeout=0.1)
            except queue.Full:
                continue

    def take() -> None:
        try:
            for item in items:
                put(True, item)
                if closed.is_set():
                    return
            put(False, None)
        except BaseException as error:
            put(False, error)

    thread = threading.Thread(target=take, name="read ahead", daemon=True)
    thread.start()
    try:
        while True:
            is_item, value = taken.get()
            if is_item:
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        closed.set()
        thread.join()
