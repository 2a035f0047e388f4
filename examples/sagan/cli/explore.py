"""The subcommand ``explore``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from sagan.distributed import pick_device
from sagan.errors import UserError, check_out_file
from sagan.explore.page import PageOptions, explorer_page
from sagan.io import atomic_write_text


@dataclass(frozen=True)
class Explore:
    """Write an HTML page that shows what the attention of G and D looks at, from any point of samples of a run.

    The page is one file: it opens from the disk and loads nothing. It has the samples at several iterations, if the run
    kept their checkpoints (`train --output.keep-checkpoints`).

    Attributes:
        source: folder of a run, or a checkpoint.
        page: what it shows.
        out: the file.
        device: "auto", "cpu", "cuda", ...
    """

    source: Path
    page: Annotated[PageOptions, tyro.conf.arg(name="")] = field(default_factory=PageOptions)
    out: Path = Path("explore.html")
    device: str = "auto"


def run(command: Explore) -> int:
    """Run ``explore`` and return the exit code."""
    check_out_file(command.out)
    if command.out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"out: expected a file that ends in .html, got {command.out}")
    page = explorer_page(command.source, pick_device(command.device), command.page, progress=True)
    command.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(command.out, page.text)
    print(f"Written: {command.out} ({page.summary})")
    return 0
