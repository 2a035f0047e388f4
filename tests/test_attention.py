"""SelfAttention2d."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from dispatched import DispatchedOperations
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sagan_layers import SelfAttention2d, SNConv2d, frozen_spectral_norm

FORMS: dict[str, dict[str, Any]] = {
    "released": {},
    "paper": {"pool_size": 1, "value_channels": 8},
    "first_arxiv": {"pool_size": 1, "output_projection": False},
    "biased": {"pool_size": 1, "output_projection": False, "bias": True},
    "plain": {"spectral_norm": False, "bias": True},
    "pool_3": {"pool_size": 3},
}
BACKENDS = ["auto", "reference", "chunked", "sdpa", "fused"]


def floor_pool(features: Tensor, size: int) -> Tensor:
    """Max-pooling without incomplete windows, window by window."""
    rows, columns = features.size(2) // size, features.size(3) // size
    pooled = features.new_empty(*features.shape[:2], rows, columns)
    for i in range(rows):
        for j in range(columns):
            window = features[:, :, i * size : (i + 1) * size, j * size : (j + 1) * size]
            pooled[:, :, i, j] = window.amax((2, 3))
    return pooled


def effective(layer: nn.Module) -> tuple[Tensor, Tensor | float]:
    """The matrix and bias that a 1x1 convolution applies in evaluation, iterating by hand."""
    if isinstance(layer, nn.Identity):
        return torch.empty(0), 0.0
    weight = layer.weight.detach().flatten(1)
    if isinstance(layer, SNConv2d):
        v = weight.t() @ layer.weight_u
        v = v / (torch.linalg.vector_norm(v) + layer.eps)
        u = weight @ v
        u = u / (torch.linalg.vector_norm(u) + layer.eps)
        weight = weight / (u @ weight @ v)
    bias = layer.bias
    return weight, 0.0 if bias is None else bias.detach()[:, None, None]


def written_out(module: SelfAttention2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and weights [N, L, S], by einsum over explicit matrices."""

    def project(layer: nn.Module, features: Tensor) -> Tensor:
        matrix, bias = effective(layer)
        return torch.einsum("oc,nchw->nohw", matrix, features) + bias

    query = project(module.query, x)
    key = floor_pool(project(module.key, x), module.pool_size)
    value = floor_pool(project(module.value, x), module.pool_size)
    logits = torch.einsum("nehw,neij->nhwij", query, key)
    weights = logits.flatten(3).softmax(-1).view_as(logits)
    attended = torch.einsum("nhwij,nvij->nvhw", weights, value)
    gathered = attended if isinstance(module.out, nn.Identity) else project(module.out, attended)
    y = module.gamma.detach() * gathered
    return (x + y if module.residual else y), weights.flatten(3).flatten(1, 2)


@given(
    form=st.sampled_from(sorted(FORMS)),
    residual=st.booleans(),
    channels=st.sampled_from([1, 2, 3, 7, 8, 64]),
    size=st.tuples(st.integers(3, 11), st.integers(3, 8)),
    gamma=st.sampled_from([0.8, -1.3]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40)
def test_every_form_is_the_written_out_formula(
    form: str, residual: bool, channels: int, size: tuple[int, int], gamma: float, seed: int
) -> None:
    torch.manual_seed(seed)
    options = {"gamma_init": gamma, "residual": residual, "dtype": torch.float64, **FORMS[form]}
    module = SelfAttention2d(channels, **options).eval()
    x = 2 * torch.randn(2, channels, *size, dtype=torch.float64)
    expected, _ = written_out(module, x)
    torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10)


def test_pooling_drops_incomplete_windows() -> None:
    module = SelfAttention2d(4, gamma_init=1.0, spectral_norm=False)
    x = torch.randn(1, 4, 5, 7)
    changed = x.clone()
    changed[:, :, 4, :] += 1
    changed[:, :, :, 6] += 1
    inner = slice(None), slice(None), slice(0, 4), slice(0, 6)
    # Border positions are no keys, so only their own outputs change.
    assert torch.equal(module(changed)[inner], module(x)[inner])
    changed[:, :, :2, :2] = torch.randn(1, 4, 2, 2)
    assert not torch.equal(module(changed)[inner][..., 2:, 2:], module(x)[inner][..., 2:, 2:])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(3, 3), (3, 9), (7, 5), (16, 16)])
def test_at_gamma_zero_the_input_returns_bit_for_bit(form: str, size: tuple[int, int]) -> None:
    module = SelfAttention2d(64, **FORMS[form])
    x = torch.randn(2, 64, *size) * 100
    x[:, ::2] = 0.0
    x[:, 1::4] = -0.0
    assert module.gamma.item() == 0
    assert torch.equal(module(x).view(torch.int32), x.view(torch.int32))


def test_at_gamma_zero_only_gamma_and_the_input_get_gradients() -> None:
    module = SelfAttention2d(8)
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    module(x).square().sum().backward()
    assert module.gamma.grad.item() != 0
    assert torch.equal(x.grad, 2 * x.detach())
    for name, parameter in module.named_parameters():
        if name != "gamma":
            assert torch.count_nonzero(parameter.grad) == 0


@pytest.mark.parametrize("size", [(2, 2), (2, 9), (9, 2), (3, 2)])
@pytest.mark.parametrize("channels", [1, 3, 7, 8])
def test_the_smallest_maps_work(channels: int, size: tuple[int, int]) -> None:
    module = SelfAttention2d(channels, gamma_init=1.0)
    x = torch.randn(2, channels, *size, requires_grad=True)
    y = module(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("pool_size", "size"), [(1, (1, 1)), (2, (2, 3))])
def test_a_single_key_gives_its_value_to_every_query(
    backend: str, pool_size: int, size: tuple[int, int]
) -> None:
    module = SelfAttention2d(32, pool_size=pool_size, gamma_init=0.7, spectral_norm=False, backend=backend)
    x = torch.randn(2, 32, *size, requires_grad=True)
    y = module(x)
    value = torch.amax(module.value(x)[..., :pool_size, :pool_size], (2, 3), keepdim=True)
    expected = x + 0.7 * module.out(value)
    torch.testing.assert_close(y, expected)
    ours, theirs = (
        torch.autograd.grad(each.square().sum(), [x, module.value.weight]) for each in (y, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(module.attention_weights(x, [(0, 0)]), torch.ones(2, 1, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_the_residual_it_is_the_input_plus_the_rest(dtype: torch.dtype) -> None:
    alone = SelfAttention2d(16, gamma_init=0.7, residual=False, dtype=dtype).eval()
    added = SelfAttention2d(16, dtype=dtype).eval()
    added.load_state_dict(alone.state_dict())
    x = torch.randn(2, 16, 6, 5, dtype=dtype)
    assert torch.equal(added(x), x + alone(x))
    nn.init.zeros_(alone.gamma)
    assert torch.count_nonzero(alone(x)) == 0


def test_the_fused_form_without_the_residual_is_refused() -> None:
    module = SelfAttention2d(32, residual=False, backend="fused")
    with pytest.raises(ValueError, match="fused: its kernels add x"):
        module(torch.randn(2, 32, 4, 4))


def test_query_and_key_exchanged_are_attention_over_the_queries_that_values_follow() -> None:
    # rosinality/sagan-pytorch: logits [N, queries, keys], softmax over axis 1, values summed over the same axis.
    module = SelfAttention2d(16, pool_size=1, output_projection=False, bias=True, gamma_init=0.7).eval()
    x = torch.randn(2, 16, 3, 5)
    query, key, value = (layer(x).flatten(2) for layer in (module.key, module.query, module.value))
    weights = torch.softmax(query.mT @ key, 1)
    torch.testing.assert_close(module(x), x + 0.7 * (value @ weights).view_as(x))


@given(seed=st.integers(0, 2**16), size=st.integers(2, 6))
def test_unpooled_attention_is_equivariant_to_permutations_of_the_positions(seed: int, size: int) -> None:
    torch.manual_seed(seed)
    module = SelfAttention2d(5, pool_size=1, gamma_init=0.9, dtype=torch.float64).eval()
    x = torch.randn(2, 5, size, size + 1, dtype=torch.float64)
    order = torch.randperm(size * (size + 1))
    permuted = x.flatten(2)[..., order].view_as(x)
    expected = module(x).flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(module(permuted), expected, rtol=1e-12, atol=1e-12)


@given(seed=st.integers(0, 2**16), row=st.integers(0, 2), column=st.integers(0, 3))
def test_pooled_attention_gathers_the_same_after_a_shift_by_whole_windows(
    seed: int, row: int, column: int
) -> None:
    torch.manual_seed(seed)
    module = SelfAttention2d(5, gamma_init=0.9, dtype=torch.float64).eval()
    x = torch.randn(2, 5, 6, 8, dtype=torch.float64)
    shift, dims = (2 * row, 2 * column), (2, 3)
    expected = module(x).roll(shift, dims)
    torch.testing.assert_close(module(x.roll(shift, dims)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_logits_of_hundreds_stay_accurate_under_autocast(memory_format: torch.memory_format) -> None:
    module = SelfAttention2d(16, gamma_init=1.0, spectral_norm=False, pool_size=1)
    with torch.no_grad():
        module.query.weight.mul_(30)
        module.key.weight.mul_(30)
    x = torch.randn(1, 16, 6, 6).to(memory_format=memory_format)
    with torch.autocast("cpu", torch.bfloat16):
        query, key = module.query(x), module.key(x)
        ours = module.attention_weights(x, [(2, 3), (5, 5)], key_grid=False)[0]
    assert query.dtype == torch.bfloat16
    logits = query.double().flatten(2)[0].t() @ key.double().flatten(2)[0]
    assert logits.abs().max() > 200
    exact = logits.softmax(-1)[[2 * 6 + 3, 35]]
    torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "key_channels", "value_channels", "has_output"),
    [
        ({}, 8, 32, True),
        (FORMS["paper"], 8, 8, True),
        (FORMS["first_arxiv"], 8, 64, False),
        (FORMS["biased"], 8, 64, False),
        ({"key_channels": 5, "value_channels": 11}, 5, 11, True),
    ],
)
def test_parameter_shapes_are_the_forms_of_the_papers(
    options: dict[str, Any], key_channels: int, value_channels: int, has_output: bool
) -> None:
    module = SelfAttention2d(64, **options)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    expected: dict[str, tuple[int, ...]] = {
        "gamma": (),
        "query.weight": (key_channels, 64, 1, 1),
        "key.weight": (key_channels, 64, 1, 1),
        "value.weight": (value_channels, 64, 1, 1),
    }
    if has_output:
        expected["out.weight"] = (64, value_channels, 1, 1)
    if options.get("bias"):
        expected |= {"query.bias": (8,), "key.bias": (8,), "value.bias": (64,)}
    assert shapes == expected


@pytest.mark.parametrize("channels", range(1, 8))
def test_fewer_than_eight_channels_leave_one_key_channel(channels: int) -> None:
    module = SelfAttention2d(channels)
    assert module.key_channels == 1
    assert module.value_channels == max(1, channels // 2)


def test_gamma_starts_at_gamma_init_and_returns_to_it() -> None:
    module = SelfAttention2d(8, gamma_init=0.25)
    assert module.gamma.item() == 0.25
    with torch.no_grad():
        module.gamma.fill_(3)
    weight = module.query.weight.clone()
    module.reset_parameters()
    assert module.gamma.item() == 0.25
    assert not torch.equal(module.query.weight, weight)


def test_power_iteration_options_reach_every_convolution() -> None:
    module = SelfAttention2d(8, n_power_iterations=3, eps=1e-8)
    layers = [module.query, module.key, module.value, module.out]
    assert [(layer.n_power_iterations, layer.eps) for layer in layers] == [(3, 1e-8)] * 4


def test_representation_names_what_is_not_visible_in_the_layers() -> None:
    assert SelfAttention2d(8, pool_size=1).extra_repr() == "8, pool_size=1, backend='auto'"
    assert SelfAttention2d(8, residual=False).extra_repr().endswith("backend='auto', residual=False")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(7, 5), (6, 9)])
def test_attention_maps_are_rows_of_the_full_matrix(form: str, size: tuple[int, int]) -> None:
    module = SelfAttention2d(64, dtype=torch.float64, **FORMS[form]).eval()
    x = 3 * torch.randn(2, 64, *size, dtype=torch.float64)
    _, full = written_out(module, x)
    points = [(0, 0), (3, 2), (size[0] - 1, size[1] - 1), (3, 2)]
    maps = module.attention_weights(x, points)
    pool = module.pool_size
    assert maps.shape == (2, 4, size[0] // pool, size[1] // pool)
    rows = full[:, [row * size[1] + column for row, column in points]]
    torch.testing.assert_close(maps.flatten(2), rows, rtol=1e-10, atol=1e-12)
    assert torch.equal(module.attention_weights(x, points, key_grid=False), maps.flatten(2))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_attention_maps_take_points_for_each_sample(dtype: torch.dtype) -> None:
    module = SelfAttention2d(16).eval()
    x = torch.randn(2, 16, 6, 5)
    points = torch.tensor([[[0, 1], [5, 4], [2, 2]], [[3, 0], [1, 4], [5, 3]]], dtype=dtype)
    maps = module.attention_weights(x, points)
    for n in range(2):
        torch.testing.assert_close(maps[n], module.attention_weights(x[n : n + 1], points[n])[0])
    assert not torch.allclose(maps[1], module.attention_weights(x, points[0])[1])


def test_attention_maps_do_not_move_u() -> None:
    module = SelfAttention2d(16)
    before = copy.deepcopy(module.state_dict())
    x = torch.randn(2, 16, 4, 4)
    first = module.attention_weights(x, [(1, 1)])
    assert torch.equal(first, module.attention_weights(x, [(1, 1)]))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.training
    module(x)
    assert not torch.equal(module.query.weight_u, before["query.weight_u"])


def test_attention_maps_are_those_of_a_frozen_forward() -> None:
    module = SelfAttention2d(16, gamma_init=1.0, output_projection=False, pool_size=1, dtype=torch.float64)
    x = torch.randn(1, 16, 3, 4, dtype=torch.float64)
    maps = module.attention_weights(x, [(i, j) for i in range(3) for j in range(4)], key_grid=False)
    with frozen_spectral_norm(module):
        value = module.value(x).flatten(2).transpose(1, 2)
        y = module(x)
    torch.testing.assert_close(y, x + (maps @ value).transpose(1, 2).view_as(x))


@pytest.mark.parametrize("form", ["released", "paper"])
def test_attention_maps_take_memory_linear_in_the_positions(form: str) -> None:
    options = {} if form == "released" else {"pool_size": 1, "value_channels": 1}
    module = SelfAttention2d(8, **options).eval()
    x = torch.randn(1, 8, 256, 256)  # L x S would be 4 GiB (17 GiB without pooling)
    points = [(0, 0), (255, 255), (128, 3)]
    with torch.no_grad(), DispatchedOperations() as dispatched:
        maps = module.attention_weights(x, points)
    assert maps.shape[:2] == (1, 3)
    assert dispatched.largest <= x.numel()


def test_attention_maps_carry_gradients() -> None:
    module = SelfAttention2d(8)
    x = torch.randn(1, 8, 4, 4, requires_grad=True)
    module.attention_weights(x, [(0, 0)])[0, 0, 1, 1].backward()
    assert torch.count_nonzero(x.grad) > 0
    assert torch.count_nonzero(module.query.weight.grad) > 0


def test_no_points_give_no_maps() -> None:
    points = torch.empty(0, 2, dtype=torch.long)
    assert SelfAttention2d(8).attention_weights(torch.randn(2, 8, 4, 4), points).shape == (2, 0, 2, 2)


X = torch.ones(1, 8, 4, 4)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (X[0], ValueError, r"input: expected \[N, C, H, W\] with C = 8, got \[8, 4, 4\]"),
        (X[:, :7], ValueError, r"expected \[N, C, H, W\] with C = 8, got \[1, 7, 4, 4\]"),
        (X.double(), TypeError, r"expected the module's dtype torch.float32, got torch.float64"),
        (X.to("meta"), ValueError, r"expected the device of the module's parameters, cpu, got meta"),
        (
            X[:, :, :1, :1],
            ValueError,
            r"expected height and width of at least pool_size = 2, got .*; SelfAttention2d\(..., pool_size=1",
        ),
    ],
)
@pytest.mark.parametrize("method", ["forward", "attention_weights"])
def test_wrong_inputs_are_refused(method: str, x: Any, error: type[Exception], message: str) -> None:
    module = SelfAttention2d(8)
    with pytest.raises(error, match=message):
        module(x) if method == "forward" else module.attention_weights(x, [(0, 0)])


@pytest.mark.parametrize(
    ("points", "error", "message"),
    [
        ([(4, 0)], ValueError, r"queries \(row\): expected values from 0 to 3, got values from 4 to 4"),
        ([(0, -1)], ValueError, r"queries \(column\): expected values from 0 to 4, got values from -1 to -1"),
        (
            [(0, 1, 2)],
            ValueError,
            r"queries: expected \[Q, 2\] or \[N, Q, 2\] with N = 2, got \[2, 1, 3\]",
        ),
        (torch.zeros(3, 1, 2, dtype=torch.long), ValueError, r"with N = 2, got \[3, 1, 2\]"),
        (torch.zeros(2, dtype=torch.long), ValueError, r"expected \[Q, 2\] or \[N, Q, 2\].*got \[2\]"),
        ([(0.5, 1.0)], TypeError, r"expected an int64 or int32 tensor, got torch.float32"),
    ],
)
def test_wrong_points_are_refused(points: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SelfAttention2d(8).attention_weights(torch.ones(2, 8, 4, 5), points)
