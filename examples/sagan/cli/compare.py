"""The subcommand ``compare``: its options, and what it does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from sagan.errors import UserError
from sagan.report.comparison import compare_runs


@dataclass(frozen=True)
class Compare:
    """Draw figures of several runs over the iterations, and a table of the best of each.

    Takes what `evaluate` and `train --evaluation.every` wrote into the runs' folders. Figures of different protocols
    get panels and columns of their own.

    Attributes:
        runs: folders of runs.
        out: folder for comparison.md and comparison.png.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    out: Path = Path("comparison")


def run(command: Compare) -> int:
    """Run ``compare`` and return the exit code."""
    if not command.runs:
        raise UserError("runs: expected the folders of one or more, got none")
    written = compare_runs(command.runs, command.out)
    print(written[0].read_text(encoding="utf-8"))
    print(f"Written: {', '.join(map(str, written))}")
    return 0
