"""Options of a step that change its time or memory leave its results alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_runs import Batches, assert_same, make_trainer

from sagan.recipes import RunConfig
from sagan.train.update import Trainer

SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "fp16, softplus, no average": {"precision": "fp16", "loss": "softplus", "ema_decay": 0.0},
    "accumulated, two updates of D": {"accumulation": 2, "d_steps": 2},
    "D's vectors move in G's update": {"d_vectors_move_in_g_step": True},
    "unconditional": {"network__num_classes": 0},
    "watched for what is not finite": {"health__on_nonfinite": "skip"},
}


# A large epsilon: else Adam divides by the size of the gradient, and where that is zero, rounding decides the step.
SMOOTH = {"optimizer__eps": 1.0, "optimizer__g_lr": 0.1, "optimizer__d_lr": 0.1}


def stepped(config: RunConfig, **changes: Any) -> Trainer:
    """Return a trainer after three steps."""
    trainer = make_trainer(config, **changes)
    batches = Batches(4 // trainer.config.accumulation)
    for _ in range(3):
        trainer.step(batches)
    return trainer


def flat(network: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def state(trainer: Trainer) -> dict[str, Any]:
    state = trainer.state_dict()
    del state["config"]
    return state


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_checkpointed_activations_change_no_bit(tiny_config: RunConfig, settings: dict[str, Any]) -> None:
    runs: list[int] = []

    def counted(network: nn.Module) -> None:
        network.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))

    plain = stepped(tiny_config, **settings)
    trainer = make_trainer(tiny_config, step__checkpoint_activations=True, **settings)
    counted(trainer.generator)
    counted(trainer.discriminator)
    batches = Batches(4 // trainer.config.accumulation)
    for _ in range(3):
        trainer.step(batches)
    assert_same(state(plain), state(trainer))
    parts, d_steps = trainer.config.accumulation, trainer.config.d_steps
    # D's update runs G without a graph and D's block twice; G's update runs both twice.
    assert len(runs) == 3 * parts * (3 * d_steps + 4)


@pytest.fixture
def compile_quickly(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compile without a C++ compiler: the same graphs and guards, run by torch itself."""
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(original, backend="aot_eager"))
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("compile_quickly")
@pytest.mark.parametrize(
    "settings",
    [{}, {"precision": "bf16", "accumulation": 2}, {"d_vectors_move_in_g_step": True, "d_steps": 2}],
    ids=["fp32", "bf16, accumulated", "D's vectors move in G's update"],
)
def test_a_compiled_step_is_the_same_step(tiny_config: RunConfig, settings: dict[str, Any]) -> None:
    plain, compiled = (
        stepped(tiny_config, step__compile=compile, **SMOOTH, **settings) for compile in (False, True)
    )
    # Torch 2.6 rounds to bfloat16 elsewhere when it compiles, and G then differs as much as from float32: by 14%.
    tolerance = 0.25 if settings.get("precision") else 1e-4
    start = make_trainer(tiny_config, **settings)
    for name, network in plain.networks.items():
        before, after = flat(start.networks[name]), flat(network)
        moved = torch.linalg.vector_norm(after - before)
        assert moved > 0.01
        assert torch.linalg.vector_norm(flat(compiled.networks[name]) - after) < tolerance * moved
    one, two = plain.means.take(), compiled.means.take()
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=tolerance, abs=tolerance)


@pytest.mark.usefixtures("compile_quickly")
def test_having_to_compile_again_after_the_first_steps_is_an_error(tiny_config: RunConfig) -> None:
    trainer = stepped(tiny_config, step__compile=True)
    larger: Any = Batches(8)
    with pytest.raises(RuntimeError, match="recompile"):
        trainer.step(larger)


def test_the_order_of_axes_in_memory_changes_nothing_but_rounding(tiny_config: RunConfig) -> None:
    plain, other = (stepped(tiny_config, step__channels_last=chosen, **SMOOTH) for chosen in (False, True))
    for trainer, channels_last in ((plain, False), (other, True)):
        weight = trainer.discriminator.blocks[0].conv2.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    for name, start in make_trainer(tiny_config).networks.items():
        after = flat(plain.networks[name])
        moved = torch.linalg.vector_norm(after - flat(start))
        assert torch.linalg.vector_norm(flat(other.networks[name]) - after) < 1e-4 * moved
