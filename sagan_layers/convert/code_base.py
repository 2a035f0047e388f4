"""The table of a code base: where it keeps the tensors of each kind of block, and in which form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Entry(NamedTuple):
    """Where a code base keeps one of our tensors, and in which form.

    Attributes:
        name: below the block's name.
        axes: our axes in the order in which they are stored; () for ours. (2, 3, 1, 0) is [kh, kw, in, out].
        leading: axes of size 1 that are stored before the others.
        dropped: axes of size 1 at our tensor's end that are not stored.
        offset: ours is the stored value plus this.
        half: the stored tensor holds two of ours along its last axis; 0 for the first, 1 for the second.

    Example:
        >>> Entry("w", axes=(2, 3, 1, 0)).stored_shape([64, 3, 5, 5])
        [5, 5, 3, 64]
        >>> Entry("u0", leading=1).our_shape([1, 64])
        [64]
    """

    name: str
    axes: tuple[int, ...] = ()
    leading: int = 0
    dropped: int = 0
    offset: float = 0.0
    half: int | None = None

    def stored_shape(self, shape: Sequence[int]) -> list[int]:
        """Return the stored shape of a tensor with our shape."""
        kept = list(shape)[: len(shape) - self.dropped]
        stored = [1] * self.leading + [kept[axis] for axis in self.axes or range(len(kept))]
        if self.half is not None:
            stored[-1] *= 2
        return stored

    def our_shape(self, stored: Sequence[int]) -> list[int]:
        """Return our shape of a tensor with this stored shape."""
        kept = list(stored)[self.leading :]
        if self.half is not None and kept:
            kept[-1] //= 2
        ours = [kept[self.axes.index(axis)] for axis in range(len(kept))] if self.axes else kept
        return ours + [1] * self.dropped

    def to_ours(self, stored: Tensor) -> Tensor:
        """Return our tensor."""
        if self.half is not None:
            stored = stored.chunk(2, -1)[self.half]
        values = stored.reshape(stored.shape[self.leading :])
        if self.axes:
            values = values.permute(*(self.axes.index(axis) for axis in range(values.dim())))
        values = values.to(torch.promote_types(values.dtype, torch.float32))  # 1 + a gain needs the digits
        return values.reshape([*values.shape, *[1] * self.dropped]) + self.offset

    def to_stored(self, ours: Tensor) -> Tensor:
        """Return the stored tensor; with ``half``, this half of it."""
        values = ours.reshape(ours.shape[: ours.dim() - self.dropped])
        if self.offset:  # which would make a float of a count
            values = values - self.offset
        if self.axes:
            values = values.permute(*self.axes)
        return values.reshape([*[1] * self.leading, *values.shape])


# The name of a child or tensor in a code base; several where it has several forms; None: it may be absent.
Place = str | Entry | None
Row = Mapping[str, "Place | tuple[Place, ...]"]


class BlockPlace(NamedTuple):
    """Where a block stands in a network.

    Attributes:
        number: of the block, from 0.
        attention: attention layers before it.
    """

    number: int
    attention: int


@dataclass(frozen=True)
class NetworkNames:
    """The names of a network's modules in a code base.

    Attributes:
        block: the name of a residual block at its place.
        attention: the name of the attention layer after that block.
        parts: the names of a block's layers, by ours.
        others: the names of the other modules, by ours, for a number of blocks.
        channels_last_outputs: linear layers whose outputs are reshaped to [height, width, channels], with that
            height and width.
        only: fields of the trainer's ``NetworkConfig`` with the values for which its network is the code base's:
            where another network has the same names and shapes.

    Example:
        >>> names = NetworkNames(
        ...     block=lambda place: f"block{place.number + 1}",
        ...     attention=lambda place: "attention",
        ...     parts={"conv1": "c1"},
        ...     others=lambda blocks: {"last_conv": f"c{blocks + 1}"},
        ... )
        >>> names.of(["blocks.0", "blocks.1"], attention={0: "mixers.8"})["blocks.1.conv1"]
        'block2.c1'
    """

    block: Callable[[BlockPlace], str]
    attention: Callable[[BlockPlace], str]
    parts: Mapping[str, str]
    others: Callable[[int], Mapping[str, str]]
    channels_last_outputs: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def of(self, blocks: Sequence[str], attention: Mapping[int, str], separator: str = ".") -> dict[str, str]:
        """Return the code base's names of all modules by ours.

        Args:
            blocks: our names of the residual blocks, in order.
            attention: our names of the attention layers, by the index of the block before them.
            separator: between parts of a name.
        """
        names = dict(self.others(len(blocks)))
        passed = 0
        for index, ours in enumerate(blocks):
            place = BlockPlace(index, passed)
            for part, theirs in self.parts.items():
                names[f"{ours}.{part}"] = f"{self.block(place)}{separator}{theirs}"
            if index in attention:
                names[attention[index]] = self.attention(place)
                passed += 1
        return names


@dataclass(frozen=True)
class CodeBase:
    """How a code base names and stores what our blocks hold.

    Attributes:
        title: its name for messages.
        url: where it is.
        rows: by kind of block, the places of its children and tensors by our names; what a row does not name has
            our name. The kinds, of which a block has one or several (the later overrides): "convolution",
            "transposed_convolution", "linear", "embedding", "spectral_norm", "attention", "head", "batch_norm",
            "class_batch_norm" and "vector_batch_norm". A name with a dot is a tensor of a child
            ("norm.running_mean"). A name of a scalar attribute that is no tensor of ours ("sigma") is only written.
        ignored: shell patterns of entries that hold nothing to load.
        separator: between the parts of a name.
        prepare: makes of a state one with the entries that the rows name.
        generator: names of G's modules, if the trainer's network can express it.
        discriminator: names of D's modules.
        settings: fields of the trainer's ``NetworkConfig`` that shapes do not tell; a mapping has a value for each
            resolution.

    Example:
        >>> import torch
        >>> from sagan_layers import SNLinear, convert
        >>> peer = CodeBase("a peer", "https://example.org", {"spectral_norm": {"weight_u": "u", "weight_v": None}})
        >>> linear = SNLinear(2, 1)
        >>> state = {"weight": torch.ones(1, 2), "bias": torch.zeros(1), "u": torch.ones(1)}
        >>> convert.load(linear, state, peer)
        >>> linear.weight.tolist()
        [[1.0, 1.0]]
    """

    title: str
    url: str
    rows: Mapping[str, Row]
    ignored: tuple[str, ...] = ()
    separator: str = "."
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = dict
    generator: NetworkNames | None = None
    discriminator: NetworkNames | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def ignores(self, name: str) -> bool:
        """Return whether an entry holds nothing to load."""
        return any(fnmatchcase(name, pattern) for pattern in self.ignored)

    def join(self, *names: str) -> str:
        """Return the parts of a name as one."""
        return self.separator.join(name for name in names if name)


def statistics(prefix: str) -> Row:
    """Return the places of running statistics that keep torch's names below a prefix."""
    return {f"norm.{name}": prefix + name for name in ("running_mean", "running_var", "num_batches_tracked")}
