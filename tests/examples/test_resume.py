"""A run resumes exactly or is refused, however it ended and whatever has changed; intact checkpoints are kept."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import SMALL, refused
from image_trees import jpeg_bytes
from torch import Tensor
from training_runs import Train, assert_same, assert_same_run, changed, make_trainer, metrics_of, stepped

from sagan.errors import UserError
from sagan.io import locked
from sagan.recipes import RunConfig, config_from_dict
from sagan.signals import NUMBERS, StopRequestedError, stop_requested
from sagan.train import loop
from sagan.train.checkpoint import BEST, CheckpointError, checkpoints_in, find_checkpoint, load_checkpoint
from sagan.train.health import TrainingError
from sagan.train.output import Score
from sagan.train.resume import check_unused
from sagan.train.update import Trainer

RESUME_CASES = {
    "cached, flipped, accumulated": {"d_steps": 2, "accumulation": 2, "d_vectors_move_in_g_step": True},
    "decoded here": {"images__cache_mib": 0, "images__workers": 0},
    "decoded by workers": {"images__cache_mib": 0, "images__workers": 2, "d_steps": 2},
    "unconditional, no average, bf16": {"network__num_classes": 0, "ema_decay": 0.0, "precision": "bf16"},
    "fp16, softplus, residual": {"precision": "fp16", "loss": "softplus", "network__mixer": "residual"},
    "late average": {"ema_start": 3, "batch_size": 6},
}
# Holds a lock with a forked worker, until its standard input ends.
HOLD_LOCK = """
import os, sys
from pathlib import Path
from sagan.io import locked

with locked(Path(sys.argv[1]), "held"):
    if os.fork() != 0:
        print("held", flush=True)
    sys.stdin.read()
    os._exit(0)
"""


def scores(*values: float) -> Callable[[Trainer], Score]:
    """Return an evaluation that gives these in turn, and writes a file as one does."""
    left: Iterator[float] = iter(values)

    def evaluate(trainer: Trainer) -> Score:
        folder = trainer.config.out / "evaluation"
        folder.mkdir(exist_ok=True)
        value = next(left)
        (folder / f"iteration_{trainer.iteration:09d}_abc.json").write_text(str(value))
        return Score(value, "test", {"evaluation/test": value})

    return evaluate


def remove_latest(out: Path) -> None:
    """Leave what a kill just before the last checkpoint leaves."""
    latest = checkpoints_in(out / "checkpoints")[-1]
    latest.unlink()
    latest.with_suffix(".sha256").unlink()


class TestExactness:
    @pytest.mark.parametrize("case", list(RESUME_CASES))
    def test_a_run_in_two_parts_is_the_whole_run_bit_for_bit(self, case: str, train_tiny: Train) -> None:
        settings = {"output__log_every": 2, "output__sample_every": 2, **RESUME_CASES[case]}
        whole = train_tiny("whole", iterations=4, **settings)
        assert (whole.iteration, whole.interrupted) == (4, False)
        train_tiny("parts", iterations=2, **settings)
        torch.manual_seed(999)  # whatever another program did before
        torch.randn(7)
        again = train_tiny("parts", iterations=4, resume=True, **settings)
        assert (again.iteration, again.interrupted) == (4, False)
        assert_same_run(whole.out, again.out)

    @pytest.mark.parametrize(("number", "at"), [(signal.SIGINT, 2), (signal.SIGTERM, 2), (signal.SIGTERM, 0)])
    def test_a_signal_between_logs_loses_nothing(self, number: int, at: int, train_tiny: Train) -> None:
        settings = {"iterations": 5, "output__log_every": 3, "output__sample_every": 2}
        whole = train_tiny("whole", **settings)

        def send_signal(trainer: Trainer) -> None:
            if trainer.iteration == at:
                signal.raise_signal(number)

        handlers = [signal.getsignal(each) for each in NUMBERS]
        stopped = train_tiny("parts", observe=send_signal, **settings)
        assert (stopped.iteration, stopped.interrupted) == (at, True)
        assert stopped.checkpoint == find_checkpoint(stopped.out)
        assert metrics_of(stopped.out) == []
        assert [signal.getsignal(each) for each in NUMBERS] == handlers
        assert not stop_requested()
        train_tiny("parts", resume=True, **settings)
        assert_same_run(whole.out, stopped.out)
        assert [row["iteration"] for row in metrics_of(stopped.out)] == [3, 5]

    def test_more_signals_lose_nothing_until_the_third_ctrl_c(
        self, train_tiny: Train, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        def send(*numbers: int) -> Callable[[Trainer], None]:
            return lambda trainer: [signal.raise_signal(each) for each in numbers if trainer.iteration]

        def end(code: int) -> None:
            raise SystemExit(code)

        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
        monkeypatch.setattr(os, "_exit", end)
        settings = {"iterations": 3, "output__sample_every": 1, "output__checkpoint_every": 1}
        try:
            stopped = train_tiny(observe=send(*2 * NUMBERS, *2 * NUMBERS[1:]), **settings)
            assert (stopped.iteration, stopped.interrupted) == (1, True)
            assert capfd.readouterr().err.count("SIGINT: stopping after this iteration") == 1
            with pytest.raises(SystemExit, match="130"):
                train_tiny(observe=send(*[signal.SIGINT] * 3), resume=True, **settings)
        finally:
            signal.signal(signal.SIGINT, before)
        lost = f"ended at once by Ctrl-C; lost: all after {stopped.checkpoint}\n"
        assert capfd.readouterr().err.endswith(lost)

    @pytest.mark.parametrize("error", [OSError("gone"), RuntimeError("a bug"), StopRequestedError()])
    def test_images_that_cannot_be_read_end_it_after_a_checkpoint(
        self, error: Exception, train_tiny: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = train_tiny("whole", iterations=4)

        def broken(*_: object) -> Iterator[tuple[Tensor, Tensor]]:
            yield from itertools.islice(real(*_), 2)
            signal.raise_signal(signal.SIGTERM) if isinstance(error, StopRequestedError) else None
            raise error

        real = loop._batches
        monkeypatch.setattr(loop, "_batches", broken)
        if isinstance(error, StopRequestedError):
            assert train_tiny(iterations=4).interrupted
        else:
            kind, message = (
                (TrainingError, "gone\nSaved ") if isinstance(error, OSError) else (type(error), "bug")
            )
            with pytest.raises(kind, match=message):
                train_tiny(iterations=4)
        monkeypatch.undo()
        resumed = train_tiny(iterations=4, resume=True)
        assert checkpoints_in(resumed.out / "checkpoints")[0].stem == "iteration_000000002"
        assert_same_run(whole.out, resumed.out)

    def test_a_crash_repeats_what_followed_the_checkpoint(self, train_tiny: Train, tmp_path: Path) -> None:
        settings = {"output__log_every": 1, "output__sample_every": 4, "output__checkpoint_every": 2}
        settings["iterations"] = 5
        whole = train_tiny("whole", **settings)

        def crash(trainer: Trainer) -> None:
            if trainer.iteration == 4:
                raise RuntimeError("power cut")

        out = tmp_path / "parts"
        with pytest.raises(RuntimeError, match="power cut"):
            train_tiny("parts", observe=crash, **settings)
        assert load_checkpoint(find_checkpoint(out))["iteration"] == 2
        assert [row["iteration"] for row in metrics_of(out)] == [1, 2, 3, 4]
        with (out / "metrics.jsonl").open("a") as file:
            file.write('{"iteration": 5, "d_lo')  # a torn line
        train_tiny("parts", resume=True, **settings)
        assert_same_run(whole.out, out)

    def test_a_finished_run_resumes_to_itself(self, train_tiny: Train) -> None:
        first = train_tiny()
        before = first.checkpoint.read_bytes()
        again = train_tiny(resume=True)
        assert (again.iteration, again.interrupted, again.checkpoint) == (2, False, first.checkpoint)
        assert first.checkpoint.read_bytes() == before
        assert [row["iteration"] for row in metrics_of(first.out)] == [2]

    def test_other_seeds_give_other_runs(self, tiny_config: RunConfig) -> None:
        states = [stepped(tiny_config, seed=seed).state_dict()["generator"] for seed in (0, 0, 1)]
        assert_same(states[0], states[1])
        assert any(not torch.equal(tensor, states[2][name]) for name, tensor in states[0].items())

    def test_the_random_state_of_the_gpu_is_saved_and_restored(
        self, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        device = torch.device("cuda", 1)
        restored: list[tuple[Any, torch.device]] = []
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda of: torch.tensor([of.index, 7]))
        monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, of: restored.append((state, of)))
        trainer = make_trainer(tiny_config)
        assert trainer.state_dict()["cuda_rng"] is None
        trainer.load_state_dict(trainer.state_dict())
        trainer.load_state_dict({**trainer.state_dict(), "cuda_rng": torch.zeros(2)})  # on a CPU now
        assert restored == []
        trainer.device = device
        state = trainer.state_dict()
        assert state["cuda_rng"].tolist() == [1, 7]
        monkeypatch.setattr(trainer.means, "load_state_dict", lambda *_: None)  # there is no such device
        trainer.load_state_dict(state)
        assert restored == [(state["cuda_rng"], device)]


class TestRefusals:
    def test_where_how_long_and_how_often_may_change(
        self, train_tiny: Train, tmp_path: Path, image_folder: Path
    ) -> None:
        train_tiny().out.rename(tmp_path / "moved")
        (tmp_path / "link").symlink_to(image_folder)
        changes = {"images__workers": 1, "images__cache_mib": 0, "images__check": "off"}
        changes |= {"data": tmp_path / "link", "iterations": 3, "output__log_every": 1}
        assert train_tiny("moved", resume=True, **changes).iteration == 3

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"batch_size": 2}, "batch_size was 4, now 2"),
            (
                {"seed": 1, "optimizer__g_lr": 1e-4},
                r"seed was 0, now 1; optimizer\.g_lr was 0\.02, now 0\.0001",
            ),
            ({"optimizer__d_lr": 0.5}, r"optimizer\.d_lr was 0\.02, now 0\.5"),
            ({"network__base_width": 3}, r"network\.base_width was 2, now 3"),
            ({"network__g_attention": (8,)}, r"network\.g_attention was \[8, 16\], now \[8\]"),
            ({"images__horizontal_flip": False}, r"images\.horizontal_flip was True, now False"),
            ({"images__resample": "box"}, r"images\.resample was 'bilinear', now 'box'"),
            ({"precision": "bf16", "d_steps": 2}, "d_steps was 1, now 2; precision was 'fp32', now 'bf16'"),
        ],
    )
    def test_another_configuration_is_refused_by_what_differs(
        self, changes: dict[str, Any], message: str, trained_run: Path, run_training: Train
    ) -> None:
        config = config_from_dict(load_checkpoint(find_checkpoint(trained_run))["config"])
        files = [trained_run / name for name in ("config.json", "metrics.jsonl")]
        before = [file.read_bytes() for file in files]
        with pytest.raises(CheckpointError, match=f"made with another configuration: {message}"):
            run_training(changed(config, **changes), resume=True)
        assert [file.read_bytes() for file in files] == before

    def test_changes_are_accepted_on_request(self, train_tiny: Train) -> None:
        out = train_tiny().out
        changes = {"iterations": 3, "optimizer__d_lr": 0.5}
        with pytest.raises(CheckpointError, match="--accept-changes"):
            train_tiny(resume=True, **changes)
        result = train_tiny(resume=True, accept_changes=True, **changes)
        assert result.iteration == 3
        assert result.trainer.d_optimizer.param_groups[0]["lr"] == 0.5
        assert json.loads((out / "config.json").read_text())["optimizer"]["d_lr"] == 0.5

    def test_other_images_are_refused(self, train_tiny: Train, tmp_path: Path, image_folder: Path) -> None:
        data = tmp_path / "data"
        shutil.copytree(image_folder, data)
        train_tiny(data=data)
        (data / "train" / "n01440764" / "one_more.JPEG").write_bytes(jpeg_bytes())
        with pytest.raises(CheckpointError, match="made with other images than those found now"):
            train_tiny(data=data, resume=True)

    def test_nothing_to_resume_is_an_error(self, train_tiny: Train, tmp_path: Path) -> None:
        with pytest.raises(
            CheckpointError, match=r"expected the folder of a run, or a checkpoint, got .* does not exist"
        ):
            train_tiny(resume=True)
        assert not (tmp_path / "run").exists()

    def test_a_run_is_never_overwritten(self, train_tiny: Train) -> None:
        first = train_tiny()
        before = first.checkpoint.read_bytes()
        with pytest.raises(CheckpointError, match="holds a run already; use --resume"):
            train_tiny()
        assert find_checkpoint(first.out).read_bytes() == before

    @pytest.mark.parametrize("name", ["metrics.jsonl", f"checkpoints/{BEST}"])
    def test_files_of_a_run_without_a_checkpoint_are_not_overwritten(self, name: str, tmp_path: Path) -> None:
        check_unused(tmp_path / "new")
        (tmp_path / "metrics.jsonl").touch()  # killed before the first log
        check_unused(tmp_path)
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / name).write_text('{"iteration": 1}\n')
        with pytest.raises(CheckpointError, match="holds a run that ended before its first checkpoint"):
            check_unused(tmp_path)


class TestDamagedCheckpoints:
    def test_the_run_resumes_from_the_one_before(
        self, train_tiny: Train, caplog: pytest.LogCaptureFixture
    ) -> None:
        settings = {"iterations": 4, "output__checkpoint_every": 2}
        whole = train_tiny("whole", **settings)
        path = train_tiny("parts", **settings).checkpoint
        path.write_bytes(path.read_bytes()[:5000])
        parts = train_tiny("parts", resume=True, **settings)
        assert "resuming from iteration_000000002.pt, which is older" in caplog.text
        assert_same_run(whole.out, parts.out)

    def test_they_do_not_count_among_those_to_keep(self, train_tiny: Train) -> None:
        settings = {"output__checkpoint_every": 1, "output__keep_checkpoints": 2}
        damaged = train_tiny(iterations=4, **settings).checkpoint
        damaged.write_bytes(damaged.read_bytes() + b"x")
        result = train_tiny(iterations=5, resume=True, **{**settings, "output__checkpoint_every": 5})
        assert [path.name[-5:] for path in checkpoints_in(damaged.parent)] == ["03.pt", "05.pt"]
        assert (damaged.parent / "iteration_000000004.pt.damaged").is_file()
        assert load_checkpoint(result.checkpoint)["iteration"] == 5

    def test_a_run_that_ends_before_them_keeps_what_it_wrote(self, train_tiny: Train) -> None:
        train_tiny(iterations=2, output__keep_checkpoints=3)
        late = train_tiny(iterations=5, output__keep_checkpoints=3, resume=True).checkpoint
        late.write_bytes(b"torn")
        result = train_tiny(iterations=3, output__keep_checkpoints=1, resume=True)
        assert result.checkpoint.is_file()
        assert checkpoints_in(late.parent) == [result.checkpoint]


class TestBest:
    SETTINGS = {"output__checkpoint_every": 2, "evaluation__proxy": True}  # noqa: RUF012

    def test_a_better_one_of_iterations_still_to_come_is_not_replaced(self, train_tiny: Train) -> None:
        settings = {**self.SETTINGS, "evaluation__every": 1}
        out = train_tiny(iterations=4, evaluate=scores(50.0, 45.0, 47.0, 40.0), **settings).out
        best = out / "checkpoints" / BEST
        assert load_checkpoint(best)["iteration"] == 4
        remove_latest(out)
        train_tiny(iterations=3, resume=True, evaluate=scores(44.0), **settings)
        assert (load_checkpoint(best)["iteration"], load_checkpoint(best)["best_score"]) == (4, 40.0)
        train_tiny(iterations=5, resume=True, evaluate=scores(42.0, 39.0), **settings)
        assert (load_checkpoint(best)["iteration"], load_checkpoint(best)["best_score"]) == (5, 39.0)

    def test_evaluations_of_iterations_that_are_made_again_are_set_aside(self, train_tiny: Train) -> None:
        out = train_tiny(iterations=4, evaluate=scores(5.0, 4.0), **self.SETTINGS, evaluation__every=2).out
        remove_latest(out)
        train_tiny(iterations=3, resume=True, **self.SETTINGS)
        folder = out / "evaluation"
        assert [path.name for path in folder.glob("*.json")] == ["iteration_000000002_abc.json"]
        assert [path.name for path in (folder / "dropped").iterdir()] == ["iteration_000000004_abc.json"]


class TestLocks:
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_one_training_at_a_time_uses_a_folder_and_a_killed_one_frees_it_although_its_workers_live(
        self, train_tiny: Train, tmp_path: Path, image_folder: Path
    ) -> None:
        lock = tmp_path / "run" / ".lock"
        lock.parent.mkdir()
        other = subprocess.Popen(
            [sys.executable, "-c", HOLD_LOCK, str(lock)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(UserError, match="another training run is using"):
                train_tiny()
            (lock.parent / "metrics.jsonl").write_text('{"iteration": 1}\n')  # as before its first checkpoint
            for options in ((), ("--dry-run",)):
                message = refused("train", "--data", image_folder, "--out", lock.parent, *SMALL, *options)
                assert "another training run is using" in message
            (lock.parent / "metrics.jsonl").unlink()
            other.kill()
            other.wait()
            assert train_tiny().iteration == 2
        finally:
            other.kill()
            other.communicate()
        assert not lock.exists()

    @pytest.mark.skipif(sys.platform == "win32", reason="needs flock")
    @pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
    def test_a_file_system_without_locks_has_none(
        self, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(descriptor: int, operation: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("fcntl.flock", fails)
        for _ in range(2):
            with locked(tmp_path / "lock", "held"):
                pass


class TestSkippedUpdates:
    SETTINGS = {"health__on_nonfinite": "skip", "output__log_every": 8, "output__checkpoint_every": 3}  # noqa: RUF012

    @staticmethod
    def poison(monkeypatch: pytest.MonkeyPatch, iterations: set[int]) -> None:
        """Put a NaN into G's gradient in these iterations."""
        original = Trainer.update_generator

        def update(self: Trainer, update: int = 1) -> None:
            factor = float("nan") if self.iteration in iterations else 1.0
            handle = next(self.generator.parameters()).register_hook(lambda gradient: gradient * factor)
            original(self, update)
            handle.remove()

        monkeypatch.setattr(Trainer, "update_generator", update)

    def test_a_resumed_run_counts_them(self, train_tiny: Train, monkeypatch: pytest.MonkeyPatch) -> None:
        self.poison(monkeypatch, {1, 4})
        settings = {**self.SETTINGS, "iterations": 6}
        whole, parts = (train_tiny(name, **settings) for name in ("whole", "parts"))
        remove_latest(parts.out)
        train_tiny("parts", resume=True, **settings)
        assert metrics_of(parts.out)[-1]["skipped_updates"] == 2
        assert_same_run(whole.out, parts.out)

    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_as_many_as_allowed_end_no_run_however_often_it_logs(
        self, precision: str, train_tiny: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = Trainer._backward
        monkeypatch.setattr(Trainer, "_backward", lambda *args: original(*args) * float("nan"))
        settings = {
            **self.SETTINGS,
            "health__most_skipped": 6,
            "output__log_every": 2,
            "precision": precision,
        }
        result = train_tiny(iterations=6, **settings)
        assert [row["skipped_updates"] for row in metrics_of(result.out)] == [4, 4, 4]
        with pytest.raises(TrainingError, match="in 7 iterations in a row, the first 1"):
            train_tiny(iterations=8, resume=True, **settings)

    def test_too_many_end_a_resumed_run(self, train_tiny: Train, monkeypatch: pytest.MonkeyPatch) -> None:
        self.poison(monkeypatch, {1, 2, 3, 4, 5})
        settings = {**self.SETTINGS, "health__most_skipped": 3}
        train_tiny(iterations=3, **settings)
        with pytest.raises(TrainingError, match=r"in 4 iterations in a row, the first 2 .*most-skipped"):
            train_tiny(iterations=8, resume=True, **settings)


class TestAcceptedChanges:
    @pytest.mark.parametrize(
        ("before", "after"), [({}, {"accumulation": 4}), ({"accumulation": 2}, {"batch_size": 6})]
    )
    def test_another_batch_size_resumes_at_the_next_image(
        self, tiny_config: RunConfig, before: dict[str, Any], after: dict[str, Any]
    ) -> None:
        first = stepped(tiny_config, **before)
        second = make_trainer(tiny_config, **after)
        second.load_state_dict(first.state_dict())
        part = second.config.batch_size // second.config.accumulation
        assert second.batches_drawn * part == 12

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ({"ema_decay": 0.0}, {"ema_decay": 0.9}),
            ({"ema_decay": 0.9}, {"ema_decay": 0.0}),
            ({"precision": "fp32"}, {"precision": "fp16"}),
            ({"precision": "fp16"}, {"precision": "bf16"}),
        ],
    )
    def test_an_average_or_a_scaler_starts_or_ends_where_the_run_resumes(
        self, train_tiny: Train, before: dict[str, Any], after: dict[str, Any]
    ) -> None:
        train_tiny(**before)
        result = train_tiny(iterations=3, resume=True, accept_changes=True, **after)
        assert result.iteration == 3
        assert all(p.isfinite().all() for p in result.trainer.sampling_generator.parameters())

    def test_other_networks_are_refused(self, train_tiny: Train) -> None:
        train_tiny()
        with pytest.raises(CheckpointError, match="holds networks that do not fit this configuration"):
            train_tiny(network__base_width=4, resume=True, accept_changes=True)


def test_means_of_several_processes_are_restored_on_any_number(tiny_config: RunConfig) -> None:
    def means(d_loss: float, count: int) -> dict[str, Any]:
        return {"sums": {"d_loss": d_loss * count}, "counts": {"d_loss": count}}

    trainer = make_trainer(tiny_config)
    state = trainer.state_dict()
    state["means_of_processes"] = [means(2.0, 4), means(3.0, 4)]
    trainer.load_state_dict(state)
    assert trainer.means.take() == {"d_loss": 2.5}
    state["means_of_processes"] = [means(0.1, 3)]
    trainer.load_state_dict(state)
    assert trainer.means.now() == {"d_loss": 0.1 * 3 / 3}
    trainer.share_means()
    assert trainer.state_dict()["means_of_processes"] == state["means_of_processes"]
    assert trainer.means.counts["d_loss"].dtype == torch.int64
