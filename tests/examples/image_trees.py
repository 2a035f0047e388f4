"""Writes folders of generated images in ImageNet's layout, clean or with every defect that real ones have."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

WNIDS = (
    "n01440764", "n01443537", "n01484850", "n01491361", "n01494475", "n01496331",
    "n01498041", "n01514668", "n01514859", "n01518878", "n01530575", "n01531178",
)  # fmt: skip

NATURAL_SIZES = ((500, 375), (375, 500), (333, 500), (97, 131), (640, 480), (64, 64), (51, 203))


@dataclass(frozen=True)
class MessyTree:
    """A tree with known defects; paths are below `root`."""

    root: Path  # folder of the class folders
    class_names: tuple[str, ...]  # all class folders, in label order
    unreadable: dict[str, str]  # part of the reason to expect for each file
    skipped: dict[str, int]  # files that are not images, by kind
    converted: dict[str, int]  # images by conversion to RGB
    exif_rotated: int  # images
    below_32_pixels: int  # images whose short side is less
    empty_class: str  # a class folder with no image file
    lost_class: str  # a class folder whose images are all unreadable


def smooth_pixels(rng: np.random.Generator, width: int, height: int, channels: int = 3) -> np.ndarray:
    """Return uint8 [height, width, channels] of soft blobs, which JPEG compresses like a photograph."""
    coarse = rng.integers(0, 256, (5, 5, channels), dtype=np.uint8)
    planes = [
        Image.fromarray(coarse[:, :, c]).resize((width, height), Image.Resampling.BICUBIC)
        for c in range(channels)
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def write_image_tree(
    root: Path,
    *,
    class_names: Sequence[str] = WNIDS[:10],
    images_per_class: int = 3,
    sizes: Sequence[tuple[int, int]] = NATURAL_SIZES,
    seed: int = 0,
) -> Path:
    """Write `root/<class>/<class>_<number>.JPEG` and return `root`; the same seed gives the same files."""
    rng = np.random.default_rng(seed)
    for name in class_names:
        (root / name).mkdir(parents=True)
        for number in range(images_per_class):
            width, height = sizes[int(rng.integers(len(sizes)))]
            image = Image.fromarray(smooth_pixels(rng, width, height))
            image.save(root / name / f"{name}_{number}.JPEG", quality=90)
    return root


def jpeg_bytes(seed: int = 0, width: int = 80, height: int = 60) -> bytes:
    """Return a sound JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(smooth_pixels(np.random.default_rng(seed), width, height)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_messy_tree(root: Path, seed: int = 0) -> MessyTree:
    """Write 12 classes with 3 sound JPEGs each in ten of them, and every defect beside them."""
    write_image_tree(root, class_names=WNIDS[:10], seed=seed)
    rng = np.random.default_rng(seed + 1)
    first, second, third = (root / name for name in WNIDS[:3])
    empty, lost = WNIDS[10], WNIDS[11]
    (root / empty).mkdir()
    (root / lost).mkdir()

    grey = smooth_pixels(rng, 120, 90, 1)[:, :, 0]
    Image.fromarray(grey).save(first / "grey.JPEG")
    Image.fromarray(smooth_pixels(rng, 120, 90, 4), "CMYK").save(first / "cmyk.JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(smooth_pixels(rng, 120, 90)).save(first / "rotated.JPEG", exif=exif)
    Image.fromarray(smooth_pixels(rng, 120, 90)).quantize(16).save(second / "palette.JPEG", "PNG")
    Image.fromarray(smooth_pixels(rng, 120, 90, 4), "RGBA").save(second / "rgba.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(second / "grey16.JPEG", "PNG")
    Image.fromarray(smooth_pixels(rng, 120, 90)).save(second / "webp.WEBP")
    Image.fromarray(smooth_pixels(rng, 1, 1)).save(third / "tiny.JPEG")
    (third / "deeper" / "still").mkdir(parents=True)
    (third / "deeper" / "still" / "inside.jpg").write_bytes(jpeg_bytes(seed))

    sound = jpeg_bytes(seed + 2, 300, 200)
    (first / "truncated.JPEG").write_bytes(sound[: len(sound) // 2])
    (second / "text.JPEG").write_text("<html>404 Not Found</html>")
    (third / "empty.JPEG").write_bytes(b"")
    (third / "broken_link.JPEG").symlink_to("nowhere.JPEG")
    (root / lost / "text.JPEG").write_text("not an image")

    (root / "README.txt").write_text("a stray file")
    (root / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (root / "stray.JPEG").write_bytes(sound)
    (first / "notes.txt").write_text("a stray file")
    (first / "._grey.JPEG").write_bytes(b"\0\5\26\7")
    (second / "LICENSE").write_text("a stray file")
    (root / "__MACOSX" / WNIDS[0]).mkdir(parents=True)
    (root / "__MACOSX" / WNIDS[0] / "._grey.JPEG").write_bytes(b"\0\5\26\7")
    return MessyTree(
        root=root,
        class_names=WNIDS,
        unreadable={
            f"{WNIDS[0]}/truncated.JPEG": "truncated",
            f"{WNIDS[1]}/text.JPEG": "text file",
            f"{WNIDS[2]}/empty.JPEG": "empty file",
            f"{WNIDS[2]}/broken_link.JPEG": "No such file",
            f"{lost}/text.JPEG": "text file",
        },
        skipped={".txt": 2, "__MACOSX": 1, "hidden": 2, "image outside a class folder": 1, "no extension": 1},
        converted={"greyscale": 2, "16-bit": 1, "CMYK": 1, "palette": 1, "alpha": 1},
        exif_rotated=1,
        below_32_pixels=1,
        empty_class=empty,
        lost_class=lost,
    )


def count_files(root: Path) -> int:
    """Return how many files lie below `root`, links included, counted without the code under test."""
    return sum(len(files) for _, _, files in os.walk(root))
