"""Prefetching on threads (Pillow, NumPy and file reads release Python's lock) or on a CUDA stream."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

Batch = tuple[Tensor, Tensor]
Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int = 1, depth: int
) -> Iterator[Result]:
    """Yield ``function(item)`` for each item, in order; up to ``depth`` results are computed ahead.

    What the function raises is raised in that result's turn. Closing or dropping the iterator drops the work that has
    not begun and ends the threads. ``items`` may be endless; it is read on the caller's thread.
    """
    with ThreadPoolExecutor(threads, "prefetch") as pool:
        remaining = iter(items)
        waiting: deque[Future[Result]] = deque(
            pool.submit(function, item) for item in islice(remaining, depth)
        )
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in islice(remaining, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()


def map_ranges(
    function: Callable[[range], Result],
    count: int,
    *,
    progress: bool,
    description: str,
    threads: int | None = None,
    chunk: int = 64,
) -> Iterator[Result]:
    """Yield ``function(range)`` for consecutive ranges that cover 0 to count - 1, in order, computed on threads.

    A range has ``chunk`` items, the last one perhaps fewer. ``threads=None`` takes one for each usable CPU.
    """
    threads = threads or usable_cpus()
    ranges = [range(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    with tqdm(total=count, desc=description, unit="img", disable=not progress) as bar:
        results = prefetch(function, ranges, threads=threads, depth=4 * threads)
        for items, result in zip(ranges, results, strict=True):
            bar.update(len(items))
            yield result


def prefetch_to_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches on the device; on CUDA a stream copies each one step ahead, in parallel if it is pinned."""
    if device.type != "cuda":
        for pixels, labels in batches:
            yield pixels.to(device), labels.to(device)
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin_next() -> Batch:
        pixels, labels = next(batches)
        with torch.cuda.stream(stream):
            return pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    following = begin_next()
    while True:
        current = following
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(stream)
        for tensor in current:
            tensor.record_stream(computing)
        following = begin_next()
        yield current


def usable_cpus() -> int:
    """Return how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
