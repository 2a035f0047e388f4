"""Weights of other code bases' networks: loaded into these networks, and saved from them.

A network needs the configuration that expresses the code base's: the shapes, and the ``settings`` of its table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sagan.errors import UserError
from sagan.networks import Generator
from sagan_layers import convert
from sagan_layers.convert import CodeBase

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from sagan.networks import Discriminator


def load_network(
    network: Generator | Discriminator,
    state: Mapping[str, ArrayLike | Tensor],
    source: str | CodeBase,
    prefix: str = "",
) -> None:
    """Load G's or D's weights of another code base; see :func:`sagan_layers.convert.load`.

    Raises:
        UserError: if the code base has blocks only.
        ValueError: if entries are missing, left over or of the wrong shape; the network then does not change.
    """
    convert.load(network, state, source, prefix=prefix, **_layout(network, source))


def save_network(
    network: Generator | Discriminator, target: str | CodeBase, prefix: str = ""
) -> dict[str, Tensor]:
    """Return G's or D's weights under the names of another code base; see :func:`sagan_layers.convert.save`.

    Raises:
        UserError: if the code base has blocks only.
    """
    return convert.save(network, target, prefix=prefix, **_layout(network, target))


def load_tensorflow_generator(
    generator: Generator, variables: Mapping[str, ArrayLike | Tensor], scope: str = "model"
) -> None:
    """Load G's variables of the released code, ``g_snh0`` to ``g_snconv_last``."""
    load_network(generator, variables, "tensorflow", scope)


def load_tensorflow_discriminator(
    discriminator: Discriminator, variables: Mapping[str, ArrayLike | Tensor], scope: str = "model"
) -> None:
    """Load D's variables of the released code, ``d_optimized_block1`` to ``d_embedding``."""
    load_network(discriminator, variables, "tensorflow", scope)


def _layout(network: Generator | Discriminator, code_base: str | CodeBase) -> dict[str, Any]:
    """Return how a code base names a network's modules, as arguments of ``convert.load``."""
    table = code_base if isinstance(code_base, CodeBase) else convert.CODE_BASES.get(code_base)
    if table is None:  # load and save say what they expect
        return {}
    blocks = [f"blocks.{index}" for index in range(len(network.blocks))]
    if isinstance(network, Generator):
        there = table.generator
        after = {name: int(name).bit_length() - 4 for name in network.mixers}
    else:
        there = table.discriminator
        half = network.config.resolution // 2
        after = {name: (half // int(name)).bit_length() - 1 for name in network.mixers}
        blocks.append("last_block")
    if there is None:
        raise UserError(
            f"{table.title}: expected a code base whose networks these can express, got its blocks only"
        )
    attention = {index: f"mixers.{name}" for name, index in after.items()}
    return {
        "names": there.of(blocks, attention, table.separator),
        "channels_last_outputs": there.channels_last_outputs,
    }
