"""Plain-torch definitions of every operation: the single source of truth, differentiable to any order.

Inputs have been checked by :mod:`sagan_layers.functional`. Half-precision inputs are computed in float32 and
rounded once at the end; float64 stays float64.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SpectralNormResult(NamedTuple):
    """A normalised weight and what its spectral norm was estimated with."""

    weight: Tensor
    sigma: Tensor
    u: Tensor
    v: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a tensor of ``dtype`` is accumulated: float64 for itself, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which autocast does not lower the precision of operations on ``device``."""
    if device.type == "meta":  # which autocast does not know
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def attention_weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return softmax over keys of ``scale * query . key``, [N, L, S], in the accumulation dtype."""
    dtype = compute_dtype(query.dtype)
    with without_autocast(query.device):
        logits = torch.bmm(query.to(dtype), key.to(dtype).transpose(1, 2))  # [N, L, S]
        return torch.softmax(logits * scale if scale != 1.0 else logits, dim=-1)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return ``softmax(scale * query . key) @ value``, [N, L, Ev]."""
    weights = attention_weights(query, key, scale)
    with without_autocast(query.device):
        return torch.bmm(weights, value.to(weights.dtype)).to(value.dtype)


def spectral_normalize(
    weight: Tensor, u: Tensor, v: Tensor, n_power_iterations: int, eps: float, dim: int
) -> SpectralNormResult:
    """Return ``weight / sigma`` with u and v, constants for autograd, moved by ``n_power_iterations``."""
    dtype = compute_dtype(weight.dtype)
    with without_autocast(weight.device):
        full = weight.to(dtype)
        matrix = full.transpose(0, dim).flatten(1)
        with torch.no_grad():
            constant, u, v = matrix.detach(), u.to(dtype), v.to(dtype)
            iterate = _opaque_power_iteration if torch.compiler.is_dynamo_compiling() else _power_iteration
            u, v = iterate(constant, u, v, n_power_iterations, eps)
        sigma = torch.dot(u, torch.mv(matrix, v))
        # A weight without a spectral norm to speak of (all zeros) is left as it is.
        divisor = torch.where(sigma.abs() > eps, sigma, torch.ones_like(sigma))
        return SpectralNormResult((full / divisor).to(weight.dtype), sigma, u, v)


def _power_iteration(
    matrix: Tensor, u: Tensor, v: Tensor, n_power_iterations: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Return copies of u and v, moved: backward reads them after the caller's own have moved in place."""
    u, v = u.clone(), v.clone()
    for _ in range(n_power_iterations):
        v = _unit(torch.mv(matrix.t(), u), eps, otherwise=v)
        u = _unit(torch.mv(matrix, v), eps, otherwise=u)
    return u, v


@torch.library.custom_op(
    "sagan_layers::power_iteration",
    mutates_args=(),
    schema="(Tensor matrix, Tensor u, Tensor v, int n_power_iterations, float eps) -> (Tensor, Tensor)",
)
def _opaque_power_iteration(
    matrix: Tensor, u: Tensor, v: Tensor, n_power_iterations: int, eps: float
) -> tuple[Tensor, Tensor]:
    """The same as one operation, which torch.compile does not look into.

    Its partitioner would otherwise recompute v in backward from the buffer u, which has moved by then, and so
    return a wrong gradient (whenever the matrix has few rows).
    """
    with without_autocast(matrix.device):
        return _power_iteration(matrix, u, v, n_power_iterations, eps)


@_opaque_power_iteration.register_fake
def _(matrix: Tensor, u: Tensor, v: Tensor, n_power_iterations: int, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u), torch.empty_like(v)


def _unit(vector: Tensor, eps: float, otherwise: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(vector)
    return torch.where(norm > eps, vector / (norm + eps), otherwise)


def batch_statistics(x: Tensor, process_group: ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and biased variance of each channel, both [C], and the number of values, a scalar.

    With a process group they are those of the batches of all its processes together.
    """
    dims = [d for d in range(x.dim()) if d != 1]
    count = torch.full((), x.numel() // x.size(1), dtype=x.dtype, device=x.device)
    if process_group is None:
        var, mean = torch.var_mean(x, dims, correction=0)
        return mean, var, count
    total = _all_reduce_sum(torch.cat([x.sum(dims), count.reshape(1)]), process_group)
    count = total[-1].detach()
    mean = total[:-1] / count
    squares = (x - _per_channel(mean, x)).square().sum(dims)
    return mean, _all_reduce_sum(squares, process_group) / count, count


def _all_reduce_sum(x: Tensor, process_group: ProcessGroup) -> Tensor:
    result: Tensor = _AllReduceSum.apply(x, process_group)  # type: ignore[no-untyped-call]
    return result


class _AllReduceSum(torch.autograd.Function):
    """Sum over the processes of a group; the gradient is the sum of the gradients, to any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, process_group: ProcessGroup) -> Tensor:
        ctx.process_group = process_group
        total = x.contiguous().clone()
        torch.distributed.all_reduce(total, group=process_group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _all_reduce_sum(gradients[0], ctx.process_group), None


def normalize(x: Tensor, mean: Tensor, var: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return ``gain * (x - mean) / sqrt(var + eps) + bias``; gain and bias are [N, C] or [C]."""
    scale = gain.to(x.dtype) * torch.rsqrt(var + eps)
    # The mean is subtracted first: folding it into the bias would cancel digits when it is large.
    return torch.addcmul(_per_channel(bias.to(x.dtype), x), x - _per_channel(mean, x), _per_channel(scale, x))


def _per_channel(coefficients: Tensor, x: Tensor) -> Tensor:
    """Append axes to [C] or [N, C] coefficients so that they broadcast against x, [N, C, *]."""
    return coefficients.reshape(*coefficients.shape, *[1] * (x.dim() - 2))
