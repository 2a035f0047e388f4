"""Normalised weights of a whole network, computed in one call and shared by every forward until the next call."""

from __future__ import annotations

import torch
from torch import nn

from sagan_layers import checks
from sagan_layers.spectral_norm.contexts import spectral_layers
from sagan_layers.spectral_norm.functional import normalize_weights
from sagan_layers.spectral_norm.layers import SharedWeight, SpectralNormLayer

__all__ = ["SharedSpectralNorm", "shared_spectral_norm"]


def shared_spectral_norm(module: nn.Module, *, dtype: torch.dtype | None = None) -> SharedSpectralNorm:
    """Normalise all weights of ``module`` once, and share them between all forwards inside a ``with`` block.

    On entry, one call does for every spectrally normalised layer what its next forward would have done: in training,
    unless frozen, it updates u and v, and it computes the normalised weight. Inside the block nothing is updated or
    computed again: the real batch, the fake batch and all parts of an accumulated batch use the same weights. The
    results are those of a first forward followed by others inside ``frozen_spectral_norm(module, iterate=False)``, at
    the cost of one.

    Args:
        module: a layer or a network that contains some; one in DistributedDataParallel or under ``torch.compile``
            as well.
        dtype: of the normalised weights of convolutions and linear layers, for forwards under autocast, which then
            need not cast them each time. None takes autocast's dtype if it is enabled on entry, else each weight's.
            Gradients have the weight's dtype.

    Returns:
        A :class:`SharedSpectralNorm`, the context. It can be used again, also without a block.

    Raises:
        TypeError: if ``dtype`` is not a floating-point dtype.
        RuntimeError: inside the block, when a layer is called in eager mode whose weight has changed or been
            replaced since. Steps of ``fused=True`` optimizers and changes of ``weight.data`` are not noticed,
            because torch does not count them as changes.

    Note:
        Training mode and frozen contexts are read on entry only. Layers that an enclosing context already shares
        keep their weights. :func:`~sagan_layers.frozen_spectral_norm` around the block prevents the update of u and v;
        inside the block it changes nothing. ``backward`` may run inside the block or after it, once for every forward,
        also after ``optimizer.step()``; second derivatives must come before that. Copies and pickles of the module
        made inside the block do not share.

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

    ``update`` begins the sharing, or computes the weights again after an optimizer's step; ``release`` ends it. A
    ``with`` block calls ``update`` on entry and ``release`` at its end.

    Args:
        module, dtype: as for :func:`shared_spectral_norm`.

    Raises:
        TypeError: if ``dtype`` is not a floating-point dtype.

    Example:
        >>> from sagan_layers import SNLinear
        >>> layer = SNLinear(4, 3)
        >>> shared = SharedSpectralNorm(layer)
        >>> shared.update()  # updates u and v once
        >>> torch.equal(layer(torch.ones(4)), layer(torch.ones(4)))
        True
        >>> shared.release()
    """

    def __init__(self, module: nn.Module, *, dtype: torch.dtype | None = None) -> None:
        checks.check_module("module", module)
        checks.check_parameter_options(None, dtype)
        self.module = module
        self.dtype = dtype
        self._layers: list[SpectralNormLayer] = []

    def __enter__(self) -> SharedSpectralNorm:
        """Begin the sharing; raise ``RuntimeError`` if this context is in use."""
        if self._layers:
            raise RuntimeError("shared_spectral_norm: expected a context that is not in use, got one that is")
        self.update()
        return self

    def __exit__(self, *_: object) -> None:
        """End the sharing."""
        self.release()

    @torch.no_grad()
    def update(self) -> None:
        """Normalise the weights of all layers as their next forward would, and share them."""
        self.release()
        layers = [layer for layer in spectral_layers(self.module) if layer._shared is None]
        tasks = [
            layer._task(
                layer.weight,
                iterate=layer._updates_vectors or layer._iterates_when_frozen,
                dtype=self._dtype_of(layer),
            )
            for layer in layers
        ]
        results = normalize_weights(tasks)
        updates = [pair for pair in zip(layers, results, strict=True) if pair[0]._updates_vectors]
        if updates:
            torch._foreach_copy_(
                [vector for layer, _ in updates for vector in (layer.weight_u, layer.weight_v)],
                [vector for _, result in updates for vector in (result.u, result.v)],
            )
        for layer, task, result in zip(layers, tasks, results, strict=True):
            layer._shared = SharedWeight(task, result, _version(layer))
        self._layers = layers

    def release(self) -> None:
        """Let every layer normalise its own weight again."""
        for layer in self._layers:
            if isinstance(layer, SpectralNormLayer):  # it may have become a plain layer since
                layer._shared = None
        self._layers = []

    def _dtype_of(self, layer: SpectralNormLayer) -> torch.dtype:
        dtype, device = layer.weight.dtype, layer.weight.device.type
        if not layer._cast_by_autocast or dtype == torch.float64:
            return dtype
        if self.dtype is None and device != "meta" and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.dtype or dtype


def _version(layer: SpectralNormLayer) -> int | None:
    weight = layer._parameters.get("weight")
    if torch.compiler.is_compiling() or weight is None or weight.is_inference():
        return None
    return weight._version
