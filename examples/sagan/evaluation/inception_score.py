"""The Inception Score of a stream of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from sagan.errors import check_finite

SPLITS = 10


class InceptionScore:
    r"""The exponential of the mean divergence of class probabilities from their mean, in each of several splits.

    .. math:: \mathrm{IS} = \exp\, \mathbb{E}_x \mathrm{KL}(p(y|x) \,\|\, p(y))
        = \exp\Big(\frac{1}{n}\sum_{i,y} p_{iy} \log p_{iy} - \sum_y \bar p_y \log \bar p_y\Big)

    Reference:
        Salimans et al., Improved Techniques for Training GANs.
    """

    def __init__(self, num_logits: int, splits: int = SPLITS, device: torch.device | None = None) -> None:
        self.counts = torch.zeros(splits, dtype=torch.float64, device=device)
        self.negative_entropies = torch.zeros(splits, dtype=torch.float64, device=device)
        self.probabilities = torch.zeros(splits, num_logits, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, splits: Tensor) -> None:
        """Add logits [n, num_logits], where -inf is a class that cannot be, and the split of each, int64 [n].

        Raises:
            NotFiniteError: for NaN, +inf, or a row of -inf.
        """
        log_probabilities = logits.to(self.probabilities).log_softmax(1)
        probabilities = log_probabilities.exp()
        check_finite("class probabilities", probabilities)
        negative_entropies = torch.where(probabilities > 0, probabilities * log_probabilities, 0).sum(1)
        splits = splits.to(self.counts.device)
        for split in set(splits.tolist()):
            chosen = splits == split
            self.counts[split] += chosen.sum()
            self.negative_entropies[split] += negative_entropies[chosen].sum()
            self.probabilities[split] += probabilities[chosen].sum(0)

    def result(self) -> tuple[float, float]:
        """Return mean and standard deviation (divided by the number of splits) of the splits' scores.

        Raises:
            ValueError: if a split has no samples.
        """
        if (self.counts == 0).any():
            raise ValueError(
                f"inception score: expected samples in each of {len(self.counts)} splits, got {self.counts.tolist()}"
            )
        means = self.probabilities / self.counts[:, None]
        scores = (self.negative_entropies / self.counts - torch.special.xlogy(means, means).sum(1)).exp()
        return float(scores.mean()), float(scores.std(correction=0))


def splits_in_order(start: int, stop: int, count: int, splits: int = SPLITS) -> Tensor:
    """Return the splits of samples start to stop - 1: split s begins at sample s * count // splits."""
    return ((torch.arange(start, stop) + 1) * splits - 1) // count
