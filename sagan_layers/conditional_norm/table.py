"""The backends of conditional batch norm, in the order in which "auto" asks them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sagan_layers.backends import Backend, Operation, interpreter_reasons, no_triton_reasons
from sagan_layers.conditional_norm import blocked, reference
from sagan_layers.conditional_norm.autograd import ConditionalNormKernels, register_conditional_norm
from sagan_layers.conditional_norm.reference import ConditionalNormResult
from sagan_layers.torch_support import is_exporting

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Below so many values in a feature map the reference is as fast on a CPU.
_FEW_VALUES = 2**16


class ConditionalNormInputs(NamedTuple):
    """What the backends choose by.

    Attributes:
        x: [N, C, *].
        given: mean and variance to normalise with, each [C]; None for the batch's own.
        process_group: whose batches the statistics are of; None for this process alone.
    """

    x: Tensor
    given: tuple[Tensor, Tensor] | None = None
    process_group: ProcessGroup | None = None


def _opaque_unsupported(inputs: ConditionalNormInputs) -> list[str]:
    """Return why kernels that autograd does not look into cannot serve."""
    reasons = []
    if inputs.given is not None and any(statistic.requires_grad for statistic in inputs.given):
        reasons.append("it has no gradients of given statistics")
    if inputs.process_group is not None and torch.compiler.is_compiling():
        reasons.append("torch.compile does not see its collective operations")
    return reasons


def _triton() -> Any:
    from sagan_layers.conditional_norm import triton

    return triton


def _triton_unsupported(inputs: ConditionalNormInputs) -> list[str]:
    if reasons := no_triton_reasons(inputs.x.device):
        return reasons
    return list(_triton().unsupported_reasons(inputs.x)) + _opaque_unsupported(inputs)


def _triton_not_preferred(inputs: ConditionalNormInputs) -> list[str]:
    if torch.compiler.is_compiling():
        return ["torch.compile writes kernels of its own from 'reference'"]
    return interpreter_reasons(inputs.x.device)


def _blocked_unsupported(inputs: ConditionalNormInputs) -> list[str]:
    if inputs.x.device.type != "cpu":
        return [f"it is made for a CPU's cache, and the tensors are on {inputs.x.device}"]
    return blocked.unsupported_reasons(inputs.x) + _opaque_unsupported(inputs)


def _blocked_not_preferred(inputs: ConditionalNormInputs) -> list[str]:
    x = inputs.x
    if is_exporting():
        return ["an exported program should need torch alone"]
    if not torch.compiler.is_compiling() and type(x) not in (Tensor, torch.nn.Parameter):
        return [f"it looks at values and writes in place, and x is a {type(x).__name__}"]
    # The processes of a group must choose alike, and their batches may have different sizes.
    if inputs.process_group is None and x.numel() < _FEW_VALUES:
        return [f"below {_FEW_VALUES} values 'reference' is as fast"]
    return []


CONDITIONAL_BATCH_NORM: Operation[ConditionalNormInputs, Callable[..., ConditionalNormResult]] = Operation(
    "conditional_batch_norm",
    "conditional batch norm",
    (
        Backend(
            "triton",
            register_conditional_norm(
                "triton",
                ConditionalNormKernels(
                    forward=lambda *args: _triton().forward(*args),
                    normalize=lambda *args: _triton().normalize(*args),
                    backward=lambda *args: _triton().backward(*args),
                ),
            ),
            _triton_unsupported,
            _triton_not_preferred,
        ),
        Backend(
            "blocked",
            register_conditional_norm(
                "blocked",
                ConditionalNormKernels(
                    forward=blocked.forward, normalize=blocked.normalize, backward=blocked.backward
                ),
            ),
            _blocked_unsupported,
            _blocked_not_preferred,
        ),
        Backend("reference", reference.conditional_batch_norm),
    ),
)
