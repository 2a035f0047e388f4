"""The images that an evaluation generates."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sagan.distributed import World
from sagan.evaluation.config import EvaluationConfig
from sagan.networks import Generator
from sagan.sampling import generate, numbered_samples, sample_inputs
from sagan_layers import ConditionalBatchNorm2d, standing_statistics

# Standing statistics come from samples with numbers beyond those of any evaluated set.
_STANDING_START = 2**40


def generated_blocks(
    generator: Generator, config: EvaluationConfig, world: World, labels_in_use: Tensor
) -> Iterator[Tensor]:
    """Return the images of blocks rank, rank + world_size, ..., uint8 [n, 3, R, R] each; G itself does not change."""
    blocks = numbered_samples(
        _with_batch_norm_statistics(generator, config, world, labels_in_use),
        config.num_samples,
        seed=config.sample_seed,
        batch_size=config.block_size,
        rank=world.rank,
        world_size=world.world_size,
        labels_in_use=labels_in_use,
        truncation=config.truncation,
    )
    return (images for _, images, _ in blocks)


@torch.no_grad()
def _with_batch_norm_statistics(
    generator: Generator, config: EvaluationConfig, world: World, labels_in_use: Tensor
) -> Generator:
    """Return G, or a copy of it with batch or standing statistics.

    Every process gathers the same standing statistics by itself, so they do not depend on the number of processes.
    """
    if config.bn_statistics == "running":
        return generator
    # Not a deep copy, which would keep G's process group and gather over all processes.
    with torch.random.fork_rng(devices=[]):
        replica = Generator(generator.config)
    replica.to(next(generator.parameters())).load_state_dict(generator.state_dict())
    replica.eval()
    if config.bn_statistics == "batch":
        for layer in replica.modules():
            if isinstance(layer, ConditionalBatchNorm2d):
                layer.begin_standing_statistics()  # never ended, so each block is normalised by its own
        return replica
    with world.single_rank_group() as group, standing_statistics(replica, process_group=group):
        for number in range(config.standing_batches):
            start = _STANDING_START + number * config.block_size
            block = range(start, start + config.block_size)
            latents, labels = sample_inputs(
                block, replica.config, config.sample_seed, labels_in_use, truncation=config.truncation
            )
            generate(replica, latents, labels, batch_size=config.block_size)
    return replica
