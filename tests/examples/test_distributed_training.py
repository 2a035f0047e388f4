"""Training on 1, 2 and 4 processes (gloo, on the CPU) is the same training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from several_processes import results_by_rank
from test_losses import hinge_with_r1
from torch import Tensor
from training_runs import set_gammas

from sagan.data import ResumableBatchSampler
from sagan.distributed import (
    ProcessesDisagreeError,
    World,
    check_agreement,
    init_world,
    running_statistics,
)
from sagan.errors import UserError
from sagan.networks import NetworkConfig
from sagan.recipes import RunConfig, StepConfig
from sagan.train.losses import LOSSES, Losses, negative_logits
from sagan.train.update import Trainer

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)

COUNTS = (2, 4)
BATCH = 8
CASES = ("plain", "accumulated", "steps", "gradient penalty", "separate statistics")


def config_of(case: str) -> RunConfig:
    return RunConfig(
        recipe="best_known",
        batch_size=BATCH,
        accumulation=2 if case == "accumulated" else 1,
        d_steps=2 if case == "steps" else 1,
        d_vectors_move_in_g_step=case == "steps",
        ema_decay=0.8,
        device="cpu",
        network=NetworkConfig(
            resolution=32,
            base_width=2,
            num_classes=3,
            latent_dim=6,
            g_attention=(16,),
            d_attention=(8,),
            bn_momentum=0.1,
        ),
        step=StepConfig(sync_batch_norm=case != "separate statistics"),
    )


class Batches(Iterator[tuple[Tensor, Tensor]]):
    """This process's share of the parts of global batches, which are the same for any number of processes."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self.config, self.world = config, world
        self.part = 0
        self.random = torch.Generator().manual_seed(1)

    def __next__(self) -> tuple[Tensor, Tensor]:
        parts = self.config.accumulation
        size = BATCH // parts
        images = torch.randint(256, (size, 3, 32, 32), generator=self.random, dtype=torch.uint8)
        labels = torch.randint(3, (size,), generator=self.random)
        return self.world.shard(images, 0, 1), self.world.shard(labels, 0, 1)


def train(case: str, world: World) -> dict[str, Tensor]:
    """Two iterations in float64; gradients of both networks after the first, and everything after the second."""
    config = config_of(case)
    losses = {"hinge": Losses(hinge_with_r1, negative_logits)} if case == "gradient penalty" else {}
    with mock.patch.dict(LOSSES, losses):
        trainer = Trainer(config, torch.arange(3), world)
    set_gammas(trainer)
    batches = Batches(config, world)
    trainer.step(batches)
    results = {
        f"{name} gradient {parameter}": tensor.grad.clone()
        for name, network in (("G", trainer.generator), ("D", trainer.discriminator))
        for parameter, tensor in network.named_parameters()
        if tensor.grad is not None
    }
    trainer.step(batches)
    for name, network in trainer.networks.items():
        results |= {f"{name} {key}": value.clone() for key, value in network.state_dict().items()}
    results |= {
        name: torch.tensor(value) for name, value in world.mean_over_ranks(trainer.means.now()).items()
    }
    check_agreement(world, trainer.networks)
    return results


def disagreement(world: World) -> str:
    """What is said when process 1 holds another vector and other statistics."""
    trainer = Trainer(config_of("plain"), torch.arange(3), world)
    if world.rank == 1:
        trainer.discriminator.blocks[0].conv1.weight_u[0] += 1e-12
        running_statistics(trainer.generator)[0][0] += 1e-12
    try:
        check_agreement(world, {"G": trainer.generator, "D": trainer.discriminator})
    except ProcessesDisagreeError as error:
        return str(error)
    return "nothing"


def work(world: World) -> dict[str, Any]:
    torch.set_default_dtype(torch.float64)
    return {
        "identity": [world.rank, world.world_size],
        "runs": {case: train(case, world) for case in CASES},
        "disagreement": disagreement(world),
        "largest": world.max_over_ranks(10 * world.rank),
        "texts": world.gather_texts(f"text {world.rank}"),
        "first": world.run_on_main(lambda: f"text {world.rank}"),
    }


@pytest.fixture(scope="module", params=COUNTS, ids=lambda count: f"{count} processes")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_by_rank(work, request.param, "training", tmp_path_factory)


@pytest.fixture
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("case", [case for case in CASES if case != "separate statistics"])
def test_gradients_and_weights_are_those_of_one_process(ranks: list[dict[str, Any]], case: str) -> None:
    alone = train(case, World(0, 1, torch.device("cpu")))
    assert sum(name.startswith("D gradient") for name in alone) > 20
    for results in ranks:
        found = results["runs"][case]
        assert found.keys() == alone.keys()
        for name, expected in alone.items():
            scale = max(1.0, expected.abs().max().item())
            # Adam divides by the size of the gradient, so rounding errors of a zero gradient show in weights.
            allowed = 1e-11 if "gradient" in name else 1e-7
            assert (found[name] - expected).abs().max() <= allowed * scale, name


@pytest.mark.parametrize("case", CASES)
def test_all_processes_hold_the_same_bits(ranks: list[dict[str, Any]], case: str) -> None:
    for results in ranks[1:]:
        for name, first in ranks[0]["runs"][case].items():
            assert torch.equal(results["runs"][case][name], first), name


def test_without_synchronised_batch_norm_the_gradients_are_others(ranks: list[dict[str, Any]]) -> None:
    runs = ranks[0]["runs"]
    name = "G gradient linear.weight"
    assert not torch.allclose(runs["separate statistics"][name], runs["plain"][name], rtol=1e-3)


def test_a_difference_is_an_error_that_names_the_process(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert results["disagreement"] == (
            f"expected the same numbers in all {len(ranks)} processes, but these differ from process 0: "
            "G's running statistics of process 1; D's spectral-norm vectors of process 1"
        )


def test_messages_reach_every_process(ranks: list[dict[str, Any]]) -> None:
    count = len(ranks)
    for rank, results in enumerate(ranks):
        assert results["identity"] == [rank, count]
        assert results["largest"] == 10 * (count - 1)
        assert results["texts"] == [f"text {number}" for number in range(count)]
        assert results["first"] == "text 0"


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("parts", [1, 2])
def test_shares_of_all_processes_make_up_the_batch_in_order(count: int, parts: int) -> None:
    whole = torch.arange(BATCH)
    shares = [
        World(rank, count, torch.device("cpu")).shard(whole, part, parts)
        for part in range(parts)
        for rank in range(count)
    ]
    assert torch.equal(torch.cat(shares), whole)  # so no noise is used twice


@pytest.mark.parametrize("count", COUNTS)
def test_images_come_in_the_same_order_on_any_number_of_processes(count: int) -> None:
    alone = ResumableBatchSampler(50, BATCH, seed=3)
    together = [ResumableBatchSampler(50, BATCH, seed=3, rank=r, num_replicas=count) for r in range(count)]
    for number in range(20):
        parts = [sampler.batch_at(number).indices for sampler in together]
        assert np.array_equal(np.concatenate(parts), alone.batch_at(number).indices)


def test_one_process_needs_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with init_world("cpu") as world:
        assert (world.rank, world.world_size, world.is_main, world.max_over_ranks(3)) == (0, 1, True, 3)
        assert (
            world.run_on_main(lambda: "a"),
            world.gather_texts("a"),
            world.mean_over_ranks({"x": 2.0}),
        ) == ("a", ["a"], {"x": 2.0})
        tensor = torch.ones(3)
        world.average_([tensor])
        assert tensor.eq(1).all()


def test_an_incomplete_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    refused = pytest.raises(
        UserError, match="WORLD_SIZE is 2 but LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"
    )
    with refused, init_world("cpu"):
        pass


def test_a_batch_that_does_not_divide_among_processes_is_refused() -> None:
    config = replace(config_of("plain"), batch_size=6)
    with pytest.raises(UserError, match="batch_size: expected a multiple of 4"):
        Trainer(config, torch.arange(3), World(0, 4, torch.device("cpu")))
