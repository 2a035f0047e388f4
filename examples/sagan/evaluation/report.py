"""An evaluation as a table, as JSON beside its run, and as a line of Markdown."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sagan_layers
from sagan.evaluation.evaluator import Evaluation, Figure

RESULTS = "results.md"
_HEADER = """\
| recipe | iteration | weights | figures | protocol |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Subject:
    """What was evaluated.

    Attributes:
        checkpoint: the file.
        iteration: how long it was trained.
        recipe: of its run.
        device: where it was evaluated, in words.
    """

    checkpoint: Path
    iteration: int
    recipe: str
    device: str


def table(evaluation: Evaluation, subject: Subject) -> str:
    """Return the figures with the reals' own, for a terminal."""
    protocol, reals = evaluation.protocol, evaluation.reals
    weights = "averaged weights" if protocol.weights == "ema" else "raw weights"
    width = max(len(figure.name) for figure in evaluation.figures)
    lines = [
        f"{subject.checkpoint}: iteration {subject.iteration}, {weights}",
        *(f"  {figure.name:<{width}}  {_number(figure)}" for figure in evaluation.figures),
        f"  against {reals.count:,} images of {protocol.real_split}, which among themselves have:",
    ]
    if reals.inception_score is not None:
        mean, deviation = reals.inception_score
        lines.append(f"    Inception Score {mean:.2f} +- {deviation:.2f}")
    distance = "Frechet distance in the proxy's features" if protocol.proxy else "FID"
    if reals.half_distance is not None:
        lines.append(f"    {distance} of a random half to the other {reals.half_distance:.4g}")
    if evaluation.by_class:
        ordered = sorted(evaluation.by_class.items(), key=lambda item: item[1])
        lines.append("  best classes:  " + ", ".join(f"{name} {value:.4g}" for name, value in ordered[:3]))
        lines.append("  worst classes: " + ", ".join(f"{name} {value:.4g}" for name, value in ordered[-3:]))
    if evaluation.classes_left_out:
        lines.append(
            f"  left out of intra-FID, with fewer than 2 reals: {', '.join(evaluation.classes_left_out)}"
        )
    if reals.replaced:
        lines.append(f"  {reals.replaced} unreadable reals; the next of their class took their places")
    if protocol.proxy:
        lines.append("  PROXY figures: for comparing checkpoints on this machine, not with published FIDs")
    lines.append(f"  protocol {protocol.identity}, {evaluation.seconds:.0f} s")
    return "\n".join(lines)


def markdown_row(evaluation: Evaluation, subject: Subject) -> str:
    """Return a row of a Markdown table: run, iteration, weights, figures with their names, protocol."""
    figures = ", ".join(f"{figure.name} **{_number(figure)}**" for figure in evaluation.figures)
    protocol = evaluation.protocol
    return (
        f"| {subject.recipe} | {subject.iteration:,} | {protocol.weights} | {figures} | "
        f"seed {protocol.sample_seed}, {protocol.identity} |"
    )


def save(evaluation: Evaluation, subject: Subject, folder: Path) -> Path:
    """Write everything to a JSON file named by iteration and protocol, and a line to results.md.

    Returns:
        The path of the JSON file, which appears once it is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"iteration_{subject.iteration:09d}_{evaluation.protocol.identity}.json"
    values: dict[str, Any] = {
        "checkpoint": str(subject.checkpoint),
        "iteration": subject.iteration,
        "recipe": subject.recipe,
        **evaluation.to_dict(),
        "device": subject.device,
        "versions": {
            "sagan_layers": sagan_layers.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    temporary.replace(path)
    results = folder / RESULTS
    with results.open("a") as file:
        if file.tell() == 0:
            file.write(_HEADER)
        file.write(markdown_row(evaluation, subject) + "\n")
    return path


def device_name(device: torch.device) -> str:
    """Return what a device is, in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _number(figure: Figure) -> str:
    digits = {"is": ".2f", "kid": ".5f", "precision": ".4f", "recall": ".4f"}.get(figure.metric, ".3f")
    text = f"{figure.value:{digits}}"
    return text if figure.deviation is None else f"{text} +- {figure.deviation:{digits}}"
