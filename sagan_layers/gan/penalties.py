"""Penalties on the discriminator's gradient, as a function and as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sagan_layers.checks import (
    check_choice,
    check_not_empty,
    check_same_device,
    check_samples,
    keyword_only,
    named_parts,
    number_of,
    shape_of,
)
from sagan_layers.gan.losses import Logits
from sagan_layers.torch_support import accumulation_dtype


@keyword_only
def gradient_penalty(*, logits: Logits, images: Tensor, kind: str = "r1", target: float = 1.0) -> Tensor:
    r"""Return a penalty on the gradient of D's logits with respect to its input images.

    With :math:`g_n = \nabla_{x_n} \sum D(x)`, the gradient of sample n:

    - "r1", "r2": :math:`\mathrm{mean}_n \|g_n\|^2`. R1 takes real images, R2 generated ones. The caller multiplies
      by the papers' weight, :math:`\gamma / 2`.
    - "wgan-gp": :math:`\mathrm{mean}_n (\|g_n\| - t)^2`, at :func:`interpolate_images` of real and generated images.

    Args:
        logits: D's output for ``images``, any shape, or a list of them, one for each scale: the result is then the
            mean of the scales' penalties, each by a backward pass of its own.
        images: [N, *], D's input; must require a gradient before D is called.
        kind: "r1", "r2" or "wgan-gp".
        target: t, the norm that "wgan-gp" pulls towards.

    Raises:
        ValueError: if the images do not require a gradient, D's logits do not depend on them, or ``kind`` is
            unknown.
        TypeError: if a tensor is not floating point, or has no keyword.

    Note:
        Keeps the graph of the first derivative. Norms are accumulated in float32 (float64 for float64). Where a
        gradient is exactly zero, the norm of "wgan-gp" has the subgradient zero, not NaN. With a gradient scaler, call
        it outside autocast on unscaled logits.

    Reference:
        Mescheder et al., Which Training Methods for GANs do actually Converge (R1, R2); Gulrajani et al.,
        Improved Training of Wasserstein GANs (WGAN-GP).

    Example:
        >>> discriminator = nn.Sequential(nn.Flatten(), nn.Linear(12, 1, bias=False))
        >>> images = torch.randn(4, 3, 2, 2, requires_grad=True)
        >>> penalty = gradient_penalty(logits=discriminator(images), images=images)
        >>> torch.allclose(penalty, discriminator[1].weight.square().sum())
        True
    """
    _check_kind(kind)
    target = number_of("target", target, least=0)
    scales = named_parts("logits", logits)
    for name, scale in scales.items():
        check_not_empty(name, scale)
    check_samples("images", images)
    if not images.requires_grad:
        raise ValueError("images: expected requires_grad; call images.requires_grad_() before D")
    penalties = [_penalty(name, scale, images, kind, target) for name, scale in scales.items()]
    return torch.stack(penalties).mean() if len(penalties) > 1 else penalties[0]


def _penalty(name: str, logits: Tensor, images: Tensor, kind: str, target: float) -> Tensor:
    if not logits.requires_grad:
        raise ValueError(f"{name}: expected a graph; call D with gradients enabled")
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError(f"{name}: expected to depend on the images, but they do not")
    gradients = gradient.to(accumulation_dtype(gradient.dtype)).reshape(len(gradient), -1)
    squares = gradients.square().sum(1)  # [N]
    if kind != "wgan-gp":
        return squares.mean()
    positive = squares > 0
    norms = torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0)
    return (norms - target).square().mean()


@keyword_only
def interpolate_images(
    *, real_images: Tensor, fake_images: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Return a random point between each pair of images that requires a gradient, for the "wgan-gp" penalty.

    Args:
        real_images: [N, *].
        fake_images: [N, *], of the same shape; generated in bfloat16, say, they meet float32 images in float32.
        generator: draws the random numbers.

    Shape:
        - Output: [N, *], a leaf of the graph, in the wider dtype of the two.

    Raises:
        ValueError: if the shapes or devices differ.
        TypeError: if images are not floating point, or have no keyword.

    Reference:
        Gulrajani et al., Improved Training of Wasserstein GANs, algorithm 1.

    Example:
        >>> points = interpolate_images(real_images=torch.ones(4, 3, 8, 8), fake_images=torch.zeros(4, 3, 8, 8))
        >>> points.shape, points.requires_grad
        (torch.Size([4, 3, 8, 8]), True)
    """
    check_samples("real_images", real_images)
    check_samples("fake_images", fake_images)
    if real_images.shape != fake_images.shape:
        raise ValueError(
            f"fake_images: expected the shape of the real images {shape_of(real_images)}, "
            f"got {shape_of(fake_images)}"
        )
    check_same_device("fake_images", fake_images, "the real images", real_images)
    shape = (real_images.size(0), *[1] * (real_images.dim() - 1))
    dtype = torch.promote_types(real_images.dtype, fake_images.dtype)
    weight = torch.rand(shape, generator=generator, device=real_images.device, dtype=dtype)
    return torch.lerp(real_images.detach().to(dtype), fake_images.detach().to(dtype), weight).requires_grad_()


class GradientPenalty(nn.Module):
    """Module form of :func:`gradient_penalty`.

    Args:
        kind: "r1", "r2" or "wgan-gp".
        target: the norm that "wgan-gp" pulls towards.
    """

    def __init__(self, kind: str = "r1", target: float = 1.0) -> None:
        super().__init__()
        _check_kind(kind)
        self.kind = kind
        self.target = number_of("target", target, least=0)

    @keyword_only
    def forward(self, *, logits: Logits, images: Tensor) -> Tensor:
        """Return the penalty, a scalar."""
        return gradient_penalty(logits=logits, images=images, kind=self.kind, target=self.target)

    def extra_repr(self) -> str:
        """Return the kind."""
        return f"kind={self.kind!r}" + (f", target={self.target}" if self.kind == "wgan-gp" else "")


def _check_kind(kind: str) -> None:
    check_choice("kind", kind, ("r1", "r2", "wgan-gp"))
