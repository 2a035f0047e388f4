"""Convolution with the upsampling before it or the pooling after it, as one operation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.common_types import _size_2_t

from sagan_layers import checks
from sagan_layers.resampling import functional
from sagan_layers.torch_support import is_proxy, record_call

__all__ = ["ResamplingConv2d"]


class ResamplingConv2d(nn.Conv2d):
    r"""Two-dimensional convolution with upsampling before it or pooling after it.

    ``upsample=s`` is nearest upsampling by s before the convolution, ``downsample=s`` average pooling over s x s
    after it, each computed as one operation with a fraction of the multiplications
    (:func:`sagan_layers.functional.upsample_conv2d`, :func:`sagan_layers.functional.conv2d_downsample`). Parameters
    and ``state_dict`` are those of ``nn.Conv2d``, and so are their initial values.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype: as for :class:`torch.nn.Conv2d`. With resampling ``stride`` must be 1.
        upsample: factor by which height and width grow before the convolution; 1 for none.
        downsample: factor by which they shrink after it; 1 for none. One of the two must be 1.
        backend: "auto", or the name of a form of :func:`sagan_layers.functional.upsample_conv2d` to require.

    Shape:
        - Input: [N, C, H, W] or [C, H, W].
        - Output: that of :class:`torch.nn.Conv2d` for an input of upsample * H x upsample * W, its height and width
          divided by ``downsample`` and rounded down.

    Raises:
        ValueError: for a wrong rank, number of channels or device, or an argument out of range.
        TypeError: for a wrong dtype.

    Note:
        The same in training and evaluation. Upsampling with a ``padding_mode`` other than "zeros" runs as two
        operations. Derivatives of every order.

    Reference:
        Released code of Zhang et al., Self-Attention Generative Adversarial Networks: the blocks of G and D.

    Example:
        >>> up = ResamplingConv2d(16, 8, kernel_size=3, padding=1, upsample=2)
        >>> down = ResamplingConv2d(8, 16, kernel_size=3, padding=1, downsample=2)
        >>> up(torch.randn(2, 16, 8, 8)).shape, down(torch.randn(2, 8, 16, 16)).shape
        (torch.Size([2, 8, 16, 16]), torch.Size([2, 16, 8, 8]))
    """

    # On the class, and on a layer only where it differs: apply_spectral_norm makes SNConv2d out of nn.Conv2d too.
    upsample: int = 1
    downsample: int = 1
    backend: str = "auto"

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
        upsample: int = 1,
        downsample: int = 1,
        backend: str = "auto",
    ) -> None:
        sizes = checks.convolution_of(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, named_padding=True
        )
        (bias,) = checks.flags_of(bias=bias)
        checks.check_choice("padding_mode", padding_mode, ("zeros", "reflect", "replicate", "circular"))
        checks.check_parameter_options(device, dtype)
        upsample, downsample = functional.resampling_factors(upsample, downsample, backend)
        super().__init__(*sizes, bias, padding_mode, device, dtype)  # type: ignore[arg-type]
        for name, value in (("upsample", upsample), ("downsample", downsample), ("backend", backend)):
            if value != getattr(self, name):
                setattr(self, name, value)
        if self.resamples and self.stride != (1, 1):
            raise ValueError(f"stride: expected 1 with upsample or downsample, got {stride!r}")
        if upsample > 1 and padding_mode != "zeros" and backend not in ("auto", "plain"):
            raise ValueError(
                f"backend: expected 'auto' or 'plain' for upsampling with padding_mode={padding_mode!r}, "
                f"got {backend!r}"
            )

    @property
    def resamples(self) -> bool:
        """Whether the layer upsamples or pools in addition to its convolution."""
        return self.upsample != 1 or self.downsample != 1

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of ``input`` with its resampling."""
        if is_proxy(input):
            return record_call(self, input)
        self._check_input(input)
        return self._resampled(input, self.weight)

    def _check_input(self, input: Tensor) -> None:
        checks.check_input(input, channels=self.in_channels, like=self.weight, batched=False)
        if isinstance(self.padding, str) or self.padding_mode != "zeros":
            left, right, top, bottom = self._reversed_padding_repeated_twice
        else:
            (top, left), (bottom, right) = self.padding, self.padding
        rows, columns = self.upsample * input.size(-2), self.upsample * input.size(-1)
        if self.padding_mode in ("reflect", "circular"):
            edge = self.padding_mode == "reflect"  # which it does not repeat
            if rows < max(top, bottom) + edge or columns < max(left, right) + edge:
                raise ValueError(
                    f"input: expected a map that its {self.padding_mode} padding {self.padding} fits into, "
                    f"got {checks.shape_of(input)}"
                )
        rows += top + bottom - self.dilation[0] * (self.kernel_size[0] - 1)
        columns += left + right - self.dilation[1] * (self.kernel_size[1] - 1)
        checks.check_map_size("input", input, rows // self.downsample, columns // self.downsample)

    def _resampled(self, input: Tensor, weight: Tensor) -> Tensor:
        """Return the forward with another weight."""
        if self.upsample != 1 and self.padding_mode != "zeros":  # the upsampled map is padded
            input = input.repeat_interleave(self.upsample, -2).repeat_interleave(self.upsample, -1)
        elif self.resamples:
            return self._resampled_as_one(input, weight)
        output: Tensor = self._conv_forward(input, weight, self.bias)
        return output

    def _resampled_as_one(self, input: Tensor, weight: Tensor) -> Tensor:
        padding: str | _size_2_t = self.padding  # type: ignore[assignment]
        if self.padding_mode != "zeros":
            input = nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        function, factor = functional.upsample_conv2d, self.upsample
        if self.downsample != 1:
            function, factor = functional.conv2d_downsample, self.downsample
        return function(
            input,
            weight,
            self.bias,
            factor=factor,
            padding=padding,
            dilation=self.dilation,  # type: ignore[arg-type]
            groups=self.groups,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Return the plain layer's description, and the options that differ from the defaults."""
        text: str = super().extra_repr()  # type: ignore[no-untyped-call]
        for name, default in (("upsample", 1), ("downsample", 1), ("backend", "auto")):
            if (value := getattr(self, name)) != default:
                text += f", {name}={value!r}"
        return text
