"""Convolutions with resampling: the module, its functional forms, the reference and the backends."""

from sagan_layers.resampling.module import ResamplingConv2d

__all__ = ["ResamplingConv2d"]
