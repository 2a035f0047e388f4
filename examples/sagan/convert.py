"""Weights of other code bases' networks: loaded into these networks, and saved from them.

A network needs the configuration that expresses the code base's: the shapes, and the ``settings`` of its table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sagan.errors import UserError, listed
from sagan.networks import Discriminator, Generator, NetworkConfig, discriminator_widths, generator_widths
from sagan_layers import convert
from sagan_layers.convert import CodeBase, NetworkNames

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Network = Generator | Discriminator


def load_network(
    network: Network,
    state: Mapping[str, ArrayLike | Tensor],
    source: str | CodeBase,
    prefix: str = "",
) -> None:
    """Load G's or D's weights of another code base; see :func:`sagan_layers.convert.load`.

    Raises:
        UserError: if the code base has no such network.
        ValueError: if entries are missing, left over or of the wrong shape (the network then does not change), or
            the code base is not known.
    """
    code_base = convert.code_base_of(source)
    check_only(type(network), network.config, code_base)
    convert.load(network, state, code_base, prefix=prefix, **layout(network, code_base))


def save_network(network: Network, target: str | CodeBase, prefix: str = "") -> dict[str, Tensor]:
    """Return G's or D's weights under the names of another code base; see :func:`sagan_layers.convert.save`.

    Raises:
        UserError: if the code base has no such network.
        ValueError: if the code base is not known.
    """
    code_base = convert.code_base_of(target)
    _check_expressible(network, code_base)
    return convert.save(network, code_base, prefix=prefix, **layout(network, code_base))


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


def layout(network: Network, code_base: CodeBase) -> dict[str, Any]:
    """Return how a code base names a network's modules, as arguments of ``convert.load``."""
    there = names_of(type(network), code_base)
    blocks = [f"blocks.{index}" for index in range(len(network.blocks))]
    if isinstance(network, Generator):
        sizes = [size for size, _ in generator_widths(network.config)[1:]]
    else:
        sizes = [size for size, _ in discriminator_widths(network.config)]
        blocks.append("last_block")
    attention = {sizes.index(int(size)): f"mixers.{size}" for size in network.mixers}
    return {
        "names": there.of(blocks, attention, code_base.separator),
        "channels_last_outputs": there.channels_last_outputs,
    }


def names_of(kind: type[Network], code_base: CodeBase) -> NetworkNames:
    """Return the names of a code base's generator or discriminator."""
    names = code_base.generator if kind is Generator else code_base.discriminator
    if names is None:
        raise UserError(
            f"{code_base.title}: expected a code base whose networks these can express, got its blocks only"
        )
    return names


def check_only(kind: type[Network], config: NetworkConfig, code_base: CodeBase) -> None:
    """Raise :class:`UserError` if a code base's network with these names and shapes is another one."""
    for name, values in names_of(kind, code_base).only.items():
        if (value := getattr(config, name)) not in values:
            raise UserError(
                f"the {kind.__name__.lower()} of {code_base.title} cannot be expressed: expected {name} "
                f"{' or '.join(map(str, values))}, got {value}"
            )


def settings_of(code_base: CodeBase, resolution: int, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a code base's settings, with others in place of some; a mapping has a value for each resolution."""
    settings = {}
    for name, value in {**code_base.settings, **overrides}.items():
        if not isinstance(value, Mapping):
            settings[name] = value
        elif resolution in value:
            settings[name] = value[resolution]
    return settings


def conditions_of(code_base: CodeBase) -> list[str]:
    """Return the kinds of class conditions that a code base's generator may have."""
    rows, names = code_base.rows, names_of(Generator, code_base).others(1)
    conditions = {
        "table": "class_batch_norm" in rows,
        "one_hot": "vector_batch_norm" in rows and code_base.settings.get("condition") == "one_hot",
        "embedding": "vector_batch_norm" in rows and "embedding" in names,
    }
    return [condition for condition, is_known in conditions.items() if is_known]


def _check_expressible(network: Network, code_base: CodeBase) -> None:
    """Raise :class:`UserError` if a code base has no such network."""
    config, kind = network.config, type(network).__name__.lower()
    check_only(type(network), config, code_base)
    usual = {"mixer": "attention", "attention_bias": False, "upsampling": "nearest"}
    settings = {**usual, **settings_of(code_base, config.resolution, {})}
    ours = ["mixer", "attention_bias"]
    ours += ["upsampling"] if kind == "generator" else ["d_relu_before_blocks", "d_hidden_channels"]
    known = {name: [settings[name]] for name in ours if name in settings}
    if kind == "generator" and config.num_classes:
        known["condition"] = conditions_of(code_base)
    for name, values in known.items():
        if (value := getattr(config, name)) not in values:
            expected = " or ".join(map(str, values))
            raise UserError(
                f"{code_base.title} cannot express this {kind}: expected {name} {expected}, got {value}"
            )
    names = layout(network, code_base)["names"]
    if len({names[f"mixers.{size}"] for size in network.mixers}) < len(network.mixers):
        raise UserError(
            f"{code_base.title} cannot express this {kind}: expected attention at one resolution, got "
            f"{listed(list(network.mixers))}"
        )
