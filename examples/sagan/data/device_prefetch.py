"""Copies each batch to the GPU while the step before it runs: work for a CUDA stream, not for a thread."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]


def prefetch_to_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches on the device; on CUDA a separate stream copies each one step ahead.

    Args:
        batches: on the CPU; in pinned memory the host does not wait for the copies.
        device: target of the copies.
    """
    if device.type != "cuda":
        for pixels, labels in batches:
            yield pixels.to(device), labels.to(device)
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin_next() -> Batch:
        pixels, labels = next(batches)
        with torch.cuda.stream(stream):
            return pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    following = begin_next()
    while True:
        current = following
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(stream)
        for tensor in current:
            tensor.record_stream(computing)
        following = begin_next()
        yield current
