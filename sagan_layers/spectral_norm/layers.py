"""The spectrally normalised layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.common_types import _size_2_t

from sagan_layers import checks
from sagan_layers.resampling import ResamplingConv2d
from sagan_layers.spectral_norm import foreign
from sagan_layers.spectral_norm.functional import normalize_weight, weight_of_result
from sagan_layers.spectral_norm.memory import LayerMemory
from sagan_layers.spectral_norm.reference import (
    SpectralNormOptions,
    SpectralNormResult,
    SpectralNormTask,
    least_norm,
    spectral_divisor,
    unit,
)
from sagan_layers.torch_support import accumulation_dtype, fusion_calls, is_proxy, record_call, update_state

__all__ = ["SNConv2d", "SNConvTranspose2d", "SNEmbedding", "SNLinear", "SpectralNormLayer"]

# Set on a layer by contexts and earlier steps; copies and plain layers do not have them.
TEMPORARY_ATTRIBUTES = ("_frozen", "_shared", "_memory", "_records", "_replayed")

_REMEDY = (
    "enter shared_spectral_norm(model) around the transform, which updates u and v once before it, or "
    "frozen_spectral_norm(model), or call model.eval(); in training a ConditionalBatchNorm2d in the model also needs "
    "frozen_running_statistics(model)"
)


class LayerOptions(NamedTuple):
    """The options of a layer as its constructor takes them; see :class:`SpectralNormLayer`."""

    n_power_iterations: int = 1
    eps: float = 1e-12
    iterate_when_frozen: bool = True
    eps_mode: str = "add"
    iterate_from: str = "u"
    dim: int | None = None

    def checked(self, output_axis: int) -> dict[str, Any]:
        """Return the options by name, after all checks; ``dim`` is ``output_axis`` where it is None."""
        options = checks.spectral_norm_options(*self[:4])
        checks.check_choice("iterate_from", self.iterate_from, checks.VECTORS)
        axis = output_axis if self.dim is None else checks.integer_of("dim", self.dim, least=0, most=1)
        return options | {"iterate_from": self.iterate_from, "dim": axis}


class Frozen(NamedTuple):
    """Set by the innermost enclosing :func:`~sagan_layers.frozen_spectral_norm`."""

    iterate: bool | None


class SharedWeight(NamedTuple):
    """Set by :func:`~sagan_layers.shared_spectral_norm`.

    Attributes:
        task: the weight, and the u and v before.
        result: the normalised weight, sigma, u and v, without a graph.
        version: of the weight at that time; None where torch counts none.
    """

    task: SpectralNormTask
    result: SpectralNormResult
    version: int | None


class UsedVectors(NamedTuple):
    """The u and v that a forward divided its weight by, when nothing was shared."""

    u: Tensor
    v: Tensor


class SpectralNormLayer(nn.Module):
    r"""Base class of the spectrally normalised layers: ``weight / sigma`` and the vectors u and v.

    The layers are :class:`SNConv2d`, :class:`SNConvTranspose2d`, :class:`SNLinear` and :class:`SNEmbedding`. Each is
    also an instance of its plain torch layer. ``weight`` is the parameter before normalisation; the buffers
    ``weight_u`` (one entry for each output) and ``weight_v`` hold the last estimate of the singular vectors.

    ``load_state_dict`` also takes the entries of other code bases: of ``torch.nn.utils.spectral_norm`` and
    ``torch.nn.utils.parametrizations.spectral_norm``, BigGAN-PyTorch's ``u0`` and ``sv0``, mimicry's ``sn_u`` and
    ``sn_sigma``. Where only u is stored, v is set to fit it. With a plain layer's ``weight`` alone both are computed
    from the weight, with one ``UserWarning`` for a whole network. Entries of several kinds, or of half of one, are
    errors. The options are not in a state: give the layer those of its code base.

    Attributes:
        n_power_iterations: updates of u and v at each forward, 1 to 10**6.
        eps: keeps the norms of u and v from 0; from 1e-37 (float32 has no normal numbers below) to 1 (u and v have
            norm 1).
        iterate_when_frozen: what a forward does when it must not update u (in evaluation, or inside
            :func:`~sagan_layers.frozen_spectral_norm`): iterate from the stored u without storing the result, as
            the released code and BigGAN do (True), or use the stored u and v without iterating, as
            ``torch.nn.utils.spectral_norm`` does in evaluation (False).
        eps_mode: how eps is used: "add" divides u and v by norm + eps, as the released code does, and leaves a weight
            whose sigma is not above eps as it is; "clamp" divides by max(norm, eps), as torch and BigGAN-PyTorch do,
            and by every sigma but 0.
        dim: the axis of the weight that counts as its outputs, 0 or 1. Given as None, it is the layer's own: 1 for
            transposed convolutions, as in torch, else 0.
        iterate_from: "u" sets v = W^T u and then u = W v in an iteration, as the released code,
            ``torch.nn.utils.spectral_norm`` and BigGAN-PyTorch do; "v" sets u first and then v, as
            ``torch.nn.utils.parametrizations.spectral_norm`` and compare_gan do.

    Example:
        >>> model = nn.Sequential(SNConv2d(3, 8, kernel_size=3), nn.ReLU())
        >>> [isinstance(layer, SpectralNormLayer) for layer in model]
        [True, False]
    """

    weight: nn.Parameter
    weight_u: Tensor
    weight_v: Tensor
    n_power_iterations: int
    eps: float
    iterate_when_frozen: bool
    eps_mode: str
    dim: int
    iterate_from: str
    _plain_class: type[nn.Module]
    _output_axis: int = 0
    # Whether autocast would cast the weight where it is used.
    _cast_by_autocast: bool = True
    _frozen: Frozen | None = None
    _shared: SharedWeight | None = None
    _memory: LayerMemory | None = None
    # What enclosing contexts record of the forwards, and what forwards must replay.
    _records: tuple[list[UsedVectors | SharedWeight], ...] = ()
    _replayed: Iterator[UsedVectors | SharedWeight] | None = None

    def _init_spectral_norm(
        self, options: LayerOptions, vectors: tuple[Tensor, Tensor] | None = None
    ) -> None:
        vars(self).update(options.checked(self._output_axis))
        outputs = self.weight.size(self.dim)
        sizes = outputs, self.weight.numel() // outputs
        with torch.no_grad():
            u, v = vectors or (self.weight.new_empty(size) for size in sizes)
        self.register_buffer("weight_u", u)
        self.register_buffer("weight_v", v)
        if vectors is None:
            self.reset_spectral_norm()

    def reset_parameters(self) -> None:
        """Draw the weight and bias as the plain layer does, and new vectors."""
        super().reset_parameters()  # type: ignore[misc]
        if "weight_u" in self._buffers:  # not yet while the plain layer's constructor runs
            self.reset_spectral_norm()

    @torch.no_grad()
    def reset_spectral_norm(self) -> None:
        """Draw u from a truncated normal distribution, as the released code does, and set v to fit it."""
        if self.weight_u.is_meta:  # it has no values, and the operations take time
            return
        nn.init.trunc_normal_(self.weight_u)
        self.weight_u.div_(torch.linalg.vector_norm(self.weight_u).clamp_min(self.eps))
        self.reset_right_vector()

    @torch.no_grad()
    def reset_right_vector(self) -> None:
        """Set v to fit the weight and u: v = W^T u / ||W^T u||. For weights that were stored with u alone."""
        self.weight_v.copy_(self._fitting_right_vector(self.weight, self.weight_u))

    def _fitting_right_vector(self, weight: Tensor, u: Tensor) -> Tensor:
        dtype = accumulation_dtype(weight.dtype)
        matrix = weight.to(dtype).transpose(0, self.dim).flatten(1)
        v = torch.mv(matrix.t(), u.to(weight.device, dtype))
        return unit(v, self.eps, self.eps_mode, otherwise=v / self.eps)

    @property
    def sigma(self) -> Tensor:
        """The spectral norm as evaluation would estimate it now, a scalar without gradient; updates nothing."""
        return normalize_weight(self._task(self.weight.detach(), iterate=self.iterate_when_frozen)).sigma

    def normalized_weight(self) -> Tensor:
        """Return ``weight / sigma`` in the weight's shape and dtype; in training, unless frozen, update u and v.

        Inside :func:`~sagan_layers.shared_spectral_norm` it is the shared weight, in the dtype chosen there.
        """
        used = self._shared if self._replayed is None else self._next_replayed(self._replayed)
        if isinstance(used, SharedWeight):
            weight = self._weight_of_shared(used)
        elif used is not None:
            weight = normalize_weight(self._task(self.weight, iterate=False, vectors=used)).weight
        else:
            iterate = self._updates_vectors or self._iterates_when_frozen
            weight, _, u, v = normalize_weight(self._task(self.weight, iterate=iterate))
            used = UsedVectors(u, v)
            if self._updates_vectors:
                # The graph has its own u and v, so an earlier forward's graph stays valid.
                update_state(lambda: (self.weight_u.copy_(u), self.weight_v.copy_(v)), _REMEDY)
        for record in self._records:
            record.append(used)
        return weight

    @property
    def _updates_vectors(self) -> bool:
        return self.training and self._frozen is None

    @property
    def _iterates_when_frozen(self) -> bool:
        frozen = self._frozen
        return self.iterate_when_frozen if frozen is None or frozen.iterate is None else frozen.iterate

    def _task(
        self,
        weight: Tensor,
        *,
        iterate: bool,
        dtype: torch.dtype | None = None,
        vectors: UsedVectors | None = None,
    ) -> SpectralNormTask:
        checks.check_floating("weight", weight)
        u, v = (self.weight_u, self.weight_v) if vectors is None else vectors
        memory = self._memory if self.training else None
        if self.training and memory is None and not torch.compiler.is_compiling():
            memory = self._memory = LayerMemory()
        iterations = self.n_power_iterations if iterate else 0
        options = SpectralNormOptions(
            self.dim, iterations, self.eps, dtype or weight.dtype, memory, self.eps_mode, self.iterate_from
        )
        return SpectralNormTask(weight, u, v, options)

    def _next_replayed(self, replayed: Iterator[UsedVectors | SharedWeight]) -> UsedVectors | SharedWeight:
        used = next(replayed, None)
        if used is None:
            raise RuntimeError(
                "expected no more forwards of the layer than were recorded, got another one (is it inside "
                "torch.compile?)"
            )
        return used

    def _weight_of_shared(self, shared: SharedWeight) -> Tensor:
        weight, expected = self.weight, shared.task.weight
        if not torch.compiler.is_compiling() and "weight" in self._parameters:
            # What torch.func wraps has no memory to compare; weight_of_result normalises it by the shared u and v.
            is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor(weight)
            if weight is not expected and not is_wrapped and weight.data_ptr() != expected.data_ptr():
                raise RuntimeError(
                    "weight: expected the parameter that shared_spectral_norm has normalised, got another tensor"
                )
            if shared.version is not None and expected._version != shared.version:
                raise RuntimeError(
                    "weight: changed since shared_spectral_norm has normalised it; call update() after each "
                    "optimizer.step(), or leave the block before"
                )
        lowered = shared.result.weight.dtype
        if lowered != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
            raise RuntimeError(
                f"weight: it is {weight.dtype}, and shared_spectral_norm has normalised it to {lowered}, which serves "
                "under autocast only, and autocast is off"
            )
        task = SpectralNormTask(weight, shared.task.u, shared.task.v, shared.task.options)
        return weight_of_result(task, shared.result)

    def __setattr__(self, name: str, value: Any) -> None:
        """As ``nn.Module``; but the weight that torch fuses with a batch norm would be normalised again."""
        if name == "weight" and fusion_calls(0):
            # It is raw weight times gain: divided by sigma it belongs to the plain layer.
            self.check_own_weight()
            with torch.no_grad():
                least = least_norm(self.eps, self.eps_mode)
                value /= spectral_divisor(self.sigma, least).to(value.dtype)
            self.become_plain(value)
        else:
            super().__setattr__(name, value)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load the entries of any code base of ``foreign``, and compute vectors that are not stored."""
        # Pruning and parametrizations store weights under names of their own.
        if isinstance(self._parameters.get("weight"), nn.Parameter):
            try:
                foreign.rename_entries(state_dict, prefix)
            except ValueError as error:
                error_msgs.append(str(error))
                return
            self._add_vectors(state_dict, prefix, missing_keys)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @torch.no_grad()
    def _add_vectors(self, state_dict: dict[str, Any], prefix: str, load: object) -> None:
        names = [prefix + name for name in foreign.OWN_KEYS]
        weight, u, v = (state_dict.get(name) for name in names)
        if v is not None or not isinstance(weight, Tensor) or weight.dtype not in checks.FLOATING:
            return
        if weight.shape != self.weight.shape:
            return
        if u is None:
            state_dict[names[1]], state_dict[names[2]] = foreign.leading_vectors(weight, self.dim)
            foreign.warn_once_a_load(load, names[0])
        elif isinstance(u, Tensor) and u.shape == self.weight_u.shape:
            state_dict[names[2]] = self._fitting_right_vector(weight, u).to(u.dtype)

    def check_own_weight(self, name: str = "") -> None:
        """Raise ``TypeError`` if the weight is not a parameter but computed by a hook or a parametrization."""
        if not isinstance(self._parameters.get("weight"), nn.Parameter):
            raise TypeError(
                f"the weight of {name or type(self).__name__!r} is computed by something else (a hook or a "
                "parametrization, such as pruning); remove that first"
            )

    def become_plain(self, weight: nn.Parameter) -> None:
        """Turn this object into its plain layer, with another weight."""
        resamples = isinstance(self, SNConv2d) and self.resamples
        del self.weight_u, self.weight_v
        options = (*LayerOptions._fields, *(() if resamples else ("backend",)))
        for name in (*options, *TEMPORARY_ATTRIBUTES):
            self.__dict__.pop(name, None)
        self.__class__ = ResamplingConv2d if resamples else self._plain_class  # type: ignore[assignment]
        self.weight = weight

    def extra_repr(self) -> str:
        """Return the plain layer's description, and the options that differ from the defaults."""
        text = super().extra_repr()
        for name, default in LayerOptions(dim=self._output_axis)._asdict().items():
            if (value := getattr(self, name)) != default:
                text += f", {name}={value!r}"
        return text

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies, without what contexts and earlier steps have set."""
        return {name: value for name, value in self.__dict__.items() if name not in TEMPORARY_ATTRIBUTES}

    def __deepcopy__(self, memo: dict[int, Any]) -> SpectralNormLayer:
        """Return a copy without what contexts and earlier steps have set, also of a parametrized layer."""
        copied = memo[id(self)] = self.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(SpectralNormLayer.__getstate__(self), memo))
        return copied


class SNConv2d(SpectralNormLayer, ResamplingConv2d):  # type: ignore[misc]
    r"""Two-dimensional convolution with a spectrally normalised weight.

    .. math:: y = x * (W / \sigma(W)) + b

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype: as for :class:`torch.nn.Conv2d`.
        n_power_iterations, eps, iterate_when_frozen, eps_mode, dim, iterate_from: see :class:`SpectralNormLayer`.
        upsample, downsample, backend: as for :class:`ResamplingConv2d`.

    Shape:
        - Input: [N, C, H, W] or [C, H, W].
        - Output: as :class:`ResamplingConv2d`; as :class:`torch.nn.Conv2d` without resampling.
        - W as a matrix: [out_channels, in_channels / groups * kernel height * kernel width].

    Raises:
        ValueError: for a wrong rank, number of channels or device, or an argument out of range.
        TypeError: for a wrong dtype.

    Note:
        In training each forward updates u and v ``n_power_iterations`` times, unless inside
        :func:`~sagan_layers.frozen_spectral_norm`; in evaluation nothing is updated. sigma is computed in float32
        under autocast too. Derivatives of every order, u and v taken as constants.

    Reference:
        Miyato et al., Spectral Normalization for Generative Adversarial Networks.

    Example:
        >>> conv = SNConv2d(3, 8, kernel_size=3, padding=1)
        >>> conv(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 8, 16, 16])
        >>> sorted(conv.state_dict())
        ['bias', 'weight', 'weight_u', 'weight_v']
    """

    _plain_class = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: str | _size_2_t = 0,
        dilation: _size_2_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        n_power_iterations: int = 1,
        eps: float = 1e-12,
        iterate_when_frozen: bool = True,
        eps_mode: str = "add",
        dim: int | None = None,
        iterate_from: str = "u",
        upsample: int = 1,
        downsample: int = 1,
        backend: str = "auto",
    ) -> None:
        plain = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        ResamplingConv2d.__init__(
            self,
            *plain,
            padding_mode,
            device,
            dtype,
            upsample=upsample,
            downsample=downsample,
            backend=backend,
        )
        options = LayerOptions(n_power_iterations, eps, iterate_when_frozen, eps_mode, iterate_from, dim)
        self._init_spectral_norm(options)

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of ``input`` with the normalised weight."""
        if is_proxy(input):
            return record_call(self, input)
        self._check_input(input)
        return self._resampled(input, self.normalized_weight())


class SNConvTranspose2d(SpectralNormLayer, nn.ConvTranspose2d):  # type: ignore[misc]
    r"""Two-dimensional transposed convolution with a spectrally normalised weight.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation,
            padding_mode, device, dtype: as for :class:`torch.nn.ConvTranspose2d`.
        n_power_iterations, eps, iterate_when_frozen, eps_mode, dim, iterate_from: see :class:`SpectralNormLayer`.

    Shape:
        - Input: [N, C, H, W] or [C, H, W].
        - Output: as :class:`torch.nn.ConvTranspose2d`.
        - W as a matrix: [out_channels / groups, in_channels * kernel height * kernel width].

    Raises:
        ValueError: for a wrong rank, number of channels or device, or an argument out of range.
        TypeError: for a wrong dtype.

    Note:
        As :class:`SNConv2d`.

    Example:
        >>> conv = SNConvTranspose2d(8, 3, kernel_size=4, stride=2, padding=1)
        >>> conv(torch.randn(2, 8, 16, 16)).shape
        torch.Size([2, 3, 32, 32])
    """

    _plain_class = nn.ConvTranspose2d
    _output_axis = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: _size_2_t = 0,
        output_padding: _size_2_t = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: _size_2_t = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        n_power_iterations: int = 1,
        eps: float = 1e-12,
        iterate_when_frozen: bool = True,
        eps_mode: str = "add",
        dim: int | None = None,
        iterate_from: str = "u",
    ) -> None:
        inputs, outputs, kernel, strides, padding, dilations, groups = checks.convolution_of(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, named_padding=False
        )
        added = checks.pair_of("output_padding", output_padding, least=0)
        if any(added[i] >= max(strides[i], dilations[i]) for i in range(2)):
            raise ValueError(
                f"output_padding: expected less than stride {strides} or dilation {dilations}, got {added}"
            )
        (bias,) = checks.flags_of(bias=bias)
        checks.check_choice("padding_mode", padding_mode, ("zeros",))
        checks.check_parameter_options(device, dtype)
        plain: Any = (added, groups, bias, dilations, padding_mode, device, dtype)
        nn.ConvTranspose2d.__init__(self, inputs, outputs, kernel, strides, padding, *plain)
        options = LayerOptions(n_power_iterations, eps, iterate_when_frozen, eps_mode, iterate_from, dim)
        self._init_spectral_norm(options)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the transposed convolution of ``input`` with the normalised weight."""
        if is_proxy(input):
            return record_call(self, input, output_size)
        checks.check_input(input, channels=self.in_channels, like=self.weight, batched=False)
        if output_size is not None:
            if not isinstance(output_size, (tuple, list)):
                raise TypeError(f"output_size: expected a list of sizes, got {checks.shown(output_size)}")
            output_size = [checks.integer_of("output_size", size, least=1) for size in output_size]
        sizes: Any = (self.stride, self.padding, self.kernel_size, 2, self.dilation)
        output_padding = self._output_padding(input, output_size, *sizes)
        steps: Any = zip(input.shape[-2:], *sizes[:3], self.dilation, output_padding, strict=True)
        rows, columns = (
            (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + added + 1
            for size, stride, padding, kernel, dilation, added in steps
        )
        checks.check_map_size("input", input, rows, columns)
        options = (self.stride, self.padding, output_padding, self.groups, self.dilation)
        return nn.functional.conv_transpose2d(input, self.normalized_weight(), self.bias, *options)  # type: ignore[arg-type]


class SNLinear(SpectralNormLayer, nn.Linear):  # type: ignore[misc]
    r"""Linear map with a spectrally normalised weight, :math:`y = x (W / \sigma(W))^T + b`.

    Args:
        in_features, out_features, bias, device, dtype: as for :class:`torch.nn.Linear`.
        n_power_iterations, eps, iterate_when_frozen, eps_mode, dim, iterate_from: see :class:`SpectralNormLayer`.

    Shape:
        - Input: [*, in_features].
        - Output: [*, out_features].

    Raises:
        ValueError: for a wrong last axis or device, or an argument out of range.
        TypeError: for a wrong dtype.

    Note:
        As :class:`SNConv2d`.

    Example:
        >>> SNLinear(128, 10)(torch.randn(4, 128)).shape
        torch.Size([4, 10])
    """

    _plain_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        n_power_iterations: int = 1,
        eps: float = 1e-12,
        iterate_when_frozen: bool = True,
        eps_mode: str = "add",
        dim: int | None = None,
        iterate_from: str = "u",
    ) -> None:
        in_features, out_features = checks.sizes_of(in_features=in_features, out_features=out_features)
        (bias,) = checks.flags_of(bias=bias)
        checks.check_parameter_options(device, dtype)
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        options = LayerOptions(n_power_iterations, eps, iterate_when_frozen, eps_mode, iterate_from, dim)
        self._init_spectral_norm(options)

    def forward(self, input: Tensor) -> Tensor:
        """Return the linear map of the last axis of ``input`` by the normalised weight."""
        if is_proxy(input):
            return record_call(self, input)
        checks.check_features(input, features=self.in_features, like=self.weight)
        return nn.functional.linear(input, self.normalized_weight(), self.bias)


class SNEmbedding(SpectralNormLayer, nn.Embedding):  # type: ignore[misc]
    r"""Look-up table whose matrix [num_embeddings, embedding_dim] is spectrally normalised.

    Args:
        num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight,
            _freeze, device, dtype: as for :class:`torch.nn.Embedding`. ``max_norm`` and ``sparse`` are refused:
            no row of a normalised matrix is longer than 1, and the gradient of sigma is dense.
        n_power_iterations, eps, iterate_when_frozen, eps_mode, dim, iterate_from: see :class:`SpectralNormLayer`.

    Shape:
        - Input: indices of any shape, int64 or int32.
        - Output: [*, embedding_dim].

    Raises:
        ValueError: for an index out of range (on a GPU see :func:`~sagan_layers.functional.set_debug_checks`),
            a wrong device, or an argument out of range.
        TypeError: for indices that are not integers.

    Note:
        As :class:`SNConv2d`. u has ``num_embeddings`` entries.

    Reference:
        Miyato and Koyama, cGANs with Projection Discriminator.

    Example:
        >>> SNEmbedding(1000, 64)(torch.tensor([3, 999])).shape
        torch.Size([2, 64])
    """

    _plain_class = nn.Embedding
    _cast_by_autocast = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        n_power_iterations: int = 1,
        eps: float = 1e-12,
        iterate_when_frozen: bool = True,
        eps_mode: str = "add",
        dim: int | None = None,
        iterate_from: str = "u",
    ) -> None:
        num_embeddings, embedding_dim = checks.sizes_of(
            num_embeddings=num_embeddings, embedding_dim=embedding_dim
        )
        if padding_idx is not None:
            padding_idx = checks.integer_of(
                "padding_idx", padding_idx, least=-num_embeddings, most=num_embeddings - 1
            )
        norm_type = checks.number_of("norm_type", norm_type)
        scale_grad_by_freq, sparse, _freeze = checks.flags_of(
            scale_grad_by_freq=scale_grad_by_freq, sparse=sparse, _freeze=_freeze
        )
        checks.check_parameter_options(device, dtype)
        refuse_embedding_options(max_norm, sparse)
        if _weight is not None:
            checks.check_floating("_weight", _weight)
            if _weight.shape != (num_embeddings, embedding_dim):
                expected = [num_embeddings, embedding_dim]
                raise ValueError(f"_weight: expected shape {expected}, got {checks.shape_of(_weight)}")
        plain = (num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        nn.Embedding.__init__(self, *plain, _weight, _freeze, device, dtype)
        options = LayerOptions(n_power_iterations, eps, iterate_when_frozen, eps_mode, iterate_from, dim)
        self._init_spectral_norm(options)

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of the normalised matrix that ``input`` names."""
        if is_proxy(input):
            return record_call(self, input)
        checks.check_indices("input", input, upper=self.num_embeddings, like=self.weight)
        return nn.functional.embedding(
            input,
            self.normalized_weight(),
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
        )


def refuse_embedding_options(max_norm: float | None, sparse: bool) -> None:
    """Raise for options of an embedding that do not fit a normalised matrix."""
    if max_norm is not None:
        raise ValueError("max_norm: expected None (no row of a normalised matrix is longer than 1)")
    if sparse:
        raise ValueError("sparse: expected False (the gradient of the spectral norm is dense)")
