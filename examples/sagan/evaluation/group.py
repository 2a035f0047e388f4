"""The processes that evaluate together: who this one is, and what reaches the first."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sagan.errors import UserError

# The others wait while the first computes distances of large sets, or reads a cache from a slow disk.
_PATIENCE = datetime.timedelta(hours=12)


@dataclass(frozen=True)
class Group:
    """This process among those that evaluate together; alone by default.

    Attributes:
        rank: its number, from 0.
        count: how many there are.
        channel: connects them, on the CPU.
        alone: has this process for its only member.
    """

    rank: int = 0
    count: int = 1
    channel: dist.ProcessGroup | None = None
    alone: dist.ProcessGroup | None = None

    @classmethod
    def current(cls) -> Group:
        """Return the group of all processes of torch.distributed; all of them must call this together."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        rank, count = dist.get_rank(), dist.get_world_size()
        channel = dist.new_group(backend="gloo", timeout=_PATIENCE)
        return cls(rank, count, channel, dist.new_group([rank], use_local_synchronization=True))

    @property
    def is_first(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all processes by rank, all of one shape and on the CPU; nothing except in process 0."""
        if self.channel is None:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.count)] if self.is_first else None
        dist.gather(tensor.contiguous(), found, group=self.channel)
        return found or []

    def on_first(self, function: Callable[[], Any]) -> Any:
        """Return in all processes what the function returns in process 0, which alone calls it.

        Args:
            function: returns what JSON can hold.

        Raises:
            UserError: in all processes, if the function raised one; any other exception in process 0, and a
                RuntimeError in the others.
        """
        if self.channel is None:
            return function()
        answer = [""]
        failure: Exception | None = None
        if self.is_first:
            try:
                answer = [json.dumps({"value": function()})]
            except Exception as error:  # told to the others, who would wait for ever, and raised below
                failure = error
                kind = "refused" if isinstance(error, UserError) else "failed"
                answer = [json.dumps({kind: str(error)})]
        dist.broadcast_object_list(answer, src=0, group=self.channel)
        if failure is not None:
            raise failure
        told = json.loads(answer[0])
        if "refused" in told:
            raise UserError(told["refused"])
        if "failed" in told:
            raise RuntimeError(f"process 0 failed: {told['failed']}")
        return told["value"]


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[tuple[torch.device, Group]]:
    """Join the processes that torchrun started, for a ``with`` block; alone without it.

    Args:
        device: with several processes on CUDA, each takes its own GPU instead.

    Yields:
        This process's device, and the group.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device, Group()
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device, Group.current()
    finally:
        dist.destroy_process_group()
