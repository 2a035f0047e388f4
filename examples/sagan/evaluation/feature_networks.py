"""The networks that turn images into features: Inception, an exported program, or the proxy."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import InitVar, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan.errors import UserError, check_finite
from sagan.evaluation.config import WEIGHTS_SHA256, EvaluationConfig
from sagan.evaluation.inception import load_inception
from sagan.io import file_sha256, first_line, module_digest

# Images at a time on a CPU. Twice as fast as whole blocks, whose feature maps do not fit its caches.
_CPU_CHUNK = 8
_PROXY_WIDTHS = (8, 16, 32)
_PROXY_MAX_RESOLUTION = 64


@dataclass
class FeatureNetwork:
    """A frozen network, and what identifies it in a protocol."""

    module: (
        nn.Module
    )  # takes uint8 images [N, 3, R, R] and returns features [N, d], or features and logits [N, K]
    name: str  # short, for the names of figures
    digest: str  # 64 hex digits, different for other weights
    resize: str  # how the network resizes images, in words
    device: torch.device
    resolution: InitVar[int]  # R
    proxy: bool = False  # whether it stands in for Inception, so that its figures need a label
    num_features: int = field(init=False)  # d
    num_logits: int = field(init=False)  # K; 0 without logits

    def __post_init__(self, resolution: int) -> None:
        self.module.to(self.device)
        features, logits = self._run(torch.zeros(2, 3, resolution, resolution, dtype=torch.uint8))
        self.num_features = features.size(1)
        self.num_logits = 0 if logits is None else logits.size(1)

    @property
    def float64_device(self) -> torch.device:
        """Where to compute in float64: the GPU with CUDA, else the CPU (MPS has no float64)."""
        return self.device if self.device.type == "cuda" else torch.device("cpu")

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and logits of images; the same bits for the same block of images.

        Shape:
            - images: uint8 [N, 3, R, R].
            - Output: float32 [N, d] and [N, K], on the CPU; K is 0 for a network without logits.
        """
        images = images.contiguous()  # a generator's memory format would change the last bits
        chunks = torch.split(images, _CPU_CHUNK) if self.device.type == "cpu" else (images,)
        parts = [self._run(chunk) for chunk in chunks]
        features = torch.cat([features.float().cpu() for features, _ in parts])
        logits = [logits.float().cpu() for _, logits in parts if logits is not None]
        return features, torch.cat(logits) if logits else features.new_empty(len(features), 0)

    @torch.no_grad()
    def _run(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        outputs = self.module(images.to(self.device, non_blocking=True))
        features, logits = (
            outputs if isinstance(outputs, (tuple, list)) and len(outputs) == 2 else (outputs, None)
        )
        for what, output in (("features", features), ("logits", logits)):
            if output is None and what == "logits":
                continue
            if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(images):
                found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise UserError(
                    f"feature network: expected {what} [{len(images)}, d] for {len(images)} images, got {found}"
                )
        check_finite("feature network: features", features)
        if logits is not None:  # one of -inf is a class that cannot be
            check_finite("feature network: class probabilities", logits.float().softmax(1))
        return features, logits


def load_feature_network(
    config: EvaluationConfig, device: torch.device, *, resolution: int
) -> FeatureNetwork:
    """Return the feature network that a configuration names.

    Raises:
        UserError: if it names none, or its file is not usable.
    """
    if config.proxy:
        return proxy_network(device, resolution=resolution)
    if config.feature_network is not None:
        return exported_network(
            config.feature_network, device, sha256=config.feature_network_sha256, resolution=resolution
        )
    if config.inception_weights is not None:
        return tensorflow_inception(config.inception_weights, device, resolution=resolution)
    raise UserError(config.no_network)


def tensorflow_inception(path: Path, device: torch.device, *, resolution: int) -> FeatureNetwork:
    """Return TensorFlow's Inception-v3 of 2015-12-05 with the weights of a file; see `load_inception`."""
    network = load_inception(path)
    digest = file_sha256(path)
    official = digest == WEIGHTS_SHA256
    return FeatureNetwork(
        network,
        name="tfinception" if official else f"inception-{digest[:8]}",
        digest=digest,
        resize="bilinear to 299x299 as TensorFlow 1 (no antialiasing, pixel i at i * old / new)",
        device=device,
        resolution=resolution,
    )


def exported_network(
    path: Path, device: torch.device, *, sha256: str | None, resolution: int
) -> FeatureNetwork:
    """Return a network that ``torch.export.save`` wrote, if the user gives the file's SHA-256.

    An exported program is code: PyTorch evaluates expressions in it while loading it. So the file is not parsed before
    its SHA-256 matches, and pickles in it may hold tensors only. The program takes uint8 images [N, 3, R, R] for any N,
    and returns features [N, d], or features and logits.

    Raises:
        UserError: if there is no such file, its SHA-256 differs or is not given, or it cannot be loaded.
    """
    if not path.is_file():
        raise UserError(f"feature network: expected an exported program, found no file at {path}")
    digest = file_sha256(path)
    if sha256 is None or sha256.lower() != digest:
        given = "none" if sha256 is None else repr(sha256)
        raise UserError(
            f"feature network: loading an exported program can run code that it holds. The SHA-256 of {path} is "
            f"{digest}; if you trust the file, give that as --feature-network-sha256. Got {given}"
        )
    try:
        with _tensors_only():
            program = torch.export.load(str(path))
        return FeatureNetwork(
            program.module(),
            name=f"{path.stem}-{digest[:8]}",
            digest=digest,
            resize="the network's own",
            device=device,
            resolution=resolution,
        )
    except UserError:
        raise
    except Exception as error:  # torch raises many kinds for a damaged or foreign file, or unsuitable inputs
        reason = first_line(error)
        raise UserError(
            f"feature network: {path} is not an exported program for any number of {resolution}x{resolution} "
            f"images ({reason})"
        ) from error


def proxy_network(device: torch.device, *, resolution: int) -> FeatureNetwork:
    """Return the stand-in for Inception on small machines: small, random and fixed; no download."""
    module = RandomFeatures()
    return FeatureNetwork(
        module,
        name="randomconv",
        digest=module_digest(module),
        resize=f"by areas to {_PROXY_MAX_RESOLUTION}x{_PROXY_MAX_RESOLUTION}, where larger",
        device=device,
        resolution=resolution,
        proxy=True,
    )


class RandomFeatures(nn.Module):
    """The proxy: three convolutions with random weights, the same on every machine since they are drawn as integers.

    Shape:
        - images: uint8 [N, 3, R, R]; larger images are reduced to 64 pixels by areas.
        - Output: [N, 536], means of the first two and a 4x4 grid of the third.
    """

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        inputs = 3
        for number, width in enumerate(_PROXY_WIDTHS):
            weight = torch.randint(-127, 128, (width, inputs, 3, 3), generator=draws).float()
            # Variance 2 / fan-in, so that ReLU keeps the size of activations.
            self.register_buffer(f"weight{number}", weight * (6 / (9 * inputs)) ** 0.5 / 127)
            inputs = width

    def forward(self, images: Tensor) -> Tensor:
        """Return features."""
        x = images.float() / 127.5 - 1
        if x.size(2) > _PROXY_MAX_RESOLUTION:
            x = F.interpolate(x, size=(_PROXY_MAX_RESOLUTION, _PROXY_MAX_RESOLUTION), mode="area")
        parts = []
        for number in range(len(_PROXY_WIDTHS)):
            if number:
                parts.append(x.mean((2, 3)))
                x = F.avg_pool2d(x, 2)
            x = F.conv2d(x, self.get_buffer(f"weight{number}"), padding=1).relu()
        return torch.cat([*parts, F.adaptive_avg_pool2d(x, 4).flatten(1)], 1)


@contextlib.contextmanager
def deterministic_float32() -> Iterator[None]:
    """Turn off TF32 and cuDNN's autotuning inside a ``with`` block, so that CUDA gives the same bits every time."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """Force ``weights_only`` on every ``torch.load``, whatever its caller asks for."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
