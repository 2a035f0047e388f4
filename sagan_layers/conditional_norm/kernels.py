"""The interface of a backend's kernels for conditional batch norm; autograd.py makes them differentiable.

Shapes: N batch, C channels; x, y and their gradients [N, C, *], not empty; gain and bias [N, C] or [C]; mean and
variance [C], float64. Outputs are written into tensors named ``out``, which are contiguous or channels_last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ConditionalNormInputs(NamedTuple):
    """The inputs that decide which backend serves.

    Attributes:
        x: [N, C, *].
        running: mean and variance to normalise with, each [C]; None for those of the batch.
        process_group: the processes over which statistics are taken; None for this process alone.
    """

    x: Tensor
    running: tuple[Tensor, Tensor] | None = None
    process_group: ProcessGroup | None = None


class ForwardArguments(NamedTuple):
    """The arguments of forward.

    Attributes:
        x, gain, bias: as above.
        mean, var: to normalise with; None for those of the batch.
        eps: added to the variance.
        relu: whether y goes through ReLU.
    """

    x: Tensor
    gain: Tensor
    bias: Tensor
    mean: Tensor | None
    var: Tensor | None
    eps: float
    relu: bool


class BackwardArguments(NamedTuple):
    """The arguments of backward.

    Attributes:
        grad_y, x, gain: as above.
        y: the output if it went through ReLU, else None.
        mean, var: what x was normalised with.
        eps: added to the variance.
        batch_statistics: whether mean and variance are those of x; else they are constants.
        needs_x, needs_gain, needs_bias: which gradients to compute.
    """

    grad_y: Tensor
    x: Tensor
    y: Tensor | None
    mean: Tensor
    var: Tensor
    gain: Tensor
    eps: float
    batch_statistics: bool
    needs_x: bool
    needs_gain: bool
    needs_bias: bool

    @property
    def needs_averages(self) -> bool:
        """Whether the gradient of x has the terms that come through mean and variance."""
        return self.needs_x and self.batch_statistics

    @property
    def needs_sums(self) -> bool:
        """Whether sums over positions are needed: for the gradients of gain and bias, or for the averages."""
        return self.needs_gain or self.needs_bias or self.needs_averages


class CoefficientGradients(NamedTuple):
    """The gradients of gain and bias for each sample, [N, C] in the accumulation dtype; None if not needed."""

    gain: Tensor | None
    bias: Tensor | None


CombineStatistics = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Average = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ConditionalNormKernels:
    """How a backend computes conditional batch norm and its gradients, without autograd.

    Attributes:
        forward: takes (arguments, combine, out), the arguments without mean and variance; writes y, returns the
            mean and biased variance used. ``combine`` takes those of this batch and returns those of all processes;
            it is None for one process.
        normalize: takes (arguments, mean, var, out); writes y.
        backward: takes (arguments, average, out); writes the gradient of x unless ``out`` is None, returns those of
            gain and bias. ``average`` takes sums over this batch, [2, C] in float64, and returns averages over all
            values of a channel; it is called if and only if ``arguments.needs_averages``.
    """

    forward: Callable[[ForwardArguments, CombineStatistics | None, Tensor], tuple[Tensor, Tensor]]
    normalize: Callable[[ForwardArguments, Tensor, Tensor, Tensor], None]
    backward: Callable[[BackwardArguments, Average, Tensor | None], CoefficientGradients]


def opaque_unsupported_reasons(inputs: ConditionalNormInputs) -> list[str]:
    """Return why no backend with kernels can serve: neither autograd nor torch.compile sees inside kernels."""
    reasons = []
    if inputs.running is not None and any(statistic.requires_grad for statistic in inputs.running):
        reasons.append("it has no gradients of running statistics")
    if inputs.process_group is not None and torch.compiler.is_compiling():
        reasons.append("torch.compile does not see its collective operations")
    return reasons
