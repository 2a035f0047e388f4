"""Makes the fused kernels of the whole self-attention block into one differentiable operation of torch.

``sagan_layers::self_attention_2d`` and its ``..._backward`` are opaque to torch.compile and torch.export. Second
derivatives come from the composed form (projections, pooling and attention one by one), which is written out
when a graph of the gradients is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sagan_layers.attention import reference
from sagan_layers.attention.reference import SelfAttentionWeights
from sagan_layers.torch_support import accumulation_dtype, without_autocast

_INPUTS = (
    "Tensor x, Tensor query_weight, Tensor key_weight, Tensor value_weight, Tensor? out_weight, "
    "Tensor? query_bias, Tensor? key_bias, Tensor? value_bias, Tensor? out_bias, Tensor gamma"
)


def _kernels() -> Any:
    from sagan_layers.attention import fused_triton as self_attention_triton

    return self_attention_triton


def _run_forward(
    x: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    out_weight: Tensor | None,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    out_bias: Tensor | None,
    gamma: Tensor,
    pool_size: int,
    save: bool,
) -> tuple[Tensor, ...]:
    weights = query_weight, key_weight, value_weight, out_weight
    biases = query_bias, key_bias, value_bias, out_bias
    results: tuple[Tensor, ...] = _kernels().forward(x, *weights, *biases, gamma, pool_size, save=save)
    return results


_forward: Any = torch.library.custom_op(
    "sagan_layers::self_attention_2d",
    _run_forward,
    mutates_args=(),
    schema=f"({_INPUTS}, int pool_size, bool save) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _fake_forward(
    x: Tensor, query_weight: Tensor, key_weight: Tensor, value_weight: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *_, pool_size, save = rest
    N, _, H, W = x.shape
    E, Ev = key_weight.size(0), value_weight.size(0)
    L, S = H * W, (H // pool_size) * (W // pool_size)
    places = (N, S) if save and pool_size > 1 else (0, 0)
    return (
        torch.empty_like(x),
        x.new_empty((N, L, E) if save else (0, 0, E)),
        x.new_empty((N, S, E)),
        x.new_empty((N, S, Ev)),
        x.new_empty((N, L, Ev) if save else (0, 0, Ev)),
        x.new_empty((N, L) if save else (0, 0), dtype=accumulation_dtype(x.dtype)),
        x.new_empty((*places, E), dtype=torch.uint8),
        x.new_empty((*places, Ev), dtype=torch.uint8),
    )


_forward.register_fake(_fake_forward)


def _run_backward(
    grad_y: Tensor,
    x: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    out_weight: Tensor | None,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    out_bias: Tensor | None,
    gamma: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attended: Tensor,
    lse: Tensor,
    key_argmax: Tensor,
    value_argmax: Tensor,
    pool_size: int,
) -> list[Tensor]:
    weights = query_weight, key_weight, value_weight, out_weight
    biases = query_bias, key_bias, value_bias, out_bias
    saved = query, key, value, attended, lse, key_argmax, value_argmax
    gradients = _kernels().backward(grad_y, x, *weights, *biases, gamma, *saved, pool_size)
    of_x, *of_parameters = gradients
    return [of_x, *(gradient.contiguous() for gradient in of_parameters if gradient is not None)]


_backward: Any = torch.library.custom_op(
    "sagan_layers::self_attention_2d_backward",
    _run_backward,
    mutates_args=(),
    schema=f"(Tensor grad_y, {_INPUTS}, Tensor query, Tensor key, Tensor value, Tensor attended, Tensor lse, "
    "Tensor key_argmax, Tensor value_argmax, int pool_size) -> Tensor[]",
)


def _fake_backward(grad_y: Tensor, *rest: Any) -> list[Tensor]:
    x, *parameters = rest[:10]
    return [torch.empty_like(x), *(p.new_empty(p.shape) for p in parameters if p is not None)]


_backward.register_fake(_fake_backward)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def register_self_attention(attend: Attend) -> Callable[[Tensor, SelfAttentionWeights, int, bool], Tensor]:
    """Connect forward and backward; return the block with derivatives of every order.

    Args:
        attend: attention with derivatives of every order, for the composed form.
    """

    class Block(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return _run_forward(*args)

        setup_context = staticmethod(_save_inputs)

        @staticmethod
        def backward(ctx: Any, grad_y: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
            return _differentiate(attend, _run_backward, ctx, grad_y)

    _forward.register_autograd(
        lambda ctx, grad_y, *_: _differentiate(attend, _backward, ctx, grad_y), setup_context=_save_inputs
    )

    def self_attention_2d(x: Tensor, weights: SelfAttentionWeights, pool_size: int, save: bool) -> Tensor:
        # In eager code the dispatch of a registered operation would cost more than a small block.
        call = _forward if torch.compiler.is_compiling() else Block.apply
        result: Tensor = call(x, *weights, pool_size, save)[0]
        return result

    return self_attention_2d


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.pool_size, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for the rest of the outputs, which nobody reads
    ctx.save_for_backward(*tensors, *output[1:])


def _differentiate(
    attend: Attend, backward: Callable[..., list[Tensor]], ctx: Any, grad_y: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 12
    inputs = ctx.saved_tensors[:10]
    if torch.is_grad_enabled():
        return *_composed_gradients(attend, inputs, grad_y, ctx.pool_size), None, None
    computed = iter(backward(grad_y, *ctx.saved_tensors, ctx.pool_size))
    return *(None if tensor is None else next(computed) for tensor in inputs), None, None


def _composed_gradients(
    attend: Attend, inputs: tuple[Tensor | None, ...], grad_y: Tensor, pool_size: int
) -> tuple[Tensor | None, ...]:
    # Views, because grad_y may itself depend on x: derivatives are to stop here.
    stops = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    x, query, key, value, out, query_bias, key_bias, value_bias, out_bias, gamma = stops
    assert x is not None
    assert query is not None
    assert key is not None
    assert value is not None
    assert gamma is not None
    with without_autocast(x.device):
        weights = SelfAttentionWeights(
            query, key, value, out, query_bias, key_bias, value_bias, out_bias, gamma
        )
        y = reference.self_attention_2d(x, weights, pool_size, attend)
    wanted = [stop for stop in stops if stop is not None and stop.requires_grad]
    computed = iter(torch.autograd.grad(y, wanted, grad_y, create_graph=True))
    return tuple(next(computed) if stop is not None and stop.requires_grad else None for stop in stops)
