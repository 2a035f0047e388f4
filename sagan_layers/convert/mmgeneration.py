"""mmgeneration's SAGAN and projection networks, as its configurations initialise them ("studio" or "BigGAN")."""

from sagan_layers.convert.code_base import CodeBase, Entry, NetworkNames, Row, statistics


def _of_one_hot(ours: str, theirs: str) -> Row:
    """A normalised table is the linear map of one-hot labels, transposed; its u is the map's v."""
    return {
        f"{ours}.weight": Entry(f"{theirs}.weight_orig", axes=(1, 0)),
        f"{ours}.weight_u": f"{theirs}.weight_v",
        f"{ours}.weight_v": f"{theirs}.weight_u",
    }


_PARTS = {"conv1": "conv_1.conv", "conv2": "conv_2.conv", "shortcut": "shortcut.conv"}

MMGENERATION = CodeBase(
    title="mmgeneration",
    url="https://github.com/open-mmlab/mmgeneration",
    rows={
        # torch's spectral norm; attention after a later block of D has BigGAN-PyTorch's.
        "spectral_norm": {
            "weight": ("weight_orig", "weight"),
            "weight_u": ("weight_u", Entry("u0", leading=1)),
            "weight_v": ("weight_v", None),
        },
        "attention": {"query": "theta.conv", "key": "phi.conv", "value": "g.conv", "out": "o.conv"},
        "head": {"linear": "decision", "embedding": "proj_y"},
        "batch_norm": statistics(""),
        "class_batch_norm": {
            "weight": Entry("weight_embedding.weight", offset=1.0),
            "bias": "bias_embedding.weight",
            **statistics("norm."),
        },
        "vector_batch_norm": {
            **_of_one_hot("weight_projection", "weight_embedding"),
            **_of_one_hot("bias_projection", "bias_embedding"),
            **statistics("norm."),
        },
    },
    ignored=("*sv0",),
    generator=NetworkNames(
        block=lambda place: f"conv_blocks.{place.number + place.attention}",
        attention=lambda place: f"conv_blocks.{place.number + place.attention + 1}",
        parts={"norm1": "norm_1", "norm2": "norm_2", **_PARTS},
        others=lambda blocks: {"linear": "noise2feat", "last_norm": "to_rgb.bn", "last_conv": "to_rgb.conv"},
    ),
    discriminator=NetworkNames(
        block=lambda place: (
            f"conv_blocks.{place.number + place.attention - 1}" if place.number else "from_rgb"
        ),
        attention=lambda place: f"conv_blocks.{place.number + place.attention}",
        parts=_PARTS,
        others=lambda blocks: {"head": ""},
        only={"resolution": (32, 128)},  # at 64 pixels the last block halves the resolution
    ),
    settings={
        "condition": "one_hot",
        "sn_eps_mode": "clamp",
        "sn_iterate_in_evaluation": False,
        "bn_eps": 1e-4,
        "bn_momentum": 0.1,
        "last_bn_momentum": 0.1,
        "biased_running_var": False,
    },
)
