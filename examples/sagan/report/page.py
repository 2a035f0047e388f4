"""A run's curves as a PNG, and a report as one HTML file with the pictures inside."""

from __future__ import annotations

import base64
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sagan.errors import UserError, is_finite
from sagan.io import atomic_write_text, open_regular
from sagan.names import in_html
from sagan.recipes import read_config
from sagan.report.figures import Curve, Panel, save_curves
from sagan.train.checkpoint import checkpoints_in
from sagan.train.logs import read_metrics, series

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } figure { display: inline-block; margin: 0 1rem 1rem 0; vertical-align: top; }
figcaption { color: #555; font-size: .85rem; } details { margin: .5rem 0; } code { background: #f3f3f3; }
"""


def draw_run(out: Path, path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """Draw the curves of the run in ``out``: losses, logits, gamma, sigma, speed, and scores if it was evaluated."""
    panels = _panels(_metrics(out) if rows is None else rows)
    if not panels:
        raise UserError(f"expected metrics of a run in {out}, found none with a number yet")
    save_curves(path, panels, title=str(out))
    return path


def _metrics(out: Path) -> list[dict[str, Any]]:
    rows = read_metrics(out)
    if not rows:
        raise UserError(f"expected metrics of a run in {out}, found none yet")
    return rows


def _panels(rows: list[dict[str, Any]]) -> list[Panel]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    gammas = [name for name in names if name.startswith("gamma_")]
    curves: dict[str, dict[str, Curve]] = {
        "loss": {"D": series(rows, "d_loss"), "G": series(rows, "g_loss")},
        "mean logit of D": {"real": series(rows, "real_logits"), "generated": series(rows, "fake_logits")},
        "attention's gamma": {name[6:].replace("_", " at "): series(rows, name) for name in gammas},
        "largest sigma": {network.upper(): _largest_sigma(rows, network) for network in "gd"},
        "images a second": {"speed": series(rows, "images_per_s")},
        "share of time waiting for data": {"share": series(rows, "data_wait_share")},
    }
    for name in _scores(rows):
        # Wrapped at hyphens, to fit next to the panel.
        curves[textwrap.fill(name.removeprefix("evaluation/"), 20)] = {"score": series(rows, name)}
    panels = [
        Panel(label, {name: curve for name, curve in found.items() if curve[0]})
        for label, found in curves.items()
    ]
    return [panel for panel in panels if panel.curves]


def _scores(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row if name.startswith("evaluation/")))


def _largest_sigma(rows: list[dict[str, Any]], network: str) -> Curve:
    prefix = f"sigma_{network}."
    iterations, largest = [], []
    for row in rows:
        sigmas = [
            value for name, value in row.items() if name.startswith(prefix) and isinstance(value, float)
        ]
        if sigmas:
            iterations.append(float(row["iteration"]))
            largest.append(max(sigmas))
    return iterations, largest


def write_report(out: Path, path: Path | None = None) -> Path:
    """Write one HTML file about the run in ``out``, by default ``report.html`` in that folder; return its path."""
    path = path or out / "report.html"
    rows = _metrics(out)
    config = read_config(out).to_dict()
    curves = draw_run(out, out / "curves.png", rows)
    parts = [
        f"<h1>{in_html(config['recipe'])}: {in_html(str(out))}</h1>",
        _summary(out, config, rows),
        "<h2>Curves</h2>",
        _picture(curves, "over the iterations"),
        "<h2>Samples</h2>",
        *(_picture(each, _caption(each)) for each in _few(sorted((out / "samples").glob("*.png")))),
    ]
    maps = sorted((out / "attention").glob("*.png"))
    if maps:
        parts += ["<h2>Where G's attention looks</h2>", _picture(maps[-1], _caption(maps[-1]))]
    parts += ["<h2>Evaluations</h2>", _evaluations(rows)]
    parts += ["<h2>Configuration</h2>", _configuration(config)]
    text = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>{in_html(out.name)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, text)
    return path


def _summary(out: Path, config: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    last = next((row for row in reversed(rows) if "d_loss" in row), rows[-1])
    speeds = sorted(filter(is_finite, series(rows, "images_per_s")[1]))
    saved = ", ".join(path.name for path in checkpoints_in(out / "checkpoints"))
    best = " and best.pt" if (out / "checkpoints" / "best.pt").exists() else ""
    alarms = [f"iteration {row['iteration']:,}: {row['alarm']}" for row in rows if row.get("alarm")]
    return _table(
        [
            ("iterations", f"{rows[-1]['iteration']:,} of {config['iterations']:,}"),
            ("batch", f"{config['batch_size']}, {config['network']['resolution']} pixels"),
            ("classes", str(config["network"]["num_classes"])),
            ("losses", f"D {_number(last.get('d_loss'))}, G {_number(last.get('g_loss'))}"),
            ("images a second", f"{speeds[len(speeds) // 2]:.1f} (median)" if speeds else "not logged"),
            ("checkpoints", saved + best),
            ("skipped updates", f"{sum(series(rows, 'skipped_updates')[1]):.0f}"),
            *(("alarm", alarm) for alarm in alarms),
        ]
    )


def _evaluations(rows: list[dict[str, Any]]) -> str:
    names = _scores(rows)
    found = [row for row in rows if any(name in row for name in names)]
    if not found:
        return "<p>This run was not evaluated in training.</p>"
    header = ["iteration", *(name.removeprefix("evaluation/") for name in names)]
    body = [[f"{row['iteration']:,}", *(_number(row.get(name)) for name in names)] for row in found]
    return _table(body, header)


def _configuration(config: dict[str, Any]) -> str:
    plain = [[name, str(value)] for name, value in config.items() if not isinstance(value, dict)]
    groups = [
        f"<details><summary>{in_html(name)}</summary>"
        + _table([[inner, str(each)] for inner, each in value.items()])
        + "</details>"
        for name, value in config.items()
        if isinstance(value, dict)
    ]
    return _table(plain) + "".join(groups)


def _table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{in_html(cell)}</{tag}>" for cell in cells) + "</tr>"

    head = line(header, "th") if header else ""
    return f"<table>{head}{''.join(line(row, 'td') for row in rows)}</table>"


def _picture(path: Path, caption: str) -> str:
    with open_regular(path) as file:
        data = base64.b64encode(file.read()).decode()
    text = in_html(caption)
    return f"<figure><img alt='{text}' src='data:image/png;base64,{data}'><figcaption>{text}</figcaption></figure>"


def _few(paths: Sequence[Path]) -> list[Path]:
    """Return the first, the middle and the last."""
    return list(dict.fromkeys([paths[0], paths[len(paths) // 2], paths[-1]])) if paths else []


def _caption(path: Path) -> str:
    number = path.stem.removeprefix("iteration_")
    return f"iteration {int(number):,}" if number.isdecimal() else path.stem


def _number(value: Any) -> str:
    return f"{value:.4g}" if is_finite(value) else "n/a"
