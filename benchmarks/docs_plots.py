"""Draw the documentation's plots from the recorded results, without measuring: ``python -m benchmarks.docs_plots``.

The tables beside the results have all cases; a plot shows those that a reader can take in.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.plots import Dots, Lines, draw
from benchmarks.report import RESULTS, ROOT, Row, hardware

FOLDER = ROOT / "docs" / "_static" / "plots"
FASTER = "time / textbook's: below 1 is faster"
MEMORY = "peak memory beyond the inputs, MiB"


class Recorded:
    """The cases that a file of results holds.

    Args:
        name: of the file, without its ending.
        results: the folder of the results.
        freed: what happened to memory that a process freed: "returned" to the system, glibc's default, or "kept".
    """

    def __init__(self, name: str, results: Path = RESULTS, *, freed: str = "returned") -> None:
        runs = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))["runs"]
        runs = [run for run in runs if run["environment"].get("freed_memory") in (None, freed)]
        found = runs[0]["environment"]
        self.note = f"{hardware(found)}, torch {found['torch'].partition('+')[0]}"
        # By suite and case; a case may have been measured in several runs.
        self.cases: dict[tuple[str, str], list[Row]] = {}
        for case in (case for run in runs for case in run["cases"] if "contenders" in case):
            rows = {name: row for name, row in case["contenders"].items() if row["status"] == "ok"}
            self.cases.setdefault((case["suite"], case["case"]), []).append(rows)

    def values(self, suite: str, case: str, column: str, only: str = "") -> dict[str, float]:
        """Return a column of a case by contender, all of one run: the latest of those that have most contenders.

        Args:
            suite: of the case.
            case: its name.
            column: such as "time_ms".
            only: a regular expression that finds the contenders.
        """
        found = [
            {name: row[column] for name, row in rows.items() if row.get(column) and re.search(only, name)}
            for rows in self.cases[suite, case]
        ]
        return max(reversed(found), key=len)

    def rows(
        self, suite: str, cases: dict[str, str], column: str, only: str = ""
    ) -> dict[str, dict[str, float]]:
        """Return a column by row and contender; ``cases`` maps the rows' names to the recorded ones."""
        return {row: self.values(suite, case, column, only) for row, case in cases.items()}


def attention_by_resolution(path: Path) -> None:
    """Time and memory of one image against the size of the map."""
    recorded = Recorded("attention_cpu")
    cases = [
        ("16×16", "N64 C64 16x16 pooled float32", 64),
        ("32×32", "N32 C64 32x32 pooled float32", 32),
        ("64×64", "N4 C64 64x64 pooled float32", 4),
        ("64×64,\nno pool", "N4 C64 64x64 unpooled float32", 4),
        ("128×128,\nno pool", "N1 C64 128x128 unpooled float32", 1),
    ]

    def lines(column: str) -> dict[str, dict[float, float]]:
        found: dict[str, dict[float, float]] = {"textbook": {}, "ours": {}}
        for x, (_, case, images) in enumerate(cases):
            for name, value in recorded.values(
                "core forward+backward", case, column, "^(textbook|ours)$"
            ).items():
                found[name][float(x)] = value / images
        return found

    ticks = {float(x): name for x, (name, *_) in enumerate(cases)}
    panels = [
        Lines("", "MiB", lines("peak_mib"), "Peak memory of one image", ticks),
        Lines("feature map of 64 channels", "ms", lines("time_ms"), "Time of one image", ticks),
    ]
    draw(path, "Attention, forward and backward", panels, f"{recorded.note}, float32, default allocator")


_SHAPES = {
    "64×64, C 128": "N8 C128 64x64 pooled",
    "64×64, C 64": "N4 C64 64x64 pooled",
    "32×32, C 256": "N16 C256 32x32 pooled",
    "32×32, C 64": "N32 C64 32x32 pooled",
    "16×16, C 64": "N64 C64 16x16 pooled",
    "8×8, C 256": "N64 C256 8x8 pooled",
}
_ATTENTION = "^(ours|textbook|SDPA|SDPA padded)$"


def attention(path: Path) -> None:
    """Attention alone."""
    recorded, suite = Recorded("attention_cpu"), "core forward+backward"
    float32 = {row: f"{case} float32" for row, case in _SHAPES.items()}
    kept = Recorded("attention_cpu", freed="kept").rows(suite, float32, "time_ratio", _ATTENTION)
    bfloat16 = {row: f"{case} bfloat16" for row, case in _SHAPES.items()}
    unpooled = {
        "64×64, C 64, no pool": "N4 C64 64x64 unpooled float32",
        "128×128, no pool": "N1 C64 128x128 unpooled float32",
    }
    both = float32 | unpooled
    panels = [
        Dots("", recorded.rows(suite, both, "time_ratio", _ATTENTION), "Time, float32", 1.0),
        Dots("", kept, "Time, float32, freed memory kept", 1.0),
        Dots(FASTER, recorded.rows(suite, bfloat16, "time_ratio", _ATTENTION), "Time, bfloat16", 1.0),
        Dots(MEMORY, recorded.rows(suite, both, "peak_mib", _ATTENTION), "Memory, float32"),
    ]
    draw(path, "Attention alone, forward and backward", panels, recorded.note)


def attention_r1(path: Path) -> None:
    """R1 through the block."""
    recorded, suite = Recorded("attention_cpu"), "block R1"
    cases = {row: f"{case} float32" for row, case in _SHAPES.items()}
    panels = [
        Dots(FASTER, recorded.rows(suite, cases, "time_ratio", _ATTENTION), "Time, float32", 1.0),
        Dots(MEMORY, recorded.rows(suite, cases, "peak_mib", _ATTENTION), "Memory, float32"),
    ]
    draw(path, "R1 through SelfAttention2d", panels, recorded.note)


def conditional_norm(path: Path) -> None:
    """Conditional batch norm at each map of G."""
    recorded = Recorded("conditional_norm_cpu")
    shapes = ["4x1024x4x4", "4x1024x8x8", "4x512x16x16", "4x256x32x32", "4x128x64x64", "4x64x128x128"]
    panels = []
    for memory_format in ("NCHW", "channels_last"):
        cases = {shape.replace("x", "×"): f"{shape} float32 {memory_format}" for shape in shapes}
        rows = recorded.rows(
            "norm and ReLU, maps of G", cases, "time_ratio", "^(ours|textbook|BigGAN-PyTorch)$"
        )
        panels.append(
            Dots("time / nn.BatchNorm2d's, without classes", rows, f"float32, {memory_format}", 1.0)
        )
    draw(path, "Conditional batch norm and ReLU, maps of G", panels, recorded.note)


def resampling(path: Path) -> None:
    """Convolutions that change the resolution, in each form."""
    recorded, suite = Recorded("resampling_cpu"), "3x3 convolution"
    layers = [case for of, case in recorded.cases if of == suite and case.endswith("N4 float32")]
    cases = {
        case.removesuffix(" N4 float32").replace("->", "→").replace(" C", ", C "): case for case in layers
    }
    panels = [
        Dots(FASTER, recorded.rows(suite, cases, "time_ratio"), "Time", 1.0),
        Dots(MEMORY, recorded.rows(suite, cases, "peak_mib"), "Memory"),
    ]
    draw(path, "3×3 convolutions that resample, batch 4", panels, f"{recorded.note}, float32")


def spectral_norm(path: Path) -> None:
    """Spectral normalisation of D."""
    recorded, suite = Recorded("spectral_norm_cpu"), "D forward+backward"
    cases = {
        f"{memory_format}, batch {batch}": f"D 128x128 width 64 {memory_format} batch {batch}"
        for memory_format in ("NCHW", "channels_last")
        for batch in (8, 2)
    }
    panels = [
        Dots("time / that without normalisation", recorded.rows(suite, cases, "time_ratio"), "Time", 1.0),
        Dots(MEMORY, recorded.rows(suite, cases, "peak_mib"), "Memory"),
    ]
    draw(path, "Spectral normalisation of SAGAN's D", panels, f"{recorded.note}, float32")


def data_rates(path: Path) -> None:
    """Images a second of preparing and reading."""
    recorded = Recorded("data_cpu")
    panels = []
    for suite, title in {
        "prepare": "prepare: 2,400 JPEGs to 128 pixels",
        "random batches, warm": "Random batches of 256, in the cache",
        "random batches, cold": "Random batches of 256, from the disk",
    }.items():
        (case,) = (case for of, case in recorded.cases if of == suite)
        rows = {name: {name: value} for name, value in recorded.values(suite, case, "images_per_s").items()}
        panels.append(Dots("images a second", rows, title, numbers=True))
    draw(path, "Reading images", panels, recorded.note)


def step(path: Path) -> None:
    """A training step, against what people run."""
    recorded = Recorded("step_cpu")
    shown = "^(ours|textbook|BigGAN-PyTorch|BigGAN-PyTorch toggled)$"
    case = "batch 4, 128 pixels, width 64"
    suites = {"float32": ("step, in separate processes", case), "bfloat16": ("step", f"{case}, bfloat16")}
    seconds = {
        row: {name: ms / 1000 for name, ms in recorded.values(suite, of, "time_ms", shown).items()}
        for row, (suite, of) in suites.items()
    }
    memory = {
        row: recorded.values("step", of, "peak_mib", shown)
        for row, of in {"float32": case, "bfloat16": f"{case}, bfloat16"}.items()
    }
    panels = [Dots("seconds a step", seconds, "Time"), Dots(MEMORY, memory, "Memory")]
    draw(path, "A training step: batch 4, 128 pixels, width 64", panels, recorded.note)


def step_scaling(path: Path) -> None:
    """The time of an image's step against batch, width and resolution."""
    recorded = Recorded("step_cpu")
    names = ("batch", "pixels", "width")
    sizes = {
        case: dict(zip(names, map(int, re.findall(r"\d+", case)), strict=True))
        for suite, case in recorded.cases
        if suite == "step, by size"
    }
    common = {"batch": 4, "pixels": 64, "width": 16}
    panels = []
    for varied, title in {
        "batch": "batch size",
        "width": "base width",
        "pixels": "resolution, pixels",
    }.items():
        lines: dict[str, dict[float, float]] = {}
        for case, size in sorted(sizes.items(), key=lambda item: item[1][varied]):
            if all(size[name] == common[name] for name in names if name != varied):
                for name, time_ms in recorded.values("step, by size", case, "time_ms").items():
                    lines.setdefault(name, {})[size[varied]] = time_ms / size["batch"]
        fixed = ", ".join(f"{name} {size}" for name, size in common.items() if name != varied)
        panels.append(Lines(title, "ms an image", lines, fixed))
    draw(path, "A training step by size", panels, f"{recorded.note}, float32")


PLOTS: tuple[Callable[[Path], None], ...] = (
    attention_by_resolution,
    attention,
    attention_r1,
    conditional_norm,
    data_rates,
    resampling,
    spectral_norm,
    step,
    step_scaling,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw every plot into a folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.docs_plots", description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the plots")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for plot in PLOTS:
        path = options.out / f"{plot.__name__}.svg"
        plot(path)
        print(f"Wrote {path}: {path.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
