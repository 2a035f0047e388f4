"""What evaluations need of the real images: computed in one pass over them, once, and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sagan.distributed import World
from sagan.errors import UserError
from sagan.evaluation.extraction import Block, dataset_blocks, extract_features
from sagan.evaluation.feature_networks import FeatureNetwork
from sagan.evaluation.fid import frechet_distance
from sagan.evaluation.inception_score import SPLITS, InceptionScore
from sagan.evaluation.moments import Moments
from sagan.evaluation.real_images import RealImages
from sagan.io import file_sha256

FORMAT = "sagan-layers reference features"
VERSION = 1
# Features of so many images, drawn at random, are kept for KID, precision and recall.
SAMPLE_SIZE = 50_000
_MANIFEST, _STATISTICS, _FEATURES = "manifest.json", "statistics.npz", "features.npy"

logger = logging.getLogger(__name__)


class RealFeaturesError(UserError):
    """Kept features that are not of the images or the network asked for."""


@dataclass(frozen=True)
class RealFacts:
    """What all processes know of a reference.

    Attributes:
        count: images.
        checksum: SHA-256 of the SHA-256 of each image's pixels.
        replaced: unreadable files among them, in whose place another image was taken.
        inception_score: mean and standard deviation of the reals' own; None without logits or with too few images.
        half_distance: Frechet distance of a random half of the reals to the other; None with too few images.
        from_cache: whether it was kept from before.
    """

    count: int
    checksum: str
    replaced: int
    inception_score: tuple[float, float] | None
    half_distance: float | None
    from_cache: bool

    def __post_init__(self) -> None:
        if self.inception_score is not None:  # from JSON, a list
            object.__setattr__(self, "inception_score", tuple(self.inception_score))


@dataclass(frozen=True)
class Reference:
    """Features of the reals, in process 0.

    Attributes:
        facts: what all processes know.
        moments: of all features.
        sample: features of up to 50,000 images in random order, [M, d], float32.
        features: of all images, [N, d], mapped from the disk; None if they were not asked for.
    """

    facts: RealFacts
    moments: Moments
    sample: Tensor
    features: npt.NDArray[np.float32] | None

    def of_class(self, labels: Tensor) -> Callable[[int], Tensor]:
        """Return the function from a label to the features of its images.

        Args:
            labels: [N], of all images.
        """
        assert self.features is not None
        features = self.features

        def of_label(label: int) -> Tensor:
            rows = torch.nonzero(labels == label).flatten().numpy()
            return torch.from_numpy(features[rows])

        return of_label


def load_or_compute_real_features(
    reals: RealImages,
    network: FeatureNetwork,
    world: World,
    cache: Path,
    *,
    block_size: int,
    all_features: bool = False,
    progress: bool = False,
) -> tuple[RealFacts, Reference | None]:
    """Return what is kept of these images and this network, or compute and keep it.

    All processes call this together, and share the pass.

    Args:
        reals: the images.
        network: makes features.
        world: this process.
        cache: folder of what is kept.
        block_size: images at a time in each process.
        all_features: keep the features of all images too, for the distances of single classes.
        progress: show a progress bar.

    Returns:
        What all processes know, and in process 0 the reference.

    Raises:
        RealFeaturesError: if what is kept under the name of these images and this network is of others.
    """
    key = _key(reals, network)
    folder = cache / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    found: list[Reference] = []

    def look_up() -> bool:
        reference = _load(folder, key, all_features)
        if reference is not None:
            found.append(reference)
        return reference is not None

    if not world.run_on_main(look_up):
        found += _compute(reals, network, world, folder, key, block_size, all_features, progress)
    facts = RealFacts(**world.run_on_main(lambda: asdict(found[0].facts)))
    return facts, found[0] if found else None


def _key(reals: RealImages, network: FeatureNetwork) -> dict[str, Any]:
    return {
        "images": reals.identity,
        "count": len(reals.source),
        "resolution": reals.source.resolution,
        "network": network.name,
        "network_sha256": network.digest,
        "resize": network.resize,
        "precision": "float32",
        "checksum": "of each image",  # by blocks before
    }


def _compute(
    reals: RealImages,
    network: FeatureNetwork,
    world: World,
    folder: Path,
    key: dict[str, Any],
    block_size: int,
    all_features: bool,
    progress: bool,
) -> list[Reference]:
    """Pass over the reals with all processes; process 0 keeps the result, and returns it alone."""
    count = len(reals.source)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    collected = _Collected(network, count, partial if all_features else None) if world.is_main else None
    try:
        for block in extract_features(
            dataset_blocks(reals.source, block_size, world),
            count,
            block_size,
            network,
            world,
            description="features of the reals" if progress else None,
        ):
            assert collected is not None
            collected.add(block)
        failures = torch.tensor([len(getattr(reals.source, "failures", []))])
        replaced = sum(int(each) for each in world.gather(failures))
        made: list[Reference] = []

        def keep() -> None:
            assert collected is not None
            if replaced:
                logger.warning(
                    "%d of the reals cannot be read; the next of their class took their places", replaced
                )
            made.append(collected.finish(replaced))
            _save(made[0], folder, partial, key)

        world.run_on_main(keep)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already, unless something went wrong
    if not all_features:
        return made
    return [
        replace(each, features=np.load(folder / _FEATURES, mmap_mode="r", allow_pickle=False))
        for each in made
    ]


class _Collected:
    """What a pass over the reals leaves, in process 0."""

    def __init__(self, network: FeatureNetwork, count: int, partial: Path | None) -> None:
        self._count = count
        # A random order, the same in every pass: halves, splits and the sample are taken by it.
        self._places = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        device = network.device if network.device.type == "cuda" else None
        self._halves = [Moments.empty(network.num_features, device) for _ in range(2)]
        self._sample = torch.empty(min(count, SAMPLE_SIZE), network.num_features)
        self._score = InceptionScore(network.num_logits, device=device) if network.num_logits else None
        self._digest = hashlib.sha256()
        self._features: np.memmap[Any, np.dtype[np.float32]] | None = None
        if partial is not None:
            partial.mkdir(parents=True, exist_ok=True)
            self._features = np.lib.format.open_memmap(
                partial / _FEATURES, "w+", np.float32, (count, network.num_features)
            )

    def add(self, block: Block) -> None:
        places = self._places[block.start : block.stop]
        for number, half in enumerate(self._halves):
            half.add(block.features[places % 2 == number])
        kept = places < len(self._sample)
        self._sample[places[kept]] = block.features[kept]
        if self._score is not None:
            self._score.add(block.logits, places * SPLITS // self._count)
        if self._features is not None:
            self._features[block.start : block.stop] = block.features.numpy()
        self._digest.update(block.digest)

    def finish(self, replaced: int) -> Reference:
        one, other = self._halves
        enough = self._count >= 2 * SPLITS
        half_distance = None
        if enough:
            half_distance = frechet_distance(one.mean, one.covariance, other.mean, other.covariance)
        one.merge(other)
        if self._features is not None:
            self._features.flush()
        facts = RealFacts(
            count=self._count,
            checksum=self._digest.hexdigest(),
            replaced=replaced,
            inception_score=self._score.result() if self._score is not None and enough else None,
            half_distance=half_distance,
            from_cache=False,
        )
        moments = Moments(one.count, one.mean.cpu(), one.products.cpu())
        return Reference(facts, moments, self._sample, None)


def _save(reference: Reference, folder: Path, partial: Path, key: dict[str, Any]) -> None:
    """Write a reference whole or not at all, in place of one without the features of all images."""
    partial.mkdir(parents=True, exist_ok=True)
    np.savez(
        partial / _STATISTICS,
        mean=reference.moments.mean.numpy(),
        products=reference.moments.products.numpy(),
        sample=reference.sample.numpy(),
    )
    files = {
        name: file_sha256(partial / name) for name in (_STATISTICS, _FEATURES) if (partial / name).exists()
    }
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "key": key,
        "facts": asdict(reference.facts),
        "files": files,
    }
    (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    old = partial.with_suffix(".replaced")
    if folder.exists():
        folder.replace(old)
    partial.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def _load(folder: Path, key: dict[str, Any], all_features: bool) -> Reference | None:
    """Return the reference in a folder; None if there is none, it is damaged, or lacks what is asked for."""
    if not folder.exists():
        return None
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        facts = RealFacts(**{**manifest["facts"], "from_cache": True})
        found, files = manifest["key"], dict(manifest["files"])
        made_by = (manifest["format"], manifest["version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s); its features are computed anew", folder / _MANIFEST, error)
        return None
    if made_by != (FORMAT, VERSION) or found != key:
        what = "another version" if made_by != (FORMAT, VERSION) else "other images or another network"
        raise RealFeaturesError(f"{folder} holds features of {what}: delete it, or choose another --cache")
    if all_features and _FEATURES not in files:
        return None
    for name in (_STATISTICS, _FEATURES) if all_features else (_STATISTICS,):
        if not (folder / name).is_file() or file_sha256(folder / name) != files.get(name):
            logger.warning("%s is damaged; its features are computed anew", folder / name)
            return None
    with np.load(folder / _STATISTICS, allow_pickle=False) as arrays:
        # Copied to torch's alignment in memory, which BLAS's last bits depend on.
        mean, products, sample = (
            torch.from_numpy(arrays[name]).clone() for name in ("mean", "products", "sample")
        )
    features = np.load(folder / _FEATURES, mmap_mode="r", allow_pickle=False) if all_features else None
    return Reference(facts, Moments(facts.count, mean, products), sample, features)


def default_cache() -> Path:
    """Return the folder below the user's cache folder where features of reals are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sagan-layers" / "references"
