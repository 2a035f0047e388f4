"""Derivatives of attention beyond the first, and what torch's compilers and transforms make of the operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import assert_norms_of_errors
from blocks import Discriminator
from dispatched import DispatchedOperations, saved_tensors
from torch import Tensor

from sagan_layers import (
    SelfAttention2d,
    functional,
    gradient_penalty,
    interpolate_images,
)
from sagan_layers.attention import chunked, reference, sdpa
from sagan_layers.attention.autograd import BackwardInputs, GradGrads
from sagan_layers.attention.reference import AttentionInputs
from sagan_layers.attention.table import ATTENTION

BACKENDS = {backend.name: backend for backend in ATTENTION.backends}
OURS = ["triton", "sdpa", "chunked"]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs_of(
    dtype: torch.dtype = torch.float64, batch: int = 2, queries: int = 5, keys: int = 4
) -> list[Tensor]:
    shapes = ((batch, queries, 3), (batch, keys, 3), (batch, keys, 2))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def attention_on(name: str, scale: float = 0.7) -> Attention:
    return lambda query, key, value: BACKENDS[name].implementation(query, key, value, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OURS)
def test_the_second_derivative_is_as_accurate_as_the_references(name: str, dtype: torch.dtype) -> None:
    shapes = ((2, 37, 8), (2, 23, 8), (2, 23, 16), (2, 37, 16))  # the last is the gradient of the output
    drawn = [torch.randn(shape).to(dtype) for shape in (*shapes, *shapes[:3])]

    def second(backend: str, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        query, key, value, grad_y = leaves = [tensor.clone().requires_grad_() for tensor in tensors[:4]]
        y = attention_on(backend, 1.0)(query, key, value)
        first = torch.autograd.grad(y, leaves[:3], grad_y, create_graph=True)
        return torch.autograd.grad(first, leaves, tensors[4:])

    ours, plain = second(name, drawn), second("reference", drawn)
    exact = second("reference", [tensor.double() for tensor in drawn])
    assert all(result.dtype == dtype for result in ours)
    assert_norms_of_errors(ours, plain, exact, torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", OURS)
def test_the_third_derivative_is_the_references(name: str) -> None:
    inputs = inputs_of()
    directions = [torch.randn_like(tensor) for tensor in inputs]

    def third(attention: Attention) -> tuple[Tensor, ...]:
        # The gradient of the output depends on the inputs, so that every order mixes with the others.
        objective = attention(*inputs).pow(3).sum()
        for _ in range(2):
            gradients = torch.autograd.grad(objective, inputs, create_graph=True)
            objective = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)).pow(2)
        return torch.autograd.grad(objective, inputs)

    expected = third(attention_on("reference"))
    torch.testing.assert_close(third(attention_on(name)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("create_graph", [False, True])
def test_any_inputs_need_gradients_with_and_without_a_graph_of_the_second(
    name: str, wanted: tuple[int, ...], create_graph: bool
) -> None:
    inputs = [tensor.detach() for tensor in inputs_of()]
    leaves = [inputs[i].requires_grad_() for i in wanted]

    def gradients(attention: Attention) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(attention(*inputs).pow(2).sum(), leaves, create_graph=True)
        penalty = sum(gradient.pow(2).sum() for gradient in first)
        return *first, *torch.autograd.grad(penalty, leaves, create_graph=create_graph)

    expected = gradients(attention_on("reference"))
    torch.testing.assert_close(gradients(attention_on(name)), expected, rtol=1e-10, atol=1e-10)


def r1(network: Discriminator, images: Tensor, labels: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    return gradient_penalty(logits=network(images, labels), images=images, kind="r1")


def wgan_gp(network: Discriminator, images: Tensor, labels: Tensor) -> Tensor:
    torch.manual_seed(2)
    mixed = interpolate_images(real_images=images, fake_images=images.flip(0)).requires_grad_()
    return gradient_penalty(logits=network(mixed, labels), images=mixed, kind="wgan-gp")


def path_length(network: Discriminator, images: Tensor, labels: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    features = network.attention(network.conv(images))
    (gradient,) = torch.autograd.grad((features * 0.3).sum(), images, create_graph=True)
    return (gradient.square().sum((1, 2, 3)).sqrt() - 1).square().mean()


@pytest.mark.parametrize("penalty", [r1, wgan_gp, path_length])
@pytest.mark.parametrize("name", [*OURS, "fused"])
def test_gradient_penalties_through_a_whole_discriminator_are_the_references(
    name: str, penalty: Callable[[Discriminator, Tensor, Tensor], Tensor]
) -> None:
    torch.manual_seed(1)
    network = Discriminator(backend=name).double().eval()
    images, labels = torch.randn(2, 3, 5, 6, dtype=torch.float64), torch.tensor([0, 2])

    def values() -> list[Tensor]:
        value = penalty(network, images, labels)
        return [value, *torch.autograd.grad(value, list(network.parameters()), allow_unused=True)]

    with functional.record_backends() as served:
        ours = values()
    assert name in served
    with functional.force_backend("reference"):
        expected = values()
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("save_weights", [False, True])
def test_the_registered_operations_pass_torchs_checks(name: str, save_weights: bool) -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    dtype = torch.float32
    inputs = inputs_of(dtype)
    forward = getattr(torch.ops.sagan_layers, f"attention_{name}")
    torch.library.opcheck(forward, (*inputs, 0.7, save_weights), test_utils=tests)
    saved = [tensor.detach() for tensor in forward(*inputs, 0.7, save_weights)]
    grad_y = torch.randn_like(saved[0])
    backward = getattr(torch.ops.sagan_layers, f"attention_{name}_backward")
    torch.library.opcheck(backward, (*inputs, *saved, grad_y, 0.7), test_utils=tests)
    grad_grads = [torch.randn_like(tensor) for tensor in inputs]
    double_backward = getattr(torch.ops.sagan_layers, f"attention_{name}_double_backward")
    plain = [tensor.detach() for tensor in inputs]
    torch.library.opcheck(
        double_backward,
        (*plain, *saved, grad_y, 0.7, *grad_grads),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.parametrize("name", OURS)
def test_compiled_attention_is_one_graph_with_the_same_results(name: str) -> None:
    inputs = inputs_of(torch.float32, queries=9, keys=7)

    def loss(*tensors: Tensor) -> Tensor:
        return functional.attention(*tensors, backend=name).square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    value = compiled(*inputs)
    gradients = torch.autograd.grad(value, inputs)
    torch.testing.assert_close(value, loss(*inputs))
    torch.testing.assert_close(gradients, torch.autograd.grad(loss(*inputs), inputs))


@pytest.mark.parametrize("name", OURS)
def test_exported_attention_takes_any_batch(name: str) -> None:
    module = SelfAttention2d(8, gamma_init=0.5, backend=name).eval()
    x = torch.randn(2, 8, 6, 6)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("N")},))
    for batch in (2, 5):
        larger = torch.randn(batch, 8, 6, 6)
        torch.testing.assert_close(program.module()(larger), module(larger))


@pytest.mark.parametrize("name", OURS)
def test_vmap_folds_its_axis_into_the_batch(name: str) -> None:
    query, key, value = (tensor.detach() for tensor in inputs_of(torch.float32, batch=3))
    attention = attention_on(name)

    def penalty(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def loss(k: Tensor) -> Tensor:
            return attention(q[None], k[None], v[None]).square().sum()

        return torch.func.grad(loss)(k).square().sum()

    over_samples = torch.func.vmap(torch.func.grad(penalty))(query, key, value)
    one_by_one = torch.stack(
        [torch.func.grad(penalty)(*sample) for sample in zip(query, key, value, strict=True)]
    )
    torch.testing.assert_close(over_samples, one_by_one)
    shared_key = torch.func.vmap(attention, in_dims=(0, None, None))(query.unsqueeze(1), key[:1], value[:1])
    torch.testing.assert_close(shared_key[1], attention(query[1:2], key[:1], value[:1]))


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(("batch", "queries"), [(0, 5), (2, 0)])
def test_empty_batches_and_no_queries_pass(name: str, batch: int, queries: int) -> None:
    inputs = inputs_of(batch=batch, queries=queries)
    y = attention_on(name)(*inputs)
    assert y.shape == (batch, queries, 2)
    gradients = torch.autograd.grad(y.sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), inputs)
    for tensor, first, other in zip(inputs, gradients, second, strict=True):
        assert torch.equal(first, torch.zeros_like(tensor))
        assert torch.equal(other, torch.zeros_like(tensor))


@pytest.mark.parametrize("name", ["sdpa", "chunked"])
@pytest.mark.parametrize("strict", [True, False])
def test_rules_on_sizes_leave_no_guards_on_an_exported_batch_or_image(name: str, strict: bool) -> None:
    """The choice of a backend and of what it saves depends on sizes; with dynamic sizes it must not."""
    for backend, size in (("auto", 64), (name, 12)):
        # Without pooling, to which older versions of torch attach guards of their own.
        module = SelfAttention2d(8, gamma_init=0.5, backend=backend, pool_size=1)
        N, H, W = (
            torch.export.Dim("N"),
            torch.export.Dim("H", min=4, max=256),
            torch.export.Dim("W", min=4, max=256),
        )
        x = torch.randn(2, 8, size, size)
        program = torch.export.export(
            module.eval(), (x,), dynamic_shapes=({0: N, 2: H, 3: W},), strict=strict
        )
        other = torch.randn(3, 8, 20, 16)
        torch.testing.assert_close(program.module()(other), module(other))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own forward mode
@pytest.mark.parametrize("name", OURS)
def test_forward_mode_derivatives_are_refused_with_the_remedy(name: str) -> None:
    inputs = tuple(tensor.detach() for tensor in inputs_of())
    with pytest.raises(NotImplementedError, match=r"only 'reference' has forward-mode .*force_backend"):
        torch.func.jvp(attention_on(name), inputs, inputs)


@pytest.mark.parametrize("name", ["chunked", "reference"])
def test_the_output_may_be_changed_in_place_where_the_derivatives_do_not_read_it(name: str) -> None:
    inputs = inputs_of()
    expected = torch.autograd.grad(torch.relu(attention_on(name)(*inputs)).sum(), inputs)
    changed = torch.autograd.grad(torch.relu_(attention_on(name)(*inputs)).sum(), inputs)
    assert all(map(torch.equal, changed, expected))


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("scale", [-3.0, 0.0])
def test_a_scale_of_zero_or_below_is_served(name: str, scale: float) -> None:
    inputs = inputs_of(queries=17, keys=19)
    y, expected = attention_on(name, scale)(*inputs), attention_on("reference", scale)(*inputs)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out.pow(2).sum(), inputs) for out in (y, expected)))


@pytest.mark.parametrize(
    ("entries", "rows", "whole"),
    [(1, 1, 0), (8, 2, 0), (12, 2, 0), (20, 1, 0), (45, 1, 0), (2**20, 128, 0), (1, 1, 100), (1, 1, 99)],
)
@pytest.mark.parametrize("save_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_size_of_the_blocks_does_not_matter(
    monkeypatch: pytest.MonkeyPatch,
    entries: int,
    rows: int,
    whole: int,
    save_weights: bool,
    dtype: torch.dtype,
) -> None:
    saved_bytes = 2**24 if save_weights else 0
    for constant, size in (
        ("BLOCK_ENTRIES", entries),
        ("MIN_ROWS", rows),
        ("WHOLE_ENTRIES", whole),
        ("MAX_SAVED_BYTES", saved_bytes),
        ("MAX_SAVED_BYTES_OF_HALF", saved_bytes),
    ):
        monkeypatch.setattr(chunked, constant, size)
    inputs = inputs_of(dtype, batch=5)

    def results(name: str) -> list[Tensor]:
        y = attention_on(name)(*inputs)
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return [y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)]

    tolerance = {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.15}
    torch.testing.assert_close(results("chunked"), results("reference"), **tolerance)


@pytest.mark.parametrize("order", ["forward", "backward", "double_backward"])
def test_no_tensor_of_the_chunked_backend_grows_with_l_times_s(order: str) -> None:
    L = S = 4096
    query, key, value = torch.randn(1, L, 2), torch.randn(1, S, 2), torch.randn(1, S, 2)
    with DispatchedOperations() as dispatched:
        y, saved = chunked.forward(query, key, value, 1.0, False)
        inputs = BackwardInputs(query, key, value, None, saved, torch.ones_like(y), 1.0)
        if order == "backward":
            chunked.backward(inputs)
        if order == "double_backward":
            chunked.double_backward(inputs, GradGrads(query, key, value))
    assert saved.numel() == 0
    assert 0 < dispatched.largest <= 4 * chunked.BLOCK_ENTRIES < L * S


def saved_entries(inputs: list[Tensor]) -> int:
    """The entries of the largest tensor that the chunked backend saves for backward."""
    with saved_tensors() as saved:
        attention_on("chunked")(*inputs)
    return max((tensor.numel() for tensor in saved), default=0)


@pytest.mark.parametrize(
    ("length", "dtype", "saves"),
    [
        (64, torch.float32, True),
        (65, torch.float32, False),
        (65, torch.bfloat16, True),
        (257, torch.bfloat16, False),
    ],
    ids=str,
)
def test_weights_are_saved_only_while_they_are_few(length: int, dtype: torch.dtype, saves: bool) -> None:
    inputs = [torch.randn(length, 256, 2, dtype=dtype, requires_grad=True) for _ in range(3)]
    assert saved_entries(inputs) == (length * 256 * 256 if saves else length * 256 * 2)
    with torch.no_grad():
        assert saved_entries(inputs) == 0
    assert saved_entries([tensor.detach() for tensor in inputs]) == 0


@pytest.mark.parametrize(("width", "value_width"), [(2, 8), (8, 2), (5, 5)])
def test_the_flash_kernel_serves_every_pair_of_widths_on_a_cpu(width: int, value_width: int) -> None:
    query, key = torch.randn(2, 7, width), torch.randn(2, 5, width)
    value = torch.randn(2, value_width, 5).mT  # as a feature map gives it: channels first
    with DispatchedOperations() as dispatched:
        y, lse = sdpa.forward(query, key, value, 1.0, False)
        sdpa.backward(BackwardInputs(query, key, value, y, lse, torch.ones_like(y), 1.0))
    assert dispatched.names.count("aten::_scaled_dot_product_flash_attention_for_cpu") == 1
    assert dispatched.names.count("aten::_scaled_dot_product_flash_attention_for_cpu_backward") == 1
    assert not [name for name in dispatched.names if "softmax" in name]
    torch.testing.assert_close(y, reference.attention(query, key, value, 1.0))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "sdpa", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("width", "value_width"), [(8, 32), (32, 128), (64, 256), (72, 288), (5, 7)])
def test_results_and_derivatives_on_a_gpu_are_the_references(
    name: str, dtype: torch.dtype, width: int, value_width: int
) -> None:
    shapes = ((2, 300, width), (2, 130, width), (2, 130, value_width))
    inputs = [torch.randn(s, device="cuda").mul(0.5).to(dtype).requires_grad_() for s in shapes]
    if reasons := BACKENDS[name].unsupported_reasons(AttentionInputs(*inputs)):
        pytest.skip("; ".join(reasons))

    def results(backend: str, tensors: list[Tensor]) -> list[Tensor]:
        y = attention_on(backend, 1.0)(*tensors)
        first = torch.autograd.grad(y.sum(), tensors, torch.ones_like(y.sum()), create_graph=True)
        return [y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), tensors)]

    exact = results("reference", [tensor.detach().double().requires_grad_() for tensor in inputs])
    plain = results("reference", inputs)
    assert_norms_of_errors(results(name, inputs), plain, exact, 4 * torch.finfo(dtype).eps)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OURS)
def test_a_step_can_be_captured_in_a_cuda_graph(name: str) -> None:
    inputs = [tensor.detach().cuda().requires_grad_() for tensor in inputs_of(torch.float32, queries=70)]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention_on(name)(*inputs).square().sum(), inputs)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in captured:
        tensor.fill_(torch.nan)
    graph.replay()
    torch.testing.assert_close(captured, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("scale", [1.0, -2.0, 0.0])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 5), (70, 1)])
def test_single_positions_and_any_scale_pass_on_a_gpu(
    name: str, scale: float, queries: int, keys: int
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        # As a feature map gives them: channels first.
        shapes = ((2, 64, queries), (2, 64, keys), (2, 256, keys))
        inputs = [torch.randn(s, device="cuda").mul(0.3).to(dtype).mT.requires_grad_() for s in shapes]
        if BACKENDS[name].unsupported_reasons(AttentionInputs(*inputs)):
            continue
        y, expected = attention_on(name, scale)(*inputs), attention_on("reference", scale)(*inputs)
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
        ours, theirs = (torch.autograd.grad(out.float().sum(), inputs) for out in (y, expected))
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
