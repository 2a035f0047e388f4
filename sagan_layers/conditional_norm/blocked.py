"""Conditional batch norm on a CPU, in blocks that stay in the cache.

Every step is a few of torch's operations on one block after the other, in place or into a block of scratch memory,
so that a feature map comes from memory once a pass: one pass for the statistics, one for the output, two for
backward. Where a mean is large beside the standard deviation, values are centred before they are squared or scaled,
and what the rounded centre lacks of the mean is made up for, so that no digits cancel.

A feature map is seen as [N * C, L], or as [N, L, C] where the channels of a position lie next to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from sagan_layers.torch_support import accumulation_dtype

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Bytes of a block for each thread, in the compute dtype: about what a core has of cache for itself.
BLOCK_BYTES = 2**21
# So many values of a channel give the first guess of its mean.
GUESS_VALUES = 32
# So many numbers stand next to each other where torch's kernels add up columns.
SIDE_BY_SIDE = 1024
# Up to so many standard deviations a mean costs three bits at the most where values are not centred first.
NEAR = 8.0
# From so many on a guess of the mean was so bad that the squares around it have lost digits.
MISSED = 2.0


def unsupported_reasons(x: Tensor) -> list[str]:
    """Return why a feature map on a CPU cannot be served."""
    return [] if x.dtype in DTYPES else [f"{x.dtype} is not served"]


def forward(
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    eps: float,
    relu: bool,
    combine: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
    to: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write y; return the mean and biased variance that it was normalised with, both [C], float64.

    Args:
        x: [N, C, *].
        gain: [N, C] or [C].
        bias: [N, C] or [C].
        eps: added to the variance.
        relu: whether negative values of y are replaced by 0.
        combine: takes mean and variance of x and returns those to use, if they are to be of more than x.
        to: where y goes, contiguous or channels_last.
    """
    layout = _Layout(to)
    values, results = layout.map(x), layout.map(to)
    guess = None
    if layout.adjacent_channels:
        mean, var = _statistics_of_columns(values.flatten(0, 1), 2 * layout.entries)
        if not _is_near(mean, var, eps):
            guess = mean.to(layout.dtype)
    else:
        guess = layout.guess_mean(values)
    if guess is not None:
        mean, var = _statistics_around(guess, layout, values, results)
        if not _is_near(mean - guess, var, eps, MISSED):
            guess = mean.to(layout.dtype)
            mean, var = _statistics_around(guess, layout, values, results)
    if combine is not None:
        mean, var = combine(mean, var)
    if guess is None:
        _scale_and_shift(layout, values, results, None, mean, var, gain, bias, eps, relu)
    elif results.dtype == layout.dtype:  # which hold the centred values
        _scale_and_shift(layout, results, results, None, mean - guess, var, gain, bias, eps, relu)
    else:
        _scale_and_shift(layout, values, results, guess, mean - guess, var, gain, bias, eps, relu)
    return mean, var


def normalize(
    x: Tensor, mean: Tensor, var: Tensor, gain: Tensor, bias: Tensor, eps: float, relu: bool, to: Tensor
) -> None:
    """Write y for a given mean and variance."""
    layout = _Layout(to)
    centre = None if _is_near(mean, var, eps) else mean.to(layout.dtype)
    rest = mean if centre is None else mean - centre
    _scale_and_shift(layout, layout.map(x), layout.map(to), centre, rest, var, gain, bias, eps, relu)


def backward(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gain: Tensor,
    eps: float,
    average: Callable[[Tensor], Tensor] | None,
    of_coefficients: bool,
    to: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Write the gradient of x; return those of gain and bias for each sample, [N, C] in the compute dtype.

    Args:
        grad_y: as x.
        x: [N, C, *].
        y: the output if it went through ReLU, else None.
        mean: [C], float64.
        var: [C], float64.
        gain: [N, C] or [C].
        eps: added to the variance.
        average: takes sums over this batch, [2, C], and returns averages over all values of a channel; None if mean
            and variance were given.
        of_coefficients: whether the gradients of gain and bias are wanted.
        to: where the gradient of x goes, contiguous or channels_last; None if it is not wanted.
    """
    masked = torch.empty_like(y) if to is None and y is not None else to
    layout = _Layout(x if masked is None else masked)
    dtype = layout.dtype
    values, grad = layout.map(x), layout.map(grad_y)
    centre = mean.to(dtype)
    inverse_std = (var + eps).rsqrt_()
    grad_gain = grad_bias = None
    if y is not None or of_coefficients or average is not None:
        relu = () if y is None or masked is None else (layout.map(y), layout.map(masked))
        grad_bias, grad_gain = _sums(layout, grad, values, centre, relu)
        grad_gain.addcmul_(grad_bias, (mean - centre).to(dtype), value=-1).mul_(inverse_std.to(dtype))
        if relu:
            grad = relu[1]
    if to is None:
        return grad_gain, grad_bias
    gain = gain.to(dtype)
    maps = [grad, layout.map(to), layout.coefficients(gain * inverse_std.to(dtype))]
    if average is not None and grad_bias is not None and grad_gain is not None:
        totals = torch.stack([grad_bias, grad_gain]).mul_(gain).sum(1, dtype=torch.float64)
        of_grad, of_product = average(totals).mul_(inverse_std).neg_()
        slope = of_product.mul_(inverse_std)
        is_near = _is_near(mean, var, eps)
        offset = torch.addcmul(of_grad, slope, mean if is_near else mean - centre, value=-1)
        maps += [values, *(layout.coefficients(each.to(dtype)) for each in (slope, offset))]
        if not is_near:
            maps.append(layout.coefficients(centre))
    scratch = layout.scratch()
    wide_grad = None if to.dtype == dtype else layout.scratch()
    for part, result, scale, *rest in layout.blocks(*maps):
        room = result
        if wide_grad is not None:
            part = room = _view(wide_grad, part.shape).copy_(part)
        if rest:
            part_of_x, part_slope, part_offset, *part_centre = rest
            term = _view(scratch, part.shape)
            part_of_x = _centred(part_of_x, *part_centre, room=term)
            layout.scale_and_shift(part_of_x, part_slope, part_offset, out=term)
            torch.addcmul(term, part, scale, out=room)
        else:
            torch.mul(part, scale, out=room)
        if room is not result:
            result.copy_(room)
    return grad_gain, grad_bias


class _Layout:
    """How feature maps of one shape and memory format are seen, and cut into blocks."""

    def __init__(self, like: Tensor) -> None:
        self.samples, self.channels = like.shape[:2]
        self.length = like.numel() // (self.samples * self.channels)
        self.dtype = accumulation_dtype(like.dtype)
        # Where there is one position only, both formats are the same, and this is the faster one.
        self.adjacent_channels = like.movedim(1, -1).is_contiguous() and (
            self.length == 1 or not like.is_contiguous()
        )
        self.threads = torch.get_num_threads()
        self.entries = BLOCK_BYTES * self.threads // self.dtype.itemsize

    def map(self, x: Tensor) -> Tensor:
        """[N, C, *] -> [N * C, L] or [N, L, C]; a view of what is in this layout's memory format."""
        if self.adjacent_channels:
            return x.movedim(1, -1).contiguous().view(self.samples, self.length, self.channels)
        return x.contiguous().view(-1, self.length)

    def coefficients(self, values: Tensor) -> Tensor:
        """[C] or [N, C] -> what is cut like a map and broadcasts against its blocks."""
        if self.adjacent_channels:
            return values.unsqueeze(-2).expand(self.samples, self.length, -1)
        return values.expand(self.samples, -1).reshape(-1, 1)

    def scratch(self) -> Tensor:
        """Return memory for a block in the compute dtype."""
        row = self.channels * self.threads if self.adjacent_channels else self.length
        entries = min(max(self.entries, row), self.samples * self.channels * self.length)
        return torch.empty(entries, dtype=self.dtype)

    def blocks(self, *maps: Tensor) -> Iterable[Sequence[Tensor]]:
        """Cut maps and coefficients alike."""
        if maps[0].numel() <= self.entries:
            return [maps]
        return zip(*map(self._cut, maps), strict=True)

    def _cut(self, x: Tensor) -> Iterable[Tensor]:
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
            # Torch would share out the columns. So each thread adds up the rows that it has in its cache.
            return block.view(len(block), self.threads, -1, self.channels).sum(2).sum(1)
        return block.sum(1)

    def per_sample(self, sums: Sequence[Tensor]) -> Tensor:
        """Return sums along the second axis of all blocks as those of each sample and channel, [N, C]."""
        joined = torch.cat(list(sums)) if len(sums) > 1 else sums[0]
        joined = joined.view(self.samples, -1, self.channels)
        return joined.sum(1) if joined.size(1) > 1 else joined[:, 0]

    def guess_mean(self, values: Tensor) -> Tensor:
        """Return a mean of each channel, [C], from a few positions in the middle of each sample's rows."""
        few = min(self.length, -(-GUESS_VALUES // self.samples))
        middle = values.narrow(1, (self.length - few) // 2, few).to(self.dtype)
        return middle.view(self.samples, self.channels, few).mean((0, 2))

    def scale_and_shift(self, values: Tensor, scale: Tensor, shift: Tensor, *, out: Tensor) -> None:
        """Write ``scale * values + shift``; ``out`` may be the values."""
        if self.adjacent_channels:
            torch.addcmul(shift, values, scale, out=out)
        else:  # torch's loops are fast with one operand that is constant along a row, not with two
            torch.mul(values, scale, out=out).add_(shift)


def _statistics_around(
    guess: Tensor, layout: _Layout, values: Tensor, results: Tensor
) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance; leave ``values - guess`` in results that are of the compute dtype."""
    scratch = layout.scratch()
    moments = []
    for part, result, centre in layout.blocks(values, results, layout.coefficients(guess)):
        room = _view(scratch, part.shape)
        centred = _centred(part, centre, room=result if result.dtype == layout.dtype else room)
        moments.append((layout.sum(centred), layout.sum(torch.mul(centred, centred, out=room))))
    shift, square = (
        layout.per_sample(sums).sum(0, dtype=torch.float64).div_(layout.samples * layout.length)
        for sums in zip(*moments, strict=True)
    )
    return guess + shift, square.sub_(shift.square()).clamp_min_(0.0)


def _statistics_of_columns(positions: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each column of [positions, C], by torch's own kernel.

    The mean is in error by some 1e-7 of itself: good where it is not many standard deviations.
    """
    columns = positions.size(1)
    means, variances, counts = [], [], []
    for rows in _side_by_side(positions, entries):
        unused = (torch.zeros(rows.size(1), dtype=accumulation_dtype(rows.dtype)) for _ in range(2))
        mean, var = torch.ops.aten.batch_norm_update_stats(rows.t()[None, :, :, None], *unused, 0.0)
        means.append(mean.view(-1, columns))
        variances.append(var.view(-1, columns))
        counts += [float(len(rows))] * len(means[-1])
    shares = torch.tensor(counts, dtype=torch.float64).div_(len(positions)).unsqueeze(1)
    every_mean, every_var = (torch.cat(parts).double() for parts in (means, variances))
    mean = (shares * every_mean).sum(0)
    return mean, (shares * every_var.add_(every_mean.sub_(mean).square_())).sum(0)


def _sums(
    layout: _Layout, grad: Tensor, values: Tensor, centre: Tensor, relu: Sequence[Tensor]
) -> Iterable[Tensor]:
    """Return the sums of grad and of ``grad * (values - centre)`` for each sample and channel, both [N, C].

    With ReLU's output and a map to write to, grad is what passes ReLU, and is written there.
    """
    scratch = layout.scratch()
    wide_grad = None if grad.dtype == layout.dtype else layout.scratch()
    sums = []
    for part, of_values, of_centre, *of_relu in layout.blocks(
        grad, values, layout.coefficients(centre), *relu
    ):
        if of_relu:
            output, masked = of_relu
            part = torch.ops.aten.threshold_backward.grad_input(part, output, 0, grad_input=masked)
        if wide_grad is not None:
            part = _view(wide_grad, part.shape).copy_(part)
        products = _centred(of_values, of_centre, room=_view(scratch, part.shape)).mul_(part)
        sums.append((layout.sum(part), layout.sum(products)))
    return (layout.per_sample(parts) for parts in zip(*sums, strict=True))


def _side_by_side(positions: Tensor, entries: int) -> list[Tensor]:
    """Cut [positions, C] into blocks of rows, each of several positions.

    Torch's kernel adds one row to the next. With wide rows sums are of few terms and keep their digits, and threads do
    not write to the same line of the cache. Positions that make no whole row come last, one a row.
    """
    columns = positions.size(1)
    side = max(1, SIDE_BY_SIDE // columns)
    whole = len(positions) // side * side
    blocks: list[Tensor] = []
    if whole:
        wide = positions[:whole].view(-1, side * columns)
        blocks += torch.unsafe_split(wide, max(1, entries // (side * columns)))
    return blocks if whole == len(positions) else [*blocks, positions[whole:]]


def _scale_and_shift(
    layout: _Layout,
    values: Tensor,
    results: Tensor,
    centre: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gain: Tensor,
    bias: Tensor,
    eps: float,
    relu: bool,
) -> None:
    """Write ``gain * (values - centre - mean) / sqrt(var + eps) + bias``, and ReLU of it, into results."""
    dtype = layout.dtype
    scale = gain.to(dtype) * (var + eps).rsqrt_().to(dtype)
    shift = torch.addcmul(bias.double(), mean, scale.double(), value=-1).to(dtype)
    maps = [values, results, *map(layout.coefficients, (scale, shift))]
    if centre is not None:
        maps.append(layout.coefficients(centre))
    scratch = None if results.dtype == dtype else layout.scratch()
    single = layout.adjacent_channels and centre is None and scratch is None and not relu
    blocks = [maps] if single else layout.blocks(*maps)
    for part, result, of_scale, of_shift, *of_centre in blocks:
        room = result if scratch is None else _view(scratch, result.shape)
        layout.scale_and_shift(_centred(part, *of_centre, room=room), of_scale, of_shift, out=room)
        if relu:
            room.relu_()
        if room is not result:
            result.copy_(room)


def _is_near(mean: Tensor, var: Tensor, eps: float, limit: float = NEAR) -> bool:
    """Whether every mean is a few standard deviations, so that values need not be centred before they are scaled."""
    return bool((mean.square() <= (var + eps).mul_(limit**2)).all())


def _centred(x: Tensor, centre: Tensor | None = None, *, room: Tensor) -> Tensor:
    """Return ``x - centre``, or x, in the dtype of ``room``, and there unless that is x itself."""
    if x.dtype != room.dtype:
        x = room.copy_(x)
    return x if centre is None else torch.sub(x, centre, out=room)


def _view(flat: Tensor, shape: torch.Size) -> Tensor:
    return flat[: shape.numel()].view(shape)
