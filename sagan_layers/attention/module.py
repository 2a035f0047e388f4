"""Self-attention over the positions of a feature map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sagan_layers import checks
from sagan_layers.attention import functional
from sagan_layers.attention.reference import ProjectionLayers, ProjectionWeights, positions
from sagan_layers.attention.table import SELF_ATTENTION_2D
from sagan_layers.spectral_norm import SNConv2d, frozen_spectral_norm
from sagan_layers.torch_support import is_proxy, record_call

__all__ = ["SelfAttention2d"]


class SelfAttention2d(nn.Module):
    r"""Self-attention of SAGAN: every position gathers from all others, added to the input.

    .. math:: y = x + \gamma\, W_o\, \mathrm{attention}(W_q x,\; \mathrm{pool}(W_k x),\; \mathrm{pool}(W_v x))

    The four W are 1x1 convolutions, ``query``, ``key``, ``value`` and ``out``; attention is
    :func:`sagan_layers.functional.attention` over the positions, without a scale on the logits. ``gamma``
    starts at 0, so a new layer returns its input bit for bit (as long as the gathered values are finite).

    The defaults are those of the released code. Other forms in use:

    ============================  =====================================================================
    form                          arguments
    ============================  =====================================================================
    released code, BigGAN         (defaults)
    paper (ICML)                  ``pool_size=1, value_channels=in_channels // 8``
    first arXiv version           ``pool_size=1, output_projection=False``
    with biases, no output conv   ``pool_size=1, output_projection=False, bias=True``
    ============================  =====================================================================

    Args:
        in_channels: C.
        key_channels: channels of query and key; C // 8, at least 1, by default.
        value_channels: channels of the value; C // 2, at least 1, by default. Without an output projection it must
            be C.
        pool_size: side and stride of the max-pool over keys and values; 1 for none. Incomplete windows at the
            border are dropped, as with TensorFlow's 'VALID'.
        output_projection: whether there is a last 1x1 convolution, value_channels -> C.
        bias: whether the 1x1 convolutions have biases.
        spectral_norm: whether they are :class:`~sagan_layers.SNConv2d` instead of ``nn.Conv2d``.
        residual: whether the input is added; if not, the output is gamma times the gathered values, 0 at the start.
        gamma_init: where gamma starts, at most 65504 (float16's largest) in size.
        backend: "auto" or a backend of :func:`sagan_layers.functional.self_attention_2d`.
        n_power_iterations, eps, iterate_when_frozen, eps_mode: as for :class:`~sagan_layers.SNConv2d`; ignored
            without ``spectral_norm``.
        device, dtype: of the parameters.

    Shape:
        - Input: [N, C, H, W], H and W at least ``pool_size``.
        - Output: [N, C, H, W], in the input's dtype and memory format.

    Raises:
        ValueError: for a wrong rank, number of channels, size or device, or arguments that contradict each other.
        TypeError: for a wrong dtype.

    Note:
        The same in training and evaluation, except that training updates the vectors of spectral normalisation.
        Logits and softmax are accumulated in float32, also under autocast. Derivatives of every order.

    Reference:
        Zhang et al., Self-Attention Generative Adversarial Networks, section 3; the released code for the
        pooling, the widths and the output projection.

    Example:
        >>> attention = SelfAttention2d(64)
        >>> x = torch.randn(2, 64, 16, 16)
        >>> torch.equal(attention(x), x)
        True
    """

    def __init__(
        self,
        in_channels: int,
        *,
        key_channels: int | None = None,
        value_channels: int | None = None,
        pool_size: int = 2,
        output_projection: bool = True,
        bias: bool = False,
        spectral_norm: bool = True,
        residual: bool = True,
        gamma_init: float = 0.0,
        backend: str = "auto",
        n_power_iterations: int = 1,
        eps: float = 1e-12,
        iterate_when_frozen: bool = True,
        eps_mode: str = "add",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_channels, pool_size = checks.sizes_of(in_channels=in_channels, pool_size=pool_size)
        output_projection, bias, spectral_norm, residual = checks.flags_of(
            output_projection=output_projection, bias=bias, spectral_norm=spectral_norm, residual=residual
        )
        options = checks.spectral_norm_options(n_power_iterations, eps, iterate_when_frozen, eps_mode)
        gamma_init = checks.number_of("gamma_init", gamma_init, least=-65504, most=65504)  # of float16
        if key_channels is None:
            key_channels = max(1, in_channels // 8)
        if value_channels is None:
            value_channels = max(1, in_channels // 2) if output_projection else in_channels
        key_channels, value_channels = checks.sizes_of(
            key_channels=key_channels, value_channels=value_channels
        )
        if not output_projection and value_channels != in_channels:
            raise ValueError(
                f"value_channels: expected in_channels = {in_channels} without an output projection, "
                f"got {value_channels}"
            )
        SELF_ATTENTION_2D.check_name(backend)
        checks.check_parameter_options(device, dtype)

        def conv1x1(inputs: int, outputs: int) -> nn.Conv2d:
            if not spectral_norm:
                return nn.Conv2d(inputs, outputs, 1, bias=bias, device=device, dtype=dtype)
            return SNConv2d(inputs, outputs, 1, bias=bias, device=device, dtype=dtype, **options)

        self.in_channels = in_channels
        self.key_channels = key_channels
        self.value_channels = value_channels
        self.pool_size = pool_size
        self.residual = residual
        self.gamma_init = gamma_init
        self.backend = backend
        self.query = conv1x1(in_channels, key_channels)
        self.key = conv1x1(in_channels, key_channels)
        self.value = conv1x1(in_channels, value_channels)
        self.out = conv1x1(value_channels, in_channels) if output_projection else nn.Identity()
        self.gamma = nn.Parameter(torch.full((), gamma_init, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Initialise the convolutions' weights again and set gamma back to ``gamma_init``."""
        for layer in (self.query, self.key, self.value, self.out):
            if isinstance(layer, nn.Conv2d):
                layer.reset_parameters()
        nn.init.constant_(self.gamma, self.gamma_init)

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus gamma times the attention output, or the second term alone."""
        if is_proxy(x):
            return record_call(self, x)
        self._check_input(x)
        projections = _weights_or_layers(self.query, self.key, self.value, self.out)
        return functional.self_attention_of_projections(
            x,
            projections,
            self.gamma,
            pool_size=self.pool_size,
            residual=self.residual,
            backend=self.backend,
        )

    def attention_weights(
        self, x: Tensor, queries: Tensor | Sequence[tuple[int, int]], *, key_grid: bool = True
    ) -> Tensor:
        """Return where chosen query points look: the weight of every key for each of them.

        Memory is linear in the number of points; the full L x S matrix is not built. The vectors of spectral
        normalisation are not updated.

        Args:
            x: [N, C, H, W].
            queries: (row, column) of each query point: a sequence of pairs or an integer tensor, [Q, 2] for the
                same points in every image or [N, Q, 2].
            key_grid: whether the keys are returned as a grid; else as one axis in row-major order.

        Shape:
            - Output: [N, Q, H // pool_size, W // pool_size], or [N, Q, S] without ``key_grid``; float32
              (float64 for float64 modules); each map sums to one.

        Raises:
            ValueError: for a wrong shape or a point outside the feature map.
            TypeError: for points that are not integers.

        Example:
            >>> attention = SelfAttention2d(64)
            >>> maps = attention.attention_weights(torch.randn(2, 64, 16, 16), [(0, 0), (8, 8), (15, 3)])
            >>> maps.shape
            torch.Size([2, 3, 8, 8])
        """
        self._check_input(x)
        (key_grid,) = checks.flags_of(key_grid=key_grid)
        height, width = x.shape[2:]
        try:
            points = torch.as_tensor(queries, device=x.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"queries: expected pairs of integers, got {checks.shown(queries)}") from error
        checks.check_integers("queries", points)
        if points.dim() == 2:
            points = points.expand(x.size(0), -1, -1)
        if points.dim() != 3 or points.shape[::2] != (x.size(0), 2):
            raise ValueError(
                f"queries: expected [Q, 2] or [N, Q, 2] with N = {x.size(0)}, got {list(points.shape)}"
            )
        checks.check_indices("queries (row)", points[..., 0], upper=height, like=self.gamma)
        checks.check_indices("queries (column)", points[..., 1], upper=width, like=self.gamma)
        with frozen_spectral_norm(self):
            query = positions(self.query(x))  # [N, L, E]
            key = self._pool(self.key(x))
        flat = (points[..., 0] * width + points[..., 1]).long()  # [N, Q]
        chosen = query.gather(1, flat.unsqueeze(-1).expand(-1, -1, query.size(2)))  # [N, Q, E]
        weights = functional.attention_weights(chosen, positions(key))
        return weights.view(*weights.shape[:2], *key.shape[2:]) if key_grid else weights

    def extra_repr(self) -> str:
        """Return the sizes and options that the layers do not show."""
        text = f"{self.in_channels}, pool_size={self.pool_size}, backend={self.backend!r}"
        return text if self.residual else f"{text}, residual=False"

    def _pool(self, features: Tensor) -> Tensor:
        if self.pool_size == 1:
            return features
        return nn.functional.max_pool2d(features, self.pool_size)

    def _check_input(self, x: Tensor) -> None:
        checks.check_input(x, channels=self.in_channels, like=self.gamma)
        if min(x.shape[2:]) < self.pool_size:
            raise ValueError(
                f"input: expected height and width of at least pool_size = {self.pool_size}, "
                f"got {list(x.shape)}; SelfAttention2d(..., pool_size=1) takes maps of any size"
            )


def _weights_or_layers(
    query: nn.Module, key: nn.Module, value: nn.Module, out: nn.Module
) -> ProjectionWeights | ProjectionLayers:
    """Return the projections' weights if they are plain 1x1 convolutions, which can be fused; else the layers.

    A layer that was replaced or parametrized, or that has hooks, must be called.
    """
    layers = query, key, value, out
    if not (all(_is_pointwise(layer) for layer in layers[:3]) and (_is_pointwise(out) or _is_identity(out))):
        return layers
    weights: list[Any] = [
        layer.normalized_weight() if isinstance(layer, SNConv2d) else getattr(layer, "weight", None)
        for layer in layers
    ]
    return ProjectionWeights(*weights, *[getattr(layer, "bias", None) for layer in layers])


def _is_pointwise(layer: nn.Module) -> bool:
    """Whether the layer is a plain 1x1 convolution without hooks."""
    return (
        type(layer) in (nn.Conv2d, SNConv2d)
        and isinstance(layer, nn.Conv2d)
        and layer.kernel_size == layer.stride == (1, 1)
        and layer.padding == (0, 0)
        and layer.groups == 1
        and not (isinstance(layer, SNConv2d) and layer.resamples)
        and not _has_hooks(layer)
    )


def _is_identity(layer: nn.Module) -> bool:
    return type(layer) is nn.Identity and not _has_hooks(layer)


def _has_hooks(layer: nn.Module) -> bool:
    return bool(
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    )
