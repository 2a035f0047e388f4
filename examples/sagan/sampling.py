"""Samples of a trained generator. Each has a number, and any number of processes generates the same ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sagan.errors import UserError, check_finite, check_is_new, is_in_use
from sagan.io import atomic_write, module_digest, read_json
from sagan.networks import Generator, NetworkConfig
from sagan.randomness import mixed_seed
from sagan.recipes import RunConfig, config_from_dict
from sagan.train.checkpoint import find_checkpoint, load_checkpoint
from sagan.train.state import RunState, average_of

SAMPLES = "samples.json"
Weights = Literal["auto", "ema", "raw"]
# Sample i of a seed has the random numbers of seed * _SEED_STRIDE + i, so sets of different seeds do not overlap.
_SEED_STRIDE = 0x9E3779B97F4A7C15
_REMEDY = "the generator has diverged: an earlier checkpoint, or --weights raw or ema, may be sound"


@dataclass(frozen=True)
class TrainedGenerator:
    """A generator from a checkpoint, in evaluation mode."""

    generator: Generator
    config: RunConfig
    iteration: int
    class_names: list[str]  # by label
    labels_in_use: Tensor  # int64 [K], the classes with images
    averaged: bool  # whether the weights are the moving average

    @property
    def description(self) -> str:
        """The iteration and the kind of weights, for messages."""
        return f"iteration {self.iteration}, {'averaged' if self.averaged else 'raw'} weights"

    def chosen_labels(self, classes: Sequence[str]) -> Tensor:
        """Return the labels of classes given by name or number; without any, the labels in use."""
        if not classes:
            return self.labels_in_use
        if not self.config.network.num_classes:
            raise UserError("classes: expected none, the run is unconditional")
        labels = []
        for text in classes:
            if self.class_names.count(text) > 1:
                same = [str(label) for label, name in enumerate(self.class_names) if name == text]
                raise UserError(f"classes: {text!r} is the name of several; give one of {', '.join(same)}")
            if text in self.class_names:  # names first: the digits' names are numbers
                labels.append(self.class_names.index(text))
            elif text.isdecimal() and int(text) < len(self.class_names):
                labels.append(int(text))
            else:
                raise UserError(
                    f"classes: expected a class's name or a label from 0 to {len(self.class_names) - 1}, "
                    f"got {text!r}"
                )
        return torch.tensor(labels)


def load_generator(path: Path, device: torch.device, *, weights: Weights = "auto") -> TrainedGenerator:
    """Load G from a checkpoint, or from the latest one of a run's folder.

    ``weights`` is "ema" for the moving average, "raw" for the current weights, "auto" for the average if there is one.
    """
    return generator_of(load_checkpoint(find_checkpoint(path)), path, device, weights=weights)


def generator_of(
    state: RunState, path: Path, device: torch.device, *, weights: Weights = "auto"
) -> TrainedGenerator:
    """Return the G of a checkpoint's contents, as :func:`load_generator` does; errors name ``path``."""
    config = config_from_dict(state["config"])
    average = None if weights == "raw" else average_of(state)
    averaged = average is not None
    if weights == "ema" and not averaged:
        raise UserError(f"weights: expected a run with a moving average for 'ema', {path} has none")
    generator = Generator(config.network)
    generator.load_state_dict(state["generator"] if average is None else average)
    if config.step.channels_last:  # the same bits as in training
        generator = generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return TrainedGenerator(
        generator.to(device).eval(),
        config,
        state["iteration"],
        state["class_names"],
        state["labels_in_use"],
        averaged,
    )


def sample_inputs(
    indices: Sequence[int],
    network: NetworkConfig,
    seed: int,
    labels_in_use: Tensor | None = None,
    *,
    truncation: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return latents [n, latent_dim] and int64 labels [n] of numbered samples; sample i depends only on (seed, i).

    Args:
        indices: numbers of the samples.
        network: gives the size of a latent.
        seed: seed of the whole set.
        labels_in_use: classes to cycle through; all by default.
        truncation: redraw coordinates beyond this until none is; the others do not change.
    """
    latents = torch.empty(len(indices), network.latent_dim)
    for row, index in enumerate(indices):
        rng = torch.Generator().manual_seed(mixed_seed(seed * _SEED_STRIDE + index))
        latent = torch.randn(network.latent_dim, generator=rng, out=latents[row])
        while truncation is not None and (beyond := latent.abs() > truncation).any():
            latent[beyond] = torch.randn(int(beyond.sum()), generator=rng)
    classes = torch.arange(network.num_classes or 1) if labels_in_use is None else labels_in_use
    return latents, classes[torch.tensor(list(indices), dtype=torch.int64) % len(classes)]


def claim_folder(out: Path, trained: TrainedGenerator, **options: object) -> None:
    """Record in a folder which set of samples it is for; raise :class:`UserError` if it holds anything else.

    Processes that share a set, and a process that starts again, may use the same folder. ``options`` are JSON values:
    everything else that the samples depend on.
    """
    weights = f"sha256:{module_digest(trained.generator)}"
    samples = {"iteration": trained.iteration, "weights": weights, **options}
    path = out / SAMPLES
    in_use = is_in_use(out, ignored_prefix=SAMPLES)  # checked first: another process may write the file now
    if path.is_file():
        try:
            found = dict(read_json(path))
        except (ValueError, TypeError):
            found = {}
        differing = [name for name, value in samples.items() if found.get(name) != value]
        if differing:
            raise UserError(
                f"out: {out} holds other samples, with another value of {', '.join(differing)}; choose another "
                "folder, or delete it"
            )
    elif in_use:
        check_is_new(out)
    else:
        out.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, shared=True) as file:
            file.write((json.dumps(samples, indent=2) + "\n").encode())


def generate(generator: nn.Module, latents: Tensor, labels: Tensor, *, batch_size: int) -> Tensor:
    """Return the images for latents [N, latent_dim] and labels [N], generated in evaluation mode.

    An unconditional G ignores the labels. The images are uint8 [N, 3, resolution, resolution], on the CPU.
    """
    batches = zip(latents.split(batch_size), labels.split(batch_size), strict=True)  # type: ignore[no-untyped-call]
    return torch.cat([_generate_batch(generator, *batch) for batch in batches])


def numbered_samples(
    generator: Generator,
    count: int,
    *,
    seed: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    labels_in_use: Tensor | None = None,
    truncation: float | None = None,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield (numbers, images, labels) of this rank's share of samples 0 to ``count - 1``.

    Rank r generates the blocks r, r + world_size, ... of ``batch_size`` samples. Every block is full, also the last
    one, so that the arithmetic of a sample does not depend on the count. Another ``batch_size`` may change the last
    bits of an image. :func:`sample_inputs` and :func:`generate` describe the other arguments and the images.
    """
    for start in range(rank * batch_size, count, world_size * batch_size):
        block = range(start, start + batch_size)
        latents, labels = sample_inputs(block, generator.config, seed, labels_in_use, truncation=truncation)
        images = _generate_batch(generator, latents, labels)
        wanted = min(batch_size, count - start)
        yield list(block[:wanted]), images[:wanted], labels[:wanted]


@torch.no_grad()
def _generate_batch(generator: nn.Module, latents: Tensor, labels: Tensor) -> Tensor:
    device = next(generator.parameters()).device
    classes = labels.to(device) if generator.config.num_classes else None  # type: ignore[union-attr]
    training = generator.training
    generator.eval()
    try:
        images = generator(latents.to(device), classes)
    finally:
        generator.train(training)
    return to_uint8(images)


def to_uint8(images: Tensor) -> Tensor:
    """Return images from -1 to 1 as uint8 from 0 to 255, rounded, on the CPU; NaN and infinities are an error."""
    check_finite("generated images", images, remedy=_REMEDY)
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu()
