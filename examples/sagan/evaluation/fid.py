"""The Frechet distance between Gaussian fits of two sets of features, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sagan.errors import check_finite


@dataclass
class Moments:
    """Count, mean and summed products of deviations of the features added so far.

    The same blocks in the same order give the same bits. Sums of raw products would lose digits where means are large
    compared with deviations; these do not, also when merged.

    Attributes:
        count: n.
        mean: [d], float64.
        products: sum over samples of the outer products of deviations from the mean, [d, d], float64.
    """

    count: int
    mean: Tensor
    products: Tensor

    @classmethod
    def empty(cls, num_features: int, device: torch.device | None = None) -> Moments:
        """Return the moments of no features."""
        mean = torch.zeros(num_features, dtype=torch.float64, device=device)
        return cls(0, mean, torch.zeros(num_features, num_features, dtype=torch.float64, device=device))

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Return the moments of features [n, d]."""
        moments = cls.empty(features.size(1), features.device)
        moments.add(features)
        return moments

    def add(self, features: Tensor) -> None:
        """Add features [n, d], in place."""
        if len(features) == 0:
            return
        features = features.to(self.mean)
        mean = features.mean(0)
        deviations = features - mean
        self.products.addmm_(deviations.T, deviations)
        self._shift(len(features), mean)

    def merge(self, other: Moments) -> None:
        """Add the features that ``other`` has seen, in place."""
        if other.count == 0:
            return
        self.products.add_(other.products)
        self._shift(other.count, other.mean)

    def to(self, device: torch.device) -> Moments:
        """Return these moments on a device."""
        return Moments(self.count, self.mean.to(device), self.products.to(device))

    def _shift(self, count: int, mean: Tensor) -> None:
        total = self.count + count
        difference = mean - self.mean
        self.products.addr_(difference, difference, alpha=self.count * count / total)
        self.mean = self.mean + difference * (count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """The covariance over n - 1, [d, d].

        Raises:
            ValueError: for fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"covariance: expected at least 2 samples, got {self.count}")
        return self.products / (self.count - 1)


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    r"""Return :math:`\|m_a - m_b\|^2 + \mathrm{tr}(C_a + C_b - 2 (C_a C_b)^{1/2})`.

    With factors :math:`C = F F^T` from eigendecompositions, the trace of the root is the sum of the singular values
    of :math:`F_a^T F_b`. This avoids roots of a product's small eigenvalues, which are mostly rounding, so singular
    covariances need no special care.

    Args:
        mean_a, mean_b: [d], float64.
        covariance_a, covariance_b: [d, d], float64.

    Raises:
        NotFiniteError: if a value is NaN or infinite.
    """
    for values in (mean_a, covariance_a, mean_b, covariance_b):
        check_finite("frechet distance: moments", values)
    cross = torch.linalg.svdvals(_factor(covariance_a).T @ _factor(covariance_b)).sum()
    return _distance(mean_a - mean_b, covariance_a.trace() + covariance_b.trace(), cross)


def frechet_distance_of_moments(a: Moments, b: Moments) -> float:
    """Return the Frechet distance between Gaussians with these moments."""
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def frechet_distance_of_features(features_a: Tensor, features_b: Tensor) -> float:
    r"""Return the Frechet distance between the Gaussian fits of two sets of features, with covariances over n - 1.

    With fewer samples than features it needs no d x d matrix: for centred features :math:`A, B` divided by
    :math:`\sqrt{n - 1}`, :math:`C_a = A^T A`, the trace of the root is the sum of the singular values of
    :math:`A B^T`, [n_a, n_b].

    Args:
        features_a, features_b: [n, d], at least two samples in each.

    Raises:
        ValueError: if a set has fewer than two samples, a value is NaN or infinite, or widths differ.
    """
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"{name}: expected [n, d] with at least 2 samples, got {list(features.shape)}")
        check_finite(name, features)
    if features_a.size(1) != features_b.size(1):
        raise ValueError(
            f"features_b: expected {features_a.size(1)} features as in features_a, got {features_b.size(1)}"
        )
    (mean_a, a), (mean_b, b) = _centred(features_a), _centred(features_b)
    if min(len(a), len(b)) > a.size(1):
        return frechet_distance(mean_a, a.T @ a, mean_b, b.T @ b)
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return _distance(mean_a - mean_b, a.square().sum() + b.square().sum(), cross)


def _centred(features: Tensor) -> tuple[Tensor, Tensor]:
    features = features.double()
    mean = features.mean(0)
    return mean, (features - mean) / (len(features) - 1) ** 0.5


def _factor(covariance: Tensor) -> Tensor:
    """Return F [d, rank] with C = F F^T, without the directions that are only rounding."""
    values, vectors = torch.linalg.eigh(covariance)
    significant = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    factor: Tensor = vectors[:, significant] * values[significant].sqrt()
    return factor


def _distance(difference: Tensor, traces: Tensor, cross: Tensor) -> float:
    return float((difference.square().sum() + traces - 2 * cross).clamp_min(0))
