"""SAGAN's networks as people write them: a layer an operation, weights normalised at every forward.

They copy the weights of the trainer's networks, as do BigGAN-PyTorch's networks here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines import (
    TextbookAttention,
    TextbookConditionalNorm,
    TextbookNormalized,
    copied,
    import_peer,
)
from benchmarks.harness import Refused
from sagan.networks import Discriminator, Generator, UpBlock
from sagan_layers import SelfAttention2d, SpectralNormLayer


def _normalized(ours: nn.Module) -> TextbookNormalized:
    assert isinstance(ours, SpectralNormLayer)
    return TextbookNormalized(ours, ours.weight_u, ours.eps)


def _attention(mixers: nn.ModuleDict) -> nn.ModuleDict:
    found = nn.ModuleDict()
    for name, mixer in mixers.items():
        ours = cast(SelfAttention2d, mixer)
        theta, phi, g, o = map(_normalized, (ours.query, ours.key, ours.value, ours.out))
        found[name] = TextbookAttention((theta, phi, g, o), copied(ours.gamma))
    return found


class TextbookUpBlock(nn.Module):
    """Residual block of G."""

    def __init__(self, ours: UpBlock) -> None:
        super().__init__()
        self.norm1, self.norm2 = TextbookConditionalNorm(ours.norm1), TextbookConditionalNorm(ours.norm2)
        self.conv1, self.conv2 = _normalized(ours.conv1), _normalized(ours.conv2)
        self.shortcut = _normalized(ours.shortcut)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, 2H, 2W]."""
        main = F.interpolate(F.relu(self.norm1(x, labels)), scale_factor=2)
        main = self.conv2(F.relu(self.norm2(self.conv1(main), labels)))
        y: Tensor = main + self.shortcut(F.interpolate(x, scale_factor=2))
        return y


class TextbookGenerator(nn.Module):
    """G with copies of the weights of one of the trainer's."""

    def __init__(self, ours: Generator) -> None:
        super().__init__()
        self.first_shape = ours.first_shape
        self.linear = _normalized(ours.linear)
        self.blocks = nn.ModuleList(TextbookUpBlock(cast(UpBlock, block)) for block in ours.blocks)
        self.attention = _attention(ours.mixers)
        self.last_norm = TextbookConditionalNorm(ours.last_norm)
        self.last_conv = _normalized(ours.last_conv)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Return images."""
        x: Tensor = self.linear(latents).view(-1, *self.first_shape)
        for block in self.blocks:
            x = block(x, labels)
            if str(x.size(2)) in self.attention:
                x = self.attention[str(x.size(2))](x)
        images: Tensor = torch.tanh(self.last_conv(F.relu(self.last_norm(x, labels))))
        return images


class TextbookDownBlock(nn.Module):
    """Residual block of D: the first, one that halves the resolution, or the last."""

    def __init__(self, ours: nn.Module, place: str) -> None:
        super().__init__()
        self.place = place
        self.conv1 = _normalized(cast(nn.Module, ours.conv1))
        self.conv2 = _normalized(cast(nn.Module, ours.conv2))
        self.shortcut = None if place == "last" else _normalized(cast(nn.Module, ours.shortcut))

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H/2, W/2], or [N, C, H, W] in the last."""
        main = self.conv2(F.relu(self.conv1(x if self.place == "first" else F.relu(x))))
        y: Tensor
        if self.shortcut is None:
            y = main + x
            return y
        main = F.avg_pool2d(main, 2)
        if self.place == "first":
            y = main + self.shortcut(F.avg_pool2d(x, 2))
        else:
            y = main + F.avg_pool2d(self.shortcut(x), 2)
        return y


class TextbookDiscriminator(nn.Module):
    """D with copies of the weights of one of the trainer's."""

    def __init__(self, ours: Discriminator) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            TextbookDownBlock(block, "middle" if index else "first")
            for index, block in enumerate(ours.blocks)
        )
        self.attention = _attention(ours.mixers)
        self.last_block = TextbookDownBlock(ours.last_block, "last")
        self.linear = _normalized(ours.head.linear)
        self.embedding = _normalized(cast(nn.Module, ours.head.embedding))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return logits."""
        x = images
        for block in self.blocks:
            x = block(x)
            if str(x.size(2)) in self.attention:
                x = self.attention[str(x.size(2))](x)
        pooled = torch.sum(F.relu(self.last_block(x)), [2, 3])
        logits: Tensor = self.linear(pooled) + torch.sum(self.embedding(labels) * pooled, 1, keepdim=True)
        return logits


def peer_networks(
    generator: Generator, discriminator: Discriminator, checkout: Path | None
) -> tuple[nn.Module, nn.Module]:
    """Return BigGAN-PyTorch's G and D with copies of the weights of ours.

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
    with torch.no_grad():
        _fill_generator(theirs_g, generator)
        _fill_discriminator(theirs_d, discriminator)
    return theirs_g, theirs_d


def _fill_generator(theirs: Any, ours: Generator) -> None:
    _fill(theirs.linear, ours.linear)
    for blocks, block in zip(theirs.blocks, ours.blocks, strict=True):
        target, source = blocks[0], cast(UpBlock, block)
        _fill(target.conv1, source.conv1)
        _fill(target.conv2, source.conv2)
        _fill(target.conv_sc, source.shortcut)
        for norm, our_norm in ((target.bn1, source.norm1), (target.bn2, source.norm2)):
            norm.gain.weight.copy_(cast(Tensor, our_norm.weight) - 1)
            norm.bias.weight.copy_(cast(Tensor, our_norm.bias))
    _fill_attention(theirs, ours.mixers)
    theirs.output_layer[0].gain.copy_(cast(Tensor, ours.last_norm.weight))
    theirs.output_layer[0].bias.copy_(cast(Tensor, ours.last_norm.bias))
    _fill(theirs.output_layer[2], ours.last_conv)


def _fill_discriminator(theirs: Any, ours: Discriminator) -> None:
    for blocks, block in zip(theirs.blocks, [*ours.blocks, ours.last_block], strict=True):
        source = cast(Any, block)
        _fill(blocks[0].conv1, source.conv1)
        _fill(blocks[0].conv2, source.conv2)
        if hasattr(source, "shortcut"):
            _fill(blocks[0].conv_sc, source.shortcut)
    _fill_attention(theirs, ours.mixers)
    _fill(theirs.linear, ours.head.linear)
    _fill(theirs.embed, cast(nn.Module, ours.head.embedding))


def _fill_attention(theirs: Any, mixers: nn.ModuleDict) -> None:
    found = [blocks[1] for blocks in theirs.blocks if len(blocks) > 1]
    for target, mixer in zip(found, mixers.values(), strict=True):
        source = cast(SelfAttention2d, mixer)
        pairs = (("theta", source.query), ("phi", source.key), ("g", source.value), ("o", source.out))
        for name, layer in pairs:
            _fill(getattr(target, name), layer)
        target.gamma.copy_(source.gamma)


def _fill(theirs: Any, ours: nn.Module) -> None:
    layer = cast(Any, ours)
    theirs.weight.copy_(layer.weight)
    theirs.u0.copy_(layer.weight_u.unsqueeze(0))
    bias = getattr(ours, "bias", None)
    if bias is not None:
        theirs.bias.copy_(bias)
