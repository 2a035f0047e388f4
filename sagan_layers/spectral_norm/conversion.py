"""Plain models into spectrally normalised ones, in place, and back."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn

from sagan_layers import checks
from sagan_layers.resampling import ResamplingConv2d
from sagan_layers.spectral_norm.functional import normalize_weight
from sagan_layers.spectral_norm.layers import (
    SNConv2d,
    SNConvTranspose2d,
    SNEmbedding,
    SNLinear,
    SpectralNormLayer,
    refuse_embedding_options,
)

__all__ = ["apply_spectral_norm", "remove_spectral_norm"]

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)


@torch.no_grad()
def remove_spectral_norm(module: _ModuleT) -> _ModuleT:
    """Turn every spectrally normalised layer in ``module`` into its plain torch layer, in place.

    Each layer stays the same object, now of class ``nn.Conv2d`` (:class:`ResamplingConv2d` if it resamples),
    ``nn.ConvTranspose2d``, ``nn.Linear`` or ``nn.Embedding``, and computes what it computed in evaluation. Its
    ``weight`` is a new parameter: make a new optimizer. Weights that two layers shared are no longer shared.

    Args:
        module: a layer or a network.

    Returns:
        ``module`` itself.

    Raises:
        TypeError: if a hook or a parametrization computes a layer's weight; the model is then unchanged.

    Example:
        >>> conv = remove_spectral_norm(SNConv2d(3, 8, kernel_size=3))
        >>> type(conv).__name__, sorted(conv.state_dict())
        ('Conv2d', ['bias', 'weight'])
    """
    checks.check_module("module", module)
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, SpectralNormLayer)}
    for name, layer in layers.items():
        layer.check_own_weight(name)
    for layer in layers.values():
        # A clone, because the result lies in memory that the layer reuses.
        weight = normalize_weight(layer._task(layer.weight, iterate=layer.iterate_when_frozen)).weight
        layer.become_plain(nn.Parameter(weight.clone(), requires_grad=layer.weight.requires_grad))
    return module


def apply_spectral_norm(
    model: _ModuleT,
    *,
    exclude: Iterable[str | type[nn.Module] | nn.Module] = (),
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    iterate_when_frozen: bool = True,
    eps_mode: str = "add",
) -> _ModuleT:
    """Turn every convolution, linear layer and embedding of ``model`` into its normalised layer, in place.

    Each layer stays the same object with the same parameters, so optimizers, hooks and shared modules are not affected.
    Layers that are already normalised stay as they are. A weight layer without a normalised form (1-d and 3-d
    convolutions, recurrent layers, multi-head attention, subclasses, parametrised layers) is an error that names it,
    unless excluded: none of torch's weight layers is skipped silently.

    Args:
        model: a layer or a network.
        exclude: what to leave unchanged, with everything inside it: qualified names or shell patterns of them
            ("head.*", "blocks.0.conv"), classes, or modules.
        n_power_iterations: see :class:`SpectralNormLayer`.
        eps: see there.
        iterate_when_frozen: see there.
        eps_mode: see there.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: if a weight layer cannot be normalised, or ``exclude`` is a string.
        ValueError: if an entry of ``exclude`` matches nothing, a weight is empty, or an argument is out of range.
            After any error the model is unchanged.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1))
        >>> print(apply_spectral_norm(model, exclude=["3"]))
        Sequential(
          (0): SNConv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): ReLU()
          (2): Flatten(start_dim=1, end_dim=-1)
          (3): Linear(in_features=8, out_features=1, bias=True)
        )
    """
    checks.check_module("model", model)
    options = n_power_iterations, eps, iterate_when_frozen, eps_mode
    checks.spectral_norm_options(*options)
    if isinstance(exclude, str):
        raise TypeError(f"exclude: expected a collection, got the string {exclude!r}; write [{exclude!r}]")
    try:
        entries = tuple(exclude)
    except TypeError as error:
        raise TypeError(f"exclude: expected a collection, got {checks.shown(exclude)}") from error
    excluded = _excluded_modules(model, entries)
    chosen: list[tuple[nn.Module, type[SpectralNormLayer]]] = []
    for name, layer in model.named_modules():
        if layer in excluded or isinstance(layer, SpectralNormLayer):
            continue
        normalized_class = _NORMALIZED_CLASSES.get(type(layer))
        if normalized_class is not None:
            _check_convertible(name, layer)
            chosen.append((layer, normalized_class))
        elif isinstance(layer, _WEIGHT_LAYERS):
            raise TypeError(
                f"no spectrally normalised form of {type(layer).__name__} at {name or '(the model itself)'!r}; "
                "put its name or class into exclude to leave it as it is"
            )
    for layer, normalized_class in chosen:
        layer.__class__ = normalized_class
        assert isinstance(layer, SpectralNormLayer)
        layer._init_spectral_norm(*options)
    return model


_NORMALIZED_CLASSES: dict[type[nn.Module], type[SpectralNormLayer]] = {
    ResamplingConv2d: SNConv2d,
    **{
        layer_class._plain_class: layer_class
        for layer_class in (SNConv2d, SNConvTranspose2d, SNLinear, SNEmbedding)
    },
}
_WEIGHT_LAYERS = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)


def _excluded_modules(
    model: nn.Module, exclude: tuple[str | type[nn.Module] | nn.Module, ...]
) -> set[nn.Module]:
    excluded: set[nn.Module] = set()
    for entry in exclude:
        if isinstance(entry, str):
            matches = [layer for name, layer in model.named_modules() if fnmatch.fnmatchcase(name, entry)]
        elif isinstance(entry, type):
            matches = [layer for layer in model.modules() if isinstance(layer, entry)]
        else:
            matches = [layer for layer in model.modules() if layer is entry]
        if not matches:
            raise ValueError(f"exclude: expected names, classes or modules of the model, got {entry!r}")
        excluded.update(inner for match in matches for inner in match.modules())
    return excluded


def _check_convertible(name: str, layer: nn.Module) -> None:
    if isinstance(layer, nn.Embedding):
        refuse_embedding_options(layer.max_norm, layer.sparse)
    weight = layer._parameters.get("weight")
    if not isinstance(weight, nn.Parameter):
        raise TypeError(
            f"the weight of {name or '(the model itself)'!r} is computed by something else (a hook such as "
            "torch.nn.utils.spectral_norm); remove that first, or put the layer's name into exclude"
        )
    checks.check_floating(f"the weight of {name or '(the model itself)'!r}", weight)
    if weight.numel() == 0:
        raise ValueError(
            f"the weight of {name or '(the model itself)'!r}: expected at least one element, got shape "
            f"{list(weight.shape)}; put the layer's name into exclude to leave it as it is"
        )
