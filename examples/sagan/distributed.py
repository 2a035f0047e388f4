"""Processes that train or evaluate together. ``torchrun`` starts them; without it there is one."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sagan.errors import FailureError, NotFiniteError, UserError
from sagan.io import tensor_bytes
from sagan.rendezvous import START_S, LostProcessError, Rendezvous, environment_number, launched
from sagan_layers import SpectralNormLayer

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among those that work together."""

    rank: int  # rank 0 writes files and prints
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None  # for messages between hosts, always on the CPU

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def shard(self, whole: Tensor, part: int, parts: int) -> Tensor:
        """Return this rank's shard of a part of a global batch, [N, ...] -> [N / parts / world_size, ...]."""
        size = len(whole) // (parts * self.world_size)
        start = (part * self.world_size + self.rank) * size
        return whole[start : start + size]

    def run_on_main(self, work: Callable[[], T]) -> T:
        """Return the result of a function that runs on rank 0 only; JSON must be able to hold it.

        A UserError or an OSError is raised as by :meth:`raise_together`.
        """
        if self.world_size == 1:
            return work()
        message, error = [""], None
        if self.is_main:
            try:
                message = [json.dumps(work())]
            except (UserError, OSError) as failure:
                error = failure
        self.raise_together(error)
        dist.broadcast_object_list(message, src=0, group=self.control)
        result: T = json.loads(message[0])
        return result

    def raise_together(self, error: Exception | None) -> None:
        """Raise on all ranks if one has an error.

        All raise a :class:`NotFiniteError`, so all can go on after it, unless one has another error. Then the first
        rank with a UserError or an OSError raises it, ranks with a bug raise that, and the others
        :class:`ReportedElsewhereError`.
        """
        kind = 0 if error is None else 1 if isinstance(error, NotFiniteError) else 2
        worst = self.max_over_ranks(kind)
        is_bug = error is not None and not isinstance(error, (UserError, OSError))
        speaks = kind == worst and not is_bug
        speaker = self.world_size - self.max_over_ranks(self.world_size - self.rank if speaks else 0)
        if error is not None and (is_bug or kind == worst == 1 or self.rank == speaker):
            raise error
        if worst == 1:
            raise NotFiniteError("another process found NaN or infinite values")
        if worst == 2:
            raise ReportedElsewhereError("another process failed")

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier(group=self.control)

    def max_over_ranks(self, number: int) -> int:
        """Return the largest of all ranks' numbers, without waiting for a GPU."""
        if self.world_size == 1:
            return number
        numbers = torch.tensor([number])
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self.control)
        return int(numbers.item())

    def max_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor on the device by its maximum over the ranks, without waiting for a GPU; return it."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def mean_over_ranks(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Return the mean over all ranks of each number."""
        if self.world_size == 1:
            return dict(numbers)
        values = torch.tensor(list(numbers.values()), dtype=torch.float64)
        dist.all_reduce(values, group=self.control)
        return dict(zip(numbers, (values / self.world_size).tolist(), strict=True))

    def average_(self, tensors: Iterable[Tensor]) -> None:
        """Replace floating-point tensors by their mean over the ranks, with one message for each dtype."""
        if self.world_size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for group in by_dtype.values():
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in group])
            dist.all_reduce(flat)
            parts = torch.split(flat.div_(self.world_size), [tensor.numel() for tensor in group])
            for tensor, part in zip(group, parts, strict=True):
                tensor.detach().copy_(part.view(tensor.shape))

    def gather_texts(self, text: str) -> list[str]:
        """Return all ranks' texts, by rank."""
        if self.world_size == 1:
            return [text]
        texts: list[str | None] = [None] * self.world_size
        dist.all_gather_object(texts, text, group=self.control)
        return [str(each) for each in texts]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return all ranks' tensors, of one shape and on the CPU, by rank on rank 0; an empty list elsewhere."""
        if self.world_size == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.world_size)] if self.is_main else None
        dist.gather(tensor.contiguous(), found, group=self.control)
        return found or []

    @contextlib.contextmanager
    def single_rank_group(self) -> Iterator[dist.ProcessGroup | None]:
        """Yield a group of this process only, for code that gathers over a group."""
        if self.world_size == 1:
            yield None
            return
        group = dist.new_group([self.rank], use_local_synchronization=True)
        try:
            yield group
        finally:
            dist.destroy_process_group(group)


class ReportedElsewhereError(FailureError):
    """An error that another rank reports; this one stays silent."""


class ProcessesDisagreeError(FailureError):
    """The ranks should hold the same numbers, but do not."""


@contextlib.contextmanager
def init_world(
    device_name: str, *, timeout_minutes: float = 30.0, start_s: float = START_S
) -> Iterator[World]:
    """Join the processes that ``torchrun`` started for a ``with`` block.

    The device is "auto", "cpu" or "cuda": each process uses the GPU of its LOCAL_RANK. A device with a number, such as
    "cuda:1", is for one process. Processes wait up to ``start_s`` for all to start, and up to ``timeout_minutes`` for
    one that lives but does not answer. One that ends, however it does, ends the others within seconds.

    Raises:
        UserError: if the environment is wrong, or a process does not start.
        LostProcessError: if another process ends during the block.
    """
    rank, count = launched()
    if count == 1:
        yield World(0, 1, pick_device(device_name))
        return
    local_rank = environment_number("LOCAL_RANK", 0)
    meeting = Rendezvous(rank, count, start_s=start_s)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    control = None
    try:
        device = _local_device(device_name, local_rank)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=meeting.store, rank=rank, world_size=count, timeout=timeout)
        control = (
            dist.new_group(backend="gloo", timeout=timeout) if device.type == "cuda" else dist.group.WORLD
        )
        yield World(rank, count, device, control)
        dist.destroy_process_group()
    except BaseException as error:
        why = meeting.leave(error)
        if control is not None:  # NCCL would wait for the others
            dist.destroy_process_group(control)
        if why:
            raise LostProcessError(f"process {rank} ends, because {why}") from error
        raise


def pick_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is the first GPU, or the CPU without one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = ["cpu"]
    if torch.accelerator.is_available() and (accelerator := torch.accelerator.current_accelerator()):
        kind, count = accelerator.type, torch.accelerator.device_count()
        found += [kind, *(f"{kind}:{index}" for index in range(count))]
    if name not in found:
        raise UserError(f"device: expected auto or one of this machine ({', '.join(found)}), got {name!r}")
    return torch.device(name)


def _local_device(name: str, local_rank: int) -> torch.device:
    device = pick_device(name)
    if device.type != "cuda":
        return device
    if name not in ("auto", "cuda"):
        raise UserError(f"device: expected auto, cpu or cuda with several processes, got {name!r}")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"expected a GPU for each process of this machine, found {torch.cuda.device_count()} for process "
            f"{local_rank}; start torchrun with --nproc-per-node={torch.cuda.device_count()}"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def running_statistics(network: nn.Module) -> list[Tensor]:
    """Return the running means and variances of a network."""
    buffers = network.named_buffers()
    return [buffer for name, buffer in buffers if name.endswith(("running_mean", "running_var"))]


def check_agreement(world: World, networks: Mapping[str, nn.Module]) -> None:
    """Raise an error on all ranks if weights, spectral-norm vectors or running statistics differ in a bit."""
    if world.world_size == 1:
        return
    digests = {}
    for name, network in networks.items():
        layers = [layer for layer in network.modules() if isinstance(layer, SpectralNormLayer)]
        vectors = (vector for layer in layers for vector in (layer.weight_u, layer.weight_v))
        digests[f"{name}'s weights"] = _digest(network.parameters())
        digests[f"{name}'s spectral-norm vectors"] = _digest(vectors)
        digests[f"{name}'s running statistics"] = _digest(running_statistics(network))
    found = [text.split() for text in world.gather_texts(" ".join(digests.values()))]
    different = [
        f"{what} of process {rank}"
        for index, what in enumerate(digests)
        for rank, digests_of_rank in enumerate(found)
        if digests_of_rank[index] != found[0][index]
    ]
    if different:
        raise ProcessesDisagreeError(
            f"expected the same numbers in all {world.world_size} processes, but these differ from process 0: "
            + "; ".join(different)
        )


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()[:16]
