"""A generator with the batch-norm statistics that an evaluation asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from sagan.distributed import World
from sagan.evaluation.config import EvaluationConfig
from sagan.networks import Generator
from sagan.sampling import generate, sample_inputs
from sagan_layers import ConditionalBatchNorm2d, standing_statistics

# Numbers of the samples that standing statistics are from, beyond those of any evaluated set.
_STANDING_START = 2**40


@torch.no_grad()
def with_batch_norm_statistics(
    generator: Generator, config: EvaluationConfig, world: World, labels_in_use: Tensor
) -> Generator:
    """Return G with running, batch or standing statistics; G itself is left as it is.

    Each process gathers the same standing statistics for itself, so that they do not depend on how many there are.

    Args:
        generator: G.
        config: says which.
        world: this process.
        labels_in_use: classes to go through in turn.
    """
    if config.bn_statistics == "running":
        return generator
    with torch.random.fork_rng(devices=[]):  # anew, for a copy would gather over all processes where G does
        replica = Generator(generator.config)
    replica.to(next(generator.parameters())).load_state_dict(generator.state_dict())
    replica.eval()
    if config.bn_statistics == "batch":
        for layer in replica.modules():
            if isinstance(layer, ConditionalBatchNorm2d):
                layer.begin_standing_statistics()  # and never end: each block is normalised by its own
        return replica
    with world.single_rank_group() as alone, standing_statistics(replica, process_group=alone):
        for number in range(config.standing_batches):
            start = _STANDING_START + number * config.block_size
            latents, labels = sample_inputs(
                range(start, start + config.block_size),
                replica.config,
                config.sample_seed,
                labels_in_use,
                truncation=config.truncation,
            )
            generate(replica, latents, labels, batch_size=config.block_size)
    return replica
