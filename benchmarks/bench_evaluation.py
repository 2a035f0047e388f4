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


def unchanged(width: int) -> nn.Module:
    """Return a feature network for torchmetrics that takes features for images."""
    network = nn.Identity()
    network.num_features = width  # type: ignore[assignment]
    return network


def measure_agreement(scale: Scale, results: report.Results) -> None:
    """FID, Inception Score and KID on the same features and logits."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore as TheirScore
    from torchmetrics.image.kid import poly_mmd

    a, b = (features_of(seed, scale.samples, scale.width).double() for seed in (0, 1))
    one, other = Moments.of(a), Moments.of(b)

    def by_torchmetrics() -> float:
        metric = FrechetInceptionDistance(feature=unchanged(scale.width))
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
            metric = TheirScore(feature=unchanged(1008), splits=1)
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
    direct = {
        "direct, eigenvalues": partial(_direct_fid, trace_of_root=_trace_by_eigenvalues),
        "direct, scipy sqrtm": partial(_direct_fid, trace_of_root=_trace_by_scipy),
    }
    for reals, measured in scale.reals:
        distances, times = _timed(frechet_distance_of_features, scale, reals, measured, torch.float32)
        rows: dict[str, report.Row] = {
            "ours": {"status": "ok", "value": statistics.fmean(distances), **times}
        }
        for name, compute in direct.items():
            values, times = _timed(compute, scale, reals, scale.direct, torch.float64)
            differences = [abs(a - b) / b for a, b in zip(distances, values, strict=False)]
            rows[name] = {"status": "ok", "difference": max(differences), **times}
        sizes = f"{GENERATED} samples against {reals:,} reals of {scale.width} features"
        case = f"{scale.classes:,} classes, {sizes}"
        results.add({"suite": "intra-FID", "case": case, "baseline": "ours", "contenders": rows})


def _timed(
    compute: Callable[[Tensor, Tensor], float], scale: Scale, reals: int, classes: int, dtype: torch.dtype
) -> tuple[list[float], dict[str, float]]:
    """Return the distances of some classes, and the median time of one with what that makes for all of them."""
    generated = features_of(1, GENERATED * scale.classes, scale.width).to(dtype)
    distances, seconds = [], []
    for label in range(classes):
        real = features_of(label + 2, reals, scale.width).to(dtype)  # drawing is not timed
        start = time.perf_counter()
        distances.append(compute(real, generated[label :: scale.classes]))
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return distances, {
        "class_s": median,
        "classes_measured": classes,
        "all_classes_s": median * scale.classes,
    }


def _direct_fid(a: Tensor, b: Tensor, trace_of_root: Callable[[Tensor], float]) -> float:
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    means = float((a.mean(0) - b.mean(0)).square().sum())
    return means + float(cov_a.trace() + cov_b.trace()) - 2 * trace_of_root(cov_a @ cov_b)


def _trace_by_eigenvalues(product: Tensor) -> float:
    return float(torch.linalg.eigvals(product).real.clamp_min(0).sqrt().sum())


def _trace_by_scipy(product: Tensor) -> float:
    return float(np.real(np.trace(scipy.linalg.sqrtm(product.numpy()))))


class _Images(Dataset[Tensor]):
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
        real, _ = reals.dataset.fetch(range(len(reals.dataset)))
        blocks = numbered_samples(
            generator, scale.images, seed=0, batch_size=config.block_size, labels_in_use=labels
        )
        fake = torch.cat([images for _, images, _ in blocks])
        theirs = calculate_metrics(
            input1=_Images(fake),
            input2=_Images(real),
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
    parser = harness.argument_parser("evaluation", __doc__)
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
