"""The stateless forms of the layers.

Every function takes and returns plain tensors and raises ``ValueError`` or ``TypeError`` that says what was expected
and what was passed. Each function is defined in its operation's folder, next to its backends. Shape letters: N batch,
C channels, H height, W width, L queries, S keys, E and Ev widths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sagan_layers.attention.functional import (
    attention,
    attention_inputs,
    attention_weights,
    self_attention_2d,
    self_attention_inputs,
)
from sagan_layers.attention.table import ATTENTION, SELF_ATTENTION_2D
from sagan_layers.backends import Operation, find_operation, force_backend, record_backends
from sagan_layers.checks import set_debug_checks
from sagan_layers.conditional_norm.functional import conditional_batch_norm, conditional_norm_inputs
from sagan_layers.conditional_norm.table import CONDITIONAL_BATCH_NORM
from sagan_layers.resampling.functional import (
    conv2d_downsample,
    downsample_inputs,
    upsample_conv2d,
    upsample_inputs,
)
from sagan_layers.resampling.table import CONV2D_DOWNSAMPLE, UPSAMPLE_CONV2D
from sagan_layers.spectral_norm.functional import spectral_norm_inputs, spectral_normalize
from sagan_layers.spectral_norm.reference import SpectralNormResult
from sagan_layers.spectral_norm.table import SPECTRAL_NORM

__all__ = [
    "SpectralNormResult",
    "attention",
    "attention_weights",
    "conditional_batch_norm",
    "conv2d_downsample",
    "explain_backends",
    "force_backend",
    "record_backends",
    "select_backend",
    "self_attention_2d",
    "set_debug_checks",
    "spectral_normalize",
    "upsample_conv2d",
]

# For each operation, what turns its arguments into the inputs that select a backend.
_READ_ARGUMENTS: dict[str, Callable[..., Any]] = {
    ATTENTION.name: attention_inputs,
    SELF_ATTENTION_2D.name: self_attention_inputs,
    CONDITIONAL_BATCH_NORM.name: conditional_norm_inputs,
    SPECTRAL_NORM.name: spectral_norm_inputs,
    UPSAMPLE_CONV2D.name: upsample_inputs,
    CONV2D_DOWNSAMPLE.name: downsample_inputs,
}


def select_backend(*inputs: Any, operation: str = "attention", backend: str = "auto", **options: Any) -> str:
    """Return the name of the backend that an operation would use for these inputs.

    Args:
        inputs: the tensors that the operation takes: query, key and value of :func:`attention`; x and the weights of
            :func:`self_attention_2d`; x of :func:`conditional_batch_norm`; x and weight of :func:`upsample_conv2d`
            and :func:`conv2d_downsample`; the weight of a layer for "spectral_norm".
        operation: the function's name, or "spectral_norm" for the weights of spectrally normalised layers.
        backend: "auto", or the name of a backend.
        options: keyword arguments of the function that affect the choice, such as ``padding`` or ``pool_size``.

    Raises:
        ValueError: for arguments that the function refuses, or an unknown operation.
        TypeError: for arguments that the function refuses.

    Example:
        >>> import torch
        >>> select_backend(torch.randn(2, 9, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 16))
        'reference'
        >>> select_backend(torch.randn(8, 64, 32, 32), operation="conditional_batch_norm")
        'blocked'
        >>> x, weight = torch.randn(4, 64, 32, 32), torch.randn(64, 64, 3, 3)
        >>> select_backend(x, weight, operation="upsample_conv2d", padding=1)
        'filtered'
    """
    table, read = _find(operation)
    return table.select(read(*inputs, **options), backend).name


def explain_backends(*inputs: Any, operation: str = "attention", **options: Any) -> dict[str, str]:
    """Return for every backend of an operation whether it would serve these inputs, and why not.

    Args:
        inputs: as for :func:`select_backend`.
        operation: as for :func:`select_backend`.
        options: as for :func:`select_backend`.

    Returns:
        A sentence for each name, in the order in which "auto" tries them.

    Raises:
        ValueError: as :func:`select_backend`.
        TypeError: as :func:`select_backend`.

    Example:
        >>> import torch
        >>> query, key, value = torch.randn(2, 9, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 16)
        >>> explain_backends(query, key, value)["sdpa"]
        "serves when named: on a CPU 'chunked' is faster"
        >>> x, weight = torch.randn(4, 64, 32, 32), torch.randn(64, 64, 3, 3)
        >>> explain_backends(x, weight, operation="conv2d_downsample", padding=1)["reordered"]
        'cannot serve: the kernel is 3x3, and only 1x1 commutes with resampling'
    """
    table, read = _find(operation)
    return table.explain(read(*inputs, **options))


def _find(operation: str) -> tuple[Operation[Any, Any], Callable[..., Any]]:
    return find_operation(operation), _READ_ARGUMENTS[operation]
