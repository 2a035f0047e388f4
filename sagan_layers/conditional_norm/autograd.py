"""Makes kernels for conditional batch norm and its backward into differentiable functions.

Statistics belong to a batch, so the gradient of x has three terms. With xhat = (x - mean) / std, M values a channel
and averages over these:

    grad_x = (gain * grad_y - average(gain * grad_y) - xhat * average(gain * grad_y * xhat)) / std

The two averages follow from the sums of grad_y and of grad_y * xhat for each sample and channel, which are the
gradients of bias and gain: one pass sums, a second writes grad_x. If the gradients themselves need a graph, they are
those of the reference, so derivatives of every order exist.

Eager code calls the kernels through a ``torch.autograd.Function``. For torch.compile and torch.export each backend
also has two opaque operations, ``sagan_layers::conditional_norm_<name>`` and ``..._backward``. Both take the records
of ``kernels.py`` as flat arguments, in the records' order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor

from sagan_layers.conditional_norm import reference
from sagan_layers.conditional_norm.kernels import (
    BackwardArguments,
    ConditionalNormKernels,
    ForwardArguments,
)
from sagan_layers.conditional_norm.reference import ConditionalNormResult
from sagan_layers.torch_support import accumulation_dtype, is_batch, transforms_active, without_autocast

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LoadKernels = Callable[[], ConditionalNormKernels]


def empty_like(x: Tensor) -> Tensor:
    """Return an uninitialised tensor in the memory format of x: contiguous or channels_last."""
    y = torch.empty_like(x)
    return y if y.is_contiguous() or y.movedim(1, -1).is_contiguous() else y.new_empty(y.shape)


def register_conditional_norm(name: str, load: LoadKernels) -> Callable[..., ConditionalNormResult]:
    """Register the operations of a backend; return conditional batch norm with derivatives of every order.

    Args:
        name: the backend's.
        load: returns its kernels; called when they run, so that they are imported then.

    Returns:
        A function that takes what :func:`reference.conditional_batch_norm` takes; inside torch.compile the process
        group must be None.
    """
    eager = _as_function(load)
    compiled = _as_operation(name, load)

    def conditional_batch_norm(
        x: Tensor,
        gain: Tensor,
        bias: Tensor,
        running: tuple[Tensor, Tensor] | None,
        eps: float,
        relu: bool,
        process_group: ProcessGroup | None,
    ) -> ConditionalNormResult:
        mean = var = None
        if running is not None:  # copies: the running statistics may be updated before backward
            mean, var = (statistic.to(torch.float64, copy=True) for statistic in running)
        arguments = ForwardArguments(x, gain, bias, mean, var, eps, relu)
        if torch.compiler.is_compiling():
            y, mean, var = compiled(*arguments)
            num_values = x.numel() // x.size(1)
        else:
            y, mean, var, num_values = eager(*arguments, process_group)
        if running is not None:
            return ConditionalNormResult(y, *running, None)
        return ConditionalNormResult(y, mean, var, num_values)

    return conditional_batch_norm


class _Population:
    """The values of each channel over which statistics are taken: those of one process or of a process group.

    Attributes:
        num_values: how many; known for a group after :meth:`combine`.
    """

    def __init__(
        self, x: Tensor, process_group: ProcessGroup | None = None, num_values: int | Tensor | None = None
    ) -> None:
        self.process_group = process_group
        self.num_values = x.numel() // max(1, x.size(1)) if num_values is None else num_values

    def combine(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the group's values; count them."""
        assert isinstance(self.num_values, int)
        local = torch.cat([mean, var, mean.new_full((1,), self.num_values)])
        gathered = reference.all_gather(local, self.process_group)  # [processes, 2 C + 1]
        means, variances, counts = torch.split(gathered, [mean.numel(), mean.numel(), 1], dim=1)
        self.num_values = counts.sum()
        weights = counts / self.num_values
        mean = (weights * means).sum(0)
        return mean, (weights * (variances + (means - mean).square())).sum(0)

    def average(self, sums: Tensor) -> Tensor:
        """Return sums over this process's values as averages over all."""
        if self.process_group is not None:
            torch.distributed.all_reduce(sums, group=self.process_group)
        return sums / self.num_values


def _run_forward(
    kernels: ConditionalNormKernels, population: _Population, arguments: ForwardArguments
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y and the batch's mean and variance, which have size 0 if the arguments have a mean and variance."""
    x, mean, var = arguments.x, arguments.mean, arguments.var
    y = empty_like(x)
    size = x.size(1) if mean is None else 0
    batch_mean, batch_var = (x.new_zeros(size, dtype=torch.float64) for _ in range(2))
    combine = None if population.process_group is None else population.combine
    with without_autocast(x.device):
        if mean is not None and var is not None:
            if x.numel():
                kernels.normalize(arguments, mean, var, y)
        elif x.numel():
            batch_mean, batch_var = kernels.forward(arguments, combine, y)
        elif combine is not None:  # the other processes wait for this one
            batch_mean, batch_var = combine(batch_mean, batch_var)
    return y, batch_mean, batch_var


def _run_backward(
    kernels: ConditionalNormKernels, population: _Population, arguments: BackwardArguments
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradient of x, and those of gain and bias for each sample; None where not computed."""
    x = arguments.x
    grad_x = empty_like(x) if arguments.needs_x else None
    with without_autocast(x.device):
        if x.numel():
            return grad_x, *kernels.backward(arguments, population.average, grad_x)
        if arguments.needs_averages and population.process_group is not None:  # the other processes wait
            population.average(arguments.mean.new_zeros(2, x.size(1)))
        zeros = x.new_zeros(x.shape[:2], dtype=accumulation_dtype(x.dtype))
        return grad_x, zeros, zeros.clone()


def _as_function(load: LoadKernels) -> Callable[..., Any]:
    """Return the forward for eager code: flat :class:`ForwardArguments` and a process group to y, mean, var, count."""

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(*flat: Any) -> tuple[Tensor, Tensor, Tensor, int | Tensor]:
            *fields, process_group = flat
            arguments = ForwardArguments(*fields)
            population = _Population(arguments.x, process_group)
            return *_run_forward(load(), population, arguments), population.num_values

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            *fields, process_group = inputs
            ctx.population = _Population(inputs[0], process_group, output[-1])
            _save_for_backward(ctx, tuple(fields), output[:-1])

        @staticmethod
        def backward(ctx: Any, grad_y: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
            def run(*flat: Any) -> tuple[Tensor | None, ...]:
                return _run_backward(load(), ctx.population, BackwardArguments(*flat))

            return *_gradients(run, ctx, grad_y, ctx.population.process_group), None

        @staticmethod
        def jvp(ctx: Any, *tangents: object) -> Any:
            raise NotImplementedError(
                "conditional batch norm: only 'reference' has forward-mode derivatives; pass backend='reference'"
            )

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *flat: Any) -> Any:
            *tensors, eps, relu, process_group = flat

            def one(
                x: Tensor, gain: Tensor, bias: Tensor, mean: Tensor | None, var: Tensor | None
            ) -> tuple[Tensor, Tensor, Tensor]:
                running = None if mean is None or var is None else (mean, var)
                return reference.conditional_batch_norm(x, gain, bias, running, eps, relu, process_group)[:3]

            # Each of the mapped calls has its own batch and statistics.
            results = torch.vmap(one, in_dims=in_dims[:5])(*tensors)
            num_values = results[0][0].numel() // results[0].size(2)
            return (*results, num_values), (0, 0, 0, None)

    return Forward.apply


def _as_operation(name: str, load: LoadKernels) -> Callable[..., Any]:
    """Return the forward for compiled code: flat :class:`ForwardArguments` to y, mean and var."""

    def run_forward(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
        arguments = ForwardArguments(*flat)
        return _run_forward(load(), _Population(arguments.x), arguments)

    def run_backward(*flat: Any) -> tuple[Tensor, ...]:
        arguments = BackwardArguments(*flat)
        found = _run_backward(load(), _Population(arguments.x), arguments)
        # An operation returns tensors; one of size 0 stands for None.
        return tuple(arguments.x.new_empty(0) if gradient is None else gradient for gradient in found)

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
        schema="(Tensor grad_y, Tensor x, Tensor? y, Tensor mean, Tensor var, Tensor gain, float eps, "
        "bool batch_statistics, bool needs_x, bool needs_gain, bool needs_bias) -> (Tensor, Tensor, Tensor)",
    )

    def fake_forward(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
        arguments = ForwardArguments(*flat)
        x = arguments.x
        statistic = x.new_empty(x.size(1) if arguments.mean is None else 0, dtype=torch.float64)
        return empty_like(x), statistic, torch.empty_like(statistic)

    def fake_backward(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
        arguments = BackwardArguments(*flat)
        x = arguments.x
        coefficients = x.new_empty(
            x.shape[:2] if arguments.needs_sums else (0,), dtype=accumulation_dtype(x.dtype)
        )
        grad_x = empty_like(x) if arguments.needs_x else x.new_empty(0)
        return grad_x, coefficients, torch.empty_like(coefficients)

    def differentiate(ctx: Any, grad_y: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
        return _gradients(backward, ctx, grad_y, None)

    forward.register_fake(fake_forward)
    backward.register_fake(fake_backward)
    forward.register_autograd(differentiate, setup_context=_save_for_backward)
    result: Callable[..., Any] = forward
    return result


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, gain, bias, mean, var, ctx.eps, ctx.relu = inputs
    y, batch_mean, batch_var = output
    ctx.batch_statistics = mean is None
    ctx.mark_non_differentiable(batch_mean, batch_var)
    ctx.set_materialize_grads(False)  # the statistics have no gradients, and need no zeros
    statistics = (batch_mean, batch_var) if ctx.batch_statistics else (mean, var)
    ctx.save_for_backward(x, gain, bias, y if ctx.relu else None, *statistics)


def _gradients(
    run_backward: Callable[..., Any], ctx: Any, grad_y: Tensor | None, process_group: ProcessGroup | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the flat :class:`ForwardArguments`."""
    constants = (None,) * 4  # mean, var, eps and relu
    if grad_y is None:
        return None, None, None, *constants
    x, gain, bias, y, mean, var = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    needs_graph = torch.is_grad_enabled()
    if needs_graph or is_batch(grad_y):
        running = None if ctx.batch_statistics else (mean, var)

        def forward(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
            return reference.conditional_batch_norm(
                x, gain, bias, running, ctx.eps, ctx.relu, process_group
            ).y

        inputs = x, gain, bias
        if transforms_active():  # it has saved the tensors without their graphs
            every = torch.func.vjp(forward, *inputs)[1](grad_y)
            return *(g if is_needed else None for g, is_needed in zip(every, needs, strict=True)), *constants
        with torch.enable_grad():
            # Views, so that derivatives stop at gain and bias, which may depend on other tensors.
            views = [tensor.view_as(tensor) for tensor in inputs]
            needed = [tensor for tensor, is_needed in zip(views, needs, strict=True) if is_needed]
            found = iter(torch.autograd.grad(forward(*views), needed, grad_y, create_graph=needs_graph))
        return *(next(found) if is_needed else None for is_needed in needs), *constants
    arguments = BackwardArguments(grad_y, x, y, mean, var, gain, ctx.eps, ctx.batch_statistics, *needs)
    grad_x, grad_gain, grad_bias = run_backward(*arguments)
    return (
        grad_x if needs[0] else None,
        _sum_like(grad_gain, gain) if needs[1] else None,
        _sum_like(grad_bias, bias) if needs[2] else None,
        *constants,
    )


def _sum_like(per_sample: Tensor, coefficients: Tensor) -> Tensor:
    return (per_sample.sum(0) if coefficients.dim() == 1 else per_sample).to(coefficients.dtype)
