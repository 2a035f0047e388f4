"""What people do with any nn.Module, and expect to work: every block of tests/blocks.py, and large maps."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import BLOCKS, CLASSES, CONDITION, Block, build, draw_inputs, state_of
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from sagan_layers import (
    ConditionalBatchNorm2d,
    SelfAttention2d,
    SNConv2d,
    frozen_running_statistics,
    frozen_spectral_norm,
    functional,
    shared_spectral_norm,
)


def _large(*shape: int) -> Callable[[int, torch.Generator], tuple[Tensor, ...]]:
    return lambda batch, generator: (torch.randn(batch, *shape, generator=generator),)


# Maps so large that "auto" takes the backends made for them.
LARGE = [
    Block("large_batch_norm", lambda **to: ConditionalBatchNorm2d(8, **to), _large(8, 64, 64), ()),
    Block("large_attention", lambda **to: SelfAttention2d(8, gamma_init=0.7, **to), _large(8, 34, 34), ()),
]
every_block = pytest.mark.parametrize("block", [*BLOCKS, *LARGE], ids=lambda block: block.name)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
REMEDIES = "enter shared_spectral_norm|enter frozen_running_statistics"


class Tagged(Tensor):
    """A subclass that changes nothing, as those of libraries that mark images and masks."""


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def loss_of(module: nn.Module) -> Callable[..., Tensor]:
    def loss(parameters: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(module, parameters, inputs)
        return output.square().sum()

    return loss


def gradients_of(module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    found = torch.autograd.grad(module(*inputs).square().sum(), list(module.parameters()))
    return dict(zip(dict(module.named_parameters()), found, strict=True))


def assert_close(ours: Any, expected: Any) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@every_block
def test_vmap_over_inputs_and_labels_gives_each_call(block: Block) -> None:
    module = build(block).eval()
    calls = [draw_inputs(block, seed=seed) for seed in range(2)]
    batched = torch.func.vmap(module)(*(torch.stack(each) for each in zip(*calls, strict=True)))
    assert_close(batched, torch.stack([module(*inputs) for inputs in calls]))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # in torch itself
@every_block
@pytest.mark.parametrize("way", ["torch.func", "dual numbers"])
def test_forward_mode_agrees_with_reverse_mode(block: Block, way: str) -> None:
    module = build(block).eval()
    inputs, parameters = draw_inputs(block, batch=2), parameters_of(module)
    loss = loss_of(module)
    tangents = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}
    if way == "torch.func":
        _, derivative = torch.func.jvp(lambda values: loss(values, *inputs), (parameters,), (tangents,))
    else:
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(parameters[name], tangents[name]) for name in parameters}
            derivative = forward_ad.unpack_dual(loss(duals, *inputs)).tangent
    gradients = gradients_of(module, inputs)
    expected = torch.stack([(gradients[name] * tangents[name]).sum() for name in gradients]).sum()
    torch.testing.assert_close(derivative, expected, rtol=1e-3, atol=1e-3)


@every_block
def test_gradients_of_single_samples_are_those_of_single_calls(block: Block) -> None:
    module, inputs = build(block).eval(), draw_inputs(block, batch=2)
    per_sample = torch.func.vmap(torch.func.grad(loss_of(module)), (None, *(0 for _ in inputs)))
    found = per_sample(parameters_of(module), *(x.unsqueeze(1) for x in inputs))
    for sample in range(2):
        expected = gradients_of(module, tuple(x[sample : sample + 1] for x in inputs))
        assert_close({name: gradient[sample] for name, gradient in found.items()}, expected)


@every_block
@both_modes
@pytest.mark.parametrize("way", ["is_grads_batched", "with a graph", "vmap"])
def test_a_batch_of_gradients_is_each_of_them(block: Block, training: bool, way: str) -> None:
    module = build(block).train(training)
    y = module(*draw_inputs(block, batch=2))
    cotangents, parameters = torch.randn(2, *y.shape), list(module.parameters())

    def gradients(cotangent: Tensor, **options: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, parameters, cotangent, retain_graph=True, **options)

    if way == "vmap":
        batched = torch.func.vmap(gradients)(cotangents)
    else:
        batched = gradients(cotangents, is_grads_batched=True, create_graph=way == "with a graph")
    single = [gradients(cotangent) for cotangent in cotangents]
    assert_close(list(batched), [torch.stack(each) for each in zip(*single, strict=True)])


@every_block
def test_a_transform_in_training_names_the_remedy_and_the_remedies_work(block: Block) -> None:
    module, inputs = build(block).train(), draw_inputs(block)
    before = state_of(module)
    trained = copy.deepcopy(module)
    trained(*inputs)
    moves = any(not torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    gradient = torch.func.grad(loss_of(module))
    if moves:
        with pytest.raises(RuntimeError, match=REMEDIES) as raised:
            gradient(parameters_of(module), *inputs)
        if isinstance(module, ConditionalBatchNorm2d):
            assert "frozen_running_statistics(model)" in str(raised.value)
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name]), name
    with frozen_running_statistics(module), shared_spectral_norm(module):
        ours = gradient(parameters_of(module), *inputs)
        assert_close(ours, gradients_of(module, inputs))
    with frozen_running_statistics(module), frozen_spectral_norm(module):
        assert_close(gradient(parameters_of(module), *inputs), gradients_of(module, inputs))


@every_block
@both_modes
def test_tensor_subclasses_pass_through(block: Block, training: bool) -> None:
    module, inputs = build(block).train(training), draw_inputs(block)
    expected = copy.deepcopy(module)(*inputs)
    tagged = tuple(x.clone().as_subclass(Tagged).requires_grad_(x.is_floating_point()) for x in inputs)
    y = module(*tagged)
    assert (
        type(y) is Tagged or block.name == "embedding"
    )  # as torch's: its indices have no part in the values
    assert_close(y.as_subclass(Tensor), expected)
    y.square().sum().backward()
    assert all(x.grad is not None for x in tagged if x.is_floating_point())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@every_block
def test_a_trace_passes_its_check_and_computes_the_same_after_loading(block: Block) -> None:
    module = build(block).eval()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, draw_inputs(block)), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for batch in (3, 2):
        inputs = draw_inputs(block, batch=batch, seed=1)
        assert_close(loaded(*inputs), module(*inputs))


@every_block
def test_make_fx_records_plain_operations_that_compute_the_same(block: Block) -> None:
    module, inputs = build(block).eval(), draw_inputs(block)
    recorded = make_fx(lambda *tensors: module(*tensors))(*inputs)
    assert_close(recorded(*inputs), module(*inputs))
    assert not any("sagan_layers" in str(node.target) for node in recorded.graph.nodes)


class Network(nn.Module):
    """A block inside a network."""

    def __init__(self, block: nn.Module, inputs: int) -> None:
        super().__init__()
        self.block = block
        self.inputs = inputs

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return torch.tanh(self.block(x) if self.inputs == 1 else self.block(x, condition))


@every_block
@both_modes
def test_symbolic_trace_of_a_network_calls_the_block_in_every_mode(block: Block, training: bool) -> None:
    inputs = draw_inputs(block)
    network = Network(build(block).train(training), len(inputs))
    eager, before = copy.deepcopy(network), state_of(network)
    traced = torch.fx.symbolic_trace(network)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["block"]
    assert_close(traced.state_dict(), before)
    for mode in (training, not training):  # buffers move in training
        assert_close(traced.train(mode)(*inputs), eager.train(mode)(*inputs))
    assert_close(traced.state_dict(), eager.state_dict())


def test_symbolic_trace_of_what_cannot_be_a_leaf_names_the_remedy() -> None:
    class Doubled(SNConv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class OwnLeaves(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, Doubled) or super().is_leaf_module(m, module_qualified_name)

    doubled, x = Doubled(3, 4, 3).eval(), torch.randn(2, 3, 5, 5)
    for network in (SNConv2d(3, 4, 3), nn.Sequential(doubled)):
        with pytest.raises(
            TypeError, match=r"trace torch\.nn\.Sequential\(module\), or pass a torch\.fx\.Tracer whose"
        ):
            torch.fx.symbolic_trace(network)
    network = nn.Sequential(doubled)
    assert_close(torch.fx.GraphModule(network, OwnLeaves().trace(network))(x), doubled(x))
    with pytest.raises(
        TypeError, match=r"got a Proxy of torch\.fx; call the function in a module that is a leaf"
    ):
        torch.fx.symbolic_trace(lambda query: functional.attention(query, query, query))


def test_labels_are_not_read_while_a_transform_runs() -> None:
    norm = ConditionalBatchNorm2d(4, CLASSES).eval()
    with pytest.raises(ValueError, match="labels: expected values from 0 to 4"):
        norm(torch.randn(2, 4, 3, 3), torch.tensor([0, CLASSES]))


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "labels": {"num_classes": CLASSES},
    "labels and an offset": {"num_classes": CLASSES, "gain_offset": 1.0},
    "vectors": {"condition_features": CONDITION},
    "normalised vectors": {"condition_features": CONDITION, "spectral_norm": True},
}
every_form = pytest.mark.parametrize("form", FORMS)
copies = pytest.mark.parametrize(
    "duplicate",
    [
        lambda module: module,
        copy.deepcopy,
        lambda module: pickle.loads(pickle.dumps(module)),
        lambda module: module.to(torch.float64),
    ],
    ids=["itself", "deepcopy", "pickle", "to"],
)


def coefficients_of(norm: ConditionalBatchNorm2d) -> tuple[Tensor, Tensor]:
    """Gain and bias, read off the output: of a normalised 0 and of a normalised 1."""
    norm.eval()
    dtype = next(norm.parameters()).dtype
    condition: Tensor | None = None
    if norm.num_classes is not None:
        condition = torch.arange(CLASSES)
    elif norm.condition_features is not None:
        condition = torch.randn(CLASSES, CONDITION, dtype=dtype)
    zeros = torch.zeros(CLASSES, norm.num_features, 1, 1, dtype=dtype)
    bias = norm(zeros, condition)
    return norm(zeros + (1 + norm.eps) ** 0.5, condition) - bias, bias


def dcgan(module: nn.Module) -> None:
    """The initialisation of DCGAN's example code, as it is usually copied."""
    if "BatchNorm" in type(module).__name__:
        nn.init.normal_(module.weight.data, 1.0, 0.02)
        nn.init.constant_(module.bias.data, 0)


def as_resnet(network: nn.Module) -> None:
    """The initialisation of torchvision's ResNet."""
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.constant_(module.weight, 1)
            nn.init.constant_(module.bias, 0)


@every_form
@copies
def test_initialisers_draw_gains_around_one_and_biases_of_zero(
    form: str, duplicate: Callable[[nn.Module], nn.Module]
) -> None:
    norm = duplicate(ConditionalBatchNorm2d(256, **FORMS[form]))
    assert isinstance(norm, ConditionalBatchNorm2d)
    names = list(norm.state_dict())
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 5.0, 3.0)
    norm.apply(dcgan)
    gain, bias = coefficients_of(norm)
    assert gain.mean().item() == pytest.approx(1, abs=0.1)
    assert 0.005 < gain.std().item() < 1.5
    assert torch.count_nonzero(bias) == 0
    as_resnet(norm)
    gain, bias = coefficients_of(norm)
    torch.testing.assert_close(gain, torch.ones_like(gain))
    assert torch.count_nonzero(bias) == 0
    assert list(norm.state_dict()) == names == list(ConditionalBatchNorm2d(256, **FORMS[form]).state_dict())


def test_what_stands_for_projected_gains_refuses_what_it_cannot_pass_on() -> None:
    norm = ConditionalBatchNorm2d(8, condition_features=8)
    before = norm.weight_projection.weight.clone()
    with pytest.raises(TypeError, match="optimizer can only optimize Tensors"):
        torch.optim.SGD([norm.weight], lr=0.1)
    torch.testing.assert_close(norm.weight.clone(), before + 1)
    assert torch.equal(norm.weight_projection.weight, before)
    norm.weight.data = values = torch.randn(8, 8) + 1
    assert torch.equal(norm.weight_projection.weight, values - 1)
    norm.norm.weight.requires_grad = False
    norm.norm.bias.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in norm.parameters())
    assert norm.weight.requires_grad is False


@pytest.mark.parametrize(
    "write",
    [
        nn.init.orthogonal_,
        lambda weight: nn.init.trunc_normal_(weight, 1.0),
        nn.init.zeros_,
        lambda weight: nn.init.constant_(weight.data, 0.5),
        lambda weight: weight.data.mul_(0.5),
        lambda weight: weight.data.__setitem__(slice(None), 0.5),
    ],
)
def test_values_that_would_become_random_gains_name_the_projection(write: Callable[[Any], Any]) -> None:
    norm = ConditionalBatchNorm2d(8, condition_features=8)
    with pytest.raises(
        (TypeError, ValueError), match=r"^weight: .* initialise weight_projection\.weight instead"
    ):
        write(norm.weight)
    with pytest.raises(
        ValueError, match=r"bias: expected values around 0, got a mean of 0.25; .*bias_projection"
    ):
        nn.init.constant_(norm.norm.bias, 0.25)


@every_form
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_that_would_have_no_effect_is_refused(form: str, name: str) -> None:
    norm = ConditionalBatchNorm2d(8, **FORMS[form])
    names = list(norm.state_dict())
    with pytest.raises(
        TypeError, match=f"norm.{name}: expected no parameter of its own; set {name} of the layer"
    ):
        setattr(norm.norm, name, nn.Parameter(torch.ones(8)))
    if norm.condition_features is not None:
        with pytest.raises(TypeError, match=rf"^{name}: .* set {name}_projection\.weight"):
            setattr(norm, name, nn.Parameter(torch.ones(8)))
    else:
        setattr(norm, name, nn.Parameter(torch.full(getattr(norm, name).shape, 3.0)))
        assert torch.equal(getattr(norm.norm, name).clone(), getattr(norm, name).clone())
    assert list(norm.state_dict()) == names


@pytest.mark.parametrize("options", [*FORMS.values(), {"activation": "relu"}], ids=str)
@pytest.mark.parametrize("which", ["layer", "child"])
def test_plain_batch_norm_fuses_and_the_others_refuse(options: dict[str, Any], which: str) -> None:
    conv, norm = SNConv2d(3, 8, 3).eval(), ConditionalBatchNorm2d(8, **options).eval()
    for parameter in (*norm.parameters(), norm.norm.running_mean):
        nn.init.uniform_(parameter, 0.5, 2)
    read = norm if which == "layer" else norm.norm
    if options:
        with pytest.raises(
            TypeError, match="bn: expected a batch norm without condition and activation to fuse"
        ):
            nn.utils.fuse_conv_bn_eval(conv, read)
    else:
        x = torch.randn(2, 3, 5, 5)
        assert_close(nn.utils.fuse_conv_bn_eval(conv, read)(x), norm(conv(x)))


@every_form
def test_splitters_of_weight_decay_find_gains_and_biases_of_batch_norm(form: str) -> None:
    network = nn.Sequential(SNConv2d(3, 8, 3), ConditionalBatchNorm2d(8, **FORMS[form]))
    projections = {name for name, _ in network.named_parameters() if "projection" in name}
    for is_norm in (
        lambda module: "Norm" in type(module).__name__,
        lambda module: isinstance(module, (nn.BatchNorm2d, ConditionalBatchNorm2d)),
    ):
        decayed, free = set(), set()
        for prefix, module in network.named_modules():
            for name, _ in module.named_parameters(recurse=False):
                to = free if is_norm(module) or name == "bias" else decayed
                to.add(f"{prefix}.{name}")
        assert decayed == {"0.weight", *projections}  # projections are linear layers
        assert free == {"0.bias", *(() if projections else ("1.weight", "1.bias"))}


def test_an_older_pickle_of_the_whole_module_is_still_read() -> None:
    norm = ConditionalBatchNorm2d(4, condition_features=3)
    state = norm.__getstate__() | {"weight": None, "bias": None}
    state["_modules"] = {**state["_modules"], "norm": nn.BatchNorm2d(4, affine=False)}
    older = ConditionalBatchNorm2d.__new__(ConditionalBatchNorm2d)
    older.__setstate__(state)
    x, vectors = torch.randn(2, 4, 3, 3), torch.randn(2, 3)
    assert torch.equal(older.eval()(x, vectors), norm.eval()(x, vectors))
    nn.init.ones_(older.weight)
    assert torch.count_nonzero(older.weight_projection.weight) == 0


def test_the_large_blocks_take_the_backends_made_for_them() -> None:
    with functional.record_backends() as served:
        for block in LARGE:
            build(block)(*draw_inputs(block))
    assert {"blocked", "chunked"} <= set(served)
