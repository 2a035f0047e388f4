"""FID, Inception Score, KID, intra-FID, precision and recall against independent forms on the same features."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from sagan.errors import NotFiniteError
from sagan.evaluation.fid import Moments, frechet_distance_of_features, frechet_distance_of_moments
from sagan.evaluation.inception_score import InceptionScore, splits_in_order
from sagan.evaluation.kid import kernel_inception_distance
from sagan.evaluation.precision_recall import precision_and_recall


def features_of(seed: int, count: int, width: int = 24, shift: float = 0.0) -> Tensor:
    """Correlated features with means that are large compared with some deviations."""
    draws = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    return torch.randn(count, width, generator=draws) @ mixing * (1 + 0.2 * seed) + 3 + shift


def direct_distance(a: Tensor, b: Tensor) -> float:
    """The formula, by scipy's matrix root."""
    a, b = a.double(), b.double()
    cov_a, cov_b = (np.atleast_2d(np.cov(x.numpy(), rowvar=False)) for x in (a, b))
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    difference = (a.mean(0) - b.mean(0)).numpy()
    return float(difference @ difference + np.trace(cov_a + cov_b - 2 * np.real(root)))


def moments_distance(a: Tensor, b: Tensor) -> float:
    return frechet_distance_of_moments(Moments.of(a), Moments.of(b))


class TestFrechetDistance:
    @pytest.mark.parametrize("distance", [moments_distance, frechet_distance_of_features])
    def test_is_the_formula_by_scipys_matrix_root(self, distance: Callable[[Tensor, Tensor], float]) -> None:
        a, b = features_of(1, 300), features_of(2, 250, shift=0.3)
        assert distance(a, b) == pytest.approx(direct_distance(a, b), rel=1e-10)

    def test_of_a_set_to_itself_is_zero_also_when_covariances_are_singular(self) -> None:
        a = features_of(1, 10)  # fewer samples than features
        assert moments_distance(a, a) == pytest.approx(0, abs=1e-6)

    def test_streaming_in_blocks_and_merging_changes_nothing(self) -> None:
        a = features_of(1, 300)
        blocks, halves = Moments.empty(24), [Moments.empty(24), Moments.empty(24)]
        for number, block in enumerate(torch.split(a, 37)):
            blocks.add(block)
            halves[number % 2].add(block)
        halves[0].merge(halves[1])
        whole = Moments.of(a)
        for each in (blocks, halves[0]):
            assert each.count == 300
            torch.testing.assert_close(each.mean, whole.mean, rtol=1e-13, atol=0)
            torch.testing.assert_close(each.covariance, whole.covariance, rtol=1e-11, atol=1e-13)

    def test_huge_means_lose_no_digits(self) -> None:
        a, b = features_of(1, 300).double(), features_of(2, 250).double()
        assert moments_distance(a + 1e5, b + 1e5) == pytest.approx(moments_distance(a, b), rel=1e-6)


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save", "ignore:std")
def test_fid_and_inception_score_are_torchmetrics_on_the_same_features() -> None:
    fid, inception = map(pytest.importorskip, ("torchmetrics.image.fid", "torchmetrics.image.inception"))
    flatten = nn.Flatten()  # of what torchmetrics takes for images
    flatten.num_features = 24  # type: ignore[assignment]
    a, b = features_of(1, 300).double(), features_of(2, 250).double()
    distance, score = (
        fid.FrechetInceptionDistance(feature=flatten),
        inception.InceptionScore(flatten, splits=1),
    )
    distance.update(a, real=True)
    distance.update(b, real=False)
    assert moments_distance(a, b) == pytest.approx(float(distance.compute()), rel=1e-8)
    score.update(a)
    ours = InceptionScore(24, splits=1)
    for block in torch.split(a, 50):
        ours.add(block, torch.zeros(len(block), dtype=torch.int64))
    assert ours.result()[0] == pytest.approx(float(score.compute()[0]), rel=1e-10)


class TestIntraFid:
    @pytest.mark.parametrize("counts", [(7, 5), (10, 24), (24, 25), (40, 12), (60, 70)])
    @pytest.mark.parametrize("distance", [moments_distance, frechet_distance_of_features])
    def test_both_forms_are_the_direct_formula(
        self, counts: tuple[int, int], distance: Callable[[Tensor, Tensor], float]
    ) -> None:
        a, b = features_of(1, counts[0]), features_of(2, counts[1])
        cov_a, cov_b = a.double().T.cov(), b.double().T.cov()
        # The direct root of a singular product loses half of its digits; by eigenvalues it keeps them.
        root_trace = torch.linalg.eigvals(cov_a @ cov_b).real.clamp_min(0).sqrt().sum()
        direct = (a.double().mean(0) - b.double().mean(0)).square().sum()
        direct += cov_a.trace() + cov_b.trace() - 2 * root_trace
        assert distance(a, b) == pytest.approx(float(direct), rel=1e-6)


class TestInceptionScore:
    def test_mean_and_deviation_are_over_ten_splits_in_order(self) -> None:
        logits = torch.randn(203, 5, generator=torch.Generator().manual_seed(3)).double()
        score = InceptionScore(5)
        score.add(logits[:90], splits_in_order(0, 90, 203))
        score.add(logits[90:], splits_in_order(90, 203, 203))
        direct = []
        for split in range(10):
            p = logits[split * 203 // 10 : (split + 1) * 203 // 10].softmax(1)
            direct.append(float((p * (p.log() - p.mean(0).log())).sum(1).mean().exp()))
        assert score.result() == (pytest.approx(np.mean(direct)), pytest.approx(np.std(direct)))

    @pytest.mark.parametrize(
        ("logits", "expected"), [(torch.ones(40, 4), 1.0), (100 * torch.eye(4).repeat(10, 1), 4.0)]
    )
    def test_ranges_from_one_to_the_number_of_classes(self, logits: Tensor, expected: float) -> None:
        score = InceptionScore(4, splits=2)
        score.add(logits, splits_in_order(0, 40, 40, 2))
        assert score.result()[0] == pytest.approx(expected, rel=1e-9)

    def test_empty_splits_are_refused(self) -> None:
        score = InceptionScore(4)
        score.add(torch.ones(3, 4), splits_in_order(0, 3, 3))
        with pytest.raises(ValueError, match="samples in each of 10 splits"):
            score.result()


class TestKernelInceptionDistance:
    def test_is_torchmetrics_where_the_subset_is_the_whole(self) -> None:
        metric = pytest.importorskip("torchmetrics.image.kid")
        a, b = features_of(1, 60).double(), features_of(2, 60).double()
        theirs = metric.poly_mmd(a, b)
        assert kernel_inception_distance(a, b, subsets=2, subset_size=60)[0] == pytest.approx(
            float(theirs), rel=1e-9
        )

    def test_subsets_average_to_the_whole_and_have_a_deviation(self) -> None:
        a, b = features_of(1, 200), features_of(2, 200)
        whole, none = kernel_inception_distance(a, b, subsets=1, subset_size=200)
        mean, deviation = kernel_inception_distance(a, b, subsets=100, subset_size=50)
        assert none == 0
        assert deviation > 0
        assert abs(mean - whole) < 4 * deviation / 10


class TestPrecisionAndRecall:
    @pytest.mark.parametrize("block", [7, 1024])
    def test_are_a_brute_force_count(self, block: int) -> None:
        a, b = features_of(1, 90, width=3), features_of(2, 70, width=3, shift=0.9)

        def share(inside: Tensor, of: Tensor) -> float:
            radii = [sorted(float((x - y).norm()) for y in of)[3] for x in of]  # the first is its own, at 0
            found = [any(float((s - x).norm()) <= r for x, r in zip(of, radii, strict=True)) for s in inside]
            return sum(found) / len(found)

        precision, recall = precision_and_recall(a, b, block=block)
        assert (precision, recall) == (share(b.double(), a.double()), share(a.double(), b.double()))
        assert 0 < precision < 1
        assert 0 < recall < 1

    def test_are_one_for_the_same_set_and_zero_for_a_distant_one(self) -> None:
        a = features_of(1, 30)
        assert precision_and_recall(a, a) == (1.0, 1.0)
        assert precision_and_recall(a, a + 1000) == (0.0, 0.0)


def score_of(logits: Tensor) -> float:
    score = InceptionScore(logits.size(1), splits=1)
    score.add(logits, torch.zeros(len(logits), dtype=torch.int64))
    return score.result()[0]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[0.0, -torch.inf]] * 2, 1),
        ([[0.0, -torch.inf], [-torch.inf, 0.0]], 2),
        ([[0.0, 0.0, -torch.inf]] * 3, 1),
    ],
)
def test_a_class_of_probability_zero_adds_nothing_to_the_inception_score(
    rows: list[list[float]], expected: float
) -> None:
    assert score_of(torch.tensor(rows)) == pytest.approx(expected, rel=1e-14)
    assert score_of(torch.tensor(rows).clamp_min(-1e3)) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("row", [[0.0, torch.nan], [0.0, torch.inf], [-torch.inf, -torch.inf]])
def test_logits_without_probabilities_give_an_error_and_no_score(row: list[float]) -> None:
    with pytest.raises(NotFiniteError, match="class probabilities: expected finite values, got 2 of 4"):
        score_of(torch.tensor([[0.0, 1.0], row]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "metric",
    [moments_distance, frechet_distance_of_features, kernel_inception_distance, precision_and_recall],
)
def test_values_that_are_not_finite_give_an_error_and_no_figure(
    metric: Callable[[Tensor, Tensor], object], value: float
) -> None:
    sound, broken = features_of(1, 30), features_of(2, 30)
    broken[7, 3] = value
    for pair in ((sound, broken), (broken, sound)):
        with pytest.raises(NotFiniteError, match="expected finite values, got"):
            metric(*pair)


@pytest.mark.parametrize(
    ("metric", "shapes", "message"),
    [
        (frechet_distance_of_features, [(1, 3), (2, 3)], r"features_a: expected .* at least 2 samples, got"),
        (frechet_distance_of_features, [(2, 3), (2, 4)], "features_b: expected 3 features as .*, got 4"),
        (kernel_inception_distance, [(1, 3), (5, 3)], "at least 2 samples in each set, got 1"),
        (precision_and_recall, [(9, 2), (3, 2)], "generated: expected more than 3 samples"),
    ],
)
def test_too_few_samples_and_other_widths_are_refused(
    metric: Callable[[Tensor, Tensor], object], shapes: list[tuple[int, int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        metric(*map(torch.zeros, shapes))
