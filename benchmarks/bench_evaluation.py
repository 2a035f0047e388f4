"""Agreement of the trainer's evaluation with independent implementations, and the time of its intra-FID.

    python -m benchmarks.bench_evaluation [--quick]
    python -m benchmarks.bench_evaluation --inception-weights FILE       (end to end; needs torch-fidelity)

See benchmarks/README.md.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks import harness, report
from sagan.data import open_dataset
from sagan.distributed import World
from sagan.evaluation.config import EvaluationConfig
from sagan.evaluation.evaluator import Evaluator
from sagan.evaluation.fid import Moments, frechet_distance, frechet_distance_of_features
from sagan.evaluation.inception_score import InceptionScore
from sagan.evaluation.kid import kernel_inception_distance
from sagan.evaluation.real_images import training_images
from sagan.networks import Generator, NetworkConfig
from sagan.prepare.synthetic import SyntheticSet, write_layout
from sagan.recipes import RunConfig
from sagan.sampling import numbered_samples


@dataclass(frozen=True)
class Scale:
    """How much to measure."""

    width: int = 2048  # features of a sample
    samples: int = 5000  # in each set, for the agreement on the same features
    classes: int = 1000  # of the intra-FID
    # Pairs of real images in a class, and how many of the classes are measured.
    reals: tuple[tuple[int, int], ...] = ((50, 1000), (1300, 100))
    direct: int = 3  # classes that the direct form is timed on
    images: int = 300  # in each set, end to end


QUICK = Scale(width=64, samples=300, classes=20, reals=((50, 20), (130, 5)), direct=2, images=40)
GENERATED = 50  # samples of each class


def features_of(seed: int, count: int, width: int) -> Tensor:
    """Features like Inception's: not negative, of spreads over two orders of magnitude."""
    draws = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0, -2, width)
    scale = spread * (1 + 0.1 * (seed % 10))
    return (torch.randn(count, width, generator=draws) * scale + 0.4).abs()


def compared(suite: str, case: str, ours: float, others: dict[str, Callable[[], float]]) -> report.Row:
    """Return a record of our value and of each other implementation's, with the relative difference."""
    rows: dict[str, report.Row] = {"ours": {"status": "ok", "value": ours}}
    for name, compute in others.items():
        value = compute()
        rows[name] = {"status": "ok", "value": value, "difference": abs(ours - value) / abs(value)}
    return {"suite": suite, "case": case, "baseline": "ours", "contenders": rows}


class Unchanged(nn.Module):
    """A feature network for torchmetrics that takes features for images."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, images: Tensor) -> Tensor:
        return images


def measure_agreement(scale: Scale, results: report.Results) -> None:
    """FID, Inception Score and KID on the same features and logits."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore as TheirScore
    from torchmetrics.image.kid import poly_mmd

    a, b = (features_of(seed, scale.samples, scale.width).double() for seed in (0, 1))
    one, other = Moments.of(a), Moments.of(b)

    def by_torchmetrics() -> float:
        metric = FrechetInceptionDistance(feature=Unchanged(scale.width))
        metric.update(a, real=True)
        metric.update(b, real=False)
        return float(metric.compute())

    case = f"{scale.samples:,} samples of {scale.width} features"
    fid = frechet_distance(one.mean, one.covariance, other.mean, other.covariance)
    results.add(
        compared(
            "FID",
            case,
            fid,
            {"scipy sqrtm": lambda: _direct_fid(a, b, _trace_by_scipy), "torchmetrics": by_torchmetrics},
        )
    )

    logits = torch.randn(scale.samples, 1008, generator=torch.Generator().manual_seed(2)).double() * 2
    score = InceptionScore(1008, splits=1)
    score.add(logits, torch.zeros(scale.samples, dtype=torch.int64))

    def score_by_torchmetrics() -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of memory, and of the deviation of one split
            metric = TheirScore(feature=Unchanged(1008), splits=1)
            metric.update(logits)
            return float(metric.compute()[0])

    case = f"{scale.samples:,} samples of 1008 logits"
    results.add(compared("Inception Score", case, score.result()[0], {"torchmetrics": score_by_torchmetrics}))

    few = min(1000, scale.samples)
    distance, _ = kernel_inception_distance(a[:few], b[:few], subsets=1, subset_size=few)
    case = f"{few:,} samples of {scale.width} features, one subset"
    results.add(compared("KID", case, distance, {"torchmetrics": lambda: float(poly_mmd(a[:few], b[:few]))}))


def measure_intra_fid(scale: Scale, results: report.Results) -> None:
    """Time of the Gram form over all classes, and of the direct forms on a few of them."""
    for reals, measured in scale.reals:
        generated = features_of(1, GENERATED * scale.classes, scale.width)

        def real(label: int, reals: int = reals) -> Tensor:
            return features_of(label + 2, reals, scale.width)

        def fake(label: int, generated: Tensor = generated) -> Tensor:
            return generated[label :: scale.classes]

        seconds, distances = [], []
        for label in range(measured):
            a, b = real(label), fake(label)  # drawing them is not timed
            start = time.perf_counter()
            distances.append(frechet_distance_of_features(a, b))
            seconds.append(time.perf_counter() - start)
        case = f"{scale.classes:,} classes, {GENERATED} samples against {reals:,} reals of {scale.width} features"
        mean = statistics.fmean(distances)
        rows: dict[str, report.Row] = {"ours": {"status": "ok", "value": mean, **_times(seconds, scale)}}
        for name, root in (
            ("direct, eigenvalues", _trace_by_eigenvalues),
            ("direct, scipy sqrtm", _trace_by_scipy),
        ):
            taken, differences = [], []
            for label in range(scale.direct):
                a, b = real(label).double(), fake(label).double()
                start = time.perf_counter()
                value = _direct_fid(a, b, root)
                taken.append(time.perf_counter() - start)
                differences.append(abs(value - distances[label]) / value)
            rows[name] = {"status": "ok", "difference": max(differences), **_times(taken, scale)}
        results.add({"suite": "intra-FID", "case": case, "baseline": "ours", "contenders": rows})


def _times(seconds: Sequence[float], scale: Scale) -> dict[str, float]:
    """Return the median of a class, and what that makes for all of them."""
    median = statistics.median(seconds)
    return {"class_s": median, "classes_measured": len(seconds), "all_classes_s": median * scale.classes}


def _direct_fid(a: Tensor, b: Tensor, trace_of_root: Callable[[Tensor], float]) -> float:
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    means = float((a.mean(0) - b.mean(0)).square().sum())
    return means + float(cov_a.trace() + cov_b.trace()) - 2 * trace_of_root(cov_a @ cov_b)


def _trace_by_eigenvalues(product: Tensor) -> float:
    return float(torch.linalg.eigvals(product).real.clamp_min(0).sqrt().sum())


def _trace_by_scipy(product: Tensor) -> float:
    return float(np.real(np.trace(scipy.linalg.sqrtm(product.numpy()))))


class Images(Dataset[Tensor]):
    """Images for torch-fidelity, uint8 [N, 3, R, R]."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index].contiguous()


def measure_end_to_end(scale: Scale, weights: Path, results: report.Results) -> None:
    """The same images through both programs, ours from a generator and files."""
    from torch_fidelity import calculate_metrics

    torch.manual_seed(0)
    network = NetworkConfig(resolution=32, base_width=4, num_classes=10, g_attention=(16,), d_attention=())
    generator = Generator(network).eval()
    for parameter in generator.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    run = RunConfig(recipe="best_known", network=network, device="cpu")
    labels = torch.arange(10)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        made = SyntheticSet(classes=10, images=scale.images // 10, val_images=0, scale=0.2)
        write_layout(root / "data", "folder", made)
        reals = training_images(open_dataset(root / "data", 32, run.images), run)
        config = EvaluationConfig(
            metrics=("fid", "is", "kid"), count=scale.images, inception_weights=weights, cache=root / "cache"
        )
        evaluator = Evaluator(config, reals, World(0, 1, torch.device("cpu")), progress=True)
        ours = evaluator.evaluate(generator, labels, weights="raw")
        real = Images(reals.dataset.fetch(range(len(reals.dataset)))[0])
        blocks = numbered_samples(
            generator, scale.images, seed=0, batch_size=config.block_size, labels_in_use=labels
        )
        fake = Images(torch.cat([images for _, images, _ in blocks]))
        theirs = calculate_metrics(
            input1=fake,
            input2=real,
            has_cases=False,
            isc=True,
            fid=True,
            kid=True,
            kid_subsets=2,
            kid_subset_size=scale.images,
            samples_shuffle=False,
            feature_extractor_weights_path=str(weights),
            cache=False,
            verbose=False,
        )
    case = f"{scale.images} images of 32 pixels on each side, from pixels"
    for suite, metric, name in (
        ("FID", "fid", "frechet_inception_distance"),
        ("Inception Score", "is", "inception_score_mean"),
        ("KID", "kid", "kernel_inception_distance_mean"),
    ):
        results.add(
            compared(suite, case, ours.figure(metric).value, {"torch-fidelity": partial(float, theirs[name])})
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write everything."""
    parser = harness.argument_parser("evaluation", __doc__, has_cases=False)
    parser.add_argument(
        "--inception-weights", type=Path, help="compare end to end with torch-fidelity instead"
    )
    options = parser.parse_args(arguments)
    results = harness.open_results(options)
    scale = QUICK if options.quick else Scale()
    if options.inception_weights is not None:
        measure_end_to_end(scale, options.inception_weights, results)
    else:
        measure_agreement(scale, results)
        measure_intra_fid(scale, results)
    return results.finish()


if __name__ == "__main__":
    raise SystemExit(main())
