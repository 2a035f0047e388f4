"""Training images: a folder for each class on disk, checked before training, served as resumable batches."""

from sagan.data.ahead import copied_ahead
from sagan.data.dataset import ImageFolderDataset
from sagan.data.decoding import RESAMPLE_FILTERS, ImageReadError, decode_image
from sagan.data.inspection import PreflightReport, UnreadableFile, preflight
from sagan.data.loading import ResumableBatchSampler, horizontal_flips, make_loader
from sagan.data.tree import IMAGE_EXTENSIONS, DatasetError, ImageTree, PathTable, scan_image_tree

__all__ = [
    "IMAGE_EXTENSIONS",
    "RESAMPLE_FILTERS",
    "DatasetError",
    "ImageFolderDataset",
    "ImageReadError",
    "ImageTree",
    "PathTable",
    "PreflightReport",
    "ResumableBatchSampler",
    "UnreadableFile",
    "copied_ahead",
    "decode_image",
    "horizontal_flips",
    "make_loader",
    "preflight",
    "scan_image_tree",
]
