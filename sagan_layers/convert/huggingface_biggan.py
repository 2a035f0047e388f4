"""HuggingFace's pytorch-pretrained-BigGAN: the generator of BigGAN-deep.

Its first linear layer's outputs are [4, 4, channels] (``channels_last_outputs``), its last convolution has as many
outputs as inputs, of which three are used, and its batch norms hold the statistics of several truncations. It cannot
train, and the trainer's networks cannot express its blocks.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

from sagan_layers.checks import number_of
from sagan_layers.convert.code_base import CodeBase, Entry

_STATISTICS = {
    "norm.running_mean": "running_mean",
    "norm.running_var": "running_var",
    "norm.num_batches_tracked": None,
}


def _choose_statistics(state: dict[str, Any], truncation: float) -> dict[str, Any]:
    """Replace the statistics of all truncations by those of one."""
    chosen = {}
    for name, value in state.items():
        if name.endswith(("running_means", "running_vars")) and len(value) > 1:
            between, index = math.modf(truncation / (1.0 / (len(value) - 1)))
            value = value[int(index)]
            if between:
                # The two weights stand as there, on the wrong sides.
                value = between * value + (1 - between) * state[name][int(index) + 1]
            name = name.removesuffix("s")
        chosen[name] = value
    return chosen


def huggingface_biggan_at(truncation: float = 1.0) -> CodeBase:
    """Return the table of HuggingFace's BigGAN with its batch norms' statistics for one truncation.

    It serves to load; a network of ours holds no statistics of other truncations to save.

    Args:
        truncation: of the latents, from 0 to 1.

    Raises:
        ValueError: for another truncation.

    Example:
        >>> import torch
        >>> from sagan_layers import ConditionalBatchNorm2d, convert
        >>> norm = ConditionalBatchNorm2d(1, eps=1e-4)
        >>> state = {
        ...     "weight": torch.ones(1),
        ...     "bias": torch.zeros(1),
        ...     "running_means": torch.tensor([[0.0], [1.0], [2.0]]),
        ...     "running_vars": torch.ones(3, 1),
        ... }
        >>> convert.load(norm, state, convert.huggingface_biggan_at(truncation=0.5))
        >>> norm.norm.running_mean
        tensor([1.])
    """
    truncation = number_of("truncation", truncation, least=0, most=1)
    return replace(HUGGINGFACE_BIGGAN, prepare=partial(_choose_statistics, truncation=truncation))


HUGGINGFACE_BIGGAN = CodeBase(
    title="HuggingFace's BigGAN",
    url="https://github.com/huggingface/pytorch-pretrained-BigGAN",
    prepare=partial(_choose_statistics, truncation=1.0),
    rows={
        "embedding": {"weight": Entry("weight", axes=(1, 0))},
        "spectral_norm": {"weight": "weight_orig"},
        "attention": {
            "query": "snconv1x1_theta",
            "key": "snconv1x1_phi",
            "value": "snconv1x1_g",
            "out": "snconv1x1_o_conv",
            "gamma": Entry("gamma", leading=1),
        },
        "batch_norm": _STATISTICS,
        "vector_batch_norm": {"weight_projection": "scale", "bias_projection": "offset", **_STATISTICS},
    },
)
