"""Pictures: grids of samples, attention maps, curves."""

from __future__ import annotations

import functools
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy.typing as npt
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from sagan.errors import UserError, check_finite
from sagan.io import atomic_write
from sagan.names import escaped, printable
from sagan.sampling import generate
from sagan_layers import SelfAttention2d

# Iterations and values.
Curve = tuple[Sequence[float], Sequence[float]]
_FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")  # of matplotlib's figures, too
_LONGEST_LABEL, _LONGEST_LINE = 36, 60  # characters
_QUERY_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#00a5a5", "#c8a400", "#f032e6")


@functools.cache
def _letters() -> frozenset[int]:
    """Return the code points that the font draws."""
    return frozenset(FT2Font(str(_FONT)).get_charmap())


def class_labels(class_names: Sequence[str], labels: Sequence[int]) -> list[str]:
    """Return what to draw for classes: their names, shortened, or their numbers where the font lacks a letter."""
    drawn = []
    for label in labels:
        text = printable(unicodedata.normalize("NFC", class_names[label]))
        has_letters = bool(text.strip()) and _letters().issuperset(map(ord, text))
        drawn.append(_shortened(text, _LONGEST_LABEL) if has_letters else f"class {label}")
    return drawn


def _drawable(line: str) -> str:
    """Return text that the font can draw, with escapes for the rest, and without the middle of a long line."""
    text = "".join(c if ord(c) in _letters() else escaped(c) for c in printable(line))
    return _shortened(text, _LONGEST_LINE)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2 - 2]}...{text[-(most // 2 - 1) :]}"


def save_image(path: Path, image: Tensor) -> None:
    """Write a uint8 image [3, H, W] as a PNG."""
    _save_png(path, _picture(image))


def save_grid(
    path: Path, images: Tensor, *, columns: int, row_names: Sequence[str] | None = None, gap: int = 2
) -> None:
    """Write uint8 images [N, 3, H, W] as one PNG, row by row, with a name (of :func:`class_labels`) before each row."""
    height, width = images.shape[2:]
    rows = -(-len(images) // columns)
    font = ImageFont.truetype(str(_FONT), size=max(11, min(16, height // 2)))
    names = [_drawable(name) for name in row_names or ()]
    margin = 2 * gap + 4 + max(round(font.getlength(name)) for name in names) if names else 0
    sheet = Image.new("RGB", (margin + columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        place = (margin + gap + column * (width + gap), gap + row * (height + gap))
        sheet.paste(_picture(image), place)
    for row, name in enumerate(names):
        middle = gap + row * (height + gap) + height / 2
        draw.text((margin - gap - 2, middle), name, fill="black", font=font, anchor="rm")
    _save_png(path, sheet)


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def _save_png(path: Path, picture: Image.Image | Figure) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, sync=False) as file:
        if isinstance(picture, Figure):
            for text in picture.findobj(Text):
                assert isinstance(text, Text)
                text.set_parse_math(False)  # a $ is a $
                text.set_text("\n".join(map(_drawable, text.get_text().split("\n"))))
            picture.savefig(file, format="png", dpi=130)
        else:
            picture.save(file, format="PNG")


@torch.no_grad()
def attention_at(
    generator: nn.Module, latents: Tensor, labels: Tensor, points: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor, int]:
    """Return images and the attention of query points, from the attention layer closest to the image.

    ``points`` are (row, column) in pixels of the image. The results are images, uint8 [N, 3, R, R]; maps [N, Q, H, W]
    over the keys of the attention, each with sum one; and the resolution of the attention's feature map.
    """
    layers = [layer for layer in generator.modules() if isinstance(layer, SelfAttention2d)]
    if not layers:
        raise UserError("attention maps: expected a generator with attention, found none")
    seen: list[Tensor] = []
    with layers[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        images = generate(generator, latents, labels, batch_size=len(latents))
    size, resolution = images.size(2), seen[0].size(2)
    for point in points:
        if not all(0 <= place < size for place in point):
            raise UserError(
                f"points: expected rows and columns from 0 to {size - 1}, got {point[0]},{point[1]}"
            )
    queries = [(row * resolution // size, column * resolution // size) for row, column in points]
    maps = layers[-1].attention_weights(seen[0], queries)
    check_finite("attention maps", maps)
    return images, maps, resolution


def default_points(resolution: int) -> list[tuple[int, int]]:
    """Return five query points: the centre, and one towards each corner."""
    near, middle, far = (round(resolution * share) for share in (0.3, 0.5, 0.7))
    return [(middle, middle), (near, near), (near, far), (far, near), (far, far)]


def draw_attention(
    path: Path,
    generator: nn.Module,
    latents: Tensor,
    labels: Tensor,
    points: Sequence[tuple[int, int]],
    *,
    names: Sequence[str] | None = None,
) -> None:
    """Generate images and write the attention of query points; see :func:`attention_at`."""
    images, maps, resolution = attention_at(generator, latents, labels, points)
    title = f"Where the marked points look (G's attention at {resolution}x{resolution})"
    save_attention_figure(path, images, maps, points, names=names, title=title)


def save_attention_figure(
    path: Path,
    images: Tensor,
    maps: Tensor,
    points: Sequence[tuple[int, int]],
    *,
    names: Sequence[str] | None = None,
    title: str = "",
) -> None:
    """Write figure 5 of the paper: each image with its query points, and next to it the map of each point.

    ``images``, ``maps`` and ``points`` are those of :func:`attention_at`; ``names``, of :func:`class_labels`, has
    one for each image.
    """
    count, resolution = len(images), images.size(2)
    large = F.interpolate(maps.float().cpu(), (resolution, resolution), mode="bilinear")
    figure = Figure(figsize=(1.5 * (len(points) + 1) + 0.6, 1.5 * count + 0.5), layout="constrained")
    axes = figure.subplots(count, len(points) + 1, squeeze=False)
    for row in range(count):
        picture = images[row].permute(1, 2, 0).numpy()
        axes[row, 0].imshow(picture)
        if names:
            axes[row, 0].set_ylabel(textwrap.fill(names[row], 20), fontsize=9)
        for number, (y, x) in enumerate(points):
            axis = axes[row, number + 1]
            axis.imshow(picture.mean(2), cmap="gray", vmin=0, vmax=255)
            axis.imshow(large[row, number].numpy(), cmap="inferno", alpha=0.75)
            colour = _QUERY_COLOURS[number % len(_QUERY_COLOURS)]
            for marked in (axes[row, 0], axis):
                marked.plot(x, y, "o", color=colour, markeredgecolor="white", markersize=6)
        for axis in axes[row]:
            axis.set_xticks([])
            axis.set_yticks([])
    if title:
        figure.suptitle(title, fontsize=10)
    _save_png(path, figure)


@dataclass(frozen=True)
class Panel:
    """Curves over the iterations in one pair of axes."""

    label: str  # of the vertical axis
    curves: Mapping[str, Curve]  # by name
    published: Mapping[str, float] = field(
        default_factory=dict
    )  # values to compare with, by the name of a curve


def save_comparison(path: Path, panels: Sequence[Panel]) -> None:
    """Write panels below each other, a run in the same colour in all of them. Dashed lines are published values."""
    figure, axes = _stacked(len(panels), width=8.5, height=3.2)
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    for axis, panel in zip(axes, panels, strict=True):
        for name, (iterations, values) in panel.curves.items():
            label = _in_legend(name)
            axis.plot(iterations, values, label=label, color=colours[name], marker="o", markersize=3)
        for name, value in panel.published.items():
            label = _in_legend(f"{name}: published {value:g}")
            axis.axhline(value, color=colours[name], linestyle="--", linewidth=1, label=label)
        axis.set_ylabel(panel.label, fontsize=8)
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _save_png(path, figure)


def save_curves(path: Path, panels: Sequence[Panel], *, title: str = "") -> None:
    """Write the panels of one run below each other, with a title above."""
    figure, axes = _stacked(len(panels), width=7.5, height=2.3)
    for axis, panel in zip(axes, panels, strict=True):
        for name, (iterations, values) in panel.curves.items():
            marker = "." if len(values) < 40 else None
            axis.plot(iterations, values, label=_in_legend(name), linewidth=1.3, marker=marker)
        axis.set_ylabel(panel.label)
        if len(panel.curves) > 1:
            axis.legend(fontsize=8, ncols=3)
    if title:
        figure.suptitle(title, fontsize=10)
    _save_png(path, figure)


def _in_legend(name: str) -> str:
    """Return a name that Matplotlib's legends do not leave out, as they do those that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


def _stacked(count: int, *, width: float, height: float) -> tuple[Figure, npt.NDArray[Any]]:
    """Return a figure of ``count`` axes below each other, each ``height`` inches high."""
    figure = Figure(figsize=(width, height * count + 0.4), layout="constrained")
    axes: npt.NDArray[Any] = figure.subplots(count, 1, squeeze=False, sharex=True)[:, 0]
    axes[-1].set_xlabel("iteration")
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes
