"""What every data set of images offers to training and evaluation."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from sagan.data.inspection import CheckMode, UnreadableFile
from sagan.io import atomic_write_text


@dataclass(frozen=True)
class DatasetCheck:
    """The result of `ImageDataset.check`: what to print, and the report for a run's folder."""

    text: str
    unreadable: Sequence[str]  # files that cannot be used, as `ImageDataset.without` takes them
    report_name: str
    report: str

    def save(self, folder: Path) -> Path:
        """Write the report into a run's folder and return its path."""
        path = folder / self.report_name
        atomic_write_text(path, self.report)
        return path


class ImageDataset(Dataset[tuple[Tensor, int]], abc.ABC):
    """Square uint8 images with labels, served a batch at a time."""

    class_names: tuple[str, ...]  # by label
    labels: Tensor  # int64 [N], the label of each index
    resolution: int  # side of the images in pixels, R
    resample: str = "bilinear"
    draft: bool = False  # whether JPEG files may be decoded at a fraction of their size
    split: str | None = (
        None  # "train", "val" or the like, "all" if the source has no parts; None if not known
    )
    failures: list[UnreadableFile]  # files found unreadable so far, in this process
    prefetched_batches = 0  # how many are worth fetching ahead on a thread if there are no worker processes

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    @abc.abstractmethod
    def cached(self) -> bool:
        """Whether no image needs decoding, so that loader workers have nothing to do."""

    @abc.abstractmethod
    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return images, uint8 [N, 3, R, R] in new memory, and labels, int64 [N], of indices from 0 to len - 1."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Return text that changes when an image or a class is added, removed or renamed.

        A checkpoint stores it, so that a resumed run can tell whether a batch number still means the same images.
        """

    def identity(self) -> str:
        """Return text that changes when any pixel may have changed; cached features are found by it."""
        return self.fingerprint()

    @abc.abstractmethod
    def check(self, mode: CheckMode, *, progress: bool = False) -> DatasetCheck:
        """Look at the images before they are used, as closely as `mode` says; see `preflight`.

        Raises:
            DatasetError: the set cannot be used at all.
        """

    def without(self, unreadable: Sequence[str]) -> ImageDataset:
        """Return this set without the files that a check found unreadable; labels stay as they are."""
        assert not unreadable
        return self

    def in_memory(self, cache_mib: float, *, progress: bool = False) -> ImageDataset:
        """Return this set with its images decoded in memory, if that saves work and they fit into `cache_mib`."""
        return self

    def cache_bytes(self, cache_mib: float) -> int:
        """Return how many bytes `in_memory` takes for the images."""
        return 0

    def for_evaluation(self) -> ImageDataset:
        """Return this set with its images decoded in full and not cached: an evaluation reads each image once."""
        return self

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"expected an index below {len(self)}, got {index}")
        images, labels = self.fetch([index % len(self)])
        return images[0], int(labels[0])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Return `[self[i] for i in indices]`, fetched at once; DataLoader calls this."""
        images, labels = self.fetch(indices)
        return list(zip(images.unbind(0), labels.tolist(), strict=True))
