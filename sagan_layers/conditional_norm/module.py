"""Batch norm whose gain and bias depend on a class or on an embedding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn

from sagan_layers import checks
from sagan_layers.conditional_norm import functional
from sagan_layers.conditional_norm.table import CONDITIONAL_BATCH_NORM
from sagan_layers.spectral_norm import SNLinear
from sagan_layers.torch_support import accumulation_dtype, temporary_attribute

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "ConditionalBatchNorm2d",
    "frozen_running_statistics",
    "standing_statistics",
    "synchronize_batch_norm",
]

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)


class ConditionalBatchNorm2d(nn.Module):
    r"""Batch norm with a gain and a bias for each class, or computed from an embedding.

    .. math:: y_{nc} = \mathrm{gain}_c(n)\, \frac{x_{nc} - \mu_c}{\sqrt{\sigma^2_c + \epsilon}} + \mathrm{bias}_c(n)

    The condition is one of three:

    - ``num_classes``: integer labels. ``weight`` and ``bias`` are tables [num_classes, C] that start at 1 and 0.
    - ``condition_features``: a vector for each sample (BigGAN's shared embedding, often with latents). The gain is
      1 + ``weight_projection(vector)``, the bias ``bias_projection(vector)``, both linear without bias.
    - neither: plain batch norm, ``weight`` and ``bias`` [C].

    Args:
        num_features: C.
        num_classes: number of classes, or None.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics; None for a plain average over all batches.
        track_running_stats: whether there are running statistics; without, evaluation uses the batch's.
        condition_features: width of the vectors to condition on, instead of ``num_classes``.
        spectral_norm: whether the two projections of ``condition_features`` are normalised.
        biased_running_var: record the biased variance, as TensorFlow does (and the released code with it);
            torch's batch norm records the unbiased one. Both normalise with the biased one in training.
        activation: "relu" for ReLU of the result, in the same pass over memory; None for nothing.
        backend: which backend computes, see :func:`~sagan_layers.functional.conditional_batch_norm`.
        device, dtype: of the parameters.

    Shape:
        - Input: [N, C, H, W].
        - Condition: labels [N], int64 or int32; or vectors [N, condition_features]; or nothing.
        - Output: [N, C, H, W], in the input's dtype and memory format.

    Raises:
        ValueError: for a wrong shape, device or label (on a GPU see
            :func:`~sagan_layers.functional.set_debug_checks`), a missing condition, a single value per
            channel in training, or arguments that do not fit together.
        TypeError: for a wrong dtype.

    Note:
        In training the batch's mean and biased variance normalise, and the running ones move; in evaluation the
        running ones normalise. Statistics are taken in float32 whatever autocast says. The child ``norm``
        holds the running statistics (as ``norm.running_mean`` and ``norm.running_var`` in the state dict) and
        nothing else. After :func:`synchronize_batch_norm`, or ``nn.SyncBatchNorm.convert_sync_batchnorm``, which
        replaces the child, statistics in training are those of the whole group's batch. Derivatives of every
        order.

    Reference:
        Miyato and Koyama, cGANs with Projection Discriminator; Brock et al., Large Scale GAN Training for High
        Fidelity Natural Image Synthesis (BigGAN), for the shared embedding and standing statistics.

    Example:
        >>> norm = ConditionalBatchNorm2d(64, num_classes=10)
        >>> norm(torch.randn(4, 64, 8, 8), torch.tensor([0, 3, 3, 9])).shape
        torch.Size([4, 64, 8, 8])
        >>> shared = ConditionalBatchNorm2d(64, None, condition_features=128)
        >>> shared(torch.randn(4, 64, 8, 8), torch.randn(4, 128)).shape
        torch.Size([4, 64, 8, 8])
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        *,
        condition_features: int | None = None,
        spectral_norm: bool = False,
        biased_running_var: bool = False,
        activation: str | None = None,
        backend: str = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_sizes(num_features=num_features)
        checks.check_parameter_dtype(dtype)
        checks.check_positive("eps", eps)
        checks.check_activation(activation)
        CONDITIONAL_BATCH_NORM.check_name(backend)
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"momentum: expected None or a number from 0 to 1, got {momentum!r}")
        if num_classes is not None and condition_features is not None:
            raise ValueError("num_classes, condition_features: expected one at most, got both")
        if spectral_norm and condition_features is None:
            raise ValueError("spectral_norm: expected condition_features with it (tables are not normalised)")
        self.num_features = num_features
        self.num_classes = num_classes
        self.condition_features = condition_features
        self.biased_running_var = biased_running_var
        self.activation = activation
        self.backend = backend
        self.norm = nn.BatchNorm2d(
            num_features, eps, momentum, False, track_running_stats, device=device, dtype=dtype
        )
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if condition_features is not None:
            checks.check_sizes(condition_features=condition_features)
            linear = SNLinear if spectral_norm else nn.Linear
            self.weight_projection = linear(
                condition_features, num_features, bias=False, device=device, dtype=dtype
            )
            self.bias_projection = linear(
                condition_features, num_features, bias=False, device=device, dtype=dtype
            )
        else:
            shape: tuple[int, ...] = (num_features,)
            if num_classes is not None:
                checks.check_sizes(num_classes=num_classes)
                shape = (num_classes, num_features)
            self.weight = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self._standing: _StandingStatistics | None = None
        self._synchronized: _SharedBy | None = None
        self._frozen_statistics = False

    @property
    def eps(self) -> float:
        """What is added to the variance."""
        return self.norm.eps

    @property
    def momentum(self) -> float | None:
        """The weight of a batch in the running statistics; None for a plain average."""
        return self.norm.momentum

    def reset_parameters(self) -> None:
        """Set gain to 1 and bias to 0 (or draw the projections anew), and forget the running statistics."""
        self.norm.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)
        else:
            self.weight_projection.reset_parameters()
            self.bias_projection.reset_parameters()

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the normalised x, scaled and shifted for its condition, and ReLU of that if asked."""
        checks.check_input(x, channels=self.num_features, like=self._any_parameter())
        gain, bias = self._gain_and_bias(x, condition)
        if self._standing is not None:
            self._standing.add(x)
            return functional.conditional_batch_norm(
                x, gain, bias, eps=self.norm.eps, activation=self.activation, backend=self.backend
            )
        training = self.norm.training  # the child's, so that code which freezes batch norms freezes this one
        moves = training and not self._frozen_statistics
        reads = moves or not training
        return functional.conditional_batch_norm(
            x,
            gain,
            bias,
            self.norm.running_mean if reads else None,
            self.norm.running_var if reads else None,
            training=training,
            momentum=self._count_batch() if moves else 0.0,
            eps=self.norm.eps,
            biased_running_var=self.biased_running_var,
            process_group=self._process_group() if training else None,
            activation=self.activation,
            backend=self.backend,
        )

    def begin_standing_statistics(self) -> None:
        """Start to gather standing statistics from nothing.

        Until :meth:`end_standing_statistics` every forward normalises by its own batch's statistics, in training
        and in evaluation, and adds its values to the gathered ones; the running statistics stand still.
        :func:`standing_statistics` does this for a whole network.

        Raises:
            ValueError: if the layer has no running statistics to set, or is gathering already.
        """
        if self._standing is not None:
            raise ValueError("standing statistics: expected a layer that is not gathering them already")
        if self.norm.running_mean is None:
            raise ValueError("standing statistics: expected track_running_stats=True")
        self._standing = _StandingStatistics(self.num_features, self.norm.running_mean.device)

    def end_standing_statistics(self, process_group: ProcessGroup | None = None) -> None:
        """Set the running statistics to those of all values gathered since the beginning, each counted once.

        Args:
            process_group: gather over its processes too; by default over all, if torch.distributed runs. All of
                them must call this, and all end with the same numbers.

        Raises:
            ValueError: if nothing was gathered. The running statistics are then as before.
        """
        if self._standing is None:
            raise ValueError("standing statistics: expected begin_standing_statistics first")
        try:
            self._gather_standing_statistics(process_group)
            self._set_standing_statistics()
        finally:
            self._standing = None

    def _gather_standing_statistics(self, process_group: ProcessGroup | None) -> None:
        assert self._standing is not None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._standing.gather(process_group)
        if not self._standing.count:
            raise ValueError(
                "standing statistics: expected at least one forward pass of each layer, got none"
            )

    def _set_standing_statistics(self) -> None:
        standing = self._standing
        assert standing is not None
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        correction = 0 if self.biased_running_var else 1
        self.norm.running_mean.copy_(standing.mean)
        self.norm.running_var.copy_(standing.squares / (standing.count - correction).clamp_min(1))

    def _gain_and_bias(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        batch = x.size(0)
        if self.condition_features is not None:
            if condition is None:
                raise ValueError(
                    f"condition: expected vectors [N, {self.condition_features}] with N = {batch}, got None"
                )
            checks.check_features(
                condition, features=self.condition_features, like=self._any_parameter(), name="condition"
            )
            if condition.shape != (batch, self.condition_features):
                raise ValueError(
                    f"condition: expected [{batch}, {self.condition_features}], got {list(condition.shape)}"
                )
            return 1 + self.weight_projection(condition), self.bias_projection(condition)
        assert self.weight is not None
        assert self.bias is not None
        checks.check_labels(condition, num_classes=self.num_classes, batch=batch, like=self.weight)
        if condition is None:
            return self.weight, self.bias
        return nn.functional.embedding(condition, self.weight), nn.functional.embedding(condition, self.bias)

    def _any_parameter(self) -> Tensor:
        parameter: Tensor | None = (
            self.weight if self.condition_features is None else self.weight_projection.weight
        )
        assert parameter is not None
        return parameter

    def _count_batch(self) -> float | Tensor:
        """Count one more batch and return its weight in the running statistics."""
        if self.norm.num_batches_tracked is None or self.norm.running_mean is None:
            return 0.0
        self.norm.num_batches_tracked.add_(1)
        if self.norm.momentum is not None:
            return self.norm.momentum
        return self.norm.num_batches_tracked.to(self.norm.running_mean.dtype).reciprocal()

    def _process_group(self) -> ProcessGroup | None:
        """Return the group that shares statistics, None where there is none or it does not run."""
        if isinstance(self.norm, nn.SyncBatchNorm):
            group = self.norm.process_group
        elif self._synchronized is not None:
            group = self._synchronized.group
        else:
            return None
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return None
        return group or torch.distributed.group.WORLD

    def extra_repr(self) -> str:
        """Return the sizes and the options that are not in the child's description."""
        condition = (
            f"num_classes={self.num_classes}"
            if self.condition_features is None
            else f"condition_features={self.condition_features}"
        )
        options = [
            text
            for text, is_set in (
                ("biased_running_var=True", self.biased_running_var),
                (f"activation={self.activation!r}", self.activation is not None),
                (f"backend={self.backend!r}", self.backend != "auto"),
            )
            if is_set
        ]
        return ", ".join([str(self.num_features), condition, *options])

    def __getstate__(self) -> dict[str, Any]:
        """Leave half-gathered standing statistics, and the frozen state of a context, out of copies."""
        return self.__dict__ | {"_standing": None, "_frozen_statistics": False}


class _SharedBy:
    """The processes that share statistics. Copies share with the same; in other processes all do, until told again.

    Attributes:
        group: of these processes, None for all.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> _SharedBy:
        return self

    def __reduce__(self) -> tuple[type[_SharedBy], tuple[()]]:
        return type(self), ()


def synchronize_batch_norm(module: _ModuleT, process_group: ProcessGroup | None = None) -> _ModuleT:
    """Let every :class:`ConditionalBatchNorm2d` in ``module`` take its training statistics over several processes.

    What ``nn.SyncBatchNorm.convert_sync_batchnorm`` does to these layers, without replacing anything in them:
    DistributedDataParallel refuses networks on a CPU that hold an ``nn.SyncBatchNorm``. State dicts do not change.
    Torch's own batch norms are left alone.

    Args:
        module: a layer or a network.
        process_group: over whose processes; over all by default. They need not run yet. Copies share with the same
            processes; a group is not pickled, and an unpickled module shares with all until it is given one again.

    Returns:
        ``module`` itself.

    Raises:
        ValueError: if there is no such layer.

    Example:
        >>> norm = synchronize_batch_norm(ConditionalBatchNorm2d(3, num_classes=2))
        >>> norm(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 1, 0])).shape  # alone, it is as before
        torch.Size([4, 3, 8, 8])
    """
    layers = [layer for layer in module.modules() if isinstance(layer, ConditionalBatchNorm2d)]
    if not layers:
        raise ValueError(
            "synchronize_batch_norm: expected a ConditionalBatchNorm2d in the module, found none"
        )
    for layer in layers:
        layer._synchronized = _SharedBy(process_group)
    return module


@contextlib.contextmanager
def frozen_running_statistics(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of every :class:`ConditionalBatchNorm2d` in ``module`` from moving.

    In training the batch's statistics normalise as always; they are not recorded. For passes that must leave no
    trace: the recomputation of activation checkpointing (:func:`~sagan_layers.checkpointed`), or a look at
    samples between two steps. Contexts nest; without such layers nothing happens.

    Args:
        module: a layer or a network.

    Example:
        >>> norm = ConditionalBatchNorm2d(3)
        >>> with frozen_running_statistics(norm):
        ...     _ = norm(torch.randn(4, 3, 8, 8) + 5)
        >>> norm.norm.running_mean.tolist()
        [0.0, 0.0, 0.0]
    """
    layers = [layer for layer in module.modules() if isinstance(layer, ConditionalBatchNorm2d)]
    with temporary_attribute("_frozen_statistics", dict.fromkeys(layers, True)):
        yield


@contextlib.contextmanager
def standing_statistics(module: nn.Module, *, process_group: ProcessGroup | None = None) -> Iterator[None]:
    """Replace the running statistics in ``module`` by those of the passes made inside a ``with`` block.

    Inside, the whole module is in evaluation (spectral normalisation and dropout stand still), while every
    :class:`ConditionalBatchNorm2d` normalises by its batch's statistics and gathers them. At the end the
    running statistics are the mean and variance of all values seen, a larger batch weighing more, over all
    processes if torch.distributed runs; then the training mode is as it was. If the block raises, the running
    statistics are as before. Call under ``torch.no_grad()``.

    Args:
        module: a network with :class:`ConditionalBatchNorm2d` in it.
        process_group: whose processes gather together; all by default.

    Raises:
        ValueError: if there is no such layer, or the module also holds torch batch norms with running
            statistics, which would silently stay as they are; ``ConditionalBatchNorm2d(C)`` replaces those.

    Reference:
        Brock et al., Large Scale GAN Training for High Fidelity Natural Image Synthesis, appendix C.1.

    Example:
        >>> norm = ConditionalBatchNorm2d(3, num_classes=2)
        >>> with torch.no_grad(), standing_statistics(norm):
        ...     for size in (8, 24):
        ...         _ = norm(torch.randn(size, 3, 16, 16) + 5, torch.zeros(size, dtype=torch.long))
        >>> bool((norm.norm.running_mean - 5).abs().max() < 0.1)
        True
    """
    layers = [layer for layer in module.modules() if isinstance(layer, ConditionalBatchNorm2d)]
    own = {layer.norm for layer in layers}
    foreign = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        and layer.track_running_stats
        and layer not in own
    ]
    if not layers or foreign:
        found = f"torch's batch norm at {', '.join(map(repr, foreign))}" if foreign else "none"
        raise ValueError(f"standing statistics: expected ConditionalBatchNorm2d layers alone, got {found}")
    if any(layer._standing is not None for layer in layers):
        raise ValueError("standing statistics: expected layers that are not gathering them already")
    modes = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    try:
        for layer in layers:
            layer.begin_standing_statistics()
        yield
        for layer in layers:
            layer._gather_standing_statistics(process_group)
        for layer in layers:  # all of them, now that nothing can go wrong
            layer._set_standing_statistics()
    finally:
        for layer in layers:
            layer._standing = None
        for inner, training in modes:
            inner.training = training


class _StandingStatistics:
    """Count, mean and sum of squared deviations of each channel, in float64, of all batches added."""

    def __init__(self, num_features: int, device: torch.device) -> None:
        # A tensor, since torch.compile takes numbers for constants.
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.mean)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Add the values of x, [N, C, H, W]."""
        var, mean = torch.var_mean(x.to(accumulation_dtype(x.dtype)), (0, 2, 3), correction=0)
        if x.numel() == 0:
            return
        count = self.count.new_full((), x.numel() // x.size(1))
        self._merge(count, mean.double(), var.double() * count)

    @torch.no_grad()
    def gather(self, process_group: ProcessGroup | None) -> None:
        """Merge those of all processes, in the same order everywhere."""
        mine = torch.cat([self.count[None], self.mean, self.squares])
        theirs = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(process_group))]
        torch.distributed.all_gather(theirs, mine, group=process_group)
        self.__init__(self.mean.numel(), self.mean.device)  # type: ignore[misc]
        for part in theirs:
            mean, squares = part[1:].chunk(2)
            if part[0]:
                self._merge(part[0], mean, squares)

    def _merge(self, count: Tensor, mean: Tensor, squares: Tensor) -> None:
        total = self.count + count
        difference = mean - self.mean
        self.mean = self.mean + difference * (count / total)
        self.squares = self.squares + squares + difference.square() * (self.count * count / total)
        self.count = total
