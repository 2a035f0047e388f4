"""Checks that a folder holds class folders; if not, says what was found and how to fix it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from sagan.errors import UserError
from sagan.names import program_name

# Pillow's names of the formats that are read, and what their files' names end in.
# EPS is missing because it runs a program.
FORMAT_EXTENSIONS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
}
IMAGE_EXTENSIONS = tuple(extension for each in FORMAT_EXTENSIONS.values() for extension in each)
# Images all the same: a user should hear that they are left out.
UNREAD_IMAGE_EXTENSIONS = frozenset(
    (".avif", ".heic", ".heif", ".jp2", ".j2k", ".jpx", ".jxl", ".tga", ".dib", ".mpo", ".psd", ".svg", ".eps")
)  # fmt: skip

_ARCHIVE_EXTENSIONS = (".tar", ".gz", ".tgz", ".zip", ".7z", ".bz2", ".xz")
_SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "test", "testing")
# In lower case: what macOS, Windows, Synology, QNAP and Unix put among people's files. Names with a dot are hidden too.
_SYSTEM_NAMES = frozenset(
    {
        "__macosx", "lost+found", "@eadir", "@tmp", "@synoresource", "#recycle", "#snapshot", "@recycle",
        "@recently-snapshot", "$recycle.bin", "recycler", "system volume information", "network trash folder",
        "temporary items", "thumbs.db", "desktop.ini",
    }
)  # fmt: skip
_CLASS_ARCHIVE = re.compile(r"n\d{8}\.tar")

_EXPECTED = """\
    ROOT/
      train/                     (this level may be left out)
        n01440764/               one folder for each class
          n01440764_10026.JPEG   that class's images
          ...
        n01443537/
          ..."""

_UNPACK_LOOP = 'for t in n*.tar; do mkdir -p "${t%.tar}" && tar -xf "$t" -C "${t%.tar}"; done'
_UNPACK_TRAIN = (
    "unpack the archives. For ILSVRC2012_img_train.tar: "
    "mkdir -p train && tar -xf ILSVRC2012_img_train.tar -C train && cd train && " + _UNPACK_LOOP
)


class DatasetError(UserError):
    """The data set on disk cannot be used; the message says what was found, expected, and the likely fix."""


def _layout_error(path: Path, found: str, fix: str) -> DatasetError:
    return DatasetError(
        f"cannot use {path} as a folder of training images.\n"
        f"Found: {found}\nExpected:\n{_EXPECTED}\nLikely fix: {fix}"
    )


def has_image_extension(name: str) -> bool:
    """Return whether a file's name ends like an image's, in any case."""
    return name.lower().endswith(IMAGE_EXTENSIONS)


def hidden_kind(path: str) -> str | None:
    """Return "hidden" if a part of a path starts with a dot, its name if a system made it, None for other files."""
    for name in path.split("/"):
        if name.lower() in _SYSTEM_NAMES:
            return name
        if name.startswith(".") and name not in (".", ".."):
            return "hidden"
    return None


def is_hidden(path: str) -> bool:
    """Return whether a part of a path starts with a dot, or is a file or folder that an operating system made."""
    return hidden_kind(path) is not None


def is_class_archive(name: str) -> bool:
    """Return whether a file is ILSVRC's archive of one class, n########.tar."""
    return _CLASS_ARCHIVE.fullmatch(name) is not None


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one; a link that cannot be followed is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_special(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a pipe, device or socket, or a link to one: reading it may block or never end."""
    try:
        if entry.is_file() or entry.is_dir():
            return False
        entry.stat()
    except OSError:  # a link that cannot be followed
        return False
    return True


def list_folder(folder: Path) -> list[os.DirEntry[str]]:
    """Return a folder's entries sorted by name, or raise DatasetError."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DatasetError(
            f"expected to be able to list the folder {folder}, got: {error.strerror or error}. "
            "Likely fix: grant read and execute permission on it, or move it out of the data set."
        ) from error


def find_base(root: Path, split: str) -> Path:
    """Return the folder that holds the class folders, `root/split` or `root`; raise DatasetError if neither can."""
    try:
        exists, is_dir = root.exists(), root.is_dir()
    except OSError as error:
        found = f"that it may not be read ({error.strerror})."
        raise _layout_error(root, found, "check its permissions.") from error
    if not exists:
        above = next(folder for folder in root.absolute().parents if folder.is_dir())
        found = f"nothing: the path does not exist. The nearest folder above it is {above}."
        raise _layout_error(root, found, "check the spelling, and that the disk or volume is mounted.")
    if not is_dir and _is_archive(root.name):
        raise _layout_error(root, "an archive file, not a folder.", _pack_or_unpack(root))
    if not is_dir:
        raise _layout_error(root, "a file, not a folder.", "give the folder of class folders.")
    folders, _ = _split_contents(root)
    has_split = split in folders and not _is_class_among_classes(root, split, folders)
    base = root / split if has_split else root
    _check_direct_contents(base, split)
    return base


def _pack_or_unpack(path: Path) -> str:
    command = f"{program_name()} prepare --source {shlex.quote(str(path))} --out SET"
    return f"pack the images as they are, with `{command}`, and train on SET. Or {_UNPACK_TRAIN}"


def _is_class_among_classes(root: Path, split: str, folders: Sequence[str]) -> bool:
    """Return whether `root/split` is a class that happens to have this name: it and others hold images."""
    others = [name for name in folders if name.lower() not in _SPLIT_NAMES]
    return _holds_images(root / split) and any(_holds_images(root / name) for name in others)


def _check_direct_contents(base: Path, split: str) -> None:
    folders, files = _split_contents(base)
    images = [name for name in files if has_image_extension(name)]
    archives = [name for name in files if _is_archive(name)]
    if not folders and archives:
        found = f"{_count(archives, 'archive')} ({_some(archives)}) and no class folders."
        raise _layout_error(base, found, _pack_or_unpack(base))
    missing = [n for n in archives if is_class_archive(n) and n.removesuffix(".tar") not in folders]
    if folders and missing:
        raise _layout_error(
            base,
            f"{_count(folders, 'class folder')}, and {_count(missing, 'class archive')} "
            f"not unpacked yet ({_some(missing)}). Training now would number the classes wrongly.",
            f"unpack them: {_UNPACK_LOOP}",
        )
    if not folders and images:
        raise _flat_error(base, images)
    if folders and all(name.lower() in _SPLIT_NAMES for name in folders):
        nearest = next((name for name in folders if name.lower().startswith(split.lower())), folders[0])
        raise _layout_error(
            base,
            f"the folders {_some(folders)}, which are parts of a data set, not classes.",
            f"add a folder named {split}; to train on another part, give it as ROOT: {base / nearest}.",
        )
    if not folders:
        contents = f"{_count(folders, 'folder')} (none) and {_count(files, 'file')} ({_some(files)})."
        found = contents if files else "an empty folder."
        raise _layout_error(base, found, "give the folder that holds the class folders.")


def _flat_error(base: Path, images: Sequence[str]) -> DatasetError:
    found = f"{_count(images, 'image')} directly in the folder ({_some(images)}) and no class folders."
    above = base.absolute().parent
    fix = "move each image into a folder named after its class, or all into one folder to train without classes."
    if base.name.lower() in ("val", "valid", "validation", "test") or images[0].startswith("ILSVRC2012_val"):
        fix += (
            " ImageNet's validation images come flat; their classes are listed in "
            "ILSVRC2012_validation_ground_truth.txt of its development kit."
        )
    elif base.name.lower() not in _SPLIT_NAMES and _looks_like_base(above):
        fix = f"this looks like one class of many; give the folder above it, {above}."
    return _layout_error(base, found, fix)


def check_classes(
    base: Path, class_names: Sequence[str], images: Sequence[str], skipped: Mapping[str, int]
) -> None:
    """Raise DatasetError if a scan found no images, or class folders somewhere deeper.

    `images` are paths below `base`; `skipped` counts the other files.
    """
    if not images:
        kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.items()) or "no files at all"
        found = f"{_count(class_names, 'folder')} ({_some(class_names)}) without any image; files: {kinds}."
        fix = f"images must end in one of {', '.join(IMAGE_EXTENSIONS)} (any case)."
        if skipped and all(kind.startswith("link") for kind in skipped):
            fix = "let the links lead to folders of images; these lead back to where they are, and are not followed."
        raise _layout_error(base, found, _pack_or_unpack(base) if any(map(_is_archive, skipped)) else fix)
    nested = _nested_classes(images)
    if nested is not None and len(nested) > 1:
        example = next(iter(nested))
        inner = [name for names in nested.values() for name in names]
        raise _layout_error(
            base,
            f"no image directly in any of {_count(class_names, 'folder')} ({_some(class_names)}), but "
            f"{_count(inner, 'folder')} inside them that hold images "
            f"(in {example}: {_some(nested[example])}). The class folders seem to be one level too deep.",
            f"move the inner folders up into {base}, or give one of {_some(list(nested))} as ROOT. "
            "If the inner folders only sort the images of one class, move the images up instead.",
        )
    if len(class_names) == 1 and (better := _classes_below(base)):
        found = f"only one class folder, {class_names[0]}, with {_count(images, 'image')}."
        raise _layout_error(base, found, f"give {better} as ROOT.")


def _nested_classes(images: Sequence[str]) -> dict[str, list[str]] | None:
    """Return the inner folders of each class folder if they, not their parents, look like classes.

    They do if no image lies directly in a class folder, some class folder has several, and no two class
    folders share an inner name (other than train, val and the like). So `class/images/*.JPEG` and
    `class/2019/*.jpg` are accepted.
    """
    inner: dict[str, set[str]] = {}
    for path in images:
        first, second, *rest = path.split("/", 2)
        if not rest:
            return None
        inner.setdefault(first, set()).add(second)
    names = [name for seconds in inner.values() for name in seconds]
    are_splits = all(name.lower() in _SPLIT_NAMES for name in names)
    if not are_splits and (len(set(names)) < len(names) or len(names) == len(inner)):
        return None
    return {first: sorted(seconds) for first, seconds in inner.items()}


def _classes_below(base: Path) -> Path | None:
    """Return a folder below `base` which does hold class folders, if one is near."""
    level = [base]
    for _ in range(4):
        # At most 50 folders of a level: a wrong ROOT may be a whole disk.
        level = [folder / name for folder in level for name in _split_contents(folder)[0]][:50]
        for folder in level:
            if _looks_like_base(folder):
                inside_split = folder.name == "train" and folder.parent != base
                return folder.parent if inside_split else folder
    return None


def _looks_like_base(folder: Path) -> bool:
    folders, _ = _split_contents(folder)
    if len(folders) < 2 or all(name.lower() in _SPLIT_NAMES for name in folders):
        return False
    return any(_holds_images(folder / name) for name in folders[:5])


def _holds_images(folder: Path) -> bool:
    return any(has_image_extension(name) for name in _split_contents(folder)[1])


def _split_contents(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the folders and of the files directly in `folder`, without hidden ones."""
    entries = [entry for entry in list_folder(folder) if not is_hidden(entry.name)]
    return [e.name for e in entries if is_folder(e)], [e.name for e in entries if not is_folder(e)]


def _is_archive(name: str) -> bool:
    return name.lower().endswith(_ARCHIVE_EXTENSIONS)


def _count(names: Sequence[str], noun: str) -> str:
    return f"{len(names):,} {noun}{'' if len(names) == 1 else 's'}"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) or "none"
    return f"{shown}, ..." if len(names) > 3 else shown
