"""A folder of image files, one subfolder for each class, as a data set; decoded images are cached if they fit."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from itertools import chain
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
from sagan.names import printable

logger = logging.getLogger(__name__)

_REPORT = "preflight.json"

# How many images may be replaced by others of their class: this many, and this share of those drawn of late.
_MOST_REPLACED = 10
_MOST_REPLACED_SHARE = 0.01
_DRAWN_OF_LATE = 10_000
_MOST_MISSING = 5  # files of a class that the system does not deliver, before the disk is thought to be away
_WAITS_S = (0.2, 1.0, 4.0)  # then
_REMEDY = (
    "Likely fix: if a disk or a folder has gone, bring it back and resume; --images.check full finds damaged files "
    "before training, which leaves them out"
)


class ImageFolderDataset(ImageDataset):
    """Images of a tree as uint8 tensors [3, R, R] with their labels.

    If all decoded images together take at most `cache_mib`, they are decoded once, here, into one tensor. Otherwise
    each fetch decodes its files.

    A few unreadable files do not stop training: the index of one serves the next readable image of its class (wrapping
    around), never another label. A file that cannot be decoded twice is left out from then on; one that the system does
    not deliver is tried whenever its index comes. If no image of a class can be read, even after a wait of seconds, or
    if more than `_MOST_REPLACED` + `_MOST_REPLACED_SHARE` of the images drawn are replaced, that is an error. Each
    process counts for itself, logs each such file once as a warning and lists it in `failures`. After
    `without(unreadable)` of a full check there are none.
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
        self._reasons: dict[int, str] = {}  # of every index that could not be read
        self._damaged: set[int] = set()  # indices that are not tried again
        self._drawn = 0
        self._replaced: set[int] = set()  # among those drawn
        self._cache: Tensor | None = None
        if self.cache_bytes(cache_mib):
            self._fill_cache(progress)

    @property
    def cached(self) -> bool:
        return self._cache is not None

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a batch; see `ImageDataset.fetch`.

        Raises:
            DatasetError: no image of a class can be read, or too many images cannot.
        """
        wanted = torch.as_tensor(indices, dtype=torch.int64)
        if self._cache is not None:
            return self._cache[wanted], self.labels[wanted]
        images = torch.empty((len(wanted), 3, self.resolution, self.resolution), dtype=torch.uint8)
        for row, index in enumerate(wanted.tolist()):
            self._decode_into(images[row].numpy(), index)
        return images, self.labels[wanted]

    def fingerprint(self) -> str:
        return self.tree.fingerprint()

    def identity(self) -> str:
        """Return 64 hex digits of the files' names, sizes and modification times, and of the filter."""
        digest = hashlib.sha256(f"{self.fingerprint()} {self.resample}\n".encode())
        for path in self.tree.paths:
            facts = path.stat()
            digest.update(f"{facts.st_size} {facts.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def check(self, mode: CheckMode, *, progress: bool = False) -> DatasetCheck:
        report = preflight(
            self.tree, resolution=self.resolution, mode=mode, resample=self.resample, progress=progress
        )
        return DatasetCheck(
            text=report.format(),
            unreadable=[file.path for file in report.unreadable],
            report_name=_REPORT,
            report=report.to_json(),
        )

    def without(self, unreadable: Sequence[str]) -> ImageFolderDataset:
        return self._changed(tree=self.tree.without(self.tree.root / name for name in unreadable))

    def in_memory(self, cache_mib: float, *, progress: bool = False) -> ImageFolderDataset:
        return self._changed(cache_mib=cache_mib, progress=progress)

    def cache_bytes(self, cache_mib: float) -> int:
        all_images = len(self) * 3 * self.resolution**2
        return all_images if all_images <= cache_mib * 2**20 else 0

    def for_evaluation(self) -> ImageFolderDataset:
        return self._changed(draft=False)

    def _changed(self, **options: Any) -> ImageFolderDataset:
        same = {"tree": self.tree, "resample": self.resample, "draft": self.draft, "cache_mib": 0}
        return ImageFolderDataset(resolution=self.resolution, **{**same, **options})

    def _decode_into(self, pixels: npt.NDArray[np.uint8], index: int) -> None:
        """Write the image of `index`, or the next readable one of its class."""
        for wait_s in (*_WAITS_S, None):
            missing = 0
            for candidate in self._class_from(index):
                if candidate in self._damaged:
                    continue
                if missing > _MOST_MISSING:
                    break
                try:
                    pixels[...] = self._read(candidate)
                except ImageReadError as error:
                    missing += error.of_system
                    self._record_failure(candidate, error)
                else:
                    self._count(index, replaced=candidate != index)
                    return
            if wait_s is None or not missing:  # waiting mends no damage
                break
            time.sleep(wait_s)
        label = int(self.labels[index])
        raise DatasetError(
            f"expected readable images of class {printable(self.class_names[label])!r} in {self.tree.root}, could read "
            f"none; the first failed with: {self._reasons[index]}. {_REMEDY}"
        )

    def _read(self, index: int) -> npt.NDArray[np.uint8]:
        path = self.tree.paths[index]
        options: dict[str, Any] = {"resample": self.resample, "draft": self.draft}
        try:
            return read_pixels(path, self.resolution, **options)[0]
        except ImageReadError:  # a disk may fail once
            return read_pixels(path, self.resolution, **options)[0]

    def _class_from(self, index: int) -> Iterator[int]:
        """Yield the indices of a class, from one of them to the last, then from the first."""
        yield index
        label = self.tree.labels[index]
        start, end = np.searchsorted(self.tree.labels, [label, label + 1]).tolist()
        yield from chain(range(index + 1, end), range(start, index))

    def _record_failure(self, index: int, error: ImageReadError) -> None:
        if not error.of_system:
            self._damaged.add(index)
        if self._reasons.setdefault(index, error.reason) is error.reason:
            self.failures.append(UnreadableFile(self.tree.paths.relative(index), error.reason))
            logger.warning("%s; the next image of its class takes its place", error)

    def _count(self, index: int, *, replaced: bool) -> None:
        """Count an image that was drawn; raise `DatasetError` if too many of late were replaced."""
        if self._drawn >= _DRAWN_OF_LATE:
            self._drawn = 0
            self._replaced.clear()
        self._drawn += 1
        if not replaced:
            return
        self._replaced.add(index)
        if len(self._replaced) > _MOST_REPLACED + _MOST_REPLACED_SHARE * self._drawn:
            raise DatasetError(
                f"{self.tree.root}: {len(self._replaced):,} of the last {self._drawn:,} images drawn could not be "
                f"read, more than {_MOST_REPLACED_SHARE:.0%}; the last of them: "
                f"{printable(self.tree.paths.relative(index))}: {self._reasons[index]}. {_REMEDY}"
            )

    def _fill_cache(self, progress: bool) -> None:
        cache = torch.empty((len(self), 3, self.resolution, self.resolution), dtype=torch.uint8)
        pixels = cache.numpy()

        def decode(indices: range) -> None:
            for index in indices:
                self._decode_into(pixels[index], index)

        for _ in map_ranges(decode, len(self), progress=progress, description="decoding images"):
            pass
        self._cache = cache
