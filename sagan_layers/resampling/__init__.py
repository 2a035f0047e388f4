"""Convolutions with resampling: the module, its functional forms, their definition and how they are computed."""

from sagan_layers.resampling.module import ResamplingConv2d

__all__ = ["ResamplingConv2d"]
