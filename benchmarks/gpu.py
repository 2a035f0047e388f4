"""What a CUDA machine can tell in under 10 minutes: ``python -m benchmarks.gpu --out DIR``.

The tests marked gpu first, then every suite, the most valuable first. Each step is a process with its own time limit,
so that one that hangs does not take the others' time; results are written as they come.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

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


@dataclass(frozen=True)
class Step:
    """One process of the run."""

    name: str  # its log is ``<name>.log``
    command: tuple[str, ...]  # what runs, from the repository's root
    limit_s: float  # after so long it is killed
    takes_minutes: bool = False  # whether it takes ``--minutes``, and so stops by itself
    missing: str = ""  # if not empty, what it needs and is not here
    variables: dict[str, str] = field(default_factory=dict)  # environment variables to set


@dataclass
class Outcome:
    """How a step ended."""

    name: str
    status: str
    wall_s: float = 0.0
    reason: str = ""


def make_steps(out: Path, peer: Path | None) -> list[Step]:
    """Return the steps, the most valuable first."""
    python = (sys.executable, "-u", "-m")

    def suite(name: str, limit_s: float, *, takes_peer: bool = True) -> Step:
        command = [*python, f"benchmarks.bench_{name}", "--device", "cuda"]
        command += ["--out", str(out / f"{name}_cuda.json")]
        command += ["--peer", str(peer)] if peer and takes_peer else []
        return Step(name, tuple(command), limit_s, takes_minutes=True)

    # With -v, a run that is killed leaves in its log what passed.
    tests = ("pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={out / 'gpu_tests.xml'}")
    sanitizer = shutil.which("compute-sanitizer") or ""
    # Torch asks the driver for what it may refuse, and copes: that is no fault of a kernel.
    memcheck = (sanitizer, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9")
    return [
        Step(
            "gpu_tests",
            (*python, *tests),
            150,
            missing="" if importlib.util.find_spec("pytest") else "pytest is not installed",
        ),
        suite("attention", 200),
        suite("step", 100),
        suite("conditional_norm", 45),
        suite("spectral_norm", 60),
        suite("resampling", 45, takes_peer=False),
        Step(
            "sanitizer",
            (*memcheck, sys.executable, "-u", "-c", KERNELS),
            120,
            missing="" if sanitizer else "compute-sanitizer is not on the PATH",
            # Within one cached block an access past a tensor's end would go unseen.
            variables={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        ),
        # --check writes nothing: the committed record is of every chip.
        Step(
            "kernel_resources",
            (*python, "benchmarks.kernel_resources", "--check", "--arch", "90", "--jobs", "16"),
            120,
        ),
    ]


def run_step(step: Step, out: Path, limit_s: float) -> Outcome:
    """Run one step with its output in a log, and kill it with all that it started when its time is over."""
    command = list(step.command)
    if step.takes_minutes:
        # The last case and the report come on top.
        command += ["--minutes", f"{max(limit_s - 45, limit_s / 2) / 60:.2f}"]
    start = time.monotonic()
    log = out / f"{step.name}.log"
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command,
            cwd=report.ROOT,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **step.variables},
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=limit_s)
        except BaseException as error:
            _kill(process)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return Outcome(step.name, "timed out", time.monotonic() - start, f"killed after {limit_s:.0f} s")
    wall_s = time.monotonic() - start
    if step.name == "gpu_tests" and status == 5:
        return Outcome(step.name, "not run", wall_s, "no test is marked gpu")
    if status:
        return Outcome(step.name, "failed", wall_s, f"exit status {status}, see {log.name}")
    return Outcome(step.name, "ok", wall_s)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and those that it started: it leads its own session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_steps(steps: Sequence[Step], out: Path, budget_s: float) -> list[Outcome]:
    """Run the steps within the budget; ``summary.md`` in ``out`` has the tables and outcomes so far."""
    deadline = time.monotonic() + budget_s
    outcomes: list[Outcome] = []
    for step in steps:
        limit_s = min(step.limit_s, deadline - time.monotonic())
        if step.missing or limit_s < 5:
            outcome = Outcome(step.name, "not run", reason=step.missing or "no time was left")
        else:
            print(f"== {step.name} (at most {limit_s:.0f} s)", flush=True)
            outcome = run_step(step, out, limit_s)
            lines = (out / f"{step.name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join(lines[-200:]), flush=True)
        outcomes.append(outcome)
        print(f"== {step.name}: {outcome.status} {outcome.reason} ({outcome.wall_s:.0f} s)", flush=True)
        (out / "summary.md").write_text(summary(outcomes, out), encoding="utf-8")
    return outcomes


def summary(outcomes: Sequence[Outcome], out: Path) -> str:
    """Return the tables of what was measured, and last the outcome of each step."""
    parts = [path.read_text(encoding="utf-8") for path in sorted(out.glob("*_cuda.md"))]
    parts += ["| step | result | seconds | |", "|---|---|---:|---|"]
    parts += [f"| {each.name} | {each.status} | {each.wall_s:.0f} | {each.reason} |" for each in outcomes]
    return "\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every step; return 0 if none failed, 1 if one did, 2 without CUDA."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=report.ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--peer", type=Path, help="a checkout of BigGAN-PyTorch")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="only these steps")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    steps = make_steps(out, options.peer.resolve() if options.peer else None)
    names = [step.name for step in steps]
    if unknown := set(options.only or ()) - set(names):
        parser.error(f"--only: expected some of {', '.join(names)}; got {', '.join(sorted(unknown))}")
    if options.only:
        steps = [step for step in steps if step.name in options.only]
    if not torch.cuda.is_available():
        print("There is no CUDA device here (torch.cuda.is_available() is false): nothing was run.")
        return 2
    out.mkdir(parents=True, exist_ok=True)
    for name, value in report.environment("cuda").items():
        print(f"{name}: {value}")
    outcomes = run_steps(steps, out, options.minutes * 60 - 10)
    print(summary(outcomes, out))
    return 1 if any(outcome.status in ("failed", "timed out") for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
