"""Adversarial losses, as functions and as modules.

Two kinds of logits are keyword-only, because code bases disagree on the order. Logits may have any shape. A loss is a
scalar: the mean over all entries, computed in float32 for half-precision logits. A discriminator of several scales
returns a list of logits; the loss is then the mean of the scales' losses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from sagan_layers.checks import check_not_empty, check_same_device, keyword_only, named_parts
from sagan_layers.torch_support import accumulation_dtype

Logits = Tensor | list[Tensor] | tuple[Tensor, ...]


@keyword_only
def hinge_discriminator_loss(*, real_logits: Logits, fake_logits: Logits) -> Tensor:
    r"""Return :math:`\mathrm{mean}(\max(0, 1 - D(x))) + \mathrm{mean}(\max(0, 1 + D(G(z))))`.

    Args:
        real_logits: D's logits for real images, any shape, or a list of them, one for each scale.
        fake_logits: D's logits for generated images, the same.

    Raises:
        TypeError: if logits are not floating point, or have no keyword.
        ValueError: if logits are empty or on different devices, or the lists differ in length.

    Reference:
        Zhang et al., Self-Attention Generative Adversarial Networks, equation 4.

    Example:
        >>> logits = torch.tensor([2.0, 0.5])
        >>> hinge_discriminator_loss(real_logits=logits, fake_logits=-logits)
        tensor(0.5000)
    """

    def loss(real: Tensor, fake: Tensor) -> Tensor:
        return torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()

    return _mean_over_scales(loss, real_logits=real_logits, fake_logits=fake_logits)


def hinge_generator_loss(fake_logits: Logits) -> Tensor:
    r"""Return :math:`-\mathrm{mean}(D(G(z)))`.

    Args:
        fake_logits: D's logits for generated images, any shape, or a list of them, one for each scale.

    Raises:
        TypeError: if logits are not floating point.
        ValueError: if logits are empty.

    Reference:
        Zhang et al., Self-Attention Generative Adversarial Networks, equation 4.

    Example:
        >>> hinge_generator_loss(torch.tensor([2.0, 0.5]))
        tensor(-1.2500)
        >>> hinge_generator_loss([torch.tensor([2.0, 0.5]), torch.tensor([0.25])])
        tensor(-0.7500)
    """
    return _mean_over_scales(lambda fake: -fake.mean(), fake_logits=fake_logits)


@keyword_only
def softplus_discriminator_loss(*, real_logits: Logits, fake_logits: Logits) -> Tensor:
    r"""Return :math:`\mathrm{mean}(\mathrm{softplus}(-D(x))) + \mathrm{mean}(\mathrm{softplus}(D(G(z))))`.

    The discriminator's cross-entropy; the released code calls it "KL".

    Args:
        real_logits: D's logits for real images, any shape, or a list of them, one for each scale.
        fake_logits: D's logits for generated images, the same.

    Raises:
        TypeError: if logits are not floating point.
        ValueError: if logits are empty.

    Reference:
        The released code of Zhang et al.; Goodfellow et al., Generative Adversarial Nets, equation 1.

    Example:
        >>> softplus_discriminator_loss(real_logits=torch.zeros(2), fake_logits=torch.zeros(2))
        tensor(1.3863)
    """

    def loss(real: Tensor, fake: Tensor) -> Tensor:
        return softplus(-real).mean() + softplus(fake).mean()

    return _mean_over_scales(loss, real_logits=real_logits, fake_logits=fake_logits)


def softplus_generator_loss(fake_logits: Logits) -> Tensor:
    r"""Return :math:`-\mathrm{mean}(D(G(z)))`, which the released code pairs with D's softplus loss.

    The same as :func:`hinge_generator_loss`.

    Args:
        fake_logits: D's logits for generated images, any shape, or a list of them, one for each scale.

    Raises:
        TypeError: if logits are not floating point.
        ValueError: if logits are empty.

    Reference:
        The released code of Zhang et al.

    Example:
        >>> softplus_generator_loss(torch.tensor([2.0, 0.5]))
        tensor(-1.2500)
    """
    return hinge_generator_loss(fake_logits)


class HingeDiscriminatorLoss(nn.Module):
    """Module form of :func:`hinge_discriminator_loss`."""

    @keyword_only
    def forward(self, *, real_logits: Logits, fake_logits: Logits) -> Tensor:
        """Return the loss, a scalar."""
        return hinge_discriminator_loss(real_logits=real_logits, fake_logits=fake_logits)


class HingeGeneratorLoss(nn.Module):
    """Module form of :func:`hinge_generator_loss`."""

    def forward(self, fake_logits: Logits) -> Tensor:
        """Return the loss, a scalar."""
        return hinge_generator_loss(fake_logits)


class SoftplusDiscriminatorLoss(nn.Module):
    """Module form of :func:`softplus_discriminator_loss`."""

    @keyword_only
    def forward(self, *, real_logits: Logits, fake_logits: Logits) -> Tensor:
        """Return the loss, a scalar."""
        return softplus_discriminator_loss(real_logits=real_logits, fake_logits=fake_logits)


class SoftplusGeneratorLoss(nn.Module):
    """Module form of :func:`softplus_generator_loss`."""

    def forward(self, fake_logits: Logits) -> Tensor:
        """Return the loss, a scalar."""
        return softplus_generator_loss(fake_logits)


def _mean_over_scales(loss: Callable[..., Tensor], **logits: Logits) -> Tensor:
    """Return the loss of the tensors, or the mean of the losses of the lists' tensors, after all checks."""
    kinds = {name: named_parts(name, each) for name, each in logits.items()}
    (first_kind, first), *_ = kinds.items()
    like_name, like = next(iter(first.items()))
    for kind, parts in kinds.items():
        for name, part in parts.items():
            check_not_empty(name, part)
            check_same_device(name, part, like_name, like)
        if isinstance(logits[kind], Tensor) != isinstance(logits[first_kind], Tensor):
            raise TypeError(f"{kind}: expected a list if {first_kind} is one, got one tensor and one list")
        if len(parts) != len(first):
            raise ValueError(f"{kind}: expected {len(first)} tensors, as {first_kind}, got {len(parts)}")
    losses = [
        loss(*(part.to(accumulation_dtype(part.dtype)) for part in scale))
        for scale in zip(*(parts.values() for parts in kinds.values()), strict=True)
    ]
    return torch.stack(losses).mean() if len(losses) > 1 else losses[0]
