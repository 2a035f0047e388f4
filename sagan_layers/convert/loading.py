"""Load and save the weights of other code bases, as their tables say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sagan_layers.attention import SelfAttention2d
from sagan_layers.checks import check_floating, check_module, check_type, pair_of, shown
from sagan_layers.conditional_norm import ConditionalBatchNorm2d
from sagan_layers.convert.code_base import CodeBase, Entry, NetworkNames, Place
from sagan_layers.convert.huggingface_biggan import huggingface_biggan_at
from sagan_layers.convert.table import CODE_BASES, NOT_EXPRESSIBLE
from sagan_layers.gan import ProjectionDiscriminatorHead
from sagan_layers.spectral_norm import SpectralNormLayer

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = [
    "CODE_BASES",
    "CodeBase",
    "Comparison",
    "Entry",
    "NetworkNames",
    "code_base_of",
    "compare",
    "huggingface_biggan_at",
    "load",
    "load_tensorflow",
    "save",
]


_KINDS: dict[str, Callable[[nn.Module], bool]] = {
    "convolution": lambda module: isinstance(module, nn.Conv2d),
    "transposed_convolution": lambda module: isinstance(module, nn.ConvTranspose2d),
    "linear": lambda module: isinstance(module, nn.Linear),
    "embedding": lambda module: isinstance(module, nn.Embedding),
    "spectral_norm": lambda module: isinstance(module, SpectralNormLayer),
    "attention": lambda module: isinstance(module, SelfAttention2d),
    "head": lambda module: isinstance(module, ProjectionDiscriminatorHead),
    "batch_norm": lambda module: (
        isinstance(module, ConditionalBatchNorm2d) and module.num_classes is module.condition_features is None
    ),
    "class_batch_norm": lambda module: (
        isinstance(module, ConditionalBatchNorm2d) and module.num_classes is not None
    ),
    "vector_batch_norm": lambda module: (
        isinstance(module, ConditionalBatchNorm2d) and module.condition_features is not None
    ),
}


class Link(NamedTuple):
    """One of our tensors and its places in a code base.

    Attributes:
        name: ours.
        tensor: ours; None for an attribute that is only written.
        places: with whole names, in the order in which they are tried; None: it may be absent.
        channels_last: height and width, if it belongs to outputs stored as [height, width, channels].
        layer: its module.
    """

    name: str
    tensor: Tensor | None
    places: tuple[Entry | None, ...]
    channels_last: tuple[int, int] | None
    layer: nn.Module

    def to_ours(self, entry: Entry, stored: Tensor) -> Tensor:
        """Return our tensor from its entry."""
        values = entry.to_ours(stored)
        if self.channels_last is None:
            return values
        return values.reshape(*self.channels_last, -1, *values.shape[1:]).movedim(2, 0).reshape(values.shape)

    def to_stored(self, entry: Entry, ours: Tensor) -> Tensor:
        """Return the stored tensor from ours."""
        if self.channels_last is not None:
            grid = ours.reshape(-1, *self.channels_last, *ours.shape[1:])
            ours = grid.movedim(0, 2).reshape(ours.shape)
        return entry.to_stored(ours)


class Comparison(NamedTuple):
    """A module against a state.

    Attributes:
        found: each link whose entry is there, with the entry and its value.
        absent: links without an entry that need none.
        missing: names of entries that are not there.
        left_over: names of entries that nothing takes.

    Example:
        >>> from sagan_layers import SNLinear
        >>> compare(SNLinear(3, 2), {"weight": torch.ones(2, 4)}, "biggan_pytorch").our_shapes
        {'weight': [2, 4]}
    """

    found: list[tuple[Link, Entry, Tensor]]
    absent: list[Link]
    missing: list[str]
    left_over: list[str]

    @property
    def our_shapes(self) -> dict[str, list[int]]:
        """The shapes of the entries as they would be here, by our names."""
        return {link.name: entry.our_shape(value.shape) for link, entry, value in self.found}

    @property
    def misshapen(self) -> list[str]:
        """The entries with another shape than expected, with both."""
        return [
            f"{entry.name} (expected {expected}, got {list(value.shape)})"
            for link, entry, value in self.found
            if link.tensor is not None
            and (expected := entry.stored_shape(link.tensor.shape)) != list(value.shape)
        ]

    def problems(self, most: int = 12) -> str:
        """Return what does not fit, with at most so many names of each kind; "" if everything fits."""
        kinds = {"missing": self.missing, "left over": self.left_over, "of the wrong shape": self.misshapen}
        return "; ".join(
            f"{kind}: {', '.join(names[:most])}" + (f" and {len(names) - most} more" if names[most:] else "")
            for kind, names in kinds.items()
            if names
        )


def compare(
    module: nn.Module,
    state: Mapping[str, ArrayLike | Tensor],
    source: str | CodeBase,
    *,
    prefix: str = "",
    names: Mapping[str, str] | None = None,
    channels_last_outputs: Mapping[str, tuple[int, int]] | None = None,
) -> Comparison:
    """Compare a module with a state of another code base, without loading anything.

    Args:
        module: a block, or a network; one on the meta device will do.
        state: as for :func:`load`.
        source: as for :func:`load`.
        prefix: as for :func:`load`.
        names: as for :func:`load`.
        channels_last_outputs: as for :func:`load`.

    Returns:
        A :class:`Comparison`: what is found, missing, left over and misshapen.

    Raises:
        ValueError: if the code base is not known.
        TypeError: if an argument or an entry is of the wrong type.

    Example:
        >>> from sagan_layers import SNLinear
        >>> comparison = compare(SNLinear(3, 2), {"weight": torch.ones(2, 4)}, "biggan_pytorch")
        >>> comparison.missing, comparison.misshapen
        (['bias', 'u0'], ['weight (expected [2, 3], got [2, 4])'])
    """
    code_base = code_base_of(source)
    check_type("state", state, Mapping, "a mapping from names to arrays")
    for name in state:
        check_type("state", name, str, "strings as keys")
    check_type("prefix", prefix, str, "a string")
    separator = code_base.separator
    below = f"{prefix.strip(separator)}{separator}" if prefix else ""
    remaining = {
        name.removeprefix(below): value
        for name, value in code_base.prepare(dict(state)).items()
        if name.startswith(below)
    }
    found: list[tuple[Link, Entry, Tensor]] = []
    absent: list[Link] = []
    missing: list[str] = []
    taken: set[str] = set()
    # Layers whose tensors have several forms: whether the usual one is there, and so all of it must be.
    usual: dict[nn.Module, bool] = {}
    for link in links(module, code_base, names=names, channels_last_outputs=channels_last_outputs):
        entry = next((place for place in link.places if place and place.name in remaining), None)
        if entry is not None:
            taken.add(entry.name)
            if len(link.places) > 1:
                usual[link.layer] = entry == link.places[0]
            if link.tensor is not None:
                value = _values(below + entry.name, remaining[entry.name], link.tensor)
                found.append((link, entry._replace(name=below + entry.name), value))
        elif None in link.places and not (link.places[0] and usual.get(link.layer)):
            absent.append(link)
        elif link.tensor is not None:
            missing += [below + place.name for place in link.places[:1] if place]
    left_over = [below + name for name in remaining if name not in taken and not code_base.ignores(name)]
    return Comparison(found, absent, list(dict.fromkeys(missing)), left_over)


@torch.no_grad()
def load(
    module: nn.Module,
    state: Mapping[str, ArrayLike | Tensor],
    source: str | CodeBase,
    *,
    prefix: str = "",
    names: Mapping[str, str] | None = None,
    channels_last_outputs: Mapping[str, tuple[int, int]] | None = None,
) -> None:
    """Load weights of another code base into a block, or into a network that contains our blocks.

    The module's blocks take their entries under the names and in the form of the code base; everything else takes
    those of its own names, as ``load_state_dict`` does. So a network of that code base in which our blocks stand
    in the place of its own loads its checkpoints as they are. Where a code base stores no v, it is set to fit u;
    layers with ``iterate_when_frozen=False`` then iterate once, as the code base does whenever it evaluates.

    Args:
        module: a block, or a network.
        state: tensors or arrays by name, read from a file by any means.
        source: the code base: a name out of ``CODE_BASES``, or a table of your own.
        prefix: only entries below it are read; "" for all.
        names: the code base's names of modules that have another one here, by ours.
        channels_last_outputs: linear layers whose outputs the code base reshapes to [height, width, channels], by
            our name ("" for the module itself), with that (height, width).

    Raises:
        ValueError: if entries are missing, left over or of the wrong shape (the message names them, and the module
            is as before), or the code base is not known.
        TypeError: if an argument or an entry is of the wrong type.

    Example:
        >>> from sagan_layers import SelfAttention2d
        >>> attention = SelfAttention2d(8, spectral_norm=False)
        >>> theirs = {
        ...     "theta.weight": torch.ones(1, 8, 1, 1),
        ...     "phi.weight": torch.ones(1, 8, 1, 1),
        ...     "g.weight": torch.ones(4, 8, 1, 1),
        ...     "o.weight": torch.ones(8, 4, 1, 1),
        ...     "gamma": torch.tensor(0.5),
        ... }
        >>> load(attention, theirs, "biggan_pytorch")
        >>> attention.gamma.item()
        0.5
    """
    comparison = compare(
        module, state, source, prefix=prefix, names=names, channels_last_outputs=channels_last_outputs
    )
    if problems := comparison.problems():
        raise ValueError(f"entries of {code_base_of(source).title} do not fit; {problems}")
    # All values first, so that nothing is loaded by halves.
    copies = [(link.tensor, link.to_ours(entry, value)) for link, entry, value in comparison.found]
    for tensor, values in copies:
        assert tensor is not None
        tensor.copy_(values)
    for link in comparison.absent:
        layer = link.layer
        if isinstance(layer, SpectralNormLayer) and link.tensor is layer.weight_v:
            layer.reset_right_vector()
            if not layer.iterate_when_frozen:
                training = layer.training
                layer.train().normalized_weight()
                layer.train(training)
        elif link.tensor is not None:
            link.tensor.zero_()


def load_tensorflow(module: nn.Module, variables: Mapping[str, ArrayLike | Tensor], scope: str = "") -> None:
    """Load the released TensorFlow code's variables of one block: ``load(module, variables, "tensorflow")``.

    Args:
        module: a block.
        variables: arrays by TensorFlow variable name.
        scope: only names below it are read; "" for all.

    Raises:
        ValueError: if variables are missing, left over below the scope, or of the wrong shape.
        TypeError: if an argument is of the wrong type.

    Example:
        >>> from sagan_layers import SNLinear
        >>> linear = SNLinear(3, 2)
        >>> matrix = np.arange(6.0).reshape(3, 2)
        >>> load_tensorflow(linear, {"Matrix": matrix, "u": np.ones((1, 2)), "bias": np.zeros(2)})
        >>> linear.weight.tolist()
        [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]
    """
    load(module, variables, "tensorflow", prefix=scope)


@torch.no_grad()
def save(
    module: nn.Module,
    target: str | CodeBase,
    *,
    prefix: str = "",
    names: Mapping[str, str] | None = None,
    channels_last_outputs: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, Tensor]:
    """Return a block's or network's weights under the names and in the form of another code base.

    The inverse of :func:`load`: where a code base has several forms, its usual one. Options that the code base does
    not know (another eps, say) are not stored and have to be set there.

    Args:
        module: a block, or a network.
        target: as ``source`` of :func:`load`.
        prefix: before every name.
        names: as for :func:`load`.
        channels_last_outputs: as for :func:`load`.

    Returns:
        Copies of the tensors by name.

    Raises:
        ValueError: if the code base is not known, or two modules have one name there.
        TypeError: if an argument is of the wrong type.

    Example:
        >>> from sagan_layers import SNLinear
        >>> sorted((name, list(value.shape)) for name, value in save(SNLinear(3, 2), "biggan_pytorch").items())
        [('bias', [2]), ('sv0', [1]), ('u0', [1, 2]), ('weight', [2, 3])]
    """
    code_base = code_base_of(target)
    check_type("prefix", prefix, str, "a string")
    prefix = prefix.strip(code_base.separator)
    halves: dict[str, list[Tensor]] = {}
    for link in links(module, code_base, names=names, channels_last_outputs=channels_last_outputs):
        entry = link.places[0]
        if entry is not None:
            ours = link.tensor
            if ours is None:
                ours = getattr(link.layer, link.name.rpartition(".")[2])
            stored = link.to_stored(entry, ours.detach()).clone(memory_format=torch.contiguous_format)
            name = code_base.join(prefix, entry.name)
            if name in halves and entry.half is None:
                raise ValueError(f"names: expected a name of its own for {link.name}, got {name} twice")
            halves.setdefault(name, []).insert(entry.half or 0, stored)
    return {name: torch.cat(parts, -1) if len(parts) > 1 else parts[0] for name, parts in halves.items()}


def links(
    module: nn.Module,
    code_base: CodeBase,
    *,
    names: Mapping[str, str] | None = None,
    channels_last_outputs: Mapping[str, tuple[int, int]] | None = None,
) -> Iterator[Link]:
    """Return each tensor of a module with its places in a code base."""
    check_module("module", module)
    names = names or {}
    check_type("names", names, Mapping, "a mapping from our names to theirs")
    for theirs in names.values():
        check_type("names", theirs, str, "strings")
    layers = dict(module.named_modules(remove_duplicate=False))
    sizes = {}
    for name, size in (channels_last_outputs or {}).items():
        height, width = pair_of("channels_last_outputs", size, least=1)
        if name not in layers:
            raise ValueError(f"channels_last_outputs: expected names of modules, got {name!r}")
        outputs = getattr(layers[name], "out_features", 1)
        if outputs % (height * width):
            raise ValueError(
                f"channels_last_outputs: expected height and width of {outputs} outputs of {name!r}, got {size}"
            )
        sizes[name] = height, width

    def below(
        part: nn.Module, path: str, theirs: str, given: Mapping[str, tuple[Entry | None, ...]]
    ) -> Iterator[Link]:
        """``given`` are the places of tensors here that the rows of modules above name."""
        row, own = _row(part, code_base), _own_tensors(part)
        places = {name: _entries(theirs, row.get(name, (name,)), code_base) for name in {**row, **own}}
        places |= given
        if isinstance(part, ConditionalBatchNorm2d) and "weight" in places:
            gains = places["weight"]
            places["weight"] = tuple(
                each and each._replace(offset=each.offset - part.gain_offset) for each in gains
            )
        properties = {name: None for name in row if isinstance(getattr(type(part), name, None), property)}
        for name, tensor in {**properties, **own}.items():
            channels_last = sizes.get(path) if name in ("weight", "bias", "weight_u") else None
            yield Link(_dotted(path, name), tensor, places[name], channels_last, part)
        for name, child in part._modules.items():
            if child is not None:
                child_path, place = _dotted(path, name), row.get(name, (name,))[0]
                assert isinstance(place, str)
                child_name = names.get(child_path, code_base.join(theirs, place))
                inner = {
                    each.removeprefix(f"{name}."): places[each]
                    for each in places
                    if each.startswith(f"{name}.")
                }
                yield from below(child, child_path, child_name, inner)

    return below(module, "", "", {})


def _row(module: nn.Module, code_base: CodeBase) -> dict[str, tuple[Place, ...]]:
    """Return the places of a block's children and tensors by our names."""
    row: dict[str, tuple[Place, ...]] = {}
    for kind, matches in _KINDS.items():
        if matches(module):
            for name, place in code_base.rows.get(kind, {}).items():
                single = place is None or isinstance(place, (str, Entry))
                row[name] = (place,) if single else place  # type: ignore[assignment]
    return row


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    hidden = module._non_persistent_buffers_set
    own = {**module._parameters, **{n: b for n, b in module._buffers.items() if n not in hidden}}
    return {name: tensor for name, tensor in own.items() if tensor is not None}


def _entries(theirs: str, places: tuple[Place, ...], code_base: CodeBase) -> tuple[Entry | None, ...]:
    entries = (Entry(place) if isinstance(place, str) else place for place in places)
    return tuple(entry and entry._replace(name=code_base.join(theirs, entry.name)) for entry in entries)


def _dotted(*names: str) -> str:
    return ".".join(name for name in names if name)


def _values(name: str, value: ArrayLike | Tensor, ours: Tensor) -> Tensor:
    """Return the values of an entry for one of our tensors."""
    if isinstance(value, Tensor):
        if ours.is_floating_point():
            check_floating(name, value)
        if value.is_meta:
            raise TypeError(f"{name}: expected values, got a tensor on the meta device")
        return value.detach()
    try:
        return torch.from_numpy(np.array(value).astype(np.float64, casting="same_kind"))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected an array of numbers, got {shown(value)}") from error


def code_base_of(source: str | CodeBase) -> CodeBase:
    """Return the table of a code base by its name; a table is returned as it is.

    Raises:
        ValueError: if the code base is not known, or cannot be expressed.
        TypeError: if it is neither a name nor a table.

    Example:
        >>> code_base_of("mimicry").url
        'https://github.com/kwotsin/mimicry'
    """
    if isinstance(source, CodeBase):
        return source
    check_type("source", source, str, "the name of a code base or a CodeBase")
    if source in NOT_EXPRESSIBLE:
        raise ValueError(f"source: {NOT_EXPRESSIBLE[source]}")
    if source not in CODE_BASES:
        raise ValueError(f"source: expected one of {sorted(CODE_BASES)}, got {source!r}")
    return CODE_BASES[source]
