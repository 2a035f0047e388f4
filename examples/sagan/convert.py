"""Loaders of the released TensorFlow code's networks.

``variables`` maps TensorFlow names to arrays, without optimizer slots and counters. Names outside ``scope`` are
ignored. Missing or unknown variables and wrong shapes raise a ValueError that names all of them; the network then does
not change. It needs the size, classes and attention of the released one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from sagan.networks import DownBlock, UpBlock
from sagan_layers.convert import TensorFlowLoader

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from sagan.networks import Discriminator, Generator


def load_tensorflow_generator(
    generator: Generator, variables: Mapping[str, ArrayLike | Tensor], scope: str = "model"
) -> None:
    """Load G's variables of the released code, ``g_snh0`` to ``g_snconv_last``."""
    loader = TensorFlowLoader(variables, scope)
    _, height, width = generator.first_shape
    loader.add(generator.linear, "g_snh0", spatial=(height, width))
    for number, block in enumerate(generator.blocks, 1):
        assert isinstance(block, UpBlock)
        loader.add(block.norm1, f"g_block{number}/cbn_0")
        loader.add(block.conv1, f"g_block{number}/snconv1")
        loader.add(block.norm2, f"g_block{number}/cbn_1")
        loader.add(block.conv2, f"g_block{number}/snconv2")
        loader.add(block.shortcut, f"g_block{number}/snconv3")
    for number, mixer in enumerate(generator.mixers.values()):
        loader.add(mixer, _non_local("g", number))
    loader.add(generator.last_norm, "g_bn")
    loader.add(generator.last_conv, "g_snconv_last")
    loader.finish()


def load_tensorflow_discriminator(
    discriminator: Discriminator, variables: Mapping[str, ArrayLike | Tensor], scope: str = "model"
) -> None:
    """Load D's variables of the released code, ``d_optimized_block1`` to ``d_embedding``."""
    loader = TensorFlowLoader(variables, scope)
    for number, block in enumerate([*discriminator.blocks, discriminator.last_block], 1):
        name = "d_optimized_block1" if number == 1 else f"d_block{number}"
        loader.add(block.conv1, f"{name}/sn_conv1")
        loader.add(block.conv2, f"{name}/sn_conv2")
        if isinstance(block, DownBlock):
            loader.add(block.shortcut, f"{name}/sn_conv3")
    for number, mixer in enumerate(discriminator.mixers.values()):
        loader.add(mixer, _non_local("d", number))
    loader.add(discriminator.head, "")
    loader.finish()


def _non_local(network: str, number: int) -> str:
    """Return the scope of an attention layer: TensorFlow numbers all but the first."""
    return f"{network}_non_local" + (f"_{number}" if number else "")
