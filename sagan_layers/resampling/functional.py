"""The stateless forms of resampling convolutions: checks, then the form that serves."""

from __future__ import annotations

import functools

from torch import Tensor
from torch.nn.common_types import _size_2_t

from sagan_layers.checks import (
    check_choice,
    check_floating,
    check_map_size,
    check_same_device,
    check_same_dtype,
    pair_of,
    shape_of,
    sizes_of,
)
from sagan_layers.resampling.reference import ResamplingInputs, ResamplingOptions
from sagan_layers.resampling.table import CONV2D_DOWNSAMPLE, UPSAMPLE_CONV2D


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
        backend: "auto", or the name of a form to require (:func:`explain_backends` lists them).

    Shape:
        - Output: [N, out, Ho, Wo] with Ho = s H + 2 p - dilation (kernel height - 1).

    Raises:
        ValueError: if shapes or devices disagree, the output would be empty, or the named form does not
            exist or cannot serve.
        TypeError: if the dtypes disagree or are not floating point, or a size is not an integer.

    Note:
        Sums are taken in another order than in the plain composition, so in 16 bits the last digit differs.
        Derivatives of every order.

    Reference:
        Released code of Zhang et al., Self-Attention Generative Adversarial Networks (``usample`` before
        ``snconv2d``), computed as here.

    Example:
        >>> import torch
        >>> x, weight = torch.randn(2, 16, 8, 8), torch.randn(4, 16, 3, 3)
        >>> upsample_conv2d(x, weight, padding=1).shape
        torch.Size([2, 4, 16, 16])
    """
    inputs = _checked_inputs(
        x, weight, bias, upsample=True, factor=factor, padding=padding, dilation=dilation, groups=groups
    )
    form = UPSAMPLE_CONV2D.select_and_record(inputs, backend).implementation
    y = form.upsample(inputs.x, weight, bias, inputs.options)
    return y if x.dim() == 4 else y.squeeze(0)


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
    multiplications: a quarter for a factor of 2. Like there, an incomplete square at the border is dropped.

    Args:
        x: [N, C, H, W] or [C, H, W], floating point.
        weight: [out, C / groups, kernel height, kernel width], as for the plain convolution.
        bias: [out] or None.
        factor: s, side and stride of the pooling.
        padding: p, zeros around x: a number, one for (height, width), "same" or "valid".
        dilation: of the kernel, a number or one for (height, width).
        groups: of the convolution.
        backend: as for :func:`upsample_conv2d`.

    Shape:
        - Output: [N, out, Ho, Wo] with Ho = (H + 2 p - dilation (kernel height - 1)) // s.

    Raises:
        ValueError: if shapes or devices disagree, the output would be empty, or the named form does not
            exist or cannot serve.
        TypeError: if the dtypes disagree or are not floating point, or a size is not an integer.

    Note:
        As :func:`upsample_conv2d`.

    Reference:
        Released code of Zhang et al., Self-Attention Generative Adversarial Networks (``dsample`` after
        ``snconv2d``), computed as here.

    Example:
        >>> import torch
        >>> x, weight = torch.randn(2, 4, 16, 16), torch.randn(8, 4, 3, 3)
        >>> conv2d_downsample(x, weight, padding=1).shape
        torch.Size([2, 8, 8, 8])
    """
    inputs = _checked_inputs(
        x, weight, bias, upsample=False, factor=factor, padding=padding, dilation=dilation, groups=groups
    )
    form = CONV2D_DOWNSAMPLE.select_and_record(inputs, backend).implementation
    y = form.downsample(inputs.x, weight, bias, inputs.options)
    return y if x.dim() == 4 else y.squeeze(0)


def resampling_factors(upsample: object, downsample: object, backend: str) -> tuple[int, int]:
    """Return the two factors as ints.

    Raises:
        ValueError: if both are above 1, one is below, or there is no such backend.
        TypeError: if a factor is not an integer.
    """
    up, down = sizes_of(upsample=upsample, downsample=downsample)
    if up != 1 and down != 1:
        raise ValueError(f"upsample, downsample: expected one of them to be 1, got {up} and {down}")
    UPSAMPLE_CONV2D.check_name(backend)
    return up, down


def _checked_inputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    upsample: bool,
    factor: int = 2,
    padding: str | _size_2_t = 0,
    dilation: _size_2_t = 1,
    groups: int = 1,
) -> ResamplingInputs:
    """Return x as [N, C, H, W], the weight and the options as the forms take them, after all checks."""
    factor, groups = sizes_of(factor=factor, groups=groups)
    check_floating("x", x)
    if x.dim() not in (3, 4) or 0 in x.shape[-3:]:
        raise ValueError(f"x: expected [N, C, H, W] or [C, H, W] with C, H, W >= 1, got {shape_of(x)}")
    batch = x if x.dim() == 4 else x.unsqueeze(0)
    check_floating("weight", weight)
    check_same_device("weight", weight, "x", x)
    check_same_dtype("weight", weight, x)
    C = batch.size(1)
    if weight.dim() != 4 or weight.numel() == 0:
        raise ValueError(
            f"weight: expected [out, C / groups, kernel height, kernel width], got {shape_of(weight)}"
        )
    if weight.size(1) * groups != C or weight.size(0) % groups:
        raise ValueError(
            f"weight: expected [out, C / groups, kernel height, kernel width] with C = {C} and groups = {groups} "
            f"dividing out, got {shape_of(weight)}"
        )
    if bias is not None:
        check_floating("bias", bias)
        check_same_device("bias", bias, "x", x)
        check_same_dtype("bias", bias, x)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected [{weight.size(0)}], got {shape_of(bias)}")
    dilations = pair_of("dilation", dilation, least=1)
    options = ResamplingOptions(
        upsample=upsample,
        factor=factor,
        padding=_explicit_padding(padding, dilations, weight),
        dilation=dilations,
        groups=groups,
    )
    output = options.output_size(batch, weight)
    check_map_size("x", x, *output)
    return ResamplingInputs(batch, weight, options)


# The arguments of the two functions as their forms take them.
upsample_inputs = functools.partial(_checked_inputs, upsample=True)
downsample_inputs = functools.partial(_checked_inputs, upsample=False)


def _explicit_padding(
    padding: str | _size_2_t, dilation: tuple[int, int], weight: Tensor
) -> tuple[int, int] | str:
    """Return the zeros on each side of (height, width), or "same" where the two sides differ."""
    if not isinstance(padding, str):
        return pair_of("padding", padding, least=0)
    check_choice("padding", padding, ("same", "valid"))
    if padding == "valid":
        return (0, 0)
    height, width = (dilation[i] * (weight.size(2 + i) - 1) for i in range(2))
    return "same" if height % 2 or width % 2 else (height // 2, width // 2)
