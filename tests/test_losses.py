"""Adversarial losses and gradient penalties."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from statistics import fmean
from typing import Any

import pytest
import torch
from blocks import hold_vectors
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sagan_layers import (
    ConditionalBatchNorm2d,
    GradientPenalty,
    HingeDiscriminatorLoss,
    HingeGeneratorLoss,
    ProjectionDiscriminatorHead,
    SelfAttention2d,
    SNConv2d,
    SNConvTranspose2d,
    SNEmbedding,
    SNLinear,
    SoftplusDiscriminatorLoss,
    SoftplusGeneratorLoss,
    gradient_penalty,
    hinge_discriminator_loss,
    hinge_generator_loss,
    interpolate_images,
    softplus_discriminator_loss,
    softplus_generator_loss,
)

DISCRIMINATOR_LOSSES = [hinge_discriminator_loss, softplus_discriminator_loss]
GENERATOR_LOSSES = [hinge_generator_loss, softplus_generator_loss]
numbers = st.floats(-1e3, 1e3, allow_nan=False, width=32)
logit_lists = st.lists(numbers, min_size=1, max_size=9)


@given(real=logit_lists, fake=logit_lists)
def test_losses_are_the_written_out_formulas(real: list[float], fake: list[float]) -> None:
    def softplus(value: float) -> float:
        return max(value, 0) + math.log1p(math.exp(-abs(value)))

    hinge = fmean(max(0, 1 - r) for r in real) + fmean(max(0, 1 + f) for f in fake)
    cross_entropy = fmean(softplus(-r) for r in real) + fmean(softplus(f) for f in fake)
    logits = {"real_logits": torch.tensor(real).double(), "fake_logits": torch.tensor(fake).double()}
    assert hinge_discriminator_loss(**logits).item() == pytest.approx(hinge, rel=1e-7, abs=1e-7)
    assert softplus_discriminator_loss(**logits).item() == pytest.approx(cross_entropy, rel=1e-7, abs=1e-7)
    for generator_loss in GENERATOR_LOSSES:
        value = generator_loss(fake_logits=logits["fake_logits"]).item()
        assert value == pytest.approx(-fmean(fake), rel=1e-9, abs=1e-9)


@given(real=logit_lists, fake=logit_lists)
def test_discriminator_losses_are_bounded_below(real: list[float], fake: list[float]) -> None:
    real_logits, fake_logits = torch.tensor(real).double(), torch.tensor(fake).double()
    hinge = hinge_discriminator_loss(real_logits=real_logits, fake_logits=fake_logits)
    softplus = softplus_discriminator_loss(real_logits=real_logits, fake_logits=fake_logits)
    gap = (fake_logits.mean() - real_logits.mean()).item()
    assert hinge.item() >= max(0.0, 2 + gap) - 1e-9  # relu(1 - r) >= 1 - r
    assert softplus.item() >= max(0.0, gap) - 1e-9
    assert (hinge.item() == 0) == (min(real) >= 1 and max(fake) <= -1)
    # softplus lies between relu and relu + log 2
    relu = (torch.relu(-real_logits).mean() + torch.relu(fake_logits).mean()).item()
    assert relu - 1e-9 <= softplus.item() <= relu + 2 * math.log(2) + 1e-9


@pytest.mark.parametrize("shape", [(), (3,), (3, 1), (2, 1, 4, 4)])
@pytest.mark.parametrize("loss", DISCRIMINATOR_LOSSES)
def test_losses_of_any_shape_are_scalars_with_gradients(
    loss: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    real, fake = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    value = loss(real_logits=real, fake_logits=fake)
    assert value.shape == ()
    value.backward()
    assert real.grad.shape == fake.grad.shape == shape
    assert (real.grad <= 0).all()
    assert (fake.grad >= 0).all()


def test_hinge_gives_no_gradient_beyond_the_margin() -> None:
    real = torch.tensor([2.0, 0.0], requires_grad=True)
    fake = torch.tensor([-2.0, 0.0], requires_grad=True)
    hinge_discriminator_loss(real_logits=real, fake_logits=fake).backward()
    assert real.grad.tolist() == [0.0, -0.5]
    assert fake.grad.tolist() == [0.0, 0.5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [*DISCRIMINATOR_LOSSES, *GENERATOR_LOSSES])
def test_half_precision_logits_are_accumulated_in_float32(
    loss: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    fake = torch.full((1000,), 999.0).to(dtype).requires_grad_()  # the sum overflows float16
    arguments = {"fake_logits": fake}
    if loss in DISCRIMINATOR_LOSSES:
        arguments["real_logits"] = -fake.detach()
    value = loss(**arguments)
    exact = loss(**{name: logits.detach().double() for name, logits in arguments.items()})
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=1e-6)
    value.backward()
    assert fake.grad.dtype == dtype
    assert torch.isfinite(fake.grad).all()


def test_float64_logits_stay_float64() -> None:
    logits = torch.randn(3, dtype=torch.float64)
    assert hinge_discriminator_loss(real_logits=logits, fake_logits=logits).dtype == torch.float64
    assert hinge_generator_loss(fake_logits=logits).dtype == torch.float64


def test_softplus_of_huge_logits_is_finite() -> None:
    huge = torch.tensor([1e30], requires_grad=True)
    value = softplus_discriminator_loss(real_logits=-huge, fake_logits=huge)
    value.backward()
    assert value.item() == pytest.approx(2e30)
    assert huge.grad.item() == pytest.approx(2)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (hinge_discriminator_loss, "hinge_discriminator_loss(real_logits=..., fake_logits=...)"),
        (softplus_discriminator_loss, "softplus_discriminator_loss(real_logits=..., fake_logits=...)"),
        (HingeDiscriminatorLoss(), "HingeDiscriminatorLoss()(real_logits=..., fake_logits=...)"),
        (SoftplusDiscriminatorLoss(), "SoftplusDiscriminatorLoss()(real_logits=..., fake_logits=...)"),
        (gradient_penalty, "gradient_penalty(logits=..., images=...)"),
        (GradientPenalty(), "GradientPenalty()(logits=..., images=...)"),
        (interpolate_images, "interpolate_images(real_images=..., fake_images=...)"),
    ],
)
def test_two_kinds_without_keywords_are_an_error_that_shows_the_call(
    call: Callable[..., Tensor], text: str
) -> None:
    message = f": expected keywords, got a positional argument; write {text}"
    for arguments in [(torch.zeros(1), torch.zeros(1)), (torch.zeros(1),)]:
        with pytest.raises(TypeError, match=re.escape(message)):
            call(*arguments)


@pytest.mark.parametrize("loss", [*GENERATOR_LOSSES, HingeGeneratorLoss(), SoftplusGeneratorLoss()])
def test_one_kind_needs_no_keyword(loss: Callable[..., Tensor]) -> None:
    assert loss(torch.tensor([2.0, 0.5])).item() == loss(fake_logits=torch.tensor([2.0, 0.5])).item() == -1.25


ONES = torch.ones(2)
REAL_SCALES, FAKE_SCALES = (
    [
        torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        for shape in [(4, 1, 7, 7), (4, 1, 3, 3)]
    ]
    for seed in (0, 1)
)


@pytest.mark.parametrize("container", [list, tuple])
def test_the_loss_of_several_scales_is_the_mean_of_their_losses(container: type) -> None:
    for loss in DISCRIMINATOR_LOSSES:
        expected = fmean(
            loss(real_logits=real, fake_logits=fake).item()
            for real, fake in zip(REAL_SCALES, FAKE_SCALES, strict=True)
        )
        value = loss(real_logits=container(REAL_SCALES), fake_logits=container(FAKE_SCALES))
        assert value.item() == pytest.approx(expected)
    for loss in GENERATOR_LOSSES:
        assert loss(container(FAKE_SCALES)).item() == pytest.approx(
            -fmean(fake.mean().item() for fake in FAKE_SCALES)
        )
    assert torch.equal(hinge_generator_loss(FAKE_SCALES[:1]), hinge_generator_loss(FAKE_SCALES[0]))


@pytest.mark.parametrize(
    ("real", "fake", "error", "message"),
    [
        (ONES[:0], ONES, ValueError, r"real_logits: expected at least one entry, got shape \[0\]"),
        (ONES, ONES[:0], ValueError, r"fake_logits: expected at least one entry, got shape \[0\]"),
        (ONES, ONES.to("meta"), ValueError, "fake_logits: expected the device of real_logits, cpu, got meta"),
        ([], FAKE_SCALES, ValueError, "real_logits: expected at least one tensor, got an empty list"),
        (REAL_SCALES, (), ValueError, "fake_logits: expected at least one tensor, got an empty tuple"),
        (REAL_SCALES[:1], FAKE_SCALES, ValueError, "fake_logits: expected 1 tensors, as real_logits, got 2"),
        (REAL_SCALES[0], FAKE_SCALES[:1], TypeError, "fake_logits: expected a list if real_logits is one"),
        (
            REAL_SCALES,
            [FAKE_SCALES[0], [FAKE_SCALES[1]]],
            TypeError,
            r"fake_logits\[1\]: expected a floating-point tensor, got list",
        ),
        (
            [REAL_SCALES[0], REAL_SCALES[1][:0]],
            FAKE_SCALES,
            ValueError,
            r"real_logits\[1\]: expected at least one entry, got shape \[0, 1, 3, 3\]",
        ),
        (
            REAL_SCALES,
            [FAKE_SCALES[0], FAKE_SCALES[1].to("meta")],
            ValueError,
            r"fake_logits\[1\]: expected the device of real_logits\[0\], cpu, got meta",
        ),
    ],
)
def test_wrong_logits_are_named_those_of_a_scale_by_its_index(
    real: Any, fake: Any, error: type[Exception], message: str
) -> None:
    for loss in DISCRIMINATOR_LOSSES:
        with pytest.raises(error, match=message):
            loss(real_logits=real, fake_logits=fake)


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (HingeDiscriminatorLoss(), hinge_discriminator_loss),
        (HingeGeneratorLoss(), hinge_generator_loss),
        (SoftplusDiscriminatorLoss(), softplus_discriminator_loss),
        (SoftplusGeneratorLoss(), softplus_generator_loss),
    ],
)
def test_modules_compute_what_the_functions_do(module: nn.Module, function: Callable[..., Tensor]) -> None:
    logits = {"fake_logits": torch.randn(5)}
    if function in DISCRIMINATOR_LOSSES:
        logits["real_logits"] = torch.randn(5)
    assert torch.equal(module(**logits), function(**logits))


def test_empty_logits_are_refused() -> None:
    for loss in GENERATOR_LOSSES:
        with pytest.raises(ValueError, match=r"fake_logits: expected at least one entry, got shape \[0, 1\]"):
            loss(torch.ones(0, 1))


class EveryBlock(nn.Module):
    """A discriminator with every block of the package between its images and its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = SNConv2d(2, 8, 3, padding=1)
        self.embedding = SNEmbedding(3, 4)
        self.norm = ConditionalBatchNorm2d(8, condition_features=4, spectral_norm=True)
        self.attention = SelfAttention2d(8, gamma_init=0.7)
        self.up = SNConvTranspose2d(8, 4, 2, stride=2)
        self.class_norm = ConditionalBatchNorm2d(4, 3)
        self.mix = SNLinear(4, 4)
        self.head = ProjectionDiscriminatorHead(4, 3)
        nn.init.normal_(self.class_norm.weight, 1, 0.3)
        nn.init.normal_(self.class_norm.bias)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.conv(images), self.embedding(labels)))
        h = torch.tanh(self.class_norm(self.up(self.attention(h)), labels))
        h = self.mix(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        logits: Tensor = self.head(h, labels)
        return logits


def every_block(*, batch_statistics: bool) -> nn.Module:
    """In float64 and with constant u and v, so that finite differences can be compared."""
    return hold_vectors(EveryBlock().double().train(batch_statistics))


IMAGES = torch.randn(2, 2, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.tensor([0, 2])
KINDS = ["r1", "r2", "wgan-gp"]
both_statistics = pytest.mark.parametrize("batch_statistics", [True, False])


def penalty_of(model: nn.Module, kind: str, images: Tensor = IMAGES) -> Tensor:
    points = images.detach().clone().requires_grad_()
    return gradient_penalty(logits=model(points, LABELS), images=points, kind=kind)


@both_statistics
@pytest.mark.parametrize("kind", KINDS)
def test_penalty_of_every_block_is_that_of_finite_differences(kind: str, batch_statistics: bool) -> None:
    model = every_block(batch_statistics=batch_statistics)
    step = 1e-5
    gradient = torch.empty_like(IMAGES)
    with torch.no_grad():
        for index in range(IMAGES.numel()):
            shift = torch.zeros(IMAGES.numel(), dtype=torch.float64)
            shift[index] = step
            ahead, behind = (model(IMAGES + sign * shift.view_as(IMAGES), LABELS).sum() for sign in (1, -1))
            gradient.view(-1)[index] = (ahead - behind) / (2 * step)
    squares = gradient.square().flatten(1).sum(1)
    expected = (squares.sqrt() - 1).square().mean() if kind == "wgan-gp" else squares.mean()
    torch.testing.assert_close(penalty_of(model, kind), expected, rtol=1e-6, atol=1e-9)


@both_statistics
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_penalty_is_that_of_finite_differences_for_every_parameter(
    kind: str, batch_statistics: bool
) -> None:
    model = every_block(batch_statistics=batch_statistics)
    penalty_of(model, kind).backward()
    step = 1e-6
    without_gradient = []
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            without_gradient.append(name)
            continue
        direction = torch.randn(parameter.shape, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            shifted = copy.deepcopy(model)
            with torch.no_grad():
                shifted.get_parameter(name).add_(direction, alpha=sign * step)
            values.append(penalty_of(shifted, kind).item())
        numeric = (values[0] - values[1]) / (2 * step)
        analytic = (parameter.grad * direction).sum().item()
        assert analytic == pytest.approx(numeric, rel=1e-5, abs=1e-7), name
    # Additive terms after the last nonlinearity drop out of the gradient by the images.
    assert without_gradient in ([], ["head.linear.bias"])


@pytest.mark.parametrize("kind", KINDS)
def test_float32_penalty_and_its_gradient_agree_with_float64(kind: str) -> None:
    exact = every_block(batch_statistics=True)
    single = copy.deepcopy(exact).float()
    expected, value = penalty_of(exact, kind), penalty_of(single, kind, IMAGES.float())
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    expected.backward()
    value.backward()
    references = dict(exact.named_parameters())
    largest = max(each.grad.abs().max().item() for each in references.values() if each.grad is not None)
    for name, parameter in single.named_parameters():
        reference = references[name].grad
        if reference is None:
            assert parameter.grad is None, name
            continue
        # A bias before a batch norm has the gradient 0, of which float32 leaves rounding noise.
        scale = max(reference.abs().max().item(), 1e-2 * largest)
        assert (parameter.grad.double() - reference).abs().max().item() <= 1e-4 * scale, name


def test_penalty_works_while_u_is_updated() -> None:
    model = EveryBlock()
    images = IMAGES.float().requires_grad_()
    logits = model(images, LABELS)
    loss = hinge_generator_loss(fake_logits=model(IMAGES.float(), LABELS))  # updates u after the first pass
    (loss + gradient_penalty(logits=logits, images=images)).backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
    assert torch.count_nonzero(model.conv.weight.grad) > 0


@pytest.mark.parametrize("kind", ["r1", "r2"])
def test_r1_and_r2_of_a_linear_discriminator_are_its_squared_norm(kind: str) -> None:
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    images = torch.randn(5, 2, requires_grad=True)
    penalty = gradient_penalty(logits=images @ weight, images=images, kind=kind)
    penalty.backward()
    assert penalty.item() == pytest.approx(25)
    assert weight.grad.tolist() == pytest.approx([6, 8])


@pytest.mark.parametrize(("target", "expected"), [(1.0, 16.0), (0.0, 25.0), (5.0, 0.0)])
def test_wgan_gp_pulls_each_samples_norm_to_the_target(target: float, expected: float) -> None:
    images = torch.randn(5, 2, requires_grad=True)
    logits = images @ torch.tensor([3.0, 4.0])
    penalty = gradient_penalty(logits=logits, images=images, kind="wgan-gp", target=target)
    assert penalty.item() == pytest.approx(expected, abs=1e-5)


def test_wgan_gp_takes_the_norm_of_each_sample_not_of_the_batch() -> None:
    images = torch.ones(2, 3, requires_grad=True)
    logits = (images.sum(1) * torch.tensor([2.0, 6.0]))[:, None]
    norms = torch.tensor([2.0, 6.0]) * 3**0.5
    penalty = gradient_penalty(logits=logits, images=images, kind="wgan-gp")
    assert penalty.item() == pytest.approx(((norms - 1) ** 2).mean().item())


@given(values=st.lists(numbers, min_size=6, max_size=6), kind=st.sampled_from(KINDS))
def test_penalties_are_never_negative(values: list[float], kind: str) -> None:
    weight = torch.tensor(values, dtype=torch.float64)
    images = torch.ones(2, 6, dtype=torch.float64, requires_grad=True)
    penalty = gradient_penalty(logits=(images * weight).square().sum(1), images=images, kind=kind)
    assert penalty.item() >= 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_of_exactly_zero_has_no_nan(kind: str) -> None:
    weight = torch.zeros(4, 1, requires_grad=True)
    images = torch.randn(3, 4, requires_grad=True)
    penalty = gradient_penalty(logits=images @ weight, images=images, kind=kind)
    penalty.backward()
    assert penalty.item() == (1.0 if kind == "wgan-gp" else 0.0)
    assert torch.equal(weight.grad, torch.zeros(4, 1))


def test_half_precision_gradients_are_squared_in_float32() -> None:
    weight = torch.full((64, 1), 100.0, dtype=torch.float16, requires_grad=True)
    images = torch.ones(2, 64, dtype=torch.float16, requires_grad=True)
    penalty = gradient_penalty(logits=images @ weight, images=images)
    assert penalty.dtype == torch.float32
    assert penalty.item() == pytest.approx(64e4)  # above float16's range


@pytest.mark.parametrize("kind", KINDS)
def test_the_penalty_of_several_scales_is_the_mean_of_their_penalties(kind: str) -> None:
    weight = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    images = torch.randn(3, 3, requires_grad=True)
    scales = [images.pow(3) * weight, (images * weight).square().sum(1)]
    penalty = gradient_penalty(logits=scales, images=images, kind=kind)
    single = [gradient_penalty(logits=scale, images=images, kind=kind) for scale in scales]
    torch.testing.assert_close(penalty, (single[0] + single[1]) / 2)
    penalty.backward()
    assert torch.count_nonzero(weight.grad) == 3
    with pytest.raises(ValueError, match=r"logits\[1\]: expected a graph"):
        gradient_penalty(logits=[scales[0], scales[1].detach()], images=images)


@pytest.mark.parametrize("kind", KINDS)
def test_penalty_module_is_the_function(kind: str) -> None:
    images = torch.randn(3, 4, requires_grad=True)
    logits = images.pow(3).sum(1)
    module = GradientPenalty(kind, target=0.5)
    expected = gradient_penalty(logits=logits, images=images, kind=kind, target=0.5)
    assert torch.equal(module(logits=logits, images=images), expected)
    assert repr(module) == f"GradientPenalty(kind={kind!r}{', target=0.5' if kind == 'wgan-gp' else ''})"


POINTS = torch.ones(2, 3, requires_grad=True)
CONSTANT, UNRELATED = torch.ones(2), torch.ones(2, requires_grad=True) * 2


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": POINTS.detach()}, ValueError, r"expected requires_grad; call images\.requires_grad_\(\)"),
        ({"logits": CONSTANT}, ValueError, "logits: expected a graph; call D with gradients enabled"),
        ({"logits": UNRELATED}, ValueError, "logits: expected to depend on the images, but they do not"),
        ({"logits": UNRELATED[:0]}, ValueError, r"logits: expected at least one entry, got shape \[0\]"),
    ],
)
def test_impossible_penalties_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        gradient_penalty(**{"logits": POINTS.sum(1), "images": POINTS, **changes})


def test_interpolated_images_lie_on_the_segment_between_each_pair() -> None:
    real, fake = torch.randn(6, 3, 4, 4, requires_grad=True), torch.randn(6, 3, 4, 4)
    points = interpolate_images(real_images=real, fake_images=fake)
    weight = ((points - real) / (fake - real)).flatten(1)
    torch.testing.assert_close(weight, weight[:, :1].expand_as(weight), rtol=1e-2, atol=1e-3)
    assert ((weight > -1e-3) & (weight < 1 + 1e-3)).all()
    assert weight[:, 0].unique().numel() == 6
    assert points.requires_grad
    assert points.is_leaf


@pytest.mark.parametrize(
    ("real", "fake", "expected"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_interpolated_images_have_the_wider_dtype(
    real: torch.dtype, fake: torch.dtype, expected: torch.dtype
) -> None:
    ones, zeros = torch.ones(4, 3, dtype=real), torch.zeros(4, 3, dtype=fake)
    points = interpolate_images(real_images=ones, fake_images=zeros)
    assert (points.dtype, points.is_leaf, points.requires_grad) == (expected, True, True)
    assert ((points >= 0) & (points <= 1)).all()


def test_interpolation_repeats_with_its_generator() -> None:
    real, fake = torch.randn(2, 3), torch.randn(2, 3)
    first, second = (
        interpolate_images(real_images=real, fake_images=fake, generator=torch.Generator().manual_seed(5))
        for _ in range(2)
    )
    assert torch.equal(first, second)


PAIR = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("real", "fake", "error", "message"),
    [
        (PAIR, torch.ones(3, 3), ValueError, r"the shape of the real images \[2, 3\], got \[3, 3\]"),
        (PAIR, PAIR.long(), TypeError, "fake_images: expected a floating-point tensor, got torch.int64"),
        (PAIR, PAIR.to("meta"), ValueError, "fake_images: .* device of the real images, cpu, got meta"),
        (PAIR[:0], PAIR[:0], ValueError, r"real_images: expected at least one entry.*\[0, 3\]"),
    ],
)
def test_images_that_do_not_pair_are_refused(
    real: Tensor, fake: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        interpolate_images(real_images=real, fake_images=fake)
