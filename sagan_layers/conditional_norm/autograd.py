"""Makes kernels for conditional batch norm and its backward into differentiable functions.

Statistics belong to a batch, so the gradient of x has three terms. With xhat = (x - mean) / std, M values a channel
and averages over these:

    grad_x = (gain * grad_y - average(gain * grad_y) - xhat * average(gain * grad_y * xhat)) / std

The two averages are known from the sums of grad_y and of grad_y * xhat for each sample and channel, which are the
gradients of bias and gain: one pass sums, a second writes grad_x. Where a graph of the gradients is asked for, they
are those of the reference, written out; so derivatives of every order exist.

Eager code calls the kernels through autograd alone. For torch.compile and torch.export each backend also has two
opaque operations, ``sagan_layers::conditional_norm_<name>`` and ``..._backward``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor

from sagan_layers.conditional_norm import reference
from sagan_layers.conditional_norm.reference import ConditionalNormResult
from sagan_layers.torch_support import accumulation_dtype, without_autocast

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ConditionalNormKernels:
    """How a backend computes conditional batch norm and its gradient, none of it seen by autograd.

    Shapes: x, y and their gradients [N, C, *], not empty; gain and bias [N, C] or [C]; mean and var [C], float64.
    Results are written into the tensors named ``to``, which are contiguous or channels_last.

    Attributes:
        forward: takes (x, gain, bias, eps, relu, combine, to); writes y, returns the batch's mean and biased
            variance. ``combine``, if not None, takes these and returns those to normalise with.
        normalize: takes (x, mean, var, gain, bias, eps, relu, to); writes y.
        backward: takes (grad_y, x, y, mean, var, gain, eps, average, of_coefficients, to); writes the gradient of x
            unless ``to`` is None, returns those of gain and bias for each sample, [N, C] in the compute dtype, or
            None if neither ``of_coefficients`` nor ``average`` asks for them. y is None unless it went through
            ReLU. ``average`` takes sums over this batch, [2, C] in float64, and returns averages over all values
            of a channel; it is None if mean and variance were given, or ``to`` is None.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    normalize: Callable[..., None]
    backward: Callable[..., tuple[Tensor | None, Tensor | None]]


def empty_like(x: Tensor) -> Tensor:
    """Return an uninitialised tensor in the memory format of x: contiguous, or each position's channels adjacent."""
    y = torch.empty_like(x)
    return y if y.is_contiguous() or y.movedim(1, -1).is_contiguous() else y.new_empty(y.shape)


def register_conditional_norm(
    name: str, kernels: ConditionalNormKernels
) -> Callable[..., ConditionalNormResult]:
    """Register the operations of a backend; return conditional batch norm with derivatives of every order.

    The function takes what :func:`reference.conditional_batch_norm` takes; inside torch.compile the process group
    has to be None.
    """
    eager = _as_function(kernels)
    compiled = _as_operations(name, kernels)

    def conditional_batch_norm(
        x: Tensor,
        gain: Tensor,
        bias: Tensor,
        given: tuple[Tensor, Tensor] | None,
        eps: float,
        relu: bool,
        process_group: ProcessGroup | None,
    ) -> ConditionalNormResult:
        mean = var = None
        if given is not None:  # copies, so that the running statistics may move before backward
            mean, var = (statistic.to(torch.float64, copy=True) for statistic in given)
        arguments = (x, gain, bias, mean, var, eps, relu)
        if torch.compiler.is_compiling():
            y, mean, var = compiled(*arguments)
            count = x.numel() // x.size(1)
        else:
            y, mean, var, count = eager(*arguments, process_group)
        if given is not None:
            return ConditionalNormResult(y, *given, None)
        return ConditionalNormResult(y, mean, var, count)

    return conditional_batch_norm


class _Batch:
    """The values of each channel that statistics are of: those of one process or of a whole group.

    Attributes:
        count: how many they are.
    """

    def __init__(
        self, x: Tensor, process_group: ProcessGroup | None = None, count: int | Tensor | None = None
    ) -> None:
        self.process_group = process_group
        self.count: int | Tensor = x.numel() // max(1, x.size(1)) if count is None else count

    def combine(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the whole group's values; count them."""
        assert isinstance(self.count, int)
        mine = torch.cat([mean, var, mean.new_full((1,), self.count)])
        theirs = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(self.process_group))]
        torch.distributed.all_gather(theirs, mine, group=self.process_group)
        every = torch.stack(theirs)
        means, variances, counts = torch.split(every, [mean.numel(), mean.numel(), 1], dim=1)
        self.count = counts.sum()
        shares = counts / self.count
        mean = (shares * means).sum(0)
        return mean, (shares * (variances + (means - mean).square())).sum(0)

    def average(self, sums: Tensor) -> Tensor:
        """Return sums over this process's values as averages over all, which have been counted."""
        if self.process_group is not None:
            torch.distributed.all_reduce(sums, group=self.process_group)
        return sums / self.count


# --- what runs, with empty inputs left to nobody ------------------------------------------------------------


def _run_forward(
    kernels: ConditionalNormKernels,
    batch: _Batch,
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y and the batch's mean and variance, these empty if they were given."""
    y = empty_like(x)
    size = x.size(1) if mean is None else 0
    batch_mean, batch_var = (x.new_zeros(size, dtype=torch.float64) for _ in range(2))
    combine = None if batch.process_group is None else batch.combine
    with without_autocast(x.device):
        if mean is not None:
            if x.numel():
                kernels.normalize(x, mean, var, gain, bias, eps, relu, y)
        elif x.numel():
            batch_mean, batch_var = kernels.forward(x, gain, bias, eps, relu, combine, y)
        elif combine is not None:
            batch_mean, batch_var = combine(batch_mean, batch_var)
    return y, batch_mean, batch_var


def _run_backward(
    kernels: ConditionalNormKernels,
    batch: _Batch,
    grad_y: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gain: Tensor,
    eps: float,
    given: bool,
    of_x: bool,
    of_gain: bool,
    of_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    grad_x = empty_like(x) if of_x else None
    average = None if given or not of_x else batch.average
    with without_autocast(x.device):
        if x.numel():
            arguments = (grad_y, x, y, mean, var, gain, eps, average, of_gain or of_bias, grad_x)
            grad_gain, grad_bias = kernels.backward(*arguments)
            return grad_x, grad_gain, grad_bias
        if average is not None and batch.process_group is not None:  # the other processes wait
            average(mean.new_zeros(2, x.size(1)))
        nothing = x.new_zeros(x.shape[:2], dtype=accumulation_dtype(x.dtype))
        return grad_x, nothing, nothing.clone()


# --- how the one is the derivative of the other -------------------------------------------------------------


def _as_function(kernels: ConditionalNormKernels) -> Callable[..., Any]:
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(
            x: Tensor,
            gain: Tensor,
            bias: Tensor,
            mean: Tensor | None,
            var: Tensor | None,
            eps: float,
            relu: bool,
            process_group: ProcessGroup | None,
        ) -> tuple[Tensor, Tensor, Tensor, int | Tensor]:
            batch = _Batch(x, process_group)
            y, batch_mean, batch_var = _run_forward(kernels, batch, x, gain, bias, mean, var, eps, relu)
            return y, batch_mean, batch_var, batch.count

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            ctx.batch = _Batch(inputs[0], inputs[-1], output[-1])
            _save_forward(ctx, inputs[:-1], output[:-1])

        @staticmethod
        def backward(ctx: Any, grad_y: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
            run = partial(_run_backward, kernels, ctx.batch)
            return *_differentiate_forward(run, ctx, grad_y, ctx.batch.process_group), None

        @staticmethod
        def jvp(ctx: Any, *tangents: object) -> Any:
            raise NotImplementedError(
                "of conditional batch norm's backends only 'reference' has forward-mode derivatives: name it"
            )

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
            *tensors, eps, relu, process_group = args

            def one(
                x: Tensor, gain: Tensor, bias: Tensor, mean: Tensor | None, var: Tensor | None
            ) -> tuple[Tensor, Tensor, Tensor]:
                given = None if mean is None or var is None else (mean, var)
                y, mean, var, _ = reference.conditional_batch_norm(
                    x, gain, bias, given, eps, relu, process_group
                )
                return y, mean, var

            # Each of the calls at once has a batch and statistics of its own.
            results = torch.vmap(one, in_dims=in_dims[:5])(*tensors)
            count = results[0][0].numel() // results[0].size(2)
            return (*results, count), (0, 0, 0, None)

    return Forward.apply


def _as_operations(name: str, kernels: ConditionalNormKernels) -> Callable[..., Any]:
    def run_forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _run_forward(kernels, _Batch(x), x, *rest)

    def run_backward(grad_y: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        found = _run_backward(kernels, _Batch(x), grad_y, x, *rest)
        return tuple(x.new_empty(0) if gradient is None else gradient for gradient in found)

    forward: Any = torch.library.custom_op(
        f"sagan_layers::conditional_norm_{name}",
        run_forward,
        mutates_args=(),
        schema="(Tensor x, Tensor gain, Tensor bias, Tensor? mean, Tensor? var, float eps, bool relu) "
        "-> (Tensor, Tensor, Tensor)",
    )
    backward: Any = torch.library.custom_op(
        f"sagan_layers::conditional_norm_{name}_backward",
        run_backward,
        mutates_args=(),
        schema="(Tensor grad_y, Tensor x, Tensor? y, Tensor mean, Tensor var, Tensor gain, float eps, bool given, "
        "bool of_x, bool of_gain, bool of_bias) -> (Tensor, Tensor, Tensor)",
    )

    def empty_forward(
        x: Tensor, gain: Tensor, bias: Tensor, mean: Tensor | None, *_: object
    ) -> tuple[Tensor, Tensor, Tensor]:
        size = x.size(1) if mean is None else 0
        statistic = x.new_empty(size, dtype=torch.float64)
        return empty_like(x), statistic, torch.empty_like(statistic)

    def empty_backward(grad_y: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        given, of_x, of_gain, of_bias = rest[-4:]
        size = x.shape[:2] if of_gain or of_bias or (of_x and not given) else (0,)
        coefficients = x.new_empty(size, dtype=accumulation_dtype(x.dtype))
        return empty_like(x) if of_x else x.new_empty(0), coefficients, torch.empty_like(coefficients)

    forward.register_fake(empty_forward)
    backward.register_fake(empty_backward)

    def differentiate(ctx: Any, grad_y: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
        return _differentiate_forward(backward, ctx, grad_y, None)

    forward.register_autograd(differentiate, setup_context=_save_forward)
    result: Callable[..., Any] = forward
    return result


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, gain, bias, mean, var, ctx.eps, ctx.relu = inputs
    y, batch_mean, batch_var = output
    ctx.given = mean is not None
    ctx.mark_non_differentiable(batch_mean, batch_var)
    ctx.set_materialize_grads(False)  # zeros for the statistics, which nobody reads
    statistics = (mean, var) if ctx.given else (batch_mean, batch_var)
    ctx.save_for_backward(x, gain, bias, y if ctx.relu else None, *statistics)


def _differentiate_forward(
    backward: Callable[..., Any], ctx: Any, grad_y: Tensor | None, process_group: ProcessGroup | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, gain, bias, mean, var, eps and relu."""
    nothing = (None,) * 4
    if grad_y is None:
        return None, None, None, *nothing
    x, gain, bias, y, mean, var = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():
        given = (mean, var) if ctx.given else None
        gradients = _written_out(grad_y, x, gain, bias, given, ctx.eps, ctx.relu, process_group, wanted)
        return *gradients, *nothing
    of_x, of_gain, of_bias = backward(grad_y, x, y, mean, var, gain, ctx.eps, ctx.given, *wanted)
    return (
        of_x if wanted[0] else None,
        _of_coefficients(of_gain, gain) if wanted[1] else None,
        _of_coefficients(of_bias, bias) if wanted[2] else None,
        *nothing,
    )


def _of_coefficients(per_sample: Tensor, coefficients: Tensor) -> Tensor:
    return (per_sample.sum(0) if coefficients.dim() == 1 else per_sample).to(coefficients.dtype)


def _written_out(
    grad_y: Tensor,
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    given: tuple[Tensor, Tensor] | None,
    eps: float,
    relu: bool,
    process_group: ProcessGroup | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of x, gain and bias as differentiable functions of these and of grad_y."""
    with torch.enable_grad():
        # Views, so that what the caller computed gain or bias from is not differentiated here.
        inputs = [tensor.view_as(tensor) for tensor in (x, gain, bias)]
        y = reference.conditional_batch_norm(
            inputs[0], inputs[1], inputs[2], given, eps, relu, process_group
        ).y
        of = [tensor for tensor, is_wanted in zip(inputs, wanted, strict=True) if is_wanted]
        found = iter(torch.autograd.grad(y, of, grad_y, create_graph=True))
    return [next(found) if is_wanted else None for is_wanted in wanted]
