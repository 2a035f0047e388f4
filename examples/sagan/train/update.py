"""One iteration of training: both networks, their optimizers, the average of G, and the updates."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sagan.distributed import World, running_statistics
from sagan.errors import UserError
from sagan.networks import Discriminator, Generator
from sagan.randomness import training_noise
from sagan.recipes import RunConfig
from sagan.train.health import FiniteGuard, check_finite
from sagan.train.losses import LOSSES, DiscriminatorLoss, GeneratorLoss, Result
from sagan.train.means import Means, Sums, average_over_ranks
from sagan.train.state import AdamState, TrainerState
from sagan_layers import (
    SpectralNormLayer,
    call_with_constant_parameters,
    frozen_spectral_norm,
    shared_spectral_norm,
    synchronize_batch_norm,
)

# DDP leaves buffers alone: SN's vectors follow from the weights, and running statistics are averaged below.
_KEEP_BUFFERS: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else {"broadcast_buffers": False}  # its name until torch 2.12
)
_WARM_UP_STEPS = 2
_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class DiscriminatorObjective(nn.Module):
    """D's loss as a module, which compiles as one graph. G is not a submodule, so DDP reduces only D's gradients."""

    def __init__(self, generator: nn.Module, discriminator: nn.Module, loss: DiscriminatorLoss) -> None:
        super().__init__()
        self.discriminator = discriminator
        self._generator = (generator,)  # a tuple hides it from nn.Module
        self._loss = loss

    def forward(
        self, real: Tensor, latents: Tensor, real_labels: Tensor | None, fake_labels: Tensor | None
    ) -> Result:
        """Generate a batch without a graph, and return the loss and its measurements."""
        with torch.no_grad():
            fake = self._generator[0](latents, fake_labels)
        return self._loss(self.discriminator, real, fake.to(real.dtype), real_labels, fake_labels)


class GeneratorObjective(nn.Module):
    """Computes G's loss; the counterpart of :class:`DiscriminatorObjective`. D's parameters get no gradient."""

    def __init__(self, generator: nn.Module, discriminator: nn.Module, loss: GeneratorLoss) -> None:
        super().__init__()
        self.generator = generator
        self._discriminator = (discriminator,)
        self._loss = loss

    def forward(self, latents: Tensor, labels: Tensor | None) -> Result:
        """Generate a batch, and return the loss and its measurements."""
        discriminator = partial(call_with_constant_parameters, self._discriminator[0])
        return self._loss(discriminator, self.generator(latents, labels), labels)


class Trainer:
    """Both networks, their optimizers, the average of G, and one iteration of training.

    Every process holds the same networks. A global batch is cut into ``accumulation`` parts, to save memory, and each
    part into one shard for each rank. Noise is drawn for the whole batch, so neither number changes it. Labels of
    generated images are drawn from ``labels_in_use``, the classes with images.
    """

    def __init__(self, config: RunConfig, labels_in_use: Tensor, world: World) -> None:
        pieces = world.world_size * config.accumulation
        if config.batch_size % pieces:
            raise UserError(
                f"batch_size: expected a multiple of {pieces} ({world.world_size} ranks, {config.accumulation} parts "
                f"each), got {config.batch_size}"
            )
        self.config = config
        self.world = world
        self.device = world.device
        self.iteration = 0
        self.batches_drawn = 0
        self._steps = 0  # in this process
        self.means = Means()
        self._means_by_rank: list[Sums] = []
        self.skipped = 0  # updates skipped since the last log
        self.guard = FiniteGuard(world)
        torch.manual_seed(config.seed)
        self.generator = Generator(config.network).to(world.device)
        self.discriminator = Discriminator(config.network).to(world.device)
        for network in (self.generator, self.discriminator):
            network.checkpoints_activations = config.step.checkpoint_activations
            if config.step.channels_last:
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.step.sync_batch_norm:
            synchronize_batch_norm(self.generator)
        self.average: AveragedModel | None = None
        if config.ema_decay:
            average = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(self.generator, multi_avg_fn=average)
        self.g_optimizer = _adam(self.generator, config.optimizer.g_lr, config)
        self.d_optimizer = _adam(self.discriminator, config.optimizer.d_lr, config)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16")
        self.labels_in_use = labels_in_use
        d_loss, g_loss = LOSSES[config.loss]
        self._d_objective = self._wrap(DiscriminatorObjective(self.generator, self.discriminator, d_loss))
        self._g_objective = self._wrap(GeneratorObjective(self.generator, self.discriminator, g_loss))

    @property
    def sampling_generator(self) -> nn.Module:
        """The average of G, or G itself without one."""
        return self.generator if self.average is None else self.average.module

    def step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Update D ``d_steps`` times and G once, without making the host wait for the device."""
        statistics = running_statistics(self.generator)
        restored = statistics if self.config.health.on_nonfinite == "skip" else []
        with self._no_recompiles(), self.guard.iteration(self.iteration, restored):
            # G's weights change at the end of the iteration only. So one power iteration and one normalisation of them
            # serve all its updates.
            with shared_spectral_norm(self.generator, dtype=self._autocast_dtype):
                for update in range(self.config.d_steps):
                    self.update_discriminator(batches, update)
                self.update_generator(update=self.config.d_steps)
            if not self.config.step.sync_batch_norm:
                self.world.average_(statistics)
        self.iteration += 1
        if self.average is not None:
            if self.iteration <= self.config.ema_start:
                self.average.n_averaged.zero_()  # makes the next update a copy
            self.average.update_parameters(self.generator)  # copies buffers, SN's vectors among them

    def update_discriminator(self, batches: Iterator[tuple[Tensor, Tensor]], update: int = 0) -> None:
        """Update D once, with the next batches; ``update`` numbers the iteration's updates."""
        self.d_optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        # All parts see the same normalised weights, so their gradients add up to those of the whole batch.
        with shared_spectral_norm(self.discriminator, dtype=self._autocast_dtype):
            for part in range(self.config.accumulation):
                pixels, labels = next(batches)
                self.batches_drawn += 1
                latents, fake_labels = self._noise(update, part)
                arguments = to_unit_range(pixels), latents, self._labels(labels), fake_labels
                losses.append(self._backward(self._d_objective, "d_loss", part, *arguments))
        self._apply(self.d_optimizer, self.discriminator, losses)

    def update_generator(self, update: int = 1) -> None:
        """Update G once."""
        self.g_optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        with self._constant_discriminator():
            for part in range(self.config.accumulation):
                losses.append(self._backward(self._g_objective, "g_loss", part, *self._noise(update, part)))
        self._apply(self.g_optimizer, self.generator, losses)

    def _backward(self, objective: nn.Module, name: str, part: int, *arguments: Tensor | None) -> Tensor:
        """Add a part's gradients to those of the parts before it; return its loss."""
        dtype = self._autocast_dtype
        # Synchronise gradients only with the last accumulated part.
        waits = isinstance(objective, DistributedDataParallel) and part + 1 < self.config.accumulation
        with (
            torch.autocast(self.device.type, dtype, enabled=dtype is not None),
            objective.no_sync() if waits else contextlib.nullcontext(),  # type: ignore[operator]
        ):
            loss, measurements = objective(*arguments)
            self.scaler.scale(loss / self.config.accumulation).backward()
        self.means.add({name: loss, **measurements})
        return cast(Tensor, loss.detach())

    @contextlib.contextmanager
    def _constant_discriminator(self) -> Iterator[None]:
        """Normalise D's weights once, as constants. Its vectors move only if the recipe says so."""
        frozen = frozen_spectral_norm(self.discriminator)
        with (
            contextlib.nullcontext() if self.config.d_vectors_move_in_g_step else frozen,
            shared_spectral_norm(self.discriminator, dtype=self._autocast_dtype),
        ):
            yield

    def _apply(self, optimizer: torch.optim.Adam, network: nn.Module, losses: list[Tensor]) -> None:
        loss = torch.stack(losses).sum()
        if self.scaler.is_enabled():  # checks the gradients itself, and expects some infinities
            self.guard.see(loss)
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            self.guard.step(optimizer, network, loss)

    def _no_recompiles(self) -> contextlib.AbstractContextManager[object]:
        """Once both objectives are compiled, having to compile again is an error."""
        self._steps += 1
        done = self.config.step.compile and self._steps > _WARM_UP_STEPS
        return torch.compiler.set_stance("fail_on_recompile") if done else contextlib.nullcontext()

    def _noise(self, update: int, part: int) -> tuple[Tensor, Tensor | None]:
        """Return this rank's latents and labels for a part of an update's generated batch."""
        config = self.config
        whole_batch = training_noise(
            config.seed,
            self.iteration,
            update,
            count=config.batch_size,
            latent_dim=config.network.latent_dim,
            labels_in_use=self.labels_in_use,
        )
        latents, labels = (self.world.shard(whole, part, config.accumulation) for whole in whole_batch)
        return self._to_device(latents), self._labels(labels)

    def _labels(self, labels: Tensor) -> Tensor | None:
        return self._to_device(labels) if self.config.network.head_classes else None

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda" and not tensor.is_cuda:
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _wrap(self, objective: nn.Module) -> nn.Module:
        """Compile an objective and average its gradients over the ranks, as the run requires."""
        if self.config.step.compile:
            objective.compile(fullgraph=True, dynamic=False)
        if self.world.world_size == 1:
            return objective
        return DistributedDataParallel(
            objective,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **_KEEP_BUFFERS,
        )

    @property
    def _autocast_dtype(self) -> torch.dtype | None:
        return _AUTOCAST_DTYPES.get(self.config.precision)

    def check_finite(self) -> None:
        """Count the updates skipped because of a NaN or an infinity, or stop the run. Waits for the device."""
        self.skipped += check_finite(self.guard, self.config.health, self.networks)

    def share_means(self) -> None:
        """Gather every rank's means since the last log for the checkpoint. All ranks call this before saving."""
        kinds: dict[str, Any] = {**self.means.state_dict()}
        numbers = {kind: {name: value.item() for name, value in each.items()} for kind, each in kinds.items()}
        self._means_by_rank = [json.loads(text) for text in self.world.gather_texts(json.dumps(numbers))]

    def state_dict(self) -> TrainerState:
        """Return everything that the rest of the run depends on, the same on every rank except "means"."""
        on_cuda = self.device.type == "cuda"
        return {
            "config": self.config.to_dict(),
            "iteration": self.iteration,
            "batches_drawn": self.batches_drawn,
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "g_optimizer": cast(AdamState, self.g_optimizer.state_dict()),
            "d_optimizer": cast(AdamState, self.d_optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if on_cuda else None,
            "means": self.means.state_dict(),
            "means_of_processes": self._means_by_rank,
            "guard": self.guard.state_dict(),
            "skipped": self.skipped,
            "labels_in_use": self.labels_in_use,
        }

    def load_state_dict(self, state: TrainerState) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        self.iteration = state["iteration"]
        before = state["config"]
        images_drawn = state["batches_drawn"] * (before["batch_size"] // before["accumulation"])
        # With another batch size too, the run resumes at the next image.
        self.batches_drawn = -(-images_drawn // (self.config.batch_size // self.config.accumulation))
        self.generator.load_state_dict(state["generator"])
        self.discriminator.load_state_dict(state["discriminator"])
        if self.average is not None and state["average"] is not None:
            self.average.load_state_dict(state["average"])
        elif self.average is not None:  # it starts here
            self.average.module.load_state_dict(state["generator"])
        for optimizer, saved in (
            (self.g_optimizer, state["g_optimizer"]),
            (self.d_optimizer, state["d_optimizer"]),
        ):
            # The learning rate and the like are this run's; only the moments are saved ones.
            optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["state"]})
        if state["scaler"]:  # of a run in fp16
            self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["torch_rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        means, by_rank = state["means"], state["means_of_processes"]
        if len(by_rank) == self.world.world_size:
            means = by_rank[self.world.rank]
        elif len(by_rank) > 1:
            means = average_over_ranks(by_rank)
        self.means.load_state_dict(means, self.device)
        self.guard.load_state_dict(state["guard"])
        self.skipped = state["skipped"]

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Both networks, and the average of G if there is one, by the names that messages use."""
        networks: dict[str, nn.Module] = {"G": self.generator, "D": self.discriminator}
        return networks if self.average is None else {**networks, "G's average": self.average.module}

    def measurements(self) -> dict[str, float]:
        """Return what to log: means since the last call, each mixer's gamma, each layer's sigma, GPU memory, skips."""
        found = self.world.mean_over_ranks(self.means.take())
        for short, network in (("g", self.generator), ("d", self.discriminator)):
            for resolution, mixer in network.mixers.items():
                if isinstance(mixer.gamma, Tensor):
                    found[f"gamma_{short}_{resolution}"] = mixer.gamma.item()
        with torch.no_grad():
            found |= {
                f"sigma_{short}.{name}": float(layer.sigma)
                for short, network in (("g", self.generator), ("d", self.discriminator))
                for name, layer in network.named_modules()
                if isinstance(layer, SpectralNormLayer)
            }
        if self.device.type == "cuda":
            found["gpu_memory_mib"] = torch.cuda.max_memory_allocated(self.device) / 2**20
        if self.skipped:
            found["skipped_updates"], self.skipped = self.skipped, 0
        return found


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 from 0 to 255 -> floating point from -1 to 1."""
    return pixels.to(torch.get_default_dtype()) / 127.5 - 1


def _adam(network: nn.Module, lr: float, config: RunConfig) -> torch.optim.Adam:
    betas = config.optimizer.beta1, config.optimizer.beta2
    # Fused: one pass over weights, gradients and moments; and the guard can skip a step without asking the host.
    return torch.optim.Adam(network.parameters(), lr, betas, config.optimizer.eps, fused=True)
