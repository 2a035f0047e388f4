"""Convolutions with nearest upsampling or average pooling beside them: each layer of SAGAN's networks, and the whole.

``python -m benchmarks.bench_resampling --help`` lists the options.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness
from benchmarks.baselines import textbook_conv2d, textbook_operation
from benchmarks.harness import DTYPES, Case, Outputs, Run, Settings
from benchmarks.report import Row
from sagan import networks
from sagan_layers import SNConv2d, functional

CONV3X3, CONV1X1, NETWORK = "3x3 convolution", "1x1 convolution", "whole network"

Layer = tuple[str, int, int, int]  # "up" or "down", channels in and out, side of the input
WIDTHS = (1024, 1024, 512, 256, 128, 64)  # of both networks' blocks, from 4 to 128 pixels
GENERATOR: tuple[Layer, ...] = tuple(
    ("up", *widths, 4 << block) for block, widths in enumerate(itertools.pairwise(WIDTHS))
)
DISCRIMINATOR: tuple[Layer, ...] = tuple(
    ("down", width, width, 128 >> block) for block, width in enumerate(WIDTHS[:0:-1])
)
# D's shortcuts take the block's input.
DISCRIMINATOR_SHORTCUTS: tuple[Layer, ...] = tuple(
    ("down", inputs, width, side)
    for inputs, (_, _, width, side) in zip((3, *WIDTHS[:1:-1]), DISCRIMINATOR, strict=True)
)
QUICK = (("up", 64, 32, 16), ("down", 32, 64, 32))


@dataclass(frozen=True)
class LayerCase(Case):
    """Forward and backward of one layer, without spectral normalisation."""

    layer: Layer  # resampling, channels and side
    batch: int  # N
    dtype_name: str  # a key of DTYPES
    channels_last: bool  # the memory format of input and weight

    @property
    def name(self) -> str:
        resamples, inputs, outputs, side = self.layer
        after = side * 2 if resamples == "up" else side // 2
        text = f"{resamples} {side}->{after} C{inputs}->{outputs} N{self.batch} {self.dtype_name}"
        return text + (" channels_last" if self.channels_last else "")

    @property
    def tolerance(self) -> float:
        return 1e-4 if self.dtype_name == "float32" else 3e-2

    @property
    def upsample(self) -> int:
        """The factor of the upsampling, 1 for none."""
        return 2 if self.layer[0] == "up" else 1

    @property
    def downsample(self) -> int:
        """The factor of the pooling, 1 for none."""
        return 2 if self.layer[0] == "down" else 1

    @property
    def kernel(self) -> int:
        """Side of the kernel."""
        return 3 if self.suite == CONV3X3 else 1

    def contenders(self) -> list[str]:
        # The kernel's size decides which forms can serve at all.
        forms = (
            ["reordered", "plain"] if self.kernel == 1 else [name for name in _forms() if name != "reordered"]
        )
        return ["ours", *(f"ours: {name}" for name in forms), "textbook"]

    def first_run(self, contender: str, run: Run, row: Row) -> Outputs:
        """Record the form that served, and count the multiplications."""
        if contender == "ours":
            x, weight, *_ = self.inputs()
            row["served_by"] = functional.select_backend(
                x,
                weight,
                operation="upsample_conv2d" if self.upsample > 1 else "conv2d_downsample",
                factor=self.upsample * self.downsample,
                padding=self.kernel // 2,
            )
        with FlopCounterMode(display=False) as counter:
            outputs = run()
        _, inputs, channels, side = self.layer
        convolved_side = side * self.upsample
        # Forward, and two products as large in backward.
        written_plainly = 3 * self.batch * inputs * channels * (self.kernel * convolved_side) ** 2
        row["multiplications_share"] = counter.get_total_flops() / 2 / written_plainly
        return outputs

    def inputs(self) -> Any:
        """Return x, weight and bias as leaves, and the output's gradient."""
        generator = torch.Generator().manual_seed(0)
        _, inputs, outputs, side = self.layer
        after = side * self.upsample // self.downsample
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            drawn = (torch.randn(*shape, generator=generator) * std).to(self.device, DTYPES[self.dtype_name])
            return drawn.contiguous(memory_format=memory_format) if len(shape) == 4 else drawn

        std = (inputs * self.kernel**2) ** -0.5
        leaves = [
            normal(self.batch, inputs, side, side),
            normal(outputs, inputs, self.kernel, self.kernel, std=std),
            normal(outputs),
        ]
        return [*(leaf.requires_grad_() for leaf in leaves), normal(self.batch, outputs, after, after)]

    def prepare(self, contender: str, inputs: Any) -> Run:
        x, weight, bias, cotangent = inputs

        def run() -> Outputs:
            if contender == "textbook":
                y = textbook_conv2d(x, weight, bias, upsample=self.upsample, downsample=self.downsample)
            else:
                function = functional.upsample_conv2d if self.upsample > 1 else functional.conv2d_downsample
                y = function(x, weight, bias, padding=self.kernel // 2, backend=harness.backend_of(contender))
            return harness.outputs_and_grads(y, cotangent, {"x": x, "weight": weight, "bias": bias})

        return run

    def expected(self, inputs: Any) -> Outputs:
        *leaves, cotangent = inputs
        return self.prepare(
            "textbook", [*(leaf.detach().double().requires_grad_() for leaf in leaves), cotangent.double()]
        )()


def _forms() -> list[str]:
    x, weight = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 3, 3)
    return list(functional.explain_backends(x, weight, operation="upsample_conv2d"))


def _resample_separately(layer: SNConv2d) -> None:
    """Make a convolution resample in a separate operation."""
    operation = textbook_operation(layer)
    setattr(layer, "forward", lambda x: operation(x, layer.normalized_weight(), layer.bias))  # noqa: B010


@dataclass(frozen=True)
class NetworkCase(Case):
    """Forward and backward of G or D in training, spectral normalisation and attention included."""

    network: str  # "Generator" or "Discriminator"
    batch: int  # N
    resolution: int  # of the images
    base_width: int  # channels of the feature map nearest to the image

    @property
    def name(self) -> str:
        return f"{self.network} {self.resolution}px width {self.base_width} N{self.batch} float32"

    @property
    def tolerance(self) -> float:
        return 2e-2  # an activation within rounding of 0 may pass its ReLU or not

    def contenders(self) -> list[str]:
        return ["ours", "ours: plain", "textbook"]

    def inputs(self) -> Any:
        """Return the network, its input, the labels and the output's gradient."""
        config = networks.NetworkConfig(
            resolution=self.resolution,
            base_width=self.base_width,
            num_classes=1000,
            g_attention=(self.resolution // 4,),
            d_attention=(self.resolution // 4,),
        )
        torch.manual_seed(0)
        network = getattr(networks, self.network)(config)
        is_generator = self.network == "Generator"
        image = (3, self.resolution, self.resolution)
        shape = (config.latent_dim,) if is_generator else image
        x = torch.randn(self.batch, *shape)
        cotangent = torch.randn(self.batch, *(image if is_generator else (1,)))
        labels = torch.arange(self.batch) * 7
        return [tensor.to(self.device) for tensor in (network, x, labels, cotangent)]

    def prepare(self, contender: str, inputs: Any) -> Run:
        """Return the run of one contender, on a copy of the network."""
        network, x, labels, cotangent = inputs
        network = copy.deepcopy(network)
        for layer in network.modules():
            if isinstance(layer, SNConv2d) and layer.resamples:
                if contender == "textbook":
                    _resample_separately(layer)
                elif contender == "ours: plain":
                    layer.backend = "plain"
        x = x.clone().requires_grad_()
        weights = {name: weight for name, weight in network.named_parameters() if weight.dim() == 4}
        return lambda: harness.outputs_and_grads(network(x, labels), cotangent, {"x": x, **weights})

    def expected(self, inputs: Any) -> Outputs:
        network, x, labels, cotangent = inputs
        return self.prepare(
            "textbook", [copy.deepcopy(network).double(), x.double(), labels, cotangent.double()]
        )()


def make_cases(options: argparse.Namespace) -> list[Case]:
    """Return the cases of a run, the most valuable first."""
    device = options.device

    def layers(suite: str, dtype: str, N: int, channels_last: bool = False) -> list[Case]:
        shortcuts = DISCRIMINATOR if suite == CONV3X3 else DISCRIMINATOR_SHORTCUTS
        chosen = QUICK if options.quick else (*GENERATOR, *shortcuts)
        return [LayerCase(suite, device, layer, N, dtype, channels_last) for layer in chosen]

    def both(dtype: str, N: int, channels_last: bool = False) -> list[Case]:
        return layers(CONV3X3, dtype, N, channels_last) + layers(CONV1X1, dtype, N, channels_last)

    def whole(N: int) -> list[Case]:
        return [NetworkCase(NETWORK, device, name, N, 128, 64) for name in ("Generator", "Discriminator")]

    if options.quick:
        return [*both("float32", 2), NetworkCase(NETWORK, device, "Generator", 2, 32, 8)]
    if device == "cuda":
        cases = both("bfloat16", 64, True) + both("float32", 64, True) + whole(32)
        return cases + both("float32", 64) if options.everything else cases
    cases = both("float32", 4) + whole(4) + layers(CONV3X3, "bfloat16", 4)
    if options.everything:
        cases += layers(CONV1X1, "bfloat16", 4) + both("float32", 8) + both("float32", 4, True)
    return cases


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites; return 1 if a result was wrong or ours failed, 2 if the device is not there."""
    options = harness.parse("resampling", __doc__, arguments)
    torch.backends.cudnn.allow_tf32 = False  # the float64 check of float32 cases means float32
    return harness.run_suite(options, make_cases(options), Settings(target_s=0.6)).finish()


if __name__ == "__main__":
    raise SystemExit(main())
