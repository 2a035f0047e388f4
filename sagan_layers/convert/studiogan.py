"""PyTorch-StudioGAN: SAGAN and others of its backbones "resnet" and, with ``condition="embedding"``, "big_resnet"."""

from sagan_layers.convert.code_base import CodeBase, Entry, NetworkNames, statistics

STUDIOGAN = CodeBase(
    title="PyTorch-StudioGAN",
    url="https://github.com/POSTECH-CVLab/PyTorch-StudioGAN",
    rows={
        "spectral_norm": {"weight": "weight_orig"},
        "attention": {
            "query": "conv1x1_theta",
            "key": "conv1x1_phi",
            "value": "conv1x1_g",
            "out": "conv1x1_attn",
            "gamma": Entry("sigma", leading=1),
        },
        "head": {"linear": "linear1"},
        "batch_norm": statistics(""),
        "vector_batch_norm": {
            "weight_projection": "gain",
            "bias_projection": "bias",
            **statistics("bn."),
        },
    },
    generator=NetworkNames(
        # Attention is one more entry of the list of blocks.
        block=lambda place: f"blocks.{place.number + place.attention}.0",
        attention=lambda place: f"blocks.{place.number + place.attention + 1}.0",
        parts={
            "norm1": "bn1",
            "norm2": "bn2",
            "conv1": "conv2d1",
            "conv2": "conv2d2",
            "shortcut": "conv2d0",
        },
        others=lambda blocks: {
            "linear": "linear0",
            "embedding": "shared",
            "last_norm": "bn4",
            "last_conv": "conv2d5",
        },
    ),
    discriminator=NetworkNames(
        block=lambda place: f"blocks.{place.number + place.attention}.0",
        attention=lambda place: f"blocks.{place.number + place.attention + 1}.0",
        parts={"conv1": "conv2d1", "conv2": "conv2d2", "shortcut": "conv2d0"},
        others=lambda blocks: {"head": ""},
    ),
    settings={
        "condition": "one_hot",
        "d_relu_before_blocks": True,
        "sn_eps": 1e-6,
        "sn_eps_mode": "clamp",
        "sn_iterate_in_evaluation": False,
        "bn_eps": 1e-4,
        "bn_momentum": 0.1,
        "last_bn_momentum": 0.1,
        "biased_running_var": False,
    },
)
