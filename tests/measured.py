"""The errors that tests compare with their bounds, for ``python -m benchmarks.bench_numerics`` to record."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor

# By test, then by what was compared: the largest error.
ERRORS: dict[str, dict[str, float]] = {}


def measured(what: str, error: float) -> float:
    """Keep an error, and return it."""
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
    errors = ERRORS.setdefault(test, {})
    errors[what] = max(error, errors.get(what, 0.0))
    return error


def relative_error(found: Tensor, expected: Tensor, what: str) -> float:
    """Return the largest difference over the largest expected value, and keep it."""
    assert found.shape == expected.shape, what
    found, expected = found.detach().double(), expected.detach().double()
    difference, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    return measured(what, difference / largest if difference else 0.0)  # where both are 0 the ratio is NaN


def losses_error(found: Sequence[float], expected: Sequence[float], what: str) -> float:
    """Return the largest difference of losses, relative to those above 1, and keep it."""
    pairs = zip(found, expected, strict=True)
    return measured(what, max(abs(ours - theirs) / max(1.0, abs(theirs)) for ours, theirs in pairs))
