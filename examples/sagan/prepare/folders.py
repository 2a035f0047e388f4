"""Images as files: a folder for each class, or one folder without classes."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from sagan.data import DatasetError, PathTable, scan_image_tree
from sagan.io import open_regular
from sagan.prepare.listing import ImageFiles, Indices, Listing, hinted, too_large, will_need

# Errors of a single file; any other is the disk's or the network's, and ends the run.
_SINGLE_FILE_ERRORS = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENOTDIR)


class Files(ImageFiles):
    """Files below a folder."""

    def __init__(self, paths: PathTable) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[bytes | str]:
        for path in hinted(self.paths, will_need):
            try:
                with open_regular(path) as file:
                    yield too_large(os.fstat(file.fileno()).st_size) or file.read()
            except OSError as error:
                if error.errno not in _SINGLE_FILE_ERRORS or not os.path.lexists(path):
                    raise DatasetError(
                        f"cannot read {path} any more: {error.strerror}. Run the same command again to resume."
                    ) from error
                yield error.strerror or str(error)

    def select(self, indices: Indices) -> Files:
        return Files(PathTable(self.paths.root, map(self.paths.relative, indices.tolist())))

    def identity(self) -> bytes:
        digest = hashlib.sha256()
        for path in self.paths:
            try:
                size = path.stat().st_size
            except OSError:  # such as a link to nothing
                size = -1
            digest.update(f"{size} ".encode())
        return digest.digest()


def list_class_folders(root: Path, split: str) -> Listing:
    """List ROOT/SPLIT/<class>/* or ROOT/<class>/*; see `scan_image_tree`."""
    tree = scan_image_tree(root, split=split)
    return Listing(
        kind="folder",
        path=str(tree.root),
        class_names=tree.class_names,
        names=tree.paths,
        labels=tree.labels,
        files=Files(tree.paths),
        skipped=tree.skipped,
        skipped_examples=tree.skipped_examples,
    )
