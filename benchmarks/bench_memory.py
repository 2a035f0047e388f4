"""The trainer's estimate of the memory of a run against the peak of the process that trains it.

    python -m benchmarks.bench_memory [--quick]

Both are bytes beyond those of the started program. The estimate comes from the small parts that `train` measures; the
peak from real runs of the command, with images, samples, attention maps and a checkpoint. See benchmarks/README.md.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import harness, report
from sagan.cli.parsing import parse
from sagan.cli.train import Train, defaults
from sagan.data.prefetch import usable_cpus
from sagan.prepare import SourceOptions, list_source, prepare
from sagan.prepare.synthetic import SyntheticSet, write_layout
from sagan.train.memory import MARGIN, StepMemory

ITERATIONS = 3  # memory grows after the first: moments come, and freed blocks do not fit exactly
IMAGES = SyntheticSet(classes=2, images=16, val_images=0, scale=0.3)
# Prints the most memory that the process took beyond that of the imported program.
_TRAINING = """
import re, sys
from pathlib import Path
from sagan.cli.main import main

def kib(field):
    return int(re.search(rf"^{field}:\\s+(\\d+)", Path("/proc/self/status").read_text(), re.M)[1])

before = kib("VmRSS")
assert main(sys.argv[1:]) == 0
print("beyond", 1024 * (kib("VmHWM") - before))
"""


@dataclass(frozen=True)
class Run:
    """Options of a run."""

    resolution: int
    width: int
    batch: int
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The case's name."""
        return " ".join(
            [f"{self.resolution} px, width {self.width}, batch {self.batch}", *self.options]
        ).strip()

    def arguments(self, data: Path, out: Path) -> list[str]:
        """Return the arguments of ``train``."""
        place = str(min(32, self.resolution // 2))
        return [
            *("--data", str(data), "--out", str(out), "--device", "cpu", "--ignore-memory"),
            *("--iterations", str(ITERATIONS), "--batch-size", str(self.batch)),
            *("--network.resolution", str(self.resolution), "--network.base-width", str(self.width)),
            *("--network.g-attention", place, "--network.d-attention", place, *self.options),
        ]


RUNS = (
    Run(128, 64, 12),
    Run(64, 16, 64),
    Run(64, 16, 64, ("--accumulation", "2")),
    Run(64, 16, 96, ("--step.checkpoint-activations",)),
    Run(64, 16, 64, ("--precision", "bf16")),
    Run(32, 16, 256),
    Run(128, 16, 32),
    Run(64, 32, 64),
)
QUICK = (Run(32, 4, 32),)


def estimate(arguments: Sequence[str], classes: int) -> tuple[int, float]:
    """Return the estimated bytes of a run with these arguments, and the seconds that the estimate took."""
    command = parse(Train, "train", list(arguments), defaults(list(arguments)))
    config = replace(command.run, network=replace(command.run.network, num_classes=classes))
    start = time.perf_counter()
    needed = StepMemory(config, 1, torch.device("cpu")).needed()
    return needed, time.perf_counter() - start


def training_peak(arguments: Sequence[str]) -> int:
    """Return the bytes that a training process takes at most beyond those of the started program."""
    command = [sys.executable, "-c", _TRAINING, "train", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"training failed: {done.stderr.strip()[-300:]}")
    return int(done.stdout.rpartition("beyond")[2])


def measure(run: Run, root: Path, results: report.Results) -> bool:
    """Measure one run; return whether the estimate is as close as it should be."""
    data = root / f"prepared{run.resolution}"
    if not data.exists():
        listing = list_source(str(root / "folder" / "train"), SourceOptions(), workers=usable_cpus())
        prepare(listing, data, resolution=run.resolution, workers=1)
    arguments = run.arguments(data, root / "runs" / run.name.replace(" ", "_"))
    needed, seconds = estimate(arguments, IMAGES.classes)
    peak = training_peak(arguments)
    ratio = needed / peak
    row: report.Row = {
        "status": "ok",
        "process_mib": needed / report.MIB,
        "process_ratio": ratio,
        "estimate_s": seconds,
    }
    measured: report.Row = {"status": "ok", "process_mib": peak / report.MIB}
    results.add(
        {
            "suite": "memory of a run",
            "case": run.name,
            "baseline": "measured",
            "contenders": {"measured": measured, "ours: estimate": row},
        }
    )
    return 2 - MARGIN <= ratio <= MARGIN


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write everything; return 1 if an estimate was more than 15% off."""
    parser = harness.argument_parser("memory", __doc__)
    options = parser.parse_args(arguments)
    results = harness.open_results(options)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_layout(root / "folder", "folder", IMAGES)
        close = [measure(run, root, results) for run in (QUICK if options.quick else RUNS)]
    return max(results.finish(), int(not all(close)))


if __name__ == "__main__":
    raise SystemExit(main())
