"""What `prepare` found: every file that cannot be used, was changed or is suspect."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sagan.names import printable
from sagan.prepare.listing import Listing
from sagan.prepare.part import ENLARGED, MISNAMED_FORMAT, ROTATED, UNREADABLE, PartResult


def make_report(
    listing: Listing, results: Sequence[PartResult], digests: npt.NDArray[np.uint8]
) -> dict[str, Any]:
    """Return the report as values that JSON can hold; nothing is shortened.

    ``digests`` is uint8 [N, 16] of all listed images, zeros for those that cannot be read.
    """
    by_kind: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)
    for result in results:
        for kind, row, detail in result.problems:
            by_kind[kind].append((row, detail))

    def entries(found: Sequence[tuple[int, str]]) -> list[dict[str, str]]:
        return [
            {"file": printable(listing.names.relative(row)), "detail": printable(detail)}
            for row, detail in sorted(found)
        ]

    unreadable = [row for row, _ in by_kind[UNREADABLE]]
    listed = np.bincount(listing.labels, minlength=len(listing.class_names))
    lost = np.bincount(listing.labels[unreadable], minlength=len(listing.class_names))
    across, within = _same_images(listing, digests)
    conversions = sorted(set(by_kind) - {UNREADABLE, ROTATED, ENLARGED, MISNAMED_FORMAT})
    return {
        "warnings": [printable(warning) for warning in listing.warnings],
        "listed": len(listing),
        "packed": len(listing) - len(unreadable),
        "unreadable": entries(by_kind[UNREADABLE]),
        "converted_to_rgb": {kind: entries(by_kind[kind]) for kind in conversions},
        "rotated_by_exif": entries(by_kind[ROTATED]),
        "enlarged": entries(by_kind[ENLARGED]),
        "format_not_as_named": entries(by_kind[MISNAMED_FORMAT]),
        "name_of_another_class": entries([(row, f"named after {wnid}") for row, wnid in listing.misnamed()]),
        "same_image_in_several_classes": across,
        "same_image_within_a_class": within,
        "not_images": {printable(kind): count for kind, count in listing.skipped.items()},
        "not_images_examples": [printable(name) for name in listing.skipped_examples],
        "empty_classes": _classes(listing, listed == 0),
        "lost_classes": _classes(listing, (listed > 0) & (listed == lost)),
        "width_range": _union([result.widths for result in results if result.widths]),
        "height_range": _union([result.heights for result in results if result.heights]),
    }


def _same_images(listing: Listing, digests: npt.NDArray[np.uint8]) -> tuple[list[list[str]], list[list[str]]]:
    """Return groups of images whose prepared pixels are the same: across classes, and within one."""
    keys = np.ascontiguousarray(digests).view(f"V{digests.shape[1]}").ravel()
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(keys[order[1:]] != keys[order[:-1]]) + 1
    across: list[list[str]] = []
    within: list[list[str]] = []
    for group in np.split(order, starts):
        if len(group) == 1 or not digests[group[0]].any():
            continue
        rows = sorted(group.tolist())
        names = [printable(listing.names.relative(row)) for row in rows]
        (across if len(set(listing.labels[rows].tolist())) > 1 else within).append(names)
    return sorted(across), sorted(within)


def _classes(listing: Listing, chosen: npt.NDArray[np.bool_]) -> list[str]:
    return [printable(listing.class_names[label]) for label in np.flatnonzero(chosen).tolist()]


def _union(spans: Sequence[tuple[int, int]]) -> list[int] | None:
    return [min(low for low, _ in spans), max(high for _, high in spans)] if spans else None


def format_report(report: Mapping[str, Any]) -> str:
    """Return the report as text for people, long lists shortened."""
    skipped = sum(report["not_images"].values())
    lines = [f"WARNING: {warning}" for warning in report["warnings"]]
    lines += [
        f"{report['listed']:,} images listed = {report['packed']:,} packed + {len(report['unreadable']):,} unreadable"
        f"; {skipped:,} other files skipped"
    ]
    if report["width_range"]:
        (narrow, wide), (low, high) = report["width_range"], report["height_range"]
        lines.append(f"width {narrow:,} to {wide:,}, height {low:,} to {high:,} pixels")
    groups = {
        name: [{"file": " = ".join(group), "detail": ""} for group in report[name]]
        for name in ("same_image_in_several_classes", "same_image_within_a_class")
    }
    sections = [
        ("unreadable, not packed", report["unreadable"], 20),
        ("in a folder of another class than their name says, packed", report["name_of_another_class"], 20),
        ("the same image in several classes, packed", groups["same_image_in_several_classes"], 20),
        ("another format than their name says, decoded", report["format_not_as_named"], 20),
        *((f"{kind}, converted to RGB", found, 5) for kind, found in report["converted_to_rgb"].items()),
        ("rotated as EXIF says", report["rotated_by_exif"], 5),
        ("smaller than the resolution, enlarged", report["enlarged"], 5),
        ("the same image more than once in its class, packed", groups["same_image_within_a_class"], 5),
    ]
    for title, entries, most in sections:
        lines += _section(title, entries, most)
    if skipped:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(report["not_images"].items()))
        lines.append(f"not images: {kinds}; such as {', '.join(report['not_images_examples'][:5])}")
    for name, what in (("empty_classes", "without any image"), ("lost_classes", "of unreadable images only")):
        if report[name]:
            shown = ", ".join(report[name][:20])
            lines.append(f"{len(report[name]):,} classes {what} (they keep their labels): {shown}")
    return "\n".join(lines)


def _section(title: str, entries: Sequence[Mapping[str, str]], most: int) -> list[str]:
    """Return the lines of one list of files; a detail that all of them share is said once."""
    if not entries:
        return []
    details = Counter(entry["detail"] for entry in entries)
    shared = next(iter(details)) if len(details) == 1 and len(entries) > 1 else ""
    lines = [f"{len(entries):,} {title}{shared and f' ({shared})'}:"]
    for entry in entries[:most]:
        detail = "" if shared or not entry["detail"] else f": {entry['detail']}"
        lines.append(f"  {entry['file']}{detail}")
    if len(entries) > most:
        lines.append(f"  and {len(entries) - most:,} more, all in report.json")
    return lines
