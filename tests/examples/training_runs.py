"""Trainers of tiny networks, random batches for them, and the comparison of runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sagan.distributed import World
from sagan.networks import NetworkConfig
from sagan.recipes import RunConfig
from sagan.train.checkpoint import find_checkpoint, load_checkpoint
from sagan.train.loop import TrainingResult
from sagan.train.update import Trainer

Train = Callable[..., TrainingResult]

TINY_NETWORK = NetworkConfig(
    resolution=32,
    base_width=2,
    num_classes=3,
    latent_dim=6,
    g_attention=(8, 16),
    d_attention=(8,),
    bn_momentum=0.1,
)
ALONE = World(0, 1, torch.device("cpu"))
TIMINGS = {"images_per_s", "data_wait_share", "seconds_left"}


def changed(config: RunConfig, **changes: Any) -> RunConfig:
    """Return the configuration with fields replaced; ``network__init`` is ``network.init``."""
    for name, value in changes.items():
        group, _, inner = name.rpartition("__")
        config = replace(
            config, **({group: replace(getattr(config, group), **{inner: value})} if group else {name: value})
        )
    return config


def make_trainer(config: RunConfig, **changes: Any) -> Trainer:
    trainer = Trainer(changed(config, **changes), torch.arange(3), ALONE)
    set_gammas(trainer)
    return trainer


def stepped(config: RunConfig, *, steps: int = 3, **changes: Any) -> Trainer:
    """Return a trainer after some steps."""
    trainer = make_trainer(config, **changes)
    run_steps(trainer, steps)
    return trainer


def run_steps(trainer: Trainer, steps: int = 3) -> None:
    batches = Batches(trainer.config.batch_size // trainer.config.accumulation)
    for _ in range(steps):
        trainer.step(batches)


def set_gammas(trainer: Trainer) -> None:
    """Give the mixers an effect: with gamma 0 they are the identity."""
    with torch.no_grad():
        for network in (trainer.generator, trainer.discriminator):
            for mixer in network.mixers.values():
                mixer.gamma.fill_(0.7)


class Batches(Iterator[tuple[Tensor, Tensor]]):
    """This rank's shards of random batches, which are the same in every run; counts them."""

    def __init__(self, size: int, world: World = ALONE) -> None:
        self.size, self.world = size, world
        self.drawn = 0
        self.random = torch.Generator().manual_seed(1)

    def __next__(self) -> tuple[Tensor, Tensor]:
        self.drawn += 1
        images = torch.randint(256, (self.size, 3, 32, 32), generator=self.random, dtype=torch.uint8)
        labels = torch.randint(3, (self.size,), generator=self.random)
        return self.world.shard(images, 0, 1), self.world.shard(labels, 0, 1)


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Compare nested dictionaries and lists; tensors bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for name in one:
            assert_same(one[name], other[name], f"{where}/{name}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{where}/{number}")
    else:
        assert one == other, where


def metrics_of(out: Path, *, timings: bool = False) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if timings or name not in TIMINGS} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    """Compare the latest checkpoints except "out", the metrics except timings, and every grid."""
    first, second = load_checkpoint(find_checkpoint(one)), load_checkpoint(find_checkpoint(other))
    for state in (first, second):
        del state["config"]["out"]
    assert first["iteration"] > 0
    assert {"generator", "discriminator", "average", "g_optimizer", "d_optimizer", "means"} <= set(first)
    assert_same(first, second)
    assert metrics_of(one) == metrics_of(other)
    grids = [{path.name: path.read_bytes() for path in (out / "samples").iterdir()} for out in (one, other)]
    assert grids[0] == grids[1]
