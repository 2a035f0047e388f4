"""The projection discriminator's head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sagan_layers import checks
from sagan_layers.spectral_norm import SNEmbedding, SNLinear
from sagan_layers.torch_support import is_proxy, record_call


class ProjectionDiscriminatorHead(nn.Module):
    r"""D's last layers: a linear layer on pooled features, plus their inner product with a class embedding.

    .. math:: h = \sum_{hw} \mathrm{ReLU}(x_{hw}), \qquad \mathrm{logit} = w \cdot h + b + \langle e_{label}, h \rangle

    Args:
        in_channels: C.
        num_classes: number of classes; None for a head without labels, which has no last term.
        pooling: "sum" over the positions, as the released code does, or "mean".
        spectral_norm: whether the linear layer and the embedding are normalised.
        activation: "relu" before the pooling, or None for networks that have applied their own.
        n_power_iterations, eps, iterate_when_frozen, eps_mode: of spectral normalisation, see
            :class:`~sagan_layers.SNLinear`.
        device, dtype: of the parameters.

    Shape:
        - Input: [N, C, H, W], before the activation (a second ReLU changes nothing);
          with ``activation=None`` after it.
        - Labels: [N], int64 or int32, from 0 to num_classes - 1; None without classes.
        - Output: [N, 1].

    Raises:
        ValueError: for a wrong shape, device or label (on a GPU see
            :func:`~sagan_layers.functional.set_debug_checks`), or labels that are missing or not expected.
        TypeError: for a wrong dtype.

    Note:
        Training updates the vectors of spectral normalisation; otherwise it is the same as evaluation. Derivatives of
        every order.

    Reference:
        Miyato and Koyama, cGANs with Projection Discriminator, section 3.

    Example:
        >>> head = ProjectionDiscriminatorHead(64, num_classes=10)
        >>> head(torch.randn(2, 64, 4, 4), torch.tensor([3, 9])).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int | None,
        pooling: str = "sum",
        spectral_norm: bool = True,
        *,
        activation: str | None = "relu",
        n_power_iterations: int = 1,
        eps: float = 1e-12,
        iterate_when_frozen: bool = True,
        eps_mode: str = "add",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_channels = checks.integer_of("in_channels", in_channels, least=1)
        if num_classes is not None:
            num_classes = checks.integer_of("num_classes", num_classes, least=1)
        checks.check_choice("pooling", pooling, ("sum", "mean"))
        checks.check_choice("activation", activation, ("relu", None))
        (spectral_norm,) = checks.flags_of(spectral_norm=spectral_norm)
        checks.check_parameter_options(device, dtype)
        sn_options = checks.spectral_norm_options(n_power_iterations, eps, iterate_when_frozen, eps_mode)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.pooling = pooling
        self.activation = activation
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        if spectral_norm:
            options |= sn_options
        linear, embedding = (SNLinear, SNEmbedding) if spectral_norm else (nn.Linear, nn.Embedding)
        self.linear: nn.Linear = linear(in_channels, 1, **options)
        self.embedding: nn.Embedding | None = None
        if num_classes is not None:
            self.embedding = embedding(num_classes, in_channels, **options)

    def reset_parameters(self) -> None:
        """Initialise the weights."""
        self.linear.reset_parameters()
        if self.embedding is not None:
            self.embedding.reset_parameters()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the logits of the features x for their labels."""
        if is_proxy(x):
            return record_call(self, x, labels)
        checks.check_input(x, channels=self.in_channels, like=self.linear.weight)
        checks.check_labels(labels, num_classes=self.num_classes, batch=x.size(0), like=self.linear.weight)
        activated = x if self.activation is None else torch.relu(x)
        pooled = activated.sum((2, 3)) if self.pooling == "sum" else activated.mean((2, 3))  # [N, C]
        logits: Tensor = self.linear(pooled)
        if self.embedding is not None:
            logits = logits + (self.embedding(labels) * pooled).sum(1, keepdim=True)
        return logits

    def extra_repr(self) -> str:
        """Return the sizes, the pooling, and the activation if there is none."""
        text = f"{self.in_channels}, num_classes={self.num_classes}, pooling={self.pooling!r}"
        return text if self.activation else f"{text}, activation=None"
