"""Weights of other code bases for these layers, one file for each."""

from sagan_layers.convert.tensorflow import TensorFlowLoader, load_tensorflow

__all__ = ["TensorFlowLoader", "load_tensorflow"]
