"""Images for training and evaluation, checked and served as resumable batches.

`opening` opens every kind of data set (`dataset` is what they share): a prepared set (`packed`, `packed_format`) or a
folder (`folder`, `tree`, `layout`). `inspection` checks a folder, `decoding` reads a file, `loading` makes batches,
`prefetch` prepares them ahead.
"""

from sagan.data.dataset import ImageDataset
from sagan.data.decoding import ImageReadError, decode_image
from sagan.data.folder import ImageFolderDataset
from sagan.data.inspection import preflight
from sagan.data.layout import IMAGE_EXTENSIONS, DatasetError
from sagan.data.loading import ResumableBatchSampler, horizontal_flips, make_loader
from sagan.data.opening import DataConfig, check_dataset, open_dataset
from sagan.data.packed import PackedDataset
from sagan.data.packed_format import Manifest, PackedError, read_manifest, verify
from sagan.data.prefetch import prefetch_to_device
from sagan.data.tree import ImageTree, PathTable, scan_image_tree

__all__ = [
    "IMAGE_EXTENSIONS",
    "DataConfig",
    "DatasetError",
    "ImageDataset",
    "ImageFolderDataset",
    "ImageReadError",
    "ImageTree",
    "Manifest",
    "PackedDataset",
    "PackedError",
    "PathTable",
    "ResumableBatchSampler",
    "check_dataset",
    "decode_image",
    "horizontal_flips",
    "make_loader",
    "open_dataset",
    "prefetch_to_device",
    "preflight",
    "read_manifest",
    "scan_image_tree",
    "verify",
]
