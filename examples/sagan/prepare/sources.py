"""Recognises the kind of a source and lists its images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from sagan.contents import found_at, holds_prepared_set, holds_run
from sagan.data import DatasetError, PathTable
from sagan.data.layout import (
    UNREAD_IMAGE_EXTENSIONS,
    has_image_extension,
    is_class_archive,
    is_folder,
    is_hidden,
    is_special,
    list_folder,
)
from sagan.data.tree import NOT_REGULAR, SkippedFiles
from sagan.prepare import tars
from sagan.prepare.folders import Files, list_class_folders
from sagan.prepare.ground_truth import read_ground_truth, read_words
from sagan.prepare.listing import WNID, Listing, sorted_by_class_and_name
from sagan.prepare.parquet import find_shards, list_parquet

Kind = Literal["auto", "class-tars", "flat", "folder", "parquet"]
# Images of each part of ILSVRC2012, and how many its smallest and its largest class have.
_ILSVRC_COUNTS = {"train": (1_281_167, 732, 1300), "val": (50_000, 50, 50)}


@dataclass(frozen=True)
class SourceOptions:
    """How to read a source.

    Attributes:
        kind: kind of source: auto, class-tars, flat, folder or parquet.
        split: the split to pack, if the source has several.
        ground_truth: classes of images without class folders: LOC_val_solution.csv, a text file with one WNID per line,
            or ILSVRC's development kit (folder or .tar.gz); by default searched next to the source.
        synsets: meaning of the development kit's numbers, if meta.mat is not next to them.
        words: human-readable class names such as LOC_synset_mapping.txt; by default searched next to the source.
    """

    kind: Kind = "auto"
    split: str = "train"
    ground_truth: Path | None = None
    synsets: Path | None = None
    words: Path | None = None


def list_source(source: str, options: SourceOptions, *, workers: int = 1) -> Listing:
    """List the images of a file, a folder or a glob of parquet files; ``workers`` processes list archives.

    Raises:
        DatasetError: it is of no known kind, or damaged; the message says what was found.
    """
    path = Path(source).expanduser()
    if not path.exists():
        matches = _matching(path)
        if not matches:
            raise DatasetError(
                f"source: nothing is at {source}; check the spelling, and that the disk is mounted"
            )
        if options.kind not in ("auto", "parquet") or any(match.suffix != ".parquet" for match in matches):
            raise DatasetError(f"source: expected a pattern to match parquet files only, got {matches[0]}")
        return _with_warnings(_with_words(list_parquet(matches, source), path, options))
    if holds_prepared_set(path) or holds_run(path):
        raise DatasetError(f"source: expected images to pack, got {found_at(path)}")
    path = _archive_in(path, options)
    kind = _recognise(path, options.split) if options.kind == "auto" else options.kind
    if kind == "class-tars":
        inner = path / options.split
        listing = tars.list_class_tars(inner if _class_archives(inner) else path, workers)
    elif kind == "flat":
        listing = _list_flat(path, options)
    elif kind == "parquet":
        files = [path] if path.is_file() else find_shards(path, options.split)
        listing = list_parquet(files, source)
    else:
        listing = list_class_folders(path, options.split)
    return _with_warnings(_with_words(listing, path, options))


def _matching(pattern: Path) -> list[Path]:
    """Return the files that a pattern matches, sorted, without hidden ones; ``**`` follows no link, which may loop."""
    try:
        found = [*Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor)))]
    except (ValueError, OSError) as error:
        raise DatasetError(f"source: {pattern} is no pattern of files: {error}") from error
    return sorted({match for match in found if not is_hidden(match.name)})


def _archive_in(path: Path, options: SourceOptions) -> Path:
    """Return ILSVRC's archive of the split if a folder holds it as it was downloaded, else the path."""
    split = "val" if options.split.startswith("val") else options.split
    archive = path / f"ILSVRC2012_img_{split}.tar"
    has_tree = (path / options.split).is_dir() or options.kind in ("folder", "parquet")
    return archive if archive.is_file() and not has_tree else path


def _recognise(path: Path, split: str) -> Kind:
    if path.is_file():
        return _recognise_file(path)
    if _class_archives(path) or _class_archives(path / split):
        return "class-tars"
    if any(any(path.glob(pattern)) for pattern in ("*.parquet", "data/*.parquet", f"{split}/*.parquet")):
        return "parquet"
    base = path / split if (path / split).is_dir() else path
    entries = [entry for entry in list_folder(base) if not is_hidden(entry.name)]
    is_val = any(entry.name.startswith("ILSVRC2012_val_") for entry in entries)
    return "flat" if is_val and not any(map(is_folder, entries)) else "folder"


def _recognise_file(path: Path) -> Kind:
    if path.suffix == ".parquet":
        return "parquet"
    first = tars.first_member(path)
    if first is not None and is_class_archive(PurePosixPath(first).name):
        return "class-tars"
    if first is not None and has_image_extension(first):
        if first.removeprefix("./").count("/") == 0:
            return "flat"
        raise DatasetError(
            f"{path} holds folders of images (such as {first}); unpack it and give the folder, or name --kind flat "
            "if the folders are no classes"
        )
    tars.list_members(tars.whole(path))  # raises if the archive is damaged
    raise DatasetError(
        f"cannot tell what {path} is: expected ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, a parquet file "
        f"or a folder; its first file is {first}"
    )


def _class_archives(folder: Path) -> bool:
    """Return whether a folder holds class archives and no class folders."""
    if not folder.is_dir():
        return False
    entries = [entry for entry in list_folder(folder) if not is_hidden(entry.name)]
    return any(is_class_archive(entry.name) for entry in entries) and not any(map(is_folder, entries))


def _list_flat(path: Path, options: SourceOptions) -> Listing:
    skipped = SkippedFiles()
    images: list[tuple[str, tars.Stretch]] = []
    if path.is_file():
        images = tars.images_among(tars.list_members(tars.whole(path)), skipped)
        names = [name for name, _ in images]
    else:
        path = path / options.split if (path / options.split).is_dir() else path
        names = []
        for entry in list_folder(path):
            if is_special(entry):
                skipped.add(entry.name, NOT_REGULAR)
            elif has_image_extension(entry.name) and not is_hidden(entry.name) and not is_folder(entry):
                names.append(entry.name)
            elif not is_folder(entry):
                skipped.add(entry.name)
    if not names:
        raise DatasetError(f"expected images directly in {path}, got none")
    truth, remark = read_ground_truth(options.ground_truth, options.synsets, path)
    wnids = truth.of(names, str(path))
    label_of = {wnid: label for label, wnid in enumerate(truth.wnids)}
    labels = [label_of[wnid] for wnid in wnids]
    order = sorted_by_class_and_name(labels, names)
    stretches = [images[index][1] for index in order] if images else []
    known = len(truth.by_name or truth.by_number)
    warnings = [f"the ground truth has the classes of {known:,} images, the source holds {len(names):,}"]
    return Listing(
        kind="flat images",
        path=str(path),
        class_names=tuple(truth.wnids),
        class_words=tuple(truth.words[wnid] for wnid in truth.wnids) if truth.words else None,
        names=PathTable(path, (f"{wnids[index]}/{names[index]}" for index in order)),
        labels=np.asarray([labels[index] for index in order], dtype=np.int64),
        files=tars.TarredFiles(stretches) if stretches else Files(PathTable(path, [names[i] for i in order])),
        skipped=skipped.counts,
        skipped_examples=skipped.examples,
        remarks=[remark],
        warnings=warnings if known != len(names) else [],
    )


def _with_words(listing: Listing, path: Path, options: SourceOptions) -> Listing:
    if listing.class_words is not None and options.words is None:
        return listing
    words = read_words(options.words, listing.class_names, path)
    return replace(listing, class_words=tuple(words.values())) if words else listing


def _with_warnings(listing: Listing) -> Listing:
    """Compare a set of WordNet classes with ILSVRC2012, and name images of formats that are not read."""
    remarks, warnings = [*listing.remarks], [*listing.warnings]
    if all(map(WNID.fullmatch, listing.class_names)):
        classes, images = len(listing.class_names), len(listing)
        counts = np.bincount(listing.labels, minlength=classes)
        found = (images, int(counts.min()), int(counts.max()))
        split = next((split for split, expected in _ILSVRC_COUNTS.items() if found == expected), None)
        if classes == 1000 and split:
            remarks.append(f"as many as ILSVRC2012 {split} has, in all and in the smallest and largest class")
        else:
            known = " or ".join(f"{each:,} ({split})" for split, (each, *_) in _ILSVRC_COUNTS.items())
            warnings.append(
                f"NOT ALL OF ImageNet: ILSVRC2012 has 1,000 classes and {known} images, got {classes:,} "
                f"classes and {images:,} images, from {found[1]:,} to {found[2]:,} in a class"
            )
    unread = {kind: count for kind, count in listing.skipped.items() if kind in UNREAD_IMAGE_EXTENSIONS}
    if unread:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(unread.items()))
        warnings.append(
            f"images of formats that are not read, left out: {kinds}. Convert them to PNG or JPEG"
        )
    return replace(listing, remarks=remarks, warnings=warnings)
