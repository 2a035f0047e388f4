"""What code that walks over a network, to initialise or to freeze it, finds as a batch norm's gain and bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from sagan_layers.torch_support import fusion_calls


class RunningStatistics(nn.BatchNorm2d):
    """The running statistics of a conditional batch norm: a torch batch norm without parameters of its own.

    ``isinstance(module, nn.BatchNorm2d)`` finds it, and its ``weight`` and ``bias`` are those of the layer around it.
    """

    owner: Callable[[], Any] = staticmethod(
        lambda: None
    )  # a weak reference to that layer; None has no weight
    weight: Any = property(lambda self: check_fusion(self.owner()).weight)
    bias: Any = property(lambda self: self.owner().bias)

    def __setattr__(self, name: str, value: Any) -> None:
        """As ``nn.Module``; but a weight or bias of its own would have no effect."""
        if name in ("weight", "bias") and isinstance(value, Tensor):
            raise TypeError(
                f"norm.{name}: expected no parameter of its own; set {name} of the layer around it"
            )
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies; the copy of the layer around this one sets ``owner`` again."""
        return {name: value for name, value in self.__dict__.items() if name != "owner"}


def check_fusion(layer: Any) -> Any:
    """Return the layer; raise ``TypeError`` if torch reads it to fuse it, and it is more than plain batch norm."""
    if fusion_calls(1) and not (layer.activation is layer.num_classes is layer.condition_features is None):
        raise TypeError(f"bn: expected a batch norm without condition and activation to fuse, got {layer}")
    return layer


class ComputedCoefficients:
    """Gains or biases that are a stored weight plus an offset, for initialisers.

    A method that writes in place writes to the weight, so ``nn.init.normal_(layer.weight.data, 1, 0.02)`` draws gains
    around 1. It is not a tensor, and an optimizer refuses it: the parameter is the stored weight.

    Args:
        name: "weight" or "bias".
        holder: the module with the stored weight.
        attribute: the stored weight's name there.
        offset: what is added to it.
        projected: whether the weight is a projection's. Values with another mean than the offset are then refused:
            they would not become every vector's gain, but gains as random as the vectors.
    """

    def __init__(
        self, name: str, holder: nn.Module, attribute: str, offset: float, *, projected: bool
    ) -> None:
        self.__dict__.update(
            _name=name, _holder=holder, _attribute=attribute, _offset=offset, _projected=projected
        )

    def detach(self) -> ComputedCoefficients:
        """Return this object itself, which has no graph."""
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """Write values to the stored weight, or set its attribute, such as ``requires_grad``."""
        stored = getattr(self._holder, self._attribute)
        if name == "data":
            written = value - self._offset
            if self._projected:
                self._check_mean(written)
            with torch.no_grad():
                stored.copy_(written)
        else:
            setattr(stored, name, value)

    def _refuse(self, *_: object) -> NoReturn:
        remedy = (
            "write to the parameter, dict(layer.named_parameters())['weight'], which is added to gain_offset"
        )
        if self._projected:
            remedy = f"initialise {self._name}_projection.weight instead"
        raise TypeError(
            f"{self._name}: is computed, and can only be written whole, by methods such as normal_ and fill_; {remedy}"
        )

    __getitem__ = __setitem__ = __lt__ = __gt__ = _refuse  # trunc_normal_ compares

    def _check_mean(self, written: Tensor) -> None:
        """Raise ``ValueError`` if the mean is not 0 but for chance: five standard errors, and 0.05 for few values."""
        if written.is_meta:
            return
        std, mean = (value.item() for value in torch.std_mean(written.double(), correction=0))
        if abs(mean) > 0.05 + 5 * std / written.numel() ** 0.5:
            raise ValueError(
                f"{self._name}: expected values around {self._offset:g}, got a mean of {mean + self._offset:.2g}; "
                f"{self._name} is computed from a vector, so initialise {self._name}_projection.weight instead"
            )

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the stored weight, or a method of the values."""
        if name.startswith("_"):
            raise AttributeError(name)
        weight: Tensor = getattr(self._holder, self._attribute)
        if name == "data":
            return self
        if name == "requires_grad_" or not callable(getattr(weight, name)):
            return getattr(weight, name)
        values = weight.detach() + self._offset

        def method(*args: Any, **kwargs: Any) -> Any:
            result = getattr(values, name)(*args, **kwargs)
            if result is values:
                self.data = result
                return self
            if isinstance(result, Tensor) and result._is_view():
                self._refuse()
            return result

        return method
