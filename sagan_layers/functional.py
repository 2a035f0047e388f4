"""Stateless forms of the layers, and the one place that checks a caller's tensors.

Every function takes and returns plain tensors and raises ``ValueError`` or ``TypeError`` that says what was
expected and what came. Shape letters: N batch, C channels, H height, W width, L queries, S keys, E and Ev widths.
"""

from __future__ import annotations

import contextlib
import numbers
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.common_types import _size_2_t

from sagan_layers.ops import dispatch, reference, resampling
from sagan_layers.ops.reference import SelfAttentionWeights, SpectralNormResult
from sagan_layers.ops.reference import SpectralNormTask as SpectralNormTask
from sagan_layers.ops.resampling import Resampling
from sagan_layers.ops.spectral_norm_cpu import LayerMemory as LayerMemory

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "SpectralNormResult",
    "attention",
    "attention_weights",
    "conditional_batch_norm",
    "conv2d_downsample",
    "explain_backends",
    "explain_resampling",
    "force_backend",
    "record_backends",
    "select_backend",
    "select_conditional_norm_backend",
    "select_resampling",
    "self_attention_2d",
    "set_debug_checks",
    "spectral_normalize",
    "upsample_conv2d",
]

_ATTENTION_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_debug_checks = os.environ.get("SAGAN_LAYERS_DEBUG_CHECKS", "0") not in ("", "0")


def set_debug_checks(enabled: bool) -> None:
    """Turn on or off the checks that make the host wait for a GPU.

    Values of labels and query points on the CPU are always checked. On a GPU looking at them would stall the
    stream at every step, so they are checked only after ``set_debug_checks(True)`` or with the environment
    variable ``SAGAN_LAYERS_DEBUG_CHECKS=1``; without, CUDA's own assertion stops an index out of range.
    Inside ``torch.compile`` and ``torch.export`` values are never looked at.

    Args:
        enabled: whether to check.

    Example:
        >>> set_debug_checks(True)
        >>> set_debug_checks(False)
    """
    global _debug_checks
    _debug_checks = enabled


# --- the operations ---------------------------------------------------------------------------------------


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float = 1.0, backend: str = "auto"
) -> Tensor:
    r"""Return for every query the average of the values, weighted by softmax over the keys.

    .. math:: y_l = \sum_s \frac{\exp(c\, q_l \cdot k_s)}{\sum_{s'} \exp(c\, q_l \cdot k_{s'})} v_s

    SAGAN's attention has one head and no :math:`1/\sqrt{E}`, so the default ``scale`` c is 1.

    Args:
        query: [N, L, E], floating point.
        key: [N, S, E].
        value: [N, S, Ev]; Ev need not equal E.
        scale: factor on the logits, a number; for one that learns, multiply the query by it.
        backend: "auto", or the name of a backend to insist on (:func:`select_backend` tells which serves).

    Shape:
        - Output: [N, L, Ev], in the dtype of ``value``.

    Raises:
        ValueError: if shapes or devices disagree, or the named backend does not exist or cannot serve.
        TypeError: if the dtypes disagree or are not floating point.

    Note:
        Logits and softmax are accumulated in float32 for half-precision inputs, under autocast too: unscaled
        logits reach hundreds, where bfloat16 would be off by more than one. Derivatives of every order.

    Reference:
        Zhang et al., Self-Attention Generative Adversarial Networks, section 3 (equations 1 and 2).

    Example:
        >>> query, key, value = torch.randn(2, 9, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 16)
        >>> attention(query, key, value).shape
        torch.Size([2, 9, 16])
    """
    _check_attention_inputs(query, key, value)
    check_number("scale", scale)
    return dispatch.run_attention(query, key, value, float(scale), backend)


def select_backend(query: Tensor, key: Tensor, value: Tensor, *, backend: str = "auto") -> str:
    """Return the name of the backend that :func:`attention` would use for these inputs.

    Args:
        query: [N, L, E].
        key: [N, S, E].
        value: [N, S, Ev].
        backend: as for :func:`attention`.

    Raises:
        ValueError: as :func:`attention`.
        TypeError: as :func:`attention`.

    Example:
        >>> select_backend(torch.randn(2, 9, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 16))
        'reference'
    """
    _check_attention_inputs(query, key, value)
    return dispatch.select_attention_backend(query, key, value, backend).name


def explain_backends(query: Tensor, key: Tensor, value: Tensor) -> dict[str, str]:
    """Return for every backend of :func:`attention` whether it would serve these inputs, and why not.

    Args:
        query: [N, L, E].
        key: [N, S, E].
        value: [N, S, Ev].

    Returns:
        A sentence for each name, in the order in which "auto" asks.

    Raises:
        ValueError: as :func:`attention`.
        TypeError: as :func:`attention`.

    Example:
        >>> query, key, value = torch.randn(2, 9, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 16)
        >>> explain_backends(query, key, value)["sdpa"]
        "serves when named: on a CPU 'chunked' is faster"
    """
    _check_attention_inputs(query, key, value)
    chosen = dispatch.select_attention_backend(query, key, value, "auto").name
    reasons = dispatch.reasons_against_attention_backends(query, key, value)
    return _sentences(reasons, chosen)


def force_backend(backend: str) -> contextlib.AbstractContextManager[None]:
    """Make every attention inside a ``with`` block use one backend, whatever its own ``backend`` says.

    Modules, functions and networks that were built with other choices all follow; contexts nest, the innermost
    holds. A backend that cannot serve raises as it does when named; under "fused" every block must be served so,
    and :func:`attention` outside a block chooses for itself. The choice falls in forward: backward uses the same
    backend also after the ``with`` block has ended. It holds for all threads of the process.

    Args:
        backend: "auto", a backend of :func:`attention`, or "fused" (of :func:`self_attention_2d`).

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> with force_backend("reference"), record_backends() as served:
        ...     _ = attention(torch.randn(1, 4096, 2), torch.randn(1, 1024, 2), torch.randn(1, 1024, 2))
        >>> served
        ['reference']
    """
    return dispatch.force_attention_backend(backend)


def record_backends() -> contextlib.AbstractContextManager[list[str]]:
    """Return a context that yields a list, to which every attention inside adds the name of what served it.

    Calls inside ``torch.compile`` are recorded when they are traced, not when the compiled code runs.

    Example:
        >>> with record_backends() as served:
        ...     _ = attention(torch.randn(1, 4096, 2), torch.randn(1, 1024, 2), torch.randn(1, 1024, 2))
        >>> served
        ['chunked']
    """
    return dispatch.record_attention_backends()


def self_attention_2d(
    x: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    out_weight: Tensor | None,
    gamma: Tensor,
    *,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    out_bias: Tensor | None = None,
    pool_size: int = 2,
    backend: str = "auto",
) -> Tensor:
    r"""Return x plus gamma times what each position of a feature map gathers from all the others.

    .. math:: y = x + \gamma\, W_o\, \mathrm{attention}(W_q x,\; \mathrm{pool}(W_k x),\; \mathrm{pool}(W_v x))

    The stateless form of :class:`~sagan_layers.SelfAttention2d`. Weights come in ready: spectral normalisation
    is the caller's.

    Args:
        x: [N, C, H, W], floating point.
        query_weight: [E, C] or [E, C, 1, 1].
        key_weight: as ``query_weight``.
        value_weight: [Ev, C] or [Ev, C, 1, 1].
        out_weight: [C, Ev] or [C, Ev, 1, 1]; None for the identity (then Ev must be C).
        gamma: a scalar, or one element.
        query_bias: [E] or None.
        key_bias: [E] or None.
        value_bias: [Ev] or None.
        out_bias: [C] or None.
        pool_size: side and stride of the max-pool over keys and values; 1 for none.
        backend: "fused" for two kernels on CUDA; a backend of :func:`attention` for projections, pooling and
            attention one by one; "auto" for the first of these that serves.

    Shape:
        - Output: [N, C, H, W], in the dtype and memory format of x.

    Raises:
        ValueError: if shapes or devices disagree, or the named backend does not exist or cannot serve.
        TypeError: if a tensor is not floating point.

    Note:
        Logits and softmax are accumulated in float32 for half-precision inputs. Under autocast the projections
        are computed in autocast's dtype. Derivatives of every order; the second-order ones of "fused" are
        those of the composed form.

    Reference:
        Zhang et al., Self-Attention Generative Adversarial Networks, section 3.

    Example:
        >>> x, (wq, wk), wv = torch.randn(2, 16, 8, 8), torch.randn(2, 2, 16), torch.randn(8, 16)
        >>> self_attention_2d(x, wq, wk, wv, torch.randn(16, 8), torch.tensor(0.1)).shape
        torch.Size([2, 16, 8, 8])
    """
    weights = _self_attention_weights(
        x,
        {"query_weight": query_weight, "key_weight": key_weight, "value_weight": value_weight},
        out_weight,
        gamma,
        {"query_bias": query_bias, "key_bias": key_bias, "value_bias": value_bias, "out_bias": out_bias},
    )
    check_sizes(pool_size=pool_size)
    check_block_backend(backend)
    if min(x.shape[2:]) < pool_size:
        raise ValueError(f"x: expected height and width of at least pool_size = {pool_size}, got {_shape(x)}")
    fused = dispatch.run_self_attention(x, weights, pool_size, backend)
    if fused is not None:
        return fused
    return reference.self_attention_2d(x, weights, pool_size, partial(_attend, backend=backend))


def attention_weights(query: Tensor, key: Tensor, *, scale: float = 1.0) -> Tensor:
    """Return the weights that each query gives to each key; they sum to one over the keys.

    Args:
        query: [N, L, E], floating point; pass only the queries of interest, the result has L x S entries.
        key: [N, S, E].
        scale: factor on the logits.

    Shape:
        - Output: [N, L, S], float32 (float64 for float64 inputs).

    Raises:
        ValueError: if shapes or devices disagree.
        TypeError: if the dtypes disagree or are not floating point.

    Reference:
        Zhang et al., Self-Attention Generative Adversarial Networks, section 3 (equation 1).

    Example:
        >>> weights = attention_weights(torch.randn(2, 3, 4), torch.randn(2, 5, 4))
        >>> torch.allclose(weights.sum(dim=-1), torch.ones(2, 3))
        True
    """
    _check_attention_inputs(query, key, key)
    check_number("scale", scale)
    return reference.attention_weights(query, key, float(scale))


def spectral_normalize(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    dim: int = 0,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
) -> SpectralNormResult:
    r"""Return ``weight / sigma``, sigma the spectral norm of the weight seen as a matrix.

    Each power iteration sets :math:`v = W^T u / \|W^T u\|`, then :math:`u = W v / \|W v\|`; then
    :math:`\sigma = u^T W v`. Nothing is changed in place: the moved u and v are in the result.

    Args:
        weight: at least two axes; as a matrix [out, rest] with ``dim`` moved to the front.
        u: [out], an estimate of the left singular vector.
        v: [rest], of the right one; only used when ``n_power_iterations`` is 0.
        dim: the axis of the outputs, 0 or 1.
        n_power_iterations: how often u and v move before sigma is taken.
        eps: added to the norms of u and v; a weight whose sigma is not above it is returned unnormalised, so
            that zeros stay zeros and their gradient stays finite.

    Returns:
        ``(weight, sigma, u, v)``: the normalised weight in the weight's dtype; sigma, a scalar; u and v.

    Raises:
        ValueError: if shapes or devices disagree, or a number is out of range.
        TypeError: if a tensor is not floating point.

    Note:
        Computed in float32 (float64 for float64 weights), also under autocast. u and v are constants for
        autograd; the released TensorFlow code differentiates through the iteration. Both agree once u has
        converged.

    Reference:
        Miyato et al., Spectral Normalization for Generative Adversarial Networks, algorithm 1.

    Example:
        >>> weight = torch.randn(8, 3, 3, 3)
        >>> result = spectral_normalize(weight, torch.randn(8), torch.randn(27), n_power_iterations=200)
        >>> matrix = result.weight.flatten(1)
        >>> round(torch.linalg.matrix_norm(matrix, 2).item(), 4)
        1.0
    """
    check_floating("weight", weight)
    if weight.dim() < 2 or dim not in (0, 1):
        raise ValueError(
            f"weight: expected at least 2 axes and dim 0 or 1, got {_shape(weight)} and dim {dim!r}"
        )
    rest = weight.numel() // weight.size(dim) if weight.size(dim) else 0
    for name, vector, length in (("u", u, weight.size(dim)), ("v", v, rest)):
        check_floating(name, vector)
        if vector.shape != (length,):
            raise ValueError(f"{name}: expected shape [{length}], got {_shape(vector)}")
        check_same_device(name, vector, "the weight", weight)
    if n_power_iterations < 0:
        raise ValueError(f"n_power_iterations: expected at least 0, got {n_power_iterations}")
    check_positive("eps", eps)
    return reference.spectral_normalize(weight, u, v, n_power_iterations, eps, dim)


def conditional_batch_norm(
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    biased_running_var: bool = False,
    process_group: ProcessGroup | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Return the batch-normalised x with a gain and a bias for each sample, and ReLU of that if asked.

    .. math:: y_{nc} = \mathrm{gain}_{nc}\, \frac{x_{nc} - \mu_c}{\sqrt{\sigma^2_c + \epsilon}} + \mathrm{bias}_{nc}

    Mean and (biased) variance are the batch's when ``training`` or when there are no running statistics, and
    else the running ones. When ``training``, running statistics move in place by ``momentum``.

    Args:
        x: [N, C, *], floating point; two axes or more.
        gain: [N, C], or [C] for all samples alike.
        bias: as ``gain``.
        running_mean: [C] or None.
        running_var: [C] or None, both or neither.
        training: whether to use and record the batch's statistics.
        momentum: weight of the batch in the running statistics, a number or a scalar tensor.
        eps: added to the variance.
        biased_running_var: record the biased variance, as TensorFlow does; torch's batch norm records the
            unbiased one.
        process_group: take the batch's statistics over all processes of this group.
        activation: "relu" for ReLU of the result, computed in the same pass; None for nothing.
        backend: "auto", or the name of a backend to insist on (:func:`select_conditional_norm_backend` tells
            which serves).

    Shape:
        - Output: as x, in the dtype of x.

    Raises:
        ValueError: if shapes or devices disagree, statistics would be taken of a single value a channel, or the
            named backend does not exist or cannot serve.
        TypeError: if a tensor is not floating point.

    Note:
        Statistics are taken in float32 (float64 for float64 inputs), the mean subtracted before scaling, so
        large means lose no digits. Derivatives of every order. With ReLU, backward reads the output, which must
        not be changed in place.

    Reference:
        Dumoulin et al., A Learned Representation For Artistic Style (conditional instance norm); Miyato and
        Koyama, cGANs with Projection Discriminator, for batch norm in G.

    Example:
        >>> x = torch.randn(4, 3, 5, 5) * 7 + 2
        >>> y = conditional_batch_norm(x, torch.ones(4, 3), torch.zeros(4, 3), training=True)
        >>> bool(y.mean().abs() < 1e-5), bool((y.std() - 1).abs() < 1e-2)
        (True, True)
    """
    _check_feature_map(x)
    check_positive("eps", eps)
    check_activation(activation)
    num_features = x.size(1)
    for name, coefficients in (("gain", gain), ("bias", bias)):
        check_floating(name, coefficients)
        expected = x.shape[:2] if coefficients.dim() == 2 else x.shape[1:2]
        if coefficients.shape != expected:
            raise ValueError(
                f"{name}: expected [N, C] = [{x.size(0)}, {num_features}] or [{num_features}], "
                f"got {_shape(coefficients)}"
            )
        check_same_device(name, coefficients, "x", x)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var: expected both or neither, got one")
    for name, statistic in (("running_mean", running_mean), ("running_var", running_var)):
        if statistic is not None:
            if statistic.shape != (num_features,):
                raise ValueError(f"{name}: expected shape [{num_features}], got {_shape(statistic)}")
            check_same_device(name, statistic, "x", x)
    use_batch = training or running_mean is None
    alone = process_group is None or process_group.size() == 1
    if use_batch and alone and x.numel() <= num_features:
        raise ValueError(
            f"x: expected more than 1 value per channel to take batch statistics, got {_shape(x)}"
        )
    given = None
    if not use_batch:
        assert running_mean is not None
        assert running_var is not None
        given = running_mean, running_var
    chosen = dispatch.select_conditional_norm_backend(x, given, process_group, backend)
    relu = activation == "relu"
    y, mean, var, count = chosen.run(x, gain, bias, given, eps, relu, process_group)
    if training and running_mean is not None and running_var is not None:
        assert count is not None
        if isinstance(count, Tensor):  # of a group, whose values nobody could count before
            if count.device.type == "cpu" and not torch.compiler.is_compiling() and bool(count < 2):
                raise ValueError(
                    f"x: expected more than one value per channel in training, got {int(count)} in all processes"
                )
            count = count.clamp_min(2)
        with torch.no_grad():
            recorded = var.detach() if biased_running_var else var.detach() * (count / (count - 1))
            for statistic, batch in ((running_mean, mean.detach()), (running_var, recorded)):
                share = momentum.to(statistic.dtype) if isinstance(momentum, Tensor) else momentum
                statistic.lerp_(batch.to(statistic.dtype), share)
    return y


def select_conditional_norm_backend(
    x: Tensor, *, process_group: ProcessGroup | None = None, backend: str = "auto"
) -> str:
    """Return the name of the backend that :func:`conditional_batch_norm` would use for this x.

    Args:
        x: [N, C, *].
        process_group: as for :func:`conditional_batch_norm`.
        backend: as for :func:`conditional_batch_norm`.

    Raises:
        ValueError: if the named backend does not exist or cannot serve.
        TypeError: if x is not floating point.

    Example:
        >>> select_conditional_norm_backend(torch.randn(8, 64, 32, 32))
        'blocked'
    """
    _check_feature_map(x)
    return dispatch.select_conditional_norm_backend(x, None, process_group, backend).name


def upsample_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    factor: int = 2,
    padding: str | _size_2_t = 0,
    dilation: _size_2_t = 1,
    groups: int = 1,
    backend: str = "auto",
) -> Tensor:
    r"""Return the convolution of x after nearest upsampling, without making the upsampled map.

    .. math:: y_{ij} = b + \sum_{de} W_{de}\, x_{\lfloor (i + d - p) / s \rfloor, \lfloor (j + e - p) / s \rfloor}

    Equal to ``conv2d(interpolate(x, scale_factor=factor, mode="nearest"), weight, bias, padding=padding)`` with a
    fraction of its multiplications: a quarter for a factor of 2.

    Args:
        x: [N, C, H, W] or [C, H, W], floating point.
        weight: [out, C / groups, kernel height, kernel width], as for the plain convolution.
        bias: [out] or None.
        factor: s, by which height and width grow.
        padding: p, zeros around the upsampled map: a number, one for (height, width), "same" or "valid".
        dilation: of the kernel, a number or one for (height, width).
        groups: of the convolution.
        backend: "auto", or the name of a form to insist on (:func:`explain_resampling` lists them).

    Shape:
        - Output: [N, out, Ho, Wo] with Ho = s H + 2 p - dilation (kernel height - 1).

    Raises:
        ValueError: if shapes or devices disagree, nothing would be left of the map, or the named form does not
            exist or cannot serve.
        TypeError: if the dtypes disagree or are not floating point, or a size is not an integer.

    Note:
        Sums are taken in another order than in the plain composition, so in 16 bits the last digit differs.
        Derivatives of every order.

    Reference:
        Released code of Zhang et al., Self-Attention Generative Adversarial Networks (``usample`` before
        ``snconv2d``), computed as here.

    Example:
        >>> x, weight = torch.randn(2, 16, 8, 8), torch.randn(4, 16, 3, 3)
        >>> upsample_conv2d(x, weight, padding=1).shape
        torch.Size([2, 4, 16, 16])
    """
    return _resample(x, weight, bias, True, factor, padding, dilation, groups, backend)


def conv2d_downsample(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    factor: int = 2,
    padding: str | _size_2_t = 0,
    dilation: _size_2_t = 1,
    groups: int = 1,
    backend: str = "auto",
) -> Tensor:
    r"""Return the convolution of x, average-pooled, without making the map before pooling.

    .. math:: y_{ij} = b + \frac{1}{s^2} \sum_{ab} \sum_{de} W_{de}\, x_{s i + a + d - p, s j + b + e - p}

    Equal to ``avg_pool2d(conv2d(x, weight, bias, padding=padding), factor)`` with a fraction of its
    multiplications: a quarter for a factor of 2. An incomplete square at the border is left out, as there.

    Args:
        x: [N, C, H, W] or [C, H, W], floating point.
        weight: [out, C / groups, kernel height, kernel width], as for the plain convolution.
        bias: [out] or None.
        factor: s, side and stride of the pooling.
        padding: p, zeros around x: a number, one for (height, width), "same" or "valid".
        dilation: of the kernel, a number or one for (height, width).
        groups: of the convolution.
        backend: "auto", or the name of a form to insist on (:func:`explain_resampling` lists them).

    Shape:
        - Output: [N, out, Ho, Wo] with Ho = (H + 2 p - dilation (kernel height - 1)) // s.

    Raises:
        ValueError: if shapes or devices disagree, nothing would be left of the map, or the named form does not
            exist or cannot serve.
        TypeError: if the dtypes disagree or are not floating point, or a size is not an integer.

    Note:
        As :func:`upsample_conv2d`.

    Reference:
        Released code of Zhang et al., Self-Attention Generative Adversarial Networks (``dsample`` after
        ``snconv2d``), computed as here.

    Example:
        >>> x, weight = torch.randn(2, 4, 16, 16), torch.randn(8, 4, 3, 3)
        >>> conv2d_downsample(x, weight, padding=1).shape
        torch.Size([2, 8, 8, 8])
    """
    return _resample(x, weight, bias, False, factor, padding, dilation, groups, backend)


def select_resampling(
    x: Tensor,
    weight: Tensor,
    *,
    upsample: int = 1,
    downsample: int = 1,
    padding: str | _size_2_t = 0,
    dilation: _size_2_t = 1,
    groups: int = 1,
    backend: str = "auto",
) -> str:
    """Return the name of the form that :func:`upsample_conv2d` or :func:`conv2d_downsample` would use.

    Args:
        x: [N, C, H, W] or [C, H, W].
        weight: [out, C / groups, kernel height, kernel width].
        upsample: the factor of :func:`upsample_conv2d`, or
        downsample: the factor of :func:`conv2d_downsample`; one of the two is 1.
        padding: as for these functions.
        dilation: as for these functions.
        groups: as for these functions.
        backend: as for these functions.

    Raises:
        ValueError: as these functions.
        TypeError: as these functions.

    Example:
        >>> select_resampling(torch.randn(4, 64, 32, 32), torch.randn(64, 64, 3, 3), upsample=2, padding=1)
        'filtered'
    """
    x, how = _checked_resampling(x, weight, None, upsample, downsample, padding, dilation, groups)
    return resampling.select_resampling_backend(x, weight, how, backend).name


def explain_resampling(
    x: Tensor,
    weight: Tensor,
    *,
    upsample: int = 1,
    downsample: int = 1,
    padding: str | _size_2_t = 0,
    dilation: _size_2_t = 1,
    groups: int = 1,
) -> dict[str, str]:
    """Return for every form of a resampling convolution whether it would serve these inputs, and why not.

    Args:
        x: [N, C, H, W] or [C, H, W].
        weight: [out, C / groups, kernel height, kernel width].
        upsample: as for :func:`select_resampling`.
        downsample: as for :func:`select_resampling`.
        padding: as for :func:`select_resampling`.
        dilation: as for :func:`select_resampling`.
        groups: as for :func:`select_resampling`.

    Returns:
        A sentence for each name, in the order in which "auto" asks.

    Raises:
        ValueError: as :func:`upsample_conv2d`.
        TypeError: as :func:`upsample_conv2d`.

    Example:
        >>> x, weight = torch.randn(4, 64, 32, 32), torch.randn(64, 64, 3, 3)
        >>> explain_resampling(x, weight, downsample=2, padding=1)["reordered"]
        'cannot serve: the kernel is 3x3, and only 1x1 commutes with resampling'
    """
    x, how = _checked_resampling(x, weight, None, upsample, downsample, padding, dilation, groups)
    chosen = resampling.select_resampling_backend(x, weight, how, "auto").name
    return _sentences(resampling.reasons_against_resampling_backends(x, weight, how), chosen)


# --- what the modules share ---------------------------------------------------------------------------


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which tensors of ``dtype`` are accumulated: float64 for itself, else float32."""
    return reference.compute_dtype(dtype)


def normalize_layer_weight(task: SpectralNormTask) -> SpectralNormResult:
    """Return :func:`spectral_normalize` for a layer, on the backend that suits its weight; sigma has no graph."""
    return dispatch.run_spectral_norm(task)


def normalize_layer_weights(tasks: list[SpectralNormTask]) -> list[SpectralNormResult]:
    """Return the same for many layers in one call, without graphs; see :func:`with_spectral_gradient`."""
    return dispatch.run_spectral_norms(tasks)


def with_spectral_gradient(task: SpectralNormTask, result: SpectralNormResult) -> Tensor:
    """Return the normalised weight of a result as a function of the task's weight for autograd."""
    return dispatch.with_gradient(task, result)


def check_conditional_norm_backend(name: str) -> None:
    """Raise ``ValueError`` unless ``name`` is "auto" or a backend of :func:`conditional_batch_norm`."""
    dispatch.check_conditional_norm_backend_name(name)


def check_block_backend(name: str) -> None:
    """Raise ``ValueError`` unless ``name`` is "auto" or a backend of :func:`self_attention_2d`."""
    dispatch.check_attention_backend_name(name, also=(dispatch.FUSED,))


def compose_self_attention(
    x: Tensor,
    query: Callable[[Tensor], Tensor],
    key: Callable[[Tensor], Tensor],
    value: Callable[[Tensor], Tensor],
    out: Callable[[Tensor], Tensor],
    gamma: Tensor,
    *,
    pool_size: int,
    backend: str,
) -> Tensor:
    """Return :func:`self_attention_2d` with projections of any kind, which are called as they are.

    Raises:
        ValueError: if ``backend`` cannot serve; "fused" cannot, as it needs weights.
    """
    if dispatch.chosen_name(backend) == dispatch.FUSED:
        raise ValueError(
            "no self-attention backend serves these inputs (fused: a projection is not a plain 1x1 convolution, "
            "or has hooks)"
        )
    return reference.compose_self_attention(
        x, query, key, value, out, gamma, pool_size, partial(_attend, backend=backend)
    )


def positions(features: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H*W, C], a view where the memory format allows it."""
    return reference.positions(features)


def check_resampling(upsample: object, downsample: object, backend: str) -> None:
    """Raise unless both are factors, at most one of them above 1, and the backend exists.

    Raises:
        ValueError: for their values.
        TypeError: if a factor is not an integer.
    """
    check_sizes(upsample=upsample, downsample=downsample)
    if upsample != 1 and downsample != 1:
        raise ValueError(
            f"upsample, downsample: expected one of them to be 1, got {upsample} and {downsample}"
        )
    resampling.check_resampling_backend_name(backend)


def _resample(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    upsample: bool,
    factor: int,
    padding: str | _size_2_t,
    dilation: _size_2_t,
    groups: int,
    backend: str,
) -> Tensor:
    check_sizes(factor=factor)
    factors = (factor, 1) if upsample else (1, factor)
    batch, how = _checked_resampling(x, weight, bias, *factors, padding, dilation, groups)
    y = resampling.run_resampling(batch, weight, bias, how, backend)
    return y if x.dim() == 4 else y.squeeze(0)


def _checked_resampling(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    upsample: int,
    downsample: int,
    padding: str | _size_2_t,
    dilation: _size_2_t,
    groups: int,
) -> tuple[Tensor, Resampling]:
    """Return x as [N, C, H, W] and the options in full, after all checks.

    Raises:
        ValueError: if shapes, devices or options disagree.
        TypeError: if a tensor is not floating point or a size not an integer.
    """
    check_resampling(upsample, downsample, "auto")
    check_sizes(groups=groups)
    check_floating("x", x)
    if x.dim() not in (3, 4):
        raise ValueError(f"x: expected [N, C, H, W] or [C, H, W], got {_shape(x)}")
    batch = x if x.dim() == 4 else x.unsqueeze(0)
    check_floating("weight", weight)
    check_same_device("weight", weight, "x", x)
    _check_same_dtype("weight", weight, x)
    C = batch.size(1)
    if weight.dim() != 4 or weight.numel() == 0:
        raise ValueError(
            f"weight: expected [out, C / groups, kernel height, kernel width], got {_shape(weight)}"
        )
    if weight.size(1) * groups != C or weight.size(0) % groups:
        raise ValueError(
            f"weight: expected [out, C / groups, kernel height, kernel width] with C = {C} and groups = {groups} "
            f"dividing out, got {_shape(weight)}"
        )
    if bias is not None:
        check_floating("bias", bias)
        check_same_device("bias", bias, "x", x)
        _check_same_dtype("bias", bias, x)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected [{weight.size(0)}], got {_shape(bias)}")
    dilations = _pair("dilation", dilation, least=1)
    how = Resampling(
        upsample=upsample > 1,
        factor=max(upsample, downsample),
        padding=_explicit_padding(padding, dilations, weight),
        dilation=dilations,
        groups=groups,
    )
    output = how.output_size(batch, weight)
    if min(output) < 1:
        raise ValueError(
            f"x: expected a larger map (the output would have {output[0]} x {output[1]} positions), got {_shape(x)}"
        )
    return batch, how


def _explicit_padding(
    padding: str | _size_2_t, dilation: tuple[int, int], weight: Tensor
) -> tuple[int, int] | str:
    """Return the zeros on each side of (height, width), or "same" where the two sides differ."""
    if padding == "valid":
        return (0, 0)
    if padding == "same":
        height, width = (dilation[i] * (weight.size(2 + i) - 1) for i in range(2))
        return "same" if height % 2 or width % 2 else (height // 2, width // 2)
    if isinstance(padding, str):
        raise ValueError(f"padding: expected numbers, 'same' or 'valid', got {padding!r}")
    return _pair("padding", padding, least=0)


def _pair(name: str, value: _size_2_t, *, least: int) -> tuple[int, int]:
    """Return one number as two, after checks."""
    pair: tuple[object, ...] = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name}: expected one number or two, got {value!r}")
    first, second = (_integer(name, number, least=least) for number in pair)
    return first, second


def _integer(name: str, number: object, *, least: int) -> int:
    if isinstance(number, bool) or not isinstance(number, numbers.Integral):
        raise TypeError(f"{name}: expected an int, got {number!r}")
    if int(number) < least:
        raise ValueError(f"{name}: expected at least {least}, got {number}")
    return int(number)


def _sentences(reasons: dict[str, tuple[list[str], list[str]]], chosen: str) -> dict[str, str]:
    """Return for every backend what speaks against it, or that it is chosen."""
    sentences = {}
    for name, (against, unasked) in reasons.items():
        if against:
            sentences[name] = f"cannot serve: {'; '.join(against)}"
        elif name == chosen:
            sentences[name] = "chosen"
        else:
            sentences[name] = f"serves when named: {'; '.join(unasked) or f'{chosen!r} comes first'}"
    return sentences


def _attend(query: Tensor, key: Tensor, value: Tensor, *, backend: str) -> Tensor:
    return attention(query, key, value, backend=backend)


def _self_attention_weights(
    x: Tensor,
    projections: dict[str, Tensor],
    out_weight: Tensor | None,
    gamma: Tensor,
    biases: dict[str, Tensor | None],
) -> SelfAttentionWeights:
    """Return the parameters of a block without their spatial axes, after all checks.

    Raises:
        ValueError: if shapes or devices disagree.
        TypeError: if a tensor is not floating point.
    """
    check_floating("x", x)
    if x.dim() != 4:
        raise ValueError(f"x: expected [N, C, H, W], got {_shape(x)}")
    C = x.size(1)
    query, key, value = (_matrix(name, weight, x, columns=C) for name, weight in projections.items())
    if key.size(0) != query.size(0):
        raise ValueError(f"key_weight: expected [E, C] = [{query.size(0)}, {C}], got {_shape(key)}")
    out = None if out_weight is None else _matrix("out_weight", out_weight, x, columns=value.size(0))
    if (value if out is None else out).size(0) != C:
        name, got = ("value_weight", value) if out is None else ("out_weight", out)
        raise ValueError(f"{name}: expected C = {C} rows, got {_shape(got)}")
    if out is None and biases["out_bias"] is not None:
        raise ValueError("out_bias: expected None without out_weight, got a tensor")
    for (name, bias), rows in zip(biases.items(), (query, key, value, out), strict=True):
        if bias is not None:
            assert rows is not None
            check_floating(name, bias)
            check_same_device(name, bias, "x", x)
            _check_same_dtype(name, bias, x)
            if bias.shape != rows.shape[:1]:
                raise ValueError(f"{name}: expected [{rows.size(0)}], got {_shape(bias)}")
    check_floating("gamma", gamma)
    check_same_device("gamma", gamma, "x", x)
    if gamma.numel() != 1:
        raise ValueError(f"gamma: expected one element, got {_shape(gamma)}")
    return SelfAttentionWeights(query, key, value, out, **biases, gamma=gamma.reshape(()))


def _matrix(name: str, weight: Tensor, x: Tensor, *, columns: int) -> Tensor:
    check_floating(name, weight)
    check_same_device(name, weight, "x", x)
    if weight.dim() == 4 and weight.shape[2:] == (1, 1):
        weight = weight.flatten(1)
    _check_same_dtype(name, weight, x)
    if weight.dim() != 2 or weight.size(1) != columns or weight.size(0) < 1:
        raise ValueError(
            f"{name}: expected [rows, {columns}] or [rows, {columns}, 1, 1], got {_shape(weight)}"
        )
    return weight


def _check_same_dtype(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, got {tensor.dtype}")


def check_number(name: str, number: object) -> None:
    """Raise ``TypeError`` unless this is a real number; a tensor would lose its gradient."""
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {_kind(number)}")


def check_positive(name: str, number: float) -> None:
    """Raise ``ValueError`` unless the number is above zero."""
    if not number > 0:
        raise ValueError(f"{name}: expected a positive number, got {number!r}")


def check_activation(activation: str | None) -> None:
    """Raise ``ValueError`` unless it is None or "relu"."""
    if activation not in (None, "relu"):
        raise ValueError(f"activation: expected None or 'relu', got {activation!r}")


def check_sizes(**sizes: object) -> None:
    """Raise ``TypeError`` unless every size is an integer, ``ValueError`` unless it is at least 1."""
    for name, size in sizes.items():
        _integer(name, size, least=1)


def check_parameter_dtype(dtype: torch.dtype | None) -> None:
    """Raise ``TypeError`` unless parameters can have this dtype."""
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")


def check_convolution(
    kernel_size: _size_2_t, stride: _size_2_t, padding: str | _size_2_t, dilation: _size_2_t
) -> None:
    """Raise unless kernel size, stride and dilation are at least 1, and the padding is not negative."""
    for name, value, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("dilation", dilation, 1),
        ("padding", padding, 0),
    ):
        for size in value if isinstance(value, (tuple, list)) else (value,):
            if not isinstance(size, str) and not size >= least:
                raise ValueError(f"{name}: expected at least {least}, got {value!r}")


def check_input(
    x: Tensor, *, channels: int, dims: tuple[int, ...], layout: str, like: Tensor, channel_axis: int
) -> None:
    """Raise unless x has one of the ranks ``dims``, ``channels`` on its axis, and the dtype and device of ``like``.

    Args:
        x: a module's input.
        channels: what the module was made for.
        dims: allowed numbers of axes.
        layout: how the expected shape is written in the message, for example "[N, C, H, W]".
        like: a parameter of the module. Under autocast any floating dtype passes.
        channel_axis: where the channels are, counted from the end (negative).

    Raises:
        ValueError: for rank, channels or device.
        TypeError: if x is not a floating-point tensor of the module's dtype.
    """
    check_floating("input", x)
    if x.dim() not in dims or x.size(channel_axis) != channels:
        raise ValueError(f"input: expected {layout} with C = {channels}, got {_shape(x)}")
    _check_module_tensor("input", x, like)


def check_image(x: Tensor, *, channels: int, like: Tensor) -> None:
    """Raise unless x is [N, C, H, W] or [C, H, W] as :func:`check_input` wants it."""
    layout = "[N, C, H, W] or [C, H, W]"
    check_input(x, channels=channels, dims=(3, 4), layout=layout, like=like, channel_axis=-3)


def check_features(x: Tensor, *, features: int, like: Tensor, name: str = "input") -> None:
    """Raise unless the last axis of x has ``features`` entries, in the dtype and on the device of ``like``.

    Raises:
        ValueError: for the size or device.
        TypeError: if x is not a floating-point tensor of the module's dtype.
    """
    check_floating(name, x)
    if x.dim() < 1 or x.size(-1) != features:
        raise ValueError(f"{name}: expected [*, {features}], got {_shape(x)}")
    _check_module_tensor(name, x, like)


def check_indices(name: str, indices: object, *, upper: int, like: Tensor) -> None:
    """Raise unless ``indices`` are int64 or int32, on the device of ``like`` and in ``[0, upper)``.

    Values on a GPU are looked at only when :func:`set_debug_checks` asks for it.

    Raises:
        ValueError: for device or range.
        TypeError: if they are not integers.
    """
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected an int64 or int32 tensor, got {_kind(indices)}")
    check_same_device(name, indices, "the module's parameters", like)
    if torch.compiler.is_compiling() or indices.is_meta or indices.numel() == 0:
        return
    if indices.device.type == "cpu" or _debug_checks:
        low, high = (int(bound) for bound in torch.aminmax(indices))
        if low < 0 or high >= upper:
            raise ValueError(
                f"{name}: expected values from 0 to {upper - 1}, got values from {low} to {high}"
            )


def check_labels(labels: Tensor | None, *, num_classes: int | None, batch: int, like: Tensor) -> None:
    """Raise unless there is one label in ``[0, num_classes)`` for each sample, or none where none is wanted.

    Raises:
        ValueError: for shape, device or range, or for labels that are missing or not wanted.
        TypeError: if they are not integers.
    """
    if num_classes is None:
        if labels is not None:
            raise ValueError("labels: expected None (the module has no classes), got a tensor")
        return
    if labels is None:
        raise ValueError(f"labels: expected class indices of shape [N] = [{batch}], got None")
    check_indices("labels", labels, upper=num_classes, like=like)
    if labels.shape != (batch,):
        raise ValueError(f"labels: expected shape [N] = [{batch}], got {_shape(labels)}")


def _check_attention_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_floating(name, tensor)
        if tensor.dim() != 3:
            raise ValueError(f"{name}: expected 3 axes [N, length, width], got {_shape(tensor)}")
        if tensor.dtype not in _ATTENTION_DTYPES:
            raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: expected the query's dtype {query.dtype}, got {tensor.dtype}")
        check_same_device(name, tensor, "the query", query)
    batch, _, width = query.shape
    if key.size(0) != batch or key.size(2) != width or key.size(1) < 1 or width < 1:
        raise ValueError(f"key: expected [N, S, E] = [{batch}, S, {width}] with S, E >= 1, got {_shape(key)}")
    if value.shape[:2] != key.shape[:2] or value.size(2) < 1:
        raise ValueError(
            f"value: expected [N, S, Ev] = [{batch}, {key.size(1)}, Ev] with Ev >= 1, got {_shape(value)}"
        )


def _check_feature_map(x: Tensor) -> None:
    check_floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x: expected [N, C, *], got {_shape(x)}")


def _check_module_tensor(name: str, x: Tensor, like: Tensor) -> None:
    check_same_device(name, x, "the module's parameters", like)
    if x.dtype != like.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"{name}: expected the module's dtype {like.dtype}, got {x.dtype}; convert one, or use torch.autocast"
        )


def check_floating(name: str, tensor: object) -> None:
    """Raise ``TypeError`` unless this is a floating-point tensor."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {_kind(tensor)}")


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ``ValueError`` unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {tensor.device}")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _kind(thing: object) -> str:
    return str(thing.dtype) if isinstance(thing, Tensor) else type(thing).__name__
