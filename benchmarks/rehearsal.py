"""The whole chain at a small size, as a user would run it, with checks after each stage.

    python -m benchmarks.rehearsal --out DIR             # make-images to report
    python -m benchmarks.rehearsal --out DIR --kills 20  # one run killed at random moments

Generated images in ILSVRC's archives, prepare, training on 2 processes, kill -9 in the middle, resume, evaluate, a
second recipe, compare, report. What a kill must not change is compared bit for bit with a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness

PROGRAM = harness.ROOT / "examples" / "imagenet_sagan.py"
CLASSES = 20
# What a run of the same computation may differ in from one time to the next.
TIMED = ("images_per_s", "data_wait_share", "seconds_left")
SMALL = (
    *("--network.base-width", "8", "--network.g-attention", "16", "--network.d-attention", "16"),
    *("--batch-size", "16", "--device", "cpu", "--output.log-every", "5", "--output.no-tensorboard"),
)


class Rehearsal:
    """Runs stages, and records how long each took and what was seen.

    Attributes:
        out: folder for everything.
        resolution: of the images.
        iterations: of each run.
        stages: what was done.
    """

    def __init__(self, out: Path, resolution: int, iterations: int) -> None:
        self.out = out
        self.resolution = resolution
        self.iterations = iterations
        self.stages: list[dict[str, Any]] = []
        self.size = [*SMALL, "--network.resolution", str(resolution), "--iterations", str(iterations)]

    def stage(self, name: str, work: Callable[[], str]) -> None:
        """Do one stage; ``work`` returns what was seen, and raises if it is not what it must be."""
        started = time.monotonic()
        seen = work().replace(str(self.out), "DIR")
        seconds = time.monotonic() - started
        self.stages.append({"stage": name, "seconds": round(seconds, 1), "seen": seen})
        print(f"{name} ({seconds:.0f} s): {seen}", flush=True)

    def command(self, *arguments: object, processes: int = 1) -> list[str]:
        """Return the command line of a subcommand, under torchrun if there are several processes."""
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        return [*launcher, str(PROGRAM), *map(str, arguments)]

    def run(self, *arguments: object, processes: int = 1, expected: int = 0) -> str:
        """Run a subcommand to its end, and return what it printed."""
        done = subprocess.run(
            self.command(*arguments, processes=processes),
            capture_output=True,
            text=True,
            env=_environment(processes),
        )
        if done.returncode != expected:
            raise RuntimeError(
                f"{arguments[0]}: expected exit status {expected}, got {done.returncode}\n{done.stdout}\n{done.stderr}"
            )
        return done.stdout

    def start(self, *arguments: object, processes: int = 1) -> subprocess.Popen[bytes]:
        """Start a subcommand."""
        return subprocess.Popen(
            self.command(*arguments, processes=processes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=_environment(processes),
        )

    def train(self, run: str, *options: object) -> list[object]:
        """Return the arguments of ``train`` for a run of the rehearsal."""
        return ["train", "--data", self.out / "data", "--out", self.out / run, *self.size, *options]


def _environment(processes: int) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // processes)
    return {**os.environ, "OMP_NUM_THREADS": str(threads)}


def kill(process: subprocess.Popen[bytes], number: signal.Signals = signal.SIGKILL) -> int:
    """Send a signal to a process and all that it started; return its exit status."""
    family = [process.pid, *_descendants(process.pid)]
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    status = process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in family):
        time.sleep(0.02)
    return status


def _descendants(pid: int) -> list[int]:
    """Return the processes below one; torchrun gives each of its own a session, so a group does not hold them."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            after_name = stat.read_text().rpartition(")")[2].split()
            children.setdefault(int(after_name[1]), []).append(int(stat.parent.name))
    found, unseen = [], [pid]
    while unseen:
        new = children.get(unseen.pop(), [])
        found += new
        unseen += new
    return found


def last_checkpoint(run: Path) -> dict[str, Any]:
    """Return the contents of a run's latest checkpoint."""
    path = max((run / "checkpoints").glob("iteration_*.pt"))
    contents: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return contents


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Return the names of everything in which two checkpoints differ in any bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{name}: other keys"]
        return [each for key in one for each in differences(one[key], other[key], f"{name}.{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return [f"{name}: other lengths"]
        return [
            each
            for i, pair in enumerate(zip(one, other, strict=True))
            for each in differences(*pair, f"{name}.{i}")
        ]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
    else:
        same = type(one) is type(other) and one == other
    return [] if same else [name]


def logged(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's log without what the clock decides."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMED} for row in rows]


def check_equal(one: Path, other: Path) -> str:
    """Check that two runs ended in the same state and logged the same; return how much was compared."""
    first, second = last_checkpoint(one), last_checkpoint(other)
    for contents in (first, second):
        contents["config"]["out"] = ""
    if different := differences(first, second):
        raise RuntimeError(f"{other.name} ended otherwise than {one.name}: {different[:10]}")
    if logged(one) != logged(other):
        raise RuntimeError(f"{other.name} logged otherwise than {one.name}")
    tensors = sum(isinstance(value, torch.Tensor) for value in _leaves(first))
    return f"{tensors} tensors and {len(logged(one))} log lines equal bit for bit"


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in _leaves(value)]
    if isinstance(tree, (list, tuple)):
        return [leaf for value in tree for leaf in _leaves(value)]
    return [tree]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], limit_s: float = 300) -> None:
    """Wait until a condition holds.

    Raises:
        RuntimeError: if the process ends before, or it takes too long.
    """
    deadline = time.monotonic() + limit_s
    while not condition():
        if process.poll() is not None:
            raise RuntimeError(f"it ended before it could be killed, with status {process.returncode}")
        if time.monotonic() > deadline:
            raise RuntimeError("it took too long to come so far")
        time.sleep(0.02)


def prepare_images(rehearsal: Rehearsal) -> None:
    """Make images in ILSVRC's archives, and pack them."""
    out = rehearsal.out

    def make() -> str:
        return rehearsal.run(
            "make-images", "--out", out / "imagenet", "--classes", CLASSES, "--images", 20, "--val-images", 2
        ).strip()

    def pack() -> str:
        rehearsal.run(
            "prepare",
            "--source",
            out / "imagenet" / "ILSVRC2012_img_train.tar",
            "--out",
            out / "data",
            "--resolution",
            rehearsal.resolution,
        )
        return rehearsal.run("prepare", "--verify", out / "data").strip().splitlines()[-1]

    rehearsal.stage("make-images", make)
    rehearsal.stage("prepare, and --verify", pack)


def rehearse_chain(rehearsal: Rehearsal) -> None:
    """Train, kill, resume, evaluate, compare, report."""
    out, iterations = rehearsal.out, rehearsal.iterations
    often = ["--output.checkpoint-every", max(5, iterations // 4), "--output.sample-every", iterations // 2]
    proxy = ["--evaluation.proxy", "--evaluation.count", 200, "--evaluation.cache", out / "cache"]
    measured = [*often, *proxy, "--evaluation.every", iterations // 4]

    def straight() -> str:
        rehearsal.run(*rehearsal.train("straight", *measured), processes=2)
        return f"{iterations} iterations on 2 processes"

    def killed() -> str:
        process = rehearsal.start(*rehearsal.train("killed", *measured), processes=2)
        log = out / "killed" / "metrics.jsonl"
        checkpoints = out / "killed" / "checkpoints"

        def halfway() -> bool:
            kept = any(checkpoints.glob("iteration_*.pt"))
            return kept and log.exists() and len(log.read_text().splitlines()) > iterations // 10 + 1

        wait_for(halfway, process)
        status = kill(process)
        return f"kill -9 after {len(log.read_text().splitlines())} log lines, exit status {status}"

    def resumed() -> str:
        rehearsal.run(*rehearsal.train("killed", *measured, "--resume"), processes=2)
        return check_equal(out / "straight", out / "killed")

    def evaluate() -> str:
        tables = []
        for processes in (1, 2):
            rehearsal.run(
                *(
                    "evaluate",
                    "--source",
                    out / "straight",
                    "--proxy",
                    "--count",
                    200,
                    "--metrics",
                    "fid",
                    "kid",
                    "pr",
                ),
                *("--cache", out / "cache", "--out", out / f"evaluation_{processes}", "--device", "cpu"),
                processes=processes,
            )
            (file,) = (out / f"evaluation_{processes}").glob("*.json")
            tables.append(
                {name: each["value"] for name, each in json.loads(file.read_text())["figures"].items()}
            )
        # The number of threads moves the last bits.
        if not all(math.isclose(tables[0][name], tables[1][name], rel_tol=1e-9) for name in tables[0]):
            raise RuntimeError(f"1 process measures {tables[0]}, 2 processes {tables[1]}")
        return f"1 and 2 processes agree: {', '.join(f'{name} {value:.4g}' for name, value in tables[0].items())}"

    def second() -> str:
        rehearsal.run(*rehearsal.train("second", *measured, "--recipe", "sn_on_gd_ttur"))
        return f"recipe sn_on_gd_ttur, {iterations} iterations on 1 process"

    def compare() -> str:
        rehearsal.run(
            "compare", out / "straight", out / "killed", out / "second", "--out", out / "comparison"
        )
        table = (out / "comparison" / "comparison.md").read_text()
        rows = [
            line
            for line in table.splitlines()
            if line.startswith(("| straight |", "| killed |", "| second |"))
        ]
        if len(rows) != 3 or rows[0].split("|")[4:] != rows[1].split("|")[4:]:
            raise RuntimeError(f"expected three runs, the first two with the same figures:\n{table}")
        return f"{len(rows)} runs in comparison.md and comparison.png"

    def report() -> str:
        rehearsal.run("report", "--source", out / "straight")
        rehearsal.run("sample", "--source", out / "straight", "--out", out / "samples.png", "--device", "cpu")
        rehearsal.run(
            "attention-maps", "--source", out / "straight", "--out", out / "maps.png", "--device", "cpu"
        )
        size = (out / "straight" / "report.html").stat().st_size
        return f"report.html of {size / 2**20:.1f} MiB, samples.png, maps.png"

    for name, work in (
        ("train, 2 processes", straight),
        ("train, 2 processes, killed", killed),
        ("resume", resumed),
        ("evaluate", evaluate),
        ("another recipe", second),
        ("compare", compare),
        ("report, sample, attention-maps", report),
    ):
        rehearsal.stage(name, work)


def _any_in(folder: Path, pattern: str) -> bool:
    return any(folder.glob(pattern))


def _new_in(checkpoints: Path, before: set[str]) -> bool:
    return bool({path.name for path in checkpoints.glob("iteration_*.pt")} - before)


def rehearse_kills(rehearsal: Rehearsal, kills: int, seed: int) -> None:
    """Kill one run again and again at random moments, most of them with SIGKILL."""
    out = rehearsal.out
    often = ["--output.checkpoint-every", 3, "--output.sample-every", 10**6]
    chance = random.Random(seed)
    moments: list[str] = []

    def straight() -> str:
        rehearsal.run(*rehearsal.train("undisturbed", *often))
        return f"{rehearsal.iterations} iterations"

    def disturbed() -> str:
        checkpoints = out / "disturbed" / "checkpoints"
        for number in range(kills):
            before = {path.name for path in checkpoints.glob("iteration_*.pt")}
            process = rehearsal.start(*rehearsal.train("disturbed", *often, "--auto-resume"))
            if number % 4 == 0:  # in the middle of writing a checkpoint
                wait_for(partial(_any_in, checkpoints, "*.partial*"), process)
            else:
                wait_for(partial(_new_in, checkpoints, before), process)
                time.sleep(chance.uniform(0, 0.7))
            if process.poll() is not None:
                raise RuntimeError(f"the run ended before kill {number}: give it more iterations")
            how = signal.SIGTERM if number % 4 == 3 else signal.SIGKILL
            status = kill(process, how)
            if how == signal.SIGTERM and status != 75:
                raise RuntimeError(f"SIGTERM: expected exit status 75, got {status}")
            kept = max((path.name for path in checkpoints.glob("iteration_*.pt")), default="none")
            moments.append(f"{how.name} with {kept.removesuffix('.pt')}")
        rehearsal.run(*rehearsal.train("disturbed", *often, "--auto-resume"))
        return f"{kills} kills: {'; '.join(moments)}"

    def compared() -> str:
        return check_equal(out / "undisturbed", out / "disturbed")

    rehearsal.stage("train, undisturbed", straight)
    rehearsal.stage(f"train, killed {kills} times", disturbed)
    rehearsal.stage("what is left", compared)


def markdown(record: dict[str, Any]) -> str:
    """Return the stages as a table."""
    environment = record["environment"]
    lines = [
        f"{environment.get('cpu', 'CPU')}, torch {environment['torch']}, commit {environment.get('commit', '?')}."
    ]
    for title, stages in record["rehearsals"].items():
        lines += ["", f"## {title}", "", "| stage | seconds | seen |", "|---|---:|---|"]
        lines += [f"| {each['stage']} | {each['seconds']:.0f} | {each['seen']} |" for each in stages]
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a rehearsal; any stage that does not come out as it must raises."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rehearsal", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="an empty folder, or one that does not exist")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--iterations", type=int, help="of each run")
    parser.add_argument(
        "--kills", type=int, default=0, help="kill a run so many times, in place of the chain"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument(
        "--record", type=Path, help="JSON file to add the stages to; Markdown is written beside it"
    )
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    if out.exists() and any(out.iterdir()):
        parser.error(f"--out: expected an empty folder, {options.out} is not")
    out.mkdir(parents=True, exist_ok=True)
    iterations = options.iterations or (20 * options.kills if options.kills else 80)
    rehearsal = Rehearsal(out, options.resolution, iterations)
    prepare_images(rehearsal)
    if options.kills:
        rehearse_kills(rehearsal, options.kills, options.seed)
        title = f"{options.kills} kills at {options.resolution} pixels"
    else:
        rehearse_chain(rehearsal)
        title = f"The chain at {options.resolution} pixels"
    if options.record:
        record: dict[str, Any] = {"rehearsals": {}}
        if options.record.exists():
            record = json.loads(options.record.read_text())
        record["environment"] = harness.environment("cpu")
        record["rehearsals"][title] = rehearsal.stages
        options.record.write_text(json.dumps(record, indent=1) + "\n")
        options.record.with_suffix(".md").write_text(markdown(record))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
