"""The backends of conditional batch norm, in the order in which "auto" tries them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sagan_layers.backends import Backend, Operation, interpreter_reasons, no_triton_reasons
from sagan_layers.conditional_norm import blocked, reference
from sagan_layers.conditional_norm.autograd import register_conditional_norm
from sagan_layers.conditional_norm.kernels import ConditionalNormInputs
from sagan_layers.conditional_norm.reference import ConditionalNormResult


def _triton() -> Any:
    from sagan_layers.conditional_norm import triton  # not before a call needs it: Triton may be missing

    return triton


def _triton_unsupported(inputs: ConditionalNormInputs) -> list[str]:
    return no_triton_reasons(inputs.x.device) or list(_triton().unsupported_reasons(inputs))


def _triton_not_preferred(inputs: ConditionalNormInputs) -> list[str]:
    if torch.compiler.is_compiling():
        return ["torch.compile writes its own kernels from 'reference'"]
    return interpreter_reasons(inputs.x.device)


CONDITIONAL_BATCH_NORM: Operation[ConditionalNormInputs, Callable[..., ConditionalNormResult]] = Operation(
    "conditional_batch_norm",
    "conditional batch norm",
    (
        Backend(
            "triton",
            register_conditional_norm("triton", lambda: _triton().KERNELS),
            _triton_unsupported,
            _triton_not_preferred,
        ),
        Backend(
            "blocked",
            register_conditional_norm("blocked", lambda: blocked.KERNELS),
            blocked.unsupported_reasons,
            blocked.not_preferred_reasons,
        ),
        Backend("reference", reference.conditional_batch_norm),
    ),
)
