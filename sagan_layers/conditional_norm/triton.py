"""Conditional batch norm on this library's Triton kernels; Triton is imported when a call first needs it."""

from __future__ import annotations

from typing import Any

import torch

from sagan_layers.backends import interpreter_reasons, no_triton_reasons
from sagan_layers.conditional_norm.autograd import register_conditional_norm
from sagan_layers.conditional_norm.kernels import ConditionalNormInputs


def unsupported_reasons(inputs: ConditionalNormInputs) -> list[str]:
    """Return why the kernels cannot serve."""
    return no_triton_reasons(inputs.x.device) or list(_kernels().unsupported_reasons(inputs))


def not_preferred_reasons(inputs: ConditionalNormInputs) -> list[str]:
    """Return why "auto" takes a later backend, although this one could serve."""
    if torch.compiler.is_compiling():
        return ["torch.compile writes its own kernels from 'reference'"]
    return interpreter_reasons(inputs.x.device)


def _kernels() -> Any:
    from sagan_layers.conditional_norm import triton_kernels

    return triton_kernels


conditional_batch_norm = register_conditional_norm("triton", lambda: _kernels().KERNELS)
