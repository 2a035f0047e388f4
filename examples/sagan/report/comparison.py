"""Comparison of runs: figures over the iterations (figure 3 of the paper) and the best of each run (table 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagan.errors import UserError
from sagan.evaluation.protocol import FIGURES, LOWER
from sagan.io import atomic_write_text, read_json
from sagan.names import in_markdown
from sagan.recipes import PUBLISHED, RECIPES, RunConfig, differences, read_config
from sagan.report.figures import Curve, Panel, save_curves

# Settings that do not change the quality of a run.
_NOT_COMPARED = (
    "out",
    "data",
    "device",
    "output.",
    "health.",
    "evaluation.",
    "images.check",
    "images.workers",
)
# The columns of the paper's table 1, by recipe.
TABLE_1 = (
    "sn_on_gd_ttur",
    *(f"{mixer}_{size}" for mixer in ("attention", "residual") for size in (8, 16, 32, 64)),
)


@dataclass(frozen=True)
class Kind:
    """A kind of figure. Only figures of one kind may be compared."""

    metric: str  # fid, is, kid, intra-fid, precision or recall
    name: str  # such as fid50k-train-tfinception
    protocol: str  # the protocol's identity
    proxy: bool  # whether the proxy network stands in for Inception


@dataclass(frozen=True)
class MeasuredRun:
    """A run and its figures."""

    label: str  # differs from those of the other runs
    config: RunConfig
    figures: dict[Kind, dict[int, float]]  # for each kind, the values by iteration

    def best(self, kind: Kind) -> tuple[int, float] | None:
        """Return the iteration with the best value, and the value; None without a finite value."""
        values = {at: value for at, value in self.figures.get(kind, {}).items() if math.isfinite(value)}
        if not values:
            return None
        choose = min if FIGURES[kind.metric][0] == LOWER else max
        return choose(values.items(), key=lambda item: item[1])


def read_runs(folders: Sequence[Path]) -> list[MeasuredRun]:
    """Read the configurations and evaluations of runs."""
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) != len(resolved):
        raise UserError("runs: expected different folders, got one of them twice")
    names = [folder.name for folder in resolved]
    runs = []
    for given, folder in zip(folders, resolved, strict=True):
        config = read_config(folder)
        figures: dict[Kind, dict[int, float]] = {}
        for file in sorted((folder / "evaluation").glob("iteration_*.json")):
            for kind, value, iteration in _figures_of(file):
                figures.setdefault(kind, {})[iteration] = value
        label = folder.name if names.count(folder.name) == 1 else str(given)
        runs.append(MeasuredRun(label, config, figures))
    return runs


def _figures_of(file: Path) -> list[tuple[Kind, float, int]]:
    try:
        values = read_json(file)
        protocol = values["protocol"]
        identity, proxy = str(protocol["identity"]), bool(protocol["proxy"])
        if unknown := {figure["metric"] for figure in values["figures"].values()} - FIGURES.keys():
            raise ValueError(f"unknown metrics {unknown}")
        return [
            (Kind(figure["metric"], name, identity, proxy), float(figure["value"]), int(values["iteration"]))
            for name, figure in values["figures"].items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"expected an evaluation in {file}, got an invalid one: {error!r}") from None


def compare_runs(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write comparison.md and comparison.png to a folder and return their paths."""
    runs = read_runs(folders)
    kinds = _kinds(runs)
    if not kinds:
        raise UserError("runs: none was evaluated; use `evaluate` or `train --evaluation.every`")
    out.mkdir(parents=True, exist_ok=True)
    table, plot = out / "comparison.md", out / "comparison.png"
    atomic_write_text(table, _markdown(runs, kinds))
    save_curves(plot, [_panel(kind, runs) for kind in kinds])
    return [table, plot]


def _kinds(runs: Sequence[MeasuredRun]) -> list[Kind]:
    """Return the kinds of figures by metric (FID first), and within one those that most runs have first."""
    order = list(FIGURES)
    return sorted(
        dict.fromkeys(kind for run in runs for kind in run.figures),
        key=lambda kind: (order.index(kind.metric), -sum(kind in run.figures for run in runs), kind.name),
    )


def _panel(kind: Kind, runs: Sequence[MeasuredRun]) -> Panel:
    curves: dict[str, Curve] = {}
    published = {}
    for run in runs:
        if values := run.figures.get(kind):
            iterations = sorted(values)
            curves[run.label] = iterations, [values[iteration] for iteration in iterations]
            if (value := _published(run, kind)) is not None:
                published[run.label] = value
    better = "less" if FIGURES[kind.metric][0] == LOWER else "more"
    return Panel(f"{kind.name} ({better} is better)\nprotocol {kind.protocol}", curves, published)


def _published(run: MeasuredRun, kind: Kind) -> float | None:
    """Return the published value for the run's recipe, if there is a comparable one."""
    if kind.proxy or run.config.network.resolution != 128:
        return None
    return PUBLISHED.get(run.config.recipe, {}).get(kind.metric)


def _markdown(runs: Sequence[MeasuredRun], kinds: Sequence[Kind]) -> str:
    parts = [
        "# Comparison",
        "",
        "The best value of each run, and its iteration. Brackets hold the value published for the recipe on "
        "ImageNet at 128 pixels; publications do not give their whole protocol, so theirs may differ.",
        "",
        _row(
            [
                "run",
                "recipe",
                "iterations",
                *(in_markdown(f"{each.name} ({each.protocol})") for each in kinds),
            ]
        ),
        _row(["---"] * 3 + ["---:"] * len(kinds)),
    ]
    for run in runs:
        cells = [in_markdown(run.label), in_markdown(run.config.recipe), f"{run.config.iterations:,}"]
        parts.append(_row([*cells, *(_cell(run, kind) for kind in kinds)]))
    parts += ["", *_warnings(runs, kinds), "## What differs", ""]
    parts += [f"- **{in_markdown(run.label)}**: {in_markdown(_changes(run.config))}" for run in runs]
    if rows := _table_1(runs, kinds):
        parts += ["", "## Table 1 of the paper", "", "Measured / published.", "", *rows]
    return "\n".join([*parts, ""])


def _cell(run: MeasuredRun, kind: Kind) -> str:
    best = run.best(kind)
    if best is None:
        return "n/a" if kind in run.figures else "not measured"
    iteration, value = best
    published = _published(run, kind)
    text = f"{_number(value)} at {iteration:,}"
    return text if published is None else f"{text} [{published:g}]"


def _warnings(runs: Sequence[MeasuredRun], kinds: Sequence[Kind]) -> list[str]:
    lines = [f"**{in_markdown(run.label)} was not evaluated.**\n" for run in runs if not run.figures]
    for metric in dict.fromkeys(kind.metric for kind in kinds):
        several = [kind for kind in kinds if kind.metric == metric]
        if len(several) > 1:
            lines.append(
                f"**{metric}: {len(several)} protocols, in separate columns. Do not compare one with another.**\n"
            )
    if any(kind.proxy for kind in kinds):
        lines.append("**Proxy figures only compare runs on one machine; they are not FIDs.**\n")
    return lines


def _changes(config: RunConfig) -> str:
    """Return how a run differs from its recipe."""
    if config.recipe not in RECIPES:
        return f"unknown recipe {config.recipe}"
    recipe = RECIPES[config.recipe]()
    changed = {
        name: value
        for name, (_, value) in differences(recipe, config).items()
        if not name.startswith(_NOT_COMPARED)
        and not (name == "network.num_classes" and recipe.network.num_classes is None)
    }
    if not changed:
        return f"recipe {config.recipe} without changes"
    return f"recipe {config.recipe} with {', '.join(f'{name} {value}' for name, value in changed.items())}"


def _table_1(runs: Sequence[MeasuredRun], kinds: Sequence[Kind]) -> list[str]:
    """Return the paper's table 1 with one run for each recipe, for the first kind of FID and of IS."""
    by_recipe = {run.config.recipe: run for run in runs if run.config.recipe in TABLE_1}
    if len(by_recipe) < 2:
        return []
    header = ["no attention", *(name.replace("_", " ") for name in TABLE_1[1:])]
    lines = [_row(["", *header]), _row(["---", *["---:"] * len(header)])]
    for metric, title in (("fid", "FID"), ("is", "IS")):
        kind = next((kind for kind in kinds if kind.metric == metric), None)
        if kind is None:
            continue
        cells = []
        for name in TABLE_1:
            run = by_recipe.get(name)
            best = run.best(kind) if run else None
            cells.append(f"{_number(best[1]) if best else '-'} / {PUBLISHED[name][metric]:g}")
        lines.append(_row([f"{title} ({in_markdown(kind.name)})", *cells]))
    return lines


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: Any) -> str:
    return f"{value:.4g}"
