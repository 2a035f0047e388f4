"""Loggers: what TensorBoard and Weights & Biases get, and what happens where they are missing or fail."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
from command_line import SMALL, refused, succeed
from training_runs import Train, metrics_of

from sagan.errors import UserError
from sagan.recipes import OutputConfig, RunConfig
from sagan.train.loggers import WANDB_ID, TensorBoardLogger, WandbLogger
from sagan.train.logs import RunLog


class FakeRun:
    """Signatures of wandb.Run, as of wandb 0.31."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.logged: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str | None]] = []
        self.finished = False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, data: dict[str, Any], step: int | None = None) -> None:
        assert step is None  # wandb drops what comes for an earlier step, as after a resume
        self.logged.append(data)

    def finish(self, exit_code: int | None = None) -> None:
        self.finished = True


class FakeWandb(ModuleType):
    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[FakeRun] = []
        self.error: Exception | None = None

    def init(
        self,
        *,
        project: str,
        id: str,
        resume: str,
        name: str,
        dir: str,
        config: dict[str, Any],
        settings: Any,
    ) -> FakeRun:
        if self.error is not None:
            raise self.error
        assert Path(dir).is_dir()
        self.runs.append(
            FakeRun({"project": project, "id": id, "resume": resume, "name": name, "config": config})
        )
        return self.runs[-1]

    class Settings:
        def __init__(self, *, console: str) -> None:
            assert console == "off"

    class Image:
        def __init__(self, path: str) -> None:
            assert Path(path).stat().st_size > 0
            self.name = Path(path).parent.name


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


class TestWandb:
    def test_a_run_is_logged_and_resumed_as_one(
        self, wandb: FakeWandb, train_tiny: Train, tmp_path: Path
    ) -> None:
        options = {"output__wandb": True, "output__log_every": 1}
        train_tiny(iterations=2, **options)
        train_tiny(iterations=3, resume=True, **options)
        first, second = wandb.runs
        saved = (tmp_path / "run" / WANDB_ID).read_text().strip()
        assert first.options["id"] == second.options["id"] == saved
        assert (first.options["project"], first.options["name"]) == ("sagan", "run")
        assert first.options["resume"] == "allow"
        assert first.options["config"]["batch_size"] == 4
        assert first.metrics == [("iteration", None), ("*", "iteration")]
        assert first.finished
        assert second.finished
        rows = [each for run in wandb.runs for each in run.logged if "d_loss" in each]
        assert rows == metrics_of(tmp_path / "run", timings=True)
        pictures = [each for run in wandb.runs for each in run.logged if "samples" in each]
        assert [each["iteration"] for each in pictures] == [0, 2, 3]
        assert all(
            (each["samples"].name, each["attention"].name) == ("samples", "attention") for each in pictures
        )

    def test_the_project_is_the_environments(
        self, wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WANDB_PROJECT", "mine")
        WandbLogger(tmp_path, RunConfig(recipe="paper"))
        assert wandb.runs[0].options["project"] == "mine"

    def test_a_refusal_is_a_message_with_a_remedy(
        self, wandb: FakeWandb, image_folder: Path, tmp_path: Path
    ) -> None:
        wandb.error = RuntimeError("api_key not configured\nmore")
        options = ("--data", image_folder, "--out", tmp_path / "run", "--output.wandb")
        message = refused("train", *options, *SMALL)
        assert "output.wandb: Weights & Biases refused (api_key not configured); `wandb login`" in message
        assert "WANDB_MODE=offline" in message

    def test_a_failure_in_training_is_a_warning_and_costs_the_logger_only(
        self,
        wandb: FakeWandb,
        train_tiny: Train,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(FakeRun, "log", mock.Mock(side_effect=OSError("no space")))
        result = train_tiny(iterations=2, output__wandb=True, output__log_every=1)
        assert result.iteration == 2
        assert len(metrics_of(result.out)) == 2
        assert caplog.text.count("WandbLogger failed and gets no more of this run: OSError('no space')") == 1


class TestTensorBoard:
    def test_it_gets_every_number_and_picture(
        self, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        board = mock.Mock()
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
        path = next((trained_run / "samples").iterdir())
        with RunLog(tmp_path, 4, [TensorBoardLogger(tmp_path, 4)]) as log:
            log.write({"iteration": 5, "g_loss": 1.5, "d_loss": float("nan"), "alarm": "text"})
            log.write({"iteration": 5, "alarm": "text"})
            log.show(5, {"samples": path})
        board.SummaryWriter.assert_called_once_with(tmp_path / "tensorboard", purge_step=5)
        written = board.SummaryWriter.return_value.mock_calls
        flush = mock.call.flush()
        picture = mock.call.add_image("samples", mock.ANY, 5, dataformats="HWC")
        assert written == [mock.call.add_scalar("g_loss", 1.5, 5), flush, picture, flush, mock.call.close()]
        assert written[2].args[1].shape[2] == 3


@pytest.mark.parametrize(("option", "library"), [("tensorboard", "TensorBoard"), ("wandb", "wandb")])
def test_a_missing_library_is_named_before_the_images_are_read(
    option: str, library: str, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, option, None)
    options = ("--data", image_folder, "--out", tmp_path / "run", *SMALL)
    message = refused("train", *options, f"--output.{option}")
    assert f"output.{option} needs {library}, which the extra {option} installs: pip install " in message
    assert not (tmp_path / "run" / "preflight.json").exists()
    succeed("train", *options, "--dry-run")  # off by default


def test_loggers_are_off_by_default_and_old_configurations_have_none(tiny_config: RunConfig) -> None:
    from sagan.recipes import config_from_dict

    assert not OutputConfig().tensorboard
    assert not OutputConfig().wandb
    values = tiny_config.to_dict()
    del values["output"]["wandb"]
    assert config_from_dict(values) == tiny_config
    values["output"]["wandbs"] = True
    with pytest.raises(UserError, match="wandbs"):
        config_from_dict(values)
