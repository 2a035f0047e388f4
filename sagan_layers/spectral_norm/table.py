"""The backends of spectral normalisation, in the order in which they are tried.

A new backend is a file with ``unsupported_reasons`` and ``KERNELS``, and a row here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from sagan_layers.backends import Backend, Operation
from sagan_layers.spectral_norm import cpu, grouped, reference
from sagan_layers.spectral_norm.autograd import SpectralNormKernels
from sagan_layers.torch_support import is_traced


class SpectralNormInputs(NamedTuple):
    """The inputs that decide which backend serves.

    Attributes:
        weight: at least two axes.
        dim: the axis of the outputs.
        alone: whether this weight is normalised alone; False for the weights of a whole network together.
    """

    weight: Tensor
    dim: int
    alone: bool


def _eager_only(
    unsupported_reasons: Callable[[Tensor, int], list[str]],
) -> Callable[[SpectralNormInputs], list[str]]:
    """Return the reasons of a backend with kernels, which compilers and transforms cannot trace."""

    def reasons(inputs: SpectralNormInputs) -> list[str]:
        if is_traced(inputs.weight):
            return ["a compiler, a transform or a tensor subclass traces the operations"]
        return unsupported_reasons(inputs.weight, inputs.dim)

    return reasons


SPECTRAL_NORM: Operation[SpectralNormInputs, SpectralNormKernels] = Operation(
    "spectral_norm",
    "spectral norm",
    (
        Backend("cpu", cpu.KERNELS, _eager_only(cpu.unsupported_reasons)),
        Backend(
            "grouped",
            grouped.KERNELS,
            _eager_only(grouped.unsupported_reasons),
            lambda inputs: ["it needs more than one weight"] if inputs.alone else [],
        ),
        Backend("reference", SpectralNormKernels(reference.normalize)),
    ),
)
