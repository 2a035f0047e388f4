"""The stateless forms and their checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sagan_layers import functional

lengths, seeds = st.integers(1, 7), st.integers(0, 2**16)


def triple(
    batch: int, queries: int, keys: int, width: int, value_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(batch, queries, width, dtype=torch.float64),
        torch.randn(batch, keys, width, dtype=torch.float64),
        torch.randn(batch, keys, value_width, dtype=torch.float64),
    )


@given(batch=st.integers(1, 3), queries=lengths, keys=lengths, width=lengths, value_width=lengths, seed=seeds)
def test_attention_is_the_written_out_formula(
    batch: int, queries: int, keys: int, width: int, value_width: int, seed: int
) -> None:
    torch.manual_seed(seed)
    query, key, value = triple(batch, queries, keys, width, value_width)
    y = functional.attention(query, key, value, scale=0.7)
    assert y.shape == (batch, queries, value_width)
    for n in range(batch):
        for i in range(queries):
            exponentials = torch.stack([(0.7 * query[n, i] @ key[n, j]).exp() for j in range(keys)])
            expected = (exponentials[:, None] * value[n]).sum(0) / exponentials.sum()
            torch.testing.assert_close(y[n, i], expected)


@given(queries=lengths, keys=lengths, seed=seeds)
def test_attention_follows_the_order_of_queries_and_not_that_of_key_value_pairs(
    queries: int, keys: int, seed: int
) -> None:
    torch.manual_seed(seed)
    query, key, value = triple(2, queries, keys, 3, 5)
    y, weights = functional.attention(query, key, value), functional.attention_weights(query, key)
    order, key_order = torch.randperm(queries), torch.randperm(keys)
    key, value = key[:, key_order], value[:, key_order]
    torch.testing.assert_close(functional.attention(query[:, order], key, value), y[:, order])
    torch.testing.assert_close(functional.attention_weights(query, key), weights[..., key_order])


@given(queries=lengths, keys=lengths, seed=seeds)
def test_attention_output_lies_between_the_values(queries: int, keys: int, seed: int) -> None:
    torch.manual_seed(seed)
    query, key, value = triple(2, queries, keys, 3, 5)
    y = functional.attention(10 * query, key, value)
    assert (y <= value.amax(1, keepdim=True) + 1e-12).all()
    assert (y >= value.amin(1, keepdim=True) - 1e-12).all()


@given(keys=lengths, shift=st.floats(-100, 100), seed=seeds)
def test_attention_does_not_change_when_every_key_is_shifted_equally(
    keys: int, shift: float, seed: int
) -> None:
    torch.manual_seed(seed)
    query, key, value = triple(2, 4, keys, 3, 5)
    torch.testing.assert_close(
        functional.attention(query, key + shift, value),
        functional.attention(query, key, value),
        rtol=1e-6,
        atol=1e-9,
    )


def test_attention_of_equal_keys_is_the_mean_of_the_values() -> None:
    query, key, value = triple(2, 3, 4, 2, 5)
    y = functional.attention(query, torch.zeros_like(key), value)
    torch.testing.assert_close(y, value.mean(1, keepdim=True).expand_as(y))


def test_attention_weights_sum_to_one_over_keys() -> None:
    query, key, _ = triple(2, 3, 5, 4, 1)
    weights = functional.attention_weights(100 * query, key, scale=2.0)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    assert weights.shape == (2, 3, 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention_returns_the_values_dtype_and_weights_the_accumulation_dtype(dtype: torch.dtype) -> None:
    query, key, value = (tensor.to(dtype) for tensor in triple(1, 2, 3, 4, 5))
    assert functional.attention(query, key, value).dtype == dtype
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert functional.attention_weights(query, key).dtype == expected


QUERY, KEY, VALUE = torch.ones(2, 3, 4), torch.ones(2, 5, 4), torch.ones(2, 5, 6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": QUERY[0]}, ValueError, r"query: expected 3 axes \[N, length, width\], got \[3, 4\]"),
        ({"key": KEY[None]}, ValueError, r"key: expected 3 axes \[N, length, width\], got \[1, 2, 5, 4\]"),
        ({"value": VALUE[0]}, ValueError, r"value: expected 3 axes.*got \[5, 6\]"),
        ({"key": KEY[:1]}, ValueError, r"key: expected \[N, S, E\] = \[2, S, 4\].*got \[1, 5, 4\]"),
        ({"key": KEY[..., :3]}, ValueError, r"key: expected \[N, S, E\] = \[2, S, 4\].*got \[2, 5, 3\]"),
        ({"key": KEY[:, :0]}, ValueError, r"key: .*with S, E >= 1, got \[2, 0, 4\]"),
        ({"query": QUERY[..., :0], "key": KEY[..., :0]}, ValueError, r"key: .*S, 0\].*got \[2, 5, 0\]"),
        ({"value": VALUE[:, :4]}, ValueError, r"value: expected \[N, S, Ev\] = \[2, 5, .*got \[2, 4, 6\]"),
        ({"value": VALUE[:1]}, ValueError, r"value: expected \[N, S, Ev\] = \[2, 5, Ev\].*got \[1, 5, 6\]"),
        ({"value": VALUE[..., :0]}, ValueError, r"value: .*with Ev >= 1, got \[2, 5, 0\]"),
        ({"key": KEY.double()}, TypeError, "key: expected the query's dtype .*float32, got torch.float64"),
        ({"value": VALUE.half()}, TypeError, "value: expected the query's dtype .*float32, got .*float16"),
        ({"key": KEY.to("meta")}, ValueError, "key: expected the device of the query, cpu, got meta"),
        ({"value": VALUE.to("meta")}, ValueError, "value: expected the device of the query, cpu, got meta"),
    ],
)
def test_attention_refuses_inputs_that_do_not_fit(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    inputs = {"query": QUERY, "key": KEY, "value": VALUE, **changes}
    for function in (functional.attention, functional.select_backend):
        with pytest.raises(error, match=message):
            function(*inputs.values())
    if "value" not in changes:
        with pytest.raises(error, match=message):
            functional.attention_weights(inputs["query"], inputs["key"])


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3), (4, 6, 3, 2)])
def test_spectral_normalize_converges_to_the_singular_vectors(shape: tuple[int, ...], dim: int) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    outputs = shape[dim]
    rest = weight.numel() // outputs
    result = functional.spectral_normalize(
        weight,
        torch.randn(outputs, dtype=torch.float64),
        torch.randn(rest, dtype=torch.float64),
        dim=dim,
        n_power_iterations=1000,
    )
    matrix = weight.movedim(dim, 0).reshape(outputs, rest) if dim == 0 else weight.transpose(0, 1).flatten(1)
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(result.sigma, singular[0])
    torch.testing.assert_close(result.weight, weight / singular[0])
    sign = torch.sign(result.u @ left[:, 0])
    torch.testing.assert_close(result.u, sign * left[:, 0])
    torch.testing.assert_close(result.v, sign * right[0])


def test_spectral_normalize_changes_nothing_in_place_and_returns_new_vectors() -> None:
    weight, u, v = torch.randn(3, 4), torch.randn(3), torch.randn(4)
    copies = [tensor.clone() for tensor in (weight, u, v)]
    for iterations in (0, 1):
        result = functional.spectral_normalize(weight, u, v, n_power_iterations=iterations)
        result.u.zero_()
        result.v.zero_()
        assert all(torch.equal(*pair) for pair in zip((weight, u, v), copies, strict=True))


def test_spectral_normalize_without_iterations_takes_the_vectors_as_they_are() -> None:
    weight, u, v = torch.randn(3, 4), torch.randn(3), torch.randn(4)
    result = functional.spectral_normalize(weight, u, v, n_power_iterations=0)
    torch.testing.assert_close(result.sigma, u @ weight @ v)
    torch.testing.assert_close(result.weight, weight / (u @ weight @ v))


def test_backward_survives_a_change_of_the_callers_vectors() -> None:
    weight, u, v = torch.randn(3, 4, requires_grad=True), torch.randn(3), torch.randn(4)
    result = functional.spectral_normalize(weight, u, v, n_power_iterations=0)
    (expected,) = torch.autograd.grad(result.weight.square().sum(), weight, retain_graph=True)
    u.zero_()
    v.zero_()
    (gradient,) = torch.autograd.grad(result.weight.square().sum(), weight)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sigma_of_half_precision_weights_is_computed_in_float32(dtype: torch.dtype) -> None:
    weight = torch.randn(31, 47).to(dtype)
    result = functional.spectral_normalize(
        weight, torch.randn(31).to(dtype), torch.randn(47).to(dtype), n_power_iterations=300
    )
    assert result.weight.dtype == dtype
    assert result.sigma.dtype == torch.float32
    exact = torch.linalg.svdvals(weight.double())[0]
    assert result.sigma.item() == pytest.approx(exact.item(), rel=1e-5)


def test_the_power_iteration_runs_with_autocast_off(monkeypatch: pytest.MonkeyPatch) -> None:
    # CPU autocast leaves torch.mv alone and CUDA autocast lowers it, so the values here would not tell.
    states = []
    product = torch.mv

    def watched(matrix: Tensor, vector: Tensor) -> Tensor:
        states.append(torch.is_autocast_enabled("cpu"))
        return product(matrix, vector)

    monkeypatch.setattr(torch, "mv", watched)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.is_autocast_enabled("cpu")
        result = functional.spectral_normalize(torch.randn(3, 4), torch.randn(3), torch.randn(4))
        assert torch.is_autocast_enabled("cpu")
    assert len(states) == 3
    assert not any(states)
    assert result.sigma.dtype == result.weight.dtype == torch.float32


@pytest.mark.gpu
def test_sigma_under_autocast_on_a_gpu_is_that_of_float64() -> None:
    weight, u, v = torch.randn(64, 96), torch.randn(64), torch.randn(96)
    exact = functional.spectral_normalize(weight.double(), u.double(), v.double(), n_power_iterations=3)
    with torch.autocast("cuda", torch.bfloat16):
        result = functional.spectral_normalize(weight.cuda(), u.cuda(), v.cuda(), n_power_iterations=3)
    assert result.sigma.item() == pytest.approx(exact.sigma.item(), rel=1e-5)


def test_weight_with_a_spectral_norm_not_above_eps_is_returned_as_it_is() -> None:
    weight = 1e-3 * torch.randn(3, 4)
    u, v = torch.randn(3), torch.randn(4)
    assert torch.equal(functional.spectral_normalize(weight, u, v, eps=1.0).weight, weight)
    assert not torch.equal(functional.spectral_normalize(weight, u, v, eps=1e-8).weight, weight)


WEIGHT, U, V = torch.ones(3, 4), torch.ones(3), torch.ones(4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"u": V}, ValueError, r"u: expected shape \[3\], got \[4\]"),
        ({"v": U}, ValueError, r"v: expected shape \[4\], got \[3\]"),
        ({"dim": 1}, ValueError, r"u: expected shape \[4\], got \[3\]"),
        ({"u": U.to("meta")}, ValueError, "u: expected the device of the weight, cpu, got meta"),
    ],
)
def test_spectral_normalize_refuses_what_does_not_fit(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        functional.spectral_normalize(**{"weight": WEIGHT, "u": U, "v": V, **changes})


@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    batch=st.integers(2, 4),
    channels=st.integers(1, 4),
    per_sample=st.booleans(),
    seed=seeds,
)
def test_conditional_batch_norm_of_any_rank_is_torchs_with_a_gain_and_bias(
    shape: list[int], batch: int, channels: int, per_sample: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(batch, channels, *shape, dtype=torch.float64)
    gain, bias = (
        torch.randn((batch, channels) if per_sample else (channels,), dtype=torch.float64) for _ in range(2)
    )
    y = functional.conditional_batch_norm(x, gain, bias, training=True)
    normalised = nn.functional.batch_norm(x, None, None, training=True)

    def spread(coefficients: Tensor) -> Tensor:
        return coefficients.expand(batch, channels).reshape(batch, channels, *[1] * len(shape))

    torch.testing.assert_close(y, spread(gain) * normalised + spread(bias))


def test_momentum_may_be_a_tensor() -> None:
    x = torch.randn(4, 3, 2, 2)
    states = []
    for momentum in (0.25, torch.tensor(0.25, dtype=torch.float64)):
        mean, var = torch.zeros(3), torch.ones(3)
        functional.conditional_batch_norm(
            x, torch.ones(3), torch.zeros(3), mean, var, training=True, momentum=momentum
        )
        states.append(torch.cat([mean, var]))
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_half_precision_inputs_are_taken_in_float32(dtype: torch.dtype) -> None:
    x = (torch.randn(16, 3, 32, 32) * 0.5 + 30).to(dtype)
    mean, var = torch.zeros(3), torch.ones(3)
    y = functional.conditional_batch_norm(
        x, torch.ones(3), torch.zeros(3), mean, var, training=True, momentum=1.0
    )
    assert y.dtype == dtype
    exact = x.double()
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact.var((0, 2, 3)), rtol=1e-5, atol=0)


X, COEFFICIENTS, MEAN = torch.ones(4, 3, 2), torch.ones(4, 3), torch.zeros(3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": MEAN}, ValueError, r"x: expected \[N, C, \*\] with all but N at least 1, got \[3\]"),
        ({"gain": X[:2, :, 0]}, ValueError, r"gain: expected .* = \[4, 3\] or \[3\], got \[2, 3\]"),
        ({"bias": torch.ones(4)}, ValueError, r"bias: expected .* = \[4, 3\] or \[3\], got \[4\]"),
        ({"bias": X[..., :1]}, ValueError, r"bias: expected.*got \[4, 3, 1\]"),
        ({"bias": COEFFICIENTS.to("meta")}, ValueError, "bias: expected the device of x, cpu, got meta"),
        ({"running_mean": MEAN}, ValueError, "running_mean and running_var: .* both or neither, got one"),
        ({"running_var": MEAN}, ValueError, "expected both or neither, got one"),
        ({"running_mean": MEAN, "running_var": MEAN[:2]}, ValueError, r"running_var: .* \[3\], got \[2\]"),
        ({"running_mean": MEAN[:1], "running_var": MEAN}, ValueError, r"running_mean: .* \[3\], got \[1\]"),
        ({"running_mean": MEAN.to("meta"), "running_var": MEAN}, ValueError, "device of x, cpu, got meta"),
        ({"x": X[:1, :, :1], "gain": MEAN, "bias": MEAN}, ValueError, r"more than 1 value .*got \[1, 3, 1\]"),
        ({"x": X[:, :0], "gain": MEAN[:0], "bias": MEAN[:0]}, ValueError, r"at least 1, got \[4, 0, 2\]"),
    ],
)
def test_conditional_batch_norm_refuses_what_does_not_fit(
    changes: dict[str, Any], error: type[Exception], message: str, training: bool
) -> None:
    inputs = {"x": X, "gain": COEFFICIENTS, "bias": COEFFICIENTS, **changes}
    with pytest.raises(error, match=message):
        functional.conditional_batch_norm(**inputs, training=training)


def block(
    C: int = 8, E: int = 2, Ev: int = 4, bias: bool = False, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor | None]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype)

    return {
        "query_weight": draw(E, C),
        "key_weight": draw(E, C),
        "value_weight": draw(Ev, C),
        "out_weight": draw(C, Ev),
        "gamma": draw(()),
        "query_bias": draw(E) if bias else None,
        "key_bias": draw(E) if bias else None,
        "value_bias": draw(Ev) if bias else None,
        "out_bias": draw(C) if bias else None,
    }


@pytest.mark.parametrize("backend", ["auto", "reference", "chunked", "fused"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pool_size", [1, 2])
def test_self_attention_2d_is_the_written_out_formula(backend: str, bias: bool, pool_size: int) -> None:
    parameters = block(bias=bias)
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)

    def project(name: str, features: Tensor) -> Tensor:
        projected = torch.einsum("oc,nchw->nohw", parameters[f"{name}_weight"], features)
        return projected if not bias else projected + parameters[f"{name}_bias"][:, None, None]

    query = project("query", x).flatten(2)
    key, value = (
        torch.nn.functional.max_pool2d(project(name, x), pool_size).flatten(2) for name in ("key", "value")
    )
    weights = torch.einsum("nel,nes->nls", query, key).softmax(-1)
    gathered = project("out", torch.einsum("nls,nvs->nvl", weights, value).view(2, 4, 5, 6))
    with functional.record_backends() as served:
        y = functional.self_attention_2d(x, **parameters, pool_size=pool_size, backend=backend)
    assert served == ["reference" if backend == "auto" else backend]
    torch.testing.assert_close(y, x + parameters["gamma"] * gathered)


def test_self_attention_2d_without_an_output_projection_returns_the_value() -> None:
    parameters = {**block(Ev=8), "out_weight": None}
    x = torch.randn(1, 8, 4, 4, dtype=torch.float64)
    identity = {**parameters, "out_weight": torch.eye(8, dtype=torch.float64)}
    for backend in ("reference", "fused"):
        torch.testing.assert_close(
            functional.self_attention_2d(x, **parameters, backend=backend),
            functional.self_attention_2d(x, **identity, backend=backend),
        )


def test_self_attention_2d_takes_the_weights_of_convolutions_and_gamma_of_one_element() -> None:
    parameters = block()
    x = torch.randn(1, 8, 4, 4, dtype=torch.float64)
    expected = functional.self_attention_2d(x, **parameters)
    for name in ("query_weight", "key_weight", "value_weight", "out_weight"):
        parameters[name] = parameters[name][..., None, None]
    parameters["gamma"] = parameters["gamma"].reshape(1)
    assert torch.equal(functional.self_attention_2d(x, **parameters), expected)


ROWS = torch.ones(2, 8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(8, 4, 4)}, ValueError, r"x: expected \[N, C, H, W\], got \[8, 4, 4\]"),
        ({"x": torch.ones(1, 8, 1, 4)}, ValueError, r"at least pool_size = 2, got \[1, 8, 1, 4\]"),
        ({"query_weight": ROWS[:, :7]}, ValueError, r"query_weight: expected \[rows, 8\] or .* got \[2, 7\]"),
        ({"query_weight": torch.ones(2, 8, 3, 3)}, ValueError, r"query_weight: .* got \[2, 8, 3, 3\]"),
        ({"key_weight": ROWS[:1]}, ValueError, r"key_weight: expected \[E, C\] = \[2, 8\], got \[1, 8\]"),
        ({"key_weight": ROWS.double()}, TypeError, "key_weight: expected the dtype of x, torch.float32"),
        ({"value_weight": ROWS.to("meta")}, ValueError, "value_weight: expected the device of x"),
        ({"out_weight": torch.ones(8, 5)}, ValueError, r"out_weight: expected \[rows, 4\]"),
        ({"out_weight": torch.ones(7, 4)}, ValueError, r"out_weight: expected C = 8 rows, got \[7, 4\]"),
        ({"out_weight": None}, ValueError, r"value_weight: expected C = 8 rows, got \[4, 8\]"),
        ({"value_bias": torch.ones(3)}, ValueError, r"value_bias: expected \[4\], got \[3\]"),
        ({"gamma": torch.ones(2)}, ValueError, r"gamma: expected one element, got \[2\]"),
        ({"backend": "flash"}, ValueError, "backend: expected one of 'auto', 'fused', .*got 'flash'"),
    ],
)
def test_self_attention_2d_refuses_what_does_not_fit(
    changes: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments = {"x": torch.randn(1, 8, 4, 4), **block(dtype=torch.float32), **changes}
    with pytest.raises(error, match=message):
        functional.self_attention_2d(**arguments)


def test_self_attention_2d_refuses_a_bias_for_no_projection() -> None:
    parameters = {**block(Ev=8, bias=True), "out_weight": None}
    with pytest.raises(ValueError, match="out_bias: expected None without out_weight"):
        functional.self_attention_2d(torch.randn(1, 8, 4, 4, dtype=torch.float64), **parameters)


@pytest.mark.parametrize("backend", ["auto", "composed", "reference", "chunked", "sdpa"])
def test_self_attention_2d_without_the_residual_is_what_it_adds_to_x(backend: str) -> None:
    x, parameters = torch.randn(2, 8, 6, 6, dtype=torch.float64), block()
    y, alone = (
        functional.self_attention_2d(x, **parameters, residual=residual, backend=backend)
        for residual in (True, False)
    )
    assert torch.equal(y, x + alone)


def test_the_fused_block_says_why_it_cannot_serve() -> None:
    x = torch.randn(1, 8, 6, 6, dtype=torch.float64)
    explained = functional.explain_backends(x, **block(), residual=False, operation="self_attention_2d")
    assert explained == {"fused": "cannot serve: its kernels add x", "composed": "chosen"}
    with pytest.raises(
        ValueError, match=r"no self-attention backend serves .*fused: pool_size = 3 is above 2"
    ):
        functional.self_attention_2d(x, **block(), pool_size=3, backend="fused")
    with pytest.raises(ValueError, match=r"fused: Ev = 300 is more than 128"):
        functional.self_attention_2d(x, **block(Ev=300), backend="fused")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_fused_block_under_autocast_serves_what_autocast_projects_in(dtype: torch.dtype) -> None:
    x, parameters = torch.randn(1, 8, 4, 4).to(dtype), block(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        if dtype == torch.float32:
            with pytest.raises(
                ValueError, match=r"autocast projects in torch.bfloat16, and x is torch.float32"
            ):
                functional.self_attention_2d(x, **parameters, backend="fused")
            return
        fused = functional.self_attention_2d(x, **parameters, backend="fused")
        composed = functional.self_attention_2d(x, **parameters, backend="reference")
    assert fused.dtype == composed.dtype == torch.bfloat16
    torch.testing.assert_close(fused, composed, rtol=0.05, atol=0.1)
