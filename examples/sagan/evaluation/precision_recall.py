"""Precision and recall of generated features, by nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sagan.evaluation.feature_file import Features, check_finite_features

NEIGHBOURS = 3
_CENTRED = 1024  # rows whose mean is the centre


def precision_and_recall(
    real: Features,
    generated: Features,
    *,
    neighbours: int = NEIGHBOURS,
    block: int = 1024,
    device: torch.device | None = None,
) -> tuple[float, float]:
    """Return precision and recall: the share of generated samples within the real ones, and the reverse.

    A sample is within a set if its distance to some member is at most that member's distance to its k-th nearest
    neighbour in the set. Distances are float64, in tiles of block * block, so memory does not grow with n and m.

    Args:
        real, generated: [n, d] and [m, d].
        neighbours: k.
        block: rows at a time.
        device: where to compute; by default where the features are.

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
        check_finite_features(name, features)
    # Smaller numbers, less rounding; distances stay.
    centre = real[:_CENTRED].double().mean(0)
    reals, fakes = (_Rows(features, centre, block, device) for features in (real, generated))
    real_radii, fake_radii = reals.squared_radii(neighbours), fakes.squared_radii(neighbours)
    precise = torch.zeros(len(generated), dtype=torch.bool, device=real_radii.device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real_radii.device)
    for rows, some_reals in reals.blocks():
        for columns, some_fakes in fakes.blocks():
            distances = _squared_distances(some_reals, some_fakes)
            precise[columns] |= (distances <= real_radii[rows, None]).any(0)
            recalled[rows] |= (distances <= fake_radii[columns]).any(1)
    return float(precise.double().mean()), float(recalled.double().mean())


class _Rows:
    """The rows of a set of features as float64, centred and on the device, a block at a time."""

    def __init__(self, features: Features, centre: Tensor, block: int, device: torch.device | None) -> None:
        self._features = features
        self._centre = centre if device is None else centre.to(device)
        self._block = block

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield which rows, and the rows."""
        count = len(self._features)
        for start in range(0, count, self._block):
            rows = slice(start, min(start + self._block, count))
            yield rows, self._features[rows].to(self._centre) - self._centre

    def squared_radii(self, neighbours: int) -> Tensor:
        """Return each row's squared distance to its k-th nearest neighbour, [n]."""
        radii = []
        for rows, some in self.blocks():
            nearest = some.new_full((len(some), neighbours), torch.inf)
            for columns, others in self.blocks():
                distances = _squared_distances(some, others)
                if rows == columns:
                    distances.fill_diagonal_(torch.inf)  # not its own neighbour
                candidates = torch.cat([nearest, distances], 1)
                nearest = candidates.topk(neighbours, largest=False).values
            radii.append(nearest[:, -1])
        return torch.cat(radii)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    norms = a.square().sum(1, keepdim=True) + b.square().sum(1)
    return norms.sub_((a @ b.T).mul_(2))
