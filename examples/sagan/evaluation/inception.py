"""The Inception-v3 that defines FID and the Inception Score: TensorFlow's of 2015-12-05.

Its weights come as a file of tensors with the names of pytorch-fid and torch-fidelity. torchvision's network differs in
pooling, resize, the range of the input and the number of logits.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan.errors import UserError
from sagan.evaluation.config import WEIGHTS_FILE, WHERE_TO_GET_IT
from sagan.io import load_plain

NUM_FEATURES = 2048
NUM_LOGITS = 1008
INPUT_SIZE = 299
_EPS = 0.001


@dataclass(frozen=True)
class _Conv:
    """A convolution in a branch; its kernel is padded so that stride 1 keeps the size."""

    name: str
    outputs: int
    height: int
    width: int
    stride: int = 1

    def make(self, inputs: int) -> _ConvNorm:
        padding = (self.height // 2, self.width // 2) if self.stride == 1 else (0, 0)
        return _ConvNorm(inputs, self.outputs, (self.height, self.width), self.stride, padding)


# A branch is a sequence of pools ("average", "max", "halve"), convolutions, and pairs of parallel convolutions.
_Branch = Sequence[str | _Conv | tuple[_Conv, _Conv]]


class InceptionV3(nn.Module):
    """Inception-v3 of 2015-12-05, without weights.

    Shape:
        - images: uint8 [N, 3, H, W].
        - Output: features of the last pooling [N, 2048], and logits [N, 1008] without the bias, as the Inception
          Score takes them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _ConvNorm(3, 32, (3, 3), 2)
        self.Conv2d_2a_3x3 = _ConvNorm(32, 32, (3, 3))
        self.Conv2d_2b_3x3 = _ConvNorm(32, 64, (3, 3), padding=(1, 1))
        self.Conv2d_3b_1x1 = _ConvNorm(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = _ConvNorm(80, 192, (3, 3))
        self.Mixed_5b = _block_5(192, pooled=32)
        self.Mixed_5c = _block_5(256, pooled=64)
        self.Mixed_5d = _block_5(288, pooled=64)
        self.Mixed_6a = _Mixed(
            288,
            [_Conv("branch3x3", 384, 3, 3, stride=2)],
            _chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3, 2)),
            ["halve"],
        )
        self.Mixed_6b = _block_6(inner=128)
        self.Mixed_6c = _block_6(inner=160)
        self.Mixed_6d = _block_6(inner=160)
        self.Mixed_6e = _block_6(inner=192)
        self.Mixed_7a = _Mixed(
            768,
            _chain("branch3x3", (192, 1, 1), (320, 3, 3, 2)),
            _chain("branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3, 2)),
            ["halve"],
        )
        self.Mixed_7b = _block_7(1280, pool="average")
        self.Mixed_7c = _block_7(2048, pool="max")  # as in TensorFlow's graph; the paper has "average"
        self.fc = nn.Linear(NUM_FEATURES, NUM_LOGITS)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and logits."""
        x = resize_like_tensorflow(images.float(), INPUT_SIZE)
        x = ((x - 128) / 128).contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, 2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        features = x.mean((2, 3))
        return features, F.linear(features, self.fc.weight)


class _ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, int],
        stride: int = 1,
        padding: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(outputs, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x)).relu_()
        return y

    @torch.no_grad()
    def fold_batch_norm(self) -> None:
        """Fold batch norm into the convolution, in place."""
        norm = {name: tensor.double() for name, tensor in self.bn.state_dict().items()}
        gain = norm["weight"] / (norm["running_var"] + _EPS).sqrt()
        bias = norm["bias"] - norm["running_mean"] * gain
        self.conv.weight.copy_(self.conv.weight.double() * gain.view(-1, 1, 1, 1))
        self.conv.bias = nn.Parameter(bias.to(self.conv.weight))
        self.bn = nn.Identity()


class _Mixed(nn.Module):
    """Branches over the same input, concatenated along the channels."""

    def __init__(self, inputs: int, *branches: _Branch) -> None:
        super().__init__()
        self.branches = branches
        for branch in branches:
            width = inputs
            for step in branch:
                if not isinstance(step, str):
                    convs = step if isinstance(step, tuple) else (step,)
                    for conv in convs:
                        self.add_module(conv.name, conv.make(width))
                    width = sum(conv.outputs for conv in convs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._run(branch, x) for branch in self.branches], 1)

    def _run(self, branch: _Branch, x: Tensor) -> Tensor:
        for step in branch:
            if isinstance(step, str):
                x = _pool(step, x)
            elif isinstance(step, tuple):
                x = torch.cat([self.get_submodule(conv.name)(x) for conv in step], 1)
            else:
                x = self.get_submodule(step.name)(x)
        return x


def _pool(kind: str, x: Tensor) -> Tensor:
    if kind == "average":  # without the padding, as TensorFlow's
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    return F.max_pool2d(x, 3, 2) if kind == "halve" else F.max_pool2d(x, 3, 1, 1)


def _chain(prefix: str, *convs: tuple[int, ...]) -> _Branch:
    """Return convolutions named prefix_1, prefix_2, ..., each given as (outputs, height, width[, stride])."""
    return [_Conv(f"{prefix}_{number}", *conv) for number, conv in enumerate(convs, 1)]


def _block_5(inputs: int, pooled: int) -> _Mixed:
    return _Mixed(
        inputs,
        [_Conv("branch1x1", 64, 1, 1)],
        _chain("branch5x5", (48, 1, 1), (64, 5, 5)),
        _chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
        ["average", _Conv("branch_pool", pooled, 1, 1)],
    )


def _block_6(inner: int) -> _Mixed:
    return _Mixed(
        768,
        [_Conv("branch1x1", 192, 1, 1)],
        _chain("branch7x7", (inner, 1, 1), (inner, 1, 7), (192, 7, 1)),
        _chain("branch7x7dbl", (inner, 1, 1), (inner, 7, 1), (inner, 1, 7), (inner, 7, 1), (192, 1, 7)),
        ["average", _Conv("branch_pool", 192, 1, 1)],
    )


def _block_7(inputs: int, pool: str) -> _Mixed:
    return _Mixed(
        inputs,
        [_Conv("branch1x1", 320, 1, 1)],
        [
            _Conv("branch3x3_1", 384, 1, 1),
            (_Conv("branch3x3_2a", 384, 1, 3), _Conv("branch3x3_2b", 384, 3, 1)),
        ],
        [
            _Conv("branch3x3dbl_1", 448, 1, 1),
            _Conv("branch3x3dbl_2", 384, 3, 3),
            (_Conv("branch3x3dbl_3a", 384, 1, 3), _Conv("branch3x3dbl_3b", 384, 3, 1)),
        ],
        [pool, _Conv("branch_pool", 192, 1, 1)],
    )


def resize_like_tensorflow(images: Tensor, size: int) -> Tensor:
    """Resize as TensorFlow 1's ``resize_bilinear``: bilinear, no antialiasing, pixel i samples at i * old / new.

    ``F.interpolate`` has no such convention: this one aligns the centres of the first pixels, and repeats the last row
    and column beyond the edge. ``images`` are float [N, C, H, W]; the result is ``size`` pixels high and wide.
    """
    for axis in (3, 2):  # in TensorFlow's order, to the last bit
        old = images.size(axis)
        if old == size:
            continue
        places = torch.arange(size, dtype=images.dtype, device=images.device)
        places = places * torch.tensor(old / size, dtype=images.dtype, device=images.device)
        low = places.long()
        high = (low + 1).clamp_max(old - 1)
        share = (places - low).view([-1 if each == axis else 1 for each in range(4)])
        below, above = images.index_select(axis, low), images.index_select(axis, high)
        images = below + (above - below) * share
    return images


def load_inception(path: Path) -> InceptionV3:
    """Return the network with the weights of a file (a state dict), in evaluation mode, with batch norm folded.

    Raises:
        UserError: if there is no such file, it holds more than tensors, or the tensors are another network's.
    """
    if not path.is_file():
        raise UserError(f"inception weights: found no file at {path}, expected {WHERE_TO_GET_IT}")
    try:
        tensors = load_plain(path, legacy=True)
    except UserError as error:
        raise UserError(f"inception weights: {path} is not a readable file of tensors ({error})") from error
    if not isinstance(tensors, dict) or not all(isinstance(each, Tensor) for each in tensors.values()):
        raise UserError(f"inception weights: expected a state dict of tensors in {path}")
    network = InceptionV3()
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        # torch lists missing and unknown names in a line each, and each other shape
        differences = [textwrap.shorten(line, 300) for line in str(error).splitlines()[1:4]]
        raise UserError(
            f"inception weights: {path} is not TensorFlow's Inception-v3 of 2015-12-05 ({WEIGHTS_FILE}): "
            f"{' '.join(differences)}"
        ) from error
    network.eval().requires_grad_(False)
    for layer in network.modules():
        if isinstance(layer, _ConvNorm):
            layer.fold_batch_norm()
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
