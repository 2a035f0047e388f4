"""Decodes one image file of any colour mode and orientation into a square uint8 array."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from sagan.data.layout import FORMAT_EXTENSIONS, DatasetError
from sagan.io import open_regular

Resample = Literal["bilinear", "bicubic", "lanczos", "box"]
RESAMPLE_FILTERS = {name: Image.Resampling[name.upper()] for name in get_args(Resample)}

_FORMATS = tuple(FORMAT_EXTENSIONS)  # the content decides, not the name: ImageNet has a PNG named .JPEG

MAX_FILE_BYTES = 2**30  # Pillow's limit of pixels times 8 bytes is less; text and comments may never end

_ORIENTATION_TAG = 0x0112
_TRANSPOSE_FOR_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Damage outside the pixels, and conversions done on purpose; damage to the pixels raises.
_HARMLESS_WARNINGS = (
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
    """A file cannot be decoded; `reason` says why, without the path.

    `of_system` is whether the system said so, as of a network disk that is away: the file itself may be sound.
    """

    def __init__(self, path: Path, reason: str, of_system: bool = False) -> None:
        super().__init__(f"expected a readable image at {path}, got: {reason}")
        self.path = path
        self.reason = reason
        self.of_system = of_system

    def __reduce__(self) -> tuple[type[ImageReadError], tuple[Path, str, bool]]:
        return type(self), (self.path, self.reason, self.of_system)


@dataclass(frozen=True)
class ImageFacts:
    """An image as displayed: size in pixels, Pillow's mode and format name, and what has to be converted."""

    width: int
    height: int
    mode: str
    format: str
    has_alpha: bool
    is_rotated: bool

    def conversions(self) -> list[str]:
        """Return the conversions to RGB that the image needs."""
        needed = {
            "greyscale": self.mode.startswith(("1", "L", "I", "F")) and self.mode != "LAB",
            "16-bit": self.mode.startswith("I"),
            "CMYK": self.mode == "CMYK",
            "palette": self.mode in ("P", "PA"),
            "alpha": self.has_alpha,
        }
        found = [name for name, applies in needed.items() if applies]
        return found or ([] if self.mode in ("RGB", "RGBX") else [self.mode])


def decode_image(
    path: Path | str, resolution: int, *, resample: str = "bilinear", draft: bool = False
) -> Tensor:
    """Return a file's image as a square RGB tensor, uint8 [3, R, R].

    In this order: rotate as EXIF says, convert to RGB, crop the centre to the short side, resize with
    antialiasing. Alpha is composited on white. 16-bit greyscale is scaled to 8 bits, not clipped. CMYK is
    converted as Pillow does it (including Adobe's inverted CMYK; no colour profile is applied). Only the first frame
    of an animation counts. The content, not the name, decides the format.

    Args:
        path: the file.
        resolution: side of the result in pixels, R.
        resample: name of the filter.
        draft: let JPEG decode at 1/2, 1/4 or 1/8 of its size where that stays at or above `resolution`. About
            twice as fast, but slightly different pixels: for training only, never for a metric's statistics.

    Raises:
        ImageReadError: the file cannot be decoded, or is so large that Pillow suspects a decompression bomb.
        ValueError: `resolution` or `resample` is not supported.
    """
    check_decode_options(resolution, resample)
    pixels, _ = read_pixels(Path(path), resolution, resample=resample, draft=draft)
    return torch.from_numpy(pixels)


def check_decode_options(resolution: int, resample: str) -> None:
    """Raise ValueError if `resolution` is below 1 or `resample` is unknown."""
    if resolution < 1:
        raise ValueError(f"expected resolution of at least 1 pixel, got {resolution}")
    if resample not in RESAMPLE_FILTERS:
        raise ValueError(f"expected resample to be one of {', '.join(RESAMPLE_FILTERS)}, got {resample!r}")


def read_pixels(
    path: Path, resolution: int, *, resample: str, draft: bool, data: bytes | None = None
) -> tuple[npt.NDArray[np.uint8], ImageFacts]:
    """Do what `decode_image` does, with a file's contents if given; return uint8 [3, R, R] and the file's facts."""
    with _reading(path, data) as file, Image.open(file, formats=_FORMATS) as image:
        size, mode = image.size, image.mode
        if draft:
            image.draft(None, (resolution, resolution))
        image.load()
        orientation = _orientation(image)
        facts = _facts(image, size, mode, orientation)
        upright = image.transpose(_TRANSPOSE_FOR_ORIENTATION[orientation]) if facts.is_rotated else image
        rgb = _to_rgb(upright)
        side = min(rgb.size)
        left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
        square = rgb.crop((left, top, left + side, top + side))
        resized = square.resize((resolution, resolution), RESAMPLE_FILTERS[resample])
        return np.asarray(resized).transpose(2, 0, 1).copy(), facts


def read_header(path: Path) -> ImageFacts:
    """Return the facts of a file from its header alone, or raise ImageReadError."""
    with _reading(path) as file, Image.open(file, formats=_FORMATS) as image:
        # PNG may hold EXIF behind its pixels; asking for that would decode them.
        orientation = _orientation(image) if image.format != "PNG" or "exif" in image.info else 1
        return _facts(image, image.size, image.mode, orientation)


def _facts(image: Image.Image, size: tuple[int, int], mode: str, orientation: int) -> ImageFacts:
    width, height = size[::-1] if orientation >= 5 else size
    has_alpha = mode in ("RGBA", "RGBa", "LA", "La", "PA") or (
        "transparency" in image.info and not mode.startswith("I")
    )
    return ImageFacts(
        width, height, mode, image.format or "", has_alpha, orientation in _TRANSPOSE_FOR_ORIENTATION
    )


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF raises almost anything, and the pixels are still good
        return 1
    return orientation if orientation in _TRANSPOSE_FOR_ORIENTATION else 1


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
def _reading(path: Path, data: bytes | None = None) -> Iterator[BinaryIO]:
    """Yield an open file, or its given contents; turn whatever damage makes Pillow raise into `ImageReadError`."""
    start = b""
    with pillow_warnings():
        try:
            with open_regular(path) if data is None else io.BytesIO(data) as file:
                size = os.fstat(file.fileno()).st_size if data is None else len(data)
                if size > MAX_FILE_BYTES:
                    raise ValueError(
                        f"a file of {size:,} bytes, of which {MAX_FILE_BYTES:,} are read at most"
                    )
                try:
                    yield file
                except UnidentifiedImageError:
                    file.seek(0)
                    start = file.read(64)
                    raise
        except Exception as error:  # OSError, SyntaxError, struct.error, KeyError: the bytes are arbitrary
            of_system = isinstance(error, MemoryError) or (isinstance(error, OSError) and bool(error.errno))
            raise ImageReadError(path, _reason(error, start), of_system) from error


def _reason(error: Exception, start: bytes) -> str:
    """Return why a file that starts with these bytes cannot be read."""
    if isinstance(error, UnidentifiedImageError):
        if not start:
            return "empty file"
        if all(byte >= 32 or byte in b"\t\r\n" for byte in start):
            return f"not an image: a text file that starts with {start[:24].decode('utf-8', 'backslashreplace')!r}"
        return f"not an image in a supported format; first bytes {start[:8].hex(' ')}"
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"larger than Pillow's limit against decompression bombs ({error})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{error}" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"


_warnings_lock = threading.Lock()
_readers = 0
_saved_filters: warnings.catch_warnings[None] | None = None


@contextmanager
def pillow_warnings() -> Iterator[None]:
    """Raise on decompression bombs and ignore warnings of harmless damage, while any thread reads.

    Every read enters this; entering it around many reads saves setting the filters up for each.

    `warnings.catch_warnings` swaps a list that all threads share. So only the first reader enters it and only the last
    one leaves it: if each thread did, one could restore another's filters for good.
    """
    global _readers, _saved_filters
    with _warnings_lock:
        _readers += 1
        if _readers == 1:
            _saved_filters = warnings.catch_warnings()
            _saved_filters.__enter__()
            for message in _HARMLESS_WARNINGS:
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
    """Reset the count in a forked process, where the parent's reading threads do not exist."""
    global _warnings_lock, _readers, _saved_filters
    _warnings_lock, _readers, _saved_filters = threading.Lock(), 0, None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_readers)
