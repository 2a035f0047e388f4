"""An endless, resumable stream of batches; their order depends on (seed, epoch, position) alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from sagan.data.dataset import ImageDataset
from sagan.data.prefetch import prefetch
from sagan.data.workers import WorkerBatches, ignore_signals, no_room, place_in_shared_memory
from sagan.errors import UserError
from sagan.randomness import splitmix64

Indices = npt.NDArray[np.int64]

_PREFETCH_FACTOR = 2  # batches that each worker keeps ready
_WAKE_EVERY_S = 0.5  # how often a wait for workers looks for signals and dead workers


class IndexBatch(NamedTuple):
    """One rank's share of a batch: dataset indices and the epoch of each, both int64 [N]."""

    indices: Indices
    epochs: Indices


class ResumableBatchSampler(Sampler[list[int]]):
    """Endless batches of indices; batch k is the same wherever the stream starts.

    Each epoch visits the images in a permutation drawn from (seed, epoch). The global batch k is split into
    `num_replicas` equal consecutive parts, so 1, 2 or 4 processes see the same images in the same steps.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        seed: int,
        start_batch: int = 0,
        drop_last: bool = True,
        rank: int = 0,
        num_replicas: int = 1,
    ) -> None:
        """Describe the stream; nothing is drawn yet.

        `batch_size` counts the images in a global batch, over all replicas. All batches are full: the images at the
        end of an epoch that do not fill one are dropped, or, if not `drop_last` or if there are fewer images than
        `batch_size`, the batch continues into the next epoch.

        Raises:
            ValueError: an argument is out of range, or `num_replicas` does not divide `batch_size`.
        """
        for name, value, least in (
            ("num_items", num_items, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("start_batch", start_batch, 0),
            ("num_replicas", num_replicas, 1),
        ):
            if value < least:
                raise ValueError(f"expected {name} of at least {least}, got {value}")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"expected rank from 0 to {num_replicas - 1}, got {rank}")
        if batch_size % num_replicas:
            raise ValueError(
                f"expected a global batch_size divisible by the {num_replicas} replicas, got {batch_size}"
            )
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self.start_batch = start_batch
        self.rank = rank
        self.num_replicas = num_replicas
        drops = drop_last and num_items >= batch_size
        self._items_per_epoch = num_items // batch_size * batch_size if drops else num_items
        self._latest: dict[int, Indices] = {}

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches():
            yield batch.indices.tolist()

    def batches(self) -> Iterator[IndexBatch]:
        """Return this rank's part of batch start_batch, start_batch + 1, and so on without end."""
        return map(self.batch_at, itertools.count(self.start_batch))

    def batch_at(self, number: int) -> IndexBatch:
        """Return this rank's part of global batch `number`, N = batch_size / num_replicas indices."""
        share = self.batch_size // self.num_replicas
        first = number * self.batch_size + self.rank * share
        epochs, places = np.divmod(np.arange(first, first + share, dtype=np.int64), self._items_per_epoch)
        indices = np.empty(share, dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            indices[chosen] = self._permutation(epoch)[places[chosen]]
        return IndexBatch(indices, epochs)

    def _permutation(self, epoch: int) -> Indices:
        if epoch not in self._latest:
            self._latest = {epoch: np.random.default_rng([self.seed, epoch]).permutation(self.num_items)}
        return self._latest[epoch]


def horizontal_flips(seed: int, epochs: Indices, indices: Indices) -> npt.NDArray[np.bool_]:
    """Return whether each image is mirrored, bool [N]: a fair coin that depends on (seed, epoch, index) alone."""
    mixed = np.full(len(indices), seed, dtype=np.uint64)
    for part in (epochs, indices):
        mixed = splitmix64(mixed ^ part.astype(np.uint64))
    return (mixed >> np.uint64(63)).astype(np.bool_)


def make_loader(
    dataset: ImageDataset,
    *,
    batch_size: int,
    seed: int,
    start_batch: int = 0,
    num_workers: int = 0,
    horizontal_flip: bool = False,
    drop_last: bool = True,
    rank: int = 0,
    num_replicas: int = 1,
    pin_memory: bool = False,
    multiprocessing_context: str | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return an endless iterator over batches that neither reads nor changes torch's global random state.

    Worker processes start at once and live until the iterator is deleted; epochs do not restart them. A data set that
    is cached needs none. Without workers, `ImageDataset.prefetched_batches` are fetched ahead on a thread. What can go
    wrong with workers while a batch is awaited is raised there; see `WorkerBatches`.

    Args:
        dataset: the images.
        batch_size, drop_last, rank, num_replicas: see `ResumableBatchSampler`.
        seed: seed of the order and the flips.
        start_batch: number of the first batch; a resumed run passes the number of batches it has consumed.
        num_workers: processes that decode; 0 decodes in the caller.
        horizontal_flip: mirror each image with probability 1/2, decided by (seed, epoch, index).
        pin_memory: copy batches to pinned memory, so that copies to a GPU are asynchronous; ignored without an
            accelerator.
        multiprocessing_context: `"fork"`, `"spawn"` or `"forkserver"`; None takes Python's default.

    Returns:
        Iterator of (images uint8 [N, 3, R, R], labels int64 [N]).
    """
    sampler = ResumableBatchSampler(
        len(dataset), batch_size, seed, start_batch=start_batch, drop_last=drop_last, rank=rank,
        num_replicas=num_replicas,
    )  # fmt: skip
    options: dict[str, Any] = {
        "batch_size": None,
        "sampler": sampler.batches(),
        "collate_fn": _unchanged,
        "pin_memory": pin_memory and torch.accelerator.is_available(),
        "generator": torch.Generator().manual_seed(seed),
    }
    images = _Batches(dataset, seed, horizontal_flip)
    if num_workers:
        batch_bytes = batch_size // num_replicas * 3 * dataset.resolution**2
        options |= {
            "num_workers": num_workers,
            "prefetch_factor": _PREFETCH_FACTOR,
            "multiprocessing_context": multiprocessing_context,
            "worker_init_fn": ignore_signals,
            "timeout": _WAKE_EVERY_S,
        }
        # One more is in use.
        problem = no_room(batch_bytes, _PREFETCH_FACTOR * num_workers + 1)
        return WorkerBatches(lambda: iter(DataLoader(images, **options)), problem)
    batches: Iterator[tuple[Tensor, Tensor]] = iter(DataLoader(images, **options))
    if dataset.prefetched_batches:
        return prefetch(lambda _: next(batches), itertools.count(), depth=dataset.prefetched_batches)
    return batches


class _Batches(Dataset[Any]):
    """A data set whose key is a batch of indices, fetched at once rather than image by image."""

    def __init__(self, dataset: ImageDataset, seed: int, horizontal_flip: bool) -> None:
        self._dataset = dataset
        self._seed = seed
        self._horizontal_flip = horizontal_flip

    def __getitem__(self, key: IndexBatch) -> tuple[Tensor, Tensor] | Exception:
        """Return a batch; a worker returns an error that the user can fix, since DataLoader would change its text."""
        if get_worker_info() is None:
            return self._fetch(key)
        try:
            return place_in_shared_memory(*self._fetch(key))
        except (UserError, OSError) as error:
            return error

    def _fetch(self, key: IndexBatch) -> tuple[Tensor, Tensor]:
        images, labels = self._dataset.fetch(key.indices.tolist())
        if self._horizontal_flip:
            flipped = torch.from_numpy(horizontal_flips(self._seed, key.epochs, key.indices))
            images[flipped] = images[flipped].flip(-1)
        return images, labels


def _unchanged(batch: Any) -> Any:  # a lambda could not be sent to spawned workers
    return batch
