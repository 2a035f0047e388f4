"""A whole training step of SAGAN: D's update, G's update, the average of G; ours against what people run.

``python -m benchmarks.bench_step --help`` lists the options.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import multiprocessing
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness, textbook_networks
from benchmarks.harness import Case, Outputs, Row, Run, Settings
from benchmarks.textbook_networks import TextbookDiscriminator, TextbookGenerator
from sagan.data import CheckMode, DatasetCheck, ImageDataset
from sagan.distributed import World
from sagan.randomness import training_noise
from sagan.recipes import RECIPES, OutputConfig, Precision, RunConfig
from sagan.train.allocator import keep_freed_memory
from sagan.train.loop import train
from sagan.train.update import Trainer
from sagan_layers import SpectralNormLayer

STEP, SCALING, APART, LOOP = "step", "step, by size", "step, in processes of their own", "loop"
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
        bf16: every contender's networks run under autocast to bfloat16; otherwise all is float32.
    """

    suite: str
    batch_size: int
    resolution: int
    base_width: int
    device: str
    names: tuple[str, ...]
    peer: Path | None = None
    num_classes: int = 1000
    bf16: bool = False

    @property
    def name(self) -> str:
        """What the tables show."""
        sizes = f"batch {self.batch_size}, {self.resolution} pixels, width {self.base_width}"
        return f"{sizes}, bfloat16" if self.bf16 else sizes

    @property
    def tolerance(self) -> float:
        """The largest relative error: Adam's first step is almost the gradient's sign, where rounding shows."""
        return 0.3 if self.bf16 else 0.03

    def describe(self) -> Row:
        """Return the sizes."""
        return {
            "batch_size": self.batch_size,
            "resolution": self.resolution,
            "base_width": self.base_width,
            "num_classes": self.num_classes,
            "dtype": "bfloat16" if self.bf16 else "float32",
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
        step.autocast = torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)
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
        """Return the same with two images in narrow networks."""
        return replace(self, batch_size=2, base_width=8, num_classes=10)

    def _trainer(self, **step: Any) -> Trainer:
        config = self.run_config
        config = replace(config, step=replace(config.step, **step))
        trainer = Trainer(config, torch.arange(self.num_classes), World(0, 1, torch.device(self.device)))
        with torch.no_grad():
            for network in (trainer.generator, trainer.discriminator):
                for mixer in network.mixers.values():
                    nn.init.constant_(mixer.gamma, GAMMA)  # type: ignore[arg-type]
                for layer in network.modules():
                    if isinstance(layer, SpectralNormLayer):
                        # Until the vectors stand still, the number of their moves would tell in the losses.
                        for _ in range(100):
                            layer.normalized_weight()
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
        autocast: in which the networks run.
    """

    def __init__(self, generator: nn.Module, discriminator: nn.Module, config: RunConfig) -> None:
        self.generator, self.discriminator = generator, discriminator
        self.config = config
        self.toggles = False
        self.autocast = torch.autocast("cpu", enabled=False)
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


# --- in processes of their own ------------------------------------------------------------------------------


def measure_apart(case: StepCase, *, steps: int, rounds: int) -> list[Row]:
    """Return the step of each contender in a process of its own, as users run them: ours keeps freed memory there.

    In one process with others the allocator's settings would be everybody's. The results are checked where all run in
    one process.

    Args:
        case: whose contenders to take.
        steps: timed in each process, after one that is not.
        rounds: processes for each contender.
    """
    context = multiprocessing.get_context("spawn")
    samples: dict[str, list[float]] = {name: [] for name in case.contenders()}
    for _ in range(rounds):
        for name in samples:
            with context.Pool(1) as pool:
                samples[name] += pool.apply(_times_apart, (case, name, steps, torch.get_num_threads()))
    rows = []
    for name, times_ms in samples.items():
        timing = harness.Timing(times_ms)
        row = {
            "suite": APART,
            "case": case.name,
            "baseline": case.baseline,
            **case.describe(),
            "contender": name,
            "status": "ok",
            "time_ms": timing.median_ms(),
            "time_quartiles_ms": list(timing.quartiles_ms()),
            "samples": len(times_ms),
        }
        rows.append(row)
    baseline_ms = harness.Timing(samples[case.baseline]).median_ms()
    return [{**row, "time_ratio": row["time_ms"] / baseline_ms} for row in rows]


def _times_apart(case: StepCase, contender: str, steps: int, threads: int) -> list[float]:
    torch.set_num_threads(threads)
    if contender.startswith("ours"):
        keep_freed_memory()
    run = case.prepare(contender, case.inputs())
    run()
    times_ms = []
    for _ in range(steps):
        start = time.perf_counter()
        run()
        times_ms.append(1e3 * (time.perf_counter() - start))
    return times_ms


# --- the loop around the step -------------------------------------------------------------------------------


def measure_loop(device: str, *, iterations: int) -> list[Row]:
    """Return the median time of the demo's step inside ``train``, and of a whole turn of the loop around it.

    Logs are written as often as by default, samples and checkpoints not at all: a run writes them so rarely that
    these few turns would say nothing of their share.
    """
    digits = RECIPES["digits"]()
    inside: list[float] = []
    starts: list[float] = []
    step = Trainer.step

    def timed(trainer: Trainer, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        starts.append(time.perf_counter())
        step(trainer, _without_waiting(batches, waits))
        inside.append(time.perf_counter() - starts[-1] - sum(waits))
        waits.clear()

    waits: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            digits,
            out=Path(folder) / "run",
            device=device,
            iterations=iterations,
            network=replace(digits.network, num_classes=10),
            output=OutputConfig(sample_every=10**9, checkpoint_every=10**9),
        )
        dataset = _RandomImages(config.network.resolution)
        setattr(Trainer, "step", timed)  # noqa: B010 (mypy forbids assigning to a method)
        try:
            train(config, dataset, fingerprint="", progress=False)
        finally:
            setattr(Trainer, "step", step)  # noqa: B010
    skipped = 5  # the first turns are warmer-up than the others
    turns_ms = [1e3 * (after - before) for before, after in itertools.pairwise(starts)][skipped:]
    steps_ms = [1e3 * seconds for seconds in inside[:-1]][skipped:]
    identity = {
        "suite": LOOP,
        "case": f"demo's networks, batch {config.batch_size}",
        "baseline": "the step alone",
    }
    rows = []
    for contender, samples in (("the step alone", steps_ms), ("the whole loop", turns_ms)):
        timing = harness.Timing(samples)
        rows.append(
            {
                **identity,
                "batch_size": config.batch_size,
                "contender": contender,
                "status": "ok",
                "time_ms": timing.median_ms(),
                "time_quartiles_ms": list(timing.quartiles_ms()),
                "samples": len(samples),
                "time_ratio": sum(samples) / sum(steps_ms),
            }
        )
    return rows


def _without_waiting(
    batches: Iterator[tuple[Tensor, Tensor]], waits: list[float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Take what waiting for images costs out of the step: it is the loop's."""
    while True:
        start = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - start)
        yield batch


class _RandomImages(ImageDataset):
    """Images in memory, drawn at random."""

    cached = True

    def __init__(self, resolution: int) -> None:
        generator = torch.Generator().manual_seed(0)
        size = (2000, 3, resolution, resolution)
        self._images = torch.randint(256, size, generator=generator, dtype=torch.uint8)
        self.labels = torch.arange(len(self._images)) % 10
        self.class_names, self.num_classes = tuple(map(str, range(10))), 10
        self.resolution = resolution
        self.failures = []

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a batch."""
        chosen = torch.as_tensor(indices)
        return self._images[chosen], self.labels[chosen]

    def fingerprint(self) -> str:
        """Return text that names the images."""
        return "random"

    def check(
        self, mode: CheckMode, *, report_folder: Path | None = None, progress: bool = False
    ) -> DatasetCheck:
        """Return that nothing is wrong."""
        return DatasetCheck("random images", (), "random.txt", "")


# --- the runs -----------------------------------------------------------------------------------------------

PEERS = ("textbook", "BigGAN-PyTorch", "BigGAN-PyTorch toggled")


def make_cases(
    device: str,
    *,
    quick: bool = False,
    full: bool = False,
    compiled: bool = False,
    checkpointed: bool = False,
    peer: Path | None = None,
) -> list[StepCase]:
    """Return every case for a device, the most telling first."""
    if quick:
        return [StepCase(STEP, 4, 32, 8, device, ("ours", "textbook"), peer, num_classes=10)]
    ours: tuple[str, ...] = ("ours", "ours compiled") if compiled or device == "cuda" else ("ours",)
    activations = []
    if checkpointed:
        # At full size the optimizers' state is the larger part of the memory, at this one activations are.
        ours += ("ours checkpointed",)
        activations = [StepCase(STEP, 16, 128, 32, device, (*ours, "textbook"))]
    others: tuple[str, ...] = PEERS if peer else PEERS[:1]
    if device == "cuda":
        others += ("textbook compiled",)
        size = (256, 128, 64)
        scaling = [(batch, 128, 64) for batch in (16, 64, 128)] + [(64, 64, 64), (32, 256, 64)]
    else:
        size = (4, 128, 64)
        scaling = [(batch, 64, 16) for batch in (1, 2, 4, 8, 16)]
        scaling += [(4, 64, width) for width in (8, 32, 64)] + [(4, size, 16) for size in (32, 128, 256)]
    is_cuda = device == "cuda"
    precisions = (is_cuda, not is_cuda) if is_cuda or full else (is_cuda,)
    return [
        *(StepCase(STEP, *size, device, ours + others, peer, bf16=bf16) for bf16 in precisions),
        *activations,
        *(StepCase(SCALING, *sizes, device, ("ours", "textbook"), bf16=is_cuda) for sizes in scaling),
    ]


def add_rates(rows: Sequence[Row]) -> None:
    """Add images a second to each timed row, and at full size the rate of the plainly written arithmetic."""
    for row in rows:
        if "time_ms" in row:
            row["images_per_s"] = row["batch_size"] * 1e3 / row["time_ms"]
            if (row.get("resolution"), row.get("base_width")) == (128, 64):
                row["plain_gflop_per_s"] = row["images_per_s"] * GFLOP_PER_IMAGE


def plot_scaling(rows: Sequence[Row], path: Path) -> Path | None:
    """Draw the time of an image's step against batch, width and resolution; None where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    timed = [row for row in rows if row["suite"] == SCALING and "time_ms" in row]
    if not timed:
        return None
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    keys = ("batch_size", "base_width", "resolution")
    common = {key: max({row[key] for row in timed}, key=[row[key] for row in timed].count) for key in keys}
    for panel, varied in zip(figure.subplots(1, 3), keys, strict=True):
        fixed = [key for key in keys if key != varied]
        for contender in dict.fromkeys(row["contender"] for row in timed):
            points = sorted(
                (row[varied], row["time_ms"] / row["batch_size"])
                for row in timed
                if row["contender"] == contender and all(row[key] == common[key] for key in fixed)
            )
            panel.plot([x for x, _ in points], [y for _, y in points], marker="o", label=contender)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_major_formatter("{x:g}")
        at = ", ".join(f"{key} {common[key]}" for key in fixed)
        panel.set_xlabel(f"{varied} ({at})".replace("_", " "))
        panel.set_ylabel("ms an image")
        panel.grid(alpha=0.4)
        panel.legend()
    figure.savefig(path, dpi=120)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites; return 1 if a result was wrong or ours failed, 2 if the device is not there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_step", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small networks, under half a minute")
    parser.add_argument("--out", type=Path, help="the JSON file; Markdown and plots are written beside it")
    parser.add_argument("--peer", type=Path, help="a checkout of BigGAN-PyTorch")
    parser.add_argument("--only", type=re.compile, help='regular expression on "suite | case"')
    parser.add_argument(
        "--full", action="store_true", help="on the CPU also in bfloat16, and in processes apart"
    )
    parser.add_argument("--compiled", action="store_true", help="ours under torch.compile too, on the CPU")
    parser.add_argument("--checkpointed", action="store_true", help="ours keeping few activations, too")
    parser.add_argument("--minutes", type=float, default=15.0, help="start no case after so long")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here.")
        return 2
    default_out = harness.ROOT / "benchmarks" / "results" / f"step_{options.device}.json"
    results = harness.Results(options.out or default_out, options.device)
    settings = Settings(
        max_rounds=7,
        min_rounds=3,
        target_s=0.5 if options.quick else 8.0,
        memory=not options.no_memory,
        memory_limit_s=300,
    )
    peer = options.peer.resolve() if options.peer else None
    cases = [
        case
        for case in make_cases(
            options.device,
            quick=options.quick,
            full=options.full,
            compiled=options.compiled,
            checkpointed=options.checkpointed,
            peer=peer,
        )
        if options.only is None or options.only.search(f"{case.suite} | {case.name}")
    ]
    deadline = time.monotonic() + options.minutes * 60
    fault = ""
    for suite, with_memory in ((STEP, settings.memory), (SCALING, False)):
        if not fault:
            fault = harness.run_cases(
                [case for case in cases if case.suite == suite],
                results,
                replace(settings, memory=with_memory),
                budget_s=deadline - time.monotonic(),
            )
    if options.full and options.device == "cpu":
        for case in [case for case in cases if case.suite == STEP and not case.bf16]:
            rows = measure_apart(case, steps=4, rounds=2)
            results.add(rows)
            for row in rows:
                print(harness.line_of(row))
    if not fault and options.only is None:
        rows = measure_loop(options.device, iterations=12 if options.quick else 60)
        results.add(rows)
        for row in rows:
            print(harness.line_of(row))
    add_rates(results.rows)
    if not fault:
        results.finish()
    written = [results.path, *harness.write_report(results)]
    scaling = plot_scaling(results.rows, results.path.with_name(f"{results.path.stem}_scaling.png"))
    for path in [*written, *([scaling] if scaling else [])]:
        print(f"Wrote {path}")
    failed = harness.any_wrong(results.rows) or harness.any_of_ours_failed(results.rows)
    return 1 if fault or failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
