"""heykeetae's Self-Attention-GAN, a DCGAN with attention.

Its transposed convolutions normalise the input's axis: build them with ``SNConvTranspose2d(dim=0)``. The trainer's
networks cannot express its networks.
"""

from sagan_layers.convert.code_base import CodeBase, Entry, statistics

HEYKEETAE = CodeBase(
    title="heykeetae's Self-Attention-GAN",
    url="https://github.com/heykeetae/Self-Attention-GAN",
    rows={
        "spectral_norm": {
            "weight": "module.weight_bar",
            "bias": "module.bias",
            "weight_u": "module.weight_u",
            "weight_v": "module.weight_v",
        },
        "attention": {
            "query": "query_conv",
            "key": "key_conv",
            "value": "value_conv",
            "gamma": Entry("gamma", leading=1),
        },
        "batch_norm": statistics(""),
    },
)
