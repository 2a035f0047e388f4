"""The fused block as a differentiable function of torch: gradients, registration, and when it cannot serve."""

from __future__ import annotations

import copy

import pytest
import torch
from accuracy import assert_norms_of_errors
from torch import Tensor, nn

from sagan_layers import SelfAttention2d, functional


def pair(**options: object) -> tuple[SelfAttention2d, SelfAttention2d]:
    """A block on the fused kernels and its copy on the reference."""
    fused = SelfAttention2d(8, gamma_init=0.5, backend="fused", **options).double()
    composed = copy.deepcopy(fused)
    composed.backend = "reference"
    return fused, composed


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True},
        {"pool_size": 1, "output_projection": False},
        {"pool_size": 1, "output_projection": False, "bias": True},
        {"spectral_norm": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [False, True])
def test_output_gradients_and_updated_vectors_are_those_of_the_composed_form(
    options: dict[str, object], training: bool
) -> None:
    results = []
    torch.manual_seed(1)
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    for module in pair(**options):
        module.train(training)
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        gradients = torch.autograd.grad(y.pow(2).sum(), [leaf, *module.parameters()])
        results.append([y, *gradients, *module.buffers()])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("create_graph", [False, True])
def test_second_derivatives_are_those_of_the_composed_form(create_graph: bool) -> None:
    results = []
    x = torch.randn(1, 8, 4, 5, dtype=torch.float64)
    for module in pair(bias=True):
        module.eval()
        leaf = x.clone().requires_grad_()
        # The gradient of the output depends on x as well.
        (gradient,) = torch.autograd.grad(module(leaf).pow(3).sum(), leaf, create_graph=True)
        leaves = [leaf, *module.parameters()]
        second = torch.autograd.grad(gradient.pow(2).sum(), leaves, create_graph=create_graph)
        results.append([gradient, *second])
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-9)


def test_without_gradients_nothing_is_saved_and_the_output_is_the_same() -> None:
    fused, _ = pair()
    x = torch.randn(1, 8, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        quiet = fused.eval()(x)
    assert quiet.grad_fn is None
    assert torch.equal(quiet, fused(x))


def test_only_gamma_or_only_x_may_need_a_gradient() -> None:
    for name in ("x", "gamma"):
        results = []
        x = torch.randn(1, 8, 4, 4, dtype=torch.float64)
        for module in pair():
            module.eval().requires_grad_(False)
            leaf = module.gamma if name == "gamma" else x.clone()
            leaf.requires_grad_()
            y = module(leaf if name == "x" else x)
            results.append(torch.autograd.grad(y.pow(2).sum(), leaf, create_graph=False)[0])
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_registered_operations_pass_torchs_checks(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 8, 4, 6).to(memory_format=memory_format).requires_grad_()
    weights = [torch.randn(*shape, requires_grad=True) for shape in ((2, 8), (2, 8), (4, 8), (8, 4))]
    gamma = torch.tensor(0.5, requires_grad=True)
    biases = [torch.randn(2, requires_grad=True), None, None, torch.randn(8, requires_grad=True)]
    inputs = (x, *weights, *biases, gamma)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.sagan_layers.self_attention_2d, (*inputs, 2, True), test_utils=tests)
    y, *saved = (t.detach() for t in torch.ops.sagan_layers.self_attention_2d(*inputs, 2, True))
    plain = [None if tensor is None else tensor.detach() for tensor in inputs]
    torch.library.opcheck(
        torch.ops.sagan_layers.self_attention_2d_backward,
        (*plain, 2, torch.randn_like(y), *saved),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_the_compiled_module_is_one_graph_with_the_same_results() -> None:
    module = SelfAttention2d(8, gamma_init=0.5, backend="fused").eval()
    x = torch.randn(1, 8, 4, 4, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True)
    y = compiled(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    expected = module(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), x)[0])


class Doubled(nn.Conv2d):
    """A projection with a forward of its own, as an adapter has."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def conv(outputs: int, size: int = 1, **options: int) -> nn.Conv2d:
    return nn.Conv2d(8, outputs, size, bias=False, **options)


CHANGES = {
    "replaced": lambda module: setattr(module, "query", Doubled(8, 1, 1, bias=False)),
    "hooked": lambda module: module.value.register_forward_hook(lambda layer, args, output: output + 1),
    "wider": lambda module: setattr(module, "query", conv(1, 3, padding=1)),
    "strided": lambda module: (
        setattr(module, "key", conv(1, stride=2)),
        setattr(module, "value", conv(4, stride=2)),
    ),
    "grouped": lambda module: setattr(module, "value", conv(4, groups=2)),
    "parametrized": lambda module: nn.utils.parametrize.register_parametrization(
        module.key, "weight", Halved()
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_projections_that_are_more_than_their_weight_are_called(change: str) -> None:
    module = SelfAttention2d(8, gamma_init=0.5, spectral_norm=False)
    x = torch.randn(1, 8, 4, 4)
    before = module(x)
    CHANGES[change](module)
    after = module(x)
    assert not torch.allclose(before, after)
    gathered = functional.attention(
        module.query(x).flatten(2).mT,
        nn.functional.max_pool2d(module.key(x), 2).flatten(2).mT,
        nn.functional.max_pool2d(module.value(x), 2).flatten(2).mT,
    )
    torch.testing.assert_close(after, x + 0.5 * module.out(gathered.mT.reshape(1, 4, 4, 4)))
    module.backend = "fused"
    with pytest.raises(ValueError, match="fused: a projection is not a plain 1x1 convolution, or has hooks"):
        module(x)
    module.backend = "auto"
    with functional.force_backend("fused"), pytest.raises(ValueError, match="fused: a projection is not"):
        module(x)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [64, 128, 256, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu_the_block_is_as_accurate_as_the_composed_form(channels: int, dtype: torch.dtype) -> None:
    module = SelfAttention2d(channels, gamma_init=0.5, spectral_norm=False).cuda()
    x = torch.randn(2, channels, 32, 32, device="cuda")

    def results(backend: str, kind: torch.dtype) -> list[Tensor]:
        run = copy.deepcopy(module).to(kind)
        run.backend = backend
        leaf = x.to(dtype).to(kind).requires_grad_()
        y = run(leaf)
        return [y, *torch.autograd.grad(y.square().mean(), [leaf, *run.parameters()])]

    with functional.record_backends() as served:
        try:
            ours = results("fused", dtype)
        except ValueError as refusal:
            pytest.skip(str(refusal))
    assert served == ["fused"]
    plain, exact = results("reference", dtype), results("reference", torch.float64)
    assert_norms_of_errors(ours, plain, exact, 4 * torch.finfo(dtype).eps)
