"""What README says of torch's own modules, where that is a reason for these layers."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils import parametrizations, spectral_norm

from sagan_layers import SNConv2d, frozen_spectral_norm, functional, shared_spectral_norm

X = torch.zeros(2, 3, 8, 8)


def test_torchs_fused_attention_has_no_second_derivative_and_ours_has() -> None:
    query, key, value = (torch.randn(2, 1, n, 16, requires_grad=True) for n in (64, 32, 32))
    fused = scaled_dot_product_attention(query, key, value, scale=1.0)
    ours = functional.attention(query[:, 0], key[:, 0], value[:, 0], backend="chunked")[:, None]
    torch.testing.assert_close(ours, fused)
    penalties = [
        torch.autograd.grad(y.sum(), query, create_graph=True)[0].square().sum() for y in (fused, ours)
    ]
    with pytest.raises(
        RuntimeError, match=r"derivative for aten::_scaled_dot_product_flash_.* is not implemented"
    ):
        penalties[0].backward()
    penalties[1].backward()


@pytest.mark.filterwarnings("ignore")  # torch says in warnings why
def test_torchs_fused_attention_refuses_unequal_widths_and_ours_serves_them() -> None:
    query, key, value = torch.randn(2, 1, 64, 8), torch.randn(2, 1, 32, 8), torch.randn(2, 1, 32, 32)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(RuntimeError, match="No available kernel"):
        scaled_dot_product_attention(query, key, value)
    assert functional.attention(query[:, 0], key[:, 0], value[:, 0], backend="chunked").shape == (2, 64, 32)


def vectors(conv: nn.Module) -> Tensor:
    return next(buffer for name, buffer in conv.named_buffers() if name.endswith("_u")).clone()


@pytest.mark.parametrize("normalized", [spectral_norm, parametrizations.spectral_norm])
def test_torchs_spectral_norm_moves_u_with_every_forward_of_a_step(normalized) -> None:  # type: ignore[no-untyped-def]
    conv = normalized(nn.Conv2d(3, 8, 3))
    seen = [vectors(conv)]
    for _ in range(3):
        conv(X)
        seen.append(vectors(conv))
    assert all(not torch.equal(one, other) for one, other in itertools.pairwise(seen))


def test_our_u_moves_once_for_all_forwards_of_a_step_or_not_at_all() -> None:
    conv = SNConv2d(3, 8, 3)
    with frozen_spectral_norm(conv):
        before = vectors(conv)
        conv(X)
    assert torch.equal(vectors(conv), before)
    with shared_spectral_norm(conv):
        conv(X)
        moved = vectors(conv)
        conv(X)
    assert torch.equal(vectors(conv), moved)
    assert not torch.equal(moved, before)


def evaluated(conv: nn.Module) -> Tensor:
    """The norm of the evaluated weight after an update of the weight, 1 where sigma is known."""
    for _ in range(50):
        conv(X)
    ((_, weight), *_) = (
        item for item in conv.named_parameters() if "weight" in item[0] or "original" in item[0]
    )
    with torch.no_grad():
        weight[0].add_(1.0)  # what an optimizer does
    conv.eval()(X)
    used = conv.normalized_weight() if isinstance(conv, SNConv2d) else conv.weight
    return torch.linalg.matrix_norm(used.detach().flatten(1), 2)


def test_evaluation_of_torchs_spectral_norm_uses_vectors_of_the_weight_before_the_update() -> None:
    ours = (evaluated(SNConv2d(3, 8, 3)) - 1).abs()
    for normalized in (spectral_norm, parametrizations.spectral_norm):
        assert (evaluated(normalized(nn.Conv2d(3, 8, 3))) - 1).abs() > 2 * ours


def test_an_initialiser_reaches_our_weight_and_is_lost_on_torchs() -> None:
    hooked, parametrized = (
        spectral_norm(nn.Conv2d(3, 8, 3)),
        parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)),
    )
    ours = SNConv2d(3, 8, 3)
    for conv in (hooked, parametrized, ours):
        conv(X)
        nn.init.constant_(conv.weight.data, 0.5)
        conv(X)
    assert not torch.any(hooked.weight_orig == 0.5)
    assert not torch.any(parametrized.parametrizations.weight.original == 0.5)
    assert torch.all(ours.weight == 0.5)


def test_a_network_of_ours_can_be_copied_after_a_forward_and_torchs_hook_cannot() -> None:
    hooked, ours = spectral_norm(nn.Conv2d(3, 8, 3)), SNConv2d(3, 8, 3)
    for conv in (hooked, ours):
        conv(X)
    with pytest.raises(RuntimeError, match="Only Tensors created explicitly by the user"):
        copy.deepcopy(hooked)
    assert torch.equal(copy.deepcopy(ours).weight, ours.weight)
