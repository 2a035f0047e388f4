"""Frechet distances between Gaussian fits of features: of two sets, and class by class."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    r"""Return :math:`\|m_a - m_b\|^2 + \mathrm{tr}(C_a + C_b - 2 (C_a C_b)^{1/2})`.

    With factors :math:`C = F F^T` from eigendecompositions, the trace of the root is the sum of the singular values
    of :math:`F_a^T F_b`. No root is taken of a product's small eigenvalues, which rounding would drown, so
    singular covariances are no trouble.

    Args:
        mean_a, mean_b: [d], float64.
        covariance_a, covariance_b: [d, d], float64.
    """
    cross = torch.linalg.svdvals(_factor(covariance_a).T @ _factor(covariance_b)).sum()
    return _distance(mean_a - mean_b, covariance_a.trace() + covariance_b.trace(), cross)


def frechet_distance_of_features(features_a: Tensor, features_b: Tensor) -> float:
    r"""Return the Frechet distance between the Gaussian fits of two sets of features, covariances over n - 1.

    With fewer samples than features no d x d matrix is made: for centred features :math:`A, B` divided by
    :math:`\sqrt{n - 1}`, :math:`C_a = A^T A`, the trace of the root is the sum of the singular values of
    :math:`A B^T`, [n_a, n_b].

    Args:
        features_a, features_b: [n, d], two samples at least in each.

    Raises:
        ValueError: if a set has fewer than two samples, or their widths differ.
    """
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"{name}: expected [n, d] with at least 2 samples, got {list(features.shape)}")
    if features_a.size(1) != features_b.size(1):
        raise ValueError(
            f"features_b: expected {features_a.size(1)} features as in features_a, got {features_b.size(1)}"
        )
    (mean_a, a), (mean_b, b) = _centred(features_a), _centred(features_b)
    if min(len(a), len(b)) > a.size(1):
        return frechet_distance(mean_a, a.T @ a, mean_b, b.T @ b)
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return _distance(mean_a - mean_b, a.square().sum() + b.square().sum(), cross)


def frechet_distances_by_class(
    features_a: Callable[[int], Tensor], features_b: Callable[[int], Tensor], classes: Sequence[int]
) -> Tensor:
    """Return the Frechet distance of each class; their mean is the intra-FID.

    One class is in memory at a time.

    Args:
        features_a, features_b: return the features [n, d] of a class.
        classes: which ones.

    Shape:
        - Output: float64 [len(classes)].
    """
    distances = [frechet_distance_of_features(features_a(label), features_b(label)) for label in classes]
    return torch.tensor(distances, dtype=torch.float64)


def _centred(features: Tensor) -> tuple[Tensor, Tensor]:
    features = features.double()
    mean = features.mean(0)
    return mean, (features - mean) / (len(features) - 1) ** 0.5


def _factor(covariance: Tensor) -> Tensor:
    """Return F [d, rank] with C = F F^T, without the directions that are rounding alone."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    factor: Tensor = vectors[:, kept] * values[kept].sqrt()
    return factor


def _distance(difference: Tensor, traces: Tensor, cross: Tensor) -> float:
    return float((difference.square().sum() + traces - 2 * cross).clamp_min(0))
