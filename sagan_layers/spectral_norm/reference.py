"""Spectral normalisation in plain torch: the definition, differentiable to any order.

The functional forms have checked the inputs. Half-precision weights are computed in float32; float64 stays float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sagan_layers.torch_support import accumulation_dtype, is_exporting, without_autocast


class SpectralNormResult(NamedTuple):
    """A normalised weight, sigma, and the vectors u and v that gave it."""

    weight: Tensor
    sigma: Tensor
    u: Tensor
    v: Tensor


class SpectralNormOptions(NamedTuple):
    """How to normalise a weight.

    Attributes:
        dim: the axis of the outputs, 0 or 1.
        n_power_iterations: how often u and v are updated before sigma is taken.
        eps: keeps the norms of u and v from 0.
        dtype: of the normalised weight.
        memory: a :class:`~sagan_layers.spectral_norm.memory.LayerMemory` that a backend may reuse, or None.
        eps_mode: "add" adds eps to the norms, "clamp" takes it as their least value.
        iterate_from: the vector from which an iteration computes the other one first, "u" or "v".
    """

    dim: int
    n_power_iterations: int
    eps: float
    dtype: torch.dtype
    memory: Any = None
    eps_mode: str = "add"
    iterate_from: str = "u"


class SpectralNormTask(NamedTuple):
    """One weight to normalise, with u [out] and v [rest] from which the iteration starts."""

    weight: Tensor
    u: Tensor
    v: Tensor
    options: SpectralNormOptions


def normalize(tasks: list[SpectralNormTask]) -> list[SpectralNormResult]:
    """Return the normalised weights, with their graphs."""
    return [spectral_normalize(*task) for task in tasks]


def spectral_normalize(
    weight: Tensor, u: Tensor, v: Tensor, options: SpectralNormOptions
) -> SpectralNormResult:
    """Return ``weight / sigma``, with u and v, constants for autograd, after ``n_power_iterations`` updates."""
    dtype, eps, eps_mode = accumulation_dtype(weight.dtype), options.eps, options.eps_mode
    with without_autocast(weight.device):
        full = weight.to(dtype)
        matrix = full.transpose(0, options.dim).flatten(1)
        with torch.no_grad():
            constant, u, v = matrix.detach(), u.to(dtype), v.to(dtype)
            compiled = torch.compiler.is_dynamo_compiling() and not is_exporting()
            iterate = _opaque_power_iteration if compiled else _power_iteration
            if options.iterate_from == "u":
                u, v = iterate(constant, u, v, options.n_power_iterations, eps, eps_mode)
            else:
                v, u = iterate(constant.t(), v, u, options.n_power_iterations, eps, eps_mode)
        sigma = torch.dot(u, torch.mv(matrix, v))
        divisor = spectral_divisor(sigma, least_norm(eps, eps_mode))
        return SpectralNormResult((full / divisor).to(options.dtype), sigma, u, v)


def least_norm(eps: float, eps_mode: str) -> float:
    """Return the norm above which vectors and weights are divided: eps, or 0 if eps is only the least divisor."""
    return eps if eps_mode == "add" else 0.0


def spectral_divisor(sigma: Tensor, least: float) -> Tensor:
    """Return sigma, or 1 where it is not above ``least``: a weight of zeros stays zero. NaN where it overflowed."""
    return torch.where(sigma.abs() <= least, 1.0, sigma.masked_fill(sigma.isinf(), torch.nan))


def gradient(
    grad: Tensor, weight: Tensor, result: SpectralNormResult, options: SpectralNormOptions
) -> Tensor:
    """Return the gradient of the weight from that of the normalised one; u and v are constants."""
    u, v, sigma = result.u, result.v, result.sigma
    least = least_norm(options.eps, options.eps_mode)
    grad, normalized = grad.to(u.dtype), result.weight.to(u.dtype)
    inner = torch.where(sigma.abs() > least, (grad * normalized).sum(), torch.zeros_like(sigma))
    sizes = normalized.transpose(0, options.dim).shape
    direction = torch.outer(u, v).view(sizes).transpose(0, options.dim)
    return ((grad - inner * direction) / spectral_divisor(sigma, least)).to(weight.dtype)


def _power_iteration(
    matrix: Tensor, u: Tensor, v: Tensor, n_power_iterations: int, eps: float, eps_mode: str
) -> tuple[Tensor, Tensor]:
    """Return updated copies of u and v: backward reads them after the layer has overwritten its buffers."""
    u, v = u.clone(), v.clone()
    for _ in range(n_power_iterations):
        v = unit(torch.mv(matrix.t(), u), eps, eps_mode, otherwise=v)
        u = unit(torch.mv(matrix, v), eps, eps_mode, otherwise=u)
    return u, v


@torch.library.custom_op(
    "sagan_layers::power_iteration",
    mutates_args=(),
    schema=(
        "(Tensor matrix, Tensor u, Tensor v, int n_power_iterations, float eps, str eps_mode) -> (Tensor, Tensor)"
    ),
)
def _opaque_power_iteration(
    matrix: Tensor, u: Tensor, v: Tensor, n_power_iterations: int, eps: float, eps_mode: str
) -> tuple[Tensor, Tensor]:
    """The same as one operation that torch.compile does not look into.

    Its partitioner would otherwise recompute v in backward from the buffer u, which has been updated by then. The
    gradient would be wrong whenever the matrix has few rows.
    """
    with without_autocast(matrix.device):
        return _power_iteration(matrix, u, v, n_power_iterations, eps, eps_mode)


@_opaque_power_iteration.register_fake
def _(
    matrix: Tensor, u: Tensor, v: Tensor, n_power_iterations: int, eps: float, eps_mode: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u), torch.empty_like(v)


def unit(vectors: Tensor, eps: float, eps_mode: str, otherwise: Tensor) -> Tensor:
    """Return vectors [*, n] divided by their norms, which eps keeps from 0; other ones where the norm is too small."""
    # In float64 no square of a float32 overflows or vanishes.
    dtype = vectors.dtype if vectors.device.type == "mps" else torch.float64
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True, dtype=dtype)
    exact = norms + eps if eps_mode == "add" else norms.clamp_min(eps)
    divisors = exact.to(vectors.dtype)
    # A norm that float32 alone cannot hold still divides; others give NaN, not zeros.
    divisors = torch.where(divisors.isinf(), torch.nan if norms.dtype == vectors.dtype else exact, divisors)
    return torch.where(norms > least_norm(eps, eps_mode), (vectors / divisors).to(vectors.dtype), otherwise)
