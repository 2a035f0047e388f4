"""The Kernel Inception Distance."""

from __future__ import annotations

import torch
from torch import Tensor

SUBSETS = 100
SUBSET_SIZE = 1000


def kernel_inception_distance(
    features_a: Tensor,
    features_b: Tensor,
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = 0,
) -> tuple[float, float]:
    r"""Return mean and standard deviation over random subsets of the squared MMD with kernel :math:`(x^T y/d + 1)^3`.

    Each is an unbiased estimate, so values slightly below 0 are possible.

    Args:
        features_a, features_b: [n, d].
        subsets: number of pairs of subsets.
        subset_size: samples in a subset, drawn without repetition; at most as many as there are in each set.
        seed: of the subsets.

    Raises:
        ValueError: if there are fewer than two samples in a set.

    Reference:
        Binkowski et al., Demystifying MMD GANs.
    """
    size = min(subset_size, len(features_a), len(features_b))
    if size < 2:
        raise ValueError(f"kernel distance: expected at least 2 samples in each set, got {size}")
    draws = torch.Generator().manual_seed(seed)  # on the CPU, so that devices do not change the subsets
    distances = []
    for _ in range(subsets):
        a, b = (
            features[torch.randperm(len(features), generator=draws)[:size].to(features.device)].double()
            for features in (features_a, features_b)
        )
        distances.append(_squared_mmd(a, b))
    values = torch.stack(distances)
    return float(values.mean()), float(values.std(correction=0))


def _squared_mmd(a: Tensor, b: Tensor) -> Tensor:
    size = len(a)
    within = sum((_kernel(x, x).sum() - _kernel_of_same(x).sum() for x in (a, b)), a.new_zeros(()))
    return within / (size * (size - 1)) - 2 * _kernel(a, b).mean()


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.size(1) + 1) ** 3


def _kernel_of_same(a: Tensor) -> Tensor:
    return (a.square().mean(1) + 1) ** 3
