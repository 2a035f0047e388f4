"""What strangers wrote into checkpoints and records: names that are no names, numbers that are none."""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import read_png, refused, succeed
from training_runs import ALONE, Train, changed

from sagan.cli.terminal import PrintableStream, printable_output
from sagan.data import open_dataset
from sagan.evaluation.config import TrainingEvaluationConfig
from sagan.evaluation.feature_networks import proxy_network
from sagan.evaluation.periodic import periodic_evaluation
from sagan.recipes import RECIPES, RunConfig
from sagan.report.figures import Panel, class_labels, save_attention_figure, save_curves, save_grid
from sagan.report.page import write_report
from sagan.train.checkpoint import find_checkpoint
from sagan.train.update import Trainer

NAMES = [
    *("\udcff", "猫", "Größe", "кот", "🐈", "a$b$c", "$\\frac{"),
    *("x" * 150 + "y" * 150, "line\nbreak", "\0\x1b[31m", "", " "),
]
LABELS = [
    *("class 0", "class 1", "Größe", "кот", "class 4", "a$b$c", "$\\frac{"),
    *("x" * 16 + "..." + "y" * 17, "line\\nbreak", "\\x00\\x1b[31m", "class 10", "class 11"),
]


def altered(run: Path, folder: Path, **contents: Any) -> Path:
    """Return a copy of a run's checkpoint with other contents."""
    state = torch.load(find_checkpoint(run), weights_only=True)
    path = folder / "altered.pt"
    torch.save({**state, **contents}, path)
    return path


class TestFolders:
    @pytest.mark.parametrize(
        "names",
        [
            ("..", "../../x", "a/b"),
            ("same", "same", "SAME"),
            ("\0\x1b[31m", "samples.json", ""),
            ("{tmp_path}/absolute", ".", "\udcff\u202e猫"),
        ],
    )
    def test_samples_stay_in_the_folder_and_each_class_has_its_own(
        self, names: Sequence[str], trained_run: Path, tmp_path: Path
    ) -> None:
        names = [name.replace("{tmp_path}", str(tmp_path)) for name in names]
        source, out = altered(trained_run, tmp_path, class_names=names), tmp_path / "a" / "b" / "out"
        options = ("--source", source, "--out", out, "--layout", "folders", "--count", 7)
        assert "7 images written" in succeed("sample", *options)
        files = {path for path in tmp_path.rglob("*") if path.is_file()}
        assert files - set(out.rglob("*")) == {source}
        assert [path.parent.parent for path in files if path.suffix == ".png"] == [out] * 7
        assert sorted(len(list(each.iterdir())) for each in out.iterdir() if each.is_dir()) == [2, 2, 3]

    def test_a_class_is_chosen_by_its_real_name(self, trained_run: Path, tmp_path: Path) -> None:
        source, out = altered(trained_run, tmp_path, class_names=["../x", "same", "same"]), tmp_path / "out"
        options = ("--source", source, "--layout", "folders", "--count", 2)
        succeed("sample", *options, "--out", out, "--classes", "../x")
        assert [path.name for path in out.iterdir() if path.is_dir()] == ["_._x"]
        message = refused("sample", *options, "--out", tmp_path / "other", "--classes", "same")
        assert "classes: 'same' is the name of several; give one of 1, 2" in message


class TestPictures:
    def test_a_label_is_a_name_that_the_font_can_draw_or_a_number(self) -> None:
        assert class_labels(NAMES, range(len(NAMES))) == LABELS
        assert class_labels(["n01440764", "猫"], [1, 0, 0]) == ["class 1", "n01440764", "n01440764"]

    @pytest.mark.parametrize("names", [NAMES, LABELS], ids=["names", "labels"])
    def test_every_name_can_be_drawn(self, names: list[str], tmp_path: Path) -> None:
        images, maps = torch.zeros(len(names), 3, 8, 8, dtype=torch.uint8), torch.rand(2, 1, 2, 2)
        save_grid(tmp_path / "grid.png", images, columns=1, row_names=names)
        for start in range(0, len(names), 2):
            pair = names[start : start + 2]
            save_attention_figure(tmp_path / "map.png", images[:2], maps, [(1, 1)], names=pair)
        panel = Panel("a$b\n猫", {name: ([1, 2], [1.0, 2.0]) for name in names}, {NAMES[5]: 1.5})
        save_curves(tmp_path / "curves.png", [panel])
        for path in tmp_path.iterdir():
            assert read_png(path).float().std() > 1

    def test_letters_are_drawn_and_not_boxes(self, tmp_path: Path) -> None:
        drawn, image = [], torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
        for name in ("кот", "ток", "猫"):
            save_grid(tmp_path / "grid.png", image, columns=1, row_names=[name])
            drawn.append(read_png(tmp_path / "grid.png"))
        assert drawn[0].shape == drawn[1].shape
        assert not torch.equal(drawn[0], drawn[1])
        assert drawn[2].size(2) > drawn[0].size(2)  # the escape of one letter

    def test_a_run_whose_name_begins_with_an_underscore_is_in_the_legend(self, tmp_path: Path) -> None:
        drawn = []
        for name in ("_a", "_b"):
            save_curves(tmp_path / "curves.png", [Panel("FID", {name: ([1, 2], [1.0, 2.0])})])
            drawn.append(read_png(tmp_path / "curves.png"))
        assert not torch.equal(*drawn)

    def test_commands_draw_them(self, trained_run: Path, tmp_path: Path) -> None:
        source = altered(trained_run, tmp_path, class_names=["\udcff", "a$b", "猫"])
        succeed("sample", "--source", source, "--out", tmp_path / "grid.png", "--count", 9)
        succeed("attention-maps", "--source", source, "--out", tmp_path / "maps.png", "--count", 3)


class TestPages:
    HOSTILE = "<script>a|b&\"'$x$\udcff\x1b[31m*c*`"
    IN_HTML = "&lt;script&gt;a|b&amp;&quot;&#x27;$x$\\udcff\\x1b[31m*c*`"
    IN_MARKDOWN = r"""\<script\>a\|b\&"'$x$\\udcff\\x1b\[31m\*c\*\`"""

    def run_of(self, folder: Path) -> Path:
        out = folder / self.HOSTILE.replace("/", "")
        (out / "samples").mkdir(parents=True)
        config = replace(RECIPES["paper"](), out=out, recipe=self.HOSTILE)
        (out / "config.json").write_text(json.dumps(config.to_dict()))
        rows = [
            {"iteration": 1, "d_loss": 0.5, f"evaluation/{self.HOSTILE}": None, "gamma_$": 1},
            {"iteration": 2, "d_loss": None, "g_loss": math.nan, f"evaluation/{self.HOSTILE}": 3.5},
            {"iteration": 3, "d_loss": 10**400, "g_loss": math.inf, "alarm": self.HOSTILE},
        ]
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        save_grid(out / "samples" / "<b>.png", torch.zeros(1, 3, 8, 8, dtype=torch.uint8), columns=1)
        return out

    def test_a_report_shows_names_as_text_and_gaps_for_what_is_not_finite(self, tmp_path: Path) -> None:
        out = self.run_of(tmp_path)
        text = write_report(out, tmp_path / "page.html").read_text()
        assert text.count(self.IN_HTML) >= 6  # heading, title, alarm, column, caption, configuration
        assert "<script" not in text.lower()
        assert "&lt;b&gt;" in text
        assert "D n/a, G n/a" in text
        assert "<td>n/a</td>" in text

    def test_a_comparison_shows_names_as_text(self, tmp_path: Path) -> None:
        runs = [self.run_of(tmp_path / folder) for folder in "ab"]
        for run, value in zip(runs, (math.nan, 4.0), strict=True):
            figure = {"metric": "fid", "value": value}
            protocol = {"identity": self.HOSTILE, "proxy": False}
            (run / "evaluation").mkdir()
            (run / "evaluation" / "iteration_1.json").write_text(
                json.dumps({"iteration": 1, "figures": {self.HOSTILE: figure}, "protocol": protocol})
            )
        shown = succeed("compare", *runs, "--out", tmp_path / "out")
        text = (tmp_path / "out" / "comparison.md").read_text()
        assert (
            text.splitlines() == [line for line in shown.splitlines() if not line.startswith("Written")][:-1]
        )
        [first, second] = [line for line in text.splitlines() if line.startswith("| " + "/")]
        assert first.endswith("| 1,000,000 | n/a |")
        assert second.endswith("| 1,000,000 | 4 at 1 |")
        for line in (first, second):
            assert line.count(self.IN_MARKDOWN) == 2
        assert "<script" not in text.replace("\\<", "")


class TestDivergedGenerators:
    @pytest.fixture
    def source(self, trained_run: Path, tmp_path: Path) -> Path:
        """A checkpoint whose averaged weights are finite, but not what they compute."""
        average = torch.load(find_checkpoint(trained_run), weights_only=True)["average"]
        average["module.blocks.0.conv1.bias"][:] = torch.finfo(torch.float32).max
        return altered(trained_run, tmp_path, average=average)

    def test_weights_that_are_not_finite_are_not_loaded(self, trained_run: Path, tmp_path: Path) -> None:
        average = torch.load(find_checkpoint(trained_run), weights_only=True)["average"]
        average["module.blocks.0.conv1.weight"][0] = torch.nan
        source = altered(trained_run, tmp_path, average=average)
        assert "conv1.weight: expected finite values, got" in refused("sample", "--source", source)

    @pytest.mark.parametrize("layout", ["grid", "folders"])
    def test_are_not_sampled(self, source: Path, layout: str, tmp_path: Path) -> None:
        message = refused("sample", "--source", source, "--out", tmp_path / "out", "--layout", layout)
        assert "generated images: expected finite values, got" in message
        assert "has diverged: an earlier checkpoint, or --weights raw" in message
        assert not list(tmp_path.rglob("*.png"))
        succeed("sample", "--source", source, "--out", tmp_path / "raw", "--weights", "raw", "--count", 3)

    def test_have_no_attention_maps_and_no_figures(self, source: Path, tmp_path: Path) -> None:
        evaluation = ("evaluate", "--proxy", "--count", 20, "--cache", tmp_path)
        for command, *options in (("attention-maps",), evaluation):
            out = tmp_path / command
            message = refused(command, "--source", source, "--out", out, "--device", "cpu", *options)
            assert "expected finite values" in message
            assert not out.exists()

    def test_do_not_end_training_by_their_pictures_and_figures(
        self, tiny_config: RunConfig, run_training: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        evaluation = TrainingEvaluationConfig(every=1, proxy=True, count=20, cache=tmp_path / "cache")
        config = changed(tiny_config, out=tmp_path / "run", evaluation=evaluation, output__sample_every=1)
        dataset = open_dataset(config.data, 32, config.images)
        evaluate = periodic_evaluation(config, dataset, ALONE, proxy_network(ALONE.device, resolution=32))

        def diverge(trainer: Trainer) -> None:
            trainer.average.module.blocks[0].conv1.bias.data[:] = torch.finfo(torch.float32).max

        result = run_training(config, evaluate=evaluate, observe=diverge)  # the first average is G itself
        assert result.iteration == config.iterations == 2
        grids = sorted(path.name for path in (config.out / "samples").iterdir())
        assert grids == ["iteration_000000000.png", "iteration_000000001.png"]
        assert not (config.out / "evaluation").exists()
        assert not (config.out / "checkpoints" / "best.pt").exists()
        assert [text.split(" (")[0] for text in caplog.messages] == [
            "iteration 1: not evaluated",
            "iteration 2: no samples saved",
            "iteration 2: not evaluated",
        ]


class TestTerminal:
    def test_what_is_printed_cannot_steer_the_terminal(self, trained_run: Path, tmp_path: Path) -> None:
        out = tmp_path / "\x1b[31m\udcff"
        shown = succeed("sample", "--source", trained_run, "--out", out, "--count", 3)
        assert f"{tmp_path}/\\x1b[31m\\udcff/grid.png" in shown
        assert "\\x1b[31m\\udcff" in refused("sample", "--source", out / "none")

    def test_only_newlines_and_tabs_stay(self) -> None:
        written = io.StringIO()
        print("é猫\udcff\ta\r", file=PrintableStream(written), flush=True)
        assert written.getvalue() == "é猫\\udcff\ta\\r\n"

    def test_log_lines_are_printable(self) -> None:
        with printable_output():
            assert logging.lastResort is not None
            record = logging.LogRecord("x", logging.WARNING, "f", 1, "a\x1b[2J%s", ("\u202e",), None)
            assert logging.lastResort.format(record) == "a\\x1b[2J\\u202e"
