"""Runs side by side: figure 3 of the paper (figures over the iterations) and table 1 (the best of each run)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagan.errors import UserError
from sagan.evaluation.protocol import FIGURES, LOWER
from sagan.recipes import PUBLISHED, RECIPES, RunConfig, config_from_dict, differences
from sagan.report.figures import Panel, save_comparison

# What says nothing of how good a run becomes.
_UNTOLD = ("out", "data", "device", "output.", "health.", "evaluation.", "images.check", "images.workers")
# Table 1 of the paper: its columns by recipe.
TABLE_1 = (
    "sn_on_gd_ttur",
    *(f"{mixer}_{size}" for mixer in ("attention", "residual") for size in (8, 16, 32, 64)),
)


@dataclass(frozen=True)
class Kind:
    """Figures that may be compared: of one name, and of one protocol.

    Attributes:
        metric: fid, is, kid, intra-fid, precision or recall.
        name: such as fid50k-train-tfinception.
        protocol: the protocol's identity.
        proxy: whether it only stands in for the Inception network's.
    """

    metric: str
    name: str
    protocol: str
    proxy: bool


@dataclass(frozen=True)
class MeasuredRun:
    """A run and what was measured of it.

    Attributes:
        label: what tells it from the others.
        config: of the run.
        figures: by kind, the values by iteration.
    """

    label: str
    config: RunConfig
    figures: dict[Kind, dict[int, float]]

    def best(self, kind: Kind) -> tuple[int, float] | None:
        """Return the iteration with the best value, and the value; None if it was not measured."""
        values = {at: value for at, value in self.figures.get(kind, {}).items() if math.isfinite(value)}
        if not values:
            return None
        choose = min if FIGURES[kind.metric][0] == LOWER else max
        return choose(values.items(), key=lambda item: item[1])


def read_runs(folders: Sequence[Path]) -> list[MeasuredRun]:
    """Read the configuration of runs, and the evaluations in their folders.

    Args:
        folders: of the runs, each with a different path.

    Raises:
        UserError: if one is not the folder of a run, is given twice, or holds a broken evaluation.
    """
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) != len(resolved):
        raise UserError("runs: expected different folders, got one of them twice")
    names = [folder.name for folder in resolved]
    runs = []
    for given, folder in zip(folders, resolved, strict=True):
        path = folder / "config.json"
        if not path.is_file():
            raise UserError(f"runs: expected the folder of a run, found no config.json in {given}")
        config = config_from_dict(json.loads(path.read_text()))
        figures: dict[Kind, dict[int, float]] = {}
        for file in sorted((folder / "evaluation").glob("iteration_*.json")):
            for kind, value, iteration in _figures_of(file):
                figures.setdefault(kind, {})[iteration] = value
        label = folder.name if names.count(folder.name) == 1 else str(given)
        runs.append(MeasuredRun(label, config, figures))
    return runs


def _figures_of(file: Path) -> list[tuple[Kind, float, int]]:
    try:
        values = json.loads(file.read_text())
        protocol = values["protocol"]
        return [
            (
                Kind(figure["metric"], name, protocol["identity"], protocol["proxy"]),
                float(figure["value"]),
                int(values["iteration"]),
            )
            for name, figure in values["figures"].items()
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"expected an evaluation in {file}, could not read it: {error!r}") from None


def compare_runs(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write comparison.md and, if anything was measured, comparison.png.

    Args:
        folders: of the runs.
        out: folder to write to.

    Returns:
        The files written.

    Raises:
        UserError: as :func:`read_runs`, or if nothing was measured of any run.
    """
    runs = read_runs(folders)
    kinds = _kinds(runs)
    if not kinds:
        raise UserError("runs: none was evaluated; `evaluate` or `train --evaluation.every` does that")
    out.mkdir(parents=True, exist_ok=True)
    table, plot = out / "comparison.md", out / "comparison.png"
    table.write_text(_markdown(runs, kinds), encoding="utf-8")
    save_comparison(plot, [_panel(kind, runs) for kind in kinds])
    return [table, plot]


def _kinds(runs: Sequence[MeasuredRun]) -> list[Kind]:
    """Return the kinds of figures there are: FID and IS first, then those that most runs have."""
    found = list(dict.fromkeys(kind for run in runs for kind in run.figures))
    order = list(FIGURES)
    return sorted(
        found,
        key=lambda kind: (order.index(kind.metric), -sum(kind in run.figures for run in runs), kind.name),
    )


def _panel(kind: Kind, runs: Sequence[MeasuredRun]) -> Panel:
    curves = {
        run.label: ([float(iteration) for iteration in sorted(values)], [values[i] for i in sorted(values)])
        for run in runs
        if (values := run.figures.get(kind))
    }
    published = {}
    for run in runs:
        if run.label in curves and (value := _published(run, kind)) is not None:
            published[run.label] = value
    better = "less" if FIGURES[kind.metric][0] == LOWER else "more"
    return Panel(f"{kind.name}\n(protocol {kind.protocol}, {better} is better)", curves, published)


def _published(run: MeasuredRun, kind: Kind) -> float | None:
    """Return what was published for the run's recipe, if the figure can stand beside it."""
    result = PUBLISHED.get(run.config.recipe)
    if result is None or kind.proxy or run.config.network.resolution != 128:
        return None
    return {"fid": result.fid, "is": result.inception_score, "intra-fid": result.intra_fid}.get(kind.metric)


def _markdown(runs: Sequence[MeasuredRun], kinds: Sequence[Kind]) -> str:
    parts = [
        "# Comparison",
        "",
        "The best of each run, and the iteration it is of. In brackets what was published for the recipe, of "
        "ImageNet at 128 pixels; protocols of publications differ from these in what they do not tell.",
        "",
        _row(["run", "recipe", "iterations", *(_title(kind) for kind in kinds)]),
        _row(["---"] * 3 + ["---:"] * len(kinds)),
    ]
    for run in runs:
        cells = [run.label, run.config.recipe, f"{run.config.iterations:,}"]
        parts.append(_row([*cells, *(_cell(run, kind) for kind in kinds)]))
    parts += ["", *_warnings(runs, kinds), "## What differs", ""]
    parts += [f"- **{run.label}**: {_changes(run.config)}" for run in runs]
    if rows := _table_1(runs, kinds):
        parts += ["", "## Table 1 of the paper", "", "Measured / published.", "", *rows]
    return "\n".join([*parts, ""])


def _title(kind: Kind) -> str:
    return f"{kind.name} ({kind.protocol})"


def _cell(run: MeasuredRun, kind: Kind) -> str:
    best = run.best(kind)
    if best is None:
        return "not measured"
    iteration, value = best
    published = _published(run, kind)
    text = f"{_number(value)} at {iteration:,}"
    return text if published is None else f"{text} [{published:g}]"


def _warnings(runs: Sequence[MeasuredRun], kinds: Sequence[Kind]) -> list[str]:
    lines = [f"**{run.label} was not evaluated.**\n" for run in runs if not run.figures]
    for metric in dict.fromkeys(kind.metric for kind in kinds):
        several = [kind for kind in kinds if kind.metric == metric]
        if len(several) > 1:
            lines.append(
                f"**{metric}: {len(several)} protocols, in columns of their own. Do not compare one with another.**\n"
            )
    if any(kind.proxy for kind in kinds):
        lines.append("**Proxy figures are for telling runs on one machine apart; they are no FIDs.**\n")
    return lines


def _changes(config: RunConfig) -> str:
    """Return in words how a run differs from its recipe."""
    if config.recipe not in RECIPES:
        return f"recipe {config.recipe} is not known"
    recipe = RECIPES[config.recipe]()
    changed = {
        name: value
        for name, (_, value) in differences(recipe, config).items()
        if not name.startswith(_UNTOLD)
        and not (name == "network.num_classes" and recipe.network.num_classes is None)
    }
    if not changed:
        return f"recipe {config.recipe} as it is"
    told = ", ".join(f"{name} {value}" for name, value in changed.items())
    return f"recipe {config.recipe} with {told}"


def _table_1(runs: Sequence[MeasuredRun], kinds: Sequence[Kind]) -> list[str]:
    """Return the paper's table of one run for each recipe of it, for the first kind of FID and of IS."""
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
            result = PUBLISHED[name]
            published = result.fid if metric == "fid" else result.inception_score
            cells.append(f"{_number(best[1]) if best else '-'} / {published:g}")
        lines.append(_row([f"{title} ({kind.name})", *cells]))
    return lines


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: Any) -> str:
    return f"{value:.4g}"
