"""Images inside of tar archives that are not compressed, read where they lie; nothing is unpacked."""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from sagan.data import DatasetError, PathTable
from sagan.data.layout import has_image_extension, is_hidden
from sagan.prepare.listing import Indices, Listing, Reader, Store, consecutive_parts
from sagan.prepare.pool import run_tasks
from sagan.prepare.readahead import hinted, will_need

_CLASS_ARCHIVE = re.compile(r"(n\d{8})\.tar")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd", b"PK": "zip"}


class Place(NamedTuple):
    """A stretch of a file."""

    path: Path
    start: int
    size: int


class Member(NamedTuple):
    """A regular file inside of an archive: its name there, and where its bytes are."""

    name: str
    start: int
    size: int


def list_members(place: Place) -> list[Member]:
    """Return the regular files of an archive, in their order there.

    Raises:
        DatasetError: it is not a whole, uncompressed tar archive.
    """
    end = place.start + place.size
    members = []
    with place.path.open("rb") as file:
        magic = file.read(2)
        file.seek(place.start)
        try:
            with tarfile.TarFile(fileobj=file) as archive:
                for member in archive:
                    if member.offset >= end:
                        break
                    if member.offset_data + member.size > end:
                        raise tarfile.ReadError("unexpected end of data")
                    if member.isreg():
                        members.append(Member(member.name, member.offset_data, member.size))
        except tarfile.TarError as error:
            packer = _COMPRESSED.get(magic) if place.start == 0 else None
            reason = (
                f"it is compressed ({packer}); unpack that layer first, images inside are read at their places"
                if packer
                else f"{error}; an incomplete download? It has {place.size:,} bytes"
            )
            raise DatasetError(f"expected a whole tar archive at {place.path}, got: {reason}") from error
    return members


def is_class_archive(name: str) -> bool:
    """Return whether a name is that of one class's archive, n########.tar."""
    return _CLASS_ARCHIVE.fullmatch(PurePosixPath(name).name) is not None


def first_member(path: Path) -> str | None:
    """Return the name of an archive's first file, None if it has none or is not a tar archive."""
    try:
        with tarfile.open(path, "r:") as archive:
            return next((member.name for member in archive if member.isreg()), None)
    except (tarfile.TarError, OSError):
        return None


@dataclass(frozen=True)
class TarReader(Reader):
    """Reads stretches of files."""

    places: Sequence[Place]

    def __iter__(self) -> Iterator[bytes | str]:
        path, file = None, None
        try:
            for place in hinted(self.places, lambda place: will_need(place.path, place.start, place.size)):
                if place.path != path or file is None:
                    if file is not None:
                        file.close()
                    path, file = place.path, place.path.open("rb", buffering=0)
                file.seek(place.start)
                data = file.read(place.size)
                yield data if len(data) == place.size else f"truncated: {len(data):,} of {place.size:,} bytes"
        except OSError as error:
            raise DatasetError(
                f"cannot read {path} any more: {error.strerror}. Run the same command again to go on."
            ) from error
        finally:
            if file is not None:
                file.close()


class TarStore(Store):
    """Stretches of a few files."""

    def __init__(self, paths: Sequence[Path], files: Sequence[int], members: Sequence[Member]) -> None:
        self.paths = tuple(paths)
        self.files = np.asarray(files, dtype=np.int32)
        self.starts = np.asarray([member.start for member in members], dtype=np.int64)
        self.sizes = np.asarray([member.size for member in members], dtype=np.int64)

    def parts(self, size: int) -> list[Indices]:
        return consecutive_parts(len(self.files), size)

    def reader(self, indices: Indices) -> TarReader:
        stretches = zip(
            self.files[indices], self.starts[indices].tolist(), self.sizes[indices].tolist(), strict=True
        )
        return TarReader([Place(self.paths[file], start, size) for file, start, size in stretches])

    def identity(self) -> bytes:
        return self.sizes.astype("<i8").tobytes()


def list_class_tars(path: Path, workers: int) -> Listing:
    """List a tar of class archives (ILSVRC2012_img_train.tar), or a folder of class archives.

    Args:
        path: the archive or the folder.
        workers: processes that read the archives' headers.

    Raises:
        DatasetError: there are no class archives, or one is damaged.
    """
    skipped: Counter[str] = Counter()
    examples: list[str] = []
    archives: dict[str, Place] = {}
    if path.is_dir():
        found = [
            (entry.name, Place(entry, 0, entry.stat().st_size))
            for entry in sorted(path.iterdir())
            if entry.is_file()
        ]
    else:
        outer = list_members(Place(path, 0, path.stat().st_size))
        found = [(member.name, Place(path, member.start, member.size)) for member in outer]
    for name, place in found:
        match = _CLASS_ARCHIVE.fullmatch(PurePosixPath(name).name)
        if match is None:
            _skip(skipped, examples, name)
        elif match[1] in archives:
            raise DatasetError(f"expected one archive for each class in {path}, got two of {match[1]}")
        else:
            archives[match[1]] = place
    if not archives:
        raise DatasetError(f"expected archives named n########.tar in {path}, one for each class, got none")
    class_names = sorted(archives)
    names: list[str] = []
    labels: list[int] = []
    members: list[Member] = []
    files: list[int] = []
    paths = [path] if not path.is_dir() else [archives[name].path for name in class_names]
    listed = dict(run_tasks(list_members, [archives[name] for name in class_names], workers))
    for label, class_name in enumerate(class_names):
        images = []
        for member in listed[archives[class_name]]:
            name = PurePosixPath(member.name).name
            if is_hidden(name) or not has_image_extension(name):
                _skip(skipped, examples, f"{class_name}/{name}")
            else:
                images.append((name, member))
        for name, member in sorted(images):
            names.append(f"{class_name}/{name}")
            labels.append(label)
            members.append(member)
            files.append(label if path.is_dir() else 0)
    if not names:
        raise DatasetError(f"expected images in the class archives of {path}, got none")
    return Listing(
        kind="class tars",
        path=str(path),
        class_names=tuple(class_names),
        class_words=None,
        names=PathTable(path, names),
        labels=np.asarray(labels, dtype=np.int64),
        store=TarStore(paths, files, members),
        skipped=skipped,
        skipped_examples=examples,
    )


def _skip(skipped: Counter[str], examples: list[str], name: str) -> None:
    kind = (
        "hidden"
        if is_hidden(PurePosixPath(name).name)
        else PurePosixPath(name).suffix.lower() or "no extension"
    )
    skipped[kind] += 1
    if len(examples) < 20:
        examples.append(name)


def flat_images(path: Path) -> tuple[list[str], list[Member], Counter[str], list[str]]:
    """Return the images of an archive without class folders: file names, places, and what was skipped."""
    skipped: Counter[str] = Counter()
    examples: list[str] = []
    images: list[tuple[str, Member]] = []
    for member in list_members(Place(path, 0, path.stat().st_size)):
        name = PurePosixPath(member.name).name
        if is_hidden(name) or not has_image_extension(name):
            _skip(skipped, examples, member.name)
        else:
            images.append((name, member))
    images.sort()
    return [name for name, _ in images], [member for _, member in images], skipped, examples
