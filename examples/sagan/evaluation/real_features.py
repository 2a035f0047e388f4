"""Statistics and features of the real images, computed once and cached."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import zipfile
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sagan.data import ImageDataset
from sagan.distributed import World
from sagan.errors import UserError
from sagan.evaluation.extraction import FeatureBlock, dataset_blocks, extract_features
from sagan.evaluation.feature_file import FeatureFile, check_finite_features
from sagan.evaluation.feature_networks import FeatureNetwork
from sagan.evaluation.fid import Moments, frechet_distance_of_moments
from sagan.evaluation.inception_score import SPLITS, InceptionScore
from sagan.io import atomic_write_text, file_sha256, naming, read_json

FORMAT = "sagan-layers reference features"
VERSION = 1
# How many features are saved for KID, precision and recall, drawn at random.
SAMPLE_SIZE = 50_000
_MANIFEST, _STATISTICS, _FEATURES = "manifest.json", "statistics.npz", "features.npy"

logger = logging.getLogger(__name__)


class RealFeaturesError(UserError):
    """The cache holds features of other images or another network, or damaged ones."""


@dataclass(frozen=True)
class RealFacts:
    """What every process knows of the real images. Scores are None without logits or with too few images."""

    count: int
    checksum: str  # SHA-256 of the SHA-256 of each image's pixels
    replaced: int  # unreadable files, each replaced by another image
    inception_score: tuple[float, float] | None  # mean and standard deviation
    half_distance: float | None  # Frechet distance of a random half to the other
    from_cache: bool

    def __post_init__(self) -> None:
        if self.inception_score is not None:  # a list in JSON
            object.__setattr__(self, "inception_score", tuple(self.inception_score))
        scores = (self.count, self.replaced, self.half_distance or 0, *(self.inception_score or (0, 0)))
        if not (len(scores) == 5 and all(map(math.isfinite, scores)) and isinstance(self.checksum, str)):
            raise ValueError(f"facts: expected finite numbers and a checksum, got {self}")


@dataclass(frozen=True)
class RealFeatures:
    """Features of the real images, on rank 0."""

    moments: Moments  # of all features
    sample: FeatureFile  # features of up to 50,000 images in random order, [M, d]
    labels: Tensor  # of all images, int64 [N]
    features: FeatureFile | None  # of all images, [N, d]; None if not asked for

    def of_class(self, label: int) -> Tensor:
        """Return the features of a class's images, [n, d]."""
        assert self.features is not None
        return self.features[torch.nonzero(self.labels == label).flatten()]


def load_or_compute_real_features(
    dataset: ImageDataset,
    network: FeatureNetwork,
    world: World,
    cache: Path,
    *,
    block_size: int,
    all_features: bool = False,
    progress: bool = False,
) -> tuple[RealFacts, RealFeatures | None]:
    """Return the features of these images by this network from the cache, or compute and save them.

    All processes call this together, and share the work; only rank 0 gets the features. ``all_features`` asks for the
    features of every image too, for the distances of single classes.

    Raises:
        RealFeaturesError: if the cache holds others under the name of these images and this network.
    """
    key = {
        "images": dataset.identity(),
        "count": len(dataset),
        "resolution": dataset.resolution,
        "network": network.name,
        "network_sha256": network.digest,
        "resize": network.resize,
        "precision": "float32",
        "checksum": "of each image",  # older caches have one of each block
    }
    folder = cache / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    facts = world.run_on_main(lambda: _cached_facts(folder, key, all_features))
    if facts is None:
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        try:
            accumulator = _Accumulator(
                network, len(dataset), partial, all_features=all_features and world.is_main
            )
            extract_features(
                dataset_blocks(dataset, block_size, world),
                len(dataset),
                block_size,
                network,
                world,
                accumulator.add,
                description="features of the real images" if progress else None,
            )
            failures = torch.tensor([len(dataset.failures)])
            replaced = sum(int(each) for each in world.gather(failures))
            facts = world.run_on_main(lambda: accumulator.save(folder, key, replaced))
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # renamed by now, unless something failed
    real_facts = RealFacts(**facts)
    features: list[RealFeatures] = []
    world.run_on_main(lambda: features.append(_read(folder, real_facts, dataset.labels, all_features)))
    return real_facts, features[0] if features else None


def default_cache() -> Path:
    """Return the cache's folder below the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sagan-layers" / "references"


def _cached_facts(folder: Path, key: dict[str, Any], all_features: bool) -> dict[str, Any] | None:
    """Return the facts in a cached folder; None if it is missing, damaged, or lacks the features of all images."""
    if not folder.exists():
        return None
    try:
        manifest = read_json(folder / _MANIFEST)
        facts = RealFacts(**{**manifest["facts"], "from_cache": True})
        found, files = manifest["key"], {name: str(digest) for name, digest in manifest["files"].items()}
        version = (manifest["format"], manifest["version"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is damaged (%s); computing its features again", folder / _MANIFEST, error)
        return None
    if version != (FORMAT, VERSION) or found != key or facts.count != key["count"]:
        what = "another version" if version != (FORMAT, VERSION) else "other images or another network"
        raise RealFeaturesError(f"{folder} holds features of {what}: delete it, or choose another --cache")
    if all_features and _FEATURES not in files:
        return None
    for name in (_STATISTICS, _FEATURES) if all_features else (_STATISTICS,):
        if not (folder / name).is_file() or file_sha256(folder / name) != files.get(name):
            logger.warning("%s is damaged; computing its features again", folder / name)
            return None
    return asdict(facts)


def _read(folder: Path, facts: RealFacts, labels: Tensor, all_features: bool) -> RealFeatures:
    try:
        with np.load(folder / _STATISTICS, allow_pickle=False) as arrays:
            # Cloned for torch's alignment in memory, on which BLAS's last bits depend.
            mean, products = (torch.from_numpy(arrays[name]).clone() for name in ("mean", "products"))
        sample = FeatureFile.in_archive(folder / _STATISTICS, "sample")
        width = len(mean)
        for name, values, shape in (
            ("mean", mean, (width,)),
            ("products", products, (width, width)),
            ("sample", sample, (min(facts.count, SAMPLE_SIZE), width)),
        ):
            if values.shape != shape:
                raise ValueError(f"{name}: expected {list(shape)}, got {list(values.shape)}")
            check_finite_features(name, values)
        features = FeatureFile.of_array(folder / _FEATURES) if all_features else None
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise RealFeaturesError(
            f"{folder} holds damaged features ({error}): delete it, and they are computed again"
        ) from error
    return RealFeatures(Moments(facts.count, mean, products), sample, labels, features)


class _Accumulator:
    """Gathers what evaluations need of the real images' features, and saves it on rank 0."""

    def __init__(self, network: FeatureNetwork, count: int, partial: Path, *, all_features: bool) -> None:
        self._count = count
        self._partial = partial
        # A random order, the same every time: it decides the halves, the splits and the sample.
        self._places = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        device = network.float64_device
        self._halves = [Moments.empty(network.num_features, device) for _ in range(2)]
        self._num_features = network.num_features
        self._score = InceptionScore(network.num_logits, device=device) if network.num_logits else None
        self._checksum = hashlib.sha256()
        self._features = partial / _FEATURES if all_features else None
        if self._features is not None:
            partial.mkdir(parents=True, exist_ok=True)
            header = {"descr": "<f4", "fortran_order": False, "shape": (count, network.num_features)}
            with naming(self._features), self._features.open("wb") as file:
                np.lib.format.write_array_header_1_0(file, header)

    @cached_property
    def _sample(self) -> FeatureFile:
        """Features in the random order, in a file on rank 0."""
        return FeatureFile.temporary(min(self._count, SAMPLE_SIZE), self._num_features, self._partial.parent)

    def add(self, block: FeatureBlock) -> None:
        places = self._places[block.start : block.stop]
        for number, half in enumerate(self._halves):
            half.add(block.features[places % 2 == number])
        for place, features in zip(places.tolist(), block.features, strict=True):
            if place < len(self._sample):
                self._sample.write(place, features)
        if self._score is not None:
            self._score.add(block.logits, places * SPLITS // self._count)
        if self._features is not None:
            # A full disk would end the process, were the file mapped.
            with naming(self._features), self._features.open("ab") as file:
                file.write(block.features.numpy().astype("<f4", copy=False).tobytes())
        self._checksum.update(block.digests)

    def save(self, folder: Path, key: dict[str, Any], replaced: int) -> dict[str, Any]:
        """Write everything to the partial folder, rename it to ``folder``, and return the facts."""
        if replaced:
            logger.warning("%d real images are unreadable; the next of its class replaces each", replaced)
        one, other = self._halves
        enough = self._count >= 2 * SPLITS
        facts = RealFacts(
            count=self._count,
            checksum=self._checksum.hexdigest(),
            replaced=replaced,
            inception_score=self._score.result() if self._score is not None and enough else None,
            half_distance=frechet_distance_of_moments(one, other) if enough else None,
            from_cache=False,
        )
        one.merge(other)
        self._partial.mkdir(parents=True, exist_ok=True)
        with naming(self._partial / _STATISTICS):
            np.savez(
                self._partial / _STATISTICS,
                mean=one.mean.numpy(force=True),
                products=one.products.numpy(force=True),
            )
            self._sample.append_to(self._partial / _STATISTICS, "sample")
        files = [_STATISTICS]
        if self._features is not None:
            files.append(_FEATURES)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "key": key,
            "facts": asdict(facts),
            "files": {name: file_sha256(self._partial / name) for name in files},
        }
        atomic_write_text(self._partial / _MANIFEST, json.dumps(manifest, indent=2) + "\n")
        old = self._partial.with_suffix(".replaced")
        if folder.exists():  # damaged, or without the features of all images
            folder.replace(old)
        self._partial.replace(folder)
        shutil.rmtree(old, ignore_errors=True)
        return asdict(facts)
