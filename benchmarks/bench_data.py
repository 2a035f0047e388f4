"""Images a second: preparing against Pillow alone, and reading a prepared set against loaders that decode JPEG.

    python -m benchmarks.bench_data [--quick]

Generated images of ImageNet's sizes; see benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import harness
from sagan.data import ImageFolderDataset, PackedDataset, make_loader, scan_image_tree, verify
from sagan.data.packed import content_checksum, file_entry, image_header
from sagan.data.prefetch import usable_cpus
from sagan.prepare import Prepared, SourceOptions, list_source, prepare
from sagan.prepare.synthetic import SyntheticSet, write_layout

BATCH = 256
PREPARE, READ, READ_COLD = "prepare", "random batches, warm", "random batches, cold"
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Scale:
    """How much to measure.

    Attributes:
        resolution: side of the prepared images.
        images: what is generated.
        copies: how many times each prepared image stands in the set that is read.
        rounds: turns of each contender.
        prepare_rounds: likewise where a set is prepared, whose times scatter more.
        batches: batches of one turn of a loader that decodes; fast readers take ten times as many.
    """

    resolution: int = 128
    images: SyntheticSet = field(default_factory=lambda: SyntheticSet(classes=20, images=120, val_images=0))
    copies: int = 6
    rounds: int = 5
    prepare_rounds: int = 7
    batches: int = 6


QUICK = Scale(
    32,
    SyntheticSet(classes=4, images=80, val_images=0, scale=0.3),
    copies=2,
    rounds=2,
    prepare_rounds=2,
    batches=2,
)


# --- preparing --------------------------------------------------------------------------------------------


def pillow_alone(path: Path, resolution: int) -> Pixels:
    """Decode, crop and resize one file, and nothing else."""
    with Image.open(path) as image:
        rgb = image.convert("RGB")
        side = min(rgb.size)
        left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
        square = rgb.crop((left, top, left + side, top + side))
        return np.asarray(square.resize((resolution, resolution), Image.Resampling.BILINEAR))


def decode_all(task: tuple[Sequence[Path], int]) -> float:
    """Run Pillow over some files; return something of every image, so that none is left out."""
    paths, resolution = task
    return sum(float(pillow_alone(path, resolution)[0, 0, 0]) for path in paths)


def time_pillow(paths: Sequence[Path], resolution: int, workers: int) -> float:
    """Return the seconds that Pillow alone takes on that many processes, which have begun before."""
    tasks = [(paths[start : start + 32], resolution) for start in range(0, len(paths), 32)]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        list(pool.map(decode_all, tasks[:workers]))
        start = time.perf_counter()
        list(pool.map(decode_all, tasks))
        return time.perf_counter() - start


def measure_prepare(root: Path, scale: Scale, results: harness.Results) -> Path:
    """Measure preparing from each layout against Pillow alone; return one of the prepared sets."""
    workers = usable_cpus()
    sources = {"folder": root / "folder" / "train", "tars": root / "tars" / "ILSVRC2012_img_train.tar"}
    if importlib.util.find_spec("pyarrow"):
        sources["parquet"] = root / "parquet"
    for layout in sources:
        write_layout(root / layout, layout, scale.images)
    paths = list(scan_image_tree(sources["folder"]).paths)
    shuffled = [paths[place] for place in np.random.default_rng(0).permutation(len(paths))]
    made: dict[str, Prepared] = {}
    decoding: dict[str, list[float]] = {f"ours: {layout}": [] for layout in sources}

    def turn(layout: str) -> float:
        out = root / f"{layout}-prepared"
        shutil.rmtree(out, ignore_errors=True)
        start = time.perf_counter()
        listing = list_source(str(sources[layout]), SourceOptions(workers=workers))
        made[layout] = prepare(listing, out, resolution=scale.resolution, workers=workers)
        seconds = time.perf_counter() - start
        decoding[f"ours: {layout}"].append(made[layout].packed / made[layout].seconds)
        return seconds

    def layout_turn(layout: str) -> Callable[[], float]:
        return lambda: turn(layout)

    contenders: dict[str, Callable[[], float]] = {
        "Pillow alone": lambda: time_pillow(shuffled, scale.resolution, workers),
        **{f"ours: {layout}": layout_turn(layout) for layout in sources},
    }
    identity = {
        "suite": PREPARE,
        "case": f"{len(paths)} files to {scale.resolution} pixels, {workers} processes",
    }
    rows = alternate(
        contenders, dict.fromkeys(contenders, len(paths)), scale.prepare_rounds, identity, "Pillow alone"
    )
    for row in rows:
        if rates := decoding.get(row["contender"]):
            row["decoding_images_per_s"] = statistics.median(rates[1:])
    check_prepared(made, paths, scale.resolution)
    results.add(rows)
    return made["folder"].manifest.folder


def check_prepared(made: Mapping[str, Prepared], paths: Sequence[Path], resolution: int) -> None:
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


# --- reading ----------------------------------------------------------------------------------------------


def enlarged(folder: Path, copies: int, out: Path) -> Path:
    """Write a prepared set in which each image of another stands several times, too large for a CPU's cache."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    images = np.load(folder / "images.npy", mmap_mode="r")
    out.mkdir()
    with (out / "images.npy").open("wb") as file:
        file.write(image_header(len(images) * copies, manifest["resolution"]))
        for image in images:
            file.write(image.tobytes() * copies)
    labels, digests = (
        np.repeat(np.load(folder / f"{name}.npy"), copies, axis=0) for name in ("labels", "digests")
    )
    np.save(out / "labels.npy", labels)
    np.save(out / "digests.npy", digests)
    for name in ("names.txt", "report.json", "report.txt"):
        (out / name).write_bytes((folder / name).read_bytes())
    files = {name: file_entry((out / name).read_bytes()) for name in manifest["files"]}
    manifest |= {
        "num_images": len(labels),
        "images_per_class": [count * copies for count in manifest["images_per_class"]],
        "counts": {**manifest["counts"], "packed": len(labels)},
        "checksum": content_checksum(manifest["resolution"], manifest["class_names"], labels, digests),
        "files": files,
    }
    (out / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    if wrong := verify(out):
        raise harness.WrongResultError("; ".join(wrong))
    return out


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
    """Return the seconds for so many batches of a stream that runs already."""
    for _ in range(4):  # what was fetched ahead before the clock started
        next(stream)
    start = time.perf_counter()
    for _ in range(batches):
        next(stream)
    return time.perf_counter() - start


def drop_from_cache(path: Path) -> None:
    """Make the system forget a file that no process has mapped."""
    gc.collect()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_warm(root: Path, packed: Path, scale: Scale, results: harness.Results) -> None:
    """Measure random batches from a prepared set in the system's cache, and from JPEG files through two loaders."""
    tree_root = root / "folder" / "train"
    dataset = PackedDataset(packed)
    check_readers(dataset, tree_root, scale)
    workers, fast = usable_cpus(), 10 * scale.batches
    rng = np.random.default_rng(1)
    draws = rng.integers(0, len(dataset), (fast, BATCH))
    array = np.load(packed / "images.npy", mmap_mode="r")
    decoder = ImageFolderDataset(scan_image_tree(tree_root), scale.resolution, cache_mib=0)

    def our_loader(
        of: PackedDataset | ImageFolderDataset, num_workers: int, batches: int
    ) -> Callable[[], float]:
        return lambda: time_stream(
            make_loader(of, batch_size=BATCH, seed=0, num_workers=num_workers), batches
        )

    def plain() -> float:
        plain_set = PlainImageFolder(tree_root, scale.resolution)
        indices = rng.integers(0, len(plain_set), BATCH * (scale.batches + 20)).tolist()
        loader = DataLoader(plain_set, BATCH, sampler=indices, num_workers=workers)
        return time_stream(iter(loader), scale.batches)

    contenders = {
        "plain ImageFolder loader": (plain, scale.batches),
        "ours: JPEG loader": (our_loader(decoder, workers, scale.batches), scale.batches),
        "numpy memory map": (lambda: time_draws(array.__getitem__, draws), fast),
        "ours: packed, fetch": (lambda: time_draws(dataset.fetch, draws), fast),
        "ours: packed, loader": (our_loader(dataset, 0, fast), fast),
        "ours: packed, loader of 1 process": (our_loader(dataset, 1, fast), fast),
    }
    rows = alternate(
        {name: run for name, (run, _) in contenders.items()},
        {name: count * BATCH for name, (_, count) in contenders.items()},
        scale.rounds,
        {"suite": READ, "case": describe(dataset)},
        "plain ImageFolder loader",
    )
    results.add(rows)


def measure_cold(packed: Path, scale: Scale, results: harness.Results) -> None:
    """Measure random batches from a prepared set that the system has forgotten; nothing may have it mapped."""
    if not hasattr(os, "posix_fadvise"):
        return
    case = describe(PackedDataset(packed))
    count = PackedDataset(packed).manifest.num_images
    draws = np.random.default_rng(3).integers(0, count, (2 * scale.batches, BATCH))

    def ours() -> float:
        drop_from_cache(packed / "images.npy")
        return time_draws(PackedDataset(packed).fetch, draws)

    def memory_map() -> float:
        drop_from_cache(packed / "images.npy")
        return time_draws(np.load(packed / "images.npy", mmap_mode="r").__getitem__, draws)

    runs = {"numpy memory map": memory_map, "ours: packed, fetch": ours}
    identity = {"suite": READ_COLD, "case": case}
    results.add(alternate(runs, dict.fromkeys(runs, draws.size), scale.rounds, identity, "numpy memory map"))


def time_draws(read: Callable[[Any], object], draws: npt.NDArray[np.int64]) -> float:
    """Return the seconds that reading these batches takes."""
    start = time.perf_counter()
    for indices in draws:
        read(indices)
    return time.perf_counter() - start


def describe(dataset: PackedDataset) -> str:
    """Return the case's name."""
    size_mib = len(dataset) * 3 * dataset.resolution**2 / harness.MIB
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


# --- both -------------------------------------------------------------------------------------------------


def alternate(
    contenders: Mapping[str, Callable[[], float]],
    images: Mapping[str, int],
    rounds: int,
    identity: Mapping[str, str],
    baseline: str,
) -> list[harness.Row]:
    """Run the contenders in turn, after one turn that does not count; return a row of rates for each.

    Args:
        contenders: each returns the seconds of one turn.
        images: how many images a turn of each is.
        rounds: turns that count.
        identity: suite and case.
        baseline: the contender that ratios are taken to.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            taken = contenders[name]()
            if turn:
                seconds[name].append(taken)
    rows: list[harness.Row] = []
    for name in names:
        times_ms = [1e3 * value * BATCH / images[name] for value in seconds[name]]
        timing = harness.Timing(times_ms)
        rows.append(
            {
                **identity,
                "contender": name,
                "status": "ok",
                "time_ms": timing.median_ms(),  # for 256 images
                "time_quartiles_ms": list(timing.quartiles_ms()),
                "images_per_s": 1e3 * BATCH / timing.median_ms(),
                "images_per_s_quartiles": [1e3 * BATCH / each for each in reversed(timing.quartiles_ms())],
                "samples": len(times_ms),
            }
        )
    base = next(row["images_per_s"] for row in rows if row["contender"] == baseline)
    for row in rows:
        row["rate_ratio"] = row["images_per_s"] / base
        row["time_ratio"] = 1 / row["rate_ratio"]
        low, high = row["images_per_s_quartiles"]
        print(
            f"{row['suite']} | {row['contender']}: {row['images_per_s']:,.0f} img/s [{low:,.0f}, {high:,.0f}], "
            f"{row['rate_ratio']:.2f} of {baseline}",
            flush=True,
        )
    return rows


def markdown(data: harness.Row) -> str:
    """Return the rates as Markdown, a table a suite."""
    found = data["environment"]
    lines = [
        f"{found['cpu']}, {found['cores_used']} cores; torch {found['torch']}, Pillow {found['pillow']}, "
        f"Python {found['python']}, commit {str(found['commit'])[:12]}{' (dirty)' if found['dirty'] else ''}, "
        f"{found['date']}.",
        "",
    ]
    for suite in dict.fromkeys(row["suite"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["suite"] == suite]
        lines += [f"## {suite}", "", f"{rows[0]['case']}.", ""]
        lines += ["| contender | images/s | quartiles | of the first |", "|---|---:|---:|---:|"]
        for row in rows:
            low, high = row["images_per_s_quartiles"]
            decoding = row.get("decoding_images_per_s")
            note = f" (while decoding {decoding:,.0f})" if decoding else ""
            lines.append(
                f"| {row['contender']} | {row['images_per_s']:,.0f}{note} | {low:,.0f} to {high:,.0f} "
                f"| {row['rate_ratio']:.2f} |"
            )
        lines.append("")
    return "\n".join(lines)


def plot(data: harness.Row, path: Path) -> Path | None:
    """Draw the rates as bars; nothing, with a line that says so, where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("No plot: matplotlib is not installed (pip install matplotlib).")
        return None
    suites = list(dict.fromkeys(row["suite"] for row in data["rows"]))
    counts = [sum(row["suite"] == suite for row in data["rows"]) for suite in suites]
    figure = Figure(figsize=(9, 1.3 + 0.45 * sum(counts)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(suites), 1, height_ratios=counts, squeeze=False)[:, 0]
    for panel, suite in zip(panels, suites, strict=True):
        rows = [row for row in data["rows"] if row["suite"] == suite]
        rates = [row["images_per_s"] for row in rows]
        colours = ["C0" if row["contender"].startswith("ours") else "0.6" for row in rows]
        bars = panel.barh([row["contender"] for row in rows], rates, color=colours)
        panel.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3)
        panel.invert_yaxis()
        panel.set_title(suite, loc="left", fontsize=10)
        panel.set_xscale("log" if suite == READ else "linear")
        panel.set_xlim(right=max(rates) * (4 if suite == READ else 1.2))
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("images a second")
    found = data["environment"]
    figure.suptitle(f"{found['cpu']}, {found['cores_used']} cores", fontsize=10)
    figure.savefig(path, dpi=120)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write JSON, table and plot; return 1 if a result was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_data", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="few small images: is everything in order?")
    parser.add_argument("--device", choices=["cpu"], default="cpu", help="data is read by the CPU")
    parser.add_argument("--out", type=Path, default=harness.ROOT / "benchmarks" / "results" / "data_cpu.json")
    parser.add_argument("--folder", type=Path, help="where to put some 2 GB of images while it runs")
    options = parser.parse_args(arguments)
    results = harness.Results(options.out, options.device)
    results.data["environment"]["pillow"] = PIL.__version__
    scale = QUICK if options.quick else Scale()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = Path(folder)
        try:
            prepared = measure_prepare(root, scale, results)
            packed = enlarged(prepared, scale.copies, root / "enlarged")
            measure_warm(root, packed, scale, results)
            measure_cold(packed, scale, results)
        except harness.WrongResultError as error:
            print(f"wrong: {error}")
            return 1
    results.finish()
    table = options.out.with_suffix(".md")
    table.write_text(markdown(results.data), encoding="utf-8")
    plot(results.data, options.out.with_name(f"{options.out.stem}_rates.png"))
    print(f"Wrote {options.out} and {table.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
