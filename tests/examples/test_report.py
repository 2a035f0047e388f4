"""Curves and the report page: what they show, and what ``train`` leaves when it ends."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from command_line import SMALL, main, refused, succeed
from image_trees import write_image_tree
from PIL import Image

from sagan.cli import train as train_command
from sagan.cli.parsing import COLLAPSED, INTERRUPTED
from sagan.report import page
from sagan.report.figures import Panel
from sagan.report.page import draw_run, finish_run, write_report
from sagan.train.health import CollapseAlarm
from sagan.train.update import Trainer


class Page(HTMLParser):
    """What a page holds: its text, its tags with their attributes, and which tags stay open."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained_run, tmp_path / "run")


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> list[Panel]:
    """The panels that were drawn."""
    drawn: list[Panel] = []
    save = page.save_curves

    def recording(path: Path, panels: Sequence[Panel], **options: Any) -> None:
        drawn[:] = panels
        save(path, panels, **options)

    monkeypatch.setattr(page, "save_curves", recording)
    return drawn


def add_quality(run: Path) -> None:
    rows = [{"iteration": at, "share": 0.1 * at, "frechet": 9.0 - at, "new_thing": at} for at in (0, 2, 4)]
    (run / "quality.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    verdict = {"share": 0.875, "share_by_class": [0.75, 1.0], "frechet": 5.5, "frechet_real": 1.25}
    (run / "verdict.json").write_text(json.dumps(verdict))


class TestCurves:
    def test_a_run_is_drawn(self, trained_run: Path, tmp_path: Path) -> None:
        path = draw_run(trained_run, tmp_path / "sub" / "curves.png")
        with Image.open(path) as picture:
            assert picture.width == 880
            assert picture.height > 5 * 250  # a panel each: losses, logits, gamma, sigma, speed, waiting
            assert len(picture.convert("RGB").getcolors(2**24) or []) > 50

    def test_measured_quality_has_panels_with_what_real_images_reach(
        self, run: Path, panels: list[Panel]
    ) -> None:
        draw_run(run, run / "curves.png")
        without = [panel.label for panel in panels]
        add_quality(run)
        for command in ("plot", "report"):  # neither draws less than the other, nor than the demo
            succeed(command, "--source", run)
            assert [panel.label for panel in panels[3:]] == without
            share, frechet, other = panels[:3]
            assert share.label == "share of samples that the judge reads as their label"
            assert share.curves[""] == ([0, 2, 4], [0, 0.2, 0.4])
            assert (share.references, frechet.references) == ({}, {"half of the real images": 1.25})
            assert (other.label, other.curves[""][1]) == ("new thing", [0, 2, 4])


class TestPage:
    def test_it_holds_the_pictures_and_what_happened(
        self, run: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"iteration": 4, "evaluation/proxy": 12.25}\n')
            file.write(
                '{"iteration": 4, "alarm": "modes <are> lost"}\n{"iteration": 4, "skipped_updates": 3}\n{\n'
            )
        path = write_report(run, run / "page.html")
        assert caplog.text.count("skipped 1 damaged lines") == 1
        text = path.read_text()
        assert text.count("data:image/png;base64,") >= 4  # curves, two grids, attention
        assert "<td>skipped updates</td><td>3</td>" in text
        for part in (
            "best_known",
            "4 of 4",
            "12.25",
            "modes &lt;are&gt; lost",
            "iteration_000000004.pt",
            "sn_eps",
        ):
            assert part in text, part
        assert "http" not in text
        assert "href=" not in text

    def test_it_fits_phones_and_dark_rooms_and_says_what_pictures_show(self, run: Path) -> None:
        add_quality(run)
        found = Page(write_report(run))
        assert found.open == []
        assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in found.all("meta")
        assert "prefers-color-scheme: dark" in found.text
        assert len(found.all("table")) == sum(each.get("class") == "table" for each in found.all("div"))
        texts = [each["alt"] or "" for each in found.all("img")]
        assert len(set(texts)) == len(texts) >= 4
        assert texts[0].startswith("Curves over the iterations; at the end share of samples")
        assert "; loss: D " in texts[0]
        assert texts[1] == "Grid of generated samples, a row for each class: iteration 0"
        assert texts[-1].endswith("where G's attention looks from them: iteration 4")

    def test_it_shows_the_verdict_and_the_evaluations_of_both_commands(self, run: Path) -> None:
        assert "None: `evaluate`, and" in Page(write_report(run)).text
        add_quality(run)
        (run / "evaluation").mkdir()
        figures = {"fid50k": {"metric": "fid", "value": 17.5}}
        values = {"iteration": 4, "figures": figures, "protocol": {"identity": "x", "proxy": False}}
        (run / "evaluation" / "iteration_4.json").write_text(json.dumps(values))
        text = Page(write_report(run)).text
        assert "Verdict" in text
        assert "share by class 0.75, 1" in text
        assert "frechet 5.5 frechet real 1.25" in text
        assert "iteration fid50k 4 17.5" in text
        assert "not evaluated" not in text
        assert "None:" not in text

    def test_a_damaged_verdict_is_named(self, run: Path) -> None:
        for text in ("[]", "{"):
            (run / "verdict.json").write_text(text)
            assert "verdict.json: expected " in refused("report", "--source", run)


class TestEndOfTraining:
    @pytest.fixture
    def options(self, image_folder: Path, tmp_path: Path) -> list[object]:
        return ["train", "--data", image_folder, "--out", tmp_path / "run", *SMALL, "--iterations", 2]

    def check(self, out: Path, printed: str) -> None:
        assert f"Report: {out / 'report.html'}, curves: {out / 'curves.png'}.\n" in printed
        assert Page(out / "report.html").all("img")

    def test_a_finished_run_has_curves_and_a_report(self, options: list[object], tmp_path: Path) -> None:
        self.check(tmp_path / "run", succeed(*options, "--output.log-every", 1))
        assert (tmp_path / "run" / "curves.png").stat().st_size > 1000

    def test_a_run_interrupted_before_its_first_metrics_has_a_report(
        self,
        options: list[object],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        step = Trainer.step

        def interrupted(trainer: Trainer, batches: Any) -> None:
            step(trainer, batches)
            signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(Trainer, "step", interrupted)
        assert main(*options) == INTERRUPTED
        self.check(tmp_path / "run", capsys.readouterr().out)
        assert (
            "No metrics yet: the first follow after 100 iterations"
            in (tmp_path / "run" / "report.html").read_text()
        )

    def test_a_run_stopped_by_collapse_has_a_report_with_the_alarm(
        self,
        options: list[object],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(CollapseAlarm, "see_losses", lambda *_: "D has won")
        assert main(*options, "--output.log-every", 1, "--health.on-collapse", "stop") == COLLAPSED
        self.check(tmp_path / "run", capsys.readouterr().out)
        assert "D has won" in (tmp_path / "run" / "report.html").read_text()

    @pytest.mark.parametrize(
        ("error", "reason"), [(RuntimeError("no font"), "no font"), (KeyboardInterrupt(), "interrupted")]
    )
    def test_a_report_that_fails_is_a_warning_and_costs_nothing(
        self,
        error: BaseException,
        reason: str,
        run: Path,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def fails(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(page, "save_curves", fails)
        assert finish_run(run) == ""
        assert f"no report was written ({reason}); `" in caplog.text
        assert f"report --source {run}` writes it" in caplog.text
        assert train_command.finish_run is finish_run


def test_names_that_cannot_be_drawn_go_through_every_command(tmp_path: Path) -> None:
    names = [
        *("\udcff\udcfe", "🐈 cat", "line\nbreak", "$x$ $\\frac{", "quote'\"`", "<script>alert(1)<script>"),
        *("שלום", "\u202eabc", "x" * 240, "猫", " ", "-rf"),
    ]
    data, run, cache = tmp_path / "data", tmp_path / "run", tmp_path / "cache"
    write_image_tree(
        data, class_names=[f"c{n}" for n in range(len(names))], images_per_class=2, sizes=[(40, 40)]
    )
    for number, name in enumerate(names):
        (data / f"c{number}").rename(data / name)
    evaluation = ("--proxy", "--count", 40, "--cache", cache, "--device", "cpu", "--data", tmp_path / "set")
    succeed("prepare", "--source", data, "--out", tmp_path / "set", "--resolution", 32, "--workers", 1)
    succeed(
        "train", "--data", tmp_path / "set", "--out", run, *SMALL, "--iterations", 1, "--output.log-every", 1
    )
    succeed("train", "--data", data, "--out", tmp_path / "of_folder", *SMALL, "--iterations", 1)
    source = ("--source", run)
    succeed("sample", *source, "--out", tmp_path / "grid.png", "--count", 24, "--columns", 2)
    succeed("sample", *source, "--out", tmp_path / "samples", "--layout", "folders", "--count", 12)
    succeed("sample", *source, "--out", tmp_path / "one.png", "--count", 2, "--classes", names[0])
    succeed("attention-maps", *source, "--out", tmp_path / "maps.png", "--count", 12)
    succeed("evaluate", *source, *evaluation, "--metrics", "fid", "intra-fid")
    succeed("export", *source, "--format", "safetensors", "--out", tmp_path / "g.safetensors")
    succeed("compare", run, "--out", tmp_path / "compared")
    for command in ("plot", "report"):
        succeed(command, *source)
    folders = [path for path in (tmp_path / "samples").iterdir() if path.is_dir()]
    assert len(folders) == len(names)
    assert all(path.name.isprintable() and path.name.encode() for path in folders)
    assert Page(run / "report.html").open == []
    assert "<script" not in (run / "report.html").read_text()
    for path in [
        *run.rglob("*.json"),
        *(tmp_path / "set").rglob("*.json"),
        *(tmp_path / "samples").glob("*.json"),
    ]:
        json.loads(path.read_bytes())
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_bytes())
    assert sorted(manifest["class_names"]) == sorted(names)
