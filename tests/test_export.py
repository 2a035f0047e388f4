"""Blocks outside this library: programs of torch.export, ONNX files and safetensors."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blocks import BLOCKS, Block, Discriminator, at_another_size, build, draw_inputs, dynamic_axes
from measured import relative_error
from torch import Tensor, nn

from sagan_layers import (
    ConditionalBatchNorm2d,
    SelfAttention2d,
    SNConv2d,
    SNLinear,
    functional,
)


def _image(*shape: int) -> Callable[[int, torch.Generator], tuple[Tensor, ...]]:
    return lambda batch, generator: (torch.randn(batch, *shape, generator=generator),)


# Options that tests/blocks.py has not, and maps so large that eager code takes the backends made for them.
MORE = [
    Block(
        "attention_wide_keys",
        lambda **to: SelfAttention2d(
            6, key_channels=3, value_channels=5, pool_size=3, bias=True, gamma_init=0.7, **to
        ),
        _image(6, 7, 9),
        (),
    ),
    Block("large_attention", lambda **to: SelfAttention2d(8, gamma_init=0.7, **to), _image(8, 34, 34), ()),
    Block(
        "large_batch_norm",
        lambda **to: ConditionalBatchNorm2d(8, activation="relu", **to),
        _image(8, 64, 64),
        (),
    ),
    Block(
        "large_upsampled",
        lambda **to: SNConv2d(64, 8, 3, padding=1, upsample=2, **to),
        _image(64, 32, 32),
        (),
    ),
    Block(
        "large_downsampled",
        lambda **to: SNConv2d(64, 8, 3, padding=1, downsample=2, **to),
        _image(64, 32, 32),
        (),
    ),
]
# The large ones are translated as the small ones are.
every_block = pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=block.name, marks=pytest.mark.slow if "large" in block.name else ())
        for block in [*BLOCKS, *MORE]
    ],
)


def operations_of(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def own_operations_of(module: nn.Module, *inputs: Tensor, strict: bool = False) -> set[str]:
    program = torch.export.export(module, inputs, strict=strict)
    return {name for name in operations_of(program) if "sagan_layers" in name}


@pytest.mark.parametrize(
    "block", MORE, ids=lambda block: block.name
)  # the others: tests/test_module_contract.py
def test_exported_at_any_size_it_needs_torch_alone_and_equals_eager(block: Block) -> None:
    module, inputs = build(block).eval(), draw_inputs(block)
    program = torch.export.export(module, inputs, dynamic_shapes=dynamic_axes(inputs), strict=False)
    assert not any("sagan_layers" in name for name in operations_of(program))
    for fresh in (inputs, at_another_size(inputs)):
        assert relative_error(program.module()(*fresh), module(*fresh), "torch.export") <= 1e-6


@pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"),
    reason="torch 2.6 does not tell a strict export from torch.compile",
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_strict_export_needs_torch_alone_too(training: bool) -> None:
    network = Discriminator().train(training)
    assert not own_operations_of(network, torch.randn(2, 3, 8, 8), torch.tensor([0, 1]), strict=True)


@pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="torch 2.6 cannot load what switches gradients off"
)
def test_a_saved_program_of_training_moves_u_and_v_as_the_module_does() -> None:
    module, x = nn.Sequential(SNConv2d(3, 8, 3), SelfAttention2d(8, gamma_init=0.7)), torch.randn(2, 3, 8, 8)
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, (x,)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for _ in range(3):
        assert relative_error(loaded(x), module(x), "in training") <= 1e-6
    buffers = dict(loaded.named_buffers())
    assert all(torch.allclose(buffers[name], buffer, atol=1e-6) for name, buffer in module.named_buffers())


def test_a_backend_that_is_named_or_forced_keeps_its_operation() -> None:
    x = torch.randn(2, 8, 64, 64)
    attention, norm = SelfAttention2d(8).eval(), ConditionalBatchNorm2d(8)
    chunked = "sagan_layers.attention_chunked.default"
    assert own_operations_of(SelfAttention2d(8, backend="chunked").eval(), x) == {chunked}
    with functional.force_backend("chunked"):
        assert own_operations_of(attention, x) == {chunked}
    with functional.force_backend("blocked"):
        assert own_operations_of(norm, x) == {"sagan_layers.conditional_norm_blocked.default"}
    assert not own_operations_of(attention, x) | own_operations_of(norm, x)


def test_a_saved_program_runs_in_a_process_without_this_library(tmp_path: Path) -> None:
    network, inputs = Discriminator().eval(), (torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 4]))
    with torch.no_grad():  # torch 2.6 cannot load a program that switches gradients off
        program = torch.export.export(network, inputs, strict=False)
    torch.export.save(program, tmp_path / "network.pt2")
    torch.save(inputs, tmp_path / "inputs.pt")
    script = """
import sys, torch
sys.modules["sagan_layers"] = None
network = torch.export.load("network.pt2").module()
torch.save(network(*torch.load("inputs.pt", weights_only=True)), "logits.pt")
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(found, network(*inputs), rtol=1e-5, atol=1e-6)


@every_block
def test_onnx_at_any_size_equals_eager(block: Block, run_onnx: Callable[..., list[Tensor]]) -> None:
    module, inputs = build(block).eval(), draw_inputs(block)
    sizes = [inputs, at_another_size(inputs)]
    results = run_onnx(module, inputs, dynamic_axes(inputs), sizes)
    for found, fresh in zip(results, sizes, strict=True):
        assert relative_error(found, module(*fresh), "ONNX") <= 1e-5


def test_safetensors_hold_a_state_dict_and_refuse_a_shared_layer(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="in the extra 'export'")
    network, other, path = Discriminator(), Discriminator(), tmp_path / "network.safetensors"
    safetensors.save_file(network.state_dict(), path)
    other.load_state_dict(safetensors.load_file(path))
    assert all(torch.equal(x, network.state_dict()[name]) for name, x in other.state_dict().items())
    layer = SNLinear(4, 4)
    twice = nn.Sequential(layer, layer)
    with pytest.raises(RuntimeError, match="share memory"):
        safetensors.save_file(twice.state_dict(), path)
    safetensors.save_model(twice, str(path))
    fresh = SNLinear(4, 4)
    safetensors.load_model(nn.Sequential(fresh, fresh), str(path))
    assert torch.equal(fresh.weight_u, layer.weight_u)
