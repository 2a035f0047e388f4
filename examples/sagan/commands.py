"""The subcommands of ``imagenet_sagan.py``: their options, and what they do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import torch
import tyro

from sagan.checkpoints import checkpoints_in
from sagan.data import ImageFolderDataset, preflight, scan_image_tree
from sagan.demo import run_demo
from sagan.errors import UserError
from sagan.figures import attention_maps, default_points, save_attention_figure, save_grid, save_image
from sagan.networks import Discriminator, Generator, count_parameters
from sagan.recipes import DEFAULT_RECIPE, RECIPES, RunConfig, differences
from sagan.sampling import TrainedGenerator, load_generator, numbered_samples, sample_inputs, to_uint8
from sagan.training import check_start, pick_device, save_config, train

T = TypeVar("T")
INTERRUPTED = 75  # exit code: stopped by a signal, a checkpoint is saved
Weights = Literal["auto", "ema", "raw"]


@dataclass(frozen=True)
class Train:
    """Train on a folder of images: DATA/train/<class>/*.JPEG or DATA/<class>/*.JPEG.

    Starts from a recipe, changed by the options given. The images are checked before the first step. Stopped by
    Ctrl-C it saves a checkpoint; --resume goes on from there.

    Attributes:
        run: the run.
        resume: go on with the run in --out.
        dry_run: print and save the resolved configuration, and stop.
    """

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    resume: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Sample:
    """Generate images from a trained run: one labelled grid, or a PNG for each in a folder of its class.

    Sample i depends on the seed and i alone. Several processes share the work when started by torchrun, or with
    --process and --num-processes, and write the images that one would.

    Attributes:
        source: folder of a run, or a checkpoint.
        out: where to: for a grid the PNG (or a folder to put grid.png into), else the folder.
        layout: "grid" or "folders".
        count: number of images; for a grid rounded up to whole rows, one for each
            of --classes at least.
        classes: labels (numbers from 0) or names of the classes; by default all, and for a grid ten of them.
        seed: of the set of samples.
        weights: moving average ("ema"), the weights themselves ("raw"), or the average if there is one.
        batch_size: images at a time.
        columns: images in a row of the grid.
        device: "auto", "cpu", "cuda", ...
        process: number of this process, from 0.
        num_processes: how many share the work.
    """

    source: Path
    out: Path = Path("samples")
    layout: Literal["grid", "folders"] = "grid"
    count: int = 100
    classes: tuple[str, ...] = ()
    seed: int = 0
    weights: Weights = "auto"
    batch_size: int = 50
    columns: int = 10
    device: str = "auto"
    process: int = int(os.environ.get("RANK", "0"))
    num_processes: int = int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class AttentionMaps:
    """Draw where chosen points of generated images look (figure 5 of the paper).

    Attributes:
        source: folder of a run, or a checkpoint.
        out: the PNG.
        count: number of images.
        points: query points as ROW,COLUMN in pixels of the image; by default the centre and four others.
        classes: labels (numbers from 0) or names of the classes to go through; by default all.
        seed: of the set of samples.
        weights: moving average ("ema"), the weights themselves ("raw"), or the average if there is one.
        device: "auto", "cpu", "cuda", ...
    """

    source: Path
    out: Path = Path("attention_maps.png")
    count: int = 8
    points: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    seed: int = 0
    weights: Weights = "auto"
    device: str = "auto"


@dataclass(frozen=True)
class Demo:
    """Train on scikit-learn's handwritten digits: minutes on two CPU cores, nothing to download.

    Attributes:
        out: folder to write to.
        iterations: how long to train.
        seed: of everything random.
    """

    out: Path = Path("runs/demo")
    iterations: int = RECIPES["digits"]().iterations
    seed: int = 0


def run_train(command: Train) -> int:
    """Run ``train`` and return the exit code."""
    config = command.run
    if config.data is None and not command.dry_run:
        raise UserError("data: expected --data with the folder that holds the images, got none")
    tree = None
    if config.data is not None:
        tree = scan_image_tree(config.data, split=config.images.split)
        config = _with_classes(config, tree.num_classes)
    print(describe_config(config))
    if command.dry_run:
        if checkpoints_in(config.out / "checkpoints"):
            print(f"\nNot saved: {config.out} holds a run already. Dry run: stopping here.")
        else:
            print(f"\nSaved as {save_config(config)}. Dry run: stopping here.")
        return 0
    assert tree is not None
    print()
    pick_device(config.device)
    check_start(config, resume=command.resume)
    config.out.mkdir(parents=True, exist_ok=True)
    report = preflight(
        tree,
        resolution=config.network.resolution,
        mode=config.images.check,
        resample=config.images.resample,
        progress=True,
        report_path=config.out / "preflight.json",
    )
    print(report.format() + "\n")
    tree = tree.without(report.unreadable_paths)
    dataset = ImageFolderDataset(
        tree,
        config.network.resolution,
        resample=config.images.resample,
        draft=config.images.draft,
        cache_mib=config.images.cache_mib,
        progress=True,
    )
    result = train(config, dataset, fingerprint=tree.fingerprint(), resume=command.resume)
    if result.interrupted:
        print(f"Stopped at iteration {result.iteration}; go on with the same command and --resume.")
        return INTERRUPTED
    print(
        f"Done: {result.iteration} iterations. Checkpoint {result.checkpoint}, grids in {config.out / 'samples'}."
    )
    return 0


def run_sample(command: Sample) -> int:
    """Run ``sample`` and return the exit code."""
    for name in ("count", "batch_size", "columns", "num_processes"):
        if getattr(command, name) < 1:
            raise UserError(f"{name}: expected at least 1, got {getattr(command, name)}")
    if not 0 <= command.process < command.num_processes:
        raise UserError(f"process: expected from 0 to {command.num_processes - 1}, got {command.process}")
    trained = load_generator(command.source, pick_device(command.device), weights=command.weights)
    labels_in_use = _chosen_classes(command.classes, trained)
    if command.layout == "grid":
        return _sample_grid(command, trained, labels_in_use)
    written = 0
    for numbers, images, labels in numbered_samples(
        trained,
        command.count,
        seed=command.seed,
        batch_size=command.batch_size,
        rank=command.process,
        num_processes=command.num_processes,
        labels_in_use=labels_in_use,
    ):
        for number, image, label in zip(numbers, images, labels, strict=True):
            folder = _class_name(trained, int(label)) or "images"
            save_image(command.out / folder / f"{number:06d}.png", image)
            written += 1
    print(f"{written} images written to {command.out} ({_describe(trained)}, seed {command.seed})")
    return 0


def _sample_grid(command: Sample, trained: TrainedGenerator, labels_in_use: torch.Tensor) -> int:
    if command.num_processes > 1:
        raise UserError("layout: expected 'folders' with several processes, got 'grid'")
    rows = max(-(-command.count // command.columns), len(command.classes))
    conditional = bool(trained.config.network.num_classes)
    if conditional and not command.classes and len(labels_in_use) > rows:
        places = torch.linspace(0, len(labels_in_use) - 1, rows).round().long()
        labels_in_use = labels_in_use[places]
    wanted = rows * command.columns
    found: dict[int, list[torch.Tensor]] = {}
    # Whole rounds through the classes, so that each row gets as many as it has columns.
    per_class = -(-rows // len(labels_in_use)) * command.columns
    for _, images, labels in numbered_samples(
        trained,
        per_class * len(labels_in_use),
        seed=command.seed,
        batch_size=command.batch_size,
        labels_in_use=labels_in_use,
    ):
        for image, label in zip(images, labels.tolist(), strict=True):
            found.setdefault(label, []).append(image)
    ordered = [image for label in labels_in_use.tolist() for image in found[label]][:wanted]
    row_labels = [label for label in labels_in_use.tolist() for _ in range(per_class // command.columns)]
    names = [_class_name(trained, label) or "" for label in row_labels[:rows]] if conditional else None
    path = command.out if command.out.suffix.lower() == ".png" else command.out / "grid.png"
    save_grid(path, torch.stack(ordered), columns=command.columns, row_names=names)
    print(f"{len(ordered)} images written to {path} ({_describe(trained)}, seed {command.seed})")
    return 0


def run_attention_maps(command: AttentionMaps) -> int:
    """Run ``attention-maps`` and return the exit code."""
    if command.count < 1:
        raise UserError(f"count: expected at least 1, got {command.count}")
    device = pick_device(command.device)
    trained = load_generator(command.source, device, weights=command.weights)
    network = trained.config.network
    points = [_point(text) for text in command.points] or default_points(network.resolution)
    chosen = _chosen_classes(command.classes, trained)
    latents, labels = sample_inputs(range(command.count), network, command.seed, chosen)
    images, maps, resolution = attention_maps(
        trained.generator,
        latents.to(device),
        labels.to(device) if network.num_classes else None,
        points,
    )
    names = [_class_name(trained, int(label)) or "" for label in labels]
    title = f"Where the marked points look (G's attention at {resolution}x{resolution})"
    save_attention_figure(command.out, to_uint8(images), maps, points, names=names, title=title)
    print(
        f"{command.count} images with {len(points)} maps each written to {command.out} ({_describe(trained)})"
    )
    return 0


def run_demo_command(command: Demo) -> int:
    """Run ``demo`` and return the exit code."""
    config = replace(RECIPES["digits"](), out=command.out, iterations=command.iterations, seed=command.seed)
    result, verdict = run_demo(config)
    if verdict is None:
        print(f"Stopped at iteration {result.iteration}; the same command goes on from there.")
        return INTERRUPTED
    return 0


def describe_config(config: RunConfig) -> str:
    """Return the resolved configuration, a line for each value, those marked that differ from the recipe's."""
    changed = differences(RECIPES[config.recipe](), config)
    lines = [f"Recipe {config.recipe}; * marks what differs from it"]

    def add(values: dict[str, object], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                add(value, f"{prefix}{name}.")
            elif name != "recipe":
                mark = "*" if prefix + name in changed else " "
                lines.append(f"{mark} {prefix + name:<32} {value}")

    add(config.to_dict(), "")
    if config.network.num_classes is not None:
        with torch.device("meta"):
            counts = [count_parameters(kind(config.network)) for kind in (Generator, Discriminator)]
        lines.append(f"  parameters: G {counts[0]:,}, D {counts[1]:,}")
    return "\n".join(lines)


def _with_classes(config: RunConfig, found: int) -> RunConfig:
    wanted = config.network.num_classes
    if wanted is None:
        return replace(config, network=replace(config.network, num_classes=found))
    if wanted not in (0, found):
        raise UserError(
            f"network.num_classes: the data has {found} classes, got {wanted} (0 is unconditional)"
        )
    return config


def _chosen_classes(classes: Sequence[str], trained: TrainedGenerator) -> torch.Tensor:
    """Return labels for what the user wrote: names or numbers."""
    if not classes:
        return trained.labels_in_use
    if not trained.config.network.num_classes:
        raise UserError("classes: expected none, the run is unconditional")
    labels = []
    for text in classes:
        if text in trained.class_names:  # a name first: the digits' names are numbers
            labels.append(trained.class_names.index(text))
        elif text.isdecimal() and int(text) < len(trained.class_names):
            labels.append(int(text))
        else:
            raise UserError(
                f"classes: expected a class's name or a label from 0 to {len(trained.class_names) - 1}, got {text!r}"
            )
    return torch.tensor(labels)


def _class_name(trained: TrainedGenerator, label: int) -> str | None:
    return trained.class_names[label] if trained.config.network.num_classes else None


def _point(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"points: expected ROW,COLUMN such as 16,20, got {text!r}")
    return int(parts[0]), int(parts[1])


def _describe(trained: TrainedGenerator) -> str:
    weights = "averaged weights" if trained.averaged else "raw weights"
    return f"iteration {trained.iteration}, {weights}"


def parse_train(arguments: Sequence[str]) -> Train:
    """Parse the options of ``train``: the recipe first, for it sets what the others change."""
    name = DEFAULT_RECIPE
    for number, argument in enumerate(arguments):
        if argument == "--recipe" and number + 1 < len(arguments):
            name = arguments[number + 1]
        elif argument.startswith("--recipe="):
            name = argument.removeprefix("--recipe=")
    if name not in RECIPES:
        raise UserError(f"recipe: expected one of {', '.join(RECIPES)}; got {name!r}")
    return parse(Train, "train", arguments, Train(run=RECIPES[name]()))


def parse(kind: type[T], name: str, arguments: Sequence[str], default: T | None = None) -> T:
    """Parse the options of a subcommand; unknown ones end the program with a message."""
    program = f"imagenet_sagan.py {name}"
    if default is None:
        return tyro.cli(kind, prog=program, args=list(arguments))
    return tyro.cli(kind, prog=program, args=list(arguments), default=default)
