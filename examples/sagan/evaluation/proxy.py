"""A stand-in for the Inception network on small machines: small, random and fixed; no download."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WIDTHS = (8, 16, 32)
MAX_RESOLUTION = 64
_GRID = 4


class RandomFeatures(nn.Module):
    """Three convolutions with fixed random weights: means of the first two, and a 4x4 grid of the third.

    Weights are drawn as integers, so they are the same on every machine.

    Shape:
        - images: uint8 [N, 3, R, R]; larger images are reduced to 64 pixels by areas.
        - Output: [N, 536].
    """

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        inputs = 3
        for number, width in enumerate(_WIDTHS):
            weight = torch.randint(-127, 128, (width, inputs, 3, 3), generator=draws).float()
            # Variance 2 / fan-in, so that ReLU keeps the size of activations.
            self.register_buffer(f"weight{number}", weight * (6 / (9 * inputs)) ** 0.5 / 127)
            inputs = width

    def forward(self, images: Tensor) -> Tensor:
        """Return features."""
        x = images.float() / 127.5 - 1
        if x.size(2) > MAX_RESOLUTION:
            x = F.interpolate(x, size=(MAX_RESOLUTION, MAX_RESOLUTION), mode="area")
        parts = []
        for number in range(len(_WIDTHS)):
            if number:
                parts.append(x.mean((2, 3)))
                x = F.avg_pool2d(x, 2)
            x = F.conv2d(x, self.get_buffer(f"weight{number}"), padding=1).relu()
        return torch.cat([*parts, F.adaptive_avg_pool2d(x, _GRID).flatten(1)], 1)
