"""The forms of the two resampling convolutions, in the order in which "auto" asks them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from sagan_layers.backends import Backend, Operation
from sagan_layers.resampling import forms, reference
from sagan_layers.resampling.forms import Run
from sagan_layers.resampling.reference import Resampling
from sagan_layers.torch_support import is_known

# Measured on a CPU (docs/blocks/resampling.md). Below so many multiplications of the plain form, twice as many in
# 16 bits, the extra calls cost more than they save.
_FEW_MULTIPLICATIONS = 25_000_000
# Below so many channels on the small map's side of the convolution, filtering costs more than it saves.
_FEW_CHANNELS = 48
_FEW_CHANNELS_OF_LARGE_MAP = 192
# From this size on glibc's malloc gives a block back to the system when it is freed, and a new one costs as much
# time as filtering it.
_LARGE_MAP_BYTES = 2**25
_NOT_MEASURED = "it was measured on CPUs only"


class ResamplingInputs(NamedTuple):
    """What the forms choose by: x [N, C, H, W], weight [out, C / groups, kernel height, kernel width], options."""

    x: Tensor
    weight: Tensor
    how: Resampling


def _few_multiplications(inputs: ResamplingInputs) -> list[str]:
    x, weight, how = inputs
    few = _FEW_MULTIPLICATIONS * (2 if x.element_size() == 2 else 1)
    if is_known(how.plain_multiplications(x, weight) < few):
        return [f"fewer than {few // 10**6} million multiplications, 'plain' is as fast"]
    return []


def _small_side_channels(weight: Tensor, how: Resampling) -> int:
    """Return the channels of a group on the small map's side of the convolution."""
    return weight.size(1) if how.upsample else weight.size(0) // how.groups


def _matmul_not_preferred(inputs: ResamplingInputs) -> list[str]:
    x, weight, how = inputs
    if x.device.type != "cpu":
        return [_NOT_MEASURED]
    height, width = x.shape[2:] if how.upsample else how.output_size(x, weight)
    channels = _small_side_channels(weight, how)
    if not is_known(2 * x.size(0) * height * width <= channels):
        return [f"the small map has more positions than half its {channels} channels"]
    return _few_multiplications(inputs)


def _filtered_bytes(x: Tensor, weight: Tensor, how: Resampling) -> int:
    """Return the size of the map whose windows are summed, give or take its border."""
    height, width = x.shape[2:]
    if how.upsample:
        height, width = how.output_size(x, weight)
    return x.size(0) * (weight.size(0) if how.upsample else x.size(1)) * height * width * x.element_size()


def _filtered_not_preferred(inputs: ResamplingInputs) -> list[str]:
    x, weight, how = inputs
    if x.device.type != "cpu":
        return [_NOT_MEASURED]
    if not forms.folded_unsupported(*inputs):
        large = is_known(_filtered_bytes(x, weight, how) >= _LARGE_MAP_BYTES)
        few, size = (_FEW_CHANNELS_OF_LARGE_MAP, "large") if large else (_FEW_CHANNELS, "small")
        if (channels := _small_side_channels(weight, how)) < few:
            return [f"for a {size} map with {channels} channels, fewer than {few}, 'folded' is faster"]
    return _few_multiplications(inputs)


def _folded_not_preferred(inputs: ResamplingInputs) -> list[str]:
    if inputs.x.device.type not in ("cpu", "cuda"):
        return [f"it was never tried on {inputs.x.device.type}"]
    return _few_multiplications(inputs) if inputs.x.device.type == "cpu" else []


def _table(
    reordered: Run, matmul: Run, filtered: Run, folded: Run, plain: Run
) -> tuple[Backend[ResamplingInputs, Run], ...]:
    def moving_unsupported(inputs: ResamplingInputs) -> list[str]:
        return forms.moving_unsupported(*inputs)

    return (
        Backend("reordered", reordered, lambda inputs: forms.reordered_unsupported(*inputs)),
        Backend("matmul", matmul, moving_unsupported, _matmul_not_preferred),
        Backend("filtered", filtered, moving_unsupported, _filtered_not_preferred),
        Backend("folded", folded, lambda inputs: forms.folded_unsupported(*inputs), _folded_not_preferred),
        Backend("plain", plain),
    )


UPSAMPLE_CONV2D: Operation[ResamplingInputs, Run] = Operation(
    "upsample_conv2d",
    "upsampling convolution",
    _table(
        forms.reordered_upsample,
        forms.matmul_upsample,
        forms.filtered_upsample,
        forms.folded_upsample,
        reference.upsample_conv2d,
    ),
)
CONV2D_DOWNSAMPLE: Operation[ResamplingInputs, Run] = Operation(
    "conv2d_downsample",
    "downsampling convolution",
    _table(
        forms.reordered_downsample,
        forms.matmul_downsample,
        forms.filtered_downsample,
        forms.folded_downsample,
        reference.conv2d_downsample,
    ),
)
