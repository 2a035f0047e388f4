"""SAGAN's generator and discriminator, from 32 to 256 pixels.

At 128 pixels these are the released code's networks. One rule gives the other sizes: widths halve as the resolution
doubles, from at most 16 times the base width. Other code bases differ in some places; :class:`NetworkConfig` has a
field for each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
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
Condition = Literal["table", "one_hot", "embedding"]
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

    The defaults are the released code. A field for another code base names it.

    Attributes:
        resolution: height and width of the images in pixels: 32, 64, 128 or 256.
        base_width: channels of the feature map with the highest resolution.
        g_channels: channels of G's feature maps, from 4x4 to the image's; by default the rule of base_width. At 32, 64
            and 256 pixels every code base has its own (BigGAN-PyTorch at 256: 16, 16, 8, 8, 4, 2, 1 times 96).
        d_channels: channels after each block of D, the last blocks included; by default the rule of base_width. Fewer
            halving blocks than the rule's are possible (BigGAN-PyTorch, StudioGAN, mimicry at 32: 2, to 8x8).
        d_last_blocks: blocks at D's end that keep the resolution (BigGAN-PyTorch, StudioGAN, mimicry at 32: 2). Their
            shortcut is the identity, or a convolution where the channels change (StudioGAN at 64).
        d_hidden_channels: channels between the convolutions of D's blocks, those of the output ("out") or of the input
            ("in", mimicry, sngan_projection); the first block's are always those of the output.
        d_relu_before_blocks: the ReLU before D's blocks reaches their shortcuts too (StudioGAN, mimicry, voletiv).
        num_classes: number of classes; 0 for an unconditional GAN; by default those of the data.
        latent_dim: size of z.
        g_attention: resolutions of the feature maps that G applies attention to.
        d_attention: resolutions of the feature maps that D applies attention to.
        attention_bias: attention's convolutions have biases (voletiv).
        mixer: "attention", or in its place a "residual" block with as many parameters (paper, table 1).
        upsampling: of G's blocks, "nearest" or "bilinear" (mimicry).
        condition: what G's batch norms take gain and bias from: a "table" by class; linear maps of "one_hot" labels,
            normalised if G is (StudioGAN, mmgeneration); or linear maps of an "embedding" that all of them share
            (BigGAN). With a map the gain is 1 + map, so that a gain at 0 is neutral.
        embedding_dim: width of the shared embedding, which is not normalised (BigGAN).
        hierarchical_latents: split z into equal chunks; the first is the linear layer's input, the others join the
            embedding in one block each (BigGAN).
        g_spectral_norm: normalise G's convolutions and linear layer.
        d_spectral_norm: normalise D's layers, its head included.
        sn_eps: epsilon of spectral normalisation.
        sn_eps_mode: "add" it to the norms, or "clamp" them to at least it (torch and all code bases that use its
            spectral_norm, BigGAN-PyTorch, mmgeneration).
        sn_iterate_in_evaluation: iterate from the stored vectors in evaluation too; False uses them as they are
            (torch, StudioGAN, mimicry).
        bn_eps: epsilon of batch norm.
        last_bn_eps: epsilon of G's last, unconditional batch norm; by default bn_eps (BigGAN-PyTorch: always 1e-5).
        bn_momentum: momentum of the conditional batch norms.
        last_bn_momentum: momentum of G's last, unconditional batch norm.
        biased_running_var: keep biased running variances, as TensorFlow does.
        init: initial weights of convolutions, linear layers and embeddings.
    """

    resolution: int = 128
    base_width: int = 64
    g_channels: tuple[int, ...] = ()
    d_channels: tuple[int, ...] = ()
    d_last_blocks: int = 1
    d_hidden_channels: Literal["out", "in"] = "out"
    d_relu_before_blocks: bool = False
    num_classes: int | None = None
    latent_dim: int = 128
    g_attention: tuple[int, ...] = (32,)
    d_attention: tuple[int, ...] = (32,)
    attention_bias: bool = False
    mixer: Mixer = "attention"
    upsampling: Literal["nearest", "bilinear"] = "nearest"
    condition: Condition = "table"
    embedding_dim: int = 128
    hierarchical_latents: bool = False
    g_spectral_norm: bool = True
    d_spectral_norm: bool = True
    sn_eps: float = 1e-12
    sn_eps_mode: Literal["add", "clamp"] = "add"
    sn_iterate_in_evaluation: bool = True
    bn_eps: float = 1e-5
    last_bn_eps: float | None = None
    bn_momentum: float = 0.001
    last_bn_momentum: float = 0.0001
    biased_running_var: bool = True
    init: Init = "xavier_uniform"

    def __post_init__(self) -> None:
        if self.resolution not in RESOLUTIONS:
            raise UserError(f"resolution: expected one of {RESOLUTIONS}, got {self.resolution}")
        check_choices(self)
        check_at_least(self, 0, "num_classes")
        check_at_least(self, 1, "base_width", "latent_dim", "d_last_blocks", "embedding_dim")
        for name in ("sn_eps", "bn_eps", "last_bn_eps"):
            eps = getattr(self, name)
            if eps is not None and not 1e-37 <= eps <= 1:  # as the blocks take it
                raise UserError(f"{name}: expected from 1e-37 to 1, got {eps}")
        momenta = (self.bn_momentum, self.last_bn_momentum)
        if not all(0 <= momentum <= 1 for momentum in momenta):
            raise UserError(f"bn_momentum, last_bn_momentum: expected from 0 to 1, got {momenta}")
        self._check_channels()
        self._check_condition()
        halving = discriminator_widths(self)[: -self.d_last_blocks]
        for name, chosen, allowed in (
            ("g_attention", self.g_attention, [r for r, _ in generator_widths(self)[1:]]),
            ("d_attention", self.d_attention, [r for r, _ in halving]),
        ):
            wrong = sorted(set(chosen) - set(allowed))
            if wrong or len(set(chosen)) != len(chosen):
                raise UserError(
                    f"{name}: expected different resolutions out of {allowed}, got {listed(chosen)}"
                )

    def _check_channels(self) -> None:
        maps, last = len(map_resolutions(self.resolution)), self.d_last_blocks
        if self.g_channels and not (len(self.g_channels) == maps and min(self.g_channels) > 0):
            raise UserError(
                f"g_channels: expected {maps} numbers above 0 at {self.resolution} pixels, from the 4x4 map to the "
                f"image's, or none, got {listed(self.g_channels)}"
            )
        if self.d_channels and not (last < len(self.d_channels) < maps + last and min(self.d_channels) > 0):
            raise UserError(
                f"d_channels: expected {last + 1} to {last + maps - 1} numbers above 0 at {self.resolution} pixels, "
                f"the last {last} for d_last_blocks, or none, got {listed(self.d_channels)}"
            )

    def _check_condition(self) -> None:
        if not self.hierarchical_latents:
            return
        if self.condition != "embedding":
            raise UserError(
                f"hierarchical_latents: expected condition 'embedding' with them, got {self.condition!r}"
            )
        chunks = len(map_resolutions(self.resolution))
        if self.latent_dim % chunks:
            raise UserError(
                f"latent_dim: expected a multiple of {chunks}, the chunks of hierarchical_latents at "
                f"{self.resolution} pixels, got {self.latent_dim}"
            )

    @property
    def linear_features(self) -> int:
        """The number of latents that G's linear layer takes; all but for hierarchical latents."""
        return (
            self.latent_dim // len(map_resolutions(self.resolution))
            if self.hierarchical_latents
            else self.latent_dim
        )

    @property
    def condition_features(self) -> int | None:
        """The width of the vectors that G's batch norms take; None if they take labels or nothing."""
        if self.condition == "table":
            return None
        classes = self.head_classes or 0
        vector = self.embedding_dim if classes and self.condition == "embedding" else classes
        return vector + (self.linear_features if self.hierarchical_latents else 0) or None

    @property
    def head_classes(self) -> int | None:
        """The number of classes as the layers take it: None for an unconditional GAN."""
        if self.num_classes is None:
            raise UserError("num_classes: expected a number, got None (take it from the data first)")
        return self.num_classes or None


def map_resolutions(resolution: int) -> list[int]:
    """Return the resolutions of G's feature maps, from 4x4 to the image's."""
    return [4 * 2**i for i in range((resolution // 4).bit_length())]


def generator_widths(config: NetworkConfig) -> list[tuple[int, int]]:
    """Return (resolution, channels) of G's feature maps, from 4x4 to the image's."""
    resolutions = map_resolutions(config.resolution)
    by_rule = [config.base_width * min(16, config.resolution // r) for r in resolutions]
    return list(zip(resolutions, config.g_channels or by_rule, strict=True))


def discriminator_widths(config: NetworkConfig) -> list[tuple[int, int]]:
    """Return (resolution, channels) after each of D's blocks; the last blocks keep the resolution."""
    resolutions, last = map_resolutions(config.resolution)[-2::-1], config.d_last_blocks
    by_rule = [config.base_width * min(16, config.resolution // 2 // r) for r in resolutions]
    channels = config.d_channels or [*by_rule, *by_rule[-1:] * last]
    resolutions = resolutions[: len(channels) - last]
    return list(zip(resolutions + resolutions[-1:] * last, channels, strict=True))


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
        linear: Any = partial(SNLinear, **_sn_options(config)) if config.g_spectral_norm else nn.Linear
        conv = _conv(config.g_spectral_norm, config)
        (first_resolution, width), *following = generator_widths(config)
        self.first_shape = (width, first_resolution, first_resolution)
        self.linear = linear(config.linear_features, width * first_resolution**2)
        self.embedding: nn.Embedding | None = None
        if config.condition == "embedding" and config.head_classes:
            self.embedding = nn.Embedding(config.head_classes, config.embedding_dim)
        self.blocks = nn.ModuleList()
        self.mixers = nn.ModuleDict()
        for resolution, out_channels in following:
            self.blocks.append(UpBlock(width, out_channels, config))
            if resolution in config.g_attention:
                self.mixers[str(resolution)] = _mixer(out_channels, config.g_spectral_norm, config)
            width = out_channels
        self.last_norm = _norm(config, eps=config.last_bn_eps, momentum=config.last_bn_momentum)(width)
        self.last_conv = conv(width, 3, 3, padding=1)
        initialize(self, config.init)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the images of these latents and labels."""
        latents, conditions = self._conditions(latents, labels)
        x = self.linear(latents).reshape(-1, *self.first_shape)
        for number, (block, condition) in enumerate(zip(self.blocks, conditions, strict=True)):
            x = checkpointed(block, x, condition) if self.checkpoints_activations else block(x, condition)
            resolution = str(8 * 2**number)  # not x.size(2), which is no number for a tracer
            if resolution in self.mixers:
                x = self.mixers[resolution](x)
        return torch.tanh(self.last_conv(self.last_norm(x)))

    def _conditions(self, latents: Tensor, labels: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
        """Return the linear layer's latents, and what each block's norms take: labels, vectors or nothing."""
        config, condition = self.config, labels
        if labels is not None and self.embedding is not None:
            condition = self.embedding(labels)
        elif labels is not None and config.condition == "one_hot" and config.num_classes:
            condition = F.one_hot(labels.long(), config.num_classes).to(self.linear.weight.dtype)
        if not config.hierarchical_latents:
            return latents, [condition] * len(self.blocks)
        width = config.linear_features
        first, *chunks = (latents[:, i * width : (i + 1) * width] for i in range(len(self.blocks) + 1))
        if condition is None:
            return first, [*chunks]
        return first, [torch.cat((condition, chunk), dim=1) for chunk in chunks]


class UpBlock(nn.Module):
    """Residual block of G that doubles the resolution. The norms include the ReLU."""

    def __init__(self, in_channels: int, out_channels: int, config: NetworkConfig) -> None:
        super().__init__()
        conv = _conv(config.g_spectral_norm, config)
        norm = _norm(config, momentum=config.bn_momentum, conditional=True)
        self.bilinear = config.upsampling == "bilinear"
        upsample = 1 if self.bilinear else 2
        self.norm1 = norm(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, padding=1, upsample=upsample)
        self.norm2 = norm(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1)
        self.shortcut = conv(in_channels, out_channels, 1, upsample=upsample)

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """[N, in, H, W] -> [N, out, 2H, 2W]."""
        main = self.norm1(x, condition)
        if self.bilinear:
            main, x = (F.interpolate(each, scale_factor=2, mode="bilinear") for each in (main, x))
        main = self.conv2(self.norm2(self.conv1(main), condition))
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
        width, widths = 3, discriminator_widths(config)
        halving = len(widths) - config.d_last_blocks
        for number, (resolution, out_channels) in enumerate(widths):
            downsample = 2 if number < halving else 1
            self.blocks.append(
                DownBlock(width, out_channels, config, preactivation=number > 0, downsample=downsample)
            )
            if number < halving and resolution in config.d_attention:
                self.mixers[str(resolution)] = _mixer(out_channels, config.d_spectral_norm, config)
            width = out_channels
        self.last_block = self.blocks.pop(-1)
        self.head = ProjectionDiscriminatorHead(
            width, config.head_classes, spectral_norm=config.d_spectral_norm, **_sn_options(config)
        )
        initialize(self, config.init)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the logits of these images for their labels."""
        x = images
        for number, block in enumerate(self.blocks):
            x = checkpointed(block, x) if self.checkpoints_activations else block(x)
            resolution = str(self.config.resolution // 2 ** (number + 1))
            if resolution in self.mixers:
                x = self.mixers[resolution](x)
        logits: Tensor = self.head(self.last_block(x), labels)
        return logits


class DownBlock(nn.Module):
    """Residual block of D that halves the resolution.

    The first has no ``preactivation``: its input is the image. The last have ``downsample=1`` and keep the resolution;
    their shortcut is the identity if they keep the channels too.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: NetworkConfig,
        *,
        preactivation: bool = True,
        downsample: int = 2,
    ) -> None:
        super().__init__()
        self.preactivation = preactivation
        self.relu_reaches_shortcut = preactivation and config.d_relu_before_blocks
        conv = _conv(config.d_spectral_norm, config)
        hidden = in_channels if preactivation and config.d_hidden_channels == "in" else out_channels
        self.conv1 = conv(in_channels, hidden, 3, padding=1)
        self.conv2 = conv(hidden, out_channels, 3, padding=1, downsample=downsample)
        if downsample == 1 and in_channels == out_channels:
            self.shortcut: nn.Module = nn.Identity()
        else:
            self.shortcut = conv(in_channels, out_channels, 1, downsample=downsample)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H / downsample, W / downsample]."""
        activated = torch.relu(x) if self.preactivation else x
        main = self.conv2(torch.relu(self.conv1(activated)))
        y: Tensor = self.shortcut(activated if self.relu_reaches_shortcut else x) + main
        return y


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


def _sn_options(config: NetworkConfig) -> dict[str, Any]:
    """Return the options of spectral normalisation as the layers name them."""
    return {
        "eps": config.sn_eps,
        "eps_mode": config.sn_eps_mode,
        "iterate_when_frozen": config.sn_iterate_in_evaluation,
    }


def _conv(spectral_norm: bool, config: NetworkConfig) -> Callable[..., nn.Conv2d]:
    return partial(SNConv2d, **_sn_options(config)) if spectral_norm else ResamplingConv2d


def _norm(
    config: NetworkConfig, *, momentum: float, eps: float | None = None, conditional: bool = False
) -> Callable[[int], ConditionalBatchNorm2d]:
    """Return a function from a number of channels to a batch norm followed by a ReLU."""
    condition: dict[str, Any] = {}
    if conditional and config.condition_features:
        condition = {
            "condition_features": config.condition_features,
            "spectral_norm": config.g_spectral_norm,
            "sn_eps": config.sn_eps,
            "sn_eps_mode": config.sn_eps_mode,
            "iterate_when_frozen": config.sn_iterate_in_evaluation,
        }
    elif conditional:
        condition = {"num_classes": config.head_classes}
    return partial(
        ConditionalBatchNorm2d,
        **condition,
        eps=config.bn_eps if eps is None else eps,
        momentum=momentum,
        biased_running_var=config.biased_running_var,
        activation="relu",
    )


def _mixer(channels: int, spectral_norm: bool, config: NetworkConfig) -> nn.Module:
    if config.mixer == "attention":
        return SelfAttention2d(
            channels, bias=config.attention_bias, spectral_norm=spectral_norm, **_sn_options(config)
        )
    return ResidualMixer(channels, config, spectral_norm=spectral_norm)
