"""Checkpoints: written whole or not at all, read without running anything from them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from sagan.errors import UserError

FORMAT = "sagan-layers trainer"
VERSION = 1
_NAME = re.compile(r"iteration_(\d{9})\.pt")


class CheckpointError(UserError):
    """A checkpoint that cannot be used, in plain words."""


def save_checkpoint(folder: Path, contents: dict[str, Any], *, iteration: int, keep: int) -> Path:
    """Write a checkpoint and delete all but the ``keep`` latest.

    The file appears under its name only once it is complete and on the disk.

    Args:
        folder: where checkpoints are; made if missing.
        contents: tensors, numbers, strings, and lists and dictionaries of them.
        iteration: gives the file its name.
        keep: how many to keep, this one included.

    Returns:
        The path of the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"iteration_{iteration:09d}.pt"
    temporary = path.with_suffix(".partial")
    with temporary.open("wb") as file:
        torch.save({"format": FORMAT, "version": VERSION, **contents}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    for old in checkpoints_in(folder)[:-keep]:
        old.unlink()
    return path


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
    if path.is_file():
        return path
    for folder in (path / "checkpoints", path):
        found = checkpoints_in(folder)
        if found:
            return found[-1]
    what = "a run's folder without checkpoints" if path.is_dir() else "no file or folder"
    raise CheckpointError(f"expected a checkpoint or the folder of a run at {path}, found {what}")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return the contents of a checkpoint, on the CPU.

    Raises:
        CheckpointError: if the file is torn, not one of this trainer's, or of a newer version.
    """
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a torn or foreign file
        raise CheckpointError(f"{path} is not a readable checkpoint ({_first_line(error)})") from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this trainer")
    if contents.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is of version {contents.get('version')}; this trainer reads version {VERSION}"
        )
    return contents


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
