"""The training loop."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from sagan.checkpoints import (
    CheckpointError,
    checkpoints_in,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from sagan.data import ImageDataset, make_loader
from sagan.errors import UserError
from sagan.figures import save_grid
from sagan.networks import Discriminator, Generator
from sagan.recipes import RunConfig, config_from_dict, differences
from sagan.sampling import generate, sample_inputs
from sagan_layers import (
    frozen_spectral_norm,
    hinge_discriminator_loss,
    hinge_generator_loss,
    softplus_discriminator_loss,
    softplus_generator_loss,
)

_LOSSES = {
    "hinge": (hinge_discriminator_loss, hinge_generator_loss),
    "softplus": (softplus_discriminator_loss, softplus_generator_loss),
}
# What may change between the parts of one run: how long, where and how it is shown, not what is computed.
_MAY_CHANGE_ON_RESUME = ("data", "out", "iterations", "device", "images.workers", "images.cache_mib")
_MAY_CHANGE_GROUPS = ("output.", "images.check")


class TrainingError(UserError):
    """Training cannot go on, in plain words."""


@dataclass
class Means:
    """Running sums of an iteration's scalars, left on the device until they are logged."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, **scalars: Tensor) -> None:
        """Add one value of each."""
        for name, value in scalars.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def now(self) -> dict[str, float]:
        """Return the means so far."""
        return {name: float(total) / self.counts[name] for name, total in self.sums.items()}

    def take(self) -> dict[str, float]:
        """Return the means, and start anew."""
        means = self.now()
        self.sums, self.counts = {}, {}
        return means


class Trainer:
    """Both networks, their optimizers, the average of G, and the randomness of a run.

    Args:
        config: the whole run, ``network.num_classes`` set.
        labels_in_use: classes that have images; the generated batches' labels are drawn from them.
        device: where the networks are.
    """

    def __init__(self, config: RunConfig, labels_in_use: Tensor, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.iteration = 0
        self.batches_drawn = 0
        self.means = Means()
        torch.manual_seed(config.seed)
        self.generator = Generator(config.network).to(device)
        self.discriminator = Discriminator(config.network).to(device)
        for network in (self.generator, self.discriminator):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average: AveragedModel | None = None
        if config.ema_decay:
            average = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(self.generator, multi_avg_fn=average)
        settings = config.optimizer
        betas = (settings.beta1, settings.beta2)
        self.g_optimizer = torch.optim.Adam(self.generator.parameters(), settings.g_lr, betas, settings.eps)
        self.d_optimizer = torch.optim.Adam(
            self.discriminator.parameters(), settings.d_lr, betas, settings.eps
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.noise = torch.Generator().manual_seed(config.seed + 1)  # apart from the weights' stream
        self.labels_in_use = labels_in_use

    @property
    def sampling_generator(self) -> nn.Module:
        """G with the averaged weights, or as it is without an average."""
        return self.generator if self.average is None else self.average.module

    def step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Update D ``d_steps`` times and G once."""
        for _ in range(self.config.d_steps):
            self._update_discriminator(batches)
        self._update_generator()
        self.iteration += 1
        if self.average is not None:
            if self.iteration <= self.config.ema_start:
                self.average.n_averaged.zero_()  # a first update is a copy
            self.average.update_parameters(self.generator)  # buffers, SN's vectors among them, are copied

    def _update_discriminator(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        loss_of_d, _ = _LOSSES[self.config.loss]
        self.d_optimizer.zero_grad(set_to_none=True)
        for part in range(self.config.accumulation):
            pixels, labels = next(batches)
            self.batches_drawn += 1
            real = _to_unit_range(pixels.to(self.device, non_blocking=True))
            real_labels = labels.to(self.device, non_blocking=True)
            with (
                self._autocast(),
                _vectors_move_once(self.generator, part),
                _vectors_move_once(self.discriminator, part),
            ):
                latents, fake_labels = self._draw(len(real))
                with torch.no_grad():
                    fake = self.generator(latents, fake_labels)
                logits = self.discriminator(
                    torch.cat([real, fake.to(real.dtype)]),
                    torch.cat([real_labels, fake_labels]) if fake_labels is not None else None,
                )
                real_logits, fake_logits = logits.chunk(2)
                loss = loss_of_d(real_logits=real_logits, fake_logits=fake_logits)
            self.scaler.scale(loss / self.config.accumulation).backward()  # type: ignore[no-untyped-call]
            self.means.add(
                d_loss=loss, real_logits=real_logits.float().mean(), fake_logits=fake_logits.float().mean()
            )
        self.scaler.step(self.d_optimizer)
        self.scaler.update()

    def _update_generator(self) -> None:
        _, loss_of_g = _LOSSES[self.config.loss]
        self.g_optimizer.zero_grad(set_to_none=True)
        for part in range(self.config.accumulation):
            with (
                self._autocast(),
                _without_weight_gradients(self.discriminator),
                _vectors_move_once(self.generator, part),
                _vectors_move_once(self.discriminator, part)
                if self.config.d_vectors_move_in_g_step
                else frozen_spectral_norm(self.discriminator),
            ):
                latents, labels = self._draw(self.config.batch_size // self.config.accumulation)
                loss = loss_of_g(fake_logits=self.discriminator(self.generator(latents, labels), labels))
            self.scaler.scale(loss / self.config.accumulation).backward()  # type: ignore[no-untyped-call]
            self.means.add(g_loss=loss)
        self.scaler.step(self.g_optimizer)
        self.scaler.update()

    def _draw(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Draw latents and labels for generated images; on the CPU, so that devices do not change them."""
        latents = torch.randn(count, self.config.network.latent_dim, generator=self.noise)
        chosen = torch.randint(len(self.labels_in_use), (count,), generator=self.noise)
        labels = self._class_labels(self.labels_in_use[chosen])
        return latents.to(self.device, non_blocking=True), labels

    def _class_labels(self, labels: Tensor) -> Tensor | None:
        return labels.to(self.device, non_blocking=True) if self.config.network.head_classes else None

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.config.precision)
        return torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on."""
        return {
            "config": self.config.to_dict(),
            "iteration": self.iteration,
            "batches_drawn": self.batches_drawn,
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "g_optimizer": self.g_optimizer.state_dict(),
            "d_optimizer": self.d_optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "noise": self.noise.get_state(),
            "torch_rng": torch.get_rng_state(),
            "means": {"sums": self.means.sums, "counts": self.means.counts},
            "labels_in_use": self.labels_in_use,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state that :meth:`state_dict` returned."""
        self.iteration = state["iteration"]
        self.batches_drawn = state["batches_drawn"]
        self.generator.load_state_dict(state["generator"])
        self.discriminator.load_state_dict(state["discriminator"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.g_optimizer.load_state_dict(state["g_optimizer"])
        self.d_optimizer.load_state_dict(state["d_optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.noise.set_state(state["noise"])
        torch.set_rng_state(state["torch_rng"])
        sums = {name: total.to(self.device) for name, total in state["means"]["sums"].items()}
        self.means = Means(sums, dict(state["means"]["counts"]))

    def gammas(self) -> dict[str, float]:
        """Return gamma of every attention (or residual) block, as "gamma_g_32"."""
        return {
            f"gamma_{short}_{resolution}": mixer.gamma.item()
            for short, network in (("g", self.generator), ("d", self.discriminator))
            for resolution, mixer in network.mixers.items()
            if isinstance(mixer.gamma, Tensor)
        }


@dataclass(frozen=True)
class TrainingResult:
    """What a finished or interrupted call of :func:`train` leaves.

    Attributes:
        out: the run's folder.
        checkpoint: the last one written.
        iteration: how many iterations the run has.
        interrupted: whether a signal stopped it before the end.
        trainer: the networks, in memory.
    """

    out: Path
    checkpoint: Path
    iteration: int
    interrupted: bool
    trainer: Trainer


def train(
    config: RunConfig,
    dataset: ImageDataset,
    *,
    fingerprint: str,
    resume: bool = False,
    progress: bool = True,
    observe: Callable[[Trainer], None] | None = None,
) -> TrainingResult:
    """Train, or go on training, until ``config.iterations`` or a first SIGINT or SIGTERM.

    Writes to ``config.out``: config.json, metrics.jsonl, samples/, checkpoints/. A run that was interrupted and
    resumed is the same as one that was not, bit for bit on the CPU.

    Args:
        config: the whole run, ``network.num_classes`` set to the dataset's (or 0).
        dataset: the images.
        fingerprint: identifies the dataset's files; resuming with others is refused.
        resume: go on from the latest checkpoint of ``config.out``.
        progress: show a progress bar on a terminal, and a line for each log elsewhere.
        observe: called with the trainer whenever a grid of samples has been written.

    Raises:
        CheckpointError: if there is a run in the folder already and ``resume`` is False, if there is none to
            resume, or if it was made with another configuration or other data.
        TrainingError: if a loss is not finite.
    """
    device = pick_device(config.device)
    state = check_start(config, resume=resume)
    labels_in_use = torch.unique(dataset.labels)
    trainer = Trainer(config, labels_in_use, device)
    checkpoints = config.out / "checkpoints"
    if state is not None:
        if state["fingerprint"] != fingerprint:
            raise CheckpointError(f"the run in {config.out} was made with other images than those found now")
        trainer.load_state_dict(state)
    config.out.mkdir(parents=True, exist_ok=True)
    save_config(config)
    metrics_path = config.out / "metrics.jsonl"
    _drop_metrics_after(metrics_path, trainer.iteration)
    batches = make_loader(
        dataset,
        batch_size=config.batch_size // config.accumulation,
        seed=config.seed,
        start_batch=trainer.batches_drawn,
        num_workers=0 if dataset.cached else config.images.workers,
        horizontal_flip=config.images.horizontal_flip,
        pin_memory=device.type == "cuda",
    )
    latents, labels = _grid_inputs(config, labels_in_use)
    output = config.output

    def write_samples() -> None:
        images = generate(trainer.sampling_generator, latents, labels, batch_size=config.batch_size)
        names = None
        if config.network.head_classes:
            names = [dataset.class_names[int(label)] for label in labels[:: output.grid_columns]]
        path = config.out / "samples" / f"iteration_{trainer.iteration:09d}.png"
        save_grid(path, images, columns=output.grid_columns, row_names=names)
        if observe is not None:
            observe(trainer)

    def write_checkpoint() -> Path:
        contents = {
            **trainer.state_dict(),
            "fingerprint": fingerprint,
            "class_names": list(dataset.class_names),
        }
        return save_checkpoint(
            checkpoints, contents, iteration=trainer.iteration, keep=output.keep_checkpoints
        )

    clock = _Clock(trainer.iteration)
    timed_batches = clock.timed(batches)
    bar = tqdm(
        total=config.iterations,
        initial=trainer.iteration,
        unit="it",
        disable=None if progress else True,  # None: on a terminal only
        dynamic_ncols=True,
    )
    checkpoint = find_checkpoint(checkpoints) if resume else None
    with bar, _first_signal() as stop, metrics_path.open("a") as metrics:
        if trainer.iteration == 0:
            write_samples()
        stopping = False
        while trainer.iteration < config.iterations and not stopping:
            trainer.step(timed_batches)
            bar.update()
            last = trainer.iteration == config.iterations
            if trainer.iteration % output.log_every == 0 or last:
                row = {
                    "iteration": trainer.iteration,
                    **trainer.means.take(),
                    **trainer.gammas(),
                    **clock.rates(trainer.iteration, config),
                }
                _write_metrics(metrics, row, bar, progress)
                _check_finite(trainer.iteration, row)
            if trainer.iteration % output.sample_every == 0 or last:
                write_samples()
            stopping = bool(stop)  # read once, so that the loop never ends without a checkpoint
            if trainer.iteration % output.checkpoint_every == 0 or last or stopping:
                _check_finite(trainer.iteration, trainer.means.now())
                checkpoint = write_checkpoint()
    assert checkpoint is not None
    return TrainingResult(
        out=config.out,
        checkpoint=checkpoint,
        iteration=trainer.iteration,
        interrupted=trainer.iteration < config.iterations,
        trainer=trainer,
    )


def check_start(config: RunConfig, *, resume: bool) -> dict[str, Any] | None:
    """Return the checkpoint to go on from, None for a new run; what needs no images is checked.

    Args:
        config: the whole run.
        resume: whether to go on with the run in its folder.

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
    path = find_checkpoint(config.out)
    state = load_checkpoint(path)
    refused = {
        name: values
        for name, values in differences(config_from_dict(state["config"]), config).items()
        if name not in _MAY_CHANGE_ON_RESUME and not name.startswith(_MAY_CHANGE_GROUPS)
    }
    if refused:
        changes = "; ".join(f"{name} was {was!r}, now {now!r}" for name, (was, now) in refused.items())
        raise CheckpointError(f"{path} was made with another configuration: {changes}")
    return state


def pick_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is the first GPU, or the CPU without one.

    Raises:
        UserError: if there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device: expected auto, cpu or cuda[:index], got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: expected a CUDA device for {name!r}, found none")
    return device


def save_config(config: RunConfig) -> Path:
    """Write the resolved configuration to config.json in the run's folder and return its path."""
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "config.json"
    path.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    return path


def _vectors_move_once(network: nn.Module, part: int) -> contextlib.AbstractContextManager[None]:
    """Let spectral normalisation move in the first part of a batch; the others take the same weights."""
    return frozen_spectral_norm(network, iterate=False) if part > 0 else contextlib.nullcontext()


@contextlib.contextmanager
def _without_weight_gradients(network: nn.Module) -> Iterator[None]:
    """Keep autograd from computing gradients of the weights of ``network``, which would be thrown away."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 from 0 to 255 -> float32 from -1 to 1."""
    return pixels.float() / 127.5 - 1


def _grid_inputs(config: RunConfig, labels_in_use: Tensor) -> tuple[Tensor, Tensor]:
    """Return the latents and labels of the grid: the same for a whole run, a class for each row."""
    rows = config.output.grid_rows
    if config.network.head_classes:
        rows = min(rows, len(labels_in_use))
    places = torch.linspace(0, len(labels_in_use) - 1, rows).round().long()
    labels = labels_in_use[places].repeat_interleave(config.output.grid_columns)
    latents, _ = sample_inputs(range(len(labels)), config.network, config.seed)
    return latents, labels


def _write_metrics(file: Any, row: dict[str, Any], bar: Any, progress: bool) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()
    gammas = "  ".join(f"{name} {value:+.3f}" for name, value in row.items() if name.startswith("gamma"))
    text = f"D {row['d_loss']:.3f}  G {row['g_loss']:+.3f}  {gammas}  {row['images_per_s']:.0f} img/s"
    bar.set_postfix_str(text)
    if progress and bar.disable:
        left = _duration(row["seconds_left"])
        print(f"iteration {row['iteration']:>7}  {text}  {left} left", flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _check_finite(iteration: int, means: dict[str, Any]) -> None:
    wrong = [name for name in ("d_loss", "g_loss") if not math.isfinite(means.get(name, 0.0))]
    if wrong:
        raise TrainingError(
            f"{' and '.join(wrong)} not finite at iteration {iteration}; the last checkpoint is from before. "
            "Lower learning rates or fp32 are the usual remedies"
        )


def _drop_metrics_after(path: Path, iteration: int) -> None:
    """Remove the lines that a resumed run will write again."""
    if path.exists():
        rows = [line for line in path.read_text().splitlines() if _iteration_of(line) <= iteration]
        path.write_text("".join(line + "\n" for line in rows))


def _iteration_of(line: str) -> float:
    """Return the iteration of a line of metrics; of one that a crash has torn, infinity."""
    try:
        return float(json.loads(line)["iteration"])
    except json.JSONDecodeError:
        return math.inf


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
