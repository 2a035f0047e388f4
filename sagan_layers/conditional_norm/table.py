"""The backends of conditional batch norm, in the order in which "auto" tries them."""

from __future__ import annotations

from collections.abc import Callable

from sagan_layers.backends import Backend, Operation
from sagan_layers.conditional_norm import blocked, reference, triton
from sagan_layers.conditional_norm.kernels import ConditionalNormInputs
from sagan_layers.conditional_norm.reference import ConditionalNormResult

CONDITIONAL_BATCH_NORM: Operation[ConditionalNormInputs, Callable[..., ConditionalNormResult]] = Operation(
    "conditional_batch_norm",
    "conditional batch norm",
    (
        Backend(
            "triton",
            triton.conditional_batch_norm,
            triton.unsupported_reasons,
            triton.not_preferred_reasons,
            opaque=True,
        ),
        Backend(
            "blocked",
            blocked.conditional_batch_norm,
            blocked.unsupported_reasons,
            blocked.not_preferred_reasons,
            opaque=True,
        ),
        Backend("reference", reference.conditional_batch_norm),
    ),
)
