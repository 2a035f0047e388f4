"""The subcommand ``evaluate``: its options, and what it does."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from sagan.checkpoints import find_checkpoint
from sagan.commands import Weights
from sagan.data import ImageFolderDataset, preflight, scan_image_tree
from sagan.errors import UserError
from sagan.evaluation import report
from sagan.evaluation.config import EvaluationConfig
from sagan.evaluation.evaluator import Evaluator, feature_network
from sagan.evaluation.group import Group, joined
from sagan.evaluation.reference import Reals, default_cache, folder_identity
from sagan.sampling import TrainedGenerator, load_generator
from sagan.training import pick_device


@dataclass(frozen=True)
class Evaluate:
    """Measure a trained run: FID, Inception Score, KID, intra-FID, precision and recall, each with its protocol.

    Features of the real images are computed once and kept. Started by torchrun, processes share the work; the
    figures do not depend on how many they are. Writes a JSON file and a line of results.md.

    Attributes:
        source: folder of a run, or a checkpoint.
        evaluation: what and how.
        data: root of the real images; by default the run's.
        split: folder below it to compare with; by default the run's ("train").
        weights: moving average ("ema"), the weights themselves ("raw"), or the average if there is one.
        out: folder to write to; by default "evaluation" in the run's.
        device: "auto", "cpu", "cuda", ...
    """

    source: Path
    evaluation: Annotated[EvaluationConfig, tyro.conf.arg(name="")] = field(default_factory=EvaluationConfig)
    data: Path | None = None
    split: str | None = None
    weights: Weights = "auto"
    out: Path | None = None
    device: str = "auto"


def run_evaluate(command: Evaluate) -> int:
    """Run ``evaluate`` and return the exit code."""
    with joined(pick_device(command.device)) as (device, group):
        checkpoint = find_checkpoint(command.source)
        trained = load_generator(checkpoint, device, weights=command.weights)
        config = command.evaluation
        network = feature_network(config, device, resolution=trained.config.network.resolution)
        reals = _open_reals(command, trained, group)
        evaluator = Evaluator(config, reals, device, network=network, group=group, progress=True)
        if group.is_first:
            how = "read from" if evaluator.facts.from_cache else "kept in"
            print(f"Features of {evaluator.facts.count:,} reals {how} {config.cache or default_cache()}")
        evaluation = evaluator.evaluate(
            trained.generator, trained.labels_in_use, weights="ema" if trained.averaged else "raw"
        )
        if group.is_first:
            subject = report.Subject(
                checkpoint, trained.iteration, trained.config.recipe, report.device_name(device)
            )
            print(report.table(evaluation, subject))
            path = report.save(evaluation, subject, command.out or _folder_of(checkpoint) / "evaluation")
            print(f"Written to {path}, and a line to {path.with_name(report.RESULTS)}")
    return 0


def _folder_of(checkpoint: Path) -> Path:
    """Return the folder of the run that a checkpoint is of."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def _open_reals(command: Evaluate, trained: TrainedGenerator, group: Group) -> Reals:
    images = trained.config.images
    data = command.data or trained.config.data
    if data is None:
        raise UserError("data: expected --data with the folder that holds the real images, got none")
    split = command.split or images.split
    tree = scan_image_tree(data, split=split)
    if "intra-fid" in command.evaluation.chosen_metrics and list(tree.class_names) != trained.class_names:
        raise UserError(
            f"data: expected the run's {len(trained.class_names)} classes for intra-fid, found others in {tree.root}"
        )
    resolution = trained.config.network.resolution

    def unreadable() -> list[str]:
        found = preflight(
            tree, resolution=resolution, mode=images.check, resample=images.resample, progress=True
        )
        print(found.format() + "\n")
        return [str(path) for path in found.unreadable_paths]

    tree = tree.without(Path(path) for path in group.on_first(unreadable))
    return Reals(
        # Whole JPEGs whatever training did, and each image once: nothing to keep in memory.
        ImageFolderDataset(tree, resolution, resample=images.resample, cache_mib=0),
        split=split if tree.root.name == split else "all",
        identity=folder_identity(tree, resample=images.resample, draft=False),
    )
