"""The benchmarks measure what they say: time, memory, and nothing before the result is checked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_attention, bench_conditional_norm, bench_spectral_norm, bench_step, gpu, harness
from benchmarks.harness import Case, Outputs, Refused, Row, Run, Settings

ROOT = Path(__file__).resolve().parent.parent
FAST = Settings(max_rounds=5, target_s=0.1, sample_ms=1.0, memory=False)
calls: list[str] = []


def right() -> Outputs:
    return {"y": torch.ones(3)}


def sleeps(seconds: float) -> Run:
    def run() -> Outputs:
        time.sleep(seconds)
        return right()

    return run


def allocates_64_mib() -> Outputs:
    torch.ones(16 * 2**20)
    return right()


def wrong() -> Outputs:
    calls.append("wrong")
    return {"y": torch.tensor([1.0, 1.0, 1.1])}


def fails() -> Outputs:
    raise RuntimeError("no kernel image is available\nand a long story")


def runs_out() -> Outputs:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 999 GiB")


def ends_its_process() -> Outputs:
    if os.getpid() != int(os.environ["BENCHMARK_TEST_PID"]):
        os._exit(7)
    return right()


RUNS: dict[str, Callable[[], Outputs]] = {
    "textbook": right,
    "sleeps": sleeps(0.02),
    "sleeps twice": sleeps(0.04),
    "allocates": allocates_64_mib,
    "wrong": wrong,
    "fails": fails,
    "runs out": runs_out,
    "ends": ends_its_process,
}


@dataclass(frozen=True)
class ToyCase(Case):
    names: tuple[str, ...]
    suite: str = "toys"
    device: str = "cpu"
    label: str = "a toy"

    @property
    def name(self) -> str:
        return self.label

    def describe(self) -> Row:
        return {"N": 3}

    def contenders(self) -> list[str]:
        return list(self.names)

    def inputs(self) -> Any:
        return None

    def prepare(self, contender: str, inputs: Any) -> Run:
        if contender == "refuses":
            raise Refused("the widths differ")
        return RUNS[contender]

    def expected(self, inputs: Any) -> Outputs:
        return {"y": torch.ones(3, dtype=torch.float64)}


def measure(*names: str, settings: Settings = FAST) -> dict[str, Row]:
    return {row["contender"]: row for row in harness.measure_case(ToyCase(names), settings)}


# --- measuring --------------------------------------------------------------------------------------------


def test_a_contender_that_sleeps_twice_as_long_takes_twice_the_time() -> None:
    rows = measure("sleeps", "sleeps twice")
    assert rows["sleeps"]["time_ms"] >= 20
    assert 1.5 < rows["sleeps twice"]["time_ms"] / rows["sleeps"]["time_ms"] < 2.5
    first, third = rows["sleeps"]["time_quartiles_ms"]
    assert first <= rows["sleeps"]["time_ms"] <= third
    assert rows["sleeps"]["samples"] >= 3


def test_a_fast_contender_is_repeated_until_a_sample_is_long_enough() -> None:
    timing = harness.time_contenders({"fast": right}, "cpu", Settings(max_rounds=3, sample_ms=5.0))["fast"]
    assert timing.repeats >= 5
    assert timing.median_ms() < 1.0


def test_contenders_are_timed_in_turn() -> None:
    order: list[str] = []

    def logged(name: str) -> Run:
        def run() -> Outputs:
            order.append(name)
            time.sleep(0.003)
            return {}

        return run

    settings = Settings(max_rounds=4, min_rounds=4, sample_ms=1.0)
    harness.time_contenders({name: logged(name) for name in "abc"}, "cpu", settings)
    turns = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(turns) == 4
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len(set(turns)) > 1  # nobody is always first


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_is_that_of_each_contender_alone() -> None:
    rows = measure("allocates", "textbook", settings=Settings(max_rounds=3, target_s=0.1, sample_ms=1.0))
    assert 60 <= rows["allocates"]["peak_mib"] < 80
    assert rows["textbook"]["peak_mib"] < 10


def test_without_proc_memory_is_none_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise FileNotFoundError("/proc/self/clear_refs")

    monkeypatch.setattr(harness, "_reset_peak", absent)
    peak_mib, reason = harness.cpu_peak_mib(ToyCase(("textbook",)), "textbook", 60)
    assert peak_mib is None
    assert reason is not None
    assert "clear_refs" in reason


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_memory_process_that_dies_leaves_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCHMARK_TEST_PID", str(os.getpid()))
    peak_mib, reason = harness.cpu_peak_mib(ToyCase(("ends",)), "ends", 60)
    assert peak_mib is None
    assert reason is not None


def test_a_wrong_contender_is_refused_before_it_is_timed() -> None:
    calls.clear()
    rows = measure("wrong", "textbook")
    assert calls == ["wrong"]
    assert rows["wrong"]["status"] == "wrong"
    assert "y is off by" in rows["wrong"]["reason"]
    assert "time_ms" not in rows["wrong"]
    assert harness.any_wrong(rows.values())


@pytest.mark.parametrize(
    "outputs",
    [{}, {"y": torch.ones(4)}, {"y": torch.full((3,), torch.nan)}, {"y": torch.zeros(3)}],
    ids=["missing", "shape", "nan", "zeros"],
)
def test_a_missing_misshapen_or_nan_result_is_wrong(outputs: Outputs) -> None:
    with pytest.raises(harness.WrongResultError, match="y "):
        harness.compare(outputs, {"y": torch.ones(3)}, 1e-3)


def test_contenders_that_cannot_run_leave_their_reason_and_the_others_run() -> None:
    rows = measure("refuses", "fails", "runs out", "textbook")
    assert (rows["refuses"]["status"], rows["refuses"]["reason"]) == ("refused", "the widths differ")
    assert (rows["fails"]["status"], rows["fails"]["reason"]) == (
        "failed",
        "RuntimeError: no kernel image is available",
    )
    assert rows["runs out"]["reason"] == "out of memory"
    assert rows["textbook"]["status"] == "ok"
    assert rows["textbook"]["time_ratio"] == 1.0


def test_a_contender_that_runs_out_of_memory_while_timed_loses_only_itself() -> None:
    turns = iter([right, runs_out])

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RUNS, "runs out later", lambda: next(turns)())
        rows = measure("runs out later", "textbook")
    assert (rows["runs out later"]["status"], rows["runs out later"]["reason"]) == ("failed", "out of memory")
    assert rows["textbook"]["status"] == "ok"


def broken_cuda() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_fault_of_the_device_ends_the_run_and_keeps_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks = [False]

    def synchronize() -> None:
        if breaks[0]:
            broken_cuda()

    def illegal() -> Outputs:
        breaks[0] = True
        return right()

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", synchronize)
    monkeypatch.setattr(harness, "_cuda_sampler", lambda: harness._cpu_sample)
    monkeypatch.setitem(RUNS, "illegal", illegal)
    cases = [
        ToyCase(names, device="cuda", label=label)
        for label, names in (
            ("good", ("textbook",)),
            ("bad", ("textbook", "illegal", "sleeps")),
            ("rest", ()),
        )
    ]
    results = harness.Results(tmp_path / "toys.json", "cpu")
    fault = harness.run_cases(cases, results, FAST)
    assert "illegal memory access" in fault
    assert [row["status"] for row in results.rows] == ["ok", "skipped", "failed", "skipped", "skipped"]
    assert all("illegal memory access" in row["reason"] for row in results.rows[1:])


def test_a_fault_while_timing_is_that_of_its_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", broken_cuda)
    monkeypatch.setattr(harness, "_cuda_sampler", lambda: harness._cpu_sample)
    runs = {"sleeps": sleeps(0.002), "fails": fails, "right": right}
    timings = harness.time_contenders(runs, "cuda", FAST)
    # A first sample was taken, as slow as a sample must be.
    assert [timing.status for timing in timings.values()] == ["ok", "failed", "skipped"]
    assert "no kernel image" in timings["fails"].reason
    assert "illegal memory access" in timings["right"].reason


def test_an_error_that_goes_away_is_no_fault_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([broken_cuda, lambda: None])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: next(answers)())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert harness.device_fault("cuda") == ""


def test_cuda_repeats_are_those_that_were_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def sample(run: Run, repeats: int) -> float:
        asked.append(repeats)
        return 0.001

    monkeypatch.setattr(harness, "_cuda_sampler", lambda: sample)
    assert harness.time_contenders({"fast": right}, "cuda", FAST)["fast"].repeats == max(asked) == 50


@pytest.mark.parametrize(
    ("contender", "status", "bad"),
    [
        ("ours", "failed", True),
        ("ours: triton", "failed", True),
        ("(all)", "failed", True),
        ("textbook", "failed", False),
        ("ours", "refused", False),
        ("(all)", "skipped", False),
    ],
)
def test_a_failure_of_ours_fails_the_benchmark(contender: str, status: str, bad: bool) -> None:
    assert harness.any_of_ours_failed([{"contender": contender, "status": status}]) is bad


# --- results ----------------------------------------------------------------------------------------------

ENVIRONMENT = (
    "date command device cpu cores_used load_average python torch triton sagan_layers commit dirty gpu driver"
)


def test_results_say_where_when_and_what_was_measured(tmp_path: Path) -> None:
    results = harness.Results(tmp_path / "toys.json", "cpu")
    harness.run_cases([ToyCase(("sleeps", "textbook", "fails"))], results, FAST)
    assert json.loads(results.path.read_text())["complete"] is False
    results.finish()
    data = json.loads(results.path.read_text())
    assert data["complete"] is True
    assert set(ENVIRONMENT.split()) <= set(data["environment"])
    assert data["environment"]["torch"] == torch.__version__
    sleeper, _, failed = data["rows"]
    assert {"suite", "case", "contender", "time_ms", "time_quartiles_ms", "time_ratio", "N"} <= set(sleeper)
    text = harness.markdown(data)
    assert "| a toy |" in text
    assert "no kernel image" in text
    assert failed["status"] == "failed"


def test_past_the_budget_cases_are_recorded_as_skipped(tmp_path: Path) -> None:
    results = harness.Results(tmp_path / "toys.json", "cpu")
    cases = [ToyCase(("sleeps",)), ToyCase(("sleeps",), label="another")]
    harness.run_cases(cases, results, FAST, budget_s=0.01)
    assert [row["status"] for row in results.rows] == ["ok", "skipped"]
    assert "budget" in results.rows[1]["reason"]


KILLED_MIDWAY = """
import os, sys
sys.path.insert(0, "tests")
import test_benchmarks as t
from pathlib import Path
t.RUNS["kills"] = lambda: os.kill(os.getpid(), 9)
results = t.harness.Results(Path(sys.argv[1]), "cpu")
t.harness.run_cases([t.ToyCase(("sleeps",)), t.ToyCase(("kills",), label="deadly")], results, t.FAST)
"""


def run_python(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        # Benchmarks are not for Triton's interpreter, which the tests turn on.
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
    )


def test_a_killed_run_leaves_what_it_has(tmp_path: Path) -> None:
    done = run_python("-c", KILLED_MIDWAY, str(tmp_path / "toys.json"))
    assert done.returncode == -9, done.stderr
    data = json.loads((tmp_path / "toys.json").read_text())
    assert data["complete"] is False
    assert [row["status"] for row in data["rows"]] == ["ok"]


# --- the suite --------------------------------------------------------------------------------------------


def test_the_attention_suite_runs_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "attention.json"
    only = r"(core forward|block R1) \| N16"
    done = run_python("-m", "benchmarks.bench_attention", "--quick", "--out", str(out), "--only", only)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    data = json.loads(out.read_text())
    assert data["complete"] is True
    assert {row["suite"] for row in data["rows"]} == {"core forward", "block R1"}
    ours = [row for row in data["rows"] if row["contender"] == "ours"]
    assert len(ours) == 2
    for row in ours:
        assert row["status"] == "ok"
        assert row["time_ms"] > 0
        assert row["relative_error"] < 1e-3
        assert row["peak_mib"] is None or row["peak_mib"] > 0
        assert row["served_by"]
    table = out.with_suffix(".md").read_text()
    assert "## block R1" in table
    assert "textbook" in table


def test_the_data_suite_runs_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "data.json"
    done = run_python("-m", "benchmarks.bench_data", "--quick", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    data = json.loads(out.read_text())
    assert data["complete"] is True
    assert {"ours: folder", "ours: tars", "ours: packed, fetch", "ours: packed, loader"} <= {
        row["contender"] for row in data["rows"]
    }
    for row in data["rows"]:
        assert row["images_per_s"] > 0
        assert row["time_ms"] * row["images_per_s"] == pytest.approx(256e3)
    assert "## random batches, warm" in out.with_suffix(".md").read_text()
    assert "ours: tars" in harness.markdown(data)
    assert (tmp_path / "data_rates.png").is_file()


def test_the_evaluation_suite_agrees_with_the_others(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    out = tmp_path / "evaluation.json"
    done = run_python("-m", "benchmarks.bench_evaluation", "--quick", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    data = json.loads(out.read_text())
    assert data["complete"] is True
    differences = {
        (row["suite"], row["contender"]): row["difference"] for row in data["rows"] if "difference" in row
    }
    assert {suite for suite, _ in differences} == {"FID", "Inception Score", "KID", "intra-FID"}
    assert max(differences.values()) < 1e-6


@pytest.mark.parametrize("suite", bench_attention.SUITES)
@pytest.mark.parametrize("pool_size", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_baseline_computes_the_same_as_the_reference(suite: str, pool_size: int, dtype: str) -> None:
    case = bench_attention.AttentionCase(suite, (2, 16, 6), pool_size, dtype, "cpu")
    rows = {row["contender"]: row for row in harness.measure_case(case, FAST)}
    for name in ("ours", "textbook", "SDPA", "SDPA padded"):
        assert rows[name]["status"] == "ok" or suite == bench_attention.BLOCK_R1, rows[name]
    assert not harness.any_wrong(rows.values())
    assert rows["textbook"]["status"] == "ok"


def test_the_check_covers_every_output_and_gradient() -> None:
    case = bench_attention.AttentionCase(bench_attention.BLOCK_R1, (2, 16, 6), 2, "float32", "cpu")
    expected = case.expected(case.inputs())
    weights = {f"grad_parameter_{name}" for name in ("gamma", "theta", "phi", "g", "o")}
    assert set(expected) == {"y", "slope", "grad_x", *weights}
    assert all(tensor.norm() > 0 for tensor in expected.values())


def test_the_floor_is_the_slowest_of_bytes_products_and_exponentials() -> None:
    case = bench_attention.AttentionCase(bench_attention.CORE_FORWARD, (2, 64, 8), 1, "float32", "cpu")
    fast = {"copy_bytes": 1e30, "matmul_flops_float32": 1e30, "exponentials": 1e30}
    assert case.floor_ms({**fast, "exponentials": 1e6}) == pytest.approx(2 * 64 * 64 / 1e6 * 1e3)
    assert case.floor_ms({**fast, "matmul_flops_float32": 1e6}) == pytest.approx(
        2 * 2 * 64 * 64 * 40 / 1e6 * 1e3
    )
    assert case.floor_ms({**fast, "copy_bytes": 1e6}) == pytest.approx(2 * 64 * 80 * 4 / 1e6 * 1e3)


def test_the_backend_that_auto_takes_is_the_one_that_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    block = bench_attention.AttentionCase(bench_attention.BLOCK_TRAINING, (2, 16, 6), 2, "float32", "cpu")
    core = bench_attention.AttentionCase(bench_attention.CORE_TRAINING, (2, 16, 6), 2, "float32", "cpu")
    assert "ours: fused" in block.contenders()
    assert "ours: fused" not in core.contenders()
    monkeypatch.setattr(bench_attention.dispatch, "_INTERPRETING", False)
    rows = {row["contender"]: row for row in harness.measure_case(block, FAST)}
    assert rows["ours"]["served_by"] == "reference"
    assert "ours: reference" not in rows
    assert (rows["ours: fused"]["status"], rows["ours: triton"]["status"]) == ("refused", "refused")
    assert "run on CUDA" in rows["ours: fused"]["reason"]
    for served_by, repeated in (("fused", "fused"), ("fused + triton", "fused"), ("triton", "triton")):
        seen = {"ours": {"served_by": served_by}}
        names = [name for name in block.contenders() if block.is_repeated(name, seen)]
        assert names == [f"ours: {repeated}"]


def test_the_float32_rate_is_cublas_or_a_third_of_tf32_and_needs_no_clock() -> None:
    times_s = {"copy": 1.0, "bfloat16": 1.0, "ieee": 9.0, "tf32": 1.0}
    for clock in (None, "", "[N/A]"):
        rates = bench_attention.make_rates(times_s, 8, 100, clock)
        assert "exponentials" not in rates
        assert rates["matmul_flops_float32"] == pytest.approx(2 * 8**3 / 3)
        case = bench_attention.AttentionCase(bench_attention.CORE_FORWARD, (2, 64, 8), 1, "float32", "cpu")
        assert case.floor_ms(rates) is not None
    assert bench_attention.make_rates({"ieee": 2.0}, 8, 100, None)["matmul_flops_float32"] == 8**3
    assert case.floor_ms(bench_attention.make_rates({}, 8, 100, None)) is None


def test_products_leave_the_switch_of_tf32_as_it_was() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    for allowed in (True, False):
        (product,) = bench_attention._product(torch.eye(2), torch.eye(2), allow_tf32=allowed).values()
        assert torch.equal(product, torch.eye(2))
        assert torch.backends.cuda.matmul.allow_tf32 is before


def test_every_spectral_norm_computes_the_same_network(tmp_path: Path) -> None:
    for suite in bench_spectral_norm.SUITES:
        case = bench_spectral_norm.DiscriminatorCase(suite, 2, "cpu", base_width=2, resolution=64)
        rows = {row["contender"]: row for row in harness.measure_case(case, FAST)}
        assert [row["status"] for row in rows.values()] == ["ok"] * len(case.contenders()), rows
        assert ("without SN" in rows) == (suite == bench_spectral_norm.STEP)


def test_the_spectral_norm_suite_finds_a_wrong_sigma() -> None:
    case = bench_spectral_norm.DiscriminatorCase("the call alone", 2, "cpu", base_width=2, resolution=64)
    inputs = case.inputs()
    outputs = case.prepare("ours: shared", inputs)()
    name = next(iter(outputs))
    outputs[name] = outputs[name] * 1.01
    with pytest.raises(harness.WrongResultError, match=r"is off by 0\.01"):
        harness.compare(outputs, case.expected(inputs), case.tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("suite", [bench_conditional_norm.PLAIN, bench_conditional_norm.WITH_RELU])
def test_every_conditional_norm_computes_what_batch_norm_does(
    suite: str, channels_last: bool, dtype: str
) -> None:
    case = bench_conditional_norm.NormCase(suite, (3, 5, 7), dtype, channels_last, "cpu")
    rows = {row["contender"]: row for row in harness.measure_case(case, FAST)}
    assert {row["status"] for row in rows.values()} == {"ok"}, rows


def test_the_conditional_norm_suite_finds_a_wrong_gradient() -> None:
    case = bench_conditional_norm.NormCase("norm", (3, 5, 7), "float32", False, "cpu")
    inputs = case.inputs()
    outputs = case.prepare("ours", inputs)()
    outputs["grad_gain"] = outputs["grad_gain"] * 1.01
    with pytest.raises(harness.WrongResultError, match=r"grad_gain is off by 0\.01"):
        harness.compare(outputs, case.expected(inputs), case.tolerance)


@pytest.mark.parametrize("bf16", [False, True])
def test_every_step_computes_the_same_losses_and_gradients(bf16: bool) -> None:
    case = bench_step.StepCase(
        bench_step.STEP, 8, 32, 8, "cpu", ("ours", "textbook"), num_classes=10, bf16=bf16
    )
    rows = harness.measure_case(case, FAST)
    assert [row["status"] for row in rows] == ["ok", "ok"], rows
    bench_step.add_rates(rows)
    assert rows[0]["images_per_s"] == pytest.approx(8e3 / rows[0]["time_ms"])


def test_the_step_is_timed_in_processes_apart() -> None:
    case = bench_step.StepCase(bench_step.STEP, 2, 32, 8, "cpu", ("ours", "textbook"), num_classes=10)
    rows = bench_step.measure_apart(case, steps=2, rounds=1)
    assert [(row["contender"], row["samples"]) for row in rows] == [("ours", 2), ("textbook", 2)]
    assert rows[1]["time_ratio"] == 1.0
    assert rows[0]["time_ratio"] == pytest.approx(rows[0]["time_ms"] / rows[1]["time_ms"])


def test_the_step_suite_finds_a_wrong_loss() -> None:
    case = bench_step.StepCase(bench_step.STEP, 2, 32, 8, "cpu", ("ours", "textbook"), num_classes=10)
    inputs = case.inputs()
    outputs = case.prepare("ours", inputs)()
    outputs["d_loss"] = outputs["d_loss"] * 1.05
    with pytest.raises(harness.WrongResultError, match=r"d_loss is off by 0\.05"):
        harness.compare(outputs, case.expected(inputs), case.tolerance)


def test_the_loop_and_the_scaling_of_the_step_are_reported(tmp_path: Path) -> None:
    alone, whole = bench_step.measure_loop("cpu", iterations=8)
    assert alone["time_ratio"] == 1.0
    assert whole["time_ratio"] > 1.0
    rows = [
        {
            "suite": bench_step.SCALING,
            "contender": "ours",
            "batch_size": batch,
            "base_width": 16,
            "resolution": 64,
            "time_ms": 10.0 * batch,
        }
        for batch in (1, 2)
    ]
    assert bench_step.plot_scaling([alone], tmp_path / "none.png") is None
    plot = bench_step.plot_scaling(rows, tmp_path / "scaling.png")
    assert plot is None or plot.stat().st_size > 10_000


# --- the command for a GPU --------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize(
    "command",
    [
        ["benchmarks.gpu"],
        ["benchmarks.bench_attention", "--device", "cuda"],
        ["benchmarks.bench_spectral_norm", "--device", "cuda"],
        ["benchmarks.bench_step", "--device", "cuda"],
        ["benchmarks.bench_conditional_norm", "--device", "cuda"],
        ["benchmarks.bench_resampling", "--device", "cuda"],
    ],
    ids=lambda c: c[0],
)
def test_without_cuda_the_command_says_so_and_fails(command: Sequence[str]) -> None:
    done = run_python("-m", *command)
    assert done.returncode == 2
    assert done.stdout.startswith("There is no CUDA device here")
    assert done.stderr == ""


def step(name: str, script: str, limit_s: float = 60, not_run: str = "") -> gpu.Step:
    return gpu.Step(name, (sys.executable, "-c", script), limit_s, not_run=not_run)


def test_a_step_that_hangs_fails_or_is_absent_takes_nothing_from_the_others(tmp_path: Path) -> None:
    steps = [
        step("hangs", "print('before'); import time; time.sleep(600)", limit_s=6),
        step("fails", "raise SystemExit(3)"),
        step("absent", "", not_run="the tool is missing"),
        step("works", "print('measured')"),
    ]
    outcomes = {outcome.name: outcome for outcome in gpu.run_steps(steps, tmp_path, 500)}
    assert [outcome.status for outcome in outcomes.values()] == ["timed out", "failed", "not run", "ok"]
    assert outcomes["fails"].reason.startswith("exit status 3")
    assert (tmp_path / "hangs.log").read_text() == "before\n"
    recorded = json.loads((tmp_path / "status.json").read_text())["steps"]
    assert [entry["name"] for entry in recorded] == list(outcomes)
    assert "| absent | not run | 0 | the tool is missing |" in gpu.summary(list(outcomes.values()), tmp_path)


def test_steps_past_the_budget_are_not_begun(tmp_path: Path) -> None:
    (outcome,) = gpu.run_steps([step("late", "print('ran')")], tmp_path, 1)
    assert (outcome.status, outcome.reason) == ("not run", "the time was spent")
