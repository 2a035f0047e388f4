"""Two processes with a part of the batch each against one process with the whole batch (gloo, on the CPU)."""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from blocks import assert_close, assert_same, state_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sagan_layers import (
    ConditionalBatchNorm2d,
    ProjectionDiscriminatorHead,
    SelfAttention2d,
    SNConv2d,
    SNLinear,
    frozen_spectral_norm,
    hinge_discriminator_loss,
    shared_spectral_norm,
    standing_statistics,
    synchronize_batch_norm,
)

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)

CHANNELS, CLASSES, CONDITION = 3, 4, 5
SPLITS = {"equal": (4, 4), "unequal": (3, 5), "one_value_each": (1, 1)}
CONDITIONS = ["labels", "vectors", "none"]
STEPS = 3


def batch_norm(condition: str, biased: bool) -> ConditionalBatchNorm2d:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "labels": {"num_classes": CLASSES},
        "vectors": {"condition_features": CONDITION},
        "none": {},
    }[condition]
    module = ConditionalBatchNorm2d(
        CHANNELS, **options, momentum=0.3, biased_running_var=biased, dtype=torch.float64
    )
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    converted: ConditionalBatchNorm2d = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    assert isinstance(converted, ConditionalBatchNorm2d)
    assert isinstance(converted.norm, nn.SyncBatchNorm)
    return converted


def whole_batch(split: str, condition: str) -> tuple[Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(1)
    total = sum(SPLITS[split])
    size = (1, 1) if split == "one_value_each" else (2, 3)
    x = 3 * torch.randn(total, CHANNELS, *size, generator=generator, dtype=torch.float64) + 10
    weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    if condition == "labels":
        return x, torch.randint(CLASSES, (total,), generator=generator), weights
    if condition == "vectors":
        return x, torch.randn(total, CONDITION, generator=generator, dtype=torch.float64), weights
    return x, None, weights


def part_of(tensor: Tensor, sizes: tuple[int, int], rank: int | None) -> Tensor:
    return tensor if rank is None else tensor.split(sizes)[rank]


def batch_norm_pass(condition: str, split: str, biased: bool, rank: int | None) -> dict[str, Tensor]:
    """Output, first and second derivatives and statistics; ``rank`` None stands for the whole batch."""
    module = batch_norm(condition, biased)
    x, extra, weights = whole_batch(split, condition)
    sizes = SPLITS[split]
    x = part_of(x, sizes, rank).clone().requires_grad_()
    inputs = (x,) if extra is None else (x, part_of(extra, sizes, rank))
    y = module(*inputs)
    (gradient,) = torch.autograd.grad((y.pow(3) * part_of(weights, sizes, rank)).sum(), x, create_graph=True)
    results = {"output": y.detach(), "input gradient": gradient.detach()}
    (second,) = torch.autograd.grad(gradient.square().sum(), x, create_graph=True)
    results["second input gradient"] = second.detach()
    parameters = dict(module.named_parameters())
    for order, loss in (
        ("", (y.pow(3) * part_of(weights, sizes, rank)).sum()),
        ("second ", gradient.square().sum()),
    ):
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        for name, parameter_gradient in zip(parameters, gradients, strict=True):
            if parameter_gradient is not None:
                results[f"{order}parameter gradient {name}"] = parameter_gradient.detach()
    results["running_mean"] = module.norm.running_mean
    results["running_var"] = module.norm.running_var
    with torch.no_grad():
        results["evaluation output"] = module.eval()(*inputs)
    return results


class Discriminator(nn.Module):
    """Spectral norm, synchronised conditional batch norm, attention and head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = SNConv2d(2, 8, 3, padding=1)
        self.norm = ConditionalBatchNorm2d(8, CLASSES)
        self.attention = SelfAttention2d(8, gamma_init=0.7)
        self.head = ProjectionDiscriminatorHead(8, CLASSES)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.conv(images), labels))
        logits: Tensor = self.head(self.attention(h), labels)
        return logits


def train_discriminator(rank: int | None) -> dict[str, Tensor]:
    """Some steps with an updating pass over real and a frozen one over fake images before each backward."""
    torch.manual_seed(2)
    module = Discriminator().double()
    model = module if rank is None else DistributedDataParallel(module)
    # Before the wrapping, torch would refuse a SyncBatchNorm on the CPU.
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.0, 0.9))
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        parts = []
        for _ in range(2):
            images = torch.randn(6, 2, 5, 4, generator=generator, dtype=torch.float64)
            labels = torch.randint(CLASSES, (6,), generator=generator)
            parts.append((part_of(images, (3, 3), rank), part_of(labels, (3, 3), rank)))
        real_logits = model(*parts[0])
        with frozen_spectral_norm(model):
            fake_logits = model(*parts[1])
        optimizer.zero_grad()
        hinge_discriminator_loss(real_logits=real_logits, fake_logits=fake_logits).backward()
        optimizer.step()
    return state_of(module)


def train_with_shared_weights(rank: int | None) -> dict[str, Tensor]:
    """Some steps of two accumulated parts each, which share their normalised weights."""
    torch.manual_seed(5)
    module = nn.Sequential(
        SNConv2d(2, 8, 3), nn.Tanh(), SelfAttention2d(8, gamma_init=0.7), SNConv2d(8, 1, 2)
    )
    module = module.double()
    model = module if rank is None else DistributedDataParallel(module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(6)
    results = {}
    for step in range(STEPS):
        images = torch.randn(2, 6, 2, 5, 4, generator=generator, dtype=torch.float64)
        with shared_spectral_norm(model):
            for part, last in ((images[0], False), (images[1], True)):
                waits = rank is not None and not last
                with model.no_sync() if waits else contextlib.nullcontext():
                    (model(part_of(part, (3, 3), rank)).square().mean() / 2).backward()
        results |= {f"{step} grad {name}": p.grad.clone() for name, p in module.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return results | state_of(module)


def gather_standing_statistics(biased: bool, rank: int | None) -> dict[str, Tensor]:
    """Process 0 sees the first batch, process 1 the other two; one process sees all."""
    model = nn.Sequential(
        ConditionalBatchNorm2d(CHANNELS, biased_running_var=biased, dtype=torch.float64),
        SNLinear(4, 4, dtype=torch.float64),
        ConditionalBatchNorm2d(CHANNELS, biased_running_var=biased, dtype=torch.float64),
    )
    torch.manual_seed(4)
    model[1].reset_parameters()
    batches = [torch.randn(n, CHANNELS, 3, 4, dtype=torch.float64) * n + n for n in (2, 7, 4)]
    local = batches if rank is None else batches[:1] if rank == 0 else batches[1:]
    with torch.no_grad(), standing_statistics(model):
        for batch in local:
            model(batch)
    return state_of(model) | {"all values": torch.cat(batches)}


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError, match="expected") as caught:
        call()
    return str(caught.value)


def gather_nothing() -> None:
    with standing_statistics(ConditionalBatchNorm2d(CHANNELS)):
        pass


def refusals() -> dict[str, str]:
    """The messages of the errors that a process inside a group must raise."""
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    of_one = nn.SyncBatchNorm.convert_sync_batchnorm(ConditionalBatchNorm2d(CHANNELS), process_group=alone)
    of_all = synchronize_batch_norm(ConditionalBatchNorm2d(CHANNELS))
    return {
        "single value in a group of one": message_of(lambda: of_one(torch.ones(1, CHANNELS, 1, 1))),
        "single value in all processes": message_of(
            lambda: of_all(torch.ones(dist.get_rank(), CHANNELS, 1, 1))
        ),
        "nothing gathered anywhere": message_of(gather_nothing),
    }


def evaluation_of_one_process() -> bool:
    """Whether frozen statistics give evaluation's output, computed by the first process alone."""
    module = batch_norm("none", biased=False)
    x = torch.randn(2, CHANNELS, 2, 2, generator=torch.Generator().manual_seed(dist.get_rank())).double()
    module(x)
    frozen = copy.deepcopy(module)
    frozen.norm.eval()
    return dist.get_rank() > 0 or torch.equal(frozen(x), module.eval()(x))  # a collective call would hang


def uneven_batches(rank: int | None) -> dict[str, Tensor]:
    """Of sizes for which this process alone would choose different backends."""
    x = torch.randn(4, CHANNELS, 100, 100, generator=torch.Generator().manual_seed(7)).double()
    parts = {None: x, 0: x[:3], 1: x[3:]}
    local = parts[rank].clone().requires_grad_()
    module = synchronize_batch_norm(ConditionalBatchNorm2d(CHANNELS).double())
    y = module(local)
    y.pow(3).sum().backward()
    return {"y": y.detach(), "gradient": local.grad, "running_var": module.norm.running_var}


CASES = [
    (condition, split, biased) for condition in CONDITIONS for split in SPLITS for biased in (False, True)
]


def work(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world_size)
    try:
        results = {
            "batch_norm": {case: batch_norm_pass(*case, rank=rank) for case in CASES},
            "discriminator": train_discriminator(rank),
            "shared weights": train_with_shared_weights(rank),
            "standing": {biased: gather_standing_statistics(biased, rank) for biased in (False, True)},
            "refusals": refusals(),
            "uneven": uneven_batches(rank),
            "evaluation": evaluation_of_one_process(),
        }
        torch.save(results, Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def assert_equal_and_close(
    results: list[dict[str, Tensor]], expected: dict[str, Tensor], rtol: float, atol: float
) -> None:
    """Both processes have the same bits, close to those of one process."""
    assert_same(*results)
    assert_close(results[0], expected, rtol, atol)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes computed; started once, also when pytest-xdist spreads the tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two_processes"
    done = folder / "done"
    try:
        folder.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + 300
        while not done.exists():
            assert time.monotonic() < deadline, "the processes that another worker started do not end"
            time.sleep(0.1)
    else:
        try:
            torch.multiprocessing.spawn(work, args=(2, str(folder)), nprocs=2)
        finally:
            done.touch()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_synchronised_batch_norm_of_two_processes_is_that_of_the_whole_batch(
    ranks: list[dict[str, Any]], case: tuple[str, str, bool]
) -> None:
    one_process = batch_norm_pass(*case, rank=None)
    first, second = (results["batch_norm"][case] for results in ranks)
    assert first.keys() == second.keys() == one_process.keys()
    assert any(name.startswith("second parameter gradient") for name in one_process)
    for name, expected in one_process.items():
        if name.startswith("running"):
            assert torch.equal(first[name], second[name])
            actual = first[name]
        elif "parameter gradient" in name:  # of a sum over samples
            actual = first[name] + second[name]
        else:
            actual = torch.cat([first[name], second[name]])
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            actual, expected, rtol=1e-8, atol=1e-10 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_batches_of_different_sizes_are_normalised_together(ranks: list[dict[str, Any]]) -> None:
    expected = uneven_batches(rank=None)
    first, second = (results["uneven"] for results in ranks)
    for name in ("y", "gradient"):
        torch.testing.assert_close(torch.cat([first[name], second[name]]), expected[name])
    torch.testing.assert_close(first["running_var"], expected["running_var"])


def test_training_on_two_processes_is_training_on_one(ranks: list[dict[str, Any]]) -> None:
    expected = train_discriminator(rank=None)
    assert_equal_and_close([results["discriminator"] for results in ranks], expected, rtol=1e-6, atol=1e-8)
    torch.manual_seed(2)
    start = Discriminator().double().state_dict()
    changed = {name for name, value in expected.items() if not torch.equal(value, start[name])}
    assert {"conv.weight", "conv.weight_u", "norm.norm.running_var", "attention.gamma"} <= changed


def test_shared_weights_and_accumulated_gradients_are_equal_on_one_and_two_processes(
    ranks: list[dict[str, Any]],
) -> None:
    expected = train_with_shared_weights(rank=None)
    assert_equal_and_close([results["shared weights"] for results in ranks], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("biased", [False, True])
def test_standing_statistics_are_equal_on_one_and_two_processes(
    ranks: list[dict[str, Any]], biased: bool
) -> None:
    expected = gather_standing_statistics(biased, rank=None)
    first, second = (results["standing"][biased] for results in ranks)
    assert_equal_and_close([first, second], expected, rtol=1e-12, atol=1e-12)
    values = expected["all values"].transpose(0, 1).flatten(1)
    torch.testing.assert_close(first["0.norm.running_mean"], values.mean(1))
    torch.testing.assert_close(first["0.norm.running_var"], values.var(1, correction=0 if biased else 1))


def test_processes_refuse_what_one_process_refuses(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert results["refusals"] == {
            "single value in all processes": "x: expected more than one value per channel in training, got 1 in "
            "all processes",
            "single value in a group of one": "x: expected more than 1 value per channel to take batch "
            f"statistics, got [1, {CHANNELS}, 1, 1]",
            "nothing gathered anywhere": "standing statistics: expected at least one forward pass "
            "of each layer, got none",
        }


def test_evaluation_and_frozen_statistics_do_not_communicate(ranks: list[dict[str, Any]]) -> None:
    assert all(results["evaluation"] for results in ranks)


def test_conversion_keeps_the_state_and_its_names() -> None:
    module = ConditionalBatchNorm2d(CHANNELS, CLASSES)
    module(torch.randn(4, CHANNELS, 2, 2), torch.arange(4))
    before = state_of(module)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    assert_same(converted.state_dict(), before)
    x, labels = torch.randn(4, CHANNELS, 2, 2), torch.arange(4)
    assert torch.isfinite(converted(x, labels)).all()  # one process without a group works as well
