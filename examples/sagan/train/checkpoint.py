"""Checkpoints: their contents, atomic writing, and reading that runs no code from the file."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from sagan.errors import UserError
from sagan.io import atomic_write, atomic_write_text, file_sha256, first_line, load_plain

FORMAT = "sagan-layers trainer"
VERSION = 2
BEST = "best.pt"
_NAME = re.compile(r"iteration_(\d{9})\.pt")

logger = logging.getLogger(__name__)

StateDict = dict[str, Any]


class TrainerState(TypedDict):
    """What :class:`sagan.train.update.Trainer` restores. Values are tensors, plain values, lists and dictionaries."""

    config: dict[str, Any]  # RunConfig.to_dict()
    iteration: int  # iterations done
    batches_drawn: int  # parts of batches drawn from the loader
    generator: StateDict
    discriminator: StateDict
    average: StateDict | None  # torch's AveragedModel of G; None without a moving average
    g_optimizer: StateDict
    d_optimizer: StateDict
    scaler: StateDict  # torch's GradScaler; empty except in fp16
    torch_rng: Tensor  # torch's generator on the CPU, the same on every rank
    cuda_rng: Tensor | None  # torch's generator on the GPU, if the run uses one
    means: StateDict  # sums and counts of rank 0's measurements since the last log
    means_of_processes: list[StateDict]  # "means" of every rank, as numbers
    guard: dict[str, int]  # consecutive iterations with a skipped update, and the first of them
    skipped: int  # updates skipped since the last log
    labels_in_use: Tensor  # int64 [K], classes with images


class RunState(TrainerState):
    """The contents of a checkpoint, except its format and version."""

    fingerprint: str  # of the images
    class_names: list[str]  # by label
    best_score: float | None  # score of best.pt; less is better
    best_score_of: str  # kind of that score
    alarm: dict[str, Any]  # state of the collapse alarm


# Version 2 gained these keys later. Checkpoints without them mean this.
_ADDED_KEYS: dict[str, Any] = {
    "cuda_rng": None,
    "means_of_processes": [],
    "guard": {"in_a_row": 0, "since": -1},
    "skipped": 0,
}


class CheckpointError(UserError):
    """A checkpoint cannot be used."""


def save_checkpoint(folder: Path, state: RunState, *, keep: int) -> Path:
    """Write a checkpoint and its SHA-256 digest, delete all but it and the ``keep - 1`` before it, and return its path.

    Raises:
        CheckpointError: if it cannot be written, for example because the disk is full.
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
        raise CheckpointError(
            f"{path} could not be written ({first_line(error)}; {free / 1e6:,.1f} MB are free there); "
            "earlier checkpoints are intact"
        ) from error


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint at ``path``: itself, or the latest of the run in that folder."""
    return _candidates(path)[-1]


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
    for candidate in reversed(_candidates(path)):
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
    """Return the contents of a checkpoint, on the CPU.

    Raises:
        CheckpointError: if the file is damaged, from another program, or of another version.
    """
    digest = _digest_path(path)
    if digest.is_file() and digest.read_text().strip() != file_sha256(path):
        raise CheckpointError(f"{path} is damaged: it is not the file that was written (its SHA-256 differs)")
    try:
        contents = load_plain(path)
    except UserError as error:
        raise CheckpointError(f"{path} is not a readable checkpoint ({error})") from error
    if not isinstance(contents, dict) or contents.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this trainer")
    version = contents.pop("version", None)
    if version != VERSION:
        raise CheckpointError(f"{path} is of version {version}; this trainer reads version {VERSION}")
    state = {**_ADDED_KEYS, **contents}
    if missing := RunState.__required_keys__ - state.keys():
        raise CheckpointError(
            f"{path} is not a checkpoint of this trainer: it lacks {', '.join(sorted(missing))}"
        )
    return cast(RunState, state)


def _candidates(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for folder in (path / "checkpoints", path):
        if found := checkpoints_in(folder):
            return found
    what = "a run's folder without checkpoints" if path.is_dir() else "no file or folder"
    raise CheckpointError(f"expected a checkpoint or the folder of a run at {path}, found {what}")


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")
