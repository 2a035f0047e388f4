"""Training: the effects of an iteration on both networks, and the files of a run."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from command_line import succeed
from image_trees import jpeg_bytes
from PIL import Image
from torch import Tensor, nn
from training_runs import Batches, Train, assert_same, make_trainer, metrics_of, stepped

from sagan.data import make_loader
from sagan.distributed import pick_device
from sagan.errors import UserError
from sagan.randomness import training_noise
from sagan.recipes import OptimizerConfig, RunConfig, config_from_dict
from sagan.train.checkpoint import checkpoints_in, find_checkpoint, load_checkpoint
from sagan.train.update import Trainer
from sagan_layers import SpectralNormLayer


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def vectors(network: nn.Module) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in copy.deepcopy(network.state_dict()).items()
        if name.endswith("weight_u")
    }


def move_vectors_once(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's vectors after one power iteration, without changing it."""
    network = copy.deepcopy(network)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, SpectralNormLayer):
                layer.normalized_weight()
    return vectors(network)


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)


class TestSchedule:
    @pytest.mark.parametrize(("d_steps", "accumulation"), [(1, 1), (3, 1), (2, 2)])
    def test_updates_per_iteration(self, tiny_config: RunConfig, d_steps: int, accumulation: int) -> None:
        trainer = make_trainer(tiny_config, d_steps=d_steps, accumulation=accumulation)
        batches = Batches(4 // accumulation)
        for _ in range(2):
            trainer.step(batches)
        for optimizer, steps in ((trainer.d_optimizer, 2 * d_steps), (trainer.g_optimizer, 2)):
            assert {int(state["step"]) for state in optimizer.state.values()} == {steps}
        assert batches.drawn == trainer.batches_drawn == 2 * d_steps * accumulation
        assert trainer.iteration == 2

    def test_each_update_changes_only_its_network(self, tiny_config: RunConfig) -> None:
        trainer = make_trainer(tiny_config)
        before = weights(trainer.generator), weights(trainer.discriminator)
        trainer.update_discriminator(Batches(4))
        between = weights(trainer.generator), weights(trainer.discriminator)
        assert_same(before[0], between[0])
        assert not any(torch.equal(before[1][name], between[1][name]) for name in list(before[1])[:5])
        trainer.update_generator()
        assert_same(between[1], weights(trainer.discriminator))
        assert differ(between[0], weights(trainer.generator))

    def test_learning_rates_and_decays_are_those_of_the_configuration(self, tiny_config: RunConfig) -> None:
        settings = OptimizerConfig(g_lr=0.003, d_lr=0.007, beta1=0.25, beta2=0.75, eps=1e-5)
        trainer = make_trainer(tiny_config, optimizer=settings)
        for optimizer, rate in ((trainer.g_optimizer, 0.003), (trainer.d_optimizer, 0.007)):
            (group,) = optimizer.param_groups
            assert (group["lr"], group["betas"], group["eps"]) == (rate, (0.25, 0.75), 1e-5)

    def test_discriminator_sees_real_and_generated_images_in_one_pass(self, tiny_config: RunConfig) -> None:
        trainer = make_trainer(tiny_config)
        seen: list[tuple[Tensor, Tensor]] = []
        trainer.discriminator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
        pixels, labels = next(Batches(4))
        trainer.update_discriminator(Batches(4))
        assert len(seen) == 1
        images, all_labels = seen[0]
        assert images.shape == (8, 3, 32, 32)
        assert torch.equal(images[:4], pixels / 127.5 - 1)
        assert images[:4].aminmax() == (-1, 1)
        assert torch.equal(all_labels[:4], labels)
        assert not images.requires_grad  # no gradient flows to G in D's step

    def test_generated_labels_come_from_the_classes_in_use_alone(self) -> None:
        latents, labels = training_noise(0, 0, 0, count=200, latent_dim=6, labels_in_use=torch.tensor([2, 7]))
        assert labels.unique().tolist() == [2, 7]
        assert 50 < (labels == 2).sum() < 150
        assert latents.shape == (200, 6)
        assert latents.mean().abs() < 0.15
        assert latents.std().item() == pytest.approx(1, abs=0.1)


class TestGradients:
    def test_generator_step_computes_no_gradients_of_d(self, tiny_config: RunConfig) -> None:
        trainer = make_trainer(tiny_config)
        frozen = trainer.discriminator.blocks[0].conv1.weight.requires_grad_(False)
        during: list[bool] = []
        trainer.discriminator.register_forward_hook(
            lambda module, *_: during.extend(p.requires_grad for p in module.parameters())
        )
        trainer.update_generator()
        assert during
        assert not any(during)
        assert all(p.grad is None for p in trainer.discriminator.parameters())
        assert [p is frozen for p in trainer.discriminator.parameters() if not p.requires_grad] == [True]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trainer.generator.parameters())
        assert sum(p.grad.abs().sum() for p in trainer.generator.parameters()) > 0

    @pytest.mark.parametrize("loss", ["hinge", "softplus"])
    def test_losses_and_means_are_those_of_the_logits(self, tiny_config: RunConfig, loss: str) -> None:
        trainer = make_trainer(tiny_config, loss=loss)
        logits: list[Tensor] = []
        trainer.discriminator.register_forward_hook(lambda *args: logits.append(args[2]))
        trainer.update_discriminator(Batches(4))
        trainer.update_generator()
        real, fake = logits[0].detach().chunk(2)
        if loss == "hinge":
            expected = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        else:
            expected = F.softplus(-real).mean() + F.softplus(fake).mean()
        means = trainer.means.take()
        assert means["d_loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert means["g_loss"] == pytest.approx(-logits[1].mean().item(), rel=1e-5)
        assert means["real_logits"] == pytest.approx(real.mean().item(), rel=1e-5)
        assert means["fake_logits"] == pytest.approx(fake.mean().item(), rel=1e-5)
        assert trainer.means.take() == {}

    @pytest.mark.parametrize("sn", [False, True])
    def test_accumulated_gradients_are_those_of_one_batch(self, tiny_config: RunConfig, sn: bool) -> None:
        gradients = []
        for accumulation in (1, 2, 4):
            trainer = make_trainer(
                tiny_config,
                accumulation=accumulation,
                network__d_spectral_norm=sn,
                d_vectors_move_in_g_step=True,
                loss="softplus",
                optimizer=OptimizerConfig(g_lr=1e-12, d_lr=1e-12),
            )
            trainer.generator.eval()  # batch norm would see each part alone
            pixels, labels = next(Batches(4))
            size = 4 // accumulation
            trainer.update_discriminator(zip(pixels.split(size), labels.split(size), strict=True))
            trainer.update_generator()
            parameters = [*trainer.discriminator.parameters(), *trainer.generator.parameters()]
            gradients.append([p.grad.clone() for p in parameters])
        for several in gradients[1:]:
            for one, summed in zip(gradients[0], several, strict=True):
                torch.testing.assert_close(summed, one, rtol=1e-4, atol=1e-6)
        assert max(gradient.abs().max() for gradient in gradients[0]) > 1e-2


class TestVectors:
    @pytest.mark.parametrize(("accumulation", "d_steps"), [(1, 1), (2, 1), (1, 3)])
    def test_an_iteration_moves_the_vectors_of_g_once(
        self, tiny_config: RunConfig, accumulation: int, d_steps: int
    ) -> None:
        trainer = make_trainer(tiny_config, accumulation=accumulation, d_steps=d_steps)
        expected = move_vectors_once(trainer.generator)
        trainer.step(Batches(4 // accumulation))
        assert_same(vectors(trainer.generator), expected)

    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_discriminator_step_moves_its_vectors_once(
        self, tiny_config: RunConfig, accumulation: int
    ) -> None:
        trainer = make_trainer(tiny_config, accumulation=accumulation)
        before, expected = vectors(trainer.discriminator), move_vectors_once(trainer.discriminator)
        trainer.update_discriminator(Batches(4 // accumulation))
        assert differ(before, vectors(trainer.discriminator))
        assert_same(vectors(trainer.discriminator), expected)

    @pytest.mark.parametrize("accumulation", [1, 2])
    @pytest.mark.parametrize("moves", [True, False])
    def test_generator_step_moves_the_vectors_of_d_only_if_configured(
        self, tiny_config: RunConfig, moves: bool, accumulation: int
    ) -> None:
        trainer = make_trainer(tiny_config, accumulation=accumulation, d_vectors_move_in_g_step=moves)
        before = vectors(trainer.discriminator)
        expected = move_vectors_once(trainer.discriminator) if moves else before
        trainer.update_generator()
        assert_same(vectors(trainer.discriminator), expected)
        assert differ(before, vectors(trainer.discriminator)) == moves


class TestAverage:
    @pytest.mark.parametrize("start", [0, 3])
    def test_it_is_a_copy_until_the_start_and_exponential_from_there(
        self, tiny_config: RunConfig, start: int
    ) -> None:
        trainer = make_trainer(tiny_config, ema_decay=0.75, ema_start=start, optimizer__g_lr=0.01)
        assert trainer.average is not None
        average: dict[str, Tensor] = {}
        for iteration in range(1, 6):
            trainer.step(Batches(4))
            latest, held = weights(trainer.generator), weights(trainer.sampling_generator)
            is_copy = iteration <= max(start, 1)
            average = latest if is_copy else {n: 0.75 * average[n] + 0.25 * latest[n] for n in latest}
            torch.testing.assert_close(held, average, rtol=1e-5, atol=1e-7)
            assert is_copy != differ(held, latest)

    def test_buffers_are_copied_never_averaged(self, tiny_config: RunConfig) -> None:
        trainer = stepped(tiny_config, ema_decay=0.75)
        ours = dict(trainer.generator.named_buffers())
        held = dict(trainer.sampling_generator.named_buffers())
        assert any(name.endswith("weight_u") for name in ours)
        assert any(name.endswith("running_var") for name in ours)
        assert_same(held, ours)

    def test_without_decay_samples_come_from_the_generator_itself(self, tiny_config: RunConfig) -> None:
        trainer = make_trainer(tiny_config, ema_decay=0.0)
        assert trainer.average is None
        assert trainer.sampling_generator is trainer.generator
        assert trainer.state_dict()["average"] is None


class TestPrecision:
    def test_bf16_differs_slightly_from_fp32_in_losses_and_gradients(self, tiny_config: RunConfig) -> None:
        results = {}
        for precision in ("fp32", "bf16"):
            trainer = stepped(tiny_config, steps=1, precision=precision)
            assert not trainer.scaler.is_enabled()
            parameters = [*trainer.discriminator.parameters(), *trainer.generator.parameters()]
            assert {p.dtype for p in parameters} == {torch.float32}
            gradient = torch.cat([p.grad.flatten() for p in parameters])
            results[precision] = trainer.means.take()["d_loss"], gradient
        assert results["fp32"][0] != results["bf16"][0]
        assert results["bf16"][0] == pytest.approx(results["fp32"][0], rel=0.02)
        cosine = F.cosine_similarity(results["fp32"][1], results["bf16"][1], dim=0)
        assert 0.95 < cosine < 1 - 1e-7

    def test_fp16_scales_its_losses_and_steps(self, tiny_config: RunConfig) -> None:
        trainer, fresh = (stepped(tiny_config, steps=n, precision="fp16") for n in (3, 0))
        assert trainer.scaler.is_enabled()
        assert all(p.isfinite().all() for p in trainer.generator.parameters())
        assert differ(weights(trainer.generator), weights(fresh.generator))
        trainer.scaler.update(512.0)
        fresh.load_state_dict(trainer.state_dict())
        assert fresh.scaler.get_scale() == 512


def test_discriminator_learns_to_tell_noise_from_flat_images(tiny_config: RunConfig) -> None:
    trainer = make_trainer(
        tiny_config, network__base_width=4, optimizer__g_lr=1e-12, optimizer__d_lr=4e-3, d_steps=5
    )
    batches = Batches(4)
    trainer.step(batches)
    before = trainer.means.take()
    for _ in range(8):
        trainer.step(batches)
        after = trainer.means.take()
    assert after["d_loss"] < 0.5 * before["d_loss"]
    assert after["real_logits"] - after["fake_logits"] > 1


class TestOutput:
    def test_every_file_is_written_when_its_time_comes(self, train_tiny: Train) -> None:
        every = {"output__log_every": 3, "output__sample_every": 4, "output__checkpoint_every": 2}
        seen: list[int] = []
        observe = {"observe": lambda trainer: seen.append(trainer.iteration)}
        result = train_tiny(iterations=7, output__keep_checkpoints=2, **every, **observe)
        out = result.out
        rows = metrics_of(out, timings=True)
        assert [row["iteration"] for row in rows] == [3, 6, 7]
        for row in rows:
            assert {"d_loss", "g_loss", "real_logits", "fake_logits"} <= set(row)
            assert {"gamma_g_8", "gamma_g_16", "gamma_d_8"} <= set(row)
            assert row["images_per_s"] > 0
            assert 0 <= row["data_wait_share"] <= 1
        assert rows[0]["seconds_left"] > 0 == rows[-1]["seconds_left"]
        assert rows[-1]["gamma_g_16"] == result.trainer.generator.mixers["16"].gamma.item() != 0
        assert {"sigma_g.linear", "sigma_d.blocks.0.conv1", "sigma_d.head.embedding"} <= set(rows[0])
        samples = sorted(path.name for path in (out / "samples").iterdir())
        assert seen == [0, 4, 7]
        assert samples == [f"iteration_{number:09d}.png" for number in seen]
        assert sorted(path.name for path in (out / "attention").iterdir()) == samples
        saved = sorted(path.name for path in (out / "checkpoints").glob("*.pt"))
        assert saved == ["iteration_000000006.pt", "iteration_000000007.pt"]
        assert result.checkpoint == find_checkpoint(out)
        assert config_from_dict(json.loads((out / "config.json").read_text())) == result.trainer.config
        state = load_checkpoint(result.checkpoint)
        assert state["class_names"] == ["n01440764", "n01443537", "n01484850"]
        assert state["labels_in_use"].tolist() == [0, 1, 2]

    def test_grids_have_a_class_in_each_row_and_the_same_latents_throughout(self, train_tiny: Train) -> None:
        still = {"optimizer__g_lr": 1e-12, "network__g_spectral_norm": False}
        still |= {"network__bn_momentum": 0.0, "network__last_bn_momentum": 0.0}
        folder = train_tiny(**still).out / "samples"
        grids = [Image.open(path).tobytes() for path in sorted(folder.iterdir())]
        assert len(grids) == 2
        assert grids[0] == grids[1]  # G stood still, so only other latents could differ
        with Image.open(folder / "iteration_000000000.png") as grid:
            assert grid.height == 3 * (96 + 2) + 2
            assert grid.width > 2 * (96 + 2) + 2  # two columns, and the names before them

    def test_progress_without_a_terminal(self, train_tiny: Train, capsys: pytest.CaptureFixture[str]) -> None:
        train_tiny(output__log_every=1, progress=True)
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[:2] for line in lines] == [["iteration", "1"], ["iteration", "2"]]
        for line in lines:
            for part in ("D ", "G ", "gamma_g_16", "img/s", "left"):
                assert part in line

    def test_classes_without_images_are_never_generated(self, train_tiny: Train, tmp_path: Path) -> None:
        for name in ("a", "b", "c", "d"):
            (tmp_path / "data" / name).mkdir(parents=True)
            if name not in ("b", "d"):
                (tmp_path / "data" / name / "0.jpg").write_bytes(jpeg_bytes())
        result = train_tiny(data=tmp_path / "data", network__num_classes=4)
        assert load_checkpoint(result.checkpoint)["labels_in_use"].tolist() == [0, 2]
        for name in ("blocks.0.norm1.weight", "blocks.0.norm1.bias"):
            table = result.trainer.generator.get_parameter(name)
            start = 1.0 if name.endswith("weight") else 0.0
            assert (table[[1, 3]] == start).all()
            assert (table[[0, 2]] != start).any()
        samples = tmp_path / "samples"
        succeed("sample", "--source", result.out, "--out", samples, "--layout", "folders", "--count", 4)
        assert sorted(path.parent.name for path in samples.rglob("*.png")) == ["a", "a", "c", "c"]

    def test_the_loader_of_a_cached_data_set_starts_no_worker(
        self, train_tiny: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = mock.Mock(wraps=make_loader)
        monkeypatch.setattr("sagan.train.loop.make_loader", made)
        for cache_mib in (100, 0):
            train_tiny(str(cache_mib), iterations=1, images__cache_mib=cache_mib, images__workers=1)
        assert [call.kwargs["num_workers"] for call in made.call_args_list] == [0, 1]


class TestErrors:
    @pytest.mark.parametrize(
        ("checkpoint_every", "message"),
        [
            (1, r"discriminator\.head\.linear\.bias: expected finite values.*nothing was saved"),
            (100, r"not finite in 2 updates, the first in iteration 3 \(.*D: head\.linear\.bias"),
        ],
    )
    def test_weights_that_are_not_finite_stop_the_run_and_are_in_no_checkpoint(
        self, checkpoint_every: int, message: str, train_tiny: Train, tmp_path: Path
    ) -> None:
        def poison(trainer: Trainer) -> None:
            if trainer.iteration == 2:
                with torch.no_grad():
                    trainer.discriminator.head.linear.bias.fill_(float("nan"))

        every = {"output__log_every": 4, "output__sample_every": 2}
        with pytest.raises(UserError, match=message):
            train_tiny(iterations=9, observe=poison, output__checkpoint_every=checkpoint_every, **every)
        saved = [load_checkpoint(path) for path in checkpoints_in(tmp_path / "run" / "checkpoints")]
        assert [state["iteration"] for state in saved] == ([1] if checkpoint_every == 1 else [])
        assert all(torch.isfinite(total) for state in saved for total in state["means"]["sums"].values())

    @pytest.mark.parametrize("name", ["gpu", "cuda", "cuda:7", "mps", "xpu", "meta", ""])
    def test_a_missing_device_is_an_error_that_names_those_there_are(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        with pytest.raises(UserError, match=rf"device: expected auto or one of .* \(cpu\), got '{name}'"):
            pick_device(name)
        assert pick_device("auto") == torch.device("cpu")
