"""What compiled kernels need of a chip, read without one: a handful compiled here, the rest as recorded."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks" / "kernel_resources.py").exists():
    pytest.skip("needs a checkout: benchmarks are not packaged", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from benchmarks import kernel_resources  # noqa: E402 (found through the line above)

REPRESENTATIVE = (
    "forward 16x32 bf16 even",
    "row 16x64 bf16 even",
    "column 16x32 bf16 masked",
    "double_row with_query 16x32 bf16 even",
    "double_column with_key 16x32 bf16 even",
    "forward 16x64 fp32 tf32x3 masked",
    "project pool=2 C=128 bf16 nchw even",
    "attend with out C=128 bf16 nchw even",
    "weight gradient pool=2 C=128 bf16 channels_last masked",
)


def run(*arguments: str, cache: Path, interpret: str = "0") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.kernel_resources", "--check", *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_representative_kernels_compile_without_spills_to_matrix_instructions(tmp_path: Path) -> None:
    only = f" ({'|'.join(REPRESENTATIVE)})$"
    done = run("--arch", "90", "--only", only, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "sm_90" in line]
    assert {line.split("|")[1].strip() for line in lines} == set(REPRESENTATIVE)
    assert all("HGMMA" in line or "HMMA" in line for line in lines)


def test_interpreted_kernels_are_not_compiled(tmp_path: Path) -> None:
    done = run(cache=tmp_path, interpret="1")
    assert done.returncode == 2
    assert "unset TRITON_INTERPRET" in done.stderr


def recorded() -> dict[str, Any]:
    assert kernel_resources.RESULTS.exists(), f"run: {kernel_resources.COMMAND}"
    record: dict[str, Any] = json.loads(kernel_resources.RESULTS.read_text())
    return record


def test_the_recorded_resources_are_of_these_kernel_files() -> None:
    stale = recorded()["sources"] != kernel_resources.source_hashes()
    assert not stale, f"kernel files have changed since they were measured; run: {kernel_resources.COMMAND}"


def test_the_recorded_configurations_are_all_that_launchers_can_choose_and_fit_without_spills() -> None:
    found = kernel_resources.configurations(recorded())
    wanted = [(module, job[4]) for module, job in kernel_resources.all_jobs()]
    assert sorted((each.module, each.label) for each in found) == sorted(wanted)
    assert all(each.usage.keys() == kernel_resources.CHIPS.keys() for each in found)
    assert [complaint for each in found for complaint in each.complaints()] == []


def test_the_page_is_made_from_the_record() -> None:
    assert kernel_resources.PAGE.read_text() == kernel_resources.page(recorded()), (
        f"run: {kernel_resources.COMMAND} --page"
    )


def test_the_guide_counts_the_configurations_that_were_recorded() -> None:
    guide = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8").replace("\n> ", " ")
    (count,) = re.findall(r"None of their (\d+) configurations spills registers", guide)
    assert int(count) == len(kernel_resources.configurations(recorded()))


@pytest.mark.parametrize(
    ("arch", "usage", "matrix_instructions", "complaint"),
    [
        (90, (128, 0, 1024), {"HGMMA": 3}, ""),
        (90, (128, 8, 1024), {"HGMMA": 3}, "spills 8 bytes"),
        (90, (128, 0, 228 * 1024), {"HGMMA": 3}, "needs 233472 bytes of shared memory"),
        (80, (128, 0, 164 * 1024), {}, "the chip has 166912"),
        (90, (128, 0, 1024), {}, "has no matrix instructions"),
    ],
)
def test_what_does_not_fit_is_complained_about(
    arch: int, usage: tuple[int, int, int], matrix_instructions: dict[str, int], complaint: str
) -> None:
    needs = {arch: kernel_resources.Usage(*usage)}
    configuration = kernel_resources.Configuration("m", "k", "it", {}, needs, matrix_instructions)
    found = configuration.complaints()
    assert len(found) == bool(complaint)
    assert all(complaint in each for each in found)


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "num_warps", "blocks"),
    [(128, 0, 4, 4), (255, 0, 8, 1), (32, 0, 1, 32), (32, 100 * 1024, 4, 2), (64, 0, 16, 2)],
)
def test_occupancy_is_bounded_by_what_runs_out_first(
    registers: int, shared_bytes: int, num_warps: int, blocks: int
) -> None:
    usage = kernel_resources.Usage(registers, 0, shared_bytes)
    assert usage.blocks_per_sm(kernel_resources.CHIPS[90], num_warps) == blocks
