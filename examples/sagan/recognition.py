"""Networks of other code bases, recognised by their entries.

Names tell the blocks, the places of attention and the kinds of layers. Under our names, shapes then tell the sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, chain, combinations
from typing import Any

import torch

from sagan.convert import Network, check_only, conditions_of, layout, names_of, settings_of
from sagan.errors import UserError
from sagan.networks import (
    RESOLUTIONS,
    Discriminator,
    Generator,
    NetworkConfig,
    discriminator_widths,
    generator_widths,
)
from sagan.weight_files import State, split_networks
from sagan_layers import convert
from sagan_layers.convert import CodeBase, Comparison

Fields = dict[str, Any]  # of NetworkConfig
_MOST_LAST_BLOCKS = 3
_NAMED = 5


@dataclass(frozen=True)
class Converted:
    """Networks of another code base, as they would be here. All entries have their places.

    Attributes:
        config: the networks' configuration.
        told: the fields of it that names and shapes told.
        code_base: their code base, for entries that it has prepared.
        generator: G's entries.
        discriminator: D's, or nothing.
        average: those of the moving average of G, or nothing.
    """

    config: NetworkConfig
    told: frozenset[str]
    code_base: CodeBase
    generator: State
    discriminator: State
    average: State


def read_networks(
    code_base: CodeBase, weights: State, d_weights: State, ema_weights: State, **overrides: Any
) -> Converted:
    """Work out the configuration of a code base's networks, and check that every entry has its place.

    Args:
        code_base: the code base.
        weights: G's entries; with a prefix for each network also D's and the average's.
        d_weights: D's entries, or nothing.
        ema_weights: entries of the moving average of G, or nothing.
        overrides: fields of ``NetworkConfig`` that shapes do not tell, in place of the code base's settings.

    Raises:
        UserError: if the networks cannot be expressed, or entries are missing, left over or misshapen; some are
            named, for the nearest structure.
    """
    generator, discriminator, average = (
        code_base.prepare(state) for state in split_networks(weights, d_weights, ema_weights, code_base)
    )
    if not generator:
        raise UserError("weights: expected those of a generator, got none")
    code_base = replace(code_base, prepare=dict)
    g_entries = _Entries(Generator, code_base, generator)
    if not g_entries.are_generator() and _Entries(Discriminator, code_base, generator).have("0.conv1"):
        raise UserError("weights: expected those of a generator, got a discriminator's, which are d_weights")
    told = _read_generator(g_entries, overrides)
    if not discriminator:  # G's file may hold both networks, under names of their own
        left_over = g_entries.compared(NetworkConfig(**{"d_attention": (), **told})).left_over
        if _Entries(Discriminator, code_base, dict.fromkeys(left_over)).have("0.conv1"):
            discriminator = {name: generator.pop(name) for name in left_over}
    d_entries = _Entries(Discriminator, code_base, discriminator)
    if d_entries.are_generator():
        raise UserError("d_weights: expected those of a discriminator, got a generator's")
    settings = settings_of(code_base, told["resolution"], overrides)
    if discriminator:
        told |= _read_discriminator(d_entries, told, overrides)
    else:
        half = told["resolution"] // 2
        settings.setdefault("d_attention", tuple(size for size in told["g_attention"] if size <= half))
    config = _by_rule(NetworkConfig(**{**settings, **told}))
    for entries in (g_entries, d_entries, _Entries(Generator, code_base, average)):
        if entries.state:
            if problems := entries.compared(config).problems(_NAMED):
                of_average = "the moving average: " if entries.state is average else ""
                raise UserError(of_average + entries.unfitting(problems))
            check_only(entries.kind, config, code_base)
    return Converted(config, frozenset(told), code_base, generator, discriminator, average)


@dataclass(frozen=True)
class _Entries:
    """The entries of one network, to be compared with networks of ours."""

    kind: type[Network]
    code_base: CodeBase
    state: State

    def compared(self, config: NetworkConfig) -> Comparison:
        """Compare with our network of a configuration."""
        with torch.device("meta"):
            network = self.kind(config)
        try:
            return convert.compare(network, self.state, self.code_base, **layout(network, self.code_base))
        except TypeError as error:  # an entry that is no array of numbers
            raise UserError(str(error)) from error

    def unfitting(self, problems: str) -> str:
        """Return a message that names what does not fit."""
        kind = self.kind.__name__.lower()
        return f"the entries are no {kind} of {self.code_base.title} that is known; {problems}"

    def names(self, count: int, attended: Iterable[int]) -> dict[str, str]:
        """Return the code base's names of the modules of blocks "0", "1", ...; "attention 0" follows block "0"."""
        attention = {block: f"attention {block}" for block in attended}
        there = names_of(self.kind, self.code_base)
        return there.of([str(block) for block in range(count)], attention, self.code_base.separator)

    def have(self, part: str, count: int = 1, attended: Iterable[int] = ()) -> bool:
        """Return whether a part of a block, such as "0.conv1", is among them."""
        start = self.names(count, attended)[part] + self.code_base.separator
        return any(name.startswith(start) for name in self.state)

    def are_generator(self) -> bool:
        """Return whether a norm in the first block is among them, which no discriminator has."""
        return _Entries(Generator, self.code_base, self.state).have("0.norm1")

    def structures(self, counts: Mapping[int, int]) -> list[tuple[int, tuple[int, ...]]]:
        """Return the numbers of blocks, and the blocks before attention, whose names fit best.

        These are several if names do not tell where attention is.

        Args:
            counts: the possible numbers of blocks, each with the number of blocks that attention may follow.
        """
        separator = self.code_base.separator
        query = str(self.code_base.rows.get("attention", {}).get("query", "query"))
        modules = [
            set(accumulate(name.split(separator), f"{{}}{separator}{{}}".format)) for name in self.state
        ]
        present = {""}.union(*modules)
        costs = {}
        for count, most in counts.items():
            for attended in chain.from_iterable(combinations(range(most), n) for n in range(most + 1)):
                names = [
                    self.code_base.join(theirs, query if ours.startswith("attention") else "")
                    for ours, theirs in self.names(count, attended).items()
                ]
                absent = len(names) - len(present.intersection(names))  # of two with one name, one is absent
                costs[count, attended] = absent + sum(each.isdisjoint(names) for each in modules)
        return [structure for structure, cost in costs.items() if cost == min(costs.values())]


def _read_generator(entries: _Entries, overrides: Fields) -> Fields:
    """Return the fields of the configuration that G's entries tell."""
    blocks = [(resolution // 8).bit_length() for resolution in RESOLUTIONS]
    structures = [
        {"resolution": 4 * 2**count, "g_attention": tuple(8 * 2**block for block in attended)}
        for count, attended in entries.structures({count: count for count in blocks})
    ]
    conditions = [
        {"condition": "table", "num_classes": 0},
        *({"condition": condition, "num_classes": 2} for condition in conditions_of(entries.code_base)),
    ]
    found = _nearest(entries, structures, conditions, {"num_classes": 0, "d_attention": ()})
    settings = settings_of(entries.code_base, found[0]["resolution"], overrides)
    return _with_wanted_attention(found, "g_attention", settings, overrides)


def _read_discriminator(entries: _Entries, told: Fields, overrides: Fields) -> Fields:
    """Return the fields of the configuration that D's entries tell."""
    resolution = told["resolution"]
    most = (resolution // 8).bit_length()  # blocks that halve the resolution
    counts = {count: min(count - 1, most) for count in range(2, most + _MOST_LAST_BLOCKS + 1)}
    structures = []
    for count, attended in entries.structures(counts):
        # The last blocks have a shortcut where they change the channels.
        shortcuts = [entries.have(f"{block}.shortcut", count, attended) for block in range(count)]
        last_shortcut = max((block for block in range(count) if shortcuts[block]), default=0)
        halving = min(most, count - 1, last_shortcut + 1)
        if all(block < halving for block in attended):
            fields = {
                "d_channels": tuple(8 * 2 ** sum(shortcuts[halving : block + 1]) for block in range(count)),
                "d_last_blocks": count - halving,
                "d_attention": tuple(resolution // 2 ** (block + 1) for block in attended),
            }
            structures.append(fields)
    if not structures:
        raise UserError(
            f"the entries are no discriminator of {entries.code_base.title} that is known at {resolution} pixels: "
            "expected attention after blocks that halve the resolution only"
        )
    found = _nearest(entries, structures, [{}], told)
    settings = settings_of(entries.code_base, resolution, overrides)
    return _with_wanted_attention(found, "d_attention", settings, overrides)


def _nearest(
    entries: _Entries, structures: list[Fields], conditions: list[Fields], known: Fields
) -> list[Fields]:
    """Return the fields that entries tell, for the structures whose names, then shapes fit best.

    Args:
        entries: of one network.
        structures: fields of each.
        conditions: fields of each kind of class condition.
        known: other fields.
    """
    letter, sizes_of = ("g", _generator_sizes) if entries.kind is Generator else ("d", _discriminator_sizes)

    def compared(fields: Fields) -> Comparison:
        return entries.compared(NetworkConfig(**{**known, **fields}))

    candidates = []
    for fields in structures:
        may_have_biases = fields[f"{letter}_attention"] and "attention_bias" not in known
        # Each of these has names of its own, so that it is chosen by itself.
        for alternatives in (
            [{f"{letter}_spectral_norm": normalised} for normalised in (True, False)],
            conditions,
            [{"attention_bias": bias} for bias in (False, True)] if may_have_biases else [{}],
        ):
            choices = [{**fields, **each} for each in alternatives]
            fields = min(choices, key=lambda each: _misnamed(compared(each)))
        candidates.append((fields, compared(fields)))
    least = min(_misnamed(comparison) for _, comparison in candidates)
    candidates = [each for each in candidates if _misnamed(each[1]) == least]
    found, misfits, refusals = [], [], []
    for fields, comparison in candidates:
        try:
            sized = {**fields, **sizes_of({**known, **fields}, comparison.our_shapes)}
            exact = compared(sized)
        except (KeyError, IndexError):  # an entry that tells is missing, or has too few axes
            continue
        except UserError as error:  # sizes that no network has
            refusals.append(str(error))
            continue
        found.append(sized)
        misfits.append(_misnamed(exact) + len(exact.misshapen))
    if not found:
        nearest = candidates[0][1]
        # Sizes are not known, only how many axes there are.
        problems = [nearest._replace(found=[]).problems(_NAMED), *refusals[:1]]
        for link, entry, value in nearest.found:
            assert link.tensor is not None
            axes = len(entry.stored_shape(link.tensor.shape))
            if value.dim() != axes:
                problems.append(f"{entry.name}: expected {axes} axes, got {list(value.shape)}")
        raise UserError(entries.unfitting("; ".join(filter(None, problems[:_NAMED]))))
    return [fields for fields, misfit in zip(found, misfits, strict=True) if misfit == min(misfits)]


def _with_wanted_attention(
    found: list[Fields], attention: str, settings: Fields, overrides: Fields
) -> Fields:
    """Return the one with the wanted places of attention, if several fit or an option asks for places."""
    wanted = settings.get(attention)
    chosen = [fields for fields in found if wanted is not None and set(fields[attention]) == set(wanted)]
    if not chosen and (len(found) > 1 or attention in overrides):
        places = " or ".join(str(list(fields[attention])) for fields in found)
        raise UserError(f"{attention}: expected {places}, which fit the weights, got {wanted}")
    return (chosen or found)[0]


def _misnamed(comparison: Comparison) -> int:
    return len(comparison.missing) + len(comparison.left_over)


def _generator_sizes(fields: Fields, shapes: Mapping[str, list[int]]) -> Fields:
    """Return the sizes that the shapes of G's tensors tell."""
    count = (fields["resolution"] // 8).bit_length()
    widths = (shapes[f"blocks.{block}.conv2.weight"][0] for block in range(count))
    sizes: Fields = {
        "g_channels": (shapes["blocks.0.conv1.weight"][1], *widths),
        "latent_dim": shapes["linear.weight"][1],
    }
    if not fields["num_classes"]:
        return sizes
    if fields["condition"] == "table":
        return {**sizes, "num_classes": shapes["blocks.0.norm1.weight"][0]}
    width = shapes["blocks.0.norm1.weight_projection.weight"][1]
    if fields["condition"] == "one_hot":
        return {**sizes, "num_classes": width}
    sizes["num_classes"], sizes["embedding_dim"] = shapes["embedding.weight"]
    if width != sizes["embedding_dim"]:
        sizes |= {"hierarchical_latents": True, "latent_dim": sizes["latent_dim"] * (count + 1)}
    return sizes


def _discriminator_sizes(fields: Fields, shapes: Mapping[str, list[int]]) -> Fields:
    """Return the sizes that the shapes of D's tensors tell."""
    blocks = [f"blocks.{block}" for block in range(len(fields["d_channels"]) - 1)] + ["last_block"]
    outputs = tuple(shapes[f"{block}.conv2.weight"][0] for block in blocks)
    hidden = tuple(shapes[f"{block}.conv1.weight"][0] for block in blocks)
    if len(set(outputs)) == 1:  # both widths of the hidden channels are the same
        return {"d_channels": outputs}
    return {"d_channels": outputs, "d_hidden_channels": "out" if hidden == outputs else "in"}


def _by_rule(config: NetworkConfig) -> NetworkConfig:
    """Return the same networks with the rule of base_width in place of channels that follow it."""
    by_rule = replace(config, base_width=config.g_channels[-1], g_channels=())
    if generator_widths(by_rule) == generator_widths(config):
        config = by_rule
    by_rule = replace(config, d_channels=())
    return by_rule if discriminator_widths(by_rule) == discriminator_widths(config) else config
