"""Spectral norm of other code bases: its eps, its axis, its stored entries, and layers that carry it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sagan_layers import (
    ConditionalBatchNorm2d,
    ProjectionDiscriminatorHead,
    SelfAttention2d,
    SNConv2d,
    SNConvTranspose2d,
    SNEmbedding,
    SNLinear,
    SpectralNormLayer,
    functional,
    shared_spectral_norm,
)
from sagan_layers.spectral_norm.reference import SpectralNormOptions, SpectralNormTask
from sagan_layers.spectral_norm.table import SPECTRAL_NORM

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.nn.utils.spectral_norm.*:FutureWarning")

LAYERS: dict[str, tuple[type[nn.Module], type[SpectralNormLayer], tuple[Any, ...]]] = {
    "conv": (nn.Conv2d, SNConv2d, (4, 6, 3)),
    "transpose": (nn.ConvTranspose2d, SNConvTranspose2d, (4, 6, 3)),
    "linear": (nn.Linear, SNLinear, (4, 6)),
    "embedding": (nn.Embedding, SNEmbedding, (7, 4)),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


def input_of(kind: str, dtype: torch.dtype = torch.float64) -> Tensor:
    if kind == "embedding":
        return torch.tensor([2, 0, 6])
    return torch.randn((3, 4) if kind == "linear" else (2, 4, 6, 5), dtype=dtype)


def hooked(kind: str, magnitude: float = 1.0, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A layer with torch's hook, whose u and v have moved."""
    plain, _, sizes = LAYERS[kind]
    layer = plain(*sizes, dtype=dtype)
    with torch.no_grad():
        layer.weight.mul_(magnitude)
    nn.utils.spectral_norm(layer, **options)
    layer(input_of(kind, dtype))
    return layer


# The norms of W^T u and W v of the smaller weights are below eps.
@every_layer
@pytest.mark.parametrize(
    ("eps", "magnitude"), [(1e-12, 1.0), (1e-4, 1.0), (1e-4, 1e-5), (1e-4, 1e-3), (1.0, 0.5)]
)
def test_clamped_eps_is_torchs_in_training_evaluation_and_gradient(
    kind: str, eps: float, magnitude: float
) -> None:
    theirs = hooked(kind, magnitude, eps=eps)
    _, normalised, sizes = LAYERS[kind]
    ours = normalised(*sizes, dtype=torch.float64, eps=eps, eps_mode="clamp", iterate_when_frozen=False)  # type: ignore[call-arg]
    with torch.no_grad():
        ours.weight.copy_(theirs.weight_orig)
        ours.weight_u.copy_(theirs.weight_u)
        ours.weight_v.copy_(theirs.weight_v)
        if kind != "embedding":
            ours.bias.copy_(theirs.bias)
    x = input_of(kind)
    for training in (True, False):
        for layer in (ours, theirs):
            layer.train(training).zero_grad()
        outputs = ours(x), theirs(x)
        torch.testing.assert_close(*outputs, rtol=1e-9, atol=0)
        for y in outputs:
            (y**3).sum().backward()
        largest = theirs.weight_orig.grad.abs().max().item()
        torch.testing.assert_close(ours.weight.grad, theirs.weight_orig.grad, rtol=1e-8, atol=1e-10 * largest)
        torch.testing.assert_close(ours.weight_u, theirs.weight_u, rtol=1e-9, atol=0)
        torch.testing.assert_close(ours.weight_v, theirs.weight_v, rtol=1e-9, atol=0)


def clamped_by_hand(weight: Tensor, u: Tensor, iterations: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    matrix = weight.double().flatten(1)
    u = u.double()
    for _ in range(iterations):
        v = nn.functional.normalize(matrix.t() @ u, dim=0, eps=eps)
        u = nn.functional.normalize(matrix @ v, dim=0, eps=eps)
    return weight.double() / (u @ matrix @ v), u, v


@pytest.mark.parametrize("backend", ["cpu", "grouped", "reference"])
@pytest.mark.parametrize("magnitude", [1.0, 1e-3, 1e-6, 1e-20])
@pytest.mark.parametrize("eps", [1e-12, 1e-4])
def test_every_backend_takes_eps_as_the_least_norm(backend: str, magnitude: float, eps: float) -> None:
    weight, u, v = (
        magnitude * torch.randn(6, 4, 3, 3),
        nn.functional.normalize(torch.randn(6), dim=0),
        torch.zeros(36),
    )
    options = SpectralNormOptions(0, 1, eps, torch.float32, eps_mode="clamp")
    normalize = {row.name: row.implementation.normalize for row in SPECTRAL_NORM.backends}[backend]
    (result,) = normalize([SpectralNormTask(weight, u, v, options)])
    expected = clamped_by_hand(weight, u, 1, eps)
    for got, wanted in zip((result.weight, result.u, result.v), expected, strict=True):
        if wanted.abs().max() < 1e38:
            torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=0)


def test_layers_of_both_modes_share_one_call() -> None:
    model = nn.Sequential(SNLinear(4, 4, eps=0.5), SNLinear(4, 4, eps=0.5, eps_mode="clamp"))
    alone = copy.deepcopy(model)
    with shared_spectral_norm(model):
        shared = [layer.normalized_weight() for layer in model]
    torch.testing.assert_close(shared, [layer.normalized_weight() for layer in alone])


@pytest.mark.parametrize("eps_mode", ["add", "clamp"])
def test_zeros_stay_zeros_with_a_finite_gradient(eps_mode: str) -> None:
    layer = SNLinear(4, 3, bias=False, eps_mode=eps_mode)
    nn.init.zeros_(layer.weight)
    for _ in range(2):
        y = layer(torch.randn(2, 4))
        y.sum().backward()
        assert torch.count_nonzero(y) == 0
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()
    assert layer.weight_u.norm() > 0.5  # a later weight is normalised


def test_the_stateless_form_clamps_as_the_layer_does() -> None:
    weight, u = torch.randn(5, 4) * 1e-3, torch.randn(5)
    result = functional.spectral_normalize(weight, u, torch.ones(4), eps=1e-2, eps_mode="clamp")
    expected, *_ = clamped_by_hand(weight, u, 1, 1e-2)
    torch.testing.assert_close(result.weight.double(), expected, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="eps_mode: expected one of 'add', 'clamp', got 'max'"):
        functional.spectral_normalize(weight, u, torch.ones(4), eps_mode="max")


def test_compiled_layers_clamp_as_eager_ones_do() -> None:
    layer = SNLinear(4, 3, eps=0.9, eps_mode="clamp")
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 4)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), eager(x))
    torch.testing.assert_close(layer.weight_u, eager.weight_u)


OPTIONS: dict[str, Any] = {
    "n_power_iterations": 2,
    "eps": 1e-4,
    "iterate_when_frozen": False,
    "eps_mode": "clamp",
}


@pytest.mark.parametrize(
    "block",
    [
        SelfAttention2d(8, **OPTIONS),
        ProjectionDiscriminatorHead(8, 3, **OPTIONS),
        ConditionalBatchNorm2d(
            8,
            condition_features=4,
            spectral_norm=True,
            n_power_iterations=2,
            sn_eps=1e-4,
            iterate_when_frozen=False,
            sn_eps_mode="clamp",
        ),
    ],
    ids=lambda block: type(block).__name__,
)
def test_blocks_pass_the_options_to_their_layers(block: nn.Module) -> None:
    layers = [layer for layer in block.modules() if isinstance(layer, SpectralNormLayer)]
    assert len(layers) >= 2
    for layer in layers:
        assert {name: getattr(layer, name) for name in OPTIONS} == OPTIONS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sn_eps": 2.0}, r"sn_eps: expected a number from 1e-37 to 1, got 2\.0"),
        ({"sn_eps_mode": "floor"}, "sn_eps_mode: expected one of 'add', 'clamp', got 'floor'"),
    ],
)
def test_errors_name_the_blocks_own_argument(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConditionalBatchNorm2d(8, condition_features=4, spectral_norm=True, **options)
