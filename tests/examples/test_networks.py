"""The two networks: sizes, formulas, places of attention, spectral normalisation, initialisation."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_runs import assert_same

from sagan.errors import UserError
from sagan.networks import (
    Discriminator,
    DownBlock,
    Generator,
    NetworkConfig,
    ResidualMixer,
    UpBlock,
    count_parameters,
)
from sagan_layers import (
    ConditionalBatchNorm2d,
    ResamplingConv2d,
    SelfAttention2d,
    SpectralNormLayer,
    frozen_spectral_norm,
)

FULL_SIZE = NetworkConfig(resolution=128, base_width=64, num_classes=1000)
TINY = NetworkConfig(
    resolution=32, base_width=2, num_classes=3, latent_dim=5, g_attention=(16,), d_attention=(8,)
)
Kind = type[nn.Module]
KINDS = pytest.mark.parametrize("kind", [Generator, Discriminator])


def inputs_of(kind: Kind, config: NetworkConfig, count: int = 4) -> tuple[Tensor, Tensor | None]:
    labels = torch.arange(count) % config.num_classes if config.num_classes else None
    shape = (config.latent_dim,) if kind is Generator else (3, config.resolution, config.resolution)
    return torch.randn(count, *shape), labels


def randomize(network: nn.Module) -> nn.Module:
    """Give every parameter and running statistic a value at which nothing cancels."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.5)
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return network


def weighted_layers(network: nn.Module) -> list[Any]:
    return [layer for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.Linear, nn.Embedding))]


def batch_norms(network: nn.Module) -> list[ConditionalBatchNorm2d]:
    return [layer for layer in network.modules() if isinstance(layer, ConditionalBatchNorm2d)]


def vectors(network: nn.Module) -> dict[str, Tensor]:
    state = network.state_dict()
    return {name: state[name].clone() for name in state if name.endswith(("weight_u", "weight_v"))}


class TestParameterCounts:
    @pytest.mark.parametrize(
        ("kind", "attention", "expected"),
        [
            (Generator, (), 41_996_931),
            (Generator, (32,), 42_078_852),
            (Generator, (64,), 42_017_412),
            (Discriminator, (), 39_443_137),
            (Discriminator, (32,), 39_463_618),
        ],
    )
    def test_counts_are_the_released_codes_with_every_mixer_and_norm(
        self, kind: Kind, attention: tuple[int, ...], expected: int
    ) -> None:
        config = replace(FULL_SIZE, g_attention=attention, d_attention=attention)
        plain = {"g_spectral_norm": False, "d_spectral_norm": False}
        for changes in ({}, {"mixer": "residual"}, plain):
            with torch.device("meta"):
                assert count_parameters(kind(replace(config, **changes))) == expected

    @pytest.mark.parametrize("channels", [1, 2, 7, 8, 12, 20])
    def test_residual_mixer_matches_attention_at_any_width(self, channels: int) -> None:
        residual = ResidualMixer(channels, TINY)
        assert count_parameters(residual) == count_parameters(SelfAttention2d(channels))

    def test_frozen_parameters_are_not_counted(self) -> None:
        network = nn.Linear(3, 2)
        network.bias.requires_grad_(False)
        assert count_parameters(network) == 6


class TestShapes:
    @pytest.mark.parametrize("base_width", [1, 3])
    @pytest.mark.parametrize("resolution", [32, 64, 128, 256])
    def test_images_and_logits_have_their_shapes_at_every_resolution(
        self, resolution: int, base_width: int
    ) -> None:
        config = replace(TINY, resolution=resolution, base_width=base_width)
        generator, discriminator = Generator(config), Discriminator(config)
        latents, labels = inputs_of(Generator, config, count=2)
        images = generator(latents, labels)
        assert images.shape == (2, 3, resolution, resolution)
        assert images.abs().max() <= 1
        assert discriminator(images, labels).shape == (2, 1)

    @pytest.mark.parametrize(
        ("config", "g_widths", "d_widths"),
        [
            (FULL_SIZE, [1024, 1024, 512, 256, 128, 64], [64, 128, 256, 512, 1024]),
            (TINY, [16, 8, 4, 2], [2, 4, 8]),
        ],
    )
    def test_widths_halve_from_at_most_16_times_the_base_as_the_resolution_doubles(
        self, config: NetworkConfig, g_widths: list[int], d_widths: list[int]
    ) -> None:
        with torch.device("meta"):
            generator, discriminator = Generator(config), Discriminator(config)
        assert generator.first_shape == (g_widths[0], 4, 4)
        assert [block.conv2.out_channels for block in generator.blocks] == g_widths[1:]
        assert [block.conv2.out_channels for block in discriminator.blocks] == d_widths
        assert discriminator.last_block.conv2.out_channels == d_widths[-1]

    @KINDS
    def test_unconditional_networks_take_no_labels_and_have_no_tables(self, kind: Kind) -> None:
        config = replace(TINY, num_classes=0)
        network = kind(config)
        inputs, labels = inputs_of(kind, config)
        assert labels is None
        assert torch.isfinite(network(inputs)).all()
        assert not any("embedding" in name for name in network.state_dict())
        assert all(norm.num_classes is None for norm in batch_norms(network))


class TestAttentionPlaces:
    @pytest.mark.parametrize(
        ("kind", "places"),
        [
            *((Generator, places) for places in [(), (8,), (64, 16), (8, 16, 32, 64)]),
            *((Discriminator, places) for places in [(), (4,), (8, 32), (4, 8, 16, 32)]),
        ],
    )
    def test_networks_attend_at_the_chosen_resolutions_in_order(
        self, kind: Kind, places: tuple[int, ...]
    ) -> None:
        option = "g_attention" if kind is Generator else "d_attention"
        config = replace(TINY, resolution=64, **{option: places})
        network = kind(config)
        seen: list[int] = []
        for mixer in network.mixers.values():
            assert isinstance(mixer, SelfAttention2d)
            mixer.register_forward_hook(lambda _, inputs, output: seen.append(output.size(2)))
        network(*inputs_of(kind, config))
        assert seen == sorted(places, reverse=kind is Discriminator)

    @KINDS
    @pytest.mark.parametrize("mixer", ["attention", "residual"])
    def test_mixer_changes_the_output_once_its_gamma_is_not_zero(self, kind: Kind, mixer: Any) -> None:
        config = replace(TINY, mixer=mixer)
        network = kind(config).eval()
        inputs = inputs_of(kind, config)
        before = network(*inputs)
        for layer in network.mixers.values():
            assert layer.gamma.item() == 0
            nn.init.constant_(layer.gamma, 2)
        assert (network(*inputs) - before).abs().max() > 1e-4


class TestSpectralNorm:
    @pytest.mark.parametrize("mixer", ["attention", "residual"])
    @pytest.mark.parametrize("g_normalised", [True, False])
    @pytest.mark.parametrize("d_normalised", [True, False])
    def test_all_weighted_layers_of_a_network_are_normalised_with_its_eps_or_none(
        self, g_normalised: bool, d_normalised: bool, mixer: Any
    ) -> None:
        normalised = {"g_spectral_norm": g_normalised, "d_spectral_norm": d_normalised}
        config = replace(TINY, **normalised, sn_eps=3e-5, mixer=mixer)
        for network, chosen in ((Generator(config), g_normalised), (Discriminator(config), d_normalised)):
            layers = weighted_layers(network)
            assert len(layers) > 10
            assert {isinstance(layer, SpectralNormLayer) for layer in layers} == {chosen}
            assert {layer.eps for layer in layers if chosen} <= {3e-5}

    def test_batch_norms_have_their_settings_and_tables_without_spectral_norm(self) -> None:
        config = replace(TINY, bn_eps=2e-4, bn_momentum=0.3, last_bn_momentum=0.7, biased_running_var=False)
        norms = batch_norms(Generator(config))
        assert [norm.num_classes for norm in norms] == [3] * 6 + [None]
        assert [norm.norm.momentum for norm in norms] == [0.3] * 6 + [0.7]
        assert {norm.norm.eps for norm in norms} == {2e-4}
        assert {norm.biased_running_var for norm in norms} == {False}
        assert not any(isinstance(layer, SpectralNormLayer) for norm in norms for layer in norm.modules())

    @KINDS
    def test_evaluation_is_a_pure_function(self, kind: Kind) -> None:
        network = randomize(kind(TINY)).eval()
        before = copy.deepcopy(network.state_dict())
        inputs = inputs_of(kind, TINY)
        assert torch.equal(network(*inputs), network(*inputs))
        assert_same(network.state_dict(), before)

    @KINDS
    def test_training_moves_vectors_and_batch_statistics_only(self, kind: Kind) -> None:
        network = randomize(kind(TINY))
        before = copy.deepcopy(network.state_dict())
        network(*inputs_of(kind, TINY))
        moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
        assert moved
        assert all(name.endswith(("weight_u", "weight_v")) or ".norm." in name for name in moved)
        # A vector with one entry is a sign; it may stay.
        assert {n for n, v in vectors(network).items() if len(v) > 1 and n.endswith("_u")} <= moved

    @KINDS
    def test_frozen_vectors_do_not_move_in_training(self, kind: Kind) -> None:
        network = randomize(kind(TINY))
        before = vectors(network)
        with frozen_spectral_norm(network):
            network(*inputs_of(kind, TINY))
        assert_same(vectors(network), before)


@KINDS
@pytest.mark.parametrize("normalised", [True, False])
def test_every_change_of_resolution_is_in_its_convolution(kind: Kind, normalised: bool) -> None:
    config = replace(TINY, g_spectral_norm=normalised, d_spectral_norm=normalised)
    layers = {
        name: (layer.upsample, layer.downsample)
        for name, layer in kind(config).named_modules()
        if isinstance(layer, ResamplingConv2d) and layer.resamples
    }
    main, factors = ("conv1", (2, 1)) if kind is Generator else ("conv2", (1, 2))
    assert layers == {f"blocks.{i}.{name}": factors for i in range(3) for name in (main, "shortcut")}


@dataclass(frozen=True)
class Formulas:
    """The blocks written out with torch.nn.functional; ``normalised`` divides each weight by its norm."""

    normalised: bool = False

    def weight(self, layer: nn.Module) -> Tensor:
        norm = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2) if self.normalised else 1
        return layer.weight / norm

    def conv(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight(layer), layer.bias, padding=layer.kernel_size[0] // 2)

    def norm(self, layer: ConditionalBatchNorm2d, x: Tensor, labels: Tensor | None) -> Tensor:
        statistics = (None, None) if layer.training else (layer.norm.running_mean, layer.norm.running_var)
        gain, bias = layer.weight, layer.bias
        if labels is not None:
            gain, bias = gain[labels], bias[labels]
        normal = F.batch_norm(x, *statistics, training=layer.training)
        return normal * gain[..., None, None] + bias[..., None, None]

    def up(self, block: UpBlock, x: Tensor, labels: Tensor) -> Tensor:
        main = F.interpolate(self.norm(block.norm1, x, labels).relu(), scale_factor=2)
        main = self.norm(block.norm2, self.conv(block.conv1, main), labels).relu()
        return self.conv(block.conv2, main) + self.conv(block.shortcut, F.interpolate(x, scale_factor=2))

    def first_down(self, block: DownBlock, x: Tensor) -> Tensor:
        main = self.conv(block.conv2, self.conv(block.conv1, x).relu())
        return F.avg_pool2d(main, 2) + self.conv(block.shortcut, F.avg_pool2d(x, 2))

    def down(self, block: DownBlock, x: Tensor) -> Tensor:
        main = self.conv(block.conv2, self.conv(block.conv1, x.relu()).relu())
        return F.avg_pool2d(main + self.conv(block.shortcut, x), 2)

    def last(self, block: DownBlock, x: Tensor) -> Tensor:
        main = self.conv(block.conv2, self.conv(block.conv1, x.relu()).relu())
        return main + (x if isinstance(block.shortcut, nn.Identity) else self.conv(block.shortcut, x))

    def residual(self, mixer: ResidualMixer, x: Tensor) -> Tensor:
        return x + mixer.gamma * self.conv(mixer.conv2, self.conv(mixer.conv1, x.relu()).relu())

    def generator(self, network: Generator, latents: Tensor, labels: Tensor) -> Tensor:
        x = (latents @ self.weight(network.linear).T + network.linear.bias).unflatten(1, network.first_shape)
        for block in network.blocks:
            x = self.up(block, x, labels)
            if x.size(2) == 16:
                x = network.mixers["16"](x)
        return torch.tanh(self.conv(network.last_conv, self.norm(network.last_norm, x, None).relu()))

    def discriminator(self, network: Discriminator, images: Tensor, labels: Tensor) -> Tensor:
        x = self.first_down(network.blocks[0], images)
        for block in network.blocks[1:]:
            x = self.down(block, x)
            if x.size(2) == 8:
                x = network.mixers["8"](x)
        pooled = self.last(network.last_block, x).relu().sum((2, 3))
        head = network.head
        logits = pooled @ self.weight(head.linear).T + head.linear.bias
        return logits + (self.weight(head.embedding)[labels] * pooled).sum(1, keepdim=True)


PLAIN = replace(TINY, g_spectral_norm=False, d_spectral_norm=False)


class TestFormulas:
    @pytest.mark.parametrize(("config", "training"), [(PLAIN, True), (PLAIN, False), (TINY, False)])
    @KINDS
    def test_networks_are_their_formulas(self, kind: Kind, config: NetworkConfig, training: bool) -> None:
        network = randomize(kind(config))
        if config is TINY:
            with torch.no_grad():
                for _ in range(200):  # until sigma has converged
                    for layer in network.modules():
                        if isinstance(layer, SpectralNormLayer):
                            layer.normalized_weight()
        network.train(training)
        inputs = inputs_of(kind, config)
        formulas = Formulas(normalised=config is TINY)
        expected = getattr(formulas, kind.__name__.lower())(network, *inputs)
        torch.testing.assert_close(network(*inputs), expected, rtol=1e-3, atol=1e-3)
        assert expected.std() > 1e-2

    def test_residual_mixer_is_its_formula_and_starts_as_the_identity(self) -> None:
        mixer, x = ResidualMixer(9, PLAIN, spectral_norm=False), torch.randn(2, 9, 5, 3)
        assert torch.equal(mixer(x), x)
        randomize(mixer)
        before = x.clone()
        torch.testing.assert_close(mixer(x), Formulas().residual(mixer, x), rtol=1e-4, atol=1e-4)
        assert torch.equal(x, before)


class TestOtherCodeBases:
    """The fields of NetworkConfig that the released code does not need."""

    @pytest.mark.parametrize(
        ("resolution", "g_channels", "d_channels", "d_last_blocks", "last_map"),
        [
            (
                32,
                (8, 8, 8, 8),
                (4, 4, 4, 4),
                2,
                8,
            ),  # StudioGAN; BigGAN-PyTorch and mimicry with other numbers
            (64, (16, 16, 8, 4, 2), (1, 2, 4, 8, 16), 1, 4),  # BigGAN-PyTorch
            (256, (16, 16, 8, 8, 4, 2, 1), (1, 2, 4, 8, 8, 16, 16), 1, 4),  # BigGAN-PyTorch
        ],
    )
    def test_explicit_channels_are_those_of_the_maps_and_their_number_says_how_often_d_halves(
        self,
        resolution: int,
        g_channels: tuple[int, ...],
        d_channels: tuple[int, ...],
        d_last_blocks: int,
        last_map: int,
    ) -> None:
        widths: dict[str, Any] = {"g_channels": g_channels, "d_channels": d_channels}
        config = replace(
            TINY, resolution=resolution, **widths, d_last_blocks=d_last_blocks, d_attention=(last_map,)
        )
        generator, discriminator = Generator(config), Discriminator(config)
        assert generator.first_shape[0] == g_channels[0]
        assert tuple(block.conv2.out_channels for block in generator.blocks) == g_channels[1:]
        blocks: list[Any] = [*discriminator.blocks, discriminator.last_block]
        assert tuple(block.conv2.out_channels for block in blocks) == d_channels
        assert [block.conv2.downsample for block in blocks[-d_last_blocks:]] == [1] * d_last_blocks
        seen: list[int] = []
        attention: Any = discriminator.mixers[str(last_map)]
        attention.register_forward_hook(lambda _, inputs, output: seen.append(output.size(2)))
        images, labels = inputs_of(Discriminator, config, count=2)
        assert discriminator(images, labels).shape == (2, 1)
        assert seen == [last_map]  # once, though later blocks keep the resolution

    def test_hidden_channels_of_all_of_ds_blocks_but_the_first_can_be_those_of_the_input(self) -> None:
        discriminator = Discriminator(replace(TINY, d_hidden_channels="in"))
        blocks: list[Any] = [*discriminator.blocks, discriminator.last_block]
        assert [block.conv1.out_channels for block in blocks] == [2, 2, 4, 8]
        assert [block.conv2.in_channels for block in blocks] == [2, 2, 4, 8]

    @pytest.mark.parametrize("reaches", [False, True])
    def test_relu_before_ds_blocks_reaches_the_shortcuts_if_asked(self, reaches: bool) -> None:
        config = replace(PLAIN, d_relu_before_blocks=reaches)
        discriminator: Any = randomize(Discriminator(config))
        formulas, x = Formulas(), torch.randn(2, 3, 16, 16)
        first, second, last = discriminator.blocks[0], discriminator.blocks[1], discriminator.last_block
        torch.testing.assert_close(first(x), formulas.first_down(first, x), rtol=1e-4, atol=1e-4)
        wider = randomize(DownBlock(4, 6, config, downsample=1))
        for block, formula in ((second, formulas.down), (last, formulas.last), (wider, formulas.last)):
            x = torch.randn(2, block.conv1.in_channels, 8, 8)
            expected = formula(block, x.relu() if reaches else x)
            torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)

    def test_attention_has_biases_if_asked(self) -> None:
        config = replace(TINY, attention_bias=True)
        for kind in (Generator, Discriminator):
            mixers: Any = kind(config).mixers.values()
            for mixer in mixers:
                layers = (mixer.query, mixer.key, mixer.value, mixer.out)
                assert all(layer.bias is not None and not layer.bias.any() for layer in layers)

    def test_bilinear_upsampling_interpolates_before_both_convolutions(self) -> None:
        config = replace(PLAIN, upsampling="bilinear")
        block = randomize(UpBlock(4, 3, config))
        x, labels, formulas = torch.randn(2, 4, 5, 5), torch.tensor([2, 0]), Formulas()
        doubled = partial(F.interpolate, scale_factor=2, mode="bilinear", align_corners=False)
        main = formulas.conv(block.conv1, doubled(formulas.norm(block.norm1, x, labels).relu()))
        main = formulas.conv(block.conv2, formulas.norm(block.norm2, main, labels).relu())
        expected = main + formulas.conv(block.shortcut, doubled(x))
        torch.testing.assert_close(block(x, labels), expected, rtol=1e-4, atol=1e-4)
        assert block.state_dict().keys() == UpBlock(4, 3, PLAIN).state_dict().keys()

    @pytest.mark.parametrize("normalised", [False, True])
    @pytest.mark.parametrize("condition", ["one_hot", "embedding"])
    def test_linear_maps_of_labels_are_tables_of_their_values(self, condition: Any, normalised: bool) -> None:
        config = replace(TINY, condition=condition, embedding_dim=6, g_spectral_norm=normalised)
        generator: Any = randomize(Generator(config)).double().eval()
        tables: Any = Generator(replace(config, condition="table")).double().eval()
        shared = {name: value for name, value in generator.state_dict().items() if "projection" not in name}
        shared.pop("embedding.weight", None)
        tables.load_state_dict(shared, strict=False)
        vectors = torch.eye(3).double() if condition == "one_hot" else generator.embedding.weight
        with torch.no_grad():
            for norm, table in zip(batch_norms(generator), batch_norms(tables), strict=True):
                if table.num_classes is not None:
                    assert isinstance(norm.weight_projection, SpectralNormLayer) is normalised
                    table.weight.copy_(1 + norm.weight_projection(vectors))
                    table.bias.copy_(norm.bias_projection(vectors))
        latents, labels = inputs_of(Generator, config)
        inputs = latents.double(), labels
        torch.testing.assert_close(generator(*inputs), tables(*inputs), rtol=1e-6, atol=1e-6)
        assert not isinstance(generator.embedding, SpectralNormLayer)

    @pytest.mark.parametrize("num_classes", [0, 3])
    def test_each_block_takes_the_embedding_and_its_own_chunk_of_hierarchical_latents(
        self, num_classes: int
    ) -> None:
        config = replace(
            TINY,
            num_classes=num_classes,
            latent_dim=20,
            condition="embedding",
            embedding_dim=6,
            hierarchical_latents=True,
        )
        generator: Any = randomize(Generator(config)).eval()
        latents, labels = inputs_of(Generator, config)
        taken: list[Tensor] = []
        generator.linear.register_forward_hook(lambda _, inputs, output: taken.append(inputs[0]))
        for block in generator.blocks:
            block.register_forward_hook(lambda _, inputs, output: taken.append(inputs[1]))
        generator(latents, labels)
        chunks = [latents[:, :5], latents[:, 5:10], latents[:, 10:15], latents[:, 15:]]
        prefix = latents[:, :0] if labels is None else generator.embedding.weight[labels]
        expected = [chunks[0], *(torch.cat((prefix, chunk), dim=1) for chunk in chunks[1:])]
        assert all(map(torch.equal, taken, expected))
        assert len(taken) == 4

    @pytest.mark.parametrize("condition", ["one_hot", "embedding"])
    def test_unconditional_generators_are_the_same_for_every_condition(self, condition: Any) -> None:
        config = replace(TINY, num_classes=0)
        state = Generator(config).state_dict()
        Generator(replace(config, condition=condition)).load_state_dict(state)

    @pytest.mark.parametrize("condition", ["table", "one_hot", "embedding"])
    def test_options_of_spectral_norm_reach_every_normalised_layer(self, condition: Any) -> None:
        config = replace(
            TINY, condition=condition, sn_eps=3e-5, sn_eps_mode="clamp", sn_iterate_in_evaluation=False
        )
        for kind in (Generator, Discriminator):
            layers: list[Any] = [
                each for each in kind(config).modules() if isinstance(each, SpectralNormLayer)
            ]
            options = {(layer.eps, layer.eps_mode, layer.iterate_when_frozen) for layer in layers}
            assert options == {(3e-5, "clamp", False)}

    def test_last_batch_norm_can_have_its_own_eps(self) -> None:
        norms = batch_norms(Generator(replace(TINY, bn_eps=1e-4, last_bn_eps=1e-5)))
        assert [norm.eps for norm in norms] == [1e-4] * 6 + [1e-5]

    @pytest.mark.parametrize("checkpointed", [False, True])
    def test_every_parameter_gets_a_gradient_with_all_fields_set(self, checkpointed: bool) -> None:
        config = replace(
            TINY,
            g_channels=(8, 8, 8, 8),
            d_channels=(4, 4, 4, 4),
            d_last_blocks=2,
            d_hidden_channels="in",
            d_relu_before_blocks=True,
            attention_bias=True,
            upsampling="bilinear",
            condition="embedding",
            hierarchical_latents=True,
            latent_dim=8,
        )
        for kind in (Generator, Discriminator):
            network: Any = randomize(kind(config))
            network.checkpoints_activations = checkpointed
            network(*inputs_of(kind, config)).square().sum().backward()
            assert all(parameter.grad is not None for parameter in network.parameters())


class TestInitialisation:
    WIDE = replace(TINY, base_width=16)

    @KINDS
    def test_xavier_uniform_fills_the_range_of_its_fans(self, kind: Kind) -> None:
        for layer in weighted_layers(kind(replace(self.WIDE, init="xavier_uniform"))):
            receptive = math.prod(layer.weight.shape[2:])
            bound = math.sqrt(6 / ((layer.weight.size(0) + layer.weight.size(1)) * receptive))
            assert layer.weight.abs().max() <= bound
            if layer.weight.numel() > 1000:
                assert layer.weight.abs().max() > 0.98 * bound
                assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)

    @KINDS
    def test_orthogonal_weights_have_equal_singular_values(self, kind: Kind) -> None:
        for layer in weighted_layers(kind(replace(self.WIDE, init="orthogonal"))):
            values = torch.linalg.svdvals(layer.weight.detach().flatten(1))
            torch.testing.assert_close(values, torch.ones_like(values), rtol=1e-4, atol=1e-4)

    @KINDS
    def test_normal_weights_have_a_deviation_of_two_hundredths(self, kind: Kind) -> None:
        layers = weighted_layers(kind(replace(self.WIDE, init="normal")))
        weights = [layer.weight.flatten() for layer in layers]
        assert torch.cat(weights).std().item() == pytest.approx(0.02, rel=0.05)

    @KINDS
    @pytest.mark.parametrize("init", ["xavier_uniform", "orthogonal", "normal"])
    def test_biases_start_at_zero_and_tables_at_one_and_zero(self, kind: Kind, init: Any) -> None:
        network = kind(replace(TINY, init=init))
        biased = [layer for layer in weighted_layers(network) if getattr(layer, "bias", None) is not None]
        assert biased
        assert all(not layer.bias.any() for layer in biased)
        for norm in batch_norms(network):
            assert (norm.weight == 1).all()
            assert (norm.bias == 0).all()

    @KINDS
    def test_default_is_torchs_own(self, kind: Kind) -> None:
        network = kind(replace(self.WIDE, init="default"))
        for layer in weighted_layers(network):
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                bound = 1 / math.sqrt(layer.weight[0].numel())
                assert 0 < layer.bias.abs().max() <= bound
                assert 0.8 * bound < layer.weight.abs().max() <= bound * (1 + 1e-6)

    def test_the_same_seed_gives_the_same_network(self) -> None:
        torch.manual_seed(3)
        first = Generator(TINY).state_dict()
        torch.manual_seed(3)
        second = Generator(TINY).state_dict()
        assert_same(first, second)


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"resolution": 48}, r"resolution: expected one of \(32, 64, 128, 256\), got 48"),
            ({"num_classes": -1}, "num_classes: expected at least 0, got -1"),
            ({"base_width": 0}, "base_width: expected at least 1, got 0"),
            ({"latent_dim": 0}, "latent_dim: expected at least 1, got 0"),
            ({"g_attention": (4,)}, r"g_attention: .* out of \[8, 16, 32\], got \[4\]"),
            ({"g_attention": (16, 64)}, r"g_attention: .*, got \[16, 64\]"),
            ({"g_attention": (16, 16)}, r"g_attention: expected different resolutions .*, got \[16, 16\]"),
            ({"d_attention": (32,)}, r"d_attention: .* out of \[16, 8, 4\], got \[32\]"),
            ({"mixer": "convolution"}, "mixer: expected one of .*, got 'convolution'"),
            ({"init": "he"}, "init: expected one of .*orthogonal.*, got 'he'"),
            ({"sn_eps": 0.0}, "sn_eps: expected from 1e-37 to 1, got 0.0"),
            ({"sn_eps": 2.0}, "sn_eps: expected from 1e-37 to 1, got 2.0"),
            ({"bn_eps": float("nan")}, "bn_eps: expected from 1e-37 to 1, got nan"),
            ({"last_bn_eps": 0.0}, "last_bn_eps: expected from 1e-37 to 1, got 0.0"),
            ({"sn_eps_mode": "floor"}, "sn_eps_mode: expected one of add, clamp, got 'floor'"),
            ({"upsampling": "cubic"}, "upsampling: expected one of nearest, bilinear, got 'cubic'"),
            ({"d_hidden_channels": "both"}, "d_hidden_channels: expected one of out, in, got 'both'"),
            ({"condition": "label"}, "condition: expected one of table, one_hot, embedding, got 'label'"),
            ({"embedding_dim": 0}, "embedding_dim: expected at least 1, got 0"),
            ({"d_last_blocks": 0}, "d_last_blocks: expected at least 1, got 0"),
            (
                {"g_channels": (4, 4, 4)},
                r"g_channels: expected 4 numbers .* at 32 pixels, .*, got \[4, 4, 4\]",
            ),
            ({"g_channels": (4, 4, 4, 0)}, r"g_channels: expected 4 numbers above 0 .*, got \[4, 4, 4, 0\]"),
            ({"d_channels": (4,)}, r"d_channels: expected 2 to 4 numbers above 0 .*, got \[4\]"),
            ({"d_channels": (4,) * 5}, "d_channels: expected 2 to 4 numbers .* the last 1 for d_last_blocks"),
            ({"d_channels": (4, 0, 0)}, r"d_channels: expected 2 to 4 numbers above 0 .*, got \[4, 0, 0\]"),
            ({"d_channels": (4, 4)}, r"d_attention: .* out of \[16\], got \[8\]"),
            (
                {"hierarchical_latents": True},
                "hierarchical_latents: expected condition 'embedding' .* 'table'",
            ),
            (
                {"hierarchical_latents": True, "condition": "embedding", "latent_dim": 6},
                "latent_dim: expected a multiple of 4, the chunks of hierarchical_latents at 32 pixels, got 6",
            ),
            ({"bn_momentum": 1.5}, "bn_momentum, last_bn_momentum: expected from 0 to 1"),
            ({"last_bn_momentum": -0.1}, "bn_momentum, last_bn_momentum: expected from 0 to 1"),
        ],
    )
    def test_settings_out_of_range_are_refused_by_name(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            replace(TINY, **changes)

    @KINDS
    def test_networks_need_the_number_of_classes(self, kind: Kind) -> None:
        with pytest.raises(UserError, match="num_classes: expected a number, got None"):
            kind(replace(TINY, num_classes=None))

    @KINDS
    def test_conditional_networks_refuse_missing_labels(self, kind: Kind) -> None:
        inputs, _ = inputs_of(kind, TINY)
        with pytest.raises(ValueError, match="labels"):
            kind(TINY)(inputs)
