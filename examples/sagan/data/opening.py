"""Opens the images that a run names, whatever form they have on disk."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sagan.contents import found_at, holds_prepared_set, holds_run
from sagan.data.dataset import DatasetCheck, ImageDataset
from sagan.data.decoding import RESAMPLE_FILTERS
from sagan.data.folder import ImageFolderDataset
from sagan.data.inspection import CheckMode
from sagan.data.layout import DatasetError
from sagan.data.packed import PackedDataset
from sagan.data.tree import scan_image_tree
from sagan.distributed import World
from sagan.errors import UserError, check_at_least, check_choices

_MOST_WORKERS = 1024


@dataclass(frozen=True)
class DataConfig:
    """How images are read. For a prepared set, only horizontal_flip and check count.

    Attributes:
        split: name of the folder below the root that holds the class folders, where there is one.
        resample: filter of the antialiased resize: bilinear, bicubic, lanczos or box.
        horizontal_flip: mirror half of the images, chosen again in each epoch.
        draft: let the JPEG decoder scale down: about twice as fast, not the same pixels.
        check: preflight: "full" decodes every file, "headers" opens it, "auto" is full up to 100,000 files, or
            "off". Of a prepared set, only "full" reads all images and compares them with their digests.
        cache_mib: keep decoded images in memory if they all fit into this many MiB.
        workers: processes that decode, when the images are not in memory.
    """

    split: str = "train"
    resample: str = "bilinear"
    horizontal_flip: bool = False
    draft: bool = False
    check: CheckMode = "auto"
    cache_mib: int = 2048
    workers: int = 2

    def __post_init__(self) -> None:
        if self.resample not in RESAMPLE_FILTERS:
            raise UserError(f"resample: expected one of {', '.join(RESAMPLE_FILTERS)}, got {self.resample!r}")
        check_choices(self)
        check_at_least(self, 0, "workers", "cache_mib")
        if self.workers > _MOST_WORKERS:
            raise UserError(f"workers: expected at most {_MOST_WORKERS}, got {self.workers}")


def open_dataset(path: Path, resolution: int, config: DataConfig) -> ImageDataset:
    """Open a prepared set, or a folder with a folder for each class; no image is read yet.

    A new kind of data set is a new subclass of `ImageDataset` and a branch here.

    Raises:
        DatasetError: the data set cannot be used; the message says what was found and the likely fix.
    """
    if holds_prepared_set(path):
        return PackedDataset(path, resolution)
    if holds_run(path):  # its folders of pictures look like classes
        raise DatasetError(f"data: expected a prepared set or a folder of images, got {found_at(path)}")
    tree = scan_image_tree(path, split=config.split)
    return ImageFolderDataset(tree, resolution, resample=config.resample, draft=config.draft, cache_mib=0)


def check_dataset(dataset: ImageDataset, mode: CheckMode, world: World) -> DatasetCheck:
    """Run `ImageDataset.check` on rank 0, print the result there, and return it on all ranks (call it on all)."""

    def look() -> dict[str, Any]:
        check = dataset.check(mode, progress=True)
        print(check.text + "\n")
        return asdict(check)

    return DatasetCheck(**world.run_on_main(look))
