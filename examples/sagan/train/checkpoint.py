"""Checkpoints: their contents, atomic writing, and reading that runs no code from the file."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from sagan.contents import found_at, is_archive_or_weights
from sagan.errors import FailureError, UserError, shown
from sagan.io import atomic_write, atomic_write_text, file_sha256, first_line, load_plain, open_regular
from sagan.train.state import RunState, check_state

FORMAT = "sagan-layers trainer"
VERSION = 2
BEST = "best.pt"
_SHA256 = re.compile(rb"[0-9a-f]{64}")
_NAME = re.compile(r"iteration_(\d{9})\.pt")

logger = logging.getLogger(__name__)

# Version 2 gained these keys later. Checkpoints without them mean this.
_ADDED_KEYS: dict[str, Any] = {
    "cuda_rng": None,
    "means_of_processes": [],
    "guard": {"in_a_row": 0, "since": -1},
    "skipped": 0,
}


class CheckpointError(UserError):
    """A checkpoint cannot be used."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint cannot be written."""

    exit_code = FailureError.exit_code


def save_checkpoint(folder: Path, state: RunState, *, keep: int) -> Path:
    """Write a checkpoint and its SHA-256 digest, delete all but it and the ``keep - 1`` before it, and return its path.

    Raises:
        CheckpointWriteError: if it cannot be written, for example because the disk is full.
    """
    path = folder / f"iteration_{state['iteration']:09d}.pt"
    _write(path, state)
    for old in [each for each in checkpoints_in(folder) if each.name <= path.name][:-keep]:
        old.unlink()
        _digest_path(old).unlink(missing_ok=True)
    return path


def save_best(folder: Path, state: RunState) -> Path:
    """Write the checkpoint with the best score so far in place of the one before. It is never deleted."""
    path = folder / BEST
    _write(path, state)
    return path


def _write(path: Path, state: RunState) -> None:
    """Write a checkpoint that gets its name only when it is complete and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = _digest_path(path)
    try:
        with atomic_write(path) as file:
            torch.save({"format": FORMAT, "version": VERSION, **state}, file)
            # After a crash the new file may lack a digest; it must never have the old file's.
            digest.unlink(missing_ok=True)
        atomic_write_text(digest, file_sha256(path) + "\n")
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
        free = shutil.disk_usage(path.parent).free
        raise CheckpointWriteError(
            f"{path} could not be written ({first_line(error)}; {free / 1e6:,.1f} MB are free there); "
            "earlier checkpoints are intact"
        ) from error


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_file())


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint at ``path``: itself, or the latest of the run in that folder."""
    return kept_checkpoints(path)[-1]


def set_aside_later(path: Path) -> None:
    """Rename the checkpoints later than this one.

    They are damaged, else the run would resume from them. So they must not count among those to keep.
    """
    for each in checkpoints_in(path.parent):
        if each.name > path.name:
            each.replace(each.with_suffix(".pt.damaged"))
            _digest_path(each).unlink(missing_ok=True)


def load_latest(path: Path) -> tuple[Path, RunState]:
    """Return the latest readable checkpoint at ``path``, and its contents. Unreadable ones are logged."""
    problems: list[str] = []
    for candidate in reversed(kept_checkpoints(path, option="out")):
        try:
            state = load_checkpoint(candidate)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            for problem in problems:
                logger.warning("%s; resuming from %s, which is older", problem, candidate.name)
            return candidate, state
    raise CheckpointError("; ".join(problems))


def load_checkpoint(path: Path) -> RunState:
    """Return the contents of a checkpoint, on the CPU, checked by :func:`sagan.train.state.check_state`.

    Raises:
        CheckpointError: if the file is damaged, from another program, or of another version, or if a value cannot be
            one of a run. The message names the file and the value.
    """
    try:
        digest = _saved_digest(path)
        if digest is not None and digest != file_sha256(path):
            raise CheckpointError(
                f"{path} is damaged: it is not the file that was written (its SHA-256 differs)"
            )
        contents = load_plain(path)
    except CheckpointError:
        raise
    except (UserError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable checkpoint ({error})") from error
    if not isinstance(contents, dict) or contents.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this trainer")
    version = contents.pop("version", None)
    if type(version) is not int or version != VERSION:
        raise CheckpointError(f"{path} is of version {shown(version)}; this trainer reads version {VERSION}")
    try:
        return check_state({**_ADDED_KEYS, **contents})
    except UserError as error:
        raise CheckpointError(f"{path} holds no state of a run: {error}") from error


def _saved_digest(path: Path) -> str | None:
    """Return the digest saved beside a checkpoint; None if there is none, as after a crash."""
    digest = _digest_path(path)
    try:
        with open_regular(digest) as file:
            words = file.read(200).split()
    except FileNotFoundError:
        return None
    if not words or not _SHA256.fullmatch(words[0]):
        raise CheckpointError(
            f"{path} cannot be checked: expected the 64 hex digits of its SHA-256 in {digest}, found something else; "
            "without that file, only the checksums inside the checkpoint count"
        )
    return words[0].decode()


def kept_checkpoints(path: Path, *, option: str = "source") -> list[Path]:
    """Return the checkpoints at ``path``, oldest first: itself, or those of the run in that folder, at least one.

    An error names the option that the path came from.
    """
    if path.is_file() and not is_archive_or_weights(path):
        return [path]
    for folder in (path / "checkpoints", path):
        if found := checkpoints_in(folder):
            return found
    raise CheckpointError(f"{option}: expected the folder of a run, or a checkpoint, got {found_at(path)}")


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")
