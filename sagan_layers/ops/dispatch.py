"""Which backend serves given inputs, and why the others do not.

A backend is a name, a function that lists the reasons against serving some inputs, and the function that
computes. ``"auto"`` takes the first without a reason, in the order of the table; naming one that cannot serve
raises with every reason. A backend changes speed, memory and the last bits, never what is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sagan_layers.ops import reference


@dataclass(frozen=True)
class AttentionBackend:
    """One way to compute attention.

    Attributes:
        name: what a caller writes as ``backend=``.
        reasons_against: takes (query, key, value); returns why they cannot be served, empty if they can.
        run: takes (query, key, value, scale); returns [N, L, Ev] with derivatives of every order.
    """

    name: str
    reasons_against: Callable[[Tensor, Tensor, Tensor], list[str]]
    run: Callable[[Tensor, Tensor, Tensor, float], Tensor]


def _serves_everything(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    return []


ATTENTION_BACKENDS: tuple[AttentionBackend, ...] = (
    AttentionBackend("reference", _serves_everything, reference.attention),
)


def check_attention_backend_name(name: str) -> None:
    """Raise ``ValueError`` unless ``name`` is "auto" or a backend of the table."""
    known = ["auto", *(backend.name for backend in ATTENTION_BACKENDS)]
    if name not in known:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, known))}, got {name!r}")


def select_attention_backend(query: Tensor, key: Tensor, value: Tensor, name: str) -> AttentionBackend:
    """Return the backend that serves these inputs, or raise ``ValueError`` with every reason against."""
    check_attention_backend_name(name)
    refusals = []
    for backend in ATTENTION_BACKENDS:
        if name in ("auto", backend.name):
            reasons = backend.reasons_against(query, key, value)
            if not reasons:
                return backend
            refusals.append(f"{backend.name}: {'; '.join(reasons)}")
    raise ValueError(f"no attention backend serves these inputs ({' | '.join(refusals)})")
