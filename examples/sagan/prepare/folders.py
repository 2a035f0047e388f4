"""Images as files: a folder for each class, or one folder without classes."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sagan.data import DatasetError, PathTable, scan_image_tree
from sagan.prepare.listing import Indices, Listing, Reader, Store, consecutive_parts
from sagan.prepare.readahead import hinted, will_need

# One file's own trouble; any other error is the disk's or the network's, and ends the run.
_OF_ONE_FILE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENOTDIR)


@dataclass(frozen=True)
class FileReader(Reader):
    """Reads files below a folder."""

    root: Path
    names: Sequence[str]

    def __iter__(self) -> Iterator[bytes | str]:
        for path in hinted([self.root / name for name in self.names], will_need):
            try:
                yield path.read_bytes()
            except OSError as error:
                if error.errno not in _OF_ONE_FILE or not os.path.lexists(path):
                    raise DatasetError(
                        f"cannot read {path} any more: {error.strerror}. Run the same command again to go on."
                    ) from error
                yield error.strerror or str(error)


class FileStore(Store):
    """Files below a folder, of which `names` are the paths."""

    def __init__(self, names: PathTable) -> None:
        self.names = names

    def identity(self) -> bytes:
        digest = hashlib.sha256()
        for index in range(len(self.names)):
            try:
                size = (self.names.root / self.names.relative(index)).stat().st_size
            except OSError:  # such as a link to nothing
                size = -1
            digest.update(f"{size} ".encode())
        return digest.digest()

    def parts(self, size: int) -> list[Indices]:
        return consecutive_parts(len(self.names), size)

    def reader(self, indices: Indices) -> FileReader:
        return FileReader(self.names.root, [self.names.relative(index) for index in indices.tolist()])


def list_class_folders(root: Path, split: str) -> Listing:
    """List ROOT/SPLIT/<class>/* or ROOT/<class>/*; see `scan_image_tree`."""
    tree = scan_image_tree(root, split=split)
    return Listing(
        kind="folder",
        path=str(tree.root),
        class_names=tree.class_names,
        class_words=None,
        names=tree.paths,
        labels=tree.labels,
        store=FileStore(tree.paths),
        skipped=tree.skipped,
        skipped_examples=tree.skipped_examples,
    )
