"""One part of the work: reads files, decodes them and writes their pixels to their rows of the array."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from io import RawIOBase
from pathlib import Path, PurePosixPath

from sagan.data.decoding import ImageFacts, ImageReadError, pillow_warnings, read_pixels
from sagan.data.inspection import widen
from sagan.data.layout import FORMAT_EXTENSIONS
from sagan.data.packed_format import DIGEST_BYTES, HEADER_BYTES, digest
from sagan.prepare.listing import ImageFiles, Indices, is_cut_jpeg

UNREADABLE, ROTATED, ENLARGED, MISNAMED_FORMAT = "unreadable", "rotated by EXIF", "enlarged", "format"
_IMAGES_PER_WRITE = 64
_EXTENSIONS = {**FORMAT_EXTENSIONS, "MPO": FORMAT_EXTENSIONS["JPEG"]}


@dataclass(frozen=True, eq=False)
class Part:
    """Some of the images: their rows in the array (int64 [n]), names and files, and how to pack them."""

    number: int
    rows: Indices
    names: Sequence[str]
    files: ImageFiles
    array: Path
    resolution: int
    resample: str


@dataclass
class PartResult:
    """What became of a part; a finished part's marker holds it as JSON."""

    digests: str = ""  # of each image, one after the other, in hex; zeros for one that cannot be read
    problems: list[tuple[str, int, str]] = field(default_factory=list)  # kind, row, detail
    widths: tuple[int, int] | None = None  # smallest and largest; None if no image could be read
    heights: tuple[int, int] | None = None

    def add_facts(self, row: int, name: str, facts: ImageFacts, resolution: int) -> None:
        """Record an image's size and what is unusual about it."""
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
    """Decode a part's images and write them into the array; report those that cannot be decoded."""
    result = PartResult()
    digests = []
    pending: list[tuple[int, bytes]] = []
    with pillow_warnings(), part.array.open("r+b", buffering=0) as array:
        for row, name, data in zip(part.rows.tolist(), part.names, part.files, strict=True):
            try:
                if isinstance(data, str):
                    raise ImageReadError(Path(name), data)
                if is_cut_jpeg(data):
                    raise ImageReadError(Path(name), "truncated: zeros instead of its end")
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
            if len(pending) == _IMAGES_PER_WRITE:
                _write(array, pending)
        _write(array, pending)
    result.digests = b"".join(digests).hex()
    return result


def _write(array: RawIOBase, pending: list[tuple[int, bytes]]) -> None:
    """Write pixels to their rows, consecutive rows at once, and clear the list."""
    pending.sort()
    start = 0
    for end in range(1, len(pending) + 1):
        if end == len(pending) or pending[end][0] != pending[end - 1][0] + 1:
            row, pixels = pending[start]
            data = b"".join(data for _, data in pending[start:end])
            write_all(array, HEADER_BYTES + row * len(pixels), data)
            start = end
    pending.clear()


def write_all(file: RawIOBase, offset: int, data: bytes) -> None:
    """Write data to an unbuffered file at an offset; a full disk raises, whereas one ``write`` may stop short."""
    file.seek(offset)
    view = memoryview(data)
    while view:
        view = view[file.write(view) or 0 :]
