"""G and D in other programs: torch.jit, torch.fx, torch.export, ONNX and the Hugging Face hub."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from measured import relative_error
from torch import Tensor, nn
from training_runs import TINY_NETWORK

from sagan.networks import Discriminator, Generator, NetworkConfig

ANY_BATCH = ({0: torch.export.Dim("batch", min=1)},) * 2
KINDS = pytest.mark.parametrize("kind", [Generator, Discriminator])


def made(kind: type[nn.Module]) -> nn.Module:
    network = kind(TINY_NETWORK).eval()
    for mixer in network.mixers.values():
        nn.init.constant_(mixer.gamma, 0.7)
    return network


def inputs_of(kind: type[nn.Module], count: int) -> tuple[Tensor, Tensor]:
    shape = (TINY_NETWORK.latent_dim,) if kind is Generator else (3, 32, 32)
    return torch.randn(count, *shape), torch.randint(3, (count,))


@functools.cache
def exported(kind: type[nn.Module]) -> tuple[nn.Module, torch.export.ExportedProgram]:
    """A network, and its program for batches of any size."""
    network = made(kind)
    return network, torch.export.export(network, inputs_of(kind, 2), dynamic_shapes=ANY_BATCH, strict=False)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of checks of sizes
@KINDS
def test_jit_trace_passes_its_own_check_and_serves_other_batches(kind: type[nn.Module]) -> None:
    network, inputs = made(kind), inputs_of(kind, 5)
    traced = torch.jit.trace(network, inputs_of(kind, 2), check_tolerance=1e-6)
    torch.testing.assert_close(traced(*inputs), network(*inputs))


@KINDS
def test_symbolic_trace_records_blocks_and_mixers_as_calls(kind: type[nn.Module]) -> None:
    network, inputs = made(kind), inputs_of(kind, 5)
    traced = torch.fx.symbolic_trace(network)
    called = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    assert {f"mixers.{name}" for name in network.mixers} | {"blocks.0.conv1"} <= called
    torch.testing.assert_close(traced(*inputs), network(*inputs), rtol=0, atol=0)


@KINDS
def test_the_exported_program_needs_torch_alone(kind: type[nn.Module]) -> None:
    (network, program), inputs = exported(kind), inputs_of(kind, 5)
    assert not any("sagan_layers" in str(node.target) for node in program.graph.nodes)
    assert relative_error(program.module()(*inputs), network(*inputs), "torch.export") <= 2e-6


@KINDS
def test_onnx_computes_the_same_for_any_batch(
    kind: type[nn.Module], run_onnx: Callable[..., list[Tensor]]
) -> None:
    (network, program), batches = exported(kind), [inputs_of(kind, 1), inputs_of(kind, 5)]
    results = run_onnx(program, inputs_of(kind, 2), ANY_BATCH, batches)
    for found, inputs in zip(results, batches, strict=True):
        assert relative_error(found, network(*inputs), "ONNX") <= 2e-6


def test_a_generator_of_the_hub_comes_back_from_its_folder(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="in the extra 'export'")

    class HubGenerator(Generator, hub.PyTorchModelHubMixin):  # type: ignore[misc,name-defined]
        def __init__(self, **network: Any) -> None:
            super().__init__(NetworkConfig(**network))

    generator, inputs = HubGenerator(**asdict(TINY_NETWORK)).eval(), inputs_of(Generator, 4)
    generator.save_pretrained(tmp_path)
    assert NetworkConfig(**json.loads((tmp_path / "config.json").read_text())).resolution == 32
    assert (tmp_path / "model.safetensors").is_file()
    loaded = HubGenerator.from_pretrained(tmp_path)
    assert [*loaded.config.g_attention] == [8, 16]
    torch.testing.assert_close(loaded(*inputs), generator(*inputs), rtol=0, atol=0)
