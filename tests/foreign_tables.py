"""Tables of code bases that the package does not know: what a user writes for theirs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sagan_layers.convert import CodeBase, Entry, NetworkNames
from sagan_layers.convert.code_base import statistics

_HALVES = {
    "weight": Entry("embed.weight", half=0),
    "bias": Entry("embed.weight", half=1),
    **statistics("bn."),
}
_AVERAGES = {
    "norm.running_mean": "avg_mean",
    "norm.running_var": "avg_var",
    "norm.num_batches_tracked": None,
}
_CHAINER_PARTS = {"conv1": "c1", "conv2": "c2", "shortcut": "c_sc"}

SNGAN_PROJECTION = CodeBase(
    title="sngan_projection",
    url="https://github.com/pfnet-research/sngan_projection",
    separator="/",
    rows={
        "convolution": {"weight": "W", "bias": "b"},
        "linear": {"weight": "W", "bias": "b"},
        "embedding": {"weight": "W"},
        "spectral_norm": {"weight_u": Entry("u", leading=1), "weight_v": None},
        "batch_norm": {"weight": "gamma", "bias": "beta", **_AVERAGES},
        "class_batch_norm": {"weight": "gammas/W", "bias": "betas/W", **_AVERAGES},
    },
    ignored=("*/N",),
    generator=NetworkNames(
        block=lambda place: f"block{place.number + 2}",
        attention=lambda place: "",
        parts={"norm1": "b1", "norm2": "b2", **_CHAINER_PARTS},
        others=lambda blocks: {"linear": "l1", "last_norm": f"b{blocks + 2}", "last_conv": f"l{blocks + 2}"},
    ),
    discriminator=NetworkNames(
        block=lambda place: f"block{place.number + 1}",
        attention=lambda place: "",
        parts=_CHAINER_PARTS,
        others=lambda blocks: {"head": "", "head.linear": f"l{blocks + 1}", "head.embedding": "l_y"},
    ),
    settings={
        "g_attention": (),
        "d_attention": (),
        "g_spectral_norm": False,
        "d_hidden_channels": "in",
        "bn_eps": 2e-5,
        "bn_momentum": 0.1,
        "last_bn_momentum": 0.1,
        "biased_running_var": False,
    },
)
# Its networks have blocks that ours have not; its layers have the same function as ours.
ROSINALITY = CodeBase(
    title="sagan-pytorch",
    url="https://github.com/rosinality/sagan-pytorch",
    rows={
        "spectral_norm": {"weight": "weight_orig", "weight_v": None},
        "attention": {  # its softmax is over what it calls queries; Conv1d
            "query": "key",
            "key": "query",
            **{
                f"{ours}.weight": Entry(f"{theirs}.weight_orig", dropped=1)
                for ours, theirs in {"query": "key", "key": "query", "value": "value"}.items()
            },
        },
        "class_batch_norm": _HALVES,
    },
    ignored=("*weight",),  # the normalised weight of the last call
)


def _example_of_the_page() -> CodeBase:
    page = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n# sagan_layers/convert/voletiv.py\n(.*?)```", page, re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    table: CodeBase = names["VOLETIV"]
    return table


FOREIGN = {"voletiv": _example_of_the_page(), "sngan_projection": SNGAN_PROJECTION, "rosinality": ROSINALITY}
