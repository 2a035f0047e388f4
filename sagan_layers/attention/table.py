"""The backends of attention and of the whole self-attention block, in the order in which "auto" asks them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sagan_layers.attention import chunked, reference, sdpa
from sagan_layers.attention.autograd import AttentionKernels, register_attention
from sagan_layers.attention.fused_autograd import register_self_attention
from sagan_layers.attention.reference import Projection, SelfAttentionWeights
from sagan_layers.backends import Backend, Operation, interpreter_reasons, no_triton_reasons
from sagan_layers.torch_support import accumulation_dtype, is_known

# Below so many weights a sample the reference is as fast on a CPU.
_FEW_WEIGHTS = 2**18
# Weights of the whole batch are saved for backward up to this size, where computing them again costs more: in half
# precision it costs the most, as the logits are computed in float32.
_MAX_SAVED_BYTES = 2**24
_MAX_SAVED_BYTES_OF_HALF = 2**25


class AttentionInputs(NamedTuple):
    """What the backends of attention choose by: query [N, L, E], key [N, S, E], value [N, S, Ev]."""

    query: Tensor
    key: Tensor
    value: Tensor


Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def _triton() -> Any:
    from sagan_layers.attention import triton

    return triton


def _triton_unsupported(inputs: AttentionInputs) -> list[str]:
    return no_triton_reasons(inputs.query.device) or list(_triton().unsupported_reasons(*inputs))


_triton_attention = register_attention(
    "triton",
    AttentionKernels(
        forward=lambda query, key, value, scale, save_weights: _triton().forward(query, key, value, scale),
        backward=lambda *args: _triton().backward(*args),
        double_backward=lambda *args: _triton().double_backward(*args),
        saved=lambda query, key, value, scale, save_weights: (
            (query.size(0), query.size(1)),
            accumulation_dtype(query.dtype),
        ),
        channels_first=False,
        reads_output=True,
    ),
)


def _sdpa_not_preferred(inputs: AttentionInputs) -> list[str]:
    return ["on a CPU 'chunked' is faster"] if inputs.query.device.type == "cpu" else []


def _sdpa_double_backward(
    query: Tensor, key: Tensor, value: Tensor, y: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Torch has no kernel for it.
    grad_query, grad_key, grad_value, grad_grad_y = (
        gradient.contiguous() for gradient in chunked.double_backward(query, key, value, *rest)
    )
    return grad_query, grad_key, grad_value, grad_grad_y


_sdpa_attention = register_attention(
    "sdpa",
    AttentionKernels(
        forward=lambda query, key, value, scale, save_weights: sdpa.forward(query, key, value, scale),
        backward=sdpa.backward,
        double_backward=_sdpa_double_backward,
        saved=lambda query, key, value, scale, save_weights: (
            (query.size(0), 1, sdpa.lse_length(query, value)),
            accumulation_dtype(query.dtype),
        ),
        channels_first=False,
        reads_output=True,
    ),
)


def _chunked_not_preferred(inputs: AttentionInputs) -> list[str]:
    query, key, _ = inputs
    if query.device.type not in ("cpu", "cuda"):
        return [f"it was never tried on {query.device.type}"]
    few = is_known(query.size(1) * key.size(1) < _FEW_WEIGHTS)
    if few and query.dtype in (torch.float32, torch.float64):
        return [f"with fewer than {_FEW_WEIGHTS} weights a sample 'reference' is as fast"]
    return []


_chunked_operation = register_attention(
    "chunked",
    AttentionKernels(
        forward=chunked.forward,
        backward=lambda query, key, value, y, *rest: chunked.backward(query, key, value, *rest),
        double_backward=lambda query, key, value, y, saved, *rest: chunked.double_backward(
            query, key, value, *rest
        ),
        saved=chunked.saved_form,
        channels_first=True,
        reads_output=False,
    ),
)


def _chunked_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    size = query.size(0) * query.size(1) * key.size(1) * query.element_size()
    save = (
        torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in (query, key, value))
        and is_known(size <= (_MAX_SAVED_BYTES_OF_HALF if query.element_size() == 2 else _MAX_SAVED_BYTES))
    )
    return _chunked_operation(query, key, value, scale, save)


ATTENTION: Operation[AttentionInputs, Attend] = Operation(
    "attention",
    "attention",
    (
        Backend(
            "triton",
            lambda query, key, value, scale: _triton_attention(query, key, value, scale, False),
            _triton_unsupported,
            lambda inputs: interpreter_reasons(inputs.query.device),
        ),
        Backend(
            "sdpa",
            lambda query, key, value, scale: _sdpa_attention(query, key, value, scale, False),
            lambda inputs: sdpa.unsupported_reasons(*inputs),
            _sdpa_not_preferred,
        ),
        Backend("chunked", _chunked_attention, not_preferred_reasons=_chunked_not_preferred),
        Backend("reference", reference.attention),
    ),
)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, backend: str) -> Tensor:
    """Compute attention on the backend that serves."""
    chosen = ATTENTION.select_and_record(AttentionInputs(query, key, value), backend)
    return chosen.implementation(query, key, value, scale)


class BlockInputs(NamedTuple):
    """What the backends of the whole block choose by.

    Attributes:
        x: [N, C, H, W].
        projections: the weights of plain 1x1 convolutions, or four functions from feature map to feature map.
        gamma: a scalar.
        pool_size: of the max-pool over keys and values.
    """

    x: Tensor
    projections: SelfAttentionWeights | tuple[Projection, Projection, Projection, Projection]
    gamma: Tensor
    pool_size: int


Block = Callable[[BlockInputs, str], Tensor]

_fused_block = register_self_attention(lambda query, key, value: attend(query, key, value, 1.0, "auto"))


def _fused_unsupported(inputs: BlockInputs) -> list[str]:
    x, weights, _, pool_size = inputs
    if not isinstance(weights, SelfAttentionWeights):
        return ["a projection is not a plain 1x1 convolution, or has hooks"]
    if reasons := no_triton_reasons(x.device):
        return reasons
    from sagan_layers.attention import fused_triton

    if torch.is_autocast_enabled(x.device.type):
        computed = torch.get_autocast_dtype(x.device.type)
        if x.dtype == computed:
            weights = weights.to(computed)
        else:
            reasons.append(f"autocast projects in {computed}, and x is {x.dtype}")
    if pool_size > 2:
        reasons.append(f"pool_size = {pool_size} is above 2")
    if weights.out is None and weights.out_bias is not None:
        reasons.append("a bias without an output projection")
    matrices = weights.query, weights.key, weights.value, weights.out
    return reasons + fused_triton.unsupported_reasons(x, *matrices)


def _fused(inputs: BlockInputs, backend: str) -> Tensor:
    x, weights, _, pool_size = inputs
    assert isinstance(weights, SelfAttentionWeights)
    weights = weights.to(x.dtype)  # no more than what autocast does
    tensors = [tensor for tensor in (x, *weights) if tensor is not None]
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return _fused_block(x, weights, pool_size, save)


def _composed(inputs: BlockInputs, backend: str) -> Tensor:
    def attend_unscaled(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, 1.0, backend)

    x, projections, gamma, pool_size = inputs
    if isinstance(projections, SelfAttentionWeights):
        return reference.self_attention_2d(x, projections, pool_size, attend_unscaled)
    return reference.compose_self_attention(x, *projections, gamma, pool_size, attend_unscaled)


SELF_ATTENTION_2D: Operation[BlockInputs, Block] = Operation(
    "self_attention_2d",
    "self-attention",
    (
        Backend("fused", _fused, _fused_unsupported, lambda inputs: interpreter_reasons(inputs.x.device)),
        Backend("composed", _composed, delegates_to=ATTENTION),
    ),
)


def self_attend(inputs: BlockInputs, backend: str) -> Tensor:
    """Compute the whole block on the backend that serves."""
    chosen = SELF_ATTENTION_2D.select_and_record(inputs, backend)
    name = SELF_ATTENTION_2D.effective_name(backend)
    return chosen.implementation(inputs, "auto" if name == chosen.name else name)
