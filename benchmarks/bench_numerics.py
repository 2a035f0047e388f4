"""Errors: parity with other code, attention in half precision, the estimate of sigma.

Parity is what the tests measure: this runs them, and keeps the errors that they compare with their bounds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.report import RESULTS, ROOT, Row, environment
from sagan.io import atomic_write_text
from sagan_layers import SNConv2d
from sagan_layers.functional import attention

PARITY_TESTS = (
    "tests/test_golden.py",
    "tests/examples/test_convert_networks.py",
    "tests/examples/test_peer_networks.py",
    "tests/test_convert_peers.py",
    "tests/test_export.py",
    "tests/examples/test_network_export.py",
)
ITERATIONS = (1, 5, 20, 100, 500)


def parity() -> dict[str, dict[str, float]]:
    """Run the tests of parity and return their errors, by test and by what was compared."""
    status = pytest.main(["-q", "-p", "no:cacheprovider", *(str(ROOT / test) for test in PARITY_TESTS)])
    if status:
        raise SystemExit(f"The tests failed with status {int(status)}: no errors were recorded.")
    errors: dict[str, dict[str, float]] = sys.modules["measured"].ERRORS
    return errors


def half_precision(dtype: torch.dtype, std: float) -> Row:
    """Return the errors of attention in half precision throughout and of ours, against float64.

    Errors of outputs are relative to the largest output.
    """
    torch.manual_seed(0)
    width = std**0.5 / 32**0.25  # of query and key, so that logits have this deviation
    query, key = ((torch.randn(1, positions, 32) * width).to(dtype) for positions in (1024, 256))
    value = torch.randn(1, 256, 32).to(dtype)
    logits, half_logits = query.double() @ key.double().mT, query @ key.mT
    exact = attention(query.double(), key.double(), value.double())

    def error(found: Tensor) -> float:
        return ((found.double() - exact).abs().max() / exact.abs().max()).item()

    return {
        "dtype": str(dtype).removeprefix("torch."),
        "std": std,
        "largest_logit": logits.abs().max().item(),
        "logit_error": (half_logits.double() - logits).abs().max().item(),
        "half_error": error(torch.softmax(half_logits, dim=-1) @ value),
        "our_error": error(attention(query, key, value)),
    }


def sigma_estimate(channels: int) -> Row:
    """Return estimate / true sigma of a new convolution's constant weight after some forwards."""
    torch.manual_seed(0)
    conv = SNConv2d(channels, channels, 3)
    truth = torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2)
    ratios = {}
    with torch.no_grad():
        for done in range(1, max(ITERATIONS) + 1):
            conv.normalized_weight()
            if done in ITERATIONS:
                estimate = conv.weight_u @ conv.weight.flatten(1) @ conv.weight_v
                ratios[str(done)] = (estimate / truth).item()
    return {"channels": channels, "ratios": ratios}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure everything and write the record."""
    parser = harness.argument_parser("numerics", __doc__ or "")
    options = parser.parse_args(arguments)
    channels = (64,) if options.quick else (256, 1024)
    record = {
        "environment": environment("cpu"),
        "parity": parity(),
        "half_precision": [
            half_precision(dtype, std)
            for dtype in (torch.bfloat16, torch.float16)
            for std in (1, 10, 30, 100)
        ],
        "sigma": [sigma_estimate(each) for each in channels],
    }
    out: Path = options.out or RESULTS / "numerics.json"
    atomic_write_text(out, json.dumps(record, indent=1) + "\n")
    print(f"Wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
