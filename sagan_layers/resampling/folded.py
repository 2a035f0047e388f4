"""The sums of windows folded into the weight of one convolution with stride."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sagan_layers.resampling import windows
from sagan_layers.resampling.reference import ResamplingInputs, ResamplingOptions
from sagan_layers.resampling.windows import transposed, with_bias
from sagan_layers.torch_support import without_autocast


def unsupported_reasons(inputs: ResamplingInputs) -> list[str]:
    """Return why the weight cannot be folded."""
    _, weight, options = inputs
    if reasons := windows.unsupported_reasons(inputs):
        return reasons
    reasons = [f"dilation = {options.dilation} is not 1"] if options.dilation != (1, 1) else []
    padding, reach = options.even_padding(), options.reach(weight)
    if options.upsample and (padding[0] > reach[0] or padding[1] > reach[1]):
        reasons.append(f"padding = {padding} is larger than the kernel's size less one")
    return reasons


def upsample(x: Tensor, weight: Tensor, bias: Tensor | None, options: ResamplingOptions) -> Tensor:
    """Return one transposed convolution with a folded weight."""
    kernel = folded_weight(weight.flip(2, 3), options.factor)
    reach, padding = options.reach(weight), options.even_padding()
    y = F.conv_transpose2d(
        x,
        transposed(kernel, options.groups),
        stride=options.factor,
        padding=(reach[0] - padding[0], reach[1] - padding[1]),
        groups=options.groups,
    )
    return with_bias(y, bias)


def downsample(x: Tensor, weight: Tensor, bias: Tensor | None, options: ResamplingOptions) -> Tensor:
    """Return one strided convolution with a folded weight."""
    kernel = folded_weight(weight, options.factor) / options.factor**2
    return F.conv2d(
        x, kernel, bias, stride=options.factor, padding=options.even_padding(), groups=options.groups
    )


def folded_weight(weight: Tensor, factor: int) -> Tensor:
    """Return the kernels [*, *, kh + factor - 1, kw + factor - 1] that also sum windows; autocast leaves them alone."""
    kernel = weight.shape[2:]
    with without_autocast(weight.device):
        placed = torch.kron(*(_placed_at_each_offset(size, factor, weight) for size in kernel))
        folded = weight.flatten(2) @ placed
    return folded.view(*weight.shape[:2], *(size + factor - 1 for size in kernel))


def _placed_at_each_offset(size: int, factor: int, weight: Tensor) -> Tensor:
    """Return the matrix [size, size + factor - 1] whose row i has ones from i to i + factor - 1."""
    ones = torch.ones(size, size + factor - 1, dtype=weight.dtype, device=weight.device)
    return ones.triu().tril(factor - 1)
