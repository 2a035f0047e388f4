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


EVALUATE = """
from sagan.distributed import World
from sagan.data import ImageDataset
from sagan.evaluation import kid
from sagan.evaluation.config import EvaluationConfig
from sagan.evaluation.evaluator import Evaluator
from sagan.evaluation.feature_networks import FeatureNetwork
from sagan.evaluation.real_images import RealImages
from sagan.networks import Generator, NetworkConfig

class Pixels(torch.nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :1024].float()

class Drawn(ImageDataset):
    class_names, resolution, cached = ("a", "b"), 32, True

    def __init__(self, count):
        self.labels, self.failures = torch.arange(count) % 2, []

    def fetch(self, indices):
        draws = torch.Generator().manual_seed(indices[0])
        shape = (len(indices), 3, 32, 32)
        return torch.randint(256, shape, dtype=torch.uint8, generator=draws), self.labels[list(indices)]

    def fingerprint(self):
        return str(len(self))

    def check(self, mode, *, progress=False):
        raise NotImplementedError

kid.SUBSETS = kid.kernel_inception_distance.__kwdefaults__["subsets"] = 3
cpu = torch.device("cpu")
network = FeatureNetwork(Pixels(), "pixels", digest="5" * 64, resize="none", device=cpu, resolution=32)
generator = Generator(
    NetworkConfig(32, base_width=1, num_classes=2, latent_dim=4, g_attention=(), d_attention=())
).eval()
count = int(sys.argv[2])
config = EvaluationConfig(metrics=("fid", "kid", "pr"), count=count, cache=Path(sys.argv[1]), proxy=False)
evaluator = Evaluator(config, RealImages(Drawn(count), "train"), World(0, 1, cpu), network=network)
evaluator.evaluate(generator, torch.tensor([0, 1]), weights="raw")
print(peak_kib())
"""


KID = """
from sagan.evaluation.kid import kernel_inception_distance

a, b = (torch.randn(1100, 512) for _ in range(2))
for subsets in (2, 40):
    kernel_inception_distance(a, b, subsets=subsets)
    print(peak_kib())
"""


def peaks_kib(program: str, *arguments: object, **environment: object) -> list[int]:
    """Return the peaks that a process prints."""
    process = python(PEAK + program, *arguments, **environment)
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    return [int(line) for line in out.split()]


def growth_kib(program: str, *arguments: object) -> int:
    """Return by how much the second, larger piece of work raised the peak of the process after the first."""
    first, second = peaks_kib(program, *arguments)
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


def test_evaluate_keeps_no_features_in_memory(tmp_path: Path) -> None:
    at_once = {"MALLOC_MMAP_THRESHOLD_": 2**20}  # what is freed goes back to the system
    ((few,), (many,)) = (
        peaks_kib(EVALUATE, tmp_path / str(count), count, **at_once) for count in (1100, 5100)
    )
    assert many - few < 4000 * 4 / 2  # KiB: half of what the features of one set take


def test_kid_leaves_no_gaps_between_large_blocks(tmp_path: Path) -> None:
    few, many = peaks_kib(KID)
    assert many - few < 30 * 1024  # hundreds of MiB if each subset makes its own blocks


def test_prepare_keeps_a_small_record_of_each_image(tmp_path: Path) -> None:
    original = tmp_path / "image.jpg"
    original.write_bytes(jpeg_bytes(width=64, height=64))
    for count in (300, 2300):
        folder = tmp_path / str(count) / "ant"
        folder.mkdir(parents=True)
        for number in range(count):
            os.link(original, folder / f"{number:06d}.jpg")
    assert growth_kib(PREPARE, tmp_path, 300, 2300) / 2000 < 4  # pixels take 12 KiB


@pytest.mark.parametrize(
    "options",
    [
        ["--count", 10_000],
        ["--layout", "interpolation", "--class-steps", 1000, "--classes", 0, 1],
        ["--layout", "truncation", "--columns", 10_000, "--classes", 0],
    ],
)
def test_a_picture_too_large_to_open_is_refused(
    options: list[object], trained_run: Path, tmp_path: Path
) -> None:
    message = refused("sample", "--source", trained_run, "--out", tmp_path / "a.png", *options)
    assert "expected 'folders' for more than 9,709 images of 32 pixels" in message  # 96 pixels in the grid
