"""Where a run's rows and pictures go besides its folder: TensorBoard, Weights & Biases."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from sagan.errors import UserError
from sagan.extras import needs
from sagan.io import atomic_write_text, first_line
from sagan.recipes import OutputConfig, RunConfig

WANDB_ID = "wandb_id.txt"

logger = logging.getLogger(__name__)


class Logger(Protocol):
    """Takes what a run logs. Exceptions are warnings: they cost the run the logger only."""

    def log_row(self, iteration: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a row of the log."""

    def log_images(self, iteration: int, pictures: Mapping[str, Path]) -> None:
        """Take pictures by name, as PNGs in the run's folder."""

    def close(self) -> None:
        """Write what is still to be written."""


class TensorBoardLogger:
    """Writes TensorBoard's files below the run's folder."""

    def __init__(self, out: Path, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board: Any = SummaryWriter(out / "tensorboard", purge_step=iteration + 1)

    def log_row(self, iteration: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, iteration)
        self._board.flush()

    def log_images(self, iteration: int, pictures: Mapping[str, Path]) -> None:
        for name, path in pictures.items():
            with Image.open(path) as picture:
                pixels = np.array(picture.convert("RGB"))
            self._board.add_image(name, pixels, iteration, dataformats="HWC")
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class WandbLogger:
    """Logs to Weights & Biases, to one run there for each run's folder; a resumed run continues it.

    The project is that of WANDB_PROJECT, "sagan" by default; WANDB_MODE=offline keeps everything in the run's folder.
    """

    def __init__(self, out: Path, config: RunConfig) -> None:
        import wandb

        path = out / WANDB_ID
        if not path.exists():
            atomic_write_text(path, f"{secrets.token_hex(4)}\n")
        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "sagan"),
                id=path.read_text(encoding="utf-8").strip(),
                resume="allow",
                name=out.resolve().name,
                dir=str(out),
                config=config.to_dict(),
                settings=wandb.Settings(console="off"),  # it would take the progress bar for the run's output
            )
        except Exception as error:  # of many types; it asks the service
            raise UserError(
                f"output.wandb: Weights & Biases refused ({first_line(error)}); `wandb login` signs in, "
                "WANDB_MODE=offline keeps the log in the run's folder"
            ) from error
        # Not wandb's own step, which cannot go back, as a resumed run does.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def log_row(self, iteration: int, values: Mapping[str, float]) -> None:
        self._run.log({"iteration": iteration, **values})

    def log_images(self, iteration: int, pictures: Mapping[str, Path]) -> None:
        images = {name: self._wandb.Image(str(path)) for name, path in pictures.items()}
        self._run.log({"iteration": iteration, **images})

    def close(self) -> None:
        self._run.finish()


def check_loggers(config: OutputConfig) -> None:
    """Raise :class:`UserError` if a library that the configuration asks for is missing."""
    if config.tensorboard:
        with needs("output.tensorboard", "TensorBoard", "tensorboard"):
            import tensorboard  # noqa: F401
    if config.wandb:
        with needs("output.wandb", "wandb", "wandb"):
            import wandb  # noqa: F401


def open_loggers(config: RunConfig, iteration: int) -> list[Logger]:
    """Return the loggers that the configuration asks for, for a run that has done ``iteration`` iterations."""
    check_loggers(config.output)
    loggers: list[Logger] = []
    if config.output.tensorboard:
        loggers.append(TensorBoardLogger(config.out, iteration))
    if config.output.wandb:
        loggers.append(WandbLogger(config.out, config))
    return loggers
