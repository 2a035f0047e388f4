"""Spectral norm of other code bases: its eps, its axis, its stored entries, and layers that carry it."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from sagan_layers import (
    ConditionalBatchNorm2d,
    ProjectionDiscriminatorHead,
    SelfAttention2d,
    SNConv2d,
    SNConvTranspose2d,
    SNEmbedding,
    SNLinear,
    SpectralNormLayer,
    apply_spectral_norm,
    functional,
    remove_spectral_norm,
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
NORMALIZE = {row.name: row.implementation.normalize for row in SPECTRAL_NORM.backends}
every_backend = pytest.mark.parametrize("backend", NORMALIZE)


def input_of(kind: str) -> Tensor:
    if kind == "embedding":
        return torch.tensor([2, 0, 6])
    return torch.randn((3, 4) if kind == "linear" else (2, 4, 6, 5), dtype=torch.float64)


FOREIGN: dict[str, Any] = {
    "hook": nn.utils.spectral_norm,
    "parametrization": parametrizations.spectral_norm,
}
every_way = pytest.mark.parametrize("way", FOREIGN)


def options_of(way: str) -> dict[str, Any]:
    """Torch's, as ours."""
    order = "u" if way == "hook" else "v"
    return {"eps_mode": "clamp", "iterate_when_frozen": False, "iterate_from": order}


def original_of(layer: Any) -> nn.Parameter:
    found: nn.Parameter = (
        layer.weight_orig if hasattr(layer, "weight_orig") else layer.parametrizations.weight.original
    )
    return found


def foreign(way: str, kind: str, magnitude: float = 1.0, **options: Any) -> Any:
    """A layer with torch's spectral norm, whose weight has changed and whose u and v have moved."""
    plain, _, sizes = LAYERS[kind]
    layer = FOREIGN[way](plain(*sizes, dtype=torch.float64), **options)
    with torch.no_grad():
        original_of(layer).add_(0.1).mul_(magnitude)
    layer(input_of(kind))
    return layer


@every_layer
@every_way
@pytest.mark.parametrize(
    ("magnitude", "options"),
    [
        (1.0, {}),
        (1.0, {"n_power_iterations": 2}),
        (1.0, {"dim": 0}),
        (1.0, {"dim": 1}),
        # The norms of W^T u and W v of the smaller weights are below eps.
        (1.0, {"eps": 1e-4}),
        (1e-3, {"eps": 1e-4}),
        (1e-5, {"eps": 1e-4}),
        (0.5, {"eps": 1.0}),
    ],
)
def test_with_torchs_options_it_computes_and_differentiates_as_torch(
    way: str, kind: str, magnitude: float, options: dict[str, Any]
) -> None:
    theirs = foreign(way, kind, magnitude, **options)
    _, normalised, sizes = LAYERS[kind]
    ours = normalised(*sizes, dtype=torch.float64, **options_of(way), **options)  # type: ignore[call-arg]
    ours.load_state_dict(theirs.state_dict())
    stored, x = copy.deepcopy(ours), input_of(kind)
    for training in (True, False):
        for layer in (ours, theirs):
            layer.train(training).zero_grad()
        outputs = ours(x), theirs(x)
        torch.testing.assert_close(*outputs, rtol=1e-9, atol=0)
        for y in outputs:
            (y**3).sum().backward()
        expected = original_of(theirs).grad
        largest = expected.abs().max().item()
        torch.testing.assert_close(ours.weight.grad, expected, rtol=1e-8, atol=1e-10 * largest)
        stored.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours.state_dict(), stored.state_dict(), rtol=1e-9, atol=0)


@every_backend
@pytest.mark.parametrize("magnitude", [1.0, 1e-3, 1e-6, 1e-20])
@pytest.mark.parametrize("eps", [1e-12, 1e-4])
def test_every_backend_and_the_stateless_form_take_eps_as_the_least_norm(
    backend: str, magnitude: float, eps: float
) -> None:
    weight, v = magnitude * torch.randn(6, 4, 3, 3), torch.zeros(36)
    u = nn.functional.normalize(torch.randn(6), dim=0)
    options = SpectralNormOptions(0, 1, eps, torch.float32, eps_mode="clamp")
    results = NORMALIZE[backend]([SpectralNormTask(weight, u, v, options)])
    results.append(functional.spectral_normalize(weight, u, v, eps=eps, eps_mode="clamp"))
    matrix = weight.double().flatten(1)
    right = nn.functional.normalize(matrix.t() @ u.double(), dim=0, eps=eps)
    left = nn.functional.normalize(matrix @ right, dim=0, eps=eps)
    expected = weight.double() / (left @ matrix @ right), left, right
    for result in results:
        for got, wanted in zip((result.weight, result.u, result.v), expected, strict=True):
            if wanted.abs().max() < 1e38:
                torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=0)


def test_layers_of_all_options_share_one_call() -> None:
    layers = [
        SNConvTranspose2d(4, 6, 3, eps=0.5, dim=dim, iterate_from=order, eps_mode=mode)
        for dim in (0, 1)
        for order in ("u", "v")
        for mode in ("add", "clamp")
    ]
    model = nn.ModuleList(layers)
    alone = copy.deepcopy(model)
    with shared_spectral_norm(model):
        shared = [layer.normalized_weight() for layer in layers]
    torch.testing.assert_close(shared, [layer.normalized_weight() for layer in alone])  # type: ignore[operator]


def test_a_sigma_too_small_for_its_reciprocal_gives_an_infinite_gradient_and_no_error() -> None:
    layer = SNLinear(4, 3, bias=False, eps=1e-2, eps_mode="clamp", iterate_when_frozen=False).eval()
    with torch.no_grad():
        layer.weight_u.mul_(1e-25)
        layer.weight_v.mul_(1e-15)
    y = layer(torch.randn(2, 4))
    y.sum().backward()
    assert not y.isfinite().all()
    assert layer.weight.grad is not None
    assert not layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("options", [{"eps": 0.9, "eps_mode": "clamp"}, {"iterate_from": "v"}, {"dim": 1}])
def test_compiled_layers_compute_and_differentiate_as_eager_ones(options: dict[str, Any]) -> None:
    layer = SNConvTranspose2d(4, 3, 2, dtype=torch.float64, **{"dim": 0, **options})
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    for _ in range(2):
        outputs = compiled(x), eager(x)
        torch.testing.assert_close(*outputs)
        for y in outputs:
            (y**3).sum().backward()
    torch.testing.assert_close(layer.weight_u, eager.weight_u)
    torch.testing.assert_close(layer.weight.grad, eager.weight.grad)


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


@every_backend
@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("dim", [0, 1])
def test_an_iteration_from_v_is_that_from_u_of_the_transposed_matrix(
    backend: str, iterations: int, dim: int
) -> None:
    weight, u, v = torch.randn(5, 4), torch.randn(5), torch.randn(4)
    if dim == 1:
        u, v = v, u
    normalize = NORMALIZE[backend]
    options = SpectralNormOptions(dim, iterations, 1e-12, torch.float32, iterate_from="v")
    (from_v,) = normalize([SpectralNormTask(weight, u, v, options)])
    other = options._replace(iterate_from="u")
    (from_u,) = normalize([SpectralNormTask(weight.t().contiguous(), v, u, other)])
    torch.testing.assert_close(from_v.weight, from_u.weight.t())
    torch.testing.assert_close([from_v.sigma, from_v.u, from_v.v], [from_u.sigma, from_u.v, from_u.u])


def test_another_dim_survives_copies_and_is_shown_and_removed() -> None:
    layer = SNConvTranspose2d(4, 6, 3, dim=0, iterate_from="v")
    assert layer.weight_u.shape == (4,)
    assert layer.weight_v.shape == (54,)
    assert repr(layer).endswith("iterate_from='v', dim=0)")
    assert repr(SNConvTranspose2d(4, 6, 3, dim=1)) == repr(SNConvTranspose2d(4, 6, 3))
    copied = copy.deepcopy(layer).eval()
    x = torch.randn(1, 4, 3, 3)
    y = copied(x)
    assert torch.equal(y, layer.eval()(x))
    assert torch.equal(remove_spectral_norm(copied)(x), y)
    assert vars(copied).keys() == vars(nn.ConvTranspose2d(4, 6, 3)).keys()


# What each code base stores of a layer [6, 4].
WEIGHT, U, V = torch.randn(6, 4), nn.functional.normalize(torch.randn(6), dim=0), torch.randn(4)
STATES: dict[str, dict[str, Tensor]] = {
    "ours": {"weight": WEIGHT, "weight_u": U, "weight_v": V},
    "hook": {"weight_orig": WEIGHT, "weight_u": U, "weight_v": V},
    "parametrization": {
        "parametrizations.weight.original": WEIGHT,
        "parametrizations.weight.0._u": U,
        "parametrizations.weight.0._v": V,
    },
    "biggan": {"weight": WEIGHT, "u0": U.view(1, 6), "sv0": torch.ones(1)},
    "mimicry": {"weight": WEIGHT, "sn_u": U.view(1, 6), "sn_sigma": torch.ones(1)},
    "u alone": {"weight": WEIGHT, "weight_u": U},
}


def in_network(state: dict[str, Any], prefix: str = "body.1.") -> dict[str, Any]:
    return OrderedDict(
        {prefix + name: copy.deepcopy(entry) for name, entry in (state | {"bias": torch.ones(6)}).items()}
    )


def network(**options: Any) -> nn.Module:
    model = nn.Module()
    model.body = nn.Sequential(nn.ReLU(), SNLinear(4, 6, **options))
    return model


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("form", STATES)
def test_layers_load_the_entries_of_every_code_base(form: str, assign: bool, strict: bool) -> None:
    model = network(device="meta" if assign else None)
    state = in_network(STATES[form])
    names = list(state)
    result = model.load_state_dict(state, strict=strict, assign=assign)
    assert list(state) == names  # the caller's is not changed
    assert result.missing_keys == result.unexpected_keys == []
    fitted = nn.functional.normalize(WEIGHT.t() @ U, dim=0)
    loaded = dict(model.state_dict())
    assert loaded.keys() == {f"body.1.{name}" for name in ("weight", "bias", "weight_u", "weight_v")}
    torch.testing.assert_close(loaded["body.1.weight"], WEIGHT, rtol=0, atol=0)
    torch.testing.assert_close(loaded["body.1.weight_u"], U, rtol=0, atol=0)
    has_v = form in ("ours", "hook", "parametrization")
    torch.testing.assert_close(loaded["body.1.weight_v"], V if has_v else fitted)
    assert isinstance(model.body[1].weight, nn.Parameter)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_vectors_of_plain_weights_are_those_of_the_largest_singular_value(
    shape: tuple[int, int], magnitude: float
) -> None:
    layer = SNLinear(*shape, bias=False, iterate_when_frozen=False, eps=1e-37).eval()
    weight = magnitude * torch.randn(layer.weight.shape)
    with pytest.warns(UserWarning, match="without their vectors u and v .the first is 'weight'"):
        layer.load_state_dict({"weight": weight})
    exact = torch.linalg.svdvals(weight.double())[0].float()
    torch.testing.assert_close(layer.sigma, exact)
    torch.testing.assert_close(layer.weight_u.norm(), torch.tensor(1.0))


def test_plain_weights_are_said_once_for_a_network_and_again_for_the_next() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2), nn.Embedding(3, 2))
    model = apply_spectral_norm(copy.deepcopy(plain))
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"the first is '0\.weight'") as told:
            model.load_state_dict(plain.state_dict())
        assert len(told) == 1
    for layer in model:
        if isinstance(layer, SpectralNormLayer):
            exact = torch.linalg.matrix_norm(layer.weight.transpose(0, layer.dim).flatten(1), 2)
            torch.testing.assert_close(layer.sigma, exact.detach())


def test_weights_that_are_zero_or_not_finite_load_without_vectors() -> None:
    for value in (0.0, float("nan"), float("inf")):
        layer = SNLinear(4, 6)
        with pytest.warns(UserWarning, match="without their vectors"):
            layer.load_state_dict({"weight": torch.full((6, 4), value), "bias": torch.zeros(6)})
        assert layer.weight_u.isfinite().all()
        assert layer.weight_v.isfinite().all()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            STATES["hook"] | STATES["ours"],
            r"body\.1: expected weight_orig, weight_u, weight_v of torch\.nn\.utils",
        ),
        (STATES["hook"] | STATES["ours"], "got weight, weight_orig, weight_u, weight_v"),
        (
            STATES["hook"] | STATES["parametrization"],
            r"got parametrizations\.weight\.0\._u, .*, weight_orig, weight_u",
        ),
        (STATES["biggan"] | STATES["mimicry"], "got sn_sigma, sn_u, sv0, u0, weight"),
        ({"weight_orig": WEIGHT}, "got weight_orig$"),
        ({"weight_orig": WEIGHT, "weight_v": V}, "got weight_orig, weight_v"),
        ({"parametrizations.weight.original": WEIGHT}, r"got parametrizations\.weight\.original"),
        ({"parametrizations.weight.0._v": V}, r"got parametrizations\.weight\.0\._v"),
        (
            {"weight": WEIGHT, "sv0": torch.ones(1)},
            "expected weight, u0, sv0 of BigGAN-PyTorch.*got sv0, weight",
        ),
        ({"u0": U.view(1, 6)}, "got u0"),
        ({"weight": WEIGHT, "sn_sigma": torch.ones(1)}, "expected weight, sn_u, sn_sigma of mimicry"),
        (STATES["biggan"] | {"u0": torch.ones(1, 5)}, r"size mismatch for body\.1\.weight_u"),
        (STATES["hook"] | {"weight_orig": torch.ones(6, 5)}, r"size mismatch for body\.1\.weight"),
        ({"weight": torch.ones(6, 5)}, r"size mismatch for body\.1\.weight"),
        (STATES["biggan"] | {"u0": [1.0] * 6}, r'named "body\.1\.weight_u", expected torch\.Tensor'),
        (STATES["u alone"] | {"weight_u": [1.0] * 6}, r'named "body\.1\.weight_u", expected torch\.Tensor'),
    ],
)
def test_entries_of_several_code_bases_or_of_half_of_one_are_errors_that_name_them(
    state: dict[str, Any], message: str, strict: bool
) -> None:
    with pytest.raises(RuntimeError, match=message):
        network().load_state_dict(in_network(state), strict=strict)


def test_other_entries_stay_unexpected_and_missing() -> None:
    model = network()
    result = model.load_state_dict({"body.1.weight_u": U, "body.1.u1": U}, strict=False)
    assert result.unexpected_keys == ["body.1.u1"]
    assert result.missing_keys == ["body.1.weight", "body.1.bias", "body.1.weight_v"]
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_u"):
        model.load_state_dict(in_network({"weight": WEIGHT, "weight_v": V}))
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_u"):
        model.load_state_dict(in_network({"weight": WEIGHT.long()}))


def test_a_pruned_layer_still_loads_its_own_entries() -> None:
    layers = [prune.l1_unstructured(SNLinear(4, 6), "weight", 0.5) for _ in range(2)]
    layers[0].load_state_dict(layers[1].state_dict())
    assert torch.equal(layers[0].weight_orig, layers[1].weight_orig)


class Peer(nn.Module):
    """A network with torch's spectral norm in both forms, without it, and in a layer of its own class."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        to: dict[str, Any] = {"dtype": dtype}
        self.embed = parametrizations.spectral_norm(nn.Embedding(7, 4, **to), n_power_iterations=2)
        self.conv = nn.utils.spectral_norm(nn.Conv2d(4, 4, 3, padding=1, **to), eps=1e-4)
        self.up = nn.utils.spectral_norm(nn.ConvTranspose2d(4, 6, 2, **to), n_power_iterations=3)
        self.other_axis = nn.utils.spectral_norm(nn.ConvTranspose2d(6, 6, 2, **to), dim=0)
        self.head = parametrizations.spectral_norm(nn.Conv2d(6, 1, 5, bias=False, **to), eps=1e-3)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        hidden = self.conv(x).relu() + self.embed(labels)[..., None, None]
        y: Tensor = self.head(self.other_axis(self.up(hidden)).relu())
        return y


def peer(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    model, inputs = Peer(dtype), (torch.randn(3, 4, 6, 6, dtype=dtype), torch.tensor([1, 0, 5]))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():  # torch copies no hooked layer whose weight has a graph
        for _ in range(2):
            model(*inputs)
    return model, inputs


@pytest.mark.parametrize("training", [True, False])
def test_converted_layers_compute_and_train_as_those_of_torch(training: bool) -> None:
    theirs, inputs = peer()
    ours = apply_spectral_norm(copy.deepcopy(theirs)).train(training)
    assert {type(layer) for layer in ours.children()} == {SNEmbedding, SNConv2d, SNConvTranspose2d}
    theirs.train(training)
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in (theirs, ours)]
    for _ in range(4):
        outputs = [model(*inputs) for model in (theirs, ours)]
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-8, atol=1e-10)
        for optimizer, y in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            (y**2).mean().backward()
            optimizer.step()


def test_evaluation_is_unchanged_to_rounding_in_float32() -> None:
    theirs, inputs = peer(torch.float32)
    y = theirs.eval()(*inputs)
    torch.testing.assert_close(apply_spectral_norm(theirs)(*inputs), y, rtol=1e-5, atol=1e-5)


@every_way
def test_a_running_optimizer_goes_on_with_the_converted_parameters(way: str) -> None:
    model, untouched = nn.Sequential(foreign(way, "conv")), nn.Sequential(foreign(way, "conv"))
    untouched.load_state_dict(model.state_dict())
    optimizers = [torch.optim.Adam(each.parameters(), lr=0.1) for each in (model, untouched)]
    x = input_of("conv")
    weight, order = original_of(model[0]), list(model.parameters())
    for step in range(3):
        for each, optimizer in zip((model, untouched), optimizers, strict=True):
            optimizer.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
        if step == 0:
            apply_spectral_norm(model)
    assert model[0].weight is weight
    assert [id(parameter) for parameter in model.parameters()] == [id(parameter) for parameter in order]
    torch.testing.assert_close(model[0].weight, original_of(untouched[0]))


@every_way
def test_converted_layers_are_constructed_ones(way: str) -> None:
    converted = apply_spectral_norm(foreign(way, "conv"))
    constructed = SNConv2d(4, 6, 3, dtype=torch.float64, **options_of(way))
    assert repr(converted) == repr(constructed)
    assert vars(converted).keys() == vars(constructed).keys()
    assert set(converted.state_dict()) == set(constructed.state_dict())
    for hooks in ("_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks"):
        assert not vars(converted)[hooks]
    constructed.load_state_dict(converted.state_dict())
    converted.load_state_dict(foreign(way, "conv").state_dict())
    plain = remove_spectral_norm(converted)
    assert vars(plain).keys() == vars(nn.Conv2d(4, 6, 3)).keys()


def test_converting_one_of_two_copies_leaves_the_other() -> None:
    theirs, inputs = peer()
    average = copy.deepcopy(theirs)
    y = average.eval()(*inputs)
    apply_spectral_norm(theirs)
    assert torch.equal(average(*inputs), y)


@every_way
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.utils.spectral_norm(nn.Linear(2, 2, dtype=torch.complex64)),
        lambda: nn.utils.spectral_norm(EqualConv2d()),
        lambda: parametrizations.weight_norm(parametrizations.spectral_norm(nn.Linear(2, 2))),
    ],
)
def test_converting_is_all_or_nothing(way: str, make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(foreign(way, "linear"), nn.Linear(6, 2), make(), foreign(way, "conv"))
    before = [(type(layer), set(vars(layer)), set(layer.state_dict())) for layer in model]
    with pytest.raises(TypeError, match="'2'"):
        apply_spectral_norm(model)
    assert [(type(layer), set(vars(layer)), set(layer.state_dict())) for layer in model] == before


class EqualConv2d(nn.Module):
    """A layer of StyleGAN's kind, which scales its weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight * 0.1)


def test_the_report_names_what_was_converted_excluded_and_passed_over() -> None:
    model = nn.ModuleDict(
        {
            "plain": nn.Conv2d(2, 2, 1),
            "hooked": nn.utils.spectral_norm(nn.Linear(2, 2)),
            "parametrized": parametrizations.spectral_norm(nn.Linear(2, 2)),
            "custom": EqualConv2d(),
            "head": nn.Sequential(nn.Linear(2, 2)),
            "ready": SNLinear(2, 2),
            "norm": nn.BatchNorm2d(2),
            "conditional": ConditionalBatchNorm2d(2, 3),
        }
    )
    lines: list[str] = []
    with pytest.warns(UserWarning, match=r"not known: 'custom' \(EqualConv2d\); put") as told:
        assert apply_spectral_norm(model, exclude=["head"], report=lines.append) is model
    assert len(told) == 1
    assert lines == [
        "plain: Conv2d -> SNConv2d",
        "hooked: Linear with torch.nn.utils.spectral_norm -> SNLinear",
        "parametrized: Linear with torch.nn.utils.parametrizations.spectral_norm -> SNLinear",
        "custom: EqualConv2d passed over",
        "head.0: Linear excluded",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_spectral_norm(model, exclude=[EqualConv2d, "head"])
    with pytest.raises(TypeError, match="report: expected a function of one string, got 1"):
        apply_spectral_norm(model, report=1)  # type: ignore[arg-type]


def test_a_report_that_raises_leaves_the_model_as_it_was() -> None:
    def report(line: str) -> None:
        raise OSError(line)

    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(OSError, match="0: Linear -> SNLinear"):
        apply_spectral_norm(model, report=report)
    assert type(model[0]) is nn.Linear


@every_way
def test_only_normalized_converts_no_layer_without_torchs_spectral_norm(way: str) -> None:
    plain = [
        nn.Embedding(7, 4),
        nn.Conv1d(2, 2, 1),
        EqualConv2d(),
        parametrizations.weight_norm(nn.Linear(2, 2)),
    ]
    model = nn.ModuleList([foreign(way, "linear"), *plain, nn.Linear(2, 2), foreign(way, "conv")])
    kinds, lines = [type(layer) for layer in model], []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_spectral_norm(model, exclude=["6"], only_normalized=True, eps=0.5, report=lines.append)
    assert [type(layer) for layer in model] == [SNLinear, *kinds[1:]]
    assert model[0].eps == 1e-12  # its own
    assert [line.endswith(" left as it is") for line in lines] == [False, *[True] * 5, False]


@pytest.mark.parametrize(
    ("only_normalized", "kinds"),
    [(False, "that could be spectrally normalised"), (True, "with torch's spectral norm")],
)
def test_converting_nothing_is_said(only_normalized: bool, kinds: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2) if only_normalized else nn.ReLU(), nn.BatchNorm2d(2))
    with pytest.warns(UserWarning, match=f"the model has no layer {kinds}"):
        apply_spectral_norm(model, only_normalized=only_normalized)
