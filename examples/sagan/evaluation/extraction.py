"""One pass over images: features and logits of all of them, in order, in the first process."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from sagan.distributed import World
from sagan.evaluation.feature_networks import FeatureNetwork


class ImageSource(Protocol):
    """What a data set must have to be evaluated against."""

    @property
    def labels(self) -> Tensor:
        """Int64 [N], of each image."""

    @property
    def class_names(self) -> Sequence[str]:
        """By label."""

    @property
    def resolution(self) -> int:
        """Side of the images in pixels, R."""

    def __len__(self) -> int: ...

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return images uint8 [N, 3, R, R] and labels int64 [N]."""


@dataclass(frozen=True)
class Block:
    """What a pass yields of some images that follow each other.

    Attributes:
        start: number of the first image.
        stop: number after the last.
        features: float32 [stop - start, d].
        logits: float32 [stop - start, K].
        digest: the SHA-256 of each image, one after the other.
    """

    start: int
    stop: int
    features: Tensor
    logits: Tensor
    digest: bytes


def extract_features(
    own_blocks: Iterator[Tensor],
    count: int,
    block_size: int,
    network: FeatureNetwork,
    world: World,
    *,
    description: str | None = None,
) -> Iterator[Block]:
    """Yield all processes' blocks in the order of their numbers in process 0, and none in the others.

    All processes iterate to the end together. What process 0 sees does not depend on how many there are: block k is
    made whole by one of them, process k modulo their number.

    Args:
        own_blocks: images of blocks rank, rank + processes, ...: uint8 [n, 3, R, R].
        count: images in all blocks.
        block_size: images in a block; the last may have fewer.
        network: makes features.
        world: this process.
        description: label of a progress bar; None for none.
    """
    width = network.num_features + network.num_logits
    num_blocks = -(-count // block_size)
    bar = tqdm(
        total=count,
        desc=description,
        unit="img",
        disable=True if description is None or not world.is_main else None,  # None: on a terminal only
        dynamic_ncols=True,
    )
    with bar:
        for first in range(0, num_blocks, world.world_size):
            outputs = torch.zeros(block_size, width)
            digest = torch.zeros(block_size, 32, dtype=torch.uint8)
            if first + world.rank < num_blocks:
                images = next(own_blocks)
                outputs[: len(images)] = torch.cat(network(images), 1)
                of_each = b"".join(hashlib.sha256(image.tobytes()).digest() for image in images.numpy())
                digest[: len(images)] = torch.frombuffer(bytearray(of_each), dtype=torch.uint8).view(-1, 32)
            rows, digests = world.gather(outputs), world.gather(digest)
            for number, (row, each) in enumerate(zip(rows, digests, strict=True), first):
                if number == num_blocks:
                    break
                start, stop = number * block_size, min((number + 1) * block_size, count)
                features, logits = torch.split(
                    row[: stop - start], [network.num_features, network.num_logits], 1
                )
                yield Block(start, stop, features, logits, each[: stop - start].numpy().tobytes())
                bar.update(stop - start)


def dataset_blocks(
    source: ImageSource, block_size: int, world: World, *, threads: int = 4
) -> Iterator[Tensor]:
    """Yield the images of blocks rank, rank + processes, ... of a data set, fetched ahead on threads.

    Args:
        source: the data set.
        block_size: images in a block; the last may have fewer.
        world: this process.
        threads: blocks that are decoded at once; Pillow decodes outside of Python's lock.
    """
    count = len(source)
    starts = iter(range(world.rank * block_size, count, world.world_size * block_size))
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[tuple[Tensor, Tensor]]] = deque()

        def send() -> None:
            for start in starts:
                waiting.append(pool.submit(source.fetch, range(start, min(start + block_size, count))))
                return

        for _ in range(threads + 1):
            send()
        while waiting:
            images, _ = waiting.popleft().result()
            send()
            yield images
