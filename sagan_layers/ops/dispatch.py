"""Which backend serves given inputs, and why the others do not.

A backend lists its reasons against serving some inputs, and further reasons against being taken unasked: on
these inputs another one was measured to be faster (docs/attention.md). ``"auto"`` takes the first of the table
without any; naming one that cannot serve raises with every reason. A backend changes speed, memory and the last
bits, never what is computed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from sagan_layers.ops import (
    attention_chunked,
    attention_sdpa,
    conditional_norm_blocked,
    reference,
    spectral_norm_cpu,
    spectral_norm_grouped,
)
from sagan_layers.ops.attention_autograd import AttentionKernels, register_attention
from sagan_layers.ops.conditional_norm_autograd import ConditionalNormKernels, register_conditional_norm
from sagan_layers.ops.reference import (
    ConditionalNormResult,
    SelfAttentionWeights,
    SpectralNormResult,
    SpectralNormTask,
)
from sagan_layers.ops.self_attention_autograd import register_self_attention
from sagan_layers.ops.spectral_norm_autograd import NormalizedWeight

Reasons = Callable[[Tensor, Tensor, Tensor], list[str]]

# Triton reads this when it first sees a kernel; its interpreter then runs kernels on the CPU, for tests.
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
_HAS_TRITON = importlib.util.find_spec("triton") is not None

# Below so many weights a sample the reference is as fast on a CPU.
_FEW_WEIGHTS = 2**18
# Below so many values in a feature map the reference of conditional batch norm is as fast on a CPU.
_FEW_VALUES = 2**16
# Bytes of weights of the whole batch that may be kept for backward, where computing them again costs more: in
# half precision it costs the most, as the logits are computed in float32.
_MOST_KEPT_BYTES = 2**24
_MOST_KEPT_BYTES_OF_HALF = 2**25


@dataclass(frozen=True)
class AttentionBackend:
    """One way to compute attention.

    Attributes:
        name: what a caller writes as ``backend=``.
        reasons_against: takes (query, key, value); returns why they cannot be served, empty if they can.
        run: takes (query, key, value, scale); returns [N, L, Ev] with derivatives of every order.
        reasons_against_unasked: as ``reasons_against``; why "auto" should take a later one nevertheless.
    """

    name: str
    reasons_against: Reasons
    run: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    reasons_against_unasked: Reasons = lambda query, key, value: []


@dataclass(frozen=True)
class ConditionalNormBackend:
    """One way to compute conditional batch norm.

    Attributes:
        name: what a caller writes as ``backend=``.
        reasons_against: takes (x, given statistics or None, process group or None); returns why they cannot be
            served, empty if they can.
        run: takes (x, gain, bias, given, eps, relu, process_group) as :func:`reference.conditional_batch_norm`.
        reasons_against_unasked: as ``reasons_against``; why "auto" should take a later one nevertheless.
    """

    name: str
    reasons_against: Callable[[Tensor, Given, Any], list[str]]
    run: Callable[..., ConditionalNormResult]
    reasons_against_unasked: Callable[[Tensor, Given, Any], list[str]] = lambda x, given, process_group: []


Given = tuple[Tensor, Tensor] | None
AnyBackend = TypeVar("AnyBackend", AttentionBackend, ConditionalNormBackend)


def _serves_everything(*inputs: Any) -> list[str]:
    return []


# --- triton -------------------------------------------------------------------------------------------------


def _no_triton_reasons(device: torch.device) -> list[str]:
    """Return why Triton kernels cannot run on a device."""
    if device.type != "cuda" and not (_INTERPRETING and device.type == "cpu"):
        return [f"its kernels run on CUDA, and the tensors are on {device}"]
    if torch.version.hip is not None:
        return ["its kernels were never compiled for ROCm"]
    return [] if _HAS_TRITON else ["Triton is not installed"]


def _interpreter_reasons(device: torch.device) -> list[str]:
    return ["on a CPU only Triton's interpreter runs it, for tests"] if device.type == "cpu" else []


def _triton_reasons(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    if reasons := _no_triton_reasons(query.device):
        return reasons
    from sagan_layers.ops import attention_triton

    return attention_triton.reasons_against(query, key, value)


def _triton_reasons_unasked(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    return _interpreter_reasons(query.device)


def _triton_forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, keep_weights: bool
) -> tuple[Tensor, Tensor]:
    from sagan_layers.ops import attention_triton

    return attention_triton.forward(query, key, value, scale)


def _triton_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from sagan_layers.ops import attention_triton

    return attention_triton.backward(*args)


def _triton_double_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sagan_layers.ops import attention_triton

    return attention_triton.double_backward(*args)


_triton_attention = register_attention(
    "triton",
    AttentionKernels(
        forward=_triton_forward,
        backward=_triton_backward,
        double_backward=_triton_double_backward,
        kept=lambda query, key, value, scale, keep_weights: (
            (query.size(0), query.size(1)),
            reference.compute_dtype(query.dtype),
        ),
        channels_first=False,
        reads_output=True,
    ),
)


# --- sdpa ---------------------------------------------------------------------------------------------------


def _sdpa_reasons_unasked(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    return ["on a CPU 'chunked' is faster"] if query.device.type == "cpu" else []


def _sdpa_double_backward(
    query: Tensor, key: Tensor, value: Tensor, y: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Torch has no kernel for it.
    of_query, of_key, of_value, of_grad = (
        gradient.contiguous() for gradient in attention_chunked.double_backward(query, key, value, *rest)
    )
    return of_query, of_key, of_value, of_grad


_sdpa_attention = register_attention(
    "sdpa",
    AttentionKernels(
        forward=lambda query, key, value, scale, keep_weights: attention_sdpa.forward(
            query, key, value, scale
        ),
        backward=attention_sdpa.backward,
        double_backward=_sdpa_double_backward,
        kept=lambda query, key, value, scale, keep_weights: (
            (query.size(0), 1, attention_sdpa.lse_length(query, value)),
            reference.compute_dtype(query.dtype),
        ),
        channels_first=False,
        reads_output=True,
    ),
)


# --- chunked ------------------------------------------------------------------------------------------------


def _chunked_reasons_unasked(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    if query.device.type not in ("cpu", "cuda"):
        return [f"it was never tried on {query.device.type}"]
    few = reference.is_known(query.size(1) * key.size(1) < _FEW_WEIGHTS)
    if few and query.dtype in (torch.float32, torch.float64):
        return [f"with fewer than {_FEW_WEIGHTS} weights a sample 'reference' is as fast"]
    return []


def _chunked_backward(
    query: Tensor, key: Tensor, value: Tensor, y: None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return attention_chunked.backward(query, key, value, *rest)


def _chunked_double_backward(
    query: Tensor, key: Tensor, value: Tensor, y: None, kept: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return attention_chunked.double_backward(query, key, value, *rest)


_chunked_operation = register_attention(
    "chunked",
    AttentionKernels(
        forward=attention_chunked.forward,
        backward=_chunked_backward,
        double_backward=_chunked_double_backward,
        kept=attention_chunked.kept,
        channels_first=True,
        reads_output=False,
    ),
)


def _chunked_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    size = query.size(0) * query.size(1) * key.size(1) * query.element_size()
    keep = (
        torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in (query, key, value))
        and reference.is_known(
            size <= (_MOST_KEPT_BYTES_OF_HALF if query.element_size() == 2 else _MOST_KEPT_BYTES)
        )
    )
    return _chunked_operation(query, key, value, scale, keep)


# --- the table ----------------------------------------------------------------------------------------------

ATTENTION_BACKENDS: tuple[AttentionBackend, ...] = (
    AttentionBackend(
        "triton",
        _triton_reasons,
        lambda query, key, value, scale: _triton_attention(query, key, value, scale, False),
        _triton_reasons_unasked,
    ),
    AttentionBackend(
        "sdpa",
        attention_sdpa.reasons_against,
        lambda query, key, value, scale: _sdpa_attention(query, key, value, scale, False),
        _sdpa_reasons_unasked,
    ),
    AttentionBackend("chunked", _serves_everything, _chunked_attention, _chunked_reasons_unasked),
    AttentionBackend("reference", _serves_everything, reference.attention),
)


def chosen_name(name: str) -> str:
    """Return the backend's name that holds: the one that is forced, else ``name``."""
    return _forced[-1][0] if _forced else name


def check_attention_backend_name(name: str, *, also: tuple[str, ...] = ()) -> None:
    """Raise ``ValueError`` unless ``name`` is "auto", a backend of the table or one of ``also``."""
    known = ["auto", *(backend.name for backend in ATTENTION_BACKENDS), *also]
    if name not in known:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, known))}, got {name!r}")


def reasons_against_attention_backends(
    query: Tensor, key: Tensor, value: Tensor
) -> dict[str, tuple[list[str], list[str]]]:
    """Return for every backend why it cannot serve, and why it is not taken unasked."""
    return {
        backend.name: (
            backend.reasons_against(query, key, value),
            backend.reasons_against_unasked(query, key, value),
        )
        for backend in ATTENTION_BACKENDS
    }


def select_attention_backend(query: Tensor, key: Tensor, value: Tensor, name: str) -> AttentionBackend:
    """Return the backend that serves these inputs, or raise ``ValueError`` with every reason against."""
    name = chosen_name(name)
    if _forced and name == FUSED:
        name = "auto"  # attention alone has no such form
    check_attention_backend_name(name)
    return _select("attention", ATTENTION_BACKENDS, name, query, key, value)


def _select(operation: str, backends: Sequence[AnyBackend], name: str, *inputs: Any) -> AnyBackend:
    """Return the first backend of this name, or "auto", that has no reason against these inputs."""
    refusals = []
    for backend in backends:
        if name in ("auto", backend.name):
            reasons = list(backend.reasons_against(*inputs))
            if name == "auto":
                reasons += backend.reasons_against_unasked(*inputs)
            if not reasons:
                return backend
            refusals.append(f"{backend.name}: {'; '.join(reasons)}")
    raise ValueError(f"no {operation} backend serves these inputs ({' | '.join(refusals)})")


# --- the whole block ----------------------------------------------------------------------------------------

FUSED = "fused"

_fused_self_attention = register_self_attention(
    lambda query, key, value: run_attention(query, key, value, 1.0, "auto")
)


def reasons_against_fused(x: Tensor, weights: SelfAttentionWeights, pool_size: int) -> list[str]:
    """Return why the kernels of the whole block cannot serve, empty if they can."""
    if reasons := _no_triton_reasons(x.device):
        return reasons
    from sagan_layers.ops import self_attention_triton

    if torch.is_autocast_enabled(x.device.type):
        computed = torch.get_autocast_dtype(x.device.type)
        if x.dtype == computed:
            weights = weights.to(computed)
        else:
            reasons.append(f"autocast projects in {computed}, and x is {x.dtype}")
    if pool_size > 2:
        reasons.append(f"pool_size = {pool_size} is above 2")
    if weights.out is None and weights.out_bias is not None:
        reasons.append("a bias without an output projection")
    matrices = weights.query, weights.key, weights.value, weights.out
    return reasons + self_attention_triton.reasons_against(x, *matrices)


def run_self_attention(x: Tensor, weights: SelfAttentionWeights, pool_size: int, name: str) -> Tensor | None:
    """Compute the whole block in fused kernels where they were chosen; else return None.

    Raises:
        ValueError: if they were asked for by name and cannot serve.
    """
    name = chosen_name(name)
    if name not in ("auto", FUSED):
        return None
    reasons = reasons_against_fused(x, weights, pool_size)
    if reasons and name == FUSED:
        raise ValueError(f"no self-attention backend serves these inputs ({FUSED}: {'; '.join(reasons)})")
    if reasons or (name == "auto" and x.device.type == "cpu"):
        return None
    for served in _records:
        served.append(FUSED)
    weights = weights.to(x.dtype)  # no more than what autocast does
    tensors = [tensor for tensor in (x, *weights) if tensor is not None]
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return _fused_self_attention(x, weights, pool_size, save)


# --- conditional batch norm ---------------------------------------------------------------------------------


def _kernel_reasons(given: Given, process_group: Any) -> list[str]:
    """Return why kernels that autograd does not look into cannot serve."""
    reasons = []
    if given is not None and any(statistic.requires_grad for statistic in given):
        reasons.append("it has no gradients of given statistics")
    if process_group is not None and torch.compiler.is_compiling():
        reasons.append("torch.compile does not see its collective operations")
    return reasons


def _triton_norm_reasons(x: Tensor, given: Given, process_group: Any) -> list[str]:
    if reasons := _no_triton_reasons(x.device):
        return reasons
    from sagan_layers.ops import conditional_norm_triton

    return conditional_norm_triton.reasons_against(x) + _kernel_reasons(given, process_group)


def _triton_norm_reasons_unasked(x: Tensor, given: Given, process_group: Any) -> list[str]:
    if torch.compiler.is_compiling():
        return ["torch.compile writes kernels of its own from 'reference'"]
    return _interpreter_reasons(x.device)


def _blocked_reasons(x: Tensor, given: Given, process_group: Any) -> list[str]:
    if x.device.type != "cpu":
        return [f"it is made for a CPU's cache, and the tensors are on {x.device}"]
    return conditional_norm_blocked.reasons_against(x) + _kernel_reasons(given, process_group)


def _blocked_reasons_unasked(x: Tensor, given: Given, process_group: Any) -> list[str]:
    if reference.is_exporting():
        return ["an exported program should need torch alone"]
    if not torch.compiler.is_compiling() and type(x) not in (Tensor, torch.nn.Parameter):
        return [f"it looks at values and writes in place, and x is a {type(x).__name__}"]
    # The processes of a group must choose alike, and their batches may have different sizes.
    if process_group is None and x.numel() < _FEW_VALUES:
        return [f"below {_FEW_VALUES} values 'reference' is as fast"]
    return []


def _norm_kernels() -> Any:
    from sagan_layers.ops import conditional_norm_triton

    return conditional_norm_triton


CONDITIONAL_NORM_BACKENDS: tuple[ConditionalNormBackend, ...] = (
    ConditionalNormBackend(
        "triton",
        _triton_norm_reasons,
        register_conditional_norm(
            "triton",
            ConditionalNormKernels(
                forward=lambda *args: _norm_kernels().forward(*args),
                normalize=lambda *args: _norm_kernels().normalize(*args),
                backward=lambda *args: _norm_kernels().backward(*args),
            ),
        ),
        _triton_norm_reasons_unasked,
    ),
    ConditionalNormBackend(
        "blocked",
        _blocked_reasons,
        register_conditional_norm(
            "blocked",
            ConditionalNormKernels(
                forward=conditional_norm_blocked.forward,
                normalize=conditional_norm_blocked.normalize,
                backward=conditional_norm_blocked.backward,
            ),
        ),
        _blocked_reasons_unasked,
    ),
    ConditionalNormBackend("reference", _serves_everything, reference.conditional_batch_norm),
)


def check_conditional_norm_backend_name(name: str) -> None:
    """Raise ``ValueError`` unless ``name`` is "auto" or a backend of the table."""
    known = ["auto", *(backend.name for backend in CONDITIONAL_NORM_BACKENDS)]
    if name not in known:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, known))}, got {name!r}")


def select_conditional_norm_backend(
    x: Tensor, given: Given, process_group: Any, name: str
) -> ConditionalNormBackend:
    """Return the backend that serves these inputs, or raise ``ValueError`` with every reason against."""
    check_conditional_norm_backend_name(name)
    return _select("conditional batch norm", CONDITIONAL_NORM_BACKENDS, name, x, given, process_group)


# --- choices that hold for a stretch of code ----------------------------------------------------------------

_forced: list[tuple[str]] = []
_records: list[list[str]] = []


@contextlib.contextmanager
def force_attention_backend(name: str) -> Iterator[None]:
    """Make every call choose ``name`` until the context ends."""
    check_attention_backend_name(name, also=(FUSED,))
    entry = (name,)
    _forced.append(entry)
    try:
        yield
    finally:
        # This very entry: in several threads contexts need not end in the order they began.
        del _forced[next(i for i, other in enumerate(_forced) if other is entry)]


@contextlib.contextmanager
def record_attention_backends() -> Iterator[list[str]]:
    """Yield a list to which the name of the backend of every call is added."""
    served: list[str] = []
    _records.append(served)
    try:
        yield served
    finally:
        _records.remove(served)


def run_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, name: str) -> Tensor:
    """Compute attention on the selected backend."""
    backend = select_attention_backend(query, key, value, name)
    for served in _records:
        served.append(backend.name)
    return backend.run(query, key, value, scale)


# --- spectral norm ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpectralNormBackend:
    """One way to normalise weights.

    Attributes:
        name: as in the tests.
        reasons_against: takes (weight, dim); returns why it cannot be served, empty if it can.
        normalize: takes a list of tasks; returns their results, without a graph.
        gradient: takes (grad, weight, result, dim, eps, memory); None for the reference's.
        serves_one: whether it is taken for a single weight too, in place of the reference.
    """

    name: str
    reasons_against: Callable[[Tensor, int], list[str]]
    normalize: Callable[[list[SpectralNormTask]], list[SpectralNormResult]]
    gradient: Callable[[Tensor, Tensor, SpectralNormResult, int, float, Any], Tensor] | None = None
    serves_one: bool = True


def _cpu_gradient(
    grad: Tensor, weight: Tensor, result: SpectralNormResult, dim: int, eps: float, memory: Any
) -> Tensor:
    reused = spectral_norm_cpu.ReusedMemory() if memory is None else memory.gradient
    with reference.without_autocast(weight.device):
        return spectral_norm_cpu.gradient(grad, weight, result, dim, eps, reused)


def _grouped_gradient(
    grad: Tensor, weight: Tensor, result: SpectralNormResult, dim: int, eps: float, memory: Any
) -> Tensor:
    with reference.without_autocast(weight.device):
        return spectral_norm_grouped.gradient(grad, weight, result, dim, eps, memory)


def _normalize_by_reference(task: SpectralNormTask) -> SpectralNormResult:
    # Written out, since torch.compile of torch 2.6 knows neither slices of named tuples nor _replace.
    weight, sigma, u, v = reference.spectral_normalize(
        task.weight, task.u, task.v, task.n_power_iterations, task.eps, task.dim
    )
    return SpectralNormResult(weight.to(task.dtype), sigma, u, v)


SPECTRAL_NORM_BACKENDS: tuple[SpectralNormBackend, ...] = (
    SpectralNormBackend(
        "cpu",
        spectral_norm_cpu.reasons_against,
        lambda tasks: [spectral_norm_cpu.normalize(task) for task in tasks],
        _cpu_gradient,
    ),
    SpectralNormBackend(
        "grouped",
        spectral_norm_grouped.reasons_against,
        spectral_norm_grouped.normalize,
        _grouped_gradient,
        serves_one=False,
    ),
    SpectralNormBackend(
        "reference",
        lambda weight, dim: [],
        lambda tasks: [_normalize_by_reference(task) for task in tasks],
        serves_one=False,
    ),
)


def select_spectral_norm_backend(weight: Tensor, dim: int) -> SpectralNormBackend:
    """Return the first backend that serves a weight."""
    if _is_traced(weight):
        return SPECTRAL_NORM_BACKENDS[-1]
    return next(each for each in SPECTRAL_NORM_BACKENDS if not each.reasons_against(weight, dim))


def _is_traced(weight: Tensor) -> bool:
    """Whether something other than autograd follows the operations: a compiler, torch.func, a subclass."""
    if torch.compiler.is_compiling() or type(weight) not in (Tensor, torch.nn.Parameter):
        return True
    transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
    unpack: Any = torch.autograd.forward_ad.unpack_dual
    return bool(transformed()) or unpack(weight).tangent is not None


def run_spectral_norms(tasks: list[SpectralNormTask]) -> list[SpectralNormResult]:
    """Normalise all weights, in as few calls as their backends allow; the results have no graph."""
    groups: dict[str, list[int]] = {}
    for index, task in enumerate(tasks):
        name = select_spectral_norm_backend(task.weight, task.dim).name
        groups.setdefault(name, []).append(index)
    results: dict[int, SpectralNormResult] = {}
    with torch.no_grad():
        for backend in SPECTRAL_NORM_BACKENDS:
            indices = groups.get(backend.name, [])
            if indices:
                with reference.without_autocast(tasks[indices[0]].weight.device):
                    found = backend.normalize([tasks[index] for index in indices])
                results.update(zip(indices, found, strict=True))
    return [results[index] for index in range(len(tasks))]


def run_spectral_norm(task: SpectralNormTask) -> SpectralNormResult:
    """Normalise one weight; the normalised one has its graph."""
    backend = select_spectral_norm_backend(task.weight, task.dim)
    if not backend.serves_one:
        return _normalize_by_reference(task)
    with torch.no_grad(), reference.without_autocast(task.weight.device):
        (result,) = backend.normalize([task])
    return result._replace(weight=_with_gradient(task, result, backend))


def with_gradient(task: SpectralNormTask, result: SpectralNormResult) -> Tensor:
    """Return the normalised weight that was found before, as a function of the weight for autograd."""
    if _is_traced(task.weight) and not torch.compiler.is_compiling():
        # Torch.func and forward mode need plain operations; the same weight again, from u and v as they are.
        return _normalize_by_reference(task._replace(u=result.u, v=result.v, n_power_iterations=0)).weight
    return _with_gradient(task, result, select_spectral_norm_backend(task.weight, task.dim))


def _with_gradient(
    task: SpectralNormTask, result: SpectralNormResult, backend: SpectralNormBackend
) -> Tensor:
    if not (torch.is_grad_enabled() and task.weight.requires_grad):
        return result.weight
    weight: Tensor = NormalizedWeight.apply(  # type: ignore[no-untyped-call]
        task.weight, *result, task.dim, task.eps, backend.gradient, task.memory
    )
    return weight
