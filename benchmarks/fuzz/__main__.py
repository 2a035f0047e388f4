"""Run campaigns, print their counts and write them to one JSON file."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.fuzz import calls, contexts, files, kills
from benchmarks.fuzz.outcomes import BAD, GOOD, Campaign, Outcome, run_cases
from benchmarks.report import Row
from sagan.io import atomic_write_text

CAMPAIGNS = {
    campaign.name: campaign for campaign in (calls.CALLS, contexts.CONTEXTS, files.FILES, kills.KILLS)
}
# The numbers of a seed's cases start here.
_STRIDE = 1_000_000


def run_campaign(campaign: Campaign, *, seed: int, count: int, seconds: float, processes: int) -> Row:
    """Run a campaign and return its record; what went badly is printed at once."""
    start = time.monotonic()
    counts: Counter[tuple[str, str]] = Counter()
    failures: list[Row] = []
    numbers = range(seed * _STRIDE, seed * _STRIDE + count)
    with tempfile.TemporaryDirectory() as folder:
        options = {"seconds": seconds, "processes": processes}
        for number, outcome in run_cases(campaign, numbers, Path(folder), **options):  # type: ignore[arg-type]
            counts[outcome.what, outcome.kind] += 1
            if outcome.kind in BAD:
                print(
                    f"{campaign.name}/{number} {outcome.what}: {outcome.kind}: {outcome.detail}", flush=True
                )
                failures.append({"case": f"{campaign.name}/{number}", **outcome._asdict()})
    by_what: Row = {}
    for (what, kind), found in sorted(counts.items()):
        by_what.setdefault(what, {})[kind] = found
    return {
        "cases": sum(counts.values()),
        "asked_for": count,
        "seconds": round(time.monotonic() - start, 1),
        "counts": {kind: sum(each.get(kind, 0) for each in by_what.values()) for kind in (*GOOD, *BAD)},
        "by_what": by_what,
        "failures": sorted(failures, key=lambda row: (str(row["what"]), str(row["case"]))),
        "seed": seed,
        "environment": report.environment("cpu"),
    }


def run_one(case: str) -> Outcome:
    """Run one case again, in this process."""
    name, _, number = case.partition("/")
    with tempfile.TemporaryDirectory() as folder:
        return CAMPAIGNS[name].run(int(number), Path(folder) / "0")


def table(records: Row) -> str:
    """Return the counts as Markdown."""
    kinds = (*GOOD, *BAD)
    lines = [f"| campaign | cases | {' | '.join(kinds)} |", f"|---|{'---:|' * (len(kinds) + 1)}"]
    for name, record in records.items():
        cells = [f"{record['counts'].get(kind, 0):,}" for kind in kinds]
        lines.append(f"| {name} | {record['cases']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 if any case went badly."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument(
        "campaigns", nargs="*", metavar="CAMPAIGN", help=f"of {', '.join(CAMPAIGNS)}; all by default"
    )
    parser.add_argument("--seconds", type=float, help="start no case of a campaign after so long")
    parser.add_argument("--count", type=int, help="cases of a campaign")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other cases")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=report.RESULTS / "fuzz.json")
    parser.add_argument("--case", help="run one case again, such as calls/17, here")
    options = parser.parse_args(arguments)
    if options.case:
        print(run_one(options.case))
        return 0
    if unknown := set(options.campaigns) - CAMPAIGNS.keys():
        parser.error(f"campaigns: expected some of {', '.join(CAMPAIGNS)}, got {', '.join(sorted(unknown))}")
    records: Row = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    for name in options.campaigns or CAMPAIGNS:
        campaign = CAMPAIGNS[name]
        records[name] = run_campaign(
            campaign,
            seed=options.seed,
            count=options.count or campaign.count,
            seconds=options.seconds or campaign.seconds,
            processes=options.processes,
        )
        options.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(options.out, json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    print(f"\n{table(records)}\n\nWrote {options.out}")
    return int(any(record["failures"] for record in records.values()))


if __name__ == "__main__":
    sys.exit(main())
