"""The building blocks of Self-Attention GAN as ordinary ``nn.Module`` classes."""

from sagan_layers import convert, functional
from sagan_layers.attention import SelfAttention2d
from sagan_layers.checkpointing import checkpointed
from sagan_layers.conditional_norm import (
    ConditionalBatchNorm2d,
    frozen_running_statistics,
    standing_statistics,
    synchronize_batch_norm,
)
from sagan_layers.gan import (
    DiscriminatorPass,
    DiscriminatorResult,
    GeneratorPass,
    GeneratorResult,
    GradientPenalty,
    HingeDiscriminatorLoss,
    HingeGeneratorLoss,
    ProjectionDiscriminatorHead,
    SoftplusDiscriminatorLoss,
    SoftplusGeneratorLoss,
    call_with_constant_parameters,
    gradient_penalty,
    hinge_discriminator_loss,
    hinge_generator_loss,
    interpolate_images,
    softplus_discriminator_loss,
    softplus_generator_loss,
)
from sagan_layers.resampling import ResamplingConv2d
from sagan_layers.spectral_norm import (
    SharedSpectralNorm,
    SNConv2d,
    SNConvTranspose2d,
    SNEmbedding,
    SNLinear,
    SpectralNormLayer,
    apply_spectral_norm,
    frozen_spectral_norm,
    remove_spectral_norm,
    shared_spectral_norm,
)

__version__ = "0.1.0"

__all__ = [
    "ConditionalBatchNorm2d",
    "DiscriminatorPass",
    "DiscriminatorResult",
    "GeneratorPass",
    "GeneratorResult",
    "GradientPenalty",
    "HingeDiscriminatorLoss",
    "HingeGeneratorLoss",
    "ProjectionDiscriminatorHead",
    "ResamplingConv2d",
    "SNConv2d",
    "SNConvTranspose2d",
    "SNEmbedding",
    "SNLinear",
    "SelfAttention2d",
    "SharedSpectralNorm",
    "SoftplusDiscriminatorLoss",
    "SoftplusGeneratorLoss",
    "SpectralNormLayer",
    "apply_spectral_norm",
    "call_with_constant_parameters",
    "checkpointed",
    "convert",
    "frozen_running_statistics",
    "frozen_spectral_norm",
    "functional",
    "gradient_penalty",
    "hinge_discriminator_loss",
    "hinge_generator_loss",
    "interpolate_images",
    "remove_spectral_norm",
    "shared_spectral_norm",
    "softplus_discriminator_loss",
    "softplus_generator_loss",
    "standing_statistics",
    "synchronize_batch_norm",
]
