"""The real images that generated ones are compared with: a folder of images, or a prepared set."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from sagan.data import (
    ImageDataset,
    ImageFolderDataset,
    ImageTree,
    PackedDataset,
    is_prepared,
    scan_image_tree,
)
from sagan.data.preflight_run import checked_tree
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
    resolution = run.network.resolution
    if is_prepared(data):
        packed = PackedDataset(data, resolution)
        # What a set of its own holds, only its name can tell.
        split = config.split or (run.images.split if config.data is None else data.resolve().name)
        reals = RealImages(packed, split, packed.fingerprint)
    else:
        tree = scan_image_tree(data, split=config.split or run.images.split)
        reals = folder_images(checked_tree(tree, run, world), run, config.split)
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
    if isinstance(dataset, PackedDataset):
        return RealImages(dataset, run.images.split, dataset.fingerprint)
    assert isinstance(dataset, ImageFolderDataset)
    return folder_images(dataset.tree, run, None)


def folder_images(tree: ImageTree, run: RunConfig, split: str | None) -> RealImages:
    """Return the images of a checked tree as the reals.

    Args:
        tree: the images, those that cannot be read left out.
        run: decides resolution and filter.
        split: the part that was asked for; None for the run's.
    """
    wanted, resample = split or run.images.split, run.images.resample
    return RealImages(
        # Each image once: nothing to keep in memory.
        ImageFolderDataset(tree, run.network.resolution, resample=resample, cache_mib=0),
        split=wanted if tree.root.name == wanted else "all",
        identity=_folder_identity(tree, resample),
    )


def _folder_identity(tree: ImageTree, resample: str) -> str:
    """Return 64 hex digits of a folder's file names, sizes and times of change, and of how they are decoded."""
    digest = hashlib.sha256(f"{tree.fingerprint()} {resample}\n".encode())
    for index in range(len(tree.paths)):
        facts = tree.paths[index].stat()
        digest.update(f"{facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()
