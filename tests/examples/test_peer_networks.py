"""Whole networks of other code bases against vectors that those computed (tests/golden/peers)."""

from __future__ import annotations

from typing import Any, NamedTuple

import peer_vectors
import pytest
import torch
from foreign_tables import FOREIGN
from measured import losses_error, relative_error

from sagan.convert import load_network, save_network, settings_of
from sagan.errors import UserError
from sagan.networks import Discriminator, Generator, NetworkConfig
from sagan_layers import convert


class Peer(NamedTuple):
    """A file of vectors, and the fields of the configuration that express its networks.

    Attributes:
        code_base: a name of ``TABLES``.
        vectors: the file's name.
        fields: besides the sizes in the file and the code base's settings.
        outputs_within: of evaluation, relative to the largest output.
        losses_within: of training, relative to those above 1; None where training differs.
        maps_iterate_from: ``iterate_from`` of the maps of one-hot labels.
    """

    code_base: str
    vectors: str
    fields: dict[str, Any]
    outputs_within: float = 2e-6
    losses_within: float | None = 3e-6
    maps_iterate_from: str = "u"

    def config(self) -> NetworkConfig:
        sizes = {key: size for key, size in peer_vectors.read(self.vectors).sizes.items() if key != "batch"}
        settings = settings_of(TABLES[self.code_base], sizes["resolution"], {})
        return NetworkConfig(**{"base_width": 4, **settings, **sizes, **self.fields})


TABLES = {**convert.CODE_BASES, **FOREIGN}
BIGGAN: dict[str, Any] = {"sn_eps": 1e-8}
SHARED: dict[str, Any] = {**BIGGAN, "condition": "embedding", "embedding_dim": 6}
AT_32: dict[str, Any] = {"g_channels": (16,) * 4, "g_attention": (16,), "d_last_blocks": 2}
PEERS = [
    Peer("biggan_pytorch", "biggan_pytorch_sagan", BIGGAN),
    Peer("biggan_pytorch", "biggan_pytorch_biggan", {**SHARED, "hierarchical_latents": True}),
    # Its own batch norm subtracts squares: run in float64 it is as far from itself.
    Peer(
        "biggan_pytorch",
        "biggan_pytorch_mybn",
        {**SHARED, **AT_32, "d_attention": (), "d_channels": (16,) * 4},
        losses_within=1e-4,
    ),
    # The sigmas of drawn vectors are too small, so evaluation enlarges rounding errors, theirs as much.
    Peer("studiogan", "studiogan_128", {"g_attention": (64,)}, outputs_within=5e-5),
    Peer(
        "studiogan",
        "studiogan_32",
        {**AT_32, "d_attention": (16,), "d_channels": (8,) * 4},
        outputs_within=1e-5,
    ),
    Peer(
        "studiogan",
        "studiogan_biggan_64",
        {
            "condition": "embedding",
            "embedding_dim": 6,
            "hierarchical_latents": True,
            "g_attention": (8,),
            "d_attention": (16,),
            "d_channels": (4, 8, 16, 32, 64),
        },
        outputs_within=5e-5,
    ),
    Peer("mimicry", "mimicry_128", {}),
    Peer("mimicry", "mimicry_32", {**AT_32, "d_channels": (16,) * 4}),
    # A table's vectors are iterated in the other order than its map's, which the trainer has no option for.
    Peer(
        "mmgeneration",
        "mmgeneration_128",
        {"g_attention": (64,), "d_attention": (64,), "d_channels": (8, 16, 32, 64, 128, 128)},
        outputs_within=1e-5,
        maps_iterate_from="v",
    ),
    Peer(
        "mmgeneration",
        "mmgeneration_32",
        {**AT_32, "d_attention": (16,), "d_channels": (16,) * 4},
        maps_iterate_from="v",
    ),
    Peer(
        "mmgeneration",
        "mmgeneration_32_relu_in_place",
        {
            **AT_32,
            "d_attention": (16,),
            "d_channels": (16,) * 4,
            "d_relu_before_blocks": True,
            "condition": "table",
        },
    ),
    # Such attention's spectral norm is BigGAN-PyTorch's, and no gradient passes through its sigma.
    Peer(
        "mmgeneration",
        "mmgeneration_128_later_attention",
        {"g_attention": (64,), "condition": "table", "bn_eps": 1e-5},
        outputs_within=1e-5,
        losses_within=None,
    ),
    Peer(
        "voletiv",
        "voletiv_128",
        {"base_width": 2, "d_channels": (4, 8, 16, 32, 64, 64)},
        outputs_within=1e-5,
        losses_within=5e-6,
    ),
    Peer("sngan_projection", "sngan_projection_128", {}),
]
TRAINED = [peer for peer in PEERS if peer.losses_within]
# The others have two forms of one entry, entries that nothing takes, or a setting that is not the usual one.
UNUSUAL = ("_mybn", "_later_attention", "_relu_in_place")
SAVED = [peer for peer in PEERS if not peer.vectors.endswith(UNUSUAL) and peer.code_base not in FOREIGN]


def loaded(peer: Peer) -> tuple[Generator, Discriminator]:
    vectors, config = peer_vectors.read(peer.vectors), peer.config()
    generator, discriminator = Generator(config), Discriminator(config)
    load_network(generator, peer_vectors.draw_state(vectors.g_shapes), TABLES[peer.code_base])
    load_network(discriminator, peer_vectors.draw_state(vectors.d_shapes), TABLES[peer.code_base])
    for name, layer in generator.named_modules():
        if name.endswith("_projection"):
            layer.iterate_from = peer.maps_iterate_from
    return generator, discriminator


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.vectors)
def test_evaluation_computes_what_the_peer_does(peer: Peer) -> None:
    vectors, networks = peer_vectors.read(peer.vectors), loaded(peer)
    inputs = peer_vectors.draw_inputs(peer.vectors, **vectors.sizes)
    g_output, d_output = peer_vectors.evaluate(*networks, networks, inputs)
    assert relative_error(g_output, vectors.g_output, "images") < peer.outputs_within
    assert relative_error(d_output, vectors.d_output, "logits") < peer.outputs_within


@pytest.mark.parametrize("peer", TRAINED, ids=lambda peer: peer.vectors)
def test_three_training_steps_have_the_peers_losses(peer: Peer) -> None:
    vectors, networks = peer_vectors.read(peer.vectors), loaded(peer)
    inputs = peer_vectors.draw_inputs(peer.vectors, **vectors.sizes)
    d_losses, g_losses = peer_vectors.three_steps(*networks, networks, inputs, vectors.learning_rate)
    assert (
        losses_error(d_losses + g_losses, vectors.d_losses + vectors.g_losses, "losses") <= peer.losses_within
    )


@pytest.mark.parametrize("peer", SAVED, ids=lambda peer: peer.vectors)
def test_saving_for_a_peer_gives_back_its_entries(peer: Peer) -> None:
    vectors = peer_vectors.read(peer.vectors)
    for network, shapes in zip(loaded(peer), (vectors.g_shapes, vectors.d_shapes), strict=True):
        saved = save_network(network, peer.code_base)
        assert peer_vectors.shapes_of(saved) == shapes
        for name, value in peer_vectors.draw_state(shapes).items():
            if not name.endswith("sv0"):  # the last sigma, for logs: ours is computed
                torch.testing.assert_close(saved[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_a_code_base_of_blocks_alone_has_no_networks() -> None:
    network = Discriminator(NetworkConfig(resolution=32, base_width=2, num_classes=0, d_attention=()))
    with pytest.raises(UserError, match=r"heykeetae's .* got its blocks only"):
        load_network(network, {}, "heykeetae")
    with pytest.raises(ValueError, match=r"source: expected one of .*, got 'hekeytae'"):
        save_network(network, "hekeytae")
