"""Forms of a convolution with nearest upsampling before it or average pooling after it.

Repeating pixels is placing them ``s`` apart between zeros and summing every ``s`` x ``s`` window; averaging squares
is averaging every window and keeping each ``s``-th. Sums of windows commute with a convolution, so they can be
moved off the large map's side of it: onto the map behind it or before it ("filtered", "matmul"), or into its
weight ("folded"). Either way the convolution itself runs at the small map's resolution, with stride ``s``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sagan_layers.resampling.reference import Resampling
from sagan_layers.torch_support import without_autocast

Run = Callable[[Tensor, Tensor, Tensor | None, Resampling], Tensor]


def window_sums(x: Tensor, size: int, padding: tuple[int, int] = (0, 0), scale: float = 1.0) -> Tensor:
    """Return ``scale`` times the sum of every ``size`` x ``size`` window of x.

    Args:
        x: [N, C, H, W].
        size: of the windows.
        padding: zeros on each side of (height, width) before; negative crops.
        scale: factor on the sums.
    """
    if torch.compiler.is_compiling():  # which fuses the derivative of the slices by itself
        return _window_sums(x, size, padding, scale)
    result: Tensor = _WindowSums.apply(x, size, padding, scale)  # type: ignore[no-untyped-call]
    return result


class _WindowSums(torch.autograd.Function):
    """The same with a gradient that is again sums of windows; autograd's own would fill maps with zeros."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, size: int, padding: tuple[int, int], scale: float) -> Tensor:
        return _window_sums(x, size, padding, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, tuple[int, int], float], output: Tensor) -> None:
        _, ctx.size, ctx.padding, ctx.scale = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        vertical, horizontal = (ctx.size - 1 - padding for padding in ctx.padding)
        return window_sums(gradients[0], ctx.size, (vertical, horizontal), ctx.scale), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return window_sums(tangents[0], ctx.size, ctx.padding, ctx.scale)


def _window_sums(x: Tensor, size: int, padding: tuple[int, int], scale: float) -> Tensor:
    vertical, horizontal = padding
    if vertical or horizontal:
        x = F.pad(x, (horizontal, horizontal, vertical, vertical))
    x = _sums_along(x, size, 3)
    if scale != 1.0:
        x.mul_(scale)
    return _sums_along(x, size, 2)


def _sums_along(x: Tensor, size: int, dim: int) -> Tensor:
    length = x.size(dim) - size + 1
    total = x.narrow(dim, 0, length) + x.narrow(dim, 1, length)
    for start in range(2, size):
        total.add_(x.narrow(dim, start, length))
    return total


def reordered_unsupported(x: Tensor, weight: Tensor, how: Resampling) -> list[str]:
    """Return why the convolution does not commute with the resampling."""
    if tuple(weight.shape[2:]) != (1, 1):
        return [f"the kernel is {weight.size(2)}x{weight.size(3)}, and only 1x1 commutes with resampling"]
    return [f"padding = {how.padding} is not 0"] if how.padding != (0, 0) else []


def reordered_upsample(x: Tensor, weight: Tensor, bias: Tensor | None, how: Resampling) -> Tensor:
    """Return the convolution at the small size, enlarged."""
    return F.interpolate(
        F.conv2d(x, weight, bias, groups=how.groups), scale_factor=how.factor, mode="nearest"
    )


def reordered_downsample(x: Tensor, weight: Tensor, bias: Tensor | None, how: Resampling) -> Tensor:
    """Return the convolution of the pooled map."""
    return F.conv2d(F.avg_pool2d(x, how.factor), weight, bias, groups=how.groups)


def moving_unsupported(x: Tensor, weight: Tensor, how: Resampling) -> list[str]:
    """Return why sums of windows cannot be moved across the convolution."""
    if how.factor == 1:
        return ["there is nothing to resample"]
    return [f"padding = {how.padding!r} is uneven for an even kernel"] if isinstance(how.padding, str) else []


def _spread_margins(weight: Tensor, how: Resampling) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return by how much the spread map is to be cropped, and then padded, for the sums of its windows."""
    padding, reach = how.even_padding(), how.reach(weight)
    vertical, horizontal = (how.factor - 1 + padding[i] - reach[i] for i in range(2))
    return (max(0, -vertical), max(0, -horizontal)), (max(0, vertical), max(0, horizontal))


def _transposed(weight: Tensor, groups: int) -> Tensor:
    """[out, in / groups, kh, kw] -> [in, out / groups, kh, kw], as transposed convolution takes it."""
    if groups == 1:
        return weight.transpose(0, 1)
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    return grouped.transpose(1, 2).flatten(0, 1)


def _with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    # Not left to the transposed convolution: oneDNN's takes five times as long with a 16-bit bias.
    return y if bias is None else y.add_(bias[:, None, None])


def filtered_upsample(x: Tensor, weight: Tensor, bias: Tensor | None, how: Resampling) -> Tensor:
    """Return sums of windows of a transposed convolution."""
    crop, pad = _spread_margins(weight, how)
    spread = F.conv_transpose2d(
        x,
        _transposed(weight.flip(2, 3), how.groups),
        stride=how.factor,
        padding=crop,
        groups=how.groups,
        dilation=how.dilation,
    )
    return _with_bias(window_sums(spread, how.factor, pad), bias)


def _window_means(x: Tensor, how: Resampling) -> Tensor:
    return window_sums(x, how.factor, how.even_padding(), 1 / how.factor**2)


def filtered_downsample(x: Tensor, weight: Tensor, bias: Tensor | None, how: Resampling) -> Tensor:
    """Return a strided convolution of means of windows."""
    return F.conv2d(
        _window_means(x, how), weight, bias, stride=how.factor, dilation=how.dilation, groups=how.groups
    )


def matmul_upsample(x: Tensor, weight: Tensor, bias: Tensor | None, how: Resampling) -> Tensor:
    """Return the same as :func:`filtered_upsample` by one matrix product."""
    (N, C, H, W), (outputs, _, *kernel) = x.shape, weight.shape
    taps = kernel[0] * kernel[1]
    matrix = weight.permute(0, 2, 3, 1).reshape(how.groups, -1, C // how.groups)
    columns = x.transpose(0, 1).reshape(how.groups, C // how.groups, -1)
    products = torch.bmm(matrix, columns).view(outputs, taps, N, H * W)
    products = products.permute(2, 0, 1, 3).flip(2).reshape(N, outputs * taps, H * W)
    crop, pad = _spread_margins(weight, how)
    reach = how.reach(weight)
    height, width = (how.factor * (size - 1) + reach[i] + 1 - 2 * crop[i] for i, size in enumerate((H, W)))
    spread = F.fold(
        products,
        (height, width),
        (kernel[0], kernel[1]),
        dilation=how.dilation,
        padding=crop,
        stride=how.factor,
    )
    return _in_format_of(x, _with_bias(window_sums(spread, how.factor, pad), bias))


def matmul_downsample(x: Tensor, weight: Tensor, bias: Tensor | None, how: Resampling) -> Tensor:
    """Return the same as :func:`filtered_downsample` by one matrix product."""
    N, outputs = x.size(0), weight.size(0)
    patches = F.unfold(_window_means(x, how), weight.shape[2:], dilation=how.dilation, stride=how.factor)
    columns = patches.transpose(0, 1).reshape(how.groups, patches.size(1) // how.groups, -1)
    matrix = weight.reshape(how.groups, outputs // how.groups, -1)
    y = (
        torch.bmm(matrix, columns)
        if bias is None
        else torch.baddbmm(bias.view(how.groups, -1, 1), matrix, columns)
    )
    return _in_format_of(x, y.view(outputs, N, *how.output_size(x, weight)).transpose(0, 1))


def _in_format_of(x: Tensor, y: Tensor) -> Tensor:
    if x.stride(1) == 1 and not x.is_contiguous():  # channels_last, asked in a way that vmap answers
        return y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return y.contiguous()


def folded_weight(weight: Tensor, factor: int) -> Tensor:
    """Return the kernels, [*, *, kh + factor - 1, kw + factor - 1], that sum windows along with the convolution.

    Computed in the weight's own dtype, whatever autocast says.
    """
    kernel = weight.shape[2:]
    with without_autocast(weight.device):
        placed = torch.kron(*(_placed_at_each_offset(size, factor, weight) for size in kernel))
        folded = weight.flatten(2) @ placed
    return folded.view(*weight.shape[:2], *(size + factor - 1 for size in kernel))


def _placed_at_each_offset(size: int, factor: int, weight: Tensor) -> Tensor:
    """Return the matrix [size, size + factor - 1] whose row i has ones from i to i + factor - 1."""
    ones = torch.ones(size, size + factor - 1, dtype=weight.dtype, device=weight.device)
    return ones.triu().tril(factor - 1)


def folded_upsample(x: Tensor, weight: Tensor, bias: Tensor | None, how: Resampling) -> Tensor:
    """Return one transposed convolution with a folded weight."""
    kernel = folded_weight(weight.flip(2, 3), how.factor)
    reach, padding = how.reach(weight), how.even_padding()
    y = F.conv_transpose2d(
        x,
        _transposed(kernel, how.groups),
        stride=how.factor,
        padding=(reach[0] - padding[0], reach[1] - padding[1]),
        groups=how.groups,
    )
    return _with_bias(y, bias)


def folded_downsample(x: Tensor, weight: Tensor, bias: Tensor | None, how: Resampling) -> Tensor:
    """Return one strided convolution with a folded weight."""
    kernel = folded_weight(weight, how.factor) / how.factor**2
    return F.conv2d(x, kernel, bias, stride=how.factor, padding=how.even_padding(), groups=how.groups)


def folded_unsupported(x: Tensor, weight: Tensor, how: Resampling) -> list[str]:
    """Return why the weight cannot be folded."""
    if reasons := moving_unsupported(x, weight, how):
        return reasons
    reasons = [f"dilation = {how.dilation} is not 1"] if how.dilation != (1, 1) else []
    padding, reach = how.even_padding(), how.reach(weight)
    if how.upsample and (padding[0] > reach[0] or padding[1] > reach[1]):
        reasons.append(f"padding = {padding} is larger than the kernel's size less one")
    return reasons
