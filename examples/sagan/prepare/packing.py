"""From a list of images to a prepared set: in parts, on all cores, resumable, complete or not there."""

from __future__ import annotations

import datetime
import io
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import features
from tqdm import tqdm

import sagan_layers
from sagan.contents import holds_prepared_set
from sagan.data.decoding import check_decode_options
from sagan.data.packed_format import (
    DIGEST_BYTES,
    DIGESTS,
    FORMAT,
    IMAGES,
    LABELS,
    MANIFEST,
    NAMES,
    REPORT,
    REPORT_TEXT,
    VERSION,
    Manifest,
    PackedError,
    content_checksum,
    damaged_images,
    file_entry,
    read_manifest,
    verify,
)
from sagan.data.prefetch import usable_cpus
from sagan.errors import UserError, check_is_new
from sagan.io import atomic_write
from sagan.names import printable
from sagan.prepare.listing import Listing
from sagan.prepare.part import UNREADABLE, Part, PartResult, pack_part
from sagan.prepare.pool import run_tasks
from sagan.prepare.report import format_report, make_report
from sagan.prepare.staging import Staging

_CROP = "the central square, as wide as the short side"
_DECODING = "full decode by Pillow, upright as EXIF says, RGB"
# Seconds between flushes. A crash loses at most this much finished work; each flush waits for the disk.
MARK_EVERY_S = 0.5


@dataclass(frozen=True)
class Prepared:
    """What a call of :func:`prepare` did."""

    manifest: Manifest
    report: Mapping[str, Any]  # empty if the set was there already
    packed: int  # images that this call read
    reused: int  # images that an earlier call had finished
    seconds: float  # for reading
    total_seconds: float


def prepare(
    listing: Listing,
    out: Path,
    *,
    resolution: int,
    resample: str = "bilinear",
    workers: int | None = None,
    part_size: int | None = None,
    progress: bool = False,
) -> Prepared:
    """Pack the images of a source into one folder, which gets its name when it is complete.

    If it is killed at any moment, the same call resumes and redoes only what was not finished.

    Args:
        listing, out: the source, and the folder to make.
        resolution, resample: see `decode_image`.
        workers: processes that decode; None takes one for each CPU, 1 decodes in this one.
        part_size: images that a process takes at a time; None takes a 64th of all, from 16 to 1,024.
        progress: draw a bar on a terminal, print lines elsewhere.

    Raises:
        UserError: the disk is too small, the folder is in use, another process works on it, another set was begun
            there, or no image can be read.
    """
    started = time.perf_counter()
    check_decode_options(resolution, resample)
    part_size = part_size or min(max(len(listing) // 64, 16), 1024)
    plan = _plan(listing, resolution, resample, part_size)
    staging = Staging(out)
    if holds_prepared_set(out):
        manifest = read_manifest(out)
        _refuse_differences(manifest.source["plan"], plan, f"the prepared set in {out}", out)
        if wrong := verify(out, images=False):
            raise PackedError(f"the prepared set in {out} is damaged: {'; '.join(wrong)}")
        staging.remove_leftovers()
        return Prepared(manifest, {}, 0, len(listing), 0.0, time.perf_counter() - started)
    check_is_new(out)
    with staging.locked(), staging.disk_errors():
        begun = staging.read_plan()
        if begun is not None:
            _refuse_differences(begun, plan, f"the unfinished set in {staging.folder}", staging.folder)
        if begun is None or not staging.is_moving:
            try:
                staging.check_space(len(listing), resolution)
            except UserError:
                staging.remove_leftovers()
                raise
        if begun is None:
            staging.begin(plan, len(listing), resolution)
        packing = _Packing(listing, staging, plan, workers or usable_cpus(), progress)
        packed, reused, seconds = packing.pack()
        manifest, report = packing.finish()
        staging.publish()
    return Prepared(manifest, report, packed, reused, seconds, time.perf_counter() - started)


def _plan(listing: Listing, resolution: int, resample: str, part_size: int) -> dict[str, Any]:
    """Return all that decides the result: work that was begun with another plan cannot be resumed."""
    return {
        "format": [FORMAT, VERSION],
        "kind": listing.kind,
        "images": len(listing),
        "classes": len(listing.class_names),
        "source_fingerprint": listing.fingerprint,
        "resolution": resolution,
        "filter": resample,
        "part_size": part_size,
        "pillow": PIL.__version__,
        "libjpeg": features.version("jpg"),
    }


def _refuse_differences(begun: dict[str, Any], plan: dict[str, Any], what: str, folder: Path) -> None:
    changes = [
        f"{name} was {begun.get(name)}, now {now}" for name, now in plan.items() if begun.get(name) != now
    ]
    if changes:
        raise UserError(
            f"{what} is another set: {'; '.join(changes)}. Give the same options as before, choose another --out, or "
            f"delete {folder} to start over"
        )


class _Packing:
    """The work of :func:`prepare` after all checks."""

    def __init__(
        self, listing: Listing, staging: Staging, plan: dict[str, Any], workers: int, progress: bool
    ) -> None:
        self.listing = listing
        self.staging = staging
        self.plan = plan
        self.resolution: int = plan["resolution"]
        self.resample: str = plan["filter"]
        self.workers = workers
        self.progress = progress
        self.parts = listing.files.parts(plan["part_size"])
        self.results = staging.finished()

    def pack(self) -> tuple[int, int, float]:
        """Do the parts that are missing or damaged; return images read, images finished before, and seconds."""
        if self.staging.is_moving:
            return 0, len(self.listing), 0.0
        self.staging.shape_array(len(self.listing), self.resolution)
        for number in self._damaged_parts():
            self.staging.forget_part(number)
            del self.results[number]
        missing = [number for number in range(len(self.parts)) if number not in self.results]
        packed = sum(len(self.parts[number]) for number in missing)
        reused = len(self.listing) - packed
        started = time.perf_counter()
        if missing:
            with _Progress(len(self.listing), reused, self.progress) as progress:
                self._pack(missing, progress)
        return packed, reused, time.perf_counter() - started

    def _pack(self, missing: list[int], progress: _Progress) -> None:
        unmarked: dict[int, PartResult] = {}
        marked_at = time.monotonic()
        try:
            tasks = map(self._part, missing)
            for part, result in run_tasks(pack_part, tasks, min(self.workers, len(missing))):
                unmarked[part.number] = result
                progress.add(len(part.rows))
                if time.monotonic() - marked_at >= MARK_EVERY_S:
                    self._mark(unmarked)
                    marked_at = time.monotonic()
        finally:  # finished parts are saved, whatever ends the work
            self._mark(unmarked)

    def _mark(self, results: dict[int, PartResult]) -> None:
        if results:
            self.staging.finish_parts(results)
            self.results.update(results)
            results.clear()

    def _part(self, number: int) -> Part:
        rows = self.parts[number]
        return Part(
            number=number,
            rows=rows,
            names=[self.listing.names.relative(row) for row in rows.tolist()],
            files=self.listing.files.select(rows),
            array=self.staging.array,
            resolution=self.resolution,
            resample=self.resample,
        )

    def _digests(self) -> npt.NDArray[np.uint8]:
        """Return the digests of all images, uint8 [N, 16], zeros where there is none."""
        digests = np.zeros((len(self.listing), DIGEST_BYTES), dtype=np.uint8)
        for number, result in self.results.items():
            of_part = np.frombuffer(bytes.fromhex(result.digests), np.uint8)
            digests[self.parts[number]] = of_part.reshape(-1, DIGEST_BYTES)
        return digests

    def _damaged_parts(self) -> list[int]:
        """Return the finished parts whose pixels are not those that were written."""
        if not self.results:
            return []
        digests = self._digests()
        damaged = np.zeros(len(self.listing), dtype=bool)
        damaged[self._damaged_rows(digests, np.any(digests != 0, axis=1))] = True
        return [number for number in self.results if damaged[self.parts[number]].any()]

    def _damaged_rows(
        self, digests: npt.NDArray[np.uint8], written: npt.NDArray[np.bool_] | None = None
    ) -> list[int]:
        return damaged_images(
            self.staging.array,
            self.resolution,
            digests,
            written,
            threads=self.workers,
            progress=self.progress,
        )

    def finish(self) -> tuple[Manifest, dict[str, Any]]:
        """Close the gaps of unreadable images, write all files beside the array, and return manifest and report."""
        listing, staging = self.listing, self.staging
        digests = self._digests()
        results = [self.results[number] for number in sorted(self.results)]
        report = make_report(listing, results, digests)
        lost = [row for result in results for kind, row, _ in result.problems if kind == UNREADABLE]
        readable = np.delete(np.arange(len(listing)), np.asarray(lost, dtype=np.int64))
        if len(readable) == 0:
            first = report["unreadable"][0]
            raise UserError(
                f"none of {len(listing):,} images in {listing.path} can be read; {first['file']}: {first['detail']}"
            )
        if lost:
            staging.close_gaps(readable, self.resolution)
            digests = digests[readable]
            if self._damaged_rows(digests):
                raise UserError(
                    f"{staging.array} holds other bytes than were written to it. Delete {staging.folder} and run the "
                    "same command again"
                )
        labels = listing.labels[readable]
        names = "".join(printable(listing.names.relative(row)) + "\n" for row in readable.tolist())
        files = {
            LABELS: _npy(labels),
            DIGESTS: _npy(digests),
            NAMES: names.encode(),
            REPORT: (json.dumps(report, indent=1) + "\n").encode(),
            REPORT_TEXT: (format_report(report) + "\n").encode(),
        }
        manifest = Manifest(
            folder=staging.set,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            source={"kind": listing.kind, "path": printable(listing.path), "plan": self.plan},
            resolution=self.resolution,
            filter=self.resample,
            crop=_CROP,
            decoding=_DECODING,
            layout=f"{IMAGES}: uint8 [image, channel, row, column]",
            num_images=len(labels),
            num_classes=len(listing.class_names),
            class_names=list(listing.class_names),
            class_words=None if listing.class_words is None else list(listing.class_words),
            images_per_class=np.bincount(labels, minlength=len(listing.class_names)).tolist(),
            counts={
                "listed": len(listing),
                "packed": len(labels),
                "unreadable": len(report["unreadable"]),
                "not_images": sum(listing.skipped.values()),
            },
            checksum=content_checksum(self.resolution, listing.class_names, labels, digests),
            files={name: file_entry(data) for name, data in files.items()},
            versions={
                "sagan_layers": sagan_layers.__version__,
                "python": platform.python_version(),
                "numpy": np.__version__,
                "pillow": PIL.__version__,
                "libjpeg": features.version("jpg") or "",
            },
        )
        for name, data in {**files, MANIFEST: manifest.to_json().encode()}.items():
            with atomic_write(staging.set / name) as file:
                file.write(data)
        return replace(manifest, folder=staging.out), report


def _npy(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


class _Progress:
    """A bar on a terminal; elsewhere a line every ten seconds."""

    def __init__(self, total: int, done: int, shown: bool) -> None:
        self.total, self.done, self.done_before = total, done, done
        hidden = None if shown else True  # None hides the bar where there is no terminal
        self._bar = tqdm(total=total, initial=done, desc="packing", unit="img", disable=hidden, smoothing=0.1)
        self._prints = shown and self._bar.disable
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def add(self, count: int) -> None:
        self.done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._prints and (now - self._printed >= 10 or self.done == self.total):
            self._printed = now
            rate = (self.done - self.done_before) / max(now - self._started, 1e-9)
            left = datetime.timedelta(seconds=round((self.total - self.done) / rate))
            share = f"{self.done:,} of {self.total:,} images ({self.done / self.total:.1%})"
            print(f"{share}, {rate:,.0f} img/s, {left} left", flush=True)
