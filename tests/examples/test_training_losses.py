"""The seam for losses: what a loss gets, what becomes of what it returns, and that a new one is one function."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training_runs import Batches, Train, assert_same_run, make_trainer, metrics_of

from sagan.randomness import training_noise
from sagan.recipes import RunConfig
from sagan.train.losses import (
    LOSSES,
    Discriminator,
    Labels,
    Losses,
    Result,
    logits_in_one_batch,
    means,
    negative_logits,
)
from sagan_layers import gradient_penalty, hinge_discriminator_loss, interpolate_images

R1_WEIGHT = 5.0


def hinge_with_r1(
    discriminator: Discriminator, real: Tensor, fake: Tensor, real_labels: Labels, fake_labels: Labels
) -> Result:
    real = real.detach().requires_grad_()
    logits = logits_in_one_batch(discriminator, real, fake, real_labels, fake_labels)
    r1 = gradient_penalty(logits=logits["real_logits"], images=real)
    loss = hinge_discriminator_loss(**logits) + R1_WEIGHT * r1
    return loss, {**means(logits), "r1": r1}


def wgan_gp(
    discriminator: Discriminator, real: Tensor, fake: Tensor, real_labels: Labels, fake_labels: Labels
) -> Result:
    points = interpolate_images(real_images=real, fake_images=fake)
    penalty = gradient_penalty(logits=discriminator(points, real_labels), images=points, kind="wgan-gp")
    difference = discriminator(real, real_labels).mean() - discriminator(fake, fake_labels).mean()
    return 10 * penalty - difference, {"gradient_penalty": penalty}


@pytest.fixture
def use_loss(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """``use_loss(loss)``: let D's loss under the name "hinge" be another one."""
    return lambda loss: monkeypatch.setitem(LOSSES, "hinge", Losses(loss, negative_logits))


@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulation": 2}, {"step__checkpoint_activations": True}, {"network__num_classes": 0}],
    ids=["plain", "accumulated", "checkpointed", "unconditional"],
)
def test_a_gradient_penalty_is_one_function(
    tiny_config: RunConfig, settings: dict[str, Any], use_loss: Callable[[Any], None]
) -> None:
    use_loss(hinge_with_r1)
    trainer = make_trainer(tiny_config, **settings)
    generator, discriminator = copy.deepcopy((trainer.generator, trainer.discriminator))
    pixels, labels = next(Batches(4))
    parts = trainer.config.accumulation
    trainer.update_discriminator(zip(pixels.chunk(parts), labels.chunk(parts), strict=True))

    latents, fake_labels = training_noise(0, 0, 0, count=4, latent_dim=6, labels_in_use=trainer.labels_in_use)
    conditional = bool(trainer.config.network.num_classes)
    with torch.no_grad():
        fakes = [
            generator(part, part_labels if conditional else None)
            for part, part_labels in zip(latents.chunk(parts), fake_labels.chunk(parts), strict=True)
        ]
    real = (pixels / 127.5 - 1).requires_grad_()
    images, all_labels = torch.cat([real, *fakes]), torch.cat([labels, fake_labels])
    logits = discriminator(images, all_labels if conditional else None)
    (gradient,) = torch.autograd.grad(logits[:4].sum(), real, create_graph=True)
    r1 = gradient.square().sum((1, 2, 3)).mean()
    (F.relu(1 - logits[:4]).mean() + F.relu(1 + logits[4:]).mean() + R1_WEIGHT * r1).backward()
    assert r1 > 0
    logged = trainer.means.take()
    assert logged["r1"] == pytest.approx(r1.item(), rel=1e-4)
    assert logged["d_loss"] > R1_WEIGHT * logged["r1"]
    for mine, expected in zip(trainer.discriminator.parameters(), discriminator.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, expected.grad, rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in trainer.generator.parameters())


def test_measurements_are_in_the_log_and_random_numbers_of_a_loss_in_the_checkpoint(
    train_tiny: Train, use_loss: Callable[[Any], None]
) -> None:
    use_loss(wgan_gp)
    settings = {"output__log_every": 1, "output__sample_every": 2, "accumulation": 2}
    whole = train_tiny("whole", iterations=4, **settings)
    train_tiny("parts", iterations=2, **settings)
    torch.manual_seed(999)
    parts = train_tiny("parts", iterations=4, resume=True, **settings)
    assert_same_run(whole.out, parts.out)
    rows = metrics_of(whole.out)
    assert all(row["gradient_penalty"] > 0 for row in rows)
    assert {"d_loss", "g_loss"} <= set(rows[0])
    assert "real_logits" not in rows[0]
