"""Spectral normalisation in SAGAN's discriminator, against the same network without it and other people's.

``python -m benchmarks.bench_spectral_norm --help`` lists the options.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from benchmarks import harness
from benchmarks.harness import Case, Outputs, Row, Run, Settings
from benchmarks.peer import import_peer
from sagan_layers import (
    ResamplingConv2d,
    SpectralNormLayer,
    functional,
    remove_spectral_norm,
    shared_spectral_norm,
)

STEP, CALL = "D forward+backward", "the call alone"
SUITES = (STEP, CALL)
WITHOUT, SHARED, PER_LAYER = "without SN", "ours: shared", "ours: per layer"
PARAMETRIZATION, HOOK, PEER, TEXTBOOK = (
    "torch parametrizations.spectral_norm",
    "torch nn.utils.spectral_norm",
    "BigGAN-PyTorch",
    "textbook SN",
)
CLASSES = 1000
CPU_BATCHES, CUDA_BATCHES = (8, 2), (256, 64)


@dataclass(frozen=True)
class DiscriminatorCase(Case):
    """One forward and backward of D, or only what normalises its weights.

    Attributes:
        suite: one of SUITES.
        batch: samples.
        device: "cpu" or "cuda"; there in bfloat16 under autocast.
        channels_last: the memory format of network and images.
        base_width: of D.
        resolution: of D.
        peer: a checkout of BigGAN-PyTorch.
    """

    suite: str
    batch: int
    device: str
    channels_last: bool = False
    base_width: int = 64
    resolution: int = 128
    peer: Path | None = None

    @property
    def baseline(self) -> str:  # type: ignore[override]
        """What the ratios refer to: D without SN, and for the call alone torch's of today."""
        return WITHOUT if self.suite == STEP else PARAMETRIZATION

    @property
    def name(self) -> str:
        """What the tables show."""
        layout = "channels_last" if self.channels_last else "NCHW"
        network = f"D {self.resolution}x{self.resolution} width {self.base_width}"
        return f"{network} {layout}" + (f" batch {self.batch}" if self.suite == STEP else "")

    @property
    def tolerance(self) -> float:
        """The largest relative error."""
        return 0.2 if self.device == "cuda" else 1e-3

    def describe(self) -> Row:
        """Return the sizes."""
        return {
            "batch": self.batch,
            "base_width": self.base_width,
            "resolution": self.resolution,
            "channels_last": self.channels_last,
            "dtype": "bfloat16" if self.device == "cuda" else "float32",
        }

    def contenders(self) -> list[str]:
        """Return D without SN, ours and the others."""
        everyone = [WITHOUT, SHARED, PER_LAYER, PARAMETRIZATION, HOOK]
        everyone.append(TEXTBOOK if self.peer is None else PEER)
        return everyone if self.suite == STEP else everyone[1:]

    def inputs(self) -> Any:
        """Return D with singular vectors for u and v and a sigma of 1, images and labels."""
        from sagan.networks import Discriminator, NetworkConfig

        torch.manual_seed(0)
        config = NetworkConfig(
            num_classes=CLASSES, base_width=self.base_width, resolution=self.resolution, sn_eps=1e-8
        )
        network = Discriminator(config)
        with torch.no_grad():
            for layer in network.modules():
                if isinstance(layer, SpectralNormLayer):
                    _settle(layer)
        for mixer in network.mixers.values():
            nn.init.constant_(cast(Tensor, mixer.gamma), 0.7)
        network = network.to(self.device)
        images = torch.randn(self.batch, 3, self.resolution, self.resolution).to(self.device)
        if self.channels_last:
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.randint(CLASSES, (self.batch,)).to(self.device)
        return network, images, labels

    def prepare(self, contender: str, inputs: Any) -> Run:
        """Return one forward and backward with the contender's weights; or what makes those weights."""
        network, images, labels = inputs
        network = copy.deepcopy(network)
        if contender == WITHOUT:
            remove_spectral_norm(network.eval()).train()
        elif contender not in (SHARED, PER_LAYER):
            _replace_spectral_norm(network, self._method(contender))
        if self.suite == CALL:
            return lambda: _normalized(network, contender)
        parameters = dict(network.named_parameters())
        shared = shared_spectral_norm(network)

        def run() -> Outputs:
            autocast = torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")
            with autocast, shared if contender == SHARED else contextlib.nullcontext():
                logits = network(images, labels)
            grads = torch.autograd.grad(logits.float().sum(), list(parameters.values()))
            found = {
                f"grad of {_plain_name(name)}": grad for name, grad in zip(parameters, grads, strict=True)
            }
            return {"logits": logits.detach(), **found}

        return run

    def _method(self, contender: str) -> Callable[[nn.Module], None]:
        if contender == PARAMETRIZATION:
            return _parametrize
        if contender == HOOK:
            return _hook
        return _biggan(self.peer) if contender == PEER else _textbook

    def expected(self, inputs: Any) -> Outputs:
        """Return the float64 result of the reference: for the step logits and gradients, else the weights."""
        network, images, labels = inputs
        network = copy.deepcopy(network).double()
        if self.suite == CALL:
            return {
                name: functional.spectral_normalize(
                    layer.weight, layer.weight_u, layer.weight_v, eps=layer.eps
                ).weight.detach()
                for name, layer in network.named_modules()
                if isinstance(layer, SpectralNormLayer)
            }
        logits = network(images.double(), labels)
        parameters = dict(network.named_parameters())
        grads = torch.autograd.grad(logits.sum(), list(parameters.values()))
        found = {f"grad of {name}": grad for name, grad in zip(parameters, grads, strict=True)}
        return {"logits": logits.detach(), **found}

    def first_run(self, contender: str, run: Run, row: Row) -> Outputs:
        """Call the run; without SN, its weights' gradients are then carried through the normalisation."""
        outputs = run()
        if contender != WITHOUT:
            return outputs
        network, _, _ = self.inputs()
        for name, layer in network.named_modules():
            if isinstance(layer, SpectralNormLayer):
                key = f"grad of {name}.weight"
                normalized = functional.spectral_normalize(
                    layer.weight, layer.weight_u, layer.weight_v
                ).weight
                (outputs[key],) = torch.autograd.grad(normalized, layer.weight, outputs[key])
        return outputs

    def warm_up_case(self) -> Case:
        """Return the same with two samples of a narrow D."""
        return replace(self, batch=2, base_width=8)


def _settle(layer: SpectralNormLayer) -> None:
    """Make u and v the first singular vectors, with a sigma of 1: so D computes the same with and without SN."""
    u, v = layer.weight_u, layer.weight_v
    matrix = layer.weight.flatten(1)
    matrix = matrix - torch.outer(u, u @ matrix)
    matrix = matrix - torch.outer(matrix @ v, v)
    rows, columns = matrix.shape
    # Above what the largest singular value of so random a matrix is.
    largest = 1.2 * matrix.square().mean().sqrt() * (rows**0.5 + columns**0.5)
    layer.weight.copy_((matrix / largest.clamp_min(1e-12) + torch.outer(u, v)).view_as(layer.weight))


def _plain_name(name: str) -> str:
    """Return ours for torch's names of the same parameter."""
    return name.replace("parametrizations.weight.original", "weight").replace("weight_orig", "weight")


def _normalized(network: nn.Module, contender: str) -> Outputs:
    """Return every normalised weight, found as the contender does at a forward in training."""
    if contender == SHARED:
        with shared_spectral_norm(network):
            return {
                name: layer.normalized_weight()
                for name, layer in network.named_modules()
                if isinstance(layer, SpectralNormLayer)
            }
    weights: Outputs = {}
    for name, layer in network.named_modules():
        if isinstance(layer, SpectralNormLayer):
            weights[name] = layer.normalized_weight()
        elif isinstance(layer, _Normalized):
            weights[name] = layer.normalized()
        elif parametrize.is_parametrized(layer):
            weights[name] = cast(Tensor, layer.weight)
        elif hasattr(layer, "weight_orig"):
            for hook in layer._forward_pre_hooks.values():
                hook(layer, ())
            weights[name] = cast(Tensor, layer.weight)
    return weights


# --- other people's spectral norm -------------------------------------------------------------------------


def _replace_spectral_norm(network: nn.Module, method: Callable[[nn.Module], None]) -> None:
    """Make every layer of ours the plain one with the same weight, and let ``method`` normalise it."""
    for layer in list(network.modules()):
        if isinstance(layer, SpectralNormLayer):
            u, v, weight = layer.weight_u.clone(), layer.weight_v.clone(), layer.weight
            remove_spectral_norm(layer)
            plain = cast(nn.Conv2d, layer)
            plain.weight = nn.Parameter(weight.detach().clone(memory_format=torch.preserve_format))
            method(plain)
            _start_from(plain, u, v)


def _start_from(layer: nn.Module, u: Tensor, v: Tensor) -> None:
    with torch.no_grad():
        for name, buffer in layer.named_buffers():
            if name.endswith("_u") or name == "u0":
                buffer.copy_(u.view_as(buffer))
            elif name.endswith("_v"):
                buffer.copy_(v.view_as(buffer))


def _parametrize(layer: nn.Module) -> None:
    parametrizations.spectral_norm(layer, eps=1e-8)


def _hook(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.spectral_norm(layer, eps=1e-8)


class _Normalized:
    """A layer whose weight is what ``normalized`` returns."""

    def normalized(self) -> Tensor:
        raise NotImplementedError


class _WithPooling(_Normalized):
    """In front of a convolution's classes: it pools its output, as ours does."""

    def forward(self, input: Tensor) -> Tensor:
        layer = cast(ResamplingConv2d, self)
        padding = cast(tuple[int, int], layer.padding)
        return functional.conv2d_downsample(
            input, self.normalized(), layer.bias, factor=layer.downsample, padding=padding
        )


class _Textbook(_Normalized):
    """SN as most GAN code writes it: three products with the matrix and a division at each forward."""

    weight: nn.Parameter
    u0: Tensor

    def normalized(self) -> Tensor:
        weight: Tensor = self.weight
        matrix = weight.reshape(weight.size(0), -1)
        with torch.no_grad():
            v = F.normalize(torch.mv(matrix.t(), self.u0), dim=0, eps=1e-8)
            self.u0.copy_(F.normalize(torch.mv(matrix, v), dim=0, eps=1e-8))
        return weight / torch.dot(self.u0.clone(), torch.mv(matrix, v))


class _TextbookConv2d(_Textbook, nn.Conv2d):  # type: ignore[misc]
    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(input, self.normalized(), self.bias)
        return output


class _TextbookPoolingConv2d(_WithPooling, _Textbook, nn.Conv2d):  # type: ignore[misc]
    pass


class _TextbookLinear(_Textbook, nn.Linear):  # type: ignore[misc]
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.normalized(), self.bias)


class _TextbookEmbedding(_Textbook, nn.Embedding):  # type: ignore[misc]
    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.normalized())


def _textbook(layer: nn.Module) -> None:
    classes = {
        nn.Conv2d: _TextbookConv2d,
        ResamplingConv2d: _TextbookPoolingConv2d,
        nn.Linear: _TextbookLinear,
        nn.Embedding: _TextbookEmbedding,
    }
    weight = cast(Tensor, layer.weight)
    layer.register_buffer("u0", weight.new_empty(weight.size(0)))
    layer.__class__ = classes[type(layer)]


def _biggan(checkout: Path | None) -> Callable[[nn.Module], None]:
    """Return what turns a plain layer into BigGAN-PyTorch's.

    Raises:
        Refused: as :func:`import_peer`.
    """
    layers = import_peer(checkout, "layers")
    classes: dict[type[nn.Module], type[nn.Module]] = {}
    for plain, theirs in (
        (nn.Conv2d, layers.SNConv2d),
        (nn.Linear, layers.SNLinear),
        (nn.Embedding, layers.SNEmbedding),
    ):
        # Their method has another name than the benchmark's.
        classes[plain] = type(theirs.__name__, (theirs, _Normalized), {"normalized": theirs.W_})
    convolution = classes[nn.Conv2d]
    classes[ResamplingConv2d] = type(convolution.__name__, (_WithPooling, convolution), {})

    def convert(layer: nn.Module) -> None:
        weight = cast(Tensor, layer.weight)
        theirs = classes[type(layer)]
        layer.__class__ = theirs
        layers.SN.__init__(layer, 1, 1, weight.size(0), eps=1e-8)
        layer.to(weight.device)

    return convert


# --- the command ------------------------------------------------------------------------------------------


def make_cases(device: str, *, quick: bool = False, peer: Path | None = None) -> list[DiscriminatorCase]:
    """Return every case for a device."""
    shape: dict[str, Any] = {"base_width": 8, "resolution": 64} if quick else {}
    batches = CPU_BATCHES if device == "cpu" else CUDA_BATCHES
    layouts = (False, True) if device == "cpu" else (True,)
    cases = [
        DiscriminatorCase(STEP, batch, device, channels_last, peer=peer, **shape)
        for channels_last in layouts
        for batch in (batches if not quick else (2,))
    ]
    return cases + [DiscriminatorCase(CALL, 1, device, layout, peer=peer, **shape) for layout in layouts]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites; return 1 if a result was wrong or ours failed, 2 if the device is not there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_spectral_norm", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a small D, under half a minute")
    parser.add_argument("--out", type=Path, help="the JSON file; Markdown and plots are written beside it")
    parser.add_argument("--peer", type=Path, help="a checkout of BigGAN-PyTorch; without, a textbook SN")
    parser.add_argument("--minutes", type=float, default=15.0, help="start no case after so long")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here.")
        return 2
    default_out = harness.ROOT / "benchmarks" / "results" / f"spectral_norm_{options.device}.json"
    results = harness.Results(options.out or default_out, options.device)
    settings = Settings(
        max_rounds=25,
        min_rounds=3 if options.quick else 5,
        target_s=0.5 if options.quick else 20.0,
        memory=not options.no_memory,
    )
    peer = options.peer.resolve() if options.peer else None
    cases = make_cases(options.device, quick=options.quick, peer=peer)
    fault = harness.run_cases(cases, results, settings, budget_s=options.minutes * 60)
    if not fault:
        results.finish()
    for path in (results.path, *harness.write_report(results)):
        print(f"Wrote {path}")
    failed = harness.any_wrong(results.rows) or harness.any_of_ours_failed(results.rows)
    return 1 if fault or failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
