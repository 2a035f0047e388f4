"""What every benchmark shares: alternating timing, peak memory, checks before times, and where results go.

A suite is a list of cases. A case makes its inputs, names its contenders and turns each into a function of no
arguments that returns named tensors. :func:`measure_case` checks the tensors first, then times the contenders
in turn, then takes each one's peak memory.
"""

from __future__ import annotations

import abc
import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import sagan_layers

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
OUT_OF_MEMORY = "out of memory"

Outputs = dict[str, Tensor]
Run = Callable[[], Outputs]
Row = dict[str, Any]
Status = Literal["ok", "refused", "failed", "wrong", "skipped"]


class Refused(Exception):  # noqa: N818 (a reason, not a fault)
    """A contender that cannot run a case; the message is the reason that the results give."""


class WrongResultError(Exception):
    """A contender whose result is not what the case expects."""


@dataclass(frozen=True)
class Settings:
    """How long and how often to measure.

    Attributes:
        max_rounds: rounds over the contenders when they are fast.
        min_rounds: rounds however slow they are.
        target_s: seconds that the rounds of one case aim at.
        sample_ms: one sample lasts at least this long (on CUDA: that many runs make one sample).
        memory: whether to measure peak memory.
        memory_limit_s: after how long a memory process is given up.
        graphs: whether to time replays of a CUDA graph as well.
    """

    max_rounds: int = 15
    min_rounds: int = 3
    target_s: float = 3.0
    sample_ms: float = 20.0
    memory: bool = True
    memory_limit_s: float = 120.0
    graphs: bool = False


@dataclass
class Timing:
    """Samples of one contender, each the time of one run; ``reason`` says why it was given up, if it was."""

    samples_ms: list[float] = field(default_factory=list)
    repeats: int = 1
    status: Status = "ok"
    reason: str = ""

    def median_ms(self) -> float:
        """Return the median of the samples."""
        return statistics.median(self.samples_ms)

    def quartiles_ms(self) -> tuple[float, float]:
        """Return the first and third quartile."""
        if len(self.samples_ms) < 2:
            return self.samples_ms[0], self.samples_ms[0]
        first, _, third = statistics.quantiles(self.samples_ms, n=4, method="inclusive")
        return first, third


class Case(abc.ABC):
    """One line of a suite's table. It is pickled for the memory processes, so it holds no tensors."""

    suite: str
    device: str
    baseline = "textbook"

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The line's name in the tables, unique in its suite."""

    @property
    def tolerance(self) -> float:
        """The largest relative error that passes."""
        return 1e-3

    @abc.abstractmethod
    def describe(self) -> Row:
        """Return what identifies the case in the results: shapes, dtype."""

    @abc.abstractmethod
    def contenders(self) -> list[str]:
        """Return the names of the contenders."""

    @abc.abstractmethod
    def inputs(self) -> Any:
        """Make the inputs, the same at every call."""

    @abc.abstractmethod
    def prepare(self, contender: str, inputs: Any) -> Run:
        """Return the function to measure; raise :class:`Refused` with the reason if there is none."""

    @abc.abstractmethod
    def expected(self, inputs: Any) -> Outputs:
        """Return what :meth:`select` of every contender's outputs should be, in float64."""

    def select(self, outputs: Outputs) -> Outputs:
        """Return the part of the outputs that is compared."""
        return outputs

    def warm_up_case(self) -> Case:
        """Return a small case that loads the same libraries."""
        return self

    def first_run(self, contender: str, run: Run, row: Row) -> Outputs:
        """Call a run for its check, and add to the row what else the results say of the contender."""
        return run()

    def is_repeated(self, contender: str, rows: Mapping[str, Row]) -> bool:
        """Return whether the rows so far have the same code under another name, so that this one gets none."""
        return False

    def may_run_out(self, contender: str) -> bool:
        """Return whether running out of memory is this contender's known limit, and so no failure."""
        return False

    def floor_ms(self, rates: Mapping[str, float]) -> float | None:
        """Return the least time that the device's rates allow, None if that is not known."""
        return None


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
    lines = str(error).strip().splitlines() or [""]
    text = lines[0] if isinstance(error, Refused) else f"{type(error).__name__}: {lines[0]}"
    return text if len(text) <= 200 else text[:197] + "..."


# What a contender may raise: whatever it is goes into the results as the reason.
_ANY_FAILURE = (Exception,)


def device_fault(device: str) -> str:
    """Free what failed attempts left on the device; return why it can run nothing more, empty if it can.

    After an illegal access or a failed assertion every CUDA call of the process raises; after running out of
    memory or a refused launch the next ones work. Asking twice tells them apart.
    """
    fault = ""
    for _ in range(2 if device == "cuda" else 0):
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except _ANY_FAILURE as error:
            fault = f"CUDA can run nothing more in this process: {reason_of(error)}"
        else:
            return ""
    return fault


# --- time -------------------------------------------------------------------------------------------------


def time_contenders(runs: Mapping[str, Run], device: str, settings: Settings) -> dict[str, Timing]:
    """Return the timing of each contender, taken in turn so that a slow spell of the machine hits all alike.

    Every run must have been called once before: the first call is the warm-up. A contender that raises is not
    run again, and its timing has the reason; after a fault of the device nothing is run.
    """
    timings = {name: Timing() for name in runs}
    try:
        sample = _cuda_sampler() if device == "cuda" else _cpu_sample
    except _ANY_FAILURE as error:
        for timing in timings.values():
            timing.status, timing.reason = "failed", reason_of(error)
        return timings
    fault = ""

    def taken(name: str, repeats: int) -> list[float]:
        nonlocal fault
        timing = timings[name]
        if timing.status != "ok":
            return []
        if fault:
            if not timing.samples_ms:
                timing.status, timing.reason = "skipped", fault
            return []
        try:
            return [sample(runs[name], repeats)]
        except _ANY_FAILURE as error:
            timing.status, timing.reason = "failed", reason_of(error)
            timing.samples_ms.clear()
            # The traceback's frames hold memory that the others need.
            traceback.clear_frames(error.__traceback__)
        fault = device_fault(device)
        return []

    most = 50 if device == "cuda" else 1000  # each CUDA run has a pair of events
    estimates_ms = {name: first[0] for name in runs if (first := taken(name, 1))}
    for name, estimate_ms in estimates_ms.items():
        timings[name].repeats = max(1, min(most, math.ceil(settings.sample_ms / max(estimate_ms, 1e-3))))
    round_s = sum(estimates_ms[name] * timings[name].repeats for name in estimates_ms) / 1e3
    rounds = int(settings.target_s / max(round_s, 1e-9))
    rounds = max(settings.min_rounds, min(settings.max_rounds, rounds))
    names = list(estimates_ms)
    for name in names:
        if timings[name].repeats == 1:  # slow enough that the estimate is a sample
            timings[name].samples_ms.append(estimates_ms[name])
    rounds -= all(timings[name].repeats == 1 for name in names)
    for turn in range(rounds if names else 0):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            timings[name].samples_ms.extend(taken(name, timings[name].repeats))
    return timings


def _cpu_sample(run: Run, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) * 1e3 / repeats


def _cuda_sampler() -> Callable[[Run, int], float]:
    # Larger than any L2: writing it leaves nothing of the inputs there.
    flush = torch.empty(256 * MIB, dtype=torch.uint8, device="cuda")

    def sample(run: Run, repeats: int) -> float:
        pairs = []
        for _ in range(repeats):
            start, end = (_timing_event() for _ in range(2))
            flush.zero_()
            start.record()
            run()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return float(statistics.median(start.elapsed_time(end) for start, end in pairs))

    return sample


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def captured_in_graph(run: Run) -> Run:
    """Return a function that replays ``run`` as a CUDA graph."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay() -> Outputs:
        graph.replay()
        return outputs

    return replay


# --- memory -----------------------------------------------------------------------------------------------


def cuda_peak_mib(run: Run) -> float:
    """Return how much more CUDA memory was allocated at the highest point of a run than before it."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def cpu_peak_mib(case: Case, contender: str, limit_s: float) -> tuple[float | None, str | None]:
    """Return how far a run raises the resident size in a process of its own, or None and the reason."""
    if not _can_reset_peak():
        return None, "this system has no /proc/self/clear_refs to reset the peak with"
    context = multiprocessing.get_context("forkserver")
    # The server has imported torch but run nothing: its forks start at once and with no threads to lose.
    context.set_forkserver_preload(["torch", "benchmarks.baselines"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_memory_process, args=(sender, case, contender, torch.get_num_threads()), daemon=True
    )
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit_s):
            return None, f"longer than {limit_s:.0f} s"
        answer: tuple[float | None, str | None] = receiver.recv()
        return answer
    except EOFError:
        process.join()
        return None, f"its process ended with status {process.exitcode} (-9: killed, as when memory runs out)"
    finally:
        process.kill()
        process.join()
        receiver.close()


def _memory_process(sender: Connection, case: Case, contender: str, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        if libc is not None and hasattr(libc, "mallopt"):
            # M_MMAP_THRESHOLD: else freed blocks stay resident and the next run hides in them.
            libc.mallopt(-3, 128 * 1024)
        small = case.warm_up_case()
        if small is not case:
            small.prepare(contender, small.inputs())()
        run = case.prepare(contender, case.inputs())
        if small is case:
            run()
        gc.collect()
        if libc is not None and hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
        _reset_peak()
        before_kib = _peak_kib()
        outputs = run()
        sender.send(((_peak_kib() - before_kib) / 1024, None))
        del outputs
    except _ANY_FAILURE as error:
        sender.send((None, reason_of(error)))


def _can_reset_peak() -> bool:
    try:
        _reset_peak()
        _peak_kib()
    except (OSError, StopIteration):
        return False
    return True


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


def available_mib() -> float | None:
    """Return how much memory the system could give, None where it does not say."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) / 1024
    return None


# --- one case ---------------------------------------------------------------------------------------------


def measure_case(case: Case, settings: Settings, rates: Mapping[str, float] | None = None) -> list[Row]:
    """Check, time and weigh every contender of a case; return one row each.

    A contender that refuses, fails or is wrong gets a row with the reason, and the others go on, unless it has
    left the device unable to run anything.
    """
    identity = {"suite": case.suite, "case": case.name, **case.describe()}
    inputs = case.inputs()
    expected = case.expected(inputs)
    rows: dict[str, Row] = {}
    runs: dict[str, Run] = {}
    fault = ""
    for contender in case.contenders():
        if case.is_repeated(contender, rows):
            continue
        row: Row = {**identity, "contender": contender}
        rows[contender] = row
        if fault:
            row["status"], row["reason"] = "skipped", fault
            continue
        try:
            run = case.prepare(contender, inputs)
            start = time.perf_counter()
            outputs = case.first_run(contender, run, row)
            if case.device == "cuda":
                torch.cuda.synchronize()
            row["first_call_s"] = time.perf_counter() - start
            row["relative_error"] = compare(case.select(outputs), expected, case.tolerance)
            del outputs
            row["status"] = "ok"
            runs[contender] = run
        except Refused as error:
            _record(row, "refused", error)
        except WrongResultError as error:
            _record(row, "wrong", error)
        except torch.OutOfMemoryError as error:
            _record(row, "refused" if case.may_run_out(contender) else "failed", error)
        except _ANY_FAILURE as error:
            _record(row, "failed", error)
        fault = device_fault(case.device)
    del expected
    if fault:
        for contender in runs:
            rows[contender]["status"], rows[contender]["reason"] = "skipped", fault
        return list(rows.values())
    timings = time_contenders(runs, case.device, settings) if runs else {}
    floor_ms = case.floor_ms(rates) if rates else None
    timed: list[str] = []
    for contender, timing in timings.items():
        row = rows[contender]
        if timing.status != "ok":
            row["status"], row["reason"] = timing.status, timing.reason
            if timing.reason == OUT_OF_MEMORY and case.may_run_out(contender):
                row["status"] = "refused"
            continue
        timed.append(contender)
        row["time_ms"] = timing.median_ms()
        row["time_quartiles_ms"] = list(timing.quartiles_ms())
        row["samples"] = len(timing.samples_ms)
        row["repeats"] = timing.repeats
        baseline = timings.get(case.baseline)
        if baseline is not None and baseline.status == "ok":
            row["time_ratio"] = timing.median_ms() / baseline.median_ms()
            row["baseline"] = case.baseline
        if floor_ms is not None:
            row["floor_ms"] = floor_ms
            row["floor_share"] = floor_ms / timing.median_ms()
    for contender in timed if case.device == "cuda" else ():
        if device_fault(case.device):
            break
        if settings.graphs:
            _time_graph(rows[contender], runs[contender], settings)
        if settings.memory:
            _weigh(rows[contender], runs[contender])
    del inputs, runs
    if settings.memory and case.device == "cpu":
        # Without this process's tensors, so that a small machine has room for the other's.
        gc.collect()
        for contender in timed:
            peak_mib, reason = cpu_peak_mib(case, contender, settings.memory_limit_s)
            rows[contender]["peak_mib"] = peak_mib
            if reason is not None:
                rows[contender]["peak_reason"] = reason
    return list(rows.values())


def _record(row: Row, status: Status, error: BaseException) -> None:
    row["status"] = status
    row["reason"] = reason_of(error)
    # The traceback holds the frames, and those hold the tensors of the attempt.
    traceback.clear_frames(error.__traceback__)


def _time_graph(row: Row, run: Run, settings: Settings) -> None:
    try:
        timing = time_contenders({"graph": captured_in_graph(run)}, "cuda", settings)["graph"]
    except _ANY_FAILURE as error:
        row["graph_reason"] = reason_of(error)
        traceback.clear_frames(error.__traceback__)
        return
    if timing.status != "ok":
        row["graph_reason"] = timing.reason
        return
    row["graph_time_ms"] = timing.median_ms()
    row["graph_time_quartiles_ms"] = list(timing.quartiles_ms())


def _weigh(row: Row, run: Run) -> None:
    row["peak_mib"] = None
    try:
        row["peak_mib"] = cuda_peak_mib(run)
    except _ANY_FAILURE as error:
        row["peak_reason"] = reason_of(error)
        traceback.clear_frames(error.__traceback__)


def skipped_rows(case: Case, reason: str) -> list[Row]:
    """Return the row of a case that is left out, with the reason."""
    identity = {"suite": case.suite, "case": case.name, **case.describe()}
    return [{**identity, "contender": "(all)", "status": "skipped", "reason": reason}]


# --- results ----------------------------------------------------------------------------------------------


def environment(device: str) -> Row:
    """Return the hardware, versions, commit and date of this run."""
    found: Row = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        # Without folders, which say nothing to others.
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": device,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "cores_used": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "sagan_layers": sagan_layers.__version__,
        "commit": _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"]),
        "dirty": None,
        "gpu": None,
        "driver": None,
    }
    if found["commit"] is not None:
        found["dirty"] = bool(_output(["git", "-C", str(ROOT), "status", "--porcelain"]))
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["gpu_memory_mib"] = properties.total_memory / MIB
        found["gpu_multiprocessors"] = properties.multi_processor_count
        found["driver"] = nvidia_smi("driver_version")
        found["cuda"] = torch.version.cuda
        found["allow_tf32_matmul"] = torch.backends.cuda.matmul.allow_tf32
        found["allow_tf32_convolution"] = torch.backends.cudnn.allow_tf32
    return found


def nvidia_smi(query: str) -> str | None:
    """Return one field of nvidia-smi for the first GPU, None where the tool is missing."""
    text = _output(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"])
    return text.splitlines()[0].strip() if text else None


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


class Results:
    """The JSON file of a run, rewritten whole after each case, so that a killed run leaves what it has."""

    def __init__(self, path: Path, device: str) -> None:
        self.path = path
        self.data: Row = {"complete": False, "environment": environment(device), "rates": {}, "rows": []}
        self._write()

    @property
    def rows(self) -> list[Row]:
        """The rows so far."""
        rows: list[Row] = self.data["rows"]
        return rows

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows and write the file."""
        self.rows.extend(rows)
        self._write()

    def set_rates(self, rates: Mapping[str, float], note: str = "") -> None:
        """Record the device's measured rates, with what a reader of the floors must know; write the file."""
        self.data["rates"] = dict(rates)
        self.data["rates_note"] = note
        self._write()

    def finish(self) -> None:
        """Mark the run as complete and write the file."""
        self.data["complete"] = True
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


def run_cases(
    cases: Sequence[Case],
    results: Results,
    settings: Settings,
    *,
    rates: Mapping[str, float] | None = None,
    budget_s: float = math.inf,
) -> str:
    """Measure the cases in order and print each row; past the budget the rest is recorded as skipped.

    Returns:
        The fault of the device that ended the run, after which the rest is skipped too; empty if there was none.
    """
    started = time.monotonic()
    fault = ""
    for case in cases:
        spent_s = time.monotonic() - started
        if fault:
            rows = skipped_rows(case, fault)
        elif spent_s > budget_s:
            rows = skipped_rows(case, f"the time budget of {budget_s:.0f} s was spent")
        else:
            try:
                rows = measure_case(case, settings, rates)
            except _ANY_FAILURE as error:
                rows = skipped_rows(case, reason_of(error))
                rows[0]["status"] = "failed"
                traceback.clear_frames(error.__traceback__)
            fault = device_fault(case.device)
        results.add(rows)
        for row in rows:
            print(line_of(row), flush=True)
    return fault


def any_wrong(rows: Iterable[Row]) -> bool:
    """Return whether a contender of some row gave a wrong result."""
    return any(row["status"] == "wrong" for row in rows)


def any_of_ours_failed(rows: Iterable[Row]) -> bool:
    """Return whether one of our contenders, or a whole case, failed; refusing and skipping are no failures."""
    return any(
        row["status"] == "failed" and (row["contender"].startswith("ours") or row["contender"] == "(all)")
        for row in rows
    )


def line_of(row: Row) -> str:
    """Return a row as one line of text."""
    head = f"{row['suite']} | {row['case']} | {row['contender']}"
    if row["status"] != "ok":
        return f"{head}: {row['status']}: {row['reason']}"
    first, third = row["time_quartiles_ms"]
    parts = [f"{row['time_ms']:.3g} ms [{first:.3g}, {third:.3g}]"]
    if "time_ratio" in row:
        parts.append(f"{row['time_ratio']:.2f} of baseline")
    if "floor_ms" in row:
        parts.append(f"floor {row['floor_ms']:.3g} ms, {row['floor_share']:.0%} reached")
    if "graph_time_ms" in row:
        parts.append(f"{row['graph_time_ms']:.3g} ms in a graph")
    if row.get("peak_mib") is not None:
        parts.append(f"{row['peak_mib']:.0f} MiB")
    return f"{head}: {', '.join(parts)}"


# --- tables and plots -------------------------------------------------------------------------------------


def markdown(data: Row) -> str:
    """Return the results as Markdown: the environment, then for each suite a table of times and of memory."""
    found = data["environment"]
    hardware = found["gpu"] if found["device"] == "cuda" else f"{found['cpu']}, {found['cores_used']} cores"
    state = {True: " (dirty)", False: "", None: ""}[found["dirty"]]
    lines = [
        f"{hardware}; torch {found['torch']}, Triton {found['triton']}, Python {found['python']}, "
        f"sagan-layers {found['sagan_layers']}, commit {str(found['commit'])[:12]}{state}, {found['date']}.",
        "",
    ]
    if not data["complete"]:
        lines += ["**This run was not finished.**", ""]
    if data["rates"]:
        rates = ", ".join(f"{name} {rate:.4g}" for name, rate in data["rates"].items())
        lines += [f"Rates: {rates}.", ""]
        if data.get("rates_note"):
            lines += [data["rates_note"], ""]
    reasons: dict[str, str] = {}
    for suite in _unique(row["suite"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["suite"] == suite]
        contenders = [name for name in _unique(row["contender"] for row in rows) if name != "(all)"]
        lines += [
            f"## {suite}",
            "",
            f"Time in ms: median ± half the interquartile range, ratio to {_baseline_of(rows)}:",
            "",
        ]
        lines += _table(rows, contenders, _time_cell, reasons)
        if any(row.get("peak_mib") is not None for row in rows):
            lines += ["", "Peak memory beyond the inputs, MiB:", ""]
            lines += _table(rows, contenders, _peak_cell, reasons)
        lines.append("")
    if reasons:
        lines += ["Reasons:", "", *(f"- ({number}) {reason}" for reason, number in reasons.items()), ""]
    return "\n".join(lines)


def _baseline_of(rows: Sequence[Row]) -> str:
    """Return the contender that the ratios of a suite refer to."""
    return next((str(row["baseline"]) for row in rows if "baseline" in row), Case.baseline)


def _table(
    rows: Sequence[Row], contenders: Sequence[str], cell: Callable[[Row], str], reasons: dict[str, str]
) -> list[str]:
    lines = [f"| case | {' | '.join(contenders)} |", f"|---|{'---:|' * len(contenders)}"]
    for case in _unique(row["case"] for row in rows):
        by_name = {row["contender"]: row for row in rows if row["case"] == case}
        cells = []
        for name in contenders:
            row = by_name.get(name, by_name.get("(all)"))
            if row is None:
                cells.append("")
            elif row["status"] == "ok":
                cells.append(cell(row))
            else:
                number = reasons.setdefault(f"{row['status']}: {row['reason']}", str(len(reasons) + 1))
                cells.append(f"({number})")
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return lines


def _time_cell(row: Row) -> str:
    first, third = row["time_quartiles_ms"]
    text = f"{row['time_ms']:.3g} ±{(third - first) / 2 / row['time_ms']:.0%}"
    if "time_ratio" in row:
        text += f", {row['time_ratio']:.2f}"
    if "floor_ms" in row:
        text += f"; floor {row['floor_ms']:.3g}: {row['floor_share']:.0%}"
    if "served_by" in row:
        text += f" [{row['served_by']}]"
    return text


def _peak_cell(row: Row) -> str:
    return "?" if row.get("peak_mib") is None else f"{row['peak_mib']:.0f}"


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))


def plot(data: Row, stem: Path) -> list[Path]:
    """Draw each suite as a PNG beside ``stem``: time against the baseline, and peak memory.

    Returns:
        The files; none, with a line that says so, where matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("No plots: matplotlib is not installed (pip install matplotlib).")
        return []
    files = []
    for suite in _unique(row["suite"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["suite"] == suite and row["status"] == "ok"]
        cases, contenders = _unique(row["case"] for row in rows), _unique(row["contender"] for row in rows)
        if not rows:
            continue
        figure = Figure(figsize=(13, 2.2 + 0.32 * len(cases)), layout="constrained")
        FigureCanvasAgg(figure)
        ratio = f"time / that of {_baseline_of(rows)} (below 1 is faster)"
        columns = [("time_ratio", ratio)]
        if any(row.get("peak_mib") for row in rows):
            columns.append(("peak_mib", "peak memory, MiB"))
        (panels,) = figure.subplots(1, len(columns), sharey=True, squeeze=False)
        for panel, (column, label) in zip(panels, columns, strict=True):
            for index, contender in enumerate(contenders):
                points = [
                    (row[column], cases.index(row["case"]))
                    for row in rows
                    if row["contender"] == contender and row.get(column)
                ]
                panel.scatter(
                    [x for x, _ in points],
                    [y for _, y in points],
                    label=contender,
                    marker="osD^vP*X<>"[index % 10],
                    color=f"C{index % 10}",
                    s=34,
                    alpha=0.85,
                    zorder=3,
                )
            drawn = [row[column] for row in rows if row.get(column)] or [1.0]
            panel.set_xscale("log", base=2)
            panel.set_xlim(min(drawn) / 1.5, max(drawn) * 1.5)  # wide enough for a power of two
            panel.xaxis.set_major_formatter("{x:g}")
            panel.set_xlabel(label)
            panel.set_yticks(range(len(cases)), cases)
            panel.grid(alpha=0.4, axis="x")
            panel.grid(alpha=0.4, axis="y")
        panels[0].axvline(1.0, color="black", linewidth=1)
        panels[0].invert_yaxis()
        found = data["environment"]
        hardware = (
            found["gpu"] if found["device"] == "cuda" else f"{found['cpu']}, {found['cores_used']} cores"
        )
        figure.suptitle(f"{suite} ({hardware}, torch {found['torch']})")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(contenders), 6))
        path = stem.with_name(f"{stem.name}_{''.join(c if c.isalnum() else '_' for c in suite)}.png")
        figure.savefig(path, dpi=120)
        files.append(path)
    return files


def write_report(results: Results) -> list[Path]:
    """Write the Markdown table and the plots beside the JSON file; return the files."""
    table = results.path.with_suffix(".md")
    table.write_text(markdown(results.data), encoding="utf-8")
    return [table, *plot(results.data, results.path.with_suffix(""))]
