"""Sums of windows, which move resampling to the other side of a convolution.

Repeating pixels means placing them ``s`` apart between zeros and summing every ``s`` x ``s`` window; averaging squares
means averaging every window and keeping each ``s``-th average. Sums of windows commute with a convolution. So they can
run on its other side (``filtered``, ``matmul``), or on its weight (``folded``). Either way the convolution runs at the
small map's resolution, with stride ``s``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sagan_layers.resampling.reference import ResamplingInputs, ResamplingOptions
from sagan_layers.torch_support import is_tracing


def unsupported_reasons(inputs: ResamplingInputs) -> list[str]:
    """Return why sums of windows cannot be moved to the other side of the convolution."""
    if inputs.options.factor == 1:
        return ["there is nothing to resample"]
    padding = inputs.options.padding
    return [f"padding = {padding!r} is uneven for an even kernel"] if isinstance(padding, str) else []


def window_sums(x: Tensor, size: int, padding: tuple[int, int] = (0, 0), scale: float = 1.0) -> Tensor:
    """Return ``scale`` times the sum of every ``size`` x ``size`` window of x.

    Args:
        x: [N, C, H, W].
        size: of the windows.
        padding: zeros on each side of (height, width) before; negative crops.
        scale: factor on the sums.
    """
    # Compilers fuse the derivative of the slices, and subclasses see a custom function's result as a view.
    if torch.compiler.is_compiling() or is_tracing() or type(x) is not Tensor:
        return _window_sums(x, size, padding, scale)
    result: Tensor = _WindowSums.apply(x, size, padding, scale)  # type: ignore[no-untyped-call]
    return result


class _WindowSums(torch.autograd.Function):
    """The same with a gradient that is again sums of windows; autograd's own would fill large maps with zeros."""

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


def window_means(x: Tensor, options: ResamplingOptions) -> Tensor:
    """Return the means of the windows of x that the pooled convolution reads."""
    return window_sums(x, options.factor, options.even_padding(), 1 / options.factor**2)


def spread_margins(weight: Tensor, options: ResamplingOptions) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return by how much to crop the spread map, and then to pad it, for the sums of its windows."""
    padding, reach = options.even_padding(), options.reach(weight)
    vertical, horizontal = (options.factor - 1 + padding[i] - reach[i] for i in range(2))
    return (max(0, -vertical), max(0, -horizontal)), (max(0, vertical), max(0, horizontal))


def transposed(weight: Tensor, groups: int) -> Tensor:
    """[out, in / groups, kh, kw] -> [in, out / groups, kh, kw], as transposed convolution takes it."""
    if groups == 1:
        return weight.transpose(0, 1)
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    return grouped.transpose(1, 2).flatten(0, 1)


def with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """Return y plus the bias, in place: oneDNN's transposed convolution is five times slower with a 16-bit bias."""
    return y if bias is None else y.add_(bias[:, None, None])
