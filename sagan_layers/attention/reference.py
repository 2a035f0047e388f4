"""Self-attention in plain torch: the definition, differentiable to any order.

The functional forms have checked the inputs. Half-precision inputs are computed in float32 and rounded once at the
end; float64 stays float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sagan_layers.torch_support import accumulation_dtype, without_autocast

Projection = Callable[[Tensor], Tensor]
ProjectionLayers = tuple[Projection, Projection, Projection, Projection]


class AttentionInputs(NamedTuple):
    """The inputs of attention: query [N, L, E], key [N, S, E], value [N, S, Ev]."""

    query: Tensor
    key: Tensor
    value: Tensor


def attention_weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return softmax over keys of ``scale * query . key``, [N, L, S], in the accumulation dtype."""
    dtype = accumulation_dtype(query.dtype)
    with without_autocast(query.device):
        logits = torch.bmm(query.to(dtype), key.to(dtype).transpose(1, 2))  # [N, L, S]
        return torch.softmax(logits * scale if scale != 1.0 else logits, dim=-1)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return ``softmax(scale * query . key) @ value``, [N, L, Ev]."""
    weights = attention_weights(query, key, scale)
    with without_autocast(query.device):
        return torch.bmm(weights, value.to(weights.dtype)).to(value.dtype)


def attention_double_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_y: Tensor,
    grad_grad_query: Tensor,
    grad_grad_key: Tensor,
    grad_grad_value: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and grad_y through attention's backward.

    ``grad_y`` is the gradient that backward took, ``grad_grad_...`` are the gradients of its three results.
    """
    inputs = query, key, value, grad_y
    dtype = accumulation_dtype(query.dtype)
    query, key, value, grad_y = (tensor.to(dtype) for tensor in inputs)
    grad_grad_query, grad_grad_key, grad_grad_value = (
        tensor.to(dtype) for tensor in (grad_grad_query, grad_grad_key, grad_grad_value)
    )
    with without_autocast(query.device):
        weights = attention_weights(query, key, scale)  # [N, L, S], like all that follow

        def centred(tensor: Tensor) -> Tensor:
            return tensor - (weights * tensor).sum(-1, keepdim=True)

        # The logits' derivative along grad_grad_query and grad_grad_key, and the gradient of the weights.
        tangent = centred(scale * (grad_grad_query @ key.mT + query @ grad_grad_key.mT))
        grad_weights = centred(grad_y @ value.mT)
        first = scale * weights * grad_weights
        second = scale * weights * centred(grad_weights * tangent + grad_y @ grad_grad_value.mT)
        weight_tangent = weights * tangent
        results = (
            second @ key + first @ grad_grad_key,
            second.mT @ query + first.mT @ grad_grad_query,
            weight_tangent.mT @ grad_y,
            weight_tangent @ value + weights @ grad_grad_value,
        )
    grad_query, grad_key, grad_value, grad_grad_y = (
        result.to(tensor.dtype) for result, tensor in zip(results, inputs, strict=True)
    )
    return grad_query, grad_key, grad_value, grad_grad_y


class ProjectionWeights(NamedTuple):
    """Four projections that are plain 1x1 convolutions: weights without spatial axes, normalised.

    Shapes: query and key [E, C], value [Ev, C], out [C, Ev] or None for the identity (then Ev is C), biases [E],
    [E], [Ev], [C] or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor | None
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None
    value_bias: Tensor | None = None
    out_bias: Tensor | None = None

    def to(self, dtype: torch.dtype) -> ProjectionWeights:
        """Return the same in another dtype."""
        cast: list[Any] = [tensor if tensor is None else tensor.to(dtype) for tensor in self]
        return ProjectionWeights(*cast)

    def layers(self) -> ProjectionLayers:
        """Return the four convolutions as functions."""
        # Written out: torch.compile of torch 2.6 has no slices of named tuples.
        return (
            _conv1x1(self.query, self.query_bias),
            _conv1x1(self.key, self.key_bias),
            _conv1x1(self.value, self.value_bias),
            _conv1x1(self.out, self.out_bias),
        )


class SelfAttentionInputs(NamedTuple):
    """The inputs of a block of self-attention.

    Attributes:
        x: [N, C, H, W].
        projections: the weights of plain 1x1 convolutions, or four functions from feature map to feature map.
        gamma: a scalar.
        pool_size: of the max-pool over keys and values.
    """

    x: Tensor
    projections: ProjectionWeights | ProjectionLayers
    gamma: Tensor
    pool_size: int


class NonResidualInputs(SelfAttentionInputs):
    """The inputs of a block that does not add x to its result. A class, because kernels unpack four fields."""


def self_attention_2d(
    inputs: SelfAttentionInputs, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Return ``x + gamma * out(attend(query(x), pool(key(x)), pool(value(x))))``, or the second term alone."""
    x, projections, gamma, pool_size = inputs
    if isinstance(projections, ProjectionWeights):
        projections = projections.layers()
    query, key, value, out = projections

    def pool(features: Tensor) -> Tensor:
        return features if pool_size == 1 else F.max_pool2d(features, pool_size)

    attended = attend(positions(query(x)), positions(pool(key(x))), positions(pool(value(x))))
    attended = attended.mT.reshape(x.size(0), attended.size(2), *x.shape[2:])
    if torch.compiler.is_compiling():
        # Inductor cannot order the strides of a view whose sizes are symbols.
        attended = attended.contiguous()
    gathered = out(attended)
    # The first term's memory format is the result's.
    start = torch.zeros_like(x) if isinstance(inputs, NonResidualInputs) else x
    # Subtracted from zero twice, because at gamma 0 a plain sum would turn -0.0 into 0.0.
    return start - (0.0 - gamma * gathered).to(x.dtype)


def _conv1x1(weight: Tensor | None, bias: Tensor | None) -> Projection:
    if weight is None:
        return lambda features: features
    return lambda features: F.conv2d(features, weight[..., None, None], bias)


def positions(features: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H*W, C], a view where the memory format allows it."""
    return features.flatten(2).mT
