"""The memory of evaluate and prepare does not grow with the images, or only by a small record of each."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command_line import python, refused
from image_trees import jpeg_bytes

PEAK = """
import re, sys
from pathlib import Path
import torch

torch.set_num_threads(1)

def peak_kib():
    return int(re.search(r"^VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text(), re.M)[1])
"""

# Features of 2 KiB an image, whose float64 copies would be 4 KiB more.
EVALUATE = """
from torch import nn
from sagan.data import ImageDataset
from sagan.distributed import World
from sagan.evaluation.config import EvaluationConfig
from sagan.evaluation.evaluator import Evaluator
from sagan.evaluation.feature_networks import FeatureNetwork
from sagan.evaluation.real_images import RealImages
from sagan.networks import Generator, NetworkConfig

class Pixels(nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :512].float()

class Drawn(ImageDataset):
    class_names, resolution, cached = ("a",), 32, True
    def __init__(self, count):
        self.labels, self.failures = torch.zeros(count, dtype=torch.int64), []
    def fetch(self, indices):
        draws = torch.Generator().manual_seed(indices[0])
        shape = (len(indices), 3, 32, 32)
        return torch.randint(256, shape, dtype=torch.uint8, generator=draws), self.labels[list(indices)]
    def fingerprint(self):
        return str(len(self))
    def check(self, *_, **__):
        raise NotImplementedError

cpu = torch.device("cpu")
network = FeatureNetwork(Pixels(), "pixels", digest="5" * 64, resize="none", device=cpu, resolution=32)
generator = Generator(
    NetworkConfig(32, base_width=1, num_classes=0, latent_dim=4, g_attention=(), d_attention=())
).eval()
for count in map(int, sys.argv[2:]):
    config = EvaluationConfig(metrics=("kid", "pr"), count=count, cache=Path(sys.argv[1]))
    evaluator = Evaluator(config, RealImages(Drawn(count), "train"), World(0, 1, cpu), network=network)
    evaluator.evaluate(generator, torch.tensor([0]), weights="raw")
    print(peak_kib())
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


def test_evaluate_keeps_no_features_in_memory(tmp_path: Path) -> None:
    assert growth_kib(EVALUATE, tmp_path, 1100, 3300) < 8 * 1024  # one set of features alone has 4.4 MiB more


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
