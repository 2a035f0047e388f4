"""The demo from end to end, made small: what it writes, says and does when called again."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from command_line import read_png
from torch import Tensor
from training_runs import changed

from benchmarks import demo_pictures
from sagan.demo import run as demo
from sagan.demo.digits import Judge, train_judge
from sagan.demo.run import Verdict, describe, run_demo
from sagan.recipes import RECIPES, RunConfig
from sagan.train.checkpoint import find_checkpoint, load_checkpoint
from sagan.train.loop import Trainer, TrainingResult

PICTURES = ("samples.png", "attention_maps.png", "curves.png")


def small_demo(out: Path) -> RunConfig:
    return changed(
        RECIPES["digits"](),
        out=out,
        iterations=4,
        batch_size=4,
        ema_start=1,
        device="cpu",
        network__base_width=2,
        network__latent_dim=4,
        output__log_every=2,
        output__sample_every=2,
        output__checkpoint_every=2,
    )


@pytest.fixture(scope="module", autouse=True)
def judges() -> Iterator[list[Judge]]:
    """Take fewer samples, and a judge that was trained for one epoch, once: the images are always the same."""
    trained: list[Judge] = []

    def train_once(images: Tensor, labels: Tensor) -> Judge:
        if not trained:
            trained.append(train_judge(images, labels, epochs=1))
        return trained[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "VERDICT_SAMPLES", 130)
        patch.setattr(demo, "CURVE_SAMPLES", 100)
        patch.setattr(demo, "train_judge", train_once)
        yield trained


class Demo(NamedTuple):
    config: RunConfig
    result: TrainingResult
    verdict: Verdict | None
    text: str


def run_and_capture(config: RunConfig) -> Demo:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        result, verdict = run_demo(config, progress=False)
    return Demo(config, result, verdict, text.getvalue())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return run_and_capture(small_demo(tmp_path_factory.mktemp("demo") / "run"))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class TestFinishedDemo:
    def test_every_file_it_promises_is_there_and_every_file_there_is_promised(self, finished: Demo) -> None:
        promised = finished.text[finished.text.index("Written to") : finished.text.index("Next:")]
        lines = promised.replace(";", "\n").splitlines()[1:]
        names = [line.split()[0].rstrip("/") for line in lines if line.strip()]
        assert {*PICTURES, "verdict.json", "checkpoints"} <= set(names)
        for name in names:
            assert (finished.config.out / name).exists(), name
        there = {path.name for path in finished.config.out.iterdir()}
        assert there - set(names) == {"digits", "preflight.json", "quality.jsonl"}

    def test_the_documentations_pictures_are_made_of_it(self, finished: Demo, tmp_path: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            assert demo_pictures.main([str(finished.config.out), "--out", str(tmp_path)]) == 0
        static = Path(__file__).parents[2] / "docs" / "_static"
        committed = {path.name for path in static.iterdir() if "demo" in path.name}
        assert {path.name for path in tmp_path.iterdir()} == committed
        for path in tmp_path.glob("*.png"):
            assert read_png(path).size(2) == 720
            assert read_png(path).float().std() > 20

    def test_pictures_are_readable(self, finished: Demo) -> None:
        for name in PICTURES:
            assert min(read_png(finished.config.out / name).shape[1:]) > 300
        rows, columns = read_png(finished.config.out / "samples.png").shape[1:]
        assert rows > 10 * 100 + 4  # a heading above ten rows
        assert columns > 20 * 100 + 4
        grids = sorted(path.name for path in (finished.config.out / "samples").iterdir())
        assert grids == [f"iteration_{number:09d}.png" for number in (0, 2, 4)]

    def test_verdict_is_written_as_it_is_returned(self, finished: Demo) -> None:
        verdict = finished.verdict
        assert verdict is not None
        written = json.loads((finished.config.out / "verdict.json").read_text())
        assert written == json.loads(json.dumps(vars(verdict)))
        assert len(verdict.share_by_class) == len(verdict.diversity_by_class) == 10
        assert 0 <= verdict.share <= 1
        # 130 samples: 13 of each digit, so the share is the plain mean.
        assert verdict.share == pytest.approx(sum(verdict.share_by_class) / 10)
        assert verdict.diversity == pytest.approx(sum(verdict.diversity_by_class) / 10)
        assert 0 < verdict.diversity < 0.5  # G has hardly begun
        assert 0 <= verdict.recall < 0.5 < verdict.recall_real <= 1
        assert 0 <= verdict.precision <= 1
        assert 0.5 < verdict.precision_real <= 1
        assert 0 < verdict.frechet_real < verdict.frechet
        assert 0.3 < verdict.judge_accuracy <= 1

    def test_quality_is_measured_at_every_grid(self, finished: Demo) -> None:
        rows = rows_of(finished.config.out / "quality.jsonl")
        assert [row["iteration"] for row in rows] == [0, 2, 4]
        assert all(0 <= row["share"] <= 1 and 0 < row["frechet"] < math.inf for row in rows)
        assert all(0 < row["diversity"] < 0.5 for row in rows)

    def test_quality_measured_anew_after_a_crash_takes_the_place_of_what_was_there(
        self, finished: Demo, judges: list[Judge], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        observe = demo.quality_curve(judges[0], tmp_path / "quality.jsonl")
        for iteration in (0, 2, 4, 2):
            monkeypatch.setattr(finished.result.trainer, "iteration", iteration)
            observe(finished.result.trainer)
        assert [row["iteration"] for row in rows_of(tmp_path / "quality.jsonl")] == [0, 2]

    def test_the_run_is_on_the_digits_with_ten_classes(self, finished: Demo) -> None:
        state = load_checkpoint(find_checkpoint(finished.config.out))
        assert state["iteration"] == 4
        assert state["class_names"] == list("0123456789")
        assert state["config"]["network"]["num_classes"] == 10
        assert state["config"]["data"] == str(finished.config.out / "digits")
        report = json.loads((finished.config.out / "preflight.json").read_text())
        assert (report["num_readable"], report["num_unreadable"], report["num_classes"]) == (1797, 0, 10)

    def test_it_says_what_it_does_and_how_to_go_on(self, finished: Demo) -> None:
        for part in (
            *("1/4", "2/4", "3/4  Training SAGAN for 4 iterations of 4 images", "4/4", "VERDICT:"),
            *(f"--source {finished.config.out}", "train --data /path/to/imagenet", "The demo took"),
        ):
            assert part in finished.text

    def test_called_again_it_judges_and_draws_without_training(self, finished: Demo, tmp_path: Path) -> None:
        out = finished.config.out
        unchanged = ("metrics.jsonl", "quality.jsonl", "config.json", "verdict.json", "samples.png")
        before = {name: (out / name).read_bytes() for name in unchanged}
        checkpoint = finished.result.checkpoint.read_bytes()
        for name in PICTURES:
            shutil.move(out / name, tmp_path / name)
        _, result, verdict, text = run_and_capture(finished.config)
        assert verdict == finished.verdict
        assert (result.iteration, result.interrupted) == (4, False)
        assert "already holds this run: resuming" in text
        assert {name: (out / name).read_bytes() for name in unchanged} == before
        assert result.checkpoint.read_bytes() == checkpoint
        assert all((out / name).exists() for name in PICTURES)


def test_an_interrupted_demo_has_no_verdict_and_resumes(
    finished: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished.config.out / "digits", tmp_path / "run" / "digits")
    config = small_demo(tmp_path / "run")
    quality_curve = demo.quality_curve

    def interrupting(judge: Judge, path: Path) -> Callable[[Trainer], None]:
        def observe(trainer: Trainer) -> None:
            quality_curve(judge, path)(trainer)
            if trainer.iteration == 2:
                signal.raise_signal(signal.SIGINT)

        return observe

    with monkeypatch.context() as patch:
        patch.setattr(demo, "quality_curve", interrupting)
        _, result, verdict, text = run_and_capture(config)
    assert verdict is None
    assert (result.iteration, result.interrupted) == (2, True)
    assert "VERDICT" not in text
    assert not (config.out / "verdict.json").exists()
    _, result, verdict, _ = run_and_capture(config)
    assert (result.iteration, result.interrupted) == (4, False)
    assert verdict == finished.verdict
    for name in ("quality.jsonl", "samples.png"):
        assert (config.out / name).read_bytes() == (finished.config.out / name).read_bytes()


@pytest.mark.parametrize(("share", "word"), [(0.9, "goal 90%: reached"), (0.899, "goal 90%: NOT reached")])
def test_verdict_in_words_says_whether_the_goal_is_reached(share: float, word: str) -> None:
    tenths = tuple(n / 10 for n in range(10))
    verdict = Verdict(
        share=share,
        share_by_class=tenths,
        diversity=0.87,
        diversity_by_class=tenths[::-1],
        precision=0.81,
        recall=0.52,
        precision_real=0.93,
        recall_real=0.94,
        frechet=1.234,
        frechet_real=0.056,
        judge_accuracy=0.98,
    )
    text = describe(verdict)
    assert word in text
    assert f"{share:.1%} of {demo.VERDICT_SAMPLES} generated digits" in text
    right, diversity = re.findall("By digit: (.*)", text)
    assert "3: 30%" in right
    assert "3: 60%" in diversity
    assert "between two images of a digit: 87% of the real digits'" in text
    assert "Precision 0.81 and recall 0.52" in text
    assert "against the rest: 0.93 and 0.94" in text
    assert "features: 1.23 (a random half of the real digits: 0.06)" in text
