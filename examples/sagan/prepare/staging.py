"""The folder in which a set is made. A kill at any moment leaves it resumable; it becomes the set in one step.

```
OUT.partial/
  lock              held by the process that works here
  plan.json         what is made from what; written once
  parts/00000.json  marker of a finished part: its images' digests and what was found
  moved/            blocks being moved up over the rows of unreadable images
  set/              becomes OUT
```

A marker is written only after its part's pixels are on the disk, so a part with a marker need not be done again. The
reverse order could leave, after a power failure, a marker without its pixels.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from io import RawIOBase
from pathlib import Path
from typing import Any

import numpy as np

from sagan.data.packed_format import HEADER_BYTES, IMAGES, PARTIAL, image_header, read_sealed, seal
from sagan.errors import UserError
from sagan.io import atomic_write, atomic_write_text, locked, naming, sync_folder
from sagan.prepare.listing import Indices
from sagan.prepare.part import PartResult, write_all

MOVED_BYTES = 64 * 2**20
SPARE_BYTES = 64 * 2**20
_SMALL_BYTES_PER_IMAGE = 256  # label, digest, name, marker


class Staging:
    """The folder beside ``out`` in which it is made."""

    def __init__(self, out: Path) -> None:
        if out.name in ("", ".."):
            out = out.resolve()
            if not out.name:
                raise UserError(f"out: expected a new or empty folder, got {out}")
        self.out = out
        self.folder = out.with_name(out.name + PARTIAL)
        self.set = self.folder / "set"
        self.array = self.set / IMAGES
        self._parts = self.folder / "parts"
        self._moved = self.folder / "moved"
        self._plan = self.folder / "plan.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock for a ``with`` block; raise UserError if another process holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / "lock", f"another prepare is at work in {self.folder}"):
            yield

    @contextlib.contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Name the place in errors of the disk, which a full one leaves out; leave nothing of no use behind."""
        try:
            with naming(self.array):
                yield
        except OSError as error:
            if not any(self._parts.glob("*.json")):
                shutil.rmtree(self.folder, ignore_errors=True)
                raise
            hint = f"{error.strerror or error} (finished work is saved: the same command resumes)"
            raise OSError(error.errno or errno.EIO, hint, error.filename) from error

    def read_plan(self) -> dict[str, Any] | None:
        """Return the plan of the work that was begun here, None if there is none."""
        if not self._plan.is_file() or not self.array.is_file():
            return None
        try:
            return read_sealed(self._plan)
        except ValueError as error:
            raise UserError(
                f"{self._plan} is damaged: {error}. Delete {self.folder} and run the same command again"
            ) from error

    def begin(self, plan: dict[str, Any], count: int, resolution: int) -> None:
        """Make the array, all holes, and write the plan."""
        for folder in (self.set, self._parts, self._moved):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        self.array.touch()
        self.shape_array(count, resolution)
        atomic_write_text(self._plan, seal(plan))

    def shape_array(self, count: int, resolution: int) -> None:
        """Give the array its header and its size; its pixels stay."""
        with self.array.open("r+b") as file:
            file.write(image_header(count, resolution))
            file.truncate(HEADER_BYTES + count * 3 * resolution**2)

    def check_space(self, count: int, resolution: int) -> None:
        """Raise UserError if what is still to be written does not fit on the disk."""
        total = count * (3 * resolution**2 + _SMALL_BYTES_PER_IMAGE) + SPARE_BYTES
        # Blocks, not size: the parts of the array that are not written yet are holes. Windows does not tell.
        written = getattr(self.array.stat(), "st_blocks", 0) * 512 if self.array.is_file() else 0
        free = shutil.disk_usage(self.folder).free
        needed = max(0, total - written)
        if needed > free:
            raise UserError(
                f"out: expected {_gb(needed)} free for {count:,} images of {resolution}x{resolution} in "
                f"{self.out.parent}, got {_gb(free)}: {_gb(needed - free)} too little. Make room, or choose "
                "another --out"
            )

    def finished(self) -> dict[int, PartResult]:
        """Return the results of finished parts by number; a damaged marker does not count."""
        results = {}
        for path in self._parts.glob("*.json"):
            with contextlib.suppress(ValueError, TypeError):
                results[int(path.stem)] = PartResult(**read_sealed(path))
        return results

    def finish_parts(self, results: Mapping[int, PartResult]) -> None:
        """Flush the pixels of parts to the disk, then mark the parts as finished."""
        with self.array.open("r+b") as file:
            os.fsync(file.fileno())
        for number, result in results.items():
            atomic_write_text(self._marker(number), seal(vars(result)))

    def forget_part(self, number: int) -> None:
        """Remove the marker of a finished part."""
        self._marker(number).unlink(missing_ok=True)

    def _marker(self, number: int) -> Path:
        return self._parts / f"{number:05d}.json"

    @property
    def is_moving(self) -> bool:
        """Whether `close_gaps` has begun: then every part is finished, and rows are not at their old places."""
        return any(self._moved.glob("*.rows"))

    def close_gaps(self, readable: Indices, resolution: int) -> None:
        """Move the readable rows up over the others, and cut the array off behind them.

        The disk may have no room for a second array, so rows move within this one, in blocks. A block's new place
        overlaps the old places of its own rows (of no later block's): a write cut short would destroy them. So each
        block is first copied to a file in moved/, and from there into the array; the file stays until the next
        block is on the disk. A killed move resumes by writing the last such file to its place again.

        ``readable`` is int64 [n], rising: the rows that stay.
        """
        row_bytes = 3 * resolution**2
        block = max(1, MOVED_BYTES // row_bytes)
        moved = sorted(self._moved.glob("*.rows"))
        first_gap = int(np.flatnonzero(np.append(readable, -1) != np.arange(len(readable) + 1))[0])
        start = int(moved[-1].stem) if moved else first_gap
        with self.array.open("r+b", buffering=0) as file:
            while start < len(readable):
                path = self._moved / f"{start:012d}.rows"
                if not path.is_file():
                    with atomic_write(path) as copy:
                        for row in readable[start : start + block].tolist():
                            copy.write(_read_row(file, row, row_bytes))
                write_all(file, HEADER_BYTES + start * row_bytes, path.read_bytes())
                os.fsync(file.fileno())
                for earlier in self._moved.glob("*.rows"):
                    if earlier != path:
                        earlier.unlink()
                start += block
            # Truncation alone moves no rows; write an empty marker so that a resumed run sees it.
            if not moved and first_gap >= len(readable):
                atomic_write_text(self._moved / f"{len(readable):012d}.rows", "")
            file.truncate(HEADER_BYTES + len(readable) * row_bytes)
            write_all(file, 0, image_header(len(readable), resolution))
            os.fsync(file.fileno())

    def remove_leftovers(self) -> None:
        """Remove the folder if no work was begun in it, or if the set is published."""
        if not self.set.exists():
            shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self) -> None:
        """Give the finished set its name, and remove everything else."""
        sync_folder(self.set)
        self.set.replace(self.out)  # an empty folder of that name is replaced
        sync_folder(self.out.parent)
        shutil.rmtree(self.folder, ignore_errors=True)


def _read_row(file: RawIOBase, row: int, row_bytes: int) -> bytes:
    file.seek(HEADER_BYTES + row * row_bytes)
    data = file.read(row_bytes)
    assert data is not None
    assert len(data) == row_bytes
    return data


def _gb(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"
