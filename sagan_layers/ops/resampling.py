"""Forms of a convolution with nearest upsampling before it or average pooling after it, and which one serves.

Repeating pixels is placing them ``s`` apart between zeros and summing every ``s`` x ``s`` window; averaging squares
is averaging every window and keeping each ``s``-th. Sums of windows commute with a convolution, so they can be
moved off the large map's side of it: onto the map behind it or before it ("filtered", "matmul"), or into its
weight ("folded"). Either way the convolution itself runs at the small map's resolution, with stride ``s``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sagan_layers.ops import reference

# Measured on a CPU (docs/blocks/resampling.md). Below so many multiplications of the plain form, twice as many in
# 16 bits, the extra calls cost more than they save.
_FEW_MULTIPLICATIONS = 25_000_000
# Below so many channels on the small map's side of the convolution, filtering costs more than it saves.
_FEW_CHANNELS = 48
_FEW_CHANNELS_OF_LARGE_MAP = 192
# From this size on glibc's malloc gives a block back to the system when it is freed, and a new one costs as much
# time as filtering it.
_LARGE_MAP_BYTES = 2**25


@dataclass(frozen=True)
class Resampling:
    """A convolution of stride 1, and the resampling beside it.

    Attributes:
        upsample: whether x is upsampled before, or the result pooled after the convolution.
        factor: of the resampling.
        padding: zeros on each side of (height, width); "same" where that is uneven.
        dilation: of the convolution, (height, width).
        groups: of the convolution.
    """

    upsample: bool
    factor: int
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int

    def reach(self, weight: Tensor) -> tuple[int, int]:
        """Return how far apart the first and last tap of the kernel are."""
        (height, width), (vertical, horizontal) = weight.shape[2:], self.dilation
        return vertical * (height - 1), horizontal * (width - 1)

    def even_padding(self) -> tuple[int, int]:
        """Return the padding where it is known to be even."""
        assert not isinstance(self.padding, str)
        return self.padding

    def plain_multiplications(self, x: Tensor, weight: Tensor) -> int:
        """Return how many multiplications the composition takes."""
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


Run = Callable[[Tensor, Tensor, Tensor | None, Resampling], Tensor]
Reasons = Callable[[Tensor, Tensor, Resampling], list[str]]


@dataclass(frozen=True)
class ResamplingBackend:
    """One form of the two operations.

    Attributes:
        name: what a caller writes as ``backend=``.
        upsample: takes (x, weight, bias, resampling); nearest upsampling, then convolution.
        downsample: the same for convolution, then average pooling.
        reasons_against: takes (x, weight, resampling); returns why it cannot serve them, empty if it can.
        reasons_against_unasked: why "auto" should take a later one nevertheless.
    """

    name: str
    upsample: Run
    downsample: Run
    reasons_against: Reasons = lambda x, weight, how: []
    reasons_against_unasked: Reasons = lambda x, weight, how: []


# --- sums of windows ----------------------------------------------------------------------------------------


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


# --- reordered ----------------------------------------------------------------------------------------------


def _reasons_against_reordered(x: Tensor, weight: Tensor, how: Resampling) -> list[str]:
    if tuple(weight.shape[2:]) != (1, 1):
        return [f"the kernel is {weight.size(2)}x{weight.size(3)}, and only 1x1 commutes with resampling"]
    return [f"padding = {how.padding} is not 0"] if how.padding != (0, 0) else []


def _reordered_upsample(x: Tensor, weight: Tensor, bias: Tensor | None, how: Resampling) -> Tensor:
    return F.interpolate(
        F.conv2d(x, weight, bias, groups=how.groups), scale_factor=how.factor, mode="nearest"
    )


def _reordered_downsample(x: Tensor, weight: Tensor, bias: Tensor | None, how: Resampling) -> Tensor:
    return F.conv2d(F.avg_pool2d(x, how.factor), weight, bias, groups=how.groups)


# --- filtered -----------------------------------------------------------------------------------------------


def _reasons_against_moving(x: Tensor, weight: Tensor, how: Resampling) -> list[str]:
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


def _filtered_upsample(x: Tensor, weight: Tensor, bias: Tensor | None, how: Resampling) -> Tensor:
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


def _filtered_downsample(x: Tensor, weight: Tensor, bias: Tensor | None, how: Resampling) -> Tensor:
    return F.conv2d(
        _window_means(x, how), weight, bias, stride=how.factor, dilation=how.dilation, groups=how.groups
    )


def _filtered_bytes(x: Tensor, weight: Tensor, how: Resampling) -> int:
    """Return the size of the map whose windows are summed, give or take its border."""
    height, width = x.shape[2:]
    if how.upsample:
        height, width = how.output_size(x, weight)
    return x.size(0) * (weight.size(0) if how.upsample else x.size(1)) * height * width * x.element_size()


def _reasons_against_filtered_unasked(x: Tensor, weight: Tensor, how: Resampling) -> list[str]:
    if x.device.type != "cpu":
        return [_NOT_MEASURED]
    if not _reasons_against_folded(x, weight, how):
        large = reference.is_known(_filtered_bytes(x, weight, how) >= _LARGE_MAP_BYTES)
        few, size = (_FEW_CHANNELS_OF_LARGE_MAP, "large") if large else (_FEW_CHANNELS, "small")
        if (channels := _small_side_channels(weight, how)) < few:
            return [f"for a {size} map with {channels} channels, fewer than {few}, 'folded' is faster"]
    return _reasons_against_few(x, weight, how)


# --- matmul -------------------------------------------------------------------------------------------------


def _matmul_upsample(x: Tensor, weight: Tensor, bias: Tensor | None, how: Resampling) -> Tensor:
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


def _matmul_downsample(x: Tensor, weight: Tensor, bias: Tensor | None, how: Resampling) -> Tensor:
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


def _reasons_against_matmul_unasked(x: Tensor, weight: Tensor, how: Resampling) -> list[str]:
    if x.device.type != "cpu":
        return [_NOT_MEASURED]
    height, width = x.shape[2:] if how.upsample else how.output_size(x, weight)
    channels = _small_side_channels(weight, how)
    if not reference.is_known(2 * x.size(0) * height * width <= channels):
        return [f"the small map has more positions than half its {channels} channels"]
    return _reasons_against_few(x, weight, how)


# --- folded -------------------------------------------------------------------------------------------------


def folded_weight(weight: Tensor, factor: int) -> Tensor:
    """Return the kernels, [*, *, kh + factor - 1, kw + factor - 1], that sum windows along with the convolution.

    Computed in the weight's own dtype, whatever autocast says.
    """
    kernel = weight.shape[2:]
    with reference.without_autocast(weight.device):
        placed = torch.kron(*(_placed_at_each_offset(size, factor, weight) for size in kernel))
        folded = weight.flatten(2) @ placed
    return folded.view(*weight.shape[:2], *(size + factor - 1 for size in kernel))


def _placed_at_each_offset(size: int, factor: int, weight: Tensor) -> Tensor:
    """Return the matrix [size, size + factor - 1] whose row i has ones from i to i + factor - 1."""
    ones = torch.ones(size, size + factor - 1, dtype=weight.dtype, device=weight.device)
    return ones.triu().tril(factor - 1)


def _folded_upsample(x: Tensor, weight: Tensor, bias: Tensor | None, how: Resampling) -> Tensor:
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


def _folded_downsample(x: Tensor, weight: Tensor, bias: Tensor | None, how: Resampling) -> Tensor:
    kernel = folded_weight(weight, how.factor) / how.factor**2
    return F.conv2d(x, kernel, bias, stride=how.factor, padding=how.even_padding(), groups=how.groups)


def _reasons_against_folded(x: Tensor, weight: Tensor, how: Resampling) -> list[str]:
    if reasons := _reasons_against_moving(x, weight, how):
        return reasons
    reasons = [f"dilation = {how.dilation} is not 1"] if how.dilation != (1, 1) else []
    padding, reach = how.even_padding(), how.reach(weight)
    if how.upsample and (padding[0] > reach[0] or padding[1] > reach[1]):
        reasons.append(f"padding = {padding} is larger than the kernel's size less one")
    return reasons


def _reasons_against_folded_unasked(x: Tensor, weight: Tensor, how: Resampling) -> list[str]:
    if x.device.type not in ("cpu", "cuda"):
        return [f"it was never tried on {x.device.type}"]
    return _reasons_against_few(x, weight, how) if x.device.type == "cpu" else []


# --- the table ----------------------------------------------------------------------------------------------

_NOT_MEASURED = "it was measured on CPUs only"


def _reasons_against_few(x: Tensor, weight: Tensor, how: Resampling) -> list[str]:
    few = _FEW_MULTIPLICATIONS * (2 if x.element_size() == 2 else 1)
    if reference.is_known(how.plain_multiplications(x, weight) < few):
        return [f"fewer than {few // 10**6} million multiplications, 'plain' is as fast"]
    return []


def _small_side_channels(weight: Tensor, how: Resampling) -> int:
    """Return the channels of a group on the small map's side of the convolution."""
    return weight.size(1) if how.upsample else weight.size(0) // how.groups


def _plain_upsample(x: Tensor, weight: Tensor, bias: Tensor | None, how: Resampling) -> Tensor:
    return reference.upsample_conv2d(x, weight, bias, how.factor, how.padding, how.dilation, how.groups)


def _plain_downsample(x: Tensor, weight: Tensor, bias: Tensor | None, how: Resampling) -> Tensor:
    return reference.conv2d_downsample(x, weight, bias, how.factor, how.padding, how.dilation, how.groups)


RESAMPLING_BACKENDS: tuple[ResamplingBackend, ...] = (
    ResamplingBackend("reordered", _reordered_upsample, _reordered_downsample, _reasons_against_reordered),
    ResamplingBackend(
        "matmul",
        _matmul_upsample,
        _matmul_downsample,
        _reasons_against_moving,
        _reasons_against_matmul_unasked,
    ),
    ResamplingBackend(
        "filtered",
        _filtered_upsample,
        _filtered_downsample,
        _reasons_against_moving,
        _reasons_against_filtered_unasked,
    ),
    ResamplingBackend(
        "folded",
        _folded_upsample,
        _folded_downsample,
        _reasons_against_folded,
        _reasons_against_folded_unasked,
    ),
    ResamplingBackend("plain", _plain_upsample, _plain_downsample),
)


def check_resampling_backend_name(name: str) -> None:
    """Raise ``ValueError`` unless ``name`` is "auto" or a form of the table."""
    known = ["auto", *(backend.name for backend in RESAMPLING_BACKENDS)]
    if name not in known:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, known))}, got {name!r}")


def reasons_against_resampling_backends(
    x: Tensor, weight: Tensor, how: Resampling
) -> dict[str, tuple[list[str], list[str]]]:
    """Return for every form why it cannot serve, and why it is not taken unasked."""
    return {
        backend.name: (
            backend.reasons_against(x, weight, how),
            backend.reasons_against_unasked(x, weight, how),
        )
        for backend in RESAMPLING_BACKENDS
    }


def select_resampling_backend(x: Tensor, weight: Tensor, how: Resampling, name: str) -> ResamplingBackend:
    """Return the form that serves these inputs, or raise ``ValueError`` with every reason against."""
    check_resampling_backend_name(name)
    for backend in RESAMPLING_BACKENDS:
        if name not in ("auto", backend.name):
            continue
        reasons = backend.reasons_against(x, weight, how)
        if name == backend.name and reasons:
            raise ValueError(f"resampling backend {name!r} cannot serve these inputs: {'; '.join(reasons)}")
        if name == backend.name or not (reasons or backend.reasons_against_unasked(x, weight, how)):
            return backend
    raise AssertionError("'plain' serves everything")


def run_resampling(x: Tensor, weight: Tensor, bias: Tensor | None, how: Resampling, name: str) -> Tensor:
    """Compute the convolution and its resampling in the selected form."""
    backend = select_resampling_backend(x, weight, how, name)
    return (backend.upsample if how.upsample else backend.downsample)(x, weight, bias, how)
