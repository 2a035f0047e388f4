"""The examples of CONTRIBUTING.md work: backends, and the table of a code base."""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Any

import peer_vectors
import pytest
import torch
from torch import Tensor

import sagan_layers.attention.reference as attention
import sagan_layers.conditional_norm.kernels as conditional_norm_kernels
import sagan_layers.conditional_norm.reference as conditional_norm
from sagan.convert import load_network
from sagan.networks import Discriminator, Generator, NetworkConfig
from sagan_layers import convert, functional
from sagan_layers.attention.table import ATTENTION
from sagan_layers.backends import Backend, Operation
from sagan_layers.conditional_norm.table import CONDITIONAL_BATCH_NORM

PAGE = Path(__file__).parent.parent / "CONTRIBUTING.md"
CONTENT = {**vars(attention), **vars(conditional_norm), **vars(conditional_norm_kernels)}


def code_with(text: str) -> str:
    """Return the page's example that holds a text."""
    (block,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if text in code)
    return block


@pytest.mark.parametrize("operation", [ATTENTION, CONDITIONAL_BATCH_NORM], ids=lambda each: each.name)
def test_a_backend_is_one_file_and_one_row(
    operation: Operation[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    function = operation.name
    block = code_with(f"def {function}(")
    (row,) = re.findall(rf"`(Backend\(\"plain\", plain\.{function},.*?)`", PAGE.read_text())
    names = {**CONTENT, "reference": conditional_norm, "torch": torch, "Tensor": Tensor, "Backend": Backend}
    exec(block, names)
    names["plain"] = types.SimpleNamespace(**names)
    monkeypatch.setattr(operation, "backends", (eval(row, names), *operation.backends))
    x, gain, bias = torch.randn(4, 3, 5, 5), torch.randn(4, 3), torch.randn(4, 3)
    results = {}
    for backend in ("plain", "reference"):
        with functional.record_backends() as served:
            if operation is ATTENTION:
                results[backend] = functional.attention(x[0], x[1], x[2], backend=backend)
            else:
                results[backend] = functional.conditional_batch_norm(
                    x, gain, bias, training=True, activation="relu", backend=backend
                )
        assert served == [backend]
    torch.testing.assert_close(results["plain"], results["reference"])


def test_a_code_base_is_one_table_and_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    exec(code_with("VOLETIV = "), names)
    (row,) = re.findall(r"the row `(\"voletiv\": .*?)`", PAGE.read_text())
    for name, code_base in eval(f"{{{row}}}", names).items():
        monkeypatch.setitem(convert.CODE_BASES, name, code_base)
    vectors = peer_vectors.read("voletiv_128")
    sizes = {key: size for key, size in vectors.sizes.items() if key != "batch"}
    d_channels = (4, 8, 16, 32, 64, 64)
    config = NetworkConfig(**sizes, base_width=2, d_channels=d_channels, **names["VOLETIV"].settings)
    networks = Generator(config), Discriminator(config)
    for network, shapes in zip(networks, (vectors.g_shapes, vectors.d_shapes), strict=True):
        load_network(network, peer_vectors.draw_state(shapes), "voletiv")
    inputs = peer_vectors.draw_inputs("voletiv_128", **vectors.sizes)
    for ours, theirs in zip(
        peer_vectors.evaluate(*networks, networks, inputs), (vectors.g_output, vectors.d_output), strict=True
    ):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_the_page_of_weights_names_every_code_base() -> None:
    page = (PAGE.parent / "docs" / "loading_weights.md").read_text()
    named = re.findall(r"^\| `\"(\w+)\"` \|", page, re.M)
    assert sorted(named) == sorted(convert.CODE_BASES)
