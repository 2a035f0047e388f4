"""Spectral normalisation: the layers, contexts and conversions, the definition and its backends."""

from sagan_layers.spectral_norm.contexts import (
    SpectralNormRecord,
    frozen_spectral_norm,
    recording_spectral_norm,
    replaying_spectral_norm,
)
from sagan_layers.spectral_norm.conversion import apply_spectral_norm, remove_spectral_norm
from sagan_layers.spectral_norm.layers import (
    SNConv2d,
    SNConvTranspose2d,
    SNEmbedding,
    SNLinear,
    SpectralNormLayer,
)
from sagan_layers.spectral_norm.shared import SharedSpectralNorm, shared_spectral_norm

__all__ = [
    "SNConv2d",
    "SNConvTranspose2d",
    "SNEmbedding",
    "SNLinear",
    "SharedSpectralNorm",
    "SpectralNormLayer",
    "SpectralNormRecord",
    "apply_spectral_norm",
    "frozen_spectral_norm",
    "recording_spectral_norm",
    "remove_spectral_norm",
    "replaying_spectral_norm",
    "shared_spectral_norm",
]
