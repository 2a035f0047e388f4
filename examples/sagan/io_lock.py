"""A file that one process at a time holds."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from sagan.errors import UserError


@contextlib.contextmanager
def locked(path: Path, held: str) -> Iterator[None]:
    """Hold a lock for a ``with`` block; it is gone with the process, however that ends, and so is the file.

    Where the file system knows no locks nothing is held.

    Args:
        path: of the lock's file.
        held: what to say if another process holds it.

    Raises:
        UserError: another process holds it.
    """
    while True:
        with path.open("a+") as file:
            try:
                _lock(file.fileno())
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                    raise UserError(held) from error
            if not _is_still(path, file.fileno()):  # its last holder has removed it in between
                continue
            try:
                yield
            finally:
                if _is_still(path, file.fileno()):
                    with contextlib.suppress(OSError):  # Windows removes no open file
                        path.unlink()
            return


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: workers would hold it too
