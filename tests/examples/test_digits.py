"""The demo's data, and the judge of generated digits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from sagan.data import ImageFolderDataset, scan_image_tree
from sagan.demo.digits import (
    Judge,
    agreement,
    frechet_to_real,
    spread_by_class,
    train_judge,
    write_digits,
)

Examples = tuple[Tensor, Tensor]  # images and labels


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits") / "tree")


@pytest.fixture(scope="module")
def examples(digits: Path) -> Examples:
    dataset = ImageFolderDataset(scan_image_tree(digits), 32)
    return dataset.fetch(range(len(dataset)))


@pytest.fixture(scope="module")
def judge(examples: Examples) -> Judge:
    return train_judge(*examples, epochs=2)


class TestDigits:
    def test_tree_holds_every_digit_in_the_folder_of_its_class(self, digits: Path) -> None:
        source = load_digits()
        paths = sorted((digits / "train").glob("*/*"))
        assert len(paths) == 1797
        counts = Counter(path.parent.name for path in paths)
        assert counts == Counter(map(str, source.target.tolist()))
        assert sorted(counts) == list("0123456789")
        assert all(int(path.parent.name) == source.target[int(path.stem)] for path in paths[::200])

    def test_images_are_grey_and_32_pixels_wide_and_show_their_digit(self, digits: Path) -> None:
        source = load_digits()
        for path in sorted((digits / "train").glob("*/*"))[::100]:
            with Image.open(path) as image:
                assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))
                pixels = np.asarray(image).astype(float)
            assert np.ptp(pixels, axis=2).max() == 0
            small = pixels[:, :, 0].reshape(8, 4, 8, 4).mean((1, 3))
            assert np.corrcoef(small.ravel(), source.images[int(path.stem)].ravel())[0, 1] > 0.97

    def test_files_that_are_there_stay(self, digits: Path) -> None:
        first, second = sorted((digits / "train" / "3").iterdir())[:2]
        kept, stamp = second.read_bytes(), second.stat().st_mtime_ns
        content = first.read_bytes()
        first.unlink()
        assert write_digits(digits) == digits
        assert first.read_bytes() == content
        assert (second.read_bytes(), second.stat().st_mtime_ns) == (kept, stamp)


class TestJudge:
    def test_it_reads_digits_it_has_not_seen(self, judge: Judge, examples: Examples) -> None:
        assert judge.accuracy > 0.9
        assert not judge.classifier.training
        agrees = agreement(judge, *examples)
        assert agrees.dtype == torch.bool
        assert agrees.double().mean() > 0.9
        wrong = (examples[1] + 1) % 10
        assert agreement(judge, examples[0], wrong).double().mean() < 0.05

    def test_accuracy_is_that_of_the_held_out_fifth(self, judge: Judge, examples: Examples) -> None:
        images, labels = examples
        with torch.random.fork_rng():
            torch.manual_seed(0)
            held_out = torch.randperm(len(images))[: len(images) // 5]
        agrees = agreement(judge, images[held_out], labels[held_out])
        assert judge.accuracy == pytest.approx(agrees.double().mean().item(), abs=1e-12)

    def test_the_global_random_state_is_neither_read_nor_moved(self, examples: Examples) -> None:
        images, labels = (part[::20] for part in examples)
        judges = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            judges.append(train_judge(images, labels, epochs=1))
            assert torch.equal(torch.get_rng_state(), before)
        first, second = (each.classifier.state_dict() for each in judges)
        assert all(torch.equal(first[name], second[name]) for name in first)
        other = train_judge(images, labels, epochs=1, seed=5).classifier.state_dict()
        assert not torch.equal(first["last.weight"], other["last.weight"])

    def test_real_digits_are_near_and_noise_is_far(self, judge: Judge, examples: Examples) -> None:
        images, _ = examples
        assert judge.real_features.shape == (1797, 64)
        half = frechet_to_real(judge, images[::2])
        noise = torch.randint(256, (500, 3, 32, 32), dtype=torch.uint8)
        assert frechet_to_real(judge, images) < 1e-6
        assert 1e-3 < half < 0.1 * frechet_to_real(judge, noise)

    def test_spread_is_the_mean_distance_of_two_different_images_of_a_class(self, judge: Judge) -> None:
        labels = torch.arange(10).repeat(3)
        images = torch.zeros(30, 3, 32, 32, dtype=torch.uint8)
        images[3] = 255  # one of the three threes is white: two of three pairs are 32 grey levels of 1 apart
        expected = torch.zeros(10, dtype=torch.float64)
        expected[3] = 2 / 3 * 32
        torch.testing.assert_close(spread_by_class(images, labels), expected)
        assert judge.real_spread.shape == (10,)
        assert (judge.real_spread > 1).all()
