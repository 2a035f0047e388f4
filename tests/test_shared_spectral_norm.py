"""Normalised weights that the forwards of a step share, against layers without sharing."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from blocks import assert_close, assert_same, converge, gradients_of, spectral_layers, state_of
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from sagan_layers import (
    ProjectionDiscriminatorHead,
    SelfAttention2d,
    SharedSpectralNorm,
    SNConv2d,
    SNConvTranspose2d,
    SNEmbedding,
    SNLinear,
    SpectralNormLayer,
    frozen_spectral_norm,
    functional,
    shared_spectral_norm,
)
from sagan_layers.spectral_norm import grouped
from sagan_layers.spectral_norm.reference import SpectralNormOptions, SpectralNormTask

CLASSES = 5
Context = Callable[[nn.Module], contextlib.AbstractContextManager[object]]


class Network(nn.Module):
    """Every kind of layer, one of them used twice, and small and large matrices."""

    def __init__(self, dtype: torch.dtype = torch.float32, **options: object) -> None:
        super().__init__()
        to = {"dtype": dtype}
        self.first = SNConv2d(3, 16, 3, padding=1, **to, **options)
        self.twice = SNConv2d(16, 16, 1, groups=2, **to, **options)
        self.up = SNConvTranspose2d(16, 12, 4, stride=2, padding=1, **to, **options)
        self.wide = SNConv2d(12, 640, 3, stride=2, padding=1, bias=False, **to, **options)
        self.narrow = SNConv2d(640, 16, 1, **to, **options)
        self.attention = SelfAttention2d(16, gamma_init=0.7, **to)
        self.head = ProjectionDiscriminatorHead(16, CLASSES, **to)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = torch.tanh(self.twice(torch.tanh(self.twice(self.first(x)))))
        h = self.narrow(torch.tanh(self.wide(torch.tanh(self.up(h)))))
        logits: Tensor = self.head(self.attention(h), labels)
        return logits


def batch(seed: int, dtype: torch.dtype = torch.float32, size: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, 6, 4, generator=generator).to(dtype)
    return x, torch.randint(CLASSES, (size,), generator=generator)


def output_axis(layer: SpectralNormLayer) -> int:
    return 1 if isinstance(layer, SNConvTranspose2d) else 0


def is_shared(layer: SpectralNormLayer) -> bool:
    """Whether a forward in training uses a shared weight, so that u is not updated."""
    before = layer.weight_u.clone()
    layer.normalized_weight()
    return torch.equal(layer.weight_u, before)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("options", [{}, {"n_power_iterations": 3, "eps": 1e-8}], ids=["defaults", "options"])
def test_steps_agree_with_a_first_forward_that_updates_and_others_that_repeat_it(
    memory_format: torch.memory_format, options: dict[str, object]
) -> None:
    ours = Network(**options).to(memory_format=memory_format)
    layerwise = copy.deepcopy(ours)
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.05) for network in (ours, layerwise)]
    shared = shared_spectral_norm(ours)
    for step in range(4):
        parts = [batch(10 * step + part) for part in range(3)]
        with shared:
            outputs = {index: ours(*part) for index, part in enumerate(parts)}
        expected = {0: _call_once_each(layerwise, *parts[0])}
        with frozen_spectral_norm(layerwise, iterate=False):
            expected |= {index: layerwise(*parts[index]) for index in (1, 2)}
        assert_close(outputs, expected, 1e-6, 1e-6)
        for results in (outputs, expected):
            sum(y.square().mean() for y in results.values()).backward()
        assert_close(gradients_of(ours), gradients_of(layerwise), 1e-6, 1e-6)
        assert_close(state_of(ours), state_of(layerwise), 1e-6, 1e-6)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_close(state_of(ours), state_of(layerwise), 1e-6, 1e-6)


def _call_once_each(network: Network, x: Tensor, labels: Tensor) -> Tensor:
    """Call the network; the layer that it uses twice updates its vectors once."""
    h = network.twice(network.first(x))
    with frozen_spectral_norm(network.twice, iterate=False):
        h = torch.tanh(network.twice(torch.tanh(h)))
    h = network.narrow(torch.tanh(network.wide(torch.tanh(network.up(h)))))
    logits: Tensor = network.head(network.attention(h), labels)
    return logits


def test_a_shared_layer_gives_the_bits_of_the_layer_alone_and_can_be_repeated() -> None:
    ours = Network()
    alone = copy.deepcopy(ours)
    x, labels = batch(0)
    with shared_spectral_norm(ours):
        y = ours(x, labels)
    weights = [layer.normalized_weight() for layer in spectral_layers(alone)]
    with frozen_spectral_norm(ours, iterate=False):
        assert torch.equal(ours(x, labels), y)
        assert all(
            torch.equal(layer.normalized_weight(), weight)
            for layer, weight in zip(spectral_layers(ours), weights, strict=True)
        )
    assert_same(state_of(ours), state_of(alone))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_parameters_of_other_dtypes_agree_too(dtype: torch.dtype) -> None:
    layer = SNLinear(24, 16, dtype=dtype)
    alone = copy.deepcopy(layer)
    x = torch.randn(3, 24).to(dtype)
    with shared_spectral_norm(layer):
        y = layer(x)
        y.square().sum().backward()
    expected = alone(x)
    expected.square().sum().backward()
    assert torch.equal(y, expected)
    assert layer.weight.grad.dtype == dtype
    tolerance = {torch.float64: 1e-13, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(layer.weight.grad, alone.weight.grad, rtol=tolerance, atol=tolerance)
    assert_same(state_of(layer), state_of(alone))


@pytest.mark.parametrize(
    "fix",
    [
        frozen_spectral_norm,
        lambda network: frozen_spectral_norm(network, iterate=False),
        lambda network: frozen_spectral_norm(network, iterate=True),
        lambda network: contextlib.nullcontext(network.eval()),
    ],
    ids=["frozen", "frozen_stored", "frozen_iterating", "evaluation"],
)
@pytest.mark.parametrize("iterate_when_frozen", [True, False])
def test_where_u_must_not_be_updated_the_weights_are_those_of_each_layers_rule(
    fix: Context, iterate_when_frozen: bool
) -> None:
    network = Network(iterate_when_frozen=iterate_when_frozen)
    x, labels = batch(0)
    before = state_of(network)
    with fix(network):
        expected = network(x, labels)
        with shared_spectral_norm(network):
            y = network(x, labels)
    assert torch.equal(y, expected)
    assert_same(state_of(network), before)


@pytest.mark.parametrize("training", [True, False])
def test_zero_weights_stay_as_they_are(training: bool) -> None:
    for layer in (SNLinear(24, 16), SNConvTranspose2d(3, 4, 3), SNLinear(640, 640)):
        nn.init.zeros_(layer.weight)
        layer.train(training)
        with shared_spectral_norm(layer):
            weight = layer.normalized_weight()
            weight.sum().backward()
        assert torch.count_nonzero(weight) == 0
        assert torch.equal(layer.weight.grad, torch.ones_like(layer.weight))
        assert all(torch.isfinite(buffer).all() for buffer in layer.buffers())


LAYOUTS: dict[str, Callable[[], SpectralNormLayer]] = {
    "conv": lambda: SNConv2d(8, 16, 3),
    "conv_channels_last": lambda: SNConv2d(8, 16, 3).to(memory_format=torch.channels_last),
    "pointwise_channels_last": lambda: SNConv2d(8, 16, 1).to(memory_format=torch.channels_last),
    "one_output": lambda: SNLinear(24, 1),
    "transpose": lambda: SNConvTranspose2d(6, 16, 3),
    "transpose_channels_last": lambda: SNConvTranspose2d(6, 16, 3).to(memory_format=torch.channels_last),
    "embedding": lambda: SNEmbedding(7, 6),
    "split": lambda: SNConv2d(64, 128, 3),
    "split_channels_last": lambda: SNConv2d(64, 128, 3).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("grad_strides", ["same", "other", "expanded"])
def test_gradients_are_the_references_for_every_layout(kind: str, grad_strides: str) -> None:
    layer = LAYOUTS[kind]().double()
    weight, dim = layer.weight, output_axis(layer)
    assert functional.select_backend(weight, operation="spectral_norm", dim=dim) == "cpu"
    cotangent = torch.randn(weight.shape, dtype=torch.float64)
    if grad_strides == "same":
        cotangent = torch.empty_like(weight).copy_(cotangent)
    elif grad_strides == "expanded":
        cotangent = cotangent.flatten()[0].expand(weight.shape)
    u, v = layer.weight_u.clone(), layer.weight_v.clone()
    with shared_spectral_norm(layer):
        normalized = layer.normalized_weight()
        (ours,) = torch.autograd.grad(normalized, weight, cotangent)
    expected = functional.spectral_normalize(weight, u, v, dim=dim)
    (theirs,) = torch.autograd.grad(expected.weight, weight, cotangent)
    torch.testing.assert_close(normalized, expected.weight, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer.weight_u, expected.u, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(layer.weight_v, expected.v, rtol=1e-12, atol=1e-13)
    assert ours.stride() == weight.stride()


@pytest.mark.parametrize(
    "layer", [SNConvTranspose2d(2, 3, 2), SNLinear(4, 3)], ids=lambda x: type(x).__name__
)
def test_gradients_of_first_and_second_order_pass_the_numerical_check(layer: SpectralNormLayer) -> None:
    layer.double().eval()
    layer.iterate_when_frozen = False

    def normalized(weight: Tensor) -> Tensor:
        with shared_spectral_norm(layer):  # whose weight the check changes in place
            return layer.normalized_weight()

    assert torch.autograd.gradcheck(normalized, layer.weight)
    assert torch.autograd.gradgradcheck(normalized, layer.weight)


def test_every_part_of_a_batch_has_its_backward_and_the_sum_is_the_whole_batchs() -> None:
    whole = Network(torch.float64)
    parts = copy.deepcopy(whole)
    x, labels = batch(0, torch.float64, size=6)
    with shared_spectral_norm(whole):
        whole(x, labels).mean().backward()
    with shared_spectral_norm(parts):
        for part in range(3):
            chosen = slice(2 * part, 2 * part + 2)
            (parts(x[chosen], labels[chosen]).mean() / 3).backward()
    assert_close(gradients_of(parts), gradients_of(whole), 1e-13, 1e-13)
    assert_same(state_of(parts), state_of(whole))


def test_real_and_fake_passes_of_two_blocks_may_share_one_backward() -> None:
    ours = Network(torch.float64)
    separate = copy.deepcopy(ours)
    losses = []
    for seed in range(2):
        with shared_spectral_norm(ours):
            losses.append(ours(*batch(seed, torch.float64)).square().sum())
        with shared_spectral_norm(separate):
            separate(*batch(seed, torch.float64)).square().sum().backward()
    sum(losses).backward()
    assert_close(gradients_of(ours), gradients_of(separate), 1e-12, 1e-12)


def test_backward_after_the_optimizers_step_is_that_of_its_own_forward() -> None:
    layer = SNConv2d(64, 128, 3)
    same = copy.deepcopy(layer)
    x = torch.randn(2, 64, 4, 4)
    with shared_spectral_norm(layer):
        loss = layer(x).square().sum()
        with torch.no_grad():
            layer.weight.mul_(2).add_(1)
        loss.backward()
    same(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, same.weight.grad, rtol=1e-5, atol=1e-6)


def test_second_derivatives_work_and_refuse_a_weight_that_has_changed() -> None:
    ours = Network(torch.float64)
    ours.twice = nn.Identity()
    alone = copy.deepcopy(ours)
    x, labels = batch(0, torch.float64)
    for network, context in ((ours, shared_spectral_norm(ours)), (alone, contextlib.nullcontext())):
        leaf = x.clone().requires_grad_()
        with context:
            (slope,) = torch.autograd.grad(network(leaf, labels).sum(), leaf, create_graph=True)
        slope.square().sum().backward()
    assert_close(gradients_of(ours), gradients_of(alone), 1e-10, 1e-10)
    layer = SNLinear(4, 3)
    with shared_spectral_norm(layer):
        y = layer(torch.randn(2, 4)).square().sum()
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified in place after the forward pass whose second"):
        torch.autograd.grad(y, layer.weight, create_graph=True)


def test_weights_get_gradients_only_while_they_require_them() -> None:
    network = Network()
    x, labels = batch(0)
    with shared_spectral_norm(network):
        with torch.no_grad():
            assert not network(x, labels).requires_grad
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        leaf = x.clone().requires_grad_()
        network(leaf, labels).sum().backward()
        assert leaf.grad is not None
        assert gradients_of(network) == {}
        for parameter in network.parameters():
            parameter.requires_grad_(True)
        network(x, labels).sum().backward()
        assert len(gradients_of(network)) == len(list(network.parameters()))


def test_entered_without_gradients_it_still_gives_gradients() -> None:
    network = Network()
    same = copy.deepcopy(network)
    with torch.no_grad():
        shared = shared_spectral_norm(network)
        shared.update()
    network(*batch(0)).sum().backward()
    with shared_spectral_norm(same):
        same(*batch(0)).sum().backward()
    assert_same(gradients_of(network), gradients_of(same))


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("lowered", [False, True])
def test_the_form_for_a_gpu_computes_the_same(iterations: int, lowered: bool) -> None:
    layers = [make().double() for kind, make in LAYOUTS.items() if kind != "transpose"]
    nn.init.zeros_(layers[0].weight)
    dtype = torch.bfloat16 if lowered else torch.float64
    tasks = []
    for layer in layers:
        options = SpectralNormOptions(output_axis(layer), iterations, layer.eps, dtype)
        tasks.append(SpectralNormTask(layer.weight, layer.weight_u, layer.weight_v, options))
        reasons = grouped.unsupported_reasons(layer.weight, output_axis(layer))
        assert [reason.split(",")[0] for reason in reasons] == ["it saves launches on a GPU"]
    with torch.no_grad():
        results = grouped.KERNELS.normalize(tasks)
    for (weight, u, v, options), result in zip(tasks, results, strict=True):
        expected = functional.spectral_normalize(
            weight, u, v, dim=options.dim, n_power_iterations=iterations, eps=options.eps
        )
        tolerance = 1e-2 if lowered else 1e-12
        assert result.weight.dtype == dtype
        torch.testing.assert_close(result.weight.double(), expected.weight, rtol=tolerance, atol=tolerance)
        for ours, theirs in zip(result[1:], expected[1:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        for cotangent in (torch.randn_like(weight), torch.randn(weight.shape).to(dtype)):
            ours = grouped.KERNELS.gradient(cotangent, weight, result, options)
            (theirs,) = torch.autograd.grad(expected.weight, weight, cotangent.double(), retain_graph=True)
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
            assert ours.stride() == weight.stride()


def test_a_weight_that_is_no_matrix_in_memory_is_refused() -> None:
    assert "outputs lie between other axes" in grouped.unsupported_reasons(torch.empty(6, 16, 3, 3), 1)
    assert "the weight does not fill its memory" in grouped.unsupported_reasons(torch.empty(6, 16)[:, ::2], 0)


@pytest.mark.gpu
def test_on_a_gpu_steps_agree_with_the_cpu_and_can_be_captured_in_a_graph() -> None:
    on_cpu = Network()
    on_gpu = copy.deepcopy(on_cpu).cuda()
    x, labels = batch(0)
    gpu_x, gpu_labels = x.cuda(), labels.cuda()
    for _ in range(2):
        for network, inputs in ((on_cpu, (x, labels)), (on_gpu, (gpu_x, gpu_labels))):
            network.zero_grad()
            with shared_spectral_norm(network):
                network(*inputs).square().mean().backward()
    assert_close({k: v.cpu() for k, v in gradients_of(on_gpu).items()}, gradients_of(on_cpu), 1e-4, 1e-4)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), shared_spectral_norm(on_gpu):
        on_gpu(gpu_x, gpu_labels).sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), shared_spectral_norm(on_gpu):
        on_gpu(gpu_x, gpu_labels).sum().backward()
    before = on_gpu.wide.weight_u.clone()
    graph.replay()
    assert not torch.equal(on_gpu.wide.weight_u, before)


def test_u_is_updated_once_on_entry_and_at_each_update_and_afterwards_as_before() -> None:
    network = Network()
    seen = [network.wide.weight_u.clone()]
    shared = shared_spectral_norm(network)
    calls = [lambda seed=seed: network(*batch(seed)) for seed in range(4)]
    for act in (shared.__enter__, *calls[:3], shared.update, lambda: shared.__exit__(None), calls[3]):
        act()
        seen.append(network.wide.weight_u.clone())
    changed = [not torch.equal(first, second) for first, second in itertools.pairwise(seen)]
    assert changed == [True, False, False, False, True, False, True]


def test_a_changed_or_replaced_weight_is_refused_until_the_update() -> None:
    layer = SNLinear(4, 3)
    x = torch.randn(2, 4)
    with shared_spectral_norm(layer) as shared:
        layer(x).sum().backward()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
        with pytest.raises(
            RuntimeError, match=r"changed since shared_spectral_norm has normalised it; call upd"
        ):
            layer(x)
        shared.update()
        layer(x)
        other = {"weight": torch.randn(3, 4)}
        with pytest.raises(
            RuntimeError, match="expected the parameter that shared_spectral_norm has normalised"
        ):
            torch.func.functional_call(layer, other, x)
    layer(x)


def test_contexts_nest_and_the_outer_ones_weights_hold() -> None:
    network = Network()
    x, labels = batch(0)
    with shared_spectral_norm(network.wide) as inner_part:
        part = network.wide.normalized_weight()
        updated = network.wide.weight_u.clone()
        with shared_spectral_norm(network):
            y = network(x, labels)
            assert torch.equal(network.wide.normalized_weight(), part)
            assert torch.equal(network.wide.weight_u, updated)
            with frozen_spectral_norm(network, iterate=True):
                assert torch.equal(network(x, labels), y)
        assert not is_shared(network.first)
        assert torch.equal(network.wide.normalized_weight(), part)
        inner_part.update()
        assert not torch.equal(network.wide.weight_u, updated)
    assert not is_shared(network.wide)


def test_a_context_in_use_is_refused() -> None:
    network = Network()
    shared = shared_spectral_norm(network)
    with shared, pytest.raises(RuntimeError, match="expected a context that is not in use"):
        shared.__enter__()


def test_another_parametrization_of_the_weight_is_a_good_neighbour() -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    layer = SNLinear(4, 3)
    parametrize.register_parametrization(layer, "weight", Double())
    original = layer.parametrizations.weight.original
    same = copy.deepcopy(layer)
    inputs = torch.randn(2, 5, 4)
    with shared_spectral_norm(layer):
        for x in inputs:
            layer(x).square().sum().backward()
    for x in inputs:
        y = same(x)
        y.square().sum().backward()
        same.eval()
        same.iterate_when_frozen = False
    weight = 2 * original / (layer.weight_u @ (2 * original) @ layer.weight_v)
    torch.testing.assert_close(y, nn.functional.linear(x, weight, layer.bias))
    torch.testing.assert_close(original.grad, same.parametrizations.weight.original.grad)


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's forward mode
@pytest.mark.parametrize("context", [shared_spectral_norm, frozen_spectral_norm])
def test_functional_transforms_and_forward_mode_take_plain_operations(
    context: Context,
) -> None:
    layer = SNLinear(4, 3, iterate_when_frozen=context is shared_spectral_norm).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    tangent = torch.randn(3, 4, dtype=torch.float64)
    identity = torch.eye(4, dtype=torch.float64)

    def transposed(weight: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, {"weight": weight}, (identity,))
        return y - layer.bias

    with context(layer):
        weight = layer.normalized_weight().detach()
        gradient = torch.func.grad(lambda x: layer(x).square().sum())(x)
        batched = torch.func.vmap(layer)(x)
        _, derivative = torch.func.jvp(transposed, (layer.weight.detach(),), (tangent,))
    y = nn.functional.linear(x, weight, layer.bias)
    torch.testing.assert_close(batched, y)
    torch.testing.assert_close(gradient, 2 * y @ weight)
    u, v = layer.weight_u, layer.weight_v
    sigma = u @ layer.weight @ v
    expected = (tangent - (u @ tangent @ v) * layer.weight / sigma) / sigma
    torch.testing.assert_close(derivative, expected.t())


def test_averaged_models_copy_the_vectors_and_none_of_the_shared_weights() -> None:
    model = Network()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.wide.weight.detach().clone()
    with shared_spectral_norm(model):
        model(*batch(0)).sum().backward()
        optimizer.step()
        average.update_parameters(model)
    assert_same(dict(average.module.named_buffers()), dict(model.named_buffers()))
    torch.testing.assert_close(average.module.wide.weight, 0.9 * before + 0.1 * model.wide.weight)
    assert average.eval()(*batch(1)).isfinite().all()


def test_activation_checkpointing_inside_takes_the_shared_weights() -> None:
    plain = Network(torch.float64)
    recomputed = copy.deepcopy(plain)
    x, labels = batch(0, torch.float64)
    with shared_spectral_norm(plain):
        plain(x, labels).square().sum().backward()
    with shared_spectral_norm(recomputed):
        checkpoint(recomputed, x, labels, use_reentrant=False).square().sum().backward()
    assert_close(gradients_of(recomputed), gradients_of(plain), 1e-13, 1e-13)
    assert_same(state_of(recomputed), state_of(plain))


def test_under_autocast_weights_are_cast_once_and_gradients_are_float32() -> None:
    network = Network()
    layerwise = copy.deepcopy(network)
    x, labels = batch(0)
    with torch.autocast("cpu", torch.bfloat16):
        with shared_spectral_norm(network):
            assert network.wide.normalized_weight().dtype == torch.bfloat16
            assert network.head.embedding.normalized_weight().dtype == torch.float32
            y = network(x, labels)
            y.float().sum().backward()
        expected = _call_once_each(layerwise, x, labels)
    expected.float().sum().backward()
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    for name, gradient in gradients_of(network).items():
        assert gradient.dtype == torch.float32
        other = dict(layerwise.named_parameters())[name].grad
        assert (gradient - other).norm() <= 0.02 * other.norm(), name
    assert_same(state_of(network), state_of(layerwise))
    with shared_spectral_norm(network, dtype=torch.float16):
        with torch.autocast("cpu", torch.float16):
            assert network.wide.normalized_weight().dtype == torch.float16
        with pytest.raises(
            RuntimeError, match=r"normalised it to torch.float16, which serves under autocast"
        ):
            network(x, labels)


@pytest.mark.usefixtures("_fresh_compiler")
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_without_graph_breaks_nothing_is_compiled_again() -> None:
    network = Network(torch.float64)
    eager = copy.deepcopy(network)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager_decomp_partition")
    optimizers = [torch.optim.SGD(each.parameters(), lr=1e-3) for each in (network, eager)]
    for step in range(3):
        for module, function in ((network, compiled), (eager, eager)):
            with shared_spectral_norm(module):
                for part in range(2):
                    function(*batch(2 * step + part, torch.float64)).square().sum().backward()
        assert_close(gradients_of(network), gradients_of(eager), 1e-10, 1e-10)
        assert_close(state_of(network), state_of(eager), 1e-10, 1e-10)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def addresses(layer: nn.Module, *, keep: list[Tensor] | None = None) -> tuple[int, int]:
    layer.weight.grad = None
    with shared_spectral_norm(layer):
        weight = layer.normalized_weight()
        weight.square().sum().backward()
        if keep is not None:
            keep += [weight.detach(), layer.weight.grad]
        return weight.data_ptr(), layer.weight.grad.data_ptr()


@pytest.fixture
def _without_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_without_garbage_collection")
def test_large_weights_and_gradients_take_the_memory_of_those_before_unless_it_is_in_use() -> None:
    layer = SNLinear(1024, 512)
    first = addresses(layer)
    assert addresses(layer) == first
    saved: list[Tensor] = []
    assert addresses(layer, keep=saved) == first
    copies = [tensor.clone() for tensor in saved]
    second = addresses(layer)
    assert set(second).isdisjoint(first)
    assert all(torch.equal(*pair) for pair in zip(saved, copies, strict=True))
    saved.clear()
    assert addresses(layer) == first
    assert layer.normalized_weight().data_ptr() % 64 == 0
    assert not layer.weight.grad._is_view()
    reference = weakref.ref(layer)
    del layer
    assert reference() is None


def test_the_explicit_form_ends_with_release() -> None:
    layer = SNLinear(4, 3)
    shared = SharedSpectralNorm(layer)
    shared.update()
    before = layer.weight_u.clone()
    layer(torch.randn(2, 4))
    assert torch.equal(layer.weight_u, before)
    shared.release()
    shared.release()
    layer(torch.randn(2, 4))
    assert not torch.equal(layer.weight_u, before)


class TestFunctionTransforms:
    """Other parameters inside the block are divided by the sigma that u and v give for them."""

    @pytest.fixture
    def net(self) -> nn.Module:
        net = nn.Sequential(SNLinear(4, 3), nn.Tanh(), SNLinear(3, 1)).double()
        converge(net)  # so that the next update changes nothing
        return net

    def test_gradients_are_those_of_autograd_and_of_single_samples_sum_to_them(self, net: nn.Module) -> None:
        parameters = {name: p.detach() for name, p in net.named_parameters()}
        x = torch.randn(5, 4).double()

        def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(net, p, (x,)).sum()

        with shared_spectral_norm(net):
            net(x).sum().backward()
            whole = torch.func.grad(loss)(parameters, x)
            samples = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:, None])
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(whole[name], parameter.grad)
            torch.testing.assert_close(samples[name].sum(0), parameter.grad)

    def test_data_of_the_parameters_is_taken_for_them(self, net: nn.Module) -> None:
        x = torch.randn(5, 4).double()
        with shared_spectral_norm(net):
            data = {name: p.data for name, p in net.named_parameters()}
            assert torch.equal(torch.func.functional_call(net, data, (x,)), net(x))
