"""The training loop."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sagan.data import ImageDataset, make_loader, prefetch_to_device
from sagan.distributed import World, check_agreement, pick_device
from sagan.io import locked
from sagan.recipes import RunConfig
from sagan.train.health import CollapseAlarm, check_losses_finite
from sagan.train.logs import Console, RunLog, Throughput
from sagan.train.output import RunOutput, Score
from sagan.train.resume import check_images, check_start
from sagan.train.update import Trainer

Evaluate = Callable[[Trainer], Score]


class Stop(IntEnum):
    """Why a run stops early. When ranks differ, the largest counts."""

    NO = 0
    SIGNAL = 1
    COLLAPSE = 2


@dataclass(frozen=True)
class TrainingResult:
    """The result of :func:`train`."""

    out: Path
    checkpoint: Path  # the last one
    iteration: int  # iterations done
    interrupted: bool  # by a signal, before the end
    collapsed: bool  # stopped by a sign of collapse
    trainer: Trainer


def train(
    config: RunConfig,
    dataset: ImageDataset,
    *,
    world: World | None = None,
    resume: bool = False,
    accept_changes: bool = False,
    progress: bool = True,
    evaluate: Evaluate | None = None,
    observe: Callable[[Trainer], None] | None = None,
) -> TrainingResult:
    """Train, or resume training, until ``config.iterations`` or a first SIGINT or SIGTERM.

    On the CPU a run that was interrupted and resumed equals one that was not, bit for bit.

    Args:
        config: the whole run, ``network.num_classes`` set to the dataset's (or 0).
        dataset: the images; a run does not resume with another `ImageDataset.fingerprint`.
        world: this process; by default the only one, on the configuration's device.
        resume: resume from the latest readable checkpoint in ``config.out``.
        accept_changes: resume although the configuration or the images have changed.
        progress: show progress on the console.
        evaluate: called on all ranks every ``config.evaluation.every`` iterations and at the end, to pick best.pt.
        observe: called on rank 0 with the trainer after samples are saved.

    Raises:
        CheckpointError: as :func:`sagan.train.resume.check_start`, and for other images.
        TrainingError: if losses or gradients are not finite.
    """
    world = world or World(0, 1, pick_device(config.device))
    settings, evaluate_every = config.output, config.evaluation.every
    with contextlib.ExitStack() as stack:
        if not resume or config.out.is_dir():
            world.run_on_main(lambda: stack.enter_context(_lock(config.out)))
        saved = check_start(config, resume=resume, accept_changes=accept_changes)
        check_images(saved, dataset.fingerprint(), accept_changes=accept_changes)

        trainer = Trainer(config, torch.unique(dataset.labels), world)
        alarm = CollapseAlarm(config.health)
        output = RunOutput(trainer, alarm, dataset)
        if saved is not None:
            output.restore(saved)
        if world.is_main:
            output.begin()

        throughput = Throughput(config, trainer.iteration)
        batches = throughput.timed(_batches(dataset, trainer))
        console = stack.enter_context(Console(config, trainer.iteration, enabled=progress and world.is_main))
        log = RunLog(config.out, trainer.iteration, tensorboard=settings.tensorboard, enabled=world.is_main)
        stack.enter_context(log)
        signals = stack.enter_context(_first_signal())

        if trainer.iteration == 0 and world.is_main:
            output.save_samples(observe)
        stop = Stop.NO
        while trainer.iteration < config.iterations and stop is Stop.NO:
            trainer.step(batches)
            console.advance()
            iteration = trainer.iteration
            last = iteration == config.iterations
            signs: list[str | None] = []  # of collapse

            # The check waits for the device: on a GPU it runs only when the log waits anyway.
            logs = last or iteration % settings.log_every == 0
            if logs or world.device.type == "cpu":
                trainer.check_finite()
            if logs:
                row = {"iteration": iteration, **trainer.measurements(), **throughput.rates(iteration)}
                check_losses_finite(row)
                signs.append(alarm.see_losses(row["d_loss"]))
                log.write(row)
                console.show_row(row)

            if world.is_main and (last or iteration % settings.sample_every == 0):
                signs.append(alarm.see_diversity(output.save_samples(observe)))

            if evaluate is not None and (last or (evaluate_every and iteration % evaluate_every == 0)):
                with throughput.paused():
                    score = evaluate(trainer)
                signs.append(alarm.see_score(score.value, score.of))
                log.write({"iteration": iteration, **score.figures})
                output.keep_best(score)
                console.show_figures(iteration, score.figures)

            stop = Stop.SIGNAL if signals else Stop.NO
            for sign in filter(None, signs if config.health.on_collapse != "off" else []):
                console.print(f"Iteration {iteration}: {sign}.")
                log.write({"iteration": iteration, "alarm": sign})
                if config.health.on_collapse == "stop":
                    stop = Stop.COLLAPSE

            # Ranks agree in every iteration, so that all stop after the same one and save it.
            stop = Stop(world.max_over_ranks(stop))
            saves = last or stop is not Stop.NO or iteration % settings.checkpoint_every == 0
            if saves or iteration % config.health.check_every == 0:
                check_agreement(world, trainer.networks)
            if saves:
                trainer.check_finite()
                output.save_checkpoint()

    assert output.checkpoint is not None
    return TrainingResult(
        out=config.out,
        checkpoint=output.checkpoint,
        iteration=trainer.iteration,
        interrupted=stop is Stop.SIGNAL and trainer.iteration < config.iterations,
        collapsed=stop is Stop.COLLAPSE,
        trainer=trainer,
    )


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Keep other trainings out of a folder."""
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".lock", f"another training run is using {out}"):
        yield


@contextlib.contextmanager
def _first_signal() -> Iterator[list[int]]:
    """Yield a list that gets the number of the first SIGINT or SIGTERM. A second one acts as usual."""
    received: list[int] = []
    handlers: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def receive(number: int, frame: object) -> None:
        received.append(number)
        restore()

    try:
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            handlers[number] = signal.signal(number, receive)
    except ValueError:  # not the main thread, which gets the signals
        handlers.clear()
    try:
        yield received
    finally:
        restore()


def _batches(dataset: ImageDataset, trainer: Trainer) -> Iterator[tuple[Tensor, Tensor]]:
    """Return parts of batches on the device, from the first that the run has not seen."""
    config, world = trainer.config, trainer.world
    loader = make_loader(
        dataset,
        batch_size=config.batch_size // config.accumulation,
        seed=config.seed,
        start_batch=trainer.batches_drawn,
        num_workers=0 if dataset.cached else config.images.workers,
        horizontal_flip=config.images.horizontal_flip,
        rank=world.rank,
        num_replicas=world.world_size,
        pin_memory=world.device.type == "cuda",
    )
    return prefetch_to_device(loader, world.device)
