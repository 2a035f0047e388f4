"""What every attention layer of G and D looks at, from chosen points of images, in 8 bits."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sagan.errors import check_finite
from sagan.networks import Discriminator, Generator, NetworkConfig
from sagan_layers import SelfAttention2d


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of a run, and the points whose maps are kept."""

    network: str  # "G" or "D"
    resolution: int  # side of the feature map, in positions
    keys: int  # side of the grid of keys
    points: int  # side of the grid of query points


def attention_layers(config: NetworkConfig, most_points: int) -> list[AttentionLayer]:
    """Return the attention layers of both networks, from the first to the last, each with its points.

    A side of the grid of points is the feature map's, or ``most_points`` where that is less.
    """
    with torch.device("meta"):
        networks = Generator(config), Discriminator(config)
    found = []
    for network in networks:
        for resolution, layer in zip(map(int, network.mixers), network.mixers.values(), strict=True):
            if isinstance(layer, SelfAttention2d):
                keys, points = resolution // layer.pool_size, min(resolution, most_points)
                name = "G" if isinstance(network, Generator) else "D"
                found.append(AttentionLayer(name, resolution, keys, points))
    return found


def point_places(layer: AttentionLayer) -> list[tuple[int, int]]:
    """Return (row, column) in the feature map of each query point, row by row: the middle of its share of the map."""
    step = layer.resolution // layer.points
    places = range(step // 2, layer.resolution, step)
    return [(row, column) for row in places for column in places]


@torch.no_grad()
def attention_maps(
    network: nn.Module, layers: Sequence[AttentionLayer], *inputs: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Return a network's output, and what its layers look at: [N, points, keys] on the CPU for each.

    The network is not changed, and should be in evaluation mode.
    """
    modules = [_module(network, layer) for layer in layers]
    seen: dict[nn.Module, Tensor] = {}
    with contextlib.ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(
                module.register_forward_pre_hook(lambda layer, given: seen.update({layer: given[0]}))
            )
        output = network(*inputs)
    maps = []
    for module, layer in zip(modules, layers, strict=True):
        # One image at a time: the maps of a large layer take 60 MB for each.
        images = seen[module].split(1)  # type: ignore[no-untyped-call]
        found = [module.attention_weights(x, point_places(layer), key_grid=False).cpu() for x in images]
        maps.append(torch.cat(found))
        check_finite(f"attention of {layer.network}", maps[-1])
    return output, maps


def gamma_of(network: nn.Module, layer: AttentionLayer) -> float:
    """Return how much of the layer's result is added to its input."""
    return _module(network, layer).gamma.item()


def _module(network: nn.Module, layer: AttentionLayer) -> SelfAttention2d:
    module = network.get_submodule(f"mixers.{layer.resolution}")
    assert isinstance(module, SelfAttention2d)
    return module


def quantized(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return uint8 levels of each map [..., keys], of which 255 is its largest weight, and these weights [...].

    A weight is level / 255 times the largest, with an error of at most 1/510 of that.
    """
    largest = maps.amax(-1)
    levels = (maps / largest.unsqueeze(-1) * 255).round()
    return levels.to(torch.uint8), largest.float()
