"""What SIGINT, SIGTERM, SIGHUP and SIGUSR1 do: end imports, interrupt a command, or ask training to stop.

=====================  ==========================================================================================
while                  a signal
=====================  ==========================================================================================
modules are imported   ends the program at once, with one line
a command runs         raises :class:`Interrupted`: files in work are removed, workers end, one line
training runs          asks it to stop after this iteration, with a checkpoint (:func:`stop_requests`). Further signals
                       change nothing, except a third Ctrl-C: it ends the program at once and says what is lost
the program ends       ends it at once, with the exit code that it has; so does a wait of 10 s (:func:`program`)
=====================  ==========================================================================================

Whoever waits in training, as for images, looks at :func:`stop_requested` and raises :class:`StopRequestedError`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from sagan.names import program_file

Handler = Callable[[int, FrameType | None], object]

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
NUMBERS = tuple(int(getattr(signal, name)) for name in _NAMES if hasattr(signal, name))  # Windows lacks some
_AT_ONCE = 3  # the number of Ctrl-C that end training without a checkpoint
_BURST_S = 1.0  # schedulers and torchrun send several
_MAX_END_S = 10.0


class Interrupted(KeyboardInterrupt):
    """A signal ended a command outside training."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number  # as shells report it


class StopRequestedError(Exception):
    """Raised by what training waits for, because a signal has asked training to stop."""


class StopRequest:
    """The signals that training has received; true once there is one.

    Attributes:
        training: whether training runs.
    """

    def __init__(self, lost: Callable[[], str]) -> None:
        self._lost = lost
        self.training = True
        self._received: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._received)

    def receive(self, number: int, _: FrameType | None = None) -> None:
        """Count a signal; the third Ctrl-C ends the process."""
        self._received.append(number)
        if self._received.count(signal.SIGINT) == _AT_ONCE:
            _say(f"ended at once by Ctrl-C; lost: {self._lost()}")
            os._exit(128 + number)
        if len(self._received) == 1 and os.environ.get("RANK", "0") == "0":
            name = signal.Signals(number).name
            _say(f"{name}: stopping after this iteration, with a checkpoint (two more Ctrl-C: without one)")


_training = StopRequest(str)  # the latest; a stop it was asked for goes on after it
_interrupted_s = float("-inf")
_exit_code = 1  # of an exception


def stop_requested() -> bool:
    """Return whether a signal has asked training to stop."""
    return bool(_training) and _training.training


@contextlib.contextmanager
def stop_requests(lost: Callable[[], str]) -> Iterator[StopRequest]:
    """Yield the request to stop that signals make during a ``with`` block; they do nothing else.

    ``lost`` returns what is lost if the third Ctrl-C ends the process.
    """
    global _training
    _training = StopRequest(lost)
    before = handle(_training.receive)
    try:
        yield _training
    finally:
        _training.training = False
        for number, handler in before.items():
            signal.signal(number, handler)


def handle(handler: Handler) -> dict[int, Any]:
    """Set the handler of all signals but ignored ones (nohup, a background job); return the handlers before."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in NUMBERS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    return before


def _end_at_once(number: int, _: FrameType | None = None) -> None:
    """End the process: there is nothing to save yet."""
    _say(f"interrupted ({signal.Signals(number).name})")
    os._exit(128 + number)


def _interrupt(number: int, _: FrameType | None = None) -> None:
    """Raise :class:`Interrupted`, unless the program is already ending because of a signal."""
    global _interrupted_s
    now = time.monotonic()
    if _training:
        _training.receive(number)
    elif now - _interrupted_s > _BURST_S:
        _interrupted_s = now
        raise Interrupted(number)


@contextlib.contextmanager
def no_interrupts() -> Iterator[None]:
    """Let signals interrupt nothing during a ``with`` block of seconds, in which a process ends anyway."""
    global _interrupted_s
    before, _interrupted_s = _interrupted_s, float("inf")
    try:
        yield
    finally:
        _interrupted_s = before


def start_program() -> None:
    """Prepare the process for signals; the program calls it first, because importing torch takes seconds."""
    handle(_end_at_once)
    # The first one registered runs last. It skips the end of the interpreter, which takes long and resets signals.
    atexit.register(lambda: os._exit(_exit_code))
    sys.unraisablehook = _signal_again
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_leave_to_parent)


@contextlib.contextmanager
def program() -> Iterator[None]:
    """Enclose a whole program, which ends soon after the block, with the code of the SystemExit in it."""
    global _exit_code
    try:
        handle(_interrupt)
        yield
    except SystemExit as error:
        _exit_code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        raise
    except KeyboardInterrupt as error:
        _exit_code = getattr(error, "code", 130)
        raise SystemExit(_exit_code) from None
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        handle(lambda *_: os._exit(_exit_code))
        timer = threading.Timer(_MAX_END_S, os._exit, [_exit_code])
        timer.daemon = True
        timer.start()


def _signal_again(unraisable: sys.UnraisableHookArgs) -> None:
    """Repeat a signal whose exception came in a callback that may not raise, as of a fork or the garbage collector."""
    global _interrupted_s
    error = unraisable.exc_value
    if not isinstance(error, Interrupted):
        sys.__unraisablehook__(unraisable)
        return
    _interrupted_s = float("-inf")
    again = threading.main_thread().ident, error.code - 128
    timer = threading.Timer(0.1, signal.pthread_kill, again)
    timer.daemon = True
    timer.start()


def _leave_to_parent() -> None:
    for number in NUMBERS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


def _say(text: str) -> None:
    """Write a line to the standard error output, from any place of the program."""
    start = "\n" if os.isatty(2) else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{start}{program_file()}: {text}\n".encode())
