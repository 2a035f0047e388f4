"""Statistics over more than one batch: those of several processes, and standing statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor

from sagan_layers.conditional_norm.reference import all_gather
from sagan_layers.torch_support import accumulation_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SynchronizedStatistics:
    """The processes over which training takes statistics. Copies use the same group; pickles do not contain it.

    Attributes:
        group: these processes; None for all.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> SynchronizedStatistics:
        return self

    def __reduce__(self) -> tuple[type[SynchronizedStatistics], tuple[()]]:
        return type(self), ()


class StandingStatistics:
    """Count, mean and sum of squared deviations of each channel of all batches added, in float64."""

    def __init__(self, num_features: int, device: torch.device) -> None:
        # A tensor, because torch.compile treats numbers as constants.
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.mean)

    def var(self, *, correction: int) -> Tensor:
        """Return the variance of all values."""
        return self.squares / (self.count - correction).clamp_min(1)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Add the values of x, [N, C, H, W]."""
        var, mean = torch.var_mean(x.to(accumulation_dtype(x.dtype)), (0, 2, 3), correction=0)
        if x.numel() == 0:
            return
        count = self.count.new_full((), x.numel() // x.size(1))
        self._merge(count, mean.double(), var.double() * count)

    @torch.no_grad()
    def gather(self, process_group: ProcessGroup | None) -> None:
        """Merge the statistics of all processes, in the same order on each.

        Raises:
            ValueError: if no process has added a batch.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            local = torch.cat([self.count[None], self.mean, self.squares])
            self.count, self.mean, self.squares = (
                torch.zeros_like(each) for each in (self.count, self.mean, self.squares)
            )
            for part in all_gather(local, process_group):
                if part[0]:
                    self._merge(part[0], *part[1:].chunk(2))
        if not self.count:
            raise ValueError(
                "standing statistics: expected at least one forward pass of each layer, got none"
            )

    def _merge(self, count: Tensor, mean: Tensor, squares: Tensor) -> None:
        total = self.count + count
        difference = mean - self.mean
        self.mean = self.mean + difference * (count / total)
        self.squares = self.squares + squares + difference.square() * (self.count * count / total)
        self.count = total
