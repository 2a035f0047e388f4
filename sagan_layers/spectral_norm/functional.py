"""The stateless form of spectral normalisation."""

from __future__ import annotations

from torch import Tensor

from sagan_layers.checks import check_floating, check_positive, check_same_device, shape_of
from sagan_layers.spectral_norm import reference
from sagan_layers.spectral_norm.reference import SpectralNormResult
from sagan_layers.spectral_norm.table import SpectralNormInputs


def spectral_normalize(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    dim: int = 0,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
) -> SpectralNormResult:
    r"""Return ``weight / sigma``, sigma the spectral norm of the weight seen as a matrix.

    Each power iteration sets :math:`v = W^T u / \|W^T u\|`, then :math:`u = W v / \|W v\|`; then
    :math:`\sigma = u^T W v`. Nothing is changed in place: the moved u and v are in the result.

    Args:
        weight: at least two axes; as a matrix [out, rest] with ``dim`` moved to the front.
        u: [out], an estimate of the left singular vector.
        v: [rest], of the right one; only used when ``n_power_iterations`` is 0.
        dim: the axis of the outputs, 0 or 1.
        n_power_iterations: how often u and v move before sigma is taken.
        eps: added to the norms of u and v; a weight whose sigma is not above it is returned unnormalised, so
            that zeros stay zeros and their gradient stays finite.

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
    rest = weight.numel() // weight.size(dim) if weight.size(dim) else 0
    for name, vector, length in (("u", u, weight.size(dim)), ("v", v, rest)):
        check_floating(name, vector)
        if vector.shape != (length,):
            raise ValueError(f"{name}: expected shape [{length}], got {shape_of(vector)}")
        check_same_device(name, vector, "the weight", weight)
    if n_power_iterations < 0:
        raise ValueError(f"n_power_iterations: expected at least 0, got {n_power_iterations}")
    check_positive("eps", eps)
    return reference.spectral_normalize(weight, u, v, n_power_iterations, eps, dim)


def spectral_norm_inputs(weight: Tensor, *, dim: int = 0) -> SpectralNormInputs:
    """Return what the backends of a layer's weight choose by, after all checks."""
    check_floating("weight", weight)
    if weight.dim() < 2 or dim not in (0, 1):
        raise ValueError(
            f"weight: expected at least 2 axes and dim 0 or 1, got {shape_of(weight)} and dim {dim!r}"
        )
    return SpectralNormInputs(weight, dim, alone=True)
