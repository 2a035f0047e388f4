"""Sheets of `sample`: interpolations of latents and classes, and truncation sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import read_png, refused, succeed
from image_trees import WNIDS
from torch import Tensor
from training_runs import assert_same

from sagan.cli import sample
from sagan.networks import Generator, NetworkConfig
from sagan.recipes import RunConfig
from sagan.sampling import TrainedGenerator, generate, sample_inputs
from sagan.sheets import Sheet, interpolation_sheet, mixed_classes, slerp, truncation_sheet
from sagan_layers import ConditionalBatchNorm2d

CONDITIONS = (
    {"condition": "table"},
    {"condition": "one_hot"},
    {"condition": "one_hot", "g_spectral_norm": False},
    {"condition": "embedding", "embedding_dim": 5},
    {"condition": "embedding", "embedding_dim": 3, "hierarchical_latents": True},
)
HOW = ("truncated at 0.25", "truncated at 0.5", "truncated at 1", "not truncated")


def make_generator(**changes: Any) -> Generator:
    """A generator whose classes look different, with the running statistics of evaluation."""
    settings = {"resolution": 32, "base_width": 2, "num_classes": 4, "latent_dim": 8, "g_attention": (8,)}
    torch.manual_seed(3)
    generator = Generator(NetworkConfig(**{**settings, "d_attention": (), **changes})).eval()
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if "norm" in name or name == "embedding.weight":
                parameter.add_(0.5 * torch.randn_like(parameter))
    return generator


def trained(generator: Generator, names: Sequence[str] = ("a", "b", "c", "d")) -> TrainedGenerator:
    config = RunConfig(recipe="paper", network=generator.config)
    return TrainedGenerator(generator, config, 7, list(names), torch.arange(len(names)), averaged=False)


def interpolated(generator: Generator, labels: Sequence[int], **options: Any) -> Sheet:
    defaults = {"rows": 3, "columns": 4, "class_steps": 1, "seed": 0, "batch_size": 50}
    return interpolation_sheet(trained(generator), torch.tensor(labels), **{**defaults, **options})


class TestSlerp:
    def test_the_path_has_the_ends_equal_angles_and_lengths_between_them(self) -> None:
        start, end = torch.randn(2, 128)
        path = slerp(start, end, 9)
        torch.testing.assert_close(path[0], start, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(path[-1], end, rtol=1e-6, atol=1e-6)
        equal = slerp(start, end / end.norm() * start.norm(), 9)
        lengths = equal.norm(dim=1)
        torch.testing.assert_close(lengths, start.norm().expand(9))
        assert torch.lerp(start, end, 0.5).norm() < 0.85 * start.norm()  # what a straight line would do
        cosines = torch.nn.functional.cosine_similarity(equal[:-1].double(), equal[1:].double())
        assert cosines.max() - cosines.min() < 1e-6

    @pytest.mark.parametrize("factor", [2.0, -3.0, 1.0])
    def test_ends_in_one_line_are_joined_by_it(self, factor: float) -> None:
        start = torch.randn(6)
        path = slerp(start, factor * start, 5)
        torch.testing.assert_close(path[2], (1 + factor) / 2 * start)
        assert path.isfinite().all()


class TestMixtures:
    @pytest.mark.parametrize("changes", CONDITIONS)
    def test_a_class_alone_is_that_class_bit_for_bit(self, changes: dict[str, Any]) -> None:
        generator = make_generator(**changes)
        before = {name: value.clone() for name, value in generator.state_dict().items()}
        latents = torch.randn(3, 8)
        for label in range(4):
            expected = generate(generator, latents, torch.full((3,), label), batch_size=3)
            with mixed_classes(generator, torch.eye(4)[label]) as mixed:
                assert torch.equal(generate(generator, latents, mixed.expand(3), batch_size=3), expected)
        assert_same(dict(generator.state_dict()), before)
        assert not any(module._forward_pre_hooks for module in generator.modules())

    @pytest.mark.parametrize("changes", CONDITIONS)
    def test_gain_and_bias_are_the_means_of_the_classes(self, changes: dict[str, Any]) -> None:
        generator, latents = make_generator(**changes), torch.randn(5, 8)
        norm = next(module for module in generator.modules() if isinstance(module, ConditionalBatchNorm2d))
        seen: list[Tensor] = []  # of the first norm, whose input has no condition
        norm.activation = None
        norm.register_forward_hook(lambda *given: seen.append(given[2]))
        with torch.no_grad():
            for label in (1, 3):
                generator(latents, torch.full((5,), label))
            with mixed_classes(generator, torch.tensor([0, 0.25, 0, 0.75])) as mixed:
                generator(latents, mixed.expand(5))
        torch.testing.assert_close(seen[2], 0.25 * seen[0] + 0.75 * seen[1])
        assert (seen[0] - seen[1]).abs().max() > 0.1

    def test_the_classes_are_restored_after_an_error(self) -> None:
        generator = make_generator()
        before = {name: value.clone() for name, value in generator.state_dict().items()}
        with pytest.raises(RuntimeError, match="stop"), mixed_classes(generator, torch.full((4,), 0.25)):
            raise RuntimeError("stop")
        assert_same(dict(generator.state_dict()), before)


class TestInterpolation:
    def test_rows_go_from_class_to_class_with_the_same_latents(self) -> None:
        generator = make_generator()
        sheet = interpolated(generator, [2, 0, 3])
        assert sheet.row_names == ["c", "50% : 50%", "a", "50% : 50%", "d"]
        (start, end), _ = sample_inputs(range(2), generator.config, 0)
        rows = sheet.images.split(4)
        for row, label in ((0, 2), (2, 0), (4, 3)):
            latents = slerp(start, end, 4)
            assert torch.equal(rows[row], generate(generator, latents, torch.full((4,), label), batch_size=4))
        assert len(torch.stack(rows).unique(dim=0)) == 5
        # At the ends stand the samples of the seed.
        ends = generate(generator, torch.stack((start, end)), torch.tensor([2, 2]), batch_size=2)
        assert (rows[0][[0, -1]].int() - ends.int()).abs().max() <= 1

    def test_one_class_has_other_ends_in_each_row(self) -> None:
        generator = make_generator()
        sheet = interpolated(generator, [1])
        assert sheet.row_names == ["b", "b", "b"]
        ends, _ = sample_inputs(range(6), generator.config, 0)
        latents = slerp(ends[4], ends[5], 4)
        expected = generate(generator, latents, torch.full((4,), 1), batch_size=4)
        assert torch.equal(sheet.images[8:], expected)

    def test_an_unconditional_run_has_no_names(self) -> None:
        sheet = interpolated(make_generator(num_classes=0), [0, 1])
        assert sheet.row_names is None
        assert len(sheet.images) == 12
        assert len(sheet.images.unique(dim=0)) == 12


class TestTruncation:
    def test_rows_have_the_same_samples_with_other_thresholds(self) -> None:
        generator = make_generator()
        options = {"columns": 3, "seed": 5, "batch_size": 50}
        sheet = truncation_sheet(trained(generator), torch.tensor([3, 1]), [0.5, None], **options)
        assert sheet.row_names == [
            f"{name}, {how}" for name in "db" for how in ("truncated at 0.5", "not truncated")
        ]
        for row, (label, truncation) in enumerate([(3, 0.5), (3, None), (1, 0.5), (1, None)]):
            latents, _ = sample_inputs(range(3), generator.config, 5, truncation=truncation)
            assert truncation is None or latents.abs().max() <= truncation
            expected = generate(generator, latents, torch.full((3,), label), batch_size=3)
            assert torch.equal(sheet.images[3 * row : 3 * row + 3], expected)

    def test_an_unconditional_run_has_the_thresholds_alone(self) -> None:
        sheet = truncation_sheet(
            trained(make_generator(num_classes=0)), torch.arange(4), [2.0], columns=2, seed=0, batch_size=5
        )
        assert (sheet.row_names, len(sheet.images)) == (["truncated at 2"], 2)


class TestCommand:
    @pytest.mark.parametrize("layout", ["interpolation", "truncation"])
    def test_the_same_command_writes_the_same_picture(
        self, layout: str, trained_run: Path, tmp_path: Path
    ) -> None:
        options = ["--layout", layout, "--columns", 3, "--device", "cpu"]
        for out in ("one", "other"):
            printed = succeed("sample", "--source", trained_run, "--out", tmp_path / out, *options)
            assert f"{tmp_path / out / layout}.png (iteration 4" in printed
        one, other = (read_png(tmp_path / out / f"{layout}.png") for out in ("one", "other"))
        assert torch.equal(one, other)
        succeed("sample", "--source", trained_run, "--out", tmp_path / "x.png", *options, "--seed", 1)
        assert not torch.equal(read_png(tmp_path / "x.png"), one)

    @pytest.mark.parametrize(
        ("options", "names"),
        [
            (["--layout", "interpolation"], [WNIDS[0], "67% : 33%", "33% : 67%", WNIDS[2]]),
            (["--layout", "interpolation", "--class-steps", 0], [*WNIDS[:3]]),
            (["--layout", "interpolation", "--classes", 2], [WNIDS[2]] * 4),
            (["--layout", "truncation"], [f"{WNIDS[0]}, {how}" for how in HOW]),
            (
                ["--layout", "truncation", "--truncations", "none", "1"],
                [f"{name}, {how}" for name in (WNIDS[0], WNIDS[2]) for how in (HOW[3], HOW[2])],
            ),
        ],
    )
    def test_the_rows_are_those_of_the_options(
        self, options: list[object], names: list[str], trained_run: Path, tmp_path: Path, monkeypatch
    ) -> None:
        drawn: list[tuple[int, list[str]]] = []

        def record(path: Path, images: Tensor, *, columns: int, row_names: list[str]) -> None:
            drawn.append((len(images) // columns, row_names))

        monkeypatch.setattr(sample, "save_grid", record)
        options = ["--columns", 2, "--count", 8, "--device", "cpu", *options]
        succeed("sample", "--source", trained_run, "--out", tmp_path, *options)
        assert drawn == [(len(names), names)]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--truncations", "0.5"], "truncations: expected layout 'truncation' with it, got 'grid'"),
            (["--class-steps", 4], "--class-steps: expected layout 'interpolation' with it, got 'grid'"),
            (
                ["--layout", "truncation", "--class-steps", 4],
                "--class-steps: expected layout 'interpolation'",
            ),
            (
                ["--layout", "interpolation", "--class-steps", -1],
                "--class-steps: expected at least 0, got -1",
            ),
            (
                ["--layout", "interpolation", "--columns", 1],
                "columns: expected at least 2 for an interpolation",
            ),
            (
                ["--layout", "truncation", "--truncations", "0"],
                "expected numbers from 0.01 such as 0.5, or none",
            ),
            (["--layout", "truncation", "--truncations", "nan"], "or none, got 'nan'"),
            (["--layout", "truncation", "--truncations", "inf"], "or none, got 'inf'"),
            (["--layout", "truncation", "--truncations", "half"], "or none, got 'half'"),
            (
                ["--layout", "interpolation", "--num-processes", 2],
                "layout: expected 'folders' with several processes",
            ),
            (["--layout", "interpolation", "--out", "a.jpg"], "out: expected a PNG or a folder, got a.jpg"),
        ],
    )
    def test_options_that_do_not_fit_are_refused(
        self, options: list[object], message: str, trained_run: Path
    ) -> None:
        assert message in refused("sample", "--source", trained_run, *options)
