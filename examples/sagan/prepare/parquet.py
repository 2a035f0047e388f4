"""Images in the parquet shards of a Hugging Face data set."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from sagan.data import DatasetError, PathTable
from sagan.data.layout import is_hidden
from sagan.errors import UserError
from sagan.extras import needs
from sagan.io import first_line
from sagan.names import file_names
from sagan.prepare.listing import WNID, ImageFiles, Indices, Listing, sorted_by_class_and_name, will_need

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.parquet")
_MOST_EMPTY = 1000  # classes that files may name by numbers alone without having images of half of them
_WNID_SUFFIX = re.compile(r"_(n\d{8})(\.\w+)$")


def _parquet() -> Any:
    with needs("reading parquet files", "pyarrow", "parquet"):
        import pyarrow.parquet
    return pyarrow.parquet


def _open(path: Path, *, memory_map: bool = False) -> Any:
    """Open a parquet file; pages that have a checksum are compared with it."""
    if not path.is_file():
        raise DatasetError(f"expected a regular file, got a folder, pipe or device at {path}")
    return _parquet().ParquetFile(path, memory_map=memory_map, page_checksum_verification=True)


def _unreadable(path: Path, error: Exception, part: str = "") -> UserError:
    if isinstance(error, UserError):
        return error
    return DatasetError(
        f"cannot read {part}the parquet file {path}: {type(error).__name__}: {first_line(error)}"
    )


class ParquetFiles(ImageFiles):
    """Rows of a column of a few parquet files."""

    def __init__(self, paths: Sequence[Path], column: str, rows: Indices) -> None:
        self.paths = paths
        self.column = column
        self.rows = rows  # int64 [N, 3]: number of the file, row group in it, row in that

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[bytes | str]:
        """Read row groups in their order; the rows of a group must follow each other and rise."""
        changes = np.flatnonzero(np.any(np.diff(self.rows[:, :2], axis=0), axis=1)) + 1
        for rows in np.split(self.rows, changes):
            number, group = rows[0, :2].tolist()
            yield from self._read(self.paths[number], group, set(rows[:, 2].tolist()))

    def _read(self, path: Path, group: int, wanted: set[int]) -> Iterator[bytes | str]:
        column = f"{self.column}.bytes"
        row = 0
        try:
            with _open(path, memory_map=True) as file:
                will_need(path, *_stretch(file.metadata.row_group(group), column))
                for batch in file.iter_batches(64, row_groups=[group], columns=[column], use_threads=False):
                    for data in batch.column(0).field("bytes"):
                        if row in wanted:
                            found = data.as_py()
                            yield "no bytes in the parquet file" if found is None else found
                        row += 1
        except Exception as error:  # pyarrow raises of almost any type; the bytes are arbitrary
            raise _unreadable(path, error, f"row group {group} of ") from error
        if row <= max(wanted):
            raise DatasetError(
                f"{path}: expected more than {max(wanted):,} rows in row group {group}, got {row:,}"
            )

    def select(self, indices: Indices) -> ParquetFiles:
        return ParquetFiles(self.paths, self.column, self.rows[indices])

    def parts(self, size: int) -> list[Indices]:
        """Return whole row groups: reading a row means decoding its group."""
        order = np.lexsort(self.rows.T[::-1])
        changes = np.flatnonzero(np.any(np.diff(self.rows[order, :2], axis=0), axis=1)) + 1
        parts: list[Indices] = []
        start = 0
        for end in [*changes.tolist(), len(order)]:
            if end - start >= size or end == len(order):
                parts.append(order[start:end])
                start = end
        return [part for part in parts if len(part)]

    def identity(self) -> bytes:
        return "\0".join(f"{path.name} {path.stat().st_size}" for path in self.paths).encode()


def _stretch(group: Any, column: str) -> tuple[int, int]:
    """Return where in the file a row group has a column, and its size in bytes."""
    for number in range(group.num_columns):
        chunk = group.column(number)
        if chunk.path_in_schema == column:
            return chunk.dictionary_page_offset or chunk.data_page_offset, chunk.total_compressed_size
    return 0, 0


def find_shards(path: Path, split: str) -> list[Path]:
    """Return the parquet files of a split in a folder or its subfolder data, sorted; all if no name has a split."""
    found = [*path.glob("*.parquet"), *path.glob("data/*.parquet"), *path.glob(f"{split}/*.parquet")]
    files = sorted(file for file in found if not is_hidden(file.name))
    synonyms = ("val", "validation", "valid") if split in ("val", "validation") else (split,)
    first_words = {file: re.split(r"[-_.]", file.name)[0] for file in files}
    chosen = [file for file in files if {first_words[file], file.parent.name} & {*synonyms}]
    others = [file for file in files if first_words[file] in ("train", "validation", "val", "test")]
    if files and not chosen and others:
        raise DatasetError(
            f"expected parquet files of the split {split!r} in {path}, got only others, such as {others[0].name}"
        )
    if missing := missing_shards(chosen or files):
        raise DatasetError(
            f"expected all shards of {path}, {len(missing):,} are missing, such as {missing[0]}. Download them, or "
            "give a pattern of the files to pack"
        )
    return chosen or files


def missing_shards(files: Sequence[Path]) -> list[str]:
    """Return the names that are missing in series such as train-00003-of-00010.parquet."""
    missing = []
    series = {(match[1], match[3]) for file in files if (match := _SHARD.fullmatch(file.name))}
    names = {file.name for file in files}
    for first, total in sorted(series):
        shards = (f"{first}-{number:0{len(total)}d}-of-{total}.parquet" for number in range(int(total)))
        missing += [name for name in shards if name not in names]
    return missing


def list_parquet(files: Sequence[Path], source: str) -> Listing:
    """List the images of parquet files, which the user named as ``source``.

    Raises:
        DatasetError: a file is damaged, a label cannot be right, or files differ in columns or classes.
    """
    if not files:
        raise DatasetError(f"expected parquet files at {source}, got none")
    names: list[str] = []
    labels: list[int] = []
    rows: list[tuple[int, int, int]] = []
    class_labels: list[str] | None = None
    columns: tuple[str, str] | None = None
    for number, path in enumerate(files):
        before = len(rows)
        try:
            with _open(path) as file:
                column, label, found = _columns(file.schema_arrow, path)
                columns, class_labels = columns or (column, label), class_labels or found
                if columns != (column, label) or (found and class_labels != found):
                    raise DatasetError(
                        f"expected the same columns and classes in {files[0]} and {path}, got others"
                    )
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, columns=[f"{column}.path", label])
                    labels += _checked(table.column(label).to_pylist(), class_labels, path)
                    for row, image in enumerate(table.column(column).to_pylist()):
                        stored = ((image and image["path"]) or "").rpartition("/")[2]
                        names.append(stored or f"{path.stem}-{group}-{row}")
                        rows.append((number, group, row))
                if file.metadata.num_rows != len(rows) - before:
                    raise DatasetError(
                        f"{path}: expected {file.metadata.num_rows:,} rows, its row groups have others"
                    )
        except Exception as error:  # pyarrow raises of almost any type; the bytes are arbitrary
            raise _unreadable(path, error) from error
    if not labels:
        raise DatasetError(f"expected images in the parquet files at {source}, got none")
    count = max(max(labels) + 1, len(class_labels or ()))
    if class_labels is None and count > (most := max(_MOST_EMPTY, 2 * len(labels))):
        raise DatasetError(
            f"{source}: expected labels below {most:,} in {len(labels):,} images of files that do not name their "
            f"classes, got {count - 1:,}"
        )
    words: tuple[str, ...] | None = None
    remarks = []
    wnids = _wnids_of(names, labels, count)
    if wnids is not None:
        class_names = tuple(sorted(wnids))
        words = tuple(class_labels[wnids.index(wnid)] for wnid in class_names) if class_labels else None
        new = {wnid: place for place, wnid in enumerate(class_names)}
        labels = [new[wnids[old]] for old in labels]
        names = [_WNID_SUFFIX.sub(r"\2", name) for name in names]
        remarks.append("WNIDs from the images' names")
    elif class_labels is not None:
        class_names = tuple(file_names(class_labels))
        if class_names != tuple(class_labels):
            words = tuple(class_labels)
            remarks.append(
                "class names that are no file names, or name two classes, are changed; words keep them"
            )
    else:
        class_names = tuple(str(number) for number in range(count))
        remarks.append("the files do not name their classes; the classes are called by their numbers")
    missing = missing_shards(files)
    order = sorted_by_class_and_name(labels, names)
    return Listing(
        kind="parquet",
        path=source,
        class_names=class_names,
        class_words=words,
        names=PathTable(Path(source), (f"{class_names[labels[index]]}/{names[index]}" for index in order)),
        labels=np.asarray(labels, dtype=np.int64)[order],
        files=ParquetFiles(files, column, np.asarray(rows, dtype=np.int64)[order]),
        remarks=remarks,
        warnings=[f"{len(missing):,} shards are left out, such as {missing[0]}"] if missing else [],
    )


def _checked(labels: list[int | None], class_labels: Sequence[str] | None, path: Path) -> list[int]:
    """Return the labels of some rows; raise DatasetError if there is none for one, or no class for it."""
    for label in labels:
        if label is None or label < 0:
            raise DatasetError(f"{path}: expected labels of 0 and above, got {label}: a test split?")
        if class_labels is not None and label >= len(class_labels):
            raise DatasetError(
                f"{path}: expected labels below {len(class_labels):,}, the number of its classes, got {label}"
            )
    return cast(list[int], labels)


def _columns(schema: Any, path: Path) -> tuple[str, str, list[str] | None]:
    """Return the names of the columns of images and labels, and the classes' names if the metadata has them."""
    try:
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = metadata.get("info", {}).get("features", {})
    except (ValueError, AttributeError):
        features = {}
    features = {name: value for name, value in features.items() if isinstance(value, dict)}
    structs = [field.name for field in schema if _is_image(field.type)]
    named = [name for name, value in features.items() if value.get("_type") == "ClassLabel"]
    integers = [field.name for field in schema if str(field.type).startswith(("int", "uint"))]
    image = "image" if "image" in structs else structs[0] if len(structs) == 1 else None
    label = next((name for name in ("label", "labels") if name in integers), None)
    if label is None:
        label = next((names[0] for names in (named, integers) if len(names) == 1), None)
    if image is None or label is None:
        raise DatasetError(
            f"{path}: expected a column image of struct<bytes, path> and a column label of integers, got "
            + ", ".join(f"{field.name}: {field.type}" for field in schema)
        )
    names = features.get(label, {}).get("names")
    return image, label, [str(name) for name in names] if isinstance(names, list) else None


def _is_image(kind: Any) -> bool:
    import pyarrow.types

    return pyarrow.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}


def _wnids_of(names: Sequence[str], labels: Sequence[int], count: int) -> list[str] | None:
    """Return the WNID of each label, if file names give one for each and no two labels share one."""
    votes: list[Counter[str]] = [Counter() for _ in range(count)]
    for name, label in zip(names, labels, strict=True):
        if match := _WNID_SUFFIX.search(name):
            votes[label][match[1]] += 1
    if not all(votes):
        return None
    wnids = [counter.most_common(1)[0][0] for counter in votes]
    return wnids if len(set(wnids)) == count and all(map(WNID.fullmatch, wnids)) else None
