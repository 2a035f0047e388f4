"""All subcommands in turn, as a user would run them, on a synthetic set in ImageNet's layout."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from command_line import SMALL, read_png, succeed

from sagan.prepare.synthetic import LAYOUTS
from sagan.train.logs import read_metrics, series

CLASSES, IMAGES, VAL_IMAGES = 20, 2, 1
ITERATIONS = 4


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set in each layout, with JPEGs of ImageNet's sizes."""
    out = tmp_path_factory.mktemp("archives")
    size = ("--classes", CLASSES, "--images", IMAGES, "--val-images", VAL_IMAGES)
    for layout in LAYOUTS:
        succeed("make-images", "--out", out / layout, "--layout", layout, *size)
    return out


@pytest.mark.parametrize("resolution", [32, 64])
def test_from_the_archives_to_a_comparison(resolution: int, archives: Path, tmp_path: Path) -> None:
    data, val, a, b = (tmp_path / name for name in ("data", "val", "a", "b"))
    tars, size = archives / "tars", ("--resolution", resolution)
    train_tar = tars / "ILSVRC2012_img_train.tar"
    succeed("prepare", "--source", train_tar, "--out", data, *size, "--workers", 1)
    succeed("prepare", "--source", tars, "--split", "val", "--out", val, *size)
    succeed("prepare", "--verify", data)
    assert np.load(data / "images.npy").shape == (CLASSES * IMAGES, 3, resolution, resolution)
    assert np.load(val / "labels.npy").tolist() == list(range(CLASSES)) * VAL_IMAGES
    assert len(np.unique(np.load(data / "digests.npy"), axis=0)) == CLASSES * IMAGES
    for layout in LAYOUTS:
        again = tmp_path / f"data_{layout}"
        succeed("prepare", "--source", archives / layout, "--out", again, *size)
        assert (again / "images.npy").read_bytes() == (data / "images.npy").read_bytes()

    small = (
        *SMALL,
        *("--data", data, "--network.resolution", resolution, "--output.log-every", 1),
        *("--network.g-attention", resolution // 2, "--network.d-attention", resolution // 4),
        *("--evaluation.every", 2, "--evaluation.proxy", "--evaluation.count", 24),
        *("--evaluation.cache", tmp_path / "cache"),
    )
    succeed("train", *small, "--out", a, "--iterations", ITERATIONS - 2)
    succeed("train", *small, "--out", a, "--iterations", ITERATIONS, "--resume", "--accept-changes")
    succeed("train", *small, "--out", b, "--iterations", ITERATIONS, "--recipe", "sn_on_gd_ttur")
    for run in (a, b):
        iterations, losses = series(read_metrics(run), "d_loss")
        assert list(iterations) == [1, 2, 3, 4]
        assert np.isfinite(losses).all()

    measure = ("--source", a, "--proxy", "--count", 24, "--cache", tmp_path / "cache")
    device = ("--device", "cpu")
    succeed("evaluate", *measure, "--metrics", "fid", "kid", "pr", "--out", tmp_path / "figures", *device)
    (written,) = (tmp_path / "figures").glob("*.json")
    figures = json.loads(written.read_text())["figures"]
    assert len(figures) == 4
    assert all(math.isfinite(figure["value"]) for figure in figures.values())

    succeed("sample", "--source", a, "--out", tmp_path / "grid.png", "--count", 20, *device)
    succeed("attention-maps", "--source", a, "--out", tmp_path / "maps.png", *device)
    succeed("plot", "--source", a)
    succeed("report", "--source", a)
    succeed("compare", a, b, "--out", tmp_path / "comparison")
    for picture in ("grid.png", "maps.png", "a/curves.png", "comparison/comparison.png"):
        pixels = read_png(tmp_path / picture)
        assert min(pixels.shape[1:]) > resolution
        assert pixels.unique().numel() > 1
    assert "<img" in (a / "report.html").read_text()
    table = (tmp_path / "comparison" / "comparison.md").read_text()
    assert "| a | best_known |" in table
    assert "| b | sn_on_gd_ttur |" in table
