"""Plain models into spectrally normalised ones, in place, and back."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.backends import mha
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm

from sagan_layers import checks
from sagan_layers.resampling import ResamplingConv2d
from sagan_layers.spectral_norm.functional import normalize_weight
from sagan_layers.spectral_norm.layers import (
    LayerOptions,
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
    only_normalized: bool = False,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    iterate_when_frozen: bool = True,
    eps_mode: str = "add",
    dim: int | None = None,
    iterate_from: str = "u",
    report: Callable[[str], object] | None = None,
) -> _ModuleT:
    """Turn every convolution, linear layer and embedding of ``model`` into its normalised layer, in place.

    Each layer stays the same object with the same parameters, so optimizers, hooks and shared modules are not affected.
    Layers that are already normalised stay as they are. Those with ``torch.nn.utils.spectral_norm`` or
    ``torch.nn.utils.parametrizations.spectral_norm`` keep u, v and their own options, and compute what they computed;
    their ``weight_orig`` or ``parametrizations.weight.original`` is the new ``weight``, the same object. Code outside
    the layer that reads its weight must read :meth:`SpectralNormLayer.normalized_weight` instead.

    A weight layer without a normalised form (1-d and 3-d convolutions, recurrent layers, multi-head attention,
    subclasses, other parametrizations) is an error that names it, unless excluded. So are the linear layers of
    ``nn.TransformerEncoderLayer`` while its fast path is enabled, which would not call them. Layers of other classes
    that have a ``weight`` of two axes or more are passed over with a warning: what they do with it is not known.

    Args:
        model: a layer or a network.
        exclude: what to leave unchanged, with everything inside it: qualified names or shell patterns of them
            ("head.*", "blocks.0.conv"), classes, or modules.
        only_normalized: whether to convert only the layers whose weight torch's spectral norm computes. The model then
            computes what it computed; all others are left as they are, without an error or a warning.
        n_power_iterations: see :class:`SpectralNormLayer`.
        eps: see there.
        iterate_when_frozen: see there.
        eps_mode: see there.
        dim: see there.
        iterate_from: see there.
        report: called with one line for each layer that was converted, excluded, left or passed over, such as
            ``print`` or a logger's ``info``.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: if a weight layer cannot be normalised, or ``exclude`` is a string.
        ValueError: if an entry of ``exclude`` matches nothing, a weight is empty, or an argument is out of range.
            After any error the model is unchanged.

    Warns:
        UserWarning: if layers of unknown classes are passed over, or the model then has no normalised layer.

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
    (only_normalized,) = checks.flags_of(only_normalized=only_normalized)
    options = LayerOptions(n_power_iterations, eps, iterate_when_frozen, eps_mode, iterate_from, dim)
    options.checked(output_axis=0)
    if not (report is None or callable(report)):
        raise TypeError(f"report: expected a function of one string, got {checks.shown(report)}")
    excluded = _excluded_modules(model, exclude)
    chosen: dict[str, _Conversion] = {}
    lines: dict[str, str] = {}
    passed_over = []
    for name, layer in model.named_modules():
        if isinstance(layer, SpectralNormLayer):
            continue
        kind, norm = parametrize.type_before_parametrizations(layer), _foreign_norm(layer)
        if layer in excluded or (only_normalized and norm is None):
            if isinstance(layer, _WEIGHT_LAYERS) or _is_unknown(layer):
                lines[name] = f"{kind.__name__} {'excluded' if layer in excluded else 'left as it is'}"
        elif kind in _NORMALIZED_CLASSES:
            chosen[name] = conversion = _conversion_of(name, layer, norm, _NORMALIZED_CLASSES[kind], options)
            lines[name] = f"{kind.__name__}{conversion.source} -> {conversion.normalized_class.__name__}"
        elif isinstance(layer, _WEIGHT_LAYERS) or norm is not None:
            raise TypeError(
                f"no spectrally normalised form of {kind.__name__} at {_shown(name)}; "
                "put its name or class into exclude to leave it as it is"
            )
        elif _is_unknown(layer):
            passed_over.append(f"{_shown(name)} ({kind.__name__})")
            lines[name] = f"{kind.__name__} passed over"
    for name in chosen:
        parent, _, child = name.rpartition(".")
        if isinstance(model.get_submodule(parent), nn.TransformerEncoderLayer) and mha.get_fastpath_enabled():
            raise TypeError(
                f"without gradients the TransformerEncoderLayer at {_shown(parent)} reads the weight of its {child!r} "
                f"before it is normalised; call torch.backends.mha.set_fastpath_enabled(False) first, or put {name!r} "
                "into exclude"
            )
    if passed_over:
        warnings.warn(
            f"not normalised, because what they do with their weight is not known: {', '.join(passed_over)}; put "
            "what is meant to stay as it is into exclude",
            stacklevel=2,
        )
    if not chosen and not any(isinstance(layer, SpectralNormLayer) for layer in model.modules()):
        kinds = "with torch's spectral norm" if only_normalized else "that could be spectrally normalised"
        warnings.warn(f"the model has no layer {kinds}", stacklevel=2)
    if report is not None:  # before anything changes, since it may raise
        for name, line in lines.items():
            report(f"{name or '(the model itself)'}: {line}")
    for name, conversion in chosen.items():
        conversion.convert(model.get_submodule(name))
    return model


class _Conversion(NamedTuple):
    """How a layer becomes normalised, after all checks."""

    normalized_class: type[SpectralNormLayer]
    weight: nn.Parameter
    options: LayerOptions
    vectors: tuple[Tensor, Tensor] | None = None
    source: str = ""

    def convert(self, layer: nn.Module) -> None:
        if self.vectors is not None:
            _remove_foreign_norm(layer)
            layer.register_parameter("weight", self.weight)
        layer.__class__ = self.normalized_class
        assert isinstance(layer, SpectralNormLayer)
        layer._init_spectral_norm(self.options, self.vectors)


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
    model: nn.Module, exclude: Iterable[str | type[nn.Module] | nn.Module]
) -> set[nn.Module]:
    if isinstance(exclude, str):
        raise TypeError(f"exclude: expected a collection, got the string {exclude!r}; write [{exclude!r}]")
    try:
        entries = tuple(exclude)
    except TypeError as error:
        raise TypeError(f"exclude: expected a collection, got {checks.shown(exclude)}") from error
    excluded: set[nn.Module] = set()
    for entry in entries:
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


def _shown(name: str) -> str:
    return repr(name or "(the model itself)")


def _is_unknown(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    known = type(layer).__module__.startswith(("torch.nn.", "sagan_layers."))
    return weight is not None and weight.dim() >= 2 and not known


def _conversion_of(
    name: str, layer: Any, norm: Any, normalized_class: type[SpectralNormLayer], options: LayerOptions
) -> _Conversion:
    """Return how to convert a layer of torch's; raise if that cannot be done."""
    if isinstance(layer, nn.Embedding):
        refuse_embedding_options(layer.max_norm, layer.sparse)
    weight, vectors, source = layer._parameters.get("weight"), None, ""
    if isinstance(norm, SpectralNorm):
        weight, vectors = layer.weight_orig, (layer.weight_u, layer.weight_v)
        options = LayerOptions(norm.n_power_iterations, norm.eps, False, "clamp", "u", norm.dim)
        source = " with torch.nn.utils.spectral_norm"
    elif norm is not None:
        weight, vectors = layer.parametrizations.weight.original, (norm._u, norm._v)
        options = LayerOptions(norm.n_power_iterations, norm.eps, False, "clamp", "v", norm.dim)
        source = " with torch.nn.utils.parametrizations.spectral_norm"
    if not isinstance(weight, nn.Parameter) or (norm is None and parametrize.is_parametrized(layer)):
        raise TypeError(
            f"the weight or bias of {_shown(name)} is computed by something else (a hook or a parametrization); "
            "remove that first, or put the layer's name into exclude"
        )
    checks.check_floating(f"the weight of {_shown(name)}", weight)
    if weight.dim() < 2 or weight.numel() == 0:
        raise ValueError(
            f"the weight of {_shown(name)}: expected at least two axes and one element, got shape "
            f"{list(weight.shape)}; put the layer's name into exclude to leave it as it is"
        )
    try:
        options.checked(normalized_class._output_axis)
    except ValueError as error:
        raise ValueError(f"{_shown(name)}{source}: {error}") from error
    return _Conversion(normalized_class, weight, options, vectors, source)


def _foreign_norm(layer: nn.Module) -> Any:
    """Return torch's spectral norm of a layer's weight, a hook or a parametrization, if nothing else computes it."""
    if parametrize.is_parametrized(layer):
        found = dict(layer.parametrizations.items())  # type: ignore[operator, union-attr]
        norms = [norm for norm in found.get("weight", ()) if isinstance(norm, parametrizations._SpectralNorm)]
        return norms[0] if found.keys() == {"weight"} and len(found["weight"]) == len(norms) == 1 else None
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm) and hook.name == "weight":
            return hook
    return None


def _remove_foreign_norm(layer: nn.Module) -> None:
    """Take torch's spectral norm off a layer, which then has no weight."""
    if parametrize.is_parametrized(layer):
        # Not the property of the class, which deep copies share.
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
        return
    hook = _foreign_norm(layer)
    for hooks in (layer._forward_pre_hooks, layer._state_dict_hooks, layer._load_state_dict_pre_hooks):
        for key, value in list(hooks.items()):
            value = getattr(value, "hook", value)  # torch wraps those of load_state_dict
            if value is hook or getattr(value, "fn", None) is hook:
                del hooks[key]
    del layer.weight_orig, layer.weight
