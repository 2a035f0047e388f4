"""Normalised weights of a whole network, found in one call and shared by every forward until the next."""

from __future__ import annotations

import torch
from torch import nn

from sagan_layers import checks
from sagan_layers.spectral_norm.layers import SpectralNormLayer, _Shared
from sagan_layers.spectral_norm.table import normalize_layer_weights

__all__ = ["SharedSpectralNorm", "shared_spectral_norm"]


def shared_spectral_norm(module: nn.Module, *, dtype: torch.dtype | None = None) -> SharedSpectralNorm:
    """Normalise all weights of ``module`` once, and share them between all forwards inside a ``with`` block.

    On entry, one call moves u and v of every spectrally normalised layer (in training and not frozen; else it
    does what the layer's next forward would have done) and computes the normalised weights. Inside the block
    nothing moves and nothing is computed again: the real and the fake batch and all parts of an accumulated batch
    take the same weights. That is what a first forward followed by others inside
    ``frozen_spectral_norm(module, iterate=False)`` computes, at the cost of one.

    Args:
        module: a layer or a network that holds some; one in DistributedDataParallel or under ``torch.compile``
            as well.
        dtype: of the normalised weights of convolutions and linear layers, for forwards under autocast: rounded
            where they are divided, they need not be cast by each forward. None takes autocast's where it is
            enabled on entry, else each weight's own. Gradients have the weight's dtype.

    Returns:
        A :class:`SharedSpectralNorm`, which is the context. Kept, it can be used again, also without a block.

    Raises:
        TypeError: if ``dtype`` is not a floating-point dtype.
        RuntimeError: inside the block, when a layer is called in eager mode whose weight has changed or been
            replaced since. Torch does not count the steps of ``fused=True`` optimizers and what is done to
            ``weight.data`` as changes, so these go unnoticed.

    Note:
        Training mode and frozen contexts are looked at on entry only. Layers that an enclosing context shares
        already stay as they are; :func:`frozen_spectral_norm` inside the block changes nothing, around it it
        keeps u and v from moving. ``backward`` may run inside the block or after it, once for every forward,
        also after ``optimizer.step()``; second derivatives must come before that. Copies and pickles of the
        module made inside the block are not part of it.

    Example:
        >>> from sagan_layers import SNConv2d, SNLinear
        >>> discriminator = nn.Sequential(SNConv2d(3, 8, 3), nn.Flatten(), SNLinear(288, 1))
        >>> optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.1)
        >>> with shared_spectral_norm(discriminator):
        ...     for images in torch.randn(4, 2, 3, 8, 8):  # four parts of a batch
        ...         discriminator(images).mean().backward()
        >>> optimizer.step()
    """
    return SharedSpectralNorm(module, dtype=dtype)


class SharedSpectralNorm:
    """The context of :func:`shared_spectral_norm`, for use without a ``with`` block too.

    ``update`` begins the sharing, or finds the weights anew after an optimizer's step; ``release`` ends it. A
    ``with`` block calls the first on entry and the second at its end.

    Args:
        module: as for :func:`shared_spectral_norm`.
        dtype: as for :func:`shared_spectral_norm`.

    Raises:
        TypeError: if ``dtype`` is not a floating-point dtype.

    Example:
        >>> from sagan_layers import SNLinear
        >>> layer = SNLinear(4, 3)
        >>> shared = SharedSpectralNorm(layer)
        >>> shared.update()  # u and v move once
        >>> torch.equal(layer(torch.ones(4)), layer(torch.ones(4)))
        True
        >>> shared.release()
    """

    def __init__(self, module: nn.Module, *, dtype: torch.dtype | None = None) -> None:
        checks.check_parameter_dtype(dtype)
        self.module = module
        self.dtype = dtype
        self._layers: list[SpectralNormLayer] = []

    def __enter__(self) -> SharedSpectralNorm:
        """Share; an error if that is so already."""
        if self._layers:
            raise RuntimeError("shared_spectral_norm: expected a context that is not in use, got one that is")
        self.update()
        return self

    def __exit__(self, *_: object) -> None:
        """End the sharing."""
        self.release()

    @torch.no_grad()
    def update(self) -> None:
        """Move u and v of all layers as their next forward would, and share the weights that follow."""
        self.release()
        layers = [
            layer
            for layer in self.module.modules()
            if isinstance(layer, SpectralNormLayer) and layer._shared is None
        ]
        tasks = [
            layer._task(
                layer.weight,
                iterate=layer._moves or layer._iterates_when_frozen,
                dtype=self._dtype_of(layer),
            )
            for layer in layers
        ]
        results = normalize_layer_weights(tasks)
        moves = [(layer, result) for layer, result in zip(layers, results, strict=True) if layer._moves]
        if moves:
            torch._foreach_copy_(
                [vector for layer, _ in moves for vector in (layer.weight_u, layer.weight_v)],
                [vector for _, result in moves for vector in (result.u, result.v)],
            )
        for layer, task, result in zip(layers, tasks, results, strict=True):
            layer._shared = _Shared(task, result, _version(layer))
        self._layers = layers

    def release(self) -> None:
        """Let every layer normalise its own weight again."""
        for layer in self._layers:
            if isinstance(layer, SpectralNormLayer):  # unless it was made a plain layer in between
                layer._shared = None
        self._layers = []

    def _dtype_of(self, layer: SpectralNormLayer) -> torch.dtype:
        own = layer.weight.dtype
        if not layer._cast_by_autocast or own == torch.float64:
            return own
        device = layer.weight.device.type
        if self.dtype is not None or device == "meta" or not torch.is_autocast_enabled(device):
            return self.dtype or own
        return torch.get_autocast_dtype(device)


def _version(layer: SpectralNormLayer) -> int | None:
    weight = layer._parameters.get("weight")
    if torch.compiler.is_compiling() or weight is None or weight.is_inference():
        return None
    return weight._version
