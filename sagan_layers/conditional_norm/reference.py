"""Conditional batch norm in plain torch: the definition, differentiable to any order.

The functional form has checked the inputs. Half-precision inputs are computed in float32 and rounded once at the end;
float64 stays float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor

from sagan_layers.checks import reads_values_of
from sagan_layers.torch_support import accumulation_dtype, without_autocast

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ConditionalNormResult(NamedTuple):
    """A normalised batch and its statistics.

    Attributes:
        y: [N, C, *].
        mean: [C].
        var: [C], biased.
        num_values: the number of values per channel in mean and variance; None for running statistics.
    """

    y: Tensor
    mean: Tensor
    var: Tensor
    num_values: int | Tensor | None


def conditional_batch_norm(
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    running: tuple[Tensor, Tensor] | None,
    eps: float,
    relu: bool,
    process_group: ProcessGroup | None,
) -> ConditionalNormResult:
    """Return x normalised by its batch's mean and variance or by the running ones, scaled and shifted; then ReLU."""
    with without_autocast(x.device):
        wide = x.to(accumulation_dtype(x.dtype))
        num_values = None
        if running is None:
            mean, var, num_values = batch_statistics(wide, process_group)
            if not reads_values_of(var):  # nothing can check it: an overflow must not leave the bias alone
                var = var.masked_fill(var.isinf(), torch.nan)
        else:
            mean, var = (statistic.to(wide.dtype) for statistic in running)
        y = normalize(wide, mean, var, gain, bias, eps).to(x.dtype)
        return ConditionalNormResult(torch.relu(y) if relu else y, mean, var, num_values)


def batch_statistics(x: Tensor, process_group: ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and biased variance of each channel, both [C], and the number of values, a scalar.

    With a process group they are taken over the batches of all its processes.
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


def all_gather(x: Tensor, process_group: ProcessGroup | None) -> Tensor:
    """Return the tensors of all processes of a group, stacked in the order of their ranks."""
    gathered = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size(process_group))]
    torch.distributed.all_gather(gathered, x, group=process_group)
    return torch.stack(gathered)


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
