"""Says what a file or folder is that was given for another, and which command takes it."""

from __future__ import annotations

import shlex
from pathlib import Path

from sagan.names import program_name

_PREPARED = ("manifest.json", "images.npy")
_METRICS, _CONFIG = "metrics.jsonl", "config.json"
_ARCHIVES = (".tar", ".gz", ".tgz", ".zip", ".parquet")
_WEIGHTS = (".pth", ".npz", ".safetensors")


def holds_prepared_set(path: Path) -> bool:
    """Return whether a folder holds a prepared set, or the remains of one."""
    return any((path / name).is_file() for name in _PREPARED)


def holds_run(path: Path) -> bool:
    """Return whether a folder holds a training run, with or without a checkpoint."""
    return (path / _METRICS).is_file() or any((path / "checkpoints").glob("*.pt"))


def is_archive_or_weights(path: Path) -> bool:
    """Return whether a file's name ends like an archive of images, or like weights of another program."""
    return path.suffix.lower() in _ARCHIVES + _WEIGHTS


def found_at(path: Path) -> str:
    """Return what is at a path where something else was expected, and the command that takes it."""
    found, command = _what_is(path)
    return f"{found}. This takes it:\n  {program_name()} {command}" if command else found


def _what_is(path: Path) -> tuple[str, str]:
    """Return what a path is, and a command for it; "" for none."""
    name, given = str(path), shlex.quote(str(path))
    if not path.exists():
        above = next((folder for folder in path.absolute().parents if folder.is_dir()), path)
        return f"{name}, which does not exist (the nearest folder above it is {above})", ""
    if holds_prepared_set(path):
        return f"the prepared set of images {name}", f"train --data {given} --out RUN"
    if holds_run(path):
        if any((path / "checkpoints").glob("*.pt")):
            return f"the run in {name}", f"sample --source {given}"
        return f"the run in {name}, which has no checkpoint yet", f"train --resume --out {given} --data DATA"
    if (path / _CONFIG).is_file():
        return (
            f"{name} with the configuration of a run that has not started",
            f"train --out {given} --data DATA",
        )
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix == ".pt":
            return f"the checkpoint {name}", f"sample --source {given}"
        if suffix in _ARCHIVES:
            return f"the archive {name}", f"prepare --source {given} --out SET"
        if suffix in _WEIGHTS:
            return f"the weights {name}", f"convert --from CODE_BASE --weights {given} --out RUN"
        return f"the file {name}", ""
    folders = [
        each for each in sorted(path.iterdir())[:1000] if each.is_dir() and not each.name.startswith(".")
    ]
    if len(folders) > 1 or path / "train" in folders:
        return f"the folder {name}, with {len(folders)} folders and no run", f"train --data {given} --out RUN"
    return f"the folder {name}, which holds no run", ""
