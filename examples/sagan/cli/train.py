"""The subcommand ``train``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import tyro

from sagan.cli.parsing import COLLAPSED, INTERRUPTED
from sagan.data import ImageDataset, check_dataset, open_dataset
from sagan.distributed import World, init_world
from sagan.errors import UserError
from sagan.evaluation.feature_networks import load_feature_network
from sagan.evaluation.periodic import periodic_evaluation
from sagan.networks import Discriminator, Generator, count_parameters
from sagan.recipes import DEFAULT_RECIPE, RECIPES, RunConfig, differences
from sagan.report.page import finish_run
from sagan.train.allocator import keep_freed_memory
from sagan.train.checkpoint import checkpoints_in
from sagan.train.loggers import check_loggers
from sagan.train.loop import train
from sagan.train.output import save_config
from sagan.train.resume import check_images, check_start, check_unused, has_started, run_lock


@dataclass(frozen=True)
class Train:
    """Train on a prepared set, or on a folder of images: DATA/train/<class>/*.JPEG.

    A recipe gives the defaults of all other options. All images are checked before the first iteration. Ctrl-C saves a
    checkpoint, and --resume continues from it. With torchrun, all processes train one run.

    Attributes:
        run: the run.
        resume: resume the run in --out.
        auto_resume: resume the run in --out if there is one, else start it, as restarts by torchrun do.
        accept_changes: resume even if the configuration or the images have changed.
        dry_run: print and save the resolved configuration, then stop.
    """

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    resume: bool = False
    auto_resume: bool = False
    accept_changes: bool = False
    dry_run: bool = False


def from_recipe(arguments: Sequence[str]) -> Train:
    """Return the defaults of ``train`` for the recipe in the arguments."""
    name = DEFAULT_RECIPE
    for number, argument in enumerate(arguments):
        if argument == "--recipe" and number + 1 < len(arguments):
            name = arguments[number + 1]
        elif argument.startswith("--recipe="):
            name = argument.removeprefix("--recipe=")
    if name not in RECIPES:
        raise UserError(f"recipe: expected one of {', '.join(RECIPES)}; got {name!r}")
    return Train(run=RECIPES[name]())


def run(command: Train) -> int:
    """Run ``train`` and return the exit code."""
    config = command.run
    if config.data is None and not command.dry_run:
        raise UserError("data: expected --data with a prepared set or a folder of images, got none")
    with init_world(config.device) as world, contextlib.ExitStack() as stack:
        if world.device.type == "cpu":
            keep_freed_memory()
        # First: what is in the folder may be another training's.
        world.run_on_main(lambda: stack.enter_context(run_lock(config.out, resume=command.resume)))
        return _train(command, world)


def _train(command: Train, world: World) -> int:
    say = print if world.is_main else lambda *_: None
    config, dataset = command.run, None
    if config.data is not None:
        dataset = open_dataset(config.data, config.network.resolution, config.images)
        config = _resolved(config, dataset)
    say(describe_config(config))
    world.run_on_main(lambda: check_loggers(config.output))
    has_run = bool(checkpoints_in(config.out / "checkpoints"))
    if command.dry_run:
        if has_run or has_started(config.out):
            say(f"\nNot saved: {config.out} already holds a run. Dry run: stopping here.")
        elif world.is_main:
            say(f"\nSaved as {save_config(config)}. Dry run: stopping here.")
        return 0
    assert dataset is not None
    say()
    # torchrun restarts the same command after a failure: the run has begun, even without --resume.
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    resume = command.resume or (has_run and (command.auto_resume or restarted))
    accept_changes = command.accept_changes
    found = check_start(config, resume=resume, accept_changes=accept_changes)
    if not (resume or command.auto_resume or restarted):
        check_unused(config.out)
    network = None  # loaded early: a missing or wrong file fails before the images are read
    if config.evaluation.every:
        network = load_feature_network(config.evaluation, world.device, resolution=config.network.resolution)
    config.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.step.tf32
    check = check_dataset(dataset, config.images.check, world, report_folder=config.out)
    dataset = dataset.without(check.unreadable)
    check_images(found, dataset.fingerprint(), accept_changes=accept_changes)
    if world.is_main:
        check.save(config.out)
    dataset = dataset.in_memory(config.images.cache_mib, progress=world.is_main)
    evaluate = None if network is None else periodic_evaluation(config, dataset, world, network)
    result = train(
        config, dataset, world=world, resume=resume, accept_changes=accept_changes, evaluate=evaluate
    )
    if world.is_main and (line := finish_run(config.out)):
        say(line)
    stopped = f"Stopped at iteration {result.iteration}"
    if result.collapsed:
        say(f"{stopped} by a sign of collapse (see above); saved {result.checkpoint}")
        return COLLAPSED
    if result.interrupted:
        say(f"{stopped}; resume with the same command and --resume.")
        return INTERRUPTED
    say(
        f"Done: {result.iteration} iterations. Checkpoint {result.checkpoint}, grids in {config.out / 'samples'}."
    )
    return 0


def describe_config(config: RunConfig) -> str:
    """Return the resolved configuration, one value per line, with marks where it differs from the recipe."""
    changed = differences(RECIPES[config.recipe](), config)
    lines = [f"Recipe {config.recipe}; * marks what differs from it"]
    for name, value in config.by_name().items():
        if name != "recipe":
            lines.append(f"{'*' if name in changed else ' '} {name:<32} {value}")
    if config.network.num_classes is not None:
        with torch.device("meta"):
            counts = [count_parameters(kind(config.network)) for kind in (Generator, Discriminator)]
        lines.append(f"  parameters: G {counts[0]:,}, D {counts[1]:,}")
    return "\n".join(lines)


def _resolved(config: RunConfig, dataset: ImageDataset) -> RunConfig:
    """Return the configuration with the values that the data determine."""
    classes, found = config.network.num_classes, dataset.num_classes
    if classes not in (None, 0, found):
        raise UserError(
            f"network.num_classes: the data has {found} classes, got {classes} (0 is unconditional)"
        )
    return replace(
        config,
        network=replace(config.network, num_classes=found if classes is None else classes),
        images=replace(config.images, resample=dataset.resample, draft=dataset.draft),
    )
