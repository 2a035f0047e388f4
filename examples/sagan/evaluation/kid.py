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
    # Made once: some allocators leave hundreds of MiB between large blocks that come and go.
    width = features_a.shape[1]
    a, b, kernel = (
        torch.empty(size, columns, dtype=torch.float64, device=device) for columns in (width, width, size)
    )
    distances = []
    for _ in range(subsets):
        for subset, features in ((a, features_a), (b, features_b)):
            subset.copy_(features[torch.randperm(len(features), generator=draws)[:size]])
        distances.append(_squared_mmd(a, b, kernel))
    values = torch.stack(distances)
    return float(values.mean()), float(values.std(correction=0))


def _squared_mmd(a: Tensor, b: Tensor, kernel: Tensor) -> Tensor:
    """Return the estimate from subsets [n, d], without the pairs of a sample and itself; writes over ``kernel``."""
    size = len(a)
    within = sum((_kernel(x, x, kernel).sum() - _kernel_diagonal(x).sum() for x in (a, b)), a.new_zeros(()))
    return within / (size * (size - 1)) - 2 * _kernel(a, b, kernel).mean()


def _kernel(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return torch.mm(a, b.T, out=out).div_(a.size(1)).add_(1).pow_(3)


def _kernel_diagonal(a: Tensor) -> Tensor:
    return (a.square().mean(1) + 1) ** 3
