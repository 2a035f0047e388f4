"""Random numbers that depend on their purpose, not on earlier draws.

So a resumed run draws what an uninterrupted one would, on any number of processes, with no state to save.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Words = npt.NDArray[np.uint64]
_MASK = 0xFFFFFFFFFFFFFFFF
_GOLDEN_RATIO = 0x9E3779B97F4A7C15


def mixed_seed(*numbers: int) -> int:
    """Return a seed of 63 bits for some integers from 0; neighbours get unrelated seeds."""
    state = 0
    for number in numbers:
        state = _scramble((state * _GOLDEN_RATIO + number + 1) & _MASK, second_shift=30)
    return state >> 1


def splitmix64(states: Words) -> Words:
    """Return the SplitMix64 output for each state: a bijection of 64-bit integers whose bits look random."""
    scrambled: Words = _scramble(states + np.uint64(_GOLDEN_RATIO), second_shift=27)
    return scrambled


def _scramble(bits: Any, second_shift: int) -> Any:  # an int or Words
    # Two shifts are in use. Another one would change the noise or the flips of runs that exist.
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    bits = ((bits ^ (bits >> second_shift)) * 0x94D049BB133111EB) & _MASK
    return bits ^ (bits >> 31)


def training_noise(
    seed: int, iteration: int, update: int, *, count: int, latent_dim: int, labels_in_use: Tensor
) -> tuple[Tensor, Tensor]:
    """Return float32 latents [count, latent_dim] and int64 labels [count] for one update of an iteration.

    Every rank draws the noise of the whole global batch and uses its shard, so any number of them trains on the same
    noise. It is drawn on the CPU, so every device gets the same numbers. Labels are drawn from ``labels_in_use``.
    """
    generator = torch.Generator().manual_seed(mixed_seed(seed, iteration, update))
    latents = torch.randn(count, latent_dim, generator=generator)
    return latents, labels_in_use[torch.randint(len(labels_in_use), (count,), generator=generator)]
