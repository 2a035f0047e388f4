"""Pictures: grids of samples, attention maps, curves."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from sagan.errors import UserError, check_finite
from sagan.io import atomic_write
from sagan.names import drawable, figure_font
from sagan.sampling import generate
from sagan_layers import SelfAttention2d

# Iterations and values.
Curve = tuple[Sequence[float], Sequence[float]]
_LONGEST_LABEL, _LINE = 36, 18  # characters of a class's name, and of a line of it
_SMALLEST = 96  # pixels; smaller images are enlarged in grids
# Figures are narrow for their letters, which can then be read where a figure fills a phone's width.
_WIDTH, _DPI = 5.5, 160  # inches, pixels per inch
_STYLE: Any = {"font.size": 9, "axes.titlesize": 9, "axes.titlelocation": "left", "legend.fontsize": 8}
_QUERY_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#00a5a5", "#c8a400", "#f032e6")
# What belongs to one network, or to real images, has one colour in all figures.
_COLOURS = {"D": "#0072b2", "G": "#d55e00", "generated": "#d55e00", "real": "#009e73"}
_OTHER_COLOURS = ("#444444", "#cc79a7", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#8c564b")
_MOST_INSIDE = 4  # names in a legend inside its panel
_LINES = ("-", "--", ":", "-.")


def class_labels(class_names: Sequence[str], labels: Sequence[int]) -> list[str]:
    """Return what to draw for classes: their names, shortened, or their numbers if no letter of a name can be drawn."""
    drawn = []
    for label in labels:
        name = class_names[label]
        is_drawn = any(letter.isprintable() and drawable(letter) == letter for letter in name.strip())
        drawn.append(drawable(name, _LONGEST_LABEL) if is_drawn else f"class {label}")
    return drawn


def _wrapped(name: str) -> str:
    return textwrap.fill(drawable(name, _LONGEST_LABEL), _LINE)


def save_image(path: Path, image: Tensor) -> None:
    """Write a uint8 image [3, H, W] as a PNG."""
    save_picture(path, _picture(image))


def enlargement(side: int) -> int:
    """Return how many pixels wide :func:`save_grid` draws each pixel of an image with this shorter side."""
    return -(-_SMALLEST // side)


def save_grid(
    path: Path,
    images: Tensor,
    *,
    columns: int,
    row_names: Sequence[str] | None = None,
    headings: Sequence[str] = (),
    gap: int = 2,
) -> None:
    """Write uint8 images [N, 3, H, W] as one PNG, row by row, with a name (of :func:`class_labels`) before each row.

    Headings share the width between them, such as one above the left half and one above the right. Each pixel of an
    image below 96 pixels becomes a square of pixels.
    """
    factor = enlargement(min(images.shape[2:]))
    height, width = (factor * side for side in images.shape[2:])
    rows, row_width = -(-len(images) // columns), columns * (width + gap) + gap
    font = ImageFont.truetype(str(figure_font()), size=max(16, min(row_width // 40, height // 4)))
    names = [_wrapped(name) for name in row_names or ()]
    margin = 0
    if names:
        margin = 2 * gap + 4 + max(round(font.getlength(line)) for name in names for line in name.split("\n"))
    top = round(1.5 * font.size) if headings else 0
    sheet = Image.new("RGB", (margin + row_width, top + rows * (height + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for number, heading in enumerate(headings):
        left = margin + gap + number * columns // len(headings) * (width + gap)
        draw.text((left, top / 2), drawable(heading, _LONGEST_LABEL), fill="black", font=font, anchor="lm")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        place = (margin + gap + column * (width + gap), top + gap + row * (height + gap))
        sheet.paste(_picture(image).resize((width, height), Image.Resampling.NEAREST), place)
    for row, name in enumerate(names):
        middle = top + gap + row * (height + gap) + height / 2
        draw.text((margin - gap - 2, middle), name, fill="black", font=font, anchor="rm", align="right")
    save_picture(path, sheet)


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def save_picture(path: Path, picture: Image.Image | Figure) -> None:
    """Write a picture or a figure as a PNG; texts of figures are drawn as they are, whatever they hold."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, sync=False) as file:
        if isinstance(picture, Figure):
            for text in picture.findobj(Text):
                assert isinstance(text, Text)
                text.set_parse_math(False)  # a $ is a $
                text.set_text("\n".join(map(drawable, text.get_text().split("\n"))))
            picture.savefig(file, format="png", dpi=_DPI)
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
    title = f"Where the marked points look: G's attention at {resolution}x{resolution}"
    save_attention_figure(path, images, maps, points, names=names, title=title)


@matplotlib.rc_context(_STYLE)
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

    All maps have one scale: how many times the average weight a place gets. It ends where 1% of the places exceed it.

    ``images``, ``maps`` and ``points`` are those of :func:`attention_at`; ``names``, of :func:`class_labels`, has
    one for each image.
    """
    count, resolution = len(images), images.size(2)
    relative = maps.float().cpu() * (maps.size(2) * maps.size(3))
    large = F.interpolate(relative, (resolution, resolution), mode="bilinear").numpy()
    most, highest = float(np.quantile(large, 0.99)), float(large.max())
    most = most if most > 0 else max(highest, 1.0)
    cell = max(_WIDTH / (len(points) + 1), 0.8)
    figure = Figure(figsize=(cell * (len(points) + 1) + 0.3, cell * count + 0.9), layout="constrained")
    axes = figure.subplots(count, len(points) + 1, squeeze=False)
    for row in range(count):
        picture = images[row].permute(1, 2, 0).numpy()
        axes[row, 0].imshow(picture)
        if names:
            axes[row, 0].set_ylabel(_wrapped(names[row]), fontsize=8)
        for number, (y, x) in enumerate(points):
            axis = axes[row, number + 1]
            axis.imshow(picture.mean(2), cmap="gray", vmin=0, vmax=255)
            shown = axis.imshow(large[row, number], cmap="inferno", alpha=0.75, vmin=0, vmax=most)
            colour = _QUERY_COLOURS[number % len(_QUERY_COLOURS)]
            for marked in (axes[row, 0], axis):
                marked.plot(x, y, "o", color=colour, markeredgecolor="white", markersize=5)
        for axis in axes[row]:
            axis.set_xticks([])
            axis.set_yticks([])
    extend = "max" if highest > most else "neither"
    bar = figure.colorbar(
        shown, ax=axes, orientation="horizontal", extend=extend, fraction=0.3 / count, aspect=40, shrink=0.8
    )
    bar.ax.set_facecolor("gray")
    bar.set_label("attention, in multiples of the map's average")
    if title:
        figure.suptitle(title, fontsize=9)
    save_picture(path, figure)


@dataclass(frozen=True)
class Panel:
    """Curves over the iterations in one pair of axes."""

    label: str
    curves: Mapping[str, Curve]  # by name; "" is in no legend
    # Values to compare with, dashed: by the name of a curve, or of their own.
    references: Mapping[str, float] = field(default_factory=dict)


@matplotlib.rc_context(_STYLE)
def save_curves(path: Path, panels: Sequence[Panel], *, title: str = "") -> None:
    """Write panels below each other, a name in the same colour in all of them."""
    figure = Figure(layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    styles = _line_styles([name for panel in panels for name in panel.curves if name])
    legends: list[dict[str, Any]] = []
    for axis, panel in zip(axes, panels, strict=True):
        drawn: dict[str, Any] = {}
        for name, (iterations, values) in panel.curves.items():
            style = styles.get(name, {"color": _OTHER_COLOURS[0]})
            marker = "." if len(values) < 40 else None
            (drawn[name],) = axis.plot(iterations, values, linewidth=1.2, marker=marker, **style)
        for name, value in panel.references.items():
            colour = drawn[name].get_color() if name in drawn else "#888888"
            label = f"{name}: published {value:.4g}" if name in drawn else f"{name} {value:.4g}"
            drawn[label] = axis.axhline(value, color=colour, linestyle=(0, (5, 3)), linewidth=1)
        axis.set_title(panel.label)
        axis.grid(alpha=0.3)
        legends.append({name: line for name, line in drawn.items() if name})
    together = {name: line for legend in legends for name, line in legend.items()}
    below = any(len(legend) > _MOST_INSIDE for legend in legends)
    # Given as lists: Matplotlib leaves out names that begin with an underscore.
    if below:
        figure.legend(list(together.values()), list(together), loc="outside lower left")
    else:
        for axis, legend in zip(axes, legends, strict=True):
            if legend:
                axis.legend(list(legend.values()), list(legend), ncols=2 if max(map(len, legend)) < 20 else 1)
    axes[-1].set_xlabel("iteration")
    if title:
        figure.suptitle(title, fontsize=9)
    figure.set_size_inches(_WIDTH, 1.8 * len(panels) + 0.4 + 0.2 * len(together) * below)
    save_picture(path, figure)


def _line_styles(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the colour of each name, which is that of its first word if that has one, and a line of its own."""
    styles: dict[str, dict[str, str]] = {}
    others = 0
    for name in dict.fromkeys(names):
        colour = _COLOURS.get(name.split(" ")[0])
        if colour is None:
            colour, line = (
                _OTHER_COLOURS[others % len(_OTHER_COLOURS)],
                _LINES[others // len(_OTHER_COLOURS) % 4],
            )
            others += 1
        else:
            alike = sum(style["color"] == colour for other, style in styles.items() if " " in other)
            line = _LINES[alike % len(_LINES)] if " " in name else "-"
        styles[name] = {"color": colour, "linestyle": line}
    return styles
