"""Reference vectors of other code bases: networks whose weights follow from the names of their entries.

A file in tests/golden/peers holds names, shapes, inputs and outputs. Whoever makes one draws the weights with
:func:`draw_state`, as the tests do.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

PEERS = Path(__file__).parent / "golden" / "peers"
Shapes = Mapping[str, tuple[int, ...]]
Network = Callable[[Tensor, Tensor], Tensor]


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def draw_state(shapes: Shapes) -> dict[str, Tensor]:
    """Random entries, each drawn from its name: vectors of length 1, variances above 0, gammas far from 0.

    A right vector is turned most of the way to the one that fits u: a sigma of two independent vectors is near 0.
    """
    state = {name: _draw(name, shape) for name, shape in shapes.items()}
    for name in state:
        if name.endswith("_v"):
            _turn_to_fit(state, name)
    return state


def _turn_to_fit(state: dict[str, Tensor], name: str) -> None:
    u, v = state[name[:-1] + "u"], state[name]
    stem = name.removesuffix("_v")
    places = (stem, f"{stem}_orig", f"{stem}_bar", stem.removesuffix("0.") + "original")
    weight = next(state[place] for place in places if place in state)
    if weight.size(0) != u.numel():
        weight = weight.transpose(0, 1)
    fitting = weight.flatten(1).t() @ u.flatten()
    turned = fitting / fitting.norm() + 0.2 * v.flatten()
    state[name] = (turned / turned.norm()).reshape(v.shape)


def _draw(name: str, shape: tuple[int, ...]) -> Tensor:
    last = name.replace("/", ".").split(".")[-1]
    if last in ("num_batches_tracked", "accumulation_counter"):
        return torch.zeros(shape, dtype=torch.int64 if last == "num_batches_tracked" else torch.float32)
    # RandomState's streams never change between versions of NumPy.
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if "var" in last:
        values = 0.5 + np.abs(normal)
    elif "mean" in last or last in ("bias", "biases", "b", "beta"):
        values = 0.1 * normal
    elif last in ("sv0", "sn_sigma"):
        values = np.ones(shape)
    elif last.endswith(("_u", "_v")) or last in ("u", "u0"):
        values = normal / np.linalg.norm(normal)
    elif len(shape) < 2:  # gains and gammas
        values = 0.8 + 0.1 * normal
    else:
        values = normal / math.sqrt(max(1, math.prod(shape[1:])))
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


class Inputs(NamedTuple):
    """Batches for three steps; evaluation takes the first.

    Attributes:
        latents: [3, N, Z].
        labels: [3, N].
        images: [3, N, 3, H, W], real ones.
    """

    latents: Tensor
    labels: Tensor
    images: Tensor


def draw_inputs(name: str, *, latent_dim: int, num_classes: int, resolution: int, batch: int = 4) -> Inputs:
    random = np.random.RandomState(zlib.crc32(name.encode()))
    latents = random.standard_normal((3, batch, latent_dim)).astype(np.float32)
    labels = random.randint(0, num_classes, (3, batch))
    images = random.uniform(-1, 1, (3, batch, 3, resolution, resolution)).astype(np.float32)
    return Inputs(*map(torch.from_numpy, (latents, labels, images)))


class Vectors(NamedTuple):
    """What a peer computed.

    Attributes:
        sizes: arguments of :func:`draw_inputs`.
        g_shapes, d_shapes: of the state dicts.
        g_output: of the first latents in evaluation, every fourth row and column: [N, 3, H / 4, W / 4].
        d_output: logits of the first images in evaluation, [N].
        d_losses, g_losses: of :func:`three_steps`.
        learning_rate: of those steps.
    """

    sizes: dict[str, int]
    g_shapes: dict[str, tuple[int, ...]]
    d_shapes: dict[str, tuple[int, ...]]
    g_output: Tensor
    d_output: Tensor
    d_losses: list[float]
    g_losses: list[float]
    learning_rate: float = 0.02


def measure(
    name: str,
    generator: Network,
    discriminator: Network,
    networks: tuple[nn.Module, nn.Module],
    learning_rate: float = 0.02,
    **sizes: int,
) -> Vectors:
    """Run a peer: draw its weights, evaluate both networks and take three steps. ``sizes`` are for the inputs.

    At 0.02 small networks may die in one step, and losses that do not move prove nothing.

    ``generator(latents, labels)`` and ``discriminator(images, labels)`` call ``networks``.
    """
    drawn = [draw_state(shapes_of(network.state_dict())) for network in networks]
    for network, state in zip(networks, drawn, strict=True):
        network.load_state_dict(state)
    inputs = draw_inputs(name, **sizes)
    outputs = evaluate(generator, discriminator, networks, inputs)
    for network, state in zip(networks, drawn, strict=True):  # some peers' evaluation moves their vectors
        network.load_state_dict(state)
    losses = three_steps(generator, discriminator, networks, inputs, learning_rate)
    return Vectors(sizes, shapes_of(drawn[0]), shapes_of(drawn[1]), *outputs, *losses, learning_rate)


@torch.no_grad()
def evaluate(
    generator: Network, discriminator: Network, networks: tuple[nn.Module, nn.Module], inputs: Inputs
) -> tuple[Tensor, Tensor]:
    """``g_output`` and ``d_output`` of :class:`Vectors`."""
    for network in networks:
        network.eval()
    fake = generator(inputs.latents[0], inputs.labels[0])
    logits = discriminator(inputs.images[0], inputs.labels[0])
    return fake[:, :, ::4, ::4].clone(), logits.flatten()


def three_steps(
    generator: Network,
    discriminator: Network,
    networks: tuple[nn.Module, nn.Module],
    inputs: Inputs,
    learning_rate: float,
) -> tuple[list[float], list[float]]:
    """Hinge losses of three steps of D and G in training mode, by plain gradient descent.

    D's step runs D on the real batch, then on the fake one; G's step runs both networks again. Every forward in
    training mode updates the vectors of spectral normalisation.
    """
    for network in networks:
        network.train()
    g_optimizer, d_optimizer = (
        torch.optim.SGD(network.parameters(), lr=learning_rate) for network in networks
    )
    d_losses, g_losses = [], []
    for z, y, real in zip(*inputs, strict=True):
        with torch.no_grad():
            fake = generator(z, y)
        d_loss = torch.relu(1 - discriminator(real, y)).mean() + torch.relu(1 + discriminator(fake, y)).mean()
        d_optimizer.zero_grad()
        d_loss.backward()
        d_optimizer.step()
        g_loss = -discriminator(generator(z, y), y).mean()
        g_optimizer.zero_grad()
        g_loss.backward()
        g_optimizer.step()
        d_losses.append(d_loss.item())
        g_losses.append(g_loss.item())
    return d_losses, g_losses


def write(name: str, vectors: Vectors) -> None:
    arrays = {
        field: np.asarray(value) if isinstance(value, Tensor) else json.dumps(value)
        for field, value in vectors._asdict().items()
    }
    PEERS.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(PEERS / f"{name}.npz", **arrays)


def read(name: str) -> Vectors:
    with np.load(PEERS / f"{name}.npz") as file:
        found: dict[str, Any] = {field: file[field] for field in Vectors._fields if field in file}
    for field, value in found.items():
        found[field] = torch.from_numpy(value) if value.dtype == np.float32 else json.loads(str(value))
    for field in ("g_shapes", "d_shapes"):
        found[field] = {key: tuple(shape) for key, shape in found[field].items()}
    return Vectors(**found)


class BlockVectors(NamedTuple):
    """What a peer's block computed.

    Attributes:
        shapes: of its state dict.
        inputs: shapes of its inputs: maps, vectors, or labels [N] below 5.
        outputs: in evaluation; then, from the same state, of two forwards in training.
    """

    shapes: dict[str, tuple[int, ...]]
    inputs: list[tuple[int, ...]]
    outputs: list[Tensor]


def draw_block_inputs(name: str, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    random = np.random.RandomState(zlib.crc32(name.encode()))
    drawn = (
        random.randint(0, 5, s) if len(s) == 1 else random.standard_normal(s).astype("f") for s in shapes
    )
    return [torch.from_numpy(values) for values in drawn]


@torch.no_grad()
def run_block(block: nn.Module, load: Callable[[], Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """``outputs`` of :class:`BlockVectors`; ``load`` sets the block's state."""
    load()
    evaluation = block.eval()(*inputs)
    load()
    block.train()
    return [evaluation, block(*inputs), block(*inputs)]


def measure_block(name: str, block: nn.Module, *inputs: tuple[int, ...]) -> BlockVectors:
    """Run a peer's block with drawn weights and inputs of these shapes."""
    state = draw_state(shapes_of(block.state_dict()))
    outputs = run_block(block, lambda: block.load_state_dict(state), draw_block_inputs(name, inputs))
    return BlockVectors(shapes_of(state), list(inputs), outputs)


def write_blocks(name: str, blocks: Mapping[str, BlockVectors]) -> None:
    """Store the blocks of a code base, each by its name."""
    arrays = {}
    for block, (shapes, inputs, outputs) in blocks.items():
        arrays[f"{block}/sizes"] = np.asarray(json.dumps({"shapes": shapes, "inputs": inputs}))
        arrays |= {f"{block}/{number}": output.detach().numpy() for number, output in enumerate(outputs)}
    PEERS.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(PEERS / f"{name}_blocks.npz", **arrays)


def read_block(name: str, block: str) -> BlockVectors:
    with np.load(PEERS / f"{name}_blocks.npz") as file:
        sizes = json.loads(str(file[f"{block}/sizes"]))
        outputs = [torch.from_numpy(file[f"{block}/{number}"]) for number in range(3)]
    shapes = {key: tuple(shape) for key, shape in sizes["shapes"].items()}
    return BlockVectors(shapes, [tuple(shape) for shape in sizes["inputs"]], outputs)
