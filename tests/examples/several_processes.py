"""Run a function in several processes joined by gloo, once for all tests that use its results."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from sagan.distributed import World, init_world

Work = Callable[[World], dict[str, Any]]


def results_by_rank(
    work: Work, count: int, name: str, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Return the results of ``work`` by rank; it runs once for each name, also when pytest-xdist spreads the tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"{name}_on_{count}"
    done = folder / "done"
    try:
        folder.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + 300
        while not done.exists():
            assert time.monotonic() < deadline, "the processes that another worker started do not end"
            time.sleep(0.1)
    else:
        try:
            arguments = work, count, str(folder), _port(name, count)
            torch.multiprocessing.spawn(_run, args=arguments, nprocs=count)
        finally:
            done.touch()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def _run(rank: int, work: Work, count: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with init_world("cpu") as world:
        torch.save(work(world), Path(folder) / f"{rank}.pt")
        world.barrier()


def _port(name: str, count: int) -> int:
    """A port that test processes on this machine do not share."""
    return 20000 + (os.getppid() * 7 + sum(name.encode()) * 11 + count) % 20000
