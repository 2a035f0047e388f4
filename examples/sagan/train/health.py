"""The health of a run: updates with a NaN or an infinity, and signs of collapse."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TypedDict, cast

import torch
from torch import Tensor, nn

from sagan.distributed import World
from sagan.errors import FailureError
from sagan.recipes import HealthConfig

_MAX_NAMED = 5


class TrainingError(FailureError):
    """Training cannot continue."""


@dataclass(frozen=True)
class Skipped:
    """Updates skipped because a loss or a gradient was not finite."""

    count: int  # since the last call of FiniteGuard.skipped
    first_iteration: int  # of the first of them
    in_a_row: int  # consecutive iterations with a skipped update, up to now
    since: int  # the first of those iterations


class GuardState(TypedDict):
    """What a resumed run needs of :class:`FiniteGuard`."""

    in_a_row: int
    since: int


class AlarmState(TypedDict):
    """What a resumed run needs of :class:`CollapseAlarm`: its fields."""

    saturated_logs: int
    diversity_was_enough: bool
    rising: int
    last_score: float | None
    last_score_of: str
    raised: list[str]


class FiniteGuard:
    """Skips updates whose loss or gradients hold a NaN or an infinity.

    The decision is made on the device. To decide on the host, every update would have to wait for the GPU, and the GPU
    for the next kernels. Instead the optimizer's fused kernel reads a flag, and changes neither weights nor moments if
    it is set. :meth:`skipped` reports later. It waits for the device, so call it when a log is due.
    """

    def __init__(self, world: World) -> None:
        device = world.device
        self._world = world
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._first = torch.full((), -1, dtype=torch.int64, device=device)
        self._since = torch.full((), -1, dtype=torch.int64, device=device)
        self._found = torch.zeros((), device=device)
        self._iteration = 0

    @contextlib.contextmanager
    def iteration(self, number: int, moving: Sequence[Tensor]) -> Iterator[None]:
        """Enclose the updates of an iteration; restore the buffers in ``moving`` if an update was skipped."""
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
        """Apply a network's gradients with a fused optimizer, unless one of them or the loss is not finite."""
        # The loss counts as well: when a hinge loss is NaN, its gradients are 0.
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        optimizer.found_inf = self.see(torch.nn.utils.get_total_norm(gradients) + loss)  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]

    def see(self, loss: Tensor) -> Tensor:
        """Count the update if its loss is not finite on a rank; return 1.0 then, else 0.0."""
        found = self._world.max_(loss.detach().isfinite().logical_not().float())
        self._first = torch.where((found > 0) & (self._count == 0), self._iteration, self._first)
        self._count = self._count + found.long()
        self._found = torch.maximum(self._found, found)
        return found

    def skipped(self) -> Skipped | None:
        """Return what was skipped since the last call, None if nothing was."""
        count = int(self._count)
        if count == 0:
            return None
        found = Skipped(count, int(self._first), int(self._in_a_row), int(self._since))
        self._count = torch.zeros_like(self._count)
        return found

    def state_dict(self) -> GuardState:
        """Return what a resumed run needs; call :meth:`skipped` first."""
        return {"in_a_row": int(self._in_a_row), "since": int(self._since)}

    def load_state_dict(self, state: GuardState) -> None:
        """Restore the state that :meth:`state_dict` returned."""
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


def check_finite(guard: FiniteGuard, health: HealthConfig, networks: Mapping[str, nn.Module]) -> int:
    """Return how many updates were skipped since the last call. Waits for the device.

    Raises:
        TrainingError: if the run may not skip them, or has skipped too many, naming the networks' parameters.
    """
    skipped = guard.skipped()
    if skipped is None:
        return 0
    if health.on_nonfinite == "skip" and skipped.in_a_row <= health.most_skipped:
        return skipped.count
    if health.on_nonfinite == "skip":
        what = f"in {skipped.in_a_row} iterations in a row, the first {skipped.since + 1}"
        remedy = "--health.most-skipped allows more"
    else:
        what = f"in {skipped.count} updates, the first in iteration {skipped.first_iteration + 1}"
        remedy = "--health.on-nonfinite skip continues without such updates"
    found = []
    for name, network in networks.items():
        if names := parameters_not_finite(network):
            others = " and others" if len(names) > _MAX_NAMED else ""
            found.append(f"{name}: {', '.join(names[:_MAX_NAMED])}{others}")
    where = f" ({'; '.join(found)})" if found else ""
    raise TrainingError(
        f"losses or gradients not finite {what}{where}. No such update was applied, and the last checkpoint is older. "
        f"Lower learning rates or --precision fp32 usually help; {remedy}"
    )


@dataclass
class CollapseAlarm:
    """Watches a run's logs for signs of mode collapse and a discriminator that separates all real and generated images.

    Each ``see_*`` method returns a message when its sign appears, else None.
    """

    config: HealthConfig
    saturated_logs: int = 0  # consecutive logs in which D's loss was close to zero
    diversity_was_enough: bool = False  # until samples have differed enough, G has only begun to learn
    rising: int = 0  # consecutive evaluations, each worse than the one before
    last_score: float | None = None
    last_score_of: str = ""  # the kind of that score
    raised: list[str] = field(default_factory=list)  # signs that are present and reported

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

    def state_dict(self) -> AlarmState:
        """Return what a resumed run needs."""
        state = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "config"}
        return cast(AlarmState, {**state, "raised": list(self.raised)})

    def load_state_dict(self, state: AlarmState) -> None:
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

    Images are [N, 3, R, R]. Classes with one image do not count.
    """
    spreads = [
        images[labels == label].float().std(0).mean()
        for label in torch.unique(labels)
        if int((labels == label).sum()) > 1
    ]
    return float(torch.stack(spreads).mean()) if spreads else 0.0
