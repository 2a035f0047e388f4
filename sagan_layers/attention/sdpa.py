"""Attention through PyTorch's fused kernels, padded to widths that they support.

The kernels are called by name, so that torch does not silently replace them with the one that builds the whole
matrix. They are: on a CPU flash attention, on CUDA flash attention (half precision, widths up to 256) or the
memory-efficient one. Flash attention needs query and value of equal width, so the narrower is padded with zeros;
on CUDA widths are also padded to a multiple of 8.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sagan_layers.attention import chunked
from sagan_layers.attention.autograd import (
    AttentionKernels,
    BackwardInputs,
    GradGrads,
    register_attention,
)
from sagan_layers.attention.reference import AttentionInputs
from sagan_layers.torch_support import accumulation_dtype, is_tracing, tracing_reasons, without_autocast

_HALF = (torch.bfloat16, torch.float16)
_MAX_SAMPLES_ON_CUDA = 65_535  # the kernels' grids have the batch on an axis of this length
_MAX_FLASH_WIDTH_ON_CUDA = 256


def unsupported_reasons(inputs: AttentionInputs) -> list[str]:
    """Return why none of the fused kernels can serve."""
    query = inputs.query
    device = query.device
    if device.type == "cpu" or is_tracing():
        return tracing_reasons()
    if device.type != "cuda":
        return [f"torch's fused attention is used on CPU and CUDA, and the tensors are on {device}"]
    reasons = []
    if torch.version.hip is not None:
        reasons.append("torch's kernels for ROCm were never tried")
    if query.dtype == torch.float64:
        reasons.append("no fused kernel of torch takes float64 on CUDA")
    if query.size(0) > _MAX_SAMPLES_ON_CUDA:
        reasons.append(f"N = {query.size(0)} is above {_MAX_SAMPLES_ON_CUDA}")
    if query.dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        reasons.append("bfloat16 needs compute capability 8.0")
    return reasons


def not_preferred_reasons(inputs: AttentionInputs) -> list[str]:
    """Return why "auto" takes a later backend, although this one could serve."""
    return ["on a CPU 'chunked' is faster"] if inputs.query.device.type == "cpu" else []


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return attention with derivatives of every order."""
    return _attention(query, key, value, scale, False)


def served_by(query: Tensor, value: Tensor) -> str:
    """Return which of torch's kernels serves: "flash_for_cpu", "flash" or "efficient"."""
    if query.device.type == "cpu":
        return "flash_for_cpu"
    half = query.dtype in _HALF and torch.cuda.get_device_capability(query.device) >= (8, 0)
    widest = max(query.size(2), value.size(2))
    large = torch.cuda.get_device_capability(query.device) in ((8, 0), (9, 0), (10, 0))
    # On smaller chips flash attention's backward does not support widths from 193 to 224.
    fits = widest <= _MAX_FLASH_WIDTH_ON_CUDA and (large or not 192 < widest <= 224)
    return "flash" if half and fits else "efficient"


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, save_weights: bool
) -> tuple[Tensor, Tensor]:
    """Return the output, [N, L, Ev], and the kernel's log-sum-exp, [N, 1, >= L], float32 or float64."""
    width = value.size(2)
    kernel = served_by(query, value)
    factor, scale = _positive(scale)
    with without_autocast(query.device):
        query = query if factor == 1.0 else query * factor
        query, key, value = _as_heads(kernel, query, key, value)
        if kernel == "flash_for_cpu":
            y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, scale=scale
            )
        elif kernel == "flash":
            y, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
        else:
            y, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
                query, key, value, None, True, scale=scale
            )
    # CPU and CUDA kernels lay out their results differently; the registered operation promises one form.
    return y[:, 0, :, :width].clone(memory_format=torch.contiguous_format), lse.contiguous()


def backward(inputs: BackwardInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    query, key, value, y, lse, grad_y, scale = inputs
    assert y is not None
    kernel = served_by(query, value)
    widths = query.size(2), key.size(2), value.size(2)
    factor, scale = _positive(scale)
    with without_autocast(query.device):
        query = query if factor == 1.0 else query * factor
        query, key, value = _as_heads(kernel, query, key, value)
        y, grad_y = (_padded(tensor, value.size(3)) for tensor in (y, grad_y))
        if kernel == "flash_for_cpu":
            gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_y, query, key, value, y, lse, 0.0, False, scale=scale
            )
        elif kernel == "flash":
            no_seed = torch.zeros(2, dtype=torch.uint64, device=query.device)  # nothing is dropped
            gradients = torch.ops.aten._scaled_dot_product_flash_attention_backward(
                grad_y, query, key, value, y, lse, None, None, query.size(2), key.size(2), 0.0, False,
                no_seed, no_seed, scale=scale,
            )  # fmt: skip
        else:
            no_seed = torch.zeros((), dtype=torch.int64, device=query.device)
            gradients = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
                grad_y, query, key, value, None, y, lse, no_seed, no_seed, 0.0,
                [True, True, True, False], scale=scale,
            )[:3]  # fmt: skip
    grad_query, grad_key, grad_value = (
        gradient[:, 0, :, :width].clone(memory_format=torch.contiguous_format)
        for gradient, width in zip(gradients, widths, strict=True)
    )
    return grad_query if factor == 1.0 else grad_query * factor, grad_key, grad_value


def _positive(scale: float) -> tuple[float, float]:
    """Return a factor of the query, exact in every dtype, and a scale above 0.

    Flash attention on CUDA looks for the largest logit before it multiplies by the scale.
    """
    if scale > 0:
        return 1.0, scale
    return (-1.0, -scale) if scale < 0 else (0.0, 1.0)


def double_backward(inputs: BackwardInputs, grad_grads: GradGrads) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and grad_y; torch has no kernel for it."""
    grad_query, grad_key, grad_value, grad_grad_y = (
        gradient.contiguous() for gradient in chunked.double_backward(inputs, grad_grads)
    )
    return grad_query, grad_key, grad_value, grad_grad_y


def saved_form(
    query: Tensor, key: Tensor, value: Tensor, scale: float, save_weights: bool
) -> tuple[tuple[int, int, int], torch.dtype]:
    """Return shape and dtype of the kernel's log-sum-exp; the memory-efficient one pads L to a multiple of 32."""
    L = query.size(1)
    length = L if served_by(query, value) != "efficient" else (L + 31) // 32 * 32
    return (query.size(0), 1, length), accumulation_dtype(query.dtype)


def _as_heads(kernel: str, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[N, length, width] -> [N, 1, length, padded width]."""
    align = 1 if kernel == "flash_for_cpu" else 8
    query_width, value_width = (-(-tensor.size(2) // align) * align for tensor in (query, value))
    if kernel != "efficient":
        query_width = value_width = max(query_width, value_width)
    return _padded(query, query_width), _padded(key, query_width), _padded(value, value_width)


def _padded(tensor: Tensor, width: int) -> Tensor:
    missing = width - tensor.size(2)
    # The kernels assume that the width has stride 1.
    tensor = F.pad(tensor, (0, missing)) if missing else tensor.contiguous()
    # Not unsqueeze: where the length is 1, the new axis would get a stride that some kernels refuse.
    return tensor.view(tensor.size(0), 1, *tensor.shape[1:])


_attention = register_attention(
    "sdpa",
    AttentionKernels(forward, backward, double_backward, saved_form, channels_first=False, reads_output=True),
)
