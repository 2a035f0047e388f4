"""A prepared set on disk: one array of all images at one resolution, labels, and a manifest that says what it is.

```
DIR/
  images.npy      uint8 [N, 3, R, R], RGB
  labels.npy      int64 [N], not decreasing
  digests.npy     uint8 [N, 16], the first half of each image's SHA-256
  names.txt       the file that each image came from, a line each: class/file
  report.json     what preparing met; report.txt the same for people
  manifest.json   everything else, written last
```

Images are sorted by class, then by file name.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sagan.data.config import DataConfig
from sagan.data.dataset import DatasetCheck, ImageDataset
from sagan.data.inspection import CheckMode
from sagan.data.layout import DatasetError
from sagan.data.prefetch import map_ranges

FORMAT = "sagan-layers packed images"
VERSION = 1
IMAGES, LABELS, DIGESTS, NAMES = "images.npy", "labels.npy", "digests.npy", "names.txt"
REPORT, REPORT_TEXT, MANIFEST = "report.json", "report.txt", "manifest.json"
SMALL_FILES = (LABELS, DIGESTS, NAMES, REPORT, REPORT_TEXT)
DIGEST_BYTES = 16
HEADER_BYTES = 128
PARTIAL = ".partial"

_FIELDS: dict[str, type | tuple[type, ...]] = {
    "format": str,
    "version": int,
    "created": str,
    "source": dict,
    "resolution": int,
    "filter": str,
    "crop": str,
    "decoding": str,
    "num_images": int,
    "num_classes": int,
    "class_names": list,
    "class_words": (list, type(None)),
    "images_per_class": list,
    "counts": dict,
    "checksum": str,
    "files": dict,
    "versions": dict,
}


class PackedError(DatasetError):
    """A prepared set that is not whole, or not what it is used for."""


@dataclass(frozen=True)
class Manifest:
    """What a prepared set says of itself.

    Attributes:
        folder: where it is.
        values: the whole of manifest.json.
    """

    folder: Path
    values: dict[str, Any]

    @property
    def resolution(self) -> int:
        """Side of the images in pixels."""
        return int(self.values["resolution"])

    @property
    def filter(self) -> str:
        """The filter of the resize."""
        return str(self.values["filter"])

    @property
    def num_images(self) -> int:
        """How many images there are."""
        return int(self.values["num_images"])

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by label."""
        return tuple(self.values["class_names"])

    @property
    def checksum(self) -> str:
        """Of pixels, labels, class names and resolution: the same for the same images from any source."""
        return str(self.values["checksum"])

    def describe(self) -> str:
        """Return what the set is, in a few lines."""
        values = self.values
        counts = values["images_per_class"]
        return "\n".join(
            [
                f"Prepared images in {self.folder}",
                f"  {self.num_images:,} images of {self.resolution}x{self.resolution} in {len(counts):,} classes"
                f" ({min(counts):,} to {max(counts):,} each)",
                f"  from {values['source']['kind']} {values['source']['path']}, "
                f"{values['counts']['unreadable']:,} unreadable left out",
                f"  {values['decoding']}; crop: {values['crop']}; filter: {self.filter}",
                f"  checksum {self.checksum}",
            ]
        )


def is_prepared(folder: Path) -> bool:
    """Return whether a folder holds a prepared set, or what is left of one."""
    return any((folder / name).is_file() for name in (MANIFEST, IMAGES))


def read_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json.

    Raises:
        PackedError: it is missing, damaged, or of another version.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "It is unfinished: run the same prepare command again. " if PARTIAL in str(folder) else ""
        raise PackedError(
            f"expected a prepared set in {folder}, cannot read its {MANIFEST}: {error.strerror}. {hint}"
        ) from error
    except ValueError as error:
        raise PackedError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise PackedError(f"{path}: expected the format {FORMAT!r}")
    if values.get("version") != VERSION:
        raise PackedError(f"{path}: expected version {VERSION}, got {values.get('version')}")
    for name, kind in _FIELDS.items():
        if name not in values:
            raise PackedError(f"{path} is damaged: {name} is missing")
        if not isinstance(values[name], kind):
            raise PackedError(f"{path} is damaged: {name} is {values[name]!r}")
    if values["num_classes"] != len(values["class_names"]) or values["num_images"] < 1:
        raise PackedError(f"{path} is damaged: num_classes or num_images is wrong")
    return Manifest(folder, values)


def image_header(num_images: int, resolution: int) -> bytes:
    """Return the first 128 bytes of images.npy."""
    buffer = io.BytesIO()
    shape = (num_images, 3, resolution, resolution)
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    assert buffer.tell() == HEADER_BYTES
    return buffer.getvalue()


def digest(pixels: bytes | memoryview) -> bytes:
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


def damaged_images(
    path: Path,
    resolution: int,
    digests: npt.NDArray[np.uint8],
    expected: npt.NDArray[np.bool_] | None = None,
    *,
    threads: int | None = None,
    progress: bool = False,
) -> list[int]:
    """Read an images.npy whole and return the rows that do not have their digest.

    Args:
        path: the array.
        resolution: side of its images.
        digests: uint8 [N, 16].
        expected: bool [N], rows to look at; None looks at all.
        threads: threads that read; None takes one for each CPU.
        progress: draw a progress bar.
    """
    row_bytes = 3 * resolution**2

    def check(rows: range) -> list[int]:
        buffer = bytearray(len(rows) * row_bytes)
        with path.open("rb", buffering=0) as file:
            file.seek(HEADER_BYTES + rows.start * row_bytes)
            view = memoryview(buffer)
            done = 0
            while done < len(buffer) and (count := file.readinto(view[done:])):
                done += count
        return [
            row
            for place, row in enumerate(rows)
            if (expected is None or expected[row])
            and (
                (place + 1) * row_bytes > done
                or digest(view[place * row_bytes : (place + 1) * row_bytes]) != digests[row].tobytes()
            )
        ]

    chunk = max(1, min(256, 2**24 // row_bytes))
    found = map_ranges(
        check, len(digests), threads=threads, progress=progress, description="checking", chunk=chunk
    )
    return [row for rows in found for row in rows]


def verify(folder: Path, *, threads: int | None = None, progress: bool = False) -> list[str]:
    """Read a prepared set whole and return what is wrong with it, nothing if it is sound.

    Args:
        folder: the set.
        threads: threads that read; None takes one for each CPU.
        progress: draw a progress bar.
    """
    try:
        manifest = read_manifest(folder)
    except PackedError as error:
        return [str(error)]
    values, resolution, count = manifest.values, manifest.resolution, manifest.num_images
    wrong = [*_wrong_small_files(manifest), *_wrong_size(manifest)]
    try:
        labels, digests = (np.load(folder / name, allow_pickle=False) for name in (LABELS, DIGESTS))
    except (OSError, ValueError) as error:
        return [*wrong, f"{LABELS} or {DIGESTS} cannot be read: {error}"]
    wrong += _wrong_labels(labels, manifest)
    if digests.shape != (count, DIGEST_BYTES) or digests.dtype != np.uint8:
        return [
            *wrong,
            f"{DIGESTS}: expected uint8 [{count}, {DIGEST_BYTES}], got {digests.dtype} {digests.shape}",
        ]
    if content_checksum(resolution, manifest.class_names, labels, digests) != manifest.checksum:
        wrong.append(f"the checksum of labels, digests and class names is not {manifest.checksum}")
    if not (folder / IMAGES).is_file():
        return wrong
    damaged = damaged_images(folder / IMAGES, resolution, digests, threads=threads, progress=progress)
    if damaged:
        names = _names(folder)
        shown = ", ".join(f"{row} ({names[row]})" if row < len(names) else str(row) for row in damaged[:10])
        more = f" and {len(damaged) - 10:,} more" if len(damaged) > 10 else ""
        wrong.append(f"{len(damaged):,} of {count:,} images are damaged in {IMAGES}: {shown}{more}")
    if sum(values["images_per_class"]) != count or values["counts"].get("packed") != count:
        wrong.append(f"the counts in {MANIFEST} do not add up to {count:,} images")
    return wrong


def _wrong_small_files(manifest: Manifest) -> Iterable[str]:
    for name in SMALL_FILES:
        path, said = manifest.folder / name, manifest.values["files"].get(name)
        if said is None:
            yield f"{MANIFEST} does not list {name}"
        elif not path.is_file():
            yield f"{name} is missing"
        elif file_entry(path.read_bytes()) != said:
            yield f"{name} is not the file that was written: its size or SHA-256 differs"


def _wrong_size(manifest: Manifest) -> Iterable[str]:
    path = manifest.folder / IMAGES
    if not path.is_file():
        yield f"{IMAGES} is missing"
        return
    header = image_header(manifest.num_images, manifest.resolution)
    size = HEADER_BYTES + manifest.num_images * 3 * manifest.resolution**2
    if path.stat().st_size != size:
        yield f"{IMAGES}: expected {size:,} bytes, got {path.stat().st_size:,}"
    with path.open("rb") as file:
        if file.read(HEADER_BYTES) != header:
            yield f"{IMAGES}: its header is damaged, or not of {manifest.num_images:,} images"


def _wrong_labels(labels: npt.NDArray[Any], manifest: Manifest) -> Iterable[str]:
    count, classes = manifest.num_images, len(manifest.class_names)
    if labels.shape != (count,) or labels.dtype != np.int64:
        yield f"{LABELS}: expected int64 [{count}], got {labels.dtype} {list(labels.shape)}"
    elif labels.min() < 0 or labels.max() >= classes:
        yield f"{LABELS}: expected labels from 0 to {classes - 1}, got {labels.min()} to {labels.max()}"
    elif (np.diff(labels) < 0).any():
        yield f"{LABELS}: the labels are not in order"
    elif np.bincount(labels, minlength=classes).tolist() != manifest.values["images_per_class"]:
        yield f"{LABELS}: the images of each class are not as many as {MANIFEST} says"


def file_entry(data: bytes) -> dict[str, Any]:
    """Return how the manifest lists a file."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _names(folder: Path) -> list[str]:
    try:
        return (folder / NAMES).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def open_packed(path: Path, resolution: int, config: DataConfig) -> PackedDataset:
    """Open a prepared set, which decides the filter and all else itself; see `open_dataset`."""
    return PackedDataset(path, resolution)


class PackedDataset(ImageDataset):
    """The images of a prepared set, read from disk (or the system's cache of it) a batch at a time.

    Attributes:
        manifest: what the set says of itself.
    """

    prefetched_batches = 4

    def __init__(self, folder: Path | str, resolution: int | None = None) -> None:
        """Open a set; no image is read.

        Args:
            folder: the set.
            resolution: the resolution that is needed; None takes the set's.

        Raises:
            PackedError: the set is not whole, or has another resolution.
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
        for problem in _wrong_size(self.manifest):
            raise PackedError(f"the prepared set in {folder} is not whole: {problem}")
        try:
            labels = np.load(folder / LABELS, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise PackedError(f"the prepared set in {folder} is not whole: {LABELS}: {error}") from error
        for problem in _wrong_labels(labels, self.manifest):
            raise PackedError(f"the prepared set in {folder} is not whole: {problem}")
        self.class_names = self.manifest.class_names
        self.num_classes = len(self.class_names)
        self.labels = torch.from_numpy(labels)
        self.resample = self.manifest.filter
        self.failures = []
        self._open()

    def _open(self) -> None:
        with (self.manifest.folder / IMAGES).open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        pixels = np.frombuffer(self._map, np.uint8, offset=HEADER_BYTES)
        self._images = pixels.reshape(len(self.labels), 3, self.resolution, self.resolution)

    @property
    def cached(self) -> bool:
        """True: there is nothing to decode."""
        return True

    def fingerprint(self) -> str:
        """Return the set's checksum."""
        return self.manifest.checksum

    def check(
        self, mode: CheckMode, *, report_folder: Path | None = None, progress: bool = False
    ) -> DatasetCheck:
        """In mode "full" read the set whole and compare it with its digests; its manifest is the report.

        Raises:
            PackedError: it is damaged.
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
        """Return a batch; see `ImageDataset.fetch`."""
        wanted = np.asarray(indices, dtype=np.int64)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(
                f"expected indices from 0 to {len(self) - 1}, got {wanted.min()} to {wanted.max()}"
            )
        self._announce(wanted)
        images = torch.empty((len(wanted), *self._images.shape[1:]), dtype=torch.uint8)
        np.take(self._images, wanted, axis=0, out=images.numpy(), mode="clip")  # "raise" would copy twice
        return images, self.labels[torch.from_numpy(wanted)]

    def _announce(self, wanted: npt.NDArray[np.int64]) -> None:
        """Let the system read a batch's images all at once, where it would read one after the other."""
        if not hasattr(self._map, "madvise"):  # Windows
            return
        row_bytes = 3 * self.resolution**2
        for row in np.sort(wanted).tolist():
            start = HEADER_BYTES + row * row_bytes
            into_page = start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, start - into_page, row_bytes + into_page)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the mapped file, which a worker process maps for itself."""
        return {name: value for name, value in vars(self).items() if name not in ("_map", "_images")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()
