"""Reference vectors of other code bases: networks whose weights follow from the names of their entries.

A file in tests/golden/peers holds names, shapes, inputs and outputs. Whoever makes one draws the weights with
:func:`draw_state`, as the tests do.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
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
    """Random entries, each drawn from its name: vectors of length 1, variances above 0, gammas of attention far from 0."""
    return {name: _draw(name, shape) for name, shape in shapes.items()}


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


class Vectors(NamedTuple):
    """What a peer computed.

    Attributes:
        g_shapes, d_shapes: of its state dicts.
        latents: [3, N, Z]: a batch for evaluation (the first) and for each step.
        labels: [3, N].
        images: [3, N, 3, H, W], real ones.
        g_output: of the first latents in evaluation.
        d_output: logits of the first images in evaluation, [N].
        d_losses, g_losses: of three steps, see :func:`three_steps`.
    """

    g_shapes: dict[str, tuple[int, ...]]
    d_shapes: dict[str, tuple[int, ...]]
    latents: Tensor
    labels: Tensor
    images: Tensor
    g_output: Tensor
    d_output: Tensor
    d_losses: list[float]
    g_losses: list[float]


def measure(
    name: str,
    generator: Network,
    discriminator: Network,
    networks: tuple[nn.Module, nn.Module],
    *,
    latent_dim: int,
    num_classes: int,
    resolution: int,
    batch: int = 4,
) -> Vectors:
    """Run a peer: draw its weights, evaluate both networks and take three steps, then write the file.

    ``generator(latents, labels)`` and ``discriminator(images, labels)`` call ``networks``.
    """
    drawn = [draw_state(shapes_of(network.state_dict())) for network in networks]
    for network, state in zip(networks, drawn, strict=True):
        network.load_state_dict(state)
    random = np.random.RandomState(zlib.crc32(name.encode()))
    latents = torch.from_numpy(random.standard_normal((3, batch, latent_dim)).astype(np.float32))
    labels = torch.from_numpy(random.randint(0, num_classes, (3, batch)))
    pixels = random.uniform(-1, 1, (3, batch, 3, resolution, resolution)).astype(np.float16)
    images = torch.from_numpy(pixels.astype(np.float32))
    for network in networks:
        network.eval()
    with torch.no_grad():
        g_output = generator(latents[0], labels[0])
        d_output = discriminator(images[0], labels[0]).flatten()
    losses = three_steps(generator, discriminator, networks, latents, labels, images)
    shapes = [shapes_of(state) for state in drawn]
    vectors = Vectors(*shapes, latents, labels, images, g_output, d_output, *losses)
    write(name, vectors)
    return vectors


def three_steps(
    generator: Network,
    discriminator: Network,
    networks: tuple[nn.Module, nn.Module],
    latents: Tensor,
    labels: Tensor,
    images: Tensor,
) -> tuple[list[float], list[float]]:
    """Hinge losses of three steps of D and G in training mode, by plain gradient descent.

    D's step runs D on the real batch, then on the fake one; G's step runs both networks again. Every forward in
    training mode updates the vectors of spectral normalisation.
    """
    for network in networks:
        network.train()
    g_optimizer, d_optimizer = (torch.optim.SGD(network.parameters(), lr=0.02) for network in networks)
    d_losses, g_losses = [], []
    for z, y, real in zip(latents, labels, images, strict=True):
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
    arrays: dict[str, Any] = {}
    for field, value in vectors._asdict().items():
        arrays[field] = json.dumps(value) if field.endswith("shapes") else np.asarray(value)
    arrays["images"] = arrays["images"].astype(np.float16)
    PEERS.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(PEERS / f"{name}.npz", **arrays)


def read(name: str) -> Vectors:
    with np.load(PEERS / f"{name}.npz") as file:
        arrays = {field: file[field] for field in Vectors._fields}
    found: dict[str, Any] = {}
    for field, value in arrays.items():
        if field.endswith("shapes"):
            found[field] = {key: tuple(shape) for key, shape in json.loads(str(value)).items()}
        elif field.endswith("losses"):
            found[field] = value.tolist()
        else:
            found[field] = torch.from_numpy(value.astype(np.float32) if value.dtype == np.float16 else value)
    return Vectors(**found)
