"""The subcommand ``prepare``: its options, and what it does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sagan.cli.parsing import INTERRUPTED, check_positive
from sagan.data import read_manifest, verify
from sagan.data.prefetch import usable_cpus
from sagan.errors import UserError
from sagan.prepare import Kind, SourceOptions, format_report, list_source, prepare


@dataclass(frozen=True)
class Prepare:
    """Pack images into one array that training reads fast: once, before training.

    Sources: ILSVRC2012_img_train.tar (nothing is unpacked), a folder of its class archives, ILSVRC2012_img_val.tar or a
    folder of its images with their ground truth, a folder with a folder of images for each class, parquet shards
    of the Hugging Face hub. Stopped or killed, the same command goes on where it was.

    Attributes:
        source: file, folder, or pattern of parquet files.
        out: the folder to make; it appears when it is whole.
        resolution: side of the images in pixels.
        resample: filter of the antialiased resize: bilinear, bicubic, lanczos or box.
        kind: what the source is: auto, class-tars, flat, folder or parquet.
        split: the part to take, where the source has several.
        ground_truth: classes of images without class folders: LOC_val_solution.csv, a text file with a WNID a line,
            or ILSVRC's development kit (folder or .tar.gz); by default looked for beside the source.
        synsets: what the development kit's numbers mean, if meta.mat does not lie beside them.
        words: human names of the classes: LOC_synset_mapping.txt or the like; by default looked for beside the source.
        workers: processes that decode; by default one for each CPU.
        part_size: images that a process takes at a time: a killed run redoes those under way; by default a 64th of
            all, from 16 to 1024.
        verify: check this finished set instead, and say what is wrong with it.
    """

    source: str | None = None
    out: Path | None = None
    resolution: int = 128
    resample: Literal["bilinear", "bicubic", "lanczos", "box"] = "bilinear"
    kind: Kind = "auto"
    split: str = "train"
    ground_truth: Path | None = None
    synsets: Path | None = None
    words: Path | None = None
    workers: int | None = None
    part_size: int | None = None
    verify: Path | None = None


def run(command: Prepare) -> int:
    """Run ``prepare`` and return the exit code."""
    if command.verify is not None:
        return _verify(command.verify)
    for name in ("source", "out"):
        if getattr(command, name) is None:
            raise UserError(f"{name}: expected --{name}, got none (or --verify DIR)")
    assert command.source is not None
    assert command.out is not None
    check_positive(command, "resolution", "workers", "part_size")
    options = SourceOptions(
        kind=command.kind,
        split=command.split,
        ground_truth=command.ground_truth,
        synsets=command.synsets,
        words=command.words,
        workers=command.workers or usable_cpus(),
    )
    try:
        listing = list_source(command.source, options)
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
        print("\nStopped; what is finished is kept. The same command goes on from there.")
        return INTERRUPTED
    if not prepared.report:
        print(f"{command.out} is finished already; --verify checks it.")
        return 0
    if prepared.reused:
        print(f"{prepared.reused:,} images were finished before and have been checked.")
    print(f"\n{format_report(prepared.report)}\n\n{prepared.manifest.describe()}")
    if prepared.packed:
        rate = prepared.packed / prepared.seconds
        print(
            f"  {prepared.packed:,} images read at {rate:,.0f} a second; {prepared.total_seconds:.1f} s in all"
        )
    return 0


def _verify(folder: Path) -> int:
    wrong = verify(folder, progress=True)
    if wrong:
        print(f"{folder} is not sound:")
        print("\n".join(f"  {problem}" for problem in wrong))
        return 1
    print(f"{read_manifest(folder).describe()}\nSound: every image and file is as it was written.")
    return 0
