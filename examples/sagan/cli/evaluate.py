"""The subcommand ``evaluate``: its options, and what it does."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from sagan.distributed import init_world
from sagan.evaluation import results as report
from sagan.evaluation.config import EvaluationConfig
from sagan.evaluation.evaluator import Evaluator
from sagan.evaluation.feature_networks import load_feature_network
from sagan.evaluation.real_features import default_cache
from sagan.evaluation.real_images import open_real_images
from sagan.sampling import Weights, load_generator
from sagan.train.checkpoint import find_checkpoint

# The others wait while the first measures: precision and recall of 50,000 images take long on a CPU.
_TIMEOUT_MINUTES = 720.0


@dataclass(frozen=True)
class Evaluate:
    """Measure a trained run: FID, Inception Score, KID, intra-FID, precision and recall, each with its protocol.

    Features of the real images are computed once and kept. Started by torchrun, processes share the work; the
    figures do not depend on how many they are. Writes a JSON file and a line of results.md.

    Attributes:
        source: folder of a run, or a checkpoint.
        evaluation: what and how.
        weights: moving average ("ema"), the weights themselves ("raw"), or the average if there is one.
        out: folder to write to; by default "evaluation" in the run's.
        device: "auto", "cpu", "cuda", ...
    """

    source: Path
    evaluation: Annotated[EvaluationConfig, tyro.conf.arg(name="")] = field(default_factory=EvaluationConfig)
    weights: Weights = "auto"
    out: Path | None = None
    device: str = "auto"


def run(command: Evaluate) -> int:
    """Run ``evaluate`` and return the exit code."""
    with init_world(command.device, timeout_minutes=_TIMEOUT_MINUTES) as world:
        checkpoint = find_checkpoint(command.source)
        trained = load_generator(checkpoint, world.device, weights=command.weights)
        config = command.evaluation
        network = load_feature_network(config, world.device, resolution=trained.config.network.resolution)
        reals = open_real_images(config, trained.config, trained.class_names, world)
        evaluator = Evaluator(config, reals, world, network=network, progress=True)
        if world.is_main:
            print(report.about_reals(evaluator, config.cache or default_cache()))
        evaluation = evaluator.evaluate(
            trained.generator, trained.labels_in_use, weights="ema" if trained.averaged else "raw"
        )
        if world.is_main:
            subject = report.Subject(
                checkpoint, trained.iteration, trained.config.recipe, report.device_name(world.device)
            )
            print(report.table(evaluation, subject))
            path = report.save(evaluation, subject, command.out or _folder_of(checkpoint) / "evaluation")
            print(f"Written to {path}, and a line to {path.with_name(report.RESULTS)}")
    return 0


def _folder_of(checkpoint: Path) -> Path:
    """Return the folder of the run that a checkpoint is of."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
