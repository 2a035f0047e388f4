"""Batch norm whose gain and bias depend on a class or on an embedding."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed
from torch import Tensor, nn

from sagan_layers import checks
from sagan_layers.conditional_norm import functional
from sagan_layers.conditional_norm.coefficients import ComputedCoefficients, RunningStatistics, check_fusion
from sagan_layers.conditional_norm.statistics import StandingStatistics, SynchronizedStatistics
from sagan_layers.conditional_norm.table import CONDITIONAL_BATCH_NORM
from sagan_layers.spectral_norm import SNLinear
from sagan_layers.torch_support import is_proxy, record_call

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ConditionalBatchNorm2d(nn.Module):
    r"""Batch norm with a gain and a bias for each class, or computed from an embedding.

    .. math:: y_{nc} = \mathrm{gain}_c(n)\, \frac{x_{nc} - \mu_c}{\sqrt{\sigma^2_c + \epsilon}} + \mathrm{bias}_c(n)

    The condition is one of three:

    - ``num_classes``: integer labels. The gain is ``gain_offset + weight[label]``, the bias ``bias[label]``; both are
      tables [num_classes, C]. Gains start at 1, biases at 0.
    - ``condition_features``: a vector for each sample (BigGAN's shared embedding, often with latents). The gain is
      1 + ``weight_projection(vector)``, the bias ``bias_projection(vector)``, both linear without bias.
    - neither: plain batch norm, ``weight`` and ``bias`` [C].

    Args:
        num_features: C.
        num_classes: number of classes, or None.
        eps: added to the variance, from 1e-37 to 1.
        momentum: weight of a batch in the running statistics; None for the average over all batches.
        track_running_stats: whether there are running statistics; without them evaluation uses the batch's.
        gain_offset: added to the table of gains, which starts at 1 - ``gain_offset``. 1.0 for tables as in
            BigGAN-PyTorch and mmgeneration. Only with ``num_classes``.
        condition_features: width of the vectors to condition on, instead of ``num_classes``.
        spectral_norm: whether the two projections of ``condition_features`` are normalised.
        n_power_iterations, sn_eps, iterate_when_frozen, sn_eps_mode: of the normalised projections, see
            :class:`~sagan_layers.SNLinear`.
        biased_running_var: record the biased variance, as TensorFlow and the released code do; torch's batch norm
            records the unbiased one. Both normalise with the biased one in training.
        activation: "relu" to apply ReLU in the same pass over memory, or None.
        backend: see :func:`~sagan_layers.functional.conditional_batch_norm`.
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
        Training normalises by the batch's mean and biased variance and updates the running ones; evaluation
        normalises by the running ones. Statistics are computed in float32, also under autocast. The child ``norm``
        contains only the running statistics (``norm.running_mean`` and ``norm.running_var`` in the state dict). After
        :func:`synchronize_batch_norm`, or ``nn.SyncBatchNorm.convert_sync_batchnorm``, which replaces the child,
        training takes statistics over the whole group's batch. Derivatives of every order. Without a condition
        ``load_state_dict`` also takes the keys of ``nn.BatchNorm2d``.

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
        gain_offset: float = 0.0,
        condition_features: int | None = None,
        spectral_norm: bool = False,
        n_power_iterations: int = 1,
        sn_eps: float = 1e-12,
        iterate_when_frozen: bool = True,
        sn_eps_mode: str = "add",
        biased_running_var: bool = False,
        activation: str | None = None,
        backend: str = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_features = checks.integer_of("num_features", num_features, least=1)
        track_running_stats, spectral_norm, biased_running_var = checks.flags_of(
            track_running_stats=track_running_stats,
            spectral_norm=spectral_norm,
            biased_running_var=biased_running_var,
        )
        eps = checks.eps_of(eps)
        sn_options = checks.spectral_norm_options(
            n_power_iterations, sn_eps, iterate_when_frozen, sn_eps_mode, prefix="sn_"
        )
        if momentum is not None:
            momentum = checks.number_of("momentum", momentum, least=0, most=1)
        checks.check_choice("activation", activation, (None, "relu"))
        CONDITIONAL_BATCH_NORM.check_name(backend)
        checks.check_parameter_options(device, dtype)
        if num_classes is not None:
            num_classes = checks.integer_of("num_classes", num_classes, least=1)
        if condition_features is not None:
            condition_features = checks.integer_of("condition_features", condition_features, least=1)
        if num_classes is not None and condition_features is not None:
            raise ValueError("num_classes, condition_features: expected one at most, got both")
        if spectral_norm and condition_features is None:
            raise ValueError("spectral_norm: expected condition_features with it (tables are not normalised)")
        gain_offset = checks.number_of("gain_offset", gain_offset, least=-65504, most=65504)  # of float16
        if gain_offset and num_classes is None:
            raise ValueError(
                f"gain_offset: expected num_classes with it (a vector's gain is 1 + its projection), got {gain_offset}"
            )
        self.num_features = num_features
        self.gain_offset = gain_offset
        self.num_classes = num_classes
        self.condition_features = condition_features
        self.biased_running_var = biased_running_var
        self.activation = activation
        self.backend = backend
        self.norm: nn.BatchNorm2d = RunningStatistics(
            num_features, eps, momentum, False, track_running_stats, device=device, dtype=dtype
        )
        self.weight: Any  # nn.Parameter or ComputedCoefficients
        self.bias: Any
        if condition_features is not None:
            linear = SNLinear if spectral_norm else nn.Linear
            sizes = condition_features, num_features, False
            options = {"device": device, "dtype": dtype, **(sn_options if spectral_norm else {})}
            self.weight_projection = linear(*sizes, **options)
            self.bias_projection = linear(*sizes, **options)
        else:
            shape: tuple[int, ...] = (num_features,)
            if num_classes is not None:
                shape = (num_classes, num_features)
            start = torch.full(shape, 1.0 - gain_offset, device=device, dtype=dtype)
            self.weight = nn.Parameter(start)
            self.bias = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self._show_coefficients()
        self._standing: StandingStatistics | None = None
        self._synchronized: SynchronizedStatistics | None = None
        self._frozen_statistics = False

    def _show_coefficients(self) -> None:
        """Let code that walks over a network find gain and bias, here and at the child."""
        if self.condition_features is not None:
            for name, offset in (("weight", 1.0), ("bias", 0.0)):
                holder = getattr(self, f"{name}_projection")
                setattr(self, name, ComputedCoefficients(name, holder, "weight", offset, projected=True))
        elif self.gain_offset:
            shown = ComputedCoefficients("weight", self, "_table", self.gain_offset, projected=False)
            self.__dict__["weight"] = shown  # where the parameter would be found; its name stays
        if isinstance(self.norm, RunningStatistics):
            self.norm.owner = weakref.ref(self)

    def __setattr__(self, name: str, value: Any) -> None:
        """As ``nn.Module``; but computed gains and biases cannot be replaced by a parameter."""
        if name in ("weight", "bias") and isinstance(value, Tensor) and self.condition_features is not None:
            raise TypeError(f"{name}: expected no parameter (it is computed), set {name}_projection.weight")
        super().__setattr__(name, value)
        if name == "weight" and isinstance(value, nn.Parameter) and self.gain_offset:
            self._show_coefficients()

    @property
    def _table(self) -> Tensor:
        """The parameter of gains, less the offset; without one ``weight``, which may be parametrized."""
        return cast("Tensor", self._parameters["weight"] if self.gain_offset else self.weight)

    @property
    def eps(self) -> float:
        """The number added to the variance."""
        return self.norm.eps

    @property
    def running_mean(self) -> Tensor | None:
        """The running mean of the child, for ``torch.nn.utils.fuse_conv_bn_eval``."""
        return check_fusion(self).norm.running_mean  # type: ignore[no-any-return]

    @property
    def running_var(self) -> Tensor | None:
        """The running variance of the child."""
        return self.norm.running_var

    @property
    def momentum(self) -> float | None:
        """The weight of a batch in the running statistics; None for the average over all."""
        return self.norm.momentum

    def reset_parameters(self) -> None:
        """Set gain to 1 and bias to 0 (or initialise the projections), and reset the running statistics."""
        self.norm.reset_running_stats()
        if self.condition_features is not None:
            self.weight_projection.reset_parameters()
            self.bias_projection.reset_parameters()
        else:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return x normalised, scaled and shifted for its condition."""
        if is_proxy(x):
            return record_call(self, x, condition)
        checks.check_input(x, channels=self.num_features, like=self._any_parameter())
        gain, bias = self._gain_and_bias(x, condition)
        running_mean, running_var, momentum = self._running_statistics(x)
        y = functional.conditional_batch_norm(
            x,
            gain,
            bias,
            running_mean,
            running_var,
            training=self.norm.training,  # the child's, so that freezing a network's batch norms reaches this one
            momentum=momentum,
            eps=self.norm.eps,
            biased_running_var=self.biased_running_var,
            process_group=self._process_group(),
            activation=self.activation,
            backend=self.backend,
        )
        if self.norm.training and running_mean is not None and self.norm.num_batches_tracked is not None:
            self.norm.num_batches_tracked.add_(1)
        return y

    def begin_standing_statistics(self) -> None:
        """Start to gather standing statistics.

        Until :meth:`end_standing_statistics` every forward normalises by its batch's statistics, in training and in
        evaluation, and adds its values to the gathered ones; the running statistics do not change.
        :func:`standing_statistics` does this for a whole network.

        Raises:
            ValueError: if the layer has no running statistics to set, or is gathering already.
        """
        if self._standing is not None:
            raise ValueError("standing statistics: expected a layer that is not gathering them already")
        if self.norm.running_mean is None:
            raise ValueError("standing statistics: expected track_running_stats=True")
        self._standing = StandingStatistics(self.num_features, self.norm.running_mean.device)

    def end_standing_statistics(self, process_group: ProcessGroup | None = None) -> None:
        """Set the running statistics to those of all gathered values, each counted once.

        Args:
            process_group: gather over its processes too; by default over all, if torch.distributed runs. All of
                them must call this, and all end with the same numbers.

        Raises:
            ValueError: if nothing was gathered. The running statistics then do not change.
        """
        if self._standing is None:
            raise ValueError("standing statistics: expected begin_standing_statistics first")
        checks.check_process_group(process_group)
        try:
            self._standing.gather(process_group)
            self._set_standing_statistics()
        finally:
            self._standing = None

    def _set_standing_statistics(self) -> None:
        assert self._standing is not None
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        self.norm.running_mean.copy_(self._standing.mean)
        self.norm.running_var.copy_(self._standing.var(correction=0 if self.biased_running_var else 1))

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
                    f"condition: expected [{batch}, {self.condition_features}], got {checks.shape_of(condition)}"
                )
            return 1 + self.weight_projection(condition), self.bias_projection(condition)
        checks.check_labels(condition, num_classes=self.num_classes, batch=batch, like=self._table)
        if condition is None:
            return self.weight, self.bias
        gain, bias = (nn.functional.embedding(condition, table) for table in (self._table, self.bias))
        return (self.gain_offset + gain if self.gain_offset else gain), bias

    def _any_parameter(self) -> Tensor:
        return self._table if self.condition_features is None else self.weight_projection.weight

    def _running_statistics(self, x: Tensor) -> tuple[Tensor | None, Tensor | None, float | Tensor]:
        """Return the mean and variance to read or update, if any, and the weight of this batch in them."""
        if self._standing is not None:
            self._standing.add(x)
            return None, None, 0.0
        if not self.norm.training:
            return self.norm.running_mean, self.norm.running_var, 0.0
        if self._frozen_statistics:
            return None, None, 0.0
        return self.norm.running_mean, self.norm.running_var, self._momentum()

    def _momentum(self) -> float | Tensor:
        """Return the weight of the next batch in the running statistics."""
        count = self.norm.num_batches_tracked
        if self.norm.momentum is not None or self.norm.running_mean is None or count is None:
            return self.norm.momentum or 0.0
        return torch.add(count, 1).to(self.norm.running_mean.dtype).reciprocal()

    def _process_group(self) -> ProcessGroup | None:
        """Return the group over which this pass takes statistics; None for this process alone."""
        if not self.norm.training or self._standing is not None:  # standing ones are gathered at the end
            return None
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
        """Return the sizes, the condition and the options that differ from the defaults."""
        if self.condition_features is None:
            text = f"{self.num_features}, num_classes={self.num_classes}"
        else:
            text = f"{self.num_features}, condition_features={self.condition_features}"
        defaults = {"gain_offset": 0.0, "biased_running_var": False, "activation": None, "backend": "auto"}
        for name, default in defaults.items():
            if (value := getattr(self, name)) != default:
                text += f", {name}={value!r}"
        return text

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """As ``nn.Module``; without a condition also from the keys of ``nn.BatchNorm2d``."""
        weight = state_dict.get(f"{prefix}weight")
        if self.num_classes is None and self.condition_features is None:
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                theirs, ours = f"{prefix}{name}", f"{prefix}norm.{name}"
                if theirs in state_dict and ours not in state_dict:
                    state_dict[ours] = state_dict.pop(theirs)
        elif self.num_classes is not None and isinstance(weight, Tensor) and weight.dim() == 1:
            errors: list[str] = args[-1]
            errors.append(
                f"{prefix}weight: expected a table {[self.num_classes, self.num_features]}, got "
                f"{checks.shape_of(weight)} of a batch norm without classes, which loads into "
                f"ConditionalBatchNorm2d({self.num_features})"
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies, without what a context has set for its block."""
        return self.__dict__ | {"_standing": None, "_frozen_statistics": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the state of a copy."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._show_coefficients()
