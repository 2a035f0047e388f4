"""A folder of image files, one subfolder for each class, as a data set; decoded images are cached if they fit."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sagan.data.dataset import DatasetCheck, ImageDataset
from sagan.data.decoding import ImageReadError, check_decode_options, read_pixels
from sagan.data.inspection import CheckMode, UnreadableFile, preflight
from sagan.data.layout import DatasetError
from sagan.data.prefetch import map_ranges
from sagan.data.tree import ImageTree

logger = logging.getLogger(__name__)

_REPORT = "preflight.json"


class ImageFolderDataset(ImageDataset):
    """Images of a tree as uint8 tensors [3, R, R] with their labels.

    If all decoded images together take at most `cache_mib`, they are decoded once, here, into one tensor. Otherwise
    each fetch decodes its files.

    An unreadable file does not stop training: its index serves the next readable image of the same class (wrapping
    around; if the class has none, the next readable image of any class, with that image's label). The choice
    depends on the files alone. Each such file is logged once as a warning and listed in `failures`; DataLoader
    workers log and list in their own process. After `without(unreadable)` of a full check there are none.
    """

    def __init__(
        self,
        tree: ImageTree,
        resolution: int,
        *,
        resample: str = "bilinear",
        draft: bool = False,
        cache_mib: float = 2048,
        progress: bool = False,
    ) -> None:
        """Decode the images, as `decode_image` does, if they fit into `cache_mib`.

        Raises:
            ValueError: an option is not supported.
            DatasetError: there is no image, or none that can be read.
        """
        check_decode_options(resolution, resample)
        if cache_mib < 0:
            raise ValueError(f"expected cache_mib of at least 0, got {cache_mib}")
        if len(tree.paths) == 0:
            raise DatasetError(
                f"expected at least one readable image in {tree.root}, got none. "
                "Likely fix: read the preflight report, which lists each unreadable file with its reason."
            )
        self.tree = tree
        self.split = tree.split
        self.class_names = tree.class_names
        self.labels = torch.from_numpy(tree.labels.copy())
        self.resolution = resolution
        self.resample = resample
        self.draft = draft
        self.failures = []
        self._failed: set[int] = set()
        self._cache: Tensor | None = None
        # The index whose image each index serves: itself, unless its file is unreadable.
        self._served = torch.arange(len(tree.paths))
        if len(self) * 3 * resolution**2 <= cache_mib * 2**20:
            self._fill_cache(progress)

    @property
    def cached(self) -> bool:
        return self._cache is not None

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a batch; see `ImageDataset.fetch`.

        Raises:
            DatasetError: no image of the data set can be read.
        """
        wanted = torch.as_tensor(indices, dtype=torch.int64)
        if self._cache is not None:
            served = self._served[wanted]
            return self._cache[served], self.labels[served]
        images = torch.empty((len(wanted), 3, self.resolution, self.resolution), dtype=torch.uint8)
        sources = [self._decode_into(images[row].numpy(), index) for row, index in enumerate(wanted.tolist())]
        return images, self.labels[sources]

    def fingerprint(self) -> str:
        return self.tree.fingerprint()

    def identity(self) -> str:
        """Return 64 hex digits of the files' names, sizes and modification times, and of the filter."""
        digest = hashlib.sha256(f"{self.fingerprint()} {self.resample}\n".encode())
        for path in self.tree.paths:
            facts = path.stat()
            digest.update(f"{facts.st_size} {facts.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def check(
        self, mode: CheckMode, *, report_folder: Path | None = None, progress: bool = False
    ) -> DatasetCheck:
        report = preflight(
            self.tree, resolution=self.resolution, mode=mode, resample=self.resample, progress=progress
        )
        return DatasetCheck(
            text=report.format(saved_as=report_folder and report_folder / _REPORT),
            unreadable=[file.path for file in report.unreadable],
            report_name=_REPORT,
            report=report.to_json(),
        )

    def without(self, unreadable: Sequence[str]) -> ImageFolderDataset:
        return self._changed(tree=self.tree.without(self.tree.root / name for name in unreadable))

    def in_memory(self, cache_mib: float, *, progress: bool = False) -> ImageFolderDataset:
        return self._changed(cache_mib=cache_mib, progress=progress)

    def for_evaluation(self) -> ImageFolderDataset:
        return self._changed(draft=False)

    def _changed(self, **options: Any) -> ImageFolderDataset:
        same = {"tree": self.tree, "resample": self.resample, "draft": self.draft, "cache_mib": 0}
        return ImageFolderDataset(resolution=self.resolution, **{**same, **options})

    def _decode_into(self, pixels: npt.NDArray[np.uint8], index: int) -> int:
        """Write the image that `index` serves, and return the index of its file."""
        source = index
        while True:
            if source not in self._failed:
                try:
                    pixels[...] = self._read(source)
                    return source
                except ImageReadError as error:
                    self._record_failure(source, error)
            source = self._next_readable(index)

    def _read(self, index: int) -> npt.NDArray[np.uint8]:
        path = self.tree.paths[index]
        return read_pixels(path, self.resolution, resample=self.resample, draft=self.draft)[0]

    def _next_readable(self, index: int) -> int:
        """Return the first index after `index` not known to fail, in its class if there is one."""
        label = self.tree.labels[index]
        start, end = np.searchsorted(self.tree.labels, [label, label + 1]).tolist()
        same_class = chain(range(index + 1, end), range(start, index))
        for candidate in chain(same_class, range(end, len(self)), range(start)):
            if candidate not in self._failed:
                return candidate
        raise DatasetError(
            f"expected at least one readable image in {self.tree.root}, got none of {len(self)}; "
            f"the first failed with: {self.failures[0].reason}. Likely fix: run the preflight in mode 'full'."
        )

    def _record_failure(self, index: int, error: ImageReadError) -> None:
        self._failed.add(index)
        self.failures.append(UnreadableFile(self.tree.paths.relative(index), error.reason))
        logger.warning("%s; the next image of its class takes its place", error)

    def _fill_cache(self, progress: bool) -> None:
        cache = torch.empty((len(self), 3, self.resolution, self.resolution), dtype=torch.uint8)
        pixels = cache.numpy()

        def decode(indices: range) -> list[tuple[int, ImageReadError]]:
            errors = []
            for index in indices:
                try:
                    pixels[index] = self._read(index)
                except ImageReadError as error:
                    errors.append((index, error))
            return errors

        for errors in map_ranges(decode, len(self), progress=progress, description="decoding images"):
            for index, error in errors:
                self._record_failure(index, error)
        for index in sorted(self._failed):
            self._served[index] = self._next_readable(index)
        self._cache = cache
