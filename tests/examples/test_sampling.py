"""Numbered samples: the same whoever makes them, and however many are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_runs import assert_same

from sagan.errors import UserError
from sagan.networks import Generator, NetworkConfig
from sagan.sampling import (
    TrainedGenerator,
    generate,
    load_generator,
    numbered_samples,
    sample_inputs,
    to_uint8,
)
from sagan.train.checkpoint import find_checkpoint, load_checkpoint
from sagan.train.loop import TrainingResult

CPU = torch.device("cpu")
NETWORK = NetworkConfig(resolution=32, base_width=2, num_classes=3, latent_dim=6, d_attention=())


@pytest.fixture(scope="module")
def trained(trained_run: Path) -> TrainedGenerator:
    return load_generator(trained_run, CPU)


def made(trained: TrainedGenerator, count: int) -> dict[int, tuple[Tensor, int]]:
    found: dict[int, tuple[Tensor, int]] = {}
    for numbers, images, labels in numbered_samples(trained.generator, count, seed=0, batch_size=4):
        assert len(numbers) == len(images) == len(labels)
        for number, image, label in zip(numbers, images, labels.tolist(), strict=True):
            assert number not in found
            found[number] = image, label
    return found


class TestInputs:
    def test_a_sample_depends_only_on_seed_and_number(self) -> None:
        latents, labels = sample_inputs(range(10), NETWORK, 5)
        for number in (0, 3, 9):
            alone, label = sample_inputs([number], NETWORK, 5)
            assert torch.equal(alone[0], latents[number])
            assert label[0] == labels[number] == number % 3
        backwards, _ = sample_inputs(range(9, -1, -1), NETWORK, 5)
        assert torch.equal(backwards.flip(0), latents)

    def test_the_global_random_state_is_neither_read_nor_moved(self) -> None:
        before = torch.get_rng_state()
        first, _ = sample_inputs(range(4), NETWORK, 0)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(12345)
        assert torch.equal(sample_inputs(range(4), NETWORK, 0)[0], first)

    def test_seeds_and_numbers_give_unrelated_normal_latents(self) -> None:
        wide = replace(NETWORK, latent_dim=64)
        latents = torch.cat([sample_inputs(range(100), wide, seed)[0] for seed in (0, 1, 2, 10**9)])
        assert latents.mean().abs() < 0.03
        assert latents.std().item() == pytest.approx(1, abs=0.03)
        correlations = torch.corrcoef(latents).fill_diagonal_(0)
        assert correlations.abs().max() < 0.7  # 80,000 pairs at a deviation of 1/8
        assert correlations.std().item() == pytest.approx(1 / 8, rel=0.1)

    def test_classes_are_gone_through_in_turn(self) -> None:
        _, labels = sample_inputs(range(5), NETWORK, 0, torch.tensor([2, 0]))
        assert labels.tolist() == [2, 0, 2, 0, 2]
        _, labels = sample_inputs([7], NETWORK, 0)
        assert labels.tolist() == [1]
        assert labels.dtype == torch.int64
        _, labels = sample_inputs(range(3), replace(NETWORK, num_classes=0), 0)  # unconditional
        assert labels.tolist() == [0, 0, 0]


class TestNumberedSamples:
    @pytest.mark.parametrize("count", [1, 4, 6, 9])
    def test_samples_do_not_depend_on_their_count(self, trained: TrainedGenerator, count: int) -> None:
        samples, more = made(trained, count), made(trained, 13)
        assert sorted(samples) == list(range(count))
        assert_same(samples, {number: more[number] for number in samples})

    def test_every_block_is_full_so_that_its_arithmetic_is_the_same(self, trained: TrainedGenerator) -> None:
        sizes: list[int] = []
        hook = trained.generator.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        with hook:
            made(trained, 6)
            made(trained, 1)
        assert sizes == [4, 4, 4]

    def test_numbers_give_other_images(self, trained: TrainedGenerator) -> None:
        images = torch.stack([image for image, _ in made(trained, 6).values()])
        assert len(images.unique(dim=0)) == 6

    def test_images_are_the_generators_for_latents_and_labels(self, trained: TrainedGenerator) -> None:
        latents, labels = sample_inputs(range(4), trained.config.network, 0)
        with torch.no_grad():
            expected = to_uint8(trained.generator(latents, labels))
        assert torch.equal(torch.stack([image for image, _ in made(trained, 4).values()]), expected)


class TestGenerate:
    @pytest.mark.parametrize("training", [True, False])
    def test_mode_and_vectors_are_as_before_and_images_those_of_evaluation(self, training: bool) -> None:
        network = Generator(NETWORK).train(training)
        before = {name: value.clone() for name, value in network.state_dict().items()}
        latents, labels = sample_inputs(range(5), NETWORK, 0)
        images = generate(network, latents, labels, batch_size=2)
        assert (images.shape, images.dtype) == ((5, 3, 32, 32), torch.uint8)
        assert network.training == training
        assert all(value.equal(before[name]) for name, value in network.state_dict().items())
        assert not images.requires_grad
        with torch.no_grad():
            expected = to_uint8(network.eval()(latents[4:], labels[4:]))
        assert torch.equal(images[4:], expected)

    def test_mode_is_restored_after_an_error(self) -> None:
        network = Generator(NETWORK).train()
        latents, _ = sample_inputs(range(2), NETWORK, 0)
        with pytest.raises(ValueError, match="labels"):
            generate(network, latents, torch.tensor([0, 9]), batch_size=2)
        assert network.training

    def test_pixels_are_rounded_and_clamped(self) -> None:
        values = torch.tensor([-2.0, -1.0, -0.999, 0.0, 1 / 127.5, 0.999, 1.0, 2.0])
        assert to_uint8(values).tolist() == [0, 0, 0, 128, 128, 255, 255, 255]
        every = torch.arange(256)
        assert torch.equal(to_uint8(every / 127.5 - 1), every.to(torch.uint8))
        assert to_uint8(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.uint8


class TestLoading:
    def test_what_a_checkpoint_says_is_loaded(self, trained_run: Path, trained: TrainedGenerator) -> None:
        assert trained.iteration == 4
        assert trained.class_names == ["n01440764", "n01443537", "n01484850"]
        assert trained.labels_in_use.tolist() == [0, 1, 2]
        assert trained.config.out == trained_run
        assert not trained.generator.training
        from_file = load_generator(find_checkpoint(trained_run), CPU)
        assert_same(from_file.generator.state_dict(), trained.generator.state_dict())

    def test_average_and_raw_weights_are_told_apart(self, trained_run: Path) -> None:
        state = load_checkpoint(find_checkpoint(trained_run))
        name = "blocks.0.conv1.weight"
        auto, ema, raw = (load_generator(trained_run, CPU, weights=kind) for kind in ("auto", "ema", "raw"))
        weights = [each.generator.get_parameter(name) for each in (auto, ema, raw)]
        assert torch.equal(weights[0], weights[1])
        assert torch.equal(weights[1], state["average"][f"module.{name}"])
        assert torch.equal(weights[2], state["generator"][name])
        assert not torch.equal(weights[2], weights[1])
        assert [each.averaged for each in (auto, ema, raw)] == [True, True, False]

    def test_without_an_average_raw_weights_are_taken(
        self, train_tiny: Callable[..., TrainingResult]
    ) -> None:
        run = train_tiny(iterations=1, ema_decay=0.0)
        loaded = load_generator(run.out, CPU)
        assert not loaded.averaged
        assert_same(loaded.generator.state_dict(), run.trainer.generator.state_dict())
        with pytest.raises(UserError, match="expected a run with a moving average for 'ema'"):
            load_generator(run.out, CPU, weights="ema")
