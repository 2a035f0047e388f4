"""A strided convolution with a box filter: after it when upsampling, before it when pooling."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from sagan_layers.resampling.reference import ResamplingOptions
from sagan_layers.resampling.windows import (
    spread_margins,
    transposed,
    window_means,
    window_sums,
    with_bias,
)


def upsample(x: Tensor, weight: Tensor, bias: Tensor | None, options: ResamplingOptions) -> Tensor:
    """Return sums of windows of a transposed convolution."""
    crop, pad = spread_margins(weight, options)
    spread = F.conv_transpose2d(
        x,
        transposed(weight.flip(2, 3), options.groups),
        stride=options.factor,
        padding=crop,
        groups=options.groups,
        dilation=options.dilation,
    )
    return with_bias(window_sums(spread, options.factor, pad), bias)


def downsample(x: Tensor, weight: Tensor, bias: Tensor | None, options: ResamplingOptions) -> Tensor:
    """Return a strided convolution of means of windows."""
    return F.conv2d(
        window_means(x, options),
        weight,
        bias,
        stride=options.factor,
        dilation=options.dilation,
        groups=options.groups,
    )
