"""Means of measurements between two logs, also when the number of processes changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor


class Sums(TypedDict):
    """Sums and counts of measurements by name, tensors or numbers."""

    sums: dict[str, Any]
    counts: dict[str, Any]


@dataclass
class Means:
    """Running sums of scalars. They stay on the device until the log needs them; a NaN or an infinity is skipped."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, scalars: Mapping[str, Tensor]) -> None:
        """Add one value of each."""
        for name, value in scalars.items():
            value = value.detach().double()
            finite = value.isfinite()
            value = torch.where(finite, value, 0.0)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts[name] + finite if name in self.counts else finite.long()

    def now(self) -> dict[str, float]:
        """Return the means so far."""
        return {name: float(total / self.counts[name]) for name, total in self.sums.items()}

    def take(self) -> dict[str, float]:
        """Return the means and start again."""
        means = self.now()
        self.sums, self.counts = {}, {}
        return means

    def state_dict(self) -> Sums:
        """Return the sums and counts."""
        return {"sums": self.sums, "counts": self.counts}

    def load_state_dict(self, state: Sums, device: torch.device) -> None:
        """Restore sums and counts, tensors or numbers."""
        self.sums, self.counts = (
            {name: torch.as_tensor(value, dtype=dtype, device=device) for name, value in values.items()}
            for values, dtype in ((state["sums"], torch.float64), (state["counts"], torch.int64))
        )


def average_over_ranks(states: Sequence[Sums]) -> Sums:
    """Return one rank's share of the sums and counts of several."""
    counts = {name: sum(each["counts"][name] for each in states) for name in states[0]["counts"]}
    share = {name: round(count / len(states)) for name, count in counts.items()}
    totals = {name: sum(each["sums"][name] for each in states) for name in counts}
    return {
        "sums": {name: totals[name] * share[name] / max(counts[name], 1) for name in counts},
        "counts": share,
    }
