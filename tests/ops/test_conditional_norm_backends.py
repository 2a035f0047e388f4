"""Every backend of conditional batch norm against the reference and float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sagan_layers import functional
from sagan_layers.backends import Backend
from sagan_layers.conditional_norm import blocked as conditional_norm_blocked
from sagan_layers.conditional_norm.kernels import ConditionalNormInputs
from sagan_layers.conditional_norm.table import CONDITIONAL_BATCH_NORM
from sagan_layers.torch_support import accumulation_dtype

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LAYOUTS = ["contiguous", "channels_last", "inside_larger", "transposed", "expanded"]
NAMES = ["y", "x", "gain", "bias"]
EPS = 1e-5

pytestmark = pytest.mark.usefixtures("_unwritten_memory_is_nan")

BACKENDS = {backend.name: backend for backend in CONDITIONAL_BATCH_NORM.backends}
every_backend = pytest.mark.parametrize(
    "backend", CONDITIONAL_BATCH_NORM.backends, ids=lambda backend: backend.name
)
select_norm_backend = partial(functional.select_backend, operation="conditional_batch_norm")
kernels = pytest.mark.parametrize("name", ["blocked", "triton"])
with_and_without_relu = pytest.mark.parametrize("relu", [False, True])


def laid_out(values: Tensor, layout: str) -> Tensor:
    """These values (one of them throughout, if expanded) with the strides of a layout, NaN beside them."""
    if layout == "contiguous":
        return values.contiguous()
    if layout == "channels_last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return values.flatten()[0].expand(values.shape)
    assert layout == "inside_larger"
    large = values.new_full([size + 3 for size in values.shape], torch.nan)
    inner = large[tuple(slice(1 + axis % 2, -2 + axis % 2) for axis in range(values.dim()))]
    inner.copy_(values)
    return inner


def run(
    backend: Backend,
    inputs: tuple[Tensor, Tensor, Tensor],
    cotangent: Tensor,
    given_statistics: tuple[Tensor, Tensor] | None = None,
    relu: bool = False,
) -> list[Tensor]:
    """The output, and the gradients of x, gain and bias."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    y = backend.implementation(*leaves, given_statistics, EPS, relu, None).y
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent.to(y.dtype))]


def in_float64(
    inputs: tuple[Tensor, Tensor, Tensor],
    cotangent: Tensor,
    given_statistics: tuple[Tensor, Tensor] | None,
    passed: Tensor | None,
) -> tuple[list[Tensor], list[float]]:
    """The same exactly, and the largest sum of absolute terms behind each.

    Rounding errors are relative to these: where terms cancel, the result may be as small as zero. ``passed`` is what
    ReLU let pass: of an output near zero rounding decides that, and the gradients are compared for one decision.
    """
    x, gain, bias = (tensor.detach().double() for tensor in inputs)
    g = cotangent.double() if passed is None else torch.where(passed, cotangent.double(), 0.0)
    exact = [tensor.double() for tensor in run(BACKENDS["reference"], (x, gain, bias), g, given_statistics)]
    axes = [axis for axis in range(x.dim()) if axis != 1]

    def per_channel(values: Tensor) -> Tensor:
        return values.reshape(*values.shape, *[1] * (x.dim() - 2))

    if given_statistics is None:
        var, mean = torch.var_mean(x, axes, correction=0)
    else:
        mean, var = (statistic.double() for statistic in given_statistics)
    inverse_std = (var + EPS).rsqrt()
    xhat = ((x - per_channel(mean)) * per_channel(inverse_std)).abs()
    scaled = (per_channel(gain) * g).abs()
    terms = scaled
    if given_statistics is None:
        of_grad, of_product = ((scaled * factor).mean(axes, keepdim=True) for factor in (1.0, xhat))
        terms = scaled + of_grad + xhat * of_product
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
    backend: Backend,
    inputs: tuple[Tensor, Tensor, Tensor],
    cotangent: Tensor,
    given_statistics: tuple[Tensor, Tensor] | None = None,
    relu: bool = False,
) -> None:
    ours = run(backend, inputs, cotangent, given_statistics, relu)
    passed = ours[0] > 0 if relu else None
    # Without ReLU, for the same reason.
    cut = cotangent if passed is None else torch.where(passed, cotangent, 0.0)
    same_dtype = run(BACKENDS["reference"], inputs, cut, given_statistics)
    exact, sizes = in_float64(inputs, cotangent, given_statistics, passed)
    if relu:
        same_dtype[0], exact[0] = same_dtype[0].relu(), exact[0].relu()
    for what, got, plain, wanted, size, like in zip(
        NAMES, ours, same_dtype, exact, sizes, (inputs[0], *inputs), strict=True
    ):
        unit = torch.finfo(like.dtype).eps + torch.finfo(accumulation_dtype(inputs[0].dtype)).eps
        if inputs[0].dtype == torch.float64:
            unit *= 8  # what the result is held against adds thousands of numbers in float64, too
        assert got.shape == wanted.shape, what
        assert got.dtype == like.dtype, what
        assert torch.isfinite(got).all(), what
        error, allowed = ((each.double() - wanted).abs().max().item() for each in (got, plain))
        limit = 2 * allowed + 4 * unit * size
        assert error <= limit, f"{what}: {error:.3g} > {limit:.3g} (reference {allowed:.3g})"


def served(backend: Backend, x: Tensor) -> Backend[Any, Any]:
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
        "of_sample": [draw(st.booleans()) for _ in range(2)],
        "shift": draw(st.sampled_from([0.0, 3.0, 1000.0])),
        "given": draw(st.booleans()),
        "relu": draw(st.booleans()),
        "seed": draw(st.integers(0, 999)),
    }


def check_accuracy(backend: Backend, dtype: torch.dtype, device: str, case: dict[str, Any]) -> None:
    shape = case["shape"]
    # What float64 results are held against was itself computed in float64, and lost digits of a large mean.
    shift = 0.0 if dtype == torch.float64 else case["shift"]
    generator = torch.Generator().manual_seed(case["seed"])

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype).to(device)

    x = laid_out(normal(*shape) + shift, case["layouts"][0])
    wide = torch.float32 if dtype.itemsize == 2 else dtype  # as under autocast
    gain, bias = (
        normal(*(shape[:2] if of_sample else shape[1:2]), dtype=wide) for of_sample in case["of_sample"]
    )
    cotangent = laid_out(normal(*shape), case["layouts"][1])
    statistics = None
    if case["given"]:
        statistics = (normal(shape[1], dtype=wide) + shift), normal(shape[1], dtype=wide).abs() + 0.1
    assert_as_accurate_as_the_reference(
        served(backend, x), (x, gain, bias), cotangent, statistics, case["relu"]
    )


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
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("mean", "std"), [(1e4, 1.0), (100.0, 1e-2), (-3e5, 4.0)])
def test_large_means_and_small_variances_cost_no_digits(
    name: str, mean: float, std: float, layout: str, relu: bool
) -> None:
    x = laid_out(torch.randn(6, 5, 9, 7) * std + mean, layout)
    inputs = (x, torch.rand(6, 5) + 0.5, torch.randn(6, 5))
    cotangent = torch.randn(x.shape)
    ours = run(served(BACKENDS[name], x), inputs, cotangent, relu=relu)
    passed = ours[0] > 0 if relu else None
    exact, sizes = in_float64(inputs, cotangent, None, passed)
    if relu:
        exact[0] = exact[0].relu()
    # A mean in float32, as batch norms have it, is off by up to 1e-3 of these standard deviations.
    for what, got, wanted, size in zip(NAMES, ours, exact, sizes, strict=True):
        assert (got.double() - wanted).abs().max() <= 2e-6 * size, what


@kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_few_values_far_from_the_others_cost_no_digits(name: str, layout: str, place: str) -> None:
    x = torch.randn(4, 3, 1, 4096)
    start = {"first": 0, "middle": 2046, "last": 4092}[place]
    x[..., start : start + 4] = 1000.0
    x = laid_out(x, layout)
    inputs = (x, torch.rand(4, 3) + 0.5, torch.randn(4, 3))
    cotangent = torch.randn(x.shape)
    ours = run(served(BACKENDS[name], x), inputs, cotangent)
    exact, sizes = in_float64(inputs, cotangent, None, None)
    for what, got, wanted, size in zip(NAMES, ours, exact, sizes, strict=True):
        assert (got.double() - wanted).abs().max() <= 3e-6 * size, what


@every_backend
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_constant_channels_give_the_bias_and_finite_gradients(backend: Backend, layout: str) -> None:
    x = laid_out(torch.full((3, 4, 5, 2), 77.3), layout)
    gain, bias = torch.randn(3, 4), torch.randn(3, 4)
    y, *gradients = run(served(backend, x), (x, gain, bias), torch.randn(x.shape))
    torch.testing.assert_close(y, bias[..., None, None].expand_as(y), rtol=1e-6, atol=1e-6)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@kernels
def test_not_a_number_goes_through_relu_as_in_torch(name: str) -> None:
    x = torch.randn(2, 3, 4)
    x[1, 2, 3] = torch.nan
    y = run(served(BACKENDS[name], x), (x, torch.ones(3), torch.zeros(3)), torch.ones(x.shape), relu=True)[0]
    assert y[:, 2].isnan().all()
    assert torch.isfinite(y[:, :2]).all()


@every_backend
@with_and_without_relu
def test_the_same_input_gives_the_same_bits_and_stays_as_it_is(backend: Backend, relu: bool) -> None:
    inputs = torch.randn(3, 4, 5, 7), torch.randn(3, 4), torch.randn(4)
    served(backend, inputs[0])
    copies = [tensor.clone() for tensor in inputs]
    cotangent = torch.randn(inputs[0].shape)
    first, second = (run(backend, inputs, cotangent, relu=relu) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert all(torch.equal(*pair) for pair in zip(inputs, copies, strict=True))


@kernels
@pytest.mark.parametrize("shape", [(3, 4, 5, 7), (3, 4, 6), (3, 4), (3, 4, 2, 3, 2)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_output_and_gradient_have_the_memory_format_of_the_input(
    name: str, layout: str, shape: tuple[int, ...]
) -> None:
    x = laid_out(torch.randn(shape), layout)
    results = run(served(BACKENDS[name], x), (x, torch.randn(3, 4), torch.randn(4)), torch.randn(shape))
    for result in results[:2]:
        assert result.stride() == x.stride()


@every_backend
@with_and_without_relu
@pytest.mark.parametrize("given_statistics", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_derivatives_of_first_and_second_order_pass_the_numerical_check(
    backend: Backend, layout: str, given_statistics: bool, relu: bool
) -> None:
    x = laid_out(torch.randn(3, 2, 2, 2, dtype=torch.float64), layout).requires_grad_()
    gain = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    statistics = (bias.detach() + 1, gain.detach()[0].abs() + 1) if given_statistics else None
    served(backend, x)
    fast = backend.name == "triton"  # along one direction: the interpreter takes long

    def forward(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        return backend.implementation(x, gain, bias, statistics, EPS, relu, None).y

    assert (
        forward(x, gain, bias).abs().masked_fill(forward(x, gain, bias) == 0, 1).min() > 1e-4
    )  # not at a kink
    assert torch.autograd.gradcheck(forward, (x, gain, bias), fast_mode=fast)
    assert torch.autograd.gradgradcheck(forward, (x, gain, bias), fast_mode=fast)


@kernels
def test_third_derivatives_and_gains_that_depend_on_the_input_are_the_references(name: str) -> None:
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)

    def derivatives(backend: Backend) -> list[Tensor]:
        found = [backend.implementation(x, x.mean(2).exp(), x[0, :, 0], None, EPS, True, None).y]
        for _ in range(3):
            (derivative,) = torch.autograd.grad(found[-1].pow(2).sum(), x, create_graph=True)
            found.append(derivative)
        return found

    for ours, wanted in zip(
        derivatives(served(BACKENDS[name], x)), derivatives(BACKENDS["reference"]), strict=True
    ):
        torch.testing.assert_close(ours, wanted)


@kernels
@with_and_without_relu
@pytest.mark.parametrize("given_statistics", [False, True])
def test_gradients_do_not_depend_on_which_are_wanted(name: str, given_statistics: bool, relu: bool) -> None:
    x = torch.randn(3, 4, 5)
    inputs = x, torch.randn(3, 4), torch.randn(4)
    statistics = (torch.randn(4), torch.rand(4) + 0.5) if given_statistics else None
    cotangent = torch.randn(x.shape)
    backend = served(BACKENDS[name], x)
    _, *every = run(backend, inputs, cotangent, statistics, relu)
    for wanted in itertools.product([False, True], repeat=3):
        leaves = [t.clone().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
        y = backend.implementation(*leaves, statistics, EPS, relu, None).y
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.backward(cotangent)
        for leaf, gradient, is_wanted in zip(leaves, every, wanted, strict=True):
            assert torch.equal(leaf.grad, gradient) if is_wanted else leaf.grad is None


@kernels
@with_and_without_relu
def test_what_is_kept_for_backward_is_the_input_and_with_relu_the_output(name: str, relu: bool) -> None:
    x = torch.randn(3, 4, 8, 8, requires_grad=True)
    backend = served(BACKENDS[name], x)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = backend.implementation(x, torch.randn(3, 4), torch.randn(3, 4), None, EPS, relu, None).y
    large = {tensor.data_ptr() for tensor in kept if tensor.numel() > 12}
    assert large == {x.data_ptr(), *([y.data_ptr()] if relu else [])}


@kernels
def test_running_statistics_may_move_between_an_evaluation_and_its_backward(name: str) -> None:
    x = torch.randn(3, 4, 5, requires_grad=True)
    statistics = torch.randn(4), torch.rand(4) + 0.5
    wanted = run(BACKENDS["reference"], (x, torch.ones(4), torch.zeros(4)), x, statistics)[1]
    y = (
        served(BACKENDS[name], x)
        .implementation(x, torch.ones(4), torch.zeros(4), statistics, EPS, False, None)
        .y
    )
    for statistic in statistics:
        statistic.mul_(7)
    torch.testing.assert_close(torch.autograd.grad(y, x, x.detach())[0], wanted)


@kernels
def test_changing_an_output_of_relu_in_place_makes_backward_raise(name: str) -> None:
    x = torch.randn(3, 4, 5, requires_grad=True)
    y = served(BACKENDS[name], x).implementation(x, torch.ones(4), torch.zeros(4), None, EPS, True, None).y
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_backend
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_does_not_lower_the_precision(
    backend: Backend, x_dtype: torch.dtype, autocast_dtype: torch.dtype
) -> None:
    inputs = torch.randn(3, 4, 5).to(x_dtype), torch.randn(3, 4), torch.randn(4)
    cotangent = torch.randn(3, 4, 5).to(x_dtype)
    plain = run(served(backend, inputs[0]), inputs, cotangent)
    with torch.autocast("cpu", autocast_dtype):
        under_autocast = run(backend, inputs, cotangent)
    assert all(torch.equal(*pair) for pair in zip(plain, under_autocast, strict=True))


@kernels
def test_statistics_are_returned_in_float64(name: str) -> None:
    x = torch.randn(3, 4, 5).bfloat16()
    result = served(BACKENDS[name], x).implementation(
        x, torch.ones(4), torch.zeros(4), None, EPS, False, None
    )
    exact = x.double().transpose(0, 1).flatten(1)
    assert result.num_values == 15
    torch.testing.assert_close(result.mean, exact.mean(1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(result.var, exact.var(1, correction=0), rtol=1e-6, atol=0)


@every_backend
@with_and_without_relu
@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 3, 0), (2, 0, 3)])
def test_empty_inputs_have_empty_outputs_and_gradients(
    backend: Backend, shape: tuple[int, ...], relu: bool
) -> None:
    x = torch.randn(shape)
    channels = shape[1]
    inputs = x, torch.randn(shape[:2]), torch.randn(channels)
    y, *gradients = run(served(backend, x), inputs, x, (torch.zeros(channels), torch.ones(channels)), relu)
    assert y.shape == gradients[0].shape == x.shape
    assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients)


# --- blocks on the CPU --------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("entries", [1, 7, 40, 100, 333, 5000])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
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


class Sizes(TorchDispatchMode):
    """Records how many entries each new tensor has."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        self.seen += [
            tensor.untyped_storage().nbytes()
            for tensor in _tensors(result)
            if tensor.untyped_storage().data_ptr() not in known
        ]
        return result


def _tensors(tree: Any) -> Iterator[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return (leaf for leaf in leaves if isinstance(leaf, Tensor))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@with_and_without_relu
def test_forward_and_backward_make_one_map_each_and_else_small_memory(
    layout: str, dtype: torch.dtype, relu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditional_norm_blocked, "BLOCK_BYTES", 2**16 // torch.get_num_threads())
    x = laid_out(torch.randn(4, 8, 64, 64).to(dtype), layout).requires_grad_()
    cotangent = laid_out(torch.randn(x.shape).to(dtype), layout)
    with Sizes() as forward:
        y = BACKENDS["blocked"].implementation(x, torch.ones(4, 8), torch.zeros(8), None, EPS, relu, None).y
    with Sizes() as backward:
        torch.autograd.grad(y, x, cotangent)
    for mode in (forward, backward):
        assert sorted(mode.seen)[-1] == x.untyped_storage().nbytes()
        assert sorted(mode.seen)[-2] <= 2**16


# --- compiled, exported, transformed ------------------------------------------------------------------------


def normalise(backend: str, activation: str | None = None) -> Callable[..., Tensor]:
    def function(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        return functional.conditional_batch_norm(
            x, gain, bias, training=True, activation=activation, backend=backend
        )

    return function


@kernels
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiled_without_breaks_it_equals_eager(name: str, layout: str, activation: str | None) -> None:
    torch.compiler.reset()
    compiled = torch.compile(normalise(name, activation), fullgraph=True, backend="aot_eager")
    for batch in (3, 5):  # the second time with sizes that were left open
        x = laid_out(torch.randn(batch, 4, 6, 2), layout).requires_grad_()
        served(BACKENDS[name], x)
        inputs = x, torch.randn(batch, 4, requires_grad=True), torch.randn(4, requires_grad=True)
        ours, wanted = compiled(*inputs), normalise(name, activation)(*inputs)
        cotangent = torch.randn(x.shape)
        assert torch.equal(ours, wanted)
        assert ours.stride() == wanted.stride()
        for got, expected in zip(
            torch.autograd.grad(ours, inputs, cotangent),
            torch.autograd.grad(wanted, inputs, cotangent),
            strict=True,
        ):
            assert torch.equal(got, expected)


@kernels
@with_and_without_relu
@pytest.mark.parametrize("given_statistics", [False, True])
def test_operations_keep_their_promises_to_torch(name: str, given_statistics: bool, relu: bool) -> None:
    x = laid_out(torch.randn(3, 4, 5, 2), "channels_last").requires_grad_()
    served(BACKENDS[name], x)
    statistics = (torch.zeros(4).double(), torch.ones(4).double()) if given_statistics else (None, None)
    gain, bias = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    forward = getattr(torch.ops.sagan_layers, f"conditional_norm_{name}").default
    torch.library.opcheck(forward, (x, gain, bias, *statistics, EPS, relu))


def operations_of(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


class Normalise(torch.nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.function = normalise(backend, "relu")

    def forward(self, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        return self.function(x, gain, bias)


def test_exported_it_is_made_of_torchs_operations_unless_a_backend_is_named() -> None:
    inputs = torch.randn(8, 16, 32, 32), torch.randn(8, 16), torch.randn(16)
    assert select_norm_backend(inputs[0]) == "blocked"
    for name, own in (("auto", set()), ("blocked", {"sagan_layers.conditional_norm_blocked.default"})):
        program = torch.export.export(Normalise(name), inputs)
        found = {operation for operation in operations_of(program) if operation.startswith("sagan_layers")}
        assert found == own
        torch.testing.assert_close(program.module()(*inputs), normalise("reference", "relu")(*inputs))


def test_compiled_auto_takes_the_blocks_from_the_same_size_on() -> None:
    torch.compiler.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(normalise("auto"), fullgraph=True, backend=keep, dynamic=False)
    for channels, own in ((15, False), (16, True)):
        compiled(torch.randn(4, channels, 32, 32), torch.randn(4, channels), torch.randn(channels))
        assert ("conditional_norm_blocked" in str(graphs[-1].graph)) == own


@kernels
def test_vmap_gives_each_its_own_statistics_and_gradients_of_functions_work(name: str) -> None:
    x, gain, bias = torch.randn(2, 3, 4, 5), torch.randn(3, 4), torch.randn(2, 4)
    served(BACKENDS[name], x[0])

    def loss(x: Tensor, bias: Tensor, name: str) -> Tensor:
        return normalise(name, "relu")(x, gain, bias).pow(3).sum()

    batched = torch.func.vmap(torch.func.grad(loss), in_dims=(0, 0, None))(x, bias, name)
    for ours, one, shift in zip(batched, x, bias, strict=True):
        torch.testing.assert_close(ours, torch.func.grad(loss)(one, shift, name))
        torch.testing.assert_close(ours, torch.func.grad(loss)(one, shift, "reference"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own forward mode
@kernels
def test_forward_mode_is_refused_with_the_remedy(name: str) -> None:
    inputs = torch.randn(3, 4, 5), torch.randn(3, 4), torch.randn(4)
    served(BACKENDS[name], inputs[0])
    with pytest.raises(NotImplementedError, match="only 'reference' has forward-mode derivatives"):
        torch.func.jvp(normalise(name), inputs, inputs)
    _, tangent = torch.func.jvp(normalise("reference"), inputs, inputs)
    assert torch.isfinite(tangent).all()


# --- dispatch -----------------------------------------------------------------------------------------------


def test_the_reference_is_the_last_of_the_table_and_refuses_nothing() -> None:
    names = [backend.name for backend in CONDITIONAL_BATCH_NORM.backends]
    assert names[-1] == "reference"
    assert len(set(names)) == len(names)
    for dtype in (*DTYPES, torch.float8_e5m2):
        x = torch.empty(2, 3, 4, dtype=dtype, device="meta")
        assert select_norm_backend(x) == "reference"


def test_auto_takes_the_blocks_for_large_maps_on_a_cpu() -> None:
    assert select_norm_backend(torch.randn(16, 64, 8, 8)) == "blocked"
    assert select_norm_backend(torch.randn(15, 64, 8, 8)) == "reference"
    assert select_norm_backend(torch.randn(2, 3), backend="blocked") == "blocked"


@pytest.mark.parametrize("name", ["native", "", "Reference"])
def test_an_unknown_backend_is_refused_by_name(name: str) -> None:
    message = f"backend: expected one of 'auto', 'triton', 'blocked', 'reference', got {name!r}"
    with pytest.raises(ValueError, match=message):
        select_norm_backend(torch.randn(2, 3), backend=name)
    with pytest.raises(ValueError, match=message):
        functional.conditional_batch_norm(torch.randn(2, 3), torch.ones(3), torch.zeros(3), backend=name)


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (
            torch.empty(2, 3, device="meta"),
            "blocked: it is made for a CPU's cache, and the tensors are on meta",
        ),
        (torch.empty(2, 3, dtype=torch.float8_e5m2), "blocked: torch.float8_e5m2 is not served"),
    ],
    ids=["device", "dtype"],
)
def test_what_the_blocks_cannot_serve_is_refused_with_the_reason(x: Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=f"no conditional batch norm backend serves these inputs.*{reason}"):
        select_norm_backend(x, backend="blocked")


def test_gradients_of_running_statistics_are_left_to_the_reference() -> None:
    x = torch.randn(16, 64, 8, 8)
    mean, var = torch.zeros(64, requires_grad=True), torch.ones(64)

    def evaluate(backend: str) -> Tensor:
        return functional.conditional_batch_norm(
            x, torch.ones(64), torch.zeros(64), mean, var, backend=backend
        )

    (gradient,) = torch.autograd.grad(evaluate("auto").sum(), mean)
    assert gradient.abs().min() > 0
    with pytest.raises(ValueError, match="blocked: it has no gradients of running statistics"):
        evaluate("blocked")


def test_a_process_group_inside_torch_compile_is_left_to_the_reference(
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
