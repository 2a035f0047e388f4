"""A run's curves as a PNG, and a report as one HTML file with the pictures inside."""

from __future__ import annotations

import base64
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sagan.errors import UserError, is_finite
from sagan.io import atomic_write_text, open_regular, read_json
from sagan.names import in_html, program_name
from sagan.recipes import read_config
from sagan.report.comparison import read_runs
from sagan.report.figures import Curve, Panel, save_curves
from sagan.train.checkpoint import checkpoints_in
from sagan.train.logs import read_metrics, read_rows, series

CURVES, REPORT = "curves.png", "report.html"
# What the demo measures besides: a row for each grid of samples, and the last word.
QUALITY, VERDICT = "quality.jsonl", "verdict.json"
_QUALITY_LABELS = {
    "share": "share of samples that the judge reads as their label",
    "frechet": "Frechet distance to the real images (less is better)",
    "diversity": "distance within a class, as a share of the real images'",
}
_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1d21; --quiet: #565b64; --line: #d5d9e0; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171b; --ink: #e9eaee; --quiet: #a6acb8; --line: #3b414c; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .8rem; border-bottom: 1px solid var(--line); }
.table { overflow-x: auto; overflow-wrap: normal; }
table { border-collapse: collapse; font-size: .93rem; }
td, th { padding: .2rem 1rem .2rem 0; text-align: left; vertical-align: top; }
th { white-space: nowrap; }
td { max-width: 40rem; overflow-wrap: anywhere; min-width: 6rem; font-variant-numeric: tabular-nums; }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
figure { margin: 0; min-width: 0; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; padding: 4px; background: #fff; }
figcaption { color: var(--quiet); font-size: .875rem; text-align: center; }
summary { cursor: pointer; padding: .4rem 0; }
"""

logger = logging.getLogger(__name__)


def finish_run(out: Path) -> str:
    """Draw the curves and write the report of a run that ends; return a line that says where they are.

    Whatever goes wrong here costs the run nothing: it is a warning, and the line is empty.
    """
    try:
        return f"Report: {write_report(out)}, curves: {out / CURVES}."
    except (Exception, KeyboardInterrupt) as error:
        command = f"{program_name()} report --source {out}"
        logger.warning("no report was written (%s); `%s` writes it", str(error) or "interrupted", command)
        return ""


def draw_run(out: Path, path: Path) -> Path:
    """Draw the curves of the run in ``out``: losses, logits, gamma, sigma, speed, measured quality."""
    panels = _panels(out, read_metrics(out))
    if not panels:
        raise UserError(f"expected metrics of a run in {out}, found none with a number yet")
    save_curves(path, panels, title=str(out))
    return path


def _panels(out: Path, rows: list[dict[str, Any]]) -> list[Panel]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    gammas = [name for name in names if name.startswith("gamma_")]
    curves: dict[str, dict[str, Curve]] = {
        "loss": {"D": series(rows, "d_loss"), "G": series(rows, "g_loss")},
        "mean logit of D": {"real": series(rows, "real_logits"), "generated": series(rows, "fake_logits")},
        "attention's gamma": {
            f"{name[6].upper()}{name[7:].replace('_', ' at ')}": series(rows, name) for name in gammas
        },
        "largest sigma": {network.upper(): _largest_sigma(rows, network) for network in "dg"},
        "images a second": {"": series(rows, "images_per_s")},
        "share of time waiting for data": {"": series(rows, "data_wait_share")},
    }
    panels = [Panel(label, found) for label, found in curves.items()]
    quality, verdict = _quality(out), _verdict(out)
    measured = list(dict.fromkeys(name for row in quality for name in row if name != "iteration"))
    panels[:0] = [
        Panel(_QUALITY_LABELS.get(name, _words(name)), {"": series(quality, name)}, _of_real(verdict, name))
        for name in measured
    ]
    for name in _scores(rows):
        panels.append(Panel(name.removeprefix("evaluation/"), {"": series(rows, name)}))
    return [
        Panel(panel.label, found, panel.references)
        for panel in panels
        if (found := {name: curve for name, curve in panel.curves.items() if curve[0]})
    ]


def _quality(out: Path) -> list[dict[str, Any]]:
    return read_rows(out / QUALITY) if (out / QUALITY).is_file() else []


def _verdict(out: Path) -> dict[str, Any]:
    if not (out / VERDICT).is_file():
        return {}
    try:
        values = read_json(out / VERDICT)
    except UserError as error:
        raise UserError(f"{out / VERDICT}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{out / VERDICT}: expected names and values, got {type(values).__name__}")
    return values


def _of_real(verdict: dict[str, Any], name: str) -> dict[str, float]:
    value = verdict.get(f"{name}_real")
    return {"half of the real images": float(value)} if value is not None and is_finite(value) else {}


def _words(name: str) -> str:
    return name.replace("_", " ")


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
    path = path or out / REPORT
    rows = read_metrics(out)
    config = read_config(out).to_dict()
    panels = _panels(out, rows)
    parts = [
        f"<h1>{in_html(config['recipe'])}: {in_html(str(out))}</h1>",
        _summary(out, config, rows),
        *_found(out),
    ]
    parts.append("<h2>Curves</h2>")
    if panels:
        save_curves(out / CURVES, panels, title=str(out))
        parts.append(_picture(out / CURVES, "over the iterations", _in_words(panels)))
    else:
        parts.append(
            f"<p>No metrics yet: the first follow after {config['output']['log_every']:,} iterations.</p>"
        )
    parts += ["<h2>Samples</h2>", "<div class='pictures'>"]
    rows_hold = "a row for each class" if config["network"]["num_classes"] else "without classes"
    parts += [
        _picture(each, _caption(each), f"Grid of generated samples, {rows_hold}: {_caption(each)}")
        for each in _few(sorted((out / "samples").glob("*.png")))
    ]
    parts.append("</div>")
    if maps := sorted((out / "attention").glob("*.png")):
        alt = (
            "Generated images with marked points, and beside each image where G's attention looks from them: "
        )
        parts += [
            "<h2>Where G's attention looks</h2>",
            _picture(maps[-1], _caption(maps[-1]), alt + _caption(maps[-1])),
        ]
    parts += ["<h2>Evaluations</h2>", _evaluations(out, rows)]
    parts += ["<h2>Configuration</h2>", _configuration(config)]
    text = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{in_html(out.name)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, text)
    return path


def _in_words(panels: Sequence[Panel]) -> str:
    """Return what curves show: the last value of each."""
    last = []
    for panel in panels:
        ends = (f"{name} {_number(values[-1])}".strip() for name, (_, values) in panel.curves.items())
        last.append(f"{panel.label}: {', '.join(ends)}")
    return f"Curves over the iterations; at the end {'; '.join(last)}"


def _found(out: Path) -> list[str]:
    """Return what the demo's judge found, if there is a verdict."""
    values = _verdict(out)
    if not values:
        return []
    rows = [(_words(name), _figures(value)) for name, value in values.items()]
    return ["<h2>Verdict</h2>", _table(rows)]


def _figures(value: Any) -> str:
    return ", ".join(map(_number, value)) if isinstance(value, list) else _number(value)


def _summary(out: Path, config: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    last: dict[str, Any] = next((row for row in reversed(rows) if "d_loss" in row), {})
    speeds = sorted(filter(is_finite, series(rows, "images_per_s")[1]))
    saved = ", ".join(path.name for path in checkpoints_in(out / "checkpoints"))
    best = " and best.pt" if (out / "checkpoints" / "best.pt").exists() else ""
    alarms = [f"iteration {row['iteration']:,}: {row['alarm']}" for row in rows if row.get("alarm")]
    return _table(
        [
            ("iterations", f"{rows[-1]['iteration'] if rows else 0:,} of {config['iterations']:,}"),
            ("batch", f"{config['batch_size']}, {config['network']['resolution']} pixels"),
            ("classes", str(config["network"]["num_classes"])),
            ("losses", f"D {_number(last.get('d_loss'))}, G {_number(last.get('g_loss'))}"),
            ("images a second", f"{speeds[len(speeds) // 2]:.1f} (median)" if speeds else "not logged"),
            ("checkpoints", saved + best),
            ("skipped updates", f"{sum(series(rows, 'skipped_updates')[1]):.0f}"),
            *(("alarm", alarm) for alarm in alarms),
        ]
    )


def _evaluations(out: Path, rows: list[dict[str, Any]]) -> str:
    """Return a table of what `train` and `evaluate` measured."""
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        for name in _scores([row]):
            found.setdefault(row["iteration"], {})[name.removeprefix("evaluation/")] = row[name]
    for kind, values in read_runs([out])[0].figures.items():
        for iteration, value in values.items():
            found.setdefault(iteration, {})[kind.name] = value
    if not found:
        return "<p>None: `evaluate`, and `train --evaluation.every`, measure FID and more.</p>"
    names = list(dict.fromkeys(name for each in found.values() for name in each))
    body = [[f"{at:,}", *(_number(found[at].get(name)) for name in names)] for at in sorted(found)]
    return _table(body, ["iteration", *names])


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
    return f"<div class='table' tabindex='0'><table>{head}{''.join(line(row, 'td') for row in rows)}</table></div>"


def _picture(path: Path, caption: str, alt: str) -> str:
    with open_regular(path) as file:
        data = base64.b64encode(file.read()).decode()
    return (
        f"<figure><img alt='{in_html(alt)}' src='data:image/png;base64,{data}'>"
        f"<figcaption>{in_html(caption)}</figcaption></figure>"
    )


def _few(paths: Sequence[Path]) -> list[Path]:
    """Return the first, the middle and the last."""
    return list(dict.fromkeys([paths[0], paths[len(paths) // 2], paths[-1]])) if paths else []


def _caption(path: Path) -> str:
    number = path.stem.removeprefix("iteration_")
    return f"iteration {int(number):,}" if number.isdecimal() else path.stem


def _number(value: Any) -> str:
    return f"{value:.4g}" if is_finite(value) else "n/a"
