"""The benchmarks measure what they say: time, memory, and nothing before the result is checked."""

from __future__ import annotations

import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    bench_attention,
    bench_conditional_norm,
    bench_numerics,
    bench_resampling,
    bench_spectral_norm,
    bench_step,
    gpu,
    harness,
    report,
)
from benchmarks.harness import Case, Outputs, Refused, Run, Settings
from benchmarks.report import Row

ROOT = Path(__file__).resolve().parent.parent
FAST = Settings(max_rounds=5, target_s=0.1, sample_ms=1.0, memory=False)
WITH_MEMORY = Settings(max_rounds=3, target_s=0.1, sample_ms=1.0)
needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")


def right() -> Outputs:
    return {"y": torch.ones(3)}


def sleeps(seconds: float) -> Outputs:
    time.sleep(seconds)
    return right()


def raises(error: Exception) -> Outputs:
    raise error


def ends_its_process() -> Outputs:
    if multiprocessing.parent_process() is not None:
        os._exit(7)
    return right()


RUNS: dict[str, Run] = {
    "textbook": right,
    "sleeps": partial(sleeps, 0.02),
    "sleeps twice": partial(sleeps, 0.04),
    "allocates": lambda: right() | {"64 MiB": torch.ones(16 * 2**20)},
    "wrong": lambda: {"y": torch.tensor([1.0, 1.0, 1.1])},
    "fails": partial(raises, RuntimeError("no kernel image is available\nand a long story")),
    "runs out": partial(raises, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 999 GiB")),
    "ends": ends_its_process,
}


@dataclass(frozen=True)
class ToyCase(Case):
    names: tuple[str, ...]
    label: str

    @property
    def name(self) -> str:
        return self.label

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


def toy(*names: str, device: str = "cpu", label: str = "a toy") -> ToyCase:
    return ToyCase("toys", device, names, label)


def measure(*names: str, settings: Settings = FAST) -> dict[str, Row]:
    rows: dict[str, Row] = harness.measure_case(toy(*names), settings)["contenders"]
    return rows


class TestMeasuring:
    def test_a_contender_that_sleeps_twice_as_long_takes_twice_the_time(self) -> None:
        rows = measure("textbook", "sleeps", "sleeps twice")
        assert rows["sleeps"]["time_ms"] >= 20
        assert 1.5 < rows["sleeps twice"]["time_ms"] / rows["sleeps"]["time_ms"] < 2.5
        assert 0 <= rows["sleeps"]["iqr_ms"] < rows["sleeps"]["time_ms"]
        assert rows["textbook"]["time_ratio"] == 1.0
        assert rows["sleeps"]["time_ratio"] == rows["sleeps"]["time_ms"] / rows["textbook"]["time_ms"]

    def test_median_spread_ratio_and_rate_are_those_of_the_times(self) -> None:
        times_s = {"a": [0.001, 0.002, 0.003, 0.004, 0.1], "b": [0.001] * 3}
        measurements = {name: harness.measurement(times, repeats=7) for name, times in times_s.items()}
        row = harness.timed_rows(measurements, "b", images=6)["a"]
        assert row == pytest.approx(
            {"time_ms": 3.0, "iqr_ms": 2.0, "time_ratio": 3.0, "images_per_s": 2000.0, "status": "ok"}
        )

    def test_a_fast_contender_is_repeated_until_a_sample_is_long_enough(self) -> None:
        settings = Settings(max_rounds=3, sample_ms=5.0)
        timing = harness.time_contenders({"fast": right}, {"fast": {}}, "cpu", settings)["fast"]
        assert timing.number_per_run >= 5
        assert timing.median < 1e-3

    def test_contenders_are_timed_in_turn(self) -> None:
        order: list[str] = []

        def logged(name: str) -> Outputs:
            order.append(name)
            return sleeps(0.003)

        settings = Settings(max_rounds=4, min_rounds=4, sample_ms=1.0)
        runs = {name: partial(logged, name) for name in "abc"}
        harness.time_contenders(runs, {name: {} for name in runs}, "cpu", settings)
        assert ["".join(order[i : i + 3]) for i in range(0, len(order), 3)] == ["abc", "abc", "bca", "cab"]

    @needs_proc
    def test_peak_memory_is_that_of_each_contender_alone(self) -> None:
        rows = measure("allocates", "textbook", settings=WITH_MEMORY)
        assert 60 <= rows["allocates"]["peak_mib"] < 80
        assert rows["textbook"]["peak_mib"] < 10

    @needs_proc
    def test_a_memory_process_that_dies_leaves_its_reason_and_the_time(self) -> None:
        row = measure("ends", settings=WITH_MEMORY)["ends"]
        assert (row["status"], row["peak_mib"]) == ("ok", None)
        assert "terminated" in row["peak_mib_reason"]

    def test_a_wrong_contender_is_refused_before_it_is_timed(self) -> None:
        row = measure("wrong", "textbook")["wrong"]
        assert row["status"] == "wrong"
        assert "y is off by" in row["reason"]
        assert "time_ms" not in row

    @pytest.mark.parametrize(
        "outputs",
        [{}, {"y": torch.ones(4)}, {"y": torch.full((3,), torch.nan)}, {"y": torch.zeros(3)}],
        ids=["missing", "shape", "nan", "zeros"],
    )
    def test_a_missing_misshapen_or_nan_result_is_wrong(self, outputs: Outputs) -> None:
        with pytest.raises(harness.WrongResultError, match="y "):
            harness.compare(outputs, {"y": torch.ones(3)}, 1e-3)

    def test_contenders_that_cannot_run_leave_their_reason_and_the_others_run(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        turns = iter([right, RUNS["runs out"]])
        monkeypatch.setitem(RUNS, "runs out while timed", lambda: next(turns)())
        rows = measure("refuses", "fails", "runs out", "runs out while timed", "textbook")
        assert [(row["status"], row.get("reason")) for row in rows.values()] == [
            ("refused", "the widths differ"),
            ("failed", "RuntimeError: no kernel image is available"),
            ("failed", "out of memory"),
            ("failed", "out of memory"),
            ("ok", None),
        ]

    def test_after_a_fault_of_the_device_no_contender_is_blamed_and_earlier_results_stay(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        broken = [False]

        def synchronize() -> None:
            if broken[0]:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

        def illegal() -> Outputs:
            broken[0] = True
            return right()

        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        monkeypatch.setattr(harness, "_cuda_sampler", lambda: lambda run, repeats: 0.001)
        monkeypatch.setitem(RUNS, "illegal", illegal)
        results = report.Results(tmp_path / "toys.json", "cpu")
        good, bad = toy("textbook", device="cuda"), toy("textbook", "illegal", "sleeps", device="cuda")
        harness.run_cases([good, bad], results, FAST)
        assert results.cases[0]["contenders"]["textbook"]["status"] == "ok"
        assert results.cases[1]["status"] == "failed"
        assert "illegal memory access" in results.cases[1]["reason"]
        assert results.finish() == 1

    def test_an_error_that_goes_away_is_no_fault_of_the_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answers = iter([partial(raises, RuntimeError("CUDA error: invalid argument")), lambda: None])
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: next(answers)())
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        row: Row = {}
        with harness.failures_recorded(row, "cuda"):
            raise RuntimeError("no launch")
        assert row["status"] == "failed"

    @pytest.mark.parametrize(
        ("record", "bad"),
        [
            ({"contenders": {"ours": {"status": "failed"}}}, True),
            ({"contenders": {"ours: triton": {"status": "failed"}}}, True),
            ({"contenders": {"textbook": {"status": "failed"}}}, False),
            ({"contenders": {"textbook": {"status": "wrong"}}}, True),
            ({"contenders": {"ours": {"status": "refused"}}}, False),
            ({"status": "failed"}, True),
            ({"status": "skipped"}, False),
        ],
    )
    def test_a_wrong_result_or_a_failure_of_ours_fails_the_benchmark(self, record: Row, bad: bool) -> None:
        assert report.any_failure([record]) is bad


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        # Benchmarks are not for Triton's interpreter, which the tests turn on.
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
    )


def last_run(path: Path) -> Row:
    run: Row = json.loads(path.read_text())["runs"][-1]
    return run


def run_quick(suite: str, folder: Path, *options: str) -> Row:
    out = folder / f"{suite}.json"
    done = run_python("-m", f"benchmarks.bench_{suite}", "--quick", "--out", str(out), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    run = last_run(out)
    assert run["complete"] is True
    return run


class TestResults:
    def test_they_say_where_when_and_what_was_measured(self, tmp_path: Path) -> None:
        path = tmp_path / "toys.json"
        results = report.Results(path, "cpu")
        harness.run_cases([toy("sleeps", "textbook", "fails")], results, FAST)
        # What a killed run leaves.
        assert last_run(path)["complete"] is False
        assert [case["case"] for case in last_run(path)["cases"]] == ["a toy"]
        assert results.finish() == 0
        run = last_run(path)
        assert run["complete"] is True
        assert {"date", "command", "cpu", "cores_used", "load_average", "commit", "dirty"} <= set(
            run["environment"]
        )
        assert run["environment"]["torch"] == torch.__version__
        (case,) = run["cases"]
        assert {"time_ms", "iqr_ms", "time_ratio"} <= set(case["contenders"]["sleeps"])
        text = path.with_suffix(".md").read_text()
        assert "| a toy |" in text
        assert "- (1) failed: RuntimeError: no kernel image is available" in text
        assert len(path.read_text().splitlines()) == 5  # one a case

    def test_past_the_budget_cases_are_recorded_as_skipped_and_appended_runs_keep_the_earlier(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "toys.json"
        results = report.Results(path, "cpu")
        harness.run_cases([toy("sleeps"), toy("sleeps", label="another")], results, FAST, budget_s=0.01)
        assert results.cases[0]["contenders"]["sleeps"]["status"] == "ok"
        assert results.cases[1]["status"] == "skipped"
        assert "budget" in results.cases[1]["reason"]
        report.Results(path, "cpu", append=True).add({"suite": "toys", "case": "third", "contenders": {}})
        runs = json.loads(path.read_text())["runs"]
        assert [case["case"] for run in runs for case in run["cases"]] == ["a toy", "another", "third"]
        assert "| another |" in path.with_suffix(".md").read_text()

    @pytest.mark.parametrize("path", sorted(report.RESULTS.glob("*_cpu.json")), ids=lambda path: path.stem)
    def test_those_in_the_tree_are_well_formed(self, path: Path) -> None:
        runs = json.loads(path.read_text())["runs"]
        assert path.with_suffix(".md").exists()
        for run in runs:
            assert {"cpu", "cores_used", "torch", "date", "command"} <= set(run["environment"])
            assert re.fullmatch("[0-9a-f]{40}", run["environment"]["commit"])
            for case in run["cases"]:
                rows = case.get("contenders", {"all": case})
                assert all(row["status"] == "ok" or row["reason"] for row in rows.values())
                ratios = {name: row["time_ratio"] for name, row in rows.items() if "time_ratio" in row}
                if case["suite"] != bench_step.LOOP:  # its ratio is of the sums
                    base_ms = rows[case["baseline"]]["time_ms"] if ratios else None
                    assert ratios == pytest.approx(
                        {name: rows[name]["time_ms"] / base_ms for name in ratios}, rel=1e-4
                    )


def tiny_step(*names: str, bf16: bool = False, batch_size: int = 2) -> bench_step.StepCase:
    names = names or ("ours", "textbook")
    return bench_step.StepCase("step", "cpu", batch_size, 32, 8, names, num_classes=10, bf16=bf16)


def attention(suite: str, *names: str, pool_size: int = 2, dtype: str = "float32") -> Case:
    return bench_attention.AttentionCase(suite, "cpu", (2, 16, 6), pool_size, dtype, names=names)


def norm(suite: str, channels_last: bool = False, dtype: str = "float32") -> Case:
    return bench_conditional_norm.NormCase(suite, "cpu", (3, 5, 7), dtype, channels_last)


def discriminator(suite: str) -> Case:
    return bench_spectral_norm.DiscriminatorCase(suite, "cpu", 2, base_width=2, resolution=64)


class TestSuites:
    def test_attention_runs_end_to_end(self, tmp_path: Path) -> None:
        only = r"(core forward|block R1) \| N16"
        run = run_quick("attention", tmp_path, "--only", only)
        cases = {case["suite"]: case["contenders"] for case in run["cases"]}
        assert set(cases) == {"core forward", "block R1"}
        for rows in cases.values():
            assert rows["ours"]["status"] == "ok"
            assert rows["ours"]["relative_error"] < 1e-3
            assert rows["ours"]["peak_mib"] is None or rows["ours"]["peak_mib"] > 0
            assert f"ours: {rows['ours']['served_by']}" not in rows  # not measured twice
        assert "ours: fused" not in cases["core forward"]
        for name in ("ours: fused", "ours: triton"):
            assert cases["block R1"][name]["status"] == "refused"
            assert "run on CUDA" in cases["block R1"][name]["reason"]
        assert "## block R1" in (tmp_path / "attention.md").read_text()
        if importlib.util.find_spec("matplotlib"):
            plot = (tmp_path / "attention_block_R1.svg").read_text()
            assert all(f">{text}<" in plot for text in ("block R1", "ours", "textbook"))

    def test_data_runs_end_to_end(self, tmp_path: Path) -> None:
        run = run_quick("data", tmp_path)
        rows = {name: row for case in run["cases"] for name, row in case["contenders"].items()}
        assert set(rows) >= {"ours: folder", "ours: tars", "ours: packed, loader"}
        for row in rows.values():
            assert row["time_ms"] * row["images_per_s"] == pytest.approx(256e3, rel=1e-4)

    def test_evaluation_runs_end_to_end_and_agrees(self, tmp_path: Path) -> None:
        pytest.importorskip("torchmetrics")
        differences: dict[str, list[float]] = {}
        for case in run_quick("evaluation", tmp_path)["cases"]:
            found = [row["difference"] for row in case["contenders"].values() if "difference" in row]
            differences.setdefault(case["suite"], []).extend(found)
        assert set(differences) == {"FID", "Inception Score", "KID", "intra-FID"}
        assert all(found and max(found) < 1e-6 for found in differences.values())

    @pytest.mark.parametrize(
        ("suite", "only"),
        [
            ("spectral_norm", "call alone . .* NCHW"),
            ("conditional_norm", "ReLU . .* NCHW"),
            ("resampling", "convolution . up|Generator"),
            ("step", "^step "),
        ],
    )
    def test_the_others_run_on_a_small_case(self, suite: str, only: str, tmp_path: Path) -> None:
        module = importlib.import_module(f"benchmarks.bench_{suite}")
        out = tmp_path / f"{suite}.json"
        assert module.main(["--quick", "--no-memory", "--only", only, "--out", str(out)]) == 0
        cases = last_run(out)["cases"]
        assert {row["status"] for case in cases for row in case["contenders"].values()} == {"ok"}
        assert all(re.search(only, f"{case['suite']} | {case['case']}") for case in cases)

    @pytest.mark.parametrize(
        "case",
        [
            *(
                # Without "triton", which the interpreter would run for minutes.
                attention(
                    suite, "ours", "ours: chunked", "ours: sdpa", "textbook", pool_size=pool, dtype=dtype
                )
                for suite in bench_attention.SUITES
                for pool in (1, 2)
                for dtype in ("float32", "bfloat16")
            ),
            *(
                attention(suite, "textbook", "SDPA", "SDPA padded", pool_size=pool, dtype=dtype)
                for suite in bench_attention.SUITES[:3]  # torch's has no second derivative
                for pool in (1, 2)
                for dtype in ("float32", "bfloat16")
            ),
            *(discriminator(suite) for suite in bench_spectral_norm.SUITES),
            *(
                norm(suite, channels_last, dtype)
                for suite in ("norm", "norm and ReLU")
                for channels_last in (False, True)
                for dtype in ("float32", "bfloat16")
            ),
            *(tiny_step(bf16=bf16, batch_size=8) for bf16 in (False, True)),
        ],
        ids=lambda case: f"{case.suite} {case.name}",
    )
    def test_every_contender_computes_the_expected_result(self, case: Case) -> None:
        rows = harness.measure_case(case, FAST)["contenders"]
        assert [row["status"] for row in rows.values()] == ["ok"] * len(rows), rows
        assert case.baseline in rows

    @pytest.mark.parametrize(
        ("case", "contender", "output"),
        [
            (attention("block forward+backward"), "ours", "grad_parameter_phi"),
            (discriminator("the call alone"), "ours: shared", "blocks.0.conv1"),
            (norm("norm"), "ours", "grad_gain"),
            (
                bench_resampling.make_cases(harness.parse("resampling", "Convolutions.", ["--quick"]))[0],
                "ours",
                "grad_weight",
            ),
            (tiny_step(), "ours", "d_loss"),
        ],
        ids=["attention", "spectral_norm", "conditional_norm", "resampling", "step"],
    )
    def test_a_result_that_is_off_is_found(self, case: Case, contender: str, output: str) -> None:
        inputs = case.inputs()
        outputs = case.prepare(contender, inputs)()
        outputs[output] = outputs[output] * (1 + 2 * case.tolerance)
        with pytest.raises(harness.WrongResultError, match=rf"{output} is off by"):
            harness.compare(outputs, case.expected(inputs), case.tolerance)

    def test_the_check_of_r1_covers_every_output_and_gradient(self) -> None:
        case = attention(bench_attention.BLOCK_R1)
        expected = case.expected(case.inputs())
        weights = {f"grad_parameter_{name}" for name in ("gamma", "theta", "phi", "g", "o")}
        assert set(expected) == {"y", "slope", "grad_x", *weights}
        assert all(tensor.norm() > 0 for tensor in expected.values())

    @pytest.mark.parametrize("served_by", ["fused", "fused + triton", "triton"])
    def test_the_backend_that_auto_was_seen_to_take_is_not_measured_again(self, served_by: str) -> None:
        case = attention(bench_attention.BLOCK_TRAINING)
        rows = {"ours": {"served_by": served_by}}
        repeated = [name for name in case.contenders() if case.is_repeated(name, rows)]
        assert repeated == [f"ours: {served_by.split()[0]}"]


class TestFloors:
    def floor_ms(self, rates: Mapping[str, float]) -> float | None:
        suite, shape = bench_attention.CORE_FORWARD, (2, 64, 8)
        return bench_attention.AttentionCase(suite, "cpu", shape, 1, "float32").floor_ms(rates)

    @pytest.mark.parametrize(
        ("slowest", "work"),
        [
            ("exponentials", 2 * 64 * 64),
            ("matmul_flops_float32", 2 * 2 * 64 * 64 * 40),
            ("copy_bytes", 2 * 64 * 80 * 4),
        ],
    )
    def test_they_are_the_slowest_of_bytes_products_and_exponentials(self, slowest: str, work: int) -> None:
        rates = dict.fromkeys(("copy_bytes", "matmul_flops_float32", "exponentials"), 1e30) | {slowest: 1e6}
        assert self.floor_ms(rates) == pytest.approx(work / 1e6 * 1e3)

    def test_the_float32_rate_is_cublas_or_a_third_of_tf32_and_needs_no_clock(self) -> None:
        times_s = {"copy": 1.0, "bfloat16": 1.0, "ieee": 9.0, "tf32": 1.0}
        for clock in (None, "", "[N/A]"):
            rates = bench_attention.make_rates(times_s, 8, 100, clock)
            assert "exponentials" not in rates
            assert rates["matmul_flops_float32"] == pytest.approx(2 * 8**3 / 3)
            assert self.floor_ms(rates) is not None
        assert bench_attention.make_rates({"ieee": 2.0}, 8, 100, None)["matmul_flops_float32"] == 8**3
        assert self.floor_ms({}) is None

    @pytest.mark.parametrize("allowed", [True, False])
    def test_products_restore_the_switch_of_tf32(self, allowed: bool) -> None:
        before = torch.backends.cuda.matmul.allow_tf32
        (product,) = bench_attention._product(torch.eye(2), torch.eye(2), allow_tf32=allowed).values()
        assert torch.equal(product, torch.eye(2))
        assert torch.backends.cuda.matmul.allow_tf32 is before


class TestStep:
    def test_it_is_timed_in_separate_processes(self) -> None:
        rows = bench_step.measure_separately(tiny_step(), steps=2, rounds=1)["contenders"]
        assert list(rows) == ["ours", "textbook"]
        assert rows["textbook"]["time_ratio"] == 1.0
        assert rows["ours"]["images_per_s"] == pytest.approx(2e3 / rows["ours"]["time_ms"])

    def test_the_loop_takes_longer_than_the_step_inside_it(self) -> None:
        rows = bench_step.measure_loop("cpu", iterations=8)["contenders"]
        assert rows["the step alone"]["time_ratio"] == 1.0
        assert rows["the whole loop"]["time_ratio"] > 1.0


class TestGpuCommand:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
    def test_without_cuda_it_says_so_and_fails(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert gpu.main([]) == 2
        for suite in (bench_attention, bench_resampling):
            with pytest.raises(SystemExit, match="2"):
                suite.main(["--device", "cuda"])
        assert capsys.readouterr().out.count("There is no CUDA device here") == 3

    def test_a_step_that_hangs_or_fails_does_not_take_the_others_time(self, tmp_path: Path) -> None:
        def step(name: str, script: str, limit_s: float = 60) -> gpu.Step:
            return gpu.Step(name, limit_s, (sys.executable, "-u", "-c", script))

        steps = [
            step("hangs", "print('before'); import time; time.sleep(600)", limit_s=6),
            step("fails", "raise SystemExit(3)"),
            gpu.Step("absent", 60, ("a-missing-tool",)),
            step("works", "print('measured')"),
        ]
        outcomes = {outcome.name: outcome for outcome in gpu.run_steps(steps, tmp_path, 500)}
        assert [each.status for each in outcomes.values()] == ["timed out", "failed", "not run", "ok"]
        assert outcomes["fails"].reason.startswith("exit status 3")
        assert (tmp_path / "hangs.log").read_text() == "before\n"
        written = (tmp_path / "summary.md").read_text()
        assert "| absent | not run | 0 | a-missing-tool is not on the PATH |" in written
        assert "| works | ok |" in written
        (late,) = gpu.run_steps([step("late", "print('ran')")], tmp_path, 1)
        assert (late.status, late.reason) == ("not run", "no time was left")


@pytest.mark.parametrize(("options", "state"), [([], "returned"), (["--keep-freed-memory"], "kept")])
def test_a_record_says_what_the_allocator_did_with_freed_memory(
    options: list[str], state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(harness, "keep_freed_memory", lambda: not calls.append(True))
    given = harness.parse("attention", "Attention.", ["--out", str(tmp_path / "record.json"), *options])
    results = harness.run_suite(given, [], FAST)
    assert results.run["environment"]["freed_memory"] == state
    assert len(calls) == len(options)


def test_all_suites_run_in_processes_of_their_own_and_the_worst_status_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], *, check: bool) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, int("spectral" in command[2]))

    main = importlib.import_module("benchmarks.__main__")
    monkeypatch.setattr(main.subprocess, "run", run)
    assert main.main(["--quick", "--out", str(tmp_path), "--peer", "peer"]) == 1
    assert [command[2] for command in commands] == [f"benchmarks.bench_{suite}" for suite in main.SUITES]
    assert [("--peer" in command) for command in commands] == [True] * 4 + [False] * 3


class TestNumerics:
    def test_half_precision_throughout_loses_where_logits_are_large_and_ours_does_not(self) -> None:
        small, large = (bench_numerics.half_precision(torch.bfloat16, std) for std in (1, 100))
        assert large["logit_error"] > 10 * small["logit_error"]
        assert large["half_error"] > 20 * large["our_error"]
        assert large["our_error"] < 2**-7  # the rounding of the output

    def test_the_estimate_of_sigma_grows_to_the_truth(self) -> None:
        ratios = list(bench_numerics.sigma_estimate(16)["ratios"].values())
        assert ratios == sorted(ratios)
        assert ratios[0] < 0.95
        assert 0.99 < ratios[-1] < 1 + 1e-6

    def test_a_failing_test_of_parity_records_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bench_numerics.pytest, "main", lambda _: pytest.ExitCode.TESTS_FAILED)
        with pytest.raises(SystemExit, match="no errors were recorded"):
            bench_numerics.main(["--out", str(tmp_path / "record.json")])
        assert not (tmp_path / "record.json").exists()
