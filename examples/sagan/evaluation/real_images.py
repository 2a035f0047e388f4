"""The real images that generated ones are compared with: a folder of images, or a prepared set."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sagan.data import ImageDataset, check_dataset, open_dataset
from sagan.distributed import World
from sagan.errors import UserError
from sagan.evaluation.config import EvaluationConfig
from sagan.evaluation.extraction import ImageSource
from sagan.recipes import RunConfig


@dataclass(frozen=True)
class RealImages:
    """Real images to compare with.

    Attributes:
        source: the images.
        split: which ones they are, for the names of figures: "train", "val", ...
        identity: text that is another one when an image may have changed; what is kept of them is found by it.
    """

    source: ImageSource
    split: str
    identity: str


def open_real_images(
    config: EvaluationConfig, run: RunConfig, class_names: list[str], world: World
) -> RealImages:
    """Return the images that a configuration names, by default those that a run was trained on.

    Images of a folder are checked as training checks them, and decoded whole whatever training did. All processes
    call this together.

    Args:
        config: says where the images are.
        run: decides resolution, filter, and what the configuration leaves open.
        class_names: the run's, by label.
        world: this process.

    Raises:
        UserError: if there is no such folder or set, or intra-FID is asked for and its classes are others.
    """
    data = config.data or run.data
    if data is None:
        raise UserError("data: expected --data with the real images to compare with, got none")
    images = replace(run.images, split=config.split or run.images.split, draft=False)
    dataset = open_dataset(data, run.network.resolution, images)
    dataset = dataset.without(check_dataset(dataset, images.check, world).unreadable)
    # What a prepared set of its own holds, only its name can tell.
    split = config.split or (run.images.split if config.data is None else data.resolve().name)
    reals = RealImages(dataset, dataset.split or split, dataset.identity())
    if "intra-fid" in config.chosen_metrics and list(reals.source.class_names) != class_names:
        raise UserError(
            f"data: expected the run's {len(class_names)} classes for intra-fid, found others in {data}"
        )
    return reals


def training_images(dataset: ImageDataset, run: RunConfig) -> RealImages:
    """Return the images of a training set as the reals.

    Args:
        dataset: what the run trains on.
        run: the run.
    """
    source = dataset.for_evaluation()
    return RealImages(source, source.split or run.images.split, source.identity())
