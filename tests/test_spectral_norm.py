"""Spectrally normalised layers, and the control of when their vectors are updated."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from blocks import (
    assert_close,
    assert_same,
    check_derivatives,
    converge,
    gradients_of,
    hold_vectors,
    matrix_of,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import fusion, parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from sagan_layers import (
    ResamplingConv2d,
    SelfAttention2d,
    SNConv2d,
    SNConvTranspose2d,
    SNEmbedding,
    SNLinear,
    SpectralNormLayer,
    apply_spectral_norm,
    frozen_spectral_norm,
    remove_spectral_norm,
    shared_spectral_norm,
)
from sagan_layers.spectral_norm.reference import SpectralNormOptions, SpectralNormTask
from sagan_layers.spectral_norm.table import SPECTRAL_NORM

PLAIN: dict[type[SpectralNormLayer], type[nn.Module]] = {
    SNConv2d: nn.Conv2d,
    SNConvTranspose2d: nn.ConvTranspose2d,
    SNLinear: nn.Linear,
    SNEmbedding: nn.Embedding,
}
SAME_CIRCULAR: dict[str, Any] = {"padding": "same", "padding_mode": "circular"}
KINDS: dict[str, tuple[type[SpectralNormLayer], tuple[Any, ...], dict[str, Any]]] = {
    "conv": (SNConv2d, (4, 6, 3), {"padding": 1}),
    "conv_grouped": (SNConv2d, (4, 6, (3, 2)), {"groups": 2}),
    "conv_depthwise_dilated": (SNConv2d, (4, 4, 3), {"groups": 4, "dilation": 2, "padding": 2}),
    "conv_same_circular": (SNConv2d, (4, 6, 3), SAME_CIRCULAR),
    "transpose": (SNConvTranspose2d, (4, 6, 4, 2, 1), {}),
    "transpose_grouped": (SNConvTranspose2d, (4, 6, 3, 2, 0, 1), {"groups": 2, "dilation": 2}),
    "linear": (SNLinear, (4, 6), {}),
    "embedding": (SNEmbedding, (7, 6), {}),
}
LAYERS: dict[str, Callable[..., SpectralNormLayer]] = {
    kind: partial(normalised, *sizes, **options) for kind, (normalised, sizes, options) in KINDS.items()
}
every_layer = pytest.mark.parametrize("kind", LAYERS)
Context = Callable[[nn.Module], contextlib.AbstractContextManager[Any]]
both_contexts = pytest.mark.parametrize("context", [frozen_spectral_norm, shared_spectral_norm])


def input_of(layer: SpectralNormLayer, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(layer, SNEmbedding):
        return torch.randint(7, (5,), generator=generator)
    shape = (3, 4) if isinstance(layer, SNLinear) else (3, 4, 7, 6)
    return torch.randn(shape, generator=generator).to(layer.weight.dtype)


def vectors(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def plain_copy(layer: SpectralNormLayer, sigma: Tensor | float = 1.0) -> nn.Module:
    """The plain torch layer with the layer's weight over sigma."""
    plain = remove_spectral_norm(copy.deepcopy(layer))
    plain.weight = nn.Parameter(layer.weight.detach() / sigma)
    return plain


@every_layer
def test_sigma_is_the_largest_singular_value_at_convergence(kind: str) -> None:
    layer = LAYERS[kind](dtype=torch.float64)
    for _ in range(500):
        layer.normalized_weight()
    exact = torch.linalg.svdvals(matrix_of(layer))[0]
    torch.testing.assert_close(layer.sigma, exact)
    torch.testing.assert_close(layer.normalized_weight().detach(), layer.weight.detach() / exact)


@every_layer
def test_output_is_the_plain_layers_with_the_normalised_weight(kind: str) -> None:
    layer = LAYERS[kind]().eval()
    x = input_of(layer)
    torch.testing.assert_close(layer(x), plain_copy(layer, layer.sigma)(x), rtol=1e-5, atol=1e-6)


@every_layer
def test_one_forward_updates_u_and_v_by_one_iteration_of_the_matrix(kind: str) -> None:
    layer = LAYERS[kind](dtype=torch.float64)
    matrix, u = matrix_of(layer), layer.weight_u.clone()
    v = nn.functional.normalize(matrix.t() @ u, dim=0)
    u = nn.functional.normalize(matrix @ v, dim=0)
    weight = layer.normalized_weight().detach()
    torch.testing.assert_close(layer.weight_v, v)
    torch.testing.assert_close(layer.weight_u, u)
    torch.testing.assert_close(weight, layer.weight.detach() / (u @ matrix @ v))


def test_several_iterations_at_a_forward_are_as_many_forwards() -> None:
    one, three = SNLinear(9, 5), SNLinear(9, 5, n_power_iterations=3)
    three.load_state_dict(one.state_dict())
    for _ in range(2):
        one.normalized_weight()
    torch.testing.assert_close(one.normalized_weight(), three.normalized_weight())
    torch.testing.assert_close(one.weight_u, three.weight_u)


@pytest.mark.parametrize("kind", ["conv", "transpose", "linear", "embedding"])
def test_agrees_with_torchs_parametrization_at_convergence(kind: str) -> None:
    layer = LAYERS[kind](dtype=torch.float64)
    converge(layer)
    reference = parametrizations.spectral_norm(plain_copy(layer), n_power_iterations=1000).eval()
    x = input_of(layer)
    ours, theirs = layer(x), reference(x)
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, reference.parametrizations.weight.original.grad)


@given(
    exponent=st.integers(-20, 20),
    negative=st.booleans(),
    seed=st.integers(0, 2**16),
    kind=st.sampled_from(sorted(LAYERS)),
)
def test_normalised_weight_does_not_depend_on_the_scale_of_the_weight(
    exponent: int, negative: bool, seed: int, kind: str
) -> None:
    torch.manual_seed(seed)
    layer = LAYERS[kind](eps=1e-30)
    scaled = copy.deepcopy(layer)
    with torch.no_grad():
        scaled.weight.mul_((-1 if negative else 1) * 2.0**exponent)
    expected = -layer.normalized_weight() if negative else layer.normalized_weight()
    torch.testing.assert_close(scaled.normalized_weight(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scaled.sigma, layer.sigma * 2.0**exponent, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "grouped", "reference"])
@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [
        *((torch.float32, magnitude) for magnitude in (1e-42, 1e-30, 1e-20, 1e19, 1e30, 1e37, 5e37, 1e38)),
        *((torch.bfloat16, magnitude) for magnitude in (1e-30, 1e19, 5e37, 1e38)),
        (torch.float16, 1e-7),
        *((torch.float64, magnitude) for magnitude in (1e-140, 1e140, 1e160)),
    ],
)
def test_weights_of_any_size_are_normalised(dtype: torch.dtype, magnitude: float, backend: str) -> None:
    if dtype.itemsize == 2 and backend != "reference":
        pytest.skip("serves float32 and float64")
    matrix = torch.randn(8, 27, dtype=torch.float64).clamp(-3, 3)
    weight = (magnitude * matrix).to(dtype)
    rounded = weight.double() / magnitude
    exact = rounded / torch.linalg.matrix_norm(rounded, 2)
    left, sigma, right = torch.linalg.svd(rounded, full_matrices=False)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    options = SpectralNormOptions(0, 2, eps=1e-300, dtype=dtype)
    task = SpectralNormTask(weight, left[:, 0].to(wide), right[0].to(wide), options)
    normalize = {row.name: row.implementation.normalize for row in SPECTRAL_NORM.backends}[backend]
    (result,) = normalize([task])
    largest = torch.finfo(wide).max
    # The norms that the others take are float64, whose squares overflow from 1e154 on.
    if backend != "cpu" and sigma[0] * magnitude > (1e154 if wide == torch.float64 else largest):
        assert result.weight.isnan().all()  # not zeros
        return
    bound = 2e-3 if magnitude == 1e-42 and backend != "cpu" else 5 * torch.finfo(dtype).eps
    torch.testing.assert_close(result.weight.double(), exact, rtol=0, atol=bound)
    expected = sigma[0].item() * magnitude
    assert result.sigma.item() == (pytest.approx(expected, rel=2e-3) if expected < largest else float("inf"))


@every_layer
@pytest.mark.parametrize("magnitude", [2.0**-66, 2.0**83])
def test_layers_of_any_size_compute_and_differentiate_like_small_ones(kind: str, magnitude: float) -> None:
    layer = LAYERS[kind](eps=1e-35)
    scaled = copy.deepcopy(layer)
    with torch.no_grad():
        scaled.weight.mul_(magnitude)
    scaled.reset_right_vector()
    torch.testing.assert_close(scaled.weight_v, layer.weight_v)
    gradients = []
    for each in (layer, scaled):
        (each(input_of(each)) ** 3).sum().backward()
        assert each.weight.grad is not None
        gradients.append(each.weight.grad)
    torch.testing.assert_close(gradients[1] * magnitude, gradients[0], rtol=1e-4, atol=1e-5)


@given(seed=st.integers(0, 2**16), kind=st.sampled_from(sorted(LAYERS)))
def test_sigma_is_never_above_the_spectral_norm_and_rises_to_it(seed: int, kind: str) -> None:
    torch.manual_seed(seed)
    layer = LAYERS[kind](dtype=torch.float64)
    exact = torch.linalg.svdvals(matrix_of(layer))[0].item()
    estimates = []
    for _ in range(20):
        layer.normalized_weight()
        estimates.append(layer.sigma.item())
    assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(estimates))
    assert 0 < estimates[-1] <= exact * (1 + 1e-12)


@every_layer
def test_gradient_takes_u_and_v_as_constants(kind: str) -> None:
    layer = LAYERS[kind](dtype=torch.float64)
    u0 = layer.weight_u.clone()
    y = layer(input_of(layer))
    assert not torch.equal(layer.weight_u, u0)
    y.square().sum().backward()
    constants = copy.deepcopy(layer)
    constants.zero_grad()
    hold_vectors(constants)
    constants(input_of(layer)).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, constants.weight.grad)
    # u^T W v is linear in W, so the normalised weight, and with it the output, is invariant to scale.
    dot = (layer.weight.grad * layer.weight.detach()).sum()
    assert abs(dot.item()) < 1e-10 * layer.weight.grad.abs().sum().item()


# The other kinds are among the blocks of test_module_contract.py.
@pytest.mark.parametrize(
    "kind", ["conv_depthwise_dilated", "conv_same_circular", "transpose", "transpose_grouped"]
)
def test_derivatives_of_first_and_second_order_pass_the_numerical_check(kind: str) -> None:
    layer = hold_vectors(LAYERS[kind](dtype=torch.float64))
    check_derivatives(layer, input_of(layer)[:1, ..., :5, :5])


@every_layer
@pytest.mark.parametrize("iterate_when_frozen", [True, False])
@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_real_and_fake_passes_before_one_backward_add_their_gradients(
    kind: str, iterate_when_frozen: bool, frozen: int | None
) -> None:
    layer = LAYERS[kind](dtype=torch.float64, iterate_when_frozen=iterate_when_frozen)
    separate = copy.deepcopy(layer)

    def call(module: SpectralNormLayer, index: int) -> Tensor:
        with frozen_spectral_norm(module) if frozen == index else contextlib.nullcontext():
            return module(input_of(module, seed=index)).square().sum()

    (call(layer, 0) + 2 * call(layer, 1)).backward()
    call(separate, 0).backward()
    (2 * call(separate, 1)).backward()
    torch.testing.assert_close(layer.weight.grad, separate.weight.grad)
    assert_same(vectors(layer), vectors(separate))


@every_layer
@pytest.mark.parametrize("iterate_when_frozen", [True, False])
def test_evaluation_is_a_pure_function(kind: str, iterate_when_frozen: bool) -> None:
    layer = LAYERS[kind](iterate_when_frozen=iterate_when_frozen).eval()
    x, before = input_of(layer), vectors(layer)
    first = layer(x)
    assert torch.equal(layer(x), first)
    assert torch.equal(layer.sigma, layer.sigma)
    assert_same(vectors(layer), before)
    layer.train()
    layer(x)
    layer(x)  # v fitted the first u already
    after = vectors(layer)
    assert not torch.equal(after["weight_u"], before["weight_u"])
    assert not torch.equal(after["weight_v"], before["weight_v"])


def test_reading_sigma_updates_nothing_in_training_and_has_no_gradient() -> None:
    layer = SNLinear(5, 4)
    before = vectors(layer)
    sigma = layer.sigma
    assert sigma.shape == ()
    assert not sigma.requires_grad
    assert_same(vectors(layer), before)
    weight = layer.normalized_weight()
    torch.testing.assert_close(weight, layer.weight / sigma)  # what the next training step divided by


def test_a_frozen_pass_iterates_from_the_stored_u_or_takes_the_stored_vectors() -> None:
    iterating = SNLinear(5, 4, dtype=torch.float64)
    stored = SNLinear(5, 4, dtype=torch.float64, iterate_when_frozen=False)
    stored.load_state_dict(iterating.state_dict())
    with torch.no_grad():
        stored.weight_v.copy_(nn.functional.normalize(torch.randn(5, dtype=torch.float64), dim=0))
        iterating.weight_v.copy_(stored.weight_v)
    for layer in (iterating, stored):
        layer.eval()
    as_stored = stored.weight_u @ stored.weight @ stored.weight_v
    torch.testing.assert_close(stored.sigma, as_stored.detach())
    torch.testing.assert_close(stored.normalized_weight(), stored.weight / as_stored)
    v = nn.functional.normalize(iterating.weight.t() @ iterating.weight_u, dim=0)
    torch.testing.assert_close(iterating.sigma, torch.linalg.vector_norm(iterating.weight @ v).detach())


def test_frozen_contexts_nest_and_do_not_change_the_mode() -> None:
    model = nn.Sequential(
        SNConv2d(4, 4, 3, padding=1, upsample=2), nn.ReLU(), SNConv2d(4, 4, 3, padding=1, downsample=2)
    )
    x, before = torch.randn(2, 4, 6, 6), vectors(model)
    model.eval()(x)
    model.train()
    with frozen_spectral_norm(model):
        assert model.training
        with frozen_spectral_norm(model[0]):
            model(x)
        model(x)
        assert_same(vectors(model), before)
    with frozen_spectral_norm(model[0]):
        model(x)
    after = vectors(model)
    assert torch.equal(after["0.weight_u"], before["0.weight_u"])
    assert not torch.equal(after["2.weight_u"], before["2.weight_u"])


@both_contexts
def test_a_context_ends_after_an_exception(context: Context) -> None:
    layer = SNLinear(4, 4)
    with pytest.raises(ValueError, match="in the middle"), context(layer):
        raise ValueError("in the middle")
    before = layer.weight_u.clone()
    layer(torch.randn(2, 4))
    assert not torch.equal(layer.weight_u, before)


@both_contexts
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copy.copy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_a_copy_made_inside_a_context_is_outside_it(
    duplicate: Callable[[nn.Module], nn.Module], context: Context
) -> None:
    layer = SNLinear(1024, 512)  # large enough for memory of its own
    with context(layer):
        layer.normalized_weight().sum().backward()
        duplicated = duplicate(layer)
        assert vars(duplicated).keys() == vars(SNLinear(1, 1)).keys()
        before = duplicated.weight_u.clone()
        duplicated.normalized_weight()
    assert not torch.equal(duplicated.weight_u, before)


@every_layer
@both_contexts
def test_a_deep_copy_of_a_parametrized_layer_is_outside_contexts_too(kind: str, context: Context) -> None:
    layer = LAYERS[kind]()
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    layer(input_of(layer)).sum().backward()
    with context(layer):
        copied = copy.deepcopy(layer)
    before = copied.weight_u.clone()
    assert torch.equal(copied.normalized_weight(), layer.normalized_weight())
    assert not torch.equal(copied.weight_u, before)


@both_contexts
def test_a_model_without_normalised_layers_does_not_change(context: Context) -> None:
    model = nn.Linear(2, 2)
    weight = model.weight
    with context(model):
        model(torch.randn(1, 2))
    assert remove_spectral_norm(model).weight is weight
    assert vars(model).keys() == vars(nn.Linear(2, 2)).keys()


@every_layer
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("iterate_when_frozen", [True, False])
@pytest.mark.parametrize("eps_mode", ["add", "clamp"])
def test_a_zero_weight_gives_zeros_and_finite_gradients(
    kind: str, training: bool, iterate_when_frozen: bool, eps_mode: str
) -> None:
    layer = LAYERS[kind](iterate_when_frozen=iterate_when_frozen, eps_mode=eps_mode).train(training)
    nn.init.zeros_(layer.weight)
    x = input_of(layer)
    y = layer(x)
    bias = getattr(layer, "bias", None)
    expected = torch.zeros_like(y) if bias is None else bias.reshape(-1, *[1] * (x.dim() - 2)).expand_as(y)
    assert torch.equal(y, expected)
    assert layer.sigma.item() == 0
    y.sum().backward()
    assert torch.isfinite(layer.weight.grad).all()
    assert torch.count_nonzero(layer.weight.grad) > 0
    assert all(torch.isfinite(buffer).all() for buffer in layer.buffers())


@every_layer
@pytest.mark.parametrize("eps_mode", ["add", "clamp"])
def test_a_zero_weight_recovers_when_it_becomes_non_zero(kind: str, eps_mode: str) -> None:
    layer = LAYERS[kind](dtype=torch.float64, eps_mode=eps_mode)
    weight = layer.weight.detach().clone()
    nn.init.zeros_(layer.weight)
    layer.reset_spectral_norm()  # v has nothing to fit
    for _ in range(3):
        layer(input_of(layer))
    assert torch.linalg.vector_norm(layer.weight_u).item() == pytest.approx(1)
    with torch.no_grad():
        layer.weight.copy_(weight)
    for _ in range(500):
        layer.normalized_weight()
    torch.testing.assert_close(layer.sigma, torch.linalg.svdvals(matrix_of(layer))[0])


@every_layer
def test_vectors_start_with_length_one_and_v_fits_u(kind: str) -> None:
    layer = LAYERS[kind](dtype=torch.float64)
    matrix = matrix_of(layer)
    assert layer.weight_u.shape == (matrix.size(0),)
    assert layer.weight_v.shape == (matrix.size(1),)
    assert torch.linalg.vector_norm(layer.weight_u).item() == pytest.approx(1)
    torch.testing.assert_close(layer.weight_v, nn.functional.normalize(matrix.t() @ layer.weight_u, dim=0))


@every_layer
def test_weights_start_as_the_plain_layers(kind: str) -> None:
    torch.manual_seed(3)
    layer = LAYERS[kind]()
    torch.manual_seed(3)
    plain = plain_layer(kind)
    assert torch.equal(layer.weight, plain.weight)
    assert isinstance(layer, type(plain))


def plain_layer(kind: str) -> nn.Module:
    normalised, sizes, options = KINDS[kind]
    return PLAIN[normalised](*sizes, **options)


@pytest.mark.parametrize(("normalised", "plain"), PLAIN.items())
def test_positional_arguments_are_torchs(normalised: type[nn.Module], plain: type[nn.Module]) -> None:
    ours, torchs = (inspect.getfullargspec(kind.__init__).args for kind in (normalised, plain))
    assert ours == torchs


def test_reset_parameters_draws_new_weights_and_vectors() -> None:
    layer = SNConv2d(3, 4, 3)
    before = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    assert not any(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    matrix = matrix_of(layer)
    torch.testing.assert_close(layer.weight_v, nn.functional.normalize(matrix.t() @ layer.weight_u, dim=0))


def test_transposed_convolution_takes_an_output_size() -> None:
    layer = SNConvTranspose2d(4, 6, 3, stride=2, padding=1)
    x = torch.randn(1, 4, 5, 5)
    assert layer(x).shape == (1, 6, 9, 9)
    assert layer(x, output_size=[10, 10]).shape == (1, 6, 10, 10)


def test_convolutions_take_a_single_image() -> None:
    for layer in (SNConv2d(4, 6, 3).eval(), SNConvTranspose2d(4, 6, 3).eval()):
        x = torch.randn(4, 5, 5)
        torch.testing.assert_close(layer(x), layer(x[None])[0])


def test_padding_row_of_an_embedding_gets_no_gradient() -> None:
    layer = SNEmbedding(5, 3, padding_idx=2)
    assert torch.count_nonzero(layer.weight[2]) == 0
    layer(torch.tensor([2, 2, 0, 4])).sum().backward()
    assert torch.count_nonzero(layer.weight.grad[2]) == 0
    assert torch.count_nonzero(layer.weight.grad[0]) > 0


def test_embedding_scales_gradients_by_frequency() -> None:
    layers = [SNEmbedding(5, 3, scale_grad_by_freq=scale, dtype=torch.float64) for scale in (False, True)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer in layers:
        nn.init.zeros_(layer.weight)  # sigma takes no part in the gradient
        layer(torch.tensor([1, 1, 1, 4])).sum().backward()
    torch.testing.assert_close(layers[0].weight.grad[1], 3 * layers[1].weight.grad[1])


def test_representation_names_what_differs_from_the_defaults() -> None:
    assert repr(SNLinear(2, 3)) == "SNLinear(in_features=2, out_features=3, bias=True)"
    text = repr(SNLinear(2, 3, n_power_iterations=2, eps=1e-8, iterate_when_frozen=False))
    assert text.endswith("n_power_iterations=2, eps=1e-08, iterate_when_frozen=False)")


@every_layer
@pytest.mark.parametrize("iterate_when_frozen", [True, False])
def test_removing_leaves_the_plain_layer_with_the_same_outputs(kind: str, iterate_when_frozen: bool) -> None:
    layer = LAYERS[kind](iterate_when_frozen=iterate_when_frozen)
    x = input_of(layer)
    layer(x)
    y = layer.eval()(x)
    removed, plain = remove_spectral_norm(layer), plain_layer(kind)
    assert removed is layer
    assert type(removed) is type(plain)
    assert torch.equal(removed(x), y)
    assert removed.state_dict().keys() == plain.state_dict().keys()
    assert vars(removed).keys() == vars(plain).keys()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["conv", "conv_grouped", "resampling", "transpose", "linear"])
def test_torchs_fusion_with_batch_norm_gives_the_plain_layer_that_computes_the_same(
    kind: str, bias: bool
) -> None:
    layer = (
        SNConv2d(4, 6, 3, upsample=2, bias=bias) if kind == "resampling" else LAYERS[kind](bias=bias)
    ).eval()
    norm = (nn.BatchNorm1d if kind == "linear" else nn.BatchNorm2d)(6).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    x, before = input_of(layer), copy.deepcopy(layer.state_dict())
    if kind == "linear":
        fused = fusion.fuse_linear_bn_eval(layer, norm)
    else:
        fused = fusion.fuse_conv_bn_eval(layer, norm, transpose=kind == "transpose")
    assert type(fused) is (ResamplingConv2d if kind == "resampling" else PLAIN[type(layer)])
    torch.testing.assert_close(fused(x), norm(layer(x)), rtol=1e-4, atol=1e-5)
    assert_same(layer.state_dict(), before)
    assert sorted(fused.state_dict()) == ["bias", "weight"]


def test_pruned_weights_are_normalised_and_stay_pruned() -> None:
    layer = SNConv2d(4, 6, 3)
    prune.l1_unstructured(layer, "weight", 0.5)
    for _ in range(200):
        layer(torch.randn(1, 4, 7, 6))
    weight = layer.normalized_weight()
    assert (weight == 0).float().mean() == 0.5
    assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "compute_weight",
    [parametrizations.weight_norm, partial(prune.l1_unstructured, name="weight", amount=0.5)],
    ids=["parametrization", "pruning"],
)
def test_removing_from_a_weight_that_something_else_computes_is_refused_and_changes_nothing(
    compute_weight: Callable[[nn.Module], nn.Module],
) -> None:
    model = nn.Sequential(SNLinear(4, 4), SNLinear(4, 4))
    compute_weight(model[1])
    with pytest.raises(TypeError, match="the weight of '1' is computed by something else"):
        remove_spectral_norm(model)
    assert all(isinstance(layer, SNLinear) for layer in model)
    model.eval()
    # Torch itself copies no weight that pruning computes.
    with pytest.raises((TypeError, RuntimeError), match=r"computed by something else|deepcopy protocol"):
        fusion.fuse_linear_bn_eval(model[1], nn.BatchNorm1d(4).eval())


def test_removing_reaches_every_layer_and_keeps_requires_grad() -> None:
    model = nn.Sequential(SelfAttention2d(8, gamma_init=1.0), nn.ReLU(), SNConv2d(8, 2, 1)).eval()
    model[2].weight.requires_grad_(False)
    x = torch.randn(1, 8, 4, 4)
    y = model(x)
    remove_spectral_norm(model)
    assert not any(isinstance(layer, SpectralNormLayer) for layer in model.modules())
    assert type(model[0].query) is nn.Conv2d
    assert not model[2].weight.requires_grad
    assert model[0].query.weight.requires_grad
    assert torch.equal(model(x), y)


@both_contexts
def test_removing_inside_a_context_leaves_no_trace(context: Context) -> None:
    layer = SNLinear(2, 2)
    with context(layer):
        remove_spectral_norm(layer)
    assert vars(layer).keys() == vars(nn.Linear(2, 2)).keys()


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()) for _ in range(2))
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4, 1))


def normalised_names(model: nn.Module) -> set[str]:
    return {name for name, layer in model.named_modules() if isinstance(layer, SpectralNormLayer)}


EVERY_NAME = {"embed", "blocks.0.0", "blocks.1.0", "up", "head.1"}


@pytest.mark.parametrize(
    ("exclude", "excluded"),
    [
        ([], set()),
        (["up"], {"up"}),
        (["blocks.*"], {"blocks.0.0", "blocks.1.0"}),
        (["blocks"], {"blocks.0.0", "blocks.1.0"}),
        (["blocks.?.0", "head"], {"blocks.0.0", "blocks.1.0", "head.1"}),
        ([nn.Embedding], {"embed"}),
        ([nn.Sequential], {"blocks.0.0", "blocks.1.0", "head.1"}),
        ([nn.modules.conv._ConvNd, "embed"], {"blocks.0.0", "blocks.1.0", "up", "embed"}),
        ((name for name in ("up", "embed")), {"up", "embed"}),
        (lambda model: [model.head, model.blocks[1][0]], {"head.1", "blocks.1.0"}),
    ],
)
def test_applying_excludes_names_patterns_classes_and_modules(exclude: Any, excluded: set[str]) -> None:
    model = Network()
    apply_spectral_norm(model, exclude=exclude(model) if callable(exclude) else exclude)
    assert normalised_names(model) == EVERY_NAME - excluded


def test_applying_keeps_layers_parameters_hooks_and_the_optimizer() -> None:
    model = Network()
    layers = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    called = []
    model.head[1].register_forward_hook(lambda *_: called.append(True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert apply_spectral_norm(model, n_power_iterations=2, eps=1e-8, iterate_when_frozen=False) is model
    assert all(layer is layers[name] for name, layer in model.named_modules())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert (model.up.n_power_iterations, model.up.eps, model.up.iterate_when_frozen) == (2, 1e-8, False)
    weight = model.head[1].weight.detach().clone()
    model.head(torch.randn(2, 4, 1, 1)).sum().backward()
    optimizer.step()
    assert called
    assert not torch.equal(model.head[1].weight, weight)


def test_applied_layers_equal_constructed_ones() -> None:
    applied = apply_spectral_norm(nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect"))
    constructed = SNConv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect")
    assert type(applied) is SNConv2d
    constructed.load_state_dict(applied.state_dict())
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(applied(x), constructed(x))
    assert set(vars(applied)) == set(vars(constructed))
    assert repr(applied) == repr(constructed)


def test_applying_and_removing_returns_the_same_class_and_normalised_weight() -> None:
    model = Network()
    weight = model.up.weight.detach().clone()
    remove_spectral_norm(apply_spectral_norm(model))
    assert type(model.up) is nn.ConvTranspose2d
    ratio = model.up.weight / weight
    torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio))


def test_applying_does_not_change_normalised_layers() -> None:
    model = nn.Sequential(SNLinear(2, 2, n_power_iterations=4), nn.Linear(2, 2))
    before = vectors(model[0])
    apply_spectral_norm(apply_spectral_norm(model))
    assert model[0].n_power_iterations == 4
    assert_same(vectors(model[0]), before)
    assert type(model[1]) is SNLinear


def test_applying_finds_a_shared_layer_once() -> None:
    shared = nn.Linear(3, 3)
    model = apply_spectral_norm(nn.Sequential(shared, nn.ReLU(), shared))
    assert model[0] is model[2]
    assert model(torch.randn(2, 3)).shape == (2, 3)


def linear_with(weight: Tensor) -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(weight)
    return layer


class CustomLinear(nn.Linear):
    """A subclass, which may have a forward of its own."""


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Conv1d(2, 2, 1), TypeError, "no spectrally normalised form of Conv1d at '1'.*exclude"),
        (lambda: nn.Conv3d(2, 2, 1), TypeError, "no spectrally normalised form of Conv3d at '1'"),
        (lambda: nn.ConvTranspose1d(2, 2, 1), TypeError, "form of ConvTranspose1d at '1'"),
        (lambda: nn.Bilinear(2, 2, 2), TypeError, "form of Bilinear at '1'"),
        (lambda: nn.EmbeddingBag(2, 2), TypeError, "form of EmbeddingBag at '1'"),
        (lambda: nn.LazyConv2d(2, 1), TypeError, "form of LazyConv2d at '1'"),
        (lambda: CustomLinear(2, 2), TypeError, "form of CustomLinear at '1'"),
        (lambda: nn.MultiheadAttention(2, 1), TypeError, "form of MultiheadAttention at '1'"),
        (lambda: nn.LSTM(2, 2), TypeError, "form of LSTM at '1'"),
        (lambda: nn.GRUCell(2, 2), TypeError, "form of GRUCell at '1'"),
        (
            lambda: parametrizations.weight_norm(nn.Linear(2, 2)),
            TypeError,
            "weight or bias of '1' is computed by",
        ),
        (lambda: nn.utils.spectral_norm(nn.Conv3d(2, 2, 1)), TypeError, "form of Conv3d at '1'"),
        (lambda: nn.utils.spectral_norm(CustomLinear(2, 2)), TypeError, "form of CustomLinear at '1'"),
        (lambda: nn.utils.spectral_norm(nn.Linear(2, 2), eps=0), ValueError, "'1' with torch.*eps: expected"),
        (lambda: nn.utils.spectral_norm(nn.Conv2d(2, 2, 1), dim=2), ValueError, "'1' with torch.*dim: exp"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), TypeError, "the weight of '1': expected a floating"),
        (
            lambda: linear_with(torch.ones(2, 2).to(torch.float8_e4m3fn)),
            TypeError,
            "the weight of '1': expected a dense tensor of float32",
        ),
        (
            lambda: linear_with(torch.ones(4)),
            ValueError,
            r"the weight of '1': expected at least two axes.*got shape \[4\]",
        ),
        (
            lambda: parametrizations.weight_norm(nn.Linear(2, 2), "bias"),
            TypeError,
            "or bias of '1' is computed",
        ),
        (
            lambda: linear_with(torch.empty(0, 2)),
            ValueError,
            r"the weight of '1': expected.*one element, got shape \[0, 2",
        ),
        (lambda: nn.Embedding(3, 2, max_norm=1.0), ValueError, "max_norm: expected None"),
        (lambda: nn.Embedding(3, 2, sparse=True), ValueError, "sparse: expected False"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.spectral_norm.*:FutureWarning")
def test_applying_refuses_what_it_cannot_normalise_and_changes_nothing(
    make: Callable[[], nn.Module], error: type[Exception], message: str
) -> None:
    odd = make()
    model = nn.Sequential(nn.Conv2d(2, 2, 1), odd, nn.Linear(2, 2))
    with pytest.raises(error, match=message):
        apply_spectral_norm(model)
    assert type(model[0]) is nn.Conv2d
    assert type(model[2]) is nn.Linear
    assert normalised_names(model) == set()
    apply_spectral_norm(model, exclude=["1"])
    assert normalised_names(model) == {"0", "2"}
    assert model[1] is odd


def test_linear_layers_of_transformers_are_normalised_without_the_fast_path_alone() -> None:
    model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    with pytest.raises(TypeError, match=r"its 'linear1' before it is normalised; call torch\.backends\.mha"):
        apply_spectral_norm(model, exclude=[nn.MultiheadAttention])
    assert normalised_names(model) == set()
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        apply_spectral_norm(model, exclude=[nn.MultiheadAttention]).eval()
        assert normalised_names(model) == {"linear1", "linear2"}
        x = torch.randn(2, 3, 4)
        with torch.no_grad():
            found = model(x)
        torch.testing.assert_close(found, model(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"exclude": ["heat"]}, ValueError, "exclude: expected names, classes or modules.*got 'heat'"),
        ({"exclude": ["heads.*"]}, ValueError, r"got 'heads\.\*'"),
        ({"exclude": [nn.Conv3d]}, ValueError, "got <class 'torch.nn.modules.conv.Conv3d'>"),
        ({"exclude": [nn.Linear(2, 2)]}, ValueError, "exclude: expected names, classes or modules"),
        ({"exclude": "up"}, TypeError, r"exclude: expected a collection, got the string 'up'"),
        ({"eps": 1.5}, ValueError, r"eps: expected a number from 1e-37 to 1, got 1\.5"),
    ],
)
def test_applying_with_a_mistaken_argument_changes_nothing(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = Network()
    with pytest.raises(error, match=message):
        apply_spectral_norm(model, **options)
    assert normalised_names(model) == set()


IMAGE_OF_3 = r"expected \[N, C, H, W\] or \[C, H, W\] with C = 3, got"
VECTOR_OF_3 = r"input: expected \[\*, 3\], got"
OF_DTYPE = "expected the module's dtype torch.float32, got"
OF_DEVICE = "expected the device of the module's parameters, cpu, got meta"
OF_INDICES = "expected an int64 or int32 tensor, got"
IN_RANGE = "expected values from 0 to 2, got values from"


@pytest.mark.parametrize(
    ("layer", "x", "error", "message"),
    [
        (SNConv2d(3, 2, 1), torch.ones(1, 4, 2, 2), ValueError, IMAGE_OF_3 + r" \[1, 4, 2, 2\]"),
        (SNConv2d(3, 2, 1), torch.ones(3, 2), ValueError, IMAGE_OF_3 + r" \[3, 2\]"),
        (SNConvTranspose2d(3, 2, 1), torch.ones(4, 2, 2), ValueError, IMAGE_OF_3 + r" \[4, 2, 2\]"),
        (SNConvTranspose2d(3, 2, 1), torch.ones(3, 2, 2).half(), TypeError, OF_DTYPE + " torch.float16; con"),
        (SNConv2d(3, 2, 1), torch.ones(3, 2, 2, device="meta"), ValueError, OF_DEVICE),
        (SNLinear(3, 2), torch.ones(2, 4), ValueError, VECTOR_OF_3 + r" \[2, 4\]"),
        (SNLinear(3, 2), torch.tensor(1.0), ValueError, VECTOR_OF_3 + r" \[\]"),
        (SNLinear(3, 2), torch.ones(2, 3).double(), TypeError, OF_DTYPE + " torch.float64"),
        (SNEmbedding(3, 2), torch.tensor([0, 3]), ValueError, IN_RANGE + " 0 to 3"),
        (SNEmbedding(3, 2), torch.tensor([-1]), ValueError, IN_RANGE + " -1"),
        (SNEmbedding(3, 2), torch.tensor([1.0]), TypeError, OF_INDICES + " torch.float32"),
        (SNEmbedding(3, 2), [1], TypeError, OF_INDICES + " list"),
        (SNEmbedding(3, 2), torch.zeros(1, dtype=torch.long, device="meta"), ValueError, OF_DEVICE),
    ],
)
def test_wrong_inputs_are_refused_before_u_is_updated(
    layer: SpectralNormLayer, x: Any, error: type[Exception], message: str
) -> None:
    before = vectors(layer)
    with pytest.raises(error, match=message):
        layer(x)
    assert_same(vectors(layer), before)


@pytest.mark.parametrize("iterate_when_frozen", [True, False])
def test_a_frozen_pass_without_iteration_repeats_the_last_update_bit_for_bit(
    iterate_when_frozen: bool,
) -> None:
    layer = SNLinear(6, 4, iterate_when_frozen=iterate_when_frozen)
    x = torch.randn(8, 6)
    y, before = layer(x), vectors(layer)
    with frozen_spectral_norm(layer, iterate=False):
        assert torch.equal(layer(x), y)
    with frozen_spectral_norm(layer, iterate=True):
        assert not torch.equal(layer(x), y)
    assert_same(vectors(layer), before)


def test_checkpointing_with_a_frozen_recomputation_gives_the_plain_gradient() -> None:
    plain = nn.Sequential(SNConv2d(3, 8, 3), nn.ReLU(), SNConv2d(8, 8, 3)).double()
    block = copy.deepcopy(plain)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    plain(x).square().sum().backward()
    contexts = (contextlib.nullcontext(), frozen_spectral_norm(block, iterate=False))
    checkpoint(block, x, use_reentrant=False, context_fn=lambda: contexts).square().sum().backward()
    assert_close(gradients_of(block), gradients_of(plain), rtol=1e-12, atol=1e-14)
    assert_same(vectors(block), vectors(plain))


def test_the_normalised_weight_has_the_weights_strides_also_where_an_axis_has_size_1() -> None:
    conv = SNConv2d(2, 1, (3, 2), dtype=torch.float64).to(memory_format=torch.channels_last)
    assert conv.normalized_weight().stride() == conv.weight.stride()
    # Torch's float64 convolution refuses the gradient of others.
    conv(torch.randn(1, 2, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)).sum().backward()
