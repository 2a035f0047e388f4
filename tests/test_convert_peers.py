"""Blocks of other code bases against vectors that those computed (tests/golden/peers)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import peer_vectors
import pytest
from torch import nn

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


class Case(NamedTuple):
    """A peer's block and ours."""

    code_base: str
    block: str
    ours: Callable[[], nn.Module]
    source: convert.CodeBase | None = None


def biggan(block: str, ours: Callable[[], nn.Module]) -> Case:
    return Case("biggan_pytorch", block, ours)


def studiogan(block: str, ours: Callable[[], nn.Module]) -> Case:
    return Case("studiogan", block, ours)


def huggingface(block: str, ours: Callable[[], nn.Module], truncation: float = 1.0) -> Case:
    return Case("huggingface_biggan", block, ours, convert.huggingface_biggan_at(truncation))


CASES = [
    biggan("conv", lambda: SNConv2d(8, 5, 3, padding=1, **FLOORED)),
    biggan("linear", lambda: SNLinear(8, 5, **FLOORED)),
    biggan("embedding", lambda: SNEmbedding(5, 6, **FLOORED)),
    biggan("attention", lambda: SelfAttention2d(8, **FLOORED)),
    biggan("last_norm", lambda: ConditionalBatchNorm2d(8)),
    biggan("class_norm", lambda: ConditionalBatchNorm2d(8, 5)),
    biggan("vector_norm", lambda: VECTORS(sn_eps=0.01)),
    biggan("vector_norm_mybn", lambda: VECTORS(sn_eps=0.01)),
    studiogan("conv", lambda: SNConv2d(8, 5, 3, padding=1, **STUDIOGAN)),
    studiogan("linear", lambda: SNLinear(8, 5, **STUDIOGAN)),
    studiogan("embedding", lambda: SNEmbedding(5, 6, **STUDIOGAN)),
    studiogan("transposed_conv", lambda: SNConvTranspose2d(8, 5, 4, stride=2, padding=1, **STUDIOGAN)),
    studiogan("attention", lambda: SelfAttention2d(8, **STUDIOGAN)),
    studiogan("last_norm", lambda: ConditionalBatchNorm2d(8, eps=1e-4)),
    studiogan("vector_norm", lambda: VECTORS(eps=1e-4, sn_eps=1e-6, iterate_when_frozen=False)),
    Case("heykeetae", "conv", lambda: SNConv2d(8, 5, 4, stride=2, padding=1)),
    Case(
        "heykeetae",
        "attention",
        lambda: SelfAttention2d(8, pool_size=1, output_projection=False, bias=True, spectral_norm=False),
    ),
    huggingface("attention", lambda: SelfAttention2d(8, **{**FLOORED, **TORCH})),
    huggingface("last_norm_at_040", lambda: ConditionalBatchNorm2d(8, eps=1e-4), 0.4),
    huggingface("vector_norm_at_040", lambda: VECTORS(eps=0.01, sn_eps=0.01, iterate_when_frozen=False), 0.4),
    huggingface(
        "vector_norm_at_043", lambda: VECTORS(eps=0.01, sn_eps=0.01, iterate_when_frozen=False), 0.43
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.code_base}-{case.block}")
def test_a_peers_block_loads_by_name_and_computes_the_same(case: Case) -> None:
    vectors = peer_vectors.read_block(case.code_base, case.block)
    state = peer_vectors.draw_state(vectors.shapes)
    block = case.ours()
    outputs = peer_vectors.run_block(
        block,
        lambda: convert.load(block, state, case.source or case.code_base),
        peer_vectors.draw_block_inputs(case.block, vectors.inputs),
    )
    trains = not (case.code_base == "huggingface_biggan" and "norm" in case.block)
    for ours, theirs in list(zip(outputs, vectors.outputs, strict=True))[: 3 if trains else 1]:
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()


def test_statistics_of_a_truncation_outside_its_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"truncation: expected a number from 0 to 1, got 1\.5"):
        convert.huggingface_biggan_at(1.5)
