"""The examples of CONTRIBUTING.md work: backends, and the table of a code base."""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_tables import FOREIGN
from torch import Tensor

import sagan_layers.attention.reference as attention
import sagan_layers.conditional_norm.kernels as conditional_norm_kernels
import sagan_layers.conditional_norm.reference as conditional_norm
from sagan_layers import SelfAttention2d, convert, functional
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
    (row,) = re.findall(r"the row `(\"voletiv\": VOLETIV)`", PAGE.read_text())
    for name, code_base in eval(f"{{{row}}}", {"VOLETIV": FOREIGN["voletiv"]}).items():
        monkeypatch.setitem(convert.CODE_BASES, name, code_base)
    attention = SelfAttention2d(8, bias=True, gamma_init=0.7)
    theirs = convert.save(attention, "voletiv", prefix="self_attn")
    assert theirs["self_attn.sigma"].shape == (1,)
    other = SelfAttention2d(8, bias=True)
    convert.load(other, theirs, "voletiv", prefix="self_attn")
    torch.testing.assert_close(other.state_dict(), attention.state_dict())


def test_the_page_of_weights_names_every_code_base() -> None:
    page = (PAGE.parent / "docs" / "loading_weights.md").read_text()
    named = re.findall(r"^\| `\"(\w+)\"` \|", page, re.M)
    assert sorted(named) == sorted(convert.CODE_BASES)
