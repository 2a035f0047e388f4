"""A first signal asks the run to stop; a second one acts as usual."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def first_signal() -> Iterator[list[int]]:
    """Yield a list that gets the number of the first SIGINT or SIGTERM."""
    received: list[int] = []
    handlers: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def receive(number: int, frame: object) -> None:
        received.append(number)
        restore()

    try:
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            handlers[number] = signal.signal(number, receive)
    except ValueError:  # not the main thread, which gets the signals
        handlers.clear()
    try:
        yield received
    finally:
        restore()
