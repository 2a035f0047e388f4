"""Random numbers that depend on what they are for, not on what was drawn before.

So a resumed run draws what an uninterrupted one would, on any number of processes, with no state to keep.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFFFFFFFFFF


def mixed_seed(*numbers: int) -> int:
    """Spread integers from 0 over 63 bits, so that neighbours have unrelated generators."""
    state = 0
    for number in numbers:
        state = (state * 0x9E3779B97F4A7C15 + number + 1) & _MASK
        for multiplier in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
            state = ((state ^ (state >> 30)) * multiplier) & _MASK
        state ^= state >> 31
    return state >> 1


def training_noise(
    seed: int, iteration: int, update: int, *, count: int, latent_dim: int, labels_in_use: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the latents and labels of one update's generated images, those of the whole global batch.

    Every process draws them all and takes its share: so 1, 2 or 4 processes train on the same noise.

    Args:
        seed: of the run.
        iteration: from 0.
        update: which one of the iteration's, from 0.
        count: images in the global batch.
        latent_dim: size of a latent.
        labels_in_use: int64 [K], the classes to draw from.

    Shape:
        - latents: float32 [count, latent_dim], on the CPU, so that devices do not change them.
        - labels: int64 [count].
    """
    generator = torch.Generator().manual_seed(mixed_seed(seed, iteration, update))
    latents = torch.randn(count, latent_dim, generator=generator)
    return latents, labels_in_use[torch.randint(len(labels_in_use), (count,), generator=generator)]
