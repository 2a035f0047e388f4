"""Blocks of other code bases against vectors that those computed (tests/golden/peers)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import peer_vectors
import pytest
import torch
from foreign_tables import FOREIGN
from measured import losses_error, relative_error
from torch import Tensor, nn
from torch.nn import functional

from sagan_layers import (
    ConditionalBatchNorm2d,
    SelfAttention2d,
    SNConv2d,
    SNConvTranspose2d,
    SNEmbedding,
    SNLinear,
    convert,
)

FLOORED: dict[str, Any] = {"eps": 0.01, "eps_mode": "clamp"}
TORCH: dict[str, Any] = {"eps_mode": "clamp", "iterate_when_frozen": False}
STUDIOGAN: dict[str, Any] = {"eps": 1e-6, **TORCH}
VECTORS = partial(ConditionalBatchNorm2d, 8, condition_features=7, spectral_norm=True, sn_eps_mode="clamp")
DEEP_VECTORS = partial(VECTORS, eps=0.01, sn_eps=0.01, iterate_when_frozen=False)
HEYKEETAE_ATTENTION = partial(
    SelfAttention2d, pool_size=1, output_projection=False, bias=True, spectral_norm=False
)
DEEP: dict[str, Any] = {"eps": 1e-4, **TORCH}
DEEP_NORM = partial(
    ConditionalBatchNorm2d, eps=1e-4, sn_eps=1e-4, sn_eps_mode="clamp", iterate_when_frozen=False
)


class Case(NamedTuple):
    """A peer's block and ours; ``table`` where it is not that of ``TABLES``."""

    code_base: str
    block: str
    ours: Callable[[], nn.Module]
    table: convert.CodeBase | None = None


TABLES = {**convert.CODE_BASES, **FOREIGN}
BIGGAN, HUGGINGFACE = "biggan_pytorch", "huggingface_biggan"
AT_040, AT_043 = convert.huggingface_biggan_at(0.4), convert.huggingface_biggan_at(0.43)
CASES = [
    Case(BIGGAN, "conv", lambda: SNConv2d(8, 5, 3, padding=1, **FLOORED)),
    Case(BIGGAN, "linear", lambda: SNLinear(8, 5, **FLOORED)),
    Case(BIGGAN, "embedding", lambda: SNEmbedding(5, 6, **FLOORED)),
    Case(BIGGAN, "attention", lambda: SelfAttention2d(8, **FLOORED)),
    Case(BIGGAN, "last_norm", lambda: ConditionalBatchNorm2d(8)),
    Case(BIGGAN, "class_norm", lambda: ConditionalBatchNorm2d(8, 5)),
    Case(BIGGAN, "vector_norm", lambda: VECTORS(sn_eps=0.01)),
    Case(BIGGAN, "vector_norm_mybn", lambda: VECTORS(sn_eps=0.01)),
    Case("studiogan", "conv", lambda: SNConv2d(8, 5, 3, padding=1, **STUDIOGAN)),
    Case("studiogan", "linear", lambda: SNLinear(8, 5, **STUDIOGAN)),
    Case("studiogan", "embedding", lambda: SNEmbedding(5, 6, **STUDIOGAN)),
    Case(
        "studiogan", "transposed_conv", lambda: SNConvTranspose2d(8, 5, 4, stride=2, padding=1, **STUDIOGAN)
    ),
    Case("studiogan", "attention", lambda: SelfAttention2d(8, **STUDIOGAN)),
    Case("studiogan", "last_norm", lambda: ConditionalBatchNorm2d(8, eps=1e-4)),
    Case("studiogan", "vector_norm", lambda: VECTORS(eps=1e-4, sn_eps=1e-6, iterate_when_frozen=False)),
    Case("heykeetae", "conv", lambda: SNConv2d(8, 5, 4, stride=2, padding=1)),
    Case("heykeetae", "transposed_conv", lambda: SNConvTranspose2d(8, 5, 4, stride=2, padding=1, dim=0)),
    Case("heykeetae", "attention", lambda: HEYKEETAE_ATTENTION(8)),
    Case(HUGGINGFACE, "attention", lambda: SelfAttention2d(8, **{**FLOORED, **TORCH})),
    Case(HUGGINGFACE, "last_norm_at_040", lambda: ConditionalBatchNorm2d(8, eps=1e-4), AT_040),
    Case(HUGGINGFACE, "vector_norm_at_040", DEEP_VECTORS, AT_040),
    Case(HUGGINGFACE, "vector_norm_at_043", DEEP_VECTORS, AT_043),
    Case("mimicry", "attention", lambda: SelfAttention2d(8, **TORCH)),
    Case("mimicry", "class_norm", lambda: ConditionalBatchNorm2d(8, 5)),
    Case("mimicry", "own_conv", lambda: SNConv2d(8, 5, 3, padding=1, eps_mode="clamp")),
    Case("mmgeneration", "attention", lambda: SelfAttention2d(8, **TORCH)),
    Case("mmgeneration", "later_attention", lambda: SelfAttention2d(8, eps_mode="clamp")),
    Case("mmgeneration", "class_norm", lambda: ConditionalBatchNorm2d(8, 5, eps=1e-4)),
    Case("voletiv", "attention", lambda: SelfAttention2d(8, bias=True, **TORCH)),
    Case("voletiv", "class_norm", lambda: ConditionalBatchNorm2d(8, 5, momentum=0.001)),
    Case(
        "rosinality",
        "attention",
        lambda: SelfAttention2d(8, pool_size=1, output_projection=False, bias=True),
    ),
    Case("rosinality", "class_norm", lambda: ConditionalBatchNorm2d(8, 5)),
    Case("rosinality", "conv", lambda: SNConv2d(8, 5, 3, padding=1)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.code_base}-{case.block}")
def test_a_peers_block_loads_by_name_and_computes_the_same(case: Case) -> None:
    vectors = peer_vectors.read_block(case.code_base, case.block)
    state = peer_vectors.draw_state(vectors.shapes)
    block = case.ours()
    outputs = peer_vectors.run_block(
        block,
        lambda: convert.load(block, state, case.table or TABLES[case.code_base]),
        peer_vectors.draw_block_inputs(case.block, vectors.inputs),
    )
    trains = case.table is None  # HuggingFace's batch norms do not
    for ours, theirs in list(zip(outputs, vectors.outputs, strict=True))[: 3 if trains else 1]:
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()


def test_statistics_that_cannot_be_chosen_are_refused() -> None:
    with pytest.raises(ValueError, match=r"truncation: expected a number from 0 to 1, got 1\.5"):
        convert.huggingface_biggan_at(1.5)
    state = {"running_means": torch.zeros(1, 4), "running_vars": torch.ones(1, 4)}
    with pytest.raises(ValueError, match=r"missing: weight, .*left over: running_means, running_vars"):
        convert.load(ConditionalBatchNorm2d(4), state, AT_040)


class DeepBlock(nn.Module):
    """A block of BigGAN-deep's generator, with its names in HuggingFace's code."""

    def __init__(self, channels: int, out_channels: int, upsample: int) -> None:
        super().__init__()
        norm = partial(DEEP_NORM, condition_features=16, spectral_norm=True, activation="relu")
        hidden = channels // 4
        self.out_channels = out_channels
        self.upsample = upsample
        self.bn_0, self.conv_0 = norm(channels), SNConv2d(channels, hidden, 1, **DEEP)
        self.bn_1 = norm(hidden)
        self.conv_1 = SNConv2d(hidden, hidden, 3, padding=1, upsample=upsample, **DEEP)
        self.bn_2, self.conv_2 = norm(hidden), SNConv2d(hidden, hidden, 3, padding=1, **DEEP)
        self.bn_3, self.conv_3 = norm(hidden), SNConv2d(hidden, out_channels, 1, **DEEP)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        main = self.conv_0(self.bn_0(x, condition))
        main = self.conv_1(self.bn_1(main, condition))
        main = self.conv_2(self.bn_2(main, condition))
        main = self.conv_3(self.bn_3(main, condition))
        return main + functional.interpolate(x[:, : self.out_channels], scale_factor=self.upsample)


class DeepGenerator(nn.Module):
    """BigGAN-deep at 32 pixels with our layers, and its names in HuggingFace's code."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(5, 8)
        self.generator = nn.Module()
        self.generator.gen_z = SNLinear(16, 64 * 16, **DEEP)
        blocks = [(64, 64, 1), (64, 32, 2), (32, 32, 1), (32, 16, 2), (16, 16, 1), (16, 8, 2), (8, 4, 1)]
        self.generator.layers = nn.ModuleList(DeepBlock(*sizes) for sizes in blocks)
        self.generator.layers.insert(4, SelfAttention2d(16, **DEEP))
        self.generator.bn = DEEP_NORM(4, activation="relu")
        self.generator.conv_to_rgb = SNConv2d(4, 4, 3, padding=1, **DEEP)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        there = self.generator
        condition = torch.cat((latents, self.embeddings(labels)), 1)
        x = there.gen_z(condition).view(-1, 64, 4, 4)
        for layer in there.layers:
            x = layer(x, condition) if isinstance(layer, DeepBlock) else layer(x)
        return torch.tanh(there.conv_to_rgb(there.bn(x))[:, :3])


@pytest.mark.parametrize("truncation", [0.4, 0.43])
def test_biggan_deep_of_our_layers_takes_huggingfaces_weights(truncation: float) -> None:
    name = f"huggingface_biggan_at_{100 * truncation:03.0f}"
    vectors, generator = peer_vectors.read(name), DeepGenerator().eval()
    convert.load(
        generator,
        peer_vectors.draw_state(vectors.g_shapes),
        convert.huggingface_biggan_at(truncation),
        channels_last_outputs={"generator.gen_z": (4, 4)},
    )
    latents, labels, _ = peer_vectors.draw_inputs(name, **vectors.sizes)
    with torch.no_grad():
        images = generator(latents[0], labels[0])[:, :, ::4, ::4]
    # Run in float64 theirs differs as much.
    assert relative_error(images, vectors.g_output, "images") < 3e-5


def heykeetae_networks() -> tuple[nn.Sequential, nn.Sequential]:
    """His G and D at 64 pixels of our layers, under his names."""

    def up(inputs: int, outputs: int, stride: int = 2, padding: int = 1) -> nn.Module:
        conv = SNConvTranspose2d(inputs, outputs, 4, stride, padding, dim=0)
        return nn.Sequential(conv, ConditionalBatchNorm2d(outputs, activation="relu"))

    def down(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(SNConv2d(inputs, outputs, 4, 2, 1), nn.LeakyReLU(0.1))

    g = OrderedDict(l1=up(8, 512, 1, 0), l2=up(512, 256), l3=up(256, 128), attn1=HEYKEETAE_ATTENTION(128))
    g |= {"l4": up(128, 64), "attn2": HEYKEETAE_ATTENTION(64)}
    g["last"] = nn.Sequential(nn.ConvTranspose2d(64, 3, 4, 2, 1), nn.Tanh())
    d = OrderedDict(l1=down(3, 64), l2=down(64, 128), l3=down(128, 256), attn1=HEYKEETAE_ATTENTION(256))
    d |= {"l4": down(256, 512), "attn2": HEYKEETAE_ATTENTION(512)}
    d["last"] = nn.Sequential(nn.Conv2d(512, 1, 4))
    return nn.Sequential(g), nn.Sequential(d)


def test_networks_of_our_layers_take_heykeetaes_weights() -> None:
    """His backward of two forwards takes the last one's u and v for both, so later losses are near ours only."""
    vectors, networks = peer_vectors.read("heykeetae"), heykeetae_networks()
    for network, shapes in zip(networks, (vectors.g_shapes, vectors.d_shapes), strict=True):
        convert.load(network, peer_vectors.draw_state(shapes), "heykeetae")
    calls = lambda z, _: networks[0](z[:, :, None, None]), lambda x, _: networks[1](x)
    inputs = peer_vectors.draw_inputs("heykeetae", **vectors.sizes)
    g_output, d_output = peer_vectors.evaluate(*calls, networks, inputs)
    assert relative_error(g_output, vectors.g_output, "images") <= 1e-6
    assert relative_error(d_output, vectors.d_output, "logits") <= 1e-6
    d_losses, g_losses = peer_vectors.three_steps(*calls, networks, inputs, vectors.learning_rate)
    assert d_losses[0] == pytest.approx(vectors.d_losses[0], rel=1e-6)
    assert d_losses + g_losses == pytest.approx(vectors.d_losses + vectors.g_losses, rel=1e-3)
    losses_error(d_losses + g_losses, vectors.d_losses + vectors.g_losses, "losses")
