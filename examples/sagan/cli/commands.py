"""The subcommands of ``imagenet_sagan.py``: their options, and what they do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import torch
import tyro
from PIL import Image

from sagan.data import (
    ImageDataset,
    ImageFolderDataset,
    ImageTree,
    PackedDataset,
    is_prepared,
    read_manifest,
    scan_image_tree,
    verify,
)
from sagan.data.packed import MANIFEST
from sagan.data.preflight_run import checked_tree
from sagan.data.synthetic import SyntheticSet, write_layout
from sagan.data.threads import usable_cpus
from sagan.demo.run import run_demo
from sagan.distributed import World, init_world, pick_device
from sagan.errors import UserError, check_is_new
from sagan.evaluation.evaluator import feature_network
from sagan.evaluation.periodic import evaluation_in_training
from sagan.networks import Discriminator, Generator, count_parameters
from sagan.prepare import Kind, SourceOptions, format_report, list_source, prepare
from sagan.recipes import DEFAULT_RECIPE, RECIPES, RunConfig, differences
from sagan.report.comparison import compare_runs
from sagan.report.figures import attention_maps, default_points, save_attention_figure, save_grid, save_image
from sagan.report.page import draw_run, write_report
from sagan.sampling import (
    TrainedGenerator,
    claim_folder,
    load_generator,
    numbered_samples,
    sample_inputs,
    to_uint8,
)
from sagan.train.allocator import keep_freed_memory
from sagan.train.checkpoint import checkpoints_in
from sagan.train.loop import check_images, check_start, check_unused, save_config, train

T = TypeVar("T")
# Exit codes besides 0, 1 (an error, in plain words) and 2 (wrong arguments).
INTERRUPTED = 75  # stopped by a signal, a checkpoint is saved
COLLAPSED = 76  # stopped by a sign of collapse, a checkpoint is saved
Weights = Literal["auto", "ema", "raw"]


@dataclass(frozen=True)
class Train:
    """Train on a set that ``prepare`` made, or on a folder of images: DATA/train/<class>/*.JPEG.

    Starts from a recipe, changed by the options given. The images are checked before the first step. Stopped by
    Ctrl-C it saves a checkpoint; --resume goes on from there. Started by torchrun, its processes train as one.

    Attributes:
        run: the run.
        resume: go on with the run in --out.
        auto_resume: go on with the run in --out if there is one, else start it; what torchrun's restarts do.
        accept_changes: resume although the configuration or the images have changed.
        dry_run: print and save the resolved configuration, and stop.
    """

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    resume: bool = False
    auto_resume: bool = False
    accept_changes: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Prepare:
    """Pack images into one array that training reads fast: once, before training.

    Sources: ILSVRC2012_img_train.tar (nothing is unpacked), a folder of its class archives, ILSVRC2012_img_val.tar or a
    folder of its images with their ground truth, a folder with a folder of images for each class, parquet shards
    of the Hugging Face hub. Stopped or killed, the same command goes on where it was.

    Attributes:
        source: file, folder, or pattern of parquet files.
        out: the folder to make; it appears when it is whole.
        resolution: side of the images in pixels.
        resample: filter of the antialiased resize: bilinear, bicubic, lanczos or box.
        kind: what the source is: auto, class-tars, flat, folder or parquet.
        split: the part to take, where the source has several.
        ground_truth: classes of images without class folders: LOC_val_solution.csv, a text file with a WNID a line,
            or ILSVRC's development kit (folder or .tar.gz); by default looked for beside the source.
        synsets: what the development kit's numbers mean, if meta.mat does not lie beside them.
        words: human names of the classes: LOC_synset_mapping.txt or the like; by default looked for beside the source.
        workers: processes that decode; by default one for each CPU.
        part_size: images that a process takes at a time: a killed run redoes those under way; by default a 64th of
            all, from 16 to 1024.
        verify: check this finished set instead, and say what is wrong with it.
    """

    source: str | None = None
    out: Path | None = None
    resolution: int = 128
    resample: Literal["bilinear", "bicubic", "lanczos", "box"] = "bilinear"
    kind: Kind = "auto"
    split: str = "train"
    ground_truth: Path | None = None
    synsets: Path | None = None
    words: Path | None = None
    workers: int | None = None
    part_size: int | None = None
    verify: Path | None = None


@dataclass(frozen=True)
class MakeImages:
    """Generate images in ImageNet's own layouts, to try ``prepare`` and ``train`` without ImageNet.

    Attributes:
        out: folder to write to, not there yet or empty.
        layout: "folder" (train/ and val/ with class folders), "tars" (ILSVRC2012_img_train.tar, ..._val.tar and the
            development kit) or "parquet" (shards as on the Hugging Face hub).
        images: what to generate.
    """

    out: Path
    layout: Literal["folder", "tars", "parquet"] = "tars"
    images: Annotated[SyntheticSet, tyro.conf.arg(name="")] = field(default_factory=SyntheticSet)


@dataclass(frozen=True)
class Sample:
    """Generate images from a trained run: one labelled grid, or a PNG for each in a folder of its class.

    Sample i depends on the seed and i alone. Several processes share the work when started by torchrun, or with
    --process and --num-processes, and write the images that one would. Folders are never mixed with other samples.

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
class Plot:
    """Draw the curves of a run, finished or not: losses, logits, gamma, sigma, speed, scores.

    Attributes:
        source: folder of a run.
        out: the PNG; curves.png in the run's folder by default.
    """

    source: Path
    out: Path | None = None


@dataclass(frozen=True)
class Report:
    """Write one HTML page about a run, with its curves and pictures inside.

    Attributes:
        source: folder of a run.
        out: the file; report.html in the run's folder by default.
    """

    source: Path
    out: Path | None = None


@dataclass(frozen=True)
class Compare:
    """Draw figures of several runs over the iterations, and a table of the best of each.

    Takes what `evaluate` and `train --evaluation.every` wrote into the runs' folders. Figures of different protocols
    get panels and columns of their own.

    Attributes:
        runs: folders of runs.
        out: folder for comparison.md and comparison.png.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    out: Path = Path("comparison")


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
    with init_world(config.device) as world:
        if world.device.type == "cpu":
            keep_freed_memory()
        return _train(command, world)


def _train(command: Train, world: World) -> int:
    config = command.run
    tree = packed = None
    if config.data is not None and is_prepared(config.data):
        packed = PackedDataset(config.data, config.network.resolution)
        config = _with_classes(config, packed.num_classes)
        config = replace(config, images=replace(config.images, resample=packed.manifest.filter, draft=False))
    elif config.data is not None:
        tree = scan_image_tree(config.data, split=config.images.split)
        config = _with_classes(config, tree.num_classes)
    say = print if world.is_main else _say_nothing
    say(describe_config(config))
    has_run = bool(checkpoints_in(config.out / "checkpoints"))
    if command.dry_run:
        if has_run:
            say(f"\nNot saved: {config.out} holds a run already. Dry run: stopping here.")
        elif world.is_main:
            say(f"\nSaved as {save_config(config)}. Dry run: stopping here.")
        return 0
    say()
    # A restart by torchrun is of a run that has begun, whatever the command says.
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    resume = command.resume or (has_run and (command.auto_resume or restarted))
    found = check_start(config, resume=resume, accept_changes=command.accept_changes)
    if not (resume or command.auto_resume or restarted):
        check_unused(config.out)
    network = None  # a file that is missing or another's is refused before anything takes time
    if config.evaluation.every:
        network = feature_network(config.evaluation, world.device, resolution=config.network.resolution)
    config.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.step.tf32
    dataset: ImageDataset
    if packed is not None:
        dataset, fingerprint = packed, packed.fingerprint
        check_images(found, fingerprint, accept_changes=command.accept_changes)
        world.run_on_main(lambda: _check_packed(packed, config))
    else:
        assert tree is not None
        report, seen = config.out / "preflight.json", config.out / "preflight.json.new"
        dataset, fingerprint = _checked_images(tree, config, world, seen)
        try:
            check_images(found, fingerprint, accept_changes=command.accept_changes)
            if world.is_main:
                seen.replace(report)
        finally:
            if world.is_main:
                seen.unlink(missing_ok=True)
    evaluate = None if network is None else evaluation_in_training(config, dataset, world, network)
    result = train(
        config,
        dataset,
        fingerprint=fingerprint,
        world=world,
        resume=resume,
        accept_changes=command.accept_changes,
        evaluate=evaluate,
    )
    if result.collapsed:
        say(
            f"Stopped at iteration {result.iteration} by a sign of collapse (above), saved as {result.checkpoint}"
        )
        return COLLAPSED
    if result.interrupted:
        say(f"Stopped at iteration {result.iteration}; go on with the same command and --resume.")
        return INTERRUPTED
    say(
        f"Done: {result.iteration} iterations. Checkpoint {result.checkpoint}, grids in {config.out / 'samples'}."
    )
    return 0


def _say_nothing(*_: object) -> None:
    """What processes other than the first say."""


def _check_packed(packed: PackedDataset, config: RunConfig) -> None:
    """Print what a prepared set is and keep its manifest with the run; with --images.check full read it whole."""
    print(packed.manifest.describe() + "\n")
    if config.images.check == "full" and (wrong := verify(packed.manifest.folder, progress=True)):
        raise UserError(f"the prepared set in {packed.manifest.folder} is damaged: {'; '.join(wrong)}")
    (config.out / "data_manifest.json").write_bytes((packed.manifest.folder / MANIFEST).read_bytes())


def _checked_images(
    tree: ImageTree, config: RunConfig, world: World, report: Path
) -> tuple[ImageFolderDataset, str]:
    """Return the images of a tree that can be read, after a look at all of them, and their fingerprint."""
    tree = checked_tree(tree, config, world, report_path=report)
    dataset = ImageFolderDataset(
        tree,
        config.network.resolution,
        resample=config.images.resample,
        draft=config.images.draft,
        cache_mib=config.images.cache_mib,
        progress=world.is_main,
    )
    return dataset, tree.fingerprint()


def run_prepare(command: Prepare) -> int:
    """Run ``prepare`` and return the exit code."""
    if command.verify is not None:
        return _verify(command.verify)
    for name in ("source", "out"):
        if getattr(command, name) is None:
            raise UserError(f"{name}: expected --{name}, got none (or --verify DIR)")
    assert command.source is not None
    assert command.out is not None
    for name in ("resolution", "workers", "part_size"):
        value = getattr(command, name)
        if value is not None and value < 1:
            raise UserError(f"{name}: expected at least 1, got {value}")
    options = SourceOptions(
        kind=command.kind,
        split=command.split,
        ground_truth=command.ground_truth,
        synsets=command.synsets,
        words=command.words,
        workers=command.workers or usable_cpus(),
    )
    try:
        listing = list_source(command.source, options)
        print(listing.describe(), flush=True)
        prepared = prepare(
            listing,
            command.out,
            resolution=command.resolution,
            resample=command.resample,
            workers=command.workers,
            part_size=command.part_size,
            progress=True,
        )
    except KeyboardInterrupt:
        print("\nStopped; what is finished is kept. The same command goes on from there.")
        return INTERRUPTED
    if not prepared.report:
        print(f"{command.out} is finished already; --verify checks it.")
        return 0
    if prepared.reused:
        print(f"{prepared.reused:,} images were finished before and have been checked.")
    print(f"\n{format_report(prepared.report)}\n\n{prepared.manifest.describe()}")
    if prepared.packed:
        rate = prepared.packed / prepared.seconds
        print(
            f"  {prepared.packed:,} images read at {rate:,.0f} a second; {prepared.total_seconds:.1f} s in all"
        )
    return 0


def _verify(folder: Path) -> int:
    wrong = verify(folder, progress=True)
    if wrong:
        print(f"{folder} is not sound:")
        print("\n".join(f"  {problem}" for problem in wrong))
        return 1
    print(f"{read_manifest(folder).describe()}\nSound: every image and file is as it was written.")
    return 0


def run_make_images(command: MakeImages) -> int:
    """Run ``make-images`` and return the exit code."""
    check_is_new(command.out)
    write_layout(command.out, command.layout, command.images)
    made = command.images
    print(
        f"{made.classes * made.images:,} training and {made.classes * made.val_images:,} validation images in "
        f"{made.classes} classes written to {command.out}"
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
    claim_folder(command.out, trained, count=command.count, seed=command.seed, classes=labels_in_use.tolist())
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
    suffix = command.out.suffix.lower()
    if suffix != ".png" and suffix in Image.registered_extensions():
        raise UserError(f"out: expected a PNG or a folder, got {command.out}")
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
    path = command.out if suffix == ".png" else command.out / "grid.png"
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


def run_plot(command: Plot) -> int:
    """Run ``plot`` and return the exit code."""
    print(f"Written: {draw_run(command.source, command.out or command.source / 'curves.png')}")
    return 0


def run_report(command: Report) -> int:
    """Run ``report`` and return the exit code."""
    print(f"Written: {write_report(command.source, command.out)}")
    return 0


def run_compare(command: Compare) -> int:
    """Run ``compare`` and return the exit code."""
    if not command.runs:
        raise UserError("runs: expected the folders of one or more, got none")
    written = compare_runs(command.runs, command.out)
    print(written[0].read_text(encoding="utf-8"))
    print(f"Written: {', '.join(map(str, written))}")
    return 0


def run_demo_command(command: Demo) -> int:
    """Run ``demo`` and return the exit code."""
    config = replace(RECIPES["digits"](), out=command.out, iterations=command.iterations, seed=command.seed)
    keep_freed_memory()
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
