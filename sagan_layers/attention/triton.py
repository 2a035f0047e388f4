"""Attention on this library's Triton kernels; Triton is imported when they are first used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sagan_layers.attention.autograd import AttentionKernels, register_attention
from sagan_layers.attention.reference import AttentionInputs
from sagan_layers.backends import interpreter_reasons, no_triton_reasons
from sagan_layers.torch_support import accumulation_dtype


def unsupported_reasons(inputs: AttentionInputs) -> list[str]:
    """Return why the kernels cannot serve."""
    return no_triton_reasons(inputs.query.device) or list(_kernels().unsupported_reasons(inputs))


def not_preferred_reasons(inputs: AttentionInputs) -> list[str]:
    """Return why "auto" takes a later backend, although this one could serve."""
    return interpreter_reasons(inputs.query.device)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return attention with derivatives of every order."""
    return _attention(query, key, value, scale, False)


def _kernels() -> Any:
    from sagan_layers.attention import triton_launch

    return triton_launch


def _saved_form(
    query: Tensor, key: Tensor, value: Tensor, scale: float, save_weights: bool
) -> tuple[tuple[int, int], torch.dtype]:
    """Return shape and dtype of the logarithms of the softmax's denominators."""
    return (query.size(0), query.size(1)), accumulation_dtype(query.dtype)


_attention = register_attention(
    "triton",
    AttentionKernels(
        forward=lambda query, key, value, scale, save_weights: _kernels().forward(query, key, value, scale),
        backward=lambda inputs: _kernels().backward(inputs),
        double_backward=lambda inputs, grad_grads: _kernels().double_backward(inputs, grad_grads),
        saved_form=_saved_form,
        channels_first=False,
        reads_output=True,
    ),
)
