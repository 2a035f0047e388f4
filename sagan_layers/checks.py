"""The one place that checks a caller's tensors and numbers.

Every check raises ``ValueError`` or ``TypeError`` that names the argument, says what was expected and what was passed.
Numbers and flags may be Python's or numpy's and become Python's; True is no number, 1 no flag, and a tensor is neither.
Modules check their options and inputs, functional forms their arguments; backends check nothing.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import os
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn

from sagan_layers.torch_support import autocast_dtype, is_batch, is_proxy, is_tracing, transforms_active

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FLOATING_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
MOST_ITERATIONS = 10**6  # minutes, not years
EPS_MODES = ("add", "clamp")
VECTORS = ("u", "v")
_LARGEST = torch.finfo(torch.float32).max
_Pair = tuple[int, int]
_ModuleT = TypeVar("_ModuleT", bound=nn.Module)
_P = ParamSpec("_P")
_R = TypeVar("_R")

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
    (_debug_checks,) = flags_of(enabled=enabled)


def number_of(name: str, number: object, *, least: float = -_LARGEST, most: float = _LARGEST) -> float:
    """Return the number as a float; raise unless it is one of this range. A tensor would lose its gradient."""
    if type(number) is not float and (isinstance(number, bool) or not isinstance(number, numbers.Real)):
        raise TypeError(f"{name}: expected a number, got {shown(number)}")
    if not least <= number <= most:  # type: ignore[operator]
        raise ValueError(f"{name}: expected a number from {least:.6g} to {most:.6g}, got {shown(number)}")
    return float(number)


def eps_of(eps: object, name: str = "eps") -> float:
    """Return eps as a float; raise unless it guards a division in float32 and is small beside norms of 1."""
    return number_of(name, eps, least=1e-37, most=1.0)  # below, float32 has no normal numbers


def integer_of(name: str, number: object, *, least: int, most: int = 2**31 - 1) -> int:
    """Return the number as an int, numpy's too; raise unless it is one of this range."""
    if type(number) is not int and (isinstance(number, bool) or not isinstance(number, numbers.Integral)):
        raise TypeError(f"{name}: expected an int, got {shown(number)}")
    whole = int(number)
    if whole < least:
        raise ValueError(f"{name}: expected at least {least}, got {shown(number)}")
    if whole > most:
        raise ValueError(f"{name}: expected at most {most}, got {shown(number)}")
    return whole


def pair_of(name: str, value: object, *, least: int) -> tuple[int, int]:
    """Return a pair: one integer twice, or the two integers; raise unless each is at least ``least``."""
    pair: tuple[object, ...] = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name}: expected one number or two, got {shown(value)}")
    first, second = (integer_of(name, number, least=least) for number in pair)
    return first, second


def sizes_of(**sizes: object) -> list[int]:
    """Return the sizes as ints; raise unless each is an integer of at least 1."""
    return [integer_of(name, size, least=1) for name, size in sizes.items()]


def spectral_norm_options(
    n_power_iterations: object,
    eps: object,
    iterate_when_frozen: object,
    eps_mode: object,
    *,
    prefix: str = "",
) -> dict[str, Any]:
    """Return the options of a spectrally normalised layer by name, after all checks; ``prefix`` is that of eps."""
    (iterate,) = flags_of(iterate_when_frozen=iterate_when_frozen)
    iterations = integer_of("n_power_iterations", n_power_iterations, least=1, most=MOST_ITERATIONS)
    check_choice(f"{prefix}eps_mode", eps_mode, EPS_MODES)
    return {
        "n_power_iterations": iterations,
        "eps": eps_of(eps, f"{prefix}eps"),
        "iterate_when_frozen": iterate,
        "eps_mode": eps_mode,
    }


def flags_of(**flags: object) -> list[bool]:
    """Return the options as bools; raise ``TypeError`` unless each is one, of numpy's too."""
    for name, flag in flags.items():
        if type(flag) is not bool and not isinstance(flag, np.bool_):
            raise TypeError(f"{name}: expected True or False, got {shown(flag)}")
    return list(map(bool, flags.values()))


def check_choice(name: str, value: object, choices: Iterable[str | None]) -> None:
    """Raise ``ValueError`` unless the value is one of the choices."""
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {shown(value)}")


def check_parameter_options(device: object, dtype: object) -> None:
    """Raise unless parameters can be made on this device (None for the default) in this dtype."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in FLOATING):
        raise TypeError(f"dtype: expected a floating-point dtype ({_FLOATING_NAMES}), got {shown(dtype)}")
    if device is None:
        return
    try:
        torch.empty(0, device=device)  # type: ignore[call-overload]
    except Exception as error:  # each kind of device raises its own
        raise ValueError(
            f"device: expected one that torch can use here, got {shown(device)}: {error}"
        ) from error


def convolution_of(
    in_channels: object,
    out_channels: object,
    kernel_size: object,
    stride: object,
    padding: object,
    dilation: object,
    groups: object,
    *,
    named_padding: bool,
) -> tuple[int, int, _Pair, _Pair, Any, _Pair, int]:
    """Return the sizes of a convolution as ints and pairs, after all checks."""
    inputs, outputs, group_count = sizes_of(in_channels=in_channels, out_channels=out_channels, groups=groups)
    for name, channels in (("in_channels", inputs), ("out_channels", outputs)):
        if channels % group_count:
            raise ValueError(f"{name}: expected a multiple of groups = {group_count}, got {channels}")
    kernel, strides, dilations = (
        pair_of(name, size, least=1)
        for name, size in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
    )
    if named_padding and isinstance(padding, str):
        check_choice("padding", padding, ("same", "valid"))
        if padding == "same" and strides != (1, 1):
            raise ValueError(f"stride: expected 1 with padding='same', got {shown(stride)}")
    else:
        padding = pair_of("padding", padding, least=0)
    return inputs, outputs, kernel, strides, padding, dilations, group_count


def check_map_size(name: str, x: Tensor, rows: int, columns: int) -> None:
    """Raise ``ValueError`` unless the output of x has positions."""
    if rows < 1 or columns < 1:
        raise ValueError(
            f"{name}: expected a larger map (the output would have {max(rows, 0)} x {max(columns, 0)} positions), "
            f"got {shape_of(x)}"
        )


def check_type(name: str, value: object, kind: type, expected: str) -> None:
    """Raise ``TypeError`` unless the value is of this type."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {expected}, got {shown(value)}")


def check_module(name: str, module: object) -> None:
    """Raise ``TypeError`` unless this is a module."""
    check_type(name, module, nn.Module, "a torch.nn.Module")


def keyword_only(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make a call without keywords a ``TypeError`` that shows the call to write, for a function that requires them."""
    kinds = inspect.signature(function).parameters.values()
    is_method = any(each.kind is not each.KEYWORD_ONLY for each in kinds)
    required = [each.name for each in kinds if each.kind is each.KEYWORD_ONLY and each.default is each.empty]
    name = function.__qualname__.split(".")[0]
    call = f"{name}{'()' * is_method}({', '.join(f'{each}=...' for each in required)})"

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if len(args) > is_method:
            raise TypeError(f"{name}: expected keywords, got a positional argument; write {call}")
        return function(*args, **kwargs)

    return checked


def named_parts(name: str, tensors: Any) -> dict[str, Any]:
    """Return one tensor by its name, or those of a list by names such as "logits[1]"; raise if there are none."""
    if not isinstance(tensors, (list, tuple)):
        return {name: tensors}
    if not tensors:
        raise ValueError(f"{name}: expected at least one tensor, got an empty {type(tensors).__name__}")
    return {f"{name}[{index}]": tensor for index, tensor in enumerate(tensors)}


def check_process_group(group: object) -> None:
    """Raise ``TypeError`` unless this is a group of processes, or None."""
    if group is not None and torch.distributed.is_available() and not torch.compiler.is_compiling():
        check_type("process_group", group, torch.distributed.ProcessGroup, "a ProcessGroup of torch or None")


def parts_of(module: nn.Module, kind: type[_ModuleT]) -> list[_ModuleT]:
    """Return the modules of one kind inside ``module``, itself included."""
    check_module("module", module)
    return [part for part in module.modules() if isinstance(part, kind)]


def is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor's values lie in plain memory: not sparse, nested or in another library's layout."""
    return tensor.layout is torch.strided and not tensor.is_nested


def check_floating(name: str, tensor: object) -> None:
    """Raise ``TypeError`` unless this is a dense floating-point tensor of 16 bits or more."""
    if isinstance(tensor, Tensor) and tensor.dtype in FLOATING and is_dense(tensor):
        return
    floating = isinstance(tensor, Tensor) and tensor.is_floating_point()
    expected = f"a dense tensor of {_FLOATING_NAMES}" if floating else "a floating-point tensor"
    raise TypeError(f"{name}: expected {expected}, got {kind_of(tensor)}")


def check_not_empty(name: str, tensor: Tensor) -> None:
    """Raise unless this is a floating-point tensor with at least one entry."""
    check_floating(name, tensor)
    if tensor.numel() == 0:
        raise ValueError(f"{name}: expected at least one entry, got shape {shape_of(tensor)}")


def check_samples(name: str, x: Tensor) -> None:
    """Raise unless x is a floating-point [N, *] with at least one entry."""
    check_not_empty(name, x)
    if x.dim() < 1:
        raise ValueError(f"{name}: expected [N, *], got {shape_of(x)}")


def check_feature_map(x: Tensor) -> None:
    """Raise unless x is a floating-point [N, C, *], with values if it has samples."""
    check_floating("x", x)
    if x.dim() < 2 or (x.numel() == 0 and 0 in x.shape[1:]):
        raise ValueError(f"x: expected [N, C, *] with all but N at least 1, got {shape_of(x)}")


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ``ValueError`` unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {tensor.device}")


def check_same_dtype(name: str, tensor: Tensor, x: Tensor) -> None:
    """Raise ``TypeError`` unless the dtype is that of x; under autocast any dtype is accepted."""
    if tensor.dtype != x.dtype and autocast_dtype(x.device) is None:
        raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, got {tensor.dtype}")


def check_like_parameter(name: str, x: Tensor, like: Tensor) -> None:
    """Raise unless x has the device and dtype of a module's parameter; under autocast any dtype is accepted."""
    check_same_device(name, x, "the module's parameters", like)
    if x.dtype != like.dtype and autocast_dtype(x.device) is None:
        raise TypeError(
            f"{name}: expected the module's dtype {like.dtype}, got {x.dtype}; convert one, or use torch.autocast"
        )


def check_input(x: Tensor, *, channels: int, like: Tensor, batched: bool = True) -> None:
    """Raise unless x is [N, C, H, W], or also [C, H, W] if not ``batched``, and fits a module's parameter ``like``."""
    check_floating("input", x)
    shape = x.shape
    if not (len(shape) == 4 or (len(shape) == 3 and not batched)) or shape[-3] != channels:
        layout = "[N, C, H, W]" if batched else "[N, C, H, W] or [C, H, W]"
        raise ValueError(f"input: expected {layout} with C = {channels}, got {shape_of(x)}")
    if shape[-1] < 1 or shape[-2] < 1:
        raise ValueError(f"input: expected height and width of at least 1, got {shape_of(x)}")
    check_like_parameter("input", x, like)


def check_features(x: Tensor, *, features: int, like: Tensor, name: str = "input") -> None:
    """Raise unless x is [*, features] and fits a module's parameter ``like``."""
    check_floating(name, x)
    if x.dim() < 1 or x.size(-1) != features:
        raise ValueError(f"{name}: expected [*, {features}], got {shape_of(x)}")
    check_like_parameter(name, x, like)


def check_integers(name: str, tensor: object) -> None:
    """Raise ``TypeError`` unless this is a dense tensor of int64 or int32."""
    integers = (torch.int64, torch.int32)
    if not (isinstance(tensor, Tensor) and tensor.dtype in integers and is_dense(tensor)):
        raise TypeError(f"{name}: expected an int64 or int32 tensor, got {kind_of(tensor)}")


def check_indices(name: str, indices: Tensor, *, upper: int, like: Tensor) -> None:
    """Raise unless these are int64 or int32, on the device of ``like`` and in [0, upper).

    :func:`set_debug_checks` decides whether values on a GPU are checked.
    """
    check_integers(name, indices)
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
    return (tensor.device.type == "cpu" or _debug_checks) and not transforms_active() and not is_batch(tensor)


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
    """Return dtype and layout, or type, as text for a message."""
    if is_proxy(thing):
        return "a Proxy of torch.fx; call the function in a module that is a leaf of the tracer"
    if not isinstance(thing, Tensor):
        return type(thing).__name__
    layout = "" if is_dense(thing) else f" in a {'nested' if thing.is_nested else thing.layout} tensor"
    return f"{thing.dtype}{layout}"


def shown(value: object) -> str:
    """Return a value as text for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
