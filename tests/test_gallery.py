"""The recipes of docs/put_attention_into.md run, as they are and as they were, and do what the page says of them."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sagan_layers import SelfAttention2d, SpectralNormLayer, apply_spectral_norm

PAGE = Path(__file__).parent.parent / "docs" / "put_attention_into.md"
RECIPES = dict(re.findall(r"(?m)^## (.+)\n\n```python\n([\s\S]*?)^```", PAGE.read_text()))


def recipe(title: str, *, before: bool = False) -> Any:
    """Return a recipe's names; ``before``: without the lines marked as new and with those they replaced."""
    source = RECIPES[title]
    if before:
        source = re.sub(r"(?m)^( *)with .*  # new.*$", r"\1if True:", source)
        source = re.sub(r"(?m)^.*  # new.*\n", "", source)
        source = re.sub(r"(?m)^( *)# was: ", r"\1", source)
    torch.manual_seed(0)
    module = types.ModuleType(title)
    exec(compile(source, title, "exec"), vars(module))
    return module


def attention_of(network: nn.Module) -> SelfAttention2d:
    (attention,) = (layer for layer in network.modules() if isinstance(layer, SelfAttention2d))
    return attention


def vectors_of(network: nn.Module) -> list[Tensor]:
    return [layer.weight_u for layer in network.modules() if isinstance(layer, SpectralNormLayer)]


def wake(network: nn.Module) -> None:
    for layer in network.modules():
        if isinstance(layer, SelfAttention2d):
            nn.init.constant_(layer.gamma, 0.7)


def take_parameters(network: nn.Module, other: nn.Module) -> None:
    """Copy all parameters of a network that are not attention's from one without attention."""
    own = set(attention_of(network).parameters())
    for ours, theirs in zip(
        [p for p in network.parameters() if p not in own], other.parameters(), strict=True
    ):
        ours.data.copy_(theirs)


def pixels_that_matter(network: nn.Module, size: int) -> int:
    images = torch.randn(1, 3, size, size, requires_grad=True)
    logits = network(images)
    (gradient,) = torch.autograd.grad(logits[0, 0, logits.size(2) // 2, logits.size(3) // 2], images)
    return int(gradient.abs().sum(1).count_nonzero())


@pytest.mark.parametrize("before", [False, True], ids=["with attention", "before"])
def test_dcgan(before: bool) -> None:
    dcgan = recipe("DCGAN", before=before)
    loss = dcgan.step(torch.randn(4, 3, 64, 64))
    loss.backward()
    assert torch.isfinite(loss)
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in dcgan.discriminator) == before
    assert isinstance(dcgan.discriminator[0], SpectralNormLayer) != before
    for network in (dcgan.generator, dcgan.discriminator):
        assert any(isinstance(layer, SelfAttention2d) for layer in network) != before
        assert all(p.grad is not None for p in network.parameters())


def test_dcgan_starts_as_it_was_and_initialises_attention_too() -> None:
    dcgan, before = recipe("DCGAN"), recipe("DCGAN", before=True)
    take_parameters(dcgan.generator, before.generator)
    latents = torch.randn(4, 16, 1, 1)
    torch.testing.assert_close(dcgan.generator(latents), before.generator(latents), rtol=0, atol=0)
    attention = attention_of(dcgan.generator)
    assert attention.out.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert attention.gamma == 0


def test_a_layer_put_into_a_sequential_after_loading_keeps_an_old_checkpoint_usable() -> None:
    dcgan, before = recipe("DCGAN"), recipe("DCGAN", before=True)
    checkpoint = before.generator.state_dict()
    with pytest.raises(RuntimeError, match="Missing key"):
        dcgan.generator.load_state_dict(checkpoint)
    latents = torch.randn(4, 16, 1, 1)
    expected = before.generator(latents)
    before.generator.insert(12, SelfAttention2d(8))
    assert before.generator(latents).equal(expected)
    dcgan.generator.load_state_dict(before.generator.state_dict())


def test_a_normalisation_after_a_convolution_undoes_spectral_normalisation() -> None:
    for norm in (nn.BatchNorm2d(8), nn.InstanceNorm2d(8)):
        network = nn.Sequential(nn.Conv2d(3, 8, 4, bias=False), norm)
        x = torch.randn(4, 3, 16, 16)
        expected = network(x)
        weight = apply_spectral_norm(network)[0].normalized_weight()
        assert (weight / network[0].weight - 1).abs().min() > 0.2
        torch.testing.assert_close(network(x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("before", [False, True], ids=["with attention", "before"])
def test_wgan_gp(before: bool) -> None:
    wgan_gp = recipe("WGAN-GP", before=before)
    wake(wgan_gp.critic)
    assert wgan_gp.critic_step(torch.randn(4, 3, 16, 16)) != 0
    assert all(p.grad is not None for p in wgan_gp.critic.parameters())


def test_the_penalty_reaches_attention_and_each_image_has_its_own() -> None:
    wgan_gp = recipe("WGAN-GP")
    wake(wgan_gp.critic)
    wgan_gp.gradient_penalty(torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)).backward()
    assert attention_of(wgan_gp.critic).query.weight.grad.abs().max() > 0
    coupled = nn.Sequential(*wgan_gp.critic)
    coupled.insert(1, nn.BatchNorm2d(16))
    for critic, is_coupled in ((wgan_gp.critic, False), (coupled, True)):
        images = torch.randn(4, 3, 16, 16, requires_grad=True)
        (gradient,) = torch.autograd.grad(critic(images)[0].sum(), images)
        assert bool(gradient[1:].any()) == is_coupled


def test_a_path_length_penalty_reaches_attention() -> None:
    generator = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), SelfAttention2d(16, gamma_init=0.7))
    latents = torch.randn(2, 4, 8, 8, requires_grad=True)
    fake = generator(latents)
    (gradient,) = torch.autograd.grad((fake * torch.randn_like(fake)).sum(), latents, create_graph=True)
    gradient.square().sum((1, 2, 3)).sqrt().sub(1).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in generator[1].parameters())


def test_shared_weights_iterate_once_in_a_step() -> None:
    after, once = recipe("WGAN-GP"), recipe("WGAN-GP")
    after.critic_step(torch.randn(4, 3, 16, 16))
    once.critic(torch.randn(4, 3, 16, 16))
    assert all(u.equal(v) for u, v in zip(vectors_of(after.critic), vectors_of(once.critic), strict=True))


def first_adam_step(stylegan2: Any) -> dict[str, float]:
    """Return how far each parameter moved, relative to its norm."""
    wake(stylegan2.discriminator)
    old = {name: p.detach().clone() for name, p in stylegan2.discriminator.named_parameters()}
    stylegan2.discriminator(torch.randn(2, 3, 64, 64)).sum().backward()
    stylegan2.optimizer.step()
    new = dict(stylegan2.discriminator.named_parameters())
    return {name: ((new[name].detach() - p).norm() / p.norm()).item() for name, p in old.items()}


def test_stylegan2_starts_as_it_was() -> None:
    stylegan2, before = recipe("StyleGAN2"), recipe("StyleGAN2", before=True)
    take_parameters(stylegan2.discriminator, before.discriminator)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(stylegan2.discriminator(images), before.discriminator(images), rtol=0, atol=0)


def test_with_its_own_rate_attention_moves_as_slowly_as_equalised_weights() -> None:
    moved = first_adam_step(recipe("StyleGAN2"))
    attention = {name for name in moved if re.search(r"(query|key|value|out)\.weight", name)}
    assert len(attention) == 4
    for name, change in moved.items():
        if not name.endswith("gamma"):
            # An entry moves by 0.002, and the norm of n standard normal ones is near the root of n.
            assert change < (0.002 if name in attention else 0.0025), name


def test_at_stylegan2s_rate_attention_moves_many_times_faster() -> None:
    stylegan2 = recipe("StyleGAN2")
    stylegan2.optimizer = torch.optim.Adam(stylegan2.discriminator.parameters(), lr=0.002, betas=(0.0, 0.99))
    moved = first_adam_step(stylegan2)
    assert moved["convs.2.query.weight"] > 5 * moved["convs.1.conv1.weight"]


@pytest.mark.parametrize("before", [False, True], ids=["with buffers", "before"])
def test_an_average_of_parameters_alone_normalises_by_the_wrong_sigma(before: bool) -> None:
    accumulate = recipe("StyleGAN2", before=before).accumulate
    trained, average = SelfAttention2d(64, gamma_init=0.7), SelfAttention2d(64, gamma_init=0.7)
    for _ in range(30):
        trained(torch.randn(1, 64, 8, 8))
    with torch.no_grad():
        accumulate(average, trained, 0)
    x = torch.randn(1, 64, 8, 8)
    expected, found = trained.eval()(x), average.eval()(x)
    error = (found - expected).norm() / (expected - x).norm()
    assert (error > 0.2) if before else (error == 0)


def test_layers_with_a_weight_of_their_own_are_not_normalised() -> None:
    stylegan2 = recipe("StyleGAN2")
    with pytest.warns(UserWarning, match="EqualConv2d"):
        apply_spectral_norm(stylegan2.discriminator)
    assert not isinstance(stylegan2.discriminator.final, SpectralNormLayer)


def test_with_attention_a_patch_is_the_whole_image() -> None:
    network = recipe("PatchGAN of pix2pix and CycleGAN").NLayerDiscriminator(3, ndf=8)
    assert all(
        isinstance(layer, SpectralNormLayer) for layer in network.modules() if isinstance(layer, nn.Conv2d)
    )
    assert pixels_that_matter(network, 128) == 70**2
    wake(network)
    assert pixels_that_matter(network, 128) == 128**2
    before, images = (
        recipe("PatchGAN of pix2pix and CycleGAN", before=True).NLayerDiscriminator(3, ndf=8),
        torch.randn(1, 3, 128, 128),
    )
    assert before(images).shape == network(images).shape


def test_lightweight_gan_starts_as_it_was_and_adds_the_map_once() -> None:
    after, before = (
        recipe("lightweight-gan", before=each).Generator(16, (16, 16, 16, 8)) for each in (False, True)
    )
    gsa = set(before.layers[2][1].parameters())
    take_parameters(after, nn.ParameterList([p for p in before.parameters() if p not in gsa]))
    latents = torch.randn(4, 16)
    torch.testing.assert_close(after(latents), before(latents), rtol=0, atol=0)


@pytest.mark.parametrize("before", [False, True], ids=["copied", "averaged"])
def test_averaged_vectors_are_no_unit_vectors(before: bool) -> None:
    lightweight_gan = recipe("lightweight-gan", before=before)
    model, average = SelfAttention2d(64), SelfAttention2d(64)
    for _ in range(3):
        lightweight_gan.update_moving_average(average, model, 0.5)
    lengths = torch.stack([u.norm() for u in vectors_of(average)])
    assert torch.allclose(lengths, torch.ones(4)) != before


def test_biggan_loads_its_checkpoint_with_and_without_our_attention() -> None:
    after, before = recipe("BigGAN"), recipe("BigGAN", before=True)
    peer = before.Generator()
    nn.init.constant_(peer.blocks[1][1].gamma, 0.7)
    for name, buffer in peer.named_buffers():
        if name.endswith("u0"):
            buffer.normal_()
    ours, theirs = after.Generator(), before.Generator()
    after.load(ours, peer.state_dict())
    before.load(theirs, peer.state_dict())
    h = torch.randn(2, 16, 4, 4)
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(h), theirs.train(training)(h), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attention_of(ours).query.weight_u, theirs.blocks[1][1].theta.u0[0])


class FakeLightningModule(nn.Module):
    """What the recipe uses of Lightning: optimizers, and parameters that only their own optimizer trains."""

    device = torch.device("cpu")

    def optimizers(self) -> Any:
        if "both" not in self.__dict__:
            self.__dict__["both"] = self.configure_optimizers()
        return self.__dict__["both"]

    def toggle_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        own = {p for group in optimizer.param_groups for p in group["params"]}
        for p in self.parameters():
            p.requires_grad_(p in own)

    def untoggle_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self.requires_grad_()

    def manual_backward(self, loss: Tensor) -> None:
        loss.backward()


class FakeAccelerator:
    """What the recipe uses of accelerate: optimizers that wait for the last part of a batch."""

    device = torch.device("cpu")

    def __init__(self, parts: int, watched: nn.Sequential) -> None:
        self.parts, self.part, self.watched = parts, 0, watched
        self.vectors: list[Tensor] = []
        self.gradients: list[Tensor | None] = []

    @property
    def sync_gradients(self) -> bool:
        return self.part % self.parts == 0

    def prepare(self, *objects: Any) -> tuple[Any, ...]:
        for optimizer in objects[2:4]:
            for name in ("step", "zero_grad"):
                setattr(optimizer, name, functools.partial(self._at_the_end, getattr(optimizer, name)))
        return objects

    def _at_the_end(self, method: Callable[[], None]) -> None:
        if self.sync_gradients:
            method()

    @contextlib.contextmanager
    def accumulate(self, *models: nn.Module) -> Iterator[None]:
        self.part += 1
        yield

    def backward(self, loss: Tensor) -> None:
        self.vectors.append(torch.cat(vectors_of(self.watched)))
        (loss / self.parts).backward()
        self.gradients.append(copy.deepcopy(self.watched[0].weight.grad))


def networks() -> tuple[nn.Sequential, nn.Sequential]:
    generator = nn.Sequential(
        nn.ConvTranspose2d(16, 8, 4), nn.ReLU(), SelfAttention2d(8), nn.ConvTranspose2d(8, 3, 4, 2, 1)
    )
    discriminator = nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1), SelfAttention2d(8), nn.Flatten(), nn.Linear(8 * 4 * 4, 1)
    )
    wake(generator)
    wake(discriminator)
    return generator, discriminator


@pytest.mark.parametrize("before", [False, True], ids=["normalised", "before"])
def test_lightning_trains_both_networks_and_iterates_once(
    before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = types.SimpleNamespace(LightningModule=FakeLightningModule)
    monkeypatch.setitem(sys.modules, "lightning", stand_in)
    gan = recipe("Lightning", before=before).GAN(*networks())
    old = copy.deepcopy(gan)
    gan.training_step(torch.randn(4, 3, 8, 8), 0)
    for network, was in ((gan.generator, old.generator), (gan.discriminator, old.discriminator)):
        assert not any(p.equal(q) for p, q in zip(network[0].parameters(), was[0].parameters(), strict=True))
    if not before:
        old.discriminator(torch.randn(4, 3, 8, 8))
        for u, v in zip(vectors_of(gan.discriminator), vectors_of(old.discriminator), strict=True):
            torch.testing.assert_close(u, v)


@pytest.mark.parametrize("before", [False, True], ids=["normalised", "before"])
def test_accelerate_accumulates_parts_with_the_same_weights(before: bool) -> None:
    generator, discriminator = networks()
    old, parts = copy.deepcopy(discriminator), torch.randn(2, 4, 3, 8, 8)
    accelerator = FakeAccelerator(len(parts), discriminator)
    recipe("accelerate", before=before).train(accelerator, generator, discriminator, parts)
    assert not discriminator[0].weight.equal(old[0].weight)
    of_d, after_gs_loss, *_ = accelerator.gradients
    assert torch.equal(after_gs_loss, of_d) != before
    first, *others, after_the_step = accelerator.vectors
    assert all(u.equal(first) for u in others) != before
    assert not after_the_step.equal(first)
