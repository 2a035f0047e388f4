"""Tasks on worker processes that end with the process that started them, however that ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import connection
from typing import TypeVar

from sagan.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Iterator[tuple[Task, Result]]:
    """Yield (task, function(task)) as they are done.

    Args:
        function: at the top level of a module.
        tasks: taken as there is room for them.
        workers: processes; 1 runs everything in this one.

    Raises:
        UserError: a worker process was killed.
    """
    if workers == 1:
        for task in tasks:
            yield task, function(task)
        return
    # Forked workers start at once; this process has no other threads that they could miss. Elsewhere than on
    # Linux, system libraries do not bear it.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    waiting: dict[Future[Result], Task] = {}
    pool = ProcessPoolExecutor(workers, context, _begin_worker)
    try:
        remaining = iter(tasks)
        for task in remaining:
            waiting[pool.submit(function, task)] = task
            if len(waiting) >= 2 * workers:
                yield from _finished(waiting)
        while waiting:
            yield from _finished(waiting)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, perhaps for want of memory. What is finished is kept: run the same "
            "command again, with fewer --workers."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def run_in_order(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    """Yield function(task) of each task in their order; see :func:`run_tasks`."""
    results: dict[int, Result] = {}
    due = 0
    numbered = run_tasks(partial(_numbered, function), list(enumerate(tasks)), workers)
    for (number, _), result in numbered:
        results[number] = result
        while due in results:
            yield results.pop(due)
            due += 1


def _numbered(function: Callable[[Task], Result], task: tuple[int, Task]) -> Result:
    return function(task[1])


def _finished(waiting: dict[Future[Result], Task]) -> Iterator[tuple[Task, Result]]:
    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
    for future in done:
        yield waiting.pop(future), future.result()


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end when the parent does: a killed one cannot tell its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
