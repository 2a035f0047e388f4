"""The subcommand ``train``."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import tyro

from sagan.cli.options import flag_of, given_value
from sagan.cli.parsing import COLLAPSED, HELP, INTERRUPTED
from sagan.contents import holds_prepared_set
from sagan.data import ImageDataset, Manifest, check_dataset, open_dataset, read_manifest
from sagan.distributed import World, init_world
from sagan.errors import UserError, check_out_folder
from sagan.evaluation.feature_networks import load_feature_network
from sagan.evaluation.periodic import periodic_evaluation
from sagan.names import program_name
from sagan.networks import RESOLUTIONS, Discriminator, Generator, count_parameters
from sagan.recipes import DEFAULT_RECIPE, RECIPES, RunConfig, at_resolution, differences, read_config
from sagan.report.page import finish_run
from sagan.train.allocator import keep_freed_memory
from sagan.train.checkpoint import checkpoints_in
from sagan.train.loggers import check_loggers
from sagan.train.loop import train
from sagan.train.memory import as_begun, check_memory
from sagan.train.output import save_config
from sagan.train.resume import check_images, check_start, check_unused, has_started, images_of, run_lock

_RESOLUTION = "--network.resolution"


@dataclass(frozen=True)
class Train:
    """Train on a prepared set, or on a folder of images: DATA/train/<class>/*.JPEG.

    A recipe gives the defaults of all other options, and a prepared set those of resolution and classes. All images are
    checked before the first iteration. Ctrl-C saves a checkpoint, and --resume continues from it. With torchrun, all
    processes train one run.

    Attributes:
        run: the run.
        resume: resume the run in --out.
        auto_resume: resume the run in --out if there is one, else start it, as restarts by torchrun do.
        accept_changes: resume even if the configuration or the images have changed.
        dry_run: print and save the resolved configuration, then stop.
        fit_memory: if a step needs more memory than there is, split the batch into parts or checkpoint activations.
        ignore_memory: train although a step may need more memory than there is; it is not measured.
    """

    required: ClassVar[dict[str, str]] = {"data": "required, but for --dry-run"}
    # What --help shows, in this order; the rest is in --help-all.
    common: ClassVar[tuple[str, ...]] = (
        *("--data", "--out", "--recipe", "--network.resolution", "--iterations", "--batch-size"),
        *("--fit-memory", "--precision", "--device", "--seed", "--resume", "--dry-run"),
    )

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    resume: bool = False
    auto_resume: bool = False
    accept_changes: bool = False
    dry_run: bool = False
    fit_memory: bool = False
    ignore_memory: bool = False

    def __post_init__(self) -> None:
        if self.fit_memory and self.ignore_memory:
            raise UserError("fit_memory, ignore_memory: expected one at most, got both")


def defaults(arguments: Sequence[str]) -> Train:
    """Return the defaults of ``train`` for the recipe and the prepared set in the arguments.

    Raises:
        UserError: if the recipe is unknown, the networks do not make images of the set's resolution, or an option says
            another one.
    """
    name = given_value(arguments, "--recipe") or DEFAULT_RECIPE
    if name not in RECIPES:
        raise UserError(f"recipe: expected one of {', '.join(RECIPES)}; got {name!r}")
    config = RECIPES[name]()
    resolution = given_value(arguments, _RESOLUTION) or ""
    if resolution.isdecimal() and int(resolution) in RESOLUTIONS:
        config = at_resolution(config, int(resolution))
    given = given_value(arguments, "--data")
    data = Path(os.path.expanduser(given or ""))  # noqa: PTH111  (Path.expanduser raises for unknown users)
    if not given or any(each in HELP for each in arguments) or not holds_prepared_set(data):
        return Train(run=config)
    manifest = read_manifest(data)
    if manifest.resolution not in RESOLUTIONS:
        raise UserError(_unsupported(manifest))
    if resolution and resolution != str(manifest.resolution):
        raise UserError(
            f"{_RESOLUTION}: expected {manifest.resolution}, as the images in {data} have, or no such option, got "
            f"{resolution}. This works:\n  {_without(arguments, _RESOLUTION)}"
        )
    return Train(run=at_resolution(config, manifest.resolution))


def _unsupported(manifest: Manifest) -> str:
    """Return the message for a set of which the networks make no images."""
    resolution = max((each for each in RESOLUTIONS if each <= manifest.resolution), default=RESOLUTIONS[0])
    out = manifest.folder.with_name(f"{manifest.folder.name}_{resolution}")
    options = ["--source", manifest.source["path"], "--out", str(out), "--resolution", str(resolution)]
    return (
        f"data: expected images of {', '.join(map(str, RESOLUTIONS[:-1]))} or {RESOLUTIONS[-1]} pixels, which the "
        f"networks make; got {manifest.resolution} in {manifest.folder}. Prepare the images again:\n"
        f"  {program_name()} prepare {shlex.join(options)}\n"
        f"  {program_name()} train --data {shlex.quote(str(out))}"
    )


def _without(arguments: Sequence[str], flag: str) -> str:
    """Return the command line without an option and its value."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if flag_of(word) != flag:
            kept.append(word)
        elif "=" not in word:
            next(words, None)
    return f"{program_name()} train {shlex.join(kept)}"


def run(command: Train) -> int:
    """Run ``train`` and return the exit code."""
    check_out_folder(command.run.out)
    config = command.run
    if config.data is None and not command.dry_run:
        raise UserError("data: expected a prepared set or a folder of images, got none")
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
    has_run = bool(checkpoints_in(config.out / "checkpoints"))
    # torchrun restarts the same command after a failure: the run has begun, even without --resume.
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    resume = command.resume or (has_run and (command.auto_resume or restarted))
    if command.fit_memory and resume and has_run:
        config = as_begun(config, read_config(config.out))
    say(describe_config(config, dataset))
    world.run_on_main(lambda: check_loggers(config.output))
    if command.dry_run:
        config = _fitting(command, config, dataset, world, resumes=resume)
        if has_run or has_started(config.out):
            say(f"Not written: {config.out} already holds a run. Dry run: stopping here.")
        elif world.is_main:
            say(f"Written: {save_config(config)}, all values. Dry run: stopping here.")
        return 0
    assert dataset is not None
    say()
    accept_changes = command.accept_changes
    begun = images_of(check_start(config, resume=resume, accept_changes=accept_changes))
    if not (resume or command.auto_resume or restarted):
        check_unused(config.out)
    config = _fitting(command, config, dataset, world, resumes=resume)
    network = None  # loaded early: a missing or wrong file fails before the images are read
    if config.evaluation.every:
        network = load_feature_network(config.evaluation, world.device, resolution=config.network.resolution)
    config.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.step.tf32
    check = check_dataset(dataset, config.images.check, world)
    dataset = dataset.without(check.unreadable)
    check_images(begun, dataset.fingerprint(), accept_changes=accept_changes)
    if world.is_main:
        print(f"Written: {save_config(config)}, all values; {check.save(config.out)}, all about the images\n")
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


def _fitting(
    command: Train, config: RunConfig, dataset: ImageDataset | None, world: World, *, resumes: bool
) -> RunConfig:
    """Return the configuration, with ``--fit-memory`` one whose step fits into memory."""
    if command.ignore_memory:
        return config
    return check_memory(
        config, dataset, world, fit=command.fit_memory, refuse=not command.dry_run, resumes=resumes
    )


def describe_config(config: RunConfig, dataset: ImageDataset | None) -> str:
    """Return what differs from the recipe, what the images are, and how many parameters the networks have."""
    recipe, network = RECIPES[config.recipe](), config.network
    hidden = {"data", "out"}  # said elsewhere
    if dataset is not None and network.num_classes == dataset.num_classes:
        hidden.add("network.num_classes")
    changed = {name: both for name, both in differences(config, recipe).items() if name not in hidden}
    lines = [f"Recipe {config.recipe}" + (", but for:" if changed else "")]
    width = max(map(len, changed), default=0)
    lines += [
        f"  {name:<{width}}  {_shown(now)} (recipe: {_shown(was)})" for name, (now, was) in changed.items()
    ]
    moved = at_resolution(recipe, network.resolution).network
    if moved.g_attention == network.g_attention != recipe.network.g_attention:
        before, after = _maps(recipe.network.g_attention), _maps(network.g_attention)
        lines.append(
            f"Attention moved to {after}: as much of {network.resolution} pixels as the recipe's {before} of "
            f"{recipe.network.resolution}"
        )
    if dataset is not None:
        classes = f"in {dataset.num_classes:,} classes" if network.num_classes else "without classes"
        lines.append(
            f"Images: {len(dataset):,} {classes}, {network.resolution}x{network.resolution}, from {config.data}"
        )
    if network.num_classes is not None:
        with torch.device("meta"):
            counts = [count_parameters(kind(network)) for kind in (Generator, Discriminator)]
        lines.append(f"Parameters: G {counts[0]:,}, D {counts[1]:,}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return (
        "none"
        if value in (None, [])
        else " ".join(map(str, value))
        if isinstance(value, list)
        else str(value)
    )


def _maps(resolutions: Sequence[int]) -> str:
    return ", ".join(f"{each}x{each}" for each in resolutions)


def _resolved(config: RunConfig, dataset: ImageDataset) -> RunConfig:
    """Return the configuration with the values that the data determine."""
    classes, found = config.network.num_classes, dataset.num_classes
    if classes not in (None, 0, found):
        raise UserError(
            f"network.num_classes: expected {found}, the classes of {config.data}, or 0 to train without, got {classes}"
        )
    if classes is None:
        classes = found if found > 1 else 0  # one class tells the networks nothing
    return replace(
        config,
        network=replace(config.network, num_classes=classes),
        images=replace(config.images, resample=dataset.resample, draft=dataset.draft),
    )
