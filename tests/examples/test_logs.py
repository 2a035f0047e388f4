"""Metrics: written line by line, cut back for a resumed run, read again."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from command_line import refused
from full_disks import Full

from sagan.errors import UserError
from sagan.report.page import draw_run
from sagan.train.logs import RunLog, read_metrics, series


def test_rows_are_lines_and_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run", 0) as log:
        log.write({"iteration": 1, "d_loss": 0.5})
        log.write({"iteration": 2, "d_loss": float("nan"), "alarm": "text"})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"iteration": 1, "d_loss": 0.5},
        {"iteration": 2, "d_loss": None, "alarm": "text"},
    ]
    rows = read_metrics(tmp_path / "run")
    assert series(rows[:1], "d_loss") == ([1.0], [0.5])
    iterations, values = series(rows, "d_loss")
    assert iterations == [1, 2]
    assert values[0] == 0.5
    assert math.isnan(values[1])  # a gap in the curve
    assert series(rows[1:], "d_loss") == series(rows, "g_loss") == ([], [])


def test_a_resumed_run_drops_later_and_torn_lines(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n{"iteration": 3}\n{"itera')
    with RunLog(tmp_path, 2) as log:
        log.write({"iteration": 3, "again": 1})
    assert read_metrics(tmp_path) == [{"iteration": 1}, {"iteration": 3, "again": 1}]


@pytest.mark.parametrize(
    "line",
    [
        *("", "[]", "5", "{", "[" * 100_000, "\x00", "\udcff", '{"iteration": "1"}', '{"iteration": 1e999}'),
        *('{"iteration": 1, "x": [1]}', f'{{"iteration": 1, "d_loss": {"9" * 4000}}}'),
    ],
    ids=lambda line: line[:20].encode("unicode_escape").decode(),
)
def test_damaged_lines_are_skipped_with_a_remark(
    line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(f'{{"iteration": 1}}\n{line}\n{{"iteration": 2}}\n'.encode(errors="surrogateescape"))
    assert read_metrics(tmp_path) == [{"iteration": 1}, {"iteration": 2}]
    assert f"{path}: skipped 1 damaged lines, the first is line 2" in caplog.text


def test_a_full_disk_is_named_and_the_log_closes(tmp_path: Path, full_disk: Full) -> None:
    log = RunLog(tmp_path, 0)
    log.write({"iteration": 1})
    message = r"metrics\.jsonl could not be written .* checkpoints are intact"
    with full_disk(50), pytest.raises(UserError, match=message), log:
        log.write({"iteration": 2, "text": "x" * 1000})
    assert read_metrics(tmp_path) == [{"iteration": 1}]


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "[" * 100_000, '{"recipe": "paper"}', "\x00", "{}"])
def test_a_configuration_that_is_none_is_named(text: str, trained_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    (run / "config.json").write_text(text)
    for command in (("report", "--source", run), ("compare", run)):
        message = refused(*command)
        assert str(run / "config.json") in message
        assert message.count("\n") == 1
    (run / "config.json").unlink()
    assert "found no config.json" in refused("report", "--source", run)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"expected the folder of a run with metrics\.jsonl, got the folder .*, which holds no run",
    ):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="expected metrics of a run"):
        draw_run(tmp_path, tmp_path / "curves.png")
