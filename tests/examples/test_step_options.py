"""Options that change the time or memory of a step, not its results; and how malloc treats the freed memory."""

from __future__ import annotations

import functools
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_runs import Batches, assert_same, make_trainer, run_steps, stepped

from sagan.recipes import RunConfig
from sagan.train import allocator
from sagan.train.update import Trainer

SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "fp16, softplus, no average": {"precision": "fp16", "loss": "softplus", "ema_decay": 0.0},
    "accumulated, two updates of D": {"accumulation": 2, "d_steps": 2},
    "D's vectors move in G's update": {"d_vectors_move_in_g_step": True},
    "unconditional": {"network__num_classes": 0},
    "updates that are not finite are skipped": {"health__on_nonfinite": "skip"},
}
# A large epsilon: else Adam divides by the size of the gradient, and where that is zero, rounding decides the step.
SMOOTH = {"optimizer__eps": 1.0, "optimizer__g_lr": 0.1, "optimizer__d_lr": 0.1}


def flat(network: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def assert_close_steps(one: Trainer, other: Trainer, tolerance: float) -> None:
    """Compare two trainers' weights, relative to how far they have moved from the same start."""
    for name, start in make_trainer(one.config).networks.items():
        after = flat(one.networks[name])
        moved = torch.linalg.vector_norm(after - flat(start))
        assert moved > 0.01
        assert torch.linalg.vector_norm(flat(other.networks[name]) - after) < tolerance * moved


def state(trainer: Trainer) -> dict[str, Any]:
    state = trainer.state_dict()
    del state["config"]
    return state


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_checkpointed_activations_change_no_bit(tiny_config: RunConfig, settings: dict[str, Any]) -> None:
    runs: list[int] = []
    plain = stepped(tiny_config, **settings)
    trainer = make_trainer(tiny_config, step__checkpoint_activations=True, **settings)
    for network in (trainer.generator, trainer.discriminator):
        network.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    run_steps(trainer)
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
    assert_close_steps(plain, compiled, tolerance)
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
    assert_close_steps(plain, other, 1e-4)


# Faults while 64 MiB are allocated, written and freed ten times, after a first time.
SCRIPT = """
import resource, sys
import torch
from sagan.train.allocator import keep_freed_memory

if "keep" in sys.argv:
    assert keep_freed_memory()
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(allocator.__file__).parents[2]), "PATH": ""},
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_freed_memory_is_reused_with_fewer_faults() -> None:
    assert faults("keep") < 0.8 * faults()


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert allocator.keep_freed_memory() is False
