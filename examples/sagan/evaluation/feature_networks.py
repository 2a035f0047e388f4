"""What turns images into features: the Inception network, an exported program, or any module."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from sagan.errors import UserError
from sagan.evaluation.config import NO_NETWORK, EvaluationConfig
from sagan.evaluation.inception import WEIGHTS_SHA256_START, load_inception
from sagan.evaluation.proxy import MAX_SIZE, RandomFeatures
from sagan.io import file_sha256, module_digest

# Images at a time on a CPU: twice as fast as whole blocks, whose feature maps leave its caches.
_CPU_CHUNK = 8


class FeatureNetwork:
    """A frozen network, and what identifies it in a protocol.

    Args:
        module: takes uint8 images [N, 3, R, R] and returns features [N, d], or features and logits [N, K].
        name: short, for the names of figures.
        digest: 64 hex digits that are others for other weights.
        resize: how the network resizes images, in words.
        device: where it runs.
        resolution: R, of the images to come.
        proxy: whether its figures stand in for those of Inception, and are labelled so.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        digest: str,
        resize: str,
        device: torch.device,
        resolution: int,
        proxy: bool = False,
    ) -> None:
        self.name = name
        self.digest = digest
        self.resize = resize
        self.device = device
        self.proxy = proxy
        self._module = module.to(device)
        features, logits = self._run(torch.zeros(2, 3, resolution, resolution, dtype=torch.uint8))
        self.num_features = features.size(1)
        self.num_logits = 0 if logits is None else logits.size(1)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and logits of images; the same bits for the same block of images.

        Shape:
            - images: uint8 [N, 3, R, R].
            - Output: float32 [N, d] and [N, K], on the CPU; K is 0 for a network without logits.
        """
        images = images.contiguous()  # a generator's memory format must not change the last bits
        chunks = torch.split(images, _CPU_CHUNK) if self.device.type == "cpu" else (images,)
        parts = [self._run(chunk) for chunk in chunks]
        features = torch.cat([features.float().cpu() for features, _ in parts])
        logits = [logits.float().cpu() for _, logits in parts if logits is not None]
        return features, torch.cat(logits) if logits else features.new_empty(len(features), 0)

    @torch.no_grad()
    def _run(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        outputs = self._module(images.to(self.device, non_blocking=True))
        features, logits = (
            outputs if isinstance(outputs, (tuple, list)) and len(outputs) == 2 else (outputs, None)
        )
        for what, output in (("features", features), ("logits", logits)):
            if output is None and what == "logits":
                continue
            if isinstance(output, Tensor) and not output.isfinite().all():
                raise UserError(f"feature network: expected finite {what}, got a NaN or an infinity")
            if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(images):
                found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise UserError(
                    f"feature network: expected {what} [{len(images)}, d] for {len(images)} images, got {found}"
                )
        return features, logits


def tensorflow_inception(path: Path, device: torch.device, *, resolution: int) -> FeatureNetwork:
    """Return TensorFlow's Inception-v3 of 2015-12-05 with the weights of a file.

    Raises:
        UserError: see :func:`~sagan.evaluation.inception.load_inception`.
    """
    network = load_inception(path)
    digest = file_sha256(path)
    official = digest.startswith(WEIGHTS_SHA256_START)
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
    """Return a network that ``torch.export.save`` wrote, once its user has named the file's SHA-256.

    An exported program is code: PyTorch evaluates expressions in it while it is loaded. Nothing of the file is
    looked at before its SHA-256 is the one given, and pickles in it may hold nothing but tensors.

    Args:
        path: the .pt2 file. The program takes uint8 images [N, 3, R, R] for any N, and returns features [N, d] or
            (features, logits).
        device: where it runs.
        sha256: of the file, in hex.
        resolution: R, of the images to come.

    Raises:
        UserError: if there is no such file, its SHA-256 is another or not given, or it cannot be loaded.
    """
    if not path.is_file():
        raise UserError(f"feature network: expected an exported program, found no file at {path}")
    digest = file_sha256(path)
    if sha256 is None or sha256.lower() != digest:
        given = "none" if sha256 is None else repr(sha256)
        raise UserError(
            f"feature network: loading an exported program can run code that it holds. The SHA-256 of {path} is "
            f"{digest}; if the file is yours, or of someone you trust, give that as --feature-network-sha256. "
            f"Got {given}"
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
    except (
        Exception
    ) as error:  # torch raises many kinds for a torn or foreign file, and for inputs it cannot take
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"feature network: {path} is not an exported program for any number of {resolution}x{resolution} "
            f"images ({reason})"
        ) from error


def proxy_network(device: torch.device, *, resolution: int) -> FeatureNetwork:
    """Return the proxy for images of this resolution."""
    module = RandomFeatures()
    return FeatureNetwork(
        module,
        name="randomconv",
        digest=module_digest(module),
        resize=f"by areas to {MAX_SIZE}x{MAX_SIZE}, where larger",
        device=device,
        resolution=resolution,
        proxy=True,
    )


def load_feature_network(
    config: EvaluationConfig, device: torch.device, *, resolution: int
) -> FeatureNetwork:
    """Return the feature network that a configuration names.

    Raises:
        UserError: if it names none, or the file is not usable.
    """
    if config.proxy:
        return proxy_network(device, resolution=resolution)
    if config.feature_network is not None:
        return exported_network(
            config.feature_network, device, sha256=config.feature_network_sha256, resolution=resolution
        )
    if config.inception_weights is not None:
        return tensorflow_inception(config.inception_weights, device, resolution=resolution)
    raise UserError(NO_NETWORK)


@contextlib.contextmanager
def float32_alone() -> Iterator[None]:
    """Keep CUDA from rounding factors to TF32 and from choosing algorithms by their speed of the moment."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """Let ``torch.load`` restore tensors and nothing else, also where its caller asks for more."""
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
