"""Images from a trained generator, numbered so that any number of processes makes the same ones."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sagan.errors import UserError, check_is_new, is_taken
from sagan.io import module_digest
from sagan.networks import Generator, NetworkConfig
from sagan.recipes import RunConfig, config_from_dict
from sagan.train.checkpoint import find_checkpoint, load_checkpoint

SAMPLES = "samples.json"
Weights = Literal["auto", "ema", "raw"]


@dataclass(frozen=True)
class TrainedGenerator:
    """A generator from a checkpoint, in evaluation mode.

    Attributes:
        generator: G.
        config: the run that it comes from.
        iteration: how long it was trained.
        class_names: by label.
        labels_in_use: int64 [K], the classes that had images.
        averaged: whether the weights are the moving average.
    """

    generator: Generator
    config: RunConfig
    iteration: int
    class_names: list[str]
    labels_in_use: Tensor
    averaged: bool

    @property
    def description(self) -> str:
        """The iteration and which weights these are."""
        return f"iteration {self.iteration}, {'averaged' if self.averaged else 'raw'} weights"

    def class_name(self, label: int) -> str | None:
        """Return the name of a class; None if the run is unconditional."""
        return self.class_names[label] if self.config.network.num_classes else None

    def chosen_labels(self, classes: Sequence[str]) -> Tensor:
        """Return the labels of classes given by name or by number; of none given, the labels in use."""
        if not classes:
            return self.labels_in_use
        if not self.config.network.num_classes:
            raise UserError("classes: expected none, the run is unconditional")
        labels = []
        for text in classes:
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

    Args:
        path: a checkpoint or a run's folder.
        device: where to put it.
        weights: "ema" for the moving average, "raw" for the weights themselves, "auto" for the average where
            there is one.

    Raises:
        CheckpointError: if there is no usable checkpoint.
        UserError: if the average is asked for and there is none.
    """
    state = load_checkpoint(find_checkpoint(path))
    config = config_from_dict(state["config"])
    averaged = state["average"] is not None and weights != "raw"
    if weights == "ema" and not averaged:
        raise UserError(f"weights: expected a run with a moving average for 'ema', {path} has none")
    generator = Generator(config.network)
    if averaged:
        average = {
            name.removeprefix("module."): tensor
            for name, tensor in state["average"].items()
            if name != "n_averaged"
        }
        generator.load_state_dict(average)
    else:
        generator.load_state_dict(state["generator"])
    if config.step.channels_last:  # as in training, to the bit
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
    """Return latents and labels of numbered samples; sample i depends on (seed, i) alone.

    Args:
        indices: numbers of the samples.
        network: gives the size of a latent.
        seed: of the whole set.
        labels_in_use: classes to go through in turn; all by default.
        truncation: draw coordinates beyond this anew until there are none; the others stay as they are without.

    Shape:
        - latents: [len(indices), latent_dim].
        - labels: [len(indices)], int64.
    """
    latents = torch.empty(len(indices), network.latent_dim)
    for row, index in enumerate(indices):
        world = torch.Generator().manual_seed(_mix(seed, index))
        torch.randn(network.latent_dim, generator=world, out=latents[row])
        if truncation is not None:
            _draw_anew_beyond(truncation, latents[row], world)
    classes = torch.arange(network.num_classes or 1) if labels_in_use is None else labels_in_use
    return latents, classes[torch.tensor(list(indices), dtype=torch.int64) % len(classes)]


def claim_folder(out: Path, trained: TrainedGenerator, **options: object) -> None:
    """Write down which set of samples a folder is to hold, so that two sets never mix.

    The processes that share a set, and a process that is started again, find their own.

    Args:
        out: the folder; made if missing.
        trained: the generator.
        options: whatever else the samples depend on; plain values.

    Raises:
        UserError: the folder holds other samples, or anything else.
    """
    weights = f"sha256:{module_digest(trained.generator)}"
    samples = {"iteration": trained.iteration, "weights": weights, **options}
    path = out / SAMPLES
    taken = is_taken(out, besides=SAMPLES)  # before the file, which another process may be writing
    if path.is_file():
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            found = {}
        differing = [name for name, value in samples.items() if found.get(name) != value]
        if differing:
            raise UserError(
                f"out: {out} holds other samples, with another value of {', '.join(differing)}; choose another "
                "folder, or delete it"
            )
    elif taken:
        check_is_new(out)
    else:
        out.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{SAMPLES}.{os.getpid()}")
        temporary.write_text(json.dumps(samples, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)


def generate(generator: nn.Module, latents: Tensor, labels: Tensor, *, batch_size: int) -> Tensor:
    """Return the images of these latents and labels, in evaluation mode.

    Args:
        generator: G; its mode is as before afterwards.
        latents: [N, latent_dim], on any device.
        labels: [N]; not looked at by a G without classes.
        batch_size: how many are made at once.

    Shape:
        - Output: uint8 [N, 3, resolution, resolution], on the CPU.
    """
    parts = [
        images
        for start in range(0, len(latents), batch_size)
        for images in [
            _generate_block(
                generator,
                latents[start : start + batch_size],
                labels[start : start + batch_size],
            )
        ]
    ]
    return torch.cat(parts)


def numbered_samples(
    trained: TrainedGenerator,
    count: int,
    *,
    seed: int,
    batch_size: int,
    rank: int = 0,
    num_processes: int = 1,
    labels_in_use: Tensor | None = None,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield this process's share of samples 0 to count - 1 of a trained generator; see :func:`numbered_blocks`.

    Args:
        trained: the generator.
        count, seed, batch_size, rank, num_processes: see :func:`numbered_blocks`.
        labels_in_use: classes to go through in turn; by default those that had images in training.
    """
    return numbered_blocks(
        trained.generator,
        count,
        seed=seed,
        batch_size=batch_size,
        rank=rank,
        num_processes=num_processes,
        labels_in_use=trained.labels_in_use if labels_in_use is None else labels_in_use,
    )


def numbered_blocks(
    generator: Generator,
    count: int,
    *,
    seed: int,
    batch_size: int,
    rank: int = 0,
    num_processes: int = 1,
    labels_in_use: Tensor | None = None,
    truncation: float | None = None,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield this process's share of samples 0 to count - 1.

    The set is cut into blocks of ``batch_size``, and process r makes blocks r, r + num_processes, ... Every
    block is made full, the last one too, so that a sample's arithmetic does not depend on how many are asked
    for.

    Args:
        generator: G; it is put into evaluation mode for each block.
        count: samples in the whole set.
        seed: of the whole set.
        batch_size: samples in a block; another size may change the last bits of an image.
        rank: this process, from 0.
        num_processes: how many processes share the work.
        labels_in_use: classes to go through in turn; all by default.
        truncation: see :func:`sample_inputs`.

    Yields:
        (numbers, uint8 images [n, 3, resolution, resolution], labels [n]).
    """
    for start in range(rank * batch_size, count, num_processes * batch_size):
        block = range(start, start + batch_size)
        latents, labels = sample_inputs(block, generator.config, seed, labels_in_use, truncation=truncation)
        images = _generate_block(generator, latents, labels)
        wanted = min(batch_size, count - start)
        yield list(block[:wanted]), images[:wanted], labels[:wanted]


@torch.no_grad()
def _generate_block(generator: nn.Module, latents: Tensor, labels: Tensor) -> Tensor:
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
    """Return images from -1 to 1 as uint8 from 0 to 255, rounded, on the CPU."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def _draw_anew_beyond(threshold: float, latent: Tensor, world: torch.Generator) -> None:
    while (beyond := latent.abs() > threshold).any():
        latent[beyond] = torch.randn(int(beyond.sum()), generator=world)


def _mix(seed: int, index: int) -> int:
    """Spread (seed, index) over 63 bits, so that neighbouring samples have unrelated generators."""
    mixed = (seed * 0x9E3779B97F4A7C15 + index + 1) & 0xFFFFFFFFFFFFFFFF
    for multiplier in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        mixed = ((mixed ^ (mixed >> 30)) * multiplier) & 0xFFFFFFFFFFFFFFFF
    return (mixed ^ (mixed >> 31)) >> 1
