"""Every suite on the CPU: ``python -m benchmarks [--quick]``."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report

# The options of each suite; all of them together end within 20 minutes.
SUITES = {
    "step": ("--minutes", "3.5"),
    "attention": ("--minutes", "4"),
    "spectral_norm": ("--minutes", "1.5"),
    "conditional_norm": ("--minutes", "2.5"),
    "resampling": ("--minutes", "3"),
    "data": (),
    "memory": (),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites one after the other; return the worst of their statuses."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes: does everything run?")
    parser.add_argument("--peer", type=Path, help="a checkout of BigGAN-PyTorch, to measure as well")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    device = f"cpu{'_quick' if options.quick else ''}"
    status = 0
    for suite, suite_options in SUITES.items():
        start = time.monotonic()
        given = ["--out", str(options.out / f"{suite}_{device}.json"), *suite_options]
        given += ["--quick"] if options.quick else []
        if options.peer and suite not in ("resampling", "data", "memory"):
            given += ["--peer", str(options.peer.resolve())]
        # A process each: what one suite tells the allocator does not reach the next.
        command = [sys.executable, "-m", f"benchmarks.bench_{suite}", *given]
        status = max(status, subprocess.run(command, check=False).returncode)
        print(f"bench_{suite}: {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
