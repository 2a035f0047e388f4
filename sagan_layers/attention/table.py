"""The backends of attention and of the whole self-attention block, in the order in which "auto" tries them.

The block is computed at once on CUDA ("fused", Triton kernels) or composed of projections, pooling and attention.
Attention alone: "triton" and "sdpa" (torch's own kernels) on CUDA, "chunked" and "reference" on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from sagan_layers.attention import chunked, fused, reference, sdpa, triton
from sagan_layers.attention.reference import AttentionInputs, ProjectionWeights, SelfAttentionInputs
from sagan_layers.backends import Backend, Operation
from sagan_layers.torch_support import autocast_dtype

# Takes query, key, value and the factor on the logits.
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]

ATTENTION: Operation[AttentionInputs, Attend] = Operation(
    "attention",
    "attention",
    (
        Backend(
            "triton", triton.attention, triton.unsupported_reasons, triton.not_preferred_reasons, opaque=True
        ),
        Backend("sdpa", sdpa.attention, sdpa.unsupported_reasons, sdpa.not_preferred_reasons, opaque=True),
        Backend(
            "chunked",
            chunked.attention,
            chunked.unsupported_reasons,
            chunked.not_preferred_reasons,
            opaque=True,
        ),
        Backend("reference", reference.attention),
    ),
)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0, backend: str = "auto") -> Tensor:
    """Compute attention on the backend that serves."""
    chosen = ATTENTION.select_and_record(AttentionInputs(query, key, value), backend)
    return chosen.implementation(query, key, value, scale)


def _attention_inputs(inputs: SelfAttentionInputs) -> AttentionInputs | None:
    """Return tensors like those that the attention inside the block will see; None if layers project."""
    x, projections, _, pool_size = inputs
    if not isinstance(projections, ProjectionWeights):
        return None
    N, _, H, W = x.shape
    L, S = H * W, (H // pool_size) * (W // pool_size)
    like = x.new_empty(1, dtype=autocast_dtype(x.device) or x.dtype)
    E, Ev = projections.query.size(0), projections.value.size(0)
    return AttentionInputs(like.expand(N, L, E), like.expand(N, S, E), like.expand(N, S, Ev))


def _composed(inputs: SelfAttentionInputs, backend: str) -> Tensor:
    return reference.self_attention_2d(inputs, partial(attend, backend=backend))


_fused = fused.self_attention_2d(attend)

# Takes the inputs and the backend of the attention inside, where the block is composed.
SelfAttend = Callable[[SelfAttentionInputs, str], Tensor]

SELF_ATTENTION_2D: Operation[SelfAttentionInputs, SelfAttend] = Operation(
    "self_attention_2d",
    "self-attention",
    (
        Backend(
            "fused",
            lambda inputs, _: _fused(inputs),
            fused.unsupported_reasons,
            fused.not_preferred_reasons,
            opaque=True,
        ),
        Backend("composed", _composed, delegates_to=ATTENTION, delegate_inputs=_attention_inputs),
    ),
)


def self_attend(inputs: SelfAttentionInputs, backend: str) -> Tensor:
    """Compute the whole block on the backend that serves."""
    chosen = SELF_ATTENTION_2D.select_and_record(inputs, backend)
    return chosen.implementation(inputs, SELF_ATTENTION_2D.delegated_name(chosen, backend))
