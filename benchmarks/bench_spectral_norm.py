"""Spectral normalisation in SAGAN's discriminator, against the same network without it and other people's.

``python -m benchmarks.bench_spectral_norm --help`` lists the options.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from benchmarks import harness
from benchmarks.baselines import TextbookNormalized, settle
from benchmarks.biggan_pytorch import import_peer
from benchmarks.harness import Case, Outputs, Run, Settings
from benchmarks.report import Row
from sagan.networks import Discriminator, NetworkConfig
from sagan_layers import (
    ResamplingConv2d,
    SNConv2d,
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
CLASSES, EPS = 1000, 1e-8
CPU_BATCHES, CUDA_BATCHES = (8, 2), (256, 64)


@dataclass(frozen=True)
class DiscriminatorCase(Case):
    """One forward and backward of D, or only what normalises its weights; on CUDA in bfloat16 under autocast."""

    batch: int  # samples
    channels_last: bool = False  # the memory format of network and images
    base_width: int = 64  # of D
    resolution: int = 128  # of D
    peer: Path | None = None  # a checkout of BigGAN-PyTorch

    @property
    def baseline(self) -> str:
        return WITHOUT if self.suite == STEP else PARAMETRIZATION

    @property
    def name(self) -> str:
        layout = "channels_last" if self.channels_last else "NCHW"
        network = f"D {self.resolution}x{self.resolution} width {self.base_width}"
        return f"{network} {layout}" + (f" batch {self.batch}" if self.suite == STEP else "")

    @property
    def tolerance(self) -> float:
        return 0.2 if self.device == "cuda" else 1e-3

    def contenders(self) -> list[str]:
        names = [SHARED, PER_LAYER, PARAMETRIZATION, HOOK, PEER if self.peer else TEXTBOOK]
        return [WITHOUT, *names] if self.suite == STEP else names

    def inputs(self) -> Any:
        """Return D with singular vectors for u and v and a sigma of 1, images and labels."""
        torch.manual_seed(0)
        config = NetworkConfig(
            num_classes=CLASSES, base_width=self.base_width, resolution=self.resolution, sn_eps=EPS
        )
        network = Discriminator(config)
        settle(network, gamma=0.7)
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
            _replace_spectral_norm(network, contender, self.peer)
            if self.channels_last:
                network = network.to(memory_format=torch.channels_last)
        if self.suite == CALL:
            return lambda: _normalized(network, contender)
        leaves = {_plain_name(name): parameter for name, parameter in network.named_parameters()}
        shared = shared_spectral_norm(network)

        def run() -> Outputs:
            autocast = torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")
            with autocast, shared if contender == SHARED else contextlib.nullcontext():
                logits = network(images, labels).float()
            return harness.outputs_and_grads(logits, torch.ones_like(logits), leaves)

        return run

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
        return harness.outputs_and_grads(logits, torch.ones_like(logits), dict(network.named_parameters()))

    def first_run(self, contender: str, run: Run, row: Row) -> Outputs:
        """Without SN, take the weights' gradients through the normalisation afterwards."""
        outputs = run()
        if contender != WITHOUT:
            return outputs
        network, _, _ = self.inputs()
        for name, layer in network.named_modules():
            if isinstance(layer, SpectralNormLayer):
                key = f"grad_{name}.weight"
                normalized = functional.spectral_normalize(
                    layer.weight, layer.weight_u, layer.weight_v
                ).weight
                (outputs[key],) = torch.autograd.grad(normalized, layer.weight, outputs[key])
        return outputs

    def warm_up_case(self) -> Case:
        return replace(self, batch=2, base_width=8)


def _plain_name(name: str) -> str:
    """Return ours for torch's names of the same parameter."""
    return name.replace("parametrizations.weight.original", "weight").replace("weight_orig", "weight")


def _normalized(network: nn.Module, contender: str) -> Outputs:
    """Return every normalised weight, found as the contender does at a forward in training."""
    weights: Outputs = {}
    with shared_spectral_norm(network) if contender == SHARED else contextlib.nullcontext():
        for name, layer in network.named_modules():
            if isinstance(layer, (SpectralNormLayer, TextbookNormalized)):
                weights[name] = layer.normalized_weight()
            elif hasattr(layer, "W_"):  # BigGAN-PyTorch's
                weights[name] = layer.W_()
            elif parametrize.is_parametrized(layer):
                weights[name] = cast(Tensor, layer.weight)
            elif hasattr(layer, "weight_orig"):
                for hook in layer._forward_pre_hooks.values():
                    hook(layer, ())
                weights[name] = cast(Tensor, layer.weight)
    return weights


def _replace_spectral_norm(network: nn.Module, contender: str, peer: Path | None) -> None:
    """Give every layer of ours the contender's spectral norm, with the same weight and vectors."""
    for name, layer in list(network.named_modules()):
        if not isinstance(layer, SpectralNormLayer):
            continue
        if contender == TEXTBOOK:
            parent, _, child = name.rpartition(".")
            pooled = isinstance(layer, SNConv2d) and layer.resamples
            textbook = TextbookNormalized(layer, partial(_pooling, layer) if pooled else None)
            setattr(network.get_submodule(parent), child, textbook)
            continue
        u, v, weight = layer.weight_u.clone(), layer.weight_v.clone(), layer.weight
        plain = cast(nn.Conv2d, remove_spectral_norm(layer))
        plain.weight = nn.Parameter(weight.detach().clone(memory_format=torch.preserve_format))
        _normalize_by(plain, contender, peer)
        with torch.no_grad():
            for buffer_name, buffer in plain.named_buffers():
                if buffer_name.endswith("_u") or buffer_name == "u0":
                    buffer.copy_(u.view_as(buffer))
                elif buffer_name.endswith("_v"):
                    buffer.copy_(v.view_as(buffer))


def _normalize_by(layer: nn.Module, contender: str, peer: Path | None) -> None:
    if contender == PARAMETRIZATION:
        parametrizations.spectral_norm(layer, eps=EPS)
    elif contender == HOOK:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.spectral_norm(layer, eps=EPS)
    else:
        layers, weight = import_peer(peer, "layers"), cast(Tensor, layer.weight)
        pooling = {"forward": lambda conv, x: _pooling(conv, x, conv.W_(), conv.bias)}
        classes = {
            nn.Conv2d: layers.SNConv2d,
            ResamplingConv2d: type("PoolingSNConv2d", (layers.SNConv2d,), pooling),
            nn.Linear: layers.SNLinear,
            nn.Embedding: layers.SNEmbedding,
        }
        layer.__class__ = classes[type(layer)]
        layers.SN.__init__(layer, 1, 1, weight.size(0), eps=EPS)
        layer.to(weight.device)


def _pooling(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a convolution that pools its output, as ours does."""
    return functional.conv2d_downsample(x, weight, bias, factor=layer.downsample, padding=layer.padding)


def make_cases(options: argparse.Namespace) -> list[DiscriminatorCase]:
    """Return the cases of a run."""
    sizes = {"base_width": 8, "resolution": 64} if options.quick else {}
    batches = (2,) if options.quick else CPU_BATCHES if options.device == "cpu" else CUDA_BATCHES
    layouts = (False, True) if options.device == "cpu" else (True,)
    runs = [(STEP, batch, layout) for layout in layouts for batch in batches]
    runs += [(CALL, 1, layout) for layout in layouts]
    return [
        DiscriminatorCase(suite, options.device, batch, layout, peer=options.peer, **sizes)
        for suite, batch, layout in runs
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites; return 1 if a result was wrong or ours failed, 2 if the device is not there."""
    options = harness.parse("spectral_norm", __doc__, arguments, peer=True)
    settings = Settings(target_s=20.0, max_rounds=25, min_rounds=5)
    return harness.run_suite(options, make_cases(options), settings).finish()


if __name__ == "__main__":
    raise SystemExit(main())
