"""Resampling convolutions as layers and functions: state, options, errors, and their place among the others."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import assert_close, assert_same, gradients_of, state_of
from torch import Tensor, nn

from sagan_layers import (
    ResamplingConv2d,
    SelfAttention2d,
    SNConv2d,
    SpectralNormLayer,
    apply_spectral_norm,
    functional,
    remove_spectral_norm,
)

both_classes = pytest.mark.parametrize("kind", [ResamplingConv2d, SNConv2d])
both_directions = pytest.mark.parametrize("direction", ["upsample", "downsample"])


def around(plain: nn.Module, direction: str, factor: int, x: Tensor) -> Tensor:
    """The composition of a plain convolution with the resampling."""
    if direction == "upsample":
        return plain(F.interpolate(x, scale_factor=factor, mode="nearest"))
    return F.avg_pool2d(plain(x), factor)


LAYERS: dict[str, dict[str, Any]] = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "same_5x5_without_bias": {"kernel_size": 5, "padding": "same", "bias": False},
    "grouped_dilated": {"kernel_size": 3, "padding": (2, 1), "dilation": 2, "groups": 2},
    "1x1": {"kernel_size": 1},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular_same_even": {"kernel_size": (2, 3), "padding": "same", "padding_mode": "circular"},
    "replicate_of_two_sizes": {"kernel_size": (3, 5), "padding": (1, 2), "padding_mode": "replicate"},
}


def pair_of_layers(kind: type[nn.Conv2d], direction: str, factor: int, **options: Any) -> list[nn.Module]:
    """A resampling layer, and the layer with its parameters that does not resample."""
    plain = (SNConv2d if kind is SNConv2d else nn.Conv2d)(4, 6, **options)
    layer = kind(4, 6, **options, **{direction: factor})
    layer.load_state_dict(plain.state_dict())
    return [layer, plain]


@both_classes
@both_directions
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("options", LAYERS)
def test_output_and_gradients_are_the_compositions(
    options: str, factor: int, direction: str, kind: type[ResamplingConv2d]
) -> None:
    layer, plain = pair_of_layers(kind, direction, factor, **LAYERS[options], dtype=torch.float64)
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    y, expected = layer(leaves[0]), around(plain, direction, factor, leaves[1])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(expected)
    y.backward(cotangent)
    expected.backward(cotangent)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-12, atol=1e-12)
    assert_close(gradients_of(layer), gradients_of(plain), 1e-11, 1e-11)
    assert_same(dict(layer.named_buffers()), dict(plain.named_buffers()))  # u and v after one update


@both_classes
@both_directions
def test_initial_values_are_the_plain_convolutions(direction: str, kind: type[ResamplingConv2d]) -> None:
    plain_kind, states = SNConv2d if kind is SNConv2d else nn.Conv2d, []
    for make in (lambda: kind(4, 6, 3, **{direction: 2}), lambda: plain_kind(4, 6, 3)):
        torch.manual_seed(3)
        states.append(state_of(make()))
    assert_same(*states)


@both_classes
@both_directions
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_one_image_without_a_batch_axis_is_taken(
    mode: str, direction: str, kind: type[ResamplingConv2d]
) -> None:
    layer = kind(3, 5, 3, padding=1, padding_mode=mode, **{direction: 2}).eval()
    image = torch.randn(3, 6, 8)
    torch.testing.assert_close(layer(image), layer(image[None])[0])


def test_without_resampling_it_is_the_plain_convolution() -> None:
    options = {"kernel_size": 3, "stride": 2, "padding": 1, "padding_mode": "reflect"}
    layer, plain = pair_of_layers(ResamplingConv2d, "upsample", 1, **options)
    assert not layer.resamples
    x = torch.randn(2, 4, 7, 9)
    assert torch.equal(layer(x), plain(x))


@both_classes
def test_the_named_form_serves(kind: type[ResamplingConv2d]) -> None:
    x = torch.randn(1, 3, 4, 4)
    with functional.record_backends(operation="upsample_conv2d") as served:
        for backend in ("auto", "plain", "filtered"):
            kind(3, 4, 3, padding=1, upsample=2, backend=backend)(x)
    assert served == ["plain", "plain", "filtered"]  # so small a map is not worth another form
    layer = kind(3, 4, 3, padding=1, downsample=2)
    layer.backend = "folded"  # as one would for every layer of a network
    with functional.record_backends(operation="conv2d_downsample") as served:
        layer(x)
    assert served == ["folded"]


@both_classes
def test_options_show_in_the_repr(kind: type[ResamplingConv2d]) -> None:
    assert repr(kind(3, 4, 3)) == f"{kind.__name__}(3, 4, kernel_size=(3, 3), stride=(1, 1))"
    assert "upsample=2, backend='folded'" in repr(kind(3, 4, 3, upsample=2, backend="folded"))
    assert "downsample=3" in repr(kind(3, 4, 3, downsample=3))
    assert "upsample" not in repr(kind(3, 4, 3, downsample=3)).replace("downsample", "")


@both_directions
def test_removing_spectral_norm_keeps_the_resampling(direction: str) -> None:
    layer = SNConv2d(4, 6, 3, padding=1, **{direction: 2}, backend="filtered").eval()
    x = torch.randn(2, 4, 6, 8)
    expected = layer(x)
    removed = remove_spectral_norm(layer)
    assert type(removed) is ResamplingConv2d
    assert sorted(removed.state_dict()) == ["bias", "weight"]
    assert (getattr(removed, direction), removed.backend) == (2, "filtered")
    torch.testing.assert_close(removed(x), expected)
    assert (
        vars(removed).keys() == vars(ResamplingConv2d(4, 6, 3, **{direction: 2}, backend="filtered")).keys()
    )


def test_removing_it_from_a_layer_that_does_not_resample_gives_torchs_own() -> None:
    removed = remove_spectral_norm(SNConv2d(4, 6, 3, backend="filtered"))
    assert type(removed) is nn.Conv2d
    assert vars(removed).keys() == vars(nn.Conv2d(4, 6, 3)).keys()


@both_directions
def test_applying_spectral_norm_keeps_the_resampling(direction: str) -> None:
    model = nn.Sequential(ResamplingConv2d(4, 6, 3, padding=1, **{direction: 2}), nn.Conv2d(6, 2, 1))
    plain = copy.deepcopy(model)
    apply_spectral_norm(model)
    assert all(type(layer) is SNConv2d for layer in model)
    assert [layer.resamples for layer in model] == [True, False]
    x = torch.randn(2, 4, 6, 8)
    assert model(x).shape == plain(x).shape
    model.eval()
    for layer, other in zip(model, plain, strict=True):
        with torch.no_grad():
            other.weight.div_(layer.sigma)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    assert isinstance(model[0], SpectralNormLayer)


@both_directions
def test_attention_does_not_take_it_for_a_plain_pointwise_convolution(direction: str) -> None:
    attention = SelfAttention2d(8, pool_size=1, gamma_init=0.7, bias=True).eval()
    x = torch.randn(2, 8, 6, 4)
    unchanged = attention(x)
    for name in ("key", "value"):
        before = getattr(attention, name)
        layer = SNConv2d(8, before.out_channels, 1, **{direction: 2}).eval()
        layer.load_state_dict(before.state_dict())
        setattr(attention, name, layer)
    y = attention(x)
    query, key, value = (
        projection(x).flatten(2).mT for projection in (attention.query, attention.key, attention.value)
    )
    assert key.size(1) == (96 if direction == "upsample" else 6)
    gathered = functional.attention(query, key, value).mT.reshape(2, -1, 6, 4)
    torch.testing.assert_close(y, x + 0.7 * attention.out(gathered), rtol=1e-4, atol=1e-5)
    # Upsampled keys are each key four times, which softmax does not see; averaged ones are others.
    assert torch.allclose(y, unchanged, atol=1e-5) is (direction == "upsample")


@both_classes
@both_directions
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 4, 8, 8), ValueError, "input: expected [N, C, H, W] or [C, H, W] with C = 3"),
        (torch.zeros(2, 3, 8), ValueError, "input: expected [N, C, H, W] or [C, H, W] with C = 3"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.float64), TypeError, "input: expected the module's dtype"),
        (torch.zeros(2, 3, 8, 8, device="meta"), ValueError, "input: expected the device of"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    x: Tensor, error: type[Exception], message: str, direction: str, kind: type[ResamplingConv2d]
) -> None:
    layer = kind(3, 4, 3, padding=1, **{direction: 2})
    with pytest.raises(error, match=re.escape(message)):
        layer(x)


IMAGE, KERNEL = torch.zeros(2, 4, 8, 8), torch.zeros(6, 4, 3, 3)


@pytest.mark.parametrize("function", [functional.upsample_conv2d, functional.conv2d_downsample])
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((IMAGE[0, 0], KERNEL), {}, ValueError, "or [C, H, W] with C, H, W >= 1, got [8, 8]"),
        ((IMAGE, KERNEL.double()), {}, TypeError, "weight: expected the dtype of x, torch.float32"),
        ((IMAGE, KERNEL.to("meta")), {}, ValueError, "weight: expected the device of x"),
        ((IMAGE, KERNEL[0]), {}, ValueError, "weight: expected [out, C / groups, kernel height, kernel"),
        ((IMAGE, KERNEL[:0]), {}, ValueError, "weight: expected [out, C / groups, kernel height, kernel"),
        ((IMAGE, KERNEL[:, :3]), {}, ValueError, "with C = 4 and groups = 1 dividing out, got [6, 3, 3, 3]"),
        ((IMAGE, KERNEL[:, :1]), {"groups": 4}, ValueError, "groups = 4 dividing out, got [6, 1, 3, 3]"),
        ((IMAGE, KERNEL, torch.zeros(4)), {}, ValueError, "bias: expected [6], got [4]"),
        ((IMAGE, KERNEL, torch.zeros(6).double()), {}, TypeError, "bias: expected the dtype of x"),
        ((IMAGE, KERNEL, torch.zeros(6, device="meta")), {}, ValueError, "bias: expected the device of x"),
        ((IMAGE, KERNEL), {"dilation": 9}, ValueError, "x: expected a larger map (the output would have"),
    ],
)
def test_functions_refuse_what_does_not_fit(
    function: Callable[..., Tensor],
    arguments: tuple[Tensor, ...],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        function(*arguments, **options)


def test_pooling_away_everything_is_refused() -> None:
    assert functional.conv2d_downsample(IMAGE, KERNEL, factor=6).shape == (2, 6, 1, 1)
    with pytest.raises(ValueError, match="the output would have 0 x 0 positions"):
        functional.conv2d_downsample(IMAGE, KERNEL, factor=7)


def test_under_autocast_dtypes_may_differ() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.upsample_conv2d(IMAGE.bfloat16(), KERNEL, torch.zeros(6), backend="filtered")
    assert y.dtype == torch.bfloat16
