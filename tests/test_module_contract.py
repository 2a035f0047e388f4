"""Every block as an nn.Module, in every variant of tests/blocks.py."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from blocks import (
    BLOCKS,
    CLASSES,
    Block,
    assert_close,
    assert_same,
    at_another_size,
    build,
    check_derivatives,
    cotangent,
    draw_inputs,
    dynamic_axes,
    hold_vectors,
    inside_larger,
    matrix_of,
    spectral_layers,
    state_of,
)
from torch import Tensor, nn

from sagan_layers import (
    ConditionalBatchNorm2d,
    ProjectionDiscriminatorHead,
    SelfAttention2d,
    SNConv2d,
    SNLinear,
    frozen_spectral_norm,
)

every_block = pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
image_blocks = pytest.mark.parametrize(
    "block", [block for block in BLOCKS if draw_inputs(block)[0].dim() == 4], ids=lambda block: block.name
)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def step(
    module: nn.Module, inputs: tuple[Tensor, ...], call: Callable[..., Tensor] | None = None
) -> dict[str, Tensor]:
    """Output, gradients of inputs and parameters, and the buffers after a forward (by ``call``) and backward."""
    leaves = tuple(x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs)
    module.zero_grad()
    y = (module if call is None else call)(*leaves)
    (y * cotangent(y)).sum().backward()
    results = {"output": y.detach().clone()}
    results |= {f"grad of input {i}": x.grad for i, x in enumerate(leaves) if x.is_floating_point()}
    results |= {f"grad of {name}": parameter.grad.clone() for name, parameter in module.named_parameters()}
    results |= {f"buffer {name}": buffer.clone() for name, buffer in module.named_buffers()}
    return results


@every_block
def test_names_in_the_state_dict_are_stable(block: Block) -> None:
    assert set(build(block).state_dict()) == set(block.state)


@every_block
def test_state_dict_round_trip_gives_the_same_outputs(block: Block) -> None:
    module, inputs = build(block), draw_inputs(block)
    for _ in range(2):
        module(*inputs)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = build(block, seed=1)
    assert not torch.equal(other.eval()(*inputs), module.eval()(*inputs))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(*inputs), module(*inputs))
    assert_same(step(other.train(), inputs), step(module.train(), inputs))


@every_block
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_equal_and_independent(block: Block, duplicate: object) -> None:
    module, inputs = build(block), draw_inputs(block)
    module(*inputs)
    duplicated = duplicate(module)
    assert type(duplicated) is type(module)
    assert repr(duplicated) == repr(module)
    before = state_of(module)
    assert_same(state_of(duplicated), before)
    assert_same(step(duplicated, inputs), step(copy.deepcopy(module), inputs))
    with torch.no_grad():
        for value in duplicated.state_dict().values():
            value.zero_()
    assert_same(state_of(module), before)


@every_block
def test_meta_construction_then_to_empty_and_reset_gives_a_fresh_module(block: Block) -> None:
    module = block.make(device="meta")
    assert all(value.is_meta for value in module.state_dict().values())
    module.to_empty(device="cpu")
    with torch.no_grad():
        for value in module.state_dict().values():
            value.fill_(torch.nan if value.is_floating_point() else -1)
    for inner in module.modules():  # as PyTorch's own deferred initialisation does
        if hasattr(inner, "reset_parameters"):
            inner.reset_parameters()
    for name, value in module.state_dict().items():
        assert torch.isfinite(value).all(), name
        assert (value >= 0).all() or value.is_floating_point(), name
    y = module(*draw_inputs(block))
    assert torch.isfinite(y).all()
    for layer in spectral_layers(module):
        assert torch.linalg.vector_norm(layer.weight_u).item() == pytest.approx(1, abs=1e-5)


@every_block
def test_constructor_places_everything_by_device_and_dtype(block: Block) -> None:
    module = block.make(device="meta", dtype=torch.float64)
    for name, value in module.state_dict().items():
        assert value.is_meta, name
        assert value.dtype == (torch.float64 if value.is_floating_point() else torch.int64), name


@every_block
def test_two_optimizer_steps_lower_the_loss(block: Block) -> None:
    module, inputs = build(block), draw_inputs(block)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        with torch.no_grad():
            reference = copy.deepcopy(module)(*inputs)
        loss = (module(*inputs) - torch.tanh(cotangent(reference))).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


@every_block
@both_modes
def test_every_parameter_and_input_gets_a_gradient(block: Block, training: bool) -> None:
    module = build(block).train(training)
    inputs = draw_inputs(block, grad=True)
    y = module(*inputs)
    (y * cotangent(y)).sum().backward()
    for name, tensor in [*module.named_parameters(), *((f"input {i}", x) for i, x in enumerate(inputs))]:
        if not tensor.is_floating_point():
            continue
        assert tensor.grad is not None, name
        assert torch.isfinite(tensor.grad).all(), name
        if name != "key.bias":  # softmax does not see what all keys have in common
            assert torch.count_nonzero(tensor.grad) > 0, name


@every_block
@both_modes
def test_derivatives_of_first_and_second_order_pass_the_numerical_check(block: Block, training: bool) -> None:
    module = hold_vectors(build(block, dtype=torch.float64).train(training))
    check_derivatives(module, *draw_inputs(block, batch=2, dtype=torch.float64))


@every_block
@both_modes
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_converted_module_computes_in_its_dtype(block: Block, dtype: torch.dtype, training: bool) -> None:
    module = build(block).to(dtype).train(training)
    exact = copy.deepcopy(module).double()
    inputs = draw_inputs(block, dtype=dtype)
    for name, value in module.state_dict().items():
        assert value.dtype == (dtype if value.is_floating_point() else torch.int64), name
    y = module(*inputs)
    assert y.dtype == dtype
    expected = exact(*(x.double() if x.is_floating_point() else x for x in inputs))
    # A block rounds weights, intermediate maps and the output, each by half a unit.
    tolerance = 1e-12 if dtype == torch.float64 else 5 * torch.finfo(dtype).eps
    error = (y.double() - expected).abs().max() / expected.abs().max()
    assert error.item() <= tolerance
    y.float().square().sum().backward()
    assert all(parameter.grad.dtype == dtype for parameter in module.parameters())
    assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters())
    assert all(torch.isfinite(buffer).all() for buffer in module.buffers())


@every_block
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_constructed_in_half_precision_it_works(block: Block, dtype: torch.dtype) -> None:
    module = build(block, dtype=dtype)
    y = module(*draw_inputs(block, dtype=dtype))
    assert y.dtype == dtype
    assert torch.isfinite(y).all()
    for layer in spectral_layers(module):
        assert torch.linalg.vector_norm(layer.weight_u.float()).item() == pytest.approx(1, abs=0.02)


@every_block
@both_modes
def test_autocast_lowers_products_but_not_sigma_nor_statistics(block: Block, training: bool) -> None:
    module = build(block).train(training)
    plain = copy.deepcopy(module)
    inputs = draw_inputs(block, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(*inputs)
    assert y.dtype == block.autocast_dtype
    expected = plain(*(x.detach() for x in inputs))
    error = (y.double() - expected.double()).abs().max() / expected.abs().max()
    assert error.item() <= 5 * torch.finfo(torch.bfloat16).eps
    # Buffers are those of the float32 pass: to the bit, for the power iteration saw the same float32 weights.
    assert_same(state_of(module), state_of(plain))
    for layer in spectral_layers(module):
        with torch.autocast("cpu", torch.bfloat16):
            sigma = layer.sigma
        assert sigma.dtype == torch.float32
        matrix, u = matrix_of(layer).double(), layer.weight_u.double()
        for _ in range(layer.n_power_iterations):
            v = nn.functional.normalize(matrix.t() @ u, dim=0)
            u = nn.functional.normalize(matrix @ v, dim=0)
        assert sigma.item() == pytest.approx((u @ matrix @ v).item(), rel=1e-5)
    (y * cotangent(y)).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all(), name


@image_blocks
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_input_under_autocast_is_accepted(block: Block, autocast_dtype: torch.dtype) -> None:
    module = build(block)
    inputs = draw_inputs(block, dtype=torch.bfloat16)
    with torch.autocast("cpu", autocast_dtype):
        y = module(*inputs)
    if isinstance(module, (ConditionalBatchNorm2d, SelfAttention2d)):
        assert y.dtype == torch.bfloat16  # the input's, whatever autocast lowers to
    else:
        assert y.dtype == (autocast_dtype if block.autocast_dtype == torch.bfloat16 else torch.float32)
    assert torch.isfinite(y).all()


@image_blocks
@both_modes
def test_channels_last_inputs_and_modules_give_channels_last_outputs(block: Block, training: bool) -> None:
    module = build(block).train(training)
    other = copy.deepcopy(module)
    inputs = draw_inputs(block)
    strided = (inputs[0].to(memory_format=torch.channels_last), *inputs[1:])
    y, expected = other(*strided), module(*inputs)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    if y.dim() == 4:
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert expected.is_contiguous()
    expected = step(copy.deepcopy(module), inputs)
    assert_close(step(other, strided), expected, rtol=1e-4, atol=1e-5)
    assert_close(step(module.to(memory_format=torch.channels_last), strided), expected, rtol=1e-4, atol=1e-5)


@image_blocks
def test_slices_and_expanded_inputs_give_the_values_of_their_copies(block: Block) -> None:
    module = build(block).eval()
    inputs = draw_inputs(block)
    torch.testing.assert_close(module(inside_larger(inputs[0]), *inputs[1:]), module(*inputs))
    expanded = inputs[0][:1].expand_as(inputs[0])
    torch.testing.assert_close(module(expanded, *inputs[1:]), module(expanded.clone(), *inputs[1:]))


def assert_compiled_equals_eager(block: Block, backend: str, training: bool, tolerance: float) -> None:
    module = build(block).train(training)
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for seed in range(2):  # buffers of the first step are inputs of the second
        inputs = draw_inputs(block, seed=seed)
        ours, expected = step(module, inputs, compiled), step(eager, inputs)
        assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("_fresh_compiler")
@every_block
@both_modes
def test_compiled_without_graph_breaks_it_equals_eager(block: Block, training: bool) -> None:
    # Unlike "aot_eager" this backend decides, as inductor does, what backward recomputes.
    assert_compiled_equals_eager(block, "aot_eager_decomp_partition", training, 1e-5)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("outputs", [1, 2, 3, 5])
def test_compiled_gradient_takes_the_vectors_of_its_own_forward(outputs: int) -> None:
    # With few outputs it is cheap to recompute v from the buffer u, but u has been updated before backward.
    layer = SNLinear(64, outputs)
    eager, x = copy.deepcopy(layer), torch.randn(3, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition")
    for module, function in ((layer, compiled), (eager, eager)):
        real = function(x).square().sum()
        with frozen_spectral_norm(module):
            fake = function(2 * x).square().sum()
        real_again = function(3 * x).square().sum()
        (real + fake + real_again).backward()
    torch.testing.assert_close(layer.weight.grad, eager.weight.grad)
    torch.testing.assert_close(layer.weight_u, eager.weight_u)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@every_block
def test_compiled_by_inductor_it_equals_eager(block: Block) -> None:
    assert_compiled_equals_eager(block, "inductor", True, 1e-4)


class UpsamplingBlock(nn.Module):
    """A block of G with everything that may depend on the size of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([ConditionalBatchNorm2d(8, CLASSES, activation="relu") for _ in range(2)])
        # Without a bias before the batch norm: its gradient would be 0, of which float32 leaves rounding noise.
        first = SNConv2d(8, 8, 3, padding=1, bias=False, upsample=2)
        self.convs = nn.ModuleList([first, SNConv2d(8, 8, 3, padding=1)])
        self.shortcut = SNConv2d(8, 8, 1, upsample=2)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        y = self.convs[0](self.norms[0](x, labels))
        y = self.convs[1](self.norms[1](y, labels))
        return y + self.shortcut(x)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: SelfAttention2d(8, gamma_init=0.7),
        lambda: ConditionalBatchNorm2d(8, CLASSES),
        lambda: ProjectionDiscriminatorHead(8, CLASSES),
        UpsamplingBlock,
    ],
    ids=["attention", "batch_norm", "head", "upsampling_block"],
)
def test_compiled_by_inductor_at_changing_sizes_it_equals_eager(
    make: Callable[[], nn.Module], dynamic: bool | None
) -> None:
    module = make()
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic)
    condition = () if isinstance(module, SelfAttention2d) else (torch.tensor([0, 3]),)
    for height, width in [(16, 16), (24, 24), (32, 32), (40, 40), (24, 40)]:
        inputs = torch.randn(2, 8, height, width), *condition
        ours, expected = step(module, inputs, compiled), step(eager, inputs)
        for name, value in expected.items():  # sums over thousands of positions: beside the largest of them
            assert (ours[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


@pytest.mark.usefixtures("_fresh_compiler")
@every_block
@both_modes
def test_exported_at_any_size_it_needs_torch_alone_and_equals_eager(block: Block, training: bool) -> None:
    module = build(block).train(training)
    eager = copy.deepcopy(module)
    inputs = draw_inputs(block, batch=3)
    program = torch.export.export(module, inputs, dynamic_shapes=dynamic_axes(inputs), strict=False)
    assert not any("sagan_layers" in str(node.target) for node in program.graph.nodes)
    exported = program.module()
    for fresh in (inputs, draw_inputs(block, batch=7, seed=7), at_another_size(inputs)):
        torch.testing.assert_close(exported(*fresh), eager(*fresh), rtol=1e-5, atol=1e-5)
    buffers = dict(eager.named_buffers())
    ours = dict(exported.named_buffers())
    for name, buffer in buffers.items():
        if not training and name.endswith("num_batches_tracked") and name not in ours:
            continue  # torch 2.6 leaves out what evaluation does not read
        torch.testing.assert_close(ours[name], buffer, rtol=1e-5, atol=1e-6)


@every_block
def test_functional_call_computes_with_its_parameters(block: Block) -> None:
    module, other, inputs = build(block).eval(), build(block, seed=1).eval(), draw_inputs(block)
    y = module(*inputs)
    parameters = {name: tensor.detach() for name, tensor in other.state_dict().items()}
    assert torch.equal(torch.func.functional_call(module, parameters, inputs), other(*inputs))
    assert torch.equal(module(*inputs), y)
