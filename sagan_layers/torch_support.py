"""Helpers around torch: accumulation dtypes, autocast, export, function transforms, temporary attributes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)
_TELLS_EXPORT = hasattr(torch.compiler, "is_exporting")  # torch 2.6 does not
_count_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a tensor of ``dtype`` is accumulated: float64 for itself, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast where it is on, else None."""
    return torch.get_autocast_dtype(device.type) if _autocasts(device) else None


def _autocasts(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)  # autocast has no meta device


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which autocast does not lower the precision of operations on ``device``."""
    return torch.autocast(device.type, enabled=False) if _autocasts(device) else contextlib.nullcontext()


def is_exporting() -> bool:
    """Return whether torch.export is tracing."""
    if not _TELLS_EXPORT:  # then only an export with strict=False differs from torch.compile
        return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
    return torch.compiler.is_exporting()


def is_known(condition: bool | torch.SymBool) -> bool:
    """Return a condition on sizes; False inside torch.export, where sizes may be symbols."""
    exporting = is_exporting() if _TELLS_EXPORT else torch.compiler.is_compiling()
    return not exporting and bool(condition)


def is_traced(tensor: Tensor) -> bool:
    """Return whether more than torch's eager kernels will see the operations on a tensor, so that they must be plain.

    That is a compiler, a tracer, torch.func, forward mode, a tensor subclass or batched gradients.
    """
    if torch.compiler.is_compiling() or is_tracing() or type(tensor) not in (Tensor, nn.Parameter):
        return True
    unpack: Any = torch.autograd.forward_ad.unpack_dual
    return transforms_active() or is_batch(tensor) or unpack(tensor).tangent is not None


def is_tracing() -> bool:
    """Return whether torch.jit.trace or a dispatch mode (make_fx, fake tensors) records plain operations."""
    if torch.compiler.is_compiling():
        return False
    return bool(_count_dispatch_modes() or torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]


def needs_plain_operations() -> bool:
    """Return whether a tracer or forward-mode derivatives run, which kernels do not serve."""
    level: int = getattr(torch.autograd.forward_ad, "_current_level", -1)
    return is_tracing() or (not torch.compiler.is_compiling() and level >= 0)


def tracing_reasons() -> list[str]:
    """Return why functions with derivatives of their own cannot serve inside torch.jit.trace, if it records."""
    return ["torch.jit.trace saves plain operations only"] if is_tracing() else []


def is_proxy(x: object) -> bool:
    """Return whether this stands for a tensor in torch.fx's symbolic trace."""
    return isinstance(x, Proxy)


def record_call(module: nn.Module, *inputs: Any) -> Tensor:
    """Return the result of a call as torch.fx records it for torch's own modules, whose forward it does not trace.

    Args:
        module: the one whose forward asks.
        inputs: its arguments; the first is a ``torch.fx.Proxy``.

    Raises:
        TypeError: if the call would not stand for this forward: torch.fx traces the module alone, or a subclass.
    """
    tracer, kind = inputs[0].tracer, type(module)
    if tracer.root is module or kind.forward.__module__.split(".")[0] != "sagan_layers":
        raise TypeError(
            f"{kind.__name__}: expected to be a part of the module that torch.fx traces, and no subclass with its own "
            "forward; trace torch.nn.Sequential(module), or pass a torch.fx.Tracer whose is_leaf_module is true for it"
        )
    result: Tensor = tracer.create_proxy("call_module", tracer.path_of_module(module), inputs, {})
    return result


def transforms_active() -> bool:
    """Return whether a transform of torch.func runs."""
    return bool(getattr(torch._C, "_are_functorch_transforms_active", lambda: False)())


def is_batch(tensor: Tensor) -> bool:
    """Return whether this is a batch of gradients (is_grads_batched) or of vmap: it needs plain operations."""
    if torch.compiler.is_compiling():
        return False
    try:
        tensor.untyped_storage()
    except RuntimeError:
        return True
    return False


def fusion_calls(function: int) -> bool:
    """Return whether ``torch.nn.utils.fusion`` called the function that asks (0), or the one that called that (1)."""
    return bool(sys._getframe(function + 2).f_globals.get("__name__") == "torch.nn.utils.fusion")


def update_state(update: Callable[[], object], remedy: str) -> None:
    """Change a module's buffers in place; if torch.func does not allow that, raise ``RuntimeError`` with the remedy."""
    if torch.compiler.is_compiling() or not transforms_active():
        update()
        return
    try:
        update()
    except RuntimeError as error:
        raise RuntimeError(
            f"torch.func cannot change a module's buffers in place, as a forward in training does; {remedy}"
        ) from error


@contextlib.contextmanager
def temporary_attribute(name: str, values: Mapping[_ModuleT, Any]) -> Iterator[None]:
    """Set an attribute of each module to its value for a ``with`` block."""
    before = {module: getattr(module, name) for module in values}
    for module, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, value in before.items():
            if hasattr(module, name):  # not if the block turned the module into a plain layer
                setattr(module, name, value)
