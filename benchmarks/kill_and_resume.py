"""A training run that is killed again and again, and resumed, ends as an undisturbed one, bit for bit.

    python -m benchmarks.kill_and_resume --out DIR --kills 20 [--processes 2]

Most kills are SIGKILL, at random moments or while a checkpoint is written; every fourth is SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import report

PROGRAM = report.ROOT / "examples" / "imagenet_sagan.py"
# Columns of a log that differ between two runs of the same computation.
TIMED = ("images_per_s", "data_wait_share", "seconds_left")
STOPPED_BY_SIGTERM = 75  # the trainer's exit status
LIMIT_S = 300.0
SMALL = (
    *("--network.base-width", "8", "--network.g-attention", "16", "--network.d-attention", "16"),
    *("--batch-size", "16", "--device", "cpu", "--output.log-every", "5", "--output.no-tensorboard"),
    "--ignore-memory",
    *("--output.checkpoint-every", "3", "--output.sample-every", "1000000"),
)


def start(
    out: Path, *arguments: object, processes: int = 1, threads: int | None = None
) -> subprocess.Popen[bytes]:
    """Start a subcommand of the trainer, under torchrun if there are several processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    threads = threads or max(1, (os.cpu_count() or 1) // processes)
    with (out / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [*launcher, str(PROGRAM), *map(str, arguments)],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )


def run(out: Path, *arguments: object, processes: int = 1) -> None:
    """Run a subcommand to its end."""
    status = start(out, *arguments, processes=processes).wait()
    if status:
        raise RuntimeError(f"{arguments[0]}: exit status {status}, see {out / 'log.txt'}")


def disturb(out: Path, train: Sequence[object], processes: int, kills: int) -> list[str]:
    """Kill and resume a run, and let it end; return each kill with the checkpoint that it left."""
    checkpoints = out / "disturbed" / "checkpoints"
    chance = random.Random(0)
    moments = []
    for number in range(kills):
        during_write = number % 4 == 0
        how = signal.SIGTERM if number % 4 == 3 else signal.SIGKILL
        pattern = "*.partial*" if during_write else "iteration_*.pt"
        before = set() if during_write else set(checkpoints.glob(pattern))
        process = start(out, *train, processes=processes)
        deadline = time.monotonic() + LIMIT_S
        while not set(checkpoints.glob(pattern)) - before:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"kill {number}: no {pattern} came; exit status {process.returncode}")
            time.sleep(0.02)
        if not during_write:
            time.sleep(chance.uniform(0, 0.7))
        if process.poll() is not None:
            raise RuntimeError(f"the run ended before kill {number}")
        status = kill(process, how)
        if how == signal.SIGTERM and processes == 1 and status != STOPPED_BY_SIGTERM:
            raise RuntimeError(f"SIGTERM: expected exit status {STOPPED_BY_SIGTERM}, got {status}")
        last = max((path.stem for path in checkpoints.glob("iteration_*.pt")), default="no checkpoint")
        moments.append(f"{how.name} with {last}")
    run(out, *train, processes=processes)
    return moments


def kill(process: subprocess.Popen[bytes], number: signal.Signals) -> int:
    """Send a signal to a process and all that it started; return its exit status."""
    family = [process.pid, *descendants(process.pid)]
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    status = process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in family):
        time.sleep(0.02)
    return status


def descendants(pid: int) -> list[int]:
    """Return the processes that a process has started, and theirs."""
    # torchrun gives each of its processes a session, so that no process group holds them all.
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [each for child in map(int, children) for each in (child, *descendants(child))]


def check_equal(one: Path, other: Path) -> str:
    """Check that two runs ended in the same state and logged the same; return how much was compared."""
    states, logs = [], []
    for folder in (one, other):
        path = max((folder / "checkpoints").glob("iteration_*.pt"))
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["config"]["out"] = ""
        states.append(dict(leaves(state)))
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        logs.append([{name: value for name, value in row.items() if name not in TIMED} for row in rows])
    names = states[0].keys() | states[1].keys()
    different = [name for name in sorted(names) if not same_bits(*(state.get(name) for state in states))]
    if different:
        raise RuntimeError(f"{other.name} and {one.name} ended in different states: {different[:10]}")
    if logs[0] != logs[1]:
        raise RuntimeError(f"{other.name} and {one.name} logged different values")
    tensors = sum(isinstance(value, torch.Tensor) for value in states[0].values())
    return f"{tensors} tensors and {len(logs[0])} log lines equal bit for bit"


def leaves(tree: Any, name: str = "") -> list[tuple[str, Any]]:
    """Return what a checkpoint holds, with names."""
    if not isinstance(tree, (dict, list, tuple)):
        return [(name, tree)]
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return [leaf for key, value in items for leaf in leaves(value, f"{name}.{key}")]


def same_bits(one: Any, other: Any) -> bool:
    """Return whether two leaves are equal, in dtype too."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; raise if the runs differ."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kill_and_resume", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="an empty folder, or one that does not exist")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1, help="of each run")
    parser.add_argument("--resolution", type=int, default=32)
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    if out.exists() and any(out.iterdir()):
        parser.error(f"--out: expected an empty folder, got {options.out}")
    out.mkdir(parents=True, exist_ok=True)
    archives = out / "imagenet"
    run(out, "make-images", "--out", archives, "--classes", 20, "--images", 20, "--val-images", 2)
    source = archives / "ILSVRC2012_img_train.tar"
    run(out, "prepare", "--source", source, "--out", out / "data", "--resolution", options.resolution)
    sizes = ("--network.resolution", options.resolution, "--iterations", 20 * options.kills)
    train = ("train", "--data", out / "data", *SMALL, *sizes, "--auto-resume", "--out")
    run(out, *train, out / "undisturbed", processes=options.processes)
    moments = disturb(out, (*train, out / "disturbed"), options.processes, options.kills)
    print(f"{options.kills} kills: {'; '.join(moments)}")
    print(check_equal(out / "undisturbed", out / "disturbed"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
