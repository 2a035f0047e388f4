"""What every suite shares: results checked before times, contenders timed in turn, peak memory, options.

A suite is a list of cases. A case makes its inputs, names its contenders and turns each into a function without
arguments that returns named tensors.
"""

from __future__ import annotations

import abc
import argparse
import contextlib
import ctypes
import gc
import math
import multiprocessing
import re
import signal
import statistics
import time
import timeit
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Measurement, TaskSpec

from benchmarks.report import MIB, RESULTS, Results, Row
from sagan.train.allocator import keep_freed_memory

OUT_OF_MEMORY = "out of memory"
_MEMORY_LIMIT_S = 300
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Outputs = dict[str, Tensor]
Run = Callable[[], Outputs]
# Whatever a contender raises goes into the results as the reason.
_ANY_FAILURE = (Exception,)


class Refused(Exception):  # noqa: N818 (a reason, not a fault)
    """A contender cannot run a case; the message says why."""


class WrongResultError(Exception):
    """A contender's result is not the expected one."""


@dataclass(frozen=True)
class Settings:
    """How long and how often to measure."""

    target_s: float = 3.0  # what the rounds over the contenders of one case aim at
    max_rounds: int = 15  # when they are fast
    min_rounds: int = 3  # however slow they are
    sample_ms: float = 20.0  # one sample repeats a run for at least so long
    memory: bool = True  # also measure peak memory
    graphs: bool = False  # also time replays of a CUDA graph


@dataclass(frozen=True)
class Case(abc.ABC):
    """One line of a suite's table. It is pickled for the memory processes, so it holds no tensors."""

    suite: str
    device: str  # "cpu" or "cuda"

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The line's name in the tables, unique in its suite."""

    @property
    def baseline(self) -> str:
        """The contender that ratios refer to."""
        return "textbook"

    @property
    def tolerance(self) -> float:
        """The largest relative error that passes."""
        return 1e-3

    @property
    def measures_memory(self) -> bool:
        """Whether peak memory is measured, where the settings ask for it."""
        return True

    @property
    def images(self) -> int | None:
        """How many images a run takes in, where the results say how many that is a second."""
        return None

    @abc.abstractmethod
    def contenders(self) -> list[str]:
        """Return the names of the contenders; those of this library start with "ours"."""

    @abc.abstractmethod
    def inputs(self) -> Any:
        """Make the inputs, the same at every call."""

    @abc.abstractmethod
    def prepare(self, contender: str, inputs: Any) -> Run:
        """Return the function to measure; raise :class:`Refused` if there is none."""

    @abc.abstractmethod
    def expected(self, inputs: Any) -> Outputs:
        """Return in float64 what :meth:`select` of every contender's outputs should be."""

    def select(self, outputs: Outputs) -> Outputs:
        """Return the part of the outputs that is compared."""
        return outputs

    def warm_up_case(self) -> Case:
        """Return a small case that loads the same libraries."""
        return self

    def first_run(self, contender: str, run: Run, row: Row) -> Outputs:
        """Make the run that is checked, and add to the row what else the results say of the contender."""
        return run()

    def is_repeated(self, contender: str, rows: Mapping[str, Row]) -> bool:
        """Return whether "ours" has already measured this contender, because it selected the same backend."""
        taken = rows.get("ours", {}).get("served_by", "").split(" + ")[0]
        return bool(taken) and contender == f"ours: {taken}"

    def may_run_out(self, contender: str) -> bool:
        """Return whether running out of memory is this contender's known limit, and so no failure."""
        return False

    def floor_ms(self, rates: Mapping[str, float]) -> float | None:
        """Return the least time that the device's rates allow, None if they are not known."""
        return None


def backend_of(contender: str) -> str:
    """Return the backend in the name of one of ours: "ours: chunked" -> "chunked", "ours" -> "auto"."""
    return contender.partition(": ")[2] or "auto"


def outputs_and_grads(y: Tensor, cotangent: Tensor, leaves: Mapping[str, Tensor]) -> Outputs:
    """Run backward; return the output as "y" and the gradient of each leaf as "grad_NAME"."""
    grads = torch.autograd.grad(y, list(leaves.values()), cotangent)
    return {"y": y.detach(), **{f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def compare(outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> float:
    """Return the largest relative error (in the 2-norm) over the expected tensors.

    Raises:
        WrongResultError: if it is above the tolerance, or a tensor is missing, of another shape or not finite.
    """
    worst = 0.0
    for name, right in expected.items():
        if name not in outputs:
            raise WrongResultError(f"{name} is missing")
        if outputs[name].shape != right.shape:
            raise WrongResultError(
                f"{name} has shape {list(outputs[name].shape)}, expected {list(right.shape)}"
            )
        difference = outputs[name].detach().double() - right.double()
        error = float(difference.norm() / right.double().norm().clamp_min(1e-30))
        if not error <= tolerance:  # a NaN is not
            raise WrongResultError(f"{name} is off by {error:.2g} (relative), allowed {tolerance:.2g}")
        worst = max(worst, error)
    return worst


def reason_of(error: BaseException) -> str:
    """Return an error as one short line."""
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    first_line = (str(error).strip().splitlines() or [""])[0]
    text = first_line if isinstance(error, Refused) else f"{type(error).__name__}: {first_line}"
    return text if len(text) <= 200 else text[:197] + "..."


@contextlib.contextmanager
def failures_recorded(row: Row, device: str, column: str = "") -> Iterator[None]:
    """Put what the block raises into the row: as its status and reason, or as the reason why one column is empty.

    If the device can run nothing more afterwards, its error is raised.
    """
    try:
        yield
    except _ANY_FAILURE as error:
        if column:
            row[column], row[f"{column}_reason"] = None, reason_of(error)
        else:
            kinds: dict[type, str] = {Refused: "refused", WrongResultError: "wrong"}
            row["status"], row["reason"] = kinds.get(type(error), "failed"), reason_of(error)
        # The frames of the attempt hold its tensors, whose memory the others need.
        traceback.clear_frames(error.__traceback__)
        if device == "cuda":
            # After a refused launch the next call may raise once; after an illegal access every call does.
            with contextlib.suppress(*_ANY_FAILURE):
                torch.cuda.synchronize()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def in_turn(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Yield every name once a round, a different one first, so that a slow spell of the machine hits all alike."""
    for turn in range(rounds if names else 0):
        shift = turn % len(names)
        yield from (*names[shift:], *names[:shift])


def time_contenders(
    runs: Mapping[str, Run], rows: Mapping[str, Row], device: str, settings: Settings
) -> dict[str, Measurement]:
    """Return a measurement of each contender, taken in turn; a contender that raises has the reason in its row.

    Every run must have been called once before: the first call is the warm-up.
    """
    sample = _cuda_sampler() if device == "cuda" else _cpu_sample
    times_s: dict[str, list[float]] = {name: [] for name in runs}

    def take(name: str, repeats: int) -> None:
        if name in times_s:
            with failures_recorded(rows[name], device):
                times_s[name].append(sample(runs[name], repeats))
            if "reason" in rows[name]:
                del times_s[name]

    for name in runs:
        take(name, 1)
    most = 50 if device == "cuda" else 1000  # each CUDA run has a pair of events
    repeats = {
        name: min(most, math.ceil(settings.sample_ms / 1e3 / max(first_s, 1e-6)))
        for name, (first_s,) in times_s.items()
    }
    round_s = sum(times_s[name][0] * count for name, count in repeats.items())
    rounds = int(settings.target_s / max(round_s, 1e-9))
    rounds = max(settings.min_rounds, min(settings.max_rounds, rounds))
    if all(count == 1 for count in repeats.values()):
        rounds -= 1  # the first runs were slow enough to be a round
    for name, count in repeats.items():
        if count > 1:
            times_s[name].clear()
    for name in in_turn(list(times_s), rounds):
        take(name, repeats[name])
    return {name: measurement(times, repeats[name]) for name, times in times_s.items()}


def measurement(times_s: Sequence[float], repeats: int = 1) -> Measurement:
    """Return times of one run as torch's measurement; each is the mean of ``repeats`` repetitions."""
    return Measurement(repeats, [time_s * repeats for time_s in times_s], TaskSpec("run()", "pass"))


def timed_rows(
    measurements: Mapping[str, Measurement], baseline: str, images: int | None = None
) -> dict[str, Row]:
    """Return each contender's median, spread and ratio to the baseline, and its rate if a run takes in images."""
    rows: dict[str, Row] = {
        name: {"status": "ok", "time_ms": each.median * 1e3, "iqr_ms": each.iqr * 1e3}
        for name, each in measurements.items()
    }
    if baseline in rows:
        for row in rows.values():
            row["time_ratio"] = row["time_ms"] / rows[baseline]["time_ms"]
    if images is not None:
        for row in rows.values():
            row["images_per_s"] = images * 1e3 / row["time_ms"]
    return rows


def timed_record(
    suite: str, case: str, baseline: str, times_s: Mapping[str, Sequence[float]], images: int
) -> Row:
    """Return the record of a case from the times of its contenders; one run processes ``images`` images."""
    measurements = {name: measurement(times) for name, times in times_s.items()}
    rows = timed_rows(measurements, baseline, images)
    return {"suite": suite, "case": case, "baseline": baseline, "contenders": rows}


def _cpu_sample(run: Run, repeats: int) -> float:
    return timeit.timeit(run, number=repeats) / repeats


def _cuda_sampler() -> Callable[[Run, int], float]:
    # Larger than any L2: writing it leaves nothing of the inputs there.
    flush = torch.empty(256 * MIB, dtype=torch.uint8, device="cuda")

    def sample(run: Run, repeats: int) -> float:
        pairs = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            flush.zero_()
            start.record()
            run()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return float(statistics.median(start.elapsed_time(end) for start, end in pairs)) / 1e3

    return sample


def cuda_peak_mib(run: Run) -> float:
    """Return how much more CUDA memory was allocated at the highest point of a run than before it."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def cpu_peak_mib(case: Case, contender: str) -> float:
    """Return how far a run raises the resident size of a separate process, which is killed after _MEMORY_LIMIT_S."""
    context = multiprocessing.get_context("forkserver")
    # The server has imported torch but run nothing: its forks start at once and with no threads to lose.
    context.set_forkserver_preload(["torch", "benchmarks.baselines"])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_peak_of_run, case, contender, torch.get_num_threads()).result()


def _peak_of_run(case: Case, contender: str, threads: int) -> float:
    torch.set_num_threads(threads)
    _reset_peak()  # raises where there is no such /proc, before anything slow
    signal.alarm(_MEMORY_LIMIT_S)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # M_MMAP_THRESHOLD: else freed blocks stay resident and the next run hides in them.
        libc.mallopt(-3, 128 * 1024)
    small = case.warm_up_case()
    if small is not case:
        small.prepare(contender, small.inputs())()
    run = case.prepare(contender, case.inputs())
    if small is case:
        run()
    gc.collect()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    _reset_peak()
    before_kib = _proc_kib("self/status", "VmHWM")
    outputs = run()
    peak_mib = (_proc_kib("self/status", "VmHWM") - before_kib) / 1024
    del outputs
    signal.alarm(0)
    return peak_mib


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _proc_kib(file: str, field: str) -> int:
    (found,) = re.findall(rf"^{field}:\s+(\d+)", Path("/proc", file).read_text(), re.MULTILINE)
    return int(found)


def available_mib() -> float | None:
    """Return how much memory the system could give, None where it does not say."""
    with contextlib.suppress(OSError, ValueError):
        return _proc_kib("meminfo", "MemAvailable") / 1024
    return None


def measure_case(case: Case, settings: Settings, rates: Mapping[str, float] | None = None) -> Row:
    """Check every contender; measure its time and peak memory. Return the record of the case.

    A contender that refuses, fails or is wrong has the reason in its row, and the others go on.
    """
    inputs = case.inputs()
    expected = case.expected(inputs)
    rows: dict[str, Row] = {}
    runs: dict[str, Run] = {}
    for contender in case.contenders():
        if not case.is_repeated(contender, rows):
            rows[contender] = {}
            with failures_recorded(rows[contender], case.device):
                runs[contender] = _checked_run(case, contender, inputs, expected, rows[contender])
    del expected
    measurements = time_contenders(runs, rows, case.device, settings) if runs else {}
    floor_ms = case.floor_ms(rates or {})
    weighs = settings.memory and case.measures_memory
    for contender, timed in timed_rows(measurements, case.baseline, case.images).items():
        row = rows[contender]
        row |= timed
        if floor_ms is not None:
            row["floor_ms"] = floor_ms
        if case.device == "cuda" and settings.graphs:
            with failures_recorded(row, case.device, "graph_time_ms"):
                from triton.testing import do_bench_cudagraph

                row["graph_time_ms"] = do_bench_cudagraph(runs[contender], return_mode="median")
        if case.device == "cuda" and weighs:
            with failures_recorded(row, case.device, "peak_mib"):
                row["peak_mib"] = cuda_peak_mib(runs[contender])
    for contender, row in rows.items():
        if row.get("reason") == OUT_OF_MEMORY and case.may_run_out(contender):
            row["status"] = "refused"
    del inputs, runs
    if case.device == "cpu" and weighs:
        # Without this process's tensors, so that a small machine has room for the other's.
        gc.collect()
        for contender in measurements:
            with failures_recorded(rows[contender], case.device, "peak_mib"):
                rows[contender]["peak_mib"] = cpu_peak_mib(case, contender)
    return {"suite": case.suite, "case": case.name, "baseline": case.baseline, "contenders": rows}


def _checked_run(case: Case, contender: str, inputs: Any, expected: Outputs, row: Row) -> Run:
    run = case.prepare(contender, inputs)
    start = time.perf_counter()
    outputs = case.first_run(contender, run, row)
    if case.device == "cuda":
        torch.cuda.synchronize()
    row["first_call_s"] = time.perf_counter() - start
    row["relative_error"] = compare(case.select(outputs), expected, case.tolerance)
    return run


def run_cases(
    cases: Iterable[Case],
    results: Results,
    settings: Settings,
    budget_s: float = math.inf,
) -> None:
    """Measure the cases in order; past the budget the rest is skipped."""
    deadline = time.monotonic() + budget_s
    for case in cases:
        record = {"suite": case.suite, "case": case.name}
        if time.monotonic() > deadline:
            record |= {"status": "skipped", "reason": f"the time budget of {budget_s:.0f} s was spent"}
        else:
            try:
                record = measure_case(case, settings, results.run["rates"])
            except _ANY_FAILURE as error:
                record |= {"status": "failed", "reason": reason_of(error)}
                traceback.clear_frames(error.__traceback__)
        results.add(record)


def argument_parser(suite: str, description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every suite has; the first line of the description is the help's."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.bench_{suite}", description=description.splitlines()[0]
    )
    parser.set_defaults(suite=suite, device="cpu")
    parser.add_argument("--quick", action="store_true", help="a few small shapes: does everything run?")
    parser.add_argument("--out", type=Path, help="the JSON file; tables and plots are written beside it")
    parser.add_argument("--append", action="store_true", help="keep the runs that the JSON file holds")
    return parser


def parse(
    suite: str, description: str, arguments: Sequence[str] | None, *, peer: bool = False
) -> argparse.Namespace:
    """Return the options of a suite that is a list of cases; ``everything`` if those that take long are asked for.

    Args:
        suite: its name, which the module and the files have.
        description: the first line is the help's.
        arguments: the command line's; None for the process's.
        peer: whether the suite runs code of BigGAN-PyTorch.
    """
    parser = argument_parser(suite, description)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    only = 'regular expression on "suite | case"; also finds those that take minutes or GBs ("." for all)'
    parser.add_argument("--only", type=re.compile, help=only)
    parser.add_argument("--minutes", type=float, default=10.0, help="start no case after so long")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--graphs", action="store_true", help="on CUDA, time CUDA graphs too")
    kept = "on a CPU, let malloc keep freed memory, as the trainer does; ratios differ (docs/attention.md)"
    parser.add_argument("--keep-freed-memory", action="store_true", help=kept)
    if peer:
        # Other processes, which may have another working directory, import from it too.
        path = "a checkout of BigGAN-PyTorch"
        parser.add_argument("--peer", type=lambda text: Path(text).resolve(), help=path)
    options = parser.parse_args(arguments)
    options.everything = options.only is not None
    return options


def open_results(options: argparse.Namespace) -> Results:
    """Return the results of a run with these options.

    Raises:
        SystemExit: 2, if the device is not there.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here.")
        raise SystemExit(2)
    out = options.out or RESULTS / f"{options.suite}_{options.device}.json"
    results = Results(out, options.device, append=options.append)
    if options.device == "cpu" and "keep_freed_memory" in options:
        keeps = options.keep_freed_memory and keep_freed_memory()
        results.run["environment"]["freed_memory"] = "kept" if keeps else "returned"
    return results


def is_chosen(line: str, options: argparse.Namespace) -> bool:
    """Return whether ``--only`` asks for "suite | case"."""
    return options.only is None or bool(options.only.search(line))


def run_suite(
    options: argparse.Namespace,
    cases: Iterable[Case],
    settings: Settings,
    measure_rates: Callable[[], dict[str, float]] | None = None,
) -> Results:
    """Measure the chosen cases within ``--minutes``; on CUDA the device's rates first."""
    results = open_results(options)
    if measure_rates is not None and options.device == "cuda":
        results.run["rates"] = measure_rates()
    settings = replace(settings, memory=not options.no_memory, graphs=options.graphs)
    if options.quick:
        settings = replace(settings, max_rounds=5, target_s=0.3)
    chosen = [case for case in cases if is_chosen(f"{case.suite} | {case.name}", options)]
    run_cases(chosen, results, settings, options.minutes * 60)
    return results
