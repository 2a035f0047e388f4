"""The one place that checks a caller's tensors and numbers.

Every check raises ``ValueError`` or ``TypeError`` that says what was expected and what was passed. Modules check their
options and inputs, functional forms their arguments; backends check nothing.
"""

from __future__ import annotations

import numbers
import os

import torch
from torch import Tensor
from torch.nn.common_types import _size_2_t

from sagan_layers.torch_support import has_memory, is_tracing, transforms_active

_debug_checks = os.environ.get("SAGAN_LAYERS_DEBUG_CHECKS", "0") not in ("", "0")


def set_debug_checks(enabled: bool) -> None:
    """Turn on or off the checks that make the host wait for a GPU.

    Values of labels and query points on the CPU are always checked. On a GPU reading them would stall the stream at
    every step, so they are checked only after ``set_debug_checks(True)`` or with the environment variable
    ``SAGAN_LAYERS_DEBUG_CHECKS=1``; otherwise an index out of range fails a CUDA assertion. Inside
    ``torch.compile``, ``torch.export``, ``torch.jit.trace`` and ``torch.func`` values are never checked.

    Args:
        enabled: whether to check.

    Example:
        >>> set_debug_checks(True)
        >>> set_debug_checks(False)
    """
    global _debug_checks
    _debug_checks = enabled


def check_number(name: str, number: object) -> None:
    """Raise ``TypeError`` unless this is a real number; a tensor would lose its gradient."""
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {kind_of(number)}")


def check_positive(name: str, number: float) -> None:
    """Raise ``ValueError`` unless the number is above zero."""
    if not number > 0:
        raise ValueError(f"{name}: expected a positive number, got {number!r}")


def integer_of(name: str, number: object, *, least: int) -> int:
    """Return the number as an int; raise unless it is one and at least ``least``."""
    if isinstance(number, bool) or not isinstance(number, numbers.Integral):
        raise TypeError(f"{name}: expected an int, got {number!r}")
    if int(number) < least:
        raise ValueError(f"{name}: expected at least {least}, got {number}")
    return int(number)


def pair_of(name: str, value: _size_2_t, *, least: int) -> tuple[int, int]:
    """Return a pair: one integer twice, or the two integers; raise unless each is at least ``least``."""
    pair: tuple[object, ...] = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name}: expected one number or two, got {value!r}")
    first, second = (integer_of(name, number, least=least) for number in pair)
    return first, second


def check_sizes(**sizes: object) -> None:
    """Raise unless every size is an integer of at least 1."""
    for name, size in sizes.items():
        integer_of(name, size, least=1)


def check_activation(activation: str | None) -> None:
    """Raise ``ValueError`` unless it is None or "relu"."""
    if activation not in (None, "relu"):
        raise ValueError(f"activation: expected None or 'relu', got {activation!r}")


def check_parameter_dtype(dtype: torch.dtype | None) -> None:
    """Raise ``TypeError`` unless parameters can have this dtype."""
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")


def check_convolution(
    kernel_size: _size_2_t, stride: _size_2_t, padding: str | _size_2_t, dilation: _size_2_t
) -> None:
    """Raise ``ValueError`` unless kernel size, stride and dilation are at least 1, and padding at least 0."""
    for name, value, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("dilation", dilation, 1),
        ("padding", padding, 0),
    ):
        for size in value if isinstance(value, (tuple, list)) else (value,):
            if not isinstance(size, str) and not size >= least:
                raise ValueError(f"{name}: expected at least {least}, got {value!r}")


def check_floating(name: str, tensor: object) -> None:
    """Raise ``TypeError`` unless this is a floating-point tensor."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {kind_of(tensor)}")


def check_not_empty(name: str, tensor: Tensor) -> None:
    """Raise unless this is a floating-point tensor with at least one entry."""
    check_floating(name, tensor)
    if tensor.numel() == 0:
        raise ValueError(f"{name}: expected at least one entry, got shape {shape_of(tensor)}")


def check_feature_map(x: Tensor) -> None:
    """Raise unless x is a floating-point [N, C, *]."""
    check_floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x: expected [N, C, *], got {shape_of(x)}")


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ``ValueError`` unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {tensor.device}")


def check_same_dtype(name: str, tensor: Tensor, x: Tensor) -> None:
    """Raise ``TypeError`` unless the dtype is that of x; under autocast any dtype is accepted."""
    if tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, got {tensor.dtype}")


def check_like_parameter(name: str, x: Tensor, like: Tensor) -> None:
    """Raise unless x has the device and dtype of a module's parameter; under autocast any dtype is accepted."""
    check_same_device(name, x, "the module's parameters", like)
    if x.dtype != like.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"{name}: expected the module's dtype {like.dtype}, got {x.dtype}; convert one, or use torch.autocast"
        )


def check_input(x: Tensor, *, channels: int, like: Tensor, batched: bool = True) -> None:
    """Raise unless x is [N, C, H, W], or also [C, H, W] if not ``batched``, and fits a module's parameter ``like``."""
    check_floating("input", x)
    if not (x.dim() == 4 or (x.dim() == 3 and not batched)) or x.size(-3) != channels:
        layout = "[N, C, H, W]" if batched else "[N, C, H, W] or [C, H, W]"
        raise ValueError(f"input: expected {layout} with C = {channels}, got {shape_of(x)}")
    check_like_parameter("input", x, like)


def check_features(x: Tensor, *, features: int, like: Tensor, name: str = "input") -> None:
    """Raise unless x is [*, features] and fits a module's parameter ``like``."""
    check_floating(name, x)
    if x.dim() < 1 or x.size(-1) != features:
        raise ValueError(f"{name}: expected [*, {features}], got {shape_of(x)}")
    check_like_parameter(name, x, like)


def check_indices(name: str, indices: object, *, upper: int, like: Tensor) -> None:
    """Raise unless these are int64 or int32, on the device of ``like`` and in [0, upper).

    :func:`set_debug_checks` decides whether values on a GPU are checked.
    """
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected an int64 or int32 tensor, got {kind_of(indices)}")
    check_same_device(name, indices, "the module's parameters", like)
    if indices.numel() and reads_values_of(indices):
        low, high = (int(bound) for bound in torch.aminmax(indices))
        if low < 0 or high >= upper:
            raise ValueError(
                f"{name}: expected values from 0 to {upper - 1}, got values from {low} to {high}"
            )


def reads_values_of(tensor: Tensor) -> bool:
    """Return whether checks read a tensor's values: not in compilers, tracers, transforms, and on a GPU if told to."""
    if torch.compiler.is_compiling() or tensor.is_meta or is_tracing():
        return False
    return (tensor.device.type == "cpu" or _debug_checks) and not transforms_active() and has_memory(tensor)


def check_labels(labels: Tensor | None, *, num_classes: int | None, batch: int, like: Tensor) -> None:
    """Raise unless there is one label in [0, num_classes) for each sample, or None for a module without classes."""
    if num_classes is None:
        if labels is not None:
            raise ValueError("labels: expected None (the module has no classes), got a tensor")
        return
    if labels is None:
        raise ValueError(f"labels: expected class indices of shape [N] = [{batch}], got None")
    check_indices("labels", labels, upper=num_classes, like=like)
    if labels.shape != (batch,):
        raise ValueError(f"labels: expected shape [N] = [{batch}], got {shape_of(labels)}")


def shape_of(tensor: Tensor) -> str:
    """Return the shape as text for a message."""
    return str(list(tensor.shape))


def kind_of(thing: object) -> str:
    """Return dtype or type as text for a message."""
    return str(thing.dtype) if isinstance(thing, Tensor) else type(thing).__name__
