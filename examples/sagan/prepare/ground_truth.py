"""The class of each validation image, and the human names of the classes."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sagan.data import DatasetError
from sagan.errors import UserError
from sagan.io import open_regular
from sagan.prepare.listing import WNID
from sagan.prepare.pool import run_tasks
from sagan.prepare.tars import walk

_DEVKIT_LABELS = "ILSVRC2012_validation_ground_truth.txt"
_VAL_SOLUTION = "LOC_val_solution.csv"
_FOUND_BY_NAME = (
    _DEVKIT_LABELS,
    f"data/{_DEVKIT_LABELS}",
    f"ILSVRC2012_devkit_t12/data/{_DEVKIT_LABELS}",
    "ILSVRC2012_devkit_t12.tar.gz",
    _VAL_SOLUTION,
)
_WORDS_FOUND_BY_NAME = ("LOC_synset_mapping.txt", "words.txt", "synset_words.txt")
_PACKERS: dict[bytes, Callable[[io.BytesIO], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZ": bz2.open,
    b"\xfd7": lzma.open,
}
_LARGEST = 256 * 2**20  # bytes; the largest of these files takes 2.5 MB
_SEPARATORS = re.compile(r"[\s,;]+")
_NUMBER = re.compile(r"_(\d{8})\.\w+")
_HELP = (
    "Give --ground-truth: LOC_val_solution.csv (Kaggle), a text file with the WNID of one image per line, or the "
    "development kit (its folder or .tar.gz), which holds ILSVRC2012_validation_ground_truth.txt and meta.mat."
)


@dataclass(frozen=True)
class GroundTruth:
    """The classes (WNIDs) of a set of images without class folders, by number or by name, and what the source adds."""

    path: Path
    by_number: Sequence[str] = ()  # of image 1, 2, ... in the order of the file names
    by_name: Mapping[str, str] = field(default_factory=dict)  # by file name without extension
    words: Mapping[str, str] = field(default_factory=dict)  # human names by WNID
    classes: Sequence[str] = ()  # all that the source lists: there may be some without an image here

    @cached_property
    def wnids(self) -> list[str]:
        """All classes in the order of their labels."""
        return sorted({*self.classes, *self.by_number, *self.by_name.values()})

    def of(self, names: Sequence[str], source: str) -> list[str]:
        """Return the WNID of each of the files, whose names are sorted; raise DatasetError if one is not known."""
        if self.by_name:
            missing = [name for name in names if name.rpartition(".")[0] not in self.by_name]
            if missing:
                raise DatasetError(
                    f"{self.path} does not name {len(missing):,} of {len(names):,} images of {source}, "
                    f"such as {missing[0]}"
                )
            return [self.by_name[name.rpartition(".")[0]] for name in names]
        matches = [_NUMBER.search(name) for name in names]
        numbers = [int(match[1]) for match in matches if match]
        if len(numbers) < len(names):
            numbers = list(range(1, len(names) + 1))
            if len(names) != len(self.by_number):
                raise DatasetError(
                    f"{self.path} has {len(self.by_number):,} lines for {len(names):,} images of {source}, whose "
                    "names do not end in their number (as ILSVRC2012_val_00000001.JPEG does): the lines cannot be "
                    "matched to images"
                )
        if numbers and (min(numbers) < 1 or max(numbers) > len(self.by_number)):
            raise DatasetError(
                f"{self.path} has {len(self.by_number):,} lines, the images of {source} are numbered "
                f"{min(numbers)} to {max(numbers)}"
            )
        return [self.by_number[number - 1] for number in numbers]


def find_beside(start: Path, names: Sequence[str]) -> Path | None:
    """Return the first of some files in a folder or up to four folders above it."""
    folder = start.absolute() if start.is_dir() else start.absolute().parent
    for place in (folder, *list(folder.parents)[:4]):
        for name in names:
            if (place / name).is_file():
                return place / name
    return None


def read_ground_truth(path: Path | None, synsets: Path | None, source: Path) -> tuple[GroundTruth, str]:
    """Return the ground truth and a remark on where it was found; raise DatasetError if there is no usable one.

    Args:
        path: what the user named; None looks beside the source.
        synsets: what the user named for the kit's numbers: meta.mat, or a text file with one WNID per line.
        source: the images.
    """
    found = path or find_beside(source, _FOUND_BY_NAME)
    if found is None:
        raise DatasetError(
            f"the images in {source} have no class folders, and there is no ground truth beside them: their classes "
            f"cannot be known. {_HELP}"
        )
    if not found.exists():
        raise DatasetError(f"expected the ground truth at {found}, found nothing. {_HELP}")
    remark = f"classes from {found}"
    if found.is_dir():
        inside = sorted(found.rglob(_DEVKIT_LABELS))
        if not inside:
            raise DatasetError(f"expected {_DEVKIT_LABELS} in the folder {found}, found none. {_HELP}")
        found = inside[0]
    meta: bytes | None = None
    if found.name.endswith((".tar.gz", ".tgz", ".tar")):
        text, meta = _from_archive(found)
    else:
        text = _text(_read(found))
        beside = found.with_name("meta.mat")
        meta = _read(beside) if beside.is_file() else None
    if found.suffix == ".csv" and "ImageId" in text.partition("\n")[0]:
        return _val_solution(text, found), remark
    lines = _fields(text)
    if lines and all(len(line) == 1 and line[0].isdecimal() for line in lines):
        return _devkit([int(line[0]) for line in lines], synsets, meta, found), remark
    if lines and all(len(line) == 1 and WNID.fullmatch(line[0]) for line in lines):
        return GroundTruth(found, by_number=[line[0] for line in lines]), remark
    if lines and all(len(line) == 2 and WNID.fullmatch(line[1]) for line in lines):
        return _by_name([(name, wnid) for name, wnid in lines], found), remark
    raise DatasetError(
        f"cannot read the ground truth in {found}: expected a number or a WNID (n01440764) per line, or an image and "
        f"its WNID, got {' '.join(lines[0])[:80] if lines else 'an empty file'!r}. {_HELP}"
    )


def _from_archive(path: Path) -> tuple[str, bytes | None]:
    found: dict[str, bytes] = {}
    data = _read(path)
    packer = next((packer for magic, packer in _PACKERS.items() if data.startswith(magic)), None)
    try:
        if packer is not None:
            with packer(io.BytesIO(data)) as file:
                data = file.read(_LARGEST)  # to its end, where its checksum is
        for member in walk(io.BytesIO(data), 0, len(data)):
            name = member.name.rpartition("/")[2]
            if name in (_DEVKIT_LABELS, "meta.mat") and member.isreg():
                found[name] = data[member.offset_data : member.offset_data + member.size]
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DatasetError(f"cannot read the development kit {path}: {error}") from error
    if _DEVKIT_LABELS not in found:
        raise DatasetError(f"expected {_DEVKIT_LABELS} in {path}, found none. {_HELP}")
    return _text(found[_DEVKIT_LABELS]), found.get("meta.mat")


def _read(path: Path) -> bytes:
    with open_regular(path) as file:
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise DatasetError(f"expected a file of classes of at most {_LARGEST:,} bytes, got more in {path}")
    return data


def _text(data: bytes) -> str:
    """Decode a text file as editors, shells and spreadsheets save it."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace")
    if data[:2].count(0) == 1:  # UTF-16 without a mark
        return data.decode("utf-16-be" if data[0] == 0 else "utf-16-le", "replace")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _fields(text: str) -> list[list[str]]:
    """Return the fields of each line that has any; blanks, commas and semicolons separate, quotes do not count."""
    split = (_SEPARATORS.split(line) for line in text.splitlines())
    lines = [[field for each in line if (field := each.strip("\"'\ufeff"))] for line in split]
    return [line for line in lines if line]


def _val_solution(text: str, path: Path) -> GroundTruth:
    pairs = []
    lines = text.splitlines()
    separator = next((each for each in ";\t" if each in lines[0]), ",")
    try:
        rows = list(csv.DictReader(lines, delimiter=separator))
    except csv.Error as error:
        raise DatasetError(f"cannot read {path}: {error}") from error
    for row in rows:
        wnid = ((row.get("PredictionString") or "").split() or [""])[0]
        if not WNID.fullmatch(wnid) or not row.get("ImageId"):
            found = str(list(row.values()))[:80]
            raise DatasetError(f"{path}: expected the columns ImageId and PredictionString, got {found}")
        pairs.append((row["ImageId"], wnid))
    if not pairs:
        raise DatasetError(f"{path} holds no row. {_HELP}")
    return _by_name(pairs, path)


def _by_name(pairs: Sequence[tuple[str, str]], path: Path) -> GroundTruth:
    by_name: dict[str, str] = {}
    for name, wnid in pairs:
        if by_name.setdefault(_stem(name), wnid) != wnid:
            raise DatasetError(
                f"{path}: expected one class for {name}, got {by_name[_stem(name)]} and {wnid}"
            )
    return GroundTruth(path, by_name=by_name)


def _stem(name: str) -> str:
    name = name.rpartition("/")[2]
    return name[: -len(".JPEG")] if name.lower().endswith(".jpeg") else name.removesuffix(".jpg")


def _devkit(numbers: Sequence[int], synsets: Path | None, meta: bytes | None, path: Path) -> GroundTruth:
    """Turn the kit's numbers, which are not in the sorted order of the WNIDs, into WNIDs."""
    words: dict[str, str] = {}
    if synsets is not None and synsets.suffix == ".mat":
        meta = _read(synsets)
    if synsets is not None and synsets.suffix != ".mat":
        wnids = _synset_lines(synsets)
    elif meta is not None:
        wnids, words = _meta_mat(meta)
    else:
        raise DatasetError(
            f"{path} holds the development kit's numbers, from 1. They are not in the order of the WNIDs, so without "
            "meta.mat (which is beside it in the kit) the classes cannot be known. Give --synsets: that meta.mat, "
            f"or a text file with the WNID of each number in a line. Or {_HELP[0].lower()}{_HELP[1:]}"
        )
    if min(numbers) < 1 or max(numbers) > len(wnids):
        raise DatasetError(
            f"{path}: the numbers go from {min(numbers)} to {max(numbers)}, the synsets from 1 to {len(wnids)}"
        )
    return GroundTruth(path, by_number=[wnids[n - 1] for n in numbers], words=words, classes=wnids)


def _synset_lines(path: Path) -> list[str]:
    wnids = [line[0] for line in _fields(_text(_read(path)))]
    if not wnids or not all(map(WNID.fullmatch, wnids)):
        raise DatasetError(
            f"expected a line for each class in {path} that begins with its WNID, such as n01440764"
        )
    if len(wnids) > 1 and wnids == sorted(wnids):
        raise DatasetError(
            f"the WNIDs in {path} are sorted. The development kit's numbers are in another order, so this list does "
            "not tell what they mean; give its meta.mat to --synsets"
        )
    return wnids


def _meta_mat(data: bytes) -> tuple[list[str], dict[str, str]]:
    """Return the WNIDs by number from 1, and the words by WNID."""
    try:
        # In another process: some damage makes scipy's reader crash.
        ((_, (wnids, words)),) = run_tasks(_synsets, [data], 2)
    except UserError as error:
        raise DatasetError("cannot read the synsets in meta.mat: its damage ends the reader") from error
    except Exception as error:  # arbitrary bytes
        raise DatasetError(f"cannot read the synsets in meta.mat: {type(error).__name__}: {error}") from error
    if len(words) < len(wnids) or not all(map(WNID.fullmatch, wnids)):
        raise DatasetError(
            "cannot read the synsets in meta.mat: expected a WNID for each class, all different"
        )
    return wnids, words


def _synsets(data: bytes) -> tuple[list[str], dict[str, str]]:
    from scipy.io import loadmat

    rows = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
    leaves = {int(row["ILSVRC2012_ID"]): row for row in rows if int(row["num_children"]) == 0}
    wnids = [str(leaves[number]["WNID"]) for number in range(1, len(leaves) + 1)]
    return wnids, {str(row["WNID"]): str(row["words"]) for row in leaves.values()}


def read_words(path: Path | None, class_names: Sequence[str], source: Path) -> dict[str, str]:
    """Return human names by WNID from LOC_synset_mapping.txt, words.txt or the like.

    ``path`` is what the user named, which must have every class; None looks beside the source.
    """
    found = path or find_beside(source, _WORDS_FOUND_BY_NAME)
    if found is None:
        return {}
    if not found.is_file():
        raise DatasetError(
            f"expected a text file with a WNID and its words per line at {found}, found nothing"
        )
    words = {}
    for line in _text(_read(found)).splitlines():
        wnid, _, text = line.strip("\ufeff \r").replace("\t", " ", 1).partition(" ")
        if text:
            words[wnid] = text.strip()
    missing = [name for name in class_names if name not in words]
    if not missing:
        return {name: words[name] for name in class_names}
    if path is None:
        return {}
    raise DatasetError(
        f"{found} has no words for {len(missing):,} of {len(class_names):,} classes, such as {missing[0]}"
    )
