"""The page that explores attention: its data, and what a browser draws of it."""

from __future__ import annotations

import base64
import io
import json
import zlib
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attention_runs import CPU, networks_of, weights_of, write_run
from command_line import refused, succeed
from image_trees import WNIDS
from PIL import Image
from torch import Tensor
from training_runs import changed

from sagan.errors import UserError
from sagan.explore.attention import AttentionLayer, point_places, quantized
from sagan.explore.page import PageOptions, chosen_checkpoints, explorer_page
from sagan.recipes import RunConfig
from sagan.sampling import sample_inputs, to_uint8
from sagan.train.checkpoint import kept_checkpoints

HOSTILE = ["</script><script>hacked = 1</script>", "<!--<script>", '"quo\'te"&amp;\n\u202e\udcff \U0001f600']


@pytest.fixture(scope="module")
def run(tiny_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("explored") / "run", tiny_config)


class Scripts(HTMLParser):
    """The script elements of a page: their attributes and their text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[dict[str, str | None], str]] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag == "script"
        if self.inside:
            self.found.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.found[-1] = self.found[-1][0], self.found[-1][1] + data


@dataclass
class Shown:
    """The data in a page."""

    facts: dict[str, Any]
    assets: dict[str, bytes]

    def picture(self, name: str) -> Tensor:
        with Image.open(io.BytesIO(self.assets[name])) as image:
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def maps(self, name: str) -> Tensor:
        """The weights, [images, points, keys]."""
        layer = self.facts["layers"][int(name.rpartition("-")[2])]
        points, keys = layer["points"] ** 2, layer["keys"] ** 2
        data = zlib.decompress(self.assets[name]) if self.facts["compressed"] else self.assets[name]
        images = len(data) // (points * (keys + 4))
        largest = torch.frombuffer(bytearray(data[: 4 * images * points]), dtype=torch.float32)
        levels = torch.frombuffer(bytearray(data[4 * images * points :]), dtype=torch.uint8)
        return levels.view(images, points, keys).float() / 255 * largest.view(images, points, 1)


def shown_by(page: str) -> Shown:
    scripts = {attributes.get("id"): text for attributes, text in Scripts(page).found}
    facts = json.loads(scripts.pop("run"))
    assets = {name: base64.b64decode(text) for name, text in scripts.items() if name is not None}
    return Shown(facts, assets)


def explored(source: Path, **options: Any) -> Shown:
    return shown_by(explorer_page(source, CPU, PageOptions(**options)).text)


def assert_stored(stored: Tensor, weights: Tensor) -> None:
    """Compare 8 bits with the weights they stand for."""
    assert stored.shape == weights.shape
    largest = weights.amax(-1, keepdim=True)
    assert ((stored - weights).abs() <= largest * (1 / 510 + 1e-5)).all()
    assert weights.std(-1).max() > 0.02  # flat maps would hide an error


class TestData:
    def test_maps_are_the_weights_of_every_layer_at_every_iteration(self, run: Path) -> None:
        shown = explored(run, count=2)
        names = [(layer["network"], layer["resolution"], layer["keys"]) for layer in shown.facts["layers"]]
        assert names == [("G", 8, 4), ("G", 16, 8), ("D", 8, 4)]
        assert shown.facts["iterations"] == [200, 400]
        assert shown.facts["classes"] == list(WNIDS[:3])
        for number, checkpoint in enumerate(kept_checkpoints(run)):
            networks = dict(zip("GD", networks_of(checkpoint), strict=True))
            for label in range(3):
                inputs = sample_inputs(range(2), networks["G"].config, 0, torch.tensor([label]))
                with torch.no_grad():
                    images = networks["G"](*inputs)
                for sample in range(2):
                    assert torch.equal(
                        shown.picture(f"image-{number}-{label}-{sample}"), to_uint8(images)[sample]
                    )
                for place, (name, resolution, _) in enumerate(names):
                    given = inputs if name == "G" else (images, inputs[1])
                    weights = weights_of(networks[name], resolution, *given).flatten(1, 2)
                    assert_stored(shown.maps(f"maps-{number}-{label}-{place}"), weights)
                    gamma = networks[name].mixers[str(resolution)].gamma.item()
                    assert shown.facts["layers"][place]["gammas"][number] == gamma

    def test_real_images_of_the_run_are_shown_to_d(self, run: Path, image_folder: Path) -> None:
        shown = explored(run, count=1, real=2, iterations=(400,), classes=(WNIDS[1],))
        assert shown.facts["real"] == [2]
        assert shown.facts["classes"] == [WNIDS[1]]
        real = torch.stack([shown.picture(f"real-0-{number}") for number in range(2)])
        with Image.open(sorted((image_folder / "train" / WNIDS[1]).iterdir())[0]) as first:
            near = torch.from_numpy(np.array(first.convert("RGB"))).float().mean((0, 1))
        assert (real[0].float().mean((1, 2)) - near).abs().max() < 25  # that image, cropped
        _, discriminator = networks_of(kept_checkpoints(run)[-1])
        weights = weights_of(discriminator, 8, real.float() / 127.5 - 1, torch.tensor([1, 1]))
        maps = shown.maps("maps-0-0-2")
        assert len(maps) == 3  # the sample's is the first
        assert_stored(maps[1:], weights.flatten(1, 2))
        assert len(shown.maps("maps-0-0-1")) == 1  # G sees none

    def test_seed_weights_and_compression_are_those_of_the_options(self, run: Path) -> None:
        one, other = (explored(run, count=1, classes=("0",), seed=seed) for seed in (0, 7))
        assert one.assets.keys() == other.assets.keys()
        assert all(one.assets[name] != other.assets[name] for name in one.assets)
        plain = explored(run, count=1, classes=("0",), compress=False)
        assert not plain.facts["compressed"]
        for name in one.assets:
            expected = zlib.decompress(one.assets[name]) if name.startswith("maps") else one.assets[name]
            assert plain.assets[name] == expected
        with pytest.raises(UserError, match="expected a run with a moving average for 'ema'"):
            explored(run, weights="ema")

    def test_a_bound_on_the_size_leaves_fewer_points_which_the_page_and_the_command_say(
        self, run: Path
    ) -> None:
        whole = explorer_page(run, CPU, PageOptions(count=1))
        assert "is kept of" not in whole.text + whole.summary
        allowed = 0.9 * len(whole.text) / 2**20
        page = explorer_page(run, CPU, PageOptions(count=1, max_mib=allowed))
        assert len(page.text.encode()) <= allowed * 2**20
        said = "G's attention at 16 x 16 is kept of 8 x 8 points"
        assert said in page.summary
        shown = shown_by(page.text)
        assert said in shown.facts["notes"]
        layer = AttentionLayer("G", 16, 8, 8)
        assert vars(layer).items() <= shown.facts["layers"][1].items()
        places = point_places(layer)
        assert (places[0], places[1], places[-1]) == ((1, 1), (1, 3), (15, 15))
        generator, _ = networks_of(kept_checkpoints(run)[1])
        inputs = sample_inputs(range(1), generator.config, 0, torch.tensor([2]))
        weights = weights_of(generator, 16, *inputs)[:, 1::2, 1::2].flatten(1, 2)
        assert_stored(shown.maps("maps-1-2-1"), weights)
        with pytest.raises(
            UserError, match=r"max_mib: expected at least about 0\.\d+ .* 4 x 4 points only, got 0.05"
        ):
            explorer_page(run, CPU, PageOptions(max_mib=0.05))

    def test_levels_reach_255_and_are_off_by_half_a_level_at_most(self) -> None:
        maps = torch.softmax(5 * torch.randn(3, 50, 64), -1)
        levels, largest = quantized(maps)
        assert levels.dtype == torch.uint8
        assert (levels.amax(-1) == 255).all()
        assert torch.equal(largest, maps.amax(-1))
        assert_stored(levels / 255 * largest.unsqueeze(-1), maps)

    def test_hostile_names_stay_data(self, tiny_config: RunConfig, tmp_path: Path) -> None:
        source = write_run(tmp_path / "<b>&amp;", tiny_config, names=HOSTILE, iterations=(1,))
        page = explorer_page(source, CPU, PageOptions(count=1)).text
        scripts = Scripts(page).found
        assert len([each for each in scripts if not each[0]]) == 1  # the page's own
        assert all(each.get("type") in (None, "application/json", "text/plain") for each, _ in scripts)
        names = shown_by(page).facts["classes"]
        assert names[:2] == HOSTILE[:2]
        assert names[2] == '"quo\'te"&amp;\\n\\u202e\\udcff \U0001f600'
        assert "<title>Attention of &lt;b&gt;&amp;amp;</title>" in page

    def test_equal_and_empty_names_are_told_apart(self, tiny_config: RunConfig, tmp_path: Path) -> None:
        source = write_run(tmp_path / "run", tiny_config, names=["cat", "cat", " "], iterations=(1,))
        expected = ["cat (class 0)", "cat (class 1)", "(class 2)"]
        assert [each.strip() for each in explored(source, count=1).facts["classes"]] == expected


class TestRuns:
    def test_iterations_are_chosen_from_the_checkpoints_that_there_are(
        self, run: Path, tmp_path: Path
    ) -> None:
        kept = kept_checkpoints(run)
        assert chosen_checkpoints(run, ()) == kept
        assert chosen_checkpoints(run, (400,)) == kept[1:]
        assert chosen_checkpoints(kept[0], ()) == kept[:1]
        with pytest.raises(UserError, match=r"iterations: expected some of \[200, 400\].* got \[300\]"):
            chosen_checkpoints(run, (300, 400))
        with pytest.raises(UserError, match=r"iterations: expected 200, that of .*, got \[400\]"):
            explored(kept[0], iterations=(400,))
        for number in range(1, 13):
            (tmp_path / f"iteration_{number:09d}.pt").touch()
        chosen = [int(path.stem[-3:]) for path in chosen_checkpoints(tmp_path, ())]
        assert (len(chosen), chosen[0], chosen[-1]) == (5, 1, 12)

    def test_an_unconditional_run_has_no_classes(self, tiny_config: RunConfig, tmp_path: Path) -> None:
        config = changed(tiny_config, network__num_classes=0)
        shown = explored(write_run(tmp_path / "run", config, iterations=(1,)), count=3, real=2)
        assert not shown.facts["conditional"]
        assert shown.facts["real"] == [2]
        generator, _ = networks_of(tmp_path / "run" / "checkpoints" / "iteration_000000001.pt")
        weights = weights_of(generator, 16, sample_inputs(range(3), generator.config, 0)[0])
        assert_stored(shown.maps("maps-0-0-1"), weights.flatten(1, 2))

    def test_one_network_with_attention_is_enough_but_not_none(
        self, tiny_config: RunConfig, tmp_path: Path
    ) -> None:
        config = changed(tiny_config, network__d_attention=())
        source = write_run(tmp_path / "g", config, iterations=(1,))
        assert [layer["network"] for layer in explored(source).facts["layers"]] == ["G", "G"]
        with pytest.raises(UserError, match="real: expected a run whose D has attention"):
            explored(source, real=1)
        source = write_run(tmp_path / "no", changed(config, network__g_attention=()), iterations=(1,))
        with pytest.raises(UserError, match=r"explore: expected a run with attention, .* has none"):
            explored(source)

    def test_real_images_that_are_gone_or_others_are_refused(
        self, tiny_config: RunConfig, tmp_path: Path
    ) -> None:
        source = write_run(tmp_path / "run", tiny_config, names=["a", "b", "c"], iterations=(1,))
        with pytest.raises(UserError, match="real: expected the run's 3 classes, found others"):
            explored(source, real=1)
        gone = changed(tiny_config, data=tmp_path / "gone")
        source = write_run(tmp_path / "other", gone, iterations=(1,))
        with pytest.raises(UserError, match=r"real: expected the images .* found nothing there"):
            explored(source, real=1)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--count", 0], "count: expected at least 1, got 0"),
            (["--real", -1], "real: expected at least 0, got -1"),
            (["--max-mib", 0], "max-mib: expected more than 0, got 0"),
            (["--max-mib", "nan"], "max-mib: expected more than 0, got nan"),
            (["--out", "page.png"], "out: expected a file that ends in .html, got page.png"),
            (["--classes", "tench"], "classes: expected a class's name or a label from 0 to 2, got 'tench'"),
        ],
    )
    def test_wrong_options_are_refused(self, options: list[object], message: str, run: Path) -> None:
        assert message in refused("explore", "--source", run, *options)

    def test_the_command_writes_the_page_and_says_what_is_on_it(self, run: Path, tmp_path: Path) -> None:
        out = tmp_path / "new" / "page.html"
        printed = succeed("explore", "--source", run, "--out", out, "--count", 1, "--device", "cpu")
        assert f"Written: {out}" in printed
        assert (
            "1 sample of each of 3 classes; attention of G 8x8, G 16x16, D 8x8; iteration 200, 400" in printed
        )
        assert out.read_text() == explorer_page(run, CPU, PageOptions(count=1)).text
