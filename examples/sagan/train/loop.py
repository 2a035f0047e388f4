"""The training loop, and what it writes."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sagan.data import ImageDataset, make_loader, prefetch_to_device
from sagan.distributed import World, check_agreement, pick_device
from sagan.errors import UserError
from sagan.io import locked
from sagan.recipes import RunConfig, config_from_dict, differences
from sagan.report.figures import default_points, draw_attention, save_grid
from sagan.sampling import generate, sample_inputs
from sagan.train.checkpoint import (
    BEST,
    CheckpointError,
    checkpoints_in,
    load_checkpoint,
    load_latest,
    save_best,
    save_checkpoint,
    set_aside_later,
)
from sagan.train.guard import CollapseAlarm, diversity, parameters_not_finite
from sagan.train.logs import METRICS, RunLog
from sagan.train.update import Trainer
from sagan_layers import SelfAttention2d

# What may change between the parts of one run: how long, where and how it is shown, not what is computed.
_MAY_CHANGE_ON_RESUME = (
    "data", "out", "iterations", "device", "images.workers", "images.cache_mib", "step.compile",
    "step.channels_last", "step.checkpoint_activations",
)  # fmt: skip
_MAY_CHANGE_GROUPS = ("output.", "images.check", "health.", "evaluation.")
_ATTENTION_IMAGES = 4
# Why the loop ends, the graver the larger.
_GOES_ON, _STOPPED, _COLLAPSED = range(3)


@dataclass(frozen=True)
class Score:
    """What an evaluation says of a run.

    Attributes:
        value: less is better.
        of: what it is; scores of different kinds are not compared.
        figures: what to log, by name.
    """

    value: float
    of: str
    figures: dict[str, float]


Evaluate = Callable[[Trainer], Score]
# A checkpoint to go on from, and its contents.
Found = tuple[Path, dict[str, Any]]


class TrainingError(UserError):
    """Training cannot go on, in plain words."""


@dataclass(frozen=True)
class TrainingResult:
    """What a finished or interrupted call of :func:`train` leaves.

    Attributes:
        out: the run's folder.
        checkpoint: the last one written.
        iteration: how many iterations the run has.
        interrupted: whether a signal stopped it before the end.
        collapsed: whether a sign of collapse ended it.
        trainer: the networks, in memory.
    """

    out: Path
    checkpoint: Path
    iteration: int
    interrupted: bool
    collapsed: bool
    trainer: Trainer


def train(
    config: RunConfig,
    dataset: ImageDataset,
    *,
    fingerprint: str,
    world: World | None = None,
    resume: bool = False,
    accept_changes: bool = False,
    progress: bool = True,
    evaluate: Evaluate | None = None,
    observe: Callable[[Trainer], None] | None = None,
) -> TrainingResult:
    """Train, or go on training, until ``config.iterations`` or a first SIGINT or SIGTERM.

    Writes to ``config.out``: config.json, metrics.jsonl, samples/, attention/, checkpoints/. A run that was
    interrupted and resumed is the same as one that was not, bit for bit on the CPU.

    Args:
        config: the whole run, ``network.num_classes`` set to the dataset's (or 0).
        dataset: the images.
        fingerprint: identifies the dataset's files; resuming with others is refused.
        world: this process among those that train together; by default alone on the configuration's device.
        resume: go on from the latest checkpoint of ``config.out`` that can be read.
        accept_changes: resume although the configuration or the images have changed.
        progress: show a progress bar on a terminal, and a line for each log elsewhere.
        evaluate: called in all processes every ``config.evaluation.every`` iterations, and at the end; the best
            checkpoint is kept.
        observe: called in the first process, with the trainer, whenever samples have been written.

    Raises:
        CheckpointError: if there is a run in the folder already and ``resume`` is False, if there is none to
            resume, or if it was made with another configuration or other data.
        TrainingError: if losses or gradients are not finite.
    """
    world = world or World(0, 1, pick_device(config.device))
    with contextlib.ExitStack() as held:
        if not resume or config.out.is_dir():
            world.run_on_main(lambda: _hold(config.out, held))
        found = check_start(config, resume=resume, accept_changes=accept_changes)
        check_images(found, fingerprint, accept_changes=accept_changes)
        return _train(config, dataset, found, fingerprint, world, progress, evaluate, observe)


def _hold(out: Path, held: contextlib.ExitStack) -> None:
    """Let no other training write into this folder."""
    out.mkdir(parents=True, exist_ok=True)
    held.enter_context(locked(out / ".lock", f"another training is at work in {out}"))


def _train(
    config: RunConfig,
    dataset: ImageDataset,
    found: Found | None,
    fingerprint: str,
    world: World,
    progress: bool,
    evaluate: Evaluate | None,
    observe: Callable[[Trainer], None] | None,
) -> TrainingResult:
    trainer = Trainer(config, torch.unique(dataset.labels), world)
    writer = _Writer(config, dataset, fingerprint, trainer)
    alarm = CollapseAlarm(config.health)
    if found is not None:
        path, state = found
        try:
            trainer.load_state_dict(state)
        except (RuntimeError, KeyError) as error:
            raise CheckpointError(
                f"{path} holds networks that are not of this configuration, which --accept-changes cannot change"
            ) from error
        alarm.load_state_dict(state["alarm"])
        writer.checkpoint = path
        writer.best_score, writer.best_score_of = state["best_score"], state["best_score_of"]
    if world.is_main:
        writer.begin()
    batches = make_loader(
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
    clock = _Clock(trainer.iteration)
    batches = clock.timed(prefetch_to_device(batches, world.device))
    output = config.output
    voice = _Voice(config, trainer.iteration, progress and world.is_main)
    log = RunLog(config.out, trainer.iteration, tensorboard=output.tensorboard) if world.is_main else None
    every = config.evaluation.every
    ended = _GOES_ON
    with voice, log or contextlib.nullcontext(), _first_signal() as received:
        if trainer.iteration == 0 and world.is_main:
            writer.write_samples(observe)
        while trainer.iteration < config.iterations and ended == _GOES_ON:
            trainer.step(batches)
            voice.advance()
            iteration = trainer.iteration
            last = iteration == config.iterations
            signs: list[str | None] = []
            if world.device.type == "cpu" or iteration % output.log_every == 0 or last:
                trainer.skipped += _refuse_not_finite(trainer)
            if iteration % output.log_every == 0 or last:
                row = {"iteration": iteration, **trainer.measurements(), **clock.rates(iteration, config)}
                _refuse_lost_losses(row)
                if trainer.skipped:
                    row["skipped_updates"], trainer.skipped = trainer.skipped, 0
                signs.append(alarm.see_losses(row["d_loss"]))
                if log is not None:
                    log.write(row)
                voice.tell(row)
            if (iteration % output.sample_every == 0 or last) and world.is_main:
                signs.append(alarm.see_diversity(writer.write_samples(observe)))
            if evaluate is not None and (last or (every and iteration % every == 0)):
                with clock.stopped():
                    score = evaluate(trainer)
                signs.append(alarm.see_score(score.value, score.of))
                if log is not None:
                    log.write({"iteration": iteration, **score.figures})
                trainer.share_means()
                if world.is_main:
                    writer.keep_best(score, alarm)
                voice.say(f"iteration {iteration:>7}  {_in_words(score.figures)}")
            for sign in filter(None, signs if config.health.on_collapse != "off" else []):
                voice.say(f"Iteration {iteration}: {sign}.")
                if log is not None:
                    log.write({"iteration": iteration, "alarm": sign})
                if config.health.on_collapse == "stop":
                    ended = _COLLAPSED
            # Asked once an iteration, so that all processes stop together and none without a checkpoint.
            ended = world.max_over_ranks(max(ended, _STOPPED if received else _GOES_ON))
            saves = iteration % output.checkpoint_every == 0 or last or ended != _GOES_ON
            if saves or iteration % config.health.check_every == 0:
                check_agreement(world, trainer.networks)
            if saves:
                trainer.skipped += _refuse_not_finite(trainer)
                trainer.share_means()
                if world.is_main:
                    writer.write_checkpoint(alarm)
                writer.checkpoint = Path(world.broadcast_from_main(str(writer.checkpoint)))
    assert writer.checkpoint is not None
    return TrainingResult(
        out=config.out,
        checkpoint=writer.checkpoint,
        iteration=trainer.iteration,
        interrupted=ended == _STOPPED and trainer.iteration < config.iterations,
        collapsed=ended == _COLLAPSED,
        trainer=trainer,
    )


def check_start(config: RunConfig, *, resume: bool, accept_changes: bool = False) -> Found | None:
    """Return the checkpoint to go on from and its contents, None for a new run; what needs no images is checked.

    Args:
        config: the whole run.
        resume: whether to go on with the run in its folder.
        accept_changes: whether the configuration may be another one.

    Raises:
        CheckpointError: if there is a run in the folder already and ``resume`` is False, or none to resume, or
            one that was made with another configuration.
    """
    if not resume:
        if checkpoints_in(config.out / "checkpoints"):
            raise CheckpointError(
                f"{config.out} holds a run already; go on with it by --resume, or choose another --out"
            )
        return None
    path, state = load_latest(config.out)
    refused = {
        name: values
        for name, values in differences(config_from_dict(state["config"]), config).items()
        if name not in _MAY_CHANGE_ON_RESUME and not name.startswith(_MAY_CHANGE_GROUPS)
    }
    if refused and not accept_changes:
        changes = "; ".join(f"{name} was {was!r}, now {now!r}" for name, (was, now) in refused.items())
        raise CheckpointError(
            f"{path} was made with another configuration: {changes}. To go on with the new one nevertheless: "
            "--accept-changes"
        )
    return path, state


def check_images(found: Found | None, fingerprint: str, *, accept_changes: bool = False) -> None:
    """Check that a checkpoint, if there is one to go on from, is of a run with these images.

    Raises:
        CheckpointError: if it is not, unless changes are accepted.
    """
    if found is not None and found[1]["fingerprint"] != fingerprint and not accept_changes:
        raise CheckpointError(f"the run of {found[0]} was made with other images than those found now")


def check_unused(out: Path) -> None:
    """Check that a folder without a checkpoint to go on from holds nothing of a run that has begun.

    Raises:
        CheckpointError: if it does.
    """
    metrics = out / METRICS
    if (out / "checkpoints" / BEST).exists() or (metrics.is_file() and metrics.stat().st_size):
        raise CheckpointError(
            f"{out} holds a run that ended before its first checkpoint; delete it, or choose another --out "
            "(--auto-resume starts it anew)"
        )


def save_config(config: RunConfig) -> Path:
    """Write the resolved configuration to config.json in the run's folder and return its path."""
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "config.json"
    path.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    return path


def _refuse_not_finite(trainer: Trainer) -> int:
    """Return how many updates were left out because of a NaN or an infinity; end the run unless it may do so.

    Raises:
        TrainingError: with what is known of the cause.
    """
    skipped = trainer.guard.skipped()
    health = trainer.config.health
    if skipped is None:
        return 0
    if health.on_nonfinite == "skip" and skipped.in_a_row <= health.most_skipped:
        return skipped.count
    if health.on_nonfinite == "skip":
        what = f"in {skipped.in_a_row} iterations in a row, the first {skipped.since + 1}"
        remedies = "; --health.most-skipped allows more"
    else:
        what = f"in {skipped.count} updates, the first in iteration {skipped.first_iteration + 1}"
        remedies = "; --health.on-nonfinite skip leaves such updates out and goes on"
    where = {name: parameters_not_finite(network) for name, network in trainer.networks.items()}
    named = "; ".join(
        f"{name}: {', '.join(names[:5])}{' and others' if len(names) > 5 else ''}"
        for name, names in where.items()
        if names
    )
    raise TrainingError(
        f"losses or gradients not finite {what}{f' ({named})' if named else ''}. No such update was applied, and "
        "the last checkpoint is from before. Lower learning rates or the precision fp32 are the usual remedies"
        f"{remedies}"
    )


def _refuse_lost_losses(row: dict[str, Any]) -> None:
    """End a run none of whose losses since the last log was finite: in fp16 the scaler leaves out all its updates.

    Raises:
        TrainingError: naming the losses.
    """
    lost = [name for name in ("d_loss", "g_loss") if not math.isfinite(row[name])]
    if lost:
        raise TrainingError(
            f"{' and '.join(lost)} not finite in any iteration since the last log, at iteration {row['iteration']}; "
            "the last checkpoint is from before"
        )


class _Writer:
    """What the first process of a run writes besides its log.

    Attributes:
        checkpoint: the last one written, or the one that the run goes on from.
        best_score: of the checkpoint kept as the best.
        best_score_of: what that is a score of.
    """

    def __init__(self, config: RunConfig, dataset: ImageDataset, fingerprint: str, trainer: Trainer) -> None:
        self._config = config
        self._class_names = list(dataset.class_names)
        self._fingerprint = fingerprint
        self._trainer = trainer
        self._latents, self._labels = _grid_inputs(config, trainer.labels_in_use)
        self._real_diversity = _real_diversity(dataset, self._labels)
        self.checkpoint: Path | None = None
        self.best_score: float | None = None
        self.best_score_of = ""

    def begin(self) -> None:
        """Write the configuration, and see to what an earlier part of the run has left behind it."""
        out, iteration = self._config.out, self._trainer.iteration
        save_config(self._config)
        if self.checkpoint is not None:
            set_aside_later(self.checkpoint)
        # As their rows of metrics; the run makes them again.
        for evaluation in sorted((out / "evaluation").glob("iteration_*.json")):
            number = evaluation.name.split("_")[1]
            if number.isdigit() and int(number) > iteration:
                dropped = evaluation.parent / "dropped" / evaluation.name
                dropped.parent.mkdir(exist_ok=True)
                evaluation.replace(dropped)

    def write_samples(self, observe: Callable[[Trainer], None] | None) -> float:
        """Write the grid and the attention maps; return how much samples differ, as a share of real images."""
        config, trainer = self._config, self._trainer
        columns = config.output.grid_columns
        images = generate(
            trainer.sampling_generator, self._latents, self._labels, batch_size=config.batch_size
        )
        conditional = bool(config.network.head_classes)
        names = [self._class_names[int(label)] for label in self._labels] if conditional else None
        file = f"iteration_{trainer.iteration:09d}.png"
        save_grid(
            config.out / "samples" / file, images, columns=columns, row_names=names and names[::columns]
        )
        self._write_attention(config.out / "attention" / file, names)
        if observe is not None:
            observe(trainer)
        return diversity(images, self._labels) / max(self._real_diversity, 1e-6)

    def _write_attention(self, path: Path, names: list[str] | None) -> None:
        generator = self._trainer.sampling_generator
        if not any(isinstance(layer, SelfAttention2d) for layer in generator.modules()):
            return
        chosen = torch.linspace(0, len(self._labels) - 1, min(_ATTENTION_IMAGES, len(self._labels))).long()
        draw_attention(
            path,
            generator,
            self._latents[chosen],
            self._labels[chosen],
            default_points(self._config.network.resolution),
            names=names and [names[int(index)] for index in chosen],
        )

    def write_checkpoint(self, alarm: CollapseAlarm) -> None:
        """Write a checkpoint of this iteration."""
        self.checkpoint = save_checkpoint(
            self._config.out / "checkpoints",
            self._contents(alarm),
            iteration=self._trainer.iteration,
            keep=self._config.output.keep_checkpoints,
        )

    def keep_best(self, score: Score, alarm: CollapseAlarm) -> None:
        """Write the best checkpoint anew if this score is better than its, or of another kind."""
        known = self.best_score if score.of == self.best_score_of else None
        if not math.isfinite(score.value) or (known is not None and score.value >= known):
            return
        self.best_score, self.best_score_of = score.value, score.of
        folder = self._config.out / "checkpoints"
        if not _holds_better(folder / BEST, score):
            save_best(folder, self._contents(alarm))

    def _contents(self, alarm: CollapseAlarm) -> dict[str, Any]:
        return {
            **self._trainer.state_dict(),
            "fingerprint": self._fingerprint,
            "class_names": self._class_names,
            "best_score": self.best_score,
            "best_score_of": self.best_score_of,
            "alarm": alarm.state_dict(),
        }


def _holds_better(best: Path, score: Score) -> bool:
    """Whether a best checkpoint is as good: of iterations that this part of the run has still before it."""
    if not best.is_file():
        return False
    try:
        state = load_checkpoint(best)
    except CheckpointError:
        return False
    known: float | None = state["best_score"]
    return known is not None and state["best_score_of"] == score.of and known <= score.value


def _grid_inputs(config: RunConfig, labels_in_use: Tensor) -> tuple[Tensor, Tensor]:
    """Return the latents and labels of the grid: the same for a whole run, a class for each row."""
    rows = config.output.grid_rows
    if config.network.head_classes:
        rows = min(rows, len(labels_in_use))
    places = torch.linspace(0, len(labels_in_use) - 1, rows).round().long()
    labels = labels_in_use[places].repeat_interleave(config.output.grid_columns)
    latents, _ = sample_inputs(range(len(labels)), config.network, config.seed)
    return latents, labels


def _real_diversity(dataset: ImageDataset, labels: Tensor) -> float:
    """Return how much the real images of the grid's classes differ, as many of each class as the grid has."""
    chosen = []
    for label in torch.unique(labels):
        of_class = (dataset.labels == label).nonzero().flatten()
        chosen.append(of_class[: max(2, int((labels == label).sum()))])
    return diversity(*dataset.fetch(torch.cat(chosen).tolist()))


class _Voice:
    """Tells a person how the run goes: a progress bar on a terminal, a line for each log elsewhere."""

    def __init__(self, config: RunConfig, iteration: int, speaks: bool) -> None:
        self._speaks = speaks
        self._bar = tqdm(
            total=config.iterations,
            initial=iteration,
            unit="it",
            disable=None if speaks else True,  # None: on a terminal only
            dynamic_ncols=True,
        )

    def __enter__(self) -> None:
        self._bar.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def advance(self) -> None:
        """Count an iteration."""
        self._bar.update()

    def tell(self, row: dict[str, Any]) -> None:
        """Tell what was logged."""
        gammas = "  ".join(f"{name} {value:+.3f}" for name, value in row.items() if name.startswith("gamma"))
        text = f"D {row['d_loss']:.3f}  G {row['g_loss']:+.3f}  {gammas}  {row['images_per_s']:.0f} img/s"
        self._bar.set_postfix_str(text)
        if self._bar.disable:
            self.say(f"iteration {row['iteration']:>7}  {text}  {_duration(row['seconds_left'])} left")

    def say(self, text: str) -> None:
        """Print a line."""
        if self._speaks:
            self._bar.write(text) if not self._bar.disable else print(text, flush=True)


def _in_words(figures: dict[str, float]) -> str:
    return "  ".join(f"{name.removeprefix('evaluation/')} {value:.5g}" for name, value in figures.items())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


@contextlib.contextmanager
def _first_signal() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM in a list; a second one acts as usual."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: object) -> None:
        received.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    try:
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: signals go elsewhere
        before.clear()
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Clock:
    """Rates since the last log."""

    def __init__(self, iteration: int) -> None:
        self._iteration = iteration
        self._start = time.perf_counter()
        self._waiting = 0.0

    def timed(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield from ``batches``, and measure the time they take."""
        while True:
            start = time.perf_counter()
            batch = next(batches)
            self._waiting += time.perf_counter() - start
            yield batch

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Leave out the time that a ``with`` block takes."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def rates(self, iteration: int, config: RunConfig) -> dict[str, float]:
        """Return images/s, the share of time spent waiting for data, and the seconds to the end."""
        now = time.perf_counter()
        seconds = max(now - self._start, 1e-9)
        done = iteration - self._iteration
        rates = {
            "images_per_s": done * config.batch_size / seconds,
            "data_wait_share": self._waiting / seconds,
            "seconds_left": (config.iterations - iteration) * seconds / max(done, 1),
        }
        self._iteration, self._start, self._waiting = iteration, now, 0.0
        return rates
