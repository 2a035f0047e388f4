"""Conditional batch norm on a CPU, in blocks that stay in the cache.

Every step is a few of torch's operations on one block after the other, in place or into a block of scratch memory,
so that a feature map comes from memory once a pass: one pass for the statistics, one for the output, two for
backward. Values are centred before they are squared, multiplied or scaled, so that no digits cancel, and what the
rounded centre lacks of the mean is made up for.

A feature map is seen as [N * C, L], or as [N, L, C] where the channels of a position lie next to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from sagan_layers.ops.reference import compute_dtype

# Bytes of a block for each thread, in the compute dtype: about what a core has of cache for itself.
BLOCK_BYTES = 2**20
# So many values of a channel give the first guess of its mean.
GUESS_VALUES = 32
# So many sums stand next to each other where channels do.
SIDE_BY_SIDE = 1024


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
    values, results, scratch = layout.map(x), layout.map(to), layout.scratch()
    guess = layout.guess_mean(values)
    moments = []
    for part, result, centre in layout.blocks(values, results, layout.coefficients(guess)):
        room = _view(scratch, part.shape)
        centred = _centre(part, centre, out=result if result.dtype == layout.dtype else room)
        moments.append(layout.moments(centred, room))
    shift, square = layout.averages(moments)
    mean, var = guess + shift, square.addcmul_(shift, shift, value=-1).clamp_min_(0.0)
    if combine is not None:
        mean, var = combine(mean, var)
    _scale_and_shift(layout, values, results, guess, mean, var, gain, bias, eps, relu, centred=True)
    return mean, var


def normalize(
    x: Tensor, mean: Tensor, var: Tensor, gain: Tensor, bias: Tensor, eps: float, relu: bool, to: Tensor
) -> None:
    """Write y for a given mean and variance."""
    layout = _Layout(to)
    centre = mean.to(layout.dtype)
    maps = layout.map(x), layout.map(to)
    _scale_and_shift(layout, *maps, centre, mean, var, gain, bias, eps, relu, centred=False)


def _scale_and_shift(
    layout: _Layout,
    values: Tensor,
    results: Tensor,
    centre: Tensor,
    mean: Tensor,
    var: Tensor,
    gain: Tensor,
    bias: Tensor,
    eps: float,
    relu: bool,
    *,
    centred: bool,
) -> None:
    """Write the normalised values into results, which hold ``values - centre`` if ``centred`` and not narrow."""
    narrow = results.dtype != layout.dtype
    scale = gain.to(layout.dtype) * (var + eps).rsqrt_().to(layout.dtype)
    shift = torch.addcmul(bias.to(layout.dtype), (mean - centre).to(layout.dtype), scale, value=-1)
    maps = [results, layout.coefficients(scale), layout.coefficients(shift)]
    if narrow or not centred:
        maps += [values, layout.coefficients(centre)]
    scratch = layout.scratch() if narrow else None
    for result, of_scale, of_shift, *uncentred in layout.blocks(*maps):
        room = result if scratch is None else _view(scratch, result.shape)
        if uncentred:
            _centre(*uncentred, out=room)
        layout.scale_and_shift_(room, of_scale, of_shift)
        if relu:
            room.relu_()
        if room is not result:
            result.copy_(room)


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
    if to is None and y is not None:
        to, of_x = torch.empty_like(y), False
    else:
        of_x = to is not None
    layout = _Layout(x if to is None else to)
    values, grad = layout.map(x), layout.map(grad_y)
    centre = mean.to(layout.dtype)
    centres = layout.coefficients(centre)
    sums = []
    if y is not None:
        assert to is not None
        masked = layout.map(to)
        maps: Sequence[Tensor] = (grad, layout.map(y), masked, values, centres)
        for part, output, result, *rest in layout.whole_samples(*maps):
            torch.ops.aten.threshold_backward.grad_input(part, output, 0, grad_input=result)
            sums.append(layout.sums_of_samples(result, *rest))
        grad = masked
    elif of_coefficients or average is not None:
        for block in layout.whole_samples(grad, values, centres, in_one=True):
            sums.append(layout.sums_of_samples(*block))
    inverse_std = (var + eps).rsqrt_()
    grad_gain = grad_bias = None
    if sums:
        missing = (mean - centre).to(layout.dtype)
        grad_bias, grad_gain = layout.per_sample(sums)
        grad_gain.addcmul_(grad_bias, missing, value=-1).mul_(inverse_std.to(layout.dtype))
    if not of_x or to is None:
        return grad_gain, grad_bias
    gain = gain.to(layout.dtype)
    maps = grad, layout.map(to), layout.coefficients(gain * inverse_std.to(layout.dtype))
    if average is not None and grad_bias is not None and grad_gain is not None:
        totals = torch.stack([grad_bias, grad_gain]).mul_(gain).sum(1, dtype=torch.float64)
        of_grad, of_product = average(totals).mul_(inverse_std).neg_()
        slope = of_product.mul_(inverse_std).to(layout.dtype)
        offset = of_grad.to(layout.dtype).addcmul_(slope, missing, value=-1)
        maps = *maps, values, centres, layout.coefficients(slope), layout.coefficients(offset)
    scratch = layout.scratch()
    wide_grad = None if to.dtype == layout.dtype else layout.scratch()
    for part, result, scale, *rest in layout.blocks(*maps):
        room = result
        if wide_grad is not None:
            part = room = _view(wide_grad, part.shape).copy_(part)
        if rest:
            part_of_x, part_centre, part_slope, part_offset = rest
            term = _centre(part_of_x, part_centre, out=_view(scratch, part.shape))
            layout.scale_and_shift_(term, part_slope, part_offset)
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
        self.dtype = compute_dtype(like.dtype)
        # Where there is one position only, both formats are the same, and this is the faster one.
        self.adjacent_channels = like.movedim(1, -1).is_contiguous() and (
            self.length == 1 or not like.is_contiguous()
        )
        self.entries = BLOCK_BYTES * torch.get_num_threads() // self.dtype.itemsize

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
        row = self.channels if self.adjacent_channels else self.length
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
        positions = max(1, self.entries // self.channels)
        return [part for sample in x.unbind() for part in torch.unsafe_split(sample[None], positions, 1)]

    def whole_samples(self, *maps: Tensor, in_one: bool = False) -> Iterable[Sequence[Tensor]]:
        """Cut maps alike for :meth:`sums_of_samples`, or not at all if that is as good."""
        if not self.adjacent_channels:
            return [maps] if in_one else self.blocks(*maps)
        # A large sample is worth a call of torch's kernel, which takes one at a time.
        samples = max(1, self.entries // (4 * self.length * self.channels))
        return zip(*(torch.unsafe_split(x, samples) for x in maps), strict=True)

    def guess_mean(self, values: Tensor) -> Tensor:
        """Return a mean of each channel, [C], from a few positions in the middle of each sample."""
        few = min(self.length, -(-GUESS_VALUES // self.samples))
        middle = values.narrow(1, (self.length - few) // 2, few).to(self.dtype)
        if self.adjacent_channels:
            return middle.mean((0, 1))
        return middle.view(self.samples, self.channels, few).mean((0, 2))

    def moments(self, centred: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
        """Return sums of the values and of their squares in a block, of each channel or of each row."""
        if self.adjacent_channels:
            rows = centred.flatten(0, 1)
            return _sums_of_columns(rows, rows, None)
        return centred.sum(1), torch.mul(centred, centred, out=room).sum(1)

    def averages(self, moments: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the averages of values and squares over all blocks, [2, C], float64."""
        first, second = zip(*moments, strict=True)
        totals = torch.cat(first + second).view(2, -1, self.channels).sum(1, dtype=torch.float64)
        return totals.div_(self.samples * self.length)

    def sums_of_samples(self, grad: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of grad and of ``grad * (x - centre)`` in a block, for each sample and channel."""
        if not self.adjacent_channels:
            return _sums_of_rows(grad, x, centre[:, 0])
        if len(x) == 1:
            sums, products = _sums_of_columns(grad[0], x[0], centre[0, 0])
            return sums[None], products[None]
        products = _centre(x, centre, out=torch.empty_like(x, dtype=self.dtype)).mul_(grad)
        return grad.sum(1, dtype=self.dtype), products.sum(1)

    def per_sample(self, sums: Sequence[tuple[Tensor, Tensor]]) -> Iterable[Tensor]:
        """Return both sums of all blocks as [N, C]."""
        return (torch.cat(each).view(self.samples, self.channels) for each in zip(*sums, strict=True))

    def scale_and_shift_(self, values: Tensor, scale: Tensor, shift: Tensor) -> None:
        """Replace values by ``scale * values + shift``."""
        if self.adjacent_channels:
            torch.addcmul(shift, values, scale, out=values)
        else:  # torch's loops are fast with one operand that is constant along a row, not with two
            values.mul_(scale).add_(shift)


def _sums_of_rows(grad: Tensor, x: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the sums along [rows, columns] of grad and of ``grad * (x - mean)``, in one pass.

    They are the gradients of bias and gain of a batch norm with given statistics; torch has a kernel for these.
    """
    one = torch.ones(x.size(0), dtype=compute_dtype(x.dtype))
    if mean is None:
        mean = torch.zeros_like(one)
    grad, x = (tensor[None, :, :, None] for tensor in (grad, x))
    _, products, sums = torch.ops.aten.native_batch_norm_backward(
        grad, x, None, mean, one, None, None, False, 0.0, [False, True, True]
    )
    return sums, products


def _sums_of_columns(grad: Tensor, x: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the same along the other axis of [rows, columns].

    The kernel adds one row to the next. Several rows are laid side by side, so that sums are of fewer terms and
    keep their digits, and so that threads do not write to the same line of the cache.
    """
    columns = x.size(1)
    side = max(1, SIDE_BY_SIDE // columns)
    whole = len(x) // side * side
    parts = []
    if whole:
        means = None if mean is None else mean.repeat(side)
        wide_grad, wide_x = (tensor[:whole].view(-1, side * columns) for tensor in (grad, x))
        parts.append(_sums_of_rows(wide_grad.t(), wide_x.t(), means))
    if whole < len(x):
        parts.append(_sums_of_rows(grad[whole:].t(), x[whole:].t(), mean))
    sums, products = (torch.cat(each).view(-1, columns).sum(0) for each in zip(*parts, strict=True))
    return sums, products


def _centre(x: Tensor, centre: Tensor, *, out: Tensor) -> Tensor:
    return torch.sub(x, centre, out=out) if x.dtype == out.dtype else out.copy_(x).sub_(centre)


def _view(flat: Tensor, shape: torch.Size) -> Tensor:
    return flat[: shape.numel()].view(shape)
