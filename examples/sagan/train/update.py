"""One iteration of training: both networks, their optimizers, the average of G, and the updates."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sagan.distributed import World, running_statistics
from sagan.errors import UserError
from sagan.networks import Discriminator, Generator
from sagan.randomness import training_noise
from sagan.recipes import RunConfig
from sagan.train.guard import FiniteGuard
from sagan_layers import (
    DiscriminatorPass,
    GeneratorPass,
    SpectralNormLayer,
    frozen_spectral_norm,
    hinge_discriminator_loss,
    hinge_generator_loss,
    shared_spectral_norm,
    softplus_discriminator_loss,
    softplus_generator_loss,
    synchronize_batch_norm,
)

_LOSSES = {
    "hinge": (hinge_discriminator_loss, hinge_generator_loss),
    "softplus": (softplus_discriminator_loss, softplus_generator_loss),
}
# Vectors follow from the weights, and running statistics are averaged here.
_LEAVING_BUFFERS: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else {"broadcast_buffers": False}  # its name until torch 2.12
)
_WARM_UP_STEPS = 2
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Means:
    """Running sums of scalars, left on the device until they are logged; what is not finite is left out."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, **scalars: Tensor) -> None:
        """Add one value of each."""
        for name, value in scalars.items():
            value = value.detach().double()
            finite = value.isfinite()
            value = torch.where(finite, value, 0.0)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts[name] + finite if name in self.counts else finite.long()

    def now(self) -> dict[str, float]:
        """Return the means so far."""
        return {name: float(total / self.counts[name]) for name, total in self.sums.items()}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the sums and counts."""
        return {"sums": self.sums, "counts": self.counts}

    def load_state_dict(self, state: dict[str, dict[str, Any]], device: torch.device) -> None:
        """Take up sums and counts, tensors or numbers."""
        self.sums, self.counts = (
            {name: torch.as_tensor(value, dtype=dtype, device=device) for name, value in state[kind].items()}
            for kind, dtype in (("sums", torch.float64), ("counts", torch.int64))
        )

    def take(self) -> dict[str, float]:
        """Return the means, and start anew."""
        means = self.now()
        self.sums, self.counts = {}, {}
        return means


class Trainer:
    """Both networks, their optimizers, the average of G, and what an iteration does with them.

    Every process holds the same networks. A global batch is cut into ``accumulation`` parts and each part into
    a share for each process; noise is drawn for the whole batch, so that their number changes nothing.

    Args:
        config: the whole run, ``network.num_classes`` set.
        labels_in_use: classes that have images; the generated batches' labels are drawn from them.
        world: this process, and the device of the networks.
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
        self.skipped = 0  # updates left out since the last log
        self._means_of_processes: list[dict[str, dict[str, float]]] = []
        self.guard = FiniteGuard(world.device)
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
        loss_of_d, loss_of_g = _LOSSES[config.loss]
        self._d_pass = self._prepared(DiscriminatorPass(self.generator, self.discriminator, loss_of_d))
        self._g_pass = self._prepared(GeneratorPass(self.generator, self.discriminator, loss_of_g))

    @property
    def sampling_generator(self) -> nn.Module:
        """G with the averaged weights, or as it is without an average."""
        return self.generator if self.average is None else self.average.module

    def step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Update D ``d_steps`` times and G once; nothing in it makes the host wait for the device."""
        moving = running_statistics(self.generator)
        with (
            self._compiled(),
            self.guard.iteration(self.iteration, moving if self.config.health.on_nonfinite == "skip" else ()),
        ):
            # One move of G's vectors and one normalisation of its weights serve the whole iteration.
            with shared_spectral_norm(self.generator, dtype=self._compute_dtype):
                for update in range(self.config.d_steps):
                    self._update_discriminator(batches, update)
                self._update_generator(update=self.config.d_steps)
            if not self.config.step.sync_batch_norm:
                self.world.average_(moving)
        self.iteration += 1
        if self.average is not None:
            if self.iteration <= self.config.ema_start:
                self.average.n_averaged.zero_()  # a first update is a copy
            self.average.update_parameters(self.generator)  # buffers, SN's vectors among them, are copied

    def _update_discriminator(self, batches: Iterator[tuple[Tensor, Tensor]], update: int = 0) -> None:
        self.d_optimizer.zero_grad(set_to_none=True)
        parts = self.config.accumulation
        losses: list[Tensor] = []
        with shared_spectral_norm(self.discriminator, dtype=self._compute_dtype):
            for part in range(parts):
                pixels, labels = next(batches)
                self.batches_drawn += 1
                real = to_unit_range(pixels)
                latents, fake_labels = self._noise(update, part)
                with self._autocast(), self._reducing_last(self._d_pass, part):
                    result = self._d_pass(real, latents, self._labels(labels), fake_labels)
                    self.scaler.scale(result.loss / parts).backward()
                losses.append(result.loss.detach())
                self.means.add(
                    d_loss=result.loss,
                    real_logits=result.real_logits.float().mean(),
                    fake_logits=result.fake_logits.float().mean(),
                )
        self._apply(self.d_optimizer, self.discriminator, losses)

    def _update_generator(self, update: int = 1) -> None:
        self.g_optimizer.zero_grad(set_to_none=True)
        parts = self.config.accumulation
        losses: list[Tensor] = []
        with self._constant_discriminator():
            for part in range(parts):
                latents, labels = self._noise(update, part)
                with self._autocast(), self._reducing_last(self._g_pass, part):
                    result = self._g_pass(latents, labels)
                    self.scaler.scale(result.loss / parts).backward()
                losses.append(result.loss.detach())
                self.means.add(g_loss=result.loss)
        self._apply(self.g_optimizer, self.generator, losses)

    @contextlib.contextmanager
    def _constant_discriminator(self) -> Iterator[None]:
        """Normalise D's weights once, as constants; its vectors move only where the recipe says so."""
        frozen = frozen_spectral_norm(self.discriminator)
        with contextlib.nullcontext() if self.config.d_vectors_move_in_g_step else frozen:
            with torch.no_grad():
                shared = shared_spectral_norm(self.discriminator, dtype=self._compute_dtype)
                shared.__enter__()
            with contextlib.ExitStack() as stack:
                stack.push(shared)
                yield

    def _apply(self, optimizer: torch.optim.Adam, network: nn.Module, losses: list[Tensor]) -> None:
        if self.scaler.is_enabled():  # it looks for infinities itself, and expects some
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            self.guard.step(optimizer, network, torch.stack(losses).sum())

    def _compiled(self) -> contextlib.AbstractContextManager[object]:
        """Once both passes are compiled, having to compile again is an error."""
        self._steps += 1
        if not self.config.step.compile or self._steps <= _WARM_UP_STEPS:
            return contextlib.nullcontext()
        stance: contextlib.AbstractContextManager[object] = torch.compiler.set_stance("fail_on_recompile")
        return stance

    def _noise(self, update: int, part: int) -> tuple[Tensor, Tensor | None]:
        """Return this process's latents and labels of a part of an update's generated batch."""
        latents, labels = training_noise(
            self.config.seed,
            self.iteration,
            update,
            count=self.config.batch_size,
            latent_dim=self.config.network.latent_dim,
            labels_in_use=self.labels_in_use,
        )
        world, parts = self.world, self.config.accumulation
        return self._to_device(world.shard(latents, part, parts)), self._labels(
            world.shard(labels, part, parts)
        )

    def _labels(self, labels: Tensor) -> Tensor | None:
        return self._to_device(labels) if self.config.network.head_classes else None

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda" and not tensor.is_cuda:
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _prepared(self, update: nn.Module) -> nn.Module:
        """Compile a pass, and let its gradients be averaged over the processes, where there are several."""
        if self.config.step.compile:
            update.compile(fullgraph=True, dynamic=False)
        if self.world.world_size == 1:
            return update
        return DistributedDataParallel(
            update,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **_LEAVING_BUFFERS,
        )

    def _reducing_last(self, update: nn.Module, part: int) -> contextlib.AbstractContextManager[None]:
        """Average gradients over the processes with an update's last part only."""
        if isinstance(update, DistributedDataParallel) and part + 1 < self.config.accumulation:
            return update.no_sync()
        return contextlib.nullcontext()

    @property
    def _compute_dtype(self) -> torch.dtype | None:
        return _AUTOCAST.get(self.config.precision)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        dtype = self._compute_dtype
        return torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext()

    def share_means(self) -> None:
        """Tell each other the means since the last log, for the checkpoint; all processes call this before."""
        state = self.means.state_dict()
        world = {kind: {name: value.item() for name, value in each.items()} for kind, each in state.items()}
        self._means_of_processes = [json.loads(text) for text in self.world.gather_texts(json.dumps(world))]

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on; the same in every process, this one's means apart."""
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
            "torch_rng": torch.get_rng_state(),
            "means": self.means.state_dict(),
            "means_of_processes": self._means_of_processes,
            "guard": self.guard.state_dict(),
            "skipped": self.skipped,
            "labels_in_use": self.labels_in_use,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state that :meth:`state_dict` returned."""
        self.iteration = state["iteration"]
        before = state["config"]
        images_drawn = state["batches_drawn"] * (before["batch_size"] // before["accumulation"])
        # Another size of batch goes on with the next images all the same.
        self.batches_drawn = -(-images_drawn // (self.config.batch_size // self.config.accumulation))
        self.generator.load_state_dict(state["generator"])
        self.discriminator.load_state_dict(state["discriminator"])
        if self.average is not None and state["average"] is not None:
            self.average.load_state_dict(state["average"])
        elif self.average is not None:  # it begins here
            self.average.module.load_state_dict(state["generator"])
        self.g_optimizer.load_state_dict(state["g_optimizer"])
        self.d_optimizer.load_state_dict(state["d_optimizer"])
        if state["scaler"]:  # of a run in fp16
            self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["torch_rng"])
        self.means.load_state_dict(self._own_means(state), self.device)
        if "guard" in state:
            self.guard.load_state_dict(state["guard"])
            self.skipped = state["skipped"]

    def _own_means(self, state: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Return this process's means of a checkpoint; those of all, if it was of another number of processes."""
        of_processes = state.get("means_of_processes", [])
        if len(of_processes) == self.world.world_size:
            world: dict[str, dict[str, Any]] = of_processes[self.world.rank]
            return world
        if len(of_processes) < 2:
            alone: dict[str, dict[str, Any]] = state["means"]
            return alone
        counts = {
            name: sum(each["counts"][name] for each in of_processes) for name in of_processes[0]["counts"]
        }
        share = {name: round(count / len(of_processes)) for name, count in counts.items()}
        return {
            "sums": {
                name: sum(each["sums"][name] for each in of_processes) * share[name] / max(counts[name], 1)
                for name in counts
            },
            "counts": share,
        }

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Both networks, and the average of G where there is one, by the names to call them."""
        networks: dict[str, nn.Module] = {"G": self.generator, "D": self.discriminator}
        return networks if self.average is None else {**networks, "G's average": self.average.module}

    def measurements(self) -> dict[str, float]:
        """Return the means since the last call, gamma of each mixer, sigma of each layer, and GPU memory in MiB."""
        found = self.world.mean_over_ranks(self.means.take())
        found |= self.gammas()
        with torch.no_grad():
            found |= {
                f"sigma_{short}.{name}": float(layer.sigma)
                for short, network in (("g", self.generator), ("d", self.discriminator))
                for name, layer in network.named_modules()
                if isinstance(layer, SpectralNormLayer)
            }
        if self.device.type == "cuda":
            found["gpu_memory_mib"] = torch.cuda.max_memory_allocated(self.device) / 2**20
        return found

    def gammas(self) -> dict[str, float]:
        """Return gamma of every attention (or residual) block, as "gamma_g_32"."""
        return {
            f"gamma_{short}_{resolution}": mixer.gamma.item()
            for short, network in (("g", self.generator), ("d", self.discriminator))
            for resolution, mixer in network.mixers.items()
            if isinstance(mixer.gamma, Tensor)
        }


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 from 0 to 255 -> floating point from -1 to 1."""
    return pixels.to(torch.get_default_dtype()) / 127.5 - 1


def _adam(network: nn.Module, lr: float, config: RunConfig) -> torch.optim.Adam:
    settings = config.optimizer
    # Fused: one pass over weights, gradients and moments, and it leaves out a step without asking the host.
    return torch.optim.Adam(
        network.parameters(), lr, (settings.beta1, settings.beta2), settings.eps, fused=True
    )
