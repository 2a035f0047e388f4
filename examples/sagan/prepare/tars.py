"""Images inside uncompressed tar archives, read in place; nothing is unpacked."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, cast

import numpy as np

from sagan.data import DatasetError, PathTable, layout
from sagan.data.tree import NOT_REGULAR, SkippedFiles
from sagan.errors import listed
from sagan.io import open_regular
from sagan.prepare.listing import ImageFiles, Indices, Listing, hinted, is_cut_jpeg, too_large, will_need
from sagan.prepare.pool import run_tasks

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd", b"PK": "zip"}
_BLOCK = 512
# What writers put behind the last file: two blocks of zeros, filled up to a record of 20 blocks.
_RECORD = 20 * _BLOCK
_MOST_ZEROS = _RECORD + 2 * _BLOCK
_LONGEST_HEADER = 2**20  # bytes; the names of very long paths are a few thousand


class Stretch(NamedTuple):
    """Consecutive bytes of a file: an archive inside another, or one image."""

    path: Path
    start: int
    size: int


def whole(path: Path) -> Stretch:
    """Return all bytes of a file."""
    return Stretch(path, 0, path.stat().st_size)


class _Window:
    """Some bytes of a file, as a file for `tarfile`: a damaged archive does not run on into the next one."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self.file, self.start, self.size, self.place = file, start, size, 0

    def tell(self) -> int:
        return self.place

    def seek(self, place: int) -> None:
        self.place = place

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        if not 0 <= self.place < self.size:
            return b""
        self.file.seek(self.start + self.place)
        data = self.file.read(min(size, self.size - self.place))
        self.place += len(data)
        return data


def walk(file: BinaryIO, start: int, size: int) -> Iterator[tarfile.TarInfo]:
    """Yield an archive's members, their places counted from ``start``; raise `tarfile.TarError` unless it is whole.

    `tarfile` alone takes a header that is damaged, cut or overwritten with zeros for the archive's end.
    """
    window = _Window(file, start, size)
    try:
        with tarfile.TarFile(fileobj=cast(BinaryIO, window)) as tar:
            for member in tar:
                if member.size < 0:
                    raise tarfile.ReadError(f"a file of {member.size:,} bytes")
                yield member
            end = tar.offset
    except (ValueError, OverflowError, RecursionError) as error:  # of a damaged header
        raise tarfile.ReadError(f"{type(error).__name__}: {error}") from error
    window.seek(end)
    rest = window.read(_MOST_ZEROS + 1)
    if len(rest) < _BLOCK:
        raise tarfile.ReadError(f"it ends at byte {size:,} without the two empty blocks that end an archive")
    if rest[:_BLOCK].strip(b"\0"):
        raise tarfile.ReadError(f"no file's header at byte {end:,}, and {size - end:,} bytes behind it")
    if len(rest) > _MOST_ZEROS or rest.strip(b"\0"):
        raise tarfile.ReadError(f"zeros where a file's header should be, at byte {end:,} of {size:,}")


def list_members(archive: Stretch) -> list[tuple[str, Stretch | None]]:
    """Return the names and places of an archive's files, without place if not regular; folders are left out.

    Raises:
        DatasetError: the archive is damaged, incomplete or compressed.
    """
    members: list[tuple[str, Stretch | None]] = []
    with open_regular(archive.path) as file:
        magic = file.read(2)
        try:
            for member in walk(file, *archive[1:]):
                if member.isreg() and not member.issparse():
                    place = Stretch(archive.path, archive.start + member.offset_data, member.size)
                    members.append((member.name, place))
                elif not member.isdir():
                    members.append((member.name, None))
            # Zeros from inside the last file on may have been more files, if no more than _MOST_ZEROS.
            if members and (last := members[-1][1]) and last.size > _BLOCK and not too_large(last.size):
                file.seek(last.start + last.size - 2)
                if file.read(2) == bytes(2):
                    file.seek(last.start)
                    if is_cut_jpeg(file.read(last.size), zeros=2):
                        raise tarfile.ReadError(f"zeros from inside {members[-1][0]} on")
        except tarfile.TarError as error:
            packer = _COMPRESSED.get(magic) if archive.start == 0 else None
            reason = (
                f"it is compressed ({packer}); unpack that layer first, images inside are read in place"
                if packer
                else f"{error}; an incomplete download? It has {archive.size:,} bytes"
            )
            inside = f" (the archive inside it at byte {archive.start:,})" if archive.start else ""
            raise DatasetError(
                f"expected a whole tar archive at {archive.path}{inside}, got: {reason}"
            ) from error
    return members


def first_member(path: Path) -> str | None:
    """Return the name of an archive's first file, the system's own aside; None if there is none or no archive."""
    try:
        with open_regular(path) as file:
            members = (member.name for member in walk(file, *whole(path)[1:]) if member.isreg())
            return next((name for name in members if not layout.is_hidden(name)), None)
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
                if reason := too_large(place.size):
                    yield reason
                    continue
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
    inside: list[tuple[str, Stretch | None]]
    if path.is_dir():
        entries = [entry for entry in layout.list_folder(path) if not layout.is_folder(entry)]
        inside = [
            (entry.name, None if layout.is_special(entry) else whole(Path(entry.path))) for entry in entries
        ]
    else:
        inside = list_members(whole(path))
    for name, place in inside:
        class_name = PurePosixPath(name).stem
        if place is None:
            skipped.add(name, NOT_REGULAR)
        elif layout.is_hidden(name) or not layout.is_class_archive(PurePosixPath(name).name):
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
    empty = [name for name in class_names if not members[archives[name]]]
    long = [name for name in class_names if _ends_in_more_zeros(archives[name], members[archives[name]])]
    found = ((empty, "hold no file"), (long, "end in more zeros than tar writes, so files may be lost there"))
    return Listing(
        kind="class tars",
        path=str(path),
        class_names=tuple(class_names),
        names=PathTable(path, (name for _, name, _ in images)),
        labels=np.asarray([label for label, _, _ in images], dtype=np.int64),
        files=TarredFiles([place for _, _, place in images]),
        skipped=skipped.counts,
        skipped_examples=skipped.examples,
        warnings=[f"{len(names):,} class archives {what}: {listed(names)}" for names, what in found if names],
    )


def _ends_in_more_zeros(archive: Stretch, members: Sequence[tuple[str, Stretch | None]]) -> bool:
    """Whether more zeros follow the last file than the two blocks, filled up to a record, that end an archive."""
    last = members[-1][1] if members else None
    if last is None:
        return False
    end = last.start + last.size - archive.start
    least = -(-end // _BLOCK) * _BLOCK + 2 * _BLOCK
    return archive.size > -(-least // _RECORD) * _RECORD


def images_among(
    members: Sequence[tuple[str, Stretch | None]], skipped: SkippedFiles, prefix: str = ""
) -> list[tuple[str, Stretch]]:
    """Return file name and place of the images among an archive's files, sorted by file name."""
    images = []
    for path, place in members:
        if place is None:
            skipped.add(prefix + path, NOT_REGULAR)
        elif layout.is_hidden(path) or not layout.has_image_extension(path):
            skipped.add(prefix + path)
        else:
            images.append((PurePosixPath(path).name, place))
    return sorted(images)
