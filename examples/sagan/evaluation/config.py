"""What to evaluate, and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

from sagan.errors import UserError, check_at_least
from sagan.evaluation.inception_score import SPLITS

Metric = Literal["fid", "is", "kid", "intra-fid", "pr"]
BatchNormStatistics = Literal["running", "batch", "standing"]
METRICS: tuple[Metric, ...] = get_args(Metric)
NUM_SAMPLES, NUM_SAMPLES_PROXY = 50_000, 5000
WEIGHTS_FILE = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WHERE_TO_GET_IT = (
    f"{WEIGHTS_FILE} (95,628,359 bytes, SHA-256 {WEIGHTS_SHA256}). pytorch-fid publishes it at "
    f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS_FILE}; "
    "nothing is downloaded unasked"
)


@dataclass(frozen=True)
class EvaluationConfig:
    """What to evaluate, and how.

    Attributes:
        metrics: fid, is (Inception Score), kid, intra-fid (mean over classes of the FID of each), pr (precision and
            recall); by default fid and is, with --proxy fid.
        count: images to generate; by default 50,000, or 5,000 with --proxy.
        sample_seed: seed of the generated images; image i depends on the seed and i only.
        block_size: images at a time in each process.
        bn_statistics: batch-norm statistics of G: "running" averages from training, those of each block of images
            ("batch"), or "standing" ones gathered over --standing-batches blocks.
        standing_batches: blocks for standing statistics.
        truncation: redraw coordinates of latents beyond this; by default none is.
        inception_weights: the file pt_inception-2015-12-05-6726825d.pth.
        feature_network: a program saved by torch.export.save (.pt2), in place of Inception.
        feature_network_sha256: SHA-256 of that file, which says that you trust it.
        proxy: use a small random network and fewer images, for small machines; its figures are not FIDs.
        cache: folder for features of the real images; by default below the user's cache folder.
        data: prepared set or folder with the real images; by default the run's.
        split: subfolder with the real images, or for a prepared set its name in figures; by default the run's.
    """

    prefix: ClassVar[str] = "--"  # of these options on the command line

    metrics: tuple[Metric, ...] = ()
    count: int | None = None
    sample_seed: int = 0
    block_size: int = 50
    bn_statistics: BatchNormStatistics = "running"
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
        if len(set(self.metrics)) != len(self.metrics) or set(self.metrics) - set(METRICS):
            raise UserError(
                f"metrics: expected some of {', '.join(METRICS)}, each once; got {list(self.metrics)}"
            )
        if self.num_samples < 2 * SPLITS:
            raise UserError(f"count: expected at least {2 * SPLITS}, got {self.count}")
        check_at_least(self, 1, "block_size", "standing_batches")
        check_at_least(self, 0, "sample_seed")
        if self.bn_statistics not in get_args(BatchNormStatistics):
            raise UserError(f"bn_statistics: expected running, batch or standing, got {self.bn_statistics!r}")
        if self.truncation is not None and not self.truncation >= 0.02:
            raise UserError(f"truncation: expected at least 0.02, got {self.truncation}")
        if len(self.network_options) > 1:
            raise UserError(f"feature network: expected one, got {' and '.join(self.network_options)}")
        if self.proxy and "is" in self.metrics:
            raise UserError("metrics: the proxy network has no classes, so there is no 'is' with --proxy")

    @property
    def no_network(self) -> str:
        """The message if no option names a feature network."""
        return (
            f"feature network: expected {self.prefix}inception-weights FILE, {self.prefix}proxy or "
            f"{self.prefix}feature-network PROGRAM, got none.\n"
            f"FID and IS take the file {WHERE_TO_GET_IT}.\n"
            f"{self.prefix}proxy takes no file: a small random network, for small machines; its figures are not FIDs"
        )

    @property
    def network_options(self) -> list[str]:
        """The options given that name a feature network; at most one."""
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
        return NUM_SAMPLES_PROXY if self.proxy else NUM_SAMPLES


@dataclass(frozen=True)
class TrainingEvaluationConfig(EvaluationConfig):
    """Evaluation during training.

    Attributes:
        every: iterations between evaluations, with one more at the end; 0 for none.
        best_by: figure that picks the best checkpoint: fid, is, kid, intra-fid, precision or recall; by default the
            first of the metrics.
    """

    prefix: ClassVar[str] = "--evaluation."

    every: int = 0
    best_by: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "every")
        figures = [
            name
            for metric in self.chosen_metrics
            for name in (("precision", "recall") if metric == "pr" else (metric,))
        ]
        if self.best_by is not None and self.best_by not in figures:
            raise UserError(f"best_by: expected one of {', '.join(figures)}; got {self.best_by!r}")
        if self.every and not self.network_options:
            raise UserError(self.no_network)
