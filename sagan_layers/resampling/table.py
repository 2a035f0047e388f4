"""The forms of the two resampling convolutions, in the order in which "auto" tries them.

A new form is a file with ``upsample``, ``downsample`` and ``unsupported_reasons``, and a row here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from torch import Tensor

from sagan_layers.backends import Backend, Operation
from sagan_layers.resampling import filtered, folded, matmul, reference, reordered, windows
from sagan_layers.resampling.reference import ResamplingInputs, ResamplingOptions
from sagan_layers.torch_support import is_known

# Measured on a CPU (docs/blocks/resampling.md). With fewer multiplications in the plain form (twice as many in 16 bits)
# the extra calls cost more than they save.
_MIN_MULTIPLICATIONS = 25_000_000
# With fewer channels on the small map's side of the convolution, filtering costs more than it saves.
_MIN_CHANNELS = 48
_MIN_CHANNELS_OF_LARGE_MAP = 192
# A large map's memory is fresh at every call (see spectral_norm/memory.py), which costs as much as filtering it.
_LARGE_MAP_BYTES = 2**25
_NOT_MEASURED = "it was measured on CPUs only"

_Run: TypeAlias = Callable[[Tensor, Tensor, Tensor | None, ResamplingOptions], Tensor]


class Form(NamedTuple):
    """How a form computes both operations, from x [N, C, H, W], weight, bias and options."""

    upsample: _Run
    downsample: _Run


def _few_multiplications(inputs: ResamplingInputs) -> list[str]:
    x, weight, options = inputs
    few = _MIN_MULTIPLICATIONS * (2 if x.element_size() == 2 else 1)
    if is_known(options.plain_multiplications(x, weight) < few):
        return [f"fewer than {few // 10**6} million multiplications, 'plain' is as fast"]
    return []


def _small_side_channels(weight: Tensor, options: ResamplingOptions) -> int:
    """Return the channels of a group on the small map's side of the convolution."""
    return weight.size(1) if options.upsample else weight.size(0) // options.groups


def _matmul_not_preferred(inputs: ResamplingInputs) -> list[str]:
    x, weight, options = inputs
    if x.device.type != "cpu":
        return [_NOT_MEASURED]
    height, width = x.shape[2:] if options.upsample else options.output_size(x, weight)
    channels = _small_side_channels(weight, options)
    if not is_known(2 * x.size(0) * height * width <= channels):
        return [f"the small map has more positions than half its {channels} channels"]
    return _few_multiplications(inputs)


def _filtered_bytes(x: Tensor, weight: Tensor, options: ResamplingOptions) -> int:
    """Return the size of the map whose windows are summed, ignoring its border."""
    height, width = x.shape[2:]
    if options.upsample:
        height, width = options.output_size(x, weight)
    return x.size(0) * (weight.size(0) if options.upsample else x.size(1)) * height * width * x.element_size()


def _filtered_not_preferred(inputs: ResamplingInputs) -> list[str]:
    x, weight, options = inputs
    if x.device.type != "cpu":
        return [_NOT_MEASURED]
    if not folded.unsupported_reasons(inputs):
        large = is_known(_filtered_bytes(x, weight, options) >= _LARGE_MAP_BYTES)
        few, size = (_MIN_CHANNELS_OF_LARGE_MAP, "large") if large else (_MIN_CHANNELS, "small")
        if (channels := _small_side_channels(weight, options)) < few:
            return [f"for a {size} map with {channels} channels, fewer than {few}, 'folded' is faster"]
    return _few_multiplications(inputs)


def _folded_not_preferred(inputs: ResamplingInputs) -> list[str]:
    if inputs.x.device.type not in ("cpu", "cuda"):
        return [f"it was never tried on {inputs.x.device.type}"]
    return _few_multiplications(inputs) if inputs.x.device.type == "cpu" else []


_FORMS: tuple[Backend[ResamplingInputs, Form], ...] = (
    Backend("reordered", Form(reordered.upsample, reordered.downsample), reordered.unsupported_reasons),
    Backend(
        "matmul", Form(matmul.upsample, matmul.downsample), windows.unsupported_reasons, _matmul_not_preferred
    ),
    Backend(
        "filtered",
        Form(filtered.upsample, filtered.downsample),
        windows.unsupported_reasons,
        _filtered_not_preferred,
    ),
    Backend(
        "folded", Form(folded.upsample, folded.downsample), folded.unsupported_reasons, _folded_not_preferred
    ),
    Backend("plain", Form(reference.upsample, reference.downsample)),
)
UPSAMPLE_CONV2D = Operation("upsample_conv2d", "upsampling convolution", _FORMS)
CONV2D_DOWNSAMPLE = Operation("conv2d_downsample", "downsampling convolution", _FORMS)
