"""Files that appear whole or not at all, digests of their contents, safe loading, and locks."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from sagan.errors import UserError

_READ_BYTES = 2**20


@contextlib.contextmanager
def atomic_write(path: Path, *, sync: bool = True, shared: bool = False) -> Iterator[BinaryIO]:
    """Yield a binary file that takes the name ``path`` once it is complete and on the disk.

    A reader sees the old contents or the new ones, also after a crash. If the block raises, the old file stays.
    ``sync=False`` is faster, but a power failure may lose the file: for pictures. With ``shared``, several processes
    may write the file at once. Errors name ``path``, not the file that is written first.
    """
    number = f".{secrets.token_hex(4)}" if shared else ""
    temporary = path.with_name(f"{path.name}{number}.partial")
    try:
        with naming(path, temporary), temporary.open("wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        with naming(path, temporary):
            temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(path.parent)


@contextlib.contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Name this path in an ``OSError`` of a ``with`` block that names none (a full disk's), or the temporary file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, temporary and str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def atomic_write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file with :func:`atomic_write`."""
    with atomic_write(path) as file:
        file.write(text.encode())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk; does nothing where folders cannot be opened (Windows)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; raise ``OSError`` unless it is a regular one: a pipe would block, a device never end."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(
            errno.EINVAL, "expected a regular file, got a folder, pipe, device or socket", str(path)
        )
    return os.fdopen(descriptor, "rb")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 digest of a file as 64 hex digits."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the elements of a tensor as bytes, in row-major order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def module_digest(module: nn.Module) -> str:
    """Return 64 hex digits of a module's parameters and buffers, names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def load_plain(path: Path, *, legacy: bool = False) -> Any:
    """Return what ``torch.save`` wrote, on the CPU; no code in the file is run.

    The checksums in the file are compared, which torch does not do. ``legacy`` accepts torch's format of before 1.6,
    which has none.

    Raises:
        UserError: if the file is damaged or another program's. The message does not name it.
    """
    try:
        with open_regular(path) as file:
            if file.read(4) == b"PK\3\4":
                _check_archive(file)
            elif not legacy:
                raise UserError("it is no archive of torch.save")
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except (OSError, RuntimeError) as error:
        raise UserError(first_line(error)) from error
    except Exception as error:  # of many types; torch's message advises to unpickle the file anyway
        raise UserError("it holds more than tensors and plain values, or is no file of torch.save") from error


def _check_archive(file: BinaryIO) -> None:
    """Raise :class:`UserError` if a member of a zip archive is compressed, or its CRC differs."""
    try:
        with zipfile.ZipFile(file) as archive:
            if any(each.compress_type or each.compress_size != each.file_size for each in archive.infolist()):
                raise zipfile.BadZipFile("a member is compressed")
            if (name := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{name!r} has another CRC")
    except Exception as error:  # of many types
        raise UserError(f"its archive is damaged ({first_line(error)})") from error


def read_json(path: Path) -> Any:
    """Return what a JSON file holds, or raise :class:`UserError`, whose message does not name the file."""
    try:
        with open_regular(path) as file:
            return json.loads(file.read())
    except (ValueError, RecursionError) as error:
        raise UserError(f"expected JSON, got something else ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def locked(path: Path, message: str) -> Iterator[None]:
    """Hold a lock file for a ``with`` block, or raise :class:`UserError` with this message if another process holds it.

    The system releases it when the process ends, however it ends. Without locks of the file system, the block runs
    unlocked. Blocks of one process may be nested.
    """
    # No fallback to a file that merely exists: such a lock would outlive a process that is killed.
    lock = FileLock(path, timeout=0, thread_local=False, is_singleton=True, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(message) from error
    except (NotImplementedError, OSError):
        pass
    try:
        yield
    finally:
        if lock.is_locked:
            if lock.lock_counter == 1:
                with contextlib.suppress(OSError):  # Windows removes no open file
                    path.unlink(missing_ok=True)
            lock.release()
