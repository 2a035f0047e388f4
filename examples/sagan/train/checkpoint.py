"""Checkpoints: written whole or not at all, read without running anything from them."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from sagan.errors import UserError
from sagan.io import file_sha256

FORMAT = "sagan-layers trainer"
VERSION = 2
BEST = "best.pt"
_NAME = re.compile(r"iteration_(\d{9})\.pt")

logger = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint that cannot be used, in plain words."""


def save_checkpoint(folder: Path, contents: dict[str, Any], *, iteration: int, keep: int) -> Path:
    """Write a checkpoint and delete all but it and the ``keep - 1`` before it.

    The file appears under its name only once it is complete and on the disk. Its SHA-256 lies beside it.

    Args:
        folder: where checkpoints are; made if missing.
        contents: tensors, numbers, strings, and lists and dictionaries of them.
        iteration: gives the file its name.
        keep: how many to keep, this one included.

    Returns:
        The path of the file.
    """
    path = folder / f"iteration_{iteration:09d}.pt"
    _write(path, contents)
    for old in [each for each in checkpoints_in(folder) if each.name <= path.name][:-keep]:
        old.unlink()
        _digest_path(old).unlink(missing_ok=True)
    return path


def save_best(folder: Path, contents: dict[str, Any]) -> Path:
    """Write the checkpoint with the best score so far, in place of the one before; it is never deleted."""
    path = folder / BEST
    _write(path, contents)
    return path


def _write(path: Path, contents: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **contents}, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        with contextlib.suppress(OSError):
            temporary.unlink()
        free = shutil.disk_usage(path.parent).free
        raise CheckpointError(
            f"{path} could not be written ({_first_line(error)}; {free / 1e6:,.1f} MB are free there); "
            "the checkpoints before it are whole"
        ) from error
    digest = _digest_path(path)
    partial_digest = digest.with_suffix(".partial-sha256")
    with partial_digest.open("w") as text:
        text.write(file_sha256(temporary) + "\n")
        text.flush()
        os.fsync(text.fileno())
    # A crash between the two leaves a checkpoint beside a digest of another one: it must not count as damaged.
    digest.unlink(missing_ok=True)
    temporary.replace(path)
    partial_digest.replace(digest)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Put a folder's new names on the disk; where folders cannot be opened (Windows), nothing is needed."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, the oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that ``path`` means: itself, or the latest of the run in that folder.

    Raises:
        CheckpointError: if there is none.
    """
    return _candidates(path)[-1]


def set_aside_later(path: Path) -> list[Path]:
    """Rename the checkpoints that are later than this one, and return their new paths.

    A run that goes on from here has passed them over, because they are damaged: they must not count among those that
    are kept.
    """
    found = []
    for later in checkpoints_in(path.parent):
        if later.name > path.name:
            found.append(later.replace(later.with_suffix(".pt.damaged")))
            _digest_path(later).unlink(missing_ok=True)
    return found


def load_latest(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the latest checkpoint that can be read, and its contents; the ones passed over are logged.

    Args:
        path: a checkpoint, or the folder of a run.

    Raises:
        CheckpointError: if there is none, or none that can be read.
    """
    problems: list[str] = []
    for candidate in reversed(_candidates(path)):
        try:
            contents = load_checkpoint(candidate)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            for problem in problems:
                logger.warning("%s; going on from %s, which is older", problem, candidate.name)
            return candidate, contents
    raise CheckpointError("; ".join(problems))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return the contents of a checkpoint, on the CPU.

    Raises:
        CheckpointError: if the file is torn or changed, not one of this trainer's, or of another version.
    """
    digest = _digest_path(path)
    if digest.is_file() and digest.read_text().strip() != file_sha256(path):
        raise CheckpointError(f"{path} is damaged: it is not the file that was written (its SHA-256 differs)")
    try:
        contents = load_plain(path)
    except UserError as error:
        raise CheckpointError(f"{path} is not a readable checkpoint ({error})") from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this trainer")
    if contents.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is of version {contents.get('version')}; this trainer reads version {VERSION}"
        )
    return contents


def load_plain(path: Path) -> Any:
    """Return what ``torch.save`` wrote, on the CPU; nothing in the file is run.

    Raises:
        UserError: the reason, if it cannot be read, or holds more than tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:
        raise UserError(_first_line(error)) from error
    except Exception as error:  # of many kinds; torch's words advise to unpickle the file all the same
        raise UserError("it holds more than tensors and plain values, or is no file of torch.save") from error


def _candidates(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for folder in (path / "checkpoints", path):
        found = checkpoints_in(folder)
        if found:
            return found
    what = "a run's folder without checkpoints" if path.is_dir() else "no file or folder"
    raise CheckpointError(f"expected a checkpoint or the folder of a run at {path}, found {what}")


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
