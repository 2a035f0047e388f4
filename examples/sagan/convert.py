"""Loaders of the released TensorFlow code's networks.

``variables`` maps TensorFlow names to arrays, without optimizer slots and counters. Names outside ``scope`` are
ignored. Missing or unknown variables and wrong shapes raise a ValueError that names them; the network then does
not change. It needs the size, classes and attention of the released one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from sagan_layers import convert

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from sagan.networks import Discriminator, Generator

_TENSORFLOW = convert.CODE_BASES["tensorflow"]


def load_tensorflow_generator(
    generator: Generator, variables: Mapping[str, ArrayLike | Tensor], scope: str = "model"
) -> None:
    """Load G's variables of the released code, ``g_snh0`` to ``g_snconv_last``."""
    there = _TENSORFLOW.generator
    assert there is not None
    blocks = [f"blocks.{index}" for index in range(len(generator.blocks))]
    attention = {int(name).bit_length() - 4: f"mixers.{name}" for name in generator.mixers}
    names = there.of(blocks, attention, _TENSORFLOW.separator)
    outputs = there.channels_last_outputs
    convert.load(generator, variables, _TENSORFLOW, prefix=scope, names=names, channels_last_outputs=outputs)


def load_tensorflow_discriminator(
    discriminator: Discriminator, variables: Mapping[str, ArrayLike | Tensor], scope: str = "model"
) -> None:
    """Load D's variables of the released code, ``d_optimized_block1`` to ``d_embedding``."""
    there = _TENSORFLOW.discriminator
    assert there is not None
    blocks = [f"blocks.{index}" for index in range(len(discriminator.blocks))]
    half = discriminator.config.resolution // 2
    attention = {(half // int(name)).bit_length() - 1: f"mixers.{name}" for name in discriminator.mixers}
    names = there.of([*blocks, "last_block"], attention, _TENSORFLOW.separator)
    convert.load(discriminator, variables, _TENSORFLOW, prefix=scope, names=names)
