"""A 1x1 convolution at the small resolution, before the upsampling or after the pooling: the two commute."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from sagan_layers.resampling.reference import ResamplingInputs, ResamplingOptions


def unsupported_reasons(inputs: ResamplingInputs) -> list[str]:
    """Return why the convolution does not commute with the resampling."""
    _, weight, options = inputs
    if tuple(weight.shape[2:]) != (1, 1):
        return [f"the kernel is {weight.size(2)}x{weight.size(3)}, and only 1x1 commutes with resampling"]
    return [f"padding = {options.padding} is not 0"] if options.padding != (0, 0) else []


def upsample(x: Tensor, weight: Tensor, bias: Tensor | None, options: ResamplingOptions) -> Tensor:
    """Return the convolution at the small size, enlarged."""
    return F.interpolate(
        F.conv2d(x, weight, bias, groups=options.groups), scale_factor=options.factor, mode="nearest"
    )


def downsample(x: Tensor, weight: Tensor, bias: Tensor | None, options: ResamplingOptions) -> Tensor:
    """Return the convolution of the pooled map."""
    return F.conv2d(F.avg_pool2d(x, options.factor), weight, bias, groups=options.groups)
