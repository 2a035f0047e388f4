"""Every form of a resampling convolution against the composition, and which form serves when."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from blocks import inside_larger
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sagan_layers import functional
from sagan_layers.resampling.folded import folded_weight
from sagan_layers.resampling.table import UPSAMPLE_CONV2D
from sagan_layers.resampling.windows import window_sums

BACKENDS = [backend.name for backend in UPSAMPLE_CONV2D.backends]
FORMS = ["matmul", "filtered", "folded"]  # what serves kernels of any odd size
both_directions = pytest.mark.parametrize("upsample", [True, False], ids=["up", "down"])
every_form = pytest.mark.parametrize("form", FORMS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


class Problem(NamedTuple):
    """Inputs of one call; ``options`` are its keyword arguments."""

    upsample: bool
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    options: dict[str, Any]


def draw(
    upsample: bool,
    *,
    kernel: tuple[int, int] = (3, 3),
    size: tuple[int, int] = (5, 7),
    channels: tuple[int, int] = (4, 6),
    batch: int = 2,
    groups: int = 1,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **options: Any,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs, outputs = channels
    weight = normal(outputs, inputs // groups, *kernel)
    options = {"padding": (kernel[0] // 2, kernel[1] // 2), **options, "groups": groups}
    return Problem(upsample, normal(batch, inputs, *size), weight, normal(outputs) if bias else None, options)


def composed(problem: Problem) -> Tensor:
    """The plain composition, written down a second time."""
    upsample, x, weight, bias, options = problem
    convolution = {name: value for name, value in options.items() if name not in ("factor", "backend")}
    factor = options.get("factor", 2)
    if upsample:
        x = x.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        return F.conv2d(x, weight, bias, **convolution)
    y = F.conv2d(x, weight, bias, **convolution)
    whole = y[:, :, : y.size(2) // factor * factor, : y.size(3) // factor * factor]
    return whole.unflatten(3, (-1, factor)).unflatten(2, (-1, factor)).mean((3, 5))


def ours(problem: Problem, backend: str) -> Tensor:
    upsample, x, weight, bias, options = problem
    function = functional.upsample_conv2d if upsample else functional.conv2d_downsample
    return function(x, weight, bias, **{**options, "backend": backend})


def with_derivatives(compute: Callable[[Problem], Tensor], problem: Problem) -> dict[str, Tensor]:
    """Output, first and second derivatives by x, weight and bias, along fixed directions."""
    named = {"x": problem.x, "weight": problem.weight, "bias": problem.bias}
    leaves = {name: t.detach().requires_grad_() for name, t in named.items() if t is not None}
    y = compute(problem._replace(**leaves))

    def direction(like: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    cotangent = direction(y, 1).requires_grad_()
    tensors = [*leaves.values()]
    first = torch.autograd.grad(y, tensors, cotangent, create_graph=True)
    along = sum((grad * direction(grad, 2 + i)).sum() for i, grad in enumerate(first))
    second = torch.autograd.grad(along, [leaves["x"], leaves["weight"], cotangent])
    results = {"y": y, **{f"grad_{name}": grad for name, grad in zip(leaves, first, strict=True)}}
    results |= dict(zip(("second_x", "second_weight", "second_cotangent"), second, strict=True))
    return {name: tensor.detach() for name, tensor in results.items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert found[name].dtype == value.dtype, name
        error = (found[name] - value).abs().max() / value.abs().max()
        assert error <= tolerance, f"{name}: {error:.2e}"


OPTIONS: dict[str, dict[str, Any]] = {
    "3x3": {},
    "3x3_without_bias": {"bias": False},
    "3x3_unpadded": {"padding": 0},
    "3x3_padded_by_2": {"padding": 2},
    "3x3_same": {"padding": "same"},
    "3x3_valid": {"padding": "valid"},
    "3x3_groups": {"groups": 2},
    "3x3_depthwise": {"groups": 4, "channels": (4, 8)},
    "3x3_even_map": {"size": (8, 6)},
    "3x3_factor_3": {"factor": 3, "size": (10, 7)},
    "3x3_factor_5": {"factor": 5, "size": (11, 10)},
    "1x1": {"kernel": (1, 1)},
    "1x1_padded": {"kernel": (1, 1), "padding": (1, 0)},
    "5x5": {"kernel": (5, 5)},
    "5x5_factor_3_groups": {"kernel": (5, 5), "factor": 3, "groups": 2, "size": (7, 9)},
    "7x7": {"kernel": (7, 7)},
    "3x5": {"kernel": (3, 5), "padding": (0, 2)},
    "1x3": {"kernel": (1, 3)},
    "even": {"kernel": (2, 4), "padding": (1, 2)},
    "dilated": {"dilation": (2, 1), "padding": (2, 1)},
    "wider_padding_than_kernel": {"padding": (3, 4)},
    "one_pixel_map": {"size": (2, 2), "batch": 1},
    "one_channel": {"channels": (1, 1)},
}


# The cases that a form refuses, in the directions in which it does.
REFUSED: dict[str, dict[str, str]] = {
    "reordered": {name: "up down" for name in OPTIONS if name != "1x1"},
    "folded": {"dilated": "up down", "wider_padding_than_kernel": "up", "1x1_padded": "up"},
}


def choice_of(problem: Problem) -> dict[str, Any]:
    """The keyword arguments of ``select_backend`` and ``explain_backends``."""
    return {"operation": "upsample_conv2d" if problem.upsample else "conv2d_downsample", **problem.options}


def cast(problem: Problem, dtype: torch.dtype) -> Problem:
    bias = None if problem.bias is None else problem.bias.to(dtype)
    return problem._replace(x=problem.x.to(dtype), weight=problem.weight.to(dtype), bias=bias)


def fitting(upsample: bool, backend: str, **options: Any) -> Problem:
    """A problem that every backend serves: with a kernel of 3x3, or 1x1 where only that commutes."""
    return draw(upsample, kernel=(1, 1) if backend == "reordered" else (3, 3), **options)


def leaves_of(problem: Problem) -> list[Tensor]:
    return [t.requires_grad_() for t in (problem.x, problem.weight, problem.bias) if t is not None]


def flops(problem: Problem, backend: str) -> int:
    with FlopCounterMode(display=False) as counter:
        ours(problem, backend)
    return counter.get_total_flops()


@every_backend
@both_directions
@pytest.mark.parametrize("case", OPTIONS)
def test_output_and_derivatives_of_both_orders_are_the_compositions(
    case: str, upsample: bool, backend: str
) -> None:
    problem = draw(upsample, **OPTIONS[case])
    if ("up" if upsample else "down") in REFUSED.get(backend, {}).get(case, ""):
        with pytest.raises(ValueError, match=rf"convolution backend serves these inputs \({backend}: "):
            ours(problem, backend)
        return
    expected = with_derivatives(composed, problem)
    assert_close(with_derivatives(lambda each: ours(each, backend), problem), expected, 1e-12)
    found = with_derivatives(lambda each: ours(each, backend), cast(problem, torch.float32))
    assert_close({name: value.double() for name, value in found.items()}, expected, 1e-5)


@given(data=st.data(), upsample=st.booleans(), form=st.sampled_from(FORMS))
def test_any_odd_kernel_size_padding_and_factor_is_the_composition(
    data: st.DataObject, upsample: bool, form: str
) -> None:
    kernel = tuple(data.draw(st.sampled_from((1, 3, 5, 7)), label="kernel") for _ in range(2))
    padding = tuple(data.draw(st.integers(0, size - 1), label="padding") for size in kernel)
    groups = data.draw(st.sampled_from((1, 2)), label="groups")
    factor = data.draw(st.integers(2, 4), label="factor")
    size = tuple(data.draw(st.integers(1, 9), label="size") for _ in range(2))
    channels = tuple(groups * data.draw(st.integers(1, 3), label="channels") for _ in range(2))
    large = [size[i] * (factor if upsample else 1) + 2 * padding[i] - kernel[i] + 1 for i in range(2)]
    assume(min(large) >= (1 if upsample else factor))
    problem = draw(
        upsample, kernel=kernel, padding=padding, groups=groups, factor=factor, size=size, channels=channels
    )
    found, expected = ours(problem, form), composed(problem)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


@every_backend
@both_directions
def test_derivatives_of_both_orders_pass_the_numerical_check(upsample: bool, backend: str) -> None:
    problem = fitting(upsample, backend, size=(3, 4), channels=(2, 2), batch=1)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ours(problem._replace(x=x, weight=weight, bias=bias), backend)

    assert torch.autograd.gradcheck(function, leaves_of(problem), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves_of(problem), fast_mode=True)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("padding", [(0, 0), (1, 2), (-1, 1), (-2, 0)])
def test_sums_of_windows_and_their_gradient(size: int, padding: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64, requires_grad=True)
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    expected = 0.3 * padded.unfold(2, size, 1).unfold(3, size, 1).sum((4, 5))
    torch.testing.assert_close(window_sums(x, size, padding, 0.3), expected)
    assert torch.autograd.gradcheck(lambda x: window_sums(x, size, padding, 0.3), (x,))
    assert torch.autograd.gradgradcheck(lambda x: window_sums(x, size, padding, 0.3), (x,))


@both_directions
@pytest.mark.parametrize(
    ("form", "expected"), [("matmul", 1 / 4), ("filtered", 1 / 4), ("folded", 4 / 9), ("reordered", 1 / 4)]
)
def test_a_quarter_or_four_ninths_of_the_multiplications_are_done(
    form: str, expected: float, upsample: bool
) -> None:
    problem = fitting(upsample, form, size=(64, 64), dtype=torch.float32)
    # The forms differ by a row or two at the border; a 1x1 kernel has none.
    tolerance = 0 if form == "reordered" else 0.04
    assert flops(problem, form) / flops(problem, "plain") == pytest.approx(expected, rel=tolerance)


@every_form
@both_directions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_about_as_exact_as_the_composition(
    dtype: torch.dtype, upsample: bool, form: str
) -> None:
    problem = cast(draw(upsample, channels=(16, 16), size=(8, 8)), dtype)
    expected = composed(cast(problem, torch.float64))

    def error(y: Tensor) -> float:
        return float((y.double() - expected).norm() / expected.norm())

    y = ours(problem, form)
    assert y.dtype == dtype
    assert error(y) <= 2 * error(composed(problem)) + torch.finfo(dtype).eps / 4


@every_backend
@both_directions
def test_autocast_lowers_the_convolution_and_not_the_folding(upsample: bool, backend: str) -> None:
    problem = fitting(upsample, backend, channels=(16, 16), size=(8, 8), dtype=torch.float32)
    leaves = leaves_of(problem)
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = ours(problem, backend), composed(problem)
        assert folded_weight(problem.weight, 2).dtype == torch.float32
    assert y.dtype == torch.bfloat16
    exact = composed(cast(problem, torch.float64))
    errors = [((result.double() - exact).norm() / exact.norm()).item() for result in (y, plain)]
    assert errors[0] <= 2 * errors[1]
    grads = torch.autograd.grad(y.float().square().sum(), leaves)
    assert all(grad.dtype == torch.float32 for grad in grads)


@every_backend
@both_directions
def test_output_has_the_memory_format_of_the_input(upsample: bool, backend: str) -> None:
    problem = fitting(upsample, backend)
    strided = problem._replace(x=problem.x.to(memory_format=torch.channels_last))
    y, expected = ours(strided, backend), ours(problem, backend)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert expected.is_contiguous()
    torch.testing.assert_close(y, expected)


@every_form
@both_directions
def test_slices_of_larger_tensors_give_the_values_of_their_copies(upsample: bool, form: str) -> None:
    problem = draw(upsample)
    part = problem._replace(x=inside_larger(problem.x))
    torch.testing.assert_close(ours(part, form), ours(problem, form))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use
@every_backend
@both_directions
def test_vmap_and_forward_mode_derivatives_agree_with_the_composition(upsample: bool, backend: str) -> None:
    problem = fitting(upsample, backend)
    many = torch.stack([problem.x, 2 * problem.x])

    def function(x: Tensor) -> Tensor:
        return ours(problem._replace(x=x), backend)

    def plain(x: Tensor) -> Tensor:
        return composed(problem._replace(x=x))

    torch.testing.assert_close(torch.func.vmap(function)(many), torch.stack([plain(x) for x in many]))
    tangent = torch.randn_like(problem.x)
    found, expected = (torch.func.jvp(each, (problem.x,), (tangent,)) for each in (function, plain))
    torch.testing.assert_close(found, expected)


def chosen(
    batch: int,
    channels: tuple[int, int],
    side: int,
    upsample: bool,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    kernel: int = 3,
    **options: Any,
) -> str:
    """Return what "auto" takes for a map of side x side pixels, without making it."""
    with FakeTensorMode():
        x = torch.empty(batch, channels[0], side, side, device=device, dtype=dtype)
        weight = torch.empty(channels[1], channels[0], kernel, kernel, device=device, dtype=dtype)
        operation = "upsample_conv2d" if upsample else "conv2d_downsample"
        return functional.select_backend(x, weight, operation=operation, padding=kernel // 2, **options)


@pytest.mark.parametrize(
    ("batch", "channels", "side", "upsample", "expected"),
    [
        (4, (1024, 1024), 4, True, "matmul"),
        (4, (1024, 512), 8, True, "matmul"),
        (4, (512, 256), 16, True, "filtered"),
        (4, (256, 128), 32, True, "filtered"),
        (4, (128, 64), 64, True, "filtered"),
        (7, (128, 64), 64, True, "filtered"),
        (8, (128, 64), 64, True, "folded"),
        (8, (256, 64), 64, True, "filtered"),
        (4, (64, 64), 128, False, "filtered"),
        (9, (64, 64), 128, False, "folded"),
        (4, (256, 256), 32, False, "filtered"),
        (4, (512, 512), 16, False, "matmul"),
        (5, (512, 512), 16, False, "filtered"),
        (4, (1024, 1024), 8, False, "matmul"),
        (16, (32, 32), 16, True, "folded"),
        (16, (32, 32), 32, False, "folded"),
        (8, (16, 16), 8, True, "plain"),
        (2, (16, 16), 32, False, "plain"),
    ],
)
def test_on_a_cpu_the_measured_rule_chooses(
    batch: int, channels: tuple[int, int], side: int, upsample: bool, expected: str
) -> None:
    assert chosen(batch, channels, side, upsample) == expected


@both_directions
@pytest.mark.parametrize(
    ("batch", "channels", "side", "options", "expected"),
    [
        # Half precision needs twice the work to leave the plain form.
        (8, 48, 8, {}, "filtered"),
        (8, 48, 8, {"dtype": torch.bfloat16}, "plain"),
        (16, 64, 8, {"dtype": torch.bfloat16}, "filtered"),
        # Pointwise convolutions are reordered everywhere.
        (1, 3, 2, {"kernel": 1}, "reordered"),
        (1, 3, 2, {"kernel": 1, "device": "cuda"}, "reordered"),
        (1, 3, 2, {"kernel": 1, "device": "mps"}, "reordered"),
        # Other devices take what should be fast there, or the plain form.
        (4, 64, 32, {"device": "cuda"}, "folded"),
        (4, 64, 32, {"device": "cuda", "dilation": 2}, "plain"),
        (4, 64, 32, {"device": "mps"}, "plain"),
        # A large map that cannot be folded is filtered.
        (16, 64, 64, {}, "folded"),
        (16, 64, 64, {"dilation": 2}, "filtered"),
    ],
)
def test_the_choice_depends_on_dtype_device_and_options(
    batch: int, channels: int, side: int, options: dict[str, Any], expected: str, upsample: bool
) -> None:
    assert (
        chosen(batch, (channels, channels), side if upsample else 2 * side, upsample, **options) == expected
    )


@both_directions
def test_what_only_the_plain_form_serves_is_served(upsample: bool) -> None:
    problem = draw(upsample, kernel=(4, 4), padding="same")
    assert functional.select_backend(problem.x, problem.weight, **choice_of(problem)) == "plain"
    with warnings.catch_warnings():  # torch's own, of the copy that it pads
        warnings.simplefilter("ignore", UserWarning)
        torch.testing.assert_close(ours(problem, "auto"), composed(problem))
    for form in FORMS:
        with pytest.raises(ValueError, match="padding = 'same' is uneven for an even kernel"):
            ours(problem, form)


@both_directions
def test_a_factor_of_one_is_the_convolution(upsample: bool) -> None:
    problem = draw(upsample, factor=1)
    assert functional.select_backend(problem.x, problem.weight, **choice_of(problem)) == "plain"
    expected = F.conv2d(problem.x, problem.weight, problem.bias, padding=1)
    torch.testing.assert_close(ours(problem, "auto"), expected)
    with pytest.raises(ValueError, match="there is nothing to resample"):
        ours(problem, "folded")


def test_inside_export_the_choice_does_not_depend_on_sizes() -> None:
    class Up(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return functional.upsample_conv2d(x, weight, padding=1)

    problem = draw(True, channels=(64, 64), size=(3, 4), dtype=torch.float32)
    batch = torch.export.Dim("batch", min=2, max=1024)
    program = torch.export.export(Up(), (problem.x, problem.weight), dynamic_shapes=({0: batch}, None))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.aten.conv_transpose2d.input in targets
    for size in (2, 9):
        x = torch.randn(size, 64, 3, 4)
        expected = composed(problem._replace(x=x, bias=None))
        torch.testing.assert_close(program.module()(x, problem.weight), expected, rtol=1e-4, atol=1e-4)
