"""The Kernel Inception Distance."""

from __future__ import annotations

import torch
from torch import Tensor

from sagan.evaluation.feature_file import Features, check_finite_features

SUBSETS = 100
SUBSET_SIZE = 1000


def kernel_inception_distance(
    features_a: Features,
    features_b: Features,
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = 0,
    device: torch.device | None = None,
) -> tuple[float, float]:
    r"""Return mean and standard deviation over random subsets of the squared MMD with kernel :math:`(x^T y/d + 1)^3`.

    Each is an unbiased estimate, so it can be slightly below 0.

    Args:
        features_a, features_b: [n, d].
        subsets: number of pairs of subsets.
        subset_size: samples in a subset, drawn without replacement; fewer if a set is smaller.
        seed: seed of the subsets.
        device: where to compute; by default where the features are.

    Raises:
        ValueError: if there are fewer than two samples in a set, or a value is NaN or infinite.

    Reference:
        Binkowski et al., Demystifying MMD GANs.
    """
    size = min(subset_size, len(features_a), len(features_b))
    if size < 2:
        raise ValueError(f"kernel inception distance: expected at least 2 samples in each set, got {size}")
    check_finite_features("features_a", features_a)
    check_finite_features("features_b", features_b)
    draws = torch.Generator().manual_seed(seed)  # on the CPU: the same subsets on every device
    distances = []
    for _ in range(subsets):
        a, b = (
            _to(device, features[torch.randperm(len(features), generator=draws)[:size]]).double()
            for features in (features_a, features_b)
        )
        distances.append(_squared_mmd(a, b))
    values = torch.stack(distances)
    return float(values.mean()), float(values.std(correction=0))


def _to(device: torch.device | None, features: Tensor) -> Tensor:
    return features if device is None else features.to(device)


def _squared_mmd(a: Tensor, b: Tensor) -> Tensor:
    """Return the estimate from subsets [n, d], without the pairs of a sample and itself."""
    size = len(a)
    within = sum((_kernel(x, x).sum() - _kernel_diagonal(x).sum() for x in (a, b)), a.new_zeros(()))
    return within / (size * (size - 1)) - 2 * _kernel(a, b).mean()


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.size(1) + 1) ** 3


def _kernel_diagonal(a: Tensor) -> Tensor:
    return (a.square().mean(1) + 1) ** 3
