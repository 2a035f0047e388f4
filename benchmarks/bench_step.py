"""A whole training step of SAGAN: D's update, G's update, the average of G; ours against what people run.

``python -m benchmarks.bench_step --help`` lists the options.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import textbook_networks
from benchmarks.harness import Case, Outputs, Row, Run
from benchmarks.textbook_networks import TextbookDiscriminator, TextbookGenerator
from sagan.distributed import Processes
from sagan.randomness import training_noise
from sagan.recipes import RECIPES, RunConfig
from sagan.step import Trainer
from sagan_layers import SpectralNormLayer

STEP, SCALING = "step", "step, by size"
# The GFLOP of one image's step at 128 pixels and width 64, written plainly (multiply and add count as two).
GFLOP_PER_IMAGE = 148.0
GAMMA = 0.5


@dataclass(frozen=True)
class StepCase(Case):
    """One training step at one size.

    Attributes:
        suite: STEP or SCALING.
        batch_size: real images, and generated ones in each update.
        resolution: of the images.
        base_width: of the networks.
        device: "cpu" or "cuda".
        names: the contenders.
        peer: a checkout of BigGAN-PyTorch.
        num_classes: of the data.
    """

    suite: str
    batch_size: int
    resolution: int
    base_width: int
    device: str
    names: tuple[str, ...]
    peer: Path | None = None
    num_classes: int = 1000

    @property
    def name(self) -> str:
        """What the tables show."""
        return f"batch {self.batch_size}, {self.resolution} pixels, width {self.base_width}"

    @property
    def tolerance(self) -> float:
        """The largest relative error: Adam's first step is almost the gradient's sign, where rounding shows."""
        return 0.03

    def describe(self) -> Row:
        """Return the sizes."""
        return {
            "batch_size": self.batch_size,
            "resolution": self.resolution,
            "base_width": self.base_width,
            "num_classes": self.num_classes,
        }

    def contenders(self) -> list[str]:
        """Return the names of the contenders."""
        return list(self.names)

    @property
    def run_config(self) -> RunConfig:
        """The run whose step it is: the best known recipe."""
        attention = (32,) if self.resolution > 32 else (16,)
        recipe = RECIPES["best_known"]()
        network = replace(
            recipe.network,
            resolution=self.resolution,
            base_width=self.base_width,
            num_classes=self.num_classes,
            g_attention=attention,
            d_attention=attention,
        )
        return replace(recipe, batch_size=self.batch_size, device=self.device, network=network)

    def inputs(self) -> Any:
        """Return a trainer, whose networks every contender copies, and a batch of images and labels."""
        generator = torch.Generator().manual_seed(0)
        trainer = self._trainer()
        size = (self.batch_size, 3, self.resolution, self.resolution)
        pixels = torch.randint(256, size, generator=generator, dtype=torch.uint8)
        labels = torch.randint(self.num_classes, (self.batch_size,), generator=generator)
        return trainer, pixels.to(self.device), labels.to(self.device)

    def prepare(self, contender: str, inputs: Any) -> Run:
        """Return the step of one contender."""
        trainer, pixels, labels = inputs
        if contender.startswith("ours"):
            return self._ours(contender, trainer, pixels, labels)
        if contender.startswith("BigGAN"):
            networks: tuple[nn.Module, nn.Module] = textbook_networks.peer_networks(
                trainer.generator, trainer.discriminator, self.peer
            )
        else:
            networks = TextbookGenerator(trainer.generator), TextbookDiscriminator(trainer.discriminator)
        generator, discriminator = (network.to(self.device) for network in networks)
        step = _PlainStep(generator, discriminator, self.run_config)
        step.toggles = contender.endswith("toggled")
        if contender.endswith("compiled"):
            for network in (step.generator, step.discriminator):
                network.compile(dynamic=False)
        return lambda: step(pixels, labels)

    def expected(self, inputs: Any) -> Outputs:
        """Return the losses and some gradients of the textbook step in float64."""
        trainer, pixels, labels = inputs
        generator = TextbookGenerator(trainer.generator).to(self.device).double()
        discriminator = TextbookDiscriminator(trainer.discriminator).to(self.device).double()
        step = _PlainStep(generator, discriminator, self.run_config)
        return step(pixels, labels)

    def warm_up_case(self) -> Case:
        """Return the same at two small images."""
        return replace(self, batch_size=2, resolution=64, base_width=4, num_classes=10)

    def _trainer(self, **changes: Any) -> Trainer:
        config = replace(self.run_config, **changes)
        trainer = Trainer(config, torch.arange(self.num_classes), Processes(0, 1, torch.device(self.device)))
        with torch.no_grad():
            for network in (trainer.generator, trainer.discriminator):
                for mixer in network.mixers.values():
                    nn.init.constant_(mixer.gamma, GAMMA)  # type: ignore[arg-type]
                for layer in network.modules():
                    if isinstance(layer, SpectralNormLayer):
                        # Until the vectors stand still, the number of their moves would tell in the losses.
                        for _ in range(30):
                            layer.normalized_weight()
        return trainer

    def _ours(self, contender: str, given: Trainer, pixels: Tensor, labels: Tensor) -> Run:
        changes: dict[str, Any] = {}
        if "bf16" in contender:
            changes["precision"] = "bf16"
        step = given.config.step
        if "compiled" in contender:
            step = replace(step, compile=True)
        if "NCHW" in contender:
            step = replace(step, channels_last=False)
        if "checkpointed" in contender:
            step = replace(step, checkpoint_activations=True)
        trainer = self._trainer(step=step, **changes)
        trainer.generator.load_state_dict(given.generator.state_dict())
        trainer.discriminator.load_state_dict(given.discriminator.state_dict())
        batches = itertools.repeat((pixels, labels))

        def run() -> Outputs:
            trainer.step(batches)
            means = trainer.means
            results = _results(
                means.sums["d_loss"] / means.counts["d_loss"],
                means.sums["g_loss"] / means.counts["g_loss"],
                trainer.generator.linear.weight.grad,
                trainer.generator.last_conv.weight.grad,
            )
            means.take()
            return results

        return run


class _PlainStep:
    """BigGAN-PyTorch's training function, without what belongs to its loop.

    Attributes:
        generator: called with latents and labels.
        discriminator: called with images and labels.
        toggles: whether D's weights get no gradients in G's update, as its option ``--toggle_grads`` has it.
    """

    def __init__(self, generator: nn.Module, discriminator: nn.Module, config: RunConfig) -> None:
        self.generator, self.discriminator = generator, discriminator
        self.config = config
        self.toggles = False
        settings = config.optimizer
        betas = (settings.beta1, settings.beta2)
        self.g_optimizer = torch.optim.Adam(generator.parameters(), settings.g_lr, betas, settings.eps)
        self.d_optimizer = torch.optim.Adam(discriminator.parameters(), settings.d_lr, betas, settings.eps)
        self.average = copy.deepcopy(generator)
        self.iteration = 0

    def __call__(self, pixels: Tensor, labels: Tensor) -> Outputs:
        generator, discriminator = self.generator, self.discriminator
        dtype = next(generator.parameters()).dtype
        real = pixels.to(dtype) / 127.5 - 1
        self.g_optimizer.zero_grad()
        self.d_optimizer.zero_grad()
        latents, fake_labels = self._noise(0, pixels, dtype)
        with torch.no_grad():
            fake = generator(latents, fake_labels)
        logits = discriminator(torch.cat([fake, real]), torch.cat([fake_labels, labels]))
        fake_logits, real_logits = torch.split(logits, [len(fake), len(real)])
        d_loss = F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean()
        d_loss.backward()  # type: ignore[no-untyped-call]
        self.d_optimizer.step()
        self.g_optimizer.zero_grad()
        if self.toggles:
            discriminator.requires_grad_(False)
        latents, fake_labels = self._noise(1, pixels, dtype)
        g_loss = -discriminator(generator(latents, fake_labels), fake_labels).mean()
        g_loss.backward()
        self.g_optimizer.step()
        if self.toggles:
            discriminator.requires_grad_(True)
        self._update_average()
        self.iteration += 1
        named = dict(generator.named_parameters())
        last = "last_conv.weight" if "last_conv.weight" in named else "output_layer.2.weight"
        return _results(d_loss, g_loss, named["linear.weight"].grad, named[last].grad)

    def _noise(self, update: int, pixels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        network = self.config.network
        assert network.num_classes is not None
        latents, labels = training_noise(
            self.config.seed,
            self.iteration,
            update,
            count=len(pixels),
            latent_dim=network.latent_dim,
            labels_in_use=torch.arange(network.num_classes),
        )
        return latents.to(pixels.device, dtype), labels.to(pixels.device)

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = 0.0 if self.iteration < self.config.ema_start else self.config.ema_decay
        source = self.generator.state_dict()
        for name, value in self.average.state_dict().items():
            value.copy_(value * decay + source[name] * (1 - decay))


def _results(d_loss: Tensor, g_loss: Tensor, linear: Tensor | None, last: Tensor | None) -> Outputs:
    assert linear is not None
    assert last is not None
    return {
        "d_loss": d_loss.detach().clone(),
        "g_loss": g_loss.detach().clone(),
        "linear_gradient": linear.detach(),
        "last_gradient": last.detach(),
    }
