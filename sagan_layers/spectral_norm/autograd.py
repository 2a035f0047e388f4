"""The contract of a backend, and the node that gives its normalised weight a gradient.

Every use of a weight gets its own node: each part of an accumulated batch has its own backward, and data-parallel
training sees each layer's gradient as soon as it is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sagan_layers.spectral_norm import reference
from sagan_layers.spectral_norm.reference import SpectralNormOptions, SpectralNormResult, SpectralNormTask
from sagan_layers.torch_support import is_batch, without_autocast

Gradient = Callable[[Tensor, Tensor, SpectralNormResult, SpectralNormOptions], Tensor]


@dataclass(frozen=True)
class SpectralNormKernels:
    """How a backend normalises weights. Both functions run without autocast.

    Attributes:
        normalize: takes a list of tasks; returns their results, all new tensors.
        gradient: takes the gradient of the normalised weight, the weight (its values may have changed since), the
            result and the options; returns the weight's gradient in its dtype. None if ``normalize`` records the
            graph of plain operations, which autograd follows.
    """

    normalize: Callable[[list[SpectralNormTask]], list[SpectralNormResult]]
    gradient: Gradient | None = None


def with_gradient(task: SpectralNormTask, result: SpectralNormResult, gradient: Gradient) -> Tensor:
    """Return the normalised weight of a result as a function of the task's weight for autograd."""
    if not (torch.is_grad_enabled() and task.weight.requires_grad):
        return result.weight
    normalized, sigma, u, v = result
    weight: Tensor = NormalizedWeight.apply(  # type: ignore[no-untyped-call]
        task.weight, normalized, sigma, u, v, task.options, gradient
    )
    return weight


class NormalizedWeight(torch.autograd.Function):
    """The normalised weight of a result, with the derivative of ``weight / sigma``; u and v are constants."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        normalized: Tensor,
        sigma: Tensor,
        u: Tensor,
        v: Tensor,
        options: SpectralNormOptions,
        gradient: Gradient,
    ) -> Tensor:
        """Return ``normalized``; the rest is for backward."""
        ctx.options, ctx.gradient = options, gradient
        # First derivatives do not read the weight's values, so an optimizer may step before backward.
        ctx.weight = weight
        ctx.version = None if torch.compiler.is_compiling() else weight._version
        ctx.save_for_backward(normalized, sigma, u, v)
        return normalized.detach()  # an alias with the same strides, those of axes of size 1 included

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the weight."""
        (grad,) = grads
        result = SpectralNormResult(*ctx.saved_tensors)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            gradient = _differentiable_gradient(ctx, grad, result)
        else:
            function = reference.gradient if is_batch(grad) else ctx.gradient
            with without_autocast(grad.device):
                gradient = function(grad, ctx.weight, result, ctx.options)
        return gradient, *(None,) * 6


def _differentiable_gradient(ctx: Any, grad: Tensor, result: SpectralNormResult) -> Tensor:
    """Return the gradient as a function of ``grad`` and the weight, for derivatives of every order."""
    if ctx.weight._version != ctx.version:
        raise RuntimeError(
            "a spectrally normalised weight was modified in place after the forward pass whose second "
            "derivatives are needed; compute them before optimizer.step()"
        )
    # A view, because grad may itself depend on the weight: derivatives must stop here.
    weight = ctx.weight.view_as(ctx.weight)
    options = ctx.options._replace(n_power_iterations=0, dtype=weight.dtype)
    normalized = reference.spectral_normalize(weight, result.u, result.v, options).weight
    gradient: Tensor
    (gradient,) = torch.autograd.grad(normalized, weight, grad.to(normalized.dtype), create_graph=True)
    return gradient
