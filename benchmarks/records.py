"""Recorded results of the benchmarks, and how their numbers are written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from benchmarks.report import RESULTS, Row

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


def last_with(name: str, suite: str, case: str, contender: str) -> dict[str, Row]:
    """Return the contenders of a case in the last run that has this one."""
    found = [
        each["contenders"]
        for run in record(f"{name}_cpu")["runs"]
        for each in run["cases"]
        if (each["suite"], each["case"]) == (suite, case) and contender in each.get("contenders", {})
    ]
    last: dict[str, Row] = found[-1]
    return last


def digits(number: float) -> str:
    """Return three digits, all of those before the point."""
    return format(number, ",.0f" if number >= 100 else ".3g")


def exponent(number: float) -> str:
    """Return "2.1e-7", and "0" for none."""
    return f"{number:.1e}".replace("e-0", "e-") if number else "0"


def span(numbers: Iterable[float], form: str = ".2f", unit: str = "") -> str:
    """Return "least to greatest", one number where both read the same."""
    numbers = list(numbers)
    least, greatest = format(min(numbers), form), format(max(numbers), form)
    return f"{least}{unit}" if least == greatest else f"{least} to {greatest}{unit}"


def percents(ratios: Iterable[float], form: str = ".0f") -> str:
    """Return ratios of a time to a baseline as what is added to it."""
    return span([100 * (ratio - 1) for ratio in ratios], form, "%").replace("-", "−")


def fraction(parts: Iterable[float], wholes: Iterable[float]) -> str:
    """Return "1/12 to 1/15"."""
    shares = sorted(whole / part for part, whole in zip(parts, wholes, strict=True))
    return span([round(share) for share in shares], ".0f").replace("to ", "to 1/").join(["1/", ""])


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table between empty lines; columns after the first ``left`` are aligned to the right."""
    lines = [heads, ["---"] * left + ["---:"] * (len(heads) - left), *rows]
    return "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"


def pair(name: str, suite: str, case: str, contender: str, column: str = "time_ratio") -> str:
    """Return a number in each state of the allocator, "0.49 / 1.05"; a dash where it was not measured."""
    numbers = [cases(name, suite, state).get(case, {}).get(contender, {}).get(column) for state in FREED]
    form = "{:.2f}".format if column == "time_ratio" else digits
    texts = ["–" if number is None else form(number) for number in numbers]
    return "–" if texts == ["–", "–"] else "\u00a0/\u00a0".join(texts)  # not broken in narrow columns
