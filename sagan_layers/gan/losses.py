"""Adversarial losses, as functions and as modules.

Logits are keyword-only, because code bases disagree on the order, and may have any shape. A loss is a scalar: the mean
over all entries, computed in float32 for half-precision logits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from sagan_layers.checks import check_not_empty, check_same_device
from sagan_layers.torch_support import accumulation_dtype


def hinge_discriminator_loss(*, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    r"""Return :math:`\mathrm{mean}(\max(0, 1 - D(x))) + \mathrm{mean}(\max(0, 1 + D(G(z))))`.

    Args:
        real_logits: D's logits for real images, any shape.
        fake_logits: D's logits for generated images, any shape.

    Raises:
        TypeError: if logits are not floating point.
        ValueError: if logits are empty, or on different devices.

    Reference:
        Zhang et al., Self-Attention Generative Adversarial Networks, equation 4.

    Example:
        >>> logits = torch.tensor([2.0, 0.5])
        >>> hinge_discriminator_loss(real_logits=logits, fake_logits=-logits)
        tensor(0.5000)
    """
    real, fake = _both(real_logits, fake_logits)
    return torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()


def hinge_generator_loss(*, fake_logits: Tensor) -> Tensor:
    r"""Return :math:`-\mathrm{mean}(D(G(z)))`.

    Args:
        fake_logits: D's logits for generated images, any shape.

    Raises:
        TypeError: if logits are not floating point.
        ValueError: if logits are empty.

    Reference:
        Zhang et al., Self-Attention Generative Adversarial Networks, equation 4.

    Example:
        >>> hinge_generator_loss(fake_logits=torch.tensor([2.0, 0.5]))
        tensor(-1.2500)
    """
    return -_wide("fake_logits", fake_logits).mean()


def softplus_discriminator_loss(*, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    r"""Return :math:`\mathrm{mean}(\mathrm{softplus}(-D(x))) + \mathrm{mean}(\mathrm{softplus}(D(G(z))))`.

    The discriminator's cross-entropy; the released code calls it "KL".

    Args:
        real_logits: D's logits for real images, any shape.
        fake_logits: D's logits for generated images, any shape.

    Raises:
        TypeError: if logits are not floating point.
        ValueError: if logits are empty.

    Reference:
        The released code of Zhang et al.; Goodfellow et al., Generative Adversarial Nets, equation 1.

    Example:
        >>> softplus_discriminator_loss(real_logits=torch.zeros(2), fake_logits=torch.zeros(2))
        tensor(1.3863)
    """
    real, fake = _both(real_logits, fake_logits)
    return softplus(-real).mean() + softplus(fake).mean()


def softplus_generator_loss(*, fake_logits: Tensor) -> Tensor:
    r"""Return :math:`-\mathrm{mean}(D(G(z)))`, which the released code pairs with D's softplus loss.

    The same as :func:`hinge_generator_loss`.

    Args:
        fake_logits: D's logits for generated images, any shape.

    Raises:
        TypeError: if logits are not floating point.
        ValueError: if logits are empty.

    Reference:
        The released code of Zhang et al.

    Example:
        >>> softplus_generator_loss(fake_logits=torch.tensor([2.0, 0.5]))
        tensor(-1.2500)
    """
    return hinge_generator_loss(fake_logits=fake_logits)


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


def _both(real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
    real, fake = _wide("real_logits", real_logits), _wide("fake_logits", fake_logits)
    check_same_device("fake_logits", fake, "real_logits", real)
    return real, fake


def _wide(name: str, logits: Tensor) -> Tensor:
    check_not_empty(name, logits)
    return logits.to(accumulation_dtype(logits.dtype))
