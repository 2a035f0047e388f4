"""Going on with a run that did not end as it should, or that is no longer what it was: nothing good is lost."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import Batches, assert_same_run, changed, make_trainer, metrics_of

from sagan.errors import UserError
from sagan.io import locked
from sagan.recipes import RunConfig
from sagan.train.checkpoint import BEST, CheckpointError, checkpoints_in, load_checkpoint, set_aside_later
from sagan.train.guard import TrainingError
from sagan.train.loop import TrainingResult
from sagan.train.output import Score
from sagan.train.resume import check_unused
from sagan.train.update import Trainer

Train = Callable[..., TrainingResult]


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
    """Return an evaluation that gives these in turn, and writes as one does."""
    left: Iterator[float] = iter(values)

    def evaluate(trainer: Trainer) -> Score:
        folder = trainer.config.out / "evaluation"
        folder.mkdir(exist_ok=True)
        value = next(left)
        (folder / f"iteration_{trainer.iteration:09d}_abc.json").write_text(str(value))
        return Score(value, "test", {"evaluation/test": value})

    return evaluate


def evaluated(config: RunConfig, out: Path, *, every: int) -> RunConfig:
    """Return a run of four iterations with two checkpoints and evaluations."""
    return changed(
        config,
        out=out,
        iterations=4,
        output__checkpoint_every=2,
        evaluation__proxy=True,
        evaluation__every=every,
    )


def remove_latest(out: Path) -> None:
    """Leave what a kill just before the last checkpoint leaves."""
    latest = checkpoints_in(out / "checkpoints")[-1]
    latest.unlink()
    latest.with_suffix(".sha256").unlink()


class TestDamagedCheckpoints:
    def test_they_do_not_count_among_those_that_are_kept(
        self, tiny_config: RunConfig, run_training: Train, tmp_path: Path
    ) -> None:
        config = changed(
            tiny_config, out=tmp_path / "run", output__checkpoint_every=1, output__keep_checkpoints=2
        )
        damaged = run_training(changed(config, iterations=4)).checkpoint
        damaged.write_bytes(damaged.read_bytes() + b"x")
        result = run_training(changed(config, iterations=5, output__checkpoint_every=5), resume=True)
        assert [path.name[-5:] for path in checkpoints_in(damaged.parent)] == ["03.pt", "05.pt"]
        assert (damaged.parent / "iteration_000000004.pt.damaged").is_file()
        assert load_checkpoint(result.checkpoint)["iteration"] == 5

    def test_a_run_that_ends_before_them_keeps_what_it_wrote(
        self, tiny_config: RunConfig, run_training: Train, tmp_path: Path
    ) -> None:
        config = changed(tiny_config, out=tmp_path / "run", output__keep_checkpoints=1, iterations=5)
        run_training(changed(config, iterations=2, output__keep_checkpoints=3))
        late = run_training(changed(config, output__keep_checkpoints=3), resume=True).checkpoint
        late.write_bytes(b"torn")
        result = run_training(changed(config, iterations=3), resume=True)
        assert result.checkpoint.is_file()
        assert checkpoints_in(late.parent) == [result.checkpoint]

    def test_set_aside_names_what_it_renamed(self, tmp_path: Path) -> None:
        for number in (1, 2, 3):
            (tmp_path / f"iteration_{number:09d}.pt").touch()
        names = [path.name for path in set_aside_later(tmp_path / "iteration_000000001.pt")]
        assert names == ["iteration_000000002.pt.damaged", "iteration_000000003.pt.damaged"]


class TestBest:
    def test_a_better_one_of_iterations_still_to_come_is_not_replaced(
        self, tiny_config: RunConfig, run_training: Train, tmp_path: Path
    ) -> None:
        config = evaluated(tiny_config, tmp_path / "run", every=1)
        run_training(config, evaluate=scores(50.0, 45.0, 47.0, 40.0))
        best = config.out / "checkpoints" / BEST
        assert load_checkpoint(best)["iteration"] == 4
        remove_latest(config.out)
        run_training(changed(config, iterations=3), resume=True, evaluate=scores(44.0))
        assert (load_checkpoint(best)["iteration"], load_checkpoint(best)["best_score"]) == (4, 40.0)
        run_training(changed(config, iterations=5), resume=True, evaluate=scores(42.0, 39.0))
        assert (load_checkpoint(best)["iteration"], load_checkpoint(best)["best_score"]) == (5, 39.0)

    def test_evaluations_of_iterations_that_are_made_again_are_put_aside(
        self, tiny_config: RunConfig, run_training: Train, tmp_path: Path
    ) -> None:
        config = evaluated(tiny_config, tmp_path / "run", every=2)
        run_training(config, evaluate=scores(5.0, 4.0))
        remove_latest(config.out)
        run_training(changed(config, iterations=3, evaluation__every=0), resume=True)
        folder = config.out / "evaluation"
        assert [path.name for path in folder.glob("*.json")] == ["iteration_000000002_abc.json"]
        assert [path.name for path in (folder / "dropped").iterdir()] == ["iteration_000000004_abc.json"]


class TestFolders:
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_one_training_at_a_time_works_in_a_folder_and_a_killed_one_frees_it_although_its_workers_live(
        self, tiny_config: RunConfig, run_training: Train, tmp_path: Path
    ) -> None:
        out = tmp_path / "run"
        out.mkdir()
        other = subprocess.Popen(
            [sys.executable, "-c", HOLD_LOCK, str(out / ".lock")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(UserError, match="another training is at work in"):
                run_training(changed(tiny_config, out=out))
            other.kill()
            other.wait()
            assert run_training(changed(tiny_config, out=out)).iteration == 2
        finally:
            other.kill()
            other.communicate()
        assert not (out / ".lock").exists()

    @pytest.mark.skipif(sys.platform == "win32", reason="flock")
    @pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
    def test_without_a_lock_service_there_is_no_lock(
        self, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(descriptor: int, operation: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("fcntl.flock", fails)
        for _ in range(2):
            with locked(tmp_path / "lock", "held"):
                pass

    def test_what_a_run_left_before_its_first_checkpoint_is_not_overwritten(self, tmp_path: Path) -> None:
        check_unused(tmp_path / "new")
        (tmp_path / "metrics.jsonl").touch()  # killed before the first log
        check_unused(tmp_path)
        (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n')
        with pytest.raises(CheckpointError, match="holds a run that ended before its first checkpoint"):
            check_unused(tmp_path)
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / BEST).touch()
        with pytest.raises(CheckpointError, match="holds a run that ended before its first checkpoint"):
            check_unused(tmp_path)


class TestSkippedUpdates:
    @staticmethod
    def poisoned(monkeypatch: pytest.MonkeyPatch, iterations: set[int]) -> None:
        """Put a NaN into G's gradient in these iterations."""
        original = Trainer.update_generator

        def update(self: Trainer, update: int = 1) -> None:
            poison = float("nan") if self.iteration in iterations else 1.0
            handle = next(self.generator.parameters()).register_hook(lambda gradient: gradient * poison)
            original(self, update)
            handle.remove()

        monkeypatch.setattr(Trainer, "update_generator", update)

    def test_their_number_survives_a_resumption(
        self, tiny_config: RunConfig, run_training: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.poisoned(monkeypatch, {1, 4})
        config = changed(
            tiny_config, health__on_nonfinite="skip", output__log_every=8, output__checkpoint_every=3
        )
        whole = run_training(changed(config, out=tmp_path / "whole", iterations=6))
        parts = changed(config, out=tmp_path / "parts", iterations=6)
        run_training(parts)
        remove_latest(parts.out)
        run_training(parts, resume=True)
        assert metrics_of(parts.out)[-1]["skipped_updates"] == 2
        assert_same_run(whole.out, parts.out)

    def test_too_many_in_a_row_are_told_as_such_also_over_a_resumption(
        self, tiny_config: RunConfig, run_training: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.poisoned(monkeypatch, {1, 2, 3, 4, 5})
        config = changed(
            tiny_config,
            out=tmp_path / "run",
            health__on_nonfinite="skip",
            health__most_skipped=3,
            output__log_every=8,
            output__checkpoint_every=3,
        )
        run_training(changed(config, iterations=3))
        with pytest.raises(TrainingError, match=r"in 4 iterations in a row, the first 2 .*most-skipped"):
            run_training(changed(config, iterations=8), resume=True)


class TestAcceptedChanges:
    @pytest.mark.parametrize(
        ("before", "after"), [({}, {"accumulation": 4}), ({"accumulation": 2}, {"batch_size": 6})]
    )
    def test_another_batch_goes_on_with_the_next_images(
        self, tiny_config: RunConfig, before: dict[str, Any], after: dict[str, Any]
    ) -> None:
        first = make_trainer(tiny_config, **before)
        batches = Batches(first.config.batch_size // first.config.accumulation)
        for _ in range(3):
            first.step(batches)
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
    def test_an_average_or_a_scaler_begins_or_ends_where_the_run_goes_on(
        self,
        tiny_config: RunConfig,
        run_training: Train,
        tmp_path: Path,
        before: dict[str, Any],
        after: dict[str, Any],
    ) -> None:
        run_training(changed(tiny_config, out=tmp_path / "run", **before))
        config = changed(tiny_config, out=tmp_path / "run", iterations=3, **after)
        result = run_training(config, resume=True, accept_changes=True)
        assert result.iteration == 3
        assert all(p.isfinite().all() for p in result.trainer.sampling_generator.parameters())

    def test_other_networks_cannot_be(
        self, tiny_config: RunConfig, run_training: Train, tmp_path: Path
    ) -> None:
        run_training(changed(tiny_config, out=tmp_path / "run"))
        wider = changed(tiny_config, out=tmp_path / "run", network__base_width=4)
        with pytest.raises(CheckpointError, match="holds networks that do not fit this configuration"):
            run_training(wider, resume=True, accept_changes=True)


def test_means_of_several_processes_are_taken_up_by_any_number(tiny_config: RunConfig) -> None:
    def means(d_loss: float, count: int) -> dict[str, Any]:
        return {"sums": {"d_loss": d_loss * count}, "counts": {"d_loss": count}}

    trainer = make_trainer(tiny_config)
    state = {**trainer.state_dict(), "means_of_processes": [means(2.0, 4), means(3.0, 4)]}
    trainer.load_state_dict(state)
    assert trainer.means.take() == {"d_loss": 2.5}
    state["means_of_processes"] = [means(0.1, 3)]
    trainer.load_state_dict(state)
    assert trainer.means.now() == {"d_loss": 0.1 * 3 / 3}
    trainer.share_means()
    assert trainer.state_dict()["means_of_processes"] == state["means_of_processes"]
    assert trainer.means.counts["d_loss"].dtype == torch.int64
