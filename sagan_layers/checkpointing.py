"""Activation checkpointing that repeats a block exactly, whatever moves in it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sagan_layers.conditional_norm import frozen_running_statistics
from sagan_layers.spectral_norm import frozen_spectral_norm

__all__ = ["checkpointed"]


def checkpointed(module: nn.Module, *inputs: Any) -> Any:
    """Return ``module(*inputs)``, keeping its inputs alone for backward, which computes the rest again.

    ``torch.utils.checkpoint`` runs the block a second time during backward. Left to itself that would move the
    vectors of spectral normalisation and the running statistics of batch norm once more, and spectrally
    normalised weights would not be those of the first pass, so that gradients would be wrong without a message.
    Here nothing moves in the second pass and the weights are the first one's.

    Args:
        module: a block, called once for each ``backward``: run ``backward`` before it is called in training again
            (or share its weights between calls by :func:`~sagan_layers.shared_spectral_norm`).
        inputs: what to call it with.

    Raises:
        RuntimeError: inside torch.compile, whose own partitioner decides what is kept.

    Note:
        Derivatives of the first order, and of the second through torch's checkpoint without reentry.

    Example:
        >>> from sagan_layers import SNConv2d
        >>> block = nn.Sequential(SNConv2d(3, 8, 3), nn.ReLU(), SNConv2d(8, 8, 3))
        >>> checkpointed(block, torch.randn(2, 3, 12, 12)).square().sum().backward()
        >>> block[0].weight.grad is None
        False
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("checkpointed: expected eager code, got torch.compile")

    return checkpoint(
        module,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _Repeating(module)),
    )


class _Repeating:
    """The context of a repeated pass. Second derivatives enter it more than once."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._entered: list[contextlib.ExitStack] = []

    def __enter__(self) -> None:
        stack = contextlib.ExitStack()
        stack.enter_context(frozen_spectral_norm(self._module, iterate=False))
        stack.enter_context(frozen_running_statistics(self._module))
        self._entered.append(stack)

    def __exit__(self, *_: object) -> None:
        self._entered.pop().close()
