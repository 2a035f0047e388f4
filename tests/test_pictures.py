"""The documentation's pictures: readable on a phone, on light and dark pages, and what the recorded results say."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from colours import contrast
from packaging.requirements import Requirement

from benchmarks import diagrams, docs_plots, plots, style

ROOT = Path(__file__).resolve().parent.parent
STATIC = ROOT / "docs" / "_static"
SVGS = sorted(STATIC.rglob("*.svg"))
every_svg = pytest.mark.parametrize("path", SVGS, ids=lambda path: path.stem)

PAGES = ("attention.md", "training_step.md")
PHONE = 358  # pixels that a phone of 390 leaves a picture


@pytest.mark.parametrize("paper", [style.PAPER, style.DARK_PAPER])
def test_colours_show_on_both_papers(paper: str) -> None:
    for color in (style.BLUE, style.VERMILLION, style.GREEN, style.PURPLE, style.GREY):
        assert contrast(color, paper) >= 3
    assert contrast(style.INK, style.PAPER) >= 7
    assert contrast(style.DARK_INK, style.DARK_PAPER) >= 7


def test_ours_has_one_colour_and_nothing_else_has_it() -> None:
    recorded = [docs_plots.Recorded(path.stem) for path in docs_plots.RESULTS.glob("*_cpu.json")]
    names = {name for each in recorded for runs in each.cases.values() for rows in runs for name in rows}
    assert len(names) > 20
    for name in names:
        assert (style.look(name)["color"] == style.OURS) is name.startswith("ours")


class TestPlots:
    def test_the_committed_ones_are_what_the_command_draws(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        matplotlib = pytest.importorskip("matplotlib")
        pins = re.findall(r"^matplotlib==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
        pin = next(pin for pin in map(Requirement, pins) if pin.marker is None or pin.marker.evaluate())
        if matplotlib.__version__ not in pin.specifier or sys.version_info < (3, 11):
            pytest.skip("drawn by the matplotlib that constraints.txt has for Python 3.11 and newer")
        # A new process: Matplotlib's layout depends, in the last bits, on how many figures were laid out before.
        command = [sys.executable, "-m", "benchmarks.docs_plots", "--out", str(tmp_path)]
        subprocess.run(command, cwd=ROOT, check=True)
        drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
        assert {path.name: path.read_text() for path in docs_plots.FOLDER.iterdir()} == drawn, (
            "run python -m benchmarks.docs_plots"
        )

    def test_a_plot_shows_its_cases_contenders_and_units(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        dots = plots.Dots("seconds", {"small & <fast>": {"ours": 0.5, "textbook": 2.0}}, "Time", 1.0)
        lines = plots.Lines("batch", "MiB", {"ours": {1: 4.0, 2: 8.0}})
        path = plots.draw(tmp_path / "plot.svg", "Title & more", [dots, lines], "a machine")
        assert path is not None
        texts = {node.text for node in ElementTree.parse(path).iter() if node.tag.endswith(("text", "title"))}
        assert texts >= {
            "Title & more",
            "small & <fast>",
            "ours",
            "textbook",
            "seconds",
            "batch",
            "MiB",
            "a machine",
        }

    def test_of_a_case_measured_twice_one_run_is_shown_the_latest_with_all_contenders(
        self, tmp_path: Path
    ) -> None:
        times = [{"ours": 1.0, "theirs": 2.0}, {"ours": 3.0, "theirs": 4.0}, {"ours": 5.0}]
        runs = [
            {
                "environment": {"device": "cpu", "cpu": "a machine", "cores_used": 2, "torch": "2.13.0+cpu"},
                "cases": [
                    {
                        "suite": "step",
                        "case": "small",
                        "contenders": {name: {"status": "ok", "time_ms": ms} for name, ms in run.items()},
                    },
                    {"suite": "step", "case": "large", "status": "skipped", "reason": "too slow"},
                ],
            }
            for run in times
        ]
        (tmp_path / "step.json").write_text(json.dumps({"runs": runs}))
        recorded = docs_plots.Recorded("step", tmp_path)
        assert recorded.note == "a machine, 2 cores, torch 2.13.0"
        assert recorded.values("step", "small", "time_ms") == {"ours": 3.0, "theirs": 4.0}
        assert recorded.values("step", "small", "time_ms", "^ours") == {"ours": 5.0}


class TestDiagrams:
    def test_the_committed_ones_are_what_the_build_draws(self, tmp_path: Path) -> None:
        diagrams.write(tmp_path)
        drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
        committed = {path.name: path.read_text() for path in diagrams.FOLDER.iterdir()}
        assert committed == drawn, "run python -m benchmarks.diagrams"

    @pytest.mark.parametrize(
        "page", [*sorted((ROOT / "docs" / "blocks").glob("*.md")), *map((ROOT / "docs").joinpath, PAGES)]
    )
    def test_a_page_of_a_block_has_one_and_a_formula(self, page: Path) -> None:
        text = page.read_text()
        assert re.search(r"^!\[.+\]\((\.\./)?_static/diagrams/\w+\.svg\)$", text, re.MULTILINE)
        assert re.search(r"\$[^$]+\$", text)


class TestSvg:
    def test_there_are_some(self) -> None:
        assert len(SVGS) > 5

    @every_svg
    def test_it_is_small_and_its_text_readable_on_a_phone(self, path: Path) -> None:
        text = path.read_text()
        assert len(text) < 60_000
        root = ElementTree.fromstring(text)
        scale = min(1.0, PHONE / float(root.attrib["viewBox"].split()[2]))
        sizes = [float(size) for size in re.findall(r"font(?:-size)?: ?(?:bold )?([\d.]+)px", text)]
        assert sizes
        assert min(sizes) * scale > 9.5

    @every_svg
    def test_it_follows_the_readers_scheme_and_loads_nothing(self, path: Path) -> None:
        text = path.read_text()
        assert style.STYLE_SHEET in text
        assert 'class="paper"' in text
        assert "currentColor" in text
        assert not re.search(r"""(?:href="|src="|url\()(?!#)""", text)
        assert not re.search(r"<script|<foreignObject|@import", text)

    @every_svg
    def test_a_page_shows_it(self, path: Path) -> None:
        pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
        name = path.relative_to(STATIC).as_posix()
        assert any(f"_static/{name}" in page.read_text() for page in pages)


class TestPagesInABrowser:
    def test_the_check_names_what_is_wrong(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.syspath_prepend(ROOT / "docs")
        check = importlib.import_module("check_pages")
        if check.chromium() is None:
            pytest.skip("there is no Chromium here")
        head = '<!doctype html><meta name="viewport" content="width=device-width"><title>a</title>'
        scrolls = '<div style="overflow-x: auto"><pre style="width: 900px">code</pre></div>'
        (tmp_path / "good.html").write_text(f"{head}<article><p>text</p>{scrolls}</article>")
        assert check.main([str(tmp_path)]) == 0
        (tmp_path / "bad.html").write_text(
            f"""{head}<article><p style="font-size: 8px">small</p><pre style="width: 900px">code</pre>
            <img src="none.png" alt="picture"><span class="math">x</span></article>"""
        )
        assert check.main([str(tmp_path)]) == 1
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bad.html")]
        for width, problem in {
            "390": "the page is 9",
            "390 ": "PRE ends at",
            "1280": "no picture",
            "1280 ": "alt text",
            "390  ": "formulas are not typeset",
            "1280  ": "P 8px",
        }.items():
            assert any(width.strip() in line and problem in line for line in lines), problem
        assert not any("1280" in line and "PRE" in line for line in lines)

    @pytest.mark.parametrize(("theme", "paper"), [("dark", style.DARK_PAPER), ("light", style.PAPER)])
    def test_pictures_follow_the_theme_that_the_reader_chose(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theme: str, paper: str
    ) -> None:
        monkeypatch.syspath_prepend(ROOT / "tests" / "examples")
        browser = importlib.import_module("browser")
        if (program := browser.chromium()) is None:
            pytest.skip("there is no Chromium here")
        page = tmp_path / "page.html"
        page.write_text(
            f'<link rel="stylesheet" href="{(STATIC / "custom.css").as_uri()}">'
            f'<body data-theme="{theme}" style="margin: 0"><img src="{SVGS[0].as_uri()}">'
        )
        with browser.open_browser(program, tmp_path / "profile") as opened:
            opened.open(page, width=480, height=100, dark=theme == "light")  # the system has the other one
            seen = opened.screenshot()[:, 2, 2].tolist()
        assert seen == [int(paper[at : at + 2], 16) for at in (1, 3, 5)]
