"""What all Triton kernels and their launchers share.

Importing this file imports Triton, so only a backend's Triton files do. :func:`sagan_layers.backends.no_triton_reasons`
tells beforehand whether they can be imported and run on a device.
"""
# Kernels are not Python for a type checker, and Triton ships no types.
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

# Kernels compute offsets inside a sample in 32 bits. The margin is for masked positions past the end of a sample.
MAX_SAMPLE_SPAN = 2**31 - 2**16

LOG2_E = tl.constexpr(1.4426950408889634)


class Tile(Protocol):
    """What every kernel's tile has beside its block sizes."""

    @property
    def num_warps(self) -> int:
        """Warps of a program."""

    @property
    def num_stages(self) -> int:
        """How many blocks ahead loads are issued."""


class CompileJob(NamedTuple):
    """One configuration of a kernel, to compile without a GPU.

    Attributes:
        kernel: the Triton function.
        signature: the type of each argument; ":16" after it stands for a known multiple of 16.
        constexprs: the arguments that are known when the kernel is compiled.
        tile: warps and stages, beside the block sizes.
        label: names the configuration.
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    tile: Tile
    label: str


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Return x in a narrower dtype, rounded to nearest even as GPUs do; the interpreter would cut bfloat16."""
    if _ROUNDS_BY_HAND and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


# Whether Triton's interpreter runs the kernels, on the CPU, for tests.
INTERPRETED = not isinstance(rounded, triton.JITFunction)
_ROUNDS_BY_HAND = tl.constexpr(INTERPRETED)


def accumulator(dtype: torch.dtype) -> Any:
    """Return Triton's dtype in which kernels accumulate tensors of ``dtype``."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def float32_precision() -> str:
    """Return "tf32" where torch takes it for its own products, else "tf32x3": three of them, as good as float32."""
    matmul = torch.backends.cuda.matmul
    setting = getattr(matmul, "fp32_precision", None)  # torch < 2.9 has only the older switch
    allowed = matmul.allow_tf32 if setting is None else setting == "tf32"
    return "tf32" if allowed else "tf32x3"


def device_guard(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which kernels are launched on the tensor's device."""
    guard: contextlib.AbstractContextManager[object] = torch.cuda.device_of(x)
    return guard


def launch_options(tile: Tile) -> dict[str, Any]:
    """Return the options of a launch.

    The compiler must not fuse multiplications and additions, so that two kernels compute a product with the same bits.
    """
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": False}


def unsupported_reasons(x: Tensor, *served: torch.dtype) -> list[str]:
    """Return why no kernel for these dtypes can serve a tensor on a device that runs Triton.

    The interpreter takes float32 and float64 as well.
    """
    reasons = []
    if x.device.type == "cuda" and not INTERPRETED:
        major, minor = torch.cuda.get_device_capability(x.device)
        if major < 8:
            reasons.append(f"needs compute capability 8.0, got {major}.{minor}")
    if x.dtype not in served and not (INTERPRETED and x.dtype in (torch.float32, torch.float64)):
        reasons.append(f"serves {', '.join(map(str, served))}, got {x.dtype}")
    return reasons


def sample_span(x: Tensor) -> int:
    """Return how far the last element of a sample lies from its first, in elements."""
    return sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))


def large_sample_reasons(x: Tensor) -> list[str]:
    """Return why 32-bit offsets do not reach every element of a sample, or of a contiguous copy."""
    if max(sample_span(x), x[:1].numel()) < MAX_SAMPLE_SPAN:
        return []
    return [f"a sample spans {MAX_SAMPLE_SPAN} elements or more"]


def compile_job(
    kernel: Any,
    tile: Tile,
    label: str,
    constexprs: dict[str, Any],
    types: dict[str, str],
    other_type: str,
) -> CompileJob:
    """Return a job for a kernel.

    Args:
        kernel: the Triton function.
        tile: its tile.
        label: names the configuration.
        constexprs: arguments known in advance; those that the kernel does not take are dropped.
        types: of arguments that launches pass.
        other_type: of all others.
    """
    constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
    signature = {
        name: "constexpr" if name in constexprs else types.get(name, other_type) for name in kernel.arg_names
    }
    return CompileJob(kernel, signature, constexprs, tile, label)
