"""The figures that README and docs cite, out of the records in ``benchmarks/results``.

A page holds ``<!-- figure: NAME -->text<!-- /figure -->``. ``python -m benchmarks.figures`` writes the texts;
``--check`` exits with 1 where one is not what the records say.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, ROOT, Row

MARKER = re.compile(r"<!-- figure: (\S+) -->(.*?)<!-- /figure -->", re.DOTALL)
# What a process does with memory that it frees (docs/attention.md): glibc's default, and the trainer's setting.
FREED = ("returned", "kept")


@cache
def record(name: str) -> Any:
    """Return what ``benchmarks/results/NAME.json`` holds."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def cases(name: str, suite: str, freed: str | None = None) -> dict[str, dict[str, Row]]:
    """Return the measured contenders of each case of a suite, each from the last run that has it."""
    return {
        case["case"]: {who: row for who, row in case["contenders"].items() if row["status"] == "ok"}
        for run in record(f"{name}_cpu")["runs"]
        for case in run["cases"]
        if case["suite"] == suite
        and "contenders" in case
        and freed in (None, run["environment"].get("freed_memory"))
    }


def values(
    name: str,
    suite: str,
    case: str,
    contender: str,
    column: str = "time_ratio",
    freed: Sequence[str] = FREED,
) -> list[float]:
    """Return a column of a contender over all cases that match a regular expression, in each state of the allocator."""
    found = [
        contenders[contender][column]
        for state in freed
        for title, contenders in cases(name, suite, state).items()
        if re.search(case, title) and contenders.get(contender, {}).get(column) is not None
    ]
    if not found:
        raise LookupError(f"{name}: no {column} of {contender!r} in {suite!r} | {case!r}")
    return found


def span(numbers: Iterable[float], form: str = ".2f", unit: str = "") -> str:
    """Return "least to greatest", one number where both read the same."""
    numbers = list(numbers)
    least, greatest = format(min(numbers), form), format(max(numbers), form)
    return f"{least}{unit}" if least == greatest else f"{least} to {greatest}{unit}"


def percents(ratios: Iterable[float]) -> str:
    """Return ratios of a time to a baseline as what is added to it."""
    return span([100 * (ratio - 1) for ratio in ratios], ".0f", "%").replace("-", "−")


def fraction(parts: Iterable[float], wholes: Iterable[float]) -> str:
    """Return "1/12 to 1/15"."""
    shares = sorted(whole / part for part, whole in zip(parts, wholes, strict=True))
    return span([round(share) for share in shares], ".0f").replace("to ", "to 1/").join(["1/", ""])


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table between empty lines; columns after the first ``left`` are aligned to the right."""
    lines = [heads, ["---"] * left + ["---:"] * (len(heads) - left), *rows]
    return "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"


def pair(name: str, suite: str, case: str, contender: str, column: str = "time_ratio", form: str = ".2f") -> str:
    """Return a number in each state of the allocator, "0.49 / 1.05"; a dash where it was not measured."""
    numbers = [cases(name, suite, state).get(case, {}).get(contender, {}).get(column) for state in FREED]
    texts = ["–" if number is None else format(number, form) for number in numbers]
    return "–" if texts == ["–", "–"] else " / ".join(texts)


# Attention

POOLED_64 = r"64x64 pooled float32"
CORE, BLOCK, R1 = "core forward+backward", "block forward+backward", "block R1"


def attention_share(suite: str, case: str = POOLED_64) -> str:
    """Return our share of the textbook's peak memory."""
    ours, textbook = (
        values("attention", suite, case, who, "peak_mib", FREED[:1]) for who in ("ours", "textbook")
    )
    return fraction(ours, textbook)


def attention_table(suite: str) -> str:
    """Return times and memory of every case."""
    of = partial(pair, "attention", suite)
    contenders = ("ours", "SDPA", *(["SDPA padded"] if suite != R1 else []))
    rows = []
    for case in dict.fromkeys(case for state in FREED for case in cases("attention", suite, state)):
        n, c, side, pooling, dtype = case.split()
        title = f"{n[1:]}, {c[1:]}, {side.split('x')[0]}{', unpooled' if pooling == 'unpooled' else ''}"
        served = next(found[case] for state in FREED if case in (found := cases("attention", suite, state)))
        rows.append(
            [
                title,
                dtype,
                of(case, "textbook", "time_ms", ".3g"),
                *(of(case, who) for who in contenders),
                *(f"{served[who]['peak_mib']:,.0f}" for who in ("textbook", "ours")),
                served["ours"]["served_by"],
            ]
        )
    heads = ["N, C, side", "dtype", "textbook ms", *contenders, "textbook MiB", "ours MiB", "served by"]
    return table(heads, rows, left=2)


# Spectral norm

SN, SN_CALL = "D forward+backward", "the call alone"
SN_TITLES = {
    "without SN": "without SN",
    "ours: shared": "**`shared_spectral_norm`**",
    "ours: per layer": "these layers without sharing",
    "torch parametrizations.spectral_norm": "`torch.nn.utils.parametrizations.spectral_norm`",
    "torch nn.utils.spectral_norm": "`torch.nn.utils.spectral_norm`",
    "BigGAN-PyTorch": "BigGAN-PyTorch",
}
TORCH_SN = tuple(SN_TITLES)[3:5]


def of_torch_sn(case: str = "") -> list[float]:
    """Return the ratios of both of torch's forms."""
    return [ratio for who in TORCH_SN for ratio in values("spectral_norm", SN, case, who)]


def sn_table() -> str:
    """Return the ratios of D with and without SN, and the time of the weights alone."""
    columns = [f"D 128x128 width 64 {layout} batch {n}" for layout in ("NCHW", "channels_last") for n in (8, 2)]
    call = cases("spectral_norm", SN_CALL)["D 128x128 width 64 NCHW"]
    rows = []
    for who, title in SN_TITLES.items():
        column, form = ("time_ms", ".0f") if who == "without SN" else ("time_ratio", ".2f")
        cells = [pair("spectral_norm", SN, case, who, column, form) for case in columns]
        cells = [f"{cell} ms" if who == "without SN" else cell for cell in cells]
        rows.append([title, *cells, f"{call[who]['time_ms']:.0f} ms" if who in call else ""])
    heads = ["", *(case.removeprefix("D 128x128 width 64 ").replace(" b", ", b") for case in columns)]
    return table([*heads, "the weights alone"], rows)


# Conditional batch norm

NORM, NORM_RELU, MAPS_OF_G = "norm", "norm and ReLU", "norm and ReLU, maps of G"


def norm_ratios(contender: str, *suites: str, case: str = "") -> list[float]:
    """Return ratios to batch norm."""
    return [ratio for suite in suites for ratio in values("conditional_norm", suite, case, contender)]


def norm_table() -> str:
    """Return times relative to batch norm at every map."""
    rows = []
    for suite in (NORM, NORM_RELU, MAPS_OF_G):
        for case in cases("conditional_norm", suite):
            shape, dtype, layout = case.split()
            of = partial(pair, "conditional_norm", suite, case)
            ratios = [of(who) for who in ("ours", "textbook", "BigGAN-PyTorch")]
            what = "norm" if suite == NORM else "norm, ReLU"
            rows.append([shape, f"{dtype}, {layout}", what, of("nn.BatchNorm2d", "time_ms", ".3g"), *ratios])
    heads = ["map", "", "", "`nn.BatchNorm2d` ms", "**ours**", "textbook", "BigGAN-PyTorch"]
    return table(heads, rows, left=3)


def norm_memory(contender: str) -> str:
    """Return the peak memory of the rows with ReLU relative to another contender's."""
    of = partial(values, "conditional_norm", NORM_RELU, "")
    ours, theirs = of("ours", "peak_mib"), of(contender, "peak_mib")
    return span([mine / other for mine, other in zip(ours, theirs, strict=True)], ".1f")


# Convolutions that resample


def speed_ups(suite: str, case: str) -> list[float]:
    """Return how many times faster than the two operations."""
    return [1 / ratio for ratio in values("resampling", suite, case, "ours")]


def resampling_table() -> str:
    """Return how many times faster each layer of G and D is."""
    columns = [("3x3", "float32"), ("3x3", "bfloat16"), ("1x1", "float32")]
    layers: dict[str, list[str]] = {}
    for kernel, dtype in columns:
        suite = f"{kernel} convolution"
        for case in cases("resampling", suite, "returned"):
            name, sizes, channels, *rest = case.split()
            if rest != ["N4", dtype]:
                continue
            layer = layers.setdefault(f"{name} {sizes.replace('->', ' to ')}", [])
            if kernel == "3x3" and not layer:
                layer.append(f"{channels[1:].replace('->', ' to ')}")
            elif kernel == "1x1" and channels[1:].replace("->", " to ") != layer[0]:
                layer[0] += f" (1x1: {channels[1:].replace('->', ' to ')})"
            numbers = [cases("resampling", suite, state).get(case, {}).get("ours", {}) for state in FREED]
            layer.append(
                " / ".join(f"{1 / row['time_ratio']:.1f}" if row else "–" for row in numbers)
            )
    heads = ["layer", "channels", *(f"{kernel}, {dtype}" for kernel, dtype in columns)]
    return table(heads, ([name, *cells] for name, cells in layers.items()), left=2)


# The training step

STEP, APART, BY_SIZE, LOOP = "step", "step, in separate processes", "step, by size", "loop"
SAGAN_128 = "batch 4, 128 pixels, width 64"
STEP_CONTENDERS = ("ours", "textbook", "BigGAN-PyTorch", "BigGAN-PyTorch toggled")


def apart(contender: str, column: str) -> float:
    """Return a figure of the step in separate processes."""
    number: float = cases("step", APART)[SAGAN_128][contender][column]
    return number


def step_runs(case: str, contender: str, column: str) -> list[float]:
    """Return a column of a contender over all runs of the step in one process."""
    return [
        found["contenders"][contender][column]
        for run in record("step_cpu")["runs"]
        for found in run["cases"]
        if (found["suite"], found["case"]) == (STEP, case)
        and found["contenders"].get(contender, {}).get(column) is not None
    ]


def step_table() -> str:
    """Return time, rate and peak memory of the step."""
    in_one = {"float32": SAGAN_128, "bfloat16 autocast": f"{SAGAN_128}, bfloat16"}

    def row(title: str, text: Callable[[str], str]) -> list[str]:
        return [title, *(text(who) for who in STEP_CONTENDERS)]

    rows = [
        row("float32, in separate processes", lambda who: f"{apart(who, 'time_ms') / 1000:.2f} s"),
        row("images a second", lambda who: f"{apart(who, 'images_per_s'):.2f}"),
    ]
    for dtype, case in in_one.items():
        seconds = {who: [ms / 1000 for ms in step_runs(case, who, "time_ms")] for who in STEP_CONTENDERS}
        rows.append(row(f"{dtype}, all in one process", lambda who, s=seconds: span(s[who], unit=" s")))  # type: ignore[misc]
    for dtype, case in in_one.items():
        peaks = {who: step_runs(case, who, "peak_mib") for who in STEP_CONTENDERS}
        text = lambda who, peaks=peaks: span(peaks[who], ",.0f", " MiB")  # noqa: E731
        rows.append(row(f"peak memory beyond weights and images, {dtype}", text))  # type: ignore[arg-type]
    return table(["", "ours", "textbook", "BigGAN-PyTorch", "toggled"], rows)


def checkpointed(case: str) -> str:
    """Return a row's time and memory without and with checkpointing."""
    row = cases("step", STEP, "returned")[case]
    plain, saved = row["ours"], row["ours checkpointed"]
    times = [each["time_ms"] / 1000 for each in (plain, saved)]
    return (
        f"{times[0]:.2f} s, **{times[1]:.2f} s** checkpointed ({times[1] / times[0]:.2f}x) | "
        f"{plain['peak_mib']:,.0f} MiB, **{saved['peak_mib']:,.0f} MiB**"
    )


def by_size(pattern: str) -> str:
    """Return our share of the textbook's time at some sizes."""
    return span(values("step", BY_SIZE, pattern, "ours", freed=FREED[:1]))
