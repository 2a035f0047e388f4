"""What ours is measured against: layers and attention as most GAN code writes them, and BigGAN-PyTorch's modules."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Refused
from sagan_layers import ConditionalBatchNorm2d, SelfAttention2d

Core = Callable[[Tensor, Tensor, Tensor], Tensor]


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


def textbook_resampling(x: Tensor, weight: Tensor, bias: Tensor, up: bool) -> Tensor:
    """Return the convolution and its resampling as two operations."""
    padding = weight.size(2) // 2
    if up:
        return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=padding)
    return F.avg_pool2d(F.conv2d(x, weight, bias, padding=padding), 2)


class TextbookAttention(nn.Module):
    """The usual SAGAN and BigGAN module.

    Args:
        projections: theta, phi, g and o.
        gamma: the residual's gain.
        pool_size: of the keys and values.
        core: what takes the place of bmm, softmax, bmm.
    """

    def __init__(
        self,
        projections: tuple[nn.Module, nn.Module, nn.Module, nn.Module],
        gamma: nn.Parameter,
        pool_size: int = 2,
        core: Core | None = None,
    ) -> None:
        super().__init__()
        self.theta, self.phi, self.g, self.o = projections
        self.gamma = gamma
        self.pool_size = pool_size
        self.core = core

    @classmethod
    def sharing(cls, ours: SelfAttention2d, core: Core | None = None) -> TextbookAttention:
        """Return the module with the parameters of one of ours (the same tensors)."""
        projections = (ours.query, ours.key, ours.value, ours.out)
        return cls(projections, ours.gamma, ours.pool_size, core)

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
        layer: whose weight and bias are copied.
        u: the left singular vector to start from, [out].
        eps: the least norm that a vector is divided by.
    """

    weight_u: Tensor

    def __init__(self, layer: nn.Module, u: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = copied(layer.weight)
        bias = getattr(layer, "bias", None)
        self.bias = None if bias is None else copied(bias)
        self.padding = cast(tuple[int, int], layer.padding) if isinstance(layer, nn.Conv2d) else None
        self.is_embedding = isinstance(layer, nn.Embedding)
        self.eps = eps
        self.register_buffer("weight_u", u.clone().unsqueeze(0))

    def normalized(self) -> Tensor:
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
        if self.is_embedding:
            return F.embedding(x, self.normalized())
        if self.padding is not None:
            return F.conv2d(x, self.normalized(), self.bias, padding=self.padding)
        return F.linear(x, self.normalized(), self.bias)


class TextbookConditionalNorm(nn.Module):
    """Batch norm without affine, then gain and bias of the label; plain batch norm where ours has no classes.

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
        self.register_buffer("running_mean", torch.zeros(ours.num_features))
        self.register_buffer("running_var", torch.ones(ours.num_features))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return the normalised x, scaled and shifted."""
        gain, bias = (self.gain, self.bias) if self.gain.dim() == 1 else (None, None)
        statistics = self.running_mean, self.running_var
        x = F.batch_norm(x, *statistics, gain, bias, self.training, eps=self.eps)
        if gain is not None:
            return x
        gains, biases = (F.embedding(labels, table)[..., None, None] for table in (self.gain, self.bias))
        if self.casts:
            gains, biases = gains.to(x.dtype), biases.to(x.dtype)
        return x * gains + biases


def copied(parameter: Any) -> nn.Parameter:
    """Return a new parameter with the same values."""
    return nn.Parameter(parameter.detach().clone(memory_format=torch.contiguous_format))


def import_peer(checkout: Path | None, name: str) -> ModuleType:
    """Return a module of a checkout of BigGAN-PyTorch, such as "layers".

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
    """Return BigGAN-PyTorch's ``layers.Attention`` with copies of our weights.

    Raises:
        Refused: without a checkout, or for a form that it does not have.
    """
    layers = import_peer(checkout, "layers")
    if ours.pool_size != 2:
        raise Refused("BigGAN-PyTorch's attention always pools by 2")
    module = cast(nn.Module, layers.Attention(ours.in_channels, which_conv=nn.Conv2d)).to(ours.gamma)
    pairs = {"theta": ours.query, "phi": ours.key, "g": ours.value, "o": ours.out}
    with torch.no_grad():
        for name, conv in pairs.items():
            cast(nn.Conv2d, getattr(module, name)).weight.copy_(cast(nn.Conv2d, conv).weight)
        cast(nn.Parameter, module.gamma).copy_(ours.gamma)
    return module
