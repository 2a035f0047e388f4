"""One part of the work: read files, decode them, write their pixels to their places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from sagan.data.decoding import ImageFacts, ImageReadError, pillow_warnings, read_pixels
from sagan.data.inspection import widen
from sagan.data.packed_format import DIGEST_BYTES, HEADER_BYTES, digest
from sagan.prepare.listing import Indices, Reader

UNREADABLE, ROTATED, ENLARGED, MISNAMED_FORMAT = "unreadable", "rotated by EXIF", "enlarged", "format"
_WRITTEN_TOGETHER = 64
_EXTENSIONS = {
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "PPM": (".ppm",),
    "TIFF": (".tif", ".tiff"),
}


@dataclass(frozen=True, eq=False)
class Part:
    """Some of the images.

    Attributes:
        number: its place among the parts.
        rows: int64 [n], the images' rows in the array.
        names: their names.
        reader: reads their files.
        array: the array's file.
        resolution: side of the images.
        resample: filter of the resize.
    """

    number: int
    rows: Indices
    names: Sequence[str]
    reader: Reader
    array: Path
    resolution: int
    resample: str


@dataclass
class PartResult:
    """What became of a part.

    Attributes:
        digests: of each image, one after the other; zeros for one that is left out.
        problems: (kind, row, detail) of what is worth a report.
        widths: least and greatest width, None if no image could be read.
        heights: likewise.
    """

    digests: bytes = b""
    problems: list[tuple[str, int, str]] = field(default_factory=list)
    widths: tuple[int, int] | None = None
    heights: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return values that JSON can hold."""
        return {**vars(self), "digests": self.digests.hex()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PartResult:
        """Return what :meth:`to_dict` was called on."""
        return cls(
            bytes.fromhex(values["digests"]),
            [(kind, row, detail) for kind, row, detail in values["problems"]],
            values["widths"] and tuple(values["widths"]),
            values["heights"] and tuple(values["heights"]),
        )

    def add_facts(self, row: int, name: str, facts: ImageFacts, resolution: int) -> None:
        """Note what is unusual about an image."""
        self.widths = widen(self.widths, facts.width)
        self.heights = widen(self.heights, facts.height)
        self.problems += [(kind, row, facts.mode) for kind in facts.conversions()]
        if facts.is_rotated:
            self.problems.append((ROTATED, row, ""))
        if min(facts.width, facts.height) < resolution:
            self.problems.append((ENLARGED, row, f"{facts.width}x{facts.height}"))
        extension = PurePosixPath(name).suffix.lower()
        if extension and extension not in _EXTENSIONS.get(facts.format, (extension,)):
            self.problems.append((MISNAMED_FORMAT, row, f"holds {facts.format}"))


def pack_part(part: Part) -> PartResult:
    """Decode a part's images and write them into the array; what cannot be decoded is noted and left out."""
    result = PartResult()
    digests = []
    pending: list[tuple[int, bytes]] = []
    with pillow_warnings(), part.array.open("r+b", buffering=0) as array:
        for row, name, data in zip(part.rows.tolist(), part.names, part.reader, strict=True):
            try:
                if isinstance(data, str):
                    raise ImageReadError(Path(name), data)
                pixels, facts = read_pixels(
                    Path(name), part.resolution, resample=part.resample, draft=False, data=data
                )
            except ImageReadError as error:
                result.problems.append((UNREADABLE, row, error.reason))
                digests.append(bytes(DIGEST_BYTES))
                continue
            packed = pixels.tobytes()
            digests.append(digest(packed))
            result.add_facts(row, name, facts, part.resolution)
            pending.append((row, packed))
            if len(pending) == _WRITTEN_TOGETHER:
                _write(array, pending)
        _write(array, pending)
    result.digests = b"".join(digests)
    return result


def _write(array: Any, pending: list[tuple[int, bytes]]) -> None:
    """Write pixels to their rows, neighbours at once, and forget them."""
    pending.sort()
    start = 0
    for end in range(1, len(pending) + 1):
        if end == len(pending) or pending[end][0] != pending[end - 1][0] + 1:
            row, pixels = pending[start]
            write_all(
                array, HEADER_BYTES + row * len(pixels), b"".join(data for _, data in pending[start:end])
            )
            start = end
    pending.clear()


def write_all(file: Any, offset: int, data: bytes) -> None:
    """Write data to an unbuffered file at an offset; a full disk raises."""
    file.seek(offset)
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def digests_of(
    results: Sequence[tuple[Indices, PartResult]], count: int
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the digests of all images, uint8 [count, 16], from (rows, result) of every part."""
    digests = np.zeros((count, DIGEST_BYTES), dtype=np.uint8)
    for rows, result in results:
        digests[rows] = np.frombuffer(result.digests, np.uint8).reshape(-1, DIGEST_BYTES)
    return digests
