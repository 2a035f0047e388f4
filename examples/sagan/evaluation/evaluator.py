"""Evaluates generators against one set of real images."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sagan.distributed import World
from sagan.errors import UserError
from sagan.evaluation.config import EvaluationConfig
from sagan.evaluation.extraction import Block, extract_features
from sagan.evaluation.feature_networks import (
    FeatureNetwork,
    float32_alone,
    load_feature_network,
)
from sagan.evaluation.fid import frechet_distance, frechet_distances_by_class
from sagan.evaluation.inception_score import SPLITS, InceptionScore, splits_in_order
from sagan.evaluation.kid import SUBSET_SIZE, SUBSETS, kernel_inception_distance
from sagan.evaluation.moments import Moments
from sagan.evaluation.precision_recall import NEIGHBOURS, precision_and_recall
from sagan.evaluation.protocol import FIGURES, LOWER, Protocol
from sagan.evaluation.real_features import (
    RealFacts,
    Reference,
    default_cache,
    load_or_compute_real_features,
)
from sagan.evaluation.real_images import RealImages
from sagan.evaluation.samples import with_batch_norm_statistics
from sagan.networks import Generator
from sagan.sampling import numbered_blocks


@dataclass(frozen=True)
class Figure:
    """One number, named by its protocol.

    Attributes:
        metric: fid, is, kid, intra-fid, precision or recall.
        name: such as fid50k-train-tfinception.
        value: the number; a mean where there is a deviation.
        deviation: standard deviation over splits (is) or subsets (kid); None for the others.
    """

    metric: str
    name: str
    value: float
    deviation: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        figures: the numbers.
        protocol: how they were come by.
        reals: the reals, and how they score themselves.
        by_class: FID of each class by its name, where intra-FID was asked for.
        classes_left_out: those of intra-FID with fewer than two real images.
        samples_checksum: SHA-256 of the SHA-256 of each generated image's pixels.
        seconds: how long it took.
    """

    figures: tuple[Figure, ...]
    protocol: Protocol
    reals: RealFacts
    by_class: dict[str, float] | None
    classes_left_out: tuple[str, ...]
    samples_checksum: str
    seconds: float

    def figure(self, metric: str | None = None) -> Figure:
        """Return the figure of a metric, by default the first.

        Raises:
            UserError: if it was not asked for.
        """
        for figure in self.figures:
            if metric in (None, figure.metric):
                return figure
        raise UserError(
            f"metric: expected one of {', '.join(each.metric for each in self.figures)}; got {metric!r}"
        )

    def score(self, metric: str | None = None) -> float:
        """Return a figure, of which less is better: negative where more is. By default the first."""
        figure = self.figure(metric)
        direction, _ = FIGURES[figure.metric]
        return figure.value if direction == LOWER else -figure.value

    def scalars(self) -> dict[str, float]:
        """Return the figures by name, as "evaluation/fid50k-train-tfinception", for a run's log."""
        return {f"evaluation/{figure.name}": figure.value for figure in self.figures}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return {
            "figures": {
                each.name: {"metric": each.metric, "value": each.value, "deviation": each.deviation}
                for each in self.figures
            },
            "protocol": {"identity": self.protocol.identity, **asdict(self.protocol)},
            "reals": asdict(self.reals),
            "by_class": self.by_class,
            "classes_left_out": list(self.classes_left_out),
            "samples_checksum": self.samples_checksum,
            "seconds": self.seconds,
        }


class Evaluator:
    """Evaluates generators against one set of reals, whose features are computed here or read from the cache.

    With several processes all of them make it, and call it, together; they all return the same numbers, which do
    not depend on how many they are.

    Args:
        config: what to evaluate, and how.
        reals: the real images.
        world: this process; the feature network runs on its device.
        network: makes features; by default the one that the configuration names.
        progress: show progress bars on a terminal.

    Raises:
        UserError: if there is no feature network, or it has no logits for the Inception Score.
        RealFeaturesError: if the cache holds features of other images under these images' name.

    Attributes:
        facts: of the reals.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        reals: RealImages,
        world: World,
        *,
        network: FeatureNetwork | None = None,
        progress: bool = False,
    ) -> None:
        self.config = config
        self._metrics = config.chosen_metrics
        self._reals = reals
        self._world = world
        self._progress = progress
        if len(reals.source) <= NEIGHBOURS:
            raise UserError(f"reals: expected more than {NEIGHBOURS} images, got {len(reals.source)}")
        self._network = network or load_feature_network(
            config, world.device, resolution=reals.source.resolution
        )
        if "is" in self._metrics and not self._network.num_logits:
            raise UserError(
                f"metrics: the network {self._network.name} has no logits, so there is no 'is' with it"
            )
        with float32_alone():
            self.facts, self._reference = load_or_compute_real_features(
                reals,
                self._network,
                world,
                config.cache or default_cache(),
                block_size=config.block_size,
                all_features="intra-fid" in self._metrics,
                progress=progress,
            )

    @property
    def split(self) -> str:
        """Which images the reals are."""
        return self._reals.split

    @property
    def proxy(self) -> bool:
        """Whether the figures are a proxy's."""
        return self._network.proxy

    def evaluate(
        self, generator: Generator, labels_in_use: Tensor, *, weights: Literal["ema", "raw"]
    ) -> Evaluation:
        """Evaluate a generator; it is as before afterwards, and so is torch's random state.

        Args:
            generator: G, of the reals' resolution.
            labels_in_use: the classes that samples go through in turn.
            weights: what its weights are, for the protocol.

        Raises:
            UserError: if resolutions differ, or there are too few samples or reals for a metric.
        """
        start = time.perf_counter()
        if generator.config.resolution != self._reals.source.resolution:
            raise UserError(
                f"reals: expected images of {generator.config.resolution} pixels as the generator's, "
                f"got {self._reals.source.resolution}"
            )
        classes, left_out = self._classes(generator, labels_in_use)
        collected = _Collected(self.config, self._network) if self._world.is_main else None
        with float32_alone():
            sampled = with_batch_norm_statistics(generator, self.config, self._world, labels_in_use)
            blocks = numbered_blocks(
                sampled,
                self.config.num_samples,
                seed=self.config.sample_seed,
                batch_size=self.config.block_size,
                rank=self._world.rank,
                num_processes=self._world.world_size,
                labels_in_use=labels_in_use,
                truncation=self.config.truncation,
            )
            for block in extract_features(
                (images for _, images, _ in blocks),
                self.config.num_samples,
                self.config.block_size,
                self._network,
                self._world,
                description="generated images" if self._progress else None,
            ):
                assert collected is not None
                collected.add(block)

            def measure() -> dict[str, Any]:
                assert collected is not None
                return self._measure(collected, labels_in_use, classes)

            measured = self._world.run_on_main(measure)
        protocol = self._protocol(len(labels_in_use), weights)
        names = self._reals.source.class_names
        return Evaluation(
            figures=tuple(
                Figure(metric, protocol.name(metric), value, deviation)
                for metric, value, deviation in measured["figures"]
            ),
            protocol=protocol,
            reals=self.facts,
            by_class=dict(zip((names[label] for label in classes), measured["by_class"], strict=True))
            if "intra-fid" in self._metrics
            else None,
            classes_left_out=tuple(names[label] for label in left_out),
            samples_checksum=measured["checksum"],
            seconds=time.perf_counter() - start,
        )

    def _measure(
        self, collected: _Collected, labels_in_use: Tensor, classes: Sequence[int]
    ) -> dict[str, Any]:
        """Return (metric, value, deviation) of each figure; in process 0."""
        reference = self._reference
        assert reference is not None
        figures: list[tuple[str, float, float | None]] = []
        by_class: list[float] = []
        device = self._network.device
        for metric in self._metrics:
            if metric == "fid":
                figures.append(("fid", _fid(collected.moments, reference), None))
            elif metric == "is":
                assert collected.inception_score is not None
                figures.append(("is", *collected.inception_score.result()))
            elif metric == "kid":
                distance = kernel_inception_distance(
                    reference.sample.to(device), collected.features.to(device)
                )
                figures.append(("kid", *distance))
            elif metric == "intra-fid":
                by_class = self._by_class(collected.features, reference, labels_in_use, classes)
                figures.append(("intra-fid", sum(by_class) / len(by_class), None))
            else:
                size = min(len(reference.sample), len(collected.features))
                precision, recall = precision_and_recall(
                    reference.sample[:size].to(device), collected.features.to(device)
                )
                figures += [("precision", precision, None), ("recall", recall, None)]
        return {"figures": figures, "by_class": by_class, "checksum": collected.digest.hexdigest()}

    def _by_class(
        self, features: Tensor, reference: Reference, labels_in_use: Tensor, classes: Sequence[int]
    ) -> list[float]:
        of_reals = reference.of_class(self._reals.source.labels)
        places = {label: place for place, label in enumerate(labels_in_use.tolist())}
        device = self._network.device
        distances = frechet_distances_by_class(
            lambda label: of_reals(label).to(device),
            lambda label: features[places[label] :: len(places)].to(device),
            classes,
        )
        found: list[float] = distances.tolist()
        return found

    def _classes(self, generator: Generator, labels_in_use: Tensor) -> tuple[list[int], list[int]]:
        """Return the classes that intra-FID is over, and those with too few reals for it.

        Raises:
            UserError: if there are too few samples, or no classes at all.
        """
        if "intra-fid" not in self._metrics:
            return [], []
        if not generator.config.num_classes:
            raise UserError("metrics: expected a run with classes for intra-fid, this one is unconditional")
        if self.config.num_samples < 2 * len(labels_in_use):
            raise UserError(
                f"count: expected at least 2 samples of each of {len(labels_in_use)} classes for intra-fid, "
                f"got {self.config.num_samples} in all"
            )
        counts = torch.bincount(self._reals.source.labels, minlength=len(self._reals.source.class_names))
        enough = [label for label in labels_in_use.tolist() if counts[label] >= 2]
        if not enough:
            raise UserError("metrics: expected at least 2 real images in a class for intra-fid")
        return enough, sorted(set(labels_in_use.tolist()) - set(enough))

    def _protocol(self, classes: int, weights: str) -> Protocol:
        config = self.config
        running = config.bn_statistics == "running"
        return Protocol(
            network=self._network.name,
            network_sha256=self._network.digest,
            resize=self._network.resize,
            precision="float32",
            proxy=self._network.proxy,
            real_split=self._reals.split,
            real_count=self.facts.count,
            real_checksum=self.facts.checksum,
            real_resolution=self._reals.source.resolution,
            sample_count=config.num_samples,
            sample_seed=config.sample_seed,
            sample_classes=classes,
            weights=weights,
            bn_statistics=config.bn_statistics,
            standing_batches=config.standing_batches if config.bn_statistics == "standing" else 0,
            block_size=0 if running else config.block_size,
            truncation=config.truncation,
            splits=SPLITS,
            kid_subsets=SUBSETS,
            kid_subset_size=min(SUBSET_SIZE, self.facts.count, config.num_samples),
            neighbours=NEIGHBOURS,
        )


class _Collected:
    """What a pass over generated images leaves for the metrics, in process 0."""

    def __init__(self, config: EvaluationConfig, network: FeatureNetwork) -> None:
        metrics = config.chosen_metrics
        self._count = config.num_samples
        device = network.device if network.device.type == "cuda" else None
        self._gathers_moments = "fid" in metrics
        self.moments = Moments.empty(network.num_features if self._gathers_moments else 0, device)
        self.inception_score = InceptionScore(network.num_logits, device=device) if "is" in metrics else None
        keeps_features = bool({"kid", "intra-fid", "pr"} & set(metrics))
        self.features = torch.empty(self._count if keeps_features else 0, network.num_features)
        self.digest = hashlib.sha256()

    def add(self, block: Block) -> None:
        if self._gathers_moments:
            self.moments.add(block.features)
        if self.inception_score is not None:
            self.inception_score.add(block.logits, splits_in_order(block.start, block.stop, self._count))
        if len(self.features):
            self.features[block.start : block.stop] = block.features
        self.digest.update(block.digest)


def _fid(generated: Moments, reference: Reference) -> float:
    real = reference.moments
    device = generated.mean.device
    return frechet_distance(
        real.mean.to(device), real.covariance.to(device), generated.mean, generated.covariance
    )
