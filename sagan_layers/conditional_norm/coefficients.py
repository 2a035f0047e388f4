"""What code that walks over a network, to initialise or to freeze it, finds as a batch norm's gain and bias."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn


class RunningStatistics(nn.BatchNorm2d):
    """The running statistics of a conditional batch norm: a torch batch norm without parameters of its own.

    ``isinstance(module, nn.BatchNorm2d)`` finds it, and its ``weight`` and ``bias`` are those of the layer around it.
    """

    def show(self, owner: nn.Module) -> None:
        """Show the gain and bias of the layer around this one."""
        self.__dict__["_owner"] = weakref.ref(owner)

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """The gain of the layer around this one; None without such a layer."""
        return self._shown("weight")

    @property
    def bias(self) -> Any:  # type: ignore[override]
        """The bias of the layer around this one; None without such a layer."""
        return self._shown("bias")

    def _shown(self, name: str) -> Any:
        reference = self.__dict__.get("_owner")
        owner = None if reference is None else reference()
        if owner is None:
            return super().__getattr__(name)
        return getattr(owner, name)

    def extra_repr(self) -> str:
        """Return the options of the statistics."""
        return f"eps={self.eps}, momentum={self.momentum}, track_running_stats={self.track_running_stats}"

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies; the copied layer around this one shows itself again."""
        return {name: value for name, value in self.__dict__.items() if name != "_owner"}


class ProjectedCoefficients:
    """The gains or biases of a projection, for initialisers: its weight plus the gain of a vector of zeros.

    What is written into it in place goes to the projection, so ``nn.init.normal_(layer.weight.data, 1, 0.02)`` draws
    gains around 1. It is not a tensor, and an optimizer refuses it: the parameter is the projection's weight.
    """

    def __init__(self, projection: nn.Module, offset: float) -> None:
        self._projection = projection
        self._offset = offset

    @property
    def _weight(self) -> Tensor:
        weight: Tensor = self._projection.weight  # type: ignore[assignment]
        return weight

    @property
    def data(self) -> ProjectedCoefficients:
        """This object itself."""
        return self

    @data.setter
    def data(self, values: Tensor) -> None:
        with torch.no_grad():
            self._weight.copy_(values - self._offset)

    @property
    def requires_grad(self) -> bool:
        """Whether the projection's weight is trained."""
        return self._weight.requires_grad

    @requires_grad.setter
    def requires_grad(self, requires_grad: bool) -> None:
        self._weight.requires_grad_(requires_grad)

    def requires_grad_(self, requires_grad: bool = True) -> ProjectedCoefficients:
        """Choose whether the projection's weight is trained."""
        self.requires_grad = requires_grad
        return self

    def detach(self) -> ProjectedCoefficients:
        """Return this object itself, which has no graph."""
        return self

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the values, or a method that also writes what it changes to the projection."""
        if name.startswith("__") or name in ("_projection", "_offset"):
            raise AttributeError(name)
        attribute = getattr(Tensor, name)
        if not callable(attribute):
            return getattr(self._weight, name)
        return lambda *args, **kwargs: self.__torch_function__(attribute, (), (self, *args), kwargs)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch with the values; write what it changes to the projection."""
        found: dict[ProjectedCoefficients, Tensor] = {}

        def values_of(argument: Any) -> Any:
            if not isinstance(argument, cls):
                return argument
            if argument not in found:
                found[argument] = argument._weight.detach() + argument._offset
            return found[argument]

        named = {name: values_of(argument) for name, argument in (kwargs or {}).items()}
        result = function(*map(values_of, args), **named)
        for coefficients, values in found.items():
            if values._version:
                coefficients.data = values
            if result is values:
                return coefficients
            if isinstance(result, Tensor) and result._is_view():
                raise TypeError("coefficients of a projection have no views; use the projection's weight")
        return result
