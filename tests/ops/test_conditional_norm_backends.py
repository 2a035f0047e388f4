"""Every backend of conditional batch norm against the reference and float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from blocks import inside_larger
from dispatched import DispatchedOperations, saved_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from sagan_layers import functional
from sagan_layers.backends import Backend
from sagan_layers.conditional_norm import blocked as conditional_norm_blocked
from sagan_layers.conditional_norm.kernels import ConditionalNormInputs
from sagan_layers.conditional_norm.reference import ConditionalNormResult
from sagan_layers.conditional_norm.table import CONDITIONAL_BATCH_NORM
from sagan_layers.torch_support import accumulation_dtype

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LAYOUTS = ["contiguous", "channels_last", "inside_larger", "transposed", "expanded"]
NAMES = ["y", "x", "gain", "bias"]
EPS = 1e-5

ConditionalNorm = Backend[ConditionalNormInputs, Callable[..., ConditionalNormResult]]

pytestmark = pytest.mark.usefixtures("_unwritten_memory_is_nan")

BACKENDS = {backend.name: backend for backend in CONDITIONAL_BATCH_NORM.backends}
REFERENCE = BACKENDS["reference"]
select_norm_backend = partial(functional.select_backend, operation="conditional_batch_norm")


def parametrized_by_backend(*backends: ConditionalNorm) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("backend", backends, ids=lambda backend: backend.name)


every_backend = parametrized_by_backend(*BACKENDS.values())
kernels = parametrized_by_backend(*(backend for backend in BACKENDS.values() if backend is not REFERENCE))
with_and_without_relu = pytest.mark.parametrize("relu", [False, True])
both_statistics = pytest.mark.parametrize("running", [False, True], ids=["batch", "running"])
both_formats = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
half_and_single = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The values (or one of them everywhere, if expanded) with the strides of a layout."""
    if layout == "contiguous":
        return values.contiguous()
    if layout == "channels_last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return values.flatten()[0].expand(values.shape)
    assert layout == "inside_larger"
    return inside_larger(values)


def compute(
    backend: ConditionalNorm,
    x: Tensor,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    running: tuple[Tensor, Tensor] | None = None,
    relu: bool = False,
) -> ConditionalNormResult:
    gain = torch.ones(x.size(1)) if gain is None else gain
    bias = torch.zeros(x.size(1)) if bias is None else bias
    return backend.implementation(x, gain, bias, running, EPS, relu, None)


def run(
    backend: ConditionalNorm,
    inputs: tuple[Tensor, Tensor, Tensor],
    cotangent: Tensor,
    running: tuple[Tensor, Tensor] | None = None,
    relu: bool = False,
) -> list[Tensor]:
    """The output, and the gradients of x, gain and bias."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    y = compute(backend, *leaves, running, relu).y
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent.to(y.dtype))]


def in_float64(
    inputs: tuple[Tensor, Tensor, Tensor],
    cotangent: Tensor,
    running: tuple[Tensor, Tensor] | None,
    passed: Tensor | None,
) -> tuple[list[Tensor], list[float]]:
    """The same in float64, and the largest sum of absolute terms behind each.

    Rounding errors are relative to these: where terms cancel, the result may be as small as zero. ``passed`` is the
    mask of ReLU: near zero it depends on rounding, and the gradients are compared for the same mask.
    """
    x, gain, bias = (tensor.detach().double() for tensor in inputs)
    g = cotangent.double() if passed is None else torch.where(passed, cotangent.double(), 0.0)
    exact = [tensor.double() for tensor in run(REFERENCE, (x, gain, bias), g, running)]
    axes = [axis for axis in range(x.dim()) if axis != 1]

    def per_channel(values: Tensor) -> Tensor:
        return values.reshape(*values.shape, *[1] * (x.dim() - 2))

    if running is None:
        var, mean = torch.var_mean(x, axes, correction=0)
    else:
        mean, var = (statistic.double() for statistic in running)
    inverse_std = (var + EPS).rsqrt()
    xhat = ((x - per_channel(mean)) * per_channel(inverse_std)).abs()
    scaled = (per_channel(gain) * g).abs()
    terms = scaled
    if running is None:
        grad_average, product_average = ((scaled * factor).mean(axes, keepdim=True) for factor in (1.0, xhat))
        terms = scaled + grad_average + xhat * product_average
    position_axes = list(range(2, x.dim()))

    def summed(values: Tensor, like: Tensor) -> Tensor:
        values = values.sum(position_axes) if position_axes else values
        return values.sum(0) if like.dim() == 1 else values

    sizes = [
        per_channel(gain).abs() * xhat + per_channel(bias).abs(),
        terms * per_channel(inverse_std),
        summed(g.abs() * xhat, gain),
        summed(g.abs(), bias),
    ]
    return exact, [size.max().item() for size in sizes]


def assert_as_accurate_as_the_reference(
    backend: ConditionalNorm,
    inputs: tuple[Tensor, Tensor, Tensor],
    cotangent: Tensor,
    running: tuple[Tensor, Tensor] | None = None,
    relu: bool = False,
) -> None:
    ours = run(backend, inputs, cotangent, running, relu)
    passed = ours[0] > 0 if relu else None
    # Without ReLU, so that the masks are the same.
    cut = cotangent if passed is None else torch.where(passed, cotangent, 0.0)
    same_dtype = run(REFERENCE, inputs, cut, running)
    exact, sizes = in_float64(inputs, cotangent, running, passed)
    if relu:
        same_dtype[0], exact[0] = same_dtype[0].relu(), exact[0].relu()
    wide_unit = torch.finfo(accumulation_dtype(inputs[0].dtype)).eps
    units = [torch.finfo(result.dtype).eps + wide_unit for result in same_dtype]
    if inputs[0].dtype == torch.float64:
        units = [8 * unit for unit in units]  # the exact result adds thousands of numbers in float64, too
    roundings = [unit * size for unit, size in zip(units, sizes, strict=True)]
    assert_accurate(NAMES, ours, same_dtype, exact, roundings)


def assert_digits(
    backend: ConditionalNorm, inputs: tuple[Tensor, Tensor, Tensor], relu: bool, tolerance: float
) -> None:
    """Compare with float64 alone, relative to the terms that are added."""
    cotangent = torch.randn(inputs[0].shape)
    ours = run(backend, inputs, cotangent, relu=relu)
    exact, sizes = in_float64(inputs, cotangent, None, ours[0] > 0 if relu else None)
    if relu:
        exact[0] = exact[0].relu()
    for name, got, expected, size in zip(NAMES, ours, exact, sizes, strict=True):
        assert (got.double() - expected).abs().max() <= tolerance * size, name


def served(backend: ConditionalNorm, x: Tensor) -> ConditionalNorm:
    if reasons := backend.unsupported_reasons(ConditionalNormInputs(x)):
        pytest.skip("; ".join(reasons))
    return backend


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    sizes = [1, 2, 3, 5, 7, 8, 13, 16, 17]
    return {
        "shape": [
            draw(st.integers(2, 5)),
            draw(st.sampled_from([1, 2, 3, 7, 16, 31, 65])),
            *(draw(st.sampled_from(sizes)) for _ in range(draw(st.integers(0, 3)))),
        ],
        "layouts": [draw(st.sampled_from(LAYOUTS[:-1])), draw(st.sampled_from(LAYOUTS))],
        "per_sample": [draw(st.booleans()) for _ in range(2)],
        "shift": draw(st.sampled_from([0.0, 3.0, 1000.0])),
        "running": draw(st.booleans()),
        "relu": draw(st.booleans()),
        "seed": draw(st.integers(0, 999)),
    }


def check_accuracy(backend: ConditionalNorm, dtype: torch.dtype, device: str, case: dict[str, Any]) -> None:
    shape = case["shape"]
    # The exact results are computed in float64 too, and would lose digits of a large mean.
    shift = 0.0 if dtype == torch.float64 else case["shift"]
    generator = torch.Generator().manual_seed(case["seed"])

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype).to(device)

    x = laid_out(normal(*shape) + shift, case["layouts"][0])
    wide = torch.float32 if dtype.itemsize == 2 else dtype  # as under autocast
    gain, bias = (
        normal(*(shape[:2] if per_sample else shape[1:2]), dtype=wide) for per_sample in case["per_sample"]
    )
    cotangent = laid_out(normal(*shape), case["layouts"][1])
    running = None
    if case["running"]:
        running = (normal(shape[1], dtype=wide) + shift), normal(shape[1], dtype=wide).abs() + 0.1
    assert_as_accurate_as_the_reference(served(backend, x), (x, gain, bias), cotangent, running, case["relu"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(case=cases())
def test_blocked_is_as_accurate_as_the_reference(
    dtype: torch.dtype, device: str, case: dict[str, Any]
) -> None:
    check_accuracy(BACKENDS["blocked"], dtype, device, case)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(case=cases())
@settings(max_examples=10)  # the interpreter is slow
def test_triton_is_as_accurate_as_the_reference(
    dtype: torch.dtype, device: str, case: dict[str, Any]
) -> None:
    check_accuracy(BACKENDS["triton"], dtype, device, case)


@kernels
@with_and_without_relu
@both_formats
@pytest.mark.parametrize(("mean", "std"), [(1e4, 1.0), (100.0, 1e-2), (-3e5, 4.0)])
def test_large_means_and_small_variances_cost_no_digits(
    backend: ConditionalNorm, mean: float, std: float, layout: str, relu: bool
) -> None:
    x = laid_out(torch.randn(6, 5, 9, 7) * std + mean, layout)
    inputs = (x, torch.rand(6, 5) + 0.5, torch.randn(6, 5))
    # A mean in float32, as in other batch norms, is off by up to 1e-3 of these standard deviations.
    assert_digits(served(backend, x), inputs, relu, 2e-6)


@kernels
@both_formats
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_few_values_far_from_the_others_cost_no_digits(
    backend: ConditionalNorm, layout: str, place: str
) -> None:
    x = torch.randn(4, 3, 1, 4096)
    start = {"first": 0, "middle": 2046, "last": 4092}[place]
    x[..., start : start + 4] = 1000.0
    x = laid_out(x, layout)
    inputs = (x, torch.rand(4, 3) + 0.5, torch.randn(4, 3))
    assert_digits(served(backend, x), inputs, False, 3e-6)


@every_backend
@both_formats
def test_constant_channels_give_the_bias_and_finite_gradients(backend: ConditionalNorm, layout: str) -> None:
    x = laid_out(torch.full((3, 4, 5, 2), 77.3), layout)
    gain, bias = torch.randn(3, 4), torch.randn(3, 4)
    y, *gradients = run(served(backend, x), (x, gain, bias), torch.randn(x.shape))
    torch.testing.assert_close(y, bias[..., None, None].expand_as(y), rtol=1e-6, atol=1e-6)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # of Triton's interpreter
@every_backend
@both_formats
@pytest.mark.parametrize("magnitude", [1e20, 1e38])
def test_a_variance_beyond_float32_is_an_error_that_changes_nothing(
    backend: ConditionalNorm, layout: str, magnitude: float
) -> None:
    values = torch.randn(4, 3, 4, 5).clamp(-3, 3)
    one, mean, var = torch.ones(3), torch.zeros(3), torch.ones(3)
    call = partial(functional.conditional_batch_norm, backend=backend.name, training=True)
    x = laid_out(values * magnitude, layout)
    with pytest.raises(ValueError, match=r"x: expected values whose variance torch\.float32 can hold, .*got"):
        call(x, one, mean, mean, var)
    assert mean.eq(0).all()
    assert var.eq(1).all()
    assert call(x.clone().fill_(torch.inf), one, mean).isnan().all()  # as torch's
    y = call(laid_out(values * 1e17, layout), one, mean, eps=1e-5)
    torch.testing.assert_close(y, call(values, one, mean, eps=1e-12), rtol=1e-4, atol=1e-4)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "vmap": lambda call, x: torch.func.vmap(call)(x[None])[0],
    "jvp": lambda call, x: torch.func.jvp(call, (x,), (x,))[0],
    "grad": lambda call, x: torch.func.grad(lambda x: (call(x).sum(), call(x)), has_aux=True)(x)[1],
    "trace": lambda call, x: torch.jit.trace(lambda x: call(x), x, check_trace=False)(x),  # NaN is not NaN
    "make_fx": lambda call, x: make_fx(call)(x)(x),
    "compile": lambda call, x: torch.compile(call, backend="aot_eager")(x),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("positions", [(4, 5), (256, 256)])
def test_a_variance_beyond_float32_is_nan_where_no_check_reads_it(
    transform: str, positions: tuple[int, int]
) -> None:
    x, one, zero = 1e20 * torch.randn(2, 3, *positions).clamp(-3, 3), torch.ones(3), torch.zeros(3)
    call = partial(functional.conditional_batch_norm, gain=one, bias=zero, training=True)
    assert TRANSFORMS[transform](call, x).isnan().all()
    torch.testing.assert_close(TRANSFORMS[transform](call, 1e-20 * x), call(1e-20 * x))


@kernels
def test_not_a_number_goes_through_relu_as_in_torch(backend: ConditionalNorm) -> None:
    x = torch.randn(2, 3, 4)
    x[1, 2, 3] = torch.nan
    y = compute(served(backend, x), x, relu=True).y
    assert y[:, 2].isnan().all()
    assert torch.isfinite(y[:, :2]).all()


@every_backend
@with_and_without_relu
def test_the_same_input_gives_the_same_bits_and_is_not_changed(backend: ConditionalNorm, relu: bool) -> None:
    inputs = torch.randn(3, 4, 5, 7), torch.randn(3, 4), torch.randn(4)
    served(backend, inputs[0])
    copies = [tensor.clone() for tensor in inputs]
    cotangent = torch.randn(inputs[0].shape)
    first, second = (run(backend, inputs, cotangent, relu=relu) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, inputs, copies))


@kernels
@pytest.mark.parametrize("shape", [(3, 4, 5, 7), (3, 4, 6), (3, 4), (3, 4, 2, 3, 2)])
@both_formats
def test_output_and_gradient_have_the_memory_format_of_the_input(
    backend: ConditionalNorm, layout: str, shape: tuple[int, ...]
) -> None:
    x = laid_out(torch.randn(shape), layout)
    results = run(served(backend, x), (x, torch.randn(3, 4), torch.randn(4)), torch.randn(shape))
    for result in results[:2]:
        assert result.stride() == x.stride()


@every_backend
@with_and_without_relu
@both_statistics
@both_formats
def test_derivatives_of_first_and_second_order_pass_the_numerical_check(
    backend: ConditionalNorm, layout: str, running: bool, relu: bool
) -> None:
    x = laid_out(torch.randn(3, 2, 2, 2, dtype=torch.float64), layout).requires_grad_()
    gain = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    statistics = (bias.detach() + 1, gain.detach()[0].abs() + 1) if running else None
    fast = served(backend, x).name == "triton"  # along one direction: the interpreter takes long

    def forward(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        return compute(backend, x, gain, bias, statistics, relu).y

    y = forward(x, gain, bias)
    assert y.abs().masked_fill(y == 0, 1).min() > 1e-4  # not at a kink
    assert torch.autograd.gradcheck(forward, (x, gain, bias), fast_mode=fast)
    assert torch.autograd.gradgradcheck(forward, (x, gain, bias), fast_mode=fast)


@kernels
def test_third_derivatives_and_gains_that_depend_on_the_input_are_the_references(
    backend: ConditionalNorm,
) -> None:
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)

    def derivatives(backend: ConditionalNorm) -> list[Tensor]:
        found = [compute(backend, x, x.mean(2).exp(), x[0, :, 0], relu=True).y]
        for _ in range(3):
            (derivative,) = torch.autograd.grad(found[-1].pow(2).sum(), x, create_graph=True)
            found.append(derivative)
        return found

    torch.testing.assert_close(derivatives(served(backend, x)), derivatives(REFERENCE))


@kernels
@with_and_without_relu
@both_statistics
def test_gradients_do_not_depend_on_which_are_needed(
    backend: ConditionalNorm, running: bool, relu: bool
) -> None:
    x = torch.randn(3, 4, 5)
    inputs = x, torch.randn(3, 4), torch.randn(4)
    statistics = (torch.randn(4), torch.rand(4) + 0.5) if running else None
    cotangent = torch.randn(x.shape)
    _, *gradients = run(served(backend, x), inputs, cotangent, statistics, relu)
    for needed in itertools.product([False, True], repeat=3):
        leaves = [t.clone().requires_grad_(need) for t, need in zip(inputs, needed, strict=True)]
        y = compute(backend, *leaves, statistics, relu).y
        assert y.requires_grad == any(needed)
        if any(needed):
            y.backward(cotangent)
        for leaf, gradient, is_needed in zip(leaves, gradients, needed, strict=True):
            assert torch.equal(leaf.grad, gradient) if is_needed else leaf.grad is None


@kernels
@with_and_without_relu
def test_the_input_is_saved_for_backward_and_with_relu_the_output(
    backend: ConditionalNorm, relu: bool
) -> None:
    x = torch.randn(3, 4, 8, 8, requires_grad=True)
    with saved_tensors() as saved:
        y = compute(served(backend, x), x, torch.randn(3, 4), torch.randn(3, 4), relu=relu).y
    large = {tensor.data_ptr() for tensor in saved if tensor.numel() > 12}
    assert large == {x.data_ptr(), *([y.data_ptr()] if relu else [])}


@kernels
def test_running_statistics_may_change_between_an_evaluation_and_its_backward(
    backend: ConditionalNorm,
) -> None:
    x = torch.randn(3, 4, 5, requires_grad=True)
    statistics = torch.randn(4), torch.rand(4) + 0.5
    expected = run(REFERENCE, (x, torch.ones(4), torch.zeros(4)), x, statistics)[1]
    y = compute(served(backend, x), x, running=statistics).y
    for statistic in statistics:
        statistic.mul_(7)
    torch.testing.assert_close(torch.autograd.grad(y, x, x.detach())[0], expected)


@kernels
def test_changing_an_output_of_relu_in_place_makes_backward_raise(backend: ConditionalNorm) -> None:
    x = torch.randn(3, 4, 5, requires_grad=True)
    y = compute(served(backend, x), x, relu=True).y
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_backend
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_does_not_lower_the_precision(
    backend: ConditionalNorm, x_dtype: torch.dtype, autocast_dtype: torch.dtype
) -> None:
    inputs = torch.randn(3, 4, 5).to(x_dtype), torch.randn(3, 4), torch.randn(4)
    cotangent = torch.randn(3, 4, 5).to(x_dtype)
    plain = run(served(backend, inputs[0]), inputs, cotangent)
    with torch.autocast("cpu", autocast_dtype):
        under_autocast = run(backend, inputs, cotangent)
    assert all(torch.equal(*pair) for pair in zip(plain, under_autocast, strict=True))


@kernels
def test_statistics_are_returned_in_float64(backend: ConditionalNorm) -> None:
    x = torch.randn(3, 4, 5).bfloat16()
    result = compute(served(backend, x), x)
    exact = x.double().transpose(0, 1).flatten(1)
    assert result.num_values == 15
    torch.testing.assert_close(result.mean, exact.mean(1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(result.var, exact.var(1, correction=0), rtol=1e-6, atol=0)


@every_backend
@with_and_without_relu
@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 3, 0), (2, 0, 3)])
def test_empty_inputs_have_empty_outputs_and_gradients(
    backend: ConditionalNorm, shape: tuple[int, ...], relu: bool
) -> None:
    x = torch.randn(shape)
    channels = shape[1]
    inputs = x, torch.randn(shape[:2]), torch.randn(channels)
    y, *gradients = run(served(backend, x), inputs, x, (torch.zeros(channels), torch.ones(channels)), relu)
    assert y.shape == gradients[0].shape == x.shape
    assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("entries", [1, 7, 40, 100, 333, 5000])
@both_formats
@half_and_single
@with_and_without_relu
def test_blocks_of_any_size_are_as_accurate(
    entries: int, threads: int, layout: str, dtype: torch.dtype, relu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditional_norm_blocked, "BLOCK_BYTES", 4 * entries // threads)
    monkeypatch.setattr(conditional_norm_blocked, "ROW_VALUES", 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = laid_out(torch.randn(3, 5, 4, 7).to(dtype) + 10, layout)
    inputs = x, torch.randn(3, 5), torch.randn(3, 5)
    assert_as_accurate_as_the_reference(
        BACKENDS["blocked"], inputs, torch.randn(x.shape).to(dtype), relu=relu
    )


@both_formats
@half_and_single
@with_and_without_relu
def test_forward_and_backward_allocate_one_map_each_and_small_blocks(
    layout: str, dtype: torch.dtype, relu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditional_norm_blocked, "BLOCK_BYTES", 2**16 // torch.get_num_threads())
    x = laid_out(torch.randn(4, 8, 64, 64).to(dtype), layout).requires_grad_()
    cotangent = laid_out(torch.randn(x.shape).to(dtype), layout)
    with DispatchedOperations() as forward:
        y = compute(BACKENDS["blocked"], x, torch.ones(4, 8), relu=relu).y
    with DispatchedOperations() as backward:
        torch.autograd.grad(y, x, cotangent)
    for dispatched in (forward, backward):
        *_, second, largest = sorted(dispatched.allocated_bytes)
        assert largest == x.untyped_storage().nbytes()
        assert second <= 2**16


def normalise(backend: str, activation: str | None = None) -> Callable[..., Tensor]:
    def function(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        return functional.conditional_batch_norm(
            x, gain, bias, training=True, activation=activation, backend=backend
        )

    return function


@pytest.mark.usefixtures("_fresh_compiler")
@kernels
@pytest.mark.parametrize("activation", [None, "relu"])
@both_formats
def test_compiled_without_breaks_it_equals_eager(
    backend: ConditionalNorm, layout: str, activation: str | None
) -> None:
    function = normalise(backend.name, activation)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for batch in (3, 5):  # the second time with dynamic sizes
        x = laid_out(torch.randn(batch, 4, 6, 2), layout).requires_grad_()
        served(backend, x)
        inputs = x, torch.randn(batch, 4, requires_grad=True), torch.randn(4, requires_grad=True)
        ours, expected = compiled(*inputs), function(*inputs)
        cotangent = torch.randn(x.shape)
        assert torch.equal(ours, expected)
        assert ours.stride() == expected.stride()
        gradients = (torch.autograd.grad(y, inputs, cotangent) for y in (ours, expected))
        assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@kernels
@with_and_without_relu
@both_statistics
def test_operations_keep_their_promises_to_torch(backend: ConditionalNorm, running: bool, relu: bool) -> None:
    x = laid_out(torch.randn(3, 4, 5, 2), "channels_last").requires_grad_()
    served(backend, x)
    statistics = (torch.zeros(4).double(), torch.ones(4).double()) if running else (None, None)
    gain, bias = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    forward = getattr(torch.ops.sagan_layers, f"conditional_norm_{backend.name}").default
    torch.library.opcheck(forward, (x, gain, bias, *statistics, EPS, relu))


class Normalise(torch.nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.function = normalise(backend, "relu")

    def forward(self, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        return self.function(x, gain, bias)


@pytest.mark.parametrize(
    ("name", "operations"),
    [("auto", set()), ("blocked", {"sagan_layers.conditional_norm_blocked.default"})],
)
def test_exported_it_is_made_of_torchs_operations_unless_a_backend_is_named(
    name: str, operations: set[str]
) -> None:
    inputs = torch.randn(8, 16, 32, 32), torch.randn(8, 16), torch.randn(16)
    assert select_norm_backend(inputs[0]) == "blocked"
    program = torch.export.export(Normalise(name), inputs)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {target for target in called if target.startswith("sagan_layers")} == operations
    torch.testing.assert_close(program.module()(*inputs), normalise("reference", "relu")(*inputs))


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_auto_takes_the_blocks_from_the_same_size_on() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(normalise("auto"), fullgraph=True, backend=record, dynamic=False)
    for channels, is_blocked in ((15, False), (16, True)):
        compiled(torch.randn(4, channels, 32, 32), torch.randn(4, channels), torch.randn(channels))
        assert ("conditional_norm_blocked" in str(graphs[-1].graph)) == is_blocked


@kernels
def test_vmap_gives_each_call_its_statistics_and_gradients_of_functions_work(
    backend: ConditionalNorm,
) -> None:
    x, gain, bias = torch.randn(2, 3, 4, 5), torch.randn(3, 4), torch.randn(2, 4)
    served(backend, x[0])

    def loss(x: Tensor, bias: Tensor, name: str) -> Tensor:
        return normalise(name, "relu")(x, gain, bias).pow(3).sum()

    gradient = torch.func.grad(loss)
    batched = torch.func.vmap(gradient, in_dims=(0, 0, None))(x, bias, backend.name)
    for ours, one, shift in zip(batched, x, bias, strict=True):
        torch.testing.assert_close(ours, gradient(one, shift, backend.name))
        torch.testing.assert_close(ours, gradient(one, shift, "reference"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from torch's forward mode
@kernels
def test_forward_mode_is_refused_with_the_remedy(backend: ConditionalNorm) -> None:
    inputs = torch.randn(3, 4, 5), torch.randn(3, 4), torch.randn(4)
    served(backend, inputs[0])
    with pytest.raises(NotImplementedError, match="only 'reference' has forward-mode derivatives"):
        torch.func.jvp(normalise(backend.name), inputs, inputs)
    _, tangent = torch.func.jvp(normalise("reference"), inputs, inputs)
    assert torch.isfinite(tangent).all()


def test_the_reference_is_the_last_of_the_table_and_refuses_nothing() -> None:
    assert list(BACKENDS)[-1] == "reference"
    assert len(BACKENDS) == len(CONDITIONAL_BATCH_NORM.backends)
    for dtype in DTYPES:
        assert select_norm_backend(torch.empty(2, 3, 4, dtype=dtype, device="meta")) == "reference"


def test_auto_takes_the_blocks_for_large_maps_on_a_cpu() -> None:
    assert select_norm_backend(torch.randn(16, 64, 8, 8)) == "blocked"
    assert select_norm_backend(torch.randn(15, 64, 8, 8)) == "reference"
    assert select_norm_backend(torch.randn(2, 3), backend="blocked") == "blocked"


def test_inputs_that_the_blocks_cannot_serve_are_refused_with_the_reason() -> None:
    reason = "it is made for a CPU's cache, and the tensors are on meta"
    with pytest.raises(ValueError, match=f"no conditional batch norm backend serves .*blocked: {reason}"):
        select_norm_backend(torch.empty(2, 3, device="meta"), backend="blocked")


def test_the_reference_serves_gradients_of_running_statistics() -> None:
    mean, var = torch.zeros(64, requires_grad=True), torch.ones(64)
    inputs = torch.randn(16, 64, 8, 8), torch.ones(64), torch.zeros(64), mean, var
    y = functional.conditional_batch_norm(*inputs)
    (gradient,) = torch.autograd.grad(y.sum(), mean)
    assert gradient.abs().min() > 0
    with pytest.raises(ValueError, match="blocked: it has no gradients of running statistics"):
        functional.conditional_batch_norm(*inputs, backend="blocked")


def test_the_reference_serves_a_process_group_inside_torch_compile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: False, raising=False)
    x = torch.randn(16, 64, 8, 8)
    group: Any = object()
    assert select_norm_backend(x) == "blocked"
    assert select_norm_backend(x, process_group=group) == "reference"
    with pytest.raises(ValueError, match=r"torch\.compile does not see its collective operations"):
        select_norm_backend(x, process_group=group, backend="blocked")
