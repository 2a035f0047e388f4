"""The subcommand ``sample``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from sagan.distributed import pick_device
from sagan.errors import UserError, check_at_least
from sagan.names import file_names
from sagan.rendezvous import launched
from sagan.report.figures import class_labels, save_grid, save_image
from sagan.sampling import SAMPLES, TrainedGenerator, Weights, claim_folder, load_generator, numbered_samples


@dataclass(frozen=True)
class Sample:
    """Generate images from a trained run: one labelled grid, or a PNG for each image in a folder for its class.

    Sample i depends only on the seed and i. Processes share the work with torchrun, or with --process and
    --num-processes, and write the same images as one process. Samples never go into a folder that holds others.

    Attributes:
        source: folder of a run, or a checkpoint.
        out: the PNG of a grid (or a folder for grid.png), or the folder for the class folders.
        layout: "grid" or "folders".
        count: number of images; a grid rounds up to whole rows and has at least one row for each of --classes.
        classes: labels (numbers from 0) or names of the classes; by default all, and for a grid ten of them.
        seed: seed of the set of samples.
        weights: moving average ("ema"), current weights ("raw"), or the average if there is one ("auto").
        batch_size: images at a time.
        columns: images in a row of the grid.
        device: "auto", "cpu", "cuda", ...
        process: number of this process, from 0; by default as torchrun says.
        num_processes: number of processes that share the work; by default as torchrun says.
    """

    source: Path
    out: Path = Path("samples")
    layout: Literal["grid", "folders"] = "grid"
    count: int = 100
    classes: tuple[str, ...] = ()
    seed: int = 0
    weights: Weights = "auto"
    batch_size: int = 50
    columns: int = 10
    device: str = "auto"
    process: int | None = None
    num_processes: int | None = None


def run(command: Sample) -> int:
    """Run ``sample`` and return the exit code."""
    check_at_least(command, 1, "count", "batch_size", "columns", "num_processes")
    rank, count = launched()
    rank = rank if command.process is None else command.process
    count = count if command.num_processes is None else command.num_processes
    if not 0 <= rank < count:
        raise UserError(f"process: expected from 0 to {count - 1}, got {rank}")
    if command.layout == "grid" and count > 1:
        raise UserError("layout: expected 'folders' with several processes, got 'grid'")
    trained = load_generator(command.source, pick_device(command.device), weights=command.weights)
    labels_in_use = trained.chosen_labels(command.classes)
    if command.layout == "grid":
        return _sample_grid(command, trained, labels_in_use)
    claim_folder(command.out, trained, count=command.count, seed=command.seed, classes=labels_in_use.tolist())
    conditional = bool(trained.config.network.num_classes)
    folders = file_names([SAMPLES, *trained.class_names])[1:] if conditional else None
    written = 0
    for numbers, images, labels in numbered_samples(
        trained.generator,
        command.count,
        seed=command.seed,
        batch_size=command.batch_size,
        rank=rank,
        world_size=count,
        labels_in_use=labels_in_use,
    ):
        for number, image, label in zip(numbers, images, labels, strict=True):
            folder = folders[int(label)] if folders else "images"
            save_image(command.out / folder / f"{number:06d}.png", image)
            written += 1
    print(f"{written} images written to {command.out} ({trained.description}, seed {command.seed})")
    return 0


def _sample_grid(command: Sample, trained: TrainedGenerator, labels_in_use: torch.Tensor) -> int:
    suffix = command.out.suffix.lower()
    if suffix != ".png" and suffix in Image.registered_extensions():
        raise UserError(f"out: expected a PNG or a folder, got {command.out}")
    rows = max(-(-command.count // command.columns), len(command.classes))
    conditional = bool(trained.config.network.num_classes)
    if conditional and not command.classes and len(labels_in_use) > rows:
        places = torch.linspace(0, len(labels_in_use) - 1, rows).round().long()
        labels_in_use = labels_in_use[places]
    found: dict[int, list[torch.Tensor]] = {}
    # Samples cycle through the classes; whole cycles fill every row.
    per_class = -(-rows // len(labels_in_use)) * command.columns
    for _, images, labels in numbered_samples(
        trained.generator,
        per_class * len(labels_in_use),
        seed=command.seed,
        batch_size=command.batch_size,
        labels_in_use=labels_in_use,
    ):
        for image, label in zip(images, labels.tolist(), strict=True):
            found.setdefault(label, []).append(image)
    ordered = [image for label in labels_in_use.tolist() for image in found[label]][: rows * command.columns]
    row_labels = [label for label in labels_in_use.tolist() for _ in range(per_class // command.columns)]
    names = class_labels(trained.class_names, row_labels[:rows]) if conditional else None
    path = command.out if suffix == ".png" else command.out / "grid.png"
    save_grid(path, torch.stack(ordered), columns=command.columns, row_names=names)
    print(f"{len(ordered)} images written to {path} ({trained.description}, seed {command.seed})")
    return 0
