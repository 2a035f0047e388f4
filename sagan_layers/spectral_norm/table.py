"""The backends of spectral normalisation, in the order in which weights ask them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sagan_layers.backends import Backend, Operation
from sagan_layers.spectral_norm import cpu, grouped, reference
from sagan_layers.spectral_norm.autograd import NormalizedWeight
from sagan_layers.spectral_norm.reference import SpectralNormResult, SpectralNormTask
from sagan_layers.torch_support import is_traced, without_autocast


class SpectralNormInputs(NamedTuple):
    """What the backends choose by.

    Attributes:
        weight: at least two axes.
        dim: the axis of the outputs.
        alone: whether one weight is normalised by itself, not those of a whole network.
    """

    weight: Tensor
    dim: int
    alone: bool


@dataclass(frozen=True)
class SpectralNormKernels:
    """How a backend normalises weights.

    Attributes:
        normalize: takes a list of tasks; returns their results, without a graph.
        gradient: takes (grad, weight, result, dim, eps, memory); returns the weight's gradient. None for the
            reference's.
    """

    normalize: Callable[[list[SpectralNormTask]], list[SpectralNormResult]]
    gradient: Callable[[Tensor, Tensor, SpectralNormResult, int, float, Any], Tensor] | None = None


def _cpu_gradient(
    grad: Tensor, weight: Tensor, result: SpectralNormResult, dim: int, eps: float, memory: Any
) -> Tensor:
    reused = cpu.ReusedMemory() if memory is None else memory.gradient
    with without_autocast(weight.device):
        return cpu.gradient(grad, weight, result, dim, eps, reused)


def _grouped_gradient(
    grad: Tensor, weight: Tensor, result: SpectralNormResult, dim: int, eps: float, memory: Any
) -> Tensor:
    with without_autocast(weight.device):
        return grouped.gradient(grad, weight, result, dim, eps, memory)


def _normalize_by_reference(task: SpectralNormTask) -> SpectralNormResult:
    # Written out, since torch.compile of torch 2.6 knows neither slices of named tuples nor _replace.
    weight, sigma, u, v = reference.spectral_normalize(
        task.weight, task.u, task.v, task.n_power_iterations, task.eps, task.dim
    )
    return SpectralNormResult(weight.to(task.dtype), sigma, u, v)


def _traced_reasons(inputs: SpectralNormInputs) -> list[str]:
    return (
        ["a compiler, a transform or a subclass follows the operations"] if is_traced(inputs.weight) else []
    )


SPECTRAL_NORMALIZE: Operation[SpectralNormInputs, SpectralNormKernels] = Operation(
    "spectral_normalize",
    "spectral norm",
    (
        Backend(
            "cpu",
            SpectralNormKernels(lambda tasks: [cpu.normalize(task) for task in tasks], _cpu_gradient),
            lambda inputs: _traced_reasons(inputs) or cpu.unsupported_reasons(inputs.weight, inputs.dim),
        ),
        Backend(
            "grouped",
            SpectralNormKernels(grouped.normalize, _grouped_gradient),
            lambda inputs: _traced_reasons(inputs) or grouped.unsupported_reasons(inputs.weight, inputs.dim),
            lambda inputs: ["one weight makes no group"] if inputs.alone else [],
        ),
        Backend(
            "reference",
            SpectralNormKernels(lambda tasks: [_normalize_by_reference(task) for task in tasks]),
        ),
    ),
)


def normalize_layer_weights(tasks: list[SpectralNormTask]) -> list[SpectralNormResult]:
    """Normalise all weights, in as few calls as their backends allow; the results have no graph."""
    groups: dict[str, list[int]] = {}
    for index, task in enumerate(tasks):
        chosen = SPECTRAL_NORMALIZE.select_and_record(
            SpectralNormInputs(task.weight, task.dim, False), "auto"
        )
        groups.setdefault(chosen.name, []).append(index)
    results: dict[int, SpectralNormResult] = {}
    with torch.no_grad():
        for backend in SPECTRAL_NORMALIZE.backends:
            indices = groups.get(backend.name, [])
            if indices:
                with without_autocast(tasks[indices[0]].weight.device):
                    found = backend.implementation.normalize([tasks[index] for index in indices])
                results.update(zip(indices, found, strict=True))
    return [results[index] for index in range(len(tasks))]


def normalize_layer_weight(task: SpectralNormTask) -> SpectralNormResult:
    """Normalise one weight; the normalised one has its graph, sigma has none."""
    chosen = SPECTRAL_NORMALIZE.select_and_record(SpectralNormInputs(task.weight, task.dim, True), "auto")
    kernels = chosen.implementation
    if kernels.gradient is None:
        return _normalize_by_reference(task)
    with torch.no_grad(), without_autocast(task.weight.device):
        (result,) = kernels.normalize([task])
    return result._replace(weight=_with_gradient(task, result, kernels))


def with_spectral_gradient(task: SpectralNormTask, result: SpectralNormResult) -> Tensor:
    """Return the normalised weight of a result as a function of the task's weight for autograd."""
    if is_traced(task.weight) and not torch.compiler.is_compiling():
        # Torch.func and forward mode need plain operations; the same weight again, from u and v as they are.
        return _normalize_by_reference(task._replace(u=result.u, v=result.v, n_power_iterations=0)).weight
    chosen = SPECTRAL_NORMALIZE.select(SpectralNormInputs(task.weight, task.dim, False))
    return _with_gradient(task, result, chosen.implementation)


def _with_gradient(
    task: SpectralNormTask, result: SpectralNormResult, kernels: SpectralNormKernels
) -> Tensor:
    if not (torch.is_grad_enabled() and task.weight.requires_grad):
        return result.weight
    weight: Tensor = NormalizedWeight.apply(  # type: ignore[no-untyped-call]
        task.weight, *result, task.dim, task.eps, kernels.gradient, task.memory
    )
    return weight
