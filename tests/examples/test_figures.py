"""Grids, attention maps and curves: what the files hold."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import read_png
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

    @pytest.mark.parametrize(("count", "columns"), [(6, 3), (5, 3), (1, 4)])
    def test_a_grid_goes_row_by_row(self, tmp_path: Path, count: int, columns: int) -> None:
        images = random_images(count, 20, 30)
        save_grid(tmp_path / "grid.png", images, columns=columns, gap=3)
        sheet = read_png(tmp_path / "grid.png")
        rows = -(-count // columns)
        assert sheet.shape == (3, rows * 23 + 3, columns * 33 + 3)
        covered = torch.zeros(sheet.shape[1:], dtype=torch.bool)
        for number, image in enumerate(images):
            y, x = 3 + number // columns * 23, 3 + number % columns * 33
            assert torch.equal(sheet[:, y : y + 20, x : x + 30], image)
            covered[y : y + 20, x : x + 30] = True
        assert (sheet[:, ~covered] == 255).all()

    def test_row_names_stand_in_a_margin_before_their_rows(self, tmp_path: Path) -> None:
        images = random_images(4)
        save_grid(tmp_path / "grid.png", images, columns=2, row_names=["tench", "a much longer name"])
        sheet = read_png(tmp_path / "grid.png")
        margin = sheet.size(2) - (2 * 34 + 2)
        assert sheet.size(1) == 2 * 34 + 2
        for number, image in enumerate(images):
            y, x = 2 + number // 2 * 34, margin + 2 + number % 2 * 34
            assert torch.equal(sheet[:, y : y + 32, x : x + 32], image)
        ink = [(sheet[:, 2 + row * 34 : 34 + row * 34, :margin] < 128).any(0) for row in range(2)]
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
            assert height == round((1.5 * count + 0.5) * 130)
            assert abs(width - (1.5 * (points + 1) + 0.6) * 130) <= 1

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

    @pytest.mark.parametrize("panels", [1, 3])
    def test_curves_have_a_panel_for_each_group(self, tmp_path: Path, panels: int) -> None:
        curves = {"D": ([1, 2, 3], [0.5, 0.4, 0.3]), "G": ([1, 3], [1.0, 2.0]), "none": ([], [])}
        path = tmp_path / "new" / "curves.png"
        drawn = [Panel(f"panel {n}", curves) for n in range(panels - 1)] + [Panel("empty", {"D": ([], [])})]
        save_curves(path, drawn, title="t")
        height, width = read_png(path).shape[1:]
        assert abs(height - (2.3 * panels + 0.4) * 130) <= 1
        assert width == 975

    def test_curves_of_other_values_give_another_picture(self, tmp_path: Path) -> None:
        pictures = []
        for values in ([1.0, 2.0, 3.0], [3.0, 1.0, 2.0]):
            save_curves(tmp_path / "curves.png", [Panel("loss", {"D": ([1, 2, 3], values)})])
            pictures.append(read_png(tmp_path / "curves.png"))
        assert (pictures[0] != pictures[1]).sum() > 100
