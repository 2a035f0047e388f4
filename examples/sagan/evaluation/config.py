"""What to evaluate, and how."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from sagan.errors import UserError
from sagan.evaluation.inception_score import SPLITS

Metric = Literal["fid", "is", "kid", "intra-fid", "pr"]
METRICS: tuple[Metric, ...] = ("fid", "is", "kid", "intra-fid", "pr")
PROXY_COUNT = 5000
NO_NETWORK = (
    "feature network: expected inception-weights with the file pt_inception-2015-12-05-6726825d.pth (pytorch-fid "
    "and torch-fidelity publish it), feature-network with an exported program, or proxy; got none. Nothing is "
    "downloaded"
)
_PATHS = ("inception_weights", "feature_network", "cache", "data")


@dataclass(frozen=True)
class EvaluationConfig:
    """What to evaluate, and how.

    Attributes:
        metrics: which figures: fid, is (Inception Score), kid, intra-fid (mean over classes of the FID of each), pr
            (precision and recall); by default fid and is, with --proxy fid.
        count: generated images; None for 50,000, or 5,000 with --proxy.
        sample_seed: of the generated images; image i depends on it and i alone.
        block_size: images at a time in each process.
        bn_statistics: batch norm of G: "running" averages of training, each block's own ("batch"), or "standing"
            ones gathered anew over --standing-batches blocks.
        standing_batches: blocks for standing statistics.
        truncation: draw coordinates of latents beyond this anew; None for plain normal latents.
        inception_weights: the file pt_inception-2015-12-05-6726825d.pth.
        feature_network: instead of Inception, a program saved by torch.export.save (.pt2).
        feature_network_sha256: of that file, to say that you trust it.
        proxy: a small random network and fewer images, for small machines; its figures are no FIDs.
        cache: folder for features of the reals; by default below the user's cache folder.
        data: a prepared set, or root of the real images, to compare with; by default the run's.
        split: folder below it that holds them, for a prepared set their name in figures; by default the run's.
    """

    metrics: tuple[Metric, ...] = ()
    count: int | None = None
    sample_seed: int = 0
    block_size: int = 50
    bn_statistics: Literal["running", "batch", "standing"] = "running"
    standing_batches: int = 100
    truncation: float | None = None
    inception_weights: Path | None = None
    feature_network: Path | None = None
    feature_network_sha256: str | None = None
    proxy: bool = False
    cache: Path | None = None
    data: Path | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        for each in fields(EvaluationConfig):  # from JSON, lists and strings
            value = getattr(self, each.name)
            if each.name in _PATHS and isinstance(value, str):
                object.__setattr__(self, each.name, Path(value))
            elif each.name == "metrics":
                object.__setattr__(self, each.name, tuple(value))
        if len(set(self.metrics)) != len(self.metrics) or set(self.metrics) - set(METRICS):
            raise UserError(
                f"metrics: expected different ones out of {', '.join(METRICS)}; got {list(self.metrics)}"
            )
        least = 2 * SPLITS
        if self.num_samples < least:
            raise UserError(f"count: expected at least {least}, got {self.count}")
        for name, smallest in (("block_size", 1), ("standing_batches", 1), ("sample_seed", 0)):
            if getattr(self, name) < smallest:
                raise UserError(f"{name}: expected at least {smallest}, got {getattr(self, name)}")
        if self.bn_statistics not in ("running", "batch", "standing"):
            raise UserError(f"bn_statistics: expected running, batch or standing, got {self.bn_statistics!r}")
        if self.truncation is not None and not self.truncation >= 0.02:
            raise UserError(f"truncation: expected at least 0.02, got {self.truncation}")
        if len(self.networks) > 1:
            raise UserError(f"feature network: expected one, got {' and '.join(self.networks)}")
        if self.proxy and "is" in self.metrics:
            raise UserError("metrics: the proxy network has no classes, so there is no 'is' with --proxy")

    @property
    def networks(self) -> list[str]:
        """The options given that name a feature network: one, or none so far."""
        options = {
            "inception-weights": self.inception_weights is not None,
            "feature-network": self.feature_network is not None,
            "proxy": self.proxy,
        }
        return [name for name, given in options.items() if given]

    @property
    def chosen_metrics(self) -> tuple[Metric, ...]:
        """The metrics, or the default ones."""
        return self.metrics or (("fid",) if self.proxy else ("fid", "is"))

    @property
    def num_samples(self) -> int:
        """How many images to generate."""
        if self.count is not None:
            return self.count
        return PROXY_COUNT if self.proxy else 50_000


@dataclass(frozen=True)
class TrainingEvaluationConfig(EvaluationConfig):
    """Evaluation during training.

    Attributes:
        every: iterations between evaluations, with one at the end; 0 for none.
        best_by: figure that decides which checkpoint is the best: fid, is, kid, intra-fid, precision or recall; by
            default the first of the metrics.
    """

    every: int = 0
    best_by: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 0:
            raise UserError(f"every: expected at least 0, got {self.every}")
        figures = [
            name
            for metric in self.chosen_metrics
            for name in (("precision", "recall") if metric == "pr" else (metric,))
        ]
        if self.best_by is not None and self.best_by not in figures:
            raise UserError(f"best_by: expected one of {', '.join(figures)}; got {self.best_by!r}")
        if self.every and not self.networks:
            raise UserError(NO_NETWORK)
