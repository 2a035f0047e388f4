"""Self-attention in plain torch: the definition, differentiable to any order.

The functional forms have checked the inputs. Half-precision inputs are computed in float32 and rounded once at the
end; float64 stays float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sagan_layers.torch_support import accumulation_dtype, without_autocast

Projection = Callable[[Tensor], Tensor]


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
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], cotangents: tuple[Tensor, Tensor, Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and grad_y through attention's backward.

    Args:
        inputs: query, key, value and grad_y, the gradient of the output.
        cotangents: of the gradients of query, key and value.
        scale: factor on the logits.
    """
    dtype = accumulation_dtype(inputs[0].dtype)
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
