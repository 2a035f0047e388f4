"""Training images: a folder for each class, or a prepared set, checked and served as resumable batches."""

from sagan.data.dataset import ImageDataset, ImageFolderDataset
from sagan.data.decoding import RESAMPLE_FILTERS, ImageReadError, decode_image
from sagan.data.device_prefetch import copied_ahead
from sagan.data.inspection import PreflightReport, UnreadableFile, preflight
from sagan.data.loading import ResumableBatchSampler, horizontal_flips, make_loader
from sagan.data.packed import PackedDataset, PackedError, is_prepared, read_manifest, verify
from sagan.data.tree import IMAGE_EXTENSIONS, DatasetError, ImageTree, PathTable, scan_image_tree

__all__ = [
    "IMAGE_EXTENSIONS",
    "RESAMPLE_FILTERS",
    "DatasetError",
    "ImageDataset",
    "ImageFolderDataset",
    "ImageReadError",
    "ImageTree",
    "PackedDataset",
    "PackedError",
    "PathTable",
    "PreflightReport",
    "ResumableBatchSampler",
    "UnreadableFile",
    "copied_ahead",
    "decode_image",
    "horizontal_flips",
    "is_prepared",
    "make_loader",
    "preflight",
    "read_manifest",
    "scan_image_tree",
    "verify",
]
