"""A disk that is full after some bytes of a file: the system's limit on the size of a file, for a ``with`` block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

Full = Callable[[int], contextlib.AbstractContextManager[None]]


@pytest.fixture
def full_disk() -> Full:
    resource = pytest.importorskip("resource")  # not on Windows

    @contextlib.contextmanager
    def full(most_bytes: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return full
