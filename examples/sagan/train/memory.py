"""Whether a training step fits into memory: measured on a small part of its batch, and scaled to the whole.

A process of its own builds the run's networks and runs real steps on two small numbers of images. So it changes
neither random numbers nor results, and what it took is free again afterwards. Between the two measurements memory is
taken to be linear in the number of images.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from sagan.data import ImageDataset
from sagan.distributed import World
from sagan.errors import UserError
from sagan.evaluation.config import TrainingEvaluationConfig
from sagan.networks import Discriminator, Generator, NetworkConfig, count_parameters
from sagan.recipes import RunConfig, config_from_dict, differences
from sagan.train.allocator import keep_freed_memory
from sagan.train.update import Trainer

GIB = 2**30
# Estimates were up to so much off (benchmarks/results/memory_cpu.md); options are suggested only with this much room.
MARGIN = 1.15
_ASSUMED_CLASSES = 1000
_OUTPUT_BYTES = 28 * 2**20  # pictures, logs and checkpoints of a run
_UNKNOWN = 2**62
_TIMEOUT_S = 600
_SLOW = 3.0  # times as long as the run's own step: no advice


@dataclass(frozen=True)
class Measured:
    """Bytes beyond those of the started program at the peak of a step, by the images that a process sees at once."""

    images: tuple[int, ...]  # one or two numbers, rising
    peaks: tuple[int, ...]
    seconds: float  # of the last step

    def at(self, images: int) -> int:
        """Return the bytes for a number of images."""
        if len(self.images) == 1:
            return self.peaks[0]
        (few, many), (low, high) = self.images, self.peaks
        return high + (images - many) * (high - low) // (many - few)


class NoMeasurementError(Exception):
    """A step could not be measured; the message says why."""


class TooLittleMemoryError(NoMeasurementError):
    """Not even a small part of the batch fits."""


@dataclass
class StepMemory:
    """Estimates of the memory that each process of a run needs, in bytes beyond those of the started program.

    Attributes:
        config: the run, with a number of classes.
        world_size: processes of the run.
        device: what a process trains on.
        image_bytes: what holds images in a process, beside a step.
    """

    config: RunConfig
    world_size: int
    device: torch.device
    image_bytes: int = 0
    _measured: dict[tuple[bool, str], Measured] = field(default_factory=dict)

    def images_at_once(self, config: RunConfig) -> int:
        """Return how many images of a batch a process sees at once."""
        return max(1, config.batch_size // (config.accumulation * self.world_size))

    def needed(self, config: RunConfig | None = None) -> int:
        """Return the bytes for the run, or for it with another batch, precision or checkpointing.

        Raises:
            NoMeasurementError: as :func:`measure_step`.
        """
        config = config or self.config
        found = self.measured(config)
        generator, discriminator = parameter_bytes(config.network)
        # While a later part is computed, the gradients of those before it wait. DDP's are always there.
        gradients = max(generator, discriminator) if config.accumulation > 1 else 0
        if self.world_size > 1:
            gradients = generator + discriminator
        # The images of an iteration are drawn before its first step.
        pixels = config.batch_size * config.d_steps // self.world_size * 3 * config.network.resolution**2
        return found.at(self.images_at_once(config)) + gradients + pixels + _OUTPUT_BYTES + self.image_bytes

    def measured(self, config: RunConfig) -> Measured:
        """Return the measurement that holds for a configuration; made once for each kind of step."""
        kind = config.step.checkpoint_activations, config.precision
        if kind not in self._measured:
            few, many = small_parts(config.network, self.images_at_once(self.config), self.device)
            self._measured[kind] = measure_step(config, (few, many) if few < many else (many,), self.device)
        return self._measured[kind]


def small_parts(network: NetworkConfig, most: int, device: torch.device) -> tuple[int, int]:
    """Return two numbers of images, so few that a step takes seconds, and at most ``most``.

    So many too that activations, not the weights' gradients and moments, decide where the peak is.
    """
    scale = 128 / network.resolution * 64 / network.base_width * (8 if device.type == "cuda" else 1)
    many = min(max(5, int(10 * scale)), most)
    return max(1, many // 5), many  # far apart: a peak is some percent larger in one run than in another


def parameter_bytes(network: NetworkConfig) -> tuple[int, int]:
    """Return the bytes of the weights of G and of D."""
    with torch.device("meta"):
        generator, discriminator = (count_parameters(kind(network)) for kind in (Generator, Discriminator))
    return 4 * generator, 4 * discriminator


def measure_step(config: RunConfig, images: tuple[int, ...], device: torch.device) -> Measured:
    """Measure steps on these numbers of images in another process.

    Raises:
        TooLittleMemoryError: if there is not enough memory for them.
        NoMeasurementError: if the system does not say how much memory a process takes, or the other process failed.
    """
    request = {"config": config.to_dict(), "images": images, "device": str(device)}
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    # Each thread takes some.
    environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", "from sagan.train.memory import answer; answer()"]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request),
            env=environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoMeasurementError(str(error)) from error
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        found = json.loads(lines[-1])
        if "reason" not in found:
            return Measured(images, tuple(found["peaks"]), found["seconds"])
        raise NoMeasurementError(found["reason"])
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if done.returncode == -9 or "MemoryError" in last or "not enough memory" in last:  # OutOfMemoryError too
        raise TooLittleMemoryError(f"a step on {images[-1]} images ended for lack of memory")
    raise NoMeasurementError(last)


def answer() -> None:
    """Measure what standard input asks for and print the result as JSON: the other process of :func:`measure_step`."""
    with contextlib.suppress(OSError):  # if memory runs out, this process ends and no other
        Path("/proc/self/oom_score_adj").write_text("1000")
    request = json.loads(sys.stdin.read())
    config, device = config_from_dict(request["config"]), torch.device(request["device"])
    # What needs several processes or minutes is left out: all processes take the same memory, and a compiled step is
    # taken to need what a plain one does.
    config = replace(
        config,
        accumulation=1,
        d_steps=1,
        step=replace(config.step, compile=False, sync_batch_norm=False),
        evaluation=TrainingEvaluationConfig(),
    )
    if device.type == "cpu":
        keep_freed_memory()
    before = _peak_bytes(device)
    if before is None:
        reason = f"this system does not tell how much memory a process takes on {device.type}"
        print(json.dumps({"reason": reason}))
        return
    classes = config.network.num_classes or 1
    trainer = Trainer(
        replace(config, batch_size=request["images"][0]), torch.arange(classes), World(0, 1, device)
    )
    _make_moments(trainer)
    peaks, seconds = [], 0.0
    for count in request["images"]:
        trainer.config = replace(config, batch_size=count)
        start = time.perf_counter()
        trainer.step(_random_batches(count, config.network.resolution, classes, device))
        seconds = time.perf_counter() - start
        peaks.append((_peak_bytes(device) or before) - before)
    print(json.dumps({"peaks": peaks, "seconds": seconds}))


def _make_moments(trainer: Trainer) -> None:
    """Let the optimizers make their moments, which every step but the first finds there."""
    for optimizer in (trainer.g_optimizer, trainer.d_optimizer):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _random_batches(
    count: int, resolution: int, classes: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        pixels = torch.randint(0, 256, (count, 3, resolution, resolution), dtype=torch.uint8, device=device)
        yield pixels, torch.randint(0, classes, (count,), device=device)


def _peak_bytes(device: torch.device) -> int | None:
    """Return the most memory that this process has taken, on the GPU or else of the machine; None if not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if device.type != "cpu":
        return None
    with contextlib.suppress(OSError, ValueError):
        (kib,) = re.findall(r"^VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
        return int(kib) * 1024
    with contextlib.suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None


def available_bytes(device: torch.device) -> int | None:
    """Return how much memory this process can still take: of the GPU, or its share of the machine's; None if unknown.

    The machine's is what the system could give, or less where a container's limit (cgroup) is lower.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = [*_cgroup_headroom(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))]
    with contextlib.suppress(OSError, ValueError):
        (kib,) = re.findall(r"^MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
        found.append(int(kib) * 1024)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(found) // processes if found else None


def _cgroup_headroom(root: Path, membership: Path) -> Iterator[int]:
    """Yield what each limit on this process's control groups leaves; files in the system's cache can be dropped."""
    with contextlib.suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers == "":
                base, limit, usage, cache = root, "memory.max", "memory.current", "inactive_file"
            elif "memory" in controllers.split(","):
                base, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
                cache = "total_inactive_file"
            else:
                continue
            place = base / name.lstrip("/")
            # In a container the group's name may be the host's, whose folders are not there.
            for folder in (place, *place.parents):
                if not folder.is_relative_to(base):
                    break
                with contextlib.suppress(OSError, ValueError):
                    most, used = (int((folder / each).read_text()) for each in (limit, usage))
                    facts = dict(each.split() for each in (folder / "memory.stat").read_text().splitlines())
                    if most < _UNKNOWN:  # version 1 says "no limit" with a number near 2^63
                        yield max(0, most - used + int(facts.get(cache, 0)))


def image_bytes(config: RunConfig, dataset: ImageDataset | None, world_size: int) -> int:
    """Return the bytes of the machine's memory that hold images in each process, beside those of a step."""
    if dataset is None:
        return 0
    cache = dataset.cache_bytes(config.images.cache_mib)
    batch = config.batch_size // (config.accumulation * world_size) * 3 * config.network.resolution**2
    ahead = dataset.prefetched_batches
    if not cache and not dataset.cached:
        ahead = 2 * config.images.workers + 1  # in shared memory
    return cache + ahead * batch


def check_memory(
    config: RunConfig,
    dataset: ImageDataset | None,
    world: World,
    *,
    fit: bool = False,
    refuse: bool = True,
    resumes: bool = False,
) -> RunConfig:
    """Print the memory that a step needs and what there is; return the configuration, with ``fit`` one that fits.

    All processes call this together; the first measures. What fits has the same global batch and precision. A run that
    ``resumes`` keeps its accumulation too.

    Raises:
        UserError: if ``refuse``, and the step does not fit; the message has the options that do.
    """
    # Of the process that can take the least; what is not known does not count.
    found = available_bytes(world.device)
    least = -world.max_over_ranks(-(_UNKNOWN if found is None else found))
    # Images wait in the machine's memory, not in a GPU's.
    held = image_bytes(config, dataset, world.world_size) if world.device.type == "cpu" else 0
    images = world.max_over_ranks(held)
    counted = config
    if config.network.num_classes is None:
        counted = replace(config, network=replace(config.network, num_classes=_ASSUMED_CLASSES))
    decision = _Decision(
        StepMemory(counted, world.world_size, world.device, images),
        None if least == _UNKNOWN else least,
        assumes_classes=counted is not config,
        resumes=resumes,
    )
    accumulation, checkpointed = world.run_on_main(lambda: decision.make(fit=fit, refuse=refuse))
    step = replace(config.step, checkpoint_activations=checkpointed)
    return replace(config, accumulation=accumulation, step=step)


@dataclass
class _Decision:
    """What to print, and which options to train with."""

    memory: StepMemory
    available: int | None
    assumes_classes: bool
    resumes: bool

    def make(self, *, fit: bool, refuse: bool) -> tuple[int, bool]:
        """Print whether the step fits; return accumulation and checkpointing. Raises as :func:`check_memory`."""
        config, available = self.memory.config, self.available
        unchanged = config.accumulation, config.step.checkpoint_activations
        try:
            self._check_networks()
            needed = self._print_needed()
        except NoMeasurementError as error:
            if refuse and isinstance(error, TooLittleMemoryError):
                raise UserError(f"memory: {error}. --ignore-memory goes on all the same") from error
            print(f"Memory: not measured ({error}); going on.")
            return unchanged
        if available is None or needed * MARGIN <= available:
            return unchanged
        if needed <= available and fit:
            print(f"That leaves less room than the estimate can be off, {MARGIN - 1:.0%}.")
        if fit or needed > available:
            print("Looking for options that fit; some are measured too ...", flush=True)
        if fit and (chosen := next(self._alternatives(same_batch=True), None)):
            options = command_line_options(config, chosen)
            print(f"Chosen to fit: {options}, with which a step takes {_gib(self.memory.needed(chosen))}.")
            return chosen.accumulation, chosen.step.checkpoint_activations
        if needed <= available and not fit:
            print(f"This may not fit: the estimate can be {MARGIN - 1:.0%} off. --fit-memory makes room.")
            return unchanged
        text = self._refusal(needed, available, fit=fit)
        if refuse:
            raise UserError(text)
        print(f"Warning: {text}")
        return unchanged

    def _check_networks(self) -> None:
        """Refuse to measure what cannot fit: that could end other programs."""
        generator, discriminator = parameter_bytes(self.memory.config.network)
        average = generator if self.memory.config.ema_decay else 0
        least = 3 * (generator + discriminator) + average
        if self.available is not None and least > self.available:
            raise TooLittleMemoryError(
                f"weights, moments and average alone take {_gib(least)}{self._where()}, {_gib(self.available)} are "
                "available. A smaller --network.base-width needs less"
            )

    def _print_needed(self) -> int:
        memory, config, available = self.memory, self.memory.config, self.available
        images = memory.images_at_once(config)
        few, many = small_parts(config.network, images, memory.device)
        parts = f"{few} and {many} images" if few < many else _images(many)
        print(
            f"Measuring the memory of a step on {parts}, for seconds, on a slow CPU a minute ...", flush=True
        )
        start = time.perf_counter()
        needed = memory.needed()
        there = "how much is available is not known here; going on"
        if available is not None:
            there = f"{_gib(available)} are available"
        notes = [f"scaled to {_images(images)}"] if images > many else []
        if self.assumes_classes:
            notes.append(f"{_ASSUMED_CLASSES} classes assumed")
        if config.step.compile:
            notes.append("without compile")
        notes.append(f"measured in {time.perf_counter() - start:.0f} s")
        print(f"Memory: a step needs {_gib(needed)}{self._where()}, {there}{_in_brackets(notes)}.")
        return needed

    def _where(self) -> str:
        of = " of the GPU's memory" if self.memory.device.type == "cuda" else ""
        count = self.memory.world_size
        return of + (f" in each of {count} processes" if count > 1 else "")

    def _refusal(self, needed: int, available: int, *, fit: bool) -> str:
        found = [
            f"  {self._options(each)}    ({_gib(self.memory.needed(each))})" for each in self._alternatives()
        ]
        there = f"a step needs {_gib(needed)}{self._where()}, {_gib(available)} are available"
        if not found:
            return f"memory: {there}. No option found that fits; --ignore-memory goes on all the same"
        last = "" if fit else ", --fit-memory chooses at the same global batch"
        lines = [f"memory: {there}. Each of these lines fits, by its own estimate:", *found]
        return "\n".join([*lines, f"Add one of them{last}; --ignore-memory goes on all the same"])

    def _options(self, config: RunConfig) -> str:
        same = replace(config, step=self.memory.config.step) == self.memory.config
        accepted = " --accept-changes" if self.resumes and not same else ""
        return command_line_options(self.memory.config, config) + accepted

    def _alternatives(self, *, same_batch: bool = False) -> Iterator[RunConfig]:
        """Yield configurations that fit, with room: those first that change least of what is computed."""
        config = self.memory.config
        saves = config.step.checkpoint_activations or config.step.compile  # not both
        checkpointed = config
        if not saves:
            checkpointed = replace(config, step=replace(config.step, checkpoint_activations=True))
        if not saves and self._fits(checkpointed):
            yield checkpointed
        if same_batch and self.resumes:
            return
        parts = self._in_parts(config)
        if parts is not None:
            yield parts
        elif not saves and (both := self._in_parts(checkpointed)):
            yield both
        if same_batch:
            return
        if config.precision == "fp32":
            half = replace(config, precision="bf16")
            chosen = half if self._fits(half) else self._in_parts(half)
            if chosen is not None and self._is_fast(half):
                yield chosen
        if smaller := self._smaller_batch(config):
            yield smaller

    def _fits(self, config: RunConfig) -> bool:
        with contextlib.suppress(NoMeasurementError):
            return self.memory.needed(config) * MARGIN <= (self.available or 0)
        return False

    def _is_fast(self, config: RunConfig) -> bool:
        """Whether a CPU computes the step in this precision about as fast."""
        return self.memory.measured(config).seconds < _SLOW * self.memory.measured(self.memory.config).seconds

    def _in_parts(self, config: RunConfig) -> RunConfig | None:
        """Return the configuration with the fewest accumulated parts that fit."""
        each = config.batch_size // self.memory.world_size
        counts = [n for n in range(config.accumulation + 1, each + 1) if each % n == 0]
        return next((new for n in counts if self._fits(new := replace(config, accumulation=n))), None)

    def _smaller_batch(self, config: RunConfig) -> RunConfig | None:
        pieces = config.accumulation * self.memory.world_size
        for count in range(config.batch_size // pieces - 1, 0, -1):
            rounded = count // 8 * 8 or count
            if self._fits(new := replace(config, batch_size=rounded * pieces)):
                return new
        return None


def as_begun(config: RunConfig, begun: RunConfig) -> RunConfig:
    """Return a run to be resumed with what ``--fit-memory`` chose when it began."""
    if begun.batch_size != config.batch_size or config.step.compile:
        return config
    saves = config.step.checkpoint_activations or begun.step.checkpoint_activations
    step = replace(config.step, checkpoint_activations=saves)
    return replace(config, accumulation=begun.accumulation, step=step)


def command_line_options(config: RunConfig, other: RunConfig) -> str:
    """Return the options that make the other configuration of the first."""
    return " ".join(
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        for name, (_, value) in differences(config, other).items()
    )


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


def _images(count: int) -> str:
    return f"{count} image" + "s" * (count != 1)


def _in_brackets(notes: list[str]) -> str:
    return f" ({', '.join(notes)})" if notes else ""
