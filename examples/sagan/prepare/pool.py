"""Runs tasks on worker processes that end with the process that started them, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import TypeVar

from sagan.errors import FailureError

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Iterator[tuple[Task, Result]]:
    """Yield (task, function(task)) in the order of completion; raise FailureError if a worker process was killed.

    ``tasks`` are taken only when there is room for them. ``workers=1`` runs everything in this process.
    """
    if workers == 1:
        for task in tasks:
            yield task, function(task)
        return
    # Fork starts at once, and is safe on Linux because this process has no other threads; system libraries of other
    # platforms do not survive it.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    waiting: dict[Future[Result], Task] = {}
    pool = ProcessPoolExecutor(workers, context, _start_worker)
    try:
        for task in tasks:
            waiting[pool.submit(function, task)] = task
            if len(waiting) >= 2 * workers:
                yield from _finished(waiting)
        while waiting:
            yield from _finished(waiting)
    except BrokenProcessPool as error:
        raise FailureError(
            "a worker process was killed, perhaps because memory ran out. Finished work is saved: run the same "
            "command again, with fewer --workers."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(waiting: dict[Future[Result], Task]) -> Iterator[tuple[Task, Result]]:
    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
    for future in done:
        yield waiting.pop(future), future.result()


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when the parent does: a killed parent cannot tell its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
