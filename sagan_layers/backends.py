"""Which backend serves an operation's inputs, and why the others do not.

Each operation has a table of backends (``attention/table.py`` and its siblings). A backend lists why it cannot serve
given inputs, and why another one is preferred for them. ``"auto"`` takes the first backend without either; a named
backend that cannot serve raises with every reason. A backend changes speed, memory and the last bits, never what is
computed, and no failure falls back to another backend.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from sagan_layers.checks import check_choice
from sagan_layers.torch_support import is_exporting

Inputs = TypeVar("Inputs")
Implementation = TypeVar("Implementation")

# Triton reads this variable when it first sees a kernel; its interpreter then runs kernels on the CPU, for tests.
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _no_reasons(inputs: Any) -> list[str]:
    return []


@dataclass(frozen=True)
class Backend(Generic[Inputs, Implementation]):
    """One way to compute an operation.

    Attributes:
        name: what a caller writes as ``backend=``.
        implementation: the function that computes, with the signature that the operation's table documents.
        unsupported_reasons: takes the operation's inputs; returns why the backend cannot serve them.
        not_preferred_reasons: takes the same; returns why "auto" takes a later backend, although this one could serve.
        opaque: whether torch.export would record operations of this library, so that "auto" does not take it there.
        delegates_to: an operation that this backend calls; the names of its backends select this one too.
        delegate_inputs: takes the inputs; returns those of ``delegates_to``, or None if only the call can tell.
    """

    name: str
    implementation: Implementation
    unsupported_reasons: Callable[[Inputs], list[str]] = _no_reasons
    not_preferred_reasons: Callable[[Inputs], list[str]] = _no_reasons
    opaque: bool = False
    delegates_to: Operation[Any, Any] | None = None
    delegate_inputs: Callable[[Inputs], Any] = lambda inputs: None

    @property
    def names(self) -> list[str]:
        """The names that select this backend."""
        return [self.name] if self.delegates_to is None else [self.name, *self.delegates_to.names]

    def reasons_against(self, inputs: Inputs) -> list[str]:
        """Return why "auto" takes a later backend, although this one could serve."""
        if self.opaque and is_exporting():
            return ["an exported program should need torch alone"]
        return self.not_preferred_reasons(inputs)


class Operation(Generic[Inputs, Implementation]):
    """An operation and its backends, in the order in which "auto" tries them.

    Args:
        name: of the function in :mod:`sagan_layers.functional`, or "spectral_norm" for the weights of layers.
        title: the name in messages.
        backends: the table.
    """

    def __init__(self, name: str, title: str, backends: tuple[Backend[Inputs, Implementation], ...]) -> None:
        self.name = name
        self.title = title
        self.backends = backends
        _operations[name] = self

    @property
    def names(self) -> list[str]:
        """Every name that a caller may give."""
        return list(dict.fromkeys(["auto", *(name for backend in self.backends for name in backend.names)]))

    def check_name(self, name: str) -> None:
        """Raise ``ValueError`` unless ``name`` is "auto" or a backend's name."""
        check_choice("backend", name, self.names)

    def select(self, inputs: Inputs, name: str = "auto") -> Backend[Inputs, Implementation]:
        """Return the backend that serves these inputs.

        Raises:
            ValueError: if the name is unknown, or the named backend cannot serve: with every reason.
        """
        backend = self._first(inputs, name)
        if backend.delegates_to is not None and (seen := backend.delegate_inputs(inputs)) is not None:
            backend.delegates_to.select(seen, self.delegated_name(backend, name))
        return backend

    def _first(self, inputs: Inputs, name: str) -> Backend[Inputs, Implementation]:
        name = self.effective_name(name)
        if type(name) is not str or name != "auto":  # arrays compare entry by entry
            self.check_name(name)
        refusals = []
        for backend in self.backends:
            if name != "auto" and name not in backend.names:
                continue
            reasons = backend.unsupported_reasons(inputs)
            if name == "auto" and not reasons:
                reasons = backend.reasons_against(inputs)
            if not reasons:
                return backend
            refusals.append(f"{backend.name}: {'; '.join(reasons)}")
        raise ValueError(f"no {self.title} backend serves these inputs ({' | '.join(refusals)})")

    def select_and_record(self, inputs: Inputs, name: str) -> Backend[Inputs, Implementation]:
        """Return the backend for a call, and add it to the lists of :func:`record_backends`."""
        backend = self._first(inputs, name)  # a delegate checks its own inputs when it is called
        for operation, served in _records:
            # A record of all operations holds what computes in the end: the delegate's name, not this one.
            if operation == self.name or (operation is None and backend.delegates_to is None):
                served.append(backend.name)
        return backend

    def explain(self, inputs: Inputs) -> dict[str, str]:
        """Return a sentence for each backend: chosen, or why not."""
        try:
            chosen = self.select(inputs).name
        except ValueError:  # a forced backend cannot serve: its sentence says why
            chosen = self.effective_name("auto")
        sentences = {}
        for backend in self.backends:
            if unsupported := backend.unsupported_reasons(inputs):
                sentences[backend.name] = f"cannot serve: {'; '.join(unsupported)}"
            elif backend.name == chosen:
                sentences[backend.name] = "chosen"
            else:
                reasons = backend.reasons_against(inputs) or [f"{chosen!r} comes first"]
                sentences[backend.name] = f"serves when named: {'; '.join(reasons)}"
        return sentences

    def delegated_name(self, backend: Backend[Inputs, Implementation], name: str) -> str:
        """Return the name that a delegating backend passes on: the one that selected it, if it is the delegate's."""
        name = self.effective_name(name)
        return "auto" if name == backend.name else name

    def effective_name(self, name: str) -> str:
        """Return the name that :func:`force_backend` imposes on this operation, else ``name``."""
        for operation, forced in reversed(_forced):
            if operation in (None, self.name) and forced in self.names:
                return forced
        return name


def no_triton_reasons(device: torch.device) -> list[str]:
    """Return why Triton kernels cannot run on a device."""
    if device.type != "cuda" and not (_INTERPRETING and device.type == "cpu"):
        return [f"its kernels run on CUDA, and the tensors are on {device}"]
    if torch.version.hip is not None:
        return ["its kernels were never compiled for ROCm"]
    return [] if _HAS_TRITON else ["Triton is not installed"]


def interpreter_reasons(device: torch.device) -> list[str]:
    """Return why "auto" does not take Triton kernels on a device where they could run."""
    return ["on a CPU only Triton's interpreter runs it, for tests"] if device.type == "cpu" else []


_operations: dict[str, Operation[Any, Any]] = {}
_forced: list[tuple[str | None, str]] = []
_records: list[tuple[str | None, list[str]]] = []


def find_operation(name: str) -> Operation[Any, Any]:
    """Return the operation of this name.

    Raises:
        ValueError: if there is none.
    """
    check_choice("operation", name, _operations)
    return _operations[name]


@contextlib.contextmanager
def force_backend(backend: str, *, operation: str | None = None) -> Iterator[None]:
    """Make every call inside a ``with`` block use one backend, regardless of its ``backend`` argument.

    Modules, functions and networks that were built with other choices all follow. Operations without a backend of
    this name choose as usual. Contexts nest; the innermost wins. A backend that cannot serve raises, as it does when
    named. Forward makes the choice: backward uses the same backend, also after the ``with`` block has ended. The
    choice applies to all threads of the process.

    Args:
        backend: "auto" or a backend's name, for instance "reference" or "fused". The definition of the resampling
            convolutions is called "plain".
        operation: the operation to force, as in :func:`~sagan_layers.functional.select_backend`; None for all that
            have such a backend.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> import torch
        >>> from sagan_layers.functional import attention, record_backends
        >>> with force_backend("reference"), record_backends() as served:
        ...     _ = attention(torch.randn(1, 4096, 2), torch.randn(1, 1024, 2), torch.randn(1, 1024, 2))
        >>> served
        ['reference']
    """
    operations = list(_operations.values()) if operation is None else [find_operation(operation)]
    check_choice("backend", backend, dict.fromkeys(name for each in operations for name in each.names))
    entry = (operation, backend)
    _forced.append(entry)
    try:
        yield
    finally:
        # By identity: with several threads, contexts may end in another order than they began.
        del _forced[next(i for i, other in enumerate(_forced) if other is entry)]


@contextlib.contextmanager
def record_backends(*, operation: str | None = None) -> Iterator[list[str]]:
    """Yield a list to which every call inside the ``with`` block adds the name of the backend that served it.

    Calls inside ``torch.compile`` are recorded when they are traced, not when the compiled code runs.

    Args:
        operation: the operation to record; None for all.

    Raises:
        ValueError: for an unknown operation.

    Example:
        >>> import torch
        >>> from sagan_layers.functional import attention
        >>> with record_backends() as served:
        ...     _ = attention(torch.randn(1, 4096, 2), torch.randn(1, 1024, 2), torch.randn(1, 1024, 2))
        >>> served
        ['chunked']
    """
    if operation is not None:
        find_operation(operation)
    served: list[str] = []
    entry = (operation, served)
    _records.append(entry)
    try:
        yield served
    finally:
        del _records[next(i for i, other in enumerate(_records) if other is entry)]
