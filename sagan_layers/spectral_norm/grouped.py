"""Spectral normalisation of many weights on a GPU, in few launches and without a synchronisation.

The vectors of all weights are the rows of one tensor, padded with zeros, so that norms, divisions and sigma are single
operations over all layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sagan_layers.spectral_norm import reference
from sagan_layers.spectral_norm.autograd import SpectralNormKernels
from sagan_layers.spectral_norm.layout import layout_of, same_strides
from sagan_layers.spectral_norm.reference import SpectralNormOptions, SpectralNormResult, SpectralNormTask


def unsupported_reasons(weight: Tensor, dim: int) -> list[str]:
    """Return why it cannot normalise a weight."""
    reasons = []
    if weight.device.type != "cuda":
        reasons.append(f"it saves launches on a GPU, and the weight is on {weight.device}")
    if weight.dtype not in (torch.float32, torch.float64):
        reasons.append(f"{weight.dtype} would have to be converted whole")
    if weight.layout != torch.strided:
        return [*reasons, "the weight is not strided"]
    layout = layout_of(weight, dim)
    if not layout.is_dense:
        reasons.append("the weight does not fill its memory")
    if layout.sizes[0] != 1 and layout.sizes[2] != 1:
        reasons.append("outputs lie between other axes")
    return reasons


def _normalize(tasks: list[SpectralNormTask]) -> list[SpectralNormResult]:
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, task in enumerate(tasks):
        alike = task.options._replace(dim=0, dtype=task.weight.dtype, memory=None)
        groups.setdefault((task.weight.device, alike), []).append(index)
    results: dict[int, SpectralNormResult] = {}
    for indices in groups.values():
        results.update(zip(indices, _normalize_group([tasks[index] for index in indices]), strict=True))
    return [results[index] for index in range(len(tasks))]


def _normalize_group(tasks: list[SpectralNormTask]) -> list[SpectralNormResult]:
    options = tasks[0].options
    eps, eps_mode = options.eps, options.eps_mode
    layouts = [layout_of(task.weight, task.options.dim) for task in tasks]
    from_u = options.iterate_from == "u"
    matrices = [_matrix(task.weight.detach(), task.options.dim) for task in tasks]  # [firsts, seconds]
    firsts = [task.u for task in tasks]
    seconds = [layout.in_memory_order(task.v) for layout, task in zip(layouts, tasks, strict=True)]
    if not from_u:
        matrices, firsts, seconds = [matrix.t() for matrix in matrices], seconds, firsts
    like = matrices[0]
    heights, widths = [m.size(0) for m in matrices], [m.size(1) for m in matrices]
    first_rows, second_rows = (like.new_zeros(len(tasks), max(sizes)) for sizes in (heights, widths))
    torch._foreach_copy_(_cut(first_rows, heights), firsts)
    torch._foreach_copy_(_cut(second_rows, widths), seconds)
    first_products, second_products = torch.zeros_like(first_rows), torch.zeros_like(second_rows)
    for _ in range(options.n_power_iterations):
        transposed = [matrix.t() for matrix in matrices]
        _multiply(transposed, _cut(first_rows, heights), _cut(second_products, widths))
        second_rows = reference.unit(second_products, eps, eps_mode, otherwise=second_rows)
        _multiply(matrices, _cut(second_rows, widths), _cut(first_products, heights))
        first_rows = reference.unit(first_products, eps, eps_mode, otherwise=first_rows)
    if options.n_power_iterations == 0:
        _multiply(matrices, _cut(second_rows, widths), _cut(first_products, heights))
    sigmas = (first_rows * first_products).sum(1)
    divisors = reference.spectral_divisor(sigmas, reference.least_norm(eps, eps_mode)).unbind()
    results = []
    for index, (task, layout, first, second) in enumerate(
        zip(tasks, layouts, _cut(first_rows, heights), _cut(second_rows, widths), strict=True)
    ):
        u, v = (first, second) if from_u else (second, first)
        weight = task.weight.detach()
        normalized = torch.empty_like(weight, dtype=task.options.dtype)
        torch.div(weight, divisors[index], out=normalized)
        results.append(SpectralNormResult(normalized, sigmas[index], u, layout.in_canonical_order(v)))
    return results


def _multiply(matrices: list[Tensor], vectors: list[Tensor], out: list[Tensor]) -> None:
    for matrix, vector, product in zip(matrices, vectors, out, strict=True):
        torch.mv(matrix, vector, out=product)


def _cut(rows: Tensor, sizes: list[int]) -> list[Tensor]:
    return [row[:size] for row, size in zip(rows.unbind(), sizes, strict=True)]


def _gradient(
    grad: Tensor, weight: Tensor, result: SpectralNormResult, options: SpectralNormOptions
) -> Tensor:
    out = torch.empty_like(weight)
    if grad.dtype != out.dtype or not same_strides(grad, out):
        grad = out.copy_(grad)
    u, sigma = result.u, result.sigma
    least = reference.least_norm(options.eps, options.eps_mode)
    divisor = reference.spectral_divisor(sigma, least)
    inner = torch.where(sigma.abs() > least, (grad * result.weight).sum(), torch.zeros_like(sigma))
    v = layout_of(weight, options.dim).in_memory_order(result.v)
    torch.div(grad, divisor, out=out)
    _matrix(out, options.dim).addr_(u * (-inner / divisor), v)
    return out


KERNELS = SpectralNormKernels(_normalize, _gradient)


def _matrix(tensor: Tensor, dim: int) -> Tensor:
    """Return a view [outputs, rest], the rest in memory order."""
    blocks = layout_of(tensor, dim).blocks(tensor)
    return blocks[0] if blocks.size(0) == 1 else blocks[..., 0].t()
