"""The subcommand ``prepare``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from sagan.cli.parsing import INTERRUPTED
from sagan.contents import found_at, holds_prepared_set
from sagan.data import read_manifest, verify
from sagan.data.decoding import Resample
from sagan.data.prefetch import usable_cpus
from sagan.errors import UserError, check_at_least, check_out_folder
from sagan.prepare import SourceOptions, format_report, list_source, prepare


@dataclass(frozen=True)
class Prepare:
    """Pack images into one array that training reads fast. Run this once, before training.

    Sources: ILSVRC2012_img_train.tar (without unpacking it), a folder of its class archives, ILSVRC2012_img_val.tar or
    a folder of its images with their ground truth, a folder with one subfolder of images for each class, and parquet
    shards of the Hugging Face hub. After an interruption the same command resumes.

    Attributes:
        source: file, folder, or pattern of parquet files.
        out: folder to create; it appears once it is complete.
        resolution: side of the images in pixels.
        resample: filter of the antialiased resize: bilinear, bicubic, lanczos or box.
        options: how to read the source.
        workers: processes that decode; by default one for each CPU.
        part_size: images that a process packs at a time, and that an interruption loses; by default a 64th of all, from
            16 to 1024.
        verify: check this finished set instead, and report what is wrong.
    """

    required: ClassVar[dict[str, str]] = dict.fromkeys(("source", "out"), "required, but for --verify")

    source: str | None = None
    out: Path | None = None
    resolution: int = 128
    resample: Resample = "bilinear"
    options: Annotated[SourceOptions, tyro.conf.arg(name="")] = field(default_factory=SourceOptions)
    workers: int | None = None
    part_size: int | None = None
    verify: Path | None = None


def run(command: Prepare) -> int:
    """Run ``prepare`` and return the exit code."""
    if command.verify is not None:
        return _verify(command.verify)
    for name in ("source", "out"):
        if getattr(command, name) is None:
            raise UserError(f"{name}: expected a path, got none; --verify SET needs none")
    assert command.source is not None
    assert command.out is not None
    check_out_folder(command.out)
    check_at_least(command, 1, "resolution", "workers", "part_size")
    try:
        listing = list_source(command.source, command.options, workers=command.workers or usable_cpus())
        print(listing.describe(), flush=True)
        prepared = prepare(
            listing,
            command.out,
            resolution=command.resolution,
            resample=command.resample,
            workers=command.workers,
            part_size=command.part_size,
            progress=True,
        )
    except KeyboardInterrupt:
        print("\nStopped; finished parts stay. The same command resumes.")
        return INTERRUPTED
    if not prepared.report:
        print(f"{command.out} is already complete; --verify checks it.")
        return 0
    if prepared.reused:
        print(f"{prepared.reused:,} images were already packed and have been checked.")
    print(f"\n{format_report(prepared.report)}\n\n{prepared.manifest.describe()}")
    if prepared.packed:
        rate = prepared.packed / prepared.seconds
        print(
            f"  {prepared.packed:,} images read at {rate:,.0f} a second; {prepared.total_seconds:.1f} s in total"
        )
    return 0


def _verify(folder: Path) -> int:
    if not holds_prepared_set(folder):
        raise UserError(f"verify: expected a prepared set, got {found_at(folder)}")
    wrong = verify(folder, progress=True)
    if wrong:
        print(f"{folder} is damaged:")
        print("\n".join(f"  {problem}" for problem in wrong))
        return 1
    print(f"{read_manifest(folder).describe()}\nIntact: all images and files are as they were written.")
    return 0
