"""Every suite on the CPU: ``python -m benchmarks [--quick]``."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness

# Modules with `main(arguments) -> status` that take --quick, --device and --out.
SUITES = ("attention", "spectral_norm", "data")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites one after the other; return the worst of their statuses."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes: is everything in order?")
    parser.add_argument("--out", type=Path, default=harness.ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    statuses: list[int] = []
    parts = ["# Benchmarks on the CPU", ""]
    for suite in SUITES:
        out = options.out / f"{suite}_cpu{'_quick' if options.quick else ''}.json"
        module = importlib.import_module(f"benchmarks.bench_{suite}")
        statuses.append(module.main(["--out", str(out), *(["--quick"] if options.quick else [])]))
        text = harness.markdown(json.loads(out.read_text(encoding="utf-8")))
        parts += [f"# bench_{suite}", "", text]
    summary = options.out / f"summary_cpu{'_quick' if options.quick else ''}.md"
    summary.write_text("\n".join(parts), encoding="utf-8")
    print(f"Wrote {summary}")
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main())
