"""Whether a run may start or resume in its folder, and from which checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sagan.errors import UserError
from sagan.io import locked
from sagan.recipes import RunConfig, config_from_dict, differences
from sagan.train.checkpoint import BEST, CheckpointError, checkpoints_in, load_latest
from sagan.train.logs import METRICS
from sagan.train.state import RunState, check_tensors, expected_tensors

# May change when a run resumes: its length, its paths, and settings that do not affect the results.
_MAY_CHANGE = (
    "data", "out", "iterations", "device", "images.workers", "images.cache_mib", "step.compile",
    "step.channels_last", "step.checkpoint_activations",
)  # fmt: skip
_MAY_CHANGE_GROUPS = ("output.", "images.check", "health.", "evaluation.")

# A checkpoint to resume from, and its contents.
Saved = tuple[Path, RunState]


@contextlib.contextmanager
def run_lock(out: Path, *, resume: bool) -> Iterator[None]:
    """Keep trainings of other processes out of a folder. One to be resumed is not made; no empty one is left."""
    made = not resume and not out.exists()
    if made:
        out.mkdir(parents=True, exist_ok=True)
    lock = locked(out / ".lock", f"another training run is using {out}")
    try:
        with lock if out.is_dir() else contextlib.nullcontext():
            yield
    finally:
        if made:
            with contextlib.suppress(OSError):
                out.rmdir()  # unless it holds something


def check_start(config: RunConfig, *, resume: bool, accept_changes: bool = False) -> Saved | None:
    """Return the checkpoint to resume from and its contents, or None for a new run. Needs no images.

    Raises:
        CheckpointError: if a new run finds one in ``config.out``, or a resumed one none or another configuration.
    """
    if not resume:
        if checkpoints_in(config.out / "checkpoints"):
            raise CheckpointError(f"{config.out} holds a run already; use --resume, or choose another --out")
        return None
    path, state = load_latest(config.out)
    refused = {
        name: values
        for name, values in differences(config_from_dict(state["config"]), config).items()
        if name not in _MAY_CHANGE and not name.startswith(_MAY_CHANGE_GROUPS)
    }
    if refused and not accept_changes:
        changes = "; ".join(f"{name} was {was!r}, now {now!r}" for name, (was, now) in refused.items())
        raise CheckpointError(
            f"{path} was made with another configuration: {changes}. To resume with the new one, add --accept-changes"
        )
    expected = expected_tensors(config)
    try:
        check_tensors(state["generator"], expected["generator"], "generator")
        check_tensors(state["discriminator"], expected["discriminator"], "discriminator")
    except UserError as error:
        raise CheckpointError(
            f"{path} holds networks that do not fit this configuration ({error}); --accept-changes cannot change that"
        ) from error
    return path, state


def images_of(saved: Saved | None) -> tuple[Path, str] | None:
    """Return a checkpoint's path and the fingerprint of its images, without its weights."""
    return None if saved is None else (saved[0], saved[1]["fingerprint"])


def check_images(begun: tuple[Path, str] | None, fingerprint: str, *, accept_changes: bool = False) -> None:
    """Raise :class:`CheckpointError` if the run to resume was made with other images, unless that is accepted."""
    if begun is not None and begun[1] != fingerprint and not accept_changes:
        raise CheckpointError(f"the run of {begun[0]} was made with other images than those found now")


def has_started(out: Path) -> bool:
    """Whether a folder holds files of a run, with or without a checkpoint to resume from."""
    metrics = out / METRICS
    return (out / "checkpoints" / BEST).exists() or (metrics.is_file() and metrics.stat().st_size > 0)


def check_unused(out: Path) -> None:
    """Raise :class:`CheckpointError` if a folder without a checkpoint holds files of a run that has started."""
    if has_started(out):
        raise CheckpointError(
            f"{out} holds a run that ended before its first checkpoint; delete it, or choose another --out "
            "(--auto-resume restarts it)"
        )
