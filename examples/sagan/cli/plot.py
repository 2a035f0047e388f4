"""The subcommand ``plot``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sagan.report.page import draw_run


@dataclass(frozen=True)
class Plot:
    """Draw the curves of a run, also while it trains: losses, logits, gamma, sigma, speed, scores.

    Attributes:
        source: folder of a run.
        out: the PNG; curves.png in the run's folder by default.
    """

    source: Path
    out: Path | None = None


def run(command: Plot) -> int:
    """Run ``plot`` and return the exit code."""
    print(f"Written: {draw_run(command.source, command.out or command.source / 'curves.png')}")
    return 0
