"""What ours is measured against: attention as people write it with torch, and other people's modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Refused
from benchmarks.peer import import_peer
from sagan_layers import SelfAttention2d

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

    def core(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (_padded_to_power_of_two(x).unsqueeze(1) for x in (query, key, value))  # one head
        attended: Tensor = compiled(q, k, v, scale=1.0)
        return attended.squeeze(1)[..., : value.size(2)]

    return core


def _padded_to_power_of_two(x: Tensor) -> Tensor:
    width = max(16, 1 << (x.size(2) - 1).bit_length())
    return F.pad(x, (0, width - x.size(2))).contiguous()


def textbook_compiled() -> Core:
    """Return the textbook core under torch.compile."""
    return torch.compile(textbook_attention, dynamic=False)


class TextbookBlock(nn.Module):
    """The usual SAGAN and BigGAN module, with the weights of one of ours.

    Args:
        ours: whose parameters are used (the same tensors).
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
        N, H, W = x.size(0), x.size(2), x.size(3)
        theta, phi, g = self.theta(x), self.phi(x), self.g(x)
        if self.pool_size > 1:
            phi, g = F.max_pool2d(phi, self.pool_size), F.max_pool2d(g, self.pool_size)
        theta = theta.reshape(N, theta.size(1), -1)  # [N, E, L]
        phi = phi.reshape(N, phi.size(1), -1)  # [N, E, S]
        g = g.reshape(N, g.size(1), -1)  # [N, Ev, S]
        if self.core is not None:
            gathered = self.core(theta.transpose(1, 2), phi.transpose(1, 2), g.transpose(1, 2)).transpose(
                1, 2
            )
        else:
            beta = F.softmax(torch.bmm(theta.transpose(1, 2), phi), -1)
            gathered = torch.bmm(g, beta.transpose(1, 2))  # [N, Ev, L]
        y: Tensor = self.gamma * self.o(gathered.reshape(N, -1, H, W)) + x
        return y


def peer_block(ours: SelfAttention2d, checkout: Path | None) -> nn.Module:
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
