"""The subcommands ``plot``, ``report`` and ``compare``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from sagan.errors import UserError, check_out_file, check_out_folder
from sagan.report.comparison import compare_runs
from sagan.report.page import draw_run, write_report


@dataclass(frozen=True)
class Plot:
    """Draw the curves of a run, also while it trains: losses, logits, gamma, sigma, speed, scores.

    Attributes:
        source: folder of a run.
        out: the PNG; curves.png in the run's folder by default.
    """

    source: Path
    out: Path | None = None


@dataclass(frozen=True)
class Report:
    """Write a report on a run: one HTML page that contains its curves and pictures.

    Attributes:
        source: folder of a run.
        out: the file; report.html in the run's folder by default.
    """

    source: Path
    out: Path | None = None


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


def plot(command: Plot) -> int:
    """Run ``plot`` and return the exit code."""
    if command.out is not None:
        check_out_file(command.out)
    print(f"Written: {draw_run(command.source, command.out or command.source / 'curves.png')}")
    return 0


def report(command: Report) -> int:
    """Run ``report`` and return the exit code."""
    if command.out is not None:
        check_out_file(command.out)
    print(f"Written: {write_report(command.source, command.out)}")
    return 0


def compare(command: Compare) -> int:
    """Run ``compare`` and return the exit code."""
    check_out_folder(command.out)
    if not command.runs:
        raise UserError("runs: expected the folders of one or more runs, got none")
    written = compare_runs(command.runs, command.out)
    print(written[0].read_text(encoding="utf-8"))
    print(f"Written: {', '.join(map(str, written))}")
    return 0
