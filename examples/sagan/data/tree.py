"""Lists the images of a folder with one subfolder for each class; counts every other file, opens none."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import overload

import numpy as np
import numpy.typing as npt

from sagan.data import layout

_OUTSIDE_CLASSES = "image outside a class folder"
_LINK_LOOP = "link to a folder that contains it"
_LINKED_AGAIN = "link to a folder that another link leads to"
_LINKS_IN_LINKS = "link behind many links"
_MOST_LINKS = 8  # on the way to a file; systems follow 40
NOT_REGULAR = "not a regular file"


class SkippedFiles:
    """Counts files that are not images by kind, and keeps the names of the first 20."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: list[str] = []

    def add(self, path: str, kind: str | None = None) -> None:
        """Count a file; its kind is what `layout.hidden_kind` says, its extension in lower case, or "no extension"."""
        kind = kind or layout.hidden_kind(path) or PurePosixPath(path).suffix.lower() or "no extension"
        self.counts[kind] += 1
        if len(self.examples) < 20:
            self.examples.append(path)


class PathTable(Sequence[Path]):
    """Paths below one root in one block of bytes.

    A list of 1.28 million `Path` objects takes about 400 MB, and each DataLoader worker copies it page by page as
    reference counts change; this takes about 50 MB and is never copied.
    """

    def __init__(self, root: Path, relative: Iterable[str]) -> None:
        """Store `relative`, paths below `root` with forward slashes."""
        encoded = [os.fsencode(name) for name in relative]
        self.root = root
        self._blob = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def relative(self, index: int) -> str:
        """Return the path of `index` below the root, with forward slashes."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"expected an index below {len(self)}, got {index}")
        index %= len(self)
        return os.fsdecode(self._blob[self._ends[index] : self._ends[index + 1]])

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> PathTable: ...
    def __getitem__(self, index: int | slice) -> Path | PathTable:
        if isinstance(index, slice):
            return PathTable(self.root, (self.relative(i) for i in range(*index.indices(len(self)))))
        return self.root / self.relative(index)


def names_digest(class_names: Sequence[str], paths: PathTable) -> hashlib._Hash:
    """Return a running SHA-256 of class names and relative paths."""
    digest = hashlib.sha256()
    for name in (*class_names, "", *map(paths.relative, range(len(paths)))):
        digest.update(os.fsencode(name) + b"\0")
    return digest


@dataclass(frozen=True, eq=False)
class ImageTree:
    """The images of one folder, with their labels.

    A class's label is its place in `class_names`. A class folder without images keeps its place, so that it cannot
    shift the labels of the others. `skipped` counts files that are not images by extension (lower case), or as
    `"no extension"`, `"hidden"` (also in a hidden folder), `"image outside a class folder"` or `"link to a folder
    that contains it"` and the like, or as what a system made it for (`"@eaDir"`).
    """

    root: Path  # the folder that holds the class folders
    split: str  # the part of the data set that it is, "all" if the data set has no parts
    class_names: tuple[str, ...]  # folder names in sorted order
    paths: PathTable  # every file with an image extension, sorted by class, then by path
    labels: npt.NDArray[np.int64]  # [number of images], non-decreasing
    skipped: Mapping[str, int]
    skipped_examples: tuple[str, ...]  # up to 20 of them, below `root`

    @property
    def num_classes(self) -> int:
        """Number of class folders, those without images included."""
        return len(self.class_names)

    @property
    def num_files(self) -> int:
        """Number of files below `root`: images and skipped files."""
        return len(self.paths) + sum(self.skipped.values())

    def images_per_class(self) -> npt.NDArray[np.int64]:
        """Return the number of images of each class, int64 [num_classes]."""
        return np.bincount(self.labels, minlength=self.num_classes).astype(np.int64)

    def without(self, excluded: Iterable[Path]) -> ImageTree:
        """Return this tree without some of its `paths`; classes and labels stay as they are.

        Raises:
            ValueError: a path is not in the tree.
        """
        unwanted = {path.relative_to(self.root).as_posix() for path in excluded}
        if not unwanted:
            return self
        names = [self.paths.relative(index) for index in range(len(self.paths))]
        strangers = unwanted.difference(names)
        if strangers:
            raise ValueError(f"expected images of the tree at {self.root}, got {min(strangers)}")
        rest = [index for index, name in enumerate(names) if name not in unwanted]
        paths = PathTable(self.root, (names[index] for index in rest))
        return replace(self, paths=paths, labels=self.labels[rest])

    def fingerprint(self) -> str:
        """Return 64 hex digits that change when a class or an image is added, removed or renamed; no file is read."""
        return names_digest(self.class_names, self.paths).hexdigest()


def scan_image_tree(root: Path | str, *, split: str = "train") -> ImageTree:
    """List the images of a folder that holds one folder for each class.

    Reads `root/<split>/<class>/*.JPEG` or `root/<class>/*.JPEG`, also deeper inside a class folder. Follows links.
    Extensions count in any case; see `IMAGE_EXTENSIONS`.

    Raises:
        DatasetError: the folder has another layout; the message says what was found and the likely fix.
    """
    base = layout.find_base(Path(root).expanduser(), split)
    scan = _Scan()
    class_names: list[str] = []
    names: list[str] = []
    labels: list[int] = []
    for entry in layout.list_folder(base):
        if layout.is_folder(entry) and not layout.is_hidden(entry.name):
            if entry.is_symlink() and base.resolve().is_relative_to(Path(entry.path).resolve()):
                scan.skipped.add(entry.name, _LINK_LOOP)
                continue
            images = scan.images_below(entry)
            labels.extend([len(class_names)] * len(images))
            class_names.append(entry.name)
            names.extend(images)
        else:
            scan.skip(entry, entry.name, _OUTSIDE_CLASSES)
    skipped = scan.skipped
    layout.check_classes(base, class_names, names, skipped.counts)
    return ImageTree(
        root=base,
        split=split if base.name == split else "all",
        class_names=tuple(class_names),
        paths=PathTable(base, names),
        labels=np.asarray(labels, dtype=np.int64),
        skipped=dict(sorted(skipped.counts.items())),
        skipped_examples=tuple(skipped.examples),
    )


class _Scan:
    """Lists folders, counts what is not an image, and enters the target of each link once: links can multiply."""

    def __init__(self) -> None:
        self.skipped = SkippedFiles()
        self._entered: set[Path] = set()

    def images_below(self, folder: os.DirEntry[str]) -> list[str]:
        """Return the images in and below a folder of the base, sorted, as paths below the base."""
        images: list[str] = []
        waiting = _inside(folder.path, folder.name, ())
        while waiting:
            entry, name, crossed = waiting.pop()
            hidden = layout.is_hidden(entry.name)
            if not hidden and layout.is_folder(entry):
                if not entry.is_symlink():
                    waiting.extend(_inside(entry.path, name, crossed))
                    continue
                crossed = (*crossed, Path(entry.path).parent.resolve())
                target = Path(entry.path).resolve()
                if kind := self._reason_to_skip(target, crossed):
                    self.skipped.add(name, kind)
                else:
                    self._entered.add(target)
                    waiting.extend(_inside(str(target), name, crossed))
            elif hidden or not layout.has_image_extension(entry.name) or layout.is_special(entry):
                self.skip(entry, name)
            else:
                images.append(name)
        return images

    def _reason_to_skip(self, target: Path, crossed: Sequence[Path]) -> str | None:
        if any(place.is_relative_to(target) for place in crossed):
            return _LINK_LOOP
        if target in self._entered:
            return _LINKED_AGAIN
        return _LINKS_IN_LINKS if len(crossed) > _MOST_LINKS else None

    def skip(self, entry: os.DirEntry[str], name: str, kind: str | None = None) -> None:
        """Count a file, or every file of a hidden folder; ``kind`` is that of an image."""
        if layout.is_special(entry):
            self.skipped.add(name, NOT_REGULAR)
        elif not entry.is_dir(follow_symlinks=False):
            hidden = layout.is_hidden(name) or not layout.has_image_extension(name)
            self.skipped.add(name, None if hidden else kind)
        else:
            for folder, _, files in os.walk(entry.path):
                for each in files:
                    self.skipped.add(f"{name}/{(Path(folder) / each).relative_to(entry.path).as_posix()}")


def _inside(
    folder: str, name: str, crossed: tuple[Path, ...]
) -> list[tuple[os.DirEntry[str], str, tuple[Path, ...]]]:
    """Return what is in a folder, the last first: entry, path below the base, where the links on its way lie."""
    # Entries of os.scandir, unlike paths, know files from folders without a stat call for each.
    return [(entry, f"{name}/{entry.name}", crossed) for entry in reversed(layout.list_folder(Path(folder)))]
