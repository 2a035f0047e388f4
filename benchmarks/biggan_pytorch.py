"""Modules of a checkout of BigGAN-PyTorch, with copies of the weights of ours."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.harness import Refused
from sagan.networks import Discriminator, Generator
from sagan_layers import ConditionalBatchNorm2d, SelfAttention2d, SpectralNormLayer

# The last part of a layer's name: ours and theirs.
_LAYERS = {
    "query": "theta",
    "key": "phi",
    "value": "g",
    "out": "o",
    "shortcut": "conv_sc",
    "norm1": "bn1",
    "norm2": "bn2",
}


def import_peer(checkout: Path | None, name: str) -> ModuleType:
    """Return a module of the checkout, such as "layers".

    Raises:
        Refused: if there is no checkout, or no such module in it.
    """
    if checkout is None:
        raise Refused("no checkout of BigGAN-PyTorch was given (--peer PATH)")
    if not (checkout / f"{name}.py").is_file():
        raise Refused(f"there is no {name}.py in {checkout}")
    sys.path.insert(0, str(checkout))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(checkout))


def peer_attention(ours: SelfAttention2d, checkout: Path | None) -> nn.Module:
    """Return ``layers.Attention`` with plain convolutions.

    Raises:
        Refused: without a checkout, or for a form that it does not have.
    """
    layers = import_peer(checkout, "layers")
    if ours.pool_size != 2:
        raise Refused("BigGAN-PyTorch's attention always pools by 2")
    theirs = layers.Attention(ours.in_channels, which_conv=nn.Conv2d).to(ours.gamma)
    with torch.no_grad():
        for part in ("query", "key", "value", "out"):
            getattr(theirs, _LAYERS[part]).weight.copy_(getattr(ours, part).weight)
        theirs.gamma.copy_(ours.gamma)
    return cast(nn.Module, theirs)


def peer_networks(
    generator: Generator, discriminator: Discriminator, checkout: Path | None
) -> tuple[nn.Module, nn.Module]:
    """Return G and D.

    Raises:
        Refused: without a checkout, or for a form of the networks that it does not have.
    """
    module = import_peer(checkout, "BigGAN")
    config = generator.config
    if config.resolution < 64 or not config.num_classes or not config.g_attention or not config.d_attention:
        raise Refused("made for 64 pixels and more, with classes and attention")
    options: dict[str, Any] = {
        "resolution": config.resolution,
        "n_classes": config.num_classes,
        "SN_eps": config.sn_eps,
        "BN_eps": config.bn_eps,
        "skip_init": True,
    }
    theirs_g = module.Generator(
        G_ch=config.base_width,
        dim_z=config.latent_dim,
        G_attn="_".join(map(str, config.g_attention)),
        G_shared=False,
        no_optim=True,
        **options,
    )
    theirs_d = module.Discriminator(
        D_ch=config.base_width, D_attn="_".join(map(str, config.d_attention)), **options
    )
    copy_weights(generator, theirs_g)
    copy_weights(discriminator, theirs_d)
    return theirs_g, theirs_d


@torch.no_grad()
def copy_weights(ours: Generator | Discriminator, theirs: Any) -> None:
    """Fill one of their networks with the weights and singular vectors of ours."""
    last = len(ours.blocks)
    places = {f"blocks.{index}": f"blocks.{index}.0" for index in range(last)}
    places |= {
        "last_block": f"blocks.{last}.0",
        "last_norm": "output_layer.0",
        "last_conv": "output_layer.2",
        "head.linear": "linear",
        "head.embedding": "embed",
    }
    attended = [index for index, parts in enumerate(theirs.blocks) if len(parts) > 1]
    for index, resolution in zip(attended, ours.mixers, strict=True):
        places[f"mixers.{resolution}"] = f"blocks.{index}.1"
    for name, layer in ours.named_modules():
        if not isinstance(layer, (SpectralNormLayer, ConditionalBatchNorm2d, SelfAttention2d)):
            continue
        place, _, part = name.rpartition(".")
        inside = f"{places.get(place, '')}.{_LAYERS.get(part, part)}".lstrip(".")
        target = theirs.get_submodule(places.get(name, inside))
        if isinstance(layer, SelfAttention2d):
            target.gamma.copy_(layer.gamma)
        elif isinstance(layer, SpectralNormLayer):
            target.weight.copy_(layer.weight)
            target.u0.copy_(layer.weight_u.unsqueeze(0))
            if getattr(layer, "bias", None) is not None:
                target.bias.copy_(layer.bias)
        else:
            gain, bias = cast(Tensor, layer.weight), cast(Tensor, layer.bias)
            if layer.num_classes is None:
                target.gain.copy_(gain)
                target.bias.copy_(bias)
            else:
                target.gain.weight.copy_(gain - 1)
                target.bias.weight.copy_(bias)
