"""A prepared set as a data set: batches are read from one array on disk."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sagan.data.dataset import DatasetCheck, ImageDataset
from sagan.data.inspection import CheckMode
from sagan.data.packed_format import (
    HEADER_BYTES,
    IMAGES,
    LABELS,
    MANIFEST,
    PackedError,
    read_array,
    read_manifest,
    verify,
    wrong_labels,
    wrong_size,
)
from sagan.io import open_regular


class PackedDataset(ImageDataset):
    """The images of a prepared set, read from disk (or the system's cache of it) a batch at a time.

    Attributes:
        manifest: what the set contains.
    """

    prefetched_batches = 4

    def __init__(self, folder: Path | str, resolution: int | None = None) -> None:
        """Open a set; no image is read.

        Raises:
            PackedError: the set is not complete, or has another resolution than the given one.
        """
        folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.resolution = self.manifest.resolution
        if resolution not in (None, self.resolution):
            raise PackedError(
                f"expected images of {resolution}x{resolution} pixels, the set in {folder} has "
                f"{self.resolution}x{self.resolution}. Prepare another with --resolution {resolution}, or train "
                f"with --network.resolution {self.resolution}."
            )
        try:
            problems = [*wrong_size(self.manifest)]
            if not problems:
                labels = read_array(folder / LABELS)
                problems += wrong_labels(labels, self.manifest)
        except (OSError, PackedError) as error:
            problems = [str(error)]
        if problems:
            raise PackedError(f"the prepared set in {folder} is not complete: {problems[0]}")
        self.class_names = tuple(self.manifest.class_names)
        self.labels = torch.from_numpy(labels)
        self.resample = self.manifest.filter
        self.failures = []
        self._open()

    def _open(self) -> None:
        with open_regular(self.manifest.folder / IMAGES) as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        pixels = np.frombuffer(self._map, np.uint8, offset=HEADER_BYTES)
        self._images = pixels.reshape(len(self.labels), 3, self.resolution, self.resolution)

    @property
    def cached(self) -> bool:
        return True

    def fingerprint(self) -> str:
        """Return the set's checksum, which covers all pixels."""
        return self.manifest.checksum

    def check(self, mode: CheckMode, *, progress: bool = False) -> DatasetCheck:
        """In mode "full" compare all images with their digests; the report is the set's manifest.

        Raises:
            PackedError: the set is damaged.
        """
        folder = self.manifest.folder
        if mode == "full" and (wrong := verify(folder, progress=progress)):
            raise PackedError(f"the prepared set in {folder} is damaged: {'; '.join(wrong)}")
        return DatasetCheck(
            text=self.manifest.describe(),
            unreadable=(),
            report_name="data_manifest.json",
            report=(folder / MANIFEST).read_text(encoding="utf-8"),
        )

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a batch; see `ImageDataset.fetch`.

        Raises:
            PackedError: the array has been cut off since it was opened.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(
                f"expected indices from 0 to {len(self) - 1}, got {wanted.min()} to {wanted.max()}"
            )
        self._check_size()
        self._read_ahead(wanted)
        images = torch.empty((len(wanted), *self._images.shape[1:]), dtype=torch.uint8)
        np.take(self._images, wanted, axis=0, out=images.numpy(), mode="clip")  # "raise" would copy twice
        return images, self.labels[torch.from_numpy(wanted)]

    def _check_size(self) -> None:
        """Look for a cut before each batch: to touch what is no longer there would be a bus error, no exception."""
        size = self._map.size()  # of the file, now
        if size < len(self._map):
            raise PackedError(
                f"{self.manifest.folder / IMAGES}: expected {len(self._map):,} bytes, got {size:,}: it has been cut "
                "off while it is in use. Prepare the set again, then resume"
            )

    def _read_ahead(self, wanted: npt.NDArray[np.int64]) -> None:
        """Let the system read all images of a batch at once; page faults would read one after the other."""
        if not hasattr(self._map, "madvise"):  # Windows
            return
        row_bytes = 3 * self.resolution**2
        for row in np.sort(wanted).tolist():
            start = HEADER_BYTES + row * row_bytes
            into_page = start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, start - into_page, row_bytes + into_page)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the mapped file, which a worker process maps itself."""
        return {name: value for name, value in vars(self).items() if name not in ("_map", "_images")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()
