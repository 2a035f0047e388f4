"""From a list of images to a prepared set: in parts, on all cores, resumable, whole or not there."""

from __future__ import annotations

import datetime
import io
import json
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import features
from tqdm import tqdm

import sagan_layers
from sagan.data.decoding import check_decode_options
from sagan.data.inspection import printable
from sagan.data.packed_format import (
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
    content_checksum,
    damaged_images,
    file_entry,
    is_prepared,
    read_manifest,
)
from sagan.data.prefetch import usable_cpus
from sagan.errors import UserError, check_is_new
from sagan.prepare.listing import Indices, Listing
from sagan.prepare.part import UNREADABLE, Part, PartResult, digests_of, pack_part
from sagan.prepare.pool import run_tasks
from sagan.prepare.report import format_report, make_report
from sagan.prepare.staging import Staging, write_durably

CROP = "the central square, as wide as the short side"
# A killed run does again what it finished in the last so many seconds: each mark waits for the disk.
MARK_EVERY_S = 0.5
DECODING = "full decode by Pillow, upright as EXIF says, RGB"


@dataclass(frozen=True)
class Prepared:
    """What a call of :func:`prepare` leaves.

    Attributes:
        manifest: of the set.
        report: what was met; empty if the set was there already.
        packed: images that this call read.
        reused: images that an earlier call had finished.
        seconds: that reading them took.
        total_seconds: of the whole call.
    """

    manifest: Manifest
    report: Mapping[str, Any]
    packed: int
    reused: int
    seconds: float
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
    """Pack the images of a source into one folder, which appears under its name when it is whole.

    Killed at any moment, the same call goes on and redoes only what was not finished.

    Args:
        listing: the source.
        out: the folder to make.
        resolution: side of the images in pixels.
        resample: see `decode_image`.
        workers: processes that decode; None takes one for each CPU, 1 decodes in this one.
        part_size: images that a process takes at a time; None takes a 64th of all, from 16 to 1,024.
        progress: draw a bar on a terminal, print lines elsewhere.

    Raises:
        UserError: the disk is too small, the folder is taken, another process works on it, what was begun there is
            another set, or no image can be read.
    """
    started = time.perf_counter()
    check_decode_options(resolution, resample)
    workers = workers or usable_cpus()
    part_size = part_size or min(max(len(listing) // 64, 16), 1024)
    plan = _plan(listing, resolution, resample, part_size)
    staging = Staging(out)
    if (ready := _already_there(staging, plan)) is not None:
        return Prepared(ready, {}, 0, len(listing), 0.0, time.perf_counter() - started)
    with staging.locked():
        begun = staging.read_plan()
        if begun is not None:
            _refuse_differences(begun, plan, f"what was begun in {staging.folder}", staging.folder)
        if begun is None:
            try:
                staging.check_space(len(listing), resolution)
            except UserError:
                staging.remove_leftovers()
                raise
            staging.begin(plan, len(listing), resolution)
        elif not staging.is_moving:
            staging.check_space(len(listing), resolution)
        work = _Work(listing, staging, resolution, resample, part_size, workers, progress)
        packed, reused, seconds = work.pack()
        manifest, report = work.finish(plan)
        staging.publish()
    return Prepared(manifest, report, packed, reused, seconds, time.perf_counter() - started)


def _plan(listing: Listing, resolution: int, resample: str, part_size: int) -> dict[str, Any]:
    """Return all that decides the result, to tell whether work that was begun can go on."""
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
            f"{what} is another set: {'; '.join(changes)}. Give the options of before, choose another --out, or "
            f"delete {folder} to start anew"
        )


def _already_there(staging: Staging, plan: dict[str, Any]) -> Manifest | None:
    """Return the manifest if the set is there already.

    Raises:
        UserError: the folder holds another set, or anything else.
    """
    out = staging.out
    if is_prepared(out):
        manifest = read_manifest(out)
        _refuse_differences(manifest.source["plan"], plan, f"the prepared set in {out}", out)
        staging.remove_leftovers()
        return manifest
    check_is_new(out)
    return None


class _Work:
    """The steps of :func:`prepare`, once it is clear what they are."""

    def __init__(
        self,
        listing: Listing,
        staging: Staging,
        resolution: int,
        resample: str,
        part_size: int,
        workers: int,
        progress: bool,
    ) -> None:
        self.listing = listing
        self.staging = staging
        self.resolution = resolution
        self.resample = resample
        self.workers = workers
        self.progress = progress
        self.parts = listing.store.parts(part_size)
        self.results = staging.finished()

    def pack(self) -> tuple[int, int, float]:
        """Check the parts that an earlier call finished, and do those that are damaged or not done.

        Returns:
            Images read, images that were finished before, and the seconds that reading took.
        """
        if self.staging.is_moving:
            return 0, len(self.listing), 0.0
        for number in self._damaged_parts():
            self.staging.forget_part(number)
            del self.results[number]
        reused = sum(len(self.parts[number]) for number in self.results)
        started = time.perf_counter()
        self._pack_missing()
        return len(self.listing) - reused, reused, time.perf_counter() - started

    def _pack_missing(self) -> None:
        missing = [number for number in range(len(self.parts)) if number not in self.results]
        if not missing:
            return
        done = len(self.listing) - sum(len(self.parts[number]) for number in missing)
        with _Progress(len(self.listing), done, self.progress) as progress:
            unmarked: dict[int, PartResult] = {}
            marked_at = time.monotonic()
            try:
                for part, result in run_tasks(
                    pack_part, self._tasks(missing), min(self.workers, len(missing))
                ):
                    unmarked[part.number] = result
                    progress.add(len(part.rows))
                    if time.monotonic() - marked_at >= MARK_EVERY_S:
                        self._mark(unmarked)
                        marked_at = time.monotonic()
            finally:  # what is finished is kept, whatever ends the work
                self._mark(unmarked)

    def _mark(self, results: dict[int, PartResult]) -> None:
        """Mark the parts as finished and take them over."""
        if results:
            self.staging.finish_parts(results)
            self.results.update(results)
            results.clear()

    def _tasks(self, numbers: list[int]) -> Iterator[Part]:
        listing = self.listing
        for number in numbers:
            rows = self.parts[number]
            yield Part(
                number=number,
                rows=rows,
                names=[listing.names.relative(row) for row in rows.tolist()],
                reader=listing.store.reader(rows),
                array=self.staging.array,
                resolution=self.resolution,
                resample=self.resample,
            )

    def _digests(self) -> npt.NDArray[np.uint8]:
        return digests_of(
            [(self.parts[number], self.results[number]) for number in self.results], len(self.listing)
        )

    def _damaged_parts(self) -> list[int]:
        """Return the finished parts whose pixels are not those that were written."""
        if not self.results:
            return []
        digests = self._digests()
        damaged = self._check(digests, np.any(digests != 0, axis=1))
        of_part = np.empty(len(self.listing), dtype=np.int64)
        for number, rows in enumerate(self.parts):
            of_part[rows] = number
        return sorted(set(of_part[damaged].tolist()))

    def _check(
        self, digests: npt.NDArray[np.uint8], expected: npt.NDArray[np.bool_] | None = None
    ) -> list[int]:
        return damaged_images(
            self.staging.array,
            self.resolution,
            digests,
            expected,
            threads=self.workers,
            progress=self.progress,
        )

    def finish(self, plan: dict[str, Any]) -> tuple[Manifest, dict[str, Any]]:
        """Leave out what could not be read, and write everything beside the array; return manifest and report."""
        listing, staging = self.listing, self.staging
        digests = self._digests()
        report = make_report(listing, [self.results[number] for number in sorted(self.results)], digests)
        kept = self._kept()
        if len(kept) == 0:
            first = report["unreadable"][0]
            raise UserError(
                f"none of {len(listing):,} images in {listing.path} can be read; {first['file']}: {first['detail']}"
            )
        if len(kept) < len(listing):
            staging.close_gaps(kept, self.resolution)
            digests = digests[kept]
            if self._check(digests):
                raise UserError(
                    f"{staging.array} holds other bytes than were written to it. Delete {staging.folder} and run the "
                    "same command again"
                )
        labels = listing.labels[kept]
        names = "".join(printable(listing.names.relative(row)) + "\n" for row in kept.tolist())
        files = {
            LABELS: _npy(labels),
            DIGESTS: _npy(digests),
            NAMES: names.encode(),
            REPORT: (json.dumps(report, indent=1) + "\n").encode(),
            REPORT_TEXT: (format_report(report) + "\n").encode(),
        }
        for name, data in files.items():
            write_durably(staging.set / name, data)
        manifest = self._manifest(plan, report, labels, digests, files)
        write_durably(staging.set / MANIFEST, manifest.to_json().encode())
        return replace(manifest, folder=staging.out), report

    def _kept(self) -> Indices:
        lost = [
            row for result in self.results.values() for kind, row, _ in result.problems if kind == UNREADABLE
        ]
        return np.setdiff1d(np.arange(len(self.listing)), np.asarray(lost, dtype=np.int64))

    def _manifest(
        self,
        plan: dict[str, Any],
        report: dict[str, Any],
        labels: npt.NDArray[np.int64],
        digests: npt.NDArray[np.uint8],
        files: Mapping[str, bytes],
    ) -> Manifest:
        listing = self.listing
        return Manifest(
            folder=self.staging.set,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            source={"kind": listing.kind, "path": printable(listing.path), "plan": plan},
            resolution=self.resolution,
            filter=self.resample,
            crop=CROP,
            decoding=DECODING,
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


def _npy(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


class _Progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, total: int, done: int, shown: bool) -> None:
        self.total, self.done, self.begun = total, done, done
        self._bar = tqdm(
            total=total,
            initial=done,
            desc="packing",
            unit="img",
            disable=None if shown else True,
            smoothing=0.1,
        )
        self._lines = shown and self._bar.disable
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def add(self, count: int) -> None:
        self.done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._lines and (now - self._printed >= 10 or self.done == self.total):
            self._printed = now
            rate = (self.done - self.begun) / max(now - self._started, 1e-9)
            left = datetime.timedelta(seconds=round((self.total - self.done) / rate))
            share = self.done / self.total
            print(
                f"{self.done:,} of {self.total:,} images ({share:.1%}), {rate:,.0f} img/s, {left} left",
                flush=True,
            )
