"""What every kind of source comes to: a list of images in the order of the prepared set, and where their bytes are."""

from __future__ import annotations

import abc
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from sagan.data import PathTable

Indices = npt.NDArray[np.int64]
WNID = re.compile(r"n\d{8}")
# n02190166_1007.JPEG, and on the Hugging Face hub n02190166_1007_n02190166.JPEG.
_WNID_IN_FILE_NAME = re.compile(r"(n\d{8})_\d+\.")


class Reader(abc.ABC):
    """Reads the files of one part, in a worker process: small, and can be pickled."""

    @abc.abstractmethod
    def __iter__(self) -> Iterator[bytes | str]:
        """Yield each file's bytes, or the reason why there are none.

        Raises:
            UserError: the source is not what was listed any more.
        """


class Store(abc.ABC):
    """Where the bytes of a list of images are."""

    @abc.abstractmethod
    def parts(self, size: int) -> list[Indices]:
        """Return all indices in parts of about `size` that are cheap to read in their order."""

    @abc.abstractmethod
    def reader(self, indices: Indices) -> Reader:
        """Return what reads these files in this order."""

    def identity(self) -> bytes:
        """Return what, beside names and labels, changes when the source does."""
        return b""


def consecutive_parts(count: int, size: int) -> list[Indices]:
    """Return 0 to count - 1 in parts of `size`."""
    return [np.arange(start, min(start + size, count)) for start in range(0, count, size)]


@dataclass(frozen=True, eq=False)
class Listing:
    """The images of a source, sorted by class, then by file name.

    Attributes:
        kind: "class tars", "flat images", "folder" or "parquet".
        path: what the user named.
        class_names: names by label; WNIDs in sorted order where the source has them.
        class_words: human names by label, where they are known.
        names: "class/file" of each image, the same for the same image from any source.
        labels: int64 [N], not decreasing.
        store: where the bytes are.
        skipped: files that are not images, counted by kind.
        skipped_examples: some of them.
        remarks: what a user should know of how the source was read.
    """

    kind: str
    path: str
    class_names: tuple[str, ...]
    class_words: tuple[str, ...] | None
    names: PathTable
    labels: npt.NDArray[np.int64]
    store: Store
    skipped: Mapping[str, int]
    skipped_examples: Sequence[str] = ()
    remarks: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits that change when the list or a file's size does; files' contents are not read."""
        total = hashlib.sha256()
        for name in (*self.class_names, "", *map(self.names.relative, range(len(self)))):
            total.update(os.fsencode(name) + b"\0")
        total.update(self.labels.astype("<i8").tobytes())
        total.update(self.store.identity())
        return total.hexdigest()

    def misnamed(self) -> list[tuple[int, str]]:
        """Return the images whose file name has another WNID than their class, with that WNID."""
        found = []
        for index, label in enumerate(self.labels.tolist()):
            match = _WNID_IN_FILE_NAME.match(self.names.relative(index).rpartition("/")[2])
            if match and match[1] != self.class_names[label] and WNID.fullmatch(self.class_names[label]):
                found.append((index, match[1]))
        return found

    def describe(self) -> str:
        """Return a line for people."""
        lines = [f"{self.kind}: {len(self):,} images in {len(self.class_names):,} classes, {self.path}"]
        return "\n".join([*lines, *(f"  {remark}" for remark in self.remarks)])


def sorted_by_class_and_name(labels: Sequence[int], names: Sequence[str]) -> list[int]:
    """Return the order of a prepared set."""
    return sorted(range(len(names)), key=lambda index: (labels[index], names[index]))
