"""Is this a folder of class folders? If not, say what it is and how to mend it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from sagan.errors import UserError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")

ARCHIVE_EXTENSIONS = (".tar", ".gz", ".tgz", ".zip", ".7z", ".bz2", ".xz")
SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "test", "testing")
NOT_CLASSES = ("__MACOSX", "lost+found")

EXPECTED = """\
    ROOT/
      train/                     (this level may be left out)
        n01440764/               one folder for each class, two classes or more
          n01440764_10026.JPEG   that class's images
          ...
        n01443537/
          ..."""

UNPACK_TRAIN = (
    "unpack the archives. For ILSVRC2012_img_train.tar: "
    "mkdir -p train && tar -xf ILSVRC2012_img_train.tar -C train && cd train && "
    'for t in n*.tar; do mkdir -p "${t%.tar}" && tar -xf "$t" -C "${t%.tar}"; done'
)


class DatasetError(UserError):
    """The data set on disk is not what training needs; says what was found, expected, and the likely fix."""


def layout_error(path: Path, *, found: str, fix: str) -> DatasetError:
    """Return the error for a folder with a wrong layout, in the form that all of them share."""
    return DatasetError(
        f"cannot use {path} as a folder of training images.\n"
        f"Found: {found}\nExpected:\n{EXPECTED}\nLikely fix: {fix}"
    )


def has_image_extension(name: str) -> bool:
    """Return whether a file's name ends like an image's, in any case."""
    return name.lower().endswith(IMAGE_EXTENSIONS)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is left aside: a leading dot, or a system's own folder."""
    return name.startswith(".") or name in NOT_CLASSES


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one; a link that cannot be followed is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def list_folder(folder: Path) -> list[os.DirEntry[str]]:
    """Return a folder's entries sorted by name.

    Raises:
        DatasetError: the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DatasetError(
            f"expected to be able to list the folder {folder}, got: {error.strerror or error}. "
            "Likely fix: grant read and execute permission on it, or move it out of the data set."
        ) from error


def find_base(root: Path, split: str) -> Path:
    """Return the folder that holds the class folders: `root/split` or `root`.

    Raises:
        DatasetError: neither can be one, as seen from their direct contents.
    """
    try:
        kind = "folder" if root.is_dir() else "file" if root.exists() else "nothing"
    except OSError as error:
        raise layout_error(
            root, found=f"that it may not be read ({error.strerror}).", fix="check its permissions."
        ) from error
    if kind == "nothing":
        above = next(folder for folder in root.absolute().parents if folder.is_dir())
        raise layout_error(
            root,
            found=f"nothing: the path does not exist. The nearest folder above it is {above}.",
            fix="check the spelling, and that the disk or volume is mounted.",
        )
    if kind == "file":
        if _is_archive(root.name):
            raise layout_error(root, found="an archive file, not a folder.", fix=UNPACK_TRAIN)
        raise layout_error(root, found="a file, not a folder.", fix="give the folder of class folders.")
    folders, _ = _split_contents(root)
    has_split = split in folders and not _is_class_among_classes(root, split, folders)
    base = root / split if has_split else root
    _check_direct_contents(base, split)
    return base


def _is_class_among_classes(root: Path, split: str, folders: Sequence[str]) -> bool:
    """Return whether `root/split` is a class that happens to be called so: it and others hold images."""
    others = [name for name in folders if name.lower() not in SPLIT_NAMES]
    return _holds_images(root / split) and any(_holds_images(root / name) for name in others)


def _check_direct_contents(base: Path, split: str) -> None:
    folders, files = _split_contents(base)
    images = [name for name in files if has_image_extension(name)]
    archives = [name for name in files if _is_archive(name)]
    if not folders and archives:
        raise layout_error(
            base,
            found=f"{_count(archives, 'archive')} ({_some(archives)}) and no class folders.",
            fix=UNPACK_TRAIN,
        )
    class_archives = [name for name in archives if _looks_like_class_archive(name)]
    missing = [name for name in class_archives if name.removesuffix(".tar") not in folders]
    if folders and missing:
        raise layout_error(
            base,
            found=f"{_count(folders, 'class folder')}, and {_count(missing, 'class archive')} "
            f"not unpacked yet ({_some(missing)}). Training now would number the classes wrongly.",
            fix='unpack them: for t in n*.tar; do mkdir -p "${t%.tar}" && tar -xf "$t" -C "${t%.tar}"; done',
        )
    if not folders and images:
        raise _flat_error(base, images)
    if folders and all(name.lower() in SPLIT_NAMES for name in folders):
        raise layout_error(
            base,
            found=f"the folders {_some(folders)}, which are parts of a data set, not classes.",
            fix=f"add a folder named {split}; to train on another part, give it as ROOT: "
            f"{base / _nearest(folders, split)}.",
        )
    if not folders:
        found = f"{_contents(base)}." if files else "an empty folder."
        raise layout_error(base, found=found, fix="give the folder that holds the class folders.")


def _flat_error(base: Path, images: Sequence[str]) -> DatasetError:
    found = f"{_count(images, 'image')} directly in the folder ({_some(images)}) and no class folders."
    above = base.absolute().parent
    if base.name.lower() in ("val", "valid", "validation", "test") or images[0].startswith("ILSVRC2012_val"):
        fix = (
            "move each image into a folder named after its class. ImageNet's validation images come flat; "
            "their classes are listed in ILSVRC2012_validation_ground_truth.txt of its development kit."
        )
    elif base.name.lower() not in SPLIT_NAMES and _looks_like_base(above):
        fix = f"this looks like one class of many; give the folder above it, {above}."
    else:
        fix = "move each image into a folder named after its class."
    return layout_error(base, found=found, fix=fix)


def check_classes(
    base: Path, class_names: Sequence[str], images: Sequence[str], skipped: Mapping[str, int]
) -> None:
    """Check what a scan of `base` found.

    Args:
        base: the folder that was scanned.
        class_names: names of its folders.
        images: every image's path below `base`.
        skipped: counts of the other files by extension.

    Raises:
        DatasetError: there are no images, only one class, or the class folders lie one level deeper.
    """
    if not images:
        kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.items()) or "no files at all"
        found = f"{_count(class_names, 'folder')} ({_some(class_names)}) without any image; files: {kinds}."
        fix = f"images must end in one of {', '.join(IMAGE_EXTENSIONS)} (any case)."
        if any(kind in ARCHIVE_EXTENSIONS for kind in skipped):
            fix = UNPACK_TRAIN
        raise layout_error(base, found=found, fix=fix)
    nested = _nested_classes(images)
    if nested is not None and len(nested) > 1:
        example = next(iter(nested))
        inner = [name for names in nested.values() for name in names]
        raise layout_error(
            base,
            found=f"no image directly in any of {_count(class_names, 'folder')} ({_some(class_names)}), but "
            f"{_count(inner, 'folder')} inside them that hold images "
            f"(in {example}: {_some(nested[example])}). The class folders seem to lie one level too deep.",
            fix=f"move the inner folders up into {base}, or give one of {_some(list(nested))} as ROOT. "
            "If the inner folders only sort the images of one class, move the images up instead.",
        )
    if len(class_names) == 1:
        raise layout_error(
            base,
            found=f"only one class folder, {class_names[0]}, with {_count(images, 'image')}.",
            fix=_suggest(base, otherwise="a class-conditional model needs two classes or more; add some."),
        )


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
    are_splits = all(name.lower() in SPLIT_NAMES for name in names)
    if not are_splits and (len(set(names)) < len(names) or len(names) == len(inner)):
        return None
    return {first: sorted(seconds) for first, seconds in inner.items()}


def _suggest(base: Path, *, otherwise: str) -> str:
    """Return advice that names a folder below `base` which does hold class folders, if one is near."""
    level = [base]
    for _ in range(4):
        # At most 50 folders of a level: a wrong ROOT may be a whole disk.
        level = [folder / name for folder in level for name in _split_contents(folder)[0]][:50]
        for folder in level:
            if _looks_like_base(folder):
                inside_split = folder.name == "train" and folder.parent != base
                return f"give {folder.parent if inside_split else folder} as ROOT."
    return otherwise


def _looks_like_base(folder: Path) -> bool:
    folders, _ = _split_contents(folder)
    if len(folders) < 2 or all(name.lower() in SPLIT_NAMES for name in folders):
        return False
    return any(_holds_images(folder / name) for name in folders[:5])


def _holds_images(folder: Path) -> bool:
    return any(has_image_extension(name) for name in _split_contents(folder)[1])


def _split_contents(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the folders and of the files directly in `folder`, hidden ones left out."""
    entries = [entry for entry in list_folder(folder) if not is_hidden(entry.name)]
    return [e.name for e in entries if is_folder(e)], [e.name for e in entries if not is_folder(e)]


def _nearest(names: Sequence[str], wanted: str) -> str:
    return next((name for name in names if name.lower().startswith(wanted.lower())), names[0])


def _is_archive(name: str) -> bool:
    return name.lower().endswith(ARCHIVE_EXTENSIONS)


def _looks_like_class_archive(name: str) -> bool:
    return name.startswith("n") and name[1:9].isdigit() and name[9:] == ".tar"


def _contents(folder: Path) -> str:
    folders, files = _split_contents(folder)
    return f"{_count(folders, 'folder')} ({_some(folders)}) and {_count(files, 'file')} ({_some(files)})"


def _count(names: Sequence[str], noun: str) -> str:
    return f"{len(names):,} {noun}{'' if len(names) == 1 else 's'}"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) or "none"
    return f"{shown}, ..." if len(names) > 3 else shown
