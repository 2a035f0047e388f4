"""SAGAN's generator and discriminator, from 32 to 256 pixels.

At 128 pixels these are the released code's networks. One rule gives the other sizes: widths halve as the resolution
doubles, from at most 16 times the base width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from sagan.errors import UserError, check_at_least, check_choices, listed
from sagan_layers import (
    ConditionalBatchNorm2d,
    ProjectionDiscriminatorHead,
    ResamplingConv2d,
    SelfAttention2d,
    SNConv2d,
    SNLinear,
    checkpointed,
)

RESOLUTIONS = (32, 64, 128, 256)
Mixer = Literal["attention", "residual"]
Init = Literal["xavier_uniform", "orthogonal", "normal", "default"]
_DRAW_WEIGHT: dict[Init, Callable[[Tensor], Tensor] | None] = {
    "xavier_uniform": nn.init.xavier_uniform_,
    "orthogonal": nn.init.orthogonal_,
    "normal": partial(nn.init.normal_, std=0.02),
    "default": None,
}


@dataclass(frozen=True)
class NetworkConfig:
    """Shapes and initial weights of both networks.

    Attributes:
        resolution: height and width of the images in pixels: 32, 64, 128 or 256.
        base_width: channels of the feature map with the highest resolution.
        num_classes: number of classes; 0 for an unconditional GAN, None to take the data's.
        latent_dim: size of z.
        g_attention: resolutions of the feature maps that G applies attention to.
        d_attention: resolutions of the feature maps that D applies attention to.
        mixer: "attention", or in its place a "residual" block with as many parameters (paper, table 1).
        g_spectral_norm: normalise G's convolutions and linear layer.
        d_spectral_norm: normalise D's layers, its head included.
        sn_eps: epsilon of spectral normalisation.
        bn_eps: epsilon of batch norm.
        bn_momentum: momentum of the conditional batch norms.
        last_bn_momentum: momentum of G's last, unconditional batch norm.
        biased_running_var: keep biased running variances, as TensorFlow does.
        init: initial weights of convolutions, linear layers and embeddings.
    """

    resolution: int = 128
    base_width: int = 64
    num_classes: int | None = None
    latent_dim: int = 128
    g_attention: tuple[int, ...] = (32,)
    d_attention: tuple[int, ...] = (32,)
    mixer: Mixer = "attention"
    g_spectral_norm: bool = True
    d_spectral_norm: bool = True
    sn_eps: float = 1e-12
    bn_eps: float = 1e-5
    bn_momentum: float = 0.001
    last_bn_momentum: float = 0.0001
    biased_running_var: bool = True
    init: Init = "xavier_uniform"

    def __post_init__(self) -> None:
        if self.resolution not in RESOLUTIONS:
            raise UserError(f"resolution: expected one of {RESOLUTIONS}, got {self.resolution}")
        check_choices(self)
        check_at_least(self, 0, "num_classes")
        check_at_least(self, 1, "base_width", "latent_dim")
        if not min(self.sn_eps, self.bn_eps) > 0:
            raise UserError(f"sn_eps, bn_eps: expected above 0, got {self.sn_eps}, {self.bn_eps}")
        momenta = (self.bn_momentum, self.last_bn_momentum)
        if not all(0 <= momentum <= 1 for momentum in momenta):
            raise UserError(f"bn_momentum, last_bn_momentum: expected from 0 to 1, got {momenta}")
        for name, chosen, allowed in (
            ("g_attention", self.g_attention, [r for r, _ in _generator_widths(self)[1:]]),
            ("d_attention", self.d_attention, [r for r, _ in _discriminator_widths(self)]),
        ):
            wrong = sorted(set(chosen) - set(allowed))
            if wrong or len(set(chosen)) != len(chosen):
                raise UserError(
                    f"{name}: expected different resolutions out of {allowed}, got {listed(chosen)}"
                )

    @property
    def head_classes(self) -> int | None:
        """The number of classes as the layers take it: None for an unconditional GAN."""
        if self.num_classes is None:
            raise UserError("num_classes: expected a number, got None (take it from the data first)")
        return self.num_classes or None


def _generator_widths(config: NetworkConfig) -> list[tuple[int, int]]:
    """Return (resolution, channels) of G's feature maps, from 4x4 to the image's."""
    resolutions = [4 * 2**i for i in range((config.resolution // 4).bit_length())]
    return [(r, config.base_width * min(16, config.resolution // r)) for r in resolutions]


def _discriminator_widths(config: NetworkConfig) -> list[tuple[int, int]]:
    """Return (resolution, channels) of D's feature maps, from half the image's to 4x4."""
    half = config.resolution // 2
    return [(r, config.base_width * min(16, half // r)) for r, _ in reversed(_generator_widths(config)[:-1])]


class Generator(nn.Module):
    """G: latents and labels to images.

    At 128 pixels: linear layer to 1024 x 4 x 4; up-blocks to 1024 x 8 x 8, 512 x 16 x 16, 256 x 32 x 32,
    128 x 64 x 64 and 64 x 128 x 128, with attention after one of them; batch norm, ReLU, 3x3 convolution, tanh.

    Shape:
        - latents: [N, latent_dim].
        - labels: [N], or None for an unconditional GAN.
        - Output: [N, 3, resolution, resolution] from -1 to 1.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoints_activations = False
        linear = partial(SNLinear, eps=config.sn_eps) if config.g_spectral_norm else nn.Linear
        conv = _conv(config.g_spectral_norm, config)
        (first_resolution, width), *following = _generator_widths(config)
        self.first_shape = (width, first_resolution, first_resolution)
        self.linear = linear(config.latent_dim, width * first_resolution**2)
        self.blocks = nn.ModuleList()
        self.mixers = nn.ModuleDict()
        for resolution, out_channels in following:
            self.blocks.append(UpBlock(width, out_channels, config))
            if resolution in config.g_attention:
                self.mixers[str(resolution)] = _mixer(out_channels, config.g_spectral_norm, config)
            width = out_channels
        self.last_norm = _norm(config, momentum=config.last_bn_momentum)(width)
        self.last_conv = conv(width, 3, 3, padding=1)
        initialize(self, config.init)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the images of these latents and labels."""
        x = self.linear(latents).reshape(-1, *self.first_shape)
        for block in self.blocks:
            x = checkpointed(block, x, labels) if self.checkpoints_activations else block(x, labels)
            if str(x.size(2)) in self.mixers:
                x = self.mixers[str(x.size(2))](x)
        return torch.tanh(self.last_conv(self.last_norm(x)))


class UpBlock(nn.Module):
    """Residual block of G that doubles the resolution. The norms include the ReLU."""

    def __init__(self, in_channels: int, out_channels: int, config: NetworkConfig) -> None:
        super().__init__()
        conv = _conv(config.g_spectral_norm, config)
        norm = _norm(config, num_classes=config.head_classes, momentum=config.bn_momentum)
        self.norm1 = norm(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, padding=1, upsample=2)
        self.norm2 = norm(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1)
        self.shortcut = conv(in_channels, out_channels, 1, upsample=2)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """[N, in, H, W] -> [N, out, 2H, 2W]."""
        main = self.conv1(self.norm1(x, labels))
        main = self.conv2(self.norm2(main, labels))
        y: Tensor = self.shortcut(x) + main
        return y


class Discriminator(nn.Module):
    """D: images and labels to logits.

    At 128 pixels: down-blocks to 64 x 64 x 64, 128 x 32 x 32, 256 x 16 x 16, 512 x 8 x 8 and 1024 x 4 x 4, with
    attention after one of them; a last block that keeps the size; ReLU, sum over positions, projection head.

    Shape:
        - images: [N, 3, resolution, resolution] from -1 to 1.
        - labels: [N], or None for an unconditional GAN.
        - Output: [N, 1].
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoints_activations = False
        self.blocks = nn.ModuleList()
        self.mixers = nn.ModuleDict()
        width = 3
        for resolution, out_channels in _discriminator_widths(config):
            self.blocks.append(DownBlock(width, out_channels, config, preactivation=len(self.blocks) > 0))
            if resolution in config.d_attention:
                self.mixers[str(resolution)] = _mixer(out_channels, config.d_spectral_norm, config)
            width = out_channels
        self.last_block = LastBlock(width, config)
        self.head = ProjectionDiscriminatorHead(
            width, config.head_classes, spectral_norm=config.d_spectral_norm, eps=config.sn_eps
        )
        initialize(self, config.init)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the logits of these images for their labels."""
        x = images
        for block in self.blocks:
            x = checkpointed(block, x) if self.checkpoints_activations else block(x)
            if str(x.size(2)) in self.mixers:
                x = self.mixers[str(x.size(2))](x)
        logits: Tensor = self.head(self.last_block(x), labels)
        return logits


class DownBlock(nn.Module):
    """Residual block of D that halves the resolution. The first has no ``preactivation``: its input is the image."""

    def __init__(
        self, in_channels: int, out_channels: int, config: NetworkConfig, *, preactivation: bool = True
    ) -> None:
        super().__init__()
        self.preactivation = preactivation
        conv = _conv(config.d_spectral_norm, config)
        self.conv1 = conv(in_channels, out_channels, 3, padding=1)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1, downsample=2)
        self.shortcut = conv(in_channels, out_channels, 1, downsample=2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H/2, W/2]."""
        main = self.conv1(torch.relu(x) if self.preactivation else x)
        main = self.conv2(torch.relu(main))
        y: Tensor = self.shortcut(x) + main
        return y


class LastBlock(nn.Module):
    """Last residual block of D. It keeps the resolution, and its shortcut is the identity."""

    def __init__(self, channels: int, config: NetworkConfig) -> None:
        super().__init__()
        conv = _conv(config.d_spectral_norm, config)
        self.conv1 = conv(channels, channels, 3, padding=1)
        self.conv2 = conv(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        main: Tensor = self.conv2(torch.relu(self.conv1(torch.relu(x))))
        return x + main


class ResidualMixer(nn.Module):
    r"""The paper's control for attention: a residual block with as many parameters in the same place.

    .. math:: y = x + \gamma\, W_2\, \mathrm{ReLU}(W_1\, \mathrm{ReLU}(x))

    The paper does not specify the block. Two 1x1 convolutions without bias, with as many channels between them as
    attention's keys and values have together, have exactly the weights of its four convolutions; gamma stays.
    """

    def __init__(self, channels: int, config: NetworkConfig, *, spectral_norm: bool = True) -> None:
        super().__init__()
        hidden = max(1, channels // 8) + max(1, channels // 2)
        conv = _conv(spectral_norm, config)
        self.conv1 = conv(channels, hidden, 1, bias=False)
        self.conv2 = conv(hidden, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        main = self.conv2(torch.relu(self.conv1(torch.relu(x))))
        y: Tensor = x + (self.gamma * main).to(x.dtype)
        return y


@torch.no_grad()
def initialize(network: nn.Module, init: Init) -> None:
    """Draw the weights of convolutions, linear layers and embeddings, and set their biases to zero.

    "default" leaves weights and biases as torch draws them.
    """
    draw = _DRAW_WEIGHT[init]
    if draw is None:
        return
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear, nn.Embedding)):
            draw(layer.weight)
            if not isinstance(layer, nn.Embedding) and layer.bias is not None:
                nn.init.zeros_(layer.bias)


def count_parameters(network: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def _conv(spectral_norm: bool, config: NetworkConfig) -> Callable[..., nn.Conv2d]:
    return partial(SNConv2d, eps=config.sn_eps) if spectral_norm else ResamplingConv2d


def _norm(
    config: NetworkConfig, *, momentum: float, num_classes: int | None = None
) -> Callable[[int], ConditionalBatchNorm2d]:
    """Return a function from a number of channels to a batch norm followed by a ReLU."""
    return partial(
        ConditionalBatchNorm2d,
        num_classes=num_classes,
        eps=config.bn_eps,
        momentum=momentum,
        biased_running_var=config.biased_running_var,
        activation="relu",
    )


def _mixer(channels: int, spectral_norm: bool, config: NetworkConfig) -> nn.Module:
    if config.mixer == "attention":
        return SelfAttention2d(channels, spectral_norm=spectral_norm, eps=config.sn_eps)
    return ResidualMixer(channels, config, spectral_norm=spectral_norm)
