"""What a CUDA machine can tell in under 10 minutes: ``python -m benchmarks.gpu --out DIR``.

The tests marked gpu first, then every suite, the most valuable first. Each step is a process with its own time limit,
so that one that hangs does not take the others' time; results are written as they come.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import report

# What compute-sanitizer looks at: small launches of every backend and of the fused block, forward and backward,
# odd sizes.
KERNELS = """
import torch
from sagan_layers import SelfAttention2d, functional
for dtype in (torch.float32, torch.bfloat16):
    for L, S, E, Ev in ((64, 16, 8, 32), (77, 19, 5, 33)):
        shapes = ((2, E, L), (2, E, S), (2, Ev, S))
        leaves = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
        inputs = [leaf.transpose(1, 2) for leaf in leaves]
        for backend in functional.explain_backends(*inputs):
            try:
                functional.select_backend(*inputs, backend=backend)
            except ValueError as error:
                print("refused:", error)
                continue
            y = functional.attention(*inputs, backend=backend)
            grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
            sum(grad.square().sum() for grad in grads).backward()
            torch.cuda.synchronize()
            print("ran:", backend, dtype, L, S)
for pool_size in (1, 2):
    for channels, height, width in ((64, 16, 16), (40, 10, 14)):
        block = SelfAttention2d(
            channels, pool_size=pool_size, spectral_norm=False, gamma_init=0.5, backend="fused"
        ).to("cuda", torch.bfloat16)
        x = torch.randn(2, channels, height, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        try:
            y = block(x)
        except ValueError as error:
            print("refused:", error)
            continue
        y.square().sum().backward()
        torch.cuda.synchronize()
        print("ran: fused", pool_size, channels, height, width)
"""


class Step(NamedTuple):
    """One process of the run."""

    name: str  # its log is NAME.log
    limit_s: float  # after so long it is killed
    command: tuple[str, ...]  # what runs, from the repository's root
    variables: Mapping[str, str] = {}  # environment variables to set


class Outcome(NamedTuple):
    """How a step ended."""

    name: str
    status: str  # "ok", "failed", "timed out" or "not run"
    wall_s: float = 0.0
    reason: str = ""


def make_steps(out: Path, peer: Path | None) -> list[Step]:
    """Return the steps, the most valuable first."""
    python = (sys.executable, "-u", "-m")

    def suite(name: str, limit_s: float, *, takes_peer: bool = True) -> Step:
        # The last case and the report come on top of the minutes.
        minutes = max(limit_s - 45, limit_s / 2) / 60
        command = [*python, f"benchmarks.bench_{name}", "--device", "cuda", "--minutes", f"{minutes:.2f}"]
        command += ["--out", str(out / f"{name}_cuda.json")]
        command += ["--peer", str(peer)] if peer and takes_peer else []
        return Step(name, limit_s, tuple(command))

    # With -v, a run that is killed leaves in its log what passed.
    tests = ("pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={out / 'gpu_tests.xml'}")
    # Torch makes driver calls that may fail harmlessly; ignore their errors.
    memcheck = (
        "compute-sanitizer",
        "--tool",
        "memcheck",
        "--report-api-errors",
        "no",
        "--error-exitcode",
        "9",
    )
    # Within one cached block an access past a tensor's end would go unseen.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # --check writes nothing: the committed record is of every chip.
    resources = ("benchmarks.kernel_resources", "--check", "--arch", "90", "--jobs", "16")
    return [
        Step("gpu_tests", 150, (*python, *tests)),
        suite("attention", 200),
        suite("step", 100),
        suite("conditional_norm", 45),
        suite("spectral_norm", 60),
        suite("resampling", 45, takes_peer=False),
        Step("sanitizer", 120, (*memcheck, sys.executable, "-u", "-c", KERNELS), uncached),
        Step("kernel_resources", 120, (*python, *resources)),
    ]


def run_step(step: Step, out: Path, limit_s: float) -> Outcome:
    """Run one step with its output in a log, and kill it with all that it started when its time is over."""
    if limit_s < 5:
        return Outcome(step.name, "not run", reason="no time was left")
    if shutil.which(step.command[0]) is None:
        return Outcome(step.name, "not run", reason=f"{step.command[0]} is not on the PATH")
    start = time.monotonic()
    with (out / f"{step.name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            step.command,
            cwd=report.ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **step.variables},
            start_new_session=True,
        )
        status, reason = "ok", ""
        try:
            if exit_status := process.wait(timeout=limit_s):
                status, reason = "failed", f"exit status {exit_status}, see {step.name}.log"
        except subprocess.TimeoutExpired:
            status, reason = "timed out", f"killed after {limit_s:.0f} s"
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Outcome(step.name, status, time.monotonic() - start, reason)


def run_steps(steps: Sequence[Step], out: Path, budget_s: float) -> list[Outcome]:
    """Run the steps within the budget; ``summary.md`` in ``out`` has the tables and outcomes so far."""
    deadline = time.monotonic() + budget_s
    outcomes: list[Outcome] = []
    for step in steps:
        limit_s = min(step.limit_s, deadline - time.monotonic())
        print(f"== {step.name} (at most {limit_s:.0f} s)", flush=True)
        outcome = run_step(step, out, limit_s)
        if outcome.status != "not run":
            lines = (out / f"{step.name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join(lines[-200:]), flush=True)
        outcomes.append(outcome)
        print(f"== {step.name}: {outcome.status} {outcome.reason} ({outcome.wall_s:.0f} s)", flush=True)
        tables = [path.read_text(encoding="utf-8") for path in sorted(out.glob("*_cuda.md"))]
        rows = [f"| {each.name} | {each.status} | {each.wall_s:.0f} | {each.reason} |" for each in outcomes]
        parts = [*tables, "| step | result | seconds | |", "|---|---|---:|---|", *rows, ""]
        (out / "summary.md").write_text("\n".join(parts), encoding="utf-8")
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every step; return 0 if none failed, 1 if one did, 2 without CUDA."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=report.RESULTS / "gpu")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--peer", type=Path, help="a checkout of BigGAN-PyTorch")
    names = [step.name for step in make_steps(Path(), None)]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="only these steps")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("There is no CUDA device here (torch.cuda.is_available() is false): nothing was run.")
        return 2
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    steps = make_steps(out, options.peer.resolve() if options.peer else None)
    chosen = [step for step in steps if step.name in options.only]
    outcomes = run_steps(chosen, out, options.minutes * 60 - 10)
    print((out / "summary.md").read_text(encoding="utf-8"))
    return int(any(outcome.status in ("failed", "timed out") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
