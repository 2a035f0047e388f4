"""A prepared set on disk: one array of all images at one resolution, labels, and a manifest that describes them.

```
DIR/
  images.npy      uint8 [N, 3, R, R], RGB
  labels.npy      int64 [N], not decreasing
  digests.npy     uint8 [N, 16], the first half of each image's SHA-256
  names.txt       the file that each image came from, one per line: class/file
  report.json     what prepare found; report.txt the same for people
  manifest.json   everything else and its own SHA-256, written last
```

Images are sorted by class, then by file name.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from sagan.data.layout import DatasetError
from sagan.data.prefetch import map_ranges
from sagan.errors import UserError, check_at_least, shown
from sagan.io import first_line, open_regular, read_json
from sagan.schema import conform

FORMAT = "sagan-layers packed images"
VERSION = 1
IMAGES, LABELS, DIGESTS, NAMES = "images.npy", "labels.npy", "digests.npy", "names.txt"
REPORT, REPORT_TEXT, MANIFEST = "report.json", "report.txt", "manifest.json"
SMALL_FILES = (LABELS, DIGESTS, NAMES, REPORT, REPORT_TEXT)
DIGEST_BYTES = 16
HEADER_BYTES = 128
PARTIAL = ".partial"

_SEAL = "sha256"


class PackedError(DatasetError):
    """A prepared set that is incomplete or damaged, or does not fit its use."""


class Source(TypedDict):
    """Kind and path of a source, and the plan: all that decides the pixels."""

    kind: str
    path: str
    plan: dict[str, Any]


class Counts(TypedDict):
    """Files of a source, by what became of them."""

    listed: int
    packed: int
    unreadable: int
    not_images: int


@dataclass(frozen=True)
class Manifest:
    """What manifest.json holds, and the folder that it is in.

    The checksum is of pixels, labels, class names and resolution: the same for the same images from any source.
    ``files`` lists size and SHA-256 of the small files. Names, words (human names, where the source has them) and
    counts are by label.

    Raises:
        UserError: a number is below 1, or there are not as many names, words or counts as classes.
    """

    folder: Path
    created: str
    source: Source
    resolution: int
    filter: str
    crop: str
    decoding: str
    layout: str
    num_images: int
    num_classes: int
    class_names: list[str]
    class_words: list[str] | None
    images_per_class: list[int]
    counts: Counts
    checksum: str
    files: dict[str, dict[str, Any]]
    versions: dict[str, str]

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_images", "num_classes", "resolution")
        for name in ("class_names", "class_words", "images_per_class"):
            values = getattr(self, name)
            if values is not None and len(values) != self.num_classes:
                raise UserError(f"{name}: expected num_classes, {self.num_classes:,}, got {len(values):,}")

    def to_json(self) -> str:
        """Return the text of manifest.json."""
        values = {"format": FORMAT, "version": VERSION, **asdict(self)}
        del values["folder"]
        return seal(values)

    def describe(self) -> str:
        """Return what the set is, in a few lines."""
        return "\n".join(
            [
                f"Prepared images in {self.folder}",
                f"  {self.num_images:,} images of {self.resolution}x{self.resolution} in {self.num_classes:,} classes"
                f" ({min(self.images_per_class):,} to {max(self.images_per_class):,} each)",
                f"  from {self.source['kind']} {self.source['path']}, "
                f"{self.counts['unreadable']:,} unreadable not packed",
                f"  {self.decoding}; crop: {self.crop}; filter: {self.filter}",
                f"  checksum {self.checksum}",
            ]
        )


def seal(values: Mapping[str, Any]) -> str:
    """Return values as JSON that ends with its own SHA-256: so small a file says itself whether it is damaged."""
    return json.dumps({**values, _SEAL: _json_digest(values)}, indent=1) + "\n"


def read_sealed(path: Path, *, required: bool = True) -> dict[str, Any]:
    """Return what :func:`seal` wrote; raise ValueError if it is not that. The digest may be absent if not required."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got {type(values).__name__}")
    found = values.pop(_SEAL, None)
    if found != _json_digest(values) and (required or found is not None):
        raise ValueError("it was changed since it was written: its SHA-256 is another")
    return values


def _json_digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read manifest.json; raise PackedError if it is missing, damaged, or of another version."""
    path = folder / MANIFEST
    try:
        values = read_sealed(path, required=False)  # sets made before it had a digest have none
    except OSError as error:
        hint = "It is unfinished: run the same prepare command again. " if PARTIAL in str(folder) else ""
        raise PackedError(
            f"expected a prepared set in {folder}, cannot read its {MANIFEST}: {error.strerror}. {hint}"
        ) from error
    except ValueError as error:
        raise PackedError(f"{path} is damaged: {error}") from error
    if values.pop("format", None) != FORMAT:
        raise PackedError(f"{path}: expected the format {FORMAT!r}")
    if (version := values.pop("version", None)) != VERSION:
        raise PackedError(f"{path}: expected version {VERSION}, got {shown(version)}")
    try:
        manifest: Manifest = conform({"folder": str(folder), **values}, Manifest)
    except UserError as error:
        raise PackedError(f"{path} is damaged: {error}") from None
    return manifest


def image_header(num_images: int, resolution: int) -> bytes:
    """Return the first 128 bytes of images.npy."""
    buffer = io.BytesIO()
    shape = (num_images, 3, resolution, resolution)
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    assert buffer.tell() == HEADER_BYTES
    return buffer.getvalue()


def digest(pixels: bytes) -> bytes:
    """Return the digest of one image."""
    return hashlib.sha256(pixels).digest()[:DIGEST_BYTES]


def content_checksum(
    resolution: int, class_names: Sequence[str], labels: npt.NDArray[np.int64], digests: npt.NDArray[np.uint8]
) -> str:
    """Return the checksum of a set: of its images' digests, labels, class names and resolution."""
    total = hashlib.sha256(json.dumps([FORMAT, VERSION, resolution, list(class_names)]).encode())
    total.update(labels.astype("<i8").tobytes())
    total.update(digests.tobytes())
    return f"sha256:{total.hexdigest()}"


def file_entry(data: bytes) -> dict[str, Any]:
    """Return how the manifest lists a file."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def damaged_images(
    path: Path,
    resolution: int,
    digests: npt.NDArray[np.uint8],
    written: npt.NDArray[np.bool_] | None = None,
    *,
    threads: int | None = None,
    progress: bool = False,
) -> list[int]:
    """Read all of an images.npy and return the rows that do not match their digest.

    ``digests`` is uint8 [N, 16]. Rows where ``written``, bool [N], is False are not compared.
    """
    row_bytes = 3 * resolution**2

    def check(rows: range) -> list[int]:
        found = []
        with path.open("rb", buffering=2**20) as file:
            file.seek(HEADER_BYTES + rows.start * row_bytes)
            for row in rows:
                pixels = file.read(row_bytes)
                if (written is None or written[row]) and digest(pixels) != digests[row].tobytes():
                    found.append(row)
        return found

    checked = map_ranges(
        check, len(digests), threads=threads, progress=progress, description="checking", chunk=256
    )
    return [row for rows in checked for row in rows]


def read_array(path: Path) -> npt.NDArray[Any]:
    """Read an array's file; raise PackedError if it is damaged."""
    try:
        with open_regular(path) as file:
            return np.asarray(np.load(file, allow_pickle=False))
    except Exception as error:  # of many types; the bytes are arbitrary
        raise PackedError(
            f"{path.name} cannot be read: {type(error).__name__}: {first_line(error)}"
        ) from error


def verify(folder: Path, *, images: bool = True, progress: bool = False) -> list[str]:
    """Read a prepared set and return what is wrong with it, nothing if it is sound; ``images``: all pixels too."""
    try:
        manifest = read_manifest(folder)
    except PackedError as error:
        return [str(error)]
    count = manifest.num_images
    wrong = [*_wrong_small_files(manifest), *wrong_size(manifest)]
    try:
        labels, digests = (read_array(folder / name) for name in (LABELS, DIGESTS))
    except PackedError as error:
        return [*wrong, str(error)]
    wrong += wrong_labels(labels, manifest)
    if digests.shape != (count, DIGEST_BYTES) or digests.dtype != np.uint8:
        expected = f"uint8 [{count}, {DIGEST_BYTES}]"
        return [*wrong, f"{DIGESTS}: expected {expected}, got {digests.dtype} {digests.shape}"]
    if content_checksum(manifest.resolution, manifest.class_names, labels, digests) != manifest.checksum:
        wrong.append(f"the checksum of labels, digests and class names is not {manifest.checksum}")
    if sum(manifest.images_per_class) != count or manifest.counts["packed"] != count:
        wrong.append(f"the counts in {MANIFEST} do not add up to {count:,} images")
    if not images or not (folder / IMAGES).is_file():
        return wrong
    if damaged := damaged_images(folder / IMAGES, manifest.resolution, digests, progress=progress):
        names = (
            (folder / NAMES).read_text("utf-8", "replace").splitlines() if (folder / NAMES).is_file() else []
        )
        shown = ", ".join(f"{row} ({names[row]})" if row < len(names) else str(row) for row in damaged[:10])
        more = f" and {len(damaged) - 10:,} more" if len(damaged) > 10 else ""
        wrong.append(f"{len(damaged):,} of {count:,} images are damaged in {IMAGES}: {shown}{more}")
    return wrong


def _wrong_small_files(manifest: Manifest) -> Iterable[str]:
    for name in SMALL_FILES:
        path, listed = manifest.folder / name, manifest.files.get(name)
        if listed is None:
            yield f"{MANIFEST} does not list {name}"
        elif not path.is_file():
            yield f"{name} is missing"
        elif file_entry(path.read_bytes()) != listed:
            yield f"{name} is not the file that was written: its size or SHA-256 differs"


def wrong_size(manifest: Manifest) -> Iterable[str]:
    """Yield what is wrong with the size and the header of images.npy."""
    path = manifest.folder / IMAGES
    if not path.is_file():
        yield f"{IMAGES} is missing"
        return
    size = HEADER_BYTES + manifest.num_images * 3 * manifest.resolution**2
    if path.stat().st_size != size:
        yield f"{IMAGES}: expected {size:,} bytes, got {path.stat().st_size:,}"
    with path.open("rb") as file:
        if file.read(HEADER_BYTES) != image_header(manifest.num_images, manifest.resolution):
            yield f"{IMAGES}: its header is damaged, or not of {manifest.num_images:,} images"


def wrong_labels(labels: npt.NDArray[Any], manifest: Manifest) -> Iterable[str]:
    """Yield what is wrong with the labels."""
    count, classes = manifest.num_images, len(manifest.class_names)
    if labels.shape != (count,) or labels.dtype != np.int64:
        yield f"{LABELS}: expected int64 [{count}], got {labels.dtype} {list(labels.shape)}"
    elif labels.min() < 0 or labels.max() >= classes:
        yield f"{LABELS}: expected labels from 0 to {classes - 1}, got {labels.min()} to {labels.max()}"
    elif (np.diff(labels) < 0).any():
        yield f"{LABELS}: the labels are not in order"
    elif np.bincount(labels, minlength=classes).tolist() != manifest.images_per_class:
        yield f"{LABELS}: the images of each class are not as many as {MANIFEST} says"
