"""The demo's data and judge: scikit-learn's handwritten digits, and a small classifier of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

RESOLUTION = 32


def write_digits(root: Path) -> Path:
    """Write the 1,797 digits, enlarged from 8 to 32 pixels, as an ImageFolder tree of PNGs: root/train/<digit>/.

    Files that are there already stay.

    Returns:
        ``root``.
    """
    digits = load_digits()
    for number, (values, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = root / "train" / str(label) / f"{number:04d}.png"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray((values * (255 / 16)).round().astype(np.uint8))
        small.resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC).convert("RGB").save(path)
    return root


class DigitClassifier(nn.Module):
    """A small convolutional classifier of grey 32x32 digits.

    Shape:
        - images: uint8 [N, 3, 32, 32].
        - Output: logits [N, 10].
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.AvgPool2d(2),
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 4 * 4, 64),
            nn.ReLU(),
        )
        self.last = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        """Return the features before the last layer, [N, 64]."""
        grey = images.float().mean(1, keepdim=True) / 127.5 - 1
        features: Tensor = self.body(grey)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.last(self.features(images))
        return logits


@dataclass(frozen=True)
class Judge:
    """A trained classifier and what is known of the real digits.

    Attributes:
        classifier: in evaluation mode.
        accuracy: on the real digits it was not trained on.
        mean: of the features of all real digits, [64], float64.
        covariance: likewise, [64, 64].
    """

    classifier: DigitClassifier
    accuracy: float
    mean: Tensor
    covariance: Tensor


def train_judge(images: Tensor, labels: Tensor, *, seed: int = 0, epochs: int = 12) -> Judge:
    """Train the classifier on four fifths of the real digits and test it on the rest.

    It has its own random numbers: training a GAN before or after is not disturbed.

    Args:
        images: uint8 [N, 3, 32, 32].
        labels: [N].
        seed: of the split, the weights and the batches.
        epochs: passes over the training part.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        order = torch.randperm(len(images))
        test, train = order[: len(order) // 5], order[len(order) // 5 :]
        classifier = DigitClassifier()
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
        steps = epochs * math.ceil(len(train) / 64)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        for _ in range(epochs):
            for batch in train[torch.randperm(len(train))].split(64):  # type: ignore[no-untyped-call]
                loss = F.cross_entropy(
                    classifier(_shifted(images[batch])), labels[batch], label_smoothing=0.05
                )
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    classifier.eval()
    with torch.no_grad():
        accuracy = (classifier(images[test]).argmax(1) == labels[test]).double().mean().item()
        mean, covariance = _statistics(classifier.features(images))
    return Judge(classifier, accuracy, mean, covariance)


@torch.no_grad()
def agreement(judge: Judge, images: Tensor, labels: Tensor) -> Tensor:
    """Return, for each image, whether the judge gives it its label: bool [N]."""
    agrees: Tensor = judge.classifier(images).argmax(1) == labels
    return agrees


@torch.no_grad()
def frechet_to_real(judge: Judge, images: Tensor) -> float:
    """Return the Frechet distance between Gaussian fits of the features of images and of all real digits."""
    mean, covariance = _statistics(judge.classifier.features(images))
    return frechet_distance(mean, covariance, judge.mean, judge.covariance)


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    r"""Return :math:`\|m_a - m_b\|^2 + \mathrm{tr}(C_a + C_b - 2 (C_a C_b)^{1/2})`.

    The trace of the root is the sum of the roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is
    symmetric.

    Args:
        mean_a, mean_b: [d], float64.
        covariance_a, covariance_b: [d, d], float64.
    """
    values, vectors = torch.linalg.eigh(covariance_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp_min(0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return max(0.0, float(distance))


def _statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def _shifted(images: Tensor) -> Tensor:
    """Shift each image by up to two pixels, so that the judge does not insist on exact places."""
    padded = F.pad(images, (2, 2, 2, 2))
    shifts = torch.randint(5, (len(images), 2)).tolist()
    return torch.stack(
        [padded[n, :, y : y + RESOLUTION, x : x + RESOLUTION] for n, (y, x) in enumerate(shifts)]
    )
