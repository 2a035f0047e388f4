"""One HTML file with samples of a run and the attention of their points: nothing to install or to fetch."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sagan.data import open_dataset
from sagan.errors import UserError, check_at_least, listed
from sagan.explore.attention import AttentionLayer, attention_layers, attention_maps, gamma_of, quantized
from sagan.io import tensor_bytes
from sagan.names import in_html, printable
from sagan.networks import Discriminator
from sagan.sampling import TrainedGenerator, Weights, generator_of, sample_inputs, to_uint8
from sagan.train.checkpoint import kept_checkpoints, load_checkpoint

_TEMPLATE = Path(__file__).with_name("page.html")
_MIB = 2**20
_TAG_BYTES = 50  # around an asset
_MOST_POINTS, _FEWEST_POINTS = 64, 4  # side of the grid of query points
_MOST_ITERATIONS, _MOST_CLASSES = 5, 20  # where the user names none
_NOTES = (
    "A weight is stored in 8 bits, from 0 to the largest of its map: the error is at most 0.2% of the largest. "
    "At gamma 0 a layer adds nothing, whatever its map is."
)


@dataclass(frozen=True)
class PageOptions:
    """What a page shows.

    Attributes:
        classes: labels (numbers from 0) or names of the classes; by default all, or 20 of them.
        count: samples of each class.
        real: real images of each class, of those that the run was trained on; D looks at them.
        iterations: iterations whose checkpoints to show; by default all that the run kept, or 5 of them.
        seed: seed of the set of samples.
        weights: G's moving average ("ema"), current weights ("raw"), or the average if there is one ("auto").
        max_mib: the most that the page may take; there are maps of as many points as fit.
        compress: compress the maps, for browsers since 2023; without, the page is larger.
    """

    classes: tuple[str, ...] = ()
    count: int = 4
    real: int = 0
    iterations: tuple[int, ...] = ()
    seed: int = 0
    weights: Weights = "auto"
    max_mib: float = 20.0
    compress: bool = True

    def __post_init__(self) -> None:
        check_at_least(self, 1, "count")
        check_at_least(self, 0, "real")
        if not self.max_mib > 0:
            raise UserError(f"max_mib: expected more than 0, got {self.max_mib}")


@dataclass(frozen=True)
class Page:
    """A page, and what to say about it."""

    text: str
    summary: str


class _TooLargeError(Exception):
    """The page would be larger than allowed."""

    def __init__(self, size: float, run: _Run) -> None:
        super().__init__()
        self.needed_mib = size / _MIB  # about
        self.points = max(layer.points for layer in run.layers)


def explorer_page(
    source: Path, device: torch.device, options: PageOptions, *, progress: bool = False
) -> Page:
    """Return the page of a run's folder or a checkpoint.

    Raises:
        UserError: if the run has no attention or not what the options name, or if the page cannot be small enough.
    """
    paths = chosen_checkpoints(source, options.iterations)
    points = _MOST_POINTS
    while True:
        try:
            return _page(paths, source, device, options, points, progress)
        except _TooLargeError as error:
            needed, points = error.needed_mib, error.points
        if points <= _FEWEST_POINTS:
            raise UserError(
                f"max_mib: expected at least about {needed:.2g} for these samples, even with the maps of "
                f"{points} x {points} points only, got {options.max_mib:g}; a smaller --count, fewer --classes or "
                "fewer --iterations take less"
            )
        points //= 2


def chosen_checkpoints(source: Path, iterations: Sequence[int]) -> list[Path]:
    """Return the checkpoints of these iterations; by default some of those that a run kept, the last among them."""
    kept = kept_checkpoints(source)
    if source.is_file():
        return kept
    by_iteration = {int(path.stem.rpartition("_")[2]): path for path in kept}
    if missing := sorted(set(iterations) - set(by_iteration)):
        raise UserError(
            f"iterations: expected some of {listed(list(by_iteration))}, of which {source} kept checkpoints, got "
            f"{listed(missing)}"
        )
    if iterations:
        return [by_iteration[each] for each in sorted(set(iterations))]
    return [kept[place] for place in _spread(len(kept), _MOST_ITERATIONS)]


def _spread(count: int, most: int) -> list[int]:
    """Return at most ``most`` places from the first to the last of ``count``, evenly spaced."""
    return sorted(set(torch.linspace(0, count - 1, min(count, most)).round().int().tolist()))


def _page(
    paths: Sequence[Path],
    source: Path,
    device: torch.device,
    options: PageOptions,
    most_points: int,
    progress: bool,
) -> Page:
    run: _Run | None = None
    assets: dict[str, str] = {}
    size = done = 0
    with tqdm(desc="exploring", unit=" classes", disable=None if progress else True, leave=False) as bar:
        for number, path in enumerate(paths):
            networks = _load(path, device, options)
            run = run or _Run(networks[0], source, options, most_points)
            run.add_iteration(*networks)
            bar.total = len(paths) * len(run.labels)
            for place in range(len(run.labels)):
                for name, contents in run.assets_of_class(place, *networks):
                    text = base64.b64encode(contents).decode()
                    assets[name.format(iteration=number, place=place)] = text
                    size += len(text) + _TAG_BYTES
                bar.update()
                done += 1
                if size > options.max_mib * _MIB:
                    raise _TooLargeError(size * len(paths) * len(run.labels) / done, run)
    assert run is not None
    text = _filled(run.facts, assets)
    size = len(text.encode())
    if size > options.max_mib * _MIB:
        raise _TooLargeError(size, run)
    return Page(text, f"{size / _MIB:.2g} MiB: {run.summary}")


def _load(path: Path, device: torch.device, options: PageOptions) -> tuple[TrainedGenerator, Discriminator]:
    state = load_checkpoint(path)
    iteration = state["iteration"]
    if options.iterations and iteration not in options.iterations:
        raise UserError(f"iterations: expected {iteration}, that of {path}, got {listed(options.iterations)}")
    trained = generator_of(state, path, device, weights=options.weights)
    discriminator = Discriminator(trained.config.network)
    discriminator.load_state_dict(state["discriminator"])
    return trained, discriminator.to(device).eval()


class _Run:
    """What a page says about a run, and the pictures and maps of its classes."""

    def __init__(
        self, trained: TrainedGenerator, source: Path, options: PageOptions, most_points: int
    ) -> None:
        network = trained.config.network
        self.options = options
        self.layers = attention_layers(network, most_points)
        if not self.layers:
            raise UserError(
                f"explore: expected a run with attention, {source} has none (network.g_attention and d_attention are "
                f"{listed(network.g_attention)} and {listed(network.d_attention)}, mixer is {network.mixer!r})"
            )
        self.conditional = bool(network.num_classes)
        self.labels = _labels(trained, options.classes)
        self.real = _real_images(trained, self.labels, options.real, self.layers)
        name = printable(source.resolve().name)
        names = [trained.class_names[label] for label in self.labels] if self.conditional else ["all"]
        self.facts: dict[str, Any] = {
            "title": f"Attention of {name}",
            "about": f"{name}: {network.resolution} x {network.resolution} pixels. G has "
            f"{'averaged' if trained.averaged else 'current'} weights, D its current ones.",
            "notes": " ".join((_NOTES, *self._coarse())),
            "conditional": self.conditional,
            "classes": _told_apart(names, self.labels),
            "count": options.count,
            "real": [len(images) for images in self.real],
            "iterations": [],
            "layers": [{**vars(layer), "gammas": []} for layer in self.layers],
            "colours": matplotlib.colormaps["inferno"](range(256), bytes=True)[:, :3].tobytes().hex(),
            "compressed": options.compress,
        }

    def _coarse(self) -> list[str]:
        """Say which layers have fewer query points than their feature maps have places."""
        return [
            f"{layer.network}'s attention at {layer.resolution} x {layer.resolution} is kept of {layer.points} x "
            f"{layer.points} points, for a small page; the nearest one is shown."
            for layer in self.layers
            if layer.points < layer.resolution
        ]

    @property
    def summary(self) -> str:
        """What the page shows."""
        counts = f"{self.options.count} sample{'s' * (self.options.count > 1)}" + (
            f" of each of {len(self.labels)} classes" if self.conditional else ""
        )
        real = sum(self.facts["real"])
        layers = ", ".join(f"{layer.network} {layer.resolution}x{layer.resolution}" for layer in self.layers)
        iterations = ", ".join(map(str, self.facts["iterations"]))
        return "\n".join(
            (
                f"{counts}{f', {real} real images' if real else ''}; attention of {layers}; iteration {iterations}",
                *self._coarse(),
            )
        )

    def add_iteration(self, trained: TrainedGenerator, discriminator: Discriminator) -> None:
        """Note the iteration of a checkpoint, and the layers' gammas in it."""
        self.facts["iterations"].append(trained.iteration)
        for layer, described in zip(self.layers, self.facts["layers"], strict=True):
            network = trained.generator if layer.network == "G" else discriminator
            described["gammas"].append(gamma_of(network, layer))

    def assets_of_class(
        self, place: int, trained: TrainedGenerator, discriminator: Discriminator
    ) -> Iterator[tuple[str, bytes]]:
        """Yield what the page needs of a class in a checkpoint, with names for ``str.format``.

        These are PNGs, and the maps of each layer: of every image, first of all the largest weights, little-endian
        float32 [images, points], then of all the levels, uint8 [images, points, keys].
        """
        options, device = self.options, next(discriminator.parameters()).device
        chosen = self.labels[place : place + 1]
        latents, labels = sample_inputs(range(options.count), trained.config.network, options.seed, chosen)
        condition = labels.to(device) if self.conditional else None
        of_network = {name: [layer for layer in self.layers if layer.network == name] for name in "GD"}
        images, maps = attention_maps(trained.generator, of_network["G"], latents.to(device), condition)
        for number, image in enumerate(to_uint8(images)):
            yield f"image-{{iteration}}-{{place}}-{number}", _png(image)
        for number, image in enumerate(self.real[place]):
            yield f"real-{{place}}-{number}", _png(image)
        if of_network["D"]:
            real = self.real[place].to(device).float() / 127.5 - 1
            if condition is not None:
                condition = chosen.to(device).expand(len(images) + len(real))
            _, more = attention_maps(discriminator, of_network["D"], torch.cat((images, real)), condition)
            maps += more
        for number, each in enumerate(maps):
            levels, largest = quantized(each)
            packed = bytes(tensor_bytes(largest)) + bytes(tensor_bytes(levels))
            yield (
                f"maps-{{iteration}}-{{place}}-{number}",
                zlib.compress(packed, 9) if options.compress else packed,
            )


def _labels(trained: TrainedGenerator, classes: Sequence[str]) -> Tensor:
    """Return the labels of classes, each once; without any, at most 20 of those in use."""
    labels = trained.chosen_labels(classes)
    if not trained.config.network.num_classes:
        return labels[:1]
    if classes:
        return torch.tensor(list(dict.fromkeys(labels.tolist())))
    return labels[_spread(len(labels), _MOST_CLASSES)]


def _real_images(
    trained: TrainedGenerator, labels: Tensor, count: int, layers: Sequence[AttentionLayer]
) -> list[Tensor]:
    """Return the first real images of each class that the run was trained on, uint8 [at most count, 3, R, R]."""
    config = trained.config
    resolution = config.network.resolution
    if not count:
        return [torch.empty(0, 3, resolution, resolution, dtype=torch.uint8)] * len(labels)
    if not any(layer.network == "D" for layer in layers):
        raise UserError(f"real: expected a run whose D has attention, or 0 real images, got {count}")
    if config.data is None or not config.data.exists():
        raise UserError(
            f"real: expected the images that the run was trained on at {config.data}, found nothing there"
        )
    dataset = open_dataset(config.data, resolution, config.images).for_evaluation()
    if list(dataset.class_names) != trained.class_names:
        raise UserError(
            f"real: expected the run's {len(trained.class_names)} classes, found others in {config.data}"
        )
    if not config.network.num_classes:
        return [dataset.fetch(_spread(len(dataset), count))[0]]
    found = [(dataset.labels == label).nonzero().flatten()[:count].tolist() for label in labels]
    return [dataset.fetch(indices)[0] for indices in found]


def _told_apart(names: Sequence[str], labels: Tensor) -> list[str]:
    """Return the names of classes, with the label where a name is empty or that of several."""
    shown = [printable(name) for name in names]
    return [
        name if name.strip() and shown.count(name) == 1 else f"{name} (class {label})".strip()
        for name, label in zip(shown, labels.tolist(), strict=True)
    ]


def _png(image: Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, format="PNG", optimize=True)
    return file.getvalue()


def _filled(facts: dict[str, Any], assets: dict[str, str]) -> str:
    """Return the template with the data of a run in it."""
    template = _TEMPLATE.read_text(encoding="utf-8")
    # No name of a class can end a script element, or begin a comment in it.
    run = json.dumps(facts).replace("<", "\\u003c")
    data = [f'<script type="application/json" id="run">{run}</script>']
    data += [f'<script type="text/plain" id="{name}">{text}</script>' for name, text in assets.items()]
    script = template.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    filled = {
        "TITLE": in_html(facts["title"]),
        "POLICY": f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        "DATA": "\n".join(data),
    }
    return re.sub("@(TITLE|POLICY|DATA)@", lambda found: filled[found[1]], template)
