"""The check of a folder's images before they are used."""

from __future__ import annotations

from pathlib import Path

from sagan.data import ImageTree, preflight
from sagan.distributed import World
from sagan.recipes import RunConfig


def checked_tree(
    tree: ImageTree, config: RunConfig, world: World, *, report_path: Path | None = None
) -> ImageTree:
    """Look at the images of a tree, print the report, and return those that can be read; all processes call this.

    Args:
        tree: the images.
        config: says how they are read, and how closely they are looked at.
        world: this process; the first looks.
        report_path: where to write the report too.
    """

    def look() -> list[str]:
        report = preflight(
            tree,
            resolution=config.network.resolution,
            mode=config.images.check,
            resample=config.images.resample,
            progress=True,
            report_path=report_path,
        )
        print(report.format() + "\n")
        return [str(path) for path in report.unreadable_paths]

    return tree.without(Path(path) for path in world.run_on_main(look))
