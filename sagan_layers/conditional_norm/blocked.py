"""Conditional batch norm on a CPU, in blocks that stay in the cache.

Every step runs a few torch operations on one block after the other, in place or into a block of scratch memory. So each
pass reads a feature map from memory once: one pass for the statistics, one for the output, two for backward. If a mean
is large compared with the standard deviation, values are centred before they are squared or scaled, and the rounding
error of the centre is corrected afterwards, so that no digits cancel.

A feature map is viewed as [N * C, L], or as [N, L, C] if the channels of a position are adjacent in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sagan_layers.conditional_norm.autograd import register_conditional_norm
from sagan_layers.conditional_norm.kernels import (
    Average,
    BackwardArguments,
    CoefficientGradients,
    CombineStatistics,
    ConditionalNormInputs,
    ConditionalNormKernels,
    ForwardArguments,
    opaque_unsupported_reasons,
)
from sagan_layers.torch_support import (
    accumulation_dtype,
    needs_plain_operations,
    tracing_reasons,
)

# With fewer values in a feature map the reference is as fast.
_FEW_VALUES = 2**16
# A thread's block, in the accumulation dtype: about the size of a core's cache.
BLOCK_BYTES = 2**21
# Values of a channel from which its mean is first estimated.
_ESTIMATE_VALUES = 32
# Width of the rows in which torch's kernel adds up columns.
ROW_VALUES = 1024
# Without centring, a mean of up to this many standard deviations costs at most three bits.
_NEAR_DEVIATIONS = 8.0
# If the estimated mean is further off, in standard deviations, squares around it have lost digits.
_MISSED_DEVIATIONS = 2.0


def unsupported_reasons(inputs: ConditionalNormInputs) -> list[str]:
    """Return why the blocks cannot serve."""
    if inputs.x.device.type != "cpu":
        return [f"it is made for a CPU's cache, and the tensors are on {inputs.x.device}"]
    return tracing_reasons() + opaque_unsupported_reasons(inputs)


def not_preferred_reasons(inputs: ConditionalNormInputs) -> list[str]:
    """Return why "auto" takes the reference, although the blocks could serve."""
    x = inputs.x
    if needs_plain_operations():
        return ["a tracer or forward mode needs plain operations"]
    if not torch.compiler.is_compiling() and type(x) not in (Tensor, torch.nn.Parameter):
        return [f"it reads values and writes in place, and x is a {type(x).__name__}"]
    # All processes of a group must make the same choice, and their batches may have different sizes.
    if inputs.process_group is None and x.numel() < _FEW_VALUES:
        return [f"below {_FEW_VALUES} values 'reference' is as fast"]
    return []


def forward(
    arguments: ForwardArguments, combine: CombineStatistics | None, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Write y; return the mean and biased variance that it was normalised with."""
    layout = _Layout(out)
    eps = arguments.eps
    values, results = layout.map(arguments.x), layout.map(out)
    centre = None
    if layout.adjacent_channels:
        mean, var = _statistics_of_columns(values.flatten(0, 1), 2 * layout.entries)
        if not _is_near(mean, var, eps):
            centre = mean.to(layout.dtype)
    else:
        centre = layout.estimate_mean(values)
    if centre is not None:
        mean, var = _statistics_around(centre, layout, values, results)
        if not _is_near(mean - centre, var, eps, _MISSED_DEVIATIONS):
            centre = mean.to(layout.dtype)
            mean, var = _statistics_around(centre, layout, values, results)
    if combine is not None:
        mean, var = combine(mean, var)
    var = var + (var - var)  # infinity becomes NaN: an overflow must not leave the bias alone
    remainder = mean if centre is None else mean - centre
    if centre is not None and results.dtype == layout.dtype:  # the results hold the centred values
        values, centre = results, None
    _scale_and_shift(layout, values, results, centre, remainder, var, arguments)
    return mean, var


def normalize(arguments: ForwardArguments, mean: Tensor, var: Tensor, out: Tensor) -> None:
    """Write y for the mean and variance to normalise with."""
    layout = _Layout(out)
    centre = None if _is_near(mean, var, arguments.eps) else mean.to(layout.dtype)
    remainder = mean if centre is None else mean - centre
    values, results = layout.map(arguments.x), layout.map(out)
    _scale_and_shift(layout, values, results, centre, remainder, var, arguments)


def backward(arguments: BackwardArguments, average: Average, out: Tensor | None) -> CoefficientGradients:
    """Write the gradient of x, if it is needed; return those of gain and bias."""
    grad_y, x, y, mean, var, gain, eps = arguments[:7]
    masked = torch.empty_like(y) if out is None and y is not None else out
    layout = _Layout(x if masked is None else masked)
    dtype = layout.dtype
    values, grad = layout.map(x), layout.map(grad_y)
    centre = mean.to(dtype)
    inverse_std = (var + eps).rsqrt_()
    grad_gain = grad_bias = None
    if y is not None or arguments.needs_sums:
        relu = () if y is None or masked is None else (layout.map(y), layout.map(masked))
        grad_bias, grad_gain = _sums(layout, grad, values, centre, relu)
        grad_gain.addcmul_(grad_bias, (mean - centre).to(dtype), value=-1).mul_(inverse_std.to(dtype))
        if relu:
            grad = relu[1]
    if out is None:
        return CoefficientGradients(grad_gain, grad_bias)
    gain = gain.to(dtype)
    maps = [grad, layout.map(out), layout.coefficients(gain * inverse_std.to(dtype))]
    if arguments.batch_statistics:
        assert grad_bias is not None
        assert grad_gain is not None
        totals = torch.stack([grad_bias, grad_gain]).mul_(gain).sum(1, dtype=torch.float64)
        grad_average, product_average = average(totals).mul_(inverse_std).neg_()
        slope = product_average.mul_(inverse_std)
        is_near = _is_near(mean, var, eps)
        offset = torch.addcmul(grad_average, slope, mean if is_near else mean - centre, value=-1)
        maps += [values, *(layout.coefficients(each.to(dtype)) for each in (slope, offset))]
        if not is_near:
            maps.append(layout.coefficients(centre))
    scratch = layout.scratch()
    wide_grad = None if out.dtype == dtype else layout.scratch()
    for grad_block, result, scale, *rest in layout.blocks(*maps):
        target = result
        if wide_grad is not None:
            grad_block = target = _view(wide_grad, grad_block.shape).copy_(grad_block)
        if rest:
            x_block, slope_block, offset_block, *centre_block = rest
            term = _view(scratch, grad_block.shape)
            x_block = _centred(x_block, *centre_block, out=term)
            layout.scale_and_shift(x_block, slope_block, offset_block, out=term)
            torch.addcmul(term, grad_block, scale, out=target)
        else:
            torch.mul(grad_block, scale, out=target)
        if target is not result:
            result.copy_(target)
    return CoefficientGradients(grad_gain, grad_bias)


conditional_batch_norm = register_conditional_norm(
    "blocked", lambda: ConditionalNormKernels(forward, normalize, backward)
)


class _Layout:
    """How feature maps of one shape and memory format are viewed, and split into blocks."""

    def __init__(self, like: Tensor) -> None:
        self.samples, self.channels = like.shape[:2]
        self.length = like.numel() // (self.samples * self.channels)
        self.dtype = accumulation_dtype(like.dtype)
        # With one position only both formats are the same, and adjacent channels are faster.
        self.adjacent_channels = like.movedim(1, -1).is_contiguous() and (
            self.length == 1 or not like.is_contiguous()
        )
        self.threads = torch.get_num_threads()
        self.entries = BLOCK_BYTES * self.threads // self.dtype.itemsize

    def map(self, x: Tensor) -> Tensor:
        """[N, C, *] -> [N * C, L] or [N, L, C]; a view if x has this layout's memory format."""
        if self.adjacent_channels:
            return x.movedim(1, -1).contiguous().view(self.samples, self.length, self.channels)
        return x.contiguous().view(-1, self.length)

    def coefficients(self, values: Tensor) -> Tensor:
        """[C] or [N, C] -> a tensor that is split like a map and broadcasts against its blocks."""
        if self.adjacent_channels:
            return values.unsqueeze(-2).expand(self.samples, self.length, -1)
        return values.expand(self.samples, -1).reshape(-1, 1)

    def scratch(self) -> Tensor:
        """Return memory for a block in the accumulation dtype."""
        row = self.channels * self.threads if self.adjacent_channels else self.length
        entries = min(max(self.entries, row), self.samples * self.channels * self.length)
        return torch.empty(entries, dtype=self.dtype)

    def blocks(self, *maps: Tensor) -> Iterable[Sequence[Tensor]]:
        """Split maps and coefficients at the same places."""
        if maps[0].numel() <= self.entries:
            return [maps]
        return zip(*map(self._split, maps), strict=True)

    def _split(self, x: Tensor) -> Iterable[Tensor]:
        if not self.adjacent_channels:
            return torch.unsafe_split(x, max(1, self.entries // self.length))
        samples = self.entries // (self.length * self.channels)
        if samples:
            return torch.unsafe_split(x, samples)
        positions = max(1, self.entries // self.channels // self.threads) * self.threads
        return [part for sample in x.unbind() for part in torch.unsafe_split(sample[None], positions, 1)]

    def sum(self, block: Tensor) -> Tensor:
        """Return the sums along the second axis."""
        if self.adjacent_channels and len(block) < self.threads and block.size(1) % self.threads == 0:
            # Torch would distribute the columns over threads. This way each adds up rows that are in its cache.
            return block.view(len(block), self.threads, -1, self.channels).sum(2).sum(1)
        return block.sum(1)

    def per_sample(self, sums: Sequence[Tensor]) -> Tensor:
        """Join the sums of all blocks to those of each sample and channel, [N, C]."""
        joined = torch.cat(list(sums)) if len(sums) > 1 else sums[0]
        joined = joined.view(self.samples, -1, self.channels)
        return joined.sum(1) if joined.size(1) > 1 else joined[:, 0]

    def estimate_mean(self, values: Tensor) -> Tensor:
        """Return an estimate of each channel's mean, [C], from a few positions in the middle of each sample."""
        few = min(self.length, -(-_ESTIMATE_VALUES // self.samples))
        middle = values.narrow(1, (self.length - few) // 2, few).to(self.dtype)
        return middle.view(self.samples, self.channels, few).mean((0, 2))

    def scale_and_shift(self, values: Tensor, scale: Tensor, shift: Tensor, *, out: Tensor) -> None:
        """Write ``scale * values + shift``; ``out`` may be the values."""
        if self.adjacent_channels:
            torch.addcmul(shift, values, scale, out=out)
        else:  # torch's loops are fast with one operand that is constant along a row, not with two
            torch.mul(values, scale, out=out).add_(shift)


def _statistics_around(
    centre: Tensor, layout: _Layout, values: Tensor, results: Tensor
) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance; leave ``values - centre`` in results of the accumulation dtype."""
    scratch = layout.scratch()
    moments = []
    for block, result, block_centre in layout.blocks(values, results, layout.coefficients(centre)):
        square = _view(scratch, block.shape)
        centred = _centred(block, block_centre, out=result if result.dtype == layout.dtype else square)
        moments.append((layout.sum(centred), layout.sum(torch.mul(centred, centred, out=square))))
    shift, mean_square = (
        layout.per_sample(sums).sum(0, dtype=torch.float64).div_(layout.samples * layout.length)
        for sums in zip(*moments, strict=True)
    )
    return centre + shift, mean_square.sub_(shift.square()).clamp_min_(0.0)


def _statistics_of_columns(positions: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each column of [positions, C], by torch's kernel.

    The relative error of the mean is about 1e-7, so the mean must be within a few standard deviations of 0.
    """
    columns = positions.size(1)
    means, variances, counts = [], [], []
    for rows in _wide_rows(positions, entries):
        unused = (torch.zeros(rows.size(1), dtype=accumulation_dtype(rows.dtype)) for _ in range(2))
        mean, var = torch.ops.aten.batch_norm_update_stats(rows.t()[None, :, :, None], *unused, 0.0)
        means.append(mean.view(-1, columns))
        variances.append(var.view(-1, columns))
        counts += [float(len(rows))] * len(means[-1])
    weights = torch.tensor(counts, dtype=torch.float64).div_(len(positions)).unsqueeze(1)
    all_means, all_variances = (torch.cat(parts).double() for parts in (means, variances))
    mean = (weights * all_means).sum(0)
    return mean, (weights * all_variances.add_(all_means.sub_(mean).square_())).sum(0)


def _wide_rows(positions: Tensor, entries: int) -> list[Tensor]:
    """Split [positions, C] into blocks of rows of several positions each.

    Torch's kernel adds one row to the next. Wide rows make sums of few terms, which keep their digits, and threads do
    not write to the same cache line. Positions that do not fill a row come last, one in each row.
    """
    columns = positions.size(1)
    positions_per_row = max(1, ROW_VALUES // columns)
    whole = len(positions) // positions_per_row * positions_per_row
    blocks: list[Tensor] = []
    if whole:
        wide = positions[:whole].view(-1, positions_per_row * columns)
        blocks += torch.unsafe_split(wide, max(1, entries // wide.size(1)))
    return blocks if whole == len(positions) else [*blocks, positions[whole:]]


def _sums(
    layout: _Layout, grad: Tensor, values: Tensor, centre: Tensor, relu: Sequence[Tensor]
) -> Iterable[Tensor]:
    """Return the sums of grad and of ``grad * (values - centre)`` for each sample and channel, both [N, C].

    ``relu`` is empty, or ReLU's output and a map: then grad is masked by ReLU first, and written to that map.
    """
    scratch = layout.scratch()
    wide_grad = None if grad.dtype == layout.dtype else layout.scratch()
    sums = []
    maps = (grad, values, layout.coefficients(centre), *relu)
    for grad_block, block, block_centre, *relu_blocks in layout.blocks(*maps):
        if relu_blocks:
            output, masked = relu_blocks
            grad_block = torch.ops.aten.threshold_backward.grad_input(
                grad_block, output, 0, grad_input=masked
            )
        if wide_grad is not None:
            grad_block = _view(wide_grad, grad_block.shape).copy_(grad_block)
        products = _centred(block, block_centre, out=_view(scratch, block.shape)).mul_(grad_block)
        sums.append((layout.sum(grad_block), layout.sum(products)))
    return (layout.per_sample(parts) for parts in zip(*sums, strict=True))


def _scale_and_shift(
    layout: _Layout,
    values: Tensor,
    results: Tensor,
    centre: Tensor | None,
    mean: Tensor,
    var: Tensor,
    arguments: ForwardArguments,
) -> None:
    """Write ``gain * (values - centre - mean) / sqrt(var + eps) + bias``, and ReLU of it, into results."""
    dtype = layout.dtype
    scale = arguments.gain.to(dtype) * (var + arguments.eps).rsqrt_().to(dtype)
    shift = torch.addcmul(arguments.bias.double(), mean, scale.double(), value=-1).to(dtype)
    maps = [values, results, *map(layout.coefficients, (scale, shift))]
    if centre is not None:
        maps.append(layout.coefficients(centre))
    scratch = None if results.dtype == dtype else layout.scratch()
    one_call = layout.adjacent_channels and centre is None and scratch is None and not arguments.relu
    for block, result, block_scale, block_shift, *block_centre in (
        [maps] if one_call else layout.blocks(*maps)
    ):
        target = result if scratch is None else _view(scratch, result.shape)
        layout.scale_and_shift(
            _centred(block, *block_centre, out=target), block_scale, block_shift, out=target
        )
        if arguments.relu:
            target.relu_()
        if target is not result:
            result.copy_(target)


def _is_near(mean: Tensor, var: Tensor, eps: float, deviations: float = _NEAR_DEVIATIONS) -> bool:
    """Whether every mean is so few deviations from 0 that values can be scaled without centring them first."""
    return bool((mean.square() <= (var + eps).mul_(deviations**2)).all())


def _centred(x: Tensor, centre: Tensor | None = None, *, out: Tensor) -> Tensor:
    """Return ``x - centre`` in ``out``; without a centre x, converted into ``out`` if the dtypes differ."""
    if x.dtype != out.dtype:
        x = out.copy_(x)
    return x if centre is None else torch.sub(x, centre, out=out)


def _view(flat: Tensor, shape: torch.Size) -> Tensor:
    return flat[: shape.numel()].view(shape)
