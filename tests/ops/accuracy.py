"""How the tests of kernels compare results with float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def distance(ours: Tensor, exact: Tensor) -> float:
    return (ours.double() - exact).abs().max().item()


def assert_accurate(
    names: Sequence[str],
    ours: Sequence[Tensor | None],
    same_dtype: Sequence[Tensor | None],
    exact: Sequence[Tensor | None],
    roundings: Sequence[float],
) -> None:
    """Errors are at most twice those of the reference in the same dtype, plus a few roundings."""
    for name, got, plain, wanted, rounding in zip(names, ours, same_dtype, exact, roundings, strict=True):
        if wanted is None:
            assert got is None, name
            continue
        assert got is not None, name
        assert plain is not None, name
        assert got.shape == wanted.shape, name
        assert got.dtype == plain.dtype, name
        assert torch.isfinite(got).all(), name
        error, allowed = distance(got, wanted), distance(plain, wanted)
        limit = 2 * allowed + 4 * rounding
        assert error <= limit, f"{name}: {error:.3g} > {limit:.3g} (reference {allowed:.3g})"


def assert_norms_of_errors(
    ours: Sequence[Tensor], same_dtype: Sequence[Tensor], exact: Sequence[Tensor], roundings: float
) -> None:
    """The same for the norms of the errors, with roundings relative to the result."""
    for got, plain, wanted in zip(ours, same_dtype, exact, strict=True):
        error, allowed = ((tensor.double() - wanted).norm() for tensor in (got, plain))
        assert error <= 2 * allowed + roundings * wanted.norm()
