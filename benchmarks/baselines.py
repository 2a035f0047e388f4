"""What ours is measured against: layers, attention and networks as most GAN code writes them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan_layers import ConditionalBatchNorm2d, ResamplingConv2d, SelfAttention2d, SpectralNormLayer

Core = Callable[[Tensor, Tensor, Tensor], Tensor]
# Of a layer's input, weight and bias.
Operation = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def textbook_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return attention as most GAN code has it: the whole matrix, in the inputs' dtype."""
    logits = torch.bmm(query, key.transpose(1, 2))  # [N, L, S]
    return torch.bmm(torch.softmax(logits, dim=-1), value)


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return torch's fused attention called as users do, with the widths as they are."""
    query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)  # one head
    return F.scaled_dot_product_attention(query, key, value, scale=1.0).squeeze(1)


def sdpa_padded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return torch's fused attention as its kernels want it: equal widths, and each position's row together."""
    missing = value.size(2) - query.size(2)
    query, key = (F.pad(x.contiguous(), (0, missing)) for x in (query, key))
    return sdpa(query, key, value.contiguous())


def flex_attention() -> Core:
    """Return compiled FlexAttention, with the widths padded to the powers of two that it takes."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    compiled = torch.compile(flex, dynamic=False)

    def padded(x: Tensor) -> Tensor:
        width = max(16, 1 << (x.size(2) - 1).bit_length())
        return F.pad(x, (0, width - x.size(2))).contiguous()

    def core(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (padded(x).unsqueeze(1) for x in (query, key, value))  # one head
        attended: Tensor = compiled(q, k, v, scale=1.0)
        return attended.squeeze(1)[..., : value.size(2)]

    return core


def textbook_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    upsample: int = 1,
    downsample: int = 1,
    pools_first: bool = False,
) -> Tensor:
    """Return a convolution that pads to the same size, and its resampling as another operation."""
    if upsample > 1:
        x = F.interpolate(x, scale_factor=upsample, mode="nearest")
    if downsample > 1 and pools_first:
        x = F.avg_pool2d(x, downsample)
    y = F.conv2d(x, weight, bias, padding=weight.size(2) // 2)
    return F.avg_pool2d(y, downsample) if downsample > 1 and not pools_first else y


def textbook_operation(layer: nn.Module) -> Operation:
    """Return what a layer does with its input, weight and bias."""
    if isinstance(layer, nn.Embedding):
        return lambda labels, weight, _: F.embedding(labels, weight)
    if isinstance(layer, nn.Linear):
        return F.linear
    assert isinstance(layer, ResamplingConv2d)
    # The released code pools the image before D's first shortcut.
    pools_first = layer.kernel_size == (1, 1) and layer.in_channels == 3
    return partial(
        textbook_conv2d, upsample=layer.upsample, downsample=layer.downsample, pools_first=pools_first
    )


class TextbookAttention(nn.Module):
    """The usual SAGAN and BigGAN module.

    Args:
        ours: whose layers and gamma it takes (the same ones).
        core: what takes the place of bmm, softmax, bmm.
    """

    def __init__(self, ours: SelfAttention2d, core: Core | None = None) -> None:
        super().__init__()
        self.theta, self.phi, self.g, self.o = ours.query, ours.key, ours.value, ours.out
        self.gamma = ours.gamma
        self.pool_size = ours.pool_size
        self.core = core

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus gamma times the attention over its positions."""
        N, _, H, W = x.shape
        theta, phi, g = self.theta(x), self.phi(x), self.g(x)
        if self.pool_size > 1:
            phi, g = F.max_pool2d(phi, self.pool_size), F.max_pool2d(g, self.pool_size)
        theta, phi, g = theta.flatten(2), phi.flatten(2), g.flatten(2)  # [N, E, L], [N, E, S], [N, Ev, S]
        if self.core is not None:
            attended = self.core(*(each.transpose(1, 2) for each in (theta, phi, g)))  # [N, L, Ev]
            gathered = attended.transpose(1, 2)
        else:
            beta = F.softmax(torch.bmm(theta.transpose(1, 2), phi), -1)
            gathered = torch.bmm(g, beta.transpose(1, 2))  # [N, Ev, L]
        y: Tensor = self.gamma * self.o(gathered.reshape(N, -1, H, W)) + x
        return y


class TextbookNormalized(nn.Module):
    """A convolution, linear layer or embedding whose weight is normalised as BigGAN-PyTorch does it.

    Args:
        ours: whose weight, bias and left singular vector are copied.
        operation: in place of the layer's as :func:`textbook_operation` has it.
    """

    weight_u: Tensor

    def __init__(self, ours: SpectralNormLayer, operation: Operation | None = None) -> None:
        super().__init__()
        self.weight = copied(ours.weight)
        bias = getattr(ours, "bias", None)
        self.bias = None if bias is None else copied(bias)
        self.operation = operation or textbook_operation(ours)
        self.eps = ours.eps
        self.register_buffer("weight_u", ours.weight_u.clone().unsqueeze(0))

    def normalized_weight(self) -> Tensor:
        """Return the weight over its spectral norm; in training u moves."""
        matrix = self.weight.flatten(1)
        with torch.no_grad():
            v = F.normalize(self.weight_u @ matrix, eps=self.eps)
            u = F.normalize(v @ matrix.t(), eps=self.eps)
            if self.training:
                self.weight_u.copy_(u)
        normalized: Tensor = self.weight / (v @ matrix.t() @ u.t()).squeeze()
        return normalized

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return self.operation(x, self.normalized_weight(), self.bias)


class TextbookConditionalNorm(nn.Module):
    """Batch norm without affine, then gain and bias of the label, then ReLU where ours includes it.

    Where ours has no classes it is plain batch norm.

    Args:
        ours: whose gains and biases are copied.
        casts: whether gain and bias are cast to the map's dtype; if not, a 16-bit map becomes float32.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, ours: ConditionalBatchNorm2d, *, casts: bool = False) -> None:
        super().__init__()
        self.gain, self.bias = copied(ours.weight), copied(ours.bias)
        self.casts = casts
        self.eps = ours.eps
        self.relu = ours.activation == "relu"
        self.register_buffer("running_mean", torch.zeros(ours.num_features))
        self.register_buffer("running_var", torch.ones(ours.num_features))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the normalised x, scaled and shifted."""
        gain, bias = (self.gain, self.bias) if self.gain.dim() == 1 else (None, None)
        statistics = self.running_mean, self.running_var
        x = F.batch_norm(x, *statistics, gain, bias, self.training, eps=self.eps)
        if gain is None:
            assert labels is not None
            gains, biases = (F.embedding(labels, table)[..., None, None] for table in (self.gain, self.bias))
            if self.casts:
                gains, biases = gains.to(x.dtype), biases.to(x.dtype)
            x = x * gains + biases
        return F.relu(x) if self.relu else x


def copied(parameter: Any) -> nn.Parameter:
    """Return a new parameter with the same values."""
    return nn.Parameter(parameter.detach().clone(memory_format=torch.contiguous_format))


def textbook_network(ours: nn.Module) -> nn.Module:
    """Return a copy of a network as people write it: an operation at a time, weights normalised at every forward."""
    return _with_textbook_layers(copy.deepcopy(ours))


def _with_textbook_layers(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        setattr(module, name, _with_textbook_layers(child))
    if isinstance(module, SpectralNormLayer):
        return TextbookNormalized(module)
    if isinstance(module, ConditionalBatchNorm2d):
        return TextbookConditionalNorm(module)
    return TextbookAttention(module) if isinstance(module, SelfAttention2d) else module


@torch.no_grad()
def settle(network: nn.Module, gamma: float) -> None:
    """Give attention a weight, and make every u and v the first singular vectors, with a sigma of 1.

    So the vectors stand still, and the network computes the same with and without spectral normalisation.
    """
    for layer in network.modules():
        if isinstance(layer, SelfAttention2d):
            layer.gamma.fill_(gamma)
        elif isinstance(layer, SpectralNormLayer):
            u, v = layer.weight_u, layer.weight_v
            matrix = layer.weight.flatten(1)
            matrix = matrix - torch.outer(u, u @ matrix)
            matrix = matrix - torch.outer(matrix @ v, v)
            rows, columns = matrix.shape
            # Above what the largest singular value of so random a matrix is.
            largest = 1.2 * matrix.square().mean().sqrt() * (rows**0.5 + columns**0.5)
            layer.weight.copy_((matrix / largest.clamp_min(1e-12) + torch.outer(u, v)).view_as(layer.weight))
