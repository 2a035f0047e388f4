"""Images inside uncompressed tar archives, read in place; nothing is unpacked."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from sagan.data import DatasetError, PathTable
from sagan.data.layout import has_image_extension, is_class_archive, is_hidden
from sagan.data.tree import SkippedFiles
from sagan.prepare.listing import ImageFiles, Indices, Listing, hinted, will_need
from sagan.prepare.pool import run_tasks

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd", b"PK": "zip"}


class Stretch(NamedTuple):
    """Consecutive bytes of a file: an archive inside another, or one image."""

    path: Path
    start: int
    size: int


def whole(path: Path) -> Stretch:
    """Return all bytes of a file."""
    return Stretch(path, 0, path.stat().st_size)


def list_members(archive: Stretch) -> list[tuple[str, Stretch]]:
    """Return the names and places of an archive's regular files; raise DatasetError unless it is whole and plain."""
    end = archive.start + archive.size
    members = []
    with archive.path.open("rb") as file:
        magic = file.read(2)
        file.seek(archive.start)
        try:
            with tarfile.TarFile(fileobj=file) as tar:
                for member in tar:
                    if member.offset >= end:
                        break
                    if member.offset_data + member.size > end:
                        raise tarfile.ReadError("unexpected end of data")
                    if member.isreg():
                        members.append((member.name, Stretch(archive.path, member.offset_data, member.size)))
        except tarfile.TarError as error:
            packer = _COMPRESSED.get(magic) if archive.start == 0 else None
            reason = (
                f"it is compressed ({packer}); unpack that layer first, images inside are read in place"
                if packer
                else f"{error}; an incomplete download? It has {archive.size:,} bytes"
            )
            raise DatasetError(f"expected a whole tar archive at {archive.path}, got: {reason}") from error
    return members


def first_member(path: Path) -> str | None:
    """Return the name of an archive's first file, None if it has none or is not a tar archive."""
    try:
        with tarfile.open(path, "r:") as archive:
            return next((member.name for member in archive if member.isreg()), None)
    except (tarfile.TarError, OSError):
        return None


class TarredFiles(ImageFiles):
    """Stretches of a few files."""

    def __init__(self, stretches: Sequence[Stretch]) -> None:
        # A row of arrays for each image: a list of 1.28 million tuples would take hundreds of MB.
        self.paths = list(dict.fromkeys(stretch.path for stretch in stretches))
        numbers = {path: number for number, path in enumerate(self.paths)}
        rows = [(numbers[path], start, size) for path, start, size in stretches]
        self.rows = np.asarray(rows, dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.rows)

    def _stretches(self, rows: Indices) -> list[Stretch]:
        return [Stretch(self.paths[number], start, size) for number, start, size in rows.tolist()]

    def __iter__(self) -> Iterator[bytes | str]:
        path, file = None, None
        try:
            for place in hinted(self._stretches(self.rows), lambda each: will_need(*each)):
                if place.path != path or file is None:
                    if file is not None:
                        file.close()
                    path, file = place.path, place.path.open("rb", buffering=0)
                file.seek(place.start)
                data = file.read(place.size)
                yield data if len(data) == place.size else f"truncated: {len(data):,} of {place.size:,} bytes"
        except OSError as error:
            raise DatasetError(
                f"cannot read {path} any more: {error.strerror}. Run the same command again to resume."
            ) from error
        finally:
            if file is not None:
                file.close()

    def select(self, indices: Indices) -> TarredFiles:
        return TarredFiles(self._stretches(self.rows[indices]))

    def identity(self) -> bytes:
        return self.rows[:, 2].astype("<i8").tobytes()


def list_class_tars(path: Path, workers: int) -> Listing:
    """List a tar of class archives (ILSVRC2012_img_train.tar) or a folder of them; processes read their headers."""
    skipped = SkippedFiles()
    archives: dict[str, Stretch] = {}
    inside = (
        [(entry.name, whole(entry)) for entry in sorted(path.iterdir()) if entry.is_file()]
        if path.is_dir()
        else list_members(whole(path))
    )
    for name, place in inside:
        class_name = PurePosixPath(name).stem
        if not is_class_archive(PurePosixPath(name).name):
            skipped.add(name)
        elif class_name in archives:
            raise DatasetError(f"expected one archive for each class in {path}, got two of {class_name}")
        else:
            archives[class_name] = place
    if not archives:
        raise DatasetError(f"expected archives named n########.tar in {path}, one for each class, got none")
    class_names = sorted(archives)
    members = dict(run_tasks(list_members, [archives[name] for name in class_names], workers))
    images = [
        (label, f"{class_name}/{name}", place)
        for label, class_name in enumerate(class_names)
        for name, place in images_among(members[archives[class_name]], skipped, f"{class_name}/")
    ]
    if not images:
        raise DatasetError(f"expected images in the class archives of {path}, got none")
    return Listing(
        kind="class tars",
        path=str(path),
        class_names=tuple(class_names),
        names=PathTable(path, (name for _, name, _ in images)),
        labels=np.asarray([label for label, _, _ in images], dtype=np.int64),
        files=TarredFiles([place for _, _, place in images]),
        skipped=skipped.counts,
        skipped_examples=skipped.examples,
    )


def images_among(
    members: Sequence[tuple[str, Stretch]], skipped: SkippedFiles, prefix: str = ""
) -> list[tuple[str, Stretch]]:
    """Return file name and place of the images among an archive's files, sorted by file name."""
    images = []
    for path, place in members:
        name = PurePosixPath(path).name
        if is_hidden(name) or not has_image_extension(name):
            skipped.add(prefix + path)
        else:
            images.append((name, place))
    return sorted(images)
