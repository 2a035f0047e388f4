"""All subcommands in turn, as a user would run them, on a synthetic set in ImageNet's layout."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import imagenet_sagan
from sagan.prepare.synthetic import LAYOUTS
from sagan.train.logs import read_metrics, series

CLASSES, IMAGES, VAL_IMAGES = 20, 2, 1
ITERATIONS = 4


def main(*arguments: object) -> None:
    assert imagenet_sagan.main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set in each layout, with JPEGs of ImageNet's sizes."""
    out = tmp_path_factory.mktemp("archives")
    size = ("--classes", CLASSES, "--images", IMAGES, "--val-images", VAL_IMAGES)
    for layout in LAYOUTS:
        main("make-images", "--out", out / layout, "--layout", layout, *size)
    return out


def drawn(path: Path) -> tuple[int, int]:
    """Return the size of a picture that is not of one colour."""
    with Image.open(path) as image:
        low, high = zip(*image.convert("RGB").getextrema(), strict=True)
        assert max(high) > min(low)
        return image.size


@pytest.mark.parametrize("resolution", [32, 64])
def test_from_the_archives_to_a_comparison(
    resolution: int, archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, val = tmp_path / "data", tmp_path / "val"
    archive = archives / "tars" / "ILSVRC2012_img_train.tar"
    main("prepare", "--source", archive, "--out", data, "--resolution", resolution, "--workers", 1)
    main("prepare", "--source", archives / "tars", "--split", "val", "--out", val, "--resolution", resolution)
    main("prepare", "--verify", data)
    assert np.load(data / "images.npy").shape == (CLASSES * IMAGES, 3, resolution, resolution)
    assert np.load(val / "labels.npy").tolist() == list(range(CLASSES)) * VAL_IMAGES
    assert len(np.unique(np.load(data / "digests.npy"), axis=0)) == CLASSES * IMAGES
    for layout in LAYOUTS:
        again = tmp_path / f"data_{layout}"
        main("prepare", "--source", archives / layout, "--out", again, "--resolution", resolution)
        assert (again / "images.npy").read_bytes() == (data / "images.npy").read_bytes()

    small = (
        *("--data", data, "--device", "cpu", "--batch-size", 4, "--network.resolution", resolution),
        *("--network.base-width", 1, "--network.latent-dim", 4, "--network.g-attention", resolution // 2),
        *("--network.d-attention", resolution // 4, "--output.grid-columns", 2, "--output.log-every", 1),
        *("--evaluation.every", 2, "--evaluation.proxy", "--evaluation.count", 24),
        *("--evaluation.cache", tmp_path / "cache", "--output.no-tensorboard"),
    )
    main("train", *small, "--out", tmp_path / "a", "--iterations", ITERATIONS - 2)
    main("train", *small, "--out", tmp_path / "a", "--iterations", ITERATIONS, "--resume", "--accept-changes")
    main("train", *small, "--out", tmp_path / "b", "--iterations", ITERATIONS, "--recipe", "sn_on_gd_ttur")
    for run in ("a", "b"):
        iterations, losses = series(read_metrics(tmp_path / run), "d_loss")
        assert list(iterations) == [1, 2, 3, 4]
        assert np.isfinite(losses).all()

    measure = ("--source", tmp_path / "a", "--proxy", "--count", 24, "--cache", tmp_path / "cache")
    device = ("--device", "cpu")
    main("evaluate", *measure, "--metrics", "fid", "kid", "pr", "--out", tmp_path / "figures", *device)
    (written,) = (tmp_path / "figures").glob("*.json")
    figures = json.loads(written.read_text())["figures"]
    assert len(figures) == 4
    assert all(math.isfinite(figure["value"]) for figure in figures.values())

    main("sample", "--source", tmp_path / "a", "--out", tmp_path / "grid.png", "--count", 20, *device)
    main("attention-maps", "--source", tmp_path / "a", "--out", tmp_path / "maps.png", *device)
    main("plot", "--source", tmp_path / "a")
    main("report", "--source", tmp_path / "a")
    main("compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "comparison")
    assert min(drawn(tmp_path / "grid.png")) > resolution
    for picture in ("maps.png", "a/curves.png", "comparison/comparison.png"):
        drawn(tmp_path / picture)
    assert "<img" in (tmp_path / "a" / "report.html").read_text()
    table = (tmp_path / "comparison" / "comparison.md").read_text()
    assert "| a | best_known |" in table
    assert "| b | sn_on_gd_ttur |" in table
