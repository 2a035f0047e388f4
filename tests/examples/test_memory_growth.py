"""What commands keep of each image: features in a file, a small record in memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from command_line import python, refused
from image_trees import jpeg_bytes

from sagan.evaluation.feature_file import FeatureFile
from sagan.evaluation.kid import kernel_inception_distance
from sagan.evaluation.precision_recall import precision_and_recall

PEAK = """
import re, sys
from pathlib import Path
import torch

torch.set_num_threads(1)

def peak_kib():
    return int(re.search(r"^VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text(), re.M)[1])
"""

PREPARE = """
from sagan.prepare import SourceOptions, list_source, prepare

for count in sys.argv[2:]:
    root = Path(sys.argv[1])
    listing = list_source(str(root / count), SourceOptions(), workers=1)
    prepare(listing, root / f"out{count}", resolution=64, workers=1)
    print(peak_kib())
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the peak of /proc")


def growth_kib(program: str, *arguments: object) -> int:
    """Return by how much the second, larger piece of work raised the peak of the process after the first."""
    process = python(PEAK + program, *arguments)
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    first, second = map(int, out.split())
    return second - first


def test_features_in_a_file_give_the_figures_of_those_in_memory(tmp_path: Path) -> None:
    draws = torch.Generator().manual_seed(0)
    tensors = [torch.randn(count, 24, generator=draws).abs() for count in (1500, 1300)]
    files = []
    for tensor in tensors:
        files.append(FeatureFile.temporary(*tensor.shape, tmp_path))
        for start in range(0, len(tensor), 50):
            files[-1].write(start, tensor[start : start + 50])
    assert torch.equal(files[0][5::7], tensors[0][5::7])
    assert kernel_inception_distance(*files, subsets=5) == kernel_inception_distance(*tensors, subsets=5)
    assert precision_and_recall(*files) == precision_and_recall(*tensors)
    assert precision_and_recall(files[0].head(700), files[1]) == precision_and_recall(
        tensors[0][:700], tensors[1]
    )


def test_prepare_keeps_a_small_record_of_each_image(tmp_path: Path) -> None:
    original = tmp_path / "image.jpg"
    original.write_bytes(jpeg_bytes(width=64, height=64))
    for count in (300, 2300):
        folder = tmp_path / str(count) / "ant"
        folder.mkdir(parents=True)
        for number in range(count):
            os.link(original, folder / f"{number:06d}.jpg")
    assert growth_kib(PREPARE, tmp_path, 300, 2300) / 2000 < 4  # pixels take 12 KiB


def test_a_grid_too_large_to_open_is_refused(trained_run: Path, tmp_path: Path) -> None:
    message = refused("sample", "--source", trained_run, "--out", tmp_path / "a.png", "--count", 10**6)
    assert "expected 'folders' for more than 87,381 images of 32 pixels" in message
