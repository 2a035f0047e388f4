"""Functions that choose the values over which a network's conditional batch norms take their statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from sagan_layers import checks
from sagan_layers.conditional_norm.module import ConditionalBatchNorm2d
from sagan_layers.conditional_norm.statistics import SynchronizedStatistics
from sagan_layers.torch_support import temporary_attribute

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)


def synchronize_batch_norm(module: _ModuleT, process_group: ProcessGroup | None = None) -> _ModuleT:
    """Make every :class:`ConditionalBatchNorm2d` in ``module`` take its training statistics over several processes.

    Unlike ``nn.SyncBatchNorm.convert_sync_batchnorm`` this replaces nothing: DistributedDataParallel refuses networks
    on a CPU that contain an ``nn.SyncBatchNorm``. State dicts do not change. Torch's batch norms are not touched.

    Args:
        module: a layer or a network.
        process_group: the processes; all by default. They need not run yet. A deep copy uses the same group. A group
            is not pickled: an unpickled module uses all processes until this function is called again.

    Returns:
        ``module``.

    Raises:
        ValueError: if there is no such layer.

    Example:
        >>> import torch
        >>> norm = synchronize_batch_norm(ConditionalBatchNorm2d(3, num_classes=2))
        >>> norm(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 1, 0])).shape  # alone, it is as before
        torch.Size([4, 3, 8, 8])
    """
    layers = _layers_of(module)
    checks.check_process_group(process_group)
    if not layers:
        raise ValueError(
            "synchronize_batch_norm: expected a ConditionalBatchNorm2d in the module, found none"
        )
    for layer in layers:
        layer._synchronized = SynchronizedStatistics(process_group)
    return module


@contextlib.contextmanager
def frozen_running_statistics(module: nn.Module) -> Iterator[None]:
    """Do not update the running statistics of any :class:`ConditionalBatchNorm2d` in ``module``.

    In training the batch's statistics normalise as always. For passes that must not change the network: the
    recomputation of activation checkpointing (:func:`~sagan_layers.checkpointed`), or samples between two steps.
    Contexts nest; without such layers nothing happens.

    Args:
        module: a layer or a network.

    Example:
        >>> import torch
        >>> norm = ConditionalBatchNorm2d(3)
        >>> with frozen_running_statistics(norm):
        ...     _ = norm(torch.randn(4, 3, 8, 8) + 5)
        >>> norm.norm.running_mean.tolist()
        [0.0, 0.0, 0.0]
    """
    with temporary_attribute("_frozen_statistics", dict.fromkeys(_layers_of(module), True)):
        yield


@contextlib.contextmanager
def standing_statistics(module: nn.Module, *, process_group: ProcessGroup | None = None) -> Iterator[None]:
    """Replace the running statistics in ``module`` by those of the passes made inside a ``with`` block.

    Inside, the whole module is in evaluation (no dropout, constant spectral norms), but every
    :class:`ConditionalBatchNorm2d` normalises by its batch's statistics and gathers them. At the end the running
    statistics become the mean and variance of all gathered values, over all processes if torch.distributed runs, and
    the training mode is restored. If the block raises, the running statistics do not change. Call it under
    ``torch.no_grad()``.

    Args:
        module: a network with :class:`ConditionalBatchNorm2d` layers.
        process_group: gather over its processes; over all by default.

    Raises:
        ValueError: if there is no such layer, or the module also contains torch batch norms with running statistics,
            which would not be replaced; use ``ConditionalBatchNorm2d(C)`` for those.

    Reference:
        Brock et al., Large Scale GAN Training for High Fidelity Natural Image Synthesis, appendix C.1.

    Example:
        >>> import torch
        >>> norm = ConditionalBatchNorm2d(3, num_classes=2)
        >>> with torch.no_grad(), standing_statistics(norm):
        ...     for size in (8, 24):
        ...         _ = norm(torch.randn(size, 3, 16, 16) + 5, torch.zeros(size, dtype=torch.long))
        >>> bool((norm.norm.running_mean - 5).abs().max() < 0.1)
        True
    """
    layers = _layers_of(module)
    checks.check_process_group(process_group)
    child_norms = {layer.norm for layer in layers}
    foreign = [
        repr(name)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        and layer.track_running_stats
        and layer not in child_norms
    ]
    if not layers or foreign:
        found = f"torch's batch norm at {', '.join(foreign)}" if foreign else "none"
        raise ValueError(f"standing statistics: expected ConditionalBatchNorm2d layers alone, got {found}")
    if any(layer._standing is not None for layer in layers):
        raise ValueError("standing statistics: expected layers that are not gathering them already")
    modes = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    try:
        for layer in layers:
            layer.begin_standing_statistics()
        yield
        for layer in layers:
            assert layer._standing is not None
            layer._standing.gather(process_group)
        for layer in layers:  # all or none: nothing can fail any more
            layer._set_standing_statistics()
    finally:
        for layer in layers:
            layer._standing = None
        for inner, training in modes:
            inner.training = training


def _layers_of(module: nn.Module) -> list[ConditionalBatchNorm2d]:
    return checks.parts_of(module, ConditionalBatchNorm2d)
