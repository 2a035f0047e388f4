"""One image file to one square uint8 tensor, whatever its colour mode and orientation."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from sagan.data.layout import DatasetError

RESAMPLE_FILTERS: dict[str, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}

# The content decides, not the name: ImageNet has a PNG named .JPEG. EPS, which runs a program, is left out.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")

ORIENTATION_TAG = 0x0112
TRANSPOSE_FOR_ORIENTATION: dict[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Damage outside the pixels, and conversions that are done on purpose; damage to the pixels raises.
HARMLESS_WARNINGS = (
    r"(Possibly c|C)orrupt EXIF",
    r"Metadata Warning, tag",
    r"Tag offset too large",
    r"Tag data larger than file",
    r"Image appears to be a malformed MPO file",
    r"Invalid APNG",
    r"Palette images with Transparency",
    r"image file could not be identified because",
)


class ImageReadError(DatasetError):
    """One file could not be decoded; `reason` says why, without the path."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"expected a readable image at {path}, got: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[ImageReadError], tuple[Path, str]]:
        return type(self), (self.path, self.reason)


@dataclass(frozen=True)
class ImageFacts:
    """What a file says of its image: size in pixels as displayed, Pillow's mode and name of the file's format,
    what has to be converted."""

    width: int
    height: int
    mode: str
    format: str
    has_alpha: bool
    is_rotated: bool

    def conversions(self) -> list[str]:
        """Return which conversions to RGB the image needs, none for a plain RGB image."""
        found = []
        if self.mode.startswith(("1", "L", "I", "F")) and self.mode != "LAB":
            found.append("greyscale")
        if self.mode.startswith("I"):
            found.append("16-bit")
        if self.mode == "CMYK":
            found.append("CMYK")
        if self.mode in ("P", "PA"):
            found.append("palette")
        if self.has_alpha:
            found.append("alpha")
        if not found and self.mode not in ("RGB", "RGBX"):
            found.append(self.mode)
        return found


def decode_image(
    path: Path | str, resolution: int, *, resample: str = "bilinear", draft: bool = False
) -> Tensor:
    """Return a file's image as a square RGB tensor.

    In this order: rotate as EXIF says, convert to RGB, crop the centre to the short side, resize with
    antialiasing. Alpha is composited on white. 16-bit greyscale is scaled to 8 bits, not clipped. CMYK is
    converted as Pillow does it (Adobe's inverted CMYK included; no colour profile is applied). Of several
    frames the first counts.

    Args:
        path: the file; its content, not its name, decides the format.
        resolution: side of the result in pixels, R.
        resample: `"bilinear"`, `"bicubic"`, `"lanczos"` or `"box"`; each is widened when it shrinks an image.
        draft: let JPEG decode at 1/2, 1/4 or 1/8 of its size where that stays at or above `resolution`. About
            twice as fast, and slightly different pixels: for training only, never for reference statistics of
            a metric.

    Returns:
        uint8 [3, R, R].

    Raises:
        ImageReadError: the file cannot be decoded, or is so large that Pillow takes it for a decompression
            bomb.
        ValueError: `resolution` or `resample` is not one that is served.
    """
    check_decode_options(resolution, resample)
    pixels, _ = read_pixels(Path(path), resolution, resample=resample, draft=draft)
    return torch.from_numpy(pixels)


def check_decode_options(resolution: int, resample: str) -> None:
    """Check the options of `decode_image`.

    Raises:
        ValueError: `resolution` is below 1, or `resample` is unknown.
    """
    if resolution < 1:
        raise ValueError(f"expected resolution of at least 1 pixel, got {resolution}")
    if resample not in RESAMPLE_FILTERS:
        raise ValueError(f"expected resample to be one of {', '.join(RESAMPLE_FILTERS)}, got {resample!r}")


def read_pixels(
    path: Path, resolution: int, *, resample: str, draft: bool, data: bytes | None = None
) -> tuple[npt.NDArray[np.uint8], ImageFacts]:
    """Return what `decode_image` does, as an array uint8 [3, R, R], and the facts of the file.

    Args:
        path: the file, or its name if its bytes are given.
        resolution: see `decode_image`.
        resample: see `decode_image`.
        draft: see `decode_image`.
        data: the file's bytes, if they are at hand.

    Raises:
        ImageReadError: the file cannot be decoded.
    """
    file = path if data is None else io.BytesIO(data)
    with _reading(path, data), Image.open(file, formats=FORMATS) as image:
        size, mode = image.size, image.mode
        if draft:
            image.draft(None, (resolution, resolution))
        image.load()
        orientation = _orientation(image)
        facts = _facts(image, size, mode, orientation)
        upright = image.transpose(TRANSPOSE_FOR_ORIENTATION[orientation]) if facts.is_rotated else image
        rgb = _to_rgb(upright)
        side = min(rgb.size)
        left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
        square = rgb.crop((left, top, left + side, top + side))
        resized = square.resize((resolution, resolution), RESAMPLE_FILTERS[resample])
        return np.asarray(resized).transpose(2, 0, 1).copy(), facts


def read_header(path: Path) -> ImageFacts:
    """Return the facts of a file from its header; its pixels may still be damaged.

    Raises:
        ImageReadError: the file is not an image, or too large.
    """
    with _reading(path), Image.open(path, formats=FORMATS) as image:
        # PNG may hold EXIF behind its pixels; asking for that would decode them.
        orientation = _orientation(image) if image.format != "PNG" or "exif" in image.info else 1
        return _facts(image, image.size, image.mode, orientation)


def _facts(image: Image.Image, size: tuple[int, int], mode: str, orientation: int) -> ImageFacts:
    width, height = size[::-1] if orientation >= 5 else size
    has_alpha = mode in ("RGBA", "RGBa", "LA", "La", "PA") or (
        "transparency" in image.info and not mode.startswith("I")
    )
    return ImageFacts(
        width, height, mode, image.format or "", has_alpha, orientation in TRANSPOSE_FOR_ORIENTATION
    )


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF raises almost anything, and the pixels are still good
        return 1
    return orientation if orientation in TRANSPOSE_FOR_ORIENTATION else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _greyscale_16_bit(image).convert("RGB")
    if image.mode == "F":
        raise ValueError("32-bit float pixels, whose range from black to white is not defined")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _greyscale_16_bit(image: Image.Image) -> Image.Image:
    values: npt.NDArray[Any] = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"integer pixels from {values.min()} to {values.max()}, more than 16 bits hold")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


@contextmanager
def _reading(path: Path, data: bytes | None = None) -> Iterator[None]:
    """Turn whatever a damaged file makes Pillow raise into `ImageReadError`."""
    with pillow_warnings():
        try:
            yield
        except Exception as error:  # OSError, SyntaxError, struct.error, KeyError: the bytes are arbitrary
            raise ImageReadError(path, _reason(error, path, data)) from error


def _reason(error: Exception, path: Path, data: bytes | None) -> str:
    if isinstance(error, UnidentifiedImageError):
        if data is None:
            with path.open("rb") as file:
                data = file.read(64)
        return _why_unidentified(data[:64])
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"larger than Pillow's limit against decompression bombs ({error})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{error}" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"


def _why_unidentified(start: bytes) -> str:
    if not start:
        return "empty file"
    if all(byte >= 32 or byte in b"\t\r\n" for byte in start):
        text = start[:24].decode("utf-8", "backslashreplace")
        return f"not an image: a text file that starts with {text!r}"
    return f"not an image in a format that is read here; first bytes {start[:8].hex(' ')}"


_warnings_lock = threading.Lock()
_readers = 0
_saved_filters: warnings.catch_warnings[None] | None = None


@contextmanager
def pillow_warnings() -> Iterator[None]:
    """Raise on decompression bombs and pass over harmless damage, while any thread reads.

    Reading does this for each file; around many files it saves setting the filters up for each.

    `warnings.catch_warnings` swaps a list that all threads share, so the first reader in enters it and the
    last one out leaves it; entered by each thread, it could restore another's filters for good.
    """
    global _readers, _saved_filters
    with _warnings_lock:
        _readers += 1
        if _readers == 1:
            _saved_filters = warnings.catch_warnings()
            _saved_filters.__enter__()
            for message in HARMLESS_WARNINGS:
                warnings.filterwarnings("ignore", message=message, category=UserWarning)
            warnings.simplefilter("error", Image.DecompressionBombWarning)
    try:
        yield
    finally:
        with _warnings_lock:
            _readers -= 1
            if _readers == 0 and _saved_filters is not None:
                _saved_filters.__exit__(None, None, None)
                _saved_filters = None


def _forget_readers() -> None:
    """Start afresh in a forked process: threads that read in the parent do not exist there."""
    global _warnings_lock, _readers, _saved_filters
    _warnings_lock, _readers, _saved_filters = threading.Lock(), 0, None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_readers)
