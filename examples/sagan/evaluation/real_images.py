"""The real images that generated ones are compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sagan.data import ImageDataset, check_dataset, open_dataset
from sagan.distributed import World
from sagan.errors import UserError
from sagan.evaluation.config import EvaluationConfig
from sagan.recipes import RunConfig


@dataclass(frozen=True)
class RealImages:
    """Real images to compare with, and which they are for the names of figures: "train", "val", ..."""

    dataset: ImageDataset
    split: str


def open_real_images(
    config: EvaluationConfig, run: RunConfig, class_names: list[str], world: World
) -> RealImages:
    """Return the images that a configuration names, by default those that a run was trained on.

    They are checked as training checks them, and decoded in full whatever training did. The run decides resolution,
    filter and check. All processes call this together.

    Raises:
        UserError: if there is no such folder or set, or its classes differ and intra-FID is asked for.
    """
    data = config.data or run.data
    if data is None:
        raise UserError("data: expected --data with the real images to compare with, got none")
    split = config.split or run.images.split
    dataset = open_dataset(data, run.network.resolution, replace(run.images, split=split)).for_evaluation()
    dataset = dataset.without(check_dataset(dataset, run.images.check, world).unreadable)
    if "intra-fid" in config.chosen_metrics and list(dataset.class_names) != class_names:
        raise UserError(
            f"data: expected the run's {len(class_names)} classes for intra-fid, found others in {data}"
        )
    if dataset.split is None and config.data is not None and config.split is None:
        split = data.resolve().name  # only its name says what a prepared set holds
    return RealImages(dataset, dataset.split or split)


def training_images(dataset: ImageDataset, run: RunConfig) -> RealImages:
    """Return the images that a run trains on, decoded in full, as real images to compare with."""
    return RealImages(dataset.for_evaluation(), dataset.split or run.images.split)
