"""The campaigns of hostile input: they tell right from wrong, clear from unclear, and see what hangs or dies."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sagan_layers

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks" / "fuzz").exists():
    pytest.skip("needs a checkout: benchmarks are not packaged", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from benchmarks.fuzz import blocks, calls, contexts, files  # noqa: E402 (found through the line above)
from benchmarks.fuzz.outcomes import BAD, Campaign, Outcome, WrongError, outcome_of, run_cases  # noqa: E402


def behave(number: int, folder: Path) -> Outcome:
    """Seven cases, one of each fate."""
    if number == 1:
        time.sleep(600)
    if number == 2:
        os._exit(7)
    if number == 3:
        raise KeyError("lost")
    if number == 4:
        raise WrongError("off by 1")
    if number == 5:
        torch.ones(2**40)
    return Outcome("right" if number else "clear", "block")


class TestFates:
    def test_each_case_has_its_own(self, tmp_path: Path) -> None:
        campaign = Campaign("behave", behave, count=7, seconds=60, limit_s=1)
        found = dict(run_cases(campaign, range(7), tmp_path, seconds=60, processes=2))
        kinds = {number: outcome.kind for number, outcome in sorted(found.items())}
        bad = {1: "hung", 2: "unclear", 3: "unclear", 4: "wrong", 5: "unclear"}
        assert kinds == {0: "clear", **bad, 6: "right"}
        assert "the process ended: 7" in found[2].detail
        assert "KeyError" in found[3].detail

    def test_no_case_starts_after_the_time_is_over(self, tmp_path: Path) -> None:
        campaign = Campaign("behave", behave, count=7, seconds=0, limit_s=1)
        assert [*run_cases(campaign, range(7), tmp_path, seconds=0, processes=1)] == []

    def test_an_error_that_nobody_made_clear_is_unclear(self) -> None:
        assert outcome_of(lambda: Outcome(f"{1 // 0}", "x"), "x").kind == "unclear"


class TestCalls:
    @pytest.mark.parametrize("number", range(0, 170, 10))
    def test_a_handful_of_each_kind(self, number: int) -> None:
        for each in range(number, number + 10):
            outcome = calls.run_case(each)
            assert outcome.kind not in BAD, f"calls/{each}: {outcome}"

    def test_every_public_module_and_function_is_drawn(self) -> None:
        drawn = {blocks.draw_call(number).make.__name__ for number in range(600)}
        # Bases, results, contexts, what changes models or calls them, draws at random, or chooses backends.
        other = {
            "DiscriminatorPass", "DiscriminatorResult", "GeneratorPass", "GeneratorResult",
            "GradientPenalty", "SharedSpectralNorm", "SpectralNormLayer", "SpectralNormResult",
            "apply_spectral_norm", "call_with_constant_parameters", "checkpointed", "convert",
            "explain_backends", "force_backend", "frozen_running_statistics", "frozen_spectral_norm",
            "functional", "interpolate_images", "record_backends", "remove_spectral_norm",
            "select_backend", "set_debug_checks", "shared_spectral_norm", "standing_statistics",
            "synchronize_batch_norm",
        }  # fmt: skip
        assert drawn | other == {*sagan_layers.__all__, *sagan_layers.functional.__all__}

    @pytest.mark.parametrize(("factor", "kind"), [(1.0, "right"), (1.001, "wrong")])
    def test_a_block_that_is_off_is_wrong(
        self, factor: float, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        forward = sagan_layers.SNLinear.forward
        monkeypatch.setattr(sagan_layers.SNLinear, "forward", lambda self, x: factor * forward(self, x))
        kinds = set()
        for number in range(3, 600, 17):  # linear layers
            call = blocks.draw_call(number, dtypes=(torch.float32,))
            assert call.make is sagan_layers.SNLinear
            try:
                calls.check_call(call)
                kinds.add("right")
            except WrongError:
                kinds.add("wrong")
        assert kinds == {kind}

    def test_a_gradient_that_is_off_is_wrong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        forward = sagan_layers.SNLinear.forward

        def detached(self: nn.Module, x: Tensor) -> Tensor:
            y: Tensor = forward(self, x)
            return 0.5 * y + 0.5 * y.detach()

        monkeypatch.setattr(sagan_layers.SNLinear, "forward", detached)
        with pytest.raises(WrongError, match="gradient of"):
            calls.check_call(blocks.draw_call(3, dtypes=(torch.float32,)))

    @pytest.mark.parametrize(
        ("arguments", "clear"),
        [({"in_channels": "a"}, True), ({"in_channels": 0}, True), ({"no_such_name": 1}, False)],
    )
    def test_only_errors_of_ours_that_name_an_argument_are_clear(
        self, arguments: dict[str, object], clear: bool
    ) -> None:
        with pytest.raises((TypeError, ValueError)) as caught:
            sagan_layers.SNConv2d(**{"in_channels": 1, "out_channels": 1, "kernel_size": 1, **arguments})
        assert calls.is_clear(caught.value, {"in_channels", "no_such_name"}) is clear


class TestContexts:
    @pytest.mark.usefixtures("_fresh_compiler")
    @pytest.mark.parametrize("name", contexts.CONTEXT_TABLE)
    def test_each_with_one_block(self, name: str) -> None:
        number = [*contexts.CONTEXT_TABLE].index(name) + 5 * len(contexts.CONTEXT_TABLE)
        outcome = contexts.run_case(number)
        assert outcome.what == name
        assert outcome.kind not in BAD, f"contexts/{number}: {outcome}"

    def test_a_context_with_another_result_is_wrong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(
            contexts.CONTEXT_TABLE, "deepcopy", lambda m, x, _: contexts.results(m.double().half().float(), x)
        )
        number = [*contexts.CONTEXT_TABLE].index("deepcopy")
        kinds = {contexts.run_case(number + turn * len(contexts.CONTEXT_TABLE)).kind for turn in range(12)}
        assert "wrong" in kinds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the undamaged files are."""
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("fuzz") / "0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files.sound(folder)
    return folder


class TestFiles:
    @pytest.mark.parametrize("number", range(len(files.KINDS)))
    def test_one_of_each_kind(self, folder: Path, number: int) -> None:
        outcome = files.run_case(number, folder)
        assert outcome.what == files.KINDS[number]
        assert outcome.kind not in BAD, f"files/{number}: {outcome}"

    def test_a_reader_that_believes_everything_is_wrong(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def careless(copy: Path, out: Path, way: int) -> object:
            return (copy / "manifest.json").read_bytes() if (copy / "manifest.json").exists() else None

        monkeypatch.setitem(
            files.FORMATS, "packed set", ("packed", "manifest.json", careless, files.compare_plain)
        )
        number = files.KINDS.index("packed set")
        assert files.run_case(number, folder).kind == "wrong"

    def test_damage_is_drawn_by_the_seed(self) -> None:
        data = bytes(range(256)) * 20
        first = [files.damage(files.random.Random(seed), data) for seed in range(40)]
        assert first == [files.damage(files.random.Random(seed), data) for seed in range(40)]
        assert sum(each != data for each in first) > 35

    def test_what_steers_a_terminal_is_wrong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def prints(arguments: list[str]) -> int:
            print("\x1b[2J")
            return 0

        monkeypatch.setattr(files.program, "main", prints)
        with pytest.raises(WrongError, match="printed"):
            files.command("sample")


def test_the_command_writes_counts_and_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = importlib.import_module("benchmarks.fuzz.__main__")
    campaign = Campaign("behave", behave, count=5, seconds=60, limit_s=1)
    monkeypatch.setattr(command, "CAMPAIGNS", {"behave": campaign})
    out = tmp_path / "fuzz.json"
    assert command.main(["behave", "--count", "1", "--processes", "1", "--out", str(out)]) == 0
    record = json.loads(out.read_text())["behave"]
    assert (record["cases"], record["counts"]["clear"], record["failures"]) == (1, 1, [])
    assert record["environment"]["torch"] == torch.__version__
