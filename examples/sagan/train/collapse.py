"""Signs of mode collapse and of a discriminator that has won, from what a run logs anyway."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from sagan.recipes import HealthConfig


@dataclass
class CollapseAlarm:
    """Watches for signs of collapse. Each ``see_*`` method returns a message when its sign appears, else None.

    Attributes:
        config: what counts as a sign.
        saturated_logs: consecutive logs in which D's loss was close to zero.
        diversity_was_enough: whether samples have ever differed enough; before that, G has only begun to learn.
        rising: consecutive evaluations, each worse than the one before.
        last_score: score of the last evaluation.
        last_score_of: the kind of that score.
        raised: signs that are present and reported.
    """

    config: HealthConfig
    saturated_logs: int = 0
    diversity_was_enough: bool = False
    rising: int = 0
    last_score: float | None = None
    last_score_of: str = ""
    raised: list[str] = field(default_factory=list)

    def see_losses(self, d_loss: float) -> str | None:
        """Check the mean loss of D since the last log."""
        self.saturated_logs = self.saturated_logs + 1 if d_loss < self.config.saturated_d_loss else 0
        return self._raise(
            "saturated",
            self.saturated_logs >= self.config.saturated_logs,
            f"D's loss was below {self.config.saturated_d_loss} in {self.saturated_logs} logs in a row: D "
            "recognises every image, and G learns nothing from it",
        )

    def see_diversity(self, diversity: float) -> str | None:
        """Check how much samples differ, as a share of how much real images do."""
        if diversity >= 2 * self.config.least_diversity:
            self.diversity_was_enough = True
        return self._raise(
            "diversity",
            self.diversity_was_enough and diversity < self.config.least_diversity,
            f"samples of one class differ {diversity:.1%} as much as real images do, below "
            f"{self.config.least_diversity:.1%}: modes are lost",
        )

    def see_score(self, score: float, of: str = "") -> str | None:
        """Check the score of an evaluation; less is better. Counting restarts when its kind changes."""
        if of != self.last_score_of:
            self.rising, self.last_score, self.last_score_of = 0, None, of
        worse = self.last_score is not None and score > self.last_score
        self.rising = self.rising + 1 if worse else 0
        self.last_score = score
        return self._raise(
            "rising",
            self.rising >= self.config.rising_evaluations,
            f"the score has become worse in {self.rising} evaluations in a row, now {score:.4g}",
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        state = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "config"}
        return {**state, "raised": list(self.raised)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, list(value) if isinstance(value, list) else value)

    def _raise(self, sign: str, is_there: bool, text: str) -> str | None:
        """Return the text if a sign has just appeared. It may appear again after it has gone."""
        was_there = sign in self.raised
        if is_there and not was_there:
            self.raised.append(sign)
            return text
        if was_there and not is_there:
            self.raised.remove(sign)
        return None


def diversity(images: Tensor, labels: Tensor) -> float:
    """Return the standard deviation over the images of a class, averaged over pixels and classes.

    Args:
        images: uint8 [N, 3, R, R].
        labels: int64 [N]; classes with one image do not count.
    """
    spreads = [
        images[labels == label].float().std(0).mean()
        for label in torch.unique(labels)
        if int((labels == label).sum()) > 1
    ]
    return float(torch.stack(spreads).mean()) if spreads else 0.0
