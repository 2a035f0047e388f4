"""The released TensorFlow code (brain-research/self-attention-gan)."""

from __future__ import annotations

from typing import Any

from sagan_layers.convert.code_base import CodeBase, Entry, NetworkNames


def _without_output_numbers(variables: dict[str, Any]) -> dict[str, Any]:
    """TensorFlow writes a variable's name with or without ":0"."""
    return {name.removesuffix(":0"): value for name, value in variables.items()}


def _non_local(network: str, number: int) -> str:
    """Return the scope of an attention layer: TensorFlow numbers all but the first."""
    return f"{network}_non_local" + (f"_{number}" if number else "")


TENSORFLOW = CodeBase(
    title="the released TensorFlow code",
    url="https://github.com/brain-research/self-attention-gan",
    separator="/",
    ignored=("*/Adam", "*/Adam_1", "beta?_power*", "global_step*"),
    prepare=_without_output_numbers,
    rows={
        "convolution": {"weight": Entry("w", axes=(2, 3, 1, 0)), "bias": "biases"},
        "transposed_convolution": {"weight": Entry("w", axes=(2, 3, 1, 0)), "bias": "biases"},
        "linear": {"weight": Entry("Matrix", axes=(1, 0))},
        "embedding": {"weight": "embedding_map"},
        "spectral_norm": {"weight_u": Entry("u", leading=1), "weight_v": None},
        "attention": {
            "query": "sn_conv_theta",
            "key": "sn_conv_phi",
            "value": "sn_conv_g",
            "out": "sn_conv_attn",
            "gamma": "sigma_ratio",
        },
        "head": {"linear": "d_sn_linear", "embedding": "d_embedding"},
        "batch_norm": {
            "weight": "gamma",
            "bias": "beta",
            "norm.running_mean": "moving_mean",
            "norm.running_var": "moving_variance",
            "norm.num_batches_tracked": None,
        },
        "class_batch_norm": {
            "weight": "gamma",
            "bias": "beta",
            "norm.running_mean": Entry("mean", leading=3),
            "norm.running_var": Entry("var", leading=3),
            "norm.num_batches_tracked": None,
        },
    },
    generator=NetworkNames(
        block=lambda place: f"g_block{place.number + 1}",
        attention=lambda place: _non_local("g", place.attention),
        parts={
            "norm1": "cbn_0",
            "conv1": "snconv1",
            "norm2": "cbn_1",
            "conv2": "snconv2",
            "shortcut": "snconv3",
        },
        others=lambda blocks: {"linear": "g_snh0", "last_norm": "g_bn", "last_conv": "g_snconv_last"},
        channels_last_outputs={"linear": (4, 4)},
    ),
    discriminator=NetworkNames(
        block=lambda place: f"d_block{place.number + 1}" if place.number else "d_optimized_block1",
        attention=lambda place: _non_local("d", place.attention),
        parts={"conv1": "sn_conv1", "conv2": "sn_conv2", "shortcut": "sn_conv3"},
        others=lambda blocks: {"head": ""},
    ),
    settings={"d_relu_before_blocks": False, "d_hidden_channels": "out"},
)
