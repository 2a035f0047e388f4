"""Activation checkpointing whose second pass repeats the first exactly and updates nothing."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sagan_layers.checks import check_module
from sagan_layers.conditional_norm import frozen_running_statistics
from sagan_layers.spectral_norm import (
    SpectralNormLayer,
    SpectralNormRecord,
    recording_spectral_norm,
    replaying_spectral_norm,
)

__all__ = ["checkpointed"]


def checkpointed(module: nn.Module, *inputs: Any) -> Any:
    """Return ``module(*inputs)`` and save only the inputs for backward, which computes the rest again.

    ``torch.utils.checkpoint`` runs the block a second time during backward. On its own it would update the vectors of
    spectral normalisation and the running statistics of batch norm once more, and use other normalised weights than
    the first pass: the gradients would be wrong without a message. Here the second pass uses the parameters, normalised
    weights and vectors of the first, and updates nothing. Results and gradients are those without checkpointing. So
    the block may be called several times before ``backward``, frozen (:func:`~sagan_layers.frozen_spectral_norm`), with
    shared weights (:func:`~sagan_layers.shared_spectral_norm`), whose block may have ended by then, or with other
    parameters (:func:`~sagan_layers.call_with_constant_parameters`, ``torch.func.functional_call``).

    Args:
        module: a block, in the same mode (``train`` or ``eval``) in ``backward`` as now.
        inputs: its arguments.

    Raises:
        RuntimeError: inside torch.compile, whose partitioner decides what to save; in ``backward``, if a
            parameter has changed since, or a buffer of a part in evaluation (steps of ``fused=True`` optimizers
            go unnoticed).
        TypeError: for a :class:`~sagan_layers.DiscriminatorPass` or :class:`~sagan_layers.GeneratorPass`, whose
            other network is not a submodule: checkpoint blocks of the networks instead.

    Note:
        First derivatives, and second ones as far as torch's non-reentrant checkpoint supports them. Layers of other
        packages that update buffers in their forward, such as ``nn.BatchNorm2d``, update them twice. A compiled block
        (``block.compile()``) works, with a graph break at every normalised weight.

    Example:
        >>> from sagan_layers import SNConv2d
        >>> block = nn.Sequential(SNConv2d(3, 8, 3), nn.ReLU(), SNConv2d(8, 8, 3))
        >>> checkpointed(block, torch.randn(2, 3, 12, 12)).square().sum().backward()
        >>> block[0].weight.grad is None
        False
    """
    check_module("module", module)
    if torch.compiler.is_compiling():
        raise RuntimeError("checkpointed: expected eager code, got torch.compile")
    if any(getattr(part, "calls_another_network", False) for part in module.modules()):
        raise TypeError("checkpointed: expected a block of a network, got a pass of a whole training step")
    tensors = _tensors_of(module)
    record = SpectralNormRecord()

    def run(*inputs: Any) -> Any:
        if all(tensor is tensors[name] for name, tensor in _tensors_of(module).items()):
            return module(*inputs)
        return torch.func.functional_call(module, tensors, inputs, tie_weights=False)

    return checkpoint(
        run,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (recording_spectral_norm(module, record), _SecondPass(module, record)),
    )


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}


def _read_only_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return what must not change before backward: parameters, and buffers that the forward only reads."""
    tensors: dict[str, Tensor] = dict(module.named_parameters())
    for prefix, part in module.named_modules():
        if not part.training and not isinstance(part, SpectralNormLayer):  # its vectors are recorded
            buffers = part.named_buffers(recurse=False)
            tensors |= {f"{prefix}.{name}".lstrip("."): buffer for name, buffer in buffers}
    return tensors


class _SecondPass:
    """The context of the second pass: a class, because second derivatives enter it more than once."""

    def __init__(self, module: nn.Module, record: SpectralNormRecord) -> None:
        self._module = module
        self._record = record
        self._entered: list[contextlib.ExitStack] = []
        self._versions = {
            name: (tensor, tensor._version)
            for name, tensor in _read_only_tensors(module).items()
            if not tensor.is_inference()
        }

    def __enter__(self) -> None:
        changed = [name for name, (tensor, version) in self._versions.items() if tensor._version != version]
        if changed:
            raise RuntimeError(
                f"checkpointed: {', '.join(changed[:5])} changed since the forward, which backward repeats; run "
                "backward before the change"
            )
        stack = contextlib.ExitStack()
        stack.enter_context(replaying_spectral_norm(self._record))
        stack.enter_context(frozen_running_statistics(self._module))
        self._entered.append(stack)

    def __exit__(self, *_: object) -> None:
        self._entered.pop().close()
