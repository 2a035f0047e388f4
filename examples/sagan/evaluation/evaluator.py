"""Evaluates generators against one set of real images."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sagan.distributed import World
from sagan.errors import UserError
from sagan.evaluation import results
from sagan.evaluation.config import EvaluationConfig
from sagan.evaluation.extraction import FeatureBlock, extract_features
from sagan.evaluation.feature_file import FeatureFile
from sagan.evaluation.feature_networks import FeatureNetwork, deterministic_float32, load_feature_network
from sagan.evaluation.fid import Moments, frechet_distance_of_features, frechet_distance_of_moments
from sagan.evaluation.inception_score import SPLITS, InceptionScore, splits_in_order
from sagan.evaluation.kid import SUBSET_SIZE, SUBSETS, kernel_inception_distance
from sagan.evaluation.precision_recall import NEIGHBOURS, precision_and_recall
from sagan.evaluation.protocol import Protocol
from sagan.evaluation.real_features import default_cache, load_or_compute_real_features
from sagan.evaluation.real_images import RealImages
from sagan.evaluation.results import Evaluation, Figure
from sagan.evaluation.samples import generated_blocks
from sagan.networks import Generator


class Evaluator:
    """Evaluates generators against one set of real images, whose features come from the cache or are computed here.

    All processes construct and call it together. All return the same numbers, for any number of processes. ``network``
    is by default the one that the configuration names; it runs on the device of ``world``.

    Raises:
        UserError: if there is no feature network, or it has no logits for the Inception Score.
        RealFeaturesError: if the cache holds features of other images under these images' name.

    Attributes:
        real_facts: count, checksum and scores of the real images.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        real_images: RealImages,
        world: World,
        *,
        network: FeatureNetwork | None = None,
        progress: bool = False,
    ) -> None:
        self._config = config
        self._metrics = config.chosen_metrics
        self._real_images = real_images
        self._world = world
        self._progress = progress
        self._cache = config.cache or default_cache()
        dataset = real_images.dataset
        if len(dataset) <= NEIGHBOURS:
            raise UserError(f"real images: expected more than {NEIGHBOURS}, got {len(dataset)}")
        self._network = network or load_feature_network(config, world.device, resolution=dataset.resolution)
        if "is" in self._metrics and not self._network.num_logits:
            raise UserError(
                f"metrics: the network {self._network.name} has no logits, so there is no 'is' with it"
            )
        with deterministic_float32():
            self.real_facts, self._real = load_or_compute_real_features(
                dataset,
                self._network,
                world,
                self._cache,
                block_size=config.block_size,
                all_features="intra-fid" in self._metrics,
                progress=progress,
            )

    def describe_real_images(self) -> str:
        """Return where the features of the real images are, and the real images' scores, for a terminal."""
        facts = self.real_facts
        verb = "read from" if facts.from_cache else "saved in"
        scores = results.describe_real_images(facts, self._real_images.split, proxy=self._network.proxy)
        return f"Features of {facts.count:,} real images {verb} {self._cache}\n{scores}"

    def evaluate(
        self, generator: Generator, labels_in_use: Tensor, *, weights: Literal["ema", "raw"]
    ) -> Evaluation:
        """Evaluate a generator with samples of ``labels_in_use``; neither it nor torch's random state changes.

        Raises:
            UserError: if resolutions differ, or there are too few samples or real images for a metric.
        """
        start = time.perf_counter()
        resolution = generator.config.resolution
        if (found := self._real_images.dataset.resolution) != resolution:
            raise UserError(
                f"real images: expected images of {resolution} pixels as the generator's, got {found}"
            )
        classes, skipped_classes = self._intra_fid_classes(generator, labels_in_use)
        generated = _GeneratedFeatures(self._config, self._network, self._cache)
        with deterministic_float32():
            extract_features(
                generated_blocks(generator, self._config, self._world, labels_in_use),
                self._config.num_samples,
                self._config.block_size,
                self._network,
                self._world,
                generated.add,
                description="generated images" if self._progress else None,
            )
            measured = self._world.run_on_main(lambda: self._measure(generated, labels_in_use, classes))
        protocol = self._protocol(len(labels_in_use), weights)
        given = self._real_images.dataset.class_names
        counts = Counter(given)
        names = [name if counts[name] == 1 else f"{name} ({label})" for label, name in enumerate(given)]
        by_class = {names[label]: value for label, value in zip(classes, measured["by_class"], strict=True)}
        return Evaluation(
            figures=tuple(
                Figure(metric, protocol.name(metric), value, deviation)
                for metric, value, deviation in measured["figures"]
            ),
            protocol=protocol,
            real_facts=self.real_facts,
            by_class=by_class if "intra-fid" in self._metrics else None,
            skipped_classes=tuple(names[label] for label in skipped_classes),
            samples_checksum=measured["checksum"],
            seconds=time.perf_counter() - start,
        )

    def _intra_fid_classes(self, generator: Generator, labels_in_use: Tensor) -> tuple[list[int], list[int]]:
        """Return the classes to compute intra-FID over, and those to skip for lack of real images."""
        if "intra-fid" not in self._metrics:
            return [], []
        if not generator.config.num_classes:
            raise UserError("metrics: expected a run with classes for intra-fid, this one is unconditional")
        if self._config.num_samples < 2 * len(labels_in_use):
            raise UserError(
                f"count: expected at least 2 samples of each of {len(labels_in_use)} classes for intra-fid, "
                f"got {self._config.num_samples} in all"
            )
        dataset = self._real_images.dataset
        counts = torch.bincount(dataset.labels, minlength=len(dataset.class_names))
        classes = [label for label in labels_in_use.tolist() if counts[label] >= 2]
        if not classes:
            raise UserError("metrics: expected at least 2 real images in a class for intra-fid")
        return classes, sorted(set(labels_in_use.tolist()) - set(classes))

    def _measure(
        self, generated: _GeneratedFeatures, labels_in_use: Tensor, classes: Sequence[int]
    ) -> dict[str, Any]:
        """Return the figures as (metric, value, deviation), the FID of each class, and the samples' checksum."""
        real, device = self._real, self._network.float64_device
        assert real is not None  # on rank 0
        figures: list[tuple[str, float, float | None]] = []
        by_class: list[float] = []
        for metric in self._metrics:
            if metric == "fid":
                assert generated.moments is not None
                fid = frechet_distance_of_moments(real.moments.to(device), generated.moments)
                figures.append(("fid", fid, None))
            elif metric == "is":
                assert generated.inception_score is not None
                figures.append(("is", *generated.inception_score.result()))
            elif metric == "kid":
                kid = kernel_inception_distance(real.sample, generated.features, device=device)
                figures.append(("kid", *kid))
            elif metric == "intra-fid":
                places = {label: place for place, label in enumerate(labels_in_use.tolist())}
                by_class = [
                    frechet_distance_of_features(
                        real.of_class(label).to(device),
                        generated.features[places[label] :: len(places)].to(device),
                    )
                    for label in classes
                ]
                figures.append(("intra-fid", sum(by_class) / len(by_class), None))
            else:
                real_sample = real.sample.head(len(generated.features))
                both = precision_and_recall(real_sample, generated.features, device=device)
                figures += [("precision", both[0], None), ("recall", both[1], None)]
        return {"figures": figures, "by_class": by_class, "checksum": generated.checksum.hexdigest()}

    def _protocol(self, num_classes: int, weights: str) -> Protocol:
        config = self._config
        return Protocol(
            network=self._network.name,
            network_sha256=self._network.digest,
            resize=self._network.resize,
            precision="float32",
            proxy=self._network.proxy,
            real_split=self._real_images.split,
            real_count=self.real_facts.count,
            real_checksum=self.real_facts.checksum,
            real_resolution=self._real_images.dataset.resolution,
            sample_count=config.num_samples,
            sample_seed=config.sample_seed,
            sample_classes=num_classes,
            weights=weights,
            bn_statistics=config.bn_statistics,
            standing_batches=config.standing_batches if config.bn_statistics == "standing" else 0,
            block_size=0 if config.bn_statistics == "running" else config.block_size,
            truncation=config.truncation,
            splits=SPLITS,
            kid_subsets=SUBSETS,
            kid_subset_size=min(SUBSET_SIZE, self.real_facts.count, config.num_samples),
            neighbours=NEIGHBOURS,
        )


class _GeneratedFeatures:
    """What the metrics need of the generated images; their features are in a file in ``folder``."""

    def __init__(self, config: EvaluationConfig, network: FeatureNetwork, folder: Path) -> None:
        metrics, self._count = config.chosen_metrics, config.num_samples
        device = network.float64_device
        self.moments = Moments.empty(network.num_features, device) if "fid" in metrics else None
        self.inception_score = InceptionScore(network.num_logits, device=device) if "is" in metrics else None
        self._needs_features = bool({"kid", "intra-fid", "pr"} & set(metrics))
        self._num_features, self._folder = network.num_features, folder
        self.checksum = hashlib.sha256()

    @cached_property
    def features(self) -> FeatureFile:
        """The features of all images, on rank 0."""
        return FeatureFile.temporary(self._count, self._num_features, self._folder)

    def add(self, block: FeatureBlock) -> None:
        if self.moments is not None:
            self.moments.add(block.features)
        if self.inception_score is not None:
            self.inception_score.add(block.logits, splits_in_order(block.start, block.stop, self._count))
        if self._needs_features:
            self.features.write(block.start, block.features)
        self.checksum.update(block.digests)
