"""The two updates of a GAN: what gets gradients, what stays constant, and that they compile."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import CLASSES, Discriminator, assert_same
from torch import Tensor, nn

from sagan_layers import (
    ConditionalBatchNorm2d,
    DiscriminatorPass,
    GeneratorPass,
    SNConv2d,
    SNLinear,
    call_with_constant_parameters,
    frozen_spectral_norm,
    hinge_discriminator_loss,
    hinge_generator_loss,
    shared_spectral_norm,
    softplus_discriminator_loss,
    softplus_generator_loss,
)


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = SNLinear(5, 4 * 4 * 4)
        self.norm = ConditionalBatchNorm2d(4, CLASSES)
        self.conv = SNConv2d(4, 3, 3, padding=1)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        x = self.linear(latents).view(-1, 4, 4, 4)
        return torch.tanh(self.conv(F.interpolate(torch.relu(self.norm(x, labels)), scale_factor=2)))


@pytest.fixture
def networks() -> tuple[Generator, Discriminator]:
    return Generator(), Discriminator()


def batch(size: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    real = torch.rand(size, 3, 8, 8) * 2 - 1
    labels = torch.arange(2 * size) % CLASSES
    return real, torch.randn(size, 5), labels[:size], labels[size:]


def gradients(*modules: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for module in modules for parameter in module.parameters()]


@pytest.mark.parametrize("loss", [hinge_discriminator_loss, softplus_discriminator_loss])
def test_discriminator_pass_is_the_step_written_out(
    networks: tuple[Generator, Discriminator], loss: Callable[..., Tensor]
) -> None:
    generator, discriminator = networks
    plain_g, plain_d = copy.deepcopy(networks)
    real, latents, real_labels, fake_labels = batch()
    result = DiscriminatorPass(generator, discriminator, loss)(real, latents, real_labels, fake_labels)
    result.loss.backward()
    with torch.no_grad():
        fake = plain_g(latents, fake_labels)
    logits = plain_d(torch.cat([real, fake]), torch.cat([real_labels, fake_labels]))
    expected = loss(real_logits=logits[:4], fake_logits=logits[4:])
    expected.backward()
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(torch.cat([result.real_logits, result.fake_logits]), logits)
    torch.testing.assert_close(gradients(discriminator), gradients(plain_d))
    assert all(gradient is None for gradient in gradients(generator))
    # The generator's vectors and statistics are updated as well.
    assert_same(dict(generator.named_buffers()), dict(plain_g.named_buffers()))


@pytest.mark.parametrize("loss", [hinge_generator_loss, softplus_generator_loss])
def test_generator_pass_is_the_step_written_out(
    networks: tuple[Generator, Discriminator], loss: Callable[..., Tensor]
) -> None:
    generator, discriminator = networks
    plain_g, plain_d = copy.deepcopy(networks)
    _, latents, _, labels = batch()
    with frozen_spectral_norm(discriminator):
        result = GeneratorPass(generator, discriminator, loss)(latents, labels)
    result.loss.backward()
    plain_d.requires_grad_(False)
    with frozen_spectral_norm(plain_d):
        logits = plain_d(plain_g(latents, labels), labels)
    expected = loss(fake_logits=logits)
    expected.backward()
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(result.fake_logits, logits)
    torch.testing.assert_close(gradients(generator), gradients(plain_g))
    assert sum(float(gradient.abs().sum()) for gradient in gradients(generator) if gradient is not None) > 0
    assert all(gradient is None for gradient in gradients(discriminator))
    assert all(parameter.requires_grad for parameter in discriminator.parameters())


def test_shared_weights_serve_both_passes(networks: tuple[Generator, Discriminator]) -> None:
    generator, discriminator = networks
    plain_g, plain_d = copy.deepcopy(networks)
    real, latents, real_labels, fake_labels = batch()
    with shared_spectral_norm(generator):
        with shared_spectral_norm(discriminator):
            first = DiscriminatorPass(generator, discriminator)(real, latents, real_labels, fake_labels)
            first.loss.backward()
        with frozen_spectral_norm(discriminator), shared_spectral_norm(discriminator):
            second = GeneratorPass(generator, discriminator)(latents, fake_labels)
            second.loss.backward()
    expected = DiscriminatorPass(plain_g, plain_d)(real, latents, real_labels, fake_labels)
    expected.loss.backward()
    with frozen_spectral_norm(plain_d), frozen_spectral_norm(plain_g, iterate=False):
        expected_second = GeneratorPass(plain_g, plain_d)(latents, fake_labels)
        expected_second.loss.backward()
    torch.testing.assert_close(first.loss, expected.loss)
    torch.testing.assert_close(second.loss, expected_second.loss)
    torch.testing.assert_close(
        gradients(generator, discriminator), gradients(plain_g, plain_d), rtol=1e-5, atol=1e-6
    )


def test_networks_without_labels_are_called_without() -> None:
    generator, discriminator = nn.Linear(4, 6), nn.Linear(6, 1)
    result = DiscriminatorPass(generator, discriminator)(torch.randn(3, 6), torch.randn(5, 4))
    assert (result.real_logits.shape, result.fake_logits.shape) == ((3, 1), (5, 1))
    assert GeneratorPass(generator, discriminator)(torch.randn(5, 4)).fake_logits.shape == (5, 1)
    with pytest.raises(ValueError, match="real_labels, fake_labels: expected both or neither, got one"):
        DiscriminatorPass(generator, discriminator)(torch.randn(3, 6), torch.randn(5, 4), torch.zeros(3))


def test_only_the_network_that_is_updated_is_a_submodule(networks: tuple[Generator, Discriminator]) -> None:
    generator, discriminator = networks
    d_pass, g_pass = DiscriminatorPass(*networks), GeneratorPass(*networks)
    assert set(map(id, d_pass.parameters())) == set(map(id, discriminator.parameters()))
    assert set(map(id, g_pass.parameters())) == set(map(id, generator.parameters()))


def test_images_are_taken_in_the_dtype_of_the_real_ones(networks: tuple[Generator, Discriminator]) -> None:
    real, latents, real_labels, fake_labels = batch()
    with torch.autocast("cpu", torch.bfloat16):
        result = DiscriminatorPass(*networks)(real, latents, real_labels, fake_labels)
    assert result.loss.isfinite()
    result.loss.backward()


def test_constant_parameters_give_the_inputs_gradient_and_none_to_the_parameters() -> None:
    module = nn.Sequential(SNConv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 1, 1))
    x = torch.randn(2, 2, 5, 5, requires_grad=True)
    with frozen_spectral_norm(module):
        constant = call_with_constant_parameters(module, x)
        (mine,) = torch.autograd.grad(constant.sum(), x)
        expected = module(x)
        (theirs,) = torch.autograd.grad(expected.sum(), x)
    assert torch.equal(constant, expected)
    torch.testing.assert_close(mine, theirs)
    constant = call_with_constant_parameters(module, x.detach())
    assert not constant.requires_grad
    assert all(isinstance(parameter, nn.Parameter) for parameter in module.parameters())


def test_constant_parameters_are_restored_after_an_error() -> None:
    module = nn.Sequential(SNConv2d(2, 3, 3))
    before = list(module.parameters())
    with pytest.raises(ValueError, match="C = 2"):
        call_with_constant_parameters(module, torch.randn(1, 5, 4, 4))
    assert all(one is other for one, other in zip(module.parameters(), before, strict=True))


@pytest.mark.usefixtures("_fresh_compiler")
def test_both_passes_are_one_graph_each_and_never_compiled_again() -> None:
    networks = Generator(), Discriminator()
    plain = copy.deepcopy(networks)

    def train(generator: nn.Module, discriminator: nn.Module, compiled: bool) -> list[float]:
        passes = DiscriminatorPass(generator, discriminator), GeneratorPass(generator, discriminator)
        optimizers = [
            torch.optim.Adam(module.parameters(), 1e-3, betas=(0.0, 0.9))
            for module in (discriminator, generator)
        ]
        if compiled:
            for each in passes:
                each.compile(fullgraph=True, dynamic=False, backend="aot_eager")
        torch.manual_seed(4)
        losses = []
        for step in range(4):
            if compiled and step == 1:
                torch._dynamo.config.error_on_recompile = True
            real, latents, real_labels, fake_labels = batch()
            with shared_spectral_norm(generator):
                with shared_spectral_norm(discriminator):
                    optimizers[0].zero_grad()
                    result = passes[0](real, latents, real_labels, fake_labels)
                    result.loss.backward()
                optimizers[0].step()
                with frozen_spectral_norm(discriminator), shared_spectral_norm(discriminator):
                    optimizers[1].zero_grad()
                    other = passes[1](latents, fake_labels)
                    other.loss.backward()
            optimizers[1].step()
            losses += [result.loss.item(), other.loss.item()]
        return losses

    try:
        compiled = train(*networks, True)
    finally:
        torch._dynamo.config.error_on_recompile = False
    assert compiled == pytest.approx(train(*plain, False), rel=1e-4)
    torch.testing.assert_close([*networks[0].buffers()], [*plain[0].buffers()], rtol=1e-4, atol=1e-4)


class Scales(nn.Module):
    """A discriminator that judges images at two scales."""

    def __init__(self, container: type = list) -> None:
        super().__init__()
        self.convs = nn.ModuleList([SNConv2d(3, 1, 3), SNConv2d(3, 1, 3)])
        self.container = container

    def forward(self, x: Tensor) -> Any:
        return self.container([self.convs[0](x), self.convs[1](F.avg_pool2d(x, 2))])


@pytest.mark.parametrize("container", [list, tuple])
def test_a_discriminator_of_several_scales_serves_both_passes(container: type) -> None:
    generator, discriminator = nn.Sequential(SNLinear(5, 192), nn.Unflatten(1, (3, 8, 8))), Scales(container)
    real, latents, *_ = batch()
    result = DiscriminatorPass(generator, discriminator)(real[:3], latents)
    assert [logits.shape for logits in result.real_logits] == [(3, 1, 6, 6), (3, 1, 2, 2)]
    assert [logits.shape for logits in result.fake_logits] == [(4, 1, 6, 6), (4, 1, 2, 2)]
    expected = hinge_discriminator_loss(real_logits=result.real_logits, fake_logits=result.fake_logits)
    assert torch.equal(result.loss, expected)
    result.loss.backward()
    assert all(parameter.grad is not None for parameter in discriminator.parameters())
    passed = GeneratorPass(generator, discriminator)(latents)
    assert torch.equal(passed.loss, hinge_generator_loss(passed.fake_logits))
    passed.loss.backward()
    assert torch.count_nonzero(generator[0].weight.grad) > 0


@pytest.mark.parametrize(
    ("returns", "error", "message"),
    [
        (
            lambda x: {"logits": x},
            TypeError,
            "expected a tensor of logits or a list of them, got logits of type dict",
        ),
        (
            lambda x: [x, [x]],
            TypeError,
            r"got logits\[1\] of type list; return such, or write your own update",
        ),
        (lambda x: [x, x[:2]], ValueError, r"discriminator: expected logits\[1\] for 6 images, got \[2, 6\]"),
        (lambda x: [], ValueError, "logits: expected at least one tensor, got an empty list"),
    ],
)
def test_a_discriminator_that_returns_something_else_is_refused(
    returns: Callable[[Tensor], Any], error: type[Exception], message: str
) -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return returns(x)

    with pytest.raises(error, match=message):
        DiscriminatorPass(nn.Linear(4, 6), Other())(torch.randn(3, 6), torch.randn(3, 4))
