"""The released TensorFlow code's whole networks (tests/golden), and the loaders of their variables."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from measured import relative_error
from torch import Tensor, nn

from sagan.convert import load_tensorflow_discriminator, load_tensorflow_generator
from sagan.networks import Discriminator, Generator, NetworkConfig
from sagan_layers import (
    ConditionalBatchNorm2d,
    SelfAttention2d,
    SpectralNormLayer,
    frozen_spectral_norm,
    hinge_discriminator_loss,
    hinge_generator_loss,
)

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-4
Arrays = dict[str, np.ndarray]
NON_LOCAL = {name: [f"model/{name}_non_local{end}" for end in ("", "_1", "_2")] for name in ("g", "d")}


def load(name: str) -> Arrays:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


def below(arrays: Arrays, prefix: str) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def assert_agrees(ours: Tensor, recorded: np.ndarray, what: str) -> None:
    error = relative_error(ours, torch.as_tensor(recorded), what)
    assert error <= TOLERANCE, f"{what}: relative error {error:.2e} above {TOLERANCE:.0e}"


def assert_all_agree(ours: Arrays, recorded: Arrays) -> None:
    for name, array in recorded.items():
        assert_agrees(torch.from_numpy(ours[name]), array, name)


def nchw(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def pixels(array: np.ndarray) -> Tensor:
    return nchw(array.astype(np.float32) / 127.5 - 1)


def to_numpy(values: Tensor, *axes: int) -> np.ndarray:
    """Return a copy with its axes in this order, by default as they are."""
    return values.detach().permute(axes or tuple(range(values.ndim))).numpy().copy()


def layer_variables(layer: nn.Module) -> Arrays:
    """Return a layer's variables in TensorFlow's layout, by name."""
    if isinstance(layer, ConditionalBatchNorm2d):
        variables = {"gamma": to_numpy(layer.weight), "beta": to_numpy(layer.bias)}
        mean, var = to_numpy(layer.norm.running_mean), to_numpy(layer.norm.running_var)
        if layer.num_classes:
            return variables | {"mean": mean[None, None, None], "var": var[None, None, None]}
        return variables | {"moving_mean": mean, "moving_variance": var}
    if isinstance(layer, SelfAttention2d):
        parts = {"theta": layer.query, "phi": layer.key, "g": layer.value, "attn": layer.out}
        scoped = variables_of({f"sn_conv_{name}": part for name, part in parts.items()})
        return scoped | {"sigma_ratio": to_numpy(layer.gamma)}
    if isinstance(layer, nn.Conv2d):
        variables = {"w": to_numpy(layer.weight, 2, 3, 1, 0)}
        if layer.bias is not None:
            variables["biases"] = to_numpy(layer.bias)
    elif isinstance(layer, nn.Linear):
        variables = {"Matrix": to_numpy(layer.weight, 1, 0), "bias": to_numpy(layer.bias)}
    else:
        assert isinstance(layer, nn.Embedding)
        variables = {"embedding_map": to_numpy(layer.weight)}
    if isinstance(layer, SpectralNormLayer):
        variables["u"] = to_numpy(layer.weight_u)[None]
    return variables


def variables_of(layers: dict[str, nn.Module]) -> Arrays:
    """Return the variables of all layers, each below its scope."""
    return {
        f"{scope}/{name}": array
        for scope, layer in layers.items()
        for name, array in layer_variables(layer).items()
    }


def generator_variables(generator: Generator) -> Arrays:
    layers: dict[str, nn.Module] = {"model/g_snh0": generator.linear}
    for number, block in enumerate(generator.blocks, 1):
        scope = f"model/g_block{number}"
        layers |= {f"{scope}/cbn_0": block.norm1, f"{scope}/cbn_1": block.norm2}
        layers |= {f"{scope}/snconv1": block.conv1, f"{scope}/snconv2": block.conv2}
        layers[f"{scope}/snconv3"] = block.shortcut
    layers |= dict(zip(NON_LOCAL["g"], generator.mixers.values(), strict=False))
    layers |= {"model/g_bn": generator.last_norm, "model/g_snconv_last": generator.last_conv}
    variables = variables_of(layers)
    for name, array in layer_variables(generator.linear).items():
        by_channel = array.reshape(*array.shape[:-1], generator.first_shape[0], 16)
        variables[f"model/g_snh0/{name}"] = by_channel.swapaxes(-1, -2).reshape(array.shape)
    return variables


def discriminator_variables(discriminator: Discriminator) -> Arrays:
    layers: dict[str, nn.Module] = {}
    for number, block in enumerate([*discriminator.blocks, discriminator.last_block], 1):
        scope = f"model/d_block{number}" if number > 1 else "model/d_optimized_block1"
        layers |= {f"{scope}/sn_conv1": block.conv1, f"{scope}/sn_conv2": block.conv2}
        if block is not discriminator.last_block:
            layers[f"{scope}/sn_conv3"] = block.shortcut
    layers |= dict(zip(NON_LOCAL["d"], discriminator.mixers.values(), strict=False))
    head = discriminator.head
    return variables_of({**layers, "model/d_sn_linear": head.linear, "model/d_embedding": head.embedding})


def discriminator_gradients(discriminator: Discriminator) -> Arrays:
    """Return the gradients in TensorFlow's layout."""
    gradients = copy.deepcopy(discriminator)
    for place, parameter in zip(gradients.parameters(), discriminator.parameters(), strict=True):
        place.data = parameter.grad
    variables = discriminator_variables(gradients)
    return {name: variables[name] for name in variables if not name.endswith("/u")}


@pytest.fixture(scope="module")
def g_arrays() -> Arrays:
    return load("generator_attention32")


@pytest.fixture(scope="module")
def d_arrays() -> Arrays:
    return load("discriminator_attention32")


@pytest.fixture
def generator(g_arrays: Arrays) -> Generator:
    network = Generator(NetworkConfig(resolution=128, base_width=2, num_classes=6))
    load_tensorflow_generator(network, below(g_arrays, "before/"))
    return network


@pytest.fixture
def discriminator(d_arrays: Arrays) -> Discriminator:
    network = Discriminator(NetworkConfig(resolution=128, base_width=4, num_classes=6))
    load_tensorflow_discriminator(network, below(d_arrays, "before/"))
    return network


class TestGeneratorAgainstTheReleasedCode:
    def test_training_output_and_vectors_after_it(self, generator: Generator, g_arrays: Arrays) -> None:
        assert generator.mixers["32"].gamma.item() != 0
        images = generator(torch.from_numpy(g_arrays["z"]), torch.from_numpy(g_arrays["labels"]))
        assert_agrees(images, nchw(g_arrays["y_train"]).numpy(), "y_train")
        recorded = below(g_arrays, "after/")
        assert len(recorded) == 21
        assert_all_agree(generator_variables(generator), recorded)

    def test_evaluation_output_changes_nothing(self, generator: Generator, g_arrays: Arrays) -> None:
        generator.eval()
        before = copy.deepcopy(generator.state_dict())
        images = generator(torch.from_numpy(g_arrays["z"]), torch.from_numpy(g_arrays["labels"]))
        assert_agrees(images, nchw(g_arrays["y_eval"]).numpy(), "y_eval")
        assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())
        assert np.abs(g_arrays["y_eval"] - g_arrays["y_train"]).max() > 0.01  # the two are told apart

    def test_outputs_of_the_first_layer_become_channels_first(
        self, generator: Generator, g_arrays: Arrays
    ) -> None:
        matrix = g_arrays["before/model/g_snh0/Matrix"]
        bias, u = g_arrays["before/model/g_snh0/bias"], g_arrays["before/model/g_snh0/u"]
        for channel, row, column in ((0, 0, 0), (0, 0, 1), (1, 0, 0), (31, 3, 2), (7, 2, 0)):
            theirs, ours = (row * 4 + column) * 32 + channel, (channel * 4 + row) * 4 + column
            assert np.array_equal(generator.linear.weight[ours].detach().numpy(), matrix[:, theirs])
            assert generator.linear.bias[ours].item() == bias[theirs]
            assert generator.linear.weight_u[ours].item() == u[0, theirs]


class TestDiscriminatorAgainstTheReleasedCode:
    def test_logits_losses_and_every_gradient(self, discriminator: Discriminator, d_arrays: Arrays) -> None:
        before = below(d_arrays, "before/")
        images = torch.cat([pixels(d_arrays["real_uint8"]), pixels(d_arrays["fake_uint8"])])
        labels = torch.from_numpy(np.concatenate([d_arrays["labels_real"], d_arrays["labels_fake"]]))
        with frozen_spectral_norm(discriminator):
            real_logits, fake_logits = discriminator(images, labels).chunk(2)
        d_loss = hinge_discriminator_loss(real_logits=real_logits, fake_logits=fake_logits)
        g_loss = hinge_generator_loss(fake_logits=fake_logits)
        results = {"logits_real": real_logits, "logits_fake": fake_logits, "d_loss": d_loss, "g_loss": g_loss}
        for name, value in results.items():
            assert_agrees(value, d_arrays[name], name)
        d_loss.backward()
        ours, recorded = discriminator_gradients(discriminator), below(d_arrays, "grad/")
        assert set(ours) == set(recorded)
        assert_all_agree(ours, recorded)
        for name, array in discriminator_variables(discriminator).items():
            if name.endswith("/u"):
                assert np.array_equal(array, before[name]), name

    def test_a_real_batch_moves_the_vectors_and_a_frozen_fake_one_does_not(
        self, discriminator: Discriminator, d_arrays: Arrays
    ) -> None:
        variables = below(d_arrays, "before/") | below(d_arrays, "random_u/before/")
        load_tensorflow_discriminator(discriminator, variables)
        real_labels = torch.from_numpy(d_arrays["labels_real"])
        fake_labels = torch.from_numpy(d_arrays["labels_fake"])
        real_logits = discriminator(pixels(d_arrays["real_uint8"]), real_labels)
        assert_agrees(real_logits, d_arrays["random_u/logits_real"], "logits_real")
        after = below(d_arrays, "random_u/after/")
        assert len(after) == 23
        assert_all_agree(discriminator_variables(discriminator), after)
        with frozen_spectral_norm(discriminator):
            fake_logits = discriminator(pixels(d_arrays["fake_uint8"]), fake_labels)
        assert_agrees(fake_logits, d_arrays["random_u/logits_fake_after_update"], "logits_fake")
        assert_all_agree(discriminator_variables(discriminator), after)


TINY = NetworkConfig(
    resolution=32, base_width=2, num_classes=3, latent_dim=5, g_attention=(8, 32), d_attention=(16, 4)
)
NETWORKS = [
    pytest.param(Generator, generator_variables, load_tensorflow_generator, id="generator"),
    pytest.param(Discriminator, discriminator_variables, load_tensorflow_discriminator, id="discriminator"),
]


def random_network(kind: type, config: NetworkConfig, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = kind(config)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif value.is_floating_point() and not name.endswith(("weight_u", "weight_v")):
                value.normal_()
    return network


@pytest.mark.parametrize(("kind", "export", "loader"), NETWORKS)
class TestLoaders:
    @pytest.mark.parametrize("places", [(), (16,), (8, 16)])
    def test_variables_reach_their_places_with_any_attentions(self, kind, export, loader, places) -> None:
        config = replace(TINY, g_attention=places, d_attention=places)
        source, target = random_network(kind, config, 1), random_network(kind, config, 2)
        loader(target, export(source))
        for name, value in source.state_dict().items():
            if name.endswith(("num_batches_tracked", "weight_v")):  # TensorFlow has none
                continue
            assert torch.equal(target.state_dict()[name], value), name
        x = torch.randn(2, *((5,) if kind is Generator else (3, 32, 32)))
        labels = torch.tensor([0, 2])
        assert target.eval()(x, labels).equal(source.eval()(x, labels))

    def test_variables_that_do_not_fit_are_all_named_and_none_is_loaded(self, kind, export, loader) -> None:
        variables = export(random_network(kind, TINY, 1))
        target = random_network(kind, TINY, 2)
        before = copy.deepcopy(target.state_dict())
        names = [name for name in variables if name.endswith("/w")]
        del variables[names[0]]
        variables[names[1]] = variables[names[1]].transpose(3, 2, 1, 0)[..., :1]
        variables["model/stray/w"] = np.zeros(3)
        with pytest.raises(ValueError, match="do not fit") as caught:
            loader(target, variables)
        message = str(caught.value)
        assert f"missing: {names[0]};" in message
        assert "left over: model/stray/w;" in message
        assert f"of the wrong shape: {names[1]} (expected [" in message
        assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())

    def test_only_variables_below_the_scope_are_looked_at(self, kind, export, loader) -> None:
        source, target = random_network(kind, TINY, 1), random_network(kind, TINY, 2)
        moved = {name.replace("model/", "ema/net/", 1): value for name, value in export(source).items()}
        loader(target, {**moved, "global_step": np.array(7), "model/x": np.zeros(2)}, scope="ema/net")
        assert torch.equal(next(target.parameters()), next(source.parameters()))
