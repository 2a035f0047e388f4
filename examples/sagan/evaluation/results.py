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
from sagan.evaluation.evaluator import Evaluation, Evaluator, Figure
from sagan.evaluation.real_features import RealFacts

RESULTS = "results.md"
_HEADER = """\
| recipe | iteration | weights | figures | protocol |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Subject:
    """What was evaluated.

    Attributes:
        source: the checkpoint, or the run's folder where it was evaluated in training.
        iteration: how long it was trained.
        recipe: of its run.
        device: where it was evaluated, in words.
    """

    source: Path
    iteration: int
    recipe: str
    device: str


def about_reals(evaluator: Evaluator, cache: Path) -> str:
    """Return where the features of the reals are, and the reals' own figures, for a terminal."""
    facts = evaluator.facts
    how = "read from" if facts.from_cache else "kept in"
    world = _reals_own(facts, evaluator.split, proxy=evaluator.proxy)
    return "\n".join([f"Features of {facts.count:,} reals {how} {cache}", *world])


def table(evaluation: Evaluation, subject: Subject) -> str:
    """Return the figures with the reals' own, for a terminal."""
    protocol, reals = evaluation.protocol, evaluation.reals
    weights = "averaged weights" if protocol.weights == "ema" else "raw weights"
    width = max(len(figure.name) for figure in evaluation.figures)
    lines = [
        f"{subject.source}: iteration {subject.iteration}, {weights}",
        *(f"  {figure.name:<{width}}  {_number(figure)}" for figure in evaluation.figures),
        *_reals_own(reals, protocol.real_split, proxy=protocol.proxy),
    ]
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
        "source": str(subject.source),
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
    before = results.read_text() if results.exists() else _HEADER
    row = markdown_row(evaluation, subject) + "\n"
    if row not in before:  # a resumed run may evaluate an iteration again
        results.write_text(before + row)
    return path


def _reals_own(reals: RealFacts, split: str, *, proxy: bool) -> list[str]:
    """Return what the reals score themselves: how good generated images could become."""
    lines = []
    if reals.inception_score is not None:
        mean, deviation = reals.inception_score
        lines.append(f"    Inception Score {mean:.2f} +- {deviation:.2f}")
    if reals.half_distance is not None:
        distance = "proxy's Frechet distance" if proxy else "FID"
        lines.append(f"    {distance} of a random half to the other {reals.half_distance:.4g}")
    verdict = "which themselves have" if lines else "too few for figures of their own"
    return [f"  against {reals.count:,} images of {split}, {verdict}", *lines]


def device_name(device: torch.device) -> str:
    """Return what a device is, in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _number(figure: Figure) -> str:
    digits = {"is": ".2f", "kid": ".5f", "precision": ".4f", "recall": ".4f"}.get(figure.metric, ".3f")
    text = f"{figure.value:{digits}}"
    return text if figure.deviation is None else f"{text} +- {figure.deviation:{digits}}"
