"""Every suite on the CPU: ``python -m benchmarks [--quick]``."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import harness


@dataclass(frozen=True)
class Suite:
    """A module bench_NAME with ``main(arguments) -> status`` that takes --quick and --out.

    Attributes:
        name: of the suite.
        minutes: after which it starts no case; None if it takes no such option.
        peers: whether it takes --peer.
    """

    name: str
    minutes: float | None
    peers: bool = True


# All of them together end within 20 minutes.
SUITES = (
    Suite("step", 3.5),
    Suite("attention", 4),
    Suite("spectral_norm", 1.5),
    Suite("conditional_norm", 2.5),
    Suite("resampling", 3, peers=False),
    Suite("data", None, peers=False),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites one after the other; return the worst of their statuses."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes: is everything in order?")
    parser.add_argument("--peer", type=Path, help="a checkout of BigGAN-PyTorch, to measure as well")
    parser.add_argument("--out", type=Path, default=harness.ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    statuses: list[int] = []
    parts: list[str] = []
    begun = time.monotonic()
    for suite in SUITES:
        out = options.out / f"{suite.name}_cpu{'_quick' if options.quick else ''}.json"
        started = time.monotonic()
        module = importlib.import_module(f"benchmarks.bench_{suite.name}")
        given = ["--out", str(out), *(["--quick"] if options.quick else [])]
        given += ["--minutes", str(suite.minutes)] if suite.minutes else []
        given += ["--peer", str(options.peer)] if suite.peers and options.peer else []
        statuses.append(module.main(given))
        text = harness.markdown(json.loads(out.read_text(encoding="utf-8")))
        minutes = (time.monotonic() - started) / 60
        parts += [f"# bench_{suite.name} ({minutes:.1f} minutes)", "", text]
    summary = options.out / f"summary_cpu{'_quick' if options.quick else ''}.md"
    title = f"# Benchmarks on the CPU, in {(time.monotonic() - begun) / 60:.1f} minutes"
    summary.write_text("\n".join([title, "", *parts]), encoding="utf-8")
    print(f"Wrote {summary}")
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main())
