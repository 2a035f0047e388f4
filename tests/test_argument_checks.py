"""Arguments of the wrong type or range: one sentence that names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sagan_layers import (
    ConditionalBatchNorm2d,
    DiscriminatorPass,
    GeneratorPass,
    GradientPenalty,
    ProjectionDiscriminatorHead,
    ResamplingConv2d,
    SelfAttention2d,
    SharedSpectralNorm,
    SNConv2d,
    SNConvTranspose2d,
    SNEmbedding,
    SNLinear,
    apply_spectral_norm,
    call_with_constant_parameters,
    checkpointed,
    convert,
    frozen_running_statistics,
    frozen_spectral_norm,
    functional,
    gradient_penalty,
    hinge_discriminator_loss,
    hinge_generator_loss,
    interpolate_images,
    remove_spectral_norm,
    shared_spectral_norm,
    softplus_discriminator_loss,
    softplus_generator_loss,
    standing_statistics,
    synchronize_batch_norm,
)
from tests.blocks import BLOCKS, Block, assert_same, build, draw_inputs, state_of

NAN, INF = float("nan"), float("inf")
NO_INTEGERS = [1.0, NAN, True, "a", (2,), {}, torch.tensor(2), np.array(2)]

WRONG: dict[str, list[Any]] = {
    "size": [*NO_INTEGERS, None, 0, -1, 2**40, 10**400],
    "optional size": [*NO_INTEGERS, 0, -1, 2**40],
    "index": [*NO_INTEGERS, 100, -100],
    "axis": [*NO_INTEGERS, None, 2, -1],
    "optional axis": [*NO_INTEGERS, 2, -1],
    "count": [*NO_INTEGERS, None, -1, 2**40],
    "pair": [None, 0, -1, 1.5, "a", ("a",), [1], (1, 2, 3), (NAN, 1), (True, 1), torch.tensor([1, 1])],
    "padding": [None, -1, 1.5, "a", ("same", "same"), [1], (1, 2, 3), (NAN, 1)],
    "flag": [None, 0, 1, "no", torch.tensor(True)],
    "eps": [None, 0.0, -1e-5, 1.5, 1e-45, NAN, INF, "1e-5", True, torch.tensor(1e-5)],
    "number": [None, NAN, INF, 1e39, 10**400, "1", True, 1j, torch.tensor(1.0)],
    "share": [-0.1, 1.5, NAN, "1", True, [0.1]],
    "name": [1, "fast", ["auto"], np.array(["auto", "x"]), torch.tensor(1), b"auto"],
    "dtype": [torch.int64, torch.complex64, torch.float8_e5m2, "float32", float, np.array([1, 2])],
    "device": ["nowhere", "cuda:99", 1.5, torch.float32, ["cpu"]],
    "module": [None, "net", [nn.Linear(1, 1)], nn.Linear, torch.ones(1)],
    "function": [None, "hinge", nn.ReLU().training],
    "group": ["all", 0],
    "text": [None, 1, b"scope"],
    "mapping": [None, [("a", 1)], {1: 2}, "a"],
    "collection": ["head", 1, None, torch.tensor(1)],
}


def joined(*kinds: dict[str, str]) -> dict[str, str]:
    return {kind: " ".join(each[kind] for each in kinds if kind in each) for each in kinds for kind in each}


LINEAR, NORM = nn.Linear(2, 2), ConditionalBatchNorm2d(2)
NETWORKS = {"generator": LINEAR, "discriminator": LINEAR}
CONVOLUTION = {"in_channels": 4, "out_channels": 4, "kernel_size": 3}
SIZES = {
    "size": "in_channels out_channels groups",
    "pair": "kernel_size stride dilation",
    "name": "padding_mode",
    "flag": "bias",
    "device": "device",
    "dtype": "dtype",
}
SPECTRAL = {"size": "n_power_iterations", "eps": "eps", "flag": "iterate_when_frozen", "name": "eps_mode"}
SPECTRAL_LAYER = joined(SPECTRAL, {"optional axis": "dim", "name": "iterate_from"})
ATTENTION = {"query": torch.ones(2, 3, 4), "key": torch.ones(2, 5, 4), "value": torch.ones(2, 5, 6)}
BLOCK = {
    **{"x": torch.ones(1, 8, 4, 4), "query_weight": torch.ones(2, 8), "key_weight": torch.ones(2, 8)},
    **{"value_weight": torch.ones(4, 8), "out_weight": torch.ones(8, 4), "gamma": torch.ones(())},
    **{"query_bias": torch.ones(2), "key_bias": torch.ones(2), "value_bias": torch.ones(4)},
    "out_bias": torch.ones(8),
}
BATCH_NORM = {
    **{"x": torch.randn(4, 3, 5), "gain": torch.ones(4, 3), "bias": torch.ones(3)},
    **{"running_mean": torch.zeros(3), "running_var": torch.ones(3)},
}
WEIGHT = {"weight": torch.ones(3, 4), "u": torch.ones(3), "v": torch.ones(4)}
RESAMPLING = {"x": torch.ones(2, 4, 8, 8), "weight": torch.ones(6, 4, 3, 3), "bias": torch.ones(6)}
RESAMPLED = {"size": "factor groups", "pair": "dilation", "padding": "padding", "name": "backend"}
LOGITS = {"real_logits": torch.ones(2, 1), "fake_logits": torch.ones(2, 1)}
POINTS = torch.ones(2, 3, requires_grad=True)
PENALTY = {"logits": POINTS.sum(1), "images": POINTS}
IMAGES = {"real_images": torch.ones(2, 3), "fake_images": torch.ones(2, 3)}


def entered(context: Callable[..., Any]) -> Callable[..., None]:
    def enter(**arguments: Any) -> None:
        with context(**arguments):
            pass

    enter.__name__ = context.__name__
    return enter


def load_variables(**arguments: Any) -> None:
    convert.load(LINEAR, source="tensorflow", **arguments)


# What is called, good arguments, and the other arguments by the kind of value that they take.
CALLS: list[tuple[Callable[..., Any], dict[str, Any], dict[str, str]]] = [
    (
        ResamplingConv2d,
        CONVOLUTION,
        joined(SIZES, {"padding": "padding", "size": "upsample downsample", "name": "backend"}),
    ),
    (SNConv2d, CONVOLUTION, joined(SIZES, SPECTRAL_LAYER, {"padding": "padding"})),
    (SNConvTranspose2d, CONVOLUTION, joined(SIZES, SPECTRAL_LAYER, {"padding": "padding output_padding"})),
    (
        SNLinear,
        {"in_features": 2, "out_features": 3},
        joined(SPECTRAL_LAYER, {"size": "in_features out_features", "flag": "bias", "dtype": "dtype"}),
    ),
    (
        SNEmbedding,
        {"num_embeddings": 2, "embedding_dim": 3},
        joined(
            SPECTRAL_LAYER,
            {"size": "num_embeddings embedding_dim", "index": "padding_idx", "number": "norm_type"},
            {"flag": "scale_grad_by_freq sparse _freeze", "device": "device", "dtype": "dtype"},
        ),
    ),
    (
        ConditionalBatchNorm2d,
        {"num_features": 3},
        {
            **{
                "size": "num_features",
                "optional size": "num_classes condition_features",
                "eps": "eps sn_eps",
            },
            **{
                "share": "momentum",
                "number": "gain_offset",
                "flag": "track_running_stats spectral_norm biased_running_var iterate_when_frozen",
            },
            **{"name": "activation backend sn_eps_mode", "device": "device", "dtype": "dtype"},
        },
    ),
    (
        SelfAttention2d,
        {"in_channels": 8, "spectral_norm": False},  # whose options are checked all the same
        {
            **{"size": "in_channels pool_size n_power_iterations", "eps": "eps", "number": "gamma_init"},
            **{"optional size": "key_channels value_channels", "name": "backend eps_mode", "dtype": "dtype"},
            **{"flag": "output_projection bias spectral_norm residual iterate_when_frozen"},
            "device": "device",
        },
    ),
    (
        ProjectionDiscriminatorHead,
        {"in_channels": 4, "num_classes": 3, "spectral_norm": False},
        {
            **{"size": "in_channels n_power_iterations", "optional size": "num_classes", "eps": "eps"},
            **{
                "name": "pooling activation eps_mode",
                "flag": "spectral_norm iterate_when_frozen",
                "device": "device",
                "dtype": "dtype",
            },
        },
    ),
    (GradientPenalty, {}, {"name": "kind", "number": "target"}),
    (DiscriminatorPass, NETWORKS, {"module": "generator discriminator", "function": "loss"}),
    (GeneratorPass, NETWORKS, {"module": "generator discriminator", "function": "loss"}),
    (SharedSpectralNorm, {"module": LINEAR}, {"module": "module", "dtype": "dtype"}),
    (
        apply_spectral_norm,
        {"model": nn.ReLU()},
        joined(SPECTRAL_LAYER, {"module": "model", "collection": "exclude", "flag": "only_normalized"}),
    ),
    (remove_spectral_norm, {}, {"module": "module"}),
    (entered(frozen_spectral_norm), {}, {"module": "module"}),
    (entered(frozen_running_statistics), {}, {"module": "module"}),
    (entered(standing_statistics), {"module": NORM}, {"module": "module", "group": "process_group"}),
    (synchronize_batch_norm, {"module": NORM}, {"module": "module", "group": "process_group"}),
    (shared_spectral_norm, {"module": LINEAR}, {"module": "module", "dtype": "dtype"}),
    (call_with_constant_parameters, {}, {"module": "module"}),
    (checkpointed, {}, {"module": "module"}),
    (entered(functional.force_backend), {"backend": "auto"}, {"name": "backend operation"}),
    (entered(functional.record_backends), {}, {"name": "operation"}),
    (functional.set_debug_checks, {}, {"flag": "enabled"}),
    (
        load_variables,
        {"state": {"Matrix": np.ones((2, 2)), "bias": [1, 2]}},
        {"mapping": "state", "text": "prefix"},
    ),
    (functional.attention, ATTENTION, {"number": "scale", "name": "backend"}),
    (functional.attention_weights, {name: ATTENTION[name] for name in ("query", "key")}, {"number": "scale"}),
    (functional.self_attention_2d, BLOCK, {"size": "pool_size", "flag": "residual", "name": "backend"}),
    (
        functional.conditional_batch_norm,
        BATCH_NORM,
        {
            **{"flag": "training biased_running_var", "share": "momentum", "eps": "eps"},
            **{"group": "process_group", "name": "activation backend"},
        },
    ),
    (
        functional.spectral_normalize,
        WEIGHT,
        {"axis": "dim", "count": "n_power_iterations", "eps": "eps", "name": "eps_mode iterate_from"},
    ),
    (functional.upsample_conv2d, RESAMPLING, RESAMPLED),
    (functional.conv2d_downsample, RESAMPLING, RESAMPLED),
    (hinge_discriminator_loss, LOGITS, {}),
    (softplus_discriminator_loss, LOGITS, {}),
    (hinge_generator_loss, {"fake_logits": torch.ones(2)}, {}),
    (softplus_generator_loss, {"fake_logits": torch.ones(2)}, {}),
    (gradient_penalty, PENALTY, {"name": "kind", "number": "target"}),
    (interpolate_images, IMAGES, {}),
]


@pytest.mark.parametrize(
    ("call", "good", "argument", "kind"),
    [
        pytest.param(call, good, argument, kind, id=f"{call.__name__}-{argument}")
        for call, good, kinds in CALLS
        for kind, arguments in kinds.items()
        for argument in arguments.split()
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused_by_name(
    call: Callable[..., Any], good: dict[str, Any], argument: str, kind: str
) -> None:
    for value in WRONG[kind]:
        with pytest.raises((TypeError, ValueError), match=rf"^{argument}: expected .*(got|write) "):
            call(**{**good, argument: value})


def other_tensors(good: Tensor) -> list[Any]:
    """What is no dense floating-point tensor of 16 bits or more, or none of int64 for one of int64."""
    plain = good.detach()
    others = [None, 1.0, "x", plain.tolist(), plain.numpy(), plain.to(torch.complex64), plain.bool()]
    others += [plain.to_sparse(), torch.nested.nested_tensor([plain.reshape(-1)])]
    if good.is_floating_point():
        others += [plain.to_mkldnn()] if plain.dim() and plain.dtype == torch.float32 else []
        others += [plain.to(torch.float8_e5m2), plain.long()]
    return others


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    ("call", "good", "argument"),
    [
        pytest.param(call, good, argument, id=f"{call.__name__}-{argument}")
        for call, good, _ in CALLS
        for argument, value in good.items()
        if isinstance(value, Tensor)
    ],
)
def test_what_is_no_dense_floating_point_tensor_is_refused_by_name(
    call: Callable[..., Any], good: dict[str, Any], argument: str
) -> None:
    for value in other_tensors(good[argument]):
        if value is None and (
            "bias" in argument or argument in ("out_weight", "running_mean", "running_var")
        ):
            continue
        with pytest.raises((TypeError, ValueError), match=rf"^{argument}(\[0\])?: expected .*got "):
            call(**{**good, argument: value})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_a_block_refuses_inputs_that_are_no_dense_tensors_and_does_not_change(block: Block) -> None:
    module, inputs = build(block), draw_inputs(block)
    before = state_of(module)
    for i, good in enumerate(inputs):
        for value in other_tensors(good):
            if value is not None or i == 0:
                with pytest.raises(
                    (TypeError, ValueError), match=r"^(input|labels|condition): expected .*got "
                ):
                    module(*inputs[:i], value, *inputs[i + 1 :])
        if good.dim() == 4:
            for empty in (good[:, :, :0], good[..., :0], good[:, :0]):
                with pytest.raises(ValueError, match=r"^input: expected .*got \["):
                    module(*inputs[:i], empty, *inputs[i + 1 :])
    assert_same(state_of(module), before)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_an_empty_batch_passes_where_no_statistics_are_taken_of_it(block: Block, training: bool) -> None:
    module, inputs = build(block).train(training), draw_inputs(block, batch=0)
    expected = module(*draw_inputs(block, batch=2)).shape[1:]
    if isinstance(module, ConditionalBatchNorm2d) and (training or module.norm.running_mean is None):
        with pytest.raises(ValueError, match="expected more than 1 value per channel"):
            module(*inputs)
    else:
        assert module(*inputs).shape == (0, *expected)


IMAGE = torch.ones(1, 2, 2, 3)


@pytest.mark.parametrize("kind", [ResamplingConv2d, SNConv2d, SNConvTranspose2d])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 3}, "input: expected a larger map (the output would have 0 x 1 positions)"),
        ({"kernel_size": (1, 2), "dilation": (1, 3)}, "(the output would have 2 x 0 positions)"),
        ({"kernel_size": (4, 1), "padding": (0, 1)}, "(the output would have 0 x 5 positions)"),
        ({"kernel_size": 1, "downsample": 3}, "(the output would have 0 x 1 positions)"),
        ({"kernel_size": 5, "upsample": 2}, "(the output would have 0 x 2 positions)"),
        ({"kernel_size": 4, "padding": "valid"}, "(the output would have 0 x 0 positions)"),
        ({"kernel_size": 1, "padding": 2, "padding_mode": "reflect"}, "its reflect padding (2, 2) fits into"),
        (
            {"kernel_size": 1, "padding": (3, 0), "padding_mode": "circular"},
            "its circular padding (3, 0) fits",
        ),
    ],
)
def test_maps_smaller_than_the_kernel_or_the_padding_are_refused_before_u_moves(
    kind: type[nn.Conv2d], options: dict[str, Any], message: str
) -> None:
    if kind is SNConvTranspose2d:
        if options != {"kernel_size": 3}:
            return
        options, message = {"kernel_size": 1, "padding": 1}, "(the output would have 0 x 1 positions)"
    layer = kind(2, 2, **options)
    before = state_of(layer)
    for image in (IMAGE, IMAGE[0]):
        with pytest.raises(ValueError, match=r"^input: expected") as raised:
            layer(image)
        assert message in str(raised.value)
    assert_same(state_of(layer), before)
    large = layer(torch.ones(1, 2, 9, 9))
    assert large.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SNConv2d(4, 6, 3, groups=3), "in_channels: expected a multiple of groups = 3, got 4"),
        (
            lambda: SNConvTranspose2d(4, 6, 3, groups=4),
            "out_channels: expected a multiple of groups = 4, got 6",
        ),
        (lambda: SNConv2d(4, 4, 3, 2, "same"), "stride: expected 1 with padding='same', got 2"),
        (
            lambda: SNConvTranspose2d(4, 4, 3, 2, output_padding=2),
            r"output_padding: expected less than stride",
        ),
        (lambda: SNConvTranspose2d(4, 4, 3, output_padding=(0, 1)), r"got \(0, 1\)"),
        (lambda: SNConvTranspose2d(2, 2, 3)(IMAGE, "ab"), "output_size: expected a list of sizes, got 'ab'"),
        (lambda: SNConvTranspose2d(2, 2, 3)(IMAGE, [4.0, 5]), r"output_size: expected an int, got 4\.0"),
        (
            lambda: ResamplingConv2d(4, 4, 3, upsample=2, downsample=2),
            "expected one of them to be 1, got 2 and 2",
        ),
        (lambda: SNConv2d(4, 4, 3, 2, upsample=2), "stride: expected 1 with upsample or downsample, got 2"),
        (lambda: SNConv2d(4, 4, 3, (1, 2), downsample=2), "stride: expected 1 with upsample or downsample"),
        (
            lambda: SNConv2d(4, 4, 3, padding_mode="reflect", upsample=2, backend="folded"),
            "backend: expected 'auto' or 'plain' for upsampling with padding_mode='reflect', got 'folded'",
        ),
        (lambda: SNEmbedding(2, 3, max_norm=1.0), "max_norm: expected None"),
        (lambda: SNEmbedding(2, 3, sparse=True), "sparse: expected False"),
        (
            lambda: SNEmbedding(2, 3, _weight=torch.ones(3, 2)),
            r"_weight: expected shape \[2, 3\], got \[3, 2\]",
        ),
        (
            lambda: SNEmbedding(2, 3, _weight=torch.ones(2, 3).long()),
            "_weight: expected a floating-point tensor",
        ),
        (
            lambda: SelfAttention2d(8, value_channels=4, output_projection=False),
            "value_channels: expected in_channels = 8 without an output projection, got 4",
        ),
        (
            lambda: ConditionalBatchNorm2d(3, 2, condition_features=2),
            "num_classes, condition_features: expected one at most",
        ),
        (
            lambda: ConditionalBatchNorm2d(3, gain_offset=1.0),
            r"gain_offset: expected num_classes with it \(a vector's gain is 1 \+ its projection\), got 1.0",
        ),
        (
            lambda: ConditionalBatchNorm2d(3, condition_features=2, gain_offset=1.0),
            "gain_offset: expected num_classes with it",
        ),
        (
            lambda: ConditionalBatchNorm2d(3, 2, spectral_norm=True),
            "spectral_norm: expected condition_features with it",
        ),
        (
            lambda: functional.spectral_normalize(torch.ones(3), U, U),
            r"weight: expected at least 2 axes, got \[3\]",
        ),
        (
            lambda: functional.spectral_normalize(torch.ones(3, 0), U, U),
            "weight: expected at least one entry",
        ),
        (
            lambda: functional.conditional_batch_norm(**BATCH_NORM, training=True, momentum=torch.ones(2)),
            r"momentum: expected a number or one element, got \[2\]",
        ),
        (
            lambda: functional.conditional_batch_norm(**{**BATCH_NORM, "x": torch.ones(4, 3, 0)}),
            r"x: expected \[N, C, \*\] with all but N at least 1, got \[4, 3, 0\]",
        ),
        (
            lambda: functional.upsample_conv2d(torch.ones(1, 4, 0, 8), RESAMPLING["weight"], padding=3),
            r"x: expected .* with C, H, W >= 1, got \[1, 4, 0, 8\]",
        ),
        (
            lambda: SelfAttention2d(8).attention_weights(BLOCK["x"], ["ab"]),
            r"queries: expected pairs of integers, got \['ab'\]",
        ),
        (
            lambda: SelfAttention2d(8).attention_weights(BLOCK["x"], torch.zeros(1, 2).long().to_sparse()),
            "queries: expected an int64 or int32 tensor, got torch.int64 in a torch.sparse_coo tensor",
        ),
        (
            lambda: convert.load_tensorflow(SNLinear(3, 4, bias=False), {"Matrix": "abc", "u": U[None]}),
            "Matrix: expected an array of numbers, got 'abc'",
        ),
        (
            lambda: convert.load(LINEAR, {}, "tensorflow", channels_last_outputs={"": (3, 1)}),
            r"channels_last_outputs: expected height and width of 2 outputs of '', got \(3, 1\)",
        ),
        (
            lambda: convert.load(LINEAR, {}, "tensorflow", channels_last_outputs={"frst": (1, 1)}),
            "channels_last_outputs: expected names of modules, got 'frst'",
        ),
        (
            lambda: DiscriminatorPass(LINEAR, LINEAR)(torch.ones(2, 3), torch.ones(4, 2)),
            r"generator: expected images like the real ones, \[2, 3\], got \[4, 2\]",
        ),
        (
            lambda: DiscriminatorPass(LINEAR, nn.Flatten(0))(torch.ones(2, 2), torch.ones(4, 2)),
            r"discriminator: expected logits for 6 images, got \[12\]",
        ),
        (
            lambda: DiscriminatorPass(LINEAR, LINEAR)(torch.ones(2, 2), torch.ones(4, 2), [1, 2], U),
            "real_labels: expected a tensor, got list",
        ),
        (lambda: gradient_penalty(logits=SCALAR * 2, images=SCALAR), r"images: expected \[N, \*\], got \[\]"),
        (
            lambda: interpolate_images(real_images=SCALAR, fake_images=SCALAR),
            r"real_images: expected \[N, \*\], got \[\]",
        ),
        (
            lambda: SNEmbedding(4, 2).requires_grad_(False).to(torch.float8_e5m2)(torch.tensor([1])),
            "weight: expected a dense tensor of float32, bfloat16, float16, float64, got torch.float8_e5m2",
        ),
        (
            lambda: DiscriminatorPass(LINEAR, LINEAR)(None, torch.ones(4, 2)),
            "real: expected a floating-point tensor, got NoneType",
        ),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


U, SCALAR = torch.ones(4), torch.ones((), requires_grad=True)


def test_numbers_of_numpy_are_accepted_and_become_pythons() -> None:
    three, two, no = np.int64(3), np.int32(2), np.bool_(False)
    layer = SNConv2d(
        two, two, (three, three), padding=np.int8(1), bias=no, n_power_iterations=two, eps=np.float32(0.5)
    )
    assert repr(layer) == repr(SNConv2d(2, 2, 3, padding=1, bias=False, n_power_iterations=2, eps=0.5))
    assert layer(torch.ones(1, 2, 4, 4)).shape == (1, 2, 4, 4)
    norm = ConditionalBatchNorm2d(two, three, momentum=np.float64(0.25), biased_running_var=np.bool_(True))
    assert norm(torch.ones(2, 2, 1, 1), torch.tensor([0, 2])).shape == (2, 2, 1, 1)
    assert (type(norm.momentum), type(norm.biased_running_var)) == (float, bool)
    y = functional.conditional_batch_norm(**BATCH_NORM, training=np.bool_(False), eps=np.float32(1e-5))
    assert torch.equal(y, functional.conditional_batch_norm(**BATCH_NORM, eps=float(np.float32(1e-5))))


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(TypeError, match=r"groups: expected an int, got \[0, 1, .*\.\.\.$") as raised:
        SNConv2d(2, 2, 3, groups=list(range(1000)))
    assert len(str(raised.value)) < 120
