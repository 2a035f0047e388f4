"""The subcommand evaluate, and evaluation while a run trains."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import SMALL, refused, succeed
from image_trees import WNIDS, write_image_tree
from training_runs import assert_same

from sagan.evaluation.config import TrainingEvaluationConfig
from sagan.recipes import HealthConfig, config_from_dict
from sagan.report.page import draw_run, write_report
from sagan.train.checkpoint import load_checkpoint
from sagan.train.health import CollapseAlarm
from sagan.train.logs import read_metrics, series
from sagan.train.loop import TrainingResult
from sagan.train.output import Score
from sagan.train.update import Trainer


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def train_options(data: Path, out: Path, *options: object) -> tuple[object, ...]:
    cache = ("--evaluation.cache", out / "cache")
    return ("train", "--data", data, "--out", out, *SMALL, "--output.log-every", 1, *cache, *options)


def in_training(every: int, count: int = 24) -> tuple[object, ...]:
    return ("--evaluation.proxy", "--evaluation.every", every, "--evaluation.count", count)


def evaluate(source: Path, out: Path, *options: object) -> dict[str, Any]:
    """Evaluate 24 images with the proxy, and return the JSON file with what was printed."""
    base = ("--source", source, "--out", out, "--proxy", "--count", 24, "--device", "cpu")
    printed = succeed("evaluate", *base, "--cache", out.parent / "cache", *options)
    [found] = written(out)
    return {**found, "printed": printed}


@pytest.fixture(scope="module")
def prepared(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "flowers32"
    succeed("prepare", "--source", image_folder, "--out", out, "--resolution", 32, "--workers", 1)
    return out


class TestEvaluate:
    def test_writes_and_shows_figures_with_their_protocol(self, trained_run: Path, tmp_path: Path) -> None:
        found = evaluate(trained_run, tmp_path / "out", "--metrics", "fid", "intra-fid", "pr")
        assert list(found["figures"]) == [
            f"proxy-{metric}24-train-randomconv" for metric in ("fid", "intra-fid", "precision", "recall")
        ]
        assert found["iteration"] == 4
        assert found["protocol"]["weights"] == "ema"
        assert sorted(found["by_class"]) == sorted(WNIDS[:3])
        assert "images of each class" in found["printed"]  # the real images are checked
        assert "Features of 15 real images saved in" in found["printed"]
        assert f"{found['figures']['proxy-fid24-train-randomconv']['value']:.3f}" in found["printed"]
        assert found["protocol"]["identity"] in (tmp_path / "out" / "results.md").read_text()

    def test_a_prepared_set_gives_the_figures_of_its_folder(
        self, trained_run: Path, prepared: Path, tmp_path: Path
    ) -> None:
        folder = evaluate(trained_run, tmp_path / "a")
        packed = evaluate(trained_run, tmp_path / "b", "--data", prepared, "--split", "train")
        assert packed["protocol"] == folder["protocol"]
        assert packed["figures"] == folder["figures"]
        named = evaluate(trained_run, tmp_path / "c", "--data", prepared)
        assert list(named["figures"]) == ["proxy-fid24-flowers32-randomconv"]
        assert named["reals"]["from_cache"]  # the same checksum

    def test_the_size_of_blocks_is_not_in_the_protocol(self, trained_run: Path, tmp_path: Path) -> None:
        one = evaluate(trained_run, tmp_path / "50" / "out", "--block-size", 50)
        other = evaluate(trained_run, tmp_path / "7" / "out", "--block-size", 7)
        assert one["protocol"] == other["protocol"]
        name = "proxy-fid24-train-randomconv"
        assert one["figures"][name]["value"] == pytest.approx(other["figures"][name]["value"], rel=1e-6)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ((), "feature network: expected --inception-weights FILE"),
            (
                ("--inception-weights", "absent.pth"),
                "found no file at absent.pth, expected pt_inception-2015-12-05-6726825d.pth",
            ),
            (("--proxy", "--source", "absent"), "expected the folder of a run, or a checkpoint"),
            (("--proxy", "--data", "absent"), "absent"),
        ],
    )
    def test_what_is_missing_is_refused_in_plain_words(
        self, options: tuple[str, ...], message: str, trained_run: Path
    ) -> None:
        assert message in refused("evaluate", "--source", trained_run, "--device", "cpu", *options)

    def test_other_classes_are_refused_for_intra_fid(self, trained_run: Path, tmp_path: Path) -> None:
        data = tmp_path / "others"
        write_image_tree(data, class_names=["a", "b"], images_per_class=4, sizes=[(32, 32)])
        found = evaluate(trained_run, tmp_path / "out", "--data", data)
        assert list(found["figures"]) == ["proxy-fid24-all-randomconv"]
        options = ("--proxy", "--metrics", "intra-fid", "--cache", tmp_path, "--device", "cpu")
        message = refused("evaluate", "--source", trained_run, "--data", data, *options)
        assert "expected the run's 3 classes for intra-fid, found others" in message


class TestInTraining:
    @pytest.fixture(scope="class")
    @staticmethod
    def runs(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
        """The folders of a run with evaluations and of one without."""
        folder = tmp_path_factory.mktemp("runs")
        succeed(*train_options(prepared, folder / "with", "--iterations", 5, *in_training(2)))
        succeed(*train_options(prepared, folder / "without", "--iterations", 5))
        return folder / "with", folder / "without"

    def test_leaves_the_curve_the_best_checkpoint_and_a_table(self, runs: tuple[Path, Path]) -> None:
        out, _ = runs
        name = "evaluation/proxy-fid24-train-randomconv"
        iterations, values = series(read_metrics(out), name)
        assert iterations == [2, 4, 5]
        best = load_checkpoint(out / "checkpoints" / "best.pt")
        assert best["best_score"] == min(values)
        assert best["iteration"] == iterations[values.index(min(values))]
        figures = [each["figures"][name.removeprefix("evaluation/")] for each in written(out / "evaluation")]
        assert [figure["value"] for figure in figures] == values
        assert len((out / "evaluation" / "results.md").read_text().splitlines()) == 5
        assert config_from_dict(json.loads((out / "config.json").read_text())).evaluation.every == 2
        assert draw_run(out, out / "curves.png").stat().st_size > 0
        assert "proxy-fid24-train-randomconv" in write_report(out).read_text()

    def test_changes_nothing_of_the_training(self, runs: tuple[Path, Path]) -> None:
        states = [load_checkpoint(out / "checkpoints" / "iteration_000000005.pt") for out in runs]
        for name in ("generator", "discriminator", "average"):
            assert_same(states[0][name], states[1][name], name)

    def test_equals_evaluate_on_the_checkpoint(self, runs: tuple[Path, Path], tmp_path: Path) -> None:
        out, _ = runs
        found, in_training = evaluate(out, tmp_path / "out"), written(out / "evaluation")[-1]
        for name in ("figures", "protocol", "samples_checksum"):
            assert found[name] == in_training[name]

    def test_resuming_may_evaluate_otherwise(self, runs: tuple[Path, Path], prepared: Path) -> None:
        _, out = runs
        options = ("--evaluation.metrics", "kid", "--iterations", 6, "--resume")
        printed = succeed(*train_options(prepared, out, *in_training(1, count=20), *options))
        assert "iteration       6  proxy-kid20-train-randomconv" in printed
        assert load_checkpoint(out / "checkpoints" / "best.pt")["iteration"] == 6

    def test_compares_with_another_split_by_option(self, tmp_path: Path) -> None:
        for split in ("train", "val"):
            folder = tmp_path / "data" / split
            write_image_tree(folder, class_names=WNIDS[:3], images_per_class=4, sizes=[(32, 32)])
        options = (*in_training(9), "--evaluation.split", "val", "--iterations", 1)
        succeed(*train_options(tmp_path / "data", tmp_path / "run", *options))
        assert list(written(tmp_path / "run" / "evaluation")[0]["figures"]) == ["proxy-fid24-val-randomconv"]

    @pytest.mark.parametrize("option", ["inception-weights", "feature-network"])
    def test_a_missing_network_is_refused_and_writes_nothing(
        self, option: str, prepared: Path, tmp_path: Path
    ) -> None:
        options = ("--evaluation.every", 2, f"--evaluation.{option}", "absent.pth")
        assert "found no file at absent.pth" in refused(*train_options(prepared, tmp_path / "run", *options))
        assert not (tmp_path / "run").exists()


class TestBest:
    def test_is_saved_among_scores_of_one_kind(
        self, train_tiny: Callable[..., TrainingResult], tmp_path: Path
    ) -> None:
        scores = {1: (math.nan, "fid"), 2: (3.0, "fid"), 3: (4.0, "fid"), 4: (50.0, "kid"), 5: (60.0, "kid")}
        saved = []
        best = tmp_path / "run" / "checkpoints" / "best.pt"

        def evaluate(trainer: Trainer) -> Score:
            saved.append(load_checkpoint(best)["iteration"] if best.exists() else None)
            value, of = scores[trainer.iteration]
            return Score(value, of, {f"evaluation/{of}": value})

        evaluation = TrainingEvaluationConfig(every=1, proxy=True)
        train_tiny(iterations=3, evaluation=evaluation, evaluate=evaluate)
        train_tiny(iterations=5, evaluation=evaluation, evaluate=evaluate, resume=True)
        assert saved == [None, None, 2, 2, 4]
        assert load_checkpoint(best)["best_score_of"] == "kid"

    def test_the_alarm_counts_scores_of_one_kind(self) -> None:
        alarm = CollapseAlarm(HealthConfig(rising_evaluations=2))
        scores = ((1, "a"), (2, "a"), (9, "b"), (10, "b"), (11, "b"))
        messages = [alarm.see_score(score, of) for score, of in scores]
        assert [text is not None for text in messages] == [False, False, False, False, True]
