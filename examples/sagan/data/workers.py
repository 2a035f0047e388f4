"""Processes that make batches: room for them in shared memory, their deaths, and the end of a wait for them."""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch import Tensor

from sagan.data.layout import DatasetError
from sagan.errors import FailureError
from sagan.signals import StopRequestedError, stop_requested

logger = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]

SHARED_MEMORY = Path("/dev/shm")
_REMEDIES = (
    "Remedies: more of it (docker run --shm-size=8g or --ipc=host), a smaller --batch-size, or fewer "
    "--images.workers (0 decodes in the trainer itself)"
)
_SAY_AFTER_S = 60.0
_JOIN_S = 5.0
_DEATH_S = 1.0


class WorkerError(DatasetError):
    """A data worker has died, or its batches have no room in shared memory."""

    exit_code = FailureError.exit_code


class WorkerBatches(Iterator[Batch]):
    """The batches of a DataLoader with worker processes and a timeout.

    `next` raises `StopRequestedError` within a second if a signal asks training to stop while no batch comes (also if a
    worker is stuck or has died of the same signal), and `WorkerError` if a worker has died or `problem` says
    why none were started. The workers end with this object or with the program, whatever they do.
    """

    def __init__(self, start: Callable[[], Iterator[Batch | Exception]], problem: str | None = None) -> None:
        self._problem = problem
        self._batches: list[Iterator[Batch | Exception]] = []
        processes, threads = set(multiprocessing.active_children()), set(threading.enumerate())
        try:
            if problem is None:
                with _unchanged_sigchld():
                    self._batches.append(start())
        except OSError as error:  # too many processes, or no memory for them
            self._problem = f"cannot start data workers: {error}. Remedy: fewer --images.workers"
        self._workers: list[BaseProcess] = [*set(multiprocessing.active_children()) - processes]
        self._threads = set(threading.enumerate()) - threads
        # At exit Python would ask the workers to end, and wait; they ignore the signal that asks.
        self._end = partial(_end, self._batches, self._workers)
        atexit.register(self._end)

    def __next__(self) -> Batch:
        if self._problem is not None:
            raise WorkerError(self._problem)
        start, said = time.monotonic(), False
        while True:
            try:
                batch = next(self._batches[0])
            except Exception as error:  # EOFError, ConnectionError: it died while it handed a batch over
                self._check(error)
                if not said and time.monotonic() - start > _SAY_AFTER_S:
                    logger.warning("waiting for images for %.0f s; is the disk away?", _SAY_AFTER_S)
                    said = True
                continue
            if isinstance(batch, Exception):
                raise batch
            return batch

    def _check(self, error: Exception) -> None:
        """Return if the error is a timeout without a reason; else end the workers and raise the reason."""
        timed_out = "timed out" in str(error) and all(thread.is_alive() for thread in self._threads)
        sentinels = [worker.sentinel for worker in self._workers]
        ended = multiprocessing.connection.wait(sentinels, 0 if timed_out else _DEATH_S)
        dead = [worker for worker in self._workers if worker.sentinel in ended]
        if timed_out and not dead and not stop_requested():
            return
        _kill(self._workers)  # and join the dead
        if stop_requested():
            raise StopRequestedError from None
        if dead:
            raise WorkerError(_cause_of_death(dead[0])) from error
        raise error

    def __del__(self) -> None:
        atexit.unregister(self._end)
        self._end()


def no_room(batch_bytes: int, batches: int) -> str | None:
    """Return why a number of batches has no room in shared memory, None if it has or the system has none such."""
    if not hasattr(os, "statvfs") or not SHARED_MEMORY.is_dir():
        return None
    facts = os.statvfs(SHARED_MEMORY)
    size, free = facts.f_blocks * facts.f_frsize, facts.f_bavail * facts.f_frsize
    # The other processes of this machine may have filled their part already.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = batches * batch_bytes
    if needed <= free and needed * processes <= size:
        return None
    each = f" for each of {processes} processes" if processes > 1 else ""
    return (
        f"{SHARED_MEMORY}: expected room for {batches} batches of {batch_bytes / 2**20:.1f} MiB, "
        f"{needed / 2**20:.1f} MiB{each}, got {free / 2**20:.1f} MiB free of {size / 2**20:.1f}. {_REMEDIES}"
    )


def place_in_shared_memory(images: Tensor, labels: Tensor) -> Batch:
    """Move a batch to shared memory, in a worker; where DataLoader does, on a thread, a failure loses the batch."""
    try:
        return images.share_memory_(), labels.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise WorkerError(f"a data worker found no room for its batch: {error}. {_REMEDIES}") from error


def ignore_signals(worker: int) -> None:
    """Ignore the signals that a terminal or scheduler sends to all processes: the trainer finishes its step first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _cause_of_death(worker: BaseProcess) -> str:
    code = worker.exitcode or 0
    what = f"data worker {worker.pid} has ended, with exit code {code}"
    if code == -getattr(signal, "SIGKILL", 9):
        return (
            f"data worker {worker.pid} was killed (SIGKILL), as by the system when memory runs out. "
            "Remedies: fewer --images.workers (0 decodes in the trainer itself), a smaller --batch-size, or more memory"
        )
    if code < 0:
        what = f"data worker {worker.pid} was ended by {signal.Signals(-code).name}"
    if code == -getattr(signal, "SIGBUS", 7):
        return f"{what}, as when {SHARED_MEMORY} is full. {_REMEDIES}"
    return f"{what}. Remedy: --images.workers 0 decodes in the trainer itself, and shows the error"


@contextlib.contextmanager
def _unchanged_sigchld() -> Iterator[None]:
    """Undo what DataLoader does to SIGCHLD: raise wherever the program is when a worker dies, as within an update."""
    number = getattr(signal, "SIGCHLD", None)
    before = None if number is None else signal.getsignal(number)
    try:
        yield
    finally:
        is_main = threading.current_thread() is threading.main_thread()
        if number is not None and before is not None and is_main:
            signal.signal(number, before)


def _end(batches: list[Iterator[Batch | Exception]], workers: list[BaseProcess]) -> None:
    batches.clear()  # DataLoader asks the workers to end
    _kill(workers)


def _kill(workers: list[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(_JOIN_S)
