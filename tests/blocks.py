"""The blocks of the package in every variant that the tests of the common contract run over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sagan_layers import (
    ConditionalBatchNorm2d,
    ProjectionDiscriminatorHead,
    ResamplingConv2d,
    SelfAttention2d,
    SNConv2d,
    SNConvTranspose2d,
    SNEmbedding,
    SNLinear,
    SpectralNormLayer,
)

CLASSES = 5
CONDITION = 6


@dataclass(frozen=True)
class Block:
    """A module and inputs for it.

    Attributes:
        name: appears in the test's id.
        make: constructs the module; takes device and dtype.
        inputs: draws inputs, from a batch size and a generator.
        state: the names in the state dict.
        autocast_dtype: of the output for float32 inputs under bfloat16 autocast.
    """

    name: str
    make: Callable[..., nn.Module]
    inputs: Callable[[int, torch.Generator], tuple[Tensor, ...]]
    state: tuple[str, ...]
    autocast_dtype: torch.dtype = torch.float32


Draw = Callable[[int, torch.Generator], tuple[Tensor, ...]]


def _image(*shape: int) -> Draw:
    return lambda batch, generator: (torch.randn(batch, *shape, generator=generator),)


def _labels(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randint(CLASSES, (batch,), generator=generator),)


def _indices(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randint(CLASSES, (batch, 2), generator=generator),)


def _both(first: Draw, second: Draw) -> Draw:
    return lambda batch, generator: (*first(batch, generator), *second(batch, generator))


def _of(*parts: str, state: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{part}.{name}" for part in parts for name in state)


_PLAIN = ("weight", "bias")
_SN = ("weight", "weight_u", "weight_v")
_SN_BIAS = (*_SN, "bias")
_ATTENTION = ("gamma", *_of("query", "key", "value", "out", state=_SN))
_NORM = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")
_HALF = torch.bfloat16

BLOCKS = [
    Block("attention", lambda **to: SelfAttention2d(16, gamma_init=0.7, **to), _image(16, 5, 7), _ATTENTION),
    Block(
        "attention_paper_without_residual",
        lambda **to: SelfAttention2d(16, pool_size=1, value_channels=2, residual=False, gamma_init=0.7, **to),
        _image(16, 4, 3),
        _ATTENTION,
    ),
    Block(
        "attention_plain_biased_without_output",
        lambda **to: SelfAttention2d(
            6, pool_size=1, output_projection=False, bias=True, spectral_norm=False, gamma_init=0.7, **to
        ),
        _image(6, 4, 3),
        ("gamma", *_of("query", "key", "value", state=_PLAIN)),
    ),
    Block("conv", lambda **to: SNConv2d(4, 6, 3, padding=1, **to), _image(4, 7, 5), _SN_BIAS, _HALF),
    Block(
        "conv_grouped_strided",
        lambda **to: SNConv2d(
            4, 6, (3, 2), stride=2, groups=2, bias=False, padding_mode="reflect", padding=1, **to
        ),
        _image(4, 7, 5),
        _SN,
        _HALF,
    ),
    Block(
        "conv_upsampled",
        lambda **to: SNConv2d(4, 6, 3, padding=1, upsample=2, backend="filtered", **to),
        _image(4, 3, 5),
        _SN_BIAS,
        _HALF,
    ),
    Block(
        "conv_downsampled",
        lambda **to: SNConv2d(4, 6, 5, padding="same", downsample=3, backend="folded", **to),
        _image(4, 7, 6),
        _SN_BIAS,
        _HALF,
    ),
    Block(
        "conv_plain_upsampled_grouped",
        lambda **to: ResamplingConv2d(4, 6, 3, padding=1, groups=2, upsample=2, backend="matmul", **to),
        _image(4, 3, 5),
        _PLAIN,
        _HALF,
    ),
    Block(
        "conv_pointwise_downsampled",
        lambda **to: SNConv2d(4, 6, 1, bias=False, downsample=2, **to),
        _image(4, 7, 5),
        _SN,
        _HALF,
    ),
    Block(
        "conv_transpose",
        lambda **to: SNConvTranspose2d(4, 6, 4, stride=2, padding=1, groups=2, **to),
        _image(4, 3, 5),
        _SN_BIAS,
        _HALF,
    ),
    Block("linear", lambda **to: SNLinear(7, 4, n_power_iterations=2, **to), _image(7), _SN_BIAS, _HALF),
    Block("embedding", lambda **to: SNEmbedding(CLASSES, 4, **to), _indices, _SN),
    Block(
        "batch_norm_labels",
        lambda **to: ConditionalBatchNorm2d(4, CLASSES, **to),
        _both(_image(4, 3, 5), _labels),
        (*_PLAIN, *_NORM),
    ),
    Block(
        "batch_norm_vectors",
        lambda **to: ConditionalBatchNorm2d(4, condition_features=CONDITION, spectral_norm=True, **to),
        _both(_image(4, 3, 5), _image(CONDITION)),
        (*_of("weight_projection", "bias_projection", state=_SN), *_NORM),
    ),
    Block(
        "batch_norm_unconditional_biased_average",
        lambda **to: ConditionalBatchNorm2d(4, momentum=None, biased_running_var=True, **to),
        _image(4, 3, 5),
        (*_PLAIN, *_NORM),
    ),
    Block(
        "batch_norm_offset_without_running_statistics",
        lambda **to: ConditionalBatchNorm2d(4, CLASSES, gain_offset=1.0, track_running_stats=False, **to),
        _both(_image(4, 3, 5), _labels),
        _PLAIN,
    ),
    Block(
        "head",
        lambda **to: ProjectionDiscriminatorHead(6, CLASSES, **to),
        _both(_image(6, 3, 4), _labels),
        (*_of("linear", state=_SN_BIAS), *_of("embedding", state=_SN)),
    ),
    Block(
        "head_plain_mean_unconditional_without_activation",
        lambda **to: ProjectionDiscriminatorHead(6, None, "mean", False, activation=None, **to),
        _image(6, 3, 4),
        _of("linear", state=_PLAIN),
        _HALF,
    ),
]


class Discriminator(nn.Module):
    """Convolution, attention and head, as in SAGAN's D."""

    def __init__(self, *, backend: str = "auto") -> None:
        super().__init__()
        self.conv = SNConv2d(3, 8, 3, padding=1)
        self.attention = SelfAttention2d(8, gamma_init=0.7, backend=backend)
        self.head = ProjectionDiscriminatorHead(8, CLASSES)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        logits: Tensor = self.head(self.attention(torch.tanh(self.conv(images))), labels)
        return logits


def build(block: Block, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Construct the block; no parameter has a special value such as 0 or 1."""
    torch.manual_seed(seed)
    module = block.make(dtype=dtype)
    if isinstance(module, ConditionalBatchNorm2d) and module.condition_features is None:
        nn.init.normal_(module.weight, 1.0, 0.3)
        nn.init.normal_(module.bias, 0.0, 0.3)
    return module


def draw_inputs(
    block: Block, *, batch: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32, grad: bool = False
) -> tuple[Tensor, ...]:
    """Draw inputs; the floating-point ones in ``dtype``, requiring gradients if ``grad``."""
    drawn = block.inputs(batch, torch.Generator().manual_seed(seed))
    return tuple(x.to(dtype).requires_grad_(grad) if x.is_floating_point() else x for x in drawn)


def dynamic_axes(inputs: tuple[Tensor, ...]) -> tuple[dict[int, Any], ...]:
    """For torch.export: the batch of every input, and height and width of feature maps."""
    auto = torch.export.Dim.AUTO
    return tuple({0: auto, 2: auto, 3: auto} if x.dim() == 4 else {0: auto} for x in inputs)


def at_another_size(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Inputs of a batch of 2, feature maps with another height and width."""
    return tuple(
        torch.randn(2, x.size(1), x.size(2) + 5, x.size(3) + 4) if x.dim() == 4 else x[:2] for x in inputs
    )


def cotangent(y: Tensor) -> Tensor:
    """A fixed, unsymmetric weight for each entry of an output, so that sum(y * cotangent) is a telling loss."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(y.dtype)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal names and equal bits."""
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert torch.equal(value, expected[name]), name


def assert_close(
    ours: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-5, atol: float = 1e-6
) -> None:
    """Equal names and values close to each other."""
    torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol)


def check_derivatives(module: nn.Module, *inputs: Tensor) -> None:
    """Compare derivatives of first and second order by inputs and parameters with finite differences."""
    parameters = dict(module.named_parameters())
    floating = [i for i, x in enumerate(inputs) if x.is_floating_point()]

    def forward(*tensors: Tensor) -> Tensor:
        filled = list(inputs)
        for i, tensor in zip(floating, tensors, strict=False):
            filled[i] = tensor
        named = dict(zip(parameters, tensors[len(floating) :], strict=True))
        output: Tensor = torch.func.functional_call(module, named, tuple(filled))
        return output

    arguments = [*(inputs[i] for i in floating), *parameters.values()]
    arguments = [argument.detach().clone().requires_grad_() for argument in arguments]
    assert torch.autograd.gradcheck(forward, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(forward, arguments, fast_mode=True)


def inside_larger(values: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """The values as part of a larger tensor: a step over the end of a row, sample or tensor meets NaN."""
    large = values.new_full([size + 3 for size in values.shape], torch.nan)
    large = large.contiguous(memory_format=memory_format)
    inner = large[tuple(slice(1 + axis % 2, -2 + axis % 2) for axis in range(values.dim()))]
    inner.copy_(values)
    return inner


def spectral_layers(module: nn.Module) -> list[SpectralNormLayer]:
    return [layer for layer in module.modules() if isinstance(layer, SpectralNormLayer)]


def converge(module: nn.Module) -> None:
    """Bring u and v of every spectrally normalised layer to the singular vectors."""
    with torch.no_grad():
        for layer in spectral_layers(module):
            matrix = matrix_of(layer).double()
            left, _, right = torch.linalg.svd(matrix, full_matrices=False)
            layer.weight_u.copy_(left[:, 0])
            layer.weight_v.copy_(right[0])


def hold_vectors(module: nn.Module) -> nn.Module:
    """Make u and v constants of every forward, so that finite differences see what autograd sees."""
    for layer in spectral_layers(module):
        layer.eval()
        layer.iterate_when_frozen = False
    return module


def matrix_of(layer: SpectralNormLayer) -> Tensor:
    """The weight as the matrix [outputs, rest], by an explicit rule for each layer."""
    weight = layer.weight.detach()
    if isinstance(layer, SNConvTranspose2d):
        weight = weight.permute(1, 0, 2, 3)
    return weight.reshape(weight.size(0), -1)
