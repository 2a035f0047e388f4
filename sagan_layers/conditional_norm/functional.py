"""The stateless form of conditional batch norm: checks, then the backend that serves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sagan_layers.checks import (
    check_choice,
    check_feature_map,
    check_floating,
    check_process_group,
    check_same_device,
    eps_of,
    flags_of,
    number_of,
    reads_values_of,
    shape_of,
)
from sagan_layers.conditional_norm.kernels import ConditionalNormInputs
from sagan_layers.conditional_norm.reference import ConditionalNormResult
from sagan_layers.conditional_norm.table import CONDITIONAL_BATCH_NORM
from sagan_layers.torch_support import accumulation_dtype, update_state

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_REMEDY = (
    "enter frozen_running_statistics(model) or call model.eval(), or pass the buffers to "
    "torch.func.functional_call as arguments of the transform"
)


def conditional_batch_norm(
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    biased_running_var: bool = False,
    process_group: ProcessGroup | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Return the batch-normalised x with a gain and a bias for each sample, optionally through ReLU.

    .. math:: y_{nc} = \mathrm{gain}_{nc}\, \frac{x_{nc} - \mu_c}{\sqrt{\sigma^2_c + \epsilon}} + \mathrm{bias}_{nc}

    Mean and (biased) variance are the batch's if ``training`` or if there are no running statistics, otherwise the
    running ones. If ``training``, the running statistics are updated in place.

    Args:
        x: [N, C, *], floating point; two axes or more.
        gain: [N, C], or [C] for all samples.
        bias: as ``gain``.
        running_mean: [C] or None.
        running_var: [C] or None, both or neither.
        training: whether to normalise by the batch's statistics and update the running ones.
        momentum: weight of the batch in the running statistics, a number or a scalar tensor.
        eps: added to the variance, from 1e-37 to 1.
        biased_running_var: record the biased variance, as TensorFlow does; torch's batch norm records the
            unbiased one.
        process_group: take the batch's statistics over all processes of this group.
        activation: "relu" to apply ReLU in the same pass, or None.
        backend: "auto", or the name of a backend (see :func:`explain_backends`).

    Shape:
        - Output: as x, in the dtype of x.

    Raises:
        ValueError: if shapes or devices disagree, statistics would be taken of a single value per channel, the
            variance overflows (from x of about 1e19 in float32, or 1e12 with gradients; on a GPU see
            :func:`set_debug_checks`), or the named backend does not exist or cannot serve.
        RuntimeError: if running statistics would be updated inside a transform of torch.func, which refuses it.
        TypeError: if a tensor is not floating point.

    Note:
        Statistics are computed in float32 (float64 for float64 inputs), and the mean is subtracted before scaling,
        so large means lose no digits. Derivatives of every order. With ReLU, backward reads the output: do not
        change it in place.

    Reference:
        Dumoulin et al., A Learned Representation For Artistic Style (conditional instance norm); Miyato and
        Koyama, cGANs with Projection Discriminator, for batch norm in G.

    Example:
        >>> x = torch.randn(4, 3, 5, 5) * 7 + 2
        >>> y = conditional_batch_norm(x, torch.ones(4, 3), torch.zeros(4, 3), training=True)
        >>> bool(y.mean().abs() < 1e-5), bool((y.std() - 1).abs() < 1e-2)
        (True, True)
    """
    _check(x, gain, bias, running_mean, running_var)
    eps = eps_of(eps)
    training, biased_running_var = flags_of(training=training, biased_running_var=biased_running_var)
    check_choice("activation", activation, (None, "relu"))
    if not isinstance(momentum, Tensor):
        momentum = number_of("momentum", momentum, least=0, most=1)
    else:
        check_floating("momentum", momentum)
        if momentum.numel() != 1:
            raise ValueError(f"momentum: expected a number or one element, got {shape_of(momentum)}")
    check_process_group(process_group)
    running = None
    if not training and running_mean is not None and running_var is not None:
        running = running_mean, running_var
    elif (process_group is None or process_group.size() == 1) and x.numel() <= x.size(1):
        raise ValueError(
            f"x: expected more than 1 value per channel to take batch statistics, got {shape_of(x)}"
        )
    chosen = CONDITIONAL_BATCH_NORM.select_and_record(
        ConditionalNormInputs(x, running, process_group), backend
    )
    result = chosen.implementation(x, gain, bias, running, eps, activation == "relu", process_group)
    if running is None:
        _check_variance(x, result, process_group)
    if training and running_mean is not None and running_var is not None:
        options = momentum, biased_running_var, process_group
        _update_running_statistics(running_mean, running_var, result, *options)
    return result.y


def conditional_norm_inputs(x: Tensor, *, process_group: ProcessGroup | None = None) -> ConditionalNormInputs:
    """Check the arguments of :func:`conditional_batch_norm` that select a backend, and return them."""
    check_feature_map(x)
    return ConditionalNormInputs(x, None, process_group)


def _check(
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
) -> None:
    check_feature_map(x)
    num_features = x.size(1)
    for name, coefficients in (("gain", gain), ("bias", bias)):
        check_floating(name, coefficients)
        expected = x.shape[:2] if coefficients.dim() == 2 else x.shape[1:2]
        if coefficients.shape != expected:
            raise ValueError(
                f"{name}: expected [N, C] = [{x.size(0)}, {num_features}] or [{num_features}], "
                f"got {shape_of(coefficients)}"
            )
        check_same_device(name, coefficients, "x", x)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var: expected both or neither, got one")
    for name, statistic in (("running_mean", running_mean), ("running_var", running_var)):
        if statistic is not None:
            check_floating(name, statistic)
            if statistic.shape != (num_features,):
                raise ValueError(f"{name}: expected shape [{num_features}], got {shape_of(statistic)}")
            check_same_device(name, statistic, "x", x)


def _check_variance(x: Tensor, result: ConditionalNormResult, process_group: ProcessGroup | None) -> None:
    """Raise if the variance of finite values overflowed: y would be the bias alone, or gradients wrong."""
    var = result.var.detach()
    if not reads_values_of(var):
        return
    largest, limits = var.amax().item(), torch.finfo(var.dtype)
    # Gradients need the variance to the power of -3/2.
    overflowed = largest > (limits.tiny ** (-2 / 3) if result.y.requires_grad else limits.max)
    if math.isnan(largest):  # values are not finite, or a sum overflowed too
        overflowed = process_group is None and bool(torch.isfinite(x.detach()).all())
    if overflowed:
        raise ValueError(
            f"x: expected values whose variance {accumulation_dtype(x.dtype)} can hold, and its power of -3/2 for "
            f"gradients, got values up to {x.detach().abs().amax().item():.0e}"
        )


@torch.no_grad()
def _update_running_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    batch: ConditionalNormResult,
    momentum: float | Tensor,
    biased_running_var: bool,
    process_group: ProcessGroup | None,
) -> None:
    count = batch.num_values
    assert count is not None
    if isinstance(count, Tensor):
        # Of a process group: known only now.
        in_group = process_group is not None and count.device.type == "cpu"
        if in_group and reads_values_of(count) and bool(count < 2):
            raise ValueError(
                f"x: expected more than one value per channel in training, got {int(count)} in all processes"
            )
        count = count.clamp_min(2)
    mean, var = batch.mean.detach(), batch.var.detach()
    if not biased_running_var:
        var = var * (count / (count - 1))

    def update() -> None:
        for running, statistic in ((running_mean, mean), (running_var, var)):
            weight = momentum.to(running.dtype) if isinstance(momentum, Tensor) else momentum
            running.lerp_(statistic.to(running.dtype), weight)

    update_state(update, _REMEDY)
