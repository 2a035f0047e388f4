"""The Frechet distance between Gaussian fits of two sets of features."""

from __future__ import annotations

import torch
from torch import Tensor

from sagan.evaluation.moments import Moments


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    r"""Return :math:`\|m_a - m_b\|^2 + \mathrm{tr}(C_a + C_b - 2 (C_a C_b)^{1/2})`.

    With factors :math:`C = F F^T` from eigendecompositions, the trace of the root is the sum of the singular values
    of :math:`F_a^T F_b`. This avoids roots of a product's small eigenvalues, which are mostly rounding, so singular
    covariances need no special care.

    Args:
        mean_a, mean_b: [d], float64.
        covariance_a, covariance_b: [d, d], float64.
    """
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
