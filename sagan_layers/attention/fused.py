"""The whole self-attention block in a few Triton kernels, as one differentiable operation of torch.

``sagan_layers::self_attention_2d`` and its ``..._backward`` are opaque to torch.compile and torch.export. Second
derivatives are those of the composed form (projections, pooling and attention one by one), which runs when backward
creates a graph. Triton is imported when the kernels are first used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sagan_layers.attention import reference
from sagan_layers.attention.reference import NonResidualInputs, ProjectionWeights, SelfAttentionInputs
from sagan_layers.attention.saved import Saved, empty_results
from sagan_layers.backends import interpreter_reasons, no_triton_reasons
from sagan_layers.torch_support import autocast_dtype, without_autocast

# Autograd functions and registered operations take flat arguments: the fields of the records, in their order.
_INPUTS = (
    "Tensor x, Tensor query_weight, Tensor key_weight, Tensor value_weight, Tensor? out_weight, "
    "Tensor? query_bias, Tensor? key_bias, Tensor? value_bias, Tensor? out_bias, Tensor gamma, int pool_size"
)
_SAVED = "Tensor query, Tensor key, Tensor value, Tensor attended, Tensor lse, Tensor key_argmax, Tensor value_argmax"
_NUM_TENSORS = 10  # of the inputs


def unsupported_reasons(inputs: SelfAttentionInputs) -> list[str]:
    """Return why the kernels cannot serve."""
    x, weights, _, pool_size = inputs
    if not isinstance(weights, ProjectionWeights):
        return ["a projection is not a plain 1x1 convolution, or has hooks"]
    if reasons := no_triton_reasons(x.device):
        return reasons
    computed = autocast_dtype(x.device)
    if computed is not None and x.dtype != computed:
        reasons.append(f"autocast projects in {computed}, and x is {x.dtype}")
    if isinstance(inputs, NonResidualInputs):
        reasons.append("its kernels add x")
    if pool_size > 2:
        reasons.append(f"pool_size = {pool_size} is above 2")
    return reasons + list(_kernels().unsupported_reasons(x, weights))


def not_preferred_reasons(inputs: SelfAttentionInputs) -> list[str]:
    """Return why "auto" takes the composed form, although the kernels could serve."""
    return interpreter_reasons(inputs.x.device)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def self_attention_2d(attend: Attend) -> Callable[[SelfAttentionInputs], Tensor]:
    """Return the block with derivatives of every order.

    Args:
        attend: attention with derivatives of every order, for the composed form.
    """

    class Block(torch.autograd.Function):
        @staticmethod
        def forward(*flat: Any) -> tuple[Tensor, ...]:
            return _run_forward(*flat)

        setup_context = staticmethod(_save_inputs)

        @staticmethod
        def backward(ctx: Any, grad_y: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
            return _differentiate(attend, _run_backward, ctx, grad_y)

    _forward.register_autograd(
        lambda ctx, grad_y, *_: _differentiate(attend, _backward, ctx, grad_y), setup_context=_save_inputs
    )

    def block(inputs: SelfAttentionInputs) -> Tensor:
        x, weights, gamma, pool_size = inputs
        assert isinstance(weights, ProjectionWeights)
        # As autocast does.
        tensors = x, *weights.to(x.dtype), gamma
        save = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in tensors
        )
        # In eager code the dispatch of a registered operation would cost more than a small block.
        call = _forward if torch.compiler.is_compiling() else Block.apply
        y: Tensor = call(*tensors, pool_size, save)[0]
        return y

    return block


def _kernels() -> Any:
    from sagan_layers.attention import fused_triton_launch

    return fused_triton_launch


def _inputs_of(x: Any, *rest: Any) -> SelfAttentionInputs:
    *weights, gamma, pool_size = rest
    return SelfAttentionInputs(x, ProjectionWeights(*weights), gamma, pool_size)


def _run_forward(*flat: Any) -> tuple[Tensor, ...]:
    *inputs, save = flat
    y, saved = _kernels().forward(_inputs_of(*inputs), save)
    return y, *saved


def _fake_forward(*flat: Any) -> tuple[Tensor, ...]:
    *inputs, save = flat
    y, saved = empty_results(_inputs_of(*inputs), save)
    return y, *saved


def _run_backward(*flat: Any) -> list[Tensor]:
    *inputs, grad_y = flat[: _NUM_TENSORS + 2]
    saved = Saved(*flat[_NUM_TENSORS + 2 :])
    grad_x, *gradients = _kernels().backward(_inputs_of(*inputs), saved, grad_y)
    return [grad_x, *(gradient.contiguous() for gradient in gradients if gradient is not None)]


def _fake_backward(x: Tensor, *flat: Any) -> list[Tensor]:
    parameters = flat[: _NUM_TENSORS - 1]
    return [torch.empty_like(x), *(p.new_empty(p.shape) for p in parameters if p is not None)]


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.pool_size, _ = inputs
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)  # no zeros for the gradients of saved tensors
    ctx.save_for_backward(*tensors, *saved)


def _differentiate(
    attend: Attend, backward: Callable[..., list[Tensor]], ctx: Any, grad_y: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * (_NUM_TENSORS + 2)
    tensors, saved = ctx.saved_tensors[:_NUM_TENSORS], ctx.saved_tensors[_NUM_TENSORS:]
    if torch.is_grad_enabled():
        return *_composed_gradients(attend, tensors, ctx.pool_size, grad_y), None, None
    computed = iter(backward(*tensors, ctx.pool_size, grad_y, *saved))
    return *(None if tensor is None else next(computed) for tensor in tensors), None, None


def _composed_gradients(
    attend: Attend, tensors: tuple[Any, ...], pool_size: int, grad_y: Tensor
) -> tuple[Tensor | None, ...]:
    # Views, because grad_y may itself depend on x: derivatives must stop here.
    stops = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
    with without_autocast(grad_y.device):
        y = reference.self_attention_2d(_inputs_of(*stops, pool_size), attend)
    wanted = [stop for stop in stops if stop is not None and stop.requires_grad]
    computed = iter(torch.autograd.grad(y, wanted, grad_y, create_graph=True))
    return tuple(next(computed) if stop is not None and stop.requires_grad else None for stop in stops)


_forward: Any = torch.library.custom_op(
    "sagan_layers::self_attention_2d",
    _run_forward,
    mutates_args=(),
    schema=f"({_INPUTS}, bool save) -> (Tensor, {', '.join(['Tensor'] * 7)})",
)
_forward.register_fake(_fake_forward)
_backward: Any = torch.library.custom_op(
    "sagan_layers::self_attention_2d_backward",
    _run_backward,
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor grad_y, {_SAVED}) -> Tensor[]",
)
_backward.register_fake(_fake_backward)
