"""Weights of other code bases: load them into these layers, and save these layers' for them."""

from sagan_layers.convert.loading import (
    CODE_BASES,
    CodeBase,
    Comparison,
    Entry,
    NetworkNames,
    code_base_of,
    compare,
    huggingface_biggan_at,
    load,
    load_tensorflow,
    save,
)

__all__ = [
    "CODE_BASES",
    "CodeBase",
    "Comparison",
    "Entry",
    "NetworkNames",
    "code_base_of",
    "compare",
    "huggingface_biggan_at",
    "load",
    "load_tensorflow",
    "save",
]
