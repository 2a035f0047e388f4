"""Which evaluation of a run was the best."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sagan.evaluation.evaluator import Evaluation
from sagan.evaluation.protocol import Protocol


@dataclass
class BestTracker:
    """Keeps the best of a run's evaluations; those of another protocol are refused, not compared.

    Attributes:
        metric: figure that decides; None for the first of the evaluations.
        score: of the best so far, less is better; None before the first evaluation.
        iteration: of the best so far.
        protocol: of all.
    """

    metric: str | None = None
    score: float | None = None
    iteration: int = 0
    protocol: Protocol | None = None

    def update(self, iteration: int, evaluation: Evaluation) -> bool:
        """Take in an evaluation and return whether it is the best so far; an equal one is not.

        Raises:
            ProtocolError: if its protocol is not that of the evaluations before.
            UserError: if the deciding figure is not among its figures.
        """
        if self.protocol is not None:
            self.protocol.check_comparable(evaluation.protocol)
        score = evaluation.score(self.metric)
        self.protocol = evaluation.protocol
        if self.score is not None and not score < self.score:
            return False
        self.score, self.iteration = score, iteration
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a checkpoint can hold it."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> BestTracker:
        """Return the tracker with the state that :meth:`state_dict` returned."""
        protocol = state["protocol"]
        return cls(**{**state, "protocol": None if protocol is None else Protocol(**protocol)})
