"""mimicry: SAGAN, and SNGAN and cGAN-PD, which have its names without attention."""

from sagan_layers.convert.code_base import CodeBase, Entry, NetworkNames, statistics

_PARTS = {"conv1": "c1", "conv2": "c2", "shortcut": "c_sc"}

MIMICRY = CodeBase(
    title="mimicry",
    url="https://github.com/kwotsin/mimicry",
    rows={
        # torch's spectral norm; the head of cGAN-PD at 32 pixels has its own, which keeps no v.
        "spectral_norm": {
            "weight": ("weight_orig", "weight"),
            "weight_u": ("weight_u", Entry("sn_u", leading=1)),
            "weight_v": ("weight_v", None),
        },
        "attention": {"query": "theta", "key": "phi", "value": "g", "out": "o"},
        "batch_norm": statistics(""),
        "class_batch_norm": {
            "weight": Entry("embed.weight", half=0),
            "bias": Entry("embed.weight", half=1),
            **statistics("bn."),
        },
    },
    ignored=("*sn_sigma",),
    generator=NetworkNames(
        block=lambda place: f"block{place.number + 2}",
        attention=lambda place: "attn_block",
        parts={"norm1": "b1", "norm2": "b2", **_PARTS},
        others=lambda blocks: {"linear": "l1", "last_norm": f"b{blocks + 2}", "last_conv": f"c{blocks + 2}"},
    ),
    discriminator=NetworkNames(
        block=lambda place: f"block{place.number + 1}",
        attention=lambda place: "attn_block",
        parts=_PARTS,
        others=lambda blocks: {"head": "", "head.linear": f"l{blocks + 1}", "head.embedding": "l_y"},
        # At 64 pixels the last block halves the resolution; WGAN-GP's D takes the mean over positions.
        only={"resolution": (32, 128), "d_spectral_norm": (True,)},
    ),
    settings={
        "g_attention": {32: (16,), 128: (32,)},
        "d_attention": {32: (8,), 128: (32,)},
        "d_hidden_channels": "in",
        "d_relu_before_blocks": True,
        "upsampling": "bilinear",
        "sn_eps_mode": "clamp",
        "sn_iterate_in_evaluation": False,
        "bn_momentum": 0.1,
        "last_bn_momentum": 0.1,
        "biased_running_var": False,
    },
)
