"""Data workers that are killed, stuck, or without room in shared memory."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from command_line import python
from image_trees import WNIDS
from several_processes import results_by_rank
from torch import Tensor
from torch.utils.data import get_worker_info
from training_runs import Train, changed

from sagan.data import DatasetError, ImageFolderDataset, make_loader, scan_image_tree
from sagan.data.workers import WorkerError
from sagan.distributed import World
from sagan.errors import UserError
from sagan.recipes import RunConfig
from sagan.signals import StopRequestedError, stop_requests
from sagan.train.checkpoint import checkpoints_in, load_checkpoint
from sagan.train.health import TrainingError
from sagan.train.loop import train

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")

OPTIONS: dict[str, Any] = {"batch_size": 4, "seed": 0, "num_workers": 2, "multiprocessing_context": "fork"}
# No maps to draw.
WITH_WORKER = {
    **{"images__workers": 1, "images__cache_mib": 0, "iterations": 1000},
    **{"network__g_attention": (), "network__d_attention": ()},
}


@pytest.fixture(scope="module")
def dataset(image_folder: Path) -> ImageFolderDataset:
    return ImageFolderDataset(scan_image_tree(image_folder), 8, cache_mib=0)


def kill_a_worker() -> None:
    worker = multiprocessing.active_children()[0]
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)


def test_a_killed_worker_is_an_error_within_seconds(dataset: ImageFolderDataset) -> None:
    before = signal.getsignal(signal.SIGCHLD)
    batches = make_loader(dataset, **OPTIONS)
    assert signal.getsignal(signal.SIGCHLD) is before  # no exception in the middle of an update
    next(batches)
    kill_a_worker()
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"was killed \(SIGKILL\).* --images.workers"):
        for _ in batches:
            pass
    assert time.monotonic() - start < 10
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("fault", ["a killed worker", "a class that vanishes"])
def test_training_saves_a_checkpoint_and_ends(
    fault: str, train_tiny: Train, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shutil.copytree(image_folder, tmp_path / "images")

    def fail(trainer: Any) -> None:
        if trainer.iteration == 2 and fault == "a killed worker":
            kill_a_worker()
        elif trainer.iteration == 2:
            (data / "train" / WNIDS[1]).rename(tmp_path / "away")

    monkeypatch.setattr("sagan.data.folder._WAITS_S", (0.01,))
    why = r"was killed \(SIGKILL\)" if fault == "a killed worker" else rf"class '{WNIDS[1]}'.*No such file"
    with pytest.raises(TrainingError, match=rf"{why}[\s\S]*Saved .*iteration_"):
        train_tiny(data=data, observe=fail, output__sample_every=2, **WITH_WORKER)
    (checkpoint,) = checkpoints_in(tmp_path / "run" / "checkpoints")
    assert 2 <= load_checkpoint(checkpoint)["iteration"] < 20


class Deadly(ImageFolderDataset):
    """Its worker dies while it makes the sixth batch, so after training has seen some."""

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        self.batches = getattr(self, "batches", 0) + 1
        if get_worker_info() is not None and self.batches == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fetch(indices)


def lose_a_worker_of_rank_1(world: World, *, config: RunConfig) -> dict[str, Any]:
    kind = Deadly if world.rank == 1 else ImageFolderDataset
    images = kind(scan_image_tree(config.data or ""), config.network.resolution, cache_mib=0)
    config = changed(config, images__workers=world.rank)
    try:
        train(config, images, world=world, progress=False)
    except UserError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {}


def test_all_processes_end_when_a_worker_of_one_is_killed(
    tiny_config: RunConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs torch.distributed with gloo")
    out = tmp_path_factory.getbasetemp() / "lost worker"
    config = changed(tiny_config, out=out, **WITH_WORKER)
    work = partial(lose_a_worker_of_rank_1, config=config)
    silent, spoken = (ranks["error"] for ranks in results_by_rank(work, 2, "workers", tmp_path_factory))
    assert silent.startswith("ReportedElsewhereError")
    assert "was killed (SIGKILL)" in spoken
    (checkpoint,) = checkpoints_in(out / "checkpoints")
    assert 2 <= load_checkpoint(checkpoint)["iteration"] <= 5


class Stuck(ImageFolderDataset):
    """Its files are on a disk that does not answer."""

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        time.sleep(1000)
        raise AssertionError


def test_a_signal_ends_the_wait_for_a_worker_that_is_stuck(image_folder: Path) -> None:
    batches = make_loader(Stuck(scan_image_tree(image_folder), 8, cache_mib=0), **OPTIONS)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    start = time.monotonic()
    with stop_requests(lambda: ""), pytest.raises(StopRequestedError):
        next(batches)
    assert time.monotonic() - start < 5
    assert not multiprocessing.active_children()


PROGRAM = """
import sys
from sagan.data import ImageFolderDataset, make_loader, scan_image_tree
dataset = ImageFolderDataset(scan_image_tree(sys.argv[1]), 8, cache_mib=0)
batches = make_loader(dataset, batch_size=4, seed=0, num_workers=1)
next(batches)
raise RuntimeError("a bug")
"""


def test_workers_end_with_a_program_that_fails(image_folder: Path) -> None:
    process = python(PROGRAM, image_folder)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.endswith("RuntimeError: a bug\n")


class TestSharedMemory:
    @pytest.mark.parametrize(
        ("free", "processes", "fits"), [(4000, 1, True), (3500, 1, False), (4000, 2, True), (4000, 3, False)]
    )
    def test_room_for_all_batches_is_needed(
        self,
        dataset: ImageFolderDataset,
        monkeypatch: pytest.MonkeyPatch,
        free: int,
        processes: int,
        fits: bool,
    ) -> None:
        facts = SimpleNamespace(f_blocks=8000, f_bavail=free, f_frsize=1)
        monkeypatch.setattr("sagan.data.workers.os.statvfs", lambda _: facts)
        monkeypatch.setattr("sagan.data.workers.SHARED_MEMORY", Path("/"))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        batches = make_loader(dataset, **OPTIONS)  # (2 workers * 2 + 1) * 4 * 192 bytes = 3840
        if fits:
            next(batches)
        else:
            assert not multiprocessing.active_children()
            with pytest.raises(WorkerError, match=r"room for 5 batches .* --shm-size.* --images.workers"):
                next(batches)

    def test_a_batch_without_room_is_an_error(
        self, dataset: ImageFolderDataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(_: Tensor) -> Tensor:
            raise RuntimeError("No space left on device (28)")

        monkeypatch.setattr(Tensor, "share_memory_", full)
        with pytest.raises(WorkerError, match=r"no room for its batch: No space left .* --shm-size"):
            next(make_loader(dataset, **OPTIONS))


def test_an_error_of_a_worker_keeps_its_text(
    dataset: ImageFolderDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise DatasetError("the one line")

    monkeypatch.setattr(ImageFolderDataset, "fetch", refuse)
    with pytest.raises(DatasetError, match=r"^the one line$"):
        next(make_loader(dataset, **OPTIONS))
