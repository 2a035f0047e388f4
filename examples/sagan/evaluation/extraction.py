"""Features of many images, extracted by all processes and gathered on rank 0 in order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from sagan.data import ImageDataset
from sagan.data.prefetch import prefetch
from sagan.distributed import World
from sagan.errors import UserError
from sagan.evaluation.feature_networks import FeatureNetwork

_DECODE_THREADS = 4


@dataclass(frozen=True)
class FeatureBlock:
    """Features of images start to stop - 1."""

    start: int
    stop: int
    features: Tensor  # float32 [stop - start, d]
    logits: Tensor  # float32 [stop - start, K]
    digests: bytes  # SHA-256 of each image's pixels, concatenated


def extract_features(
    blocks: Iterator[Tensor],
    count: int,
    block_size: int,
    network: FeatureNetwork,
    world: World,
    consume: Callable[[FeatureBlock], None],
    *,
    description: str | None = None,
) -> None:
    """Call ``consume`` on rank 0 with the features of all ranks' blocks, in order.

    All processes call this together; if one fails to make, to see or to consume images, all raise. One process
    computes each block, process k modulo world_size block k, so rank 0 sees the same bits for any number of processes.

    Args:
        blocks: the images of this rank's blocks, rank, rank + world_size, ...: uint8 [n, 3, R, R].
        count: images in the blocks of all ranks.
        block_size: images in each block but the last.
        network, world: the feature network, and this process.
        consume: what to do with each block, on rank 0.
        description: label of a progress bar; None for none.
    """
    hidden = description is None or not world.is_main
    # disable=None shows the bar on a terminal only.
    with tqdm(
        total=count, desc=description, unit="img", disable=hidden or None, dynamic_ncols=True
    ) as progress:
        error: UserError | OSError | None = None
        for round_start in range(0, count, block_size * world.world_size):
            outputs = torch.zeros(block_size, network.num_features + network.num_logits)
            digests = torch.zeros(block_size, 32, dtype=torch.uint8)
            try:
                if (images := next(blocks, None)) is not None:
                    outputs[: len(images)] = torch.cat(network(images), 1)
                    joined = b"".join(hashlib.sha256(image.tobytes()).digest() for image in images.numpy())
                    flat = torch.frombuffer(bytearray(joined), dtype=torch.uint8)
                    digests[: len(images)] = flat.view(-1, 32)
            except (UserError, OSError) as failure:
                error = error or failure
            world.raise_together(error)
            gathered = zip(world.gather(outputs), world.gather(digests), strict=True)
            for start, (all_outputs, all_digests) in zip(
                range(round_start, count, block_size), gathered, strict=False
            ):
                stop = min(start + block_size, count)
                features, logits = all_outputs[: stop - start].tensor_split([network.num_features], 1)
                digests_of_block = all_digests[: stop - start].numpy().tobytes()
                try:
                    consume(FeatureBlock(start, stop, features, logits, digests_of_block))
                except (UserError, OSError) as failure:
                    error = error or failure  # all ranks raise in the next round
                progress.update(stop - start)
        world.raise_together(error)


def dataset_blocks(dataset: ImageDataset, block_size: int, world: World) -> Iterator[Tensor]:
    """Return an iterator over the images of blocks rank, rank + world_size, ... of a data set, decoded on threads."""
    starts = range(world.rank * block_size, len(dataset), world.world_size * block_size)

    def fetch(start: int) -> Tensor:
        images, _ = dataset.fetch(range(start, min(start + block_size, len(dataset))))
        return images

    return prefetch(fetch, starts, threads=_DECODE_THREADS, depth=_DECODE_THREADS + 1)
