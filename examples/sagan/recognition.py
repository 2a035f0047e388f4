"""Networks of other code bases, recognised by the names and shapes of their entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, chain, combinations, product
from typing import Any

import torch

from sagan.convert import Network, check_only, conditions_of, layout, names_of, settings_of
from sagan.errors import UserError, listed
from sagan.networks import (
    RESOLUTIONS,
    Discriminator,
    Generator,
    NetworkConfig,
    discriminator_widths,
    generator_widths,
)
from sagan_layers import convert
from sagan_layers.convert import CodeBase, Entry

State = Mapping[str, Any]  # tensors or arrays by name
_PARTS = ("generator", "discriminator", "generator_ema")
_MOST_LAST_BLOCKS = 3
_NAMED = 5
_ATTENTION = ("query", "key", "value", "out", "gamma")


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
    parts, d_parts, ema_parts = (_split(each, code_base) for each in (weights, d_weights, ema_weights))
    generator, discriminator, average = (
        code_base.prepare(dict(state))
        for state in (
            _first(parts, "generator", ""),
            _first(d_parts, "discriminator", "") or _first(parts, "discriminator"),
            _first(ema_parts, "generator_ema", "generator", "") or _first(parts, "generator_ema"),
        )
    )
    if not generator:
        raise UserError("weights: expected those of a generator, got none")
    code_base = replace(code_base, prepare=dict)
    told, left_over = _read_generator(code_base, generator, overrides)
    if left_over and not discriminator and _begins(code_base, left_over):  # one file holds both networks
        discriminator = {name: generator.pop(name) for name in left_over}
    settings = settings_of(code_base, told["resolution"], overrides)
    if discriminator:
        told |= _read_discriminator(code_base, discriminator, told, overrides)
    else:
        half = told["resolution"] // 2
        settings.setdefault("d_attention", tuple(size for size in told["g_attention"] if size <= half))
    config = _tidy(NetworkConfig(**{**settings, **told}))
    for kind, state in ((Generator, generator), (Discriminator, discriminator), (Generator, average)):
        if state and _misfit(comparison := _compared(kind, config, code_base, state)):
            raise UserError(_description(kind, code_base, comparison))
        if state:
            check_only(kind, config, code_base)
    return Converted(config, frozenset(told), code_base, generator, discriminator, average)


def _split(entries: State, code_base: CodeBase) -> dict[str, dict[str, Any]]:
    """Return the entries of each network by its prefix, or all of them under ""."""
    parts: dict[str, dict[str, Any]] = {}
    for name, value in _unwrapped(entries, code_base).items():
        first, _, rest = name.partition(code_base.separator)
        part, inner = (first, rest) if first in _PARTS else ("", name)
        parts.setdefault(part, {})[inner] = value
    others = [name for name in parts.get("", ()) if not code_base.ignores(name)]
    if len(parts) > 1 and others:
        raise UserError(f"expected entries of {', '.join(_PARTS)}, got others too: {listed(others)}")
    return {part: _unwrapped(state, code_base) for part, state in parts.items()}


def _unwrapped(entries: State, code_base: CodeBase) -> dict[str, Any]:
    """Remove what all names begin with, such as DistributedDataParallel's "module."."""
    separator = code_base.separator
    names = [name for name in entries if not code_base.ignores(name)]
    firsts = {name.partition(separator)[0] for name in names}
    if len(firsts) != 1 or firsts & {*names, *_PARTS}:
        return dict(entries)
    prefix = firsts.pop() + separator
    return _unwrapped({name.removeprefix(prefix): value for name, value in entries.items()}, code_base)


def _first(parts: Mapping[str, dict[str, Any]], *names: str) -> dict[str, Any]:
    return next((parts[name] for name in names if name in parts), {})


def _read_generator(
    code_base: CodeBase, state: State, overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of the configuration that G's entries tell, and the entries that G leaves over."""
    counts = [(resolution // 4).bit_length() - 1 for resolution in RESOLUTIONS]
    conditions = [("table", 0), *((condition, 2) for condition in conditions_of(code_base))]
    probes = []
    for count, places in _structures(Generator, code_base, state, {count: count for count in counts}):
        attention = tuple(8 * 2**place for place in places)
        biases = (False, True) if attention else (False,)
        for (condition, classes), normalised, bias in product(conditions, (True, False), biases):
            fields = {
                "resolution": 4 * 2**count,
                "g_attention": attention,
                "condition": condition,
                "num_classes": classes,
                "g_spectral_norm": normalised,
                **({"attention_bias": bias} if attention else {}),
            }
            probes.append(fields)
    common = {"d_attention": (), "base_width": 8}
    told = _nearest(Generator, code_base, state, probes, common, _generator_fields, overrides)
    comparison = _compared(Generator, NetworkConfig(**{"d_attention": (), **told}), code_base, state)
    return told, comparison.left_over


def _read_discriminator(
    code_base: CodeBase, state: State, told: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the fields of the configuration that D's entries tell."""
    most = (told["resolution"] // 4).bit_length() - 1
    counts = {count: min(count - 1, most) for count in range(2, most + _MOST_LAST_BLOCKS + 1)}
    there, separator = names_of(Discriminator, code_base), code_base.separator
    probes = []
    for count, places in _structures(Discriminator, code_base, state, counts):
        blocks = [str(index) for index in range(count)]
        names = there.of(blocks, dict.fromkeys(places, ""), separator)
        shortcuts = [
            any(entry.startswith(names[f"{block}.shortcut"] + separator) for entry in state)
            for block in blocks
        ]
        # The last blocks have a shortcut where they change the channels.
        halving = min(
            most, count - 1, max((index + 1 for index in range(count) if shortcuts[index]), default=1)
        )
        if any(place >= halving for place in places):
            continue
        widths = [8] * halving
        for changes in shortcuts[halving:]:
            widths.append(widths[-1] * (2 if changes else 1))
        attention = tuple(told["resolution"] // 2 ** (place + 1) for place in places)
        biases = (
            (False, True) if attention and not told["g_attention"] else (told.get("attention_bias", False),)
        )
        for normalised, bias in product((True, False), biases):
            fields = {
                "d_channels": tuple(widths),
                "d_last_blocks": count - halving,
                "d_attention": attention,
                "d_spectral_norm": normalised,
                **({"attention_bias": bias} if attention else {}),
            }
            probes.append(fields)
    if not probes:
        raise UserError(
            f"the entries are no discriminator of {code_base.title} that is known at {told['resolution']} pixels: "
            "expected attention after blocks that halve the resolution only"
        )
    return _nearest(Discriminator, code_base, state, probes, told, _discriminator_fields, overrides)


def _structures(
    kind: type[Network], code_base: CodeBase, state: State, counts: Mapping[int, int]
) -> list[tuple[int, tuple[int, ...]]]:
    """Return the numbers of blocks and places of attention whose names fit best; several if names do not tell.

    ``counts`` are the possible numbers of blocks, each with the number of blocks that attention may follow.
    """
    there, separator = names_of(kind, code_base), code_base.separator
    row = code_base.rows.get("attention", {})
    parts = [_first_name(row.get(part, part)) for part in _ATTENTION]
    prefixes = [set(accumulate(name.split(separator), f"{{}}{separator}{{}}".format)) for name in state]
    present = set().union(*prefixes)
    costs = {}
    for count, attended in counts.items():
        blocks = [str(index) for index in range(count)]
        for places in chain.from_iterable(combinations(range(attended), n) for n in range(attended + 1)):
            ours = there.of(blocks, {place: f"attention {place}" for place in places}, separator)
            found = [
                code_base.join(theirs, part)
                for name, theirs in ours.items()
                for part in (parts if name.startswith("attention") else ("",))
            ]
            names = set(found) - {""}
            absent = len(names - present) + len(found) - len(set(found))
            costs[count, places] = absent + sum(names.isdisjoint(each) for each in prefixes)
    return [structure for structure, cost in costs.items() if cost == min(costs.values())]


def _first_name(place: Any) -> str:
    """Return the usual name of a place in a table."""
    if isinstance(place, tuple) and not isinstance(place, Entry):
        place = place[0]
    return place.name if isinstance(place, Entry) else str(place)


def _nearest(
    kind: type[Network],
    code_base: CodeBase,
    state: State,
    probes: list[dict[str, Any]],
    common: Mapping[str, Any],
    fields_of: Callable[[NetworkConfig, Mapping[str, list[int]]], dict[str, Any]],
    overrides: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the fields of the probe whose names, then shapes fit best, with those that shapes tell."""
    configs = [NetworkConfig(**{**common, **fields}) for fields in probes]
    comparisons = [_compared(kind, config, code_base, state) for config in configs]
    least = min(map(_misnamed, comparisons))
    costs: list[int] = []
    founds: list[dict[str, Any]] = []
    for fields, config, comparison in zip(probes, configs, comparisons, strict=True):
        if _misnamed(comparison) == least:
            try:
                found = {**fields, **fields_of(config, comparison.our_shapes)}
                exact = _compared(kind, NetworkConfig(**{**common, **found}), code_base, state)
            except (KeyError, IndexError, UserError):  # an entry that tells is missing, or has too few axes
                continue
            costs.append(_misfit(exact))
            founds.append(found)
    if not founds:
        nearest = min(comparisons, key=_misnamed)
        raise UserError(
            _description(kind, code_base, nearest._replace(found=[]))
        )  # probes' shapes tell nothing
    best = [found for cost, found in zip(costs, founds, strict=True) if cost == min(costs)]
    attention = "g_attention" if kind is Generator else "d_attention"
    wanted = settings_of(code_base, {**common, **best[0]}["resolution"], overrides).get(attention)
    chosen = [found for found in best if wanted is not None and set(found[attention]) == set(wanted)]
    if not chosen and (len(best) > 1 or attention in overrides):
        places = " or ".join(str(list(found[attention])) for found in best)
        raise UserError(f"{attention}: expected {places}, which fit the weights, got {wanted}")
    return (chosen or best)[0]


def _generator_fields(config: NetworkConfig, shapes: Mapping[str, list[int]]) -> dict[str, Any]:
    """Return the fields that the shapes of G's tensors tell."""
    count = len(generator_widths(config)) - 1
    fields: dict[str, Any] = {
        "g_channels": (
            shapes["blocks.0.conv1.weight"][1],
            *(shapes[f"blocks.{index}.conv2.weight"][0] for index in range(count)),
        ),
        "latent_dim": shapes["linear.weight"][1],
    }
    if not config.num_classes:
        return fields
    if config.condition == "table":
        return {**fields, "num_classes": shapes["blocks.0.norm1.weight"][0]}
    width = shapes["blocks.0.norm1.weight_projection.weight"][1]
    if config.condition == "one_hot":
        return {**fields, "num_classes": width}
    classes, embedding_dim = shapes["embedding.weight"]
    fields |= {"num_classes": classes, "embedding_dim": embedding_dim}
    if width != embedding_dim:
        latent_dim = fields["latent_dim"] * (count + 1)
        fields |= {"hierarchical_latents": True, "latent_dim": latent_dim}
    return fields


def _discriminator_fields(config: NetworkConfig, shapes: Mapping[str, list[int]]) -> dict[str, Any]:
    """Return the fields that the shapes of D's tensors tell."""
    blocks = [f"blocks.{index}" for index in range(len(config.d_channels) - 1)] + ["last_block"]
    outputs = tuple(shapes[f"{block}.conv2.weight"][0] for block in blocks)
    hidden = tuple(shapes[f"{block}.conv1.weight"][0] for block in blocks)
    if len(set(outputs)) == 1:  # both widths of the hidden channels are the same
        return {"d_channels": outputs}
    return {"d_channels": outputs, "d_hidden_channels": "out" if hidden == outputs else "in"}


def _compared(
    kind: type[Network], config: NetworkConfig, code_base: CodeBase, state: State
) -> convert.Comparison:
    with torch.device("meta"):
        network = kind(config)
    return convert.compare(network, state, code_base, **layout(network, code_base))


def _begins(code_base: CodeBase, names: list[str]) -> bool:
    """Whether the first block of D is among entries."""
    first = names_of(Discriminator, code_base).of(["0"], {}, code_base.separator)["0.conv1"]
    return any(name.startswith(first + code_base.separator) for name in names)


def _tidy(config: NetworkConfig) -> NetworkConfig:
    """Return the same networks with the rule of base_width in place of channels that follow it."""
    by_rule = replace(config, base_width=config.g_channels[-1], g_channels=())
    if generator_widths(by_rule) == generator_widths(config):
        config = by_rule
    by_rule = replace(config, d_channels=())
    return by_rule if discriminator_widths(by_rule) == discriminator_widths(config) else config


def _misnamed(comparison: convert.Comparison) -> int:
    return len(comparison.missing) + len(comparison.left_over)


def _misfit(comparison: convert.Comparison) -> int:
    return _misnamed(comparison) + len(comparison.misshapen)


def _description(kind: type[Network], code_base: CodeBase, comparison: convert.Comparison) -> str:
    """Return a message that names what does not fit."""
    return (
        f"the entries are no {kind.__name__.lower()} of {code_base.title} that is known; "
        f"{comparison.problems(_NAMED)}"
    )
