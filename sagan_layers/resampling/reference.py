"""Convolutions with resampling in plain torch: the definitions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class ResamplingOptions:
    """A convolution of stride 1 and its resampling.

    Attributes:
        upsample: True for upsampling before the convolution, False for pooling after it.
        factor: of the resampling.
        padding: zeros on each side of (height, width); "same" if the two sides differ.
        dilation: of the convolution, (height, width).
        groups: of the convolution.
    """

    upsample: bool
    factor: int
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int

    def reach(self, weight: Tensor) -> tuple[int, int]:
        """Return the distance from the first to the last tap of the kernel."""
        (height, width), (vertical, horizontal) = weight.shape[2:], self.dilation
        return vertical * (height - 1), horizontal * (width - 1)

    def even_padding(self) -> tuple[int, int]:
        """Return the padding, which is not "same"."""
        assert not isinstance(self.padding, str)
        return self.padding

    def plain_multiplications(self, x: Tensor, weight: Tensor) -> int:
        """Return how many multiplications the plain composition takes."""
        height, width = self.output_size(x, weight)
        pooled = 1 if self.upsample else self.factor**2
        return x.size(0) * height * width * pooled * weight.numel()

    def output_size(self, x: Tensor, weight: Tensor) -> tuple[int, int]:
        """Return height and width of the result."""
        large = [size * self.factor if self.upsample else size for size in x.shape[2:]]
        if not isinstance(self.padding, str):
            reach = self.reach(weight)
            large = [large[i] + 2 * self.padding[i] - reach[i] for i in range(2)]
        height, width = large if self.upsample else [size // self.factor for size in large]
        return height, width


class ResamplingInputs(NamedTuple):
    """Decide which form serves: x [N, C, H, W] and weight [out, C / groups, kernel height, kernel width]."""

    x: Tensor
    weight: Tensor
    options: ResamplingOptions


def upsample(x: Tensor, weight: Tensor, bias: Tensor | None, options: ResamplingOptions) -> Tensor:
    """Return the convolution of x after nearest upsampling."""
    enlarged = F.interpolate(x, scale_factor=options.factor, mode="nearest")
    return F.conv2d(
        enlarged, weight, bias, padding=options.padding, dilation=options.dilation, groups=options.groups
    )


def downsample(x: Tensor, weight: Tensor, bias: Tensor | None, options: ResamplingOptions) -> Tensor:
    """Return the convolution of x, averaged over squares of ``factor`` x ``factor`` pixels."""
    y = F.conv2d(x, weight, bias, padding=options.padding, dilation=options.dilation, groups=options.groups)
    return F.avg_pool2d(y, options.factor)
