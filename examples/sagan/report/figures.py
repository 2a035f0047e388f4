"""Pictures: grids of samples, attention maps, curves of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sagan.errors import UserError
from sagan_layers import SelfAttention2d

_QUERY_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#00a5a5", "#c8a400", "#f032e6")


def save_image(path: Path, image: Tensor) -> None:
    """Write one uint8 image [3, H, W] as a PNG; the file appears once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(temporary, format="PNG")
    temporary.replace(path)


def save_grid(
    path: Path, images: Tensor, *, columns: int, row_names: Sequence[str] | None = None, gap: int = 2
) -> None:
    """Write images as one PNG, row by row, with a name before each row.

    Args:
        path: where to.
        images: uint8 [N, 3, H, W].
        columns: images in a row.
        row_names: one for each row, or None.
        gap: pixels between images.
    """
    height, width = images.shape[2:]
    rows = -(-len(images) // columns)
    font = ImageFont.load_default(size=max(11, min(16, height // 2)))
    margin = 0
    if row_names:
        margin = 2 * gap + 4 + max(round(font.getlength(name)) for name in row_names)
    sheet = Image.new("RGB", (margin + columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        place = (margin + gap + column * (width + gap), gap + row * (height + gap))
        sheet.paste(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), place)
    for row, name in enumerate(row_names or ()):
        middle = gap + row * (height + gap) + height / 2
        draw.text((margin - gap - 2, middle), name, fill="black", font=font, anchor="rm")
    save_image(path, torch.from_numpy(np.array(sheet)).permute(2, 0, 1))


@torch.no_grad()
def attention_maps(
    generator: torch.nn.Module, latents: Tensor, labels: Tensor | None, points: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor, int]:
    """Return images and where chosen points look, in the attention nearest to the image.

    Args:
        generator: a :class:`~sagan.networks.Generator` in evaluation mode, with attention.
        latents: [N, latent_dim].
        labels: [N] or None.
        points: (row, column) of query points, in pixels of the image.

    Returns:
        Images [N, 3, R, R] from -1 to 1; maps [N, Q, H, W] that sum to one each, on the grid of the attention's
        keys; and the resolution of its feature map.

    Raises:
        UserError: if G has no attention, or a point lies outside the image.
    """
    layers = [layer for layer in generator.modules() if isinstance(layer, SelfAttention2d)]
    if not layers:
        raise UserError("attention maps: expected a generator with attention, found none")
    seen: list[Tensor] = []
    with layers[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        images = generator(latents, labels)
    features = seen[0]
    size, resolution = images.size(2), features.size(2)
    for point in points:
        if not all(0 <= place < size for place in point):
            raise UserError(
                f"points: expected rows and columns from 0 to {size - 1}, got {point[0]},{point[1]}"
            )
    queries = [(row * resolution // size, column * resolution // size) for row, column in points]
    return images, layers[-1].attention_weights(features, queries), resolution


def default_points(resolution: int) -> list[tuple[int, int]]:
    """Return five query points: the centre, and one towards each corner."""
    near, middle, far = (round(resolution * share) for share in (0.3, 0.5, 0.7))
    return [(middle, middle), (near, near), (near, far), (far, near), (far, far)]


def save_attention_figure(
    path: Path,
    images: Tensor,
    maps: Tensor,
    points: Sequence[tuple[int, int]],
    *,
    names: Sequence[str] | None = None,
    title: str = "",
) -> None:
    """Write figure 5 of the paper: each image with its query points marked, and the map of each point.

    Args:
        path: where to, a PNG.
        images: uint8 [N, 3, R, R].
        maps: [N, Q, H, W], each of which sums to one.
        points: (row, column) of the Q query points in pixels of the image.
        names: one for each image.
        title: above everything.
    """
    count, resolution = len(images), images.size(2)
    large = F.interpolate(maps.float().cpu(), (resolution, resolution), mode="bilinear")
    figure = Figure(figsize=(1.5 * (len(points) + 1) + 0.6, 1.5 * count + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(count, len(points) + 1, squeeze=False)
    for row in range(count):
        picture = images[row].permute(1, 2, 0).numpy()
        axes[row, 0].imshow(picture)
        if names:
            axes[row, 0].set_ylabel(names[row], fontsize=9)
        for number, (y, x) in enumerate(points):
            colour = _QUERY_COLOURS[number % len(_QUERY_COLOURS)]
            axes[row, 0].plot(x, y, "o", color=colour, markeredgecolor="white", markersize=6)
            axis = axes[row, number + 1]
            axis.imshow(picture.mean(2), cmap="gray", vmin=0, vmax=255)
            axis.imshow(large[row, number].numpy(), cmap="inferno", alpha=0.75)
            axis.plot(x, y, "o", color=colour, markeredgecolor="white", markersize=6)
        for axis in axes[row]:
            axis.set_xticks([])
            axis.set_yticks([])
    if title:
        figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


@dataclass(frozen=True)
class Panel:
    """One figure of several runs over the iterations.

    Attributes:
        label: of the vertical axis.
        curves: by run, iterations and values.
        published: by run, a value to compare with.
    """

    label: str
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    published: Mapping[str, float]


def save_comparison(path: Path, panels: Sequence[Panel]) -> None:
    """Write the panels one below another; a run has the same colour in all, and published values are dashed lines.

    Args:
        path: where to, a PNG.
        panels: what to draw.
    """
    figure = Figure(figsize=(8.5, 3.2 * len(panels) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes: npt.NDArray[Any] = figure.subplots(len(panels), 1, squeeze=False, sharex=True)
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        for name, (iterations, values) in panel.curves.items():
            axis.plot(iterations, values, label=name, color=colours[name], marker="o", markersize=3)
        for name, value in panel.published.items():
            axis.axhline(
                value, color=colours[name], linestyle="--", linewidth=1, label=f"{name}: published {value:g}"
            )
        axis.set_ylabel(panel.label, fontsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axes[-1, 0].set_xlabel("iteration")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def save_curves(
    path: Path,
    panels: Sequence[tuple[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]],
    *,
    title: str = "",
) -> None:
    """Write curves over iterations, one panel below another.

    Args:
        path: where to, a PNG.
        panels: for each its vertical label and, by name, the curves (iterations, values).
        title: above everything.
    """
    figure = Figure(figsize=(7.5, 2.3 * len(panels) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes: npt.NDArray[Any] = figure.subplots(len(panels), 1, squeeze=False, sharex=True)
    for axis, (label, curves) in zip(axes[:, 0], panels, strict=True):
        for name, (iterations, values) in curves.items():
            axis.plot(iterations, values, label=name, linewidth=1.3, marker="." if len(values) < 40 else None)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if len(curves) > 1:
            axis.legend(fontsize=8, ncols=3)
    axes[-1, 0].set_xlabel("iteration")
    if title:
        figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
