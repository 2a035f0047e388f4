"""Losses, penalties, updates and the projection head of a GAN."""

from sagan_layers.gan.losses import (
    HingeDiscriminatorLoss,
    HingeGeneratorLoss,
    SoftplusDiscriminatorLoss,
    SoftplusGeneratorLoss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    softplus_discriminator_loss,
    softplus_generator_loss,
)
from sagan_layers.gan.penalties import GradientPenalty, gradient_penalty, interpolate_images
from sagan_layers.gan.projection import ProjectionDiscriminatorHead
from sagan_layers.gan.updates import (
    DiscriminatorPass,
    DiscriminatorResult,
    GeneratorPass,
    GeneratorResult,
    call_with_constant_parameters,
)

__all__ = [
    "DiscriminatorPass",
    "DiscriminatorResult",
    "GeneratorPass",
    "GeneratorResult",
    "GradientPenalty",
    "HingeDiscriminatorLoss",
    "HingeGeneratorLoss",
    "ProjectionDiscriminatorHead",
    "SoftplusDiscriminatorLoss",
    "SoftplusGeneratorLoss",
    "call_with_constant_parameters",
    "gradient_penalty",
    "hinge_discriminator_loss",
    "hinge_generator_loss",
    "interpolate_images",
    "softplus_discriminator_loss",
    "softplus_generator_loss",
]
