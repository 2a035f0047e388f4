"""The layers against recorded results of the released TensorFlow code (tests/golden)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from measured import relative_error
from torch import Tensor, nn

from sagan_layers import (
    ConditionalBatchNorm2d,
    SelfAttention2d,
    SNConv2d,
    SNEmbedding,
    SNLinear,
    SpectralNormLayer,
    frozen_spectral_norm,
)
from sagan_layers.convert import load_tensorflow

GOLDEN = Path(__file__).parent / "golden"
LAYER_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


def below(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def nchw(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def assert_agrees(ours: Tensor, recorded: Tensor | np.ndarray, tolerance: float, what: str) -> None:
    error = relative_error(ours, torch.as_tensor(recorded), what)
    assert error <= tolerance, f"{what}: relative error {error:.2e} above {tolerance:.0e}"


ATTENTION_LAYERS = {"theta": "query", "phi": "key", "g": "value", "attn": "out"}


@pytest.mark.parametrize("start", ["random", "converged"])
def test_attention_output_u_and_gradients_agree(start: str) -> None:
    arrays = load(f"attention_{start}_u")
    module = SelfAttention2d(arrays["x"].shape[-1])
    load_tensorflow(module, below(arrays, "before/"), "attention")
    assert module.gamma.item() != 0
    x = nchw(arrays["x"]).requires_grad_()
    y = module(x)
    assert_agrees(y, nchw(arrays["y"]), LAYER_TOLERANCE, "y")
    for theirs, ours in ATTENTION_LAYERS.items():
        after = arrays[f"after/attention/sn_conv_{theirs}/u"][0]
        assert_agrees(getattr(module, ours).weight_u, after, LAYER_TOLERANCE, f"u of {ours}")
    (y * nchw(arrays["cotangent"])).sum().backward()
    gradients = below(arrays, "grad/")
    assert_agrees(x.grad, nchw(gradients.pop("x")), GRADIENT_TOLERANCE, "grad x")
    assert_agrees(module.gamma.grad, gradients.pop("attention/sigma_ratio"), GRADIENT_TOLERANCE, "grad gamma")
    for theirs, ours in ATTENTION_LAYERS.items():
        recorded = gradients.pop(f"attention/sn_conv_{theirs}/w", None)
        if recorded is not None:
            gradient = getattr(module, ours).weight.grad
            assert_agrees(
                gradient, torch.from_numpy(recorded).permute(3, 2, 0, 1), GRADIENT_TOLERANCE, f"grad {ours}"
            )
    assert not gradients, "a recorded gradient was not compared"


every_kind = pytest.mark.parametrize("kind", ["conv", "linear", "embedding"])


def spectral_layer(kind: str, arrays: dict[str, np.ndarray]) -> SpectralNormLayer:
    layer: SpectralNormLayer
    if kind == "conv":
        layer, scope = SNConv2d(6, 10, 3, padding=1), "snconv"
    elif kind == "linear":
        layer, scope = SNLinear(12, 7), "snlinear"
    else:
        layer, scope = SNEmbedding(11, 8), "snembedding"
    load_tensorflow(layer, below(arrays, "before/"), scope)
    return layer


def as_ours(kind: str, array: np.ndarray) -> Tensor:
    """An input or output of a layer, in torch's order of axes."""
    return nchw(array) if kind == "conv" else torch.from_numpy(array)


def weight_as_ours(kind: str, array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.permute(3, 2, 0, 1) if kind == "conv" else tensor.t() if kind == "linear" else tensor


@pytest.mark.parametrize("start", ["random", "converged"])
@every_kind
def test_spectral_norm_outputs_and_u_agree(kind: str, start: str) -> None:
    arrays = load(f"spectral_norm_{kind}_{start}_u")
    layer = spectral_layer(kind, arrays)
    x = as_ours(kind, arrays["x"])
    assert_agrees(layer(x), as_ours(kind, arrays["y"]), LAYER_TOLERANCE, "y")
    (after,) = below(arrays, "after/").values()
    assert_agrees(layer.weight_u, after[0], LAYER_TOLERANCE, "u")
    assert_agrees(layer(x), as_ours(kind, arrays["y_second_call"]), LAYER_TOLERANCE, "second y")


@every_kind
def test_frozen_pass_after_an_update_equals_the_second_call_and_stores_nothing(kind: str) -> None:
    arrays = load(f"spectral_norm_{kind}_random_u")
    layer = spectral_layer(kind, arrays)
    x = as_ours(kind, arrays["x"])
    layer(x)
    stored = layer.weight_u.clone()
    with frozen_spectral_norm(layer):
        frozen = layer(x)
    assert_agrees(frozen, as_ours(kind, arrays["y_second_call"]), LAYER_TOLERANCE, "frozen y")
    assert torch.equal(layer.weight_u, stored)


@every_kind
def test_spectral_norm_gradients_agree_except_for_the_path_through_the_iteration(kind: str) -> None:
    arrays = load(f"spectral_norm_{kind}_converged_u")
    layer = spectral_layer(kind, arrays)
    u0 = layer.weight_u.detach().double()
    x = as_ours(kind, arrays["x"])
    (layer(x) * as_ours(kind, arrays["cotangent"])).sum().backward()

    weight = layer.weight.detach().double()
    matrix = weight.flatten(1)  # [out, in], W^T of TensorFlow's
    v1 = nn.functional.normalize(matrix.t() @ u0, dim=0)
    u1 = nn.functional.normalize(matrix @ v1, dim=0)
    sigma = u1 @ matrix @ v1
    normalized = (weight / sigma).requires_grad_()
    if kind == "conv":
        y = nn.functional.conv2d(x.double(), normalized, padding=1)
    elif kind == "linear":
        y = nn.functional.linear(x.double(), normalized)
    else:
        y = nn.functional.embedding(x, normalized)
    (y * as_ours(kind, arrays["cotangent"]).double()).sum().backward()
    gradient = normalized.grad.flatten(1)
    c = (gradient * matrix).sum() / sigma**2

    with_constants = gradient / sigma - c * torch.outer(u1, v1)
    assert_agrees(layer.weight.grad.flatten(1), with_constants, GRADIENT_TOLERANCE, "constants formula")

    recorded = below(arrays, "grad/")
    (weight_name,) = (name for name in recorded if not name.endswith(("bias", "biases")))
    recorded_gradient = weight_as_ours(kind, recorded.pop(weight_name)).flatten(1).double()
    # The stored u has not converged, and TensorFlow differentiates through v1 (its backward pass reads u after
    # the assignment): -c g_v u1^T. Here u and v are constants by definition, so that term is taken off, exactly.
    g_v = (torch.eye(len(v1), dtype=v1.dtype) - torch.outer(v1, v1)) @ (matrix.t() @ u1)
    through_iteration = -c * torch.outer(u1, g_v / torch.linalg.vector_norm(matrix.t() @ u0))
    through = relative_error(recorded_gradient, with_constants, "grad weight, through the iteration")
    assert through > 10 * GRADIENT_TOLERANCE  # it is not noise
    assert_agrees(
        layer.weight.grad.flatten(1), recorded_gradient - through_iteration, GRADIENT_TOLERANCE, "grad weight"
    )
    for bias in recorded.values():
        assert_agrees(layer.bias.grad, bias, GRADIENT_TOLERANCE, "grad bias")


def test_conditional_batch_norm_agrees_in_evaluation_and_in_training() -> None:
    arrays = load("conditional_batch_norm")
    module = ConditionalBatchNorm2d(8, 4, momentum=0.001, biased_running_var=True)
    load_tensorflow(module, below(arrays, "before/"), "cbn")
    labels = torch.from_numpy(arrays["labels"])
    x = nchw(arrays["x"]).requires_grad_()
    assert_agrees(module.eval()(x, labels), nchw(arrays["y_eval"]), LAYER_TOLERANCE, "y_eval")
    y = module.train()(x, labels)
    assert_agrees(y, nchw(arrays["y_train"]), LAYER_TOLERANCE, "y_train")
    for name, ours in (("mean", module.norm.running_mean), ("var", module.norm.running_var)):
        before, after = (arrays[f"{when}/cbn/{name}"].ravel() for when in ("before", "after"))
        assert_agrees(ours, after, LAYER_TOLERANCE, name)
        # One update is small, so the difference is compared too, as far as float32 resolves it.
        step = torch.from_numpy(after) - torch.from_numpy(before)
        assert relative_error(ours - torch.from_numpy(before), step, f"step of {name}") < 1e-3
    (y * nchw(arrays["cotangent"])).sum().backward()
    assert_agrees(x.grad, nchw(arrays["grad/x"]), GRADIENT_TOLERANCE, "grad x")
    assert_agrees(module.weight.grad, arrays["grad/cbn/gamma"], GRADIENT_TOLERANCE, "grad gain")
    assert_agrees(module.bias.grad, arrays["grad/cbn/beta"], GRADIENT_TOLERANCE, "grad bias")
