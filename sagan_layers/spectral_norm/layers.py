"""Spectrally normalised layers, and control of when their power iteration moves."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.common_types import _size_2_t

from sagan_layers import checks
from sagan_layers.resampling import ResamplingConv2d
from sagan_layers.spectral_norm.cpu import LayerMemory
from sagan_layers.spectral_norm.reference import SpectralNormResult, SpectralNormTask
from sagan_layers.spectral_norm.table import normalize_layer_weight, with_spectral_gradient
from sagan_layers.torch_support import accumulation_dtype, temporary_attribute

__all__ = [
    "SNConv2d",
    "SNConvTranspose2d",
    "SNEmbedding",
    "SNLinear",
    "SpectralNormLayer",
    "apply_spectral_norm",
    "frozen_spectral_norm",
    "remove_spectral_norm",
]

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)

# Attributes of a layer that are no part of it.
_PASSING_STATE = ("_frozen_by", "_shared", "_memory", "_records", "_repeated")


class _Frozen(NamedTuple):
    """The innermost enclosing :func:`frozen_spectral_norm`."""

    iterate: bool | None


class _Shared(NamedTuple):
    """What a :func:`~sagan_layers.shared_spectral_norm` found for a layer.

    Attributes:
        task: what it was found from.
        result: the normalised weight, sigma, u and v, without a graph.
        version: of the weight at that time; None where it is not tracked.
    """

    task: SpectralNormTask
    result: SpectralNormResult
    version: int | None


class _Own(NamedTuple):
    """What a layer divided its weight by when nothing was shared: u and v after the iteration."""

    u: Tensor
    v: Tensor


class SpectralNormRecord:
    """Which weights the forwards of every layer took, in their order; see :func:`recording_spectral_norm`."""

    def __init__(self) -> None:
        self.used: dict[SpectralNormLayer, list[_Own | _Shared]] = {}


class SpectralNormLayer(nn.Module):
    r"""What the spectrally normalised layers share: ``weight / sigma`` and the vectors u and v.

    The layers are :class:`SNConv2d`, :class:`SNConvTranspose2d`, :class:`SNLinear` and :class:`SNEmbedding`;
    each is also an instance of its plain torch layer, and ``isinstance(layer, SpectralNormLayer)`` finds them
    all. ``weight`` is the parameter before normalisation. The buffers ``weight_u`` (one entry for each output)
    and ``weight_v`` hold the last estimate of the singular vectors.

    Attributes:
        n_power_iterations: iterations at each forward.
        eps: added to the norms in the iteration.
        iterate_when_frozen: what a forward does when u must not move (in evaluation, or inside
            :func:`frozen_spectral_norm`): iterate from the stored u without storing the result, as the released
            code and BigGAN do (True), or take the stored u and v as they are, as
            ``torch.nn.utils.spectral_norm`` does in evaluation (False).

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
    _plain_class: type[nn.Module]
    _output_axis: int = 0
    # Whether autocast would cast the weight where it is used.
    _cast_by_autocast: bool = True
    _frozen_by: _Frozen | None = None
    _shared: _Shared | None = None
    _memory: LayerMemory | None = None
    # Where enclosing contexts write down what forwards take.
    _records: tuple[list[_Own | _Shared], ...] = ()
    # What forwards have to take again.
    _repeated: Iterator[_Own | _Shared] | None = None

    def _init_spectral_norm(self, n_power_iterations: int, eps: float, iterate_when_frozen: bool) -> None:
        checks.check_sizes(n_power_iterations=n_power_iterations)
        checks.check_positive("eps", eps)
        if self.weight.numel() == 0:
            raise ValueError(f"weight: expected at least one element, got shape {list(self.weight.shape)}")
        self.n_power_iterations = n_power_iterations
        self.eps = eps
        self.iterate_when_frozen = iterate_when_frozen
        outputs = self.weight.size(self._output_axis)
        with torch.no_grad():
            self.register_buffer("weight_u", self.weight.new_empty(outputs))
            self.register_buffer("weight_v", self.weight.new_empty(self.weight.numel() // outputs))
        self.reset_spectral_norm()

    def reset_parameters(self) -> None:
        """Draw the weight and bias as the plain layer does, and new vectors."""
        super().reset_parameters()  # type: ignore[misc]
        if "weight_u" in self._buffers:  # not yet while the plain layer's constructor runs
            self.reset_spectral_norm()

    @torch.no_grad()
    def reset_spectral_norm(self) -> None:
        """Draw u from a truncated normal distribution, as the released code does, and set v to fit it."""
        nn.init.trunc_normal_(self.weight_u)
        self.weight_u.div_(torch.linalg.vector_norm(self.weight_u).clamp_min(self.eps))
        self.reset_right_vector()

    @torch.no_grad()
    def reset_right_vector(self) -> None:
        """Set v to fit the weight and u: v = W^T u / ||W^T u||. For weights that come with u alone."""
        dtype = accumulation_dtype(self.weight.dtype)
        matrix = self.weight.to(dtype).transpose(0, self._output_axis).flatten(1)
        v = torch.mv(matrix.t(), self.weight_u.to(dtype))
        self.weight_v.copy_(v / torch.linalg.vector_norm(v).clamp_min(self.eps))

    @property
    def sigma(self) -> Tensor:
        """The spectral norm as evaluation would estimate it now, a scalar without gradient; moves nothing."""
        task = self._task(self.weight.detach(), iterate=self.iterate_when_frozen)
        return normalize_layer_weight(task).sigma

    def normalized_weight(self) -> Tensor:
        """Return ``weight / sigma`` in the weight's shape and dtype; in training, unless frozen, u and v move.

        Inside :func:`~sagan_layers.shared_spectral_norm` it is the one that was found there, in the dtype that
        was asked for there.
        """
        if self._repeated is not None:
            return self._weight_again(self._repeated)
        if self._shared is not None:
            self._record(self._shared)
            return self._shared_weight(self._shared)
        moves = self._moves
        task = self._task(self.weight, iterate=moves or self._iterates_when_frozen)
        result = normalize_layer_weight(task)
        if moves:
            # The gradient was given its own u and v, so an earlier forward's graph survives this.
            with torch.no_grad():
                self.weight_u.copy_(result.u)
                self.weight_v.copy_(result.v)
        self._record(_Own(result.u, result.v))
        return result.weight

    def _record(self, used: _Own | _Shared) -> None:
        for record in self._records:
            record.append(used)

    def _weight_again(self, repeated: Iterator[_Own | _Shared]) -> Tensor:
        """Return the weight that an earlier forward took."""
        used = next(repeated, None)
        if used is None:
            raise RuntimeError(
                "expected the forwards of the first pass to be repeated, got a further one (is the layer inside "
                "torch.compile?)"
            )
        self._record(used)
        if isinstance(used, _Shared):
            return self._shared_weight(used)
        task = self._task(self.weight, iterate=False, vectors=(used.u, used.v))
        return normalize_layer_weight(task).weight

    @property
    def _moves(self) -> bool:
        return self.training and self._frozen_by is None

    @property
    def _iterates_when_frozen(self) -> bool:
        frozen = self._frozen_by
        return self.iterate_when_frozen if frozen is None or frozen.iterate is None else frozen.iterate

    def _task(
        self,
        weight: Tensor,
        *,
        iterate: bool,
        dtype: torch.dtype | None = None,
        vectors: tuple[Tensor, Tensor] | None = None,
    ) -> SpectralNormTask:
        u, v = (self.weight_u, self.weight_v) if vectors is None else vectors
        memory = self._memory if self.training else None
        if self.training and memory is None and not torch.compiler.is_compiling():
            memory = self._memory = LayerMemory()
        return SpectralNormTask(
            weight,
            u,
            v,
            self._output_axis,
            self.n_power_iterations if iterate else 0,
            self.eps,
            weight.dtype if dtype is None else dtype,
            memory,
        )

    def _shared_weight(self, shared: _Shared) -> Tensor:
        weight, expected = self.weight, shared.task.weight
        if not torch.compiler.is_compiling() and "weight" in self._parameters:
            # What torch.func wraps has no memory to compare; its weight is divided anew, by the shared sigma's vectors.
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
                "under autocast only (off here)"
            )
        old = shared.task  # written out, since torch.compile of torch 2.6 knows no _replace
        task = SpectralNormTask(
            weight, old.u, old.v, old.dim, old.n_power_iterations, old.eps, old.dtype, old.memory
        )
        return with_spectral_gradient(task, shared.result)

    def extra_repr(self) -> str:
        """Return the plain layer's description, and the options that differ from the defaults."""
        text = super().extra_repr()
        if self.n_power_iterations != 1:
            text += f", n_power_iterations={self.n_power_iterations}"
        if self.eps != 1e-12:
            text += f", eps={self.eps}"
        if not self.iterate_when_frozen:
            text += ", iterate_when_frozen=False"
        return text

    def __getstate__(self) -> dict[str, Any]:
        """Leave what enclosing contexts and earlier steps have left out of copies."""
        state = self.__dict__.copy()
        for name in _PASSING_STATE:
            state.pop(name, None)
        return state


class SNConv2d(SpectralNormLayer, ResamplingConv2d):  # type: ignore[misc]
    r"""Two-dimensional convolution with a spectrally normalised weight.

    .. math:: y = x * (W / \sigma(W)) + b

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype: as for :class:`torch.nn.Conv2d`.
        n_power_iterations: iterations at each forward.
        eps: added to the norms of u and v.
        iterate_when_frozen: see :class:`SpectralNormLayer`.
        upsample, downsample, backend: as for :class:`ResamplingConv2d`.

    Shape:
        - Input: [N, C, H, W] or [C, H, W].
        - Output: as :class:`ResamplingConv2d`; as :class:`torch.nn.Conv2d` without resampling.
        - W as a matrix: [out_channels, in_channels / groups * kernel height * kernel width].

    Raises:
        ValueError: for a wrong rank, number of channels or device, or an argument out of range.
        TypeError: for a wrong dtype.

    Note:
        In training each forward moves u and v by ``n_power_iterations``, unless inside
        :func:`frozen_spectral_norm`; in evaluation nothing moves. sigma is computed in float32 whatever autocast
        says. Derivatives of every order, u and v taken as constants.

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
        upsample: int = 1,
        downsample: int = 1,
        backend: str = "auto",
    ) -> None:
        ResamplingConv2d.__init__(
            self,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
            upsample=upsample,
            downsample=downsample,
            backend=backend,
        )
        self._init_spectral_norm(n_power_iterations, eps, iterate_when_frozen)

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of ``input`` with the normalised weight."""
        _check_image(input, self)
        return self._resampled(input, self.normalized_weight())


class SNConvTranspose2d(SpectralNormLayer, nn.ConvTranspose2d):  # type: ignore[misc]
    r"""Two-dimensional transposed convolution with a spectrally normalised weight.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation,
            padding_mode, device, dtype: as for :class:`torch.nn.ConvTranspose2d`.
        n_power_iterations: iterations at each forward.
        eps: added to the norms of u and v.
        iterate_when_frozen: see :class:`SpectralNormLayer`.

    Shape:
        - Input: [N, C, H, W] or [C, H, W].
        - Output: as :class:`torch.nn.ConvTranspose2d`.
        - W as a matrix: [out_channels / groups, in_channels * kernel height * kernel width].

    Raises:
        ValueError: for a wrong rank, number of channels or device, or an argument out of range.
        TypeError: for a wrong dtype.

    Note:
        As :class:`SNConv2d`.

    Reference:
        Miyato et al., Spectral Normalization for Generative Adversarial Networks.

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
    ) -> None:
        checks.check_sizes(in_channels=in_channels, out_channels=out_channels)
        checks.check_convolution(kernel_size, stride, padding, dilation)
        checks.check_parameter_dtype(dtype)
        nn.ConvTranspose2d.__init__(
            self,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        self._init_spectral_norm(n_power_iterations, eps, iterate_when_frozen)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the transposed convolution of ``input`` with the normalised weight."""
        _check_image(input, self)
        output_padding = self._output_padding(
            input,
            output_size,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            2,
            self.dilation,  # type: ignore[arg-type]
        )
        return nn.functional.conv_transpose2d(
            input,
            self.normalized_weight(),
            self.bias,
            self.stride,
            self.padding,  # type: ignore[arg-type]
            output_padding,
            self.groups,
            self.dilation,
        )


class SNLinear(SpectralNormLayer, nn.Linear):  # type: ignore[misc]
    r"""Linear map with a spectrally normalised weight, :math:`y = x (W / \sigma(W))^T + b`.

    Args:
        in_features, out_features, bias, device, dtype: as for :class:`torch.nn.Linear`.
        n_power_iterations: iterations at each forward.
        eps: added to the norms of u and v.
        iterate_when_frozen: see :class:`SpectralNormLayer`.

    Shape:
        - Input: [*, in_features].
        - Output: [*, out_features].

    Raises:
        ValueError: for a wrong last axis or device, or an argument out of range.
        TypeError: for a wrong dtype.

    Note:
        As :class:`SNConv2d`.

    Reference:
        Miyato et al., Spectral Normalization for Generative Adversarial Networks.

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
    ) -> None:
        checks.check_sizes(in_features=in_features, out_features=out_features)
        checks.check_parameter_dtype(dtype)
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._init_spectral_norm(n_power_iterations, eps, iterate_when_frozen)

    def forward(self, input: Tensor) -> Tensor:
        """Return the linear map of the last axis of ``input`` by the normalised weight."""
        checks.check_features(input, features=self.in_features, like=self.weight)
        return nn.functional.linear(input, self.normalized_weight(), self.bias)


class SNEmbedding(SpectralNormLayer, nn.Embedding):  # type: ignore[misc]
    r"""Look-up table whose matrix [num_embeddings, embedding_dim] is spectrally normalised.

    Args:
        num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight,
            _freeze, device, dtype: as for :class:`torch.nn.Embedding`. ``max_norm`` and ``sparse`` are refused:
            no row of a normalised matrix is longer than 1, and the gradient of sigma is dense.
        n_power_iterations: iterations at each forward.
        eps: added to the norms of u and v.
        iterate_when_frozen: see :class:`SpectralNormLayer`.

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
    ) -> None:
        checks.check_sizes(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        checks.check_parameter_dtype(dtype)
        _refuse_embedding_options(max_norm, sparse)
        nn.Embedding.__init__(
            self,
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            _freeze,
            device,
            dtype,
        )
        self._init_spectral_norm(n_power_iterations, eps, iterate_when_frozen)

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of the normalised matrix that ``input`` names."""
        checks.check_indices("input", input, upper=self.num_embeddings, like=self.weight)
        return nn.functional.embedding(
            input,
            self.normalized_weight(),
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
        )


def _check_image(input: Tensor, layer: SNConv2d | SNConvTranspose2d) -> None:
    checks.check_input(input, channels=layer.in_channels, like=layer.weight, batched=False)


def _refuse_embedding_options(max_norm: float | None, sparse: bool) -> None:
    if max_norm is not None:
        raise ValueError("max_norm: expected None (no row of a normalised matrix is longer than 1)")
    if sparse:
        raise ValueError("sparse: expected False (the gradient of the spectral norm is dense)")


def _layers_of(module: nn.Module) -> list[SpectralNormLayer]:
    return [layer for layer in module.modules() if isinstance(layer, SpectralNormLayer)]


@contextlib.contextmanager
def frozen_spectral_norm(module: nn.Module, *, iterate: bool | None = None) -> Iterator[None]:
    """Keep u and v of every spectrally normalised layer in ``module`` from moving inside a ``with`` block.

    The released code moves D's vectors on the real batch and not on the fake batch that follows. Gradients,
    dropout and batch norm are as usual; only u and v stand still. Contexts nest, the innermost counts; without
    spectrally normalised layers nothing happens. Inside :func:`shared_spectral_norm` the weights are given already
    and this changes nothing.

    Args:
        module: a layer or a network that holds some.
        iterate: what sigma is taken from: u and v iterated from the stored ones (True), or the stored ones as
            they are (False), that is the very weight of the last forward that moved them. None leaves it to
            each layer's ``iterate_when_frozen``. False is for passes that must repeat that forward, such as
            further parts of an accumulated batch.

    Example:
        >>> conv = SNConv2d(3, 8, kernel_size=3)
        >>> x = torch.randn(2, 3, 16, 16)
        >>> y = conv(x)  # moves u and v
        >>> before = conv.weight_u.clone()
        >>> with frozen_spectral_norm(conv, iterate=False):
        ...     repeated = conv(x)
        >>> torch.equal(conv.weight_u, before), torch.equal(repeated, y)
        (True, True)
    """
    frozen = _Frozen(iterate)
    with temporary_attribute("_frozen_by", dict.fromkeys(_layers_of(module), frozen)):
        yield


@contextlib.contextmanager
def recording_spectral_norm(module: nn.Module, record: SpectralNormRecord) -> Iterator[None]:
    """Write down which weights the forwards inside a ``with`` block take, for :func:`repeated_spectral_norm`.

    For :func:`~sagan_layers.checkpointed`. Contexts nest, each writes down all that happens in it.

    Args:
        module: a layer or a network.
        record: what to write into.

    Example:
        >>> conv, record = SNConv2d(3, 8, kernel_size=3), SpectralNormRecord()
        >>> x = torch.randn(2, 3, 16, 16)
        >>> with recording_spectral_norm(conv, record):
        ...     y = conv(x)
        >>> _ = conv(x)  # moves u and v
        >>> with repeated_spectral_norm(record):
        ...     repeated = conv(x)
        >>> torch.equal(repeated, y), torch.equal(conv(x), y)
        (True, False)
    """
    layers = _layers_of(module)
    lists = {layer: (*layer._records, record.used.setdefault(layer, [])) for layer in layers}
    with temporary_attribute("_records", lists):
        yield


@contextlib.contextmanager
def repeated_spectral_norm(record: SpectralNormRecord) -> Iterator[None]:
    """Let forwards inside a ``with`` block take the recorded weights again, in their order; nothing moves.

    Whatever has moved u and v since, whether the layers are in training, frozen or shared now: the weights are
    those of the record, and so are their gradients. Whether the parameters are still the same is the caller's to
    check.

    Args:
        record: of the forwards to repeat.

    Raises:
        RuntimeError: inside the block, when a layer is called more often than the record has it, or the weight of
            a shared one has changed since.

    Example:
        >>> record = SpectralNormRecord()
        >>> with repeated_spectral_norm(record):  # of nothing
        ...     pass
    """
    with temporary_attribute("_repeated", {layer: iter(used) for layer, used in record.used.items()}):
        yield


@torch.no_grad()
def remove_spectral_norm(module: _ModuleT) -> _ModuleT:
    """Turn every spectrally normalised layer in ``module`` into its plain torch layer, in place.

    Each layer stays the same object, of class ``nn.Conv2d``, ``nn.ConvTranspose2d``, ``nn.Linear`` or
    ``nn.Embedding``, or :class:`ResamplingConv2d` where it resamples, and computes what it computed in evaluation
    before. Its ``weight`` is a new parameter, so an optimizer of the old one has to be made anew, and weights that
    two layers shared are shared no longer.

    Args:
        module: a layer or a network.

    Returns:
        ``module`` itself.

    Example:
        >>> conv = remove_spectral_norm(SNConv2d(3, 8, kernel_size=3))
        >>> type(conv).__name__, sorted(conv.state_dict())
        ('Conv2d', ['bias', 'weight'])
    """
    for layer in module.modules():
        if isinstance(layer, SpectralNormLayer):
            task = layer._task(layer.weight, iterate=layer.iterate_when_frozen)._replace(memory=None)
            weight = normalize_layer_weight(task).weight
            layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
            del layer.weight_u, layer.weight_v
            for name in ("n_power_iterations", "eps", "iterate_when_frozen", *_PASSING_STATE):
                layer.__dict__.pop(name, None)
            resamples = isinstance(layer, SNConv2d) and layer.resamples
            layer.__class__ = ResamplingConv2d if resamples else layer._plain_class  # type: ignore[assignment]
            if not resamples:
                layer.__dict__.pop("backend", None)
    return module


def apply_spectral_norm(
    model: _ModuleT,
    *,
    exclude: Iterable[str | type[nn.Module] | nn.Module] = (),
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    iterate_when_frozen: bool = True,
) -> _ModuleT:
    """Turn every convolution, linear layer and embedding of ``model`` into its normalised layer, in place.

    Each layer stays the same object with the same parameters, so optimizers, hooks and shared modules are
    undisturbed. Layers that are normalised already are left alone. A weight layer for which there is no
    normalised form here (1-d and 3-d convolutions, recurrent layers, multi-head attention, subclasses with a
    forward of their own, parametrised layers) is an error that names it, unless excluded: none of torch's weight
    layers is skipped in silence.

    Args:
        model: a layer or a network.
        exclude: what to leave as it is, with everything inside it: qualified names or shell patterns of them
            ("head.*", "blocks.0.conv"), classes, or modules.
        n_power_iterations: iterations at each forward.
        eps: added to the norms of u and v.
        iterate_when_frozen: see :class:`SpectralNormLayer`.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: if a weight layer cannot be normalised, or ``exclude`` is a string.
        ValueError: if an entry of ``exclude`` matches nothing, a weight is empty, or an argument is out of
            range. In any case the model has not been changed.

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
    checks.check_sizes(n_power_iterations=n_power_iterations)
    checks.check_positive("eps", eps)
    if isinstance(exclude, str):
        raise TypeError(f"exclude: expected a collection, got the string {exclude!r}; write [{exclude!r}]")
    excluded = _excluded_modules(model, tuple(exclude))
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
        layer._init_spectral_norm(n_power_iterations, eps, iterate_when_frozen)
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
        _refuse_embedding_options(layer.max_norm, layer.sparse)
    weight = layer._parameters.get("weight")
    if not isinstance(weight, nn.Parameter):
        raise TypeError(
            f"the weight of {name or '(the model itself)'!r} is computed by something else (a hook such as "
            "torch.nn.utils.spectral_norm); remove that first, or put the layer's name into exclude"
        )
    if weight.numel() == 0:
        raise ValueError(
            f"the weight of {name or '(the model itself)'!r}: expected at least one element, got shape "
            f"{list(weight.shape)}; put the layer's name into exclude to leave it as it is"
        )
