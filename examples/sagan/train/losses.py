"""The losses of D and G. A new one is a function here, a name in ``LossName`` and an entry of ``LOSSES``.

A loss calls the discriminator itself, so that it may penalise gradients, augment images or weigh logits::

    loss(discriminator, real, fake, real_labels, fake_labels) -> (loss, measurements)  # of D
    loss(discriminator, fake, labels) -> (loss, measurements)                          # of G

Images are [N, 3, R, R] from -1 to 1, labels [N] or None. D's loss gets D's parameters and ``fake`` without a graph; G's
loss gets D with constant parameters. The first result is the scalar to minimise, logged as d_loss or g_loss; the
measurements are scalars to log as well, by name. Draw random numbers from torch's global generators: checkpoints hold
their states. All ranks start from one seed, so they draw the same numbers unless the loss mixes in the rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sagan_layers import hinge_discriminator_loss, hinge_generator_loss, softplus_discriminator_loss

Discriminator = Callable[..., Tensor]
Labels = Tensor | None
Result = tuple[Tensor, dict[str, Tensor]]
DiscriminatorLoss = Callable[[Discriminator, Tensor, Tensor, Labels, Labels], Result]
GeneratorLoss = Callable[[Discriminator, Tensor, Labels], Result]


class Losses(NamedTuple):
    """The losses of a run."""

    discriminator: DiscriminatorLoss
    generator: GeneratorLoss


def hinge(
    discriminator: Discriminator, real: Tensor, fake: Tensor, real_labels: Labels, fake_labels: Labels
) -> Result:
    """The paper's loss of D: mean(max(0, 1 - D(x))) + mean(max(0, 1 + D(G(z))))."""
    logits = logits_in_one_batch(discriminator, real, fake, real_labels, fake_labels)
    return hinge_discriminator_loss(**logits), means(logits)


def softplus(
    discriminator: Discriminator, real: Tensor, fake: Tensor, real_labels: Labels, fake_labels: Labels
) -> Result:
    """The cross-entropy loss of D: mean(softplus(-D(x))) + mean(softplus(D(G(z))))."""
    logits = logits_in_one_batch(discriminator, real, fake, real_labels, fake_labels)
    return softplus_discriminator_loss(**logits), means(logits)


def negative_logits(discriminator: Discriminator, fake: Tensor, labels: Labels) -> Result:
    """The loss of G with either: -mean(D(G(z)))."""
    return hinge_generator_loss(fake_logits=discriminator(fake, labels)), {}


LossName = Literal["hinge", "softplus"]
LOSSES: dict[LossName, Losses] = {
    "hinge": Losses(hinge, negative_logits),
    "softplus": Losses(softplus, negative_logits),
}


def logits_in_one_batch(
    discriminator: Discriminator, real: Tensor, fake: Tensor, real_labels: Labels, fake_labels: Labels
) -> dict[str, Tensor]:
    """Return "real_logits" and "fake_logits" from one call of D, which is faster than two."""
    labels = None if real_labels is None or fake_labels is None else torch.cat([real_labels, fake_labels])
    logits = discriminator(torch.cat([real, fake]), labels)
    real_logits, fake_logits = torch.split(logits, [len(real), len(fake)])
    return {"real_logits": real_logits, "fake_logits": fake_logits}


def means(logits: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the mean of each tensor in float32, to log."""
    return {name: tensor.float().mean() for name, tensor in logits.items()}
