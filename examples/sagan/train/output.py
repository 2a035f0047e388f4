"""Everything but metrics that a run writes to its folder: configuration, samples, attention maps and checkpoints."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sagan.data import ImageDataset
from sagan.errors import NotFiniteError, UserError
from sagan.io import atomic_write_text
from sagan.recipes import CONFIG, RunConfig
from sagan.report.figures import class_labels, default_points, draw_attention, save_grid
from sagan.sampling import generate, sample_inputs
from sagan.train.checkpoint import (
    BEST,
    CheckpointError,
    load_checkpoint,
    save_best,
    save_checkpoint,
    set_aside_later,
)
from sagan.train.health import CollapseAlarm, TrainingError, diversity
from sagan.train.logs import RunLog
from sagan.train.resume import Saved
from sagan.train.state import RunState, check_values
from sagan.train.update import Trainer
from sagan_layers import SelfAttention2d

_ATTENTION_IMAGES = 4

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """The result of an evaluation."""

    value: float  # less is better
    of: str  # its kind; scores of different kinds are not compared
    figures: dict[str, float]  # to log, by name


class RunOutput:
    """Writes the files of a run, on rank 0, and restores the run from its checkpoint.

    Attributes:
        checkpoint: the last checkpoint, or the one that the run resumed from.
    """

    def __init__(self, trainer: Trainer, alarm: CollapseAlarm, dataset: ImageDataset) -> None:
        self._config = trainer.config
        self._trainer = trainer
        self._alarm = alarm
        self._class_names = list(dataset.class_names)
        self._fingerprint = dataset.fingerprint()
        self._latents, self._labels = _grid_inputs(trainer.config, trainer.labels_in_use)
        self._real_diversity = _real_diversity(dataset, self._labels)
        self.checkpoint: Path | None = None
        self._best_score: float | None = None
        self._best_score_of = ""

    def state(self) -> RunState:
        """Return what to save.

        Raises:
            TrainingError: if a weight or moment is not finite: no run could resume.
        """
        trained = self._trainer.state_dict()
        try:
            check_values(trained)
        except UserError as error:
            raise TrainingError(f"{error}; nothing was saved, earlier checkpoints are intact") from error
        return {
            **trained,
            "fingerprint": self._fingerprint,
            "class_names": self._class_names,
            "best_score": self._best_score,
            "best_score_of": self._best_score_of,
            "alarm": self._alarm.state_dict(),
        }

    def restore(self, saved: Saved) -> None:
        """Restore the run from a checkpoint, on every rank."""
        path, state = saved
        self._trainer.load_state_dict(state)
        self._alarm.load_state_dict(state["alarm"])
        self.checkpoint = path
        self._best_score, self._best_score_of = state["best_score"], state["best_score_of"]

    def begin(self) -> None:
        """Save the configuration, and set aside files of later iterations than the checkpoint's."""
        save_config(self._config)
        if self.checkpoint is not None:
            set_aside_later(self.checkpoint)
        for path in sorted((self._config.out / "evaluation").glob("iteration_*.json")):
            number = path.name.split("_")[1]
            if number.isdigit() and int(number) > self._trainer.iteration:
                dropped = path.parent / "dropped" / path.name
                dropped.parent.mkdir(exist_ok=True)
                path.replace(dropped)

    def save_samples(self, observe: Callable[[Trainer], None] | None, log: RunLog) -> float | None:
        """Save and log a grid and attention maps; return how much samples differ, as a share of real images.

        Samples with a NaN or an infinity are not saved: a warning is logged, and the result is None.
        """
        try:
            return self._save_samples(observe, log)
        except NotFiniteError as error:
            logger.warning("iteration %d: no samples saved (%s)", self._trainer.iteration, error)
            return None

    def evaluated(self, evaluate: Callable[[Trainer], Score]) -> Score | None:
        """Return the score of G; None, after a warning, if its samples hold a NaN or an infinity."""
        try:
            return evaluate(self._trainer)
        except NotFiniteError as error:
            if self._trainer.world.is_main:
                logger.warning("iteration %d: not evaluated (%s)", self._trainer.iteration, error)
            return None

    def _save_samples(self, observe: Callable[[Trainer], None] | None, log: RunLog) -> float:
        config, trainer = self._config, self._trainer
        columns = config.output.grid_columns
        images = generate(
            trainer.sampling_generator, self._latents, self._labels, batch_size=config.batch_size
        )
        conditional = bool(config.network.head_classes)
        names = class_labels(self._class_names, self._labels.tolist()) if conditional else None
        file = f"iteration_{trainer.iteration:09d}.png"
        pictures = {"samples": config.out / "samples" / file}
        save_grid(pictures["samples"], images, columns=columns, row_names=names and names[::columns])
        if any(isinstance(layer, SelfAttention2d) for layer in trainer.generator.modules()):
            count = len(self._labels)
            chosen = torch.linspace(0, count - 1, min(_ATTENTION_IMAGES, count)).long()
            pictures["attention"] = config.out / "attention" / file
            draw_attention(
                pictures["attention"],
                trainer.sampling_generator,
                self._latents[chosen],
                self._labels[chosen],
                default_points(config.network.resolution),
                names=names and [names[int(index)] for index in chosen],
            )
        log.show(trainer.iteration, pictures)
        if observe is not None:
            observe(trainer)
        return diversity(images, self._labels) / max(self._real_diversity, 1e-6)

    def save_checkpoint(self) -> None:
        """Save a checkpoint of this iteration; all ranks call this."""
        self._trainer.share_means()
        folder, keep = self._config.out / "checkpoints", self._config.output.keep_checkpoints
        path = self._trainer.world.run_on_main(lambda: str(save_checkpoint(folder, self.state(), keep=keep)))
        self.checkpoint = Path(path)

    def keep_best(self, score: Score) -> None:
        """Replace best.pt if this score is better than its, or of another kind; all ranks call this."""
        self._trainer.share_means()
        self._trainer.world.run_on_main(lambda: self._keep_best(score))

    def _keep_best(self, score: Score) -> None:
        best_score = self._best_score if score.of == self._best_score_of else None
        if not math.isfinite(score.value) or (best_score is not None and score.value >= best_score):
            return
        self._best_score, self._best_score_of = score.value, score.of
        folder = self._config.out / "checkpoints"
        if not _is_as_good(folder / BEST, score):
            save_best(folder, self.state())


def save_config(config: RunConfig) -> Path:
    """Write the resolved configuration to config.json in the run's folder and return its path."""
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / CONFIG
    atomic_write_text(path, json.dumps(config.to_dict(), indent=2) + "\n")
    return path


def _is_as_good(best: Path, score: Score) -> bool:
    """Whether best.pt, perhaps from later iterations before a crash, is at least as good as this score."""
    if not best.is_file():
        return False
    try:
        state = load_checkpoint(best)
    except CheckpointError:
        return False
    best_score = state["best_score"]
    return best_score is not None and state["best_score_of"] == score.of and best_score <= score.value


def _grid_inputs(config: RunConfig, labels_in_use: Tensor) -> tuple[Tensor, Tensor]:
    """Return latents and labels for the grid, the same throughout a run: one class in each row."""
    rows = config.output.grid_rows
    if config.network.head_classes:
        rows = min(rows, len(labels_in_use))
    chosen = torch.linspace(0, len(labels_in_use) - 1, rows).round().long()
    labels = labels_in_use[chosen].repeat_interleave(config.output.grid_columns)
    latents, _ = sample_inputs(range(len(labels)), config.network, config.seed)
    return latents, labels


def _real_diversity(dataset: ImageDataset, labels: Tensor) -> float:
    """Return how much real images of the grid's classes differ, from as many of each class as the grid has."""
    chosen = []
    for label in torch.unique(labels):
        of_class = (dataset.labels == label).nonzero().flatten()
        chosen.append(of_class[: max(2, int((labels == label).sum()))])
    return diversity(*dataset.fetch(torch.cat(chosen).tolist()))
