"""Conditional batch norm against plain batch norm, and against what other code makes of it.

``python -m benchmarks.bench_conditional_norm --help`` lists the options.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.baselines import TextbookConditionalNorm
from benchmarks.biggan_pytorch import import_peer
from benchmarks.harness import DTYPES, Case, Outputs, Run, Settings
from benchmarks.report import Row
from sagan_layers import ConditionalBatchNorm2d, functional

PLAIN, WITH_RELU = "norm", "norm and ReLU"
MAPS, COMPILED = "norm and ReLU, maps of G", "norm and ReLU, compiled"
BATCH_NORM, TEXTBOOK, PEER = "nn.BatchNorm2d", "textbook", "BigGAN-PyTorch"
CLASSES = 1000
Shape = tuple[int, int, int]  # batch, channels, side
LARGE = ((16, 256, 32), (16, 64, 128))
# G's maps at 128 pixels and width 64.
GENERATOR = ((4, 1024, 4), (4, 1024, 8), (4, 512, 16), (4, 256, 32), (4, 128, 64), (4, 64, 128))


@dataclass(frozen=True)
class NormCase(Case):
    """Forward and backward in training: gradients of the map, and of the tables of gains and biases.

    All classes have the same gain and bias, so that batch norm without classes computes the same.
    """

    shape: Shape  # of the map
    dtype_name: str  # of the map, a key of DTYPES; parameters are float32, and bfloat16 is under autocast
    channels_last: bool  # the map's memory format
    peer: Path | None = None  # a checkout of BigGAN-PyTorch

    @property
    def baseline(self) -> str:
        return BATCH_NORM

    @property
    def name(self) -> str:
        N, C, side = self.shape
        layout = "channels_last" if self.channels_last else "NCHW"
        return f"{N}x{C}x{side}x{side} {self.dtype_name} {layout}"

    @property
    def tolerance(self) -> float:
        return 5e-3 if self.dtype_name == "float32" else 3e-2

    @property
    def measures_memory(self) -> bool:
        return self.suite != MAPS  # there are many

    @property
    def relu(self) -> bool:
        """Whether ReLU follows."""
        return self.suite != PLAIN

    def contenders(self) -> list[str]:
        compiled = [f"{TEXTBOOK} compiled"] if self.suite == COMPILED else []
        return [BATCH_NORM, "ours", "ours: reference", TEXTBOOK, *compiled, *([PEER] if self.peer else [])]

    def first_run(self, contender: str, run: Run, row: Row) -> Outputs:
        if contender == "ours":
            row["served_by"] = functional.select_backend(self.inputs()[0], operation="conditional_batch_norm")
        return run()

    def inputs(self) -> Any:
        """Return x, the tables of gains and biases, labels, and the output's gradient."""
        generator = torch.Generator().manual_seed(0)
        N, C, side = self.shape
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format

        def map_of(scale: float, shift: float) -> Tensor:
            drawn = torch.randn(N, C, side, side, generator=generator) * scale + shift
            return drawn.to(self.device, DTYPES[self.dtype_name]).contiguous(memory_format=memory_format)

        def table(mean: float) -> Tensor:
            row = mean + 0.3 * torch.randn(1, C, generator=generator)
            return row.expand(CLASSES, C).contiguous().to(self.device)

        labels = torch.randint(CLASSES, (N,), generator=generator).to(self.device)
        return map_of(2.0, 0.5).requires_grad_(), table(1.0), table(0.0), labels, map_of(1.0, 0.0)

    def prepare(self, contender: str, inputs: Any) -> Run:
        """Return the run of one contender, with running statistics of its own."""
        x, gains, biases, labels, cotangent = inputs
        C = x.size(1)
        fused = contender.startswith("ours")
        norm: Any
        if contender == BATCH_NORM:
            norm = nn.BatchNorm2d(C)
            gain, bias, gains, biases = norm.weight, norm.bias, gains[0], biases[0]
        elif contender == PEER:  # its layer with embeddings, as its SAGAN has it
            norm = import_peer(self.peer, "layers").ccbn(C, CLASSES, nn.Embedding)
            gain, bias, gains = norm.gain.weight, norm.bias.weight, gains - 1
        else:
            backend = harness.backend_of(contender) if fused else "auto"
            activation = "relu" if self.relu and fused else None
            norm = ConditionalBatchNorm2d(C, num_classes=CLASSES, activation=activation, backend=backend)
            gain, bias = norm.weight, norm.bias
            if not fused:
                norm = TextbookConditionalNorm(norm, casts=True)
                gain, bias = norm.gain, norm.bias
            if contender.endswith("compiled"):
                norm.compile(dynamic=False)
        norm.to(x.device)
        with torch.no_grad():
            gain.copy_(gains)
            bias.copy_(biases)
        arguments = (x,) if contender == BATCH_NORM else (x, labels)
        leaves = {"x": x, "gain": gain, "bias": bias}

        def run() -> Outputs:
            with torch.autocast(self.device, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
                y = norm(*arguments)
            if y.dtype != x.dtype:  # theirs, in 16 bits: the tables are float32
                y = y.to(x.dtype)
            if self.relu and not fused:
                y = F.relu(y, inplace=True)
            found = harness.outputs_and_grads(y, cotangent, leaves)
            return {name: each.sum(0) if each.dim() == 2 else each for name, each in found.items()}

        return run

    def expected(self, inputs: Any) -> Outputs:
        """Return batch norm's result in float64."""
        x, gains, biases, _, cotangent = inputs
        named = {"x": x, "gain": gains[0], "bias": biases[0]}
        leaves = {name: each.detach().double().requires_grad_() for name, each in named.items()}
        y = F.batch_norm(leaves["x"], None, None, leaves["gain"], leaves["bias"], training=True)
        return harness.outputs_and_grads(y.relu() if self.relu else y, cotangent.double(), leaves)

    def warm_up_case(self) -> Case:
        return replace(self, shape=(2, 8, 8))


def make_cases(options: argparse.Namespace) -> list[NormCase]:
    """Return the cases of a run, the most valuable first."""
    groups: list[tuple[str, tuple[Shape, ...], str]]
    if options.quick:
        groups = [(suite, ((2, 16, 16),), "float32") for suite in (PLAIN, WITH_RELU)]
    elif options.device == "cuda":
        shapes = tuple((64, channels, side) for _, channels, side in GENERATOR[::-1])
        groups = [(suite, shapes, dtype) for dtype in ("bfloat16", "float32") for suite in (PLAIN, WITH_RELU)]
    else:
        groups = [
            (PLAIN, LARGE, "float32"),
            (WITH_RELU, LARGE, "float32"),
            (MAPS, GENERATOR, "float32"),
            (MAPS, LARGE, "bfloat16"),
        ]
    if options.everything and not options.quick:
        _, shapes, dtype = groups[0]
        groups.append((COMPILED, shapes, dtype))
    return [
        NormCase(suite, options.device, shape, dtype, channels_last, options.peer)
        for suite, shapes, dtype in groups
        for shape in shapes
        for channels_last in (False, True)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites; return 1 if a result was wrong or ours failed, 2 if the device is not there."""
    options = harness.parse("conditional_norm", __doc__, arguments, peer=True)
    return harness.run_suite(options, make_cases(options), Settings(target_s=0.8)).finish()


if __name__ == "__main__":
    raise SystemExit(main())
