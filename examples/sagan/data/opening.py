"""Opens the images that a run names, whatever form they have on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sagan.data.config import DataConfig
from sagan.data.dataset import DatasetCheck, ImageDataset
from sagan.data.folder import open_folder
from sagan.data.inspection import CheckMode
from sagan.data.packed import open_packed
from sagan.data.packed_format import is_prepared
from sagan.distributed import World

# How to recognise a data set at a path, and how to open it. A new kind of data set is a new file and a line here.
_KINDS: tuple[tuple[Callable[[Path], bool], Callable[[Path, int, DataConfig], ImageDataset]], ...] = (
    (is_prepared, open_packed),
)


def open_dataset(path: Path, resolution: int, config: DataConfig) -> ImageDataset:
    """Open a prepared set, or a folder with a folder for each class; no image is read yet.

    Raises:
        DatasetError: the data set cannot be used; the message says what was found and the likely fix.
    """
    for recognises, open_kind in _KINDS:
        if recognises(path):
            return open_kind(path, resolution, config)
    return open_folder(path, resolution, config)


def check_dataset(
    dataset: ImageDataset, mode: CheckMode, world: World, *, report_folder: Path | None = None
) -> DatasetCheck:
    """Check a data set on rank 0, print the result there, and return it on all ranks, which call this together.

    The arguments are those of `ImageDataset.check`.
    """

    def look() -> dict[str, Any]:
        check = dataset.check(mode, report_folder=report_folder, progress=True)
        print(check.text + "\n")
        return asdict(check)

    return DatasetCheck(**world.run_on_main(look))
