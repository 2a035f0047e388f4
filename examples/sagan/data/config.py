"""How a run reads its images."""

from __future__ import annotations

from dataclasses import dataclass

from sagan.data.decoding import RESAMPLE_FILTERS
from sagan.data.inspection import CheckMode
from sagan.errors import UserError


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
        if self.workers < 0 or self.cache_mib < 0:
            raise UserError("workers, cache_mib: expected at least 0")
