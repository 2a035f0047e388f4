"""Sheets of samples: from one latent and one class to another, and with latents truncated more and more."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sagan.networks import Generator
from sagan.report.figures import class_labels
from sagan.sampling import TrainedGenerator, generate, sample_inputs
from sagan_layers import ConditionalBatchNorm2d


@dataclass(frozen=True)
class Sheet:
    """Images to draw in rows."""

    images: Tensor  # uint8 [rows * columns, 3, R, R]
    row_names: list[str] | None  # None for an unconditional run


def interpolation_sheet(
    trained: TrainedGenerator,
    labels: Tensor,
    *,
    rows: int,
    columns: int,
    class_steps: int,
    seed: int,
    batch_size: int,
) -> Sheet:
    """Return rows that lead from the latents of one sample to those of another, by :func:`slerp`.

    With several classes all rows have the same ends, those of samples 0 and 1. There is a row for each class, and
    between it and the next ``class_steps`` rows of :func:`mixed_classes`. With one class or none there are ``rows``
    rows; row r has the ends 2r and 2r + 1.
    """
    network = trained.config.network
    if len(labels) < 2 or not network.num_classes:
        ends, _ = sample_inputs(range(2 * rows), network, seed)
        latents = torch.cat([slerp(start, end, columns) for start, end in ends.view(rows, 2, -1)])
        images = generate(trained.generator, latents, labels[:1].expand(len(latents)), batch_size=batch_size)
        return Sheet(images, _names(trained, labels[:1].tolist() * rows))
    ends, _ = sample_inputs(range(2), network, seed)
    latents = slerp(ends[0], ends[1], columns)
    parts, names = [], []
    for start, end in itertools.pairwise(labels):
        for step in range(class_steps + 1):
            share = step / (class_steps + 1)
            mixture = torch.zeros(network.num_classes)
            mixture[start] += 1 - share
            mixture[end] += share
            with mixed_classes(trained.generator, mixture) as label:
                parts.append(
                    generate(trained.generator, latents, label.expand(columns), batch_size=batch_size)
                )
            names.append(f"{1 - share:.0%} : {share:.0%}")
    parts.append(generate(trained.generator, latents, labels[-1:].expand(columns), batch_size=batch_size))
    of_classes = class_labels(trained.class_names, labels.tolist())
    names[:: class_steps + 1] = of_classes[:-1]
    return Sheet(torch.cat(parts), [*names, of_classes[-1]])


def truncation_sheet(
    trained: TrainedGenerator,
    labels: Tensor,
    truncations: Sequence[float | None],
    *,
    columns: int,
    seed: int,
    batch_size: int,
) -> Sheet:
    """Return a row of the same samples for each class and each threshold of :func:`sagan.sampling.sample_inputs`."""
    network = trained.config.network
    parts = []
    for label in labels.split(1) if network.num_classes else [None]:  # type: ignore[no-untyped-call]
        for truncation in truncations:
            inputs = sample_inputs(range(columns), network, seed, label, truncation=truncation)
            parts.append(generate(trained.generator, *inputs, batch_size=batch_size))
    words = ["not truncated" if each is None else f"truncated at {each:g}" for each in truncations]
    if not network.num_classes:
        return Sheet(torch.cat(parts), words)
    names = class_labels(trained.class_names, labels.tolist())
    return Sheet(torch.cat(parts), [f"{name}, {word}" for name in names for word in words])


def slerp(start: Tensor, end: Tensor, count: int) -> Tensor:
    """Return ``count`` vectors [count, d] from one to another on a great circle, at equal angles.

    Normal latents have nearly the same length; the middle of a straight line between two of them is shorter, and G
    was never trained there.
    """
    shares = torch.linspace(0, 1, count, dtype=torch.float64).unsqueeze(1)
    first, last = start.double(), end.double()
    angle = torch.arccos(nn.functional.cosine_similarity(first, last, dim=0).clamp(-1, 1))
    if torch.sin(angle) < 1e-6:  # the same direction or the opposite one, as with one latent
        path = first + shares * (last - first)
    else:
        path = (torch.sin((1 - shares) * angle) * first + torch.sin(shares * angle) * last) / torch.sin(angle)
    return path.to(start.dtype)


@contextlib.contextmanager
def mixed_classes(generator: Generator, mixture: Tensor) -> Iterator[Tensor]:
    """Yield a label that means a mixture of G's classes for a ``with`` block, with weights [num_classes].

    Gain and bias of each conditional batch norm are the weighted means of the classes'. Where they are maps of one-hot
    labels or of a class embedding, which are linear, it is the labels or the embedding that are mixed.
    """
    norms = [module for module in generator.modules() if isinstance(module, ConditionalBatchNorm2d)]
    tables = [table for norm in norms if norm.num_classes is not None for table in (norm.weight, norm.bias)]
    if generator.embedding is not None:
        tables.append(generator.embedding.weight)
    weights = mixture.to(next(generator.parameters()))
    before = [table.data for table in tables]

    def mix(_: nn.Module, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, condition = inputs
        return x, torch.cat((weights.expand(len(x), -1), condition[:, len(weights) :]), dim=1)

    with contextlib.ExitStack() as stack:
        if generator.config.condition == "one_hot":
            for norm in norms:
                if norm.condition_features is not None:
                    stack.enter_context(norm.register_forward_pre_hook(mix))
        try:
            for table in tables:  # class 0 stands for the mixture
                rows = table.data.clone()
                rows[0] = weights @ table.data
                table.data = rows
            yield torch.zeros(1, dtype=torch.int64)
        finally:
            for table, data in zip(tables, before, strict=True):
                table.data = data


def _names(trained: TrainedGenerator, labels: Sequence[int]) -> list[str] | None:
    return class_labels(trained.class_names, labels) if trained.config.network.num_classes else None
