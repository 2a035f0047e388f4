"""The subcommand ``explore``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sagan.distributed import pick_device
from sagan.errors import UserError, check_at_least, check_out_file
from sagan.explore.page import PageOptions, explorer_page
from sagan.io import atomic_write_text
from sagan.sampling import Weights


@dataclass(frozen=True)
class Explore:
    """Write an HTML page that shows what the attention of G and D looks at, from any point of samples of a run.

    The page is one file: it opens from the disk and loads nothing. It has the samples at several iterations, if the run
    kept their checkpoints (`train --output.keep-checkpoints`).

    Attributes:
        source: folder of a run, or a checkpoint.
        out: the file.
        classes: labels (numbers from 0) or names of the classes; by default all, or 20 of them.
        count: samples of each class.
        real: real images of each class, of those that the run was trained on; D looks at them.
        iterations: iterations whose checkpoints to show; by default all that the run kept, or 5 of them.
        seed: seed of the set of samples.
        weights: G's moving average ("ema"), current weights ("raw"), or the average if there is one ("auto").
        max_mib: the most that the page may take; there are maps of as many points as fit.
        compress: compress the maps, for browsers since 2023; without, the page is larger.
        device: "auto", "cpu", "cuda", ...
    """

    source: Path
    out: Path = Path("explore.html")
    classes: tuple[str, ...] = ()
    count: int = 4
    real: int = 0
    iterations: tuple[int, ...] = ()
    seed: int = 0
    weights: Weights = "auto"
    max_mib: float = 20.0
    compress: bool = True
    device: str = "auto"


def run(command: Explore) -> int:
    """Run ``explore`` and return the exit code."""
    check_at_least(command, 1, "count")
    check_at_least(command, 0, "real")
    if not command.max_mib > 0:
        raise UserError(f"max_mib: expected more than 0, got {command.max_mib}")
    check_out_file(command.out)
    if command.out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"out: expected a file that ends in .html, got {command.out}")
    options = PageOptions(
        classes=command.classes,
        count=command.count,
        real=command.real,
        iterations=command.iterations,
        seed=command.seed,
        weights=command.weights,
        max_mib=command.max_mib,
        compress=command.compress,
    )
    page = explorer_page(command.source, pick_device(command.device), options, progress=True)
    command.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(command.out, page.text)
    print(f"Written: {command.out} ({page.summary})")
    return 0
