"""TensorFlow variables into the layers: mapping, and what is refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from blocks import assert_same, matrix_of, state_of
from torch import Tensor, nn

from sagan_layers import (
    ConditionalBatchNorm2d,
    ProjectionDiscriminatorHead,
    SelfAttention2d,
    SNConv2d,
    SNConvTranspose2d,
    SNEmbedding,
    SNLinear,
    convert,
)
from sagan_layers.convert import load_tensorflow


def array(*shape: int) -> np.ndarray:
    """Distinct numbers, so that an axis out of place shows."""
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


ATTENTION_WIDTHS = {"theta": 2, "phi": 2, "g": 8}
VARIABLES: dict[str, tuple[Callable[[], nn.Module], dict[str, np.ndarray]]] = {
    "conv": (lambda: SNConv2d(3, 4, (2, 5)), {"w": array(2, 5, 3, 4), "u": array(1, 4), "biases": array(4)}),
    "plain_conv_without_bias": (lambda: nn.Conv2d(3, 4, 2, bias=False), {"w": array(2, 2, 3, 4)}),
    "conv_transpose": (
        lambda: SNConvTranspose2d(3, 4, (2, 5)),
        {"w": array(2, 5, 4, 3), "u": array(1, 4), "biases": array(4)},
    ),
    "linear": (lambda: SNLinear(3, 4), {"Matrix": array(3, 4), "u": array(1, 4), "bias": array(4)}),
    "plain_linear": (lambda: nn.Linear(3, 4), {"Matrix": array(3, 4), "bias": array(4)}),
    "embedding": (lambda: SNEmbedding(5, 4), {"embedding_map": array(5, 4), "u": array(1, 5)}),
    "plain_embedding": (lambda: nn.Embedding(5, 4), {"embedding_map": array(5, 4)}),
    "batch_norm": (
        lambda: ConditionalBatchNorm2d(4, 5),
        {"gamma": array(5, 4), "beta": array(5, 4), "mean": array(1, 1, 1, 4), "var": array(1, 1, 1, 4)},
    ),
    "batch_norm_unconditional": (
        lambda: ConditionalBatchNorm2d(4),
        {"gamma": array(4), "beta": array(4), "moving_mean": array(4), "moving_variance": array(4)},
    ),
    "batch_norm_without_statistics": (
        lambda: ConditionalBatchNorm2d(4, 5, track_running_stats=False),
        {"gamma": array(5, 4), "beta": array(5, 4)},
    ),
    "attention": (
        lambda: SelfAttention2d(16),
        {
            **{f"sn_conv_{part}/w": array(1, 1, 16, width) for part, width in ATTENTION_WIDTHS.items()},
            **{f"sn_conv_{part}/u": array(1, width) for part, width in ATTENTION_WIDTHS.items()},
            "sn_conv_attn/w": array(1, 1, 8, 16),
            "sn_conv_attn/u": array(1, 16),
            "sigma_ratio": np.float32(0.5),
        },
    ),
    "attention_without_output": (
        lambda: SelfAttention2d(4, output_projection=False, spectral_norm=False),
        {
            "sn_conv_theta/w": array(1, 1, 4, 1),
            "sn_conv_phi/w": array(1, 1, 4, 1),
            "sn_conv_g/w": array(1, 1, 4, 4),
            "sigma_ratio": np.float32(0.5),
        },
    ),
    "head": (
        lambda: ProjectionDiscriminatorHead(4, 5),
        {
            "d_sn_linear/Matrix": array(4, 1),
            "d_sn_linear/u": array(1, 1),
            "d_sn_linear/bias": array(1),
            "d_embedding/embedding_map": array(5, 4),
            "d_embedding/u": array(1, 5),
        },
    ),
    "head_unconditional": (
        lambda: ProjectionDiscriminatorHead(4, None),
        {"d_sn_linear/Matrix": array(4, 1), "d_sn_linear/u": array(1, 1), "d_sn_linear/bias": array(1)},
    ),
}
every_block = pytest.mark.parametrize("kind", VARIABLES)


def case(kind: str) -> tuple[nn.Module, dict[str, np.ndarray]]:
    make, variables = VARIABLES[kind]
    return make(), dict(variables)


@every_block
def test_every_parameter_and_buffer_is_set(kind: str) -> None:
    module, variables = case(kind)
    with torch.no_grad():
        for state in module.state_dict().values():
            state.fill_(77)
    load_tensorflow(module, variables)
    for name, state in module.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert not torch.any(state == 77), name
    values = {float(number) for state in module.state_dict().values() for number in state.flatten()}
    for name, variable in variables.items():
        assert {float(number) for number in np.ravel(variable)} <= values, name


@pytest.mark.parametrize("kind", ["conv", "conv_transpose"])
def test_convolution_axes_come_from_height_and_width_first(kind: str) -> None:
    # Then in and out for a convolution, out and in for a transposed one: the reverse of torch's in both cases.
    module, variables = case(kind)
    load_tensorflow(module, variables)
    assert torch.equal(module.weight.permute(2, 3, 1, 0), tensor(variables["w"]))
    assert torch.equal(module.bias, tensor(variables["biases"]))
    assert torch.equal(module.weight_u, tensor(variables["u"][0]))


@pytest.mark.parametrize("kind", ["conv", "conv_transpose", "linear", "embedding"])
def test_the_right_vector_is_made_to_fit(kind: str) -> None:
    module, variables = case(kind)
    load_tensorflow(module, variables)
    expected = nn.functional.normalize(matrix_of(module).t() @ module.weight_u, dim=0)
    torch.testing.assert_close(module.weight_v, expected)


def test_attention_and_head_parts_go_to_their_layers() -> None:
    attention, variables = case("attention")
    load_tensorflow(attention, variables)
    for part, layer in (("theta", "query"), ("phi", "key"), ("g", "value"), ("attn", "out")):
        weight = getattr(attention, layer).weight
        assert torch.equal(weight, tensor(variables[f"sn_conv_{part}/w"]).permute(3, 2, 0, 1))
    assert attention.gamma.item() == 0.5
    head, variables = case("head")
    load_tensorflow(head, variables)
    assert torch.equal(head.linear.weight, tensor(variables["d_sn_linear/Matrix"].T))
    assert torch.equal(head.embedding.weight, tensor(variables["d_embedding/embedding_map"]))


@every_block
@pytest.mark.parametrize("suffix", ["", ":0"])
@pytest.mark.parametrize("scope", ["model/block", "/model/block/"])
def test_a_scope_selects_the_names_below_it(kind: str, suffix: str, scope: str) -> None:
    module, variables = case(kind)
    expected = copy.deepcopy(module)
    load_tensorflow(expected, variables)
    named = {f"model/block/{name}{suffix}": value for name, value in variables.items()}
    named |= {"model/block2/w": array(1), "global_step": array(1)}
    load_tensorflow(module, named, scope)
    assert_same(module.state_dict(), expected.state_dict())


def test_variables_may_be_tensors_lists_or_float64() -> None:
    module = SNLinear(2, 2)
    matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    load_tensorflow(module, {"Matrix": matrix, "u": [[0.6, 0.8]], "bias": np.array([5.0, 6.0])})
    assert module.weight.tolist() == [[1, 3], [2, 4]]
    assert module.bias.tolist() == [5, 6]
    assert module.weight.dtype == torch.float32
    assert module.weight.requires_grad


def test_spatial_reorders_the_outputs_from_height_width_channels() -> None:
    height, width, channels = 2, 3, 4
    module = SNLinear(5, height * width * channels)
    matrix, bias, u = array(5, 24), array(24), array(1, 24)
    variables = {"l/Matrix": matrix, "l/bias": bias, "l/u": u}
    spatial = {"": (height, width)}
    convert.load(module, variables, "tensorflow", prefix="l", channels_last_outputs=spatial)
    stored = convert.save(module, "tensorflow", prefix="l", channels_last_outputs=spatial)
    assert_same(stored, {name: tensor(value) for name, value in variables.items()})
    z = torch.randn(2, 5)
    theirs = (z @ tensor(matrix) + tensor(bias)).view(2, height, width, channels).permute(0, 3, 1, 2)
    plain = nn.functional.linear(z, module.weight, module.bias).view(2, channels, height, width)
    torch.testing.assert_close(plain, theirs)
    grid = tensor(u[0]).view(height, width, channels).permute(2, 0, 1).flatten()
    assert torch.equal(module.weight_u, grid)


def test_a_network_takes_each_module_by_its_name_there() -> None:
    network = nn.ModuleDict({"first": SNLinear(2, 3), "norm": ConditionalBatchNorm2d(3)})
    variables = {"net/l0/Matrix": array(2, 3), "net/l0/u": array(1, 3), "net/l0/bias": array(3)}
    variables |= {f"net/bn/{name}": array(3) for name in ("gamma", "beta", "moving_mean", "moving_variance")}
    names = {"first": "l0", "norm": "bn"}
    convert.load(network, variables, "tensorflow", prefix="net", names=names)
    assert torch.equal(network["first"].weight, tensor(variables["net/l0/Matrix"].T))
    assert torch.equal(network["norm"].norm.running_var, tensor(variables["net/bn/moving_variance"]))
    assert_same(
        convert.save(network, "tensorflow", prefix="net", names=names),
        {name: tensor(value) for name, value in variables.items()},
    )


def assert_refused_and_unchanged(module: nn.Module, variables: dict[str, Any], message: str) -> None:
    before = state_of(module)
    scoped = {f"scope/{name}": value for name, value in variables.items()}
    with pytest.raises(ValueError, match=message):
        load_tensorflow(module, scoped, "scope")
    assert_same(module.state_dict(), before)


@every_block
def test_each_missing_variable_is_named(kind: str) -> None:
    for name in VARIABLES[kind][1]:
        module, variables = case(kind)
        del variables[name]
        assert_refused_and_unchanged(module, variables, f"TensorFlow code do not fit; missing: scope/{name}$")


@every_block
def test_a_left_over_variable_is_named(kind: str) -> None:
    module, variables = case(kind)
    name = "stranger" if "u" in variables else "u"  # which a layer without spectral norm does not take
    assert_refused_and_unchanged(
        module, {**variables, name: array(1)}, f"do not fit; left over: scope/{name}$"
    )


@every_block
def test_each_misshapen_variable_is_named_with_both_shapes(kind: str) -> None:
    for name, value in VARIABLES[kind][1].items():
        module, variables = case(kind)
        expected, wrong = list(np.shape(value)), np.zeros((*np.shape(value), 2))
        variables[name] = wrong
        message = f"of the wrong shape: scope/{name} (expected {expected}, got {list(wrong.shape)})"
        assert_refused_and_unchanged(module, variables, re.escape(message))


def test_all_problems_are_named_together() -> None:
    module = SNLinear(3, 4)
    variables = {"Matrix": array(4, 3), "bias": array(4), "beta": array(4)}
    assert_refused_and_unchanged(
        module,
        variables,
        r"missing: scope/u; left over: scope/beta; of the wrong shape: scope/Matrix \(expected \[3, 4\], got",
    )


def test_a_module_that_the_code_base_does_not_have_misses_its_entries() -> None:
    with pytest.raises(
        ValueError, match=r"missing: weight, bias, running_mean, running_var, num_batches_tracked$"
    ):
        load_tensorflow(nn.BatchNorm2d(3), {})


def test_unknown_code_bases_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"source: expected one of \['biggan_pytorch', .*\], got 'bigan'"):
        convert.load(SNLinear(2, 2), {}, "bigan")
    with pytest.raises(ValueError, match="torchgan's attention takes the softmax over the queries"):
        convert.save(SelfAttention2d(8), "torchgan")
    with pytest.raises(TypeError, match="source: expected the name of a code base or a CodeBase, got 3"):
        convert.load(SNLinear(2, 2), {}, 3)


def test_long_lists_of_names_are_cut() -> None:
    state = {f"stranger{number}": torch.ones(1) for number in range(30)}
    with pytest.raises(ValueError, match=r"stranger11 and 18 more$"):
        convert.load(nn.Identity(), state, "biggan_pytorch")


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(4, 3).int(),
        torch.ones(4, 3) + 1j,
        torch.ones(4, 3).to_sparse(),
        torch.ones(4, 3).to(torch.float8_e4m3fn),
        torch.ones(4, 3, device="meta"),
        np.array([{}]),
    ],
    ids=["integers", "complex", "sparse", "float8", "meta", "objects"],
)
def test_weights_that_are_no_dense_floating_point_ones_are_refused_and_nothing_is_loaded(value: Any) -> None:
    modules = nn.ModuleList([SNLinear(3, 4), SNLinear(3, 4)])
    state = {**convert.save(modules, "biggan_pytorch"), "1.weight": value}
    for entry in state.values():
        if isinstance(entry, torch.Tensor) and entry.is_floating_point() and entry is not value:
            entry.fill_(0.5)
    before = state_of(modules)
    with pytest.raises(TypeError, match=r"^1\.weight: expected "):
        convert.load(modules, state, "biggan_pytorch")
    assert_same(modules.state_dict(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_offset_is_added_with_the_digits_of_float32(dtype: torch.dtype) -> None:
    norm = ConditionalBatchNorm2d(4, num_classes=3)
    state = {name: value.to(dtype) for name, value in convert.save(norm, "biggan_pytorch").items()}
    state["gain.weight"] = torch.full((3, 4), 0.0123).to(dtype)
    convert.load(norm, state, "biggan_pytorch")
    assert torch.equal(norm.weight, state["gain.weight"].float() + 1)


def test_names_and_prefixes_are_checked() -> None:
    layers = nn.ModuleDict({"a": SNLinear(2, 2), "b": SNLinear(2, 2)})
    with pytest.raises(TypeError, match=r"names: expected a mapping from our names to theirs, got \['a'\]"):
        convert.save(layers, "biggan_pytorch", names=["a"])
    with pytest.raises(TypeError, match="names: expected strings, got 3"):
        convert.save(layers, "biggan_pytorch", names={"a": 3})
    with pytest.raises(TypeError, match="prefix: expected a string, got 3"):
        convert.save(layers, "biggan_pytorch", prefix=3)
    with pytest.raises(ValueError, match=r"names: expected a name of its own for b\.\w+, got b\.\w+ twice"):
        convert.save(layers, "biggan_pytorch", names={"a": "b"})
    assert convert.save(layers, "biggan_pytorch", prefix="G.").keys() == (
        convert.save(layers, "biggan_pytorch", prefix="G").keys()
    )


def test_of_a_form_that_stores_v_it_must_be_there_and_of_one_that_does_not_it_is_made() -> None:
    layer = SNLinear(3, 4, eps_mode="clamp", iterate_when_frozen=False)
    hooked = convert.save(layer, "mimicry")
    del hooked["weight_v"]
    with pytest.raises(ValueError, match=r"do not fit; missing: weight_v$"):
        convert.load(layer, hooked, "mimicry")
    own = {"weight": hooked["weight_orig"], "bias": hooked["bias"], "sn_u": hooked["weight_u"].view(1, -1)}
    convert.load(layer, own, "mimicry")
    weight, u = own["weight"], hooked["weight_u"]
    right = nn.functional.normalize(weight.t() @ u, dim=0)
    sigma = (weight @ right).norm()
    torch.testing.assert_close(layer.eval().normalized_weight(), weight / sigma)
