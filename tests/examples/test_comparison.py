"""Comparison of runs: what is compared, what is kept apart, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command_line import read_png, refused, succeed

from sagan.errors import UserError
from sagan.recipes import PUBLISHED, RECIPES
from sagan.report.comparison import TABLE_1, compare_runs, read_runs

FID, IS = "fid50k-train-tfinception", "is50k-tfinception"


def write_run(folder: Path, recipe: str = "paper", **changes: Any) -> Path:
    folder.mkdir(parents=True)
    config = replace(RECIPES[recipe](), out=folder, **changes)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


def write_evaluation(
    run: Path, iteration: int, identity: str = "0123456789ab", proxy: bool = False, **metrics: float
) -> Path:
    figures = {}
    for metric, value in metrics.items():
        name = "proxy-" * proxy + {"fid": FID, "is": IS}[metric]
        figures[name] = {"metric": metric, "value": value, "deviation": None}
    protocol = {"identity": identity, "proxy": proxy}
    path = run / "evaluation" / f"iteration_{iteration:09d}_{identity}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"iteration": iteration, "figures": figures, "protocol": protocol}))
    return path


def cells(table: str, start: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def table_of(*runs: Path) -> str:
    """Compare the runs, and return the table."""
    return compare_runs(runs, runs[0].parent / "out")[0].read_text()


class TestTable:
    def test_the_best_of_each_run_stands_beside_what_was_published(self, tmp_path: Path) -> None:
        one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", "best_known")
        for iteration, fid, score in ((100, 30.0, 20.0), (200, 19.5, 51.0), (300, 24.0, 48.0)):
            write_evaluation(one, iteration, **{"fid": fid, "is": score})
        write_evaluation(two, 100, fid=13.25)
        table, plot = compare_runs([one, two], tmp_path / "out")
        text = table.read_text()
        assert cells(text, "one") == ["one", "paper", "1,000,000", "19.5 at 200 [18.28]", "51 at 200 [51.43]"]
        assert cells(text, "two")[3:] == ["13.25 at 100 [12.83]", "not measured"]
        pixels = read_png(plot)
        assert min(pixels.shape[1:]) > 300
        assert pixels.flatten(1).unique(dim=1).size(1) > 50

    def test_figures_of_two_protocols_are_kept_apart(self, tmp_path: Path) -> None:
        one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
        write_evaluation(one, 100, "aaaaaaaaaaaa", fid=20.0)
        write_evaluation(two, 100, "bbbbbbbbbbbb", fid=10.0)
        text = table_of(one, two)
        assert "fid: 2 protocols, in separate columns" in text
        assert cells(text, "one")[3:] == ["20 at 100 [18.28]", "not measured"]
        assert cells(text, "two")[3:] == ["not measured", "10 at 100 [18.28]"]

    @pytest.mark.parametrize(("resolution", "proxy"), [(128, True), (64, False)])
    def test_proxy_figures_and_other_resolutions_are_not_compared_with_publications(
        self, resolution: int, proxy: bool, tmp_path: Path
    ) -> None:
        network = replace(RECIPES["paper"]().network, resolution=resolution)
        run = write_run(tmp_path / "alone", network=network)
        write_evaluation(run, 100, proxy=proxy, fid=3.0)
        text = table_of(run)
        assert cells(text, "alone")[3] == "3 at 100"
        assert ("they are not FIDs" in text) == proxy

    def test_differences_from_the_recipe_and_missing_evaluations_are_named(self, tmp_path: Path) -> None:
        one = write_run(tmp_path / "one", seed=7, data=tmp_path, device="cuda")
        write_evaluation(one, 100, fid=3.0)
        text = table_of(one, write_run(tmp_path / "two"))
        assert "- **one**: recipe paper with seed 7\n- **two**: recipe paper without changes\n" in text
        assert "**two was not evaluated.**" in text
        assert "one was not evaluated" not in text

    def test_runs_of_table_1_are_arranged_as_in_the_paper(self, tmp_path: Path) -> None:
        runs = []
        for i, recipe in enumerate(("sn_on_gd_ttur", "attention_32", "residual_8")):
            runs.append(write_run(tmp_path / recipe, recipe))
            write_evaluation(runs[-1], 100, **{"fid": 20.0 + i, "is": 40.0 + i})
        text = table_of(*runs)
        row = cells(text, f"FID ({FID})")
        assert len(row) == 1 + len(TABLE_1)
        assert row[1] == "20 / 22.96"
        assert row[1 + TABLE_1.index("attention_32")] == "21 / 18.28"
        assert row[1 + TABLE_1.index("attention_16")] == "- / 22.14"
        assert cells(text, f"IS ({IS})")[1 + TABLE_1.index("residual_8")] == "42 / 23.17"


class TestReading:
    def test_a_repeated_name_is_told_apart_by_its_path(self, tmp_path: Path) -> None:
        runs = read_runs([write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run")])
        assert len({run.label for run in runs}) == 2

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"protocol": {}}'])
    def test_a_broken_evaluation_is_named(self, tmp_path: Path, text: str) -> None:
        run = write_run(tmp_path / "run")
        path = write_evaluation(run, 100)
        path.write_text(text)
        with pytest.raises(UserError, match=path.name):
            read_runs([run])


class TestCommand:
    def test_it_prints_the_table_and_says_what_it_wrote(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run")
        write_evaluation(run, 100, fid=3.0)
        printed = succeed("compare", run, "--out", tmp_path / "out")
        assert "| run | paper |" in printed
        assert str(tmp_path / "out" / "comparison.png") in printed

    def test_what_cannot_be_compared_is_refused_and_nothing_is_written(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run")
        for runs, message in (
            ([], "expected the folders of one or more"),
            ([tmp_path], "expected the folder of a run with config.json"),
            ([run, run / ".." / "run"], "one of them twice"),
            ([run], "none was evaluated"),
        ):
            assert message in refused("compare", *runs, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestPublished:
    @pytest.mark.parametrize("name", [name for name in RECIPES if name != "digits"])
    def test_the_description_of_a_recipe_has_every_number(self, name: str) -> None:
        recipe = RECIPES[name]
        told = (recipe.func if isinstance(recipe, partial) else recipe).__doc__ or ""
        numbers = {float(text) for text in re.findall(r"\d+\.\d+", told)}
        assert "Published" in told
        assert set(PUBLISHED.get(name, {}).values()) <= numbers

    def test_all_of_table_1_are_recipes_with_a_published_result(self) -> None:
        assert set(TABLE_1) <= set(PUBLISHED) <= set(RECIPES)
