"""What a run leaves: its record as JSON, tables as Markdown, and plots."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import sagan_layers
from benchmarks.plots import draw_suites
from sagan.io import atomic_write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MIB = 2**20

# The record of a case, or what it says of one contender.
Row = dict[str, Any]


def environment(device: str) -> Row:
    """Return the hardware, versions, commit and date of this run."""
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    found: Row = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        # Without folders, which say nothing to others.
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": device,
        "cpu": _cpu_model(),
        "cores_used": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "pillow": _version("pillow"),
        "sagan_layers": sagan_layers.__version__,
        "commit": commit,
        "dirty": commit and bool(_output("git", "-C", str(ROOT), "status", "--porcelain")),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_memory_mib": properties.total_memory / MIB,
            "gpu_multiprocessors": properties.multi_processor_count,
            "driver": nvidia_smi("driver_version"),
            "cuda": torch.version.cuda,
            "allow_tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
            "allow_tf32_convolution": torch.backends.cudnn.allow_tf32,
        }
    return found


def nvidia_smi(query: str) -> str | None:
    """Return one field of nvidia-smi for the first GPU, None where the tool is missing."""
    text = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits")
    return text.splitlines()[0].strip() if text else None


def _output(*command: str) -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    return None


def _version(distribution: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution)
    return None


def _cpu_model() -> str:
    with contextlib.suppress(OSError, ValueError):
        (model, *_) = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return str(model)
    return platform.processor() or platform.machine()


class Results:
    """The record of a run as JSON, with its tables as Markdown beside it.

    Both files are rewritten after each case, so that a killed run leaves what it has.

    Args:
        path: of the JSON file.
        device: "cpu" or "cuda".
        append: whether the runs that the file holds already stay.
    """

    def __init__(self, path: Path, device: str, *, append: bool = False) -> None:
        self.path = path
        self.run: Row = {"complete": False, "environment": environment(device), "rates": {}, "cases": []}
        earlier = json.loads(path.read_text(encoding="utf-8"))["runs"] if append and path.exists() else []
        self.runs: list[Row] = [*earlier, self.run]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    @property
    def cases(self) -> list[Row]:
        """The records of this run so far."""
        cases: list[Row] = self.run["cases"]
        return cases

    def add(self, *records: Row) -> None:
        """Append records of cases, print them and write the files."""
        self.cases.extend(records)
        for record in records:
            print("\n".join(lines_of(record)), flush=True)
        self._write()

    def finish(self) -> int:
        """Mark the run as complete, draw the plots (of a file's first run) and print the files' names.

        Returns:
            The exit status: 1 if a result was wrong or one of ours failed.
        """
        self.run["complete"] = True
        self._write()
        note = f"{hardware(self.run['environment'])}, torch {self.run['environment']['torch']}"
        first = len(self.runs) == 1
        plots = draw_suites(self.run, self.path.with_suffix(""), note) if first else []
        for path in (self.path, self.path.with_suffix(".md"), *plots):
            print(f"Wrote {path}")
        return int(any_failure(self.cases))

    def _write(self) -> None:
        atomic_write_text(self.path, as_text(self.runs))
        atomic_write_text(self.path.with_suffix(".md"), "\n".join(map(markdown, self.runs)))


def as_text(runs: Sequence[Row]) -> str:
    """Return runs as JSON with a line a case, floats to six digits."""
    parts = []
    for run in runs:
        head = json.dumps({name: value for name, value in run.items() if name != "cases"})
        cases = ",\n".join(json.dumps(_rounded(case)) for case in run["cases"])
        parts.append(f'{head[:-1]}, "cases": [\n{cases}\n]}}')
    return '{"runs": [\n' + ",\n".join(parts) + "\n]}\n"


def _rounded(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _rounded(value) for name, value in tree.items()}
    return float(f"{tree:.6g}") if isinstance(tree, float) else tree


def any_failure(cases: Iterable[Row]) -> bool:
    """Return whether a result was wrong, or one of ours or a whole case failed; refusing is no failure."""
    return any(
        case.get("status") == "failed"
        or any(
            row["status"] == "wrong" or (row["status"] == "failed" and name.startswith("ours"))
            for name, row in case.get("contenders", {}).items()
        )
        for case in cases
    )


def lines_of(case: Row) -> list[str]:
    """Return a record as text, a line a contender."""
    head = f"{case['suite']} | {case['case']}"
    if "contenders" not in case:
        return [f"{head}: {case['status']}: {case['reason']}"]
    lines = []
    for name, row in case["contenders"].items():
        if row["status"] == "ok":
            text = "; ".join(f"{column} {_cell(row, column)}" for column in _COLUMNS if column in row)
        else:
            text = f"{row['status']}: {row['reason']}"
        lines.append(f"{head} | {name}: {text}")
    return lines


# Columns of a row that the tables show, with their titles.
_COLUMNS = {
    "time_ms": "Time in ms: median ± half the interquartile range, ratio to {baseline}",
    "peak_mib": "Peak memory beyond the inputs, MiB",
    "images_per_s": "Images a second",
    "decoding_images_per_s": "Images a second while decoding",
    "graph_time_ms": "Time in ms as a CUDA graph",
    "multiplications_share": "Multiplications of forward and backward, as a share of textbook's",
    "value": "Value",
    "difference": "Relative difference to ours",
    "class_s": "Seconds a class",
    "all_classes_s": "Seconds for all classes",
    "process_mib": "Peak memory of the process beyond the started program, MiB",
    "process_ratio": "The same, as a share of {baseline}",
    "estimate_s": "Seconds to estimate it",
}
_FORMATS = {
    "peak_mib": ".0f",
    "multiplications_share": ".2f",
    "value": ".6g",
    "difference": ".1e",
    "process_mib": ",.0f",
}


def _cell(row: Row, column: str) -> str:
    if row[column] is None:
        return "?"
    if column != "time_ms":
        default = ",.0f" if row[column] >= 100 else ".3g"
        return format(row[column], _FORMATS.get(column, default))
    text = f"{row['time_ms']:.3g} ±{row['iqr_ms'] / 2 / row['time_ms']:.0%}"
    if "time_ratio" in row:
        text += f", {row['time_ratio']:.2f}"
    if "floor_ms" in row:
        text += f"; floor {row['floor_ms']:.3g}: {row['floor_ms'] / row['time_ms']:.0%}"
    if "served_by" in row:
        text += f" [{row['served_by']}]"
    return text


def hardware(found: Row) -> str:
    """Return the machine of an environment in words."""
    return found["gpu"] if found["device"] == "cuda" else f"{found['cpu']}, {found['cores_used']} cores"


def markdown(run: Row) -> str:
    """Return a run as Markdown tables, with what was not measured and why."""
    found = run["environment"]
    lines = [
        f"{hardware(found)}; torch {found['torch']}, Triton {found['triton']}, Python {found['python']}, "
        f"sagan-layers {found['sagan_layers']}, commit {str(found['commit'])[:12]}"
        f"{' (dirty)' if found['dirty'] else ''}, {found['date']}: `{found['command']}`.",
        "",
    ]
    if not run["complete"]:
        lines += ["**This run was not finished.**", ""]
    if run["rates"]:
        rates = ", ".join(f"{name} {rate:.4g}" for name, rate in run["rates"].items())
        lines += [f"Rates: {rates}.", ""]
    reasons: dict[str, str] = {}
    for suite in dict.fromkeys(case["suite"] for case in run["cases"]):
        cases = [case for case in run["cases"] if case["suite"] == suite]
        baseline = next((case["baseline"] for case in cases if "baseline" in case), "")
        rows = [row for case in cases for row in case.get("contenders", {}).values()]
        lines += [f"## {suite}", ""]
        for column, title in _COLUMNS.items():
            if any(row.get(column) is not None for row in rows) or (column == "time_ms" and not rows):
                lines += [f"{title.format(baseline=baseline)}:", "", *_table(cases, column, reasons), ""]
    if reasons:
        lines += ["Reasons:", "", *(f"- ({number}) {reason}" for reason, number in reasons.items()), ""]
    return "\n".join(lines)


def _table(cases: Sequence[Row], column: str, reasons: dict[str, str]) -> list[str]:
    names = list(dict.fromkeys(name for case in cases for name in case.get("contenders", {})))
    lines = [f"| case | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for case in cases:
        cells = []
        for name in names:
            row = case["contenders"].get(name, {}) if "contenders" in case else case
            if row.get("status", "ok") != "ok":
                number = reasons.setdefault(f"{row['status']}: {row['reason']}", str(len(reasons) + 1))
                cells.append(f"({number})")
            else:
                cells.append(_cell(row, column) if column in row else "")
        lines.append(f"| {case['case']} | {' | '.join(cells)} |")
    return lines
