"""Makes kernels for attention and its derivatives into differentiable functions.

A kernel computes the backward of attention, and another one the backward of that, the double backward. Derivatives of
third and higher order differentiate the reference's double backward, whose memory grows with L x S.

Eager code calls the kernels through autograd alone. For torch.compile and torch.export each backend also has
three opaque operations, ``sagan_layers::attention_<name>``, ``..._backward`` and ``..._double_backward``: in eager
code their dispatch would cost more than a small attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sagan_layers.attention import reference
from sagan_layers.torch_support import is_batch, transforms_active

# Autograd functions and registered operations take flat arguments: the fields of the records below, in their order.
_INPUTS = "Tensor query, Tensor key, Tensor value"
_BACKWARD_INPUTS = f"{_INPUTS}, Tensor? y, Tensor saved, Tensor grad_y, float scale"
_GRAD_GRADS = "Tensor grad_grad_query, Tensor grad_grad_key, Tensor grad_grad_value"


class BackwardInputs(NamedTuple):
    """The inputs of attention's derivatives.

    Attributes:
        query: [N, L, E], with N and L not 0.
        key: [N, S, E].
        value: [N, S, Ev].
        y: the output, [N, L, Ev]; None for kernels that do not read it.
        saved: the second result of the kernels' forward.
        grad_y: the gradient of y, any strides.
        scale: factor on the logits.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    y: Tensor | None
    saved: Tensor
    grad_y: Tensor
    scale: float


class GradGrads(NamedTuple):
    """The gradients of backward's three results: query [N, L, E], key [N, S, E] and value [N, S, Ev]."""

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class AttentionKernels:
    """How a backend computes attention and its derivatives; autograd sees none of it.

    Attributes:
        forward: takes (query, key, value, scale, save_weights), N and L not 0; returns y, contiguous, and a tensor
            to save for backward. ``save_weights`` allows a saved tensor of size L x S.
        backward: returns the gradients of query, key and value.
        double_backward: returns the gradients of query, key, value and grad_y through ``backward``.
        saved_form: takes the arguments of ``forward``; returns shape and dtype of the saved tensor.
        channels_first: whether the gradients lie in memory as [N, width, length].
        reads_output: whether the derivatives read y, so that it is saved and must not be changed in place.
    """

    forward: Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]
    backward: Callable[[BackwardInputs], tuple[Tensor, Tensor, Tensor]]
    double_backward: Callable[[BackwardInputs, GradGrads], tuple[Tensor, Tensor, Tensor, Tensor]]
    saved_form: Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Sequence[int], torch.dtype]]
    channels_first: bool
    reads_output: bool

    def empty_forward(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, save_weights: bool
    ) -> tuple[Tensor, Tensor]:
        """Return tensors like those of ``forward``, not computed."""
        shape, dtype = self.saved_form(query, key, value, scale, save_weights)
        y = value.new_empty(query.size(0), query.size(1), value.size(2))
        return y, query.new_empty(shape, dtype=dtype)

    def empty_gradient(self, like: Tensor) -> Tensor:
        """Return a tensor like the gradient of ``like``, not computed."""
        N, length, width = like.shape
        if self.channels_first:
            return like.new_empty(N, width, length).mT
        return like.new_empty(N, length, width)


def register_attention(
    name: str, kernels: AttentionKernels
) -> Callable[[Tensor, Tensor, Tensor, float, bool], Tensor]:
    """Register the operations of a backend; return attention with derivatives of every order."""
    eager = _as_functions(kernels)
    compiled = _as_operations(name, kernels)

    def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, save_weights: bool) -> Tensor:
        call = compiled if torch.compiler.is_compiling() else eager
        y: Tensor = call(query, key, value, scale, save_weights)[0]
        return y

    return attention


def _is_empty(query: Tensor) -> bool:
    return query.size(0) * query.size(1) == 0


def _run_forward(
    kernels: AttentionKernels, query: Tensor, key: Tensor, value: Tensor, scale: float, save_weights: bool
) -> tuple[Tensor, Tensor]:
    if _is_empty(query):
        return kernels.empty_forward(query, key, value, scale, save_weights)
    return kernels.forward(query, key, value, scale, save_weights)


def _run_backward(kernels: AttentionKernels, *flat: Any) -> tuple[Tensor, ...]:
    inputs = BackwardInputs(*flat)
    if _is_empty(inputs.query):
        return tuple(kernels.empty_gradient(tensor).zero_() for tensor in inputs[:3])
    return kernels.backward(inputs)


def _run_double_backward(kernels: AttentionKernels, *flat: Any) -> tuple[Tensor, ...]:
    inputs, grad_grads = BackwardInputs(*flat[:-3]), GradGrads(*flat[-3:])
    if _is_empty(inputs.query):
        results = inputs.query, inputs.key, inputs.value, inputs.grad_y
        return tuple(kernels.empty_gradient(tensor).zero_() for tensor in results)
    return kernels.double_backward(inputs, grad_grads)


def _save_forward(
    kernels: AttentionKernels, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    query, key, value, ctx.scale, _ = inputs
    y, saved = output
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)  # no zeros for the gradient of ``saved``
    ctx.save_for_backward(query, key, value, y if kernels.reads_output else None, saved)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_forward(
    backward: Callable[..., Any], ctx: Any, grad_y: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 5
    if is_batch(grad_y) and not transforms_active():
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views, so that derivatives stop at the inputs, which may depend on other tensors.
            query, key, value = (tensor.view_as(tensor).requires_grad_() for tensor in ctx.saved_tensors[:3])
            y = reference.attention(query, key, value, ctx.scale)
        return *torch.autograd.grad(y, (query, key, value), grad_y, create_graph=create_graph), None, None
    return *backward(*ctx.saved_tensors, grad_y, ctx.scale), None, None


def _differentiate_backward(
    double_backward: Callable[..., Any], ctx: Any, grad_grads: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor | None, ...]:
    query, key, value, y, saved, grad_y = ctx.saved_tensors
    if torch.is_grad_enabled():
        results = reference.attention_double_backward(query, key, value, grad_y, *grad_grads, ctx.scale)
    else:
        results = double_backward(query, key, value, y, saved, grad_y, ctx.scale, *grad_grads)
    grad_query, grad_key, grad_value, grad_grad_y = results
    # y and ``saved`` are functions of the inputs, so the inputs' gradients already include theirs.
    return grad_query, grad_key, grad_value, None, None, grad_grad_y, None


def _as_functions(kernels: AttentionKernels) -> Callable[..., Any]:
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return _run_backward(kernels, *args)

        setup_context = staticmethod(_save_backward)

        @staticmethod
        def backward(ctx: Any, *grad_grads: Any) -> tuple[Tensor | None, ...]:
            return _differentiate_backward(DoubleBackward.apply, ctx, grad_grads)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
            return _fold_into_batch(Backward.apply, info, in_dims, args)

    class DoubleBackward(torch.autograd.Function):  # for its vmap rule
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return _run_double_backward(kernels, *args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            pass

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
            return _fold_into_batch(DoubleBackward.apply, info, in_dims, args)

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, Tensor]:
            return _run_forward(kernels, *args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            _save_forward(kernels, ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, grad_y: Tensor | None, _: object) -> tuple[Tensor | None, ...]:
            return _differentiate_forward(Backward.apply, ctx, grad_y)

        @staticmethod
        def jvp(ctx: Any, *tangents: object) -> Any:
            raise NotImplementedError(
                "attention: only 'reference' has forward-mode derivatives; pass backend='reference', or use "
                "functional.force_backend('reference')"
            )

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
            return _fold_into_batch(Forward.apply, info, in_dims, args)

    return Forward.apply


def _as_operations(name: str, kernels: AttentionKernels) -> Callable[..., Any]:
    def operation(suffix: str, schema: str, run: Callable[..., Any]) -> Any:
        return torch.library.custom_op(
            f"sagan_layers::attention_{name}{suffix}",
            lambda *args: run(kernels, *args),
            mutates_args=(),
            schema=schema,
        )

    forward = operation("", f"({_INPUTS}, float scale, bool save_weights) -> (Tensor, Tensor)", _run_forward)
    backward = operation("_backward", f"({_BACKWARD_INPUTS}) -> (Tensor, Tensor, Tensor)", _run_backward)
    double_backward = operation(
        "_double_backward",
        f"({_BACKWARD_INPUTS}, {_GRAD_GRADS}) -> (Tensor, Tensor, Tensor, Tensor)",
        _run_double_backward,
    )

    def empty_gradients(*flat: Any) -> tuple[Tensor, ...]:
        return tuple(kernels.empty_gradient(tensor) for tensor in flat[:3])

    def empty_double_gradients(*flat: Any) -> tuple[Tensor, ...]:
        return *empty_gradients(*flat), kernels.empty_gradient(BackwardInputs(*flat[:-3]).grad_y)

    forward.register_fake(kernels.empty_forward)
    backward.register_fake(empty_gradients)
    double_backward.register_fake(empty_double_gradients)
    forward.register_autograd(
        lambda ctx, grad_y, _: _differentiate_forward(backward, ctx, grad_y),
        setup_context=lambda ctx, inputs, output: _save_forward(kernels, ctx, inputs, output),
    )
    backward.register_autograd(
        lambda ctx, *grad_grads: _differentiate_backward(double_backward, ctx, grad_grads),
        setup_context=_save_backward,
    )
    result: Callable[..., Any] = forward
    return result


def _fold_into_batch(
    function: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The rule of torch.func.vmap: the new axis becomes part of the batch."""
    folded = []
    for arg, dim in zip(args, in_dims, strict=True):
        if isinstance(arg, Tensor):
            arg = arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            arg = arg.flatten(0, 1)
        folded.append(arg)
    results = tuple(result.unflatten(0, (info.batch_size, -1)) for result in function(*folded))
    return results, (0,) * len(results)
