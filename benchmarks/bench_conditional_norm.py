"""Conditional batch norm against plain batch norm, and against what other code makes of it.

``python -m benchmarks.bench_conditional_norm --help`` lists the options.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.harness import Case, Outputs, Row, Run, Settings
from benchmarks.peer import import_peer
from sagan_layers import ConditionalBatchNorm2d, functional

PLAIN, WITH_RELU, MAPS = "norm", "norm and ReLU", "norm and ReLU, maps of G"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH_NORM, TEXTBOOK, PEER = "nn.BatchNorm2d", "textbook", "BigGAN-PyTorch"
CLASSES = 1000
LARGE = ((16, 256, 32), (16, 64, 128))
# (batch, channels, side) of G's maps at 128 pixels and width 64.
GENERATOR = ((4, 1024, 4), (4, 1024, 8), (4, 512, 16), (4, 256, 32), (4, 128, 64), (4, 64, 128))


@dataclass(frozen=True)
class NormCase(Case):
    """Forward and backward in training: gradients of the map, and of the tables of gains and biases.

    All classes have the same gain and bias, so that batch norm without classes computes the same.

    Attributes:
        suite: PLAIN, WITH_RELU or MAPS.
        shape: batch, channels and side.
        dtype_name: of the map, a key of DTYPES; parameters are float32, and bfloat16 is under autocast.
        channels_last: the map's memory format.
        device: "cpu" or "cuda".
        peer: a checkout of BigGAN-PyTorch.
        compiled: whether the textbook's form under torch.compile is a contender.
    """

    suite: str
    shape: tuple[int, int, int]
    dtype_name: str
    channels_last: bool
    device: str
    peer: Path | None = None
    compiled: bool = False
    baseline = BATCH_NORM

    @property
    def name(self) -> str:
        """What the tables show."""
        N, C, side = self.shape
        layout = "channels_last" if self.channels_last else "NCHW"
        return f"{N}x{C}x{side}x{side} {self.dtype_name} {layout}"

    @property
    def tolerance(self) -> float:
        """The largest relative error."""
        return 5e-3 if self.dtype_name == "float32" else 3e-2

    @property
    def relu(self) -> bool:
        """Whether ReLU follows."""
        return self.suite != PLAIN

    def describe(self) -> Row:
        """Return the sizes, the dtype and the memory format."""
        N, C, side = self.shape
        return {
            "N": N,
            "C": C,
            "side": side,
            "dtype": self.dtype_name,
            "channels_last": self.channels_last,
            "relu": self.relu,
        }

    def contenders(self) -> list[str]:
        """Return batch norm without classes, ours by backend, and other code."""
        compiled = [f"{TEXTBOOK} compiled"] if self.compiled else []
        return [BATCH_NORM, "ours", "ours: reference", TEXTBOOK, *compiled, *([PEER] if self.peer else [])]

    def is_repeated(self, contender: str, rows: Any) -> bool:
        """Return whether this is the backend that "auto" took."""
        return contender == f"ours: {rows.get('ours', {}).get('served_by')}"

    def first_run(self, contender: str, run: Run, row: Row) -> Outputs:
        """Call the run, and record the backend that served ours."""
        if contender == "ours":
            row["served_by"] = functional.select_conditional_norm_backend(self.inputs()[0])
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
            return row.expand(CLASSES, C).contiguous().to(self.device).requires_grad_()

        labels = torch.randint(CLASSES, (N,), generator=generator).to(self.device)
        return map_of(2.0, 0.5).requires_grad_(), table(1.0), table(0.0), labels, map_of(1.0, 0.0)

    def prepare(self, contender: str, inputs: Any) -> Run:
        """Return the run of one contender, with running statistics of its own."""
        x, gain, bias, labels, cotangent = inputs
        C = x.size(1)
        if contender == BATCH_NORM:
            plain = nn.BatchNorm2d(C).to(x.device)
            with torch.no_grad():
                plain.weight.copy_(gain[0])
                plain.bias.copy_(bias[0])
            return self._run(plain, (x,), plain.weight, plain.bias, cotangent)
        if contender.startswith("ours"):
            backend = contender.split(": ")[1] if ": " in contender else "auto"
            ours = ConditionalBatchNorm2d(
                C, num_classes=CLASSES, activation="relu" if self.relu else None, backend=backend
            ).to(x.device)
            return self._run(ours, (x, labels), *_with_values(ours, gain, bias), cotangent, fused=True)
        if contender == PEER:
            theirs = _peer(self.peer, C).to(x.device)
            # Their gains are 1 more than the table.
            weights = _copied(theirs.gain.weight, gain - 1), _copied(theirs.bias.weight, bias)
            return self._run(theirs, (x, labels), *weights, cotangent)
        textbook = Textbook(C).to(x.device)
        weights = _copied(textbook.gain.weight, gain), _copied(textbook.bias.weight, bias)
        if contender.endswith("compiled"):
            textbook.compile(dynamic=False)
        return self._run(textbook, (x, labels), *weights, cotangent)

    def _run(
        self,
        norm: nn.Module,
        arguments: tuple[Tensor, ...],
        gain: Tensor,
        bias: Tensor,
        cotangent: Tensor,
        fused: bool = False,
    ) -> Run:
        x = arguments[0]
        autocast = torch.autocast(self.device, torch.bfloat16, enabled=x.dtype == torch.bfloat16)

        def run() -> Outputs:
            with autocast:
                y = norm(*arguments)
            if y.dtype != x.dtype:  # theirs, in 16 bits: the tables are float32
                y = y.to(x.dtype)
            if self.relu and not fused:
                y = F.relu(y, inplace=True)
            grad_x, grad_gain, grad_bias = torch.autograd.grad(y, (x, gain, bias), cotangent)
            outputs = {"y": y.detach(), "grad_x": grad_x}
            tables = {"grad_gain": grad_gain, "grad_bias": grad_bias}
            return {
                **outputs,
                **{name: grad.sum(0) if grad.dim() == 2 else grad for name, grad in tables.items()},
            }

        return run

    def expected(self, inputs: Any) -> Outputs:
        """Return batch norm's result in float64."""
        x, gain, bias, _, cotangent = inputs
        leaves = [tensor.detach().double().requires_grad_() for tensor in (x, gain[0], bias[0])]
        y = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], training=True)
        if self.relu:
            y = y.relu()
        names = ("grad_x", "grad_gain", "grad_bias")
        grads = torch.autograd.grad(y, leaves, cotangent.double())
        return {"y": y.detach(), **dict(zip(names, grads, strict=True))}

    def warm_up_case(self) -> Case:
        """Return the same with a small map."""
        return replace(self, shape=(2, 8, 8))


class Textbook(nn.Module):
    """Conditional batch norm as most GAN code writes it.

    Args:
        num_features: channels.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_features, affine=False)
        self.gain = nn.Embedding(CLASSES, num_features)
        self.bias = nn.Embedding(CLASSES, num_features)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return the normalised x times its class's gain, plus its bias."""
        gain, bias = (table(labels)[:, :, None, None] for table in (self.gain, self.bias))
        y: Tensor = gain.to(x.dtype) * self.norm(x) + bias.to(x.dtype)
        return y


def _copied(parameter: Tensor, values: Tensor) -> Tensor:
    with torch.no_grad():
        return parameter.copy_(values).requires_grad_()


def _with_values(norm: ConditionalBatchNorm2d, gain: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    assert isinstance(norm.weight, nn.Parameter)
    assert isinstance(norm.bias, nn.Parameter)
    return _copied(norm.weight, gain), _copied(norm.bias, bias)


def _peer(checkout: Path | None, channels: int) -> Any:
    """Return BigGAN-PyTorch's layer with embeddings, as its SAGAN has it.

    Raises:
        Refused: as :func:`import_peer`.
    """
    layers = import_peer(checkout, "layers")
    return layers.ccbn(channels, CLASSES, nn.Embedding)


def make_cases(
    device: str, *, quick: bool = False, compiled: bool = False, peer: Path | None = None
) -> list[NormCase]:
    """Return every case for a device, the most telling first."""

    def cases(suite: str, shapes: Sequence[tuple[int, int, int]], dtype: str) -> list[NormCase]:
        return [
            NormCase(suite, shape, dtype, channels_last, device, peer, compiled)
            for shape in shapes
            for channels_last in (False, True)
        ]

    if quick:
        small = ((2, 16, 16),)
        return [case for suite in (PLAIN, WITH_RELU) for case in cases(suite, small, "float32")]
    if device == "cuda":
        shapes = [(64, channels, side) for _, channels, side in GENERATOR[::-1]]
        order = [(suite, shapes, dtype) for dtype in ("bfloat16", "float32") for suite in (PLAIN, WITH_RELU)]
        return [case for given in order for case in cases(*given)]
    return [
        *cases(PLAIN, LARGE, "float32"),
        *cases(WITH_RELU, LARGE, "float32"),
        *cases(MAPS, GENERATOR, "float32"),
        *cases(MAPS, LARGE, "bfloat16"),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites; return 1 if a result was wrong or ours failed, 2 if the device is not there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_conditional_norm", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="one small map, a few seconds")
    parser.add_argument("--out", type=Path, help="the JSON file; Markdown and plots are written beside it")
    parser.add_argument("--peer", type=Path, help="a checkout of BigGAN-PyTorch")
    parser.add_argument("--compiled", action="store_true", help="the textbook's form under torch.compile too")
    parser.add_argument("--only", type=re.compile, help='regular expression on "suite | case"')
    parser.add_argument("--minutes", type=float, default=15.0, help="start no case after so long")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here.")
        return 2
    default_out = harness.ROOT / "benchmarks" / "results" / f"conditional_norm_{options.device}.json"
    results = harness.Results(options.out or default_out, options.device)
    settings = Settings(
        max_rounds=5 if options.quick else 15,
        target_s=0.3 if options.quick else 0.8,
        memory=not options.no_memory,
    )
    peer = options.peer.resolve() if options.peer else None
    cases = [
        case
        for case in make_cases(options.device, quick=options.quick, compiled=options.compiled, peer=peer)
        if options.only is None or options.only.search(f"{case.suite} | {case.name}")
    ]
    deadline = time.monotonic() + options.minutes * 60
    fault = ""
    for with_memory in (True, False):  # the many maps of G are left out
        chosen: list[Case] = [case for case in cases if (case.suite != MAPS) is with_memory]
        if not fault:
            fault = harness.run_cases(
                chosen,
                results,
                replace(settings, memory=settings.memory and with_memory),
                budget_s=deadline - time.monotonic(),
            )
    if not fault:
        results.finish()
    for path in (results.path, *harness.write_report(results)):
        print(f"Wrote {path}")
    failed = harness.any_wrong(results.rows) or harness.any_of_ours_failed(results.rows)
    return 1 if fault or failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
