"""The subcommand ``export``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sagan.errors import UserError, check_out_file
from sagan.export import SUFFIXES, Format, exported_generator
from sagan.io import atomic_write
from sagan.sampling import Weights, load_generator


@dataclass(frozen=True)
class Export:
    """Write a trained generator for other programs: ONNX, a program of torch.export, or safetensors.

    The file is read and run again before the command ends. ONNX files and programs need nothing of this repository:
    they take latents [N, latent_dim] and labels [N] and return images from -1 to 1. All three hold the network's
    configuration and the names of the classes.

    Attributes:
        source: folder of a run, or a checkpoint.
        out: the file, whose name ends as the format's default: generator.onnx, .pt2 or .safetensors.
        format: "onnx", "torch-export" (a .pt2 file) or "safetensors" (the weights alone).
        weights: moving average ("ema"), current weights ("raw"), or the average if there is one ("auto").
        title: kept in the file.
    """

    source: Path
    out: Path | None = None
    format: Format = "onnx"
    weights: Weights = "auto"
    title: str = ""


def run(command: Export) -> int:
    """Run ``export`` and return the exit code."""
    out = command.out or Path(f"generator{SUFFIXES[command.format]}")
    check_out_file(out)
    if out.suffix != SUFFIXES[command.format]:
        raise UserError(
            f"out: expected a name that ends in {SUFFIXES[command.format]} for {command.format}, got {out}"
        )
    trained = load_generator(command.source, torch.device("cpu"), weights=command.weights)
    network = trained.config.network
    title = command.title or f"SAGAN generator of {network.resolution} pixels, iteration {trained.iteration}"
    contents, difference = exported_generator(trained, command.format, title)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as file:
        file.write(contents)
    print(
        f"{out} written ({trained.description}): {len(contents) / 1e6:.3g} MB; read and run again, its images differ "
        f"from the network's by at most {difference:.1e}"
    )
    return 0
