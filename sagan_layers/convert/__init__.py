"""Load the weights of other code bases into these layers; one file for each code base."""

from sagan_layers.convert.tensorflow import TensorFlowLoader, load_tensorflow

__all__ = ["TensorFlowLoader", "load_tensorflow"]
