"""Mean and covariance of a stream of features, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
