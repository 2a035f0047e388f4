"""The demo's data, scikit-learn's handwritten digits, and its judge, a small classifier of digits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sagan.evaluation.fid import frechet_distance_of_features
from sagan.extras import needs

RESOLUTION = 32


def write_digits(root: Path) -> Path:
    """Write the 1,797 digits, enlarged from 8 to 32 pixels, as PNGs in root/train/<digit>/; existing files stay."""
    with needs("the demo", "scikit-learn", "demo"):
        from sklearn.datasets import load_digits
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
    """A small convolutional classifier of grey digits: uint8 [N, 3, 32, 32] -> logits [N, 10]."""

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
        return cast(Tensor, self.body(grey))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return cast(Tensor, self.last(self.features(images)))


@dataclass(frozen=True)
class Judge:
    """A trained classifier in evaluation mode, and what it measures of the real digits."""

    classifier: DigitClassifier
    accuracy: float  # on the real digits that were not used for training
    real_features: Tensor  # of all real digits, [N, 64]
    real_spread: Tensor  # of all real digits by class, float64 [10]; see spread_by_class


def train_judge(images: Tensor, labels: Tensor, *, seed: int = 0, epochs: int = 12) -> Judge:
    """Train the classifier on four fifths of the real digits and test it on the rest.

    The seed determines the split, the weights and the batches. The global random state does not change.
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
                logits = classifier(_shifted(images[batch]))
                loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    classifier.eval()
    with torch.no_grad():
        accuracy = (classifier(images[test]).argmax(1) == labels[test]).double().mean().item()
        return Judge(classifier, accuracy, classifier.features(images), spread_by_class(images, labels))


@torch.no_grad()
def agreement(judge: Judge, images: Tensor, labels: Tensor) -> Tensor:
    """Return bool [N]: whether the judge predicts the label of each image."""
    return cast(Tensor, judge.classifier(images).argmax(1) == labels)


@torch.no_grad()
def frechet_to_real(judge: Judge, images: Tensor) -> float:
    """Return the Frechet distance between the judge's features of these images and of all real digits."""
    return frechet_distance_of_features(judge.classifier.features(images), judge.real_features)


def spread_by_class(images: Tensor, labels: Tensor) -> Tensor:
    """Return the mean Euclidean distance between two images of a class, float64 [10]; grey values from 0 to 1.

    Each class has at least two of the images.
    """
    grey = images.double().mean(1).flatten(1) / 255
    distances = []
    for digit in range(10):
        of_class = grey[labels == digit]
        pairs = len(of_class) * (len(of_class) - 1)
        distances.append(torch.cdist(of_class, of_class).sum() / pairs)
    return torch.stack(distances)


def _shifted(images: Tensor) -> Tensor:
    """Shift each image by up to two pixels, so that the judge tolerates shifts."""
    padded = F.pad(images, (2, 2, 2, 2))
    shifts = torch.randint(5, (len(images), 2)).tolist()
    return torch.stack(
        [padded[n, :, y : y + RESOLUTION, x : x + RESOLUTION] for n, (y, x) in enumerate(shifts)]
    )
