"""The code bases whose weights load. A new one is a file with its table, and a row here."""

from __future__ import annotations

from sagan_layers.convert.biggan_pytorch import BIGGAN_PYTORCH
from sagan_layers.convert.code_base import CodeBase
from sagan_layers.convert.heykeetae import HEYKEETAE
from sagan_layers.convert.huggingface_biggan import HUGGINGFACE_BIGGAN
from sagan_layers.convert.mimicry import MIMICRY
from sagan_layers.convert.mmgeneration import MMGENERATION
from sagan_layers.convert.studiogan import STUDIOGAN
from sagan_layers.convert.tensorflow import TENSORFLOW

CODE_BASES: dict[str, CodeBase] = {
    "biggan_pytorch": BIGGAN_PYTORCH,
    "heykeetae": HEYKEETAE,
    "huggingface_biggan": HUGGINGFACE_BIGGAN,
    "mimicry": MIMICRY,
    "mmgeneration": MMGENERATION,
    "studiogan": STUDIOGAN,
    "tensorflow": TENSORFLOW,
}
NOT_EXPRESSIBLE = {
    "torchgan": "torchgan's attention takes the softmax over the queries, which SelfAttention2d cannot express",
}
