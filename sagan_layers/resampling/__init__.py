"""Convolutions with resampling: the module, its functional forms, their definition and their forms."""

from sagan_layers.resampling.module import ResamplingConv2d

__all__ = ["ResamplingConv2d"]
