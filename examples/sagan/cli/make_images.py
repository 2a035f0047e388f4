"""The subcommand ``make-images``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from sagan.errors import check_is_new, check_out_folder
from sagan.prepare.synthetic import Layout, SyntheticSet, write_layout


@dataclass(frozen=True)
class MakeImages:
    """Generate synthetic images in ImageNet's layouts, to try ``prepare`` and ``train`` without ImageNet.

    Attributes:
        out: new or empty folder to write to.
        layout: "folder" (train/ and val/ with class folders), "tars" (ILSVRC2012_img_train.tar, ..._val.tar and the
            development kit) or "parquet" (shards as on the Hugging Face hub).
        images: what to generate.
    """

    out: Path
    layout: Layout = "tars"
    images: Annotated[SyntheticSet, tyro.conf.arg(name="")] = field(default_factory=SyntheticSet)


def run(command: MakeImages) -> int:
    """Run ``make-images`` and return the exit code."""
    check_out_folder(command.out)
    check_is_new(command.out)
    write_layout(command.out, command.layout, command.images)
    made = command.images
    print(
        f"{made.classes * made.images:,} training and {made.classes * made.val_images:,} validation images in "
        f"{made.classes} classes written to {command.out}"
    )
    return 0
