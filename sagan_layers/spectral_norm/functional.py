"""The stateless form of spectral normalisation, and the functions that layers call."""

from __future__ import annotations

import torch
from torch import Tensor

from sagan_layers.checks import (
    EPS_MODES,
    MOST_ITERATIONS,
    VECTORS,
    check_choice,
    check_floating,
    check_not_empty,
    check_same_device,
    eps_of,
    integer_of,
    shape_of,
)
from sagan_layers.spectral_norm import reference
from sagan_layers.spectral_norm.autograd import with_gradient
from sagan_layers.spectral_norm.reference import SpectralNormOptions, SpectralNormResult, SpectralNormTask
from sagan_layers.spectral_norm.table import SPECTRAL_NORM, SpectralNormInputs
from sagan_layers.torch_support import is_traced, without_autocast


def spectral_normalize(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    dim: int = 0,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    eps_mode: str = "add",
    iterate_from: str = "u",
) -> SpectralNormResult:
    r"""Return ``weight / sigma``, sigma the spectral norm of the weight seen as a matrix.

    Each power iteration sets :math:`v = W^T u / \|W^T u\|`, then :math:`u = W v / \|W v\|`; then
    :math:`\sigma = u^T W v`. Nothing is changed in place: the new u and v are in the result.

    Args:
        weight: at least two axes; as a matrix [out, rest] with ``dim`` moved to the front.
        u: [out], an estimate of the left singular vector.
        v: [rest], of the right one.
        dim: the axis of the outputs, 0 or 1.
        n_power_iterations: how often u and v are updated before sigma is taken.
        eps: from 1e-37 to 1, keeps the norms of u and v from 0.
        eps_mode: "add" divides u and v by norm + eps, as the released code does, and returns a weight whose sigma is
            not above eps unnormalised; "clamp" divides by max(norm, eps), as torch and BigGAN-PyTorch do, and by
            every sigma but 0. Zeros stay zeros either way, and their gradient stays finite.
        iterate_from: "u" for the iteration above, which does not read v; "v" sets u first and then v, as
            ``torch.nn.utils.parametrizations.spectral_norm`` does.

    Returns:
        ``(weight, sigma, u, v)``: the normalised weight in the weight's dtype; sigma, a scalar; u and v.

    Raises:
        ValueError: if shapes or devices disagree, or a number is out of range.
        TypeError: if a tensor is not floating point.

    Note:
        Computed in float32 (float64 for float64 weights), also under autocast. u and v are constants for
        autograd; the released TensorFlow code differentiates through the iteration. Both agree once u has
        converged.

    Reference:
        Miyato et al., Spectral Normalization for Generative Adversarial Networks, algorithm 1.

    Example:
        >>> weight = torch.randn(8, 3, 3, 3)
        >>> result = spectral_normalize(weight, torch.randn(8), torch.randn(27), n_power_iterations=200)
        >>> matrix = result.weight.flatten(1)
        >>> round(torch.linalg.matrix_norm(matrix, 2).item(), 4)
        1.0
    """
    spectral_norm_inputs(weight, dim=dim)
    rest = weight.numel() // weight.size(dim)
    for name, vector, length in (("u", u, weight.size(dim)), ("v", v, rest)):
        check_floating(name, vector)
        if vector.shape != (length,):
            raise ValueError(f"{name}: expected shape [{length}], got {shape_of(vector)}")
        check_same_device(name, vector, "the weight", weight)
    iterations = integer_of("n_power_iterations", n_power_iterations, least=0, most=MOST_ITERATIONS)
    check_choice("eps_mode", eps_mode, EPS_MODES)
    check_choice("iterate_from", iterate_from, VECTORS)
    options = SpectralNormOptions(
        dim, iterations, eps_of(eps), weight.dtype, eps_mode=eps_mode, iterate_from=iterate_from
    )
    return reference.spectral_normalize(weight, u, v, options)


def spectral_norm_inputs(weight: Tensor, *, dim: int = 0) -> SpectralNormInputs:
    """Return the inputs that decide which backend normalises a layer's weight, after all checks."""
    check_not_empty("weight", weight)
    dim = integer_of("dim", dim, least=0, most=1)
    if weight.dim() < 2:
        raise ValueError(f"weight: expected at least 2 axes, got {shape_of(weight)}")
    return SpectralNormInputs(weight, dim, alone=True)


def normalize_weight(task: SpectralNormTask) -> SpectralNormResult:
    """Normalise one weight. The result is differentiable; sigma is detached."""
    inputs = SpectralNormInputs(task.weight, task.options.dim, alone=True)
    kernels = SPECTRAL_NORM.select_and_record(inputs, "auto").implementation
    if kernels.gradient is None:
        return kernels.normalize([task])[0]
    with torch.no_grad(), without_autocast(task.weight.device):
        (result,) = kernels.normalize([task])
    return result._replace(weight=with_gradient(task, result, kernels.gradient))


@torch.no_grad()
def normalize_weights(tasks: list[SpectralNormTask]) -> list[SpectralNormResult]:
    """Normalise all weights, in as few calls as their backends allow; the results have no graph."""
    groups: dict[str, list[int]] = {}
    for index, task in enumerate(tasks):
        inputs = SpectralNormInputs(task.weight, task.options.dim, alone=False)
        groups.setdefault(SPECTRAL_NORM.select_and_record(inputs, "auto").name, []).append(index)
    results: dict[int, SpectralNormResult] = {}
    for backend in SPECTRAL_NORM.backends:
        if indices := groups.get(backend.name):
            with without_autocast(tasks[indices[0]].weight.device):
                found = backend.implementation.normalize([tasks[index] for index in indices])
            results.update(zip(indices, found, strict=True))
    return [results[index] for index in range(len(tasks))]


def weight_of_result(task: SpectralNormTask, result: SpectralNormResult) -> Tensor:
    """Return the normalised weight of an earlier result as a function of the task's weight for autograd."""
    if is_traced(task.weight) and not torch.compiler.is_compiling():
        # Torch.func and forward mode need plain operations: the same weight again, from the result's u and v.
        options = task.options._replace(n_power_iterations=0)
        return reference.normalize([SpectralNormTask(task.weight, result.u, result.v, options)])[0].weight
    chosen = SPECTRAL_NORM.select(SpectralNormInputs(task.weight, task.options.dim, alone=False))
    return with_gradient(task, result, chosen.implementation.gradient or reference.gradient)
