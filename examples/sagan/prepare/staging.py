"""The folder that a set is made in: it survives a kill at any moment, and becomes the set in one step at the end.

```
OUT.partial/
  lock              held by the process that works here
  plan.json         what is made from what; written once
  parts/00000.json  a finished part: its images' digests and what was found; on disk after its pixels
  moved/            blocks being moved up over the places of unreadable images
  set/              becomes OUT
```
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sagan.data.packed_format import HEADER_BYTES, IMAGES, PARTIAL, image_header
from sagan.errors import UserError
from sagan.io import locked
from sagan.prepare.listing import Indices
from sagan.prepare.part import PartResult, write_all

MOVED_BYTES = 64 * 2**20
SPARE_BYTES = 64 * 2**20


class Staging:
    """The folder beside ``out`` in which it is made.

    Args:
        out: the set's folder to be.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(out.name + PARTIAL)
        self.set = self.folder / "set"
        self.array = self.set / IMAGES
        self._parts = self.folder / "parts"
        self._moved = self.folder / "moved"
        self._plan = self.folder / "plan.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock; it is gone with the process, however that ends.

        Raises:
            UserError: another process holds it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / "lock", f"another prepare is at work in {self.folder}"):
            yield

    def read_plan(self) -> dict[str, Any] | None:
        """Return the plan of the work that was begun here, None if there is none."""
        if not self._plan.is_file() or not self.array.is_file():
            return None
        plan: dict[str, Any] = json.loads(self._plan.read_text(encoding="utf-8"))
        return plan

    def begin(self, plan: dict[str, Any], count: int, resolution: int) -> None:
        """Make the array, all holes, and write the plan."""
        for folder in (self.set, self._parts, self._moved):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        with self.array.open("wb") as file:
            file.write(image_header(count, resolution))
            file.truncate(HEADER_BYTES + count * 3 * resolution**2)
        write_durably(self._plan, json.dumps(plan, indent=1).encode())

    def check_space(self, count: int, resolution: int) -> None:
        """Check that what is still to be written fits on the disk.

        Raises:
            UserError: it does not; the message has the numbers.
        """
        total = count * (3 * resolution**2 + 256) + SPARE_BYTES  # 256: label, digest, name, markers
        written = 0
        if self.array.is_file():
            found = self.array.stat()
            written = getattr(found, "st_blocks", 0) * 512
        free = shutil.disk_usage(self.folder).free
        needed = max(0, total - written)
        if needed > free:
            raise UserError(
                f"out: expected {_gb(needed)} free for {count:,} images of {resolution}x{resolution} in "
                f"{self.out.parent}, got {_gb(free)}: {_gb(needed - free)} too little. Make room, or choose "
                "another --out"
            )

    def finished(self) -> dict[int, PartResult]:
        """Return the results of finished parts by number."""
        results = {}
        for path in self._parts.glob("*.json"):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                results[int(path.stem)] = PartResult.from_dict(json.loads(path.read_text(encoding="utf-8")))
        return results

    def finish_parts(self, results: Mapping[int, PartResult]) -> None:
        """Mark parts as finished, after their pixels are on the disk."""
        with self.array.open("r+b") as file:
            os.fsync(file.fileno())
        for number, result in results.items():
            write_durably(self._parts / f"{number:05d}.json", json.dumps(result.to_dict()).encode())

    def forget_part(self, number: int) -> None:
        """Take the mark of a finished part away."""
        (self._parts / f"{number:05d}.json").unlink(missing_ok=True)

    @property
    def is_moving(self) -> bool:
        """Whether images were being moved up: then every part is finished."""
        return any(self._moved.glob("*.rows"))

    def close_gaps(self, kept: Indices, resolution: int) -> None:
        """Move the kept rows up over the others, and cut the array off behind them.

        Each block is on the disk twice before what it replaces is gone, so that this can be killed at any moment
        and begun again.

        Args:
            kept: int64 [n], rising: the rows that stay.
            resolution: side of the images.
        """
        row_bytes = 3 * resolution**2
        block = max(1, MOVED_BYTES // row_bytes)
        moved = sorted(self._moved.glob("*.rows"))
        first_gap = int(np.flatnonzero(np.append(kept, -1) != np.arange(len(kept) + 1))[0])
        start = int(moved[-1].stem) if moved else first_gap
        with self.array.open("r+b", buffering=0) as file:
            while start < len(kept):
                path = self._moved / f"{start:012d}.rows"
                rows = kept[start : start + block]
                if not path.is_file():
                    write_durably(path, b"".join(_read_rows(file, row, row_bytes) for row in rows.tolist()))
                write_all(file, HEADER_BYTES + start * row_bytes, path.read_bytes())
                os.fsync(file.fileno())
                for earlier in self._moved.glob("*.rows"):
                    if earlier != path:
                        earlier.unlink()
                start += block
            if not moved and first_gap >= len(kept):  # only the end is cut off: leave a mark all the same
                write_durably(self._moved / f"{len(kept):012d}.rows", b"")
            file.truncate(HEADER_BYTES + len(kept) * row_bytes)
            write_all(file, 0, image_header(len(kept), resolution))
            os.fsync(file.fileno())

    def remove_leftovers(self) -> None:
        """Remove the folder if no work was begun in it, or all is done."""
        if not self.set.exists():
            shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self) -> None:
        """Give the finished set its name, and remove everything else."""
        _sync_folder(self.set)
        self.set.replace(self.out)  # an empty folder of that name is replaced
        _sync_folder(self.out.parent)
        shutil.rmtree(self.folder, ignore_errors=True)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, also after the power failed."""
    partial = path.with_name(path.name + ".new")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_rows(file: Any, row: int, row_bytes: int) -> bytes:
    file.seek(HEADER_BYTES + row * row_bytes)
    data: bytes = file.read(row_bytes)
    assert len(data) == row_bytes
    return data


def _gb(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"
