"""A small data set, and a run trained on it, for the tests of the trainer."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from full_disks import full_disk  # noqa: F401
from image_trees import WNIDS, write_image_tree
from training_runs import TINY_NETWORK, Train, changed

from sagan.data import DataConfig, ImageFolderDataset, scan_image_tree
from sagan.recipes import OutputConfig, RunConfig
from sagan.train.loop import TrainingResult, train


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of five JPEGs: root/train/<class>/."""
    root = tmp_path_factory.mktemp("images")
    sizes = [(48, 40), (37, 50), (33, 33)]
    write_image_tree(root / "train", class_names=WNIDS[:3], images_per_class=5, sizes=sizes)
    return root


@pytest.fixture(scope="session")
def tiny_config(image_folder: Path) -> RunConfig:
    """A run of a few seconds, with an average and flips."""
    return RunConfig(
        recipe="best_known",
        data=image_folder,
        iterations=2,
        batch_size=4,
        ema_decay=0.8,
        device="cpu",
        network=TINY_NETWORK,
        images=DataConfig(horizontal_flip=True),
        output=OutputConfig(grid_columns=2),
    )


@pytest.fixture(scope="session")
def run_training() -> Train:
    """``run_training(config, **arguments of train)``: train on the folder of the configuration, quietly."""

    def run(config: RunConfig, **arguments: Any) -> TrainingResult:
        assert config.data is not None
        tree = scan_image_tree(config.data)
        dataset = ImageFolderDataset(tree, config.network.resolution, cache_mib=config.images.cache_mib)
        return train(config, dataset, **{"progress": False, **arguments})

    return run


@pytest.fixture
def train_tiny(tiny_config: RunConfig, run_training: Train, tmp_path: Path) -> Train:
    """``train_tiny(out, **settings)``: train the tiny run in ``tmp_path / out``.

    Settings are arguments of ``train`` and changes as of :func:`training_runs.changed`.
    """

    def run(out: str = "run", **settings: Any) -> TrainingResult:
        names = settings.keys() & inspect.signature(train).parameters.keys()
        arguments = {name: settings.pop(name) for name in names}
        return run_training(changed(tiny_config, out=tmp_path / out, **settings), **arguments)

    return run


@pytest.fixture(scope="session")
def trained_run(
    tiny_config: RunConfig, run_training: Train, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a run whose samples differ visibly from each other and from those of the raw weights."""
    out = tmp_path_factory.mktemp("run") / "run"
    optimizer = replace(tiny_config.optimizer, g_lr=0.02, d_lr=0.02)
    run_training(replace(tiny_config, out=out, iterations=4, optimizer=optimizer))
    return out
