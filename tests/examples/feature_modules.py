"""A feature network of milliseconds, for the tests of the evaluation."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SmallNetwork(nn.Module):
    """Features [N, 8] and logits [N, 4] of a fixed random convolution."""

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(8, 3, 5, 5, generator=draws) / 8)
        self.register_buffer("head", torch.randn(4, 8, generator=draws) * 3)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = nn.functional.conv2d(images.float() / 127.5 - 1, self.get_buffer("weight"), stride=3)
        features = x.relu().mean((2, 3))
        return features, features @ self.get_buffer("head").T
