"""Adversarial losses and gradient penalties, as functions and as modules.

Logits are keyword-only, because code bases disagree on the order. Logits may have any shape; the losses are
means over all their entries, computed in float32 for half-precision logits, and scalars.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sagan_layers import checks
from sagan_layers.torch_support import accumulation_dtype

__all__ = [
    "GradientPenalty",
    "HingeDiscriminatorLoss",
    "HingeGeneratorLoss",
    "SoftplusDiscriminatorLoss",
    "SoftplusGeneratorLoss",
    "gradient_penalty",
    "hinge_discriminator_loss",
    "hinge_generator_loss",
    "interpolate_images",
    "softplus_discriminator_loss",
    "softplus_generator_loss",
]


def hinge_discriminator_loss(*, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    r"""Return :math:`\mathrm{mean}(\max(0, 1 - D(x))) + \mathrm{mean}(\max(0, 1 + D(G(z))))`.

    Args:
        real_logits: D's logits of real images, any shape.
        fake_logits: D's logits of generated images, any shape.

    Raises:
        TypeError: if logits are not floating point.
        ValueError: if there are none.

    Reference:
        Zhang et al., Self-Attention Generative Adversarial Networks, equation 4.

    Example:
        >>> logits = torch.tensor([2.0, 0.5])
        >>> hinge_discriminator_loss(real_logits=logits, fake_logits=-logits)
        tensor(0.5000)
    """
    real, fake = _wide("real_logits", real_logits), _wide("fake_logits", fake_logits)
    return torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()


def hinge_generator_loss(*, fake_logits: Tensor) -> Tensor:
    r"""Return :math:`-\mathrm{mean}(D(G(z)))`.

    Args:
        fake_logits: D's logits of generated images, any shape.

    Raises:
        TypeError: if logits are not floating point.
        ValueError: if there are none.

    Reference:
        Zhang et al., Self-Attention Generative Adversarial Networks, equation 4.

    Example:
        >>> hinge_generator_loss(fake_logits=torch.tensor([2.0, 0.5]))
        tensor(-1.2500)
    """
    return -_wide("fake_logits", fake_logits).mean()


def softplus_discriminator_loss(*, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    r"""Return :math:`\mathrm{mean}(\mathrm{softplus}(-D(x))) + \mathrm{mean}(\mathrm{softplus}(D(G(z))))`.

    This is the discriminator's cross-entropy, called "KL" in the released code.

    Args:
        real_logits: D's logits of real images, any shape.
        fake_logits: D's logits of generated images, any shape.

    Raises:
        TypeError: if logits are not floating point.
        ValueError: if there are none.

    Reference:
        The released code of Zhang et al.; Goodfellow et al., Generative Adversarial Nets, equation 1.

    Example:
        >>> softplus_discriminator_loss(real_logits=torch.zeros(2), fake_logits=torch.zeros(2))
        tensor(1.3863)
    """
    real, fake = _wide("real_logits", real_logits), _wide("fake_logits", fake_logits)
    return nn.functional.softplus(-real).mean() + nn.functional.softplus(fake).mean()


def softplus_generator_loss(*, fake_logits: Tensor) -> Tensor:
    r"""Return :math:`-\mathrm{mean}(D(G(z)))`, the released code's partner of the softplus loss of D.

    It is the hinge loss of G under the name of its pair.

    Args:
        fake_logits: D's logits of generated images, any shape.

    Raises:
        TypeError: if logits are not floating point.
        ValueError: if there are none.

    Reference:
        The released code of Zhang et al.

    Example:
        >>> softplus_generator_loss(fake_logits=torch.tensor([2.0, 0.5]))
        tensor(-1.2500)
    """
    return hinge_generator_loss(fake_logits=fake_logits)


def gradient_penalty(*, logits: Tensor, images: Tensor, kind: str = "r1", target: float = 1.0) -> Tensor:
    r"""Return a penalty on the gradient of D's logits by its input images, ready for ``backward``.

    With :math:`g_n = \nabla_{x_n} \sum D(x)`, the gradient of sample n:

    - "r1", "r2": :math:`\mathrm{mean}_n \|g_n\|^2`. R1 takes real images, R2 generated ones; the formula is one.
      The papers' weight is :math:`\gamma / 2`, which the caller multiplies.
    - "wgan-gp": :math:`\mathrm{mean}_n (\|g_n\| - t)^2`, each sample's own norm, at
      :func:`interpolate_images` of real and generated ones.

    Args:
        logits: what D returned for ``images``, any shape.
        images: [N, *], what D was given; must have ``requires_grad`` before D is called.
        kind: "r1", "r2" or "wgan-gp".
        target: t, the norm that "wgan-gp" pulls towards.

    Raises:
        ValueError: if the images do not require a gradient, D's logits do not depend on them, or ``kind`` is
            unknown.
        TypeError: if a tensor is not floating point.

    Note:
        Keeps the graph of the first derivative. Norms are accumulated in float32 (float64 for float64); at a
        gradient of exactly zero the norm of "wgan-gp" has the subgradient zero, not NaN. Under a gradient scaler
        call it outside autocast with unscaled logits.

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
    if kind not in ("r1", "r2", "wgan-gp"):
        raise ValueError(f"kind: expected 'r1', 'r2' or 'wgan-gp', got {kind!r}")
    _wide("logits", logits)
    _wide("images", images)
    if not images.requires_grad:
        raise ValueError("images: expected requires_grad; call images.requires_grad_() before D")
    if not logits.requires_grad:
        raise ValueError("logits: expected a graph; call D with gradients enabled")
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError("logits: expected to depend on the images, but they do not")
    squares = gradient.to(accumulation_dtype(gradient.dtype)).flatten(1).square().sum(1)  # [N]
    if kind != "wgan-gp":
        return squares.mean()
    positive = squares > 0
    norms = torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0)
    return (norms - target).square().mean()


def interpolate_images(
    *, real_images: Tensor, fake_images: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Return a random point between each pair of images, requiring a gradient, for the "wgan-gp" penalty.

    Args:
        real_images: [N, *].
        fake_images: [N, *], of the same shape.
        generator: where the random numbers come from.

    Shape:
        - Output: [N, *], without the history of its inputs.

    Raises:
        ValueError: if the shapes or devices differ.
        TypeError: if the dtypes differ or are not floating point.

    Reference:
        Gulrajani et al., Improved Training of Wasserstein GANs, algorithm 1.

    Example:
        >>> points = interpolate_images(real_images=torch.ones(4, 3, 8, 8), fake_images=torch.zeros(4, 3, 8, 8))
        >>> points.shape, points.requires_grad
        (torch.Size([4, 3, 8, 8]), True)
    """
    _wide("real_images", real_images)
    _wide("fake_images", fake_images)
    if real_images.shape != fake_images.shape:
        raise ValueError(
            f"fake_images: expected the shape of the real images {list(real_images.shape)}, "
            f"got {list(fake_images.shape)}"
        )
    if real_images.dtype != fake_images.dtype:
        raise TypeError(
            f"fake_images: expected the dtype of the real images {real_images.dtype}, got {fake_images.dtype}"
        )
    checks.check_same_device("fake_images", fake_images, "the real images", real_images)
    shape = (real_images.size(0), *[1] * (real_images.dim() - 1))
    share = torch.rand(shape, generator=generator, device=real_images.device, dtype=real_images.dtype)
    return torch.lerp(real_images.detach(), fake_images.detach(), share).requires_grad_()


class HingeDiscriminatorLoss(nn.Module):
    """Module form of :func:`hinge_discriminator_loss`."""

    def forward(self, *, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Return the loss, a scalar."""
        return hinge_discriminator_loss(real_logits=real_logits, fake_logits=fake_logits)


class HingeGeneratorLoss(nn.Module):
    """Module form of :func:`hinge_generator_loss`."""

    def forward(self, *, fake_logits: Tensor) -> Tensor:
        """Return the loss, a scalar."""
        return hinge_generator_loss(fake_logits=fake_logits)


class SoftplusDiscriminatorLoss(nn.Module):
    """Module form of :func:`softplus_discriminator_loss`."""

    def forward(self, *, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Return the loss, a scalar."""
        return softplus_discriminator_loss(real_logits=real_logits, fake_logits=fake_logits)


class SoftplusGeneratorLoss(nn.Module):
    """Module form of :func:`softplus_generator_loss`."""

    def forward(self, *, fake_logits: Tensor) -> Tensor:
        """Return the loss, a scalar."""
        return softplus_generator_loss(fake_logits=fake_logits)


class GradientPenalty(nn.Module):
    """Module form of :func:`gradient_penalty`.

    Args:
        kind: "r1", "r2" or "wgan-gp".
        target: the norm that "wgan-gp" pulls towards.
    """

    def __init__(self, kind: str = "r1", target: float = 1.0) -> None:
        super().__init__()
        if kind not in ("r1", "r2", "wgan-gp"):
            raise ValueError(f"kind: expected 'r1', 'r2' or 'wgan-gp', got {kind!r}")
        self.kind = kind
        self.target = target

    def forward(self, *, logits: Tensor, images: Tensor) -> Tensor:
        """Return the penalty, a scalar."""
        return gradient_penalty(logits=logits, images=images, kind=self.kind, target=self.target)

    def extra_repr(self) -> str:
        """Return the kind."""
        return f"kind={self.kind!r}" + (f", target={self.target}" if self.kind == "wgan-gp" else "")


def _wide(name: str, tensor: Tensor) -> Tensor:
    """Check a tensor and return it in its accumulation dtype."""
    checks.check_floating(name, tensor)
    if tensor.numel() == 0:
        raise ValueError(f"{name}: expected at least one entry, got shape {list(tensor.shape)}")
    return tensor.to(accumulation_dtype(tensor.dtype))
