"""The stateless forms of attention: checks, then the backend that serves."""

from __future__ import annotations

from torch import Tensor

from sagan_layers.attention import reference
from sagan_layers.attention.reference import (
    AttentionInputs,
    NonResidualInputs,
    ProjectionLayers,
    ProjectionWeights,
    SelfAttentionInputs,
)
from sagan_layers.attention.table import attend, self_attend
from sagan_layers.checks import (
    check_floating,
    check_same_device,
    check_same_dtype,
    flags_of,
    integer_of,
    number_of,
    shape_of,
)


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
        backend: "auto", or the name of a backend to require (:func:`select_backend` returns which one serves).

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
        >>> import torch
        >>> query, key, value = torch.randn(2, 9, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 16)
        >>> attention(query, key, value).shape
        torch.Size([2, 9, 16])
    """
    inputs = attention_inputs(query, key, value)
    return attend(*inputs, number_of("scale", scale), backend)


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
    residual: bool = True,
    backend: str = "auto",
) -> Tensor:
    r"""Return x plus gamma times the attention output of a feature map's positions.

    .. math:: y = x + \gamma\, W_o\, \mathrm{attention}(W_q x,\; \mathrm{pool}(W_k x),\; \mathrm{pool}(W_v x))

    The stateless form of :class:`~sagan_layers.SelfAttention2d`. It takes the weights as they are; the caller applies
    spectral normalisation.

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
        residual: whether x is added; if not, the result is the second term alone, and "fused" cannot serve.
        backend: "fused" for two kernels on CUDA; "composed", or a backend of :func:`attention`, for projections,
            pooling and attention one by one; "auto" for the first that serves.

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
        >>> import torch
        >>> x, (wq, wk), wv = torch.randn(2, 16, 8, 8), torch.randn(2, 2, 16), torch.randn(8, 16)
        >>> self_attention_2d(x, wq, wk, wv, torch.randn(16, 8), torch.tensor(0.1)).shape
        torch.Size([2, 16, 8, 8])
    """
    weights = ProjectionWeights(
        query_weight, key_weight, value_weight, out_weight, query_bias, key_bias, value_bias, out_bias
    )
    return self_attention_of_projections(
        x, weights, gamma, pool_size=pool_size, residual=residual, backend=backend
    )


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
        >>> import torch
        >>> weights = attention_weights(torch.randn(2, 3, 4), torch.randn(2, 5, 4))
        >>> torch.allclose(weights.sum(dim=-1), torch.ones(2, 3))
        True
    """
    attention_inputs(query, key, key)
    return reference.attention_weights(query, key, number_of("scale", scale))


def self_attention_of_projections(
    x: Tensor,
    projections: ProjectionWeights | ProjectionLayers,
    gamma: Tensor,
    *,
    pool_size: int,
    residual: bool,
    backend: str,
) -> Tensor:
    """Return :func:`self_attention_2d` for a record of weights, or for layers of any kind.

    Raises:
        ValueError: as :func:`self_attention_2d`; also if ``backend`` is "fused" and the projections are layers.
        TypeError: as :func:`self_attention_2d`.
    """
    inputs = _record(residual)(x, projections, gamma, pool_size)
    return self_attend(_checked(inputs) if isinstance(projections, ProjectionWeights) else inputs, backend)


def self_attention_inputs(
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
    residual: bool = True,
) -> SelfAttentionInputs:
    """Return the arguments of :func:`self_attention_2d` as its backends take them, after all checks."""
    weights = ProjectionWeights(
        query_weight, key_weight, value_weight, out_weight, query_bias, key_bias, value_bias, out_bias
    )
    return _checked(_record(residual)(x, weights, gamma, pool_size))


def _record(residual: bool) -> type[SelfAttentionInputs]:
    (residual,) = flags_of(residual=residual)
    return SelfAttentionInputs if residual else NonResidualInputs


def _checked(inputs: SelfAttentionInputs) -> SelfAttentionInputs:
    """Return the inputs with weights and gamma as the formula sees them, after all checks.

    Raises:
        ValueError: if shapes or devices disagree.
        TypeError: if a tensor is not floating point, or dtypes disagree.
    """
    x, weights, gamma, pool_size = inputs
    assert isinstance(weights, ProjectionWeights)
    check_floating("x", x)
    if x.dim() != 4:
        raise ValueError(f"x: expected [N, C, H, W], got {shape_of(x)}")
    C = x.size(1)
    query = _matrix("query_weight", weights.query, x, columns=C)
    key = _matrix("key_weight", weights.key, x, columns=C)
    value = _matrix("value_weight", weights.value, x, columns=C)
    if key.size(0) != query.size(0):
        raise ValueError(f"key_weight: expected [E, C] = [{query.size(0)}, {C}], got {shape_of(key)}")
    if weights.out is None:
        out, name, last = None, "value_weight", value
        if weights.out_bias is not None:
            raise ValueError("out_bias: expected None without out_weight, got a tensor")
    else:
        out = last = _matrix("out_weight", weights.out, x, columns=value.size(0))
        name = "out_weight"
    if last.size(0) != C:
        raise ValueError(f"{name}: expected C = {C} rows, got {shape_of(last)}")
    _check_bias("query_bias", weights.query_bias, x, rows=query.size(0))
    _check_bias("key_bias", weights.key_bias, x, rows=key.size(0))
    _check_bias("value_bias", weights.value_bias, x, rows=value.size(0))
    _check_bias("out_bias", weights.out_bias, x, rows=C)
    check_floating("gamma", gamma)
    check_same_device("gamma", gamma, "x", x)
    if gamma.numel() != 1:
        raise ValueError(f"gamma: expected one element, got {shape_of(gamma)}")
    pool_size = integer_of("pool_size", pool_size, least=1)
    if min(x.shape[2:]) < pool_size:
        raise ValueError(
            f"x: expected height and width of at least pool_size = {pool_size}, got {shape_of(x)}; pool_size=1 takes "
            "maps of any size"
        )
    # Written out: torch.compile of torch 2.6 has no slices of named tuples.
    biases = weights.query_bias, weights.key_bias, weights.value_bias, weights.out_bias
    matrices = ProjectionWeights(query, key, value, out, *biases)
    return type(inputs)(x, matrices, gamma.reshape(()), pool_size)


def _check_bias(name: str, bias: Tensor | None, x: Tensor, *, rows: int) -> None:
    if bias is None:
        return
    check_floating(name, bias)
    check_same_device(name, bias, "x", x)
    check_same_dtype(name, bias, x)
    if bias.shape != (rows,):
        raise ValueError(f"{name}: expected [{rows}], got {shape_of(bias)}")


def _matrix(name: str, weight: Tensor, x: Tensor, *, columns: int) -> Tensor:
    check_floating(name, weight)
    check_same_device(name, weight, "x", x)
    if weight.dim() == 4 and weight.shape[2:] == (1, 1):
        weight = weight.flatten(1)
    check_same_dtype(name, weight, x)
    if weight.dim() != 2 or weight.size(1) != columns or weight.size(0) < 1:
        raise ValueError(
            f"{name}: expected [rows, {columns}] or [rows, {columns}, 1, 1], got {shape_of(weight)}"
        )
    return weight


def attention_inputs(query: Tensor, key: Tensor, value: Tensor) -> AttentionInputs:
    """Return the arguments of :func:`attention` as its backends take them, after all checks."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_floating(name, tensor)
        if tensor.dim() != 3:
            raise ValueError(f"{name}: expected 3 axes [N, length, width], got {shape_of(tensor)}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: expected the query's dtype {query.dtype}, got {tensor.dtype}")
        check_same_device(name, tensor, "the query", query)
    batch, _, width = query.shape
    if key.size(0) != batch or key.size(2) != width or key.size(1) < 1 or width < 1:
        raise ValueError(
            f"key: expected [N, S, E] = [{batch}, S, {width}] with S, E >= 1, got {shape_of(key)}"
        )
    if value.shape[:2] != key.shape[:2] or value.size(2) < 1:
        raise ValueError(
            f"value: expected [N, S, Ev] = [{batch}, {key.size(1)}, Ev] with Ev >= 1, got {shape_of(value)}"
        )
    return AttentionInputs(query, key, value)
