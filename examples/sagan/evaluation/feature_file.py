"""Features in a file, for the metrics that look at them more than once."""

from __future__ import annotations

import tempfile
import weakref
import zipfile
from collections.abc import Iterator
from io import RawIOBase
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from sagan.errors import check_finite
from sagan.io import naming

_BLOCK = 1024  # rows at a time


class FeatureFile:
    """float32 features [n, d] in a file. Memory holds only the rows that are read, and does not grow with n.

    It is indexed like a tensor: by a slice, or by int64 row numbers. The file is read, not mapped: a full disk or a
    file that has been cut off raises, whereas to touch a mapped page would end the process.
    """

    def __init__(
        self, file: RawIOBase, count: int, width: int, *, offset: int = 0, owner: FeatureFile | None = None
    ) -> None:
        self._file = file
        self._offset = offset
        self._owner = owner  # of the open file; None if it is this object
        self.shape = torch.Size((count, width))
        if owner is None:
            weakref.finalize(self, file.close)  # unlike __del__, also before the file's own end in a cycle

    @classmethod
    def temporary(cls, count: int, width: int, folder: Path) -> FeatureFile:
        """Return a file without contents, in a folder's file system, that ends with this object."""
        folder.mkdir(parents=True, exist_ok=True)
        with naming(folder):
            file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (open as long as this object)
        return cls(cast(RawIOBase, file), count, width)

    @classmethod
    def in_archive(cls, path: Path, name: str) -> FeatureFile:
        """Return the rows of an array of ``np.savez``, where they are.

        Raises:
            KeyError: if there is no such array.
            ValueError: if it is compressed, or another array than float32 [n, d].
        """
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo(f"{name}.npy")
        if entry.compress_type:
            raise ValueError(f"{name}: expected no compression")
        file = path.open("rb", buffering=0)
        found = cls(file, 0, 0)
        file.seek(entry.header_offset + 26)
        lengths = np.frombuffer(file.read(4), "<u2")
        file.seek(entry.header_offset + 30 + int(lengths.sum()))
        found._read_header(name)
        return found

    @classmethod
    def of_array(cls, path: Path) -> FeatureFile:
        """Return the rows of an array of ``np.save``.

        Raises:
            ValueError: if it is another array than float32 [n, d].
        """
        found = cls(path.open("rb", buffering=0), 0, 0)
        found._read_header(path.name)
        return found

    def _read_header(self, name: str) -> None:
        """Take the shape from the array's header, where the file stands."""
        np.lib.format.read_magic(self._file)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(self._file)
        if fortran_order or dtype != np.float32 or len(shape) != 2:
            raise ValueError(f"{name}: expected float32 [n, d], got {dtype} {list(shape)}")
        self.shape, self._offset = torch.Size(shape), self._file.tell()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Return some rows, [k, d]."""
        numbers = range(*rows.indices(len(self))) if isinstance(rows, slice) else rows.tolist()
        found = torch.empty(len(numbers), self.shape[1])
        if isinstance(numbers, range) and numbers.step == 1:
            self._read(found, numbers.start)
        else:
            for row, number in zip(found, numbers, strict=True):
                self._read(row, number)
        return found

    def head(self, count: int) -> FeatureFile:
        """Return the first rows, without reading them."""
        return FeatureFile(self._file, min(count, len(self)), self.shape[1], offset=self._offset, owner=self)

    def blocks(self) -> Iterator[Tensor]:
        """Yield all rows, some thousands at a time."""
        for start in range(0, len(self), _BLOCK):
            yield self[start : start + _BLOCK]

    def write(self, start: int, features: Tensor) -> None:
        """Write rows from ``start`` on."""
        self._file.seek(self._offset + start * self._row_bytes)
        view = features.contiguous().numpy().data.cast("B")
        while view:
            view = view[self._file.write(view) or 0 :]

    def append_to(self, path: Path, name: str) -> None:
        """Add the rows to an archive of ``np.savez`` as an array, where :meth:`in_archive` finds them."""
        header = {"descr": "<f4", "fortran_order": False, "shape": tuple(self.shape)}
        with (
            zipfile.ZipFile(path, "a") as archive,
            archive.open(f"{name}.npy", "w", force_zip64=True) as entry,
        ):
            np.lib.format.write_array_header_1_0(entry, header)
            for block in self.blocks():
                entry.write(block.numpy().astype("<f4", copy=False).tobytes())

    def _read(self, into: Tensor, start: int) -> None:
        self._file.seek(self._offset + start * self._row_bytes)
        view = into.numpy().data.cast("B")
        while view:
            count = self._file.readinto(view) or 0
            if count == 0:
                raise OSError(f"features: the file ends before row {start + len(into):,} of {len(self):,}")
            view = view[count:]

    @property
    def _row_bytes(self) -> int:
        return 4 * self.shape[1]


# Features [n, d], in memory or in a file.
Features = Tensor | FeatureFile


def check_finite_features(what: str, features: Features) -> None:
    """Raise :class:`sagan.errors.NotFiniteError` if a value is NaN or infinite."""
    for block in [features] if isinstance(features, Tensor) else features.blocks():
        check_finite(what, block)
