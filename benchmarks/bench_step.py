"""A whole training step of SAGAN: D's update, G's update, the average of G; ours against what people run.

``python -m benchmarks.bench_step --help`` lists the options.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import multiprocessing
import tempfile
import time
import timeit
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.baselines import settle, textbook_network
from benchmarks.biggan_pytorch import peer_networks
from benchmarks.harness import Case, Outputs, Run, Settings
from benchmarks.report import Row
from sagan.data import open_dataset
from sagan.demo.digits import write_digits
from sagan.distributed import World
from sagan.randomness import training_noise
from sagan.recipes import RECIPES, OutputConfig, Precision, RunConfig
from sagan.train.allocator import keep_freed_memory
from sagan.train.loop import train
from sagan.train.update import Trainer

STEP, SCALING, SEPARATE = "step", "step, by size", "step, in separate processes"
COMPILED, CHECKPOINTED, LOOP = "step, compiled", "step, checkpointed", "loop"
PEERS = ("textbook", "BigGAN-PyTorch", "BigGAN-PyTorch toggled")
GAMMA = 0.5


@dataclass(frozen=True)
class StepCase(Case):
    """One training step at one size."""

    batch_size: int  # real images, and generated ones in each update
    resolution: int  # of the images
    base_width: int  # of the networks
    names: tuple[str, ...]  # the contenders
    peer: Path | None = None  # a checkout of BigGAN-PyTorch
    num_classes: int = 1000  # of the data
    bf16: bool = False  # every contender's networks run under autocast to bfloat16; otherwise all is float32

    @property
    def name(self) -> str:
        sizes = f"batch {self.batch_size}, {self.resolution} pixels, width {self.base_width}"
        return f"{sizes}, bfloat16" if self.bf16 else sizes

    @property
    def tolerance(self) -> float:
        # Adam's first step is almost the gradient's sign, where rounding shows.
        return 0.3 if self.bf16 else 0.03

    @property
    def measures_memory(self) -> bool:
        return self.suite != SCALING

    @property
    def images(self) -> int:
        return self.batch_size

    def contenders(self) -> list[str]:
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
        precision: Precision = "bf16" if self.bf16 else "fp32"
        return replace(
            recipe, batch_size=self.batch_size, device=self.device, network=network, precision=precision
        )

    def inputs(self) -> Any:
        """Return a trainer, whose networks every contender copies, and a batch of images and labels."""
        generator = torch.Generator().manual_seed(0)
        trainer = self._trainer()
        size = (self.batch_size, 3, self.resolution, self.resolution)
        pixels = torch.randint(256, size, generator=generator, dtype=torch.uint8)
        labels = torch.randint(self.num_classes, (self.batch_size,), generator=generator)
        return trainer, pixels.to(self.device), labels.to(self.device)

    def prepare(self, contender: str, inputs: Any) -> Run:
        trainer, pixels, labels = inputs
        if contender.startswith("ours"):
            return self._ours(contender, trainer, pixels, labels)
        if contender.startswith("BigGAN"):
            generator, discriminator = peer_networks(trainer.generator, trainer.discriminator, self.peer)
        else:
            generator, discriminator = map(textbook_network, (trainer.generator, trainer.discriminator))
        step = _PlainStep(
            generator.to(self.device),
            discriminator.to(self.device),
            self.run_config,
            toggles=contender.endswith("toggled"),
            autocast=torch.bfloat16 if self.bf16 else None,
        )
        if contender.endswith("compiled"):
            for network in (step.generator, step.discriminator):
                network.compile(dynamic=False)
        return lambda: step(pixels, labels)

    def expected(self, inputs: Any) -> Outputs:
        """Return the losses and some gradients of the textbook step in float64."""
        trainer, pixels, labels = inputs
        generator = textbook_network(trainer.generator).double()
        discriminator = textbook_network(trainer.discriminator).double()
        return _PlainStep(generator, discriminator, self.run_config)(pixels, labels)

    def warm_up_case(self) -> Case:
        return replace(self, batch_size=2, base_width=8, num_classes=10)

    def _trainer(self, **step: Any) -> Trainer:
        config = self.run_config
        config = replace(config, step=replace(config.step, **step))
        trainer = Trainer(config, torch.arange(self.num_classes), World(0, 1, torch.device(self.device)))
        for network in (trainer.generator, trainer.discriminator):
            settle(network, gamma=GAMMA)
        return trainer

    def _ours(self, contender: str, given: Trainer, pixels: Tensor, labels: Tensor) -> Run:
        trainer = self._trainer(
            compile=contender.endswith("compiled"), checkpoint_activations=contender.endswith("checkpointed")
        )
        trainer.generator.load_state_dict(given.generator.state_dict())
        trainer.discriminator.load_state_dict(given.discriminator.state_dict())
        batches = itertools.repeat((pixels, labels))

        def run() -> Outputs:
            trainer.step(batches)
            means = trainer.means
            d_loss, g_loss = (means.sums[name] / means.counts[name] for name in ("d_loss", "g_loss"))
            means.take()
            return _results(d_loss, g_loss, trainer.generator)

        return run


class _PlainStep:
    """BigGAN-PyTorch's training function, without what belongs to its loop.

    Args:
        generator: called with latents and labels.
        discriminator: called with images and labels.
        config: the run.
        toggles: whether D's weights get no gradients in G's update, as its option ``--toggle_grads`` has it.
        autocast: the dtype in which the networks run, None for that of their parameters.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        config: RunConfig,
        *,
        toggles: bool = False,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.generator, self.discriminator = generator, discriminator
        self.config = config
        self.toggles = toggles
        self.autocast = torch.autocast(config.device, autocast, enabled=autocast is not None)
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
        with self.autocast:
            with torch.no_grad():
                fake = generator(latents, fake_labels)
            logits = discriminator(torch.cat([fake, real.to(fake)]), torch.cat([fake_labels, labels])).to(
                dtype
            )
        fake_logits, real_logits = torch.split(logits, [len(fake), len(real)])
        d_loss = F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean()
        d_loss.backward()  # type: ignore[no-untyped-call]
        self.d_optimizer.step()
        self.g_optimizer.zero_grad()
        if self.toggles:
            discriminator.requires_grad_(False)
        latents, fake_labels = self._noise(1, pixels, dtype)
        with self.autocast:
            logits = discriminator(generator(latents, fake_labels), fake_labels).to(dtype)
        g_loss = -logits.mean()
        g_loss.backward()
        self.g_optimizer.step()
        if self.toggles:
            discriminator.requires_grad_(True)
        self._update_average()
        self.iteration += 1
        return _results(d_loss, g_loss, generator)

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


def _results(d_loss: Tensor, g_loss: Tensor, generator: nn.Module) -> Outputs:
    grads = {name: parameter.grad for name, parameter in generator.named_parameters()}
    theirs = "output_layer.2.weight"
    last = grads[theirs] if theirs in grads else grads["last_conv.weight"]
    found = {
        "d_loss": d_loss,
        "g_loss": g_loss,
        "linear_gradient": grads["linear.weight"],
        "last_gradient": last,
    }
    return {name: each.detach() for name, each in found.items() if each is not None}


def measure_separately(case: StepCase, *, steps: int, rounds: int) -> Row:
    """Return the step times of each contender in processes of its own, where ours keeps freed memory as in training.

    In one process, all contenders would share the allocator's settings. Results are not checked here. Each contender
    gets ``rounds`` processes; each makes one warm-up step and then times ``steps`` steps.
    """
    context = multiprocessing.get_context("spawn")
    times_s: dict[str, list[float]] = {name: [] for name in case.contenders()}
    for name in harness.in_turn(list(times_s), rounds):
        with ProcessPoolExecutor(1, context) as pool:
            times_s[name] += pool.submit(_step_times_s, case, name, steps, torch.get_num_threads()).result()
    return harness.timed_record(SEPARATE, case.name, case.baseline, times_s, case.batch_size)


def _step_times_s(case: StepCase, contender: str, steps: int, threads: int) -> list[float]:
    torch.set_num_threads(threads)
    if contender.startswith("ours"):
        keep_freed_memory()
    run = case.prepare(contender, case.inputs())
    run()
    return timeit.repeat(run, number=1, repeat=steps)


def measure_loop(device: str, *, iterations: int) -> Row:
    """Return the median time of the demo's training step inside ``train``, and of a whole iteration of its loop.

    Logs are written as often as by default. Samples and checkpoints are not written: in a real run they are too rare to
    matter in so few iterations.
    """
    inside: list[float] = []
    starts: list[float] = []
    step = Trainer.step

    def timed(trainer: Trainer, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        waits: list[float] = []  # for images, which belong to the loop and not to the step

        def waited() -> tuple[Tensor, Tensor]:
            start = time.perf_counter()
            batch = next(batches)
            waits.append(time.perf_counter() - start)
            return batch

        starts.append(time.perf_counter())
        step(trainer, iter(waited, None))
        inside.append(time.perf_counter() - starts[-1] - sum(waits))

    digits = RECIPES["digits"]()
    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            digits,
            out=Path(folder) / "run",
            device=device,
            iterations=iterations,
            network=replace(digits.network, num_classes=10),
            output=OutputConfig(sample_every=10**9, checkpoint_every=10**9),
        )
        dataset = open_dataset(
            write_digits(Path(folder) / "digits"), config.network.resolution, config.images
        )
        with mock.patch.object(Trainer, "step", timed):
            train(config, dataset.in_memory(config.images.cache_mib), progress=False)
    skipped = 5  # the first turns warm up
    turns = [after - before for before, after in itertools.pairwise(starts)][skipped:]
    alone, whole, steps = "the step alone", "the whole loop", inside[skipped:-1]
    case = f"demo's networks, batch {config.batch_size}"
    record = harness.timed_record(LOOP, case, alone, {alone: steps, whole: turns}, config.batch_size)
    # The median turn writes no log; the sum does.
    record["contenders"][whole]["time_ratio"] = sum(turns) / sum(steps)
    return record


def make_cases(options: argparse.Namespace) -> list[StepCase]:
    """Return the cases of a run, the most valuable first."""
    device, peer = options.device, options.peer
    if options.quick:
        return [StepCase(STEP, device, 4, 32, 8, ("ours", "textbook"), peer, num_classes=10)]
    others = PEERS if peer else PEERS[:1]
    if device == "cuda":
        size = (256, 128, 64)
        scaling = [(batch, 128, 64) for batch in (16, 64, 128)] + [(64, 64, 64), (32, 256, 64)]
        names = ("ours", "ours compiled", *others, "textbook compiled")
        cases = [StepCase(STEP, device, *size, names, peer, bf16=bf16) for bf16 in (True, False)]
    else:
        size = (4, 128, 64)
        scaling = [(batch, 64, 16) for batch in (1, 2, 4, 8, 16)]
        scaling += [(4, 64, width) for width in (8, 32, 64)] + [(4, size, 16) for size in (32, 128, 256)]
        cases = [StepCase(STEP, device, *size, ("ours", *others), peer)]
    if options.everything:
        checkpointed = ("ours", "ours checkpointed", "textbook")
        cases += [
            # At full size most memory is the optimizers' state, at the smaller one activations.
            *(StepCase(CHECKPOINTED, device, *sizes, checkpointed) for sizes in (size, (16, 128, 32))),
            StepCase(COMPILED, device, *size, ("ours", "ours compiled", *others), peer),
        ]
    if options.everything and device == "cpu":
        cases.append(StepCase(STEP, device, *size, ("ours", *others), peer, bf16=True))
        cases.append(StepCase(SEPARATE, device, *size, ("ours", *others), peer))
    is_cuda = device == "cuda"
    cases += [StepCase(SCALING, device, *sizes, ("ours", "textbook"), bf16=is_cuda) for sizes in scaling]
    return cases


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites; return 1 if a result was wrong or ours failed, 2 if the device is not there."""
    options = harness.parse("step", __doc__, arguments, peer=True)
    cases = make_cases(options)
    in_turn = [case for case in cases if case.suite != SEPARATE]
    results = harness.run_suite(options, in_turn, Settings(target_s=8.0, max_rounds=7))
    for case in cases:
        if case.suite == SEPARATE and harness.is_chosen(f"{case.suite} | {case.name}", options):
            results.add(measure_separately(case, steps=4, rounds=2))
    if harness.is_chosen(LOOP, options):
        results.add(measure_loop(options.device, iterations=12 if options.quick else 60))
    return results.finish()


if __name__ == "__main__":
    raise SystemExit(main())
