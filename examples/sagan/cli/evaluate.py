"""The subcommand ``evaluate``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from sagan.distributed import init_world
from sagan.errors import check_out_folder
from sagan.evaluation import results
from sagan.evaluation.config import EvaluationConfig
from sagan.evaluation.evaluator import Evaluator
from sagan.evaluation.feature_networks import load_feature_network
from sagan.evaluation.real_images import open_real_images
from sagan.sampling import Weights, load_generator
from sagan.train.checkpoint import find_checkpoint

# The other processes wait while the first computes: precision and recall of 50,000 images take hours on a CPU.
_TIMEOUT_MINUTES = 720.0


@dataclass(frozen=True)
class Evaluate:
    """Measure a trained run: FID, Inception Score, KID, intra-FID, precision and recall, each with its protocol.

    Features of the real images are computed once and cached. With torchrun, processes share the work; the figures do
    not depend on their number. Writes a JSON file and a row of results.md.

    Attributes:
        source: folder of a run, or a checkpoint.
        evaluation: what to evaluate, and how.
        weights: moving average ("ema"), current weights ("raw"), or the average if there is one ("auto").
        out: folder to write to; by default "evaluation" in the run's.
        device: "auto", "cpu", "cuda", ...
    """

    required: ClassVar[dict[str, str]] = {
        "inception-weights": "this, --feature-network or --proxy is required",
        "feature-network": "this, --inception-weights or --proxy is required",
        "proxy": "this, --inception-weights or --feature-network is required",
    }
    # What --help shows, in this order; the rest is in --help-all.
    common: ClassVar[tuple[str, ...]] = (
        *("--source", "--inception-weights", "--feature-network", "--feature-network-sha256", "--proxy"),
        *("--metrics", "--count", "--data", "--split", "--weights", "--out", "--device"),
    )

    source: Path
    evaluation: Annotated[EvaluationConfig, tyro.conf.arg(name="")] = field(default_factory=EvaluationConfig)
    weights: Weights = "auto"
    out: Path | None = None
    device: str = "auto"


def run(command: Evaluate) -> int:
    """Run ``evaluate`` and return the exit code."""
    if command.out is not None:
        check_out_folder(command.out)
    with init_world(command.device, timeout_minutes=_TIMEOUT_MINUTES) as world:
        checkpoint = find_checkpoint(command.source)
        trained = load_generator(checkpoint, world.device, weights=command.weights)
        # Before the images are checked, so that a missing file is reported at once.
        network = load_feature_network(
            command.evaluation, world.device, resolution=trained.config.network.resolution
        )
        real_images = open_real_images(command.evaluation, trained.config, trained.class_names, world)
        evaluator = Evaluator(command.evaluation, real_images, world, network=network, progress=True)
        if world.is_main:
            print(evaluator.describe_real_images())
        evaluation = evaluator.evaluate(
            trained.generator, trained.labels_in_use, weights="ema" if trained.averaged else "raw"
        )
        if world.is_main:
            subject = results.Subject(checkpoint, trained.iteration, trained.config.recipe, world.device)
            print(results.table(evaluation, subject))
            in_run = checkpoint.parent.name == "checkpoints"
            folder = checkpoint.parent.parent if in_run else checkpoint.parent
            path = results.save(evaluation, subject, command.out or folder / "evaluation")
            print(f"Written to {path}, and a row to {path.with_name(results.RESULTS)}")
    return 0
