"""Dots and lines of measured values, in the style of all pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 12  # of a suite's plot; the table has all


@dataclass(frozen=True)
class Dots:
    """One set of axes with a row for each case: ``rows[case][contender]`` is a dot."""

    label: str  # of the axis, with its unit
    rows: Mapping[str, Mapping[str, float]]
    title: str = ""
    reference: float | None = None  # a line at this value
    numbers: bool = False  # whether values stand beside their dots


@dataclass(frozen=True)
class Lines:
    """One set of axes with a line for each contender: ``lines[contender][x]``."""

    x_label: str
    y_label: str
    lines: Mapping[str, Mapping[float, float]]
    title: str = ""
    ticks: Mapping[float, str] | None = None  # of x, in place of powers of two
    log: bool = True


def draw(path: Path, title: str, panels: Sequence[Dots | Lines], note: str = "") -> Path | None:
    """Draw panels below each other into an SVG file, and return it; None where matplotlib is missing.

    Args:
        path: of the file.
        title: above the panels.
        panels: what to draw; one legend serves them all.
        note: below the panels: where and how it was measured.
    """
    heights = [72 + _height(panel) for panel in panels]
    names = list(dict.fromkeys(name for panel in panels for name in _contenders(panel)))
    labelled = not all(
        isinstance(panel, Dots) and panel.numbers and _is_named_by_rows(panel) for panel in panels
    )
    columns = 1 if max(map(len, names)) > 24 else 2 if max(map(len, names)) > 15 else 3
    legend_height = 22 * -(-len(names) // columns) + 10 if labelled else 0
    with style.new_figure(sum(heights) + legend_height + 36 + (24 if note else 0)) as figure:
        if figure is None:
            return None
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axis, panel in zip(axes, panels, strict=True):
            if panel.title:
                # From the figure's left edge: beside long names of rows the axes are narrow.
                where = {"xycoords": ("figure fraction", "axes fraction"), "textcoords": "offset points"}
                axis.annotate(panel.title, (0.013, 1), (0, 8), weight="bold", **where).set_in_layout(False)
                axis.set_title(" ")  # keeps the room
            axis.grid()
            if isinstance(panel, Dots):
                _draw_dots(axis, panel)
            else:
                _draw_lines(axis, panel)
        shown = names if labelled else []
        handles = [axes[0].plot([], [], linestyle="", label=name, **style.look(name))[0] for name in shown]
        legend = figure.legend(
            handles=handles,
            title=title,
            loc="outside upper left",
            ncols=columns,
            alignment="left",
            borderpad=0,
        )
        legend.get_title().set(weight="bold", size=style.TEXT + 2)
        if note:
            figure.supxlabel(note, x=0.01, ha="left", size=style.SMALL)
        style.save(figure, path, title)
    return path


def _height(panel: Dots | Lines) -> float:
    if isinstance(panel, Dots):
        return 26 * len(panel.rows)
    return 190 if panel.log else 100


def _contenders(panel: Dots | Lines) -> Iterable[str]:
    return panel.lines if isinstance(panel, Lines) else [name for row in panel.rows.values() for name in row]


def _is_named_by_rows(panel: Dots) -> bool:
    return all(list(row) == [case] for case, row in panel.rows.items())


def _draw_dots(axis: Axes, panel: Dots) -> None:
    values = [value for row in panel.rows.values() for value in row.values()]
    for number, row in enumerate(panel.rows.values()):
        # Ours last, above the others.
        for name, value in sorted(
            row.items(), key=lambda item: (item[0] == "ours", item[0].startswith("ours"))
        ):
            axis.plot(value, number, linestyle="", **style.look(name))
            if panel.numbers:
                text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
                axis.annotate(text, (value, number), (10, 0), textcoords="offset points", va="center")
    axis.set_xscale("log", base=2)
    axis.set_xlim(min(values) / 1.35, max(max(values), min(values) * 2) * (3.0 if panel.numbers else 1.35))
    _name_powers(axis.xaxis, min(values), max(values))
    if panel.numbers:
        axis.tick_params(axis="x", labelbottom=False)
    axis.set_xlabel(panel.label)
    axis.set_yticks(range(len(panel.rows)), list(panel.rows))
    axis.set_ylim(len(panel.rows) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    if panel.reference is not None:
        axis.axvline(panel.reference, color=style.INK, linewidth=1.2, zorder=1)


def _draw_lines(axis: Axes, panel: Lines) -> None:
    for name, points in sorted(panel.lines.items(), key=lambda item: item[0].startswith("ours")):
        markers = {} if len(points) < 20 else {"marker": ""}
        axis.plot(list(points), list(points.values()), linewidth=2, **style.look(name) | markers)
    if panel.log:
        values = [value for points in panel.lines.values() for value in points.values()]
        axis.set_yscale("log", base=2)
        _name_powers(axis.yaxis, min(values), max(values))
    if panel.ticks is not None:
        axis.set_xticks(list(panel.ticks), list(panel.ticks.values()))
    elif panel.log:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel(panel.x_label)
    axis.set_ylabel(panel.y_label)


def _name_powers(axis: Any, least: float, most: float) -> None:
    """Write out some powers of two, at most eight."""
    from matplotlib.ticker import LogLocator, NullLocator

    ratio = most / least
    step = 1 if ratio < 2**6 else 2 if ratio < 2**12 else 3
    axis.set_major_locator(LogLocator(base=2**step, numticks=30))
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:.3g}")
    axis.set_minor_locator(NullLocator())


def draw_suites(run: Mapping[str, Any], stem: Path, note: str) -> list[Path]:
    """Draw the first cases of each suite of a run: time against the baseline, and peak memory; return the files."""
    files = []
    for suite in dict.fromkeys(case["suite"] for case in run["cases"]):
        cases = [case for case in run["cases"] if case["suite"] == suite and "contenders" in case][:MOST_ROWS]
        columns = {"time_ratio": "time / that of {}: below 1 is faster", "peak_mib": "peak memory, MiB"}
        panels = []
        for column, label in columns.items():
            rows = {
                case["case"]: {
                    name: row[column] for name, row in case["contenders"].items() if row.get(column)
                }
                for case in cases
            }
            rows = {case: row for case, row in rows.items() if row}
            if rows:
                reference = 1.0 if column == "time_ratio" else None
                panels.append(Dots(label.format(cases[0]["baseline"]), rows, reference=reference))
        if panels:
            name = f"{stem.name}_{re.sub(r'[^a-zA-Z0-9]', '_', suite)}.svg"
            path = draw(stem.with_name(name), suite, panels, note)
            files += [path] if path else []
    return files
