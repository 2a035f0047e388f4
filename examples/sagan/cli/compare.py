"""The subcommand ``compare``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from sagan.errors import UserError
from sagan.report.comparison import compare_runs


@dataclass(frozen=True)
class Compare:
    """Compare runs: plots of their figures over the iterations, and a table of the best of each run.

    Reads what `evaluate` and `train --evaluation.every` wrote into the folders of the runs. Figures of different
    protocols get separate panels and columns.

    Attributes:
        runs: folders of the runs.
        out: folder for comparison.md and comparison.png.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    out: Path = Path("comparison")


def run(command: Compare) -> int:
    """Run ``compare`` and return the exit code."""
    if not command.runs:
        raise UserError("runs: expected the folders of one or more runs, got none")
    written = compare_runs(command.runs, command.out)
    print(written[0].read_text(encoding="utf-8"))
    print(f"Written: {', '.join(map(str, written))}")
    return 0
