"""Plain-torch definitions of every operation: the single source of truth, differentiable to any order.

Inputs have been checked by :mod:`sagan_layers.functional`. Half-precision inputs are computed in float32 and
rounded once at the end; float64 stays float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Projection = Callable[[Tensor], Tensor]


class SpectralNormResult(NamedTuple):
    """A normalised weight and what its spectral norm was estimated with."""

    weight: Tensor
    sigma: Tensor
    u: Tensor
    v: Tensor


class SpectralNormTask(NamedTuple):
    """One weight to normalise.

    Attributes:
        weight: at least two axes.
        u: [out], where the iteration starts.
        v: [rest].
        dim: the axis of the outputs, 0 or 1.
        n_power_iterations: how often u and v move before sigma is taken.
        eps: added to the norms of u and v.
        dtype: of the normalised weight.
        memory: what to reuse for the results, where a backend does that.
    """

    weight: Tensor
    u: Tensor
    v: Tensor
    dim: int
    n_power_iterations: int
    eps: float
    dtype: torch.dtype
    memory: Any = None


class SelfAttentionWeights(NamedTuple):
    """The parameters of a self-attention block, as its formula sees them: normalised, without spatial axes.

    Shapes: query and key [E, C], value [Ev, C], out [C, Ev] or None for the identity (then Ev is C), biases [E],
    [E], [Ev], [C] or None, gamma a scalar.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor | None
    query_bias: Tensor | None
    key_bias: Tensor | None
    value_bias: Tensor | None
    out_bias: Tensor | None
    gamma: Tensor

    def to(self, dtype: torch.dtype) -> SelfAttentionWeights:
        """Return the same in another dtype, gamma excepted."""

        def cast(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(dtype)

        # Written out, since torch.compile of torch 2.6 knows neither _asdict nor _replace.
        return SelfAttentionWeights(
            self.query.to(dtype),
            self.key.to(dtype),
            self.value.to(dtype),
            cast(self.out),
            cast(self.query_bias),
            cast(self.key_bias),
            cast(self.value_bias),
            cast(self.out_bias),
            self.gamma,
        )


class ConditionalNormResult(NamedTuple):
    """A normalised batch, and what it was normalised with.

    Attributes:
        y: [N, C, *].
        mean: [C].
        var: [C], biased.
        num_values: how many values of a channel mean and variance are of; None if they were given.
    """

    y: Tensor
    mean: Tensor
    var: Tensor
    num_values: int | Tensor | None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a tensor of ``dtype`` is accumulated: float64 for itself, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which autocast does not lower the precision of operations on ``device``."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):  # autocast does not know meta
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def is_exporting() -> bool:
    """Return whether torch.export is at work."""
    # The function that tells came after torch 2.6; until it did, compiling counts as exporting.
    return bool(getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)())


def is_known(condition: bool | torch.SymBool) -> bool:
    """Return a condition on sizes; False inside torch.export, which may leave sizes open."""
    return not is_exporting() and bool(condition)


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


def attention_double_backward(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], cotangents: tuple[Tensor, Tensor, Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and grad_y through attention's backward.

    Args:
        inputs: query, key, value and grad_y, the gradient of the output.
        cotangents: of the gradients of query, key and value.
        scale: factor on the logits.
    """
    dtype = compute_dtype(inputs[0].dtype)
    query, key, value, grad_y = (tensor.to(dtype) for tensor in inputs)
    towards_query, towards_key, towards_value = (tensor.to(dtype) for tensor in cotangents)
    with without_autocast(query.device):
        weights = attention_weights(query, key, scale)  # [N, L, S], like all that follow

        def centred(tensor: Tensor) -> Tensor:
            return tensor - (weights * tensor).sum(-1, keepdim=True)

        # How the logits move along the cotangents, and the gradient of the weights.
        tangent = centred(scale * (towards_query @ key.mT + query @ towards_key.mT))
        grad_weights = centred(grad_y @ value.mT)
        first = scale * weights * grad_weights
        second = scale * weights * centred(grad_weights * tangent + grad_y @ towards_value.mT)
        moved = weights * tangent
        results = (
            second @ key + first @ towards_key,
            second.mT @ query + first.mT @ towards_query,
            moved.mT @ grad_y,
            moved @ value + weights @ towards_value,
        )
    of_query, of_key, of_value, of_grad = (
        result.to(tensor.dtype) for result, tensor in zip(results, inputs, strict=True)
    )
    return of_query, of_key, of_value, of_grad


def self_attention_2d(
    x: Tensor,
    weights: SelfAttentionWeights,
    pool_size: int,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Return ``x + gamma * out(attend(query(x), pool(key(x)), pool(value(x))))``, with 1x1 convolutions."""

    def conv1x1(weight: Tensor | None, bias: Tensor | None) -> Projection:
        if weight is None:
            return lambda features: features
        return lambda features: F.conv2d(features, weight[..., None, None], bias)

    return compose_self_attention(
        x,
        conv1x1(weights.query, weights.query_bias),
        conv1x1(weights.key, weights.key_bias),
        conv1x1(weights.value, weights.value_bias),
        conv1x1(weights.out, weights.out_bias),
        weights.gamma,
        pool_size,
        attend,
    )


def compose_self_attention(
    x: Tensor,
    query: Projection,
    key: Projection,
    value: Projection,
    out: Projection,
    gamma: Tensor,
    pool_size: int,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """The same for projections of any kind, feature map to feature map."""

    def pool(features: Tensor) -> Tensor:
        return features if pool_size == 1 else F.max_pool2d(features, pool_size)

    attended = attend(positions(query(x)), positions(pool(key(x))), positions(pool(value(x))))
    gathered = out(attended.mT.reshape(x.size(0), attended.size(2), *x.shape[2:]))
    # Subtracted from zero twice, because at gamma 0 a plain sum would turn -0.0 into 0.0.
    return x - (0.0 - gamma * gathered).to(x.dtype)


def positions(features: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H*W, C], a view where the memory format allows it."""
    return features.flatten(2).mT


def upsample_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factor: int,
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Return the convolution of x, enlarged ``factor`` times by repeating its pixels."""
    enlarged = F.interpolate(x, scale_factor=factor, mode="nearest")
    return F.conv2d(enlarged, weight, bias, padding=padding, dilation=dilation, groups=groups)


def conv2d_downsample(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factor: int,
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Return the convolution of x, averaged over squares of ``factor`` x ``factor`` pixels."""
    return F.avg_pool2d(F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=groups), factor)


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
        divisor = spectral_divisor(sigma, eps)
        return SpectralNormResult((full / divisor).to(weight.dtype), sigma, u, v)


def spectral_divisor(sigma: Tensor, eps: float) -> Tensor:
    """Return sigma, or 1 for a weight without a spectral norm to speak of (all zeros): it is left as it is."""
    return torch.where(sigma.abs() > eps, sigma, torch.ones_like(sigma))


def spectral_normalize_gradient(grad: Tensor, result: SpectralNormResult, eps: float, dim: int) -> Tensor:
    """Return the gradient of the weight from that of the normalised one, u and v taken as constants.

    Args:
        grad: the gradient of ``result.weight``.
        result: what forward found.
        eps: as in forward.
        dim: the axis of the outputs.
    """
    u, v, sigma = result.u, result.v, result.sigma
    with without_autocast(grad.device):
        grad, normalized = grad.to(u.dtype), result.weight.to(u.dtype)
        inner = torch.where(sigma.abs() > eps, (grad * normalized).sum(), torch.zeros_like(sigma))
        sizes = normalized.transpose(0, dim).shape
        direction = torch.outer(u, v).view(sizes).transpose(0, dim)
        return (grad - inner * direction) / spectral_divisor(sigma, eps)


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


def conditional_batch_norm(
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    given: tuple[Tensor, Tensor] | None,
    eps: float,
    relu: bool,
    process_group: ProcessGroup | None,
) -> ConditionalNormResult:
    """Return x normalised by its batch's mean and variance, or by the given ones, and after that ReLU if asked."""
    with without_autocast(x.device):
        wide = x.to(compute_dtype(x.dtype))
        count = None
        if given is None:
            mean, var, count = batch_statistics(wide, process_group)
        else:
            mean, var = (statistic.to(wide.dtype) for statistic in given)
        y = normalize(wide, mean, var, gain, bias, eps).to(x.dtype)
        return ConditionalNormResult(torch.relu(y) if relu else y, mean, var, count)


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
