"""Images a second: preparing against Pillow alone, and reading a prepared set against loaders that decode JPEG.

    python -m benchmarks.bench_data [--quick]

Generated images of ImageNet's sizes; see benchmarks/README.md.
"""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import harness, report
from sagan.data import ImageDataset, ImageFolderDataset, PackedDataset, make_loader, scan_image_tree, verify
from sagan.data.prefetch import usable_cpus
from sagan.prepare import Prepared, SourceOptions, list_source, prepare
from sagan.prepare.synthetic import Layout, SyntheticSet, write_layout

BATCH = 256
PREPARE, READ, READ_COLD = "prepare", "random batches, warm", "random batches, cold"
Pixels = npt.NDArray[np.uint8]
Turn = Callable[[], float]  # returns the seconds for BATCH images


@dataclass(frozen=True)
class Scale:
    """How much to measure."""

    resolution: int = 128  # side of the prepared images
    # What is generated.
    images: SyntheticSet = field(default_factory=lambda: SyntheticSet(classes=20, images=120, val_images=0))
    copies: int = 6  # how many times the set that is read repeats each prepared image
    rounds: int = 5  # turns of each contender
    prepare_rounds: int = 7  # turns where a set is prepared, whose times scatter more
    batches: int = 6  # batches of one turn of a loader that decodes; fast readers take ten times as many


QUICK = Scale(
    32,
    SyntheticSet(classes=4, images=80, val_images=0, scale=0.3),
    copies=2,
    rounds=2,
    prepare_rounds=2,
    batches=2,
)


def pillow_alone(path: Path, resolution: int) -> Pixels:
    """Decode, crop and resize one file, and nothing else."""
    with Image.open(path) as image:
        rgb = image.convert("RGB")
        side = min(rgb.size)
        left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
        square = rgb.crop((left, top, left + side, top + side))
        return np.asarray(square.resize((resolution, resolution), Image.Resampling.BILINEAR))


def first_value(path: Path, resolution: int) -> int:
    """Return a number that needs the whole image to be made, in place of the image."""
    return int(pillow_alone(path, resolution)[0, 0, 0])


def time_pillow(paths: Sequence[Path], resolution: int, workers: int) -> float:
    """Return the seconds for BATCH images by Pillow alone, on that many processes, which run already."""
    decode = partial(first_value, resolution=resolution)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        list(pool.map(decode, paths[: 32 * workers], chunksize=32))
        start = time.perf_counter()
        list(pool.map(decode, paths, chunksize=32))
        return (time.perf_counter() - start) * BATCH / len(paths)


def measure_prepare(root: Path, scale: Scale, results: report.Results) -> None:
    """Measure preparing from each layout against Pillow alone."""
    workers = usable_cpus()
    sources: dict[Layout, Path] = {
        "folder": root / "folder" / "train",
        "tars": root / "tars" / "ILSVRC2012_img_train.tar",
    }
    if importlib.util.find_spec("pyarrow"):
        sources["parquet"] = root / "parquet"
    for layout in sources:
        write_layout(root / layout, layout, scale.images)
    paths = list(scan_image_tree(sources["folder"]).paths)
    shuffled = [paths[place] for place in np.random.default_rng(0).permutation(len(paths))]
    made: dict[Layout, Prepared] = {}
    decoding: dict[str, list[float]] = {f"ours: {layout}": [] for layout in sources}

    def turn(layout: Layout) -> float:
        out = root / f"{layout}-prepared"
        shutil.rmtree(out, ignore_errors=True)
        start = time.perf_counter()
        listing = list_source(str(sources[layout]), SourceOptions(), workers=workers)
        made[layout] = prepare(listing, out, resolution=scale.resolution, workers=workers)
        seconds = time.perf_counter() - start
        decoding[f"ours: {layout}"].append(made[layout].packed / made[layout].seconds)
        return seconds * BATCH / len(paths)

    contenders: dict[str, Turn] = {
        "Pillow alone": partial(time_pillow, shuffled, scale.resolution, workers),
        **{f"ours: {layout}": partial(turn, layout) for layout in sources},
    }
    case = f"{len(paths)} files to {scale.resolution} pixels, {workers} processes"
    record = alternate(PREPARE, case, contenders, scale.prepare_rounds)
    for name, rates in decoding.items():
        record["contenders"][name]["decoding_images_per_s"] = statistics.median(rates[1:])
    check_prepared(made, paths, scale.resolution)
    results.add(record)


def check_prepared(made: Mapping[Layout, Prepared], paths: Sequence[Path], resolution: int) -> None:
    """Check that every set is sound and holds what Pillow alone makes of the files."""
    checksums = {each.manifest.checksum for each in made.values()}
    if len(checksums) != 1:
        raise harness.WrongResultError(f"the layouts' sets differ: {checksums}")
    for each in made.values():
        if wrong := verify(each.manifest.folder):
            raise harness.WrongResultError("; ".join(wrong))
    images = np.load(made["folder"].manifest.folder / "images.npy", mmap_mode="r")
    for row in range(0, len(paths), 7):
        if not np.array_equal(images[row].transpose(1, 2, 0), pillow_alone(paths[row], resolution)):
            raise harness.WrongResultError(f"image {row} is not what Pillow makes of {paths[row].name}")


def prepare_enlarged(root: Path, scale: Scale) -> Path:
    """Prepare a set that repeats each image, too large for a CPU's cache."""
    for path in scan_image_tree(root / "folder" / "train").paths:
        folder = root / "enlarged" / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        for copy in range(scale.copies):
            (folder / f"{path.stem}.{copy}{path.suffix}").hardlink_to(path)
    listing = list_source(str(root / "enlarged"), SourceOptions(), workers=usable_cpus())
    made = prepare(listing, root / "enlarged-prepared", resolution=scale.resolution)
    return made.manifest.folder


class PlainImageFolder(Dataset[tuple[Tensor, int]]):
    """The usual image folder: a file opened, cropped and resized for each index."""

    def __init__(self, root: Path, resolution: int) -> None:
        classes = sorted(path for path in root.iterdir() if path.is_dir())
        self.files = [
            (path, label) for label, folder in enumerate(classes) for path in sorted(folder.iterdir())
        ]
        self.resolution = resolution

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        pixels = pillow_alone(path, self.resolution)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), label


def time_stream(stream: Iterator[Any], batches: int) -> float:
    """Return the seconds for a batch of a stream that runs already, over so many of them."""
    for _ in range(4):  # what was fetched ahead before the clock started
        next(stream)
    start = time.perf_counter()
    for _ in range(batches):
        next(stream)
    return (time.perf_counter() - start) / batches


def drop_from_cache(path: Path) -> None:
    """Make the system forget a file that no process has mapped."""
    gc.collect()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_warm(root: Path, packed: Path, scale: Scale, results: report.Results) -> None:
    """Measure random batches of a prepared set in the system's cache, and of JPEG files through two loaders."""
    tree_root = root / "folder" / "train"
    dataset = PackedDataset(packed)
    check_readers(dataset, tree_root, scale)
    workers, fast = usable_cpus(), 10 * scale.batches
    rng = np.random.default_rng(1)
    draws = rng.integers(0, len(dataset), (fast, BATCH))
    array = np.load(packed / "images.npy", mmap_mode="r")
    decoder = ImageFolderDataset(scan_image_tree(tree_root), scale.resolution, cache_mib=0)

    def our_loader(dataset: ImageDataset, num_workers: int, batches: int) -> float:
        loader = make_loader(dataset, batch_size=BATCH, seed=0, num_workers=num_workers)
        return time_stream(loader, batches)

    def plain_loader() -> float:
        plain = PlainImageFolder(tree_root, scale.resolution)
        indices = rng.integers(0, len(plain), BATCH * (scale.batches + 20)).tolist()
        loader = DataLoader(plain, BATCH, sampler=indices, num_workers=workers)
        return time_stream(iter(loader), scale.batches)

    contenders: dict[str, Turn] = {
        "plain ImageFolder loader": plain_loader,
        "ours: JPEG loader": partial(our_loader, decoder, workers, scale.batches),
        "numpy memory map": partial(time_draws, array.__getitem__, draws),
        "ours: packed, fetch": partial(time_draws, dataset.fetch, draws),
        "ours: packed, loader": partial(our_loader, dataset, 0, fast),
        "ours: packed, loader of 1 process": partial(our_loader, dataset, 1, fast),
    }
    results.add(alternate(READ, describe(dataset), contenders, scale.rounds))


def measure_cold(packed: Path, scale: Scale, results: report.Results) -> None:
    """Measure random batches of a prepared set that the system's cache does not hold; nothing may have it mapped."""
    if not hasattr(os, "posix_fadvise"):
        return
    array = packed / "images.npy"
    case = describe(PackedDataset(packed))
    count = len(np.load(array, mmap_mode="r"))
    draws = np.random.default_rng(3).integers(0, count, (2 * scale.batches, BATCH))

    def turn(open_set: Callable[[], Callable[[Any], object]]) -> float:
        drop_from_cache(array)
        return time_draws(open_set(), draws)

    contenders: dict[str, Turn] = {
        "numpy memory map": partial(turn, lambda: np.load(array, mmap_mode="r").__getitem__),
        "ours: packed, fetch": partial(turn, lambda: PackedDataset(packed).fetch),
    }
    results.add(alternate(READ_COLD, case, contenders, scale.rounds))


def time_draws(read: Callable[[Any], object], draws: npt.NDArray[np.int64]) -> float:
    """Return the seconds that reading one of these batches takes."""
    start = time.perf_counter()
    for indices in draws:
        read(indices)
    return (time.perf_counter() - start) / len(draws)


def describe(dataset: PackedDataset) -> str:
    """Return the case's name."""
    size_mib = len(dataset) * 3 * dataset.resolution**2 / report.MIB
    return f"{BATCH} of {len(dataset)} images of {dataset.resolution} pixels ({size_mib:.0f} MiB)"


def check_readers(dataset: PackedDataset, tree_root: Path, scale: Scale) -> None:
    """Check that the set and both loaders of JPEG serve the same images with the same labels."""
    plain = PlainImageFolder(tree_root, scale.resolution)
    decoder = ImageFolderDataset(scan_image_tree(tree_root), scale.resolution, cache_mib=0)
    indices = np.random.default_rng(2).integers(0, len(plain), 40).tolist()
    images, labels = dataset.fetch([index * scale.copies for index in indices])
    others = decoder.fetch(indices)
    if not (torch.equal(images, others[0]) and torch.equal(labels, others[1])):
        raise harness.WrongResultError("the prepared set and the folder serve different images")
    for place, index in enumerate(indices):
        image, label = plain[index]
        if not torch.equal(image, images[place]) or label != labels[place]:
            raise harness.WrongResultError(f"the plain loader's image {index} differs")


def alternate(suite: str, case: str, contenders: Mapping[str, Turn], rounds: int) -> report.Row:
    """Run the contenders in turn, after one turn that does not count; return the record of the case.

    The first contender is the baseline.
    """
    times_s: dict[str, list[float]] = {name: [] for name in contenders}
    for name in harness.in_turn(list(contenders), rounds + 1):
        times_s[name].append(contenders[name]())
    counted = {name: times[1:] for name, times in times_s.items()}
    return harness.timed_record(suite, case, next(iter(contenders)), counted, BATCH)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write everything; return 1 if a result was wrong."""
    parser = harness.argument_parser("data", __doc__)
    parser.add_argument("--folder", type=Path, help="where to put 2 GB of images while it runs")
    options = parser.parse_args(arguments)
    results = harness.open_results(options)
    scale = QUICK if options.quick else Scale()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = Path(folder)
        try:
            measure_prepare(root, scale, results)
            packed = prepare_enlarged(root, scale)
            measure_warm(root, packed, scale, results)
            measure_cold(packed, scale, results)
        except harness.WrongResultError as error:
            print(f"wrong: {error}")
            return 1
    return results.finish()


if __name__ == "__main__":
    raise SystemExit(main())
