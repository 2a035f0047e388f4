"""Training on 1, 2 and 4 processes (gloo, on the CPU) is the same training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from several_processes import results_by_rank
from test_training_losses import hinge_with_r1
from torch import Tensor
from training_runs import ALONE, TINY_NETWORK, Batches, assert_same, set_gammas

from sagan.distributed import ProcessesDisagreeError, World, check_agreement, init_world, running_statistics
from sagan.errors import UserError
from sagan.recipes import RunConfig, StepConfig
from sagan.train.health import FiniteGuard
from sagan.train.losses import LOSSES, Losses, negative_logits
from sagan.train.update import Trainer

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)

COUNTS = (2, 4)
BATCH = 8
CONFIG = RunConfig(
    recipe="best_known",
    batch_size=BATCH,
    ema_decay=0.8,
    device="cpu",
    network=replace(TINY_NETWORK, g_attention=(16,)),
    step=StepConfig(sync_batch_norm=True),
)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulation": 2},
    "steps": {"d_steps": 2, "d_vectors_move_in_g_step": True},
    "gradient penalty": {},
    "separate statistics": {"step": StepConfig(sync_batch_norm=False)},
}


def train(case: str, world: World) -> dict[str, Tensor]:
    """Two iterations in float64; gradients of both networks after the first, and everything after the second."""
    config = replace(CONFIG, **CASES[case])
    losses = {"hinge": Losses(hinge_with_r1, negative_logits)} if case == "gradient penalty" else {}
    with mock.patch.dict(LOSSES, losses):
        trainer = Trainer(config, torch.arange(3), world)
    set_gammas(trainer)
    batches = Batches(BATCH // config.accumulation, world)
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
    """Return the message when process 1 holds another vector and other statistics."""
    trainer = Trainer(CONFIG, torch.arange(3), world)
    if world.rank == 1:
        trainer.discriminator.blocks[0].conv1.weight_u[0] += 1e-12
        running_statistics(trainer.generator)[0][0] += 1e-12
    with pytest.raises(ProcessesDisagreeError) as caught:
        check_agreement(world, {"G": trainer.generator, "D": trainer.discriminator})
    return str(caught.value)


def work(world: World) -> dict[str, Any]:
    torch.set_default_dtype(torch.float64)
    return {
        "identity": [world.rank, world.world_size],
        "runs": {case: train(case, world) for case in CASES},
        "disagreement": disagreement(world),
        "largest": world.max_over_ranks(10 * world.rank),
        "not finite": FiniteGuard(world).see(torch.tensor([1.0, float("nan")][world.rank % 2])).item(),
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
    alone = train(case, ALONE)
    assert sum(name.startswith("D gradient") for name in alone) > 20
    for results in ranks:
        found = results["runs"][case]
        assert found.keys() == alone.keys()
        for name, expected in alone.items():
            scale = max(1.0, expected.abs().max().item())
            # Adam divides by the size of the gradient, so rounding errors of a zero gradient show in weights.
            allowed = 1e-11 if "gradient" in name else 1e-7
            assert (found[name] - expected).abs().max() <= allowed * scale, name


def test_all_processes_hold_the_same_bits(ranks: list[dict[str, Any]]) -> None:
    for results in ranks[1:]:
        assert_same(results["runs"], ranks[0]["runs"])


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
        assert results["not finite"] == 1
        assert results["texts"] == [f"text {number}" for number in range(count)]
        assert results["first"] == "text 0"


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("parts", [1, 2])
def test_shares_of_all_processes_make_up_the_batch_in_order(count: int, parts: int) -> None:
    whole = torch.arange(BATCH)
    worlds = [World(rank, count, ALONE.device) for rank in range(count)]
    shares = [world.shard(whole, part, parts) for part in range(parts) for world in worlds]
    assert torch.equal(torch.cat(shares), whole)  # so no noise is used twice


def test_one_process_needs_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with init_world("cpu") as world:
        assert (world.rank, world.world_size, world.is_main, world.max_over_ranks(3)) == (0, 1, True, 3)
        assert (world.run_on_main(lambda: "a"), world.gather_texts("a")) == ("a", ["a"])
        assert world.mean_over_ranks({"x": 2.0}) == {"x": 2.0}
        tensor = torch.ones(3)
        world.average_([tensor])
        assert tensor.eq(1).all()


@pytest.mark.parametrize("missing", ["LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_an_incomplete_environment_is_refused(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}
    for name, value in {**numbers, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    message = f"environment: expected {missing}.*, got none; start with torchrun"
    with pytest.raises(UserError, match=message), init_world("cpu"):
        pass


def test_a_batch_that_does_not_divide_among_processes_is_refused() -> None:
    config = replace(CONFIG, batch_size=6)
    with pytest.raises(UserError, match="batch_size: expected a multiple of 4"):
        Trainer(config, torch.arange(3), World(0, 4, torch.device("cpu")))
