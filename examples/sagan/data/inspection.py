"""Checks every file of a folder before the first training step, and reports in plain words what is there."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Literal, get_args

from sagan.data.decoding import ImageFacts, ImageReadError, check_decode_options, read_header, read_pixels
from sagan.data.prefetch import map_ranges
from sagan.data.tree import ImageTree
from sagan.names import printable

CheckMode = Literal["full", "headers", "auto", "off"]

AUTO_DECODES_UP_TO = 100_000
_CLASSES_WITH_A_BAR_EACH = 20
_BAR_WIDTH = 40

_WHAT_WAS_DONE = {
    "full": "every image decoded",
    "headers": "every image opened, none decoded, so a damaged one may still turn up in training",
    "off": "no image opened, so sizes, colour modes and damage are not known",
}


@dataclass(frozen=True)
class UnreadableFile:
    """A file with an image's extension that cannot be used: its path below the root, and the reason."""

    path: str
    reason: str


@dataclass
class PreflightReport:
    """What a tree of images holds.

    `num_files == num_readable + len(unreadable) + sum(skipped.values())`: every file on disk is in one of the
    three. Empty and lost classes keep their labels.
    """

    root: Path  # the folder that holds the class folders
    mode: str  # what was done: "full", "headers" or "off"
    resolution: int  # of training, in pixels
    num_files: int  # below `root`
    skipped: Mapping[str, int]  # see `ImageTree.skipped`
    skipped_examples: Sequence[str]
    num_readable: int = 0  # images that training can use (in mode "off": all with an image's extension)
    images_per_class: dict[str, int] = field(
        default_factory=dict
    )  # readable ones, in the order of the labels
    empty_classes: list[str] = field(default_factory=list)  # without image files
    lost_classes: list[str] = field(default_factory=list)  # with unreadable image files only
    unreadable: list[UnreadableFile] = field(default_factory=list)
    width_range: tuple[int, int] | None = None  # of readable images as displayed; None in mode "off"
    height_range: tuple[int, int] | None = None
    modes: Counter[str] = field(default_factory=Counter)  # readable images by Pillow's mode
    converted: Counter[str] = field(
        default_factory=Counter
    )  # by conversion to RGB; one may count under several
    exif_rotated: int = 0  # images that EXIF says to rotate or mirror
    below_resolution: int = 0  # images whose short side is less than `resolution`; they are enlarged
    seconds: float = 0.0

    @property
    def num_classes(self) -> int:
        """Number of class folders, empty ones included."""
        return len(self.images_per_class)

    @property
    def unreadable_paths(self) -> list[Path]:
        """Paths of the unreadable files, as `ImageTree.without` takes them."""
        return [self.root / file.path for file in self.unreadable]

    def add(self, facts: ImageFacts) -> None:
        """Count a readable image."""
        self.width_range = widen(self.width_range, facts.width)
        self.height_range = widen(self.height_range, facts.height)
        self.modes[facts.mode] += 1
        self.converted.update(facts.conversions())
        self.exif_rotated += facts.is_rotated
        self.below_resolution += min(facts.width, facts.height) < self.resolution

    def format(self, *, max_listed: int = 20) -> str:
        """Return the report as text for people."""
        counts = list(self.images_per_class.values())
        num_skipped = sum(self.skipped.values())
        readable = "images" if self.mode == "off" else "readable images"
        lines = [
            f"Images in {self.root}",
            f"  checked            {self.mode}: {_WHAT_WAS_DONE[self.mode]} ({self.seconds:.1f} s)",
            f"  files              {self.num_files:,} = {self.num_readable:,} {readable}"
            f" + {len(self.unreadable):,} unreadable + {num_skipped:,} not images",
            f"  classes            {self.num_classes:,}",
            f"  images per class   min {min(counts):,}, median {median(counts):,g}, max {max(counts):,}",
        ]
        if self.width_range and self.height_range:
            lines += [
                f"  width x height     {_span(self.width_range)} x {_span(self.height_range)} pixels",
                f"  {f'below {self.resolution} pixels':<18} {self.below_resolution:,} (enlarged in training)",
                f"  converted to RGB   {_counts(self.converted)}",
                f"  rotated by EXIF    {self.exif_rotated:,}",
            ]
        if self.skipped:
            lines.append(f"  not images         {_counts(self.skipped)}")
            lines.append(f"                     such as {_names(self.skipped_examples, 5)}")
        lines += ["", *_histogram(self.images_per_class)]
        for names, what in (
            (self.empty_classes, "hold no image file"),
            (self.lost_classes, "hold unreadable files only"),
        ):
            if names:
                lines += [
                    "",
                    f"Class folders that {what} ({len(names):,}): {_names(names, 20)}",
                    "  They keep their labels, so that no other label shifts, but training never sees an image of "
                    "them. Remove the folders if they are not meant to be classes.",
                ]
        if self.unreadable:
            lines += ["", f"{len(self.unreadable):,} unreadable, not used in training:"]
            lines += [f"  {printable(f.path)}: {printable(f.reason)}" for f in self.unreadable[:max_listed]]
            left = len(self.unreadable) - max_listed
            if left > 0:
                lines.append(f"  and {left:,} more")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return the full report as JSON."""
        counts = list(self.images_per_class.values())
        values = {
            **vars(self),
            "root": str(self.root),
            "unreadable": [vars(file) for file in self.unreadable],
            "num_classes": self.num_classes,
            "num_unreadable": len(self.unreadable),
            "num_skipped": sum(self.skipped.values()),
            "images_per_class_min": min(counts),
            "images_per_class_median": median(counts),
            "images_per_class_max": max(counts),
            "seconds": round(self.seconds, 3),
        }
        return json.dumps(values, indent=2) + "\n"


def preflight(
    tree: ImageTree,
    *,
    resolution: int,
    mode: CheckMode = "auto",
    resample: str = "bilinear",
    progress: bool = False,
) -> PreflightReport:
    """Look at every image of a tree and report what training will find; a bad file is listed with its reason.

    Train on `tree.without(report.unreadable_paths)`. The mode `"full"` decodes every file as training will,
    `"headers"` opens every file, `"off"` opens none, and `"auto"` is "full" up to 100,000 files and "headers" above.
    """
    check_decode_options(resolution, resample)
    if mode not in get_args(CheckMode):
        raise ValueError(f"expected mode to be one of {', '.join(get_args(CheckMode))}, got {mode!r}")
    if mode == "auto":
        mode = "full" if len(tree.paths) <= AUTO_DECODES_UP_TO else "headers"

    def look(index: int) -> ImageFacts | str:
        path = tree.paths[index]
        try:
            if mode == "headers":
                return read_header(path)
            _, facts = read_pixels(path, resolution, resample=resample, draft=False)
            return facts
        except ImageReadError as error:
            return error.reason

    start = time.perf_counter()
    report = PreflightReport(tree.root, mode, resolution, tree.num_files, tree.skipped, tree.skipped_examples)
    if mode != "off":
        results = map_ranges(
            lambda indices: [(index, look(index)) for index in indices],
            len(tree.paths),
            progress=progress,
            description=f"preflight ({mode})",
        )
        for index, found in chain.from_iterable(results):
            if isinstance(found, str):
                report.unreadable.append(UnreadableFile(tree.paths.relative(index), found))
            else:
                report.add(found)
    readable = tree.without(report.unreadable_paths)
    report.num_readable = len(readable.paths)
    listed, left = tree.images_per_class().tolist(), readable.images_per_class().tolist()
    for name, before, after in zip(tree.class_names, listed, left, strict=True):
        report.images_per_class[name] = after
        if after == 0:
            (report.lost_classes if before else report.empty_classes).append(name)
    report.seconds = time.perf_counter() - start
    return report


def widen(span: tuple[int, int] | None, value: int) -> tuple[int, int]:
    """Return the smallest range that holds a range (or nothing) and a value."""
    return (value, value) if span is None else (min(span[0], value), max(span[1], value))


def _histogram(images_per_class: Mapping[str, int]) -> list[str]:
    """Return a bar for each class, or for many classes a bar for each range of counts."""
    largest = max(images_per_class.values())
    if len(images_per_class) <= _CLASSES_WITH_A_BAR_EACH:
        width = max(len(printable(name)) for name in images_per_class)
        return ["images of each class:"] + [
            f"  {printable(name):<{width}} {count:>9,} {_bar(count, largest)}"
            for name, count in images_per_class.items()
        ]
    least = min(images_per_class.values())
    step = max(1, -(-(largest - least + 1) // 10))
    bins = Counter((count - least) // step for count in images_per_class.values())
    lines = ["classes by number of images:"]
    for place in range(max(bins) + 1):
        low = least + place * step
        high = min(low + step - 1, largest)
        span = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        lines.append(f"  {span:>20} {bins[place]:>7,} {_bar(bins[place], max(bins.values()))}")
    ranked = sorted(images_per_class.items(), key=lambda item: item[1])
    for label, extremes in (("fewest images", ranked[:5]), ("most images", ranked[:-6:-1])):
        lines.append(f"  {label}: " + ", ".join(f"{printable(name)} {count:,}" for name, count in extremes))
    return lines


def _bar(count: int, largest: int) -> str:
    return "#" * -(-count * _BAR_WIDTH // max(largest, 1))


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{printable(name)} {count:,}" for name, count in sorted(counts.items())) or "none"


def _names(names: Sequence[str], most: int) -> str:
    shown = ", ".join(printable(name) for name in names[:most])
    return f"{shown}, and {len(names) - most:,} more" if len(names) > most else shown


def _span(span: tuple[int, int]) -> str:
    return f"{span[0]:,}" if span[0] == span[1] else f"({span[0]:,} to {span[1]:,})"
