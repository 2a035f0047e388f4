"""Contexts that choose the weights of the forwards inside them: frozen, recorded or replayed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from sagan_layers import checks
from sagan_layers.spectral_norm.layers import Frozen, SharedWeight, SpectralNormLayer, UsedVectors
from sagan_layers.torch_support import temporary_attribute

__all__ = ["SpectralNormRecord", "frozen_spectral_norm", "recording_spectral_norm", "replaying_spectral_norm"]


class SpectralNormRecord(dict[SpectralNormLayer, list[UsedVectors | SharedWeight]]):
    """What each layer's forwards used, in their order; see :func:`recording_spectral_norm`."""


def spectral_layers(module: nn.Module) -> list[SpectralNormLayer]:
    """Return the spectrally normalised layers of a module."""
    return checks.parts_of(module, SpectralNormLayer)


@contextlib.contextmanager
def frozen_spectral_norm(module: nn.Module, *, iterate: bool | None = None) -> Iterator[None]:
    """Do not update u and v of any spectrally normalised layer in ``module`` inside a ``with`` block.

    The released code updates D's vectors on the real batch and not on the fake batch that follows. Gradients, dropout
    and batch norm are as usual. Contexts nest; the innermost wins. Inside
    :func:`~sagan_layers.shared_spectral_norm` the weights are fixed already and this changes nothing.

    Args:
        module: a layer or a network that contains some.
        iterate: whether sigma is taken after an iteration from the stored u and v (True), or without iterating
            (False), which gives the weight of the last forward that updated them: for passes that must repeat
            it, such as further parts of an accumulated batch. None takes each layer's ``iterate_when_frozen``.

    Example:
        >>> import torch
        >>> from sagan_layers import SNConv2d
        >>> conv = SNConv2d(3, 8, kernel_size=3)
        >>> x = torch.randn(2, 3, 16, 16)
        >>> y = conv(x)  # updates u and v
        >>> before = conv.weight_u.clone()
        >>> with frozen_spectral_norm(conv, iterate=False):
        ...     repeated = conv(x)
        >>> torch.equal(conv.weight_u, before), torch.equal(repeated, y)
        (True, True)
    """
    if iterate is not None:
        (iterate,) = checks.flags_of(iterate=iterate)
    with temporary_attribute("_frozen", dict.fromkeys(spectral_layers(module), Frozen(iterate))):
        yield


@contextlib.contextmanager
def recording_spectral_norm(module: nn.Module, record: SpectralNormRecord) -> Iterator[None]:
    """Record which weights the forwards inside a ``with`` block use, for :func:`replaying_spectral_norm`.

    For :func:`~sagan_layers.checkpointed`. Contexts nest; each records every forward inside it.

    Example:
        >>> import torch
        >>> from sagan_layers import SNConv2d
        >>> conv, record = SNConv2d(3, 8, kernel_size=3), SpectralNormRecord()
        >>> x = torch.randn(2, 3, 16, 16)
        >>> with recording_spectral_norm(conv, record):
        ...     y = conv(x)
        >>> _ = conv(x)  # updates u and v
        >>> with replaying_spectral_norm(record):
        ...     repeated = conv(x)
        >>> torch.equal(repeated, y), torch.equal(conv(x), y)
        (True, False)
    """
    layers = spectral_layers(module)
    with temporary_attribute(
        "_records", {layer: (*layer._records, record.setdefault(layer, [])) for layer in layers}
    ):
        yield


@contextlib.contextmanager
def replaying_spectral_norm(record: SpectralNormRecord) -> Iterator[None]:
    """Let forwards inside a ``with`` block use the recorded weights again, in their order; nothing is updated.

    The weights and their gradients are those of the record, even if u and v were updated since, and whether or not
    the layers are in training, frozen or shared now. The caller checks that the parameters are still the same.

    Raises:
        RuntimeError: inside the block, when a layer is called more often than recorded, or the weight of a shared
            one has changed since.
    """
    with temporary_attribute("_replayed", {layer: iter(used) for layer, used in record.items()}):
        yield
