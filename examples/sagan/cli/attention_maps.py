"""The subcommand ``attention-maps``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sagan.distributed import pick_device
from sagan.errors import UserError, check_at_least, check_out_file
from sagan.report.figures import class_labels, default_points, draw_attention
from sagan.sampling import Weights, load_generator, sample_inputs


@dataclass(frozen=True)
class AttentionMaps:
    """Draw the attention maps of chosen points of generated images (figure 5 of the paper).

    Attributes:
        source: folder of a run, or a checkpoint.
        out: the PNG.
        count: number of images.
        points: query points as ROW,COLUMN in pixels of the image; by default the centre and four others.
        classes: labels (numbers from 0) or names of the classes to cycle through; by default all.
        seed: seed of the set of samples.
        weights: moving average ("ema"), current weights ("raw"), or the average if there is one ("auto").
        device: "auto", "cpu", "cuda", ...
    """

    source: Path
    out: Path = Path("attention_maps.png")
    count: int = 8
    points: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    seed: int = 0
    weights: Weights = "auto"
    device: str = "auto"


def run(command: AttentionMaps) -> int:
    """Run ``attention-maps`` and return the exit code."""
    check_out_file(command.out)
    check_at_least(command, 1, "count")
    trained = load_generator(command.source, pick_device(command.device), weights=command.weights)
    network = trained.config.network
    points = [_point(text) for text in command.points] or default_points(network.resolution)
    chosen = trained.chosen_labels(command.classes)
    latents, labels = sample_inputs(range(command.count), network, command.seed, chosen)
    names = class_labels(trained.class_names, labels.tolist()) if network.num_classes else None
    draw_attention(command.out, trained.generator, latents, labels, points, names=names)
    images = f"{command.count} images with {len(points)} maps each"
    print(f"{images} written to {command.out} ({trained.description})")
    return 0


def _point(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"points: expected ROW,COLUMN such as 16,20, got {text!r}")
    return int(parts[0]), int(parts[1])
