"""Precision and recall of generated features, by nearest neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from sagan.errors import check_finite

NEIGHBOURS = 3


def precision_and_recall(
    real: Tensor, generated: Tensor, *, neighbours: int = NEIGHBOURS, block: int = 1024
) -> tuple[float, float]:
    """Return precision and recall: the share of generated samples within the real ones, and the reverse.

    A sample is within a set if its distance to some member is at most that member's distance to its k-th nearest
    neighbour in the set. Distances are float64, in blocks of rows, so memory grows with block * n.

    Args:
        real, generated: [n, d] and [m, d].
        neighbours: k.
        block: rows at a time.

    Raises:
        ValueError: if a set has k samples or fewer, or a value is NaN or infinite.

    Reference:
        Kynkaanniemi et al., Improved Precision and Recall Metric for Assessing Generative Models.
    """
    for name, features in (("real", real), ("generated", generated)):
        if len(features) <= neighbours:
            raise ValueError(
                f"{name}: expected more than {neighbours} samples for {neighbours} neighbours, got {len(features)}"
            )
        check_finite(name, features)
    real, generated = real.double(), generated.double()
    centre = real.mean(0)  # smaller numbers, less rounding; distances stay
    real, generated = real - centre, generated - centre
    real_radii = _squared_radii(real, neighbours, block)
    generated_radii = _squared_radii(generated, neighbours, block)
    precise = torch.zeros(len(generated), dtype=torch.bool, device=real.device)
    recalled: list[Tensor] = []
    for rows in torch.split(real, block):
        distances = _squared_distances(rows, generated)
        radii = real_radii[len(recalled) * block :][: len(rows)]
        precise |= (distances <= radii[:, None]).any(0)
        recalled.append((distances <= generated_radii).any(1))
    return float(precise.double().mean()), float(torch.cat(recalled).double().mean())


def _squared_radii(features: Tensor, neighbours: int, block: int) -> Tensor:
    """Return each sample's squared distance to its k-th nearest neighbour, [n]."""
    radii = []
    for start in range(0, len(features), block):
        distances = _squared_distances(features[start : start + block], features)
        distances.diagonal(start).fill_(torch.inf)  # not its own neighbour
        radii.append(distances.kthvalue(neighbours, dim=1).values)
    return torch.cat(radii)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    products = a @ b.T
    return a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * products
