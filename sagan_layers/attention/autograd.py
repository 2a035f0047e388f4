"""Makes kernels for attention and its derivatives into differentiable functions.

Attention is differentiated by the kernel of its backward, and that by the kernel of the double backward. The
double backward, for derivatives of third and higher order, is written out with the reference, whose memory grows
with L x S.

Eager code calls the kernels through autograd alone. For torch.compile and torch.export each backend also has
three opaque operations, ``sagan_layers::attention_<name>``, ``..._backward`` and ``..._double_backward``: in eager
code their dispatch would cost more than a small attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sagan_layers.attention import reference

_NAMESPACE = "sagan_layers"
_INPUTS = "Tensor query, Tensor key, Tensor value"


@dataclass(frozen=True)
class AttentionKernels:
    """How a backend computes attention and its derivatives, none of it seen by autograd.

    Shapes: query [N, L, E], key [N, S, E], value [N, S, Ev], output y [N, L, Ev]; N and L are not 0.

    Attributes:
        forward: takes (query, key, value, scale, save_weights); returns y, contiguous, and what it keeps for
            backward. ``save_weights`` allows it to keep something of size L x S.
        backward: takes (query, key, value, y, saved, grad_y, scale); returns the gradients of the first three.
            y is None unless ``reads_output``.
        double_backward: takes (query, key, value, y, saved, grad_y, their three cotangents, scale); returns the
            gradients of query, key, value and grad_y.
        saved: takes the arguments of ``forward``; returns shape and dtype of what it keeps.
        channels_first: whether the gradients lie in memory as [N, width, length].
        reads_output: whether the derivatives read y, so that it is saved and must not be changed in place.
    """

    forward: Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    double_backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    saved: Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Sequence[int], torch.dtype]]
    channels_first: bool
    reads_output: bool

    def empty_forward(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, save_weights: bool
    ) -> tuple[Tensor, Tensor]:
        """Return tensors like those of ``forward``, not computed."""
        shape, dtype = self.saved(query, key, value, scale, save_weights)
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
        y, _ = call(query, key, value, scale, save_weights)
        result: Tensor = y
        return result

    return attention


# --- what runs, with empty inputs left to nobody ------------------------------------------------------------


def _run_forward(
    kernels: AttentionKernels, query: Tensor, key: Tensor, value: Tensor, scale: float, save_weights: bool
) -> tuple[Tensor, Tensor]:
    if query.size(0) * query.size(1) == 0:
        return kernels.empty_forward(query, key, value, scale, save_weights)
    return kernels.forward(query, key, value, scale, save_weights)


def _run_backward(
    kernels: AttentionKernels, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    if query.size(0) * query.size(1) == 0:
        return tuple(kernels.empty_gradient(tensor).zero_() for tensor in (query, key, value))
    return kernels.backward(query, key, value, *rest)


def _run_double_backward(
    kernels: AttentionKernels,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    y: Tensor | None,
    saved: Tensor,
    grad_y: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    if query.size(0) * query.size(1) == 0:
        return tuple(kernels.empty_gradient(tensor).zero_() for tensor in (query, key, value, grad_y))
    return kernels.double_backward(query, key, value, y, saved, grad_y, *rest)


# --- how one is the derivative of the other -----------------------------------------------------------------


def _save_forward(
    kernels: AttentionKernels, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    query, key, value, ctx.scale, _ = inputs
    y, saved = output
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)  # zeros for what was saved, which nobody reads
    ctx.save_for_backward(query, key, value, y if kernels.reads_output else None, saved)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_forward(
    backward: Callable[..., Any], ctx: Any, grad_y: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 5
    return *backward(*ctx.saved_tensors, grad_y, ctx.scale), None, None


def _differentiate_backward(
    double_backward: Callable[..., Any], ctx: Any, cotangents: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor | None, ...]:
    query, key, value, _, _, grad_y = ctx.saved_tensors
    if torch.is_grad_enabled():
        results = reference.attention_double_backward((query, key, value, grad_y), cotangents, ctx.scale)
    else:
        results = double_backward(*ctx.saved_tensors, *cotangents, ctx.scale)
    *of_inputs, of_grad_y = results
    # y and what was saved are functions of the inputs, in whose gradients they are counted.
    return *of_inputs, None, None, of_grad_y, None


def _as_functions(kernels: AttentionKernels) -> Callable[..., Any]:
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return _run_backward(kernels, *args)

        setup_context = staticmethod(_save_backward)

        @staticmethod
        def backward(
            ctx: Any, of_query: Tensor, of_key: Tensor, of_value: Tensor
        ) -> tuple[Tensor | None, ...]:
            return _differentiate_backward(double_backward, ctx, (of_query, of_key, of_value))

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

    double_backward = DoubleBackward.apply

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
                "of attention's backends only 'reference' has forward-mode derivatives: name it, or use "
                "functional.force_backend('reference')"
            )

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
            return _fold_into_batch(Forward.apply, info, in_dims, args)

    return Forward.apply


def _as_operations(name: str, kernels: AttentionKernels) -> Callable[..., Any]:
    def operation(suffix: str, signature: str, run: Callable[..., Any]) -> Any:
        return torch.library.custom_op(
            f"{_NAMESPACE}::attention_{name}{suffix}",
            lambda *args: run(kernels, *args),
            mutates_args=(),
            schema=signature,
        )

    forward = operation("", f"({_INPUTS}, float scale, bool save_weights) -> (Tensor, Tensor)", _run_forward)
    backward = operation(
        "_backward",
        f"({_INPUTS}, Tensor? y, Tensor saved, Tensor grad_y, float scale) -> (Tensor, Tensor, Tensor)",
        _run_backward,
    )
    double_backward = operation(
        "_double_backward",
        f"({_INPUTS}, Tensor? y, Tensor saved, Tensor grad_y, Tensor grad_grad_query, Tensor grad_grad_key, "
        "Tensor grad_grad_value, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
        _run_double_backward,
    )
    empty = kernels.empty_gradient
    forward.register_fake(kernels.empty_forward)
    backward.register_fake(lambda query, key, value, *_: (empty(query), empty(key), empty(value)))
    double_backward.register_fake(
        lambda query, key, value, y, saved, grad_y, *_: (
            empty(query),
            empty(key),
            empty(value),
            empty(grad_y),
        )
    )
    forward.register_autograd(
        lambda ctx, grad_y, _: _differentiate_forward(backward, ctx, grad_y),
        setup_context=lambda ctx, inputs, output: _save_forward(kernels, ctx, inputs, output),
    )
    backward.register_autograd(
        lambda ctx, *cotangents: _differentiate_backward(double_backward, ctx, cotangents),
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
