"""Makes a normalised weight that has been computed already a differentiable function of its weight.

Every use of the weight gets a node of its own, so that each part of an accumulated batch has its own backward and
data-parallel training sees each layer's gradient as soon as it is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sagan_layers.spectral_norm import reference
from sagan_layers.spectral_norm.reference import SpectralNormResult

Gradient = Callable[[Tensor, Tensor, SpectralNormResult, int, float, Any], Tensor]


class NormalizedWeight(torch.autograd.Function):
    """The normalised weight of a result, with the derivative of ``weight / sigma``, u and v constants."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        normalized: Tensor,
        sigma: Tensor,
        u: Tensor,
        v: Tensor,
        dim: int,
        eps: float,
        gradient: Gradient | None,
        memory: Any,
    ) -> Tensor:
        """Return ``normalized``; the rest is for backward."""
        ctx.dim, ctx.eps, ctx.gradient, ctx.memory = dim, eps, gradient, memory
        # First derivatives read none of the weight's values, so that an optimizer may step before backward.
        ctx.weight = weight
        ctx.version = None if torch.compiler.is_compiling() else weight._version
        ctx.save_for_backward(normalized, sigma, u, v)
        return normalized.view_as(normalized)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the weight."""
        (grad,) = grads
        result = SpectralNormResult(*ctx.saved_tensors)
        if torch.compiler.is_compiling():
            gradient = reference.spectral_normalize_gradient(grad, result, ctx.eps, ctx.dim)
        elif torch.is_grad_enabled():
            gradient = _differentiable_gradient(ctx, grad, result)
        elif ctx.gradient is None:
            gradient = reference.spectral_normalize_gradient(grad, result, ctx.eps, ctx.dim)
        else:
            gradient = ctx.gradient(grad, ctx.weight, result, ctx.dim, ctx.eps, ctx.memory)
        return gradient.to(ctx.weight.dtype), *(None,) * 8


def _differentiable_gradient(ctx: Any, grad: Tensor, result: SpectralNormResult) -> Tensor:
    """Return the gradient as a function of ``grad`` and the weight, for derivatives of every order."""
    if ctx.weight._version != ctx.version:
        raise RuntimeError(
            "a spectrally normalised weight was modified in place after the forward pass whose second "
            "derivatives were asked for; take them before optimizer.step()"
        )
    # A view, because grad may itself depend on the weight: derivatives are to stop here.
    stop = ctx.weight.view_as(ctx.weight)
    normalized = reference.spectral_normalize(stop, result.u, result.v, 0, ctx.eps, ctx.dim).weight
    gradient: Tensor
    (gradient,) = torch.autograd.grad(normalized, stop, grad.to(normalized.dtype), create_graph=True)
    return gradient
