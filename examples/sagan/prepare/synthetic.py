"""Generates images in ImageNet's own layouts, to try `prepare` and training without ImageNet.

Sizes, bytes per pixel and archives are those of ILSVRC2012. The class decides the coloured shape and its textured
ground. Image i of a class depends on (seed, class, i) alone, so all layouts hold the same files.
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from sagan.data.prefetch import usable_cpus
from sagan.errors import UserError
from sagan.extras import needs
from sagan.io import naming
from sagan.prepare.pool import run_tasks

_WORTH_PROCESSES = 200  # images that are worth starting processes for
_IN_MEMORY = 1024  # images that are encoded before they are written
Layout = Literal["folder", "tars", "parquet"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
# Width, height and share, roughly as in ILSVRC2012.
NATURAL_SIZES = (
    (500, 375, 0.46), (375, 500, 0.16), (500, 333, 0.14), (333, 500, 0.06), (500, 500, 0.06),
    (640, 480, 0.05), (1024, 768, 0.03), (320, 240, 0.02), (160, 120, 0.02),
)  # fmt: skip


@dataclass(frozen=True)
class SyntheticSet:
    """What to generate.

    Attributes:
        classes: number of classes.
        images: training images of each class.
        val_images: validation images of each class.
        seed: seed of all images.
        scale: factor on the natural sizes; small for tests.
    """

    classes: int = 20
    images: int = 50
    val_images: int = 5
    seed: int = 0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.classes < 2 or self.images < 1 or self.val_images < 0:
            raise UserError(
                "classes, images, val_images: expected at least 2, 1 and 0, "
                f"got {self.classes}, {self.images} and {self.val_images}"
            )
        if not 0 < self.scale <= 4:
            raise UserError(f"scale: expected above 0 and up to 4, got {self.scale}")

    @property
    def wnids(self) -> list[str]:
        """Names like WordNet's, in sorted order."""
        return [f"n{1_440_764 + 10_007 * label:08d}" for label in range(self.classes)]

    @property
    def words(self) -> list[str]:
        """A human name for each class."""
        return [f"thing {label}, sort of thing" for label in range(self.classes)]

    def train(self) -> Iterator[tuple[str, int, bytes]]:
        """Yield (file name, label, JPEG) class by class."""
        for label, wnid in enumerate(self.wnids):
            yield from self._encoded([(f"{wnid}_{7 * i}.JPEG", label, i) for i in range(self.images)])

    def validation(self) -> Iterator[tuple[str, int, bytes]]:
        """Yield (file name, label, JPEG) in the mixed order of ImageNet's validation set."""
        total = self.classes * self.val_images
        places = np.random.default_rng([self.seed, 1]).permutation(total)
        yield from self._encoded(
            [
                (f"ILSVRC2012_val_{number + 1:08d}.JPEG", int(place) % self.classes, 10**6 + number)
                for number, place in enumerate(places)
            ]
        )

    def _encoded(self, items: Sequence[tuple[str, int, int]]) -> Iterator[tuple[str, int, bytes]]:
        for start in range(0, len(items), _IN_MEMORY):
            chunk = items[start : start + _IN_MEMORY]
            workers = usable_cpus() if len(chunk) >= _WORTH_PROCESSES else 1
            files = dict(run_tasks(self._jpeg, [(label, number) for _, label, number in chunk], workers))
            for name, label, number in chunk:
                yield name, label, files[label, number]

    def _jpeg(self, image: tuple[int, int]) -> bytes:
        return synthetic_jpeg(self.seed, *image, self.scale)


def synthetic_jpeg(seed: int, label: int, number: int, scale: float = 1.0) -> bytes:
    """Return one JPEG file: the label decides shape and colours, chance decides position and texture."""
    rng = np.random.default_rng([seed, label, number])
    shares = np.array([share for _, _, share in NATURAL_SIZES])
    width, height, _ = NATURAL_SIZES[rng.choice(len(NATURAL_SIZES), p=shares / shares.sum())]
    width, height = (max(8, round(side * scale)) for side in (width, height))
    of_class = np.random.default_rng([seed, label])
    ground, figure = of_class.integers(30, 226, (2, 3)).astype(np.float32)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    radius = min(width, height) * rng.uniform(0.2, 0.35)
    inside = _inside(label, x - width * rng.uniform(0.4, 0.6), y - height * rng.uniform(0.4, 0.6), radius)
    pixels = np.where(inside[:, :, None], figure, ground)
    pixels += _texture(rng, width, height)[:, :, None]
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
        buffer, "JPEG", quality=int(rng.integers(88, 97))
    )
    return buffer.getvalue()


def _inside(
    label: int, x: npt.NDArray[np.float32], y: npt.NDArray[np.float32], radius: float
) -> npt.NDArray[np.bool_]:
    inside = [
        x**2 + y**2 < radius**2,
        np.maximum(abs(x), abs(y)) < radius,
        abs(x) + abs(y) < radius,
        np.minimum(abs(x), abs(y)) < radius / 3,
        np.sin(x * (3.0 / radius)) > 0,
        np.sin(y * (3.0 / radius)) > 0,
    ][label % 6]
    return np.asarray(inside)


def _texture(rng: np.random.Generator, width: int, height: int) -> npt.NDArray[np.float32]:
    """Return noise at several scales, so that a file has about as many bytes for each pixel as a photograph."""
    total = np.zeros((height, width), np.float32)
    for cell, strength in ((64, 30.0), (16, 18.0), (4, 12.0), (1, 9.0)):
        rows, columns = -(-height // cell) + 1, -(-width // cell) + 1
        noise = Image.fromarray(rng.standard_normal((rows, columns), dtype=np.float32) * strength)
        total += np.asarray(noise.resize((width, height), Image.Resampling.BILINEAR))
    return total


def write_folder(root: Path, images: SyntheticSet) -> None:
    """Write ``root/train/<wnid>/*.JPEG`` and ``root/val/<wnid>/*.JPEG``."""
    for split, files in (("train", images.train()), ("val", images.validation())):
        for wnid in images.wnids:
            (root / split / wnid).mkdir(parents=True, exist_ok=True)
        for name, label, data in files:
            (root / split / images.wnids[label] / name).write_bytes(data)
    write_words(root / "LOC_synset_mapping.txt", images)


def write_tars(root: Path, images: SyntheticSet) -> None:
    """Write ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and the development kit's folder below ``root``."""
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        files = images.train()
        for wnid in images.wnids:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for _ in range(images.images):
                    name, _, data = next(files)
                    add_member(tar, name, data)
            add_member(outer, f"{wnid}.tar", inner.getvalue())
    labels = []
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for name, label, data in images.validation():
            add_member(tar, name, data)
            labels.append((name, label))
    write_devkit(root / "ILSVRC2012_devkit_t12" / "data", images, labels)
    write_val_solution(root / "LOC_val_solution.csv", images, labels)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file to an archive, without a date."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def ilsvrc_ids(images: SyntheticSet) -> list[int]:
    """Return the development kit's number of each class, from 1: as in the real one, not the sorted order."""
    order = np.random.default_rng([images.seed, 2]).permutation(images.classes)
    if images.classes > 1 and (np.diff(order) > 0).all():
        order = order[::-1]
    return [int(place) + 1 for place in order]


def write_devkit(folder: Path, images: SyntheticSet, labels: Sequence[tuple[str, int]]) -> None:
    """Write ILSVRC2012_validation_ground_truth.txt and meta.mat as the development kit has them."""
    from scipy.io import savemat

    folder.mkdir(parents=True, exist_ok=True)
    ids = ilsvrc_ids(images)
    lines = [f"{ids[label]}\n" for _, label in labels]
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(lines), encoding="utf-8")
    fields: list[tuple[str, Any]] = [
        ("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O"),
    ]  # fmt: skip
    rows = [(ids[label], images.wnids[label], images.words[label], "", 0) for label in range(images.classes)]
    rows = [*sorted(rows), (images.classes + 1, "n00001740", "entity", "", 2)]  # an inner node, as in WordNet
    synsets = np.empty((len(rows), 1), dtype=fields)
    for place, row in enumerate(rows):
        synsets[place, 0] = row
    savemat(folder / "meta.mat", {"synsets": synsets})


def write_val_solution(path: Path, images: SyntheticSet, labels: Sequence[tuple[str, int]]) -> None:
    """Write Kaggle's LOC_val_solution.csv."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageId", "PredictionString"])
        for name, label in reversed(labels):  # in no order that counts, as the real one
            writer.writerow([name.removesuffix(".JPEG"), f"{images.wnids[label]} 1 2 30 40 "])


def write_words(path: Path, images: SyntheticSet) -> None:
    """Write Kaggle's LOC_synset_mapping.txt: a WNID and its words on each line."""
    lines = [f"{wnid} {words}\n" for wnid, words in zip(images.wnids, images.words, strict=True)]
    path.write_text("".join(lines), encoding="utf-8")


def write_parquet(root: Path, images: SyntheticSet, *, shards: int = 3, row_group_size: int = 100) -> None:
    """Write ``root/data/train-00000-of-0000N.parquet`` and ``validation-...`` as on the Hugging Face hub.

    The rows are in a mixed order and the file names carry the class, as in its imagenet-1k.
    """
    with needs("writing parquet files", "pyarrow", "parquet"):
        import pyarrow.parquet  # noqa: F401  (before anything is written)
    folder = root / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for split, files in (("train", images.train()), ("validation", images.validation())):
        rows = [
            (f"{name.removesuffix('.JPEG')}_{images.wnids[label]}.JPEG", label, data)
            for name, label, data in files
        ]
        order = np.random.default_rng([images.seed, 3]).permutation(len(rows))
        for number, places in enumerate(np.array_split(order, shards)):
            path = folder / f"{split}-{number:05d}-of-{shards:05d}.parquet"
            write_shard(path, [rows[place] for place in places], images.words, row_group_size)


def write_shard(
    path: Path,
    rows: Sequence[tuple[str | None, int, bytes | None]],
    class_names: Sequence[str] | None,
    row_group_size: int = 100,
) -> None:
    """Write one parquet file with the columns and the metadata of an image data set of Hugging Face.

    ``rows`` are (file name, label, file). Without ``class_names`` there is no metadata.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "image": pa.array([{"bytes": data, "path": name} for name, _, data in rows], kind),
            "label": pa.array([label for _, label, _ in rows], pa.int64()),
        }
    )
    if class_names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": list(class_names), "_type": "ClassLabel"}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(metadata)
    pq.write_table(table, path, row_group_size=row_group_size)


def write_layout(root: Path, layout: Layout, images: SyntheticSet) -> None:
    """Write the images in one of the ``LAYOUTS``."""
    with naming(root):
        {"folder": write_folder, "tars": write_tars, "parquet": write_parquet}[layout](root, images)
