"""Load weights of the released TensorFlow code (brain-research/self-attention-gan).

The weights are a mapping from variable name to array, read from a checkpoint by any means; TensorFlow is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from sagan_layers.attention import SelfAttention2d
from sagan_layers.checks import check_type, pair_of, shown
from sagan_layers.conditional_norm import ConditionalBatchNorm2d
from sagan_layers.gan import ProjectionDiscriminatorHead
from sagan_layers.spectral_norm import SpectralNormLayer

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["TensorFlowLoader", "load_tensorflow"]


def load_tensorflow(module: nn.Module, variables: Mapping[str, ArrayLike | Tensor], scope: str = "") -> None:
    """Load the released TensorFlow code's variables of one block into its module here.

    ==================================  =====================================================================
    module                              variables below ``scope``
    ==================================  =====================================================================
    ``SNConv2d``, ``nn.Conv2d``         ``w`` [kh, kw, in, out], ``u`` [1, out], ``biases`` [out]
    ``SNConvTranspose2d``               ``w`` [kh, kw, out, in], ``u`` [1, out], ``biases`` [out]
    ``SNLinear``, ``nn.Linear``         ``Matrix`` [in, out], ``u`` [1, out], ``bias`` [out]
    ``SNEmbedding``, ``nn.Embedding``   ``embedding_map`` [n, d], ``u`` [1, n]
    ``ConditionalBatchNorm2d``          ``gamma``, ``beta`` [n, C], ``mean``, ``var`` [1, 1, 1, C]
    the same without classes            ``gamma``, ``beta``, ``moving_mean``, ``moving_variance`` [C]
    ``SelfAttention2d``                 ``sn_conv_theta``, ``_phi``, ``_g``, ``_attn``; ``sigma_ratio`` []
    ``ProjectionDiscriminatorHead``     ``d_sn_linear``, ``d_embedding``
    ==================================  =====================================================================

    Layers without spectral normalisation have no ``u``, those without bias no ``biases``. TensorFlow stores no
    right vector; v is set to fit: v = W^T u / ||W^T u||. A ":0" at the end of a name is ignored. For whole
    networks compose a :class:`TensorFlowLoader`.

    Args:
        module: one of the blocks above.
        variables: arrays by TensorFlow variable name.
        scope: only names below it ("attention" for "attention/sigma_ratio") are read; "" for all.

    Raises:
        ValueError: if variables are missing, left over below the scope, or of the wrong shape; all are named,
            and the module is as before.
        TypeError: if the module is none of the blocks.

    Example:
        >>> from sagan_layers import SNLinear
        >>> linear = SNLinear(3, 2)
        >>> matrix = np.arange(6.0).reshape(3, 2)
        >>> load_tensorflow(linear, {"l/Matrix": matrix, "l/bias": np.ones(2), "l/u": [[1.0, 0.0]]}, scope="l")
        >>> linear.weight
        Parameter containing:
        tensor([[0., 2., 4.],
                [1., 3., 5.]], requires_grad=True)
    """
    loader = TensorFlowLoader(variables, scope)
    loader.add(module, "")
    loader.finish()


class TensorFlowLoader:
    """Loads TensorFlow variables into several blocks at once: all of them, or, after an error, none.

    Args:
        variables: arrays by TensorFlow variable name.
        scope: only names below it are read; "" for all.

    Example:
        >>> from sagan_layers import SNLinear
        >>> first, second = SNLinear(3, 2, bias=False), SNLinear(2, 1, bias=False)
        >>> loader = TensorFlowLoader(
        ...     {
        ...         "model/a/Matrix": np.ones((3, 2)),
        ...         "model/a/u": np.ones((1, 2)),
        ...         "model/b/Matrix": np.ones((2, 1)),
        ...         "model/b/u": np.ones((1, 1)),
        ...     },
        ...     scope="model",
        ... )
        >>> loader.add(first, "a")
        >>> loader.add(second, "b")
        >>> loader.finish()
    """

    def __init__(self, variables: Mapping[str, ArrayLike | Tensor], scope: str = "") -> None:
        check_type("variables", variables, Mapping, "a mapping from names to arrays")
        for name in variables:
            check_type("variables", name, str, "strings as keys")
        check_type("scope", scope, str, "a string")
        prefix = f"{scope.strip('/')}/" if scope else ""
        self._scope = prefix
        self._remaining = {
            name.removesuffix(":0")[len(prefix) :]: value
            for name, value in variables.items()
            if name.startswith(prefix)
        }
        self._missing: list[str] = []
        self._misshapen: list[str] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._right_vectors: list[SpectralNormLayer] = []

    def add(self, module: nn.Module, name: str, *, spatial: tuple[int, int] | None = None) -> None:
        """Assign the variables below ``name`` to ``module``; nothing is copied before :meth:`finish`.

        Args:
            module: a block that :func:`load_tensorflow` knows.
            name: the block's scope, below the loader's.
            spatial: for a linear layer whose output TensorFlow reshapes to [height, width, channels]: (height,
                width). Its outputs are reordered to [channels, height, width].

        Raises:
            TypeError: if the module is none of the blocks.
        """
        check_type("name", name, str, "a string")
        if spatial is not None:
            spatial = pair_of("spatial", spatial, least=1)
        prefix = f"{name}/" if name else ""
        if isinstance(module, SelfAttention2d):
            for part, layer in (
                ("theta", module.query),
                ("phi", module.key),
                ("g", module.value),
                ("attn", module.out),
            ):
                if not isinstance(layer, nn.Identity):
                    self.add(layer, f"{prefix}sn_conv_{part}")
            self._take(f"{prefix}sigma_ratio", module.gamma)
        elif isinstance(module, ProjectionDiscriminatorHead):
            self.add(module.linear, f"{prefix}d_sn_linear")
            if module.embedding is not None:
                self.add(module.embedding, f"{prefix}d_embedding")
        elif isinstance(module, ConditionalBatchNorm2d) and module.condition_features is None:
            self._take(f"{prefix}gamma", module.weight)
            self._take(f"{prefix}beta", module.bias)
            self._take_statistics(prefix, module)
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            self._take(f"{prefix}w", module.weight, axes=(2, 3, 1, 0))
            self._take_bias_and_u(prefix, "biases", module, None)
        elif isinstance(module, nn.Linear):
            if spatial is not None and module.out_features % (spatial[0] * spatial[1]):
                raise ValueError(
                    f"spatial: expected height and width of {module.out_features} outputs, got {spatial}"
                )
            self._take(f"{prefix}Matrix", module.weight, axes=(1, 0), spatial=spatial)
            self._take_bias_and_u(prefix, "bias", module, spatial)
        elif isinstance(module, nn.Embedding):
            self._take(f"{prefix}embedding_map", module.weight)
            self._take_bias_and_u(prefix, "", module, None)
        else:
            raise TypeError(f"no TensorFlow variables are known for {type(module).__name__} at {name!r}")

    @torch.no_grad()
    def finish(self) -> None:
        """Copy everything that was added into its modules, after checking that all of it fits.

        Raises:
            ValueError: if variables are missing, left over or of the wrong shape.
        """
        problems = {
            "missing": self._missing,
            "left over": [self._scope + name for name in self._remaining],
            "of the wrong shape": self._misshapen,
        }
        text = "; ".join(f"{title}: {', '.join(names)}" for title, names in problems.items() if names)
        if text:
            raise ValueError(f"TensorFlow variables do not fit; {text}")
        for target, source in self._copies:
            target.copy_(source)
        for layer in self._right_vectors:
            layer.reset_right_vector()

    def _take_bias_and_u(
        self, prefix: str, bias_name: str, module: nn.Module, spatial: tuple[int, int] | None
    ) -> None:
        bias = getattr(module, "bias", None)
        if bias is not None:
            self._take(f"{prefix}{bias_name}", bias, spatial=spatial)
        if isinstance(module, SpectralNormLayer):
            self._take(f"{prefix}u", module.weight_u, leading_ones=1, spatial=spatial)
            self._right_vectors.append(module)

    def _take_statistics(self, prefix: str, module: ConditionalBatchNorm2d) -> None:
        conditional = module.num_classes is not None
        for name, target in (
            ("mean" if conditional else "moving_mean", module.norm.running_mean),
            ("var" if conditional else "moving_variance", module.norm.running_var),
        ):
            if target is not None:
                self._take(f"{prefix}{name}", target, leading_ones=3 if conditional else 0)

    def _take(
        self,
        name: str,
        target: Tensor,
        *,
        axes: tuple[int, ...] | None = None,
        leading_ones: int = 0,
        spatial: tuple[int, int] | None = None,
    ) -> None:
        """Plan a copy into ``target``; ``axes`` are the target's axes in TensorFlow's order."""
        if name not in self._remaining:
            self._missing.append(self._scope + name)
            return
        array = self._remaining.pop(name)
        values: NDArray[np.floating] = _numbers(self._scope + name, array)
        order = axes or tuple(range(target.dim()))
        expected = (1,) * leading_ones + tuple(target.size(axis) for axis in order)
        if values.shape != expected:
            self._misshapen.append(
                f"{self._scope}{name} (expected {list(expected)}, got {list(values.shape)})"
            )
            return
        values = values.reshape(expected[leading_ones:])
        if spatial is not None:  # the last axis from (h, w, c) to (c, h, w)
            grid = values.reshape(*values.shape[:-1], *spatial, -1)
            values = np.moveaxis(grid, -1, -3).reshape(values.shape)
        self._copies.append((target, torch.tensor(values.transpose(*np.argsort(order)))))


def _numbers(name: str, array: ArrayLike | Tensor) -> NDArray[np.floating]:
    """Return an array's values, those of bfloat16 widened."""
    try:
        if isinstance(array, Tensor):
            array = array.detach().cpu()
            array = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
        return np.asarray(array).astype(np.float64, casting="same_kind")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected an array of numbers, got {shown(array)}") from error
