"""The memory of a training step: measured, compared with what there is, refused, and made to fit."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import SMALL, main, refused, succeed
from several_processes import results_by_rank
from training_runs import assert_same_run

from sagan.distributed import World
from sagan.errors import UserError
from sagan.networks import NetworkConfig
from sagan.recipes import RunConfig, read_config
from sagan.train import memory
from sagan.train.memory import Measured, StepMemory, check_memory, measure_step, parameter_bytes

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
MIB = 2**20
CHECKED = tuple(option for option in SMALL if option != "--ignore-memory")


def fake_step(config: RunConfig, images: tuple[int, ...], device: torch.device) -> Measured:
    """A step of 100 MiB and 50 for each image, 20 with checkpointed activations, 30 in bf16."""
    each = 20 if config.step.checkpoint_activations else 30 if config.precision == "bf16" else 50
    return Measured(images, tuple((100 + each * count) * MIB for count in images), 1.0)


def never_measured(*_: object) -> Measured:
    raise AssertionError("a step was measured")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """``machine(mib)``: a machine with so much memory, where steps take what :func:`fake_step` says."""

    def make(mib: int | None) -> None:
        monkeypatch.setattr(memory, "measure_step", fake_step)
        monkeypatch.setattr(memory, "available_bytes", lambda _: None if mib is None else mib * MIB)

    return make


class TestMeasurement:
    def test_of_a_real_step_grows_with_the_images_and_leaves_random_numbers_alone(
        self, tiny_config: RunConfig
    ) -> None:
        before = torch.get_rng_state()
        found = measure_step(tiny_config, (2, 256), CPU)
        assert torch.equal(torch.get_rng_state(), before)
        few, many = found.peaks
        assert 0 < few < many
        # The images of one update alone, real and generated in float32.
        assert many - few > 254 * 2 * 3 * 32 * 32 * 4
        assert found.seconds > 0

    def test_is_extrapolated_along_a_line_and_not_where_one_number_was_measured(self) -> None:
        line = Measured((4, 12), (400, 1200), 1.0)
        assert [line.at(count) for count in (4, 12, 256)] == [400, 1200, 25600]
        assert Measured((1,), (70,), 1.0).at(1) == 70

    @pytest.mark.parametrize("resolution", [32, 64, 128, 256])
    @pytest.mark.parametrize("most", [1, 2, 5, 256])
    def test_parts_are_no_larger_than_the_batch(self, resolution: int, most: int) -> None:
        network = NetworkConfig(resolution, g_attention=(), d_attention=())
        few, many = memory.small_parts(network, most, CPU)
        assert 1 <= few <= many <= most

    def test_parts_are_few_images_of_large_networks_and_more_of_small_ones(self) -> None:
        assert memory.small_parts(NetworkConfig(128, base_width=64), 256, CPU) == (2, 10)
        assert memory.small_parts(NetworkConfig(64, base_width=16, d_attention=(16,)), 256, CPU) == (16, 80)

    def test_accumulated_gradients_and_buckets_of_several_processes_count(
        self, tiny_config: RunConfig, machine: Callable[[int | None], None]
    ) -> None:
        machine(None)
        weights = parameter_bytes(tiny_config.network)
        one = replace(tiny_config, batch_size=32, accumulation=1)
        parts = replace(one, batch_size=64, accumulation=2)
        pixels = 32 * 3 * 32**2
        alone = StepMemory(one, 1, CPU).needed()
        assert StepMemory(parts, 1, CPU).needed() - alone == max(weights) + pixels
        assert StepMemory(replace(one, batch_size=64), 2, CPU).needed() - alone == sum(weights)

    def test_a_process_that_fails_has_a_reason(self, tiny_config: RunConfig) -> None:
        with pytest.raises(memory.NoMeasurementError, match="does not tell how much memory"):
            measure_step(tiny_config, (1,), torch.device("meta"))


class TestAvailable:
    def test_processes_of_a_machine_share_its_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        alone = memory.available_bytes(CPU)
        assert alone is not None
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        share = memory.available_bytes(CPU)
        assert share is not None
        assert share < alone / 2

    @pytest.mark.parametrize(
        ("membership", "files", "expected"),
        [
            ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": "1000", "a/memory.current": "700"}, [350]),
            ("0::/gone", {"memory.max": "1000", "memory.current": "1040"}, [10]),
            ("0::/", {"memory.max": "max", "memory.current": "1040"}, []),
            ("0::/", {}, []),
        ],
    )
    def test_control_groups_limit_it(
        self, membership: str, files: dict[str, str], expected: list[int], tmp_path: Path
    ) -> None:
        for name, text in {
            "memory.stat": "inactive_file 50",
            "a/memory.stat": "inactive_file 50",
            **files,
        }.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        (tmp_path / "cgroup").write_text(membership)
        assert [*memory._cgroup_headroom(tmp_path, tmp_path / "cgroup")] == expected

    def test_control_groups_of_version_1_limit_it(self, tmp_path: Path) -> None:
        files = {"limit_in_bytes": "1000", "usage_in_bytes": "700", "stat": "total_inactive_file 5"}
        for name, text in files.items():
            (tmp_path / "memory" / "job").mkdir(parents=True, exist_ok=True)
            (tmp_path / "memory" / "job" / f"memory.{name}").write_text(text)
        (tmp_path / "cgroup").write_text("5:cpu,memory:/job\n1:name=systemd:/job")
        assert [*memory._cgroup_headroom(tmp_path, tmp_path / "cgroup")] == [305]


class TestRefusal:
    def refusal(self, image_folder: Path, out: Path, *options: object) -> str:
        return refused("train", "--data", image_folder, "--out", out, *CHECKED, "--batch-size", 64, *options)

    def test_names_options_each_of_which_passes(
        self,
        image_folder: Path,
        tmp_path: Path,
        machine: Callable[[int | None], None],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        machine(1800)
        message = self.refusal(image_folder, tmp_path / "run")
        assert "a step needs 3.3 GiB, 1.8 GiB are available" in message
        lines = re.findall(r"^  (--.*?)    \(", message, re.MULTILINE)
        assert lines == [
            "--step.checkpoint-activations", "--accumulation 4", "--accumulation 2 --precision bf16", "--batch-size 24",
        ]  # fmt: skip
        for line in lines:
            options = [*CHECKED, "--batch-size", 64, *line.split(), "--dry-run"]
            printed = succeed(
                "train", "--out", tmp_path / line.replace(" ", ""), "--data", image_folder, *options
            )
            assert "Warning" not in printed
            assert "This may not fit" not in printed
        assert not (tmp_path / "run").exists()

    def test_options_are_combined_where_one_is_not_enough(
        self, image_folder: Path, tmp_path: Path, machine: Callable[[int | None], None]
    ) -> None:
        machine(220)
        lines = re.findall(r"^  (--.*?)    \(", self.refusal(image_folder, tmp_path / "run"), re.MULTILINE)
        assert lines[0] == "--accumulation 64"
        machine(190)
        lines = re.findall(r"^  (--.*?)    \(", self.refusal(image_folder, tmp_path / "run"), re.MULTILINE)
        assert lines[0] == "--accumulation 64 --step.checkpoint-activations"

    def test_nothing_is_suggested_that_does_not_fit(
        self, image_folder: Path, tmp_path: Path, machine: Callable[[int | None], None]
    ) -> None:
        machine(100)
        message = self.refusal(image_folder, tmp_path / "run")
        assert "No option found that fits; --ignore-memory goes on all the same" in message

    def test_a_compiled_run_is_not_told_to_checkpoint(
        self, image_folder: Path, tmp_path: Path, machine: Callable[[int | None], None]
    ) -> None:
        machine(1800)
        assert "checkpoint" not in self.refusal(image_folder, tmp_path / "run", "--step.compile")

    def test_networks_that_cannot_fit_are_not_measured(
        self, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(memory, "measure_step", never_measured)
        monkeypatch.setattr(memory, "available_bytes", lambda _: 1000)
        assert "weights, moments and average alone take" in self.refusal(image_folder, tmp_path / "run")

    def test_a_dry_run_warns(
        self, image_folder: Path, tmp_path: Path, machine: Callable[[int | None], None]
    ) -> None:
        machine(1800)
        options = (*CHECKED, "--batch-size", 64, "--dry-run")
        printed = succeed("train", "--data", image_folder, "--out", tmp_path / "run", *options)
        assert "Warning: memory: a step needs 3.3 GiB, 1.8 GiB are available" in printed
        assert "--accumulation 4" in printed
        assert "1000 classes assumed" in succeed("train", "--out", tmp_path / "other", *options)

    def test_a_close_estimate_is_said_to_be_close(
        self, image_folder: Path, tmp_path: Path, machine: Callable[[int | None], None]
    ) -> None:
        machine(3400)
        options = (
            "--data",
            image_folder,
            "--out",
            tmp_path / "run",
            *CHECKED,
            "--batch-size",
            64,
            "--dry-run",
        )
        assert "This may not fit: the estimate can be 15% off" in succeed("train", *options)

    @pytest.mark.parametrize("reason", ["available", "measured"])
    def test_what_is_not_known_is_said_and_training_goes_on(
        self,
        image_folder: Path,
        tmp_path: Path,
        machine: Callable[[int | None], None],
        monkeypatch: pytest.MonkeyPatch,
        reason: str,
    ) -> None:
        machine(None)
        if reason == "measured":

            def fails(*_: object) -> Measured:
                raise memory.NoMeasurementError("no such file")

            monkeypatch.setattr(memory, "measure_step", fails)
        printed = succeed(
            "train", "--data", image_folder, "--out", tmp_path / "run", *CHECKED, "--iterations", 1
        )
        expected = (
            "not measured (no such file); going on" if reason == "measured" else "is not known here; going on"
        )
        assert expected in printed
        assert "Done: 1 iterations" in printed

    def test_both_ways_around_it_at_once_are_refused(self) -> None:
        message = refused("train", "--data", "x", "--fit-memory", "--ignore-memory")
        assert "expected one at most, got both" in message


class TestFitMemory:
    def test_checkpoints_activations_if_that_is_enough(
        self,
        tiny_config: RunConfig,
        machine: Callable[[int | None], None],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        machine(1800)
        run = replace(tiny_config, batch_size=64)
        found = check_memory(run, None, ALONE, fit=True)
        assert found == replace(run, step=replace(run.step, checkpoint_activations=True))
        assert "Chosen to fit: --step.checkpoint-activations" in capsys.readouterr().out
        machine(8000)
        assert check_memory(run, None, ALONE, fit=True) == run

    def test_refuses_where_nothing_keeps_the_batch(
        self, tiny_config: RunConfig, machine: Callable[[int | None], None]
    ) -> None:
        machine(150)
        with pytest.raises(UserError, match="No option found that fits"):
            check_memory(replace(tiny_config, batch_size=64), None, ALONE, fit=True)

    def test_its_run_is_the_one_with_the_chosen_options_and_resumes_with_them(
        self, image_folder: Path, tmp_path: Path, machine: Callable[[int | None], None]
    ) -> None:
        machine(500)
        data = ("train", "--data", image_folder, *CHECKED, "--batch-size", 16, "--images.cache-mib", 0)
        data += ("--images.workers", 0, "--output.log-every", 1, "--output.sample-every", 1)
        printed = succeed(*data, "--out", tmp_path / "fit", "--iterations", 1, "--fit-memory")
        assert "Chosen to fit: --accumulation 4, with which a step takes" in printed
        assert read_config(tmp_path / "fit").accumulation == 4
        machine(8000)  # more is free when it resumes
        succeed(*data, "--out", tmp_path / "fit", "--iterations", 2, "--fit-memory", "--resume")
        assert read_config(tmp_path / "fit").accumulation == 4
        succeed(*data, "--out", tmp_path / "given", "--iterations", 2, "--accumulation", 4)
        assert_same_run(tmp_path / "fit", tmp_path / "given")

    def test_options_that_change_a_run_to_be_resumed_say_so(
        self, tiny_config: RunConfig, machine: Callable[[int | None], None]
    ) -> None:
        machine(1800)
        run = replace(tiny_config, batch_size=64)
        with pytest.raises(UserError) as caught:
            check_memory(run, None, ALONE, resumes=True)
        lines = re.findall(r"^  (--.*?)    \(", str(caught.value), re.MULTILINE)
        assert lines[0] == "--step.checkpoint-activations"
        assert lines[1:]
        assert all(line.endswith(" --accept-changes") for line in lines[1:])
        machine(500)
        with pytest.raises(UserError, match="--accept-changes"):
            check_memory(run, None, ALONE, fit=True, resumes=True)


def test_the_check_changes_no_result(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out, options in (("with", CHECKED), ("without", SMALL)):
        command = ("train", "--data", image_folder, "--out", tmp_path / out, *options, "--iterations", 2)
        assert main(*command) == 0
        assert ("Memory: a step needs" in capsys.readouterr().out) == (out == "with")
    assert_same_run(tmp_path / "with", tmp_path / "without")


@pytest.mark.parametrize(("device", "fits"), [("cpu", False), ("cuda", True)])
def test_images_in_the_machines_memory_take_none_of_the_gpus(
    device: str,
    fits: bool,
    tiny_config: RunConfig,
    machine: Callable[[int | None], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(8000)
    monkeypatch.setattr(memory, "image_bytes", lambda *_: 9000 * MIB)
    with contextlib.nullcontext() if fits else pytest.raises(UserError, match="a step needs 9"):
        check_memory(tiny_config, None, World(0, 1, torch.device(device)))


def fit_on_two(world: World) -> dict[str, Any]:
    memory.measure_step = fake_step if world.is_main else never_measured  # type: ignore[assignment]
    # One process can take less than the other: that one decides for both.
    memory.available_bytes = lambda _: (8000 if world.is_main else 1000) * MIB  # type: ignore[assignment]
    run = RunConfig(recipe="digits", batch_size=128, device="cpu")
    found = check_memory(run, None, world, fit=True)
    try:
        check_memory(run, None, world)
    except UserError as error:
        message = str(error)
    return {"accumulation": found.accumulation, "message": message}


def test_processes_agree_and_the_first_measures(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = results_by_rank(fit_on_two, 2, "memory", tmp_path_factory)
    assert [each["accumulation"] for each in found] == [8, 8]
    assert "in each of 2 processes, 1000 MiB are available" in found[0]["message"]
    assert found[1]["message"] == "another process failed"


def test_config_files_do_not_hold_the_options_of_the_check(
    image_folder: Path, tmp_path: Path, machine: Callable[[int | None], None]
) -> None:
    machine(8000)
    succeed("train", "--data", image_folder, "--out", tmp_path, *CHECKED, "--dry-run", "--fit-memory")
    assert "memory" not in json.loads((tmp_path / "config.json").read_text())
