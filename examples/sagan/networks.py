"""SAGAN's generator and discriminator, from 32 to 256 pixels.

The released code's networks for 128 pixels, carried to other sizes by one rule: the widest feature map is 16
times the base width, and widths halve as the resolution doubles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from sagan.errors import UserError
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
_INITS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "xavier_uniform": nn.init.xavier_uniform_,
    "orthogonal": nn.init.orthogonal_,
    "normal": partial(nn.init.normal_, std=0.02),
    "default": None,
}


@dataclass(frozen=True)
class NetworkConfig:
    """Everything that determines the two networks' shapes and start.

    Attributes:
        resolution: height and width of the images in pixels: 32, 64, 128 or 256.
        base_width: channels of the feature map nearest to the image.
        num_classes: number of classes; 0 for an unconditional GAN, None to take the data's.
        latent_dim: size of z.
        g_attention: resolutions of the feature maps after which G has attention.
        d_attention: the same for D.
        mixer: what stands there: "attention", or a "residual" block of equal parameter count (paper, table 1).
        g_spectral_norm: whether G's convolutions and linear layer are normalised.
        d_spectral_norm: whether D's are, its head included.
        sn_eps: epsilon of the spectral normalisation.
        bn_eps: epsilon of batch norm.
        bn_momentum: momentum of the conditional batch norms.
        last_bn_momentum: momentum of G's last, unconditional batch norm.
        biased_running_var: whether running variances are biased, as TensorFlow's.
        init: how convolutions, linear layers and embeddings start.
    """

    resolution: int = 128
    base_width: int = 64
    num_classes: int | None = None
    latent_dim: int = 128
    g_attention: tuple[int, ...] = (32,)
    d_attention: tuple[int, ...] = (32,)
    mixer: Literal["attention", "residual"] = "attention"
    g_spectral_norm: bool = True
    d_spectral_norm: bool = True
    sn_eps: float = 1e-12
    bn_eps: float = 1e-5
    bn_momentum: float = 0.001
    last_bn_momentum: float = 0.0001
    biased_running_var: bool = True
    init: Literal["xavier_uniform", "orthogonal", "normal", "default"] = "xavier_uniform"

    def __post_init__(self) -> None:
        if self.resolution not in RESOLUTIONS:
            raise UserError(f"resolution: expected one of {RESOLUTIONS}, got {self.resolution}")
        if self.num_classes is not None and self.num_classes < 0:
            raise UserError(f"num_classes: expected at least 0, got {self.num_classes}")
        if self.base_width < 1 or self.latent_dim < 1:
            raise UserError(
                f"base_width, latent_dim: expected at least 1, got {self.base_width}, {self.latent_dim}"
            )
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
                    f"{name}: expected different resolutions out of {allowed}, got {list(chosen)}"
                )
        for name, value, choices in (
            ("mixer", self.mixer, ("attention", "residual")),
            ("init", self.init, tuple(_INITS)),
        ):
            if value not in choices:
                raise UserError(f"{name}: expected one of {choices}, got {value!r}")

    @property
    def head_classes(self) -> int | None:
        """The number of classes for the layers: None for an unconditional GAN."""
        if self.num_classes is None:
            raise UserError("num_classes: expected a number, got None (it is taken from the data first)")
        return self.num_classes or None


def _generator_widths(config: NetworkConfig) -> list[tuple[int, int]]:
    """(resolution, channels) of G's feature maps, from 4x4 to the image's."""
    resolutions = [4 * 2**i for i in range((config.resolution // 4).bit_length())]
    return [(r, config.base_width * min(16, config.resolution // r)) for r in resolutions]


def _discriminator_widths(config: NetworkConfig) -> list[tuple[int, int]]:
    """(resolution, channels) of D's feature maps, from half the image's to 4x4."""
    half = config.resolution // 2
    return [(r, config.base_width * min(16, half // r)) for r, _ in reversed(_generator_widths(config)[:-1])]


class Generator(nn.Module):
    """G: latents and labels to images.

    Args:
        config: shapes and options; ``num_classes`` must be set.

    Shape:
        - latents: [N, latent_dim].
        - labels: [N], or None for an unconditional GAN.
        - Output: [N, 3, resolution, resolution] from -1 to 1.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoints_activations = False
        sn = config.g_spectral_norm
        widths = _generator_widths(config)
        (first_resolution, width), *following = widths
        self.first_shape = (width, first_resolution, first_resolution)
        self.linear = _linear(config.latent_dim, width * first_resolution**2, sn, config.sn_eps)
        self.blocks = nn.ModuleList()
        self.mixers = nn.ModuleDict()
        for resolution, outputs in following:
            self.blocks.append(UpBlock(width, outputs, config))
            if resolution in config.g_attention:
                self.mixers[str(resolution)] = _mixer(outputs, sn, config)
            width = outputs
        self.last_norm = ConditionalBatchNorm2d(
            width,
            eps=config.bn_eps,
            momentum=config.last_bn_momentum,
            biased_running_var=config.biased_running_var,
            activation="relu",
        )
        self.last_conv = _conv(width, 3, 3, sn, config.sn_eps)
        initialize(self, config.init)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the images of these latents and labels."""
        x = self.linear(latents).reshape(-1, *self.first_shape)
        for block in self.blocks:
            x = checkpointed(block, x, labels) if self.checkpoints_activations else block(x, labels)
            if str(x.size(2)) in self.mixers:
                x = self.mixers[str(x.size(2))](x)
        images: Tensor = torch.tanh(self.last_conv(self.last_norm(x)))
        return images


class UpBlock(nn.Module):
    """Residual block of G that doubles the resolution."""

    def __init__(self, in_channels: int, out_channels: int, config: NetworkConfig) -> None:
        super().__init__()
        norm = partial(
            ConditionalBatchNorm2d,
            num_classes=config.head_classes,
            eps=config.bn_eps,
            momentum=config.bn_momentum,
            biased_running_var=config.biased_running_var,
            activation="relu",
        )
        sn, eps = config.g_spectral_norm, config.sn_eps
        self.norm1 = norm(in_channels)
        self.conv1 = _conv(in_channels, out_channels, 3, sn, eps, upsample=2)
        self.norm2 = norm(out_channels)
        self.conv2 = _conv(out_channels, out_channels, 3, sn, eps)
        self.shortcut = _conv(in_channels, out_channels, 1, sn, eps, upsample=2)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """[N, in, H, W] -> [N, out, 2H, 2W]."""
        main = self.conv1(self.norm1(x, labels))
        main = self.conv2(self.norm2(main, labels))
        y: Tensor = self.shortcut(x) + main
        return y


class Discriminator(nn.Module):
    """D: images and labels to logits.

    Args:
        config: shapes and options; ``num_classes`` must be set.

    Shape:
        - images: [N, 3, resolution, resolution] from -1 to 1.
        - labels: [N], or None for an unconditional GAN.
        - Output: [N, 1].
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoints_activations = False
        sn = config.d_spectral_norm
        self.blocks = nn.ModuleList()
        self.mixers = nn.ModuleDict()
        width = 3
        for resolution, outputs in _discriminator_widths(config):
            block = DownBlock if self.blocks else FirstDownBlock
            self.blocks.append(block(width, outputs, config))
            if resolution in config.d_attention:
                self.mixers[str(resolution)] = _mixer(outputs, sn, config)
            width = outputs
        self.last_block = LastBlock(width, config)
        self.head = ProjectionDiscriminatorHead(
            width, config.head_classes, spectral_norm=sn, eps=config.sn_eps
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


class FirstDownBlock(nn.Module):
    """First block of D, without activation before its convolution; halves the resolution."""

    def __init__(self, in_channels: int, out_channels: int, config: NetworkConfig) -> None:
        super().__init__()
        sn, eps = config.d_spectral_norm, config.sn_eps
        self.conv1 = _conv(in_channels, out_channels, 3, sn, eps)
        self.conv2 = _conv(out_channels, out_channels, 3, sn, eps, downsample=2)
        self.shortcut = _conv(in_channels, out_channels, 1, sn, eps, downsample=2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H/2, W/2]."""
        main = self.conv2(torch.relu(self.conv1(x)))
        y: Tensor = self.shortcut(x) + main
        return y


class DownBlock(nn.Module):
    """Residual block of D that halves the resolution. Its shortcut takes the un-activated input."""

    def __init__(self, in_channels: int, out_channels: int, config: NetworkConfig) -> None:
        super().__init__()
        sn, eps = config.d_spectral_norm, config.sn_eps
        self.conv1 = _conv(in_channels, out_channels, 3, sn, eps)
        self.conv2 = _conv(out_channels, out_channels, 3, sn, eps, downsample=2)
        self.shortcut = _conv(in_channels, out_channels, 1, sn, eps, downsample=2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H/2, W/2]."""
        main = self.conv2(torch.relu(self.conv1(torch.relu(x))))
        y: Tensor = self.shortcut(x) + main
        return y


class LastBlock(nn.Module):
    """Last residual block of D; keeps the resolution and has the identity as its shortcut."""

    def __init__(self, channels: int, config: NetworkConfig) -> None:
        super().__init__()
        sn, eps = config.d_spectral_norm, config.sn_eps
        self.conv1 = _conv(channels, channels, 3, sn, eps)
        self.conv2 = _conv(channels, channels, 3, sn, eps)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        main: Tensor = self.conv2(torch.relu(self.conv1(torch.relu(x))))
        return x + main


class ResidualMixer(nn.Module):
    r"""The paper's control for attention: a residual block with as many parameters, in the same place.

    .. math:: y = x + \gamma\, W_2\, \mathrm{ReLU}(W_1\, \mathrm{ReLU}(x))

    The paper does not say how the block is made. Two bias-free 1x1 convolutions with key plus value channels
    between them have exactly the four convolutions' number of weights, and gamma is kept.
    """

    def __init__(self, channels: int, spectral_norm: bool, sn_eps: float) -> None:
        super().__init__()
        hidden = max(1, channels // 8) + max(1, channels // 2)
        self.conv1 = _conv(channels, hidden, 1, spectral_norm, sn_eps, bias=False)
        self.conv2 = _conv(hidden, channels, 1, spectral_norm, sn_eps, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        main = self.conv2(torch.relu(self.conv1(torch.relu(x))))
        y: Tensor = x + (self.gamma * main).to(x.dtype)
        return y


@torch.no_grad()
def initialize(network: nn.Module, init: str) -> None:
    """Draw the weights of convolutions, linear layers and embeddings; set their biases to zero.

    Args:
        network: whose layers to draw.
        init: "xavier_uniform", "orthogonal", "normal" (standard deviation 0.02), or "default" for torch's own,
            biases included.
    """
    draw = _INITS[init]
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


def _conv(
    inputs: int,
    outputs: int,
    kernel_size: int,
    spectral_norm: bool,
    eps: float,
    *,
    bias: bool = True,
    upsample: int = 1,
    downsample: int = 1,
) -> nn.Conv2d:
    conv = partial(SNConv2d, eps=eps) if spectral_norm else ResamplingConv2d
    return conv(
        inputs,
        outputs,
        kernel_size,
        padding=kernel_size // 2,
        bias=bias,
        upsample=upsample,
        downsample=downsample,
    )


def _linear(inputs: int, outputs: int, spectral_norm: bool, eps: float) -> nn.Linear:
    return SNLinear(inputs, outputs, eps=eps) if spectral_norm else nn.Linear(inputs, outputs)


def _mixer(channels: int, spectral_norm: bool, config: NetworkConfig) -> nn.Module:
    if config.mixer == "attention":
        return SelfAttention2d(channels, spectral_norm=spectral_norm, eps=config.sn_eps)
    return ResidualMixer(channels, spectral_norm, config.sn_eps)
