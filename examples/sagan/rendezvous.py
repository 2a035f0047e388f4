"""How the processes of a run find each other, and how each learns why another one has ended."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from sagan.errors import FailureError, UserError
from sagan.io import first_line
from sagan.signals import no_interrupts

START_S = 600.0  # the longest that processes wait for each other at the start
_SAY_AFTER_S = 10.0
_SAY_EVERY_S = 60.0
_ANSWER_S = 3.0  # the longest that a process waits to hear why others have ended
_HELP = (
    "start all with torchrun, and look at the output of each and at WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
)


class LostProcessError(FailureError):
    """Another process has ended."""


def launched() -> tuple[int, int]:
    """Return RANK and WORLD_SIZE of the environment, 0 and 1 without them."""
    if "RANK" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1
    count = environment_number("WORLD_SIZE", 1)
    return environment_number("RANK", 0, count - 1), count


def environment_number(name: str, least: int, most: int = 2**16 - 1) -> int:
    """Return a number in the environment; raise :class:`UserError` if it is missing or out of range."""
    text = os.environ.get(name, "")
    if not text.isdecimal() or not least <= int(text) <= most:
        found = repr(text) if name in os.environ else "none"
        raise UserError(
            f"environment: expected {name} from {least} to {most}, got {found}; start with torchrun"
        )
    return int(text)


class Rendezvous:
    """The processes of a run, by what they write to a store that process 0 or torchrun holds.

    Attributes:
        store: the store, for ``init_process_group``.
    """

    def __init__(self, rank: int, world_size: int, *, start_s: float = START_S) -> None:
        """Connect, and wait until all processes have.

        Raises:
            UserError: if that takes more than ``start_s``; or at once, if the port is in use or another process failed.
        """
        self._rank, self._ranks = rank, range(world_size)
        self._start_s = start_s
        host, port = os.environ.get("MASTER_ADDR", ""), environment_number("MASTER_PORT", 1)
        self._address = host, port
        if not host:
            raise UserError(
                "environment: expected MASTER_ADDR, the name of a machine, got none; start with torchrun"
            )
        of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._serves = rank == 0 and not of_torchrun
        self._wait(lambda: "" if self._serves else self._unreachable())
        # On a thread, because neither signals nor its timeout end its waiting for another program's answer.
        found: list[Any] = []
        threading.Thread(target=lambda: found.append(self._connect()), daemon=True).start()
        self._wait(lambda: "" if found else f"no answer as of process 0 from {host}, port {port}")
        if isinstance(found[0], RuntimeError):
            reason = "it is in use" if "EADDRINUSE" in str(found[0]) else first_line(found[0])
            raise UserError(f"port {port} of {host}: {reason}; choose another MASTER_PORT")
        # torchrun's store outlives a restart, and so do its keys.
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"sagan/{restart}/{world_size}", found[0])  # type: ignore[attr-defined]
        self.store.set(f"started/{rank}", "")
        self._wait(self._absent)

    def leave(self, error: BaseException) -> str:
        """Tell the others why this process ends; return why they do, if the error says that contact to them is lost.

        Takes a few seconds at most.
        """
        lost = _is_lost_contact(error)
        reasons = {0: ""}  # process 0 holds the store
        with no_interrupts(), contextlib.suppress(RuntimeError):
            if self._serves or not self._unreachable():
                self.store.set(f"ended/{self._rank}", "" if lost else first_line(error))
                deadline = time.monotonic() + _ANSWER_S
                while (lost or self._serves) and time.monotonic() < deadline and self._without("ended"):
                    time.sleep(0.05)
                silent = self._without("ended")
                reasons = {rank: "" if rank in silent else self._why(rank) or "lost" for rank in self._ranks}
        if not lost:
            return ""
        killed = [rank for rank, reason in reasons.items() if not reason]
        failed = [
            f"process {rank} failed: {reason}"
            for rank, reason in reasons.items()
            if reason not in ("", "lost")
        ]
        if killed and not failed:
            return f"{_named(killed)} ended without a message, perhaps killed because memory ran out"
        return "; ".join(failed) or first_line(error)

    def _connect(self) -> Any:
        """Return the store, or the error."""
        host, port = self._address
        try:
            return dist.TCPStore(  # type: ignore[attr-defined]
                host,
                port,
                is_master=self._serves,
                timeout=timedelta(seconds=self._start_s),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except RuntimeError as error:
            return error

    def _wait(self, missing: Callable[[], str]) -> None:
        """Wait until nothing is missing; say so now and then, and raise an error in the end."""
        start, say_s = time.monotonic(), _SAY_AFTER_S
        while what := missing():
            waited_s = time.monotonic() - start
            if waited_s > self._start_s:
                raise FailureError(f"{what} after {self._start_s:.0f} s; {_HELP}")
            if waited_s > say_s:
                print(f"Process {self._rank} waits: {what}", file=sys.stderr, flush=True)
                say_s += _SAY_EVERY_S
            time.sleep(0.1)

    def _unreachable(self) -> str:
        host, port = self._address
        try:
            socket.create_connection(self._address, timeout=1).close()
        except OSError as error:
            return f"no process 0 at {host}, port {port} ({error.strerror or error})"
        return ""

    def _absent(self) -> str:
        absent = self._without("started")
        for rank in set(self._ranks) - set(self._without("ended")):
            if why := self._why(rank):
                raise LostProcessError(f"process {rank} failed: {why}")
        return (
            f"{len(absent)} of {len(self._ranks)} processes have not started: {_named(absent)}"
            if absent
            else ""
        )

    def _without(self, key: str) -> list[int]:
        """Return the ranks that have not written a key."""
        if self.store.check([f"{key}/{rank}" for rank in self._ranks]):
            return []
        return [rank for rank in self._ranks if not self.store.check([f"{key}/{rank}"])]

    def _why(self, rank: int) -> str:
        return self.store.get(f"ended/{rank}").decode(errors="replace")


def _is_lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because of another process: gloo raises plain RuntimeErrors."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and bool(re.search("gloo|NCCL|Connection closed", str(error)))


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"process {shown}" if len(ranks) == 1 else f"processes {shown}{' ...' if len(ranks) > 8 else ''}"
