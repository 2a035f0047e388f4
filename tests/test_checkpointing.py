"""Activation checkpointing repeats a block: nothing moves twice, and gradients are those without it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sagan_layers import (
    ConditionalBatchNorm2d,
    SNConv2d,
    checkpointed,
    frozen_running_statistics,
    shared_spectral_norm,
    synchronize_batch_norm,
)


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


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_and_buffers_are_those_without_it(shared: bool) -> None:
    block = Block()
    plain = copy.deepcopy(block)
    x, labels = inputs()
    for _ in range(2):
        if shared:
            with shared_spectral_norm(block):
                checkpointed(block, x, labels).square().sum().backward()
        else:
            checkpointed(block, x, labels).square().sum().backward()
    mine, x.grad = x.grad, None
    for _ in range(2):
        plain(x, labels).square().sum().backward()
    assert torch.equal(mine, x.grad)
    for one, other in zip(block.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    for (name, one), other in zip(block.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other), name


def test_it_keeps_fewer_activations() -> None:
    def kept(run) -> int:  # type: ignore[no-untyped-def]
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        block = Block()
        x, labels = inputs()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run(block, x, labels)
        return sum(sizes)

    assert kept(checkpointed) < 0.3 * kept(lambda block, *args: block(*args))


def test_second_derivatives_work() -> None:
    block = Block().double()
    x, labels = torch.randn(2, 4, 4, 4, dtype=torch.double, requires_grad=True), torch.tensor([0, 1])
    with frozen_running_statistics(block), shared_spectral_norm(block):
        results = []
        for run in (checkpointed, lambda module, *args: module(*args)):
            (gradient,) = torch.autograd.grad(run(block, x, labels).square().sum(), x, create_graph=True)
            results.append(torch.autograd.grad(gradient.square().sum(), x)[0])
    torch.testing.assert_close(results[0], results[1])


def test_inside_compile_it_is_refused() -> None:
    with pytest.raises(Exception, match=r"expected eager code, got torch\.compile"):
        torch.compile(lambda module, x: checkpointed(module, x), backend="eager", fullgraph=True)(
            nn.Linear(2, 2), torch.ones(2)
        )
    torch.compiler.reset()


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

    def test_evaluation_is_as_always(self) -> None:
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
        assert copy.deepcopy(norm)._synchronized == (None,)

    def test_a_module_without_such_layers_is_refused(self) -> None:
        with pytest.raises(ValueError, match="expected a ConditionalBatchNorm2d in the module, found none"):
            synchronize_batch_norm(nn.Sequential(nn.BatchNorm2d(3)))
