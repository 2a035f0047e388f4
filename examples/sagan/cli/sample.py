"""The subcommand ``sample``."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from sagan.distributed import pick_device
from sagan.errors import UserError, check_at_least, check_out_file, check_out_folder
from sagan.names import file_names
from sagan.rendezvous import launched
from sagan.report.figures import class_labels, enlargement, save_grid, save_image
from sagan.sampling import SAMPLES, TrainedGenerator, Weights, claim_folder, load_generator, numbered_samples
from sagan.sheets import Sheet, interpolation_sheet, truncation_sheet

_LEAST_TRUNCATION = 0.01  # drawing latents below it would take long


@dataclass(frozen=True)
class Sample:
    """Generate images from a trained run: a labelled grid or sheet, or a PNG for each image in a folder for its class.

    An interpolation leads from one latent to another along its rows, and from class to class down its columns. A
    truncation sweep has the same samples in each row, with latents redrawn beyond another threshold.

    Sample i depends only on the seed and i. Processes share the work with torchrun, or with --process and
    --num-processes, and write the same images as one process. Samples never go into a folder that holds others.

    Attributes:
        source: folder of a run, or a checkpoint.
        out: the PNG of a grid or sheet (or a folder for it), or the folder for the class folders.
        layout: "grid", "interpolation", "truncation" or "folders".
        count: number of images; a grid rounds up to whole rows and has at least one row for each of --classes. Sheets
            have about as many, and more if all --classes need them.
        classes: labels (numbers from 0) or names of the classes; by default all, and those that fit into a grid or
            sheet.
        seed: seed of the set of samples.
        weights: moving average ("ema"), current weights ("raw"), or the average if there is one ("auto").
        batch_size: images at a time.
        columns: images in a row of the grid or sheet.
        class_steps: rows between two classes of an interpolation, whose gains and biases are mixed.
        truncations: thresholds of a truncation sweep, "none" for none.
        device: "auto", "cpu", "cuda", ...
        process: number of this process, from 0; by default as torchrun says.
        num_processes: number of processes that share the work; by default as torchrun says.
    """

    source: Path
    out: Path = Path("samples")
    layout: Literal["grid", "interpolation", "truncation", "folders"] = "grid"
    count: int = 100
    classes: tuple[str, ...] = ()
    seed: int = 0
    weights: Weights = "auto"
    batch_size: int = 50
    columns: int = 10
    class_steps: int = 2
    truncations: tuple[str, ...] = ("0.25", "0.5", "1.0", "none")
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
    if command.layout != "folders" and count > 1:
        raise UserError(f"layout: expected 'folders' with several processes, got {command.layout!r}")
    truncations = _checked_sheet(command)
    if command.layout == "folders" or command.out.suffix.lower() != ".png":
        check_out_folder(command.out)
    else:
        check_out_file(command.out)
    trained = load_generator(command.source, pick_device(command.device), weights=command.weights)
    labels_in_use = trained.chosen_labels(command.classes)
    if command.layout != "folders":
        _check_picture_size(command, trained.config.network.resolution)
    if command.layout == "grid":
        return _sample_grid(command, trained, labels_in_use)
    if command.layout != "folders":
        return _sample_sheet(command, trained, labels_in_use, truncations)
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


def _check_picture_size(command: Sample, resolution: int) -> None:
    """Refuse a picture that takes much memory to make, and that other programs refuse to open."""
    most = (Image.MAX_IMAGE_PIXELS or 2**27) // (resolution * enlargement(resolution)) ** 2
    rows = {"interpolation": 1 + command.class_steps, "truncation": len(command.truncations)}
    least = len(command.classes) * rows.get(command.layout, 1) * command.columns
    count = max(command.count, least)
    if count > most:
        raise UserError(
            f"layout: expected 'folders' for more than {most:,} images of {resolution} pixels, got "
            f"{command.layout!r} for {count:,}"
        )


def _checked_sheet(command: Sample) -> list[float | None]:
    """Return the thresholds of truncation; raise :class:`UserError` for options that the layout does not take."""
    check_at_least(command, 0, "class_steps")
    defaults = {each.name: each.default for each in fields(command)}
    for name, layout in (("class_steps", "interpolation"), ("truncations", "truncation")):
        if command.layout != layout and getattr(command, name) != defaults[name]:
            raise UserError(f"{name}: expected layout {layout!r} with it, got {command.layout!r}")
    if command.layout == "interpolation" and command.columns < 2:
        raise UserError(f"columns: expected at least 2 for an interpolation, got {command.columns}")
    if not command.truncations:
        raise UserError("truncations: expected at least one threshold, got none")
    return [None if text == "none" else _threshold(text) for text in command.truncations]


def _threshold(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not _LEAST_TRUNCATION <= value < math.inf:
        raise UserError(
            f"truncations: expected numbers from {_LEAST_TRUNCATION} such as 0.5, or none, got {text!r}"
        )
    return value


def _sample_sheet(
    command: Sample, trained: TrainedGenerator, labels: torch.Tensor, truncations: list[float | None]
) -> int:
    path = _picture_path(command)
    rows, columns = -(-command.count // command.columns), command.columns
    sheet: Sheet
    if command.layout == "interpolation":
        if not command.classes:
            labels = _spread(labels, max(2, (rows + command.class_steps) // (1 + command.class_steps)))
        sheet = interpolation_sheet(
            trained,
            labels,
            rows=rows,
            columns=columns,
            class_steps=command.class_steps,
            seed=command.seed,
            batch_size=command.batch_size,
        )
    else:
        if not command.classes:
            labels = _spread(labels, max(1, rows // len(truncations)))
        sheet = truncation_sheet(
            trained, labels, truncations, columns=columns, seed=command.seed, batch_size=command.batch_size
        )
    save_grid(path, sheet.images, columns=columns, row_names=sheet.row_names)
    print(f"{len(sheet.images)} images written to {path} ({trained.description}, seed {command.seed})")
    return 0


def _spread(labels: torch.Tensor, most: int) -> torch.Tensor:
    """Return at most ``most`` of the labels, from the first to the last."""
    return labels if len(labels) <= most else labels[torch.linspace(0, len(labels) - 1, most).round().long()]


def _picture_path(command: Sample) -> Path:
    suffix = command.out.suffix.lower()
    if suffix != ".png" and suffix in Image.registered_extensions():
        raise UserError(f"out: expected a PNG or a folder, got {command.out}")
    return command.out if suffix == ".png" else command.out / f"{command.layout}.png"


def _sample_grid(command: Sample, trained: TrainedGenerator, labels_in_use: torch.Tensor) -> int:
    path = _picture_path(command)
    rows = max(-(-command.count // command.columns), len(command.classes))
    conditional = bool(trained.config.network.num_classes)
    if conditional and not command.classes:
        labels_in_use = _spread(labels_in_use, rows)
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
    save_grid(path, torch.stack(ordered), columns=command.columns, row_names=names)
    print(f"{len(ordered)} images written to {path} ({trained.description}, seed {command.seed})")
    return 0
