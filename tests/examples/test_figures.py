"""Grids, attention maps and curves: what the files hold."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import read_png
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from training_runs import assert_same

from sagan.errors import UserError
from sagan.networks import Generator, NetworkConfig
from sagan.report.figures import (
    Panel,
    attention_at,
    default_points,
    save_attention_figure,
    save_curves,
    save_grid,
    save_image,
)
from sagan.sampling import to_uint8
from sagan_layers import SelfAttention2d

CONFIG = NetworkConfig(
    resolution=32, base_width=8, num_classes=3, latent_dim=6, g_attention=(16, 8), d_attention=()
)


def random_images(count: int, height: int = 32, width: int = 32) -> Tensor:
    return torch.randint(0, 200, (count, 3, height, width), dtype=torch.uint8)


class TestImagesAndGrids:
    def test_an_image_is_written_pixel_for_pixel_into_a_new_folder(self, tmp_path: Path) -> None:
        images = random_images(2, 20, 30)
        folder = tmp_path / "a" / "b"
        for image in (images[0], images.contiguous(memory_format=torch.channels_last)[1]):
            save_image(folder / "image.png", image)
            assert torch.equal(read_png(folder / "image.png"), image)
        assert [path.name for path in folder.iterdir()] == ["image.png"]

    @pytest.mark.parametrize(
        ("count", "columns", "size", "factor"),
        [
            (6, 3, (20, 30), 5),
            (5, 3, (32, 32), 3),
            (1, 4, (64, 64), 2),
            (2, 1, (96, 100), 1),
            (2, 2, (128, 128), 1),
        ],
    )
    def test_a_grid_goes_row_by_row_and_small_images_are_enlarged_by_whole_pixels(
        self, tmp_path: Path, count: int, columns: int, size: tuple[int, int], factor: int
    ) -> None:
        images = random_images(count, *size)
        save_grid(tmp_path / "grid.png", images, columns=columns, gap=3)
        sheet = read_png(tmp_path / "grid.png")
        rows, (height, width) = -(-count // columns), (factor * side for side in size)
        assert sheet.shape == (3, rows * (height + 3) + 3, columns * (width + 3) + 3)
        covered = torch.zeros(sheet.shape[1:], dtype=torch.bool)
        for number, image in enumerate(images):
            y, x = 3 + number // columns * (height + 3), 3 + number % columns * (width + 3)
            enlarged = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
            assert torch.equal(sheet[:, y : y + height, x : x + width], enlarged)
            covered[y : y + height, x : x + width] = True
        assert (sheet[:, ~covered] == 255).all()

    def test_row_names_stand_in_a_margin_before_their_rows(self, tmp_path: Path) -> None:
        images = random_images(4)
        save_grid(tmp_path / "grid.png", images, columns=2, row_names=["tench", "a much longer name"])
        sheet = read_png(tmp_path / "grid.png")
        margin = sheet.size(2) - (2 * 98 + 2)
        assert sheet.size(1) == 2 * 98 + 2
        for number, image in enumerate(images):
            y, x = 2 + number // 2 * 98, margin + 2 + number % 2 * 98
            assert torch.equal(sheet[:, y : y + 96 : 3, x : x + 96 : 3], image)
        ink = [(sheet[:, 2 + row * 98 : 98 + row * 98, :margin] < 128).any(0) for row in range(2)]
        columns = [part.any(0).nonzero() for part in ink]
        assert 0 < len(columns[0]) < len(columns[1])
        assert columns[1].min() >= 1  # nothing is cut off
        assert all(part.max() < margin for part in columns)


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.manual_seed(2)
    network = Generator(CONFIG)
    with torch.no_grad():
        for mixer in network.mixers.values():
            mixer.gamma.fill_(0.5)
    return network.eval()


class TestAttentionMaps:
    def test_headings_stand_above_their_share_of_the_columns(self, tmp_path: Path) -> None:
        images = torch.full((4, 3, 96, 96), 7, dtype=torch.uint8)
        for name, headings in (("bare", ()), ("left", ("one", "")), ("both", ("one", "two"))):
            save_grid(tmp_path / f"{name}.png", images, columns=4, headings=headings)
        bare, left, both = (read_png(tmp_path / f"{name}.png") for name in ("bare", "left", "both"))
        top = both.size(1) - bare.size(1)
        assert torch.equal(both[:, top:], bare)
        middle = both.size(2) // 2
        assert torch.equal(left[:, :top, :middle], both[:, :top, :middle])
        assert left[:, :top, :middle].min() < 100 < left[:, :top, middle:].min()
        assert both[:, :top, middle:].min() < 100

    def test_maps_are_the_weights_of_the_attention_nearest_to_the_image(self, generator: Generator) -> None:
        latents, labels = torch.randn(3, 6), torch.tensor([0, 1, 2])
        before = copy.deepcopy(generator.state_dict())
        layer = generator.mixers["16"]
        assert isinstance(layer, SelfAttention2d)
        seen: list[Tensor] = []
        with layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])), torch.no_grad():
            expected_images = to_uint8(generator(latents, labels))
            expected = layer.attention_weights(seen[0], [(0, 0), (15, 15), (8, 2), (8, 2)])
        points = [(0, 0), (31, 31), (17, 5), (16, 4)]
        images, maps, resolution = attention_at(generator, latents, labels, points)
        assert torch.equal(images, expected_images)
        assert resolution == 16
        assert maps.shape == (3, 4, 8, 8)
        assert torch.equal(maps, expected)
        assert not torch.equal(maps[:, 0], maps[:, 1])  # other points look elsewhere
        torch.testing.assert_close(maps.sum((2, 3)), torch.ones(3, 4))
        assert (maps >= 0).all()
        assert_same(generator.state_dict(), before)

    @pytest.mark.parametrize("point", [(32, 0), (0, 32), (-1, 0), (5, 400)])
    def test_points_outside_the_image_are_refused(self, generator: Generator, point: tuple[int, int]) -> None:
        with pytest.raises(UserError, match=f"rows and columns from 0 to 31, got {point[0]},{point[1]}"):
            attention_at(generator, torch.randn(1, 6), torch.tensor([0]), [(0, 0), point])

    @pytest.mark.parametrize("changes", [{"g_attention": ()}, {"mixer": "residual"}])
    def test_a_generator_without_attention_is_refused(self, changes: Any) -> None:
        with pytest.raises(UserError, match="expected a generator with attention, found none"):
            attention_at(
                Generator(replace(CONFIG, **changes)), torch.randn(1, 6), torch.tensor([0]), [(0, 0)]
            )

    @pytest.mark.parametrize("resolution", [32, 64, 128, 256])
    def test_default_points_are_five_inside_the_image_with_the_centre_first(self, resolution: int) -> None:
        points = default_points(resolution)
        assert points[0] == (resolution // 2, resolution // 2)
        assert len(set(points)) == 5
        assert all(0 < place < resolution for point in points for place in point)


class TestPlots:
    def test_attention_figure_has_a_row_for_an_image_and_a_column_for_a_point(self, tmp_path: Path) -> None:
        path = tmp_path / "figure.png"
        for count, points in ((1, 1), (3, 1), (1, 4), (1, 10)):  # ten are more than there are colours
            maps = torch.rand(count, points, 8, 8)
            places = [(3 * n, 2 * n) for n in range(points)]
            save_attention_figure(path, random_images(count), maps, places, names=["a"] * count, title="t")
            height, width = read_png(path).shape[1:]
            cell = max(5.5 / (points + 1), 0.8)
            assert abs(height - (cell * count + 0.9) * 160) <= 1
            assert abs(width - (cell * (points + 1) + 0.3) * 160) <= 1

    @pytest.mark.parametrize(("peak", "most"), [(1 / 64, 1.0), (5 / 64, 5.0)])
    def test_a_colour_bar_shows_the_multiples_of_an_even_map(
        self, tmp_path: Path, peak: float, most: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bars = []
        draw = Figure.colorbar
        monkeypatch.setattr(
            Figure, "colorbar", lambda *args, **kw: bars.append(draw(*args, **kw)) or bars[-1]
        )
        maps = torch.full((2, 1, 8, 8), 1 / 64)
        maps[1, 0, :4] = peak  # so much that the largest percent of places do not end the scale
        save_attention_figure(tmp_path / "figure.png", random_images(2), maps, [(16, 16)])
        [bar] = bars
        assert (bar.vmin, bar.vmax) == (0, pytest.approx(most))
        assert bar.ax.get_xlabel() == "attention, in multiples of the map's average"
        assert len(bar.get_ticks()) >= 3

    def test_attention_figure_draws_the_map_of_each_point(self, tmp_path: Path) -> None:
        images = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
        drawn = []
        for corner in (0, 7):
            maps = torch.zeros(1, 1, 8, 8)
            maps[0, 0, corner, corner] = 1
            save_attention_figure(tmp_path / "figure.png", images, maps, [(16, 16)])
            drawn.append(read_png(tmp_path / "figure.png").float())
        changed = (drawn[0] - drawn[1]).abs().sum(0) > 60
        columns = changed.any(0).nonzero().flatten()
        assert len(columns) > 0
        assert columns.min() > drawn[0].size(2) / 2  # the map's panel alone, on the right

    def test_a_figure_of_no_attention_at_all_is_drawn(self, tmp_path: Path) -> None:
        save_attention_figure(tmp_path / "figure.png", random_images(1), torch.zeros(1, 1, 8, 8), [(16, 16)])
        assert (tmp_path / "figure.png").exists()

    @pytest.mark.parametrize("panels", [1, 3])
    def test_curves_have_a_panel_for_each_group(self, tmp_path: Path, panels: int) -> None:
        curves = {"D": ([1, 2, 3], [0.5, 0.4, 0.3]), "G": ([1, 3], [1.0, 2.0]), "none": ([], [])}
        path = tmp_path / "new" / "curves.png"
        drawn = [Panel(f"panel {n}", curves) for n in range(panels - 1)] + [Panel("empty", {"D": ([], [])})]
        save_curves(path, drawn, title="t")
        height, width = read_png(path).shape[1:]
        assert abs(height - (1.8 * panels + 0.4) * 160) <= 1
        assert width == 880

    def test_curves_of_other_values_give_another_picture(self, tmp_path: Path) -> None:
        pictures = []
        for values in ([1.0, 2.0, 3.0], [3.0, 1.0, 2.0]):
            save_curves(tmp_path / "curves.png", [Panel("loss", {"D": ([1, 2, 3], values)})])
            pictures.append(read_png(tmp_path / "curves.png"))
        assert (pictures[0] != pictures[1]).sum() > 100

    def test_one_thing_has_one_colour_and_curves_of_one_panel_differ(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drawn: dict[str, set[tuple[object, object]]] = {}
        plot = Axes.plot

        def recording(axis: Axes, *arguments: Any, **options: Any) -> Any:
            lines = plot(axis, *arguments, **options)
            drawn.setdefault(str(len(lines[0].get_xdata())), set()).add(
                (lines[0].get_color(), lines[0].get_linestyle())
            )
            return lines

        monkeypatch.setattr(Axes, "plot", recording)
        names = [
            "G",
            "D",
            "G at 16",
            "G at 32",
            "D at 8",
            "real",
            "generated",
            *(f"run {n}" for n in range(12)),
        ]
        curves = {name: ([*range(n + 1)], [1.0] * (n + 1)) for n, name in enumerate(names)}  # told by length
        groups = [names[:2], names[2:5], names[5:7], names[7:], names[::-1]]
        panels = [Panel("a", {name: curves[name] for name in group}) for group in groups]
        save_curves(tmp_path / "curves.png", panels)
        styles = {name: drawn[str(n + 1)] for n, name in enumerate(names)}
        assert all(len(style) == 1 for style in styles.values())  # the same in every panel
        found = {name: next(iter(style)) for name, style in styles.items()}
        for first, second in (("G", "generated"), ("G", "G at 16"), ("D", "D at 8")):
            assert found[first][0] == found[second][0]
        for group in groups[:4]:
            assert len({found[name] for name in group}) == len(group)

    def test_references_are_dashed_lines_with_their_values(self, tmp_path: Path) -> None:
        pictures = []
        for references in ({}, {"score": 2.0}, {"real": 2.5}):
            save_curves(tmp_path / "curves.png", [Panel("a", {"score": ([1, 2], [1.0, 3.0])}, references)])
            pictures.append(read_png(tmp_path / "curves.png"))
        assert all((pictures[0] != each).sum() > 100 for each in pictures[1:])
