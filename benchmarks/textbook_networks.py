"""SAGAN's networks as people write them: a layer an operation, weights normalised at every forward.

Made from the trainer's networks, whose weights they copy. Also BigGAN-PyTorch's own networks with these weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Refused
from benchmarks.peer import import_peer
from sagan.networks import Discriminator, Generator, NetworkConfig, UpBlock
from sagan_layers import ConditionalBatchNorm2d, SelfAttention2d

__all__ = [
    "Discriminator",
    "Generator",
    "NetworkConfig",
    "TextbookDiscriminator",
    "TextbookGenerator",
    "TextbookNormalized",
    "peer_networks",
]


class TextbookNormalized(nn.Module):
    """A convolution, linear layer or embedding whose weight is normalised as BigGAN-PyTorch does it."""

    weight_u: Tensor

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        layer = cast(Any, ours)
        self.weight = _copy(layer.weight)
        bias = getattr(layer, "bias", None)
        self.bias = None if bias is None else _copy(bias)
        self.padding: tuple[int, int] | None = layer.padding if isinstance(ours, nn.Conv2d) else None
        self.is_embedding = isinstance(ours, nn.Embedding)
        self.eps: float = layer.eps
        self.register_buffer("weight_u", layer.weight_u.clone().unsqueeze(0))

    def normalized(self) -> Tensor:
        """Return the weight over its spectral norm; in training u moves."""
        matrix = self.weight.view(self.weight.size(0), -1)
        with torch.no_grad():
            v = F.normalize(self.weight_u @ matrix, eps=self.eps)
            u = F.normalize(v @ matrix.t(), eps=self.eps)
            if self.training:
                self.weight_u.copy_(u)
        normalized: Tensor = self.weight / (v @ matrix.t() @ u.t()).squeeze()
        return normalized

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        if self.is_embedding:
            return F.embedding(x, self.normalized())
        if self.padding is not None:
            return F.conv2d(x, self.normalized(), self.bias, padding=self.padding)
        return F.linear(x, self.normalized(), self.bias)


class TextbookConditionalNorm(nn.Module):
    """Batch norm without affine, then gain and bias of the label."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, ours: ConditionalBatchNorm2d) -> None:
        super().__init__()
        assert ours.weight is not None
        assert ours.bias is not None
        self.gain, self.bias = _copy(ours.weight), _copy(ours.bias)
        self.eps = ours.eps
        self.register_buffer("running_mean", torch.zeros(ours.num_features))
        self.register_buffer("running_var", torch.ones(ours.num_features))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return the normalised x, scaled and shifted."""
        if self.gain.dim() == 1:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.gain, self.bias, self.training, eps=self.eps
            )
        x = F.batch_norm(x, self.running_mean, self.running_var, training=self.training, eps=self.eps)
        gain, bias = F.embedding(labels, self.gain), F.embedding(labels, self.bias)
        return x * gain[..., None, None] + bias[..., None, None]


class TextbookAttention(nn.Module):
    """BigGAN-PyTorch's form of SAGAN's attention."""

    def __init__(self, ours: SelfAttention2d) -> None:
        super().__init__()
        self.theta, self.phi, self.g, self.o = (
            TextbookNormalized(layer) for layer in (ours.query, ours.key, ours.value, ours.out)
        )
        self.gamma = _copy(ours.gamma)

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus gamma times the attention over its positions."""
        N, _, H, W = x.shape
        theta = self.theta(x).flatten(2)  # [N, E, L]
        phi = F.max_pool2d(self.phi(x), 2).flatten(2)  # [N, E, S]
        g = F.max_pool2d(self.g(x), 2).flatten(2)  # [N, Ev, S]
        beta = F.softmax(torch.bmm(theta.transpose(1, 2), phi), -1)
        gathered = torch.bmm(g, beta.transpose(1, 2)).reshape(N, -1, H, W)
        y: Tensor = self.gamma * self.o(gathered) + x
        return y


class TextbookUpBlock(nn.Module):
    """Residual block of G."""

    def __init__(self, ours: UpBlock) -> None:
        super().__init__()
        self.norm1, self.norm2 = TextbookConditionalNorm(ours.norm1), TextbookConditionalNorm(ours.norm2)
        self.conv1, self.conv2 = TextbookNormalized(ours.conv1), TextbookNormalized(ours.conv2)
        self.shortcut = TextbookNormalized(ours.shortcut)

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
        self.linear = TextbookNormalized(ours.linear)
        self.blocks = nn.ModuleList(TextbookUpBlock(cast(UpBlock, block)) for block in ours.blocks)
        self.attention = _textbook_attention(ours.mixers)
        self.last_norm = TextbookConditionalNorm(ours.last_norm)
        self.last_conv = TextbookNormalized(ours.last_conv)

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
        self.conv1 = TextbookNormalized(cast(nn.Module, ours.conv1))
        self.conv2 = TextbookNormalized(cast(nn.Module, ours.conv2))
        self.shortcut = None if place == "last" else TextbookNormalized(cast(nn.Module, ours.shortcut))

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
        self.attention = _textbook_attention(ours.mixers)
        self.last_block = TextbookDownBlock(ours.last_block, "last")
        self.linear = TextbookNormalized(ours.head.linear)
        self.embedding = TextbookNormalized(cast(nn.Module, ours.head.embedding))

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


def _textbook_attention(mixers: nn.ModuleDict) -> nn.ModuleDict:
    return nn.ModuleDict(
        {name: TextbookAttention(cast(SelfAttention2d, mixer)) for name, mixer in mixers.items()}
    )


def _copy(parameter: Any) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(memory_format=torch.contiguous_format))


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
