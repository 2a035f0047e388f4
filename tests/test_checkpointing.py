"""Activation checkpointing: nothing is updated twice, and gradients are those without it."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from blocks import assert_close, assert_same, gradients_of, state_of
from dispatched import saved_tensors
from torch import Tensor, nn

from sagan_layers import (
    ConditionalBatchNorm2d,
    DiscriminatorPass,
    GeneratorPass,
    SNConv2d,
    call_with_constant_parameters,
    checkpointed,
    frozen_running_statistics,
    frozen_spectral_norm,
    shared_spectral_norm,
    synchronize_batch_norm,
)
from sagan_layers.spectral_norm import SpectralNormRecord, recording_spectral_norm, replaying_spectral_norm


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = ConditionalBatchNorm2d(4, 3, momentum=0.3)
        self.conv1 = SNConv2d(4, 6, 3, padding=1)
        self.conv2 = SNConv2d(6, 4, 3, padding=1)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        y: Tensor = self.conv2(torch.tanh(self.conv1(self.norm(x, labels))))
        return y


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 4, 5, 5, requires_grad=True), torch.tensor([0, 2, 1])


either_sharing = pytest.mark.parametrize(
    "sharing", [shared_spectral_norm, lambda _: contextlib.nullcontext()], ids=["shared", "alone"]
)


@either_sharing
def test_gradients_and_buffers_are_those_without_it(sharing: Context) -> None:
    block = Block()
    plain = copy.deepcopy(block)
    x, labels = inputs()
    for _ in range(2):
        with sharing(block):
            checkpointed(block, x, labels).square().sum().backward()
    ours, x.grad = x.grad, None
    for _ in range(2):
        plain(x, labels).square().sum().backward()
    assert torch.equal(ours, x.grad)
    assert_same(gradients_of(block), gradients_of(plain))
    assert_same(state_of(block), state_of(plain))


Run = Callable[..., Tensor]
Use = Callable[[Run, nn.Module, Tensor], None]
Context = Callable[[nn.Module], contextlib.AbstractContextManager[object]]


def plainly(module: nn.Module, *inputs: Tensor) -> Tensor:
    y: Tensor = module(*inputs)
    return y


class Holder(nn.Module):
    """A network of one block, which it calls by ``run``."""

    def __init__(self, block: nn.Module, run: Run) -> None:
        super().__init__()
        self.block, self.run = block, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.block, x)


def loss_of(y: Tensor) -> Tensor:
    return y.float().square().sum()


def in_contexts(*forward: Context, backward: Context = lambda block: contextlib.nullcontext()) -> Use:
    """Forward inside some contexts, backward after them, in its own."""

    def use(run: Run, block: nn.Module, x: Tensor) -> None:
        with contextlib.ExitStack() as stack:
            for context in forward:
                stack.enter_context(context(block))
            loss = loss_of(run(block, x))
        with backward(block):
            loss.backward()

    return use


def with_options(**options: object) -> Use:
    def use(run: Run, block: nn.Module, x: Tensor) -> None:
        for layer in block:
            for name, value in options.items():
                setattr(layer, name, value)
        loss_of(run(block.train(options.get("training", True)), x)).backward()

    return use


def shared_and_then_updated(run: Run, block: nn.Module, x: Tensor) -> None:
    with shared_spectral_norm(block):
        loss = loss_of(run(block, x))
    block(x.detach())
    loss.backward()


def two_calls_before_backward(run: Run, block: nn.Module, x: Tensor) -> None:
    (loss_of(run(block, x)) + 3 * loss_of(run(block, 2 * x))).backward()


def one_layer_twice(run: Run, block: nn.Module, x: Tensor) -> None:
    loss_of(run(nn.Sequential(block[1], block[1]), x)).backward()


def a_block_in_a_block(run: Run, block: nn.Module, x: Tensor) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = block

        def forward(self, x: Tensor) -> Tensor:
            return run(self.inner, torch.tanh(run(self.inner[1], x)))

    outer = Outer()
    (loss_of(run(outer, x)) + loss_of(run(outer, 2 * x))).backward()


def constant_parameters(run: Run, block: nn.Module, x: Tensor) -> None:
    loss_of(call_with_constant_parameters(Holder(block, run), x)).backward()


USES: dict[str, Use] = {
    "frozen": in_contexts(frozen_spectral_norm),
    "frozen_and_shared": in_contexts(frozen_spectral_norm, shared_spectral_norm),
    "autocast_and_shared": in_contexts(lambda _: torch.autocast("cpu", torch.bfloat16), shared_spectral_norm),
    "backward_frozen": in_contexts(backward=lambda block: frozen_spectral_norm(block, iterate=True)),
    "backward_shared": in_contexts(backward=shared_spectral_norm),
    "evaluation": with_options(training=False),
    "evaluation_without_iterating": with_options(training=False, iterate_when_frozen=False),
    "three_iterations": with_options(n_power_iterations=3),
    **{
        use.__name__: use
        for use in (
            shared_and_then_updated,
            two_calls_before_backward,
            one_layer_twice,
            a_block_in_a_block,
            constant_parameters,
        )
    },
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_however_it_is_used_nothing_differs(use: Use, dtype: torch.dtype) -> None:
    block = nn.Sequential(SNConv2d(4, 4, 3, padding=1), SNConv2d(4, 4, 3, padding=1)).to(dtype)
    x = torch.randn(2, 4, 5, 5, dtype=dtype)
    found = []
    for run in (checkpointed, plainly):
        copied, leaf = copy.deepcopy(block), x.clone().requires_grad_()
        for _ in range(2):
            use(run, copied, leaf)
        found.append([leaf.grad, *(parameter.grad for parameter in copied.parameters()), *copied.buffers()])
    assert found[0][0].ne(0).any()
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@either_sharing
def test_a_discriminator_of_such_blocks_serves_the_generators_pass(sharing: Context) -> None:
    block = nn.Sequential(SNConv2d(4, 6, 3), SNConv2d(6, 1, 3))
    generator, latents = SNConv2d(2, 4, 3), torch.randn(3, 2, 9, 9)
    results = []
    for run in (checkpointed, plainly):
        g, d = copy.deepcopy(generator), Holder(copy.deepcopy(block), run)
        with sharing(d):
            loss = GeneratorPass(g, d)(latents).loss
        loss.backward()
        assert all(parameter.grad is None for parameter in d.parameters())
        results.append([loss, g.weight.grad, *d.buffers()])
    assert results[0][1].ne(0).any()
    assert all(map(torch.equal, *results))


@either_sharing
@pytest.mark.parametrize("name", ["0.weight", "1.bias"])
def test_a_parameter_that_has_changed_before_backward_is_an_error(name: str, sharing: Context) -> None:
    block = nn.Sequential(SNConv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Tanh())
    with sharing(block):
        loss = loss_of(checkpointed(block, torch.randn(2, 4, 6, 6)))
    with torch.no_grad():
        block.get_parameter(name).add_(1)
    with pytest.raises(RuntimeError, match=rf"checkpointed: {name} changed since"):
        loss.backward()


def test_a_layer_called_more_often_than_recorded_is_an_error() -> None:
    layer, record, x = SNConv2d(3, 3, 3), SpectralNormRecord(), torch.randn(2, 3, 8, 8)
    with recording_spectral_norm(layer, record):
        layer(x)
    with replaying_spectral_norm(record):
        layer(x)
        with pytest.raises(RuntimeError, match="no more forwards of the layer than were recorded"):
            layer(x)


def test_running_statistics_updated_since_an_evaluation_are_an_error() -> None:
    block, x = nn.Sequential(SNConv2d(3, 3, 3), ConditionalBatchNorm2d(3)), torch.randn(2, 3, 8, 8)
    loss = loss_of(checkpointed(block.eval(), x))
    block.train()(x + 5)
    block.eval()
    with pytest.raises(RuntimeError, match=r"checkpointed: 1\.norm\.running_mean, .* changed since"):
        loss.backward()


def test_buffers_of_functional_call_are_those_of_the_second_pass_too() -> None:
    block = nn.Sequential(SNConv2d(3, 3, 3, padding=1), ConditionalBatchNorm2d(3), nn.Tanh())
    net, x = Holder(block, plainly).eval(), torch.randn(2, 3, 8, 8)
    buffers = {
        name: torch.full_like(buffer, 9.0) if "running" in name else buffer
        for name, buffer in net.named_buffers()
    }
    gradients = []
    for net.run in (plainly, checkpointed):
        net.zero_grad()
        loss_of(torch.func.functional_call(net, (dict(net.named_parameters()), buffers), (x,))).backward()
        gradients.append(net.block[0].weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("kind", [GeneratorPass, DiscriminatorPass])
def test_a_pass_is_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(TypeError, match="expected a block of a network, got a pass"):
        checkpointed(kind(nn.Linear(2, 3), nn.Linear(3, 1)), torch.ones(2, 2))


def test_a_block_that_takes_another_path_the_second_time_is_an_error() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.calls = SNConv2d(4, 4, 3, padding=1), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            for _ in range(self.calls):
                x = torch.tanh(self.conv(x)) if self.calls == 1 else self.conv(torch.tanh(x))
            return x

    loss = loss_of(checkpointed(Fickle(), torch.randn(2, 4, 5, 5, requires_grad=True)))
    with pytest.raises(RuntimeError):
        loss.backward()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # dynamo's, where a graph breaks
def test_a_block_that_is_compiled_itself_repeats_its_weights_too() -> None:
    block = nn.Sequential(SNConv2d(4, 4, 3), nn.Tanh(), SNConv2d(4, 4, 3))
    plain, x = copy.deepcopy(block), torch.randn(2, 4, 7, 7)
    block.compile(backend="aot_eager")
    for _ in range(2):
        (loss_of(checkpointed(block, x)) + loss_of(checkpointed(block, 2 * x))).backward()
        (loss_of(plain(x)) + loss_of(plain(2 * x))).backward()
    assert_close(gradients_of(block), gradients_of(plain), rtol=1.3e-6, atol=1e-5)
    assert_same(dict(block.named_buffers()), dict(plain.named_buffers()))


def test_it_saves_fewer_activations() -> None:
    def saved(run: Run) -> int:
        with saved_tensors() as tensors:
            run(Block(), *inputs())
        return sum(tensor.numel() for tensor in tensors)

    assert saved(checkpointed) < 0.3 * saved(plainly)


def test_second_derivatives_work() -> None:
    block = Block().double()
    x, labels = torch.randn(2, 4, 4, 4, dtype=torch.double, requires_grad=True), torch.tensor([0, 1])
    with frozen_running_statistics(block), shared_spectral_norm(block):
        results = []
        for run in (checkpointed, plainly):
            (gradient,) = torch.autograd.grad(run(block, x, labels).square().sum(), x, create_graph=True)
            results.append(torch.autograd.grad(gradient.square().sum(), x)[0])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.usefixtures("_fresh_compiler")
def test_inside_compile_it_is_refused() -> None:
    compiled = torch.compile(lambda module, x: checkpointed(module, x), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"expected eager code, got torch\.compile|Observed exception"):
        compiled(nn.Linear(2, 2), torch.ones(2))


class TestFrozenRunningStatistics:
    def test_batch_statistics_normalise_and_nothing_is_recorded(self) -> None:
        norm = ConditionalBatchNorm2d(4, momentum=None)
        plain = copy.deepcopy(norm)
        x = torch.randn(3, 4, 5, 5) * 3 + 7
        with frozen_running_statistics(norm):
            frozen = norm(x)
            with frozen_running_statistics(norm):
                norm(x)
            norm(x * float("nan"))
        assert torch.equal(frozen, plain(x))
        assert norm.norm.running_mean.eq(0).all()
        assert norm.norm.running_var.eq(1).all()
        assert norm.norm.num_batches_tracked == 0
        norm(x)
        assert norm.norm.num_batches_tracked == 1
        assert norm.norm.running_mean.ne(0).all()

    def test_evaluation_does_not_change(self) -> None:
        norm = ConditionalBatchNorm2d(4)
        norm(torch.randn(3, 4, 5, 5) + 2)
        norm.eval()
        x = torch.randn(3, 4, 5, 5)
        expected = norm(x)
        with frozen_running_statistics(norm):
            assert torch.equal(norm(x), expected)

    def test_copies_made_inside_are_not_frozen(self) -> None:
        norm = ConditionalBatchNorm2d(4)
        with frozen_running_statistics(norm):
            other = copy.deepcopy(norm)
            other(torch.randn(3, 4, 5, 5))
        assert other.norm.num_batches_tracked == 1


class TestSynchronize:
    def test_it_changes_neither_state_nor_results_of_one_process(self) -> None:
        norm = ConditionalBatchNorm2d(4, 3)
        x, labels = inputs()
        expected, names = copy.deepcopy(norm)(x, labels), list(norm.state_dict())
        assert synchronize_batch_norm(norm) is norm
        assert torch.equal(norm(x, labels), expected)
        assert list(norm.state_dict()) == names
        assert copy.deepcopy(norm)._synchronized is norm._synchronized
        assert pickle.loads(pickle.dumps(norm))._synchronized.group is None

    def test_a_module_without_such_layers_is_refused(self) -> None:
        with pytest.raises(ValueError, match="expected a ConditionalBatchNorm2d in the module, found none"):
            synchronize_batch_norm(nn.Sequential(nn.BatchNorm2d(3)))
