"""What watches a run: numbers that are not finite, and the signs of a collapse."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sagan.recipes import HealthConfig


@dataclass(frozen=True)
class Skipped:
    """Updates that were left out because a loss or a gradient was not finite.

    Attributes:
        count: how many, since this was last asked.
        first_iteration: the iteration of the first of them.
        in_a_row: how many iterations with one there were in a row, up to now.
        since: the first iteration of that row.
    """

    count: int
    first_iteration: int
    in_a_row: int
    since: int


class FiniteGuard:
    """Leaves out updates whose loss or gradients hold a NaN or an infinity, without making the host wait.

    The optimizer's fused kernel reads a flag on the device and changes nothing where it is set: neither weights
    nor moments. :meth:`skipped` tells afterwards; it waits for the device, so ask when the log is written.

    Args:
        device: of the networks.
    """

    def __init__(self, device: torch.device) -> None:
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._first = torch.full((), -1, dtype=torch.int64, device=device)
        self._since = torch.full((), -1, dtype=torch.int64, device=device)
        self._found = torch.zeros((), device=device)
        self._iteration = 0

    @contextlib.contextmanager
    def iteration(self, number: int, moving: Sequence[Tensor]) -> Iterator[None]:
        """Enclose an iteration's updates.

        Args:
            number: of the iteration.
            moving: buffers that forward passes move, such as running statistics; they are put back if the
                iteration has an update that was left out.
        """
        self._iteration = number
        self._found = torch.zeros_like(self._found)
        before = [tensor.clone() for tensor in moving]
        yield
        found = self._found > 0
        self._since = torch.where(found & (self._in_a_row == 0), number, self._since)
        self._in_a_row = torch.where(found, self._in_a_row + 1, 0)
        for tensor, old in zip(moving, before, strict=True):
            tensor.copy_(torch.where(found, old, tensor))

    def step(self, optimizer: torch.optim.Optimizer, network: nn.Module, loss: Tensor) -> None:
        """Apply the gradients of a network, unless one of them or their loss is not finite.

        Args:
            optimizer: a fused one.
            network: whose gradients it applies.
            loss: that they are of; a hinge loss of NaN has gradients of 0.
        """
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        found = (torch.nn.utils.get_total_norm(gradients) + loss.detach()).isfinite().logical_not()
        self._first = torch.where(found & (self._count == 0), self._iteration, self._first)
        self._count = self._count + found
        self._found = torch.maximum(self._found, found.float())
        optimizer.found_inf = found.float()  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]

    def skipped(self) -> Skipped | None:
        """Return what was left out since this was last called, None if nothing was."""
        count = int(self._count)
        if count == 0:
            return None
        found = Skipped(count, int(self._first), int(self._in_a_row), int(self._since))
        self._count = torch.zeros_like(self._count)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on from, once :meth:`skipped` has been called."""
        return {"in_a_row": int(self._in_a_row), "since": int(self._since)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state that :meth:`state_dict` returned."""
        self._in_a_row.fill_(state["in_a_row"])
        self._since.fill_(state["since"])


def parameters_not_finite(network: nn.Module) -> list[str]:
    """Return the names of parameters whose values or gradients hold a NaN or an infinity."""
    return [
        name
        for name, parameter in network.named_parameters()
        for tensor in (parameter, parameter.grad)
        if tensor is not None and not bool(tensor.detach().isfinite().all())
    ]


@dataclass
class CollapseAlarm:
    """Looks for the signs of a collapse in what is logged anyway.

    Attributes:
        config: what counts as a sign.
        saturated_logs: logs in a row in which D's loss was next to nothing.
        diversity_was_enough: whether the samples have ever differed as they should; before, G has not begun.
        rising: evaluations in a row, each worse than the one before.
        last_score: of the last evaluation.
        last_score_of: what that is a score of.
        raised: the signs that have been told already.
    """

    config: HealthConfig
    saturated_logs: int = 0
    diversity_was_enough: bool = False
    rising: int = 0
    last_score: float | None = None
    last_score_of: str = ""
    raised: list[str] = field(default_factory=list)

    def see_losses(self, d_loss: float) -> str | None:
        """Take in the mean loss of D since the last log; return what is alarming, if it is and is new."""
        self.saturated_logs = self.saturated_logs + 1 if d_loss < self.config.saturated_d_loss else 0
        return self._raise(
            "saturated",
            self.saturated_logs >= self.config.saturated_logs,
            f"D's loss was below {self.config.saturated_d_loss} in {self.saturated_logs} logs in a row: D tells "
            "every image, and G learns nothing from it",
        )

    def see_diversity(self, diversity: float) -> str | None:
        """Take in how much samples differ, as a share of what real images do."""
        if diversity >= 2 * self.config.least_diversity:
            self.diversity_was_enough = True
        return self._raise(
            "diversity",
            self.diversity_was_enough and diversity < self.config.least_diversity,
            f"samples of one class differ {diversity:.1%} as much as real images do, below "
            f"{self.config.least_diversity:.1%}: modes are lost",
        )

    def see_score(self, score: float, of: str = "") -> str | None:
        """Take in the score of an evaluation, of which less is better.

        Args:
            score: the number.
            of: what it is; after one of another kind counting starts anew.
        """
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
        """Return what a resumed run goes on from."""
        return {
            "saturated_logs": self.saturated_logs,
            "diversity_was_enough": self.diversity_was_enough,
            "rising": self.rising,
            "last_score": self.last_score,
            "last_score_of": self.last_score_of,
            "raised": list(self.raised),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state that :meth:`state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, list(value) if isinstance(value, list) else value)

    def _raise(self, sign: str, is_there: bool, text: str) -> str | None:
        """Return the text when a sign has just appeared; it may appear again after it has gone."""
        was_there = sign in self.raised
        if is_there and not was_there:
            self.raised.append(sign)
            return text
        if was_there and not is_there:
            self.raised.remove(sign)
        return None


def diversity(images: Tensor, labels: Tensor) -> float:
    """Return how much images of one class differ: the standard deviation over them, averaged over pixels and classes.

    Args:
        images: uint8 [N, 3, R, R].
        labels: int64 [N]; classes with one image are left out.
    """
    spreads = [
        images[labels == label].float().std(0).mean()
        for label in torch.unique(labels)
        if int((labels == label).sum()) > 1
    ]
    return float(torch.stack(spreads).mean()) if spreads else 0.0
