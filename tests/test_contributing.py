"""The examples of CONTRIBUTING.md are backends that work."""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sagan_layers.attention.reference as attention
import sagan_layers.conditional_norm.kernels as conditional_norm_kernels
import sagan_layers.conditional_norm.reference as conditional_norm
from sagan_layers import functional
from sagan_layers.attention.table import ATTENTION
from sagan_layers.backends import Backend, Operation
from sagan_layers.conditional_norm.table import CONDITIONAL_BATCH_NORM

PAGE = Path(__file__).parent.parent / "CONTRIBUTING.md"
CONTENT = {**vars(attention), **vars(conditional_norm), **vars(conditional_norm_kernels)}


@pytest.mark.parametrize("operation", [ATTENTION, CONDITIONAL_BATCH_NORM], ids=lambda each: each.name)
def test_a_backend_is_one_file_and_one_row(
    operation: Operation[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    function = operation.name
    (block,) = (
        text
        for text in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
        if f"def {function}(" in text
    )
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
