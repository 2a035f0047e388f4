"""The subcommand evaluate, and evaluation while a run trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from image_trees import WNIDS, write_image_tree

import imagenet_sagan
from sagan.evaluation.config import TrainingEvaluationConfig
from sagan.recipes import HealthConfig, RunConfig, config_from_dict
from sagan.report.page import draw_run, write_report
from sagan.train.checkpoint import load_checkpoint
from sagan.train.guard import CollapseAlarm
from sagan.train.logs import read_metrics, series
from sagan.train.loop import Score, TrainingResult
from sagan.train.update import Trainer

SMALL = [
    *("--device", "cpu", "--batch-size", "4", "--network.resolution", "32", "--network.base-width", "1"),
    *("--network.latent-dim", "4", "--network.g-attention", "16", "--network.d-attention", "8"),
    *("--output.grid-columns", "2", "--output.no-tensorboard"),
]


def main(*arguments: object) -> int:
    return imagenet_sagan.main([str(argument) for argument in arguments])


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


@pytest.fixture(scope="module")
def prepared(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "flowers32"
    assert main("prepare", "--source", image_folder, "--out", out, "--resolution", 32, "--workers", 1) == 0
    return out


class TestEvaluate:
    def test_writes_figures_with_their_protocol_and_shows_them(
        self, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = ("--proxy", "--metrics", "fid", "intra-fid", "pr", "--count", 24, "--cache", tmp_path / "c")
        assert main("evaluate", "--source", trained_run, *options, "--out", tmp_path, "--device", "cpu") == 0
        [found] = written(tmp_path)
        assert list(found["figures"]) == [
            f"proxy-{metric}24-train-randomconv" for metric in ("fid", "intra-fid", "precision", "recall")
        ]
        assert found["iteration"] == 4
        assert found["protocol"]["weights"] == "ema"
        assert sorted(found["by_class"]) == sorted(WNIDS[:3])
        shown = capsys.readouterr().out
        assert "images of each class" in shown  # the real images are checked
        assert "Features of 15 real images saved in" in shown
        assert f"{found['figures']['proxy-fid24-train-randomconv']['value']:.3f}" in shown
        assert found["protocol"]["identity"] in (tmp_path / "results.md").read_text()

    def test_a_prepared_set_gives_the_figures_of_the_folder_it_was_made_from(
        self, trained_run: Path, prepared: Path, tmp_path: Path
    ) -> None:
        base = (
            "--proxy",
            "--count",
            24,
            "--cache",
            tmp_path / "c",
            "--device",
            "cpu",
            "--source",
            trained_run,
        )
        assert main("evaluate", *base, "--out", tmp_path / "a") == 0
        assert main("evaluate", *base, "--out", tmp_path / "b", "--data", prepared, "--split", "train") == 0
        [folder], [packed] = written(tmp_path / "a"), written(tmp_path / "b")
        assert packed["protocol"] == folder["protocol"]
        assert packed["figures"] == folder["figures"]
        assert main("evaluate", *base, "--out", tmp_path / "c", "--data", prepared) == 0
        [named] = written(tmp_path / "c")
        assert list(named["figures"]) == ["proxy-fid24-flowers32-randomconv"]
        assert named["reals"]["from_cache"]  # the same checksum

    def test_the_size_of_blocks_is_no_part_of_the_protocol(self, trained_run: Path, tmp_path: Path) -> None:
        found = []
        for size in (50, 7):
            out = tmp_path / f"{size}"
            options = ("--proxy", "--count", 24, "--device", "cpu", "--cache", out / "cache", "--out", out)
            assert main("evaluate", "--source", trained_run, "--block-size", size, *options) == 0
            found += written(out)
        assert found[0]["protocol"] == found[1]["protocol"]
        [one], [other] = (each["figures"].values() for each in found)
        assert one["value"] == pytest.approx(other["value"], rel=1e-6)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ((), "feature network: expected inception-weights"),
            (("--inception-weights", "absent.pth"), "found no file at absent.pth"),
            (
                ("--proxy", "--weights", "ema", "--source", "absent"),
                "expected a checkpoint or the folder of a run",
            ),
            (("--proxy", "--data", "absent"), "absent"),
        ],
    )
    def test_what_cannot_be_evaluated_is_refused_in_plain_words(
        self,
        trained_run: Path,
        tmp_path: Path,
        options: tuple[str, ...],
        message: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        arguments = ("--source", trained_run, "--device", "cpu", "--cache", tmp_path, *options)
        assert main("evaluate", *arguments) == 1
        assert message in capsys.readouterr().err

    def test_other_classes_than_the_runs_are_refused_for_intra_fid(
        self, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_image_tree(tmp_path / "others", class_names=["a", "b"], images_per_class=4, sizes=[(32, 32)])
        options = ("--proxy", "--count", 24, "--cache", tmp_path / "c", "--device", "cpu")
        arguments = ("--source", trained_run, "--data", tmp_path / "others", *options)
        assert main("evaluate", *arguments, "--metrics", "intra-fid") == 1
        assert "expected the run's 3 classes for intra-fid, found others" in capsys.readouterr().err
        assert main("evaluate", *arguments, "--out", tmp_path / "out") == 0
        assert list(written(tmp_path / "out")[0]["figures"]) == ["proxy-fid24-all-randomconv"]


class TestInTraining:
    @pytest.fixture(scope="class")
    @staticmethod
    def runs(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
        """The folders of a run with evaluations and of one without."""
        folder = tmp_path_factory.mktemp("runs")
        evaluation = ("--evaluation.every", 2, "--evaluation.proxy", "--evaluation.count", 24)
        cache = ("--evaluation.cache", folder / "cache")
        base = ("train", "--data", prepared, "--iterations", 5, "--output.log-every", 1, *SMALL)
        assert main(*base, "--out", folder / "with", *evaluation, *cache) == 0
        assert main(*base, "--out", folder / "without") == 0
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
            for key, tensor in states[0][name].items():
                assert torch.equal(tensor, states[1][name][key]), f"{name} {key}"

    def test_equals_evaluate_on_the_checkpoint(self, runs: tuple[Path, Path], tmp_path: Path) -> None:
        out, _ = runs
        options = ("--proxy", "--count", 24, "--cache", tmp_path / "c", "--out", tmp_path, "--device", "cpu")
        assert main("evaluate", "--source", out, *options) == 0
        [found], in_training = written(tmp_path), written(out / "evaluation")[-1]
        for name in ("figures", "protocol", "samples_checksum"):
            assert found[name] == in_training[name]

    def test_resuming_may_evaluate_otherwise(
        self, runs: tuple[Path, Path], prepared: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        _, out = runs
        evaluation = ("--evaluation.every", 1, "--evaluation.proxy", "--evaluation.count", 20)
        options = ("--evaluation.cache", out / "cache", "--evaluation.metrics", "kid", "--resume")
        base = ("train", "--data", prepared, "--out", out, "--output.log-every", 1, *SMALL)
        assert main(*base, "--iterations", 6, *evaluation, *options) == 0
        assert "iteration       6  proxy-kid20-train-randomconv" in capsys.readouterr().out
        assert load_checkpoint(out / "checkpoints" / "best.pt")["iteration"] == 6

    def test_compares_with_another_split_by_option(self, image_folder: Path, tmp_path: Path) -> None:
        data = tmp_path / "data"
        for split in ("train", "val"):
            write_image_tree(data / split, class_names=WNIDS[:3], images_per_class=4, sizes=[(32, 32)])
        evaluation = ("--evaluation.every", 9, "--evaluation.proxy", "--evaluation.count", 24)
        options = ("--evaluation.split", "val", "--evaluation.cache", tmp_path / "c", "--iterations", 1)
        assert main("train", "--data", data, "--out", tmp_path / "run", *SMALL, *evaluation, *options) == 0
        assert list(written(tmp_path / "run" / "evaluation")[0]["figures"]) == ["proxy-fid24-val-randomconv"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--evaluation.inception-weights", "absent.pth"), "found no file at absent.pth"),
            (("--evaluation.feature-network", "absent.pt2"), "found no file at absent.pt2"),
        ],
    )
    def test_a_missing_network_is_refused_before_anything_is_written(
        self,
        prepared: Path,
        tmp_path: Path,
        options: tuple[str, ...],
        message: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        arguments = ("--data", prepared, "--out", tmp_path / "run", *SMALL, "--evaluation.every", 2, *options)
        assert main("train", *arguments) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


class TestBest:
    def test_is_kept_while_scores_are_of_one_kind_and_begun_anew_with_another(
        self, tiny_config: RunConfig, run_training: Callable[..., TrainingResult], tmp_path: Path
    ) -> None:
        nan = float("nan")
        scores = {1: (nan, "fid"), 2: (3.0, "fid"), 3: (4.0, "fid"), 4: (50.0, "kid"), 5: (60.0, "kid")}
        kept = []

        def evaluate(trainer: Trainer) -> Score:
            best = tmp_path / "checkpoints" / "best.pt"
            kept.append(load_checkpoint(best)["iteration"] if best.exists() else None)
            value, of = scores[trainer.iteration]
            return Score(value, of, {f"evaluation/{of}": value})

        evaluation = TrainingEvaluationConfig(every=1, proxy=True)
        config = replace(tiny_config, out=tmp_path, iterations=3, evaluation=evaluation)
        run_training(config, evaluate=evaluate)
        run_training(replace(config, iterations=5), evaluate=evaluate, resume=True)
        assert kept == [None, None, 2, 2, 4]
        assert load_checkpoint(tmp_path / "checkpoints" / "best.pt")["best_score_of"] == "kid"

    def test_the_alarm_counts_scores_of_one_kind(self) -> None:
        alarm = CollapseAlarm(HealthConfig(rising_evaluations=2))
        told = [
            alarm.see_score(score, of) for score, of in ((1, "a"), (2, "a"), (9, "b"), (10, "b"), (11, "b"))
        ]
        assert [text is not None for text in told] == [False, False, False, False, True]
