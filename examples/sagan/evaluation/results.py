"""What an evaluation found, and how it is shown and saved: a table, JSON beside the run, a row of Markdown."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sagan_layers
from sagan.errors import UserError
from sagan.evaluation.protocol import FIGURES, LOWER, Protocol
from sagan.evaluation.real_features import RealFacts
from sagan.io import atomic_write, atomic_write_text
from sagan.names import in_markdown, printable

RESULTS = "results.md"
_HEADER = """\
| recipe | iteration | weights | figures | protocol |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Figure:
    """One number, named by its protocol."""

    metric: str  # fid, is, kid, intra-fid, precision or recall
    name: str  # such as fid50k-train-tfinception
    value: float  # a mean if there is a deviation
    deviation: float | None = None  # over splits (is) or subsets (kid); None for the others

    def __str__(self) -> str:
        digits = {"is": ".2f", "kid": ".5f", "precision": ".4f", "recall": ".4f"}.get(self.metric, ".3f")
        text = f"{self.value:{digits}}"
        return text if self.deviation is None else f"{text} +- {self.deviation:{digits}}"


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    figures: tuple[Figure, ...]
    protocol: Protocol
    real_facts: RealFacts
    by_class: dict[str, float] | None  # FID of each class by its name, with intra-FID
    skipped_classes: tuple[str, ...]  # by intra-FID, with fewer than two real images
    samples_checksum: str  # SHA-256 of the SHA-256 of each generated image's pixels
    seconds: float

    def figure(self, metric: str | None = None) -> Figure:
        """Return the figure of a metric, by default the first.

        Raises:
            UserError: if it was not measured.
        """
        for figure in self.figures:
            if metric in (None, figure.metric):
                return figure
        raise UserError(
            f"metric: expected one of {', '.join(each.metric for each in self.figures)}; got {metric!r}"
        )

    def score(self, metric: str | None = None) -> float:
        """Return a figure, by default the first, negated if higher is better: a lower score is always better."""
        figure = self.figure(metric)
        direction, _ = FIGURES[figure.metric]
        return figure.value if direction == LOWER else -figure.value

    def scalars(self) -> dict[str, float]:
        """Return the figures by name, such as "evaluation/fid50k-train-tfinception", for a run's log."""
        return {f"evaluation/{figure.name}": figure.value for figure in self.figures}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return {
            "figures": {
                each.name: {"metric": each.metric, "value": each.value, "deviation": each.deviation}
                for each in self.figures
            },
            "protocol": {"identity": self.protocol.identity, **asdict(self.protocol)},
            "reals": asdict(self.real_facts),
            "by_class": self.by_class,
            "classes_left_out": list(self.skipped_classes),
            "samples_checksum": self.samples_checksum,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Subject:
    """What was evaluated, and on which device; ``source`` is a checkpoint, or the run's folder during training."""

    source: Path
    iteration: int
    recipe: str
    device: torch.device


def describe_real_images(facts: RealFacts, split: str, *, proxy: bool) -> str:
    """Return what the real images score themselves, which bounds what generated images can reach."""
    lines = []
    if facts.inception_score is not None:
        mean, deviation = facts.inception_score
        lines.append(f"    Inception Score {mean:.2f} +- {deviation:.2f}")
    if facts.half_distance is not None:
        distance = "proxy's Frechet distance" if proxy else "FID"
        lines.append(f"    {distance} of a random half to the other {facts.half_distance:.4g}")
    verdict = "which score" if lines else "too few to score themselves"
    return "\n".join([f"  against {facts.count:,} images of {split}, {verdict}", *lines])


def table(evaluation: Evaluation, subject: Subject) -> str:
    """Return the figures, with the real images' scores, for a terminal."""
    protocol, facts = evaluation.protocol, evaluation.real_facts
    weights = "averaged weights" if protocol.weights == "ema" else "raw weights"
    width = max(len(figure.name) for figure in evaluation.figures)
    lines = [
        f"{subject.source}: iteration {subject.iteration}, {weights}",
        *(f"  {figure.name:<{width}}  {figure}" for figure in evaluation.figures),
        describe_real_images(facts, protocol.real_split, proxy=protocol.proxy),
    ]
    if evaluation.by_class:
        ordered = sorted(evaluation.by_class.items(), key=lambda item: item[1])
        shown = [f"{printable(name)} {value:.4g}" for name, value in ordered]
        lines.append("  best classes:  " + ", ".join(shown[:3]))
        lines.append("  worst classes: " + ", ".join(shown[-3:]))
    if evaluation.skipped_classes:
        names = ", ".join(map(printable, evaluation.skipped_classes))
        lines.append(f"  skipped by intra-FID, with fewer than 2 real images: {names}")
    if facts.replaced:
        lines.append(f"  {facts.replaced} unreadable real images, each replaced by the next of its class")
    if protocol.proxy:
        lines.append("  PROXY figures: for comparing checkpoints on this machine, not with published FIDs")
    lines.append(f"  protocol {protocol.identity}, {evaluation.seconds:.0f} s")
    return "\n".join(lines)


def markdown_row(evaluation: Evaluation, subject: Subject) -> str:
    """Return a row of a Markdown table: recipe, iteration, weights, figures with their names, protocol."""
    figures = ", ".join(f"{in_markdown(figure.name)} **{figure}**" for figure in evaluation.figures)
    protocol = evaluation.protocol
    return (
        f"| {in_markdown(subject.recipe)} | {subject.iteration:,} | {protocol.weights} | {figures} | "
        f"seed {protocol.sample_seed}, {protocol.identity} |"
    )


def save(evaluation: Evaluation, subject: Subject, folder: Path) -> Path:
    """Write a JSON file named by iteration and protocol, and a row of results.md; return the JSON file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"iteration_{subject.iteration:09d}_{evaluation.protocol.identity}.json"
    device = subject.device
    values = {
        "source": str(subject.source),
        "iteration": subject.iteration,
        "recipe": subject.recipe,
        **evaluation.to_dict(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "versions": {
            "sagan_layers": sagan_layers.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    atomic_write_text(path, json.dumps(values, indent=2) + "\n")
    rows = folder / RESULTS
    before = rows.read_bytes() if rows.exists() else _HEADER.encode()
    row = markdown_row(evaluation, subject).encode() + b"\n"
    if row not in before:  # a resumed run may evaluate an iteration again
        with atomic_write(rows) as file:
            file.write(before + row)
    return path
