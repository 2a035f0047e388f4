"""What became of a case, and processes that run cases which may crash, hang or fill the memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

GOOD = ("right", "clear", "undetectable")
BAD = ("unclear", "wrong", "hung")
# Address space of a case beyond what torch takes itself.
_MEMORY_BYTES = 6 * 2**30


class Outcome(NamedTuple):
    """What became of a case: one of the kinds, what it was about, and the error's or the difference's text."""

    kind: str
    what: str
    detail: str = ""


class WrongError(Exception):
    """A result is not the expected one."""


@dataclass(frozen=True)
class Campaign:
    """A kind of cases.

    Attributes:
        run: takes a case's number and a folder that all cases of a process share; it may raise.
        count: cases by default.
        seconds: for all of them, by default.
        limit_s: after which a case has hung.
    """

    name: str
    run: Callable[[int, Path], Outcome]
    count: int
    seconds: float
    limit_s: float


def text_of(error: BaseException) -> str:
    """Return an error as one line, with where it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return " ".join(f"{type(error).__name__}: {error}".split())[:400] + where


def outcome_of(run: Callable[[], Outcome], what: str) -> Outcome:
    """Return what became of a case: errors that it let through are unclear, or wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run()
    except WrongError as error:
        return Outcome("wrong", what, str(error)[:400])
    except BaseException as error:
        return Outcome("unclear", what, text_of(error))


def _serve(campaign: Campaign, folder: Path, connection: Connection) -> None:
    os.setsid()  # so that the parent can end everything that a case has started
    torch.set_num_threads(1)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (taken + _MEMORY_BYTES,) * 2)
    connection.send(None)  # ready
    while (number := connection.recv()) is not None:
        connection.send(outcome_of(lambda number=number: campaign.run(number, folder), campaign.name))  # type: ignore[misc]


class _Child:
    """A process that runs one case after the other."""

    def __init__(self, campaign: Campaign, folder: Path) -> None:
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "benchmarks.fuzz.__main__"])
        self.campaign = campaign
        self.connection, other = context.Pipe()
        folder.mkdir(parents=True, exist_ok=True)
        self.process = context.Process(target=_serve, args=(campaign, folder, other))
        self.process.start()
        other.close()
        self.connection.recv()

    def begin(self, number: int) -> None:
        self.number, self.deadline = number, time.monotonic() + self.campaign.limit_s
        self.connection.send(number)

    def outcome(self) -> Outcome | None:
        """Return what became of the case, None while it runs."""
        if self.connection.poll():
            try:
                found: Outcome = self.connection.recv()
                return found
            except EOFError:
                self.process.join()
                return Outcome("unclear", self.campaign.name, f"the process ended: {self.process.exitcode}")
        if time.monotonic() > self.deadline:
            return Outcome("hung", self.campaign.name, f"no end within {self.campaign.limit_s:.0f} s")
        return None

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.connection.close()


def run_cases(
    campaign: Campaign, numbers: range, folder: Path, *, seconds: float, processes: int
) -> Iterator[tuple[int, Outcome]]:
    """Yield the outcomes of cases, in no order, until all are done or the time is over."""
    deadline = time.monotonic() + seconds
    waiting = iter(numbers)
    made = 0
    children: list[_Child] = []
    try:
        while True:
            while len(children) < processes and time.monotonic() < deadline:
                number = next(waiting, None)
                if number is None:
                    break
                children.append(_Child(campaign, folder / str(made)))
                made += 1
                children[-1].begin(number)
            if not children:
                return
            wait([child.connection for child in children], timeout=0.2)
            for child in list(children):
                outcome = child.outcome()
                if outcome is None:
                    continue
                yield child.number, outcome
                lost = outcome.kind == "hung" or not child.process.is_alive()
                number = None if lost or time.monotonic() > deadline else next(waiting, None)
                if number is None:
                    children.remove(child)
                    child.end()
                else:
                    child.begin(number)
    finally:
        for child in children:
            child.end()
