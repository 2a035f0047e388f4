"""Checkpoints of networks whose attention has contrast, and the weights of their attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from image_trees import WNIDS
from torch import Tensor, nn
from training_runs import stepped

from sagan.networks import Discriminator, Generator
from sagan.recipes import RunConfig
from sagan.sampling import load_generator
from sagan.train.checkpoint import load_checkpoint, save_checkpoint
from sagan.train.health import CollapseAlarm, HealthConfig
from sagan_layers import SelfAttention2d

CPU = torch.device("cpu")


def write_run(
    out: Path,
    config: RunConfig,
    *,
    names: Sequence[str] = WNIDS[:3],
    iterations: tuple[int, ...] = (200, 400),
) -> Path:
    """Write checkpoints of a run whose maps have contrast: without spectral normalisation, queries are long."""
    for number, iteration in enumerate(iterations):
        torch.manual_seed(number)
        trainer = stepped(
            config, steps=1, ema_decay=0.0, network__g_spectral_norm=False, network__d_spectral_norm=False
        )
        with torch.no_grad():
            for mixer in trainer.generator.mixers.values():
                mixer.query.weight.mul_(30)
            for mixer in trainer.discriminator.mixers.values():
                mixer.query.weight.mul_(1000)
        state: Any = {
            **trainer.state_dict(),
            **{"iteration": iteration, "class_names": list(names), "fingerprint": "", "best_score": None},
            **{"best_score_of": "", "alarm": CollapseAlarm(HealthConfig()).state_dict()},
        }
        save_checkpoint(out / "checkpoints", state, keep=9)
    return out


def networks_of(checkpoint: Path) -> tuple[Generator, Discriminator]:
    generator = load_generator(checkpoint, CPU).generator
    discriminator = Discriminator(generator.config)
    discriminator.load_state_dict(load_checkpoint(checkpoint)["discriminator"])
    return generator, discriminator.eval()


@torch.no_grad()
def weights_of(network: nn.Module, resolution: int, *inputs: Tensor) -> Tensor:
    """The weights of all places of a feature map, [N, rows, columns, keys]."""
    layer = network.mixers[str(resolution)]  # type: ignore[index, union-attr, operator]
    assert isinstance(layer, SelfAttention2d)
    seen: list[Tensor] = []
    with layer.register_forward_pre_hook(lambda _, given: seen.append(given[0])):
        network(*inputs)
    every = [(row, column) for row in range(resolution) for column in range(resolution)]
    weights = layer.attention_weights(seen[0], every, key_grid=False)
    return weights.view(len(weights), resolution, resolution, -1)
