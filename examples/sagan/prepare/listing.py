"""What every kind of source becomes: a list of images in the order of the prepared set, and where their bytes are."""

from __future__ import annotations

import abc
import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from sagan.data import PathTable
from sagan.data.decoding import MAX_FILE_BYTES
from sagan.data.tree import names_digest
from sagan.io import open_regular
from sagan.names import printable

Item = TypeVar("Item")
Indices = npt.NDArray[np.int64]
WNID = re.compile(r"n\d{8}")
# n02190166_1007.JPEG, and on the Hugging Face hub n02190166_1007_n02190166.JPEG.
_WNID_IN_FILE_NAME = re.compile(r"(n\d{8})_\d+\.")
_HINTED_ITEMS = 16
# Upper limit of one read-ahead request in bytes; beyond it the kernel detects sequential reads.
_MAX_HINTED_BYTES = 64 * 2**20


def too_large(size: int) -> str | None:
    """Return why a file of this many bytes is not read into memory as an image, None if it may be."""
    return f"{size:,} bytes are too many for an image" if size > MAX_FILE_BYTES else None


def is_cut_jpeg(data: bytes, zeros: int = 512) -> bool:
    """Return whether a JPEG ends in zeros instead of its end, as in a download into a file of full size.

    libjpeg decodes the zeros as grey.
    """
    return (
        data.endswith(bytes(zeros))
        and data[:2] == b"\xff\xd8"
        and not data.rstrip(b"\0").endswith(b"\xff\xd9")
    )


class ImageFiles(abc.ABC):
    """The encoded files of a list of images. It can be pickled, to be read in a worker process."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __iter__(self) -> Iterator[bytes | str]:
        """Yield each file's bytes, or the reason why there are none.

        Raises:
            UserError: the source has changed since it was listed.
        """

    @abc.abstractmethod
    def select(self, indices: Indices) -> ImageFiles:
        """Return some of the files, in this order."""

    def parts(self, size: int) -> list[Indices]:
        """Return all indices in parts of about ``size`` that are cheap to read in their order."""
        return [np.arange(start, min(start + size, len(self))) for start in range(0, len(self), size)]

    @abc.abstractmethod
    def identity(self) -> bytes:
        """Return further facts that identify the source, beside names and labels, such as file sizes."""


@dataclass(frozen=True, eq=False)
class Listing:
    """The images of a source, sorted by class, then by file name."""

    kind: str  # "class tars", "flat images", "folder" or "parquet"
    path: str  # what the user named
    class_names: tuple[str, ...]  # by label; WNIDs in sorted order where the source has them
    names: PathTable  # "class/file" of each image, the same for the same image from any source
    labels: npt.NDArray[np.int64]  # [N], not decreasing
    files: ImageFiles
    class_words: tuple[str, ...] | None = None  # human names by label, where they are known
    skipped: Mapping[str, int] = field(default_factory=dict)  # files that are not images, by kind
    skipped_examples: Sequence[str] = ()
    remarks: Sequence[str] = ()  # what a user should know about how the source was read
    warnings: Sequence[str] = ()  # what may mean that images are missing

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits that change when the list or a file's size does; files' contents are not read."""
        total = names_digest(self.class_names, self.names)
        total.update(self.labels.astype("<i8").tobytes())
        total.update(self.files.identity())
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
        """Return what to print."""
        lines = [f"{self.kind}: {len(self):,} images in {len(self.class_names):,} classes, {self.path}"]
        lines += [f"  {remark}" for remark in self.remarks] + [f"WARNING: {each}" for each in self.warnings]
        return "\n".join(map(printable, lines))


def sorted_by_class_and_name(labels: Sequence[int], names: Sequence[str]) -> list[int]:
    """Return the order of a prepared set."""
    return sorted(range(len(names)), key=lambda index: (labels[index], names[index]))


def hinted(items: Sequence[Item], hint: Callable[[Item], None]) -> Iterator[Item]:
    """Yield the items; call ``hint`` with each of them 16 items before its turn.

    A thread, as in `sagan.data.prefetch`, would cost 3 to 11% of the rate beside the one that decodes.
    """
    for place in range(len(items) + _HINTED_ITEMS):
        if place < len(items):
            hint(items[place])
        if place >= _HINTED_ITEMS:
            yield items[place - _HINTED_ITEMS]


def will_need(path: Path, start: int = 0, size: int = _MAX_HINTED_BYTES) -> None:
    """Let the system fetch a stretch of a file, if it can; returns at once and never raises."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError), open_regular(path) as file:
            os.posix_fadvise(file.fileno(), start, min(size, _MAX_HINTED_BYTES), os.POSIX_FADV_WILLNEED)
