"""The subcommand ``report``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sagan.report.page import write_report


@dataclass(frozen=True)
class Report:
    """Write a report on a run: one HTML page that contains its curves and pictures.

    Attributes:
        source: folder of a run.
        out: the file; report.html in the run's folder by default.
    """

    source: Path
    out: Path | None = None


def run(command: Report) -> int:
    """Run ``report`` and return the exit code."""
    print(f"Written: {write_report(command.source, command.out)}")
    return 0
