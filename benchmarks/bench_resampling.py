"""Convolutions with nearest upsampling or average pooling beside them: each layer of SAGAN's networks, and the whole.

``python -m benchmarks.bench_resampling --help`` lists the options.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness
from benchmarks.harness import Case, Outputs, Row, Run, Settings
from sagan_layers import ResamplingConv2d, functional
from sagan_layers.ops.resampling import RESAMPLING_BACKENDS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CONV3X3, CONV1X1, NETWORK = "3x3 convolution", "1x1 convolution", "whole network"
CPU_DEFAULT_MINUTES = 6.0

# (resamples, channels in, channels out, side of the input) of the main path's layer that changes the resolution.
GENERATOR = (
    ("up", 1024, 1024, 4),
    ("up", 1024, 512, 8),
    ("up", 512, 256, 16),
    ("up", 256, 128, 32),
    ("up", 128, 64, 64),
)
DISCRIMINATOR = (
    ("down", 64, 64, 128),
    ("down", 128, 128, 64),
    ("down", 256, 256, 32),
    ("down", 512, 512, 16),
    ("down", 1024, 1024, 8),
)
# D's shortcuts have the block's input for theirs.
DISCRIMINATOR_SHORTCUTS = (
    ("down", 3, 64, 128),
    ("down", 64, 128, 64),
    ("down", 128, 256, 32),
    ("down", 256, 512, 16),
    ("down", 512, 1024, 8),
)
Layer = tuple[str, int, int, int]


def textbook(x: Tensor, weight: Tensor, bias: Tensor, up: bool) -> Tensor:
    """Return the convolution and its resampling one after the other, as every code base writes them."""
    padding = weight.size(2) // 2
    if up:
        return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=padding)
    return F.avg_pool2d(F.conv2d(x, weight, bias, padding=padding), 2)


@dataclass(frozen=True)
class LayerCase(Case):
    """Forward and backward of one layer, without spectral normalisation.

    Attributes:
        suite: CONV3X3 or CONV1X1.
        layer: resampling, channels and side.
        batch: N.
        dtype_name: a key of DTYPES.
        channels_last: the memory format of input and weight.
        device: "cpu" or "cuda".
    """

    suite: str
    layer: Layer
    batch: int
    dtype_name: str
    channels_last: bool
    device: str

    @property
    def name(self) -> str:
        """What the tables show."""
        resamples, inputs, outputs, side = self.layer
        after = side * 2 if resamples == "up" else side // 2
        text = f"{resamples} {side}->{after} C{inputs}->{outputs} N{self.batch} {self.dtype_name}"
        return text + (" channels_last" if self.channels_last else "")

    @property
    def tolerance(self) -> float:
        """The largest relative error."""
        return 1e-4 if self.dtype_name == "float32" else 3e-2

    @property
    def up(self) -> bool:
        """Whether the layer upsamples."""
        return self.layer[0] == "up"

    @property
    def kernel(self) -> int:
        """Side of the kernel."""
        return 3 if self.suite == CONV3X3 else 1

    def describe(self) -> Row:
        """Return the sizes, the dtype and the memory format."""
        resamples, inputs, outputs, side = self.layer
        return {
            "resamples": resamples,
            "in_channels": inputs,
            "out_channels": outputs,
            "side": side,
            "kernel": self.kernel,
            "N": self.batch,
            "dtype": self.dtype_name,
            "channels_last": self.channels_last,
        }

    def contenders(self) -> list[str]:
        """Return ours by form and the textbook; ``is_repeated`` leaves out the form that "auto" takes."""
        names = [backend.name for backend in RESAMPLING_BACKENDS]
        forms = (
            [name for name in names if name != "reordered"] if self.kernel == 3 else ["reordered", "plain"]
        )
        return ["ours", *(f"ours: {name}" for name in forms), "textbook"]

    def is_repeated(self, contender: str, rows: Mapping[str, Row]) -> bool:
        """Return whether this is the form that "auto" took."""
        return contender == f"ours: {rows.get('ours', {}).get('served_by')}"

    def first_run(self, contender: str, run: Run, row: Row) -> Outputs:
        """Call the run, and record the multiplications and the form that served."""
        if contender == "ours":
            x, weight, *_ = self.inputs()
            upsample, downsample = (2, 1) if self.up else (1, 2)
            row["served_by"] = functional.select_resampling(
                x, weight, upsample=upsample, downsample=downsample, padding=self.kernel // 2
            )
        with FlopCounterMode(display=False) as counter:
            outputs = run()
        row["multiplications"] = counter.get_total_flops() // 2
        return outputs

    def inputs(self) -> Any:
        """Return x, weight and bias as leaves, and the output's gradient."""
        generator = torch.Generator().manual_seed(0)
        _, inputs, outputs, side = self.layer
        after = side * 2 if self.up else side // 2
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
        """Return the run of one contender on these inputs."""
        *leaves, cotangent = inputs

        def run() -> Outputs:
            x, weight, bias = leaves
            if contender == "textbook":
                y = textbook(x, weight, bias, self.up)
            else:
                function = functional.upsample_conv2d if self.up else functional.conv2d_downsample
                backend = contender.split(": ")[1] if ": " in contender else "auto"
                y = function(x, weight, bias, padding=self.kernel // 2, backend=backend)
            grads = torch.autograd.grad(y, leaves, cotangent)
            return {
                "y": y.detach(),
                **dict(zip(("grad_x", "grad_weight", "grad_bias"), grads, strict=True)),
            }

        return run

    def expected(self, inputs: Any) -> Outputs:
        """Return the textbook's result in float64."""
        *leaves, cotangent = inputs
        return self.prepare(
            "textbook", [*(leaf.detach().double().requires_grad_() for leaf in leaves), cotangent.double()]
        )()


class TextbookLayer(nn.Module):
    """A convolution with the resampling of one of ours, as two operations.

    Args:
        ours: whose parameters and vectors are used (the same tensors).
    """

    def __init__(self, ours: ResamplingConv2d) -> None:
        super().__init__()
        self.up, self.down = ours.upsample, ours.downsample
        # The released code pools the image before the first shortcut.
        self.pools_first = ours.kernel_size == (1, 1) and ours.in_channels == 3
        ours.upsample = ours.downsample = 1
        self.conv = ours

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of x, upsampled before or pooled after."""
        if self.up > 1:
            x = F.interpolate(x, scale_factor=self.up, mode="nearest")
        if self.pools_first:
            x = F.avg_pool2d(x, self.down)
        y: Tensor = self.conv(x)
        return y if self.pools_first or self.down == 1 else F.avg_pool2d(y, self.down)


@dataclass(frozen=True)
class NetworkCase(Case):
    """Forward and backward of G or D in training, spectral normalisation and attention included.

    Attributes:
        network: "Generator" or "Discriminator".
        batch: N.
        resolution: of the images.
        base_width: channels of the feature map nearest to the image.
        device: "cpu" or "cuda".
    """

    network: str
    batch: int
    resolution: int
    base_width: int
    device: str
    suite: str = NETWORK

    @property
    def name(self) -> str:
        """What the tables show."""
        return f"{self.network} {self.resolution}px width {self.base_width} N{self.batch} float32"

    @property
    def tolerance(self) -> float:
        """The largest relative error: an activation within rounding of 0 may pass its ReLU or not."""
        return 2e-2

    def describe(self) -> Row:
        """Return the sizes."""
        return {"N": self.batch, "resolution": self.resolution, "base_width": self.base_width}

    def contenders(self) -> list[str]:
        """Return ours, ours with every layer in its plain form, and the textbook."""
        return ["ours", "ours: plain", "textbook"]

    def inputs(self) -> Any:
        """Return the network, its input, the labels and the output's gradient."""
        from sagan import networks

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
        for name, layer in list(network.named_modules()):
            if not isinstance(layer, ResamplingConv2d) or not layer.resamples:
                continue
            if contender == "textbook":
                parent, _, child = name.rpartition(".")
                setattr(network.get_submodule(parent), child, TextbookLayer(layer))
            elif contender == "ours: plain":
                layer.backend = "plain"
        parameters = {
            name.replace(".conv.weight", ".weight"): parameter
            for name, parameter in network.named_parameters()
            if parameter.dim() == 4
        }
        x = x.clone().requires_grad_()

        def run() -> Outputs:
            y = network(x, labels)
            grads = torch.autograd.grad(y, [x, *parameters.values()], cotangent)
            return {"y": y.detach(), **dict(zip(("grad_x", *parameters), grads, strict=True))}

        return run

    def expected(self, inputs: Any) -> Outputs:
        """Return the textbook's result in float64."""
        network, x, labels, cotangent = inputs
        return self.prepare(
            "textbook", [copy.deepcopy(network).double(), x.double(), labels, cotangent.double()]
        )()


def make_cases(
    device: str, *, quick: bool = False, full: bool = False, dtypes: Sequence[str] = ()
) -> list[Case]:
    """Return every case for a device, the most telling first."""
    conv3x3, conv1x1 = [*GENERATOR, *DISCRIMINATOR], [*GENERATOR, *DISCRIMINATOR_SHORTCUTS]
    allowed = dtypes or tuple(DTYPES)
    if quick:
        small: tuple[Layer, ...] = (("up", 64, 32, 16), ("down", 32, 64, 32))
        cases = [
            LayerCase(suite, layer, 2, dtype, False, device)
            for suite in (CONV3X3, CONV1X1)
            for dtype in dtypes or ("float32",)
            for layer in small
        ]
        return [*cases, NetworkCase("Generator", 2, 32, 8, device)]
    batch = 32 if device == "cuda" else 4
    whole = [NetworkCase(network, batch, 128, 64, device) for network in ("Generator", "Discriminator")]

    def layers(dtype: str, N: int, channels_last: bool, *suites: str) -> list[Case]:
        chosen = {CONV3X3: conv3x3, CONV1X1: conv1x1}
        return [
            LayerCase(suite, layer, N, dtype, channels_last, device)
            for suite in suites
            for layer in chosen[suite]
            if dtype in allowed
        ]

    both = (CONV3X3, CONV1X1)
    if device == "cuda":
        return [
            *layers("bfloat16", 64, True, *both),
            *layers("float32", 64, True, *both),
            *whole,
            *(layers("float32", 64, False, *both) if full else []),
        ]
    return [
        *layers("float32", batch, False, *both),
        *(whole if "float32" in allowed else []),
        *layers("bfloat16", batch, False, CONV3X3),
        *(layers("bfloat16", batch, False, CONV1X1) if full else []),
        *(layers("float32", 2 * batch, False, *both) if full else []),
        *(layers("float32", batch, True, *both) if full else []),
    ]


def multiplications(rows: Sequence[Row]) -> str:
    """Return a Markdown table of the multiplications of forward and backward, as a share of textbook's."""
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for row in rows:
        if "multiplications" in row and row["dtype"] == "float32" and not row["channels_last"]:
            counts.setdefault((row["suite"], row["case"]), {})[row["contender"]] = row["multiplications"]
    names = list(dict.fromkeys(name for row in counts.values() for name in row))
    lines = [
        "## Multiplications of forward and backward",
        "",
        "As a share of textbook's:",
        "",
        f"| case | {' | '.join(names)} |",
        f"|---|{'---:|' * len(names)}",
    ]
    for (suite, case), row in counts.items():
        cells = [f"{row[name] / row['textbook']:.2f}" if name in row else "" for name in names]
        lines.append(f"| {suite}: {case} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites; return 1 if a result was wrong or ours failed, 2 if the device is not there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_resampling", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a few small shapes, under a minute")
    parser.add_argument("--out", type=Path, help="the JSON file; Markdown and plots are written beside it")
    parser.add_argument("--dtypes", nargs="+", default=(), choices=tuple(DTYPES))
    parser.add_argument("--full", action="store_true", help="more batch sizes, dtypes and memory formats")
    parser.add_argument("--only", type=re.compile, help='regular expression on "suite | case"')
    parser.add_argument("--minutes", type=float, help="start no case after so long")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        if not torch.cuda.is_available():
            print("There is no CUDA device here.")
            return 2
        # The float64 check of float32 cases means float32.
        torch.backends.cudnn.allow_tf32 = False
    cases = make_cases(options.device, quick=options.quick, full=options.full, dtypes=options.dtypes)
    if options.only:
        cases = [case for case in cases if options.only.search(f"{case.suite} | {case.name}")]
    default_out = harness.ROOT / "benchmarks" / "results" / f"resampling_{options.device}.json"
    results = harness.Results(options.out or default_out, options.device)
    settings = Settings(
        max_rounds=5 if options.quick else 15,
        target_s=0.3 if options.quick else 0.6,
        memory=not options.no_memory,
    )
    minutes = options.minutes
    if minutes is None:
        minutes = CPU_DEFAULT_MINUTES if options.device == "cpu" else math.inf
    fault = harness.run_cases(cases, results, settings, budget_s=minutes * 60)
    if fault:
        print(fault)
    else:
        results.finish()
    report = harness.write_report(results)
    with report[0].open("a", encoding="utf-8") as file:
        file.write("\n" + multiplications(results.rows))
    for path in (results.path, *report):
        print(f"Wrote {path}")
    failed = harness.any_wrong(results.rows) or harness.any_of_ours_failed(results.rows)
    return 1 if fault or failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
