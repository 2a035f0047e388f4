"""The training loop."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import torch
from torch import Tensor

from sagan.data import ImageDataset, make_loader, prefetch_to_device
from sagan.distributed import World, check_agreement, pick_device
from sagan.errors import UserError
from sagan.recipes import RunConfig
from sagan.signals import StopRequestedError, stop_requests
from sagan.train.health import CollapseAlarm, TrainingError
from sagan.train.loggers import Logger, open_loggers
from sagan.train.logs import Console, RunLog, Throughput
from sagan.train.output import RunOutput, Score
from sagan.train.resume import check_images, check_start, images_of, run_lock
from sagan.train.update import Trainer

Evaluate = Callable[[Trainer], Score]


class Stop(IntEnum):
    """Why a run stops early. When ranks differ, the largest counts."""

    NO = 0
    SIGNAL = 1
    COLLAPSE = 2
    FAILURE = 3  # the next images could not be read


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
    """Train, or resume training, until ``config.iterations``, a signal (see :mod:`sagan.signals`) or a failure.

    On the CPU a run that was interrupted and resumed equals one that was not, bit for bit.

    Between two iterations, all ranks agree whether to stop. Each has then drawn the images of the next iteration, or
    has a reason to stop: a signal, a sign of collapse, or an exception of the iterator over batches, whatever its type.
    So all ranks stop after the same iteration and save it; then the exception goes on, on the rank that had it. An
    iterator that has to wait raises :class:`sagan.signals.StopRequestedError` once ``stop_requested()``.

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
        TrainingError: if losses or gradients are not finite, or images could not be read; a checkpoint is saved then.
        ReportedElsewhereError: if another rank could not read its images.
    """
    world = world or World(0, 1, pick_device(config.device))
    settings, evaluate_every = config.output, config.evaluation.every
    with contextlib.ExitStack() as stack:
        world.run_on_main(lambda: stack.enter_context(run_lock(config.out, resume=resume)))
        saved = check_start(config, resume=resume, accept_changes=accept_changes)
        check_images(images_of(saved), dataset.fingerprint(), accept_changes=accept_changes)

        trainer = Trainer(config, torch.unique(dataset.labels), world)
        alarm = CollapseAlarm(config.health)
        output = RunOutput(trainer, alarm, dataset)
        if saved is not None:
            output.restore(saved)
        del saved  # its weights: the trainer has copies
        if world.is_main:
            output.begin()

        throughput = Throughput(config, trainer.iteration)
        batches = throughput.timed(_batches(dataset, trainer))
        console = stack.enter_context(Console(config, trainer.iteration, enabled=progress and world.is_main))
        loggers: list[Logger] = []
        world.run_on_main(lambda: loggers.extend(open_loggers(config, trainer.iteration)))
        log = RunLog(config.out, trainer.iteration, loggers, enabled=world.is_main)
        stack.enter_context(log)
        signals = stack.enter_context(stop_requests(lambda: f"all after {output.checkpoint or 'the start'}"))

        if trainer.iteration == 0 and world.is_main:
            output.save_samples(observe, log)
        stop, start = Stop.NO, trainer.iteration
        per_iteration = config.d_steps * config.accumulation
        while True:
            iteration = trainer.iteration
            last = iteration >= config.iterations
            drawn, failure = ([], None) if last or signals else _draw(batches, per_iteration)
            if failure is not None:
                stop = Stop.FAILURE
            elif signals:
                stop = max(stop, Stop.SIGNAL)
            # Ranks agree in every iteration, so that all stop after the same one and save it.
            stop = Stop(world.max_over_ranks(stop))
            is_new = iteration > start or (iteration == 0 and stop is Stop.SIGNAL)
            saves = is_new and (last or stop is not Stop.NO or iteration % settings.checkpoint_every == 0)
            if saves or (is_new and iteration % config.health.check_every == 0):
                check_agreement(world, trainer.networks)
            if saves:
                trainer.check_finite()
                output.save_checkpoint()
            if last or stop is not Stop.NO:
                break

            trainer.step(iter(drawn))
            drawn.clear()  # shared memory for those that follow
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
                signs.append(alarm.see_losses(row["d_loss"]))
                log.write(row)
                console.show_row(row)

            samples_due = world.is_main and (last or iteration % settings.sample_every == 0)
            if samples_due and (found := output.save_samples(observe, log)) is not None:
                signs.append(alarm.see_diversity(found))

            if evaluate is not None and (last or (evaluate_every and iteration % evaluate_every == 0)):
                with throughput.paused():
                    score = output.evaluated(evaluate)
                if score is not None:
                    signs.append(alarm.see_score(score.value, score.of))
                    log.write({"iteration": iteration, **score.figures})
                    output.keep_best(score)
                    console.show_figures(iteration, score.figures)

            for sign in filter(None, signs if config.health.on_collapse != "off" else []):
                console.print(f"Iteration {iteration}: {sign}.")
                log.write({"iteration": iteration, "alarm": sign})
                if config.health.on_collapse == "stop":
                    stop = Stop.COLLAPSE

    if stop is Stop.FAILURE:
        if isinstance(failure, (UserError, OSError)):
            hint = f"\nSaved {output.checkpoint}; --resume continues from it." if output.checkpoint else ""
            failure = TrainingError(f"{failure}{hint}")
        world.raise_together(failure)
    assert output.checkpoint is not None
    return TrainingResult(
        out=config.out,
        checkpoint=output.checkpoint,
        iteration=trainer.iteration,
        interrupted=stop is Stop.SIGNAL and trainer.iteration < config.iterations,
        collapsed=stop is Stop.COLLAPSE,
        trainer=trainer,
    )


def _draw(
    batches: Iterator[tuple[Tensor, Tensor]], count: int
) -> tuple[list[tuple[Tensor, Tensor]], Exception | None]:
    """Return the next batches, or why there are none; neither if a signal has asked training to stop."""
    try:
        return list(itertools.islice(batches, count)), None
    except StopRequestedError:
        return [], None
    except Exception as error:
        return [], error


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
