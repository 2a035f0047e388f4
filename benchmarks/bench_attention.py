"""Self-attention: its core, the block, and R1 through the block, against what people use today.

``python -m benchmarks.bench_attention --help`` lists the options.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks import baselines, biggan_pytorch, harness, report
from benchmarks.harness import DTYPES, Case, Outputs, Refused, Run, Settings
from benchmarks.report import Row
from sagan_layers import SelfAttention2d, functional

CORE_FORWARD, CORE_TRAINING = "core forward", "core forward+backward"
BLOCK_TRAINING, BLOCK_R1 = "block forward+backward", "block R1"
SUITES = (CORE_FORWARD, CORE_TRAINING, BLOCK_TRAINING, BLOCK_R1)

Shape = tuple[int, int, int]  # N, C, H (= W)
# The most valuable first: a time budget cuts from the end.
CPU_SHAPES: tuple[Shape, ...] = (
    (8, 128, 64),
    (4, 64, 64),
    (16, 256, 32),
    (16, 128, 32),
    (32, 64, 32),
    (16, 512, 16),
    (64, 64, 16),
    (64, 256, 8),
)
QUICK_SHAPES: tuple[Shape, ...] = ((2, 64, 32), (16, 128, 16))
CUDA_SHAPES: tuple[Shape, ...] = (
    (64, 64, 64),
    (64, 128, 64),
    (64, 128, 32),
    (64, 256, 32),
    (64, 512, 16),
    (64, 64, 128),
)
CUDA_FLOAT32_SHAPES: tuple[Shape, ...] = ((64, 64, 64), (64, 256, 32))
MEMORY_SHAPE: Shape = (1, 64, 128)

# Work of a case, in entries of the batch's L x S matrices, above which it takes minutes on 2 cores.
MINUTES_OF_WORK = 2**25 * 10
WORK = {CORE_FORWARD: 1.0, CORE_TRAINING: 3.0, BLOCK_TRAINING: 4.0, BLOCK_R1: 10.0}
HALF_PRECISION_WORK = 2.5
# The float64 result is of the whole batch up to this many entries, above of its first and last sample.
WHOLE_CHECK_ENTRIES = 2**20
# Contenders that hold whole matrices, and how many textbook code holds at its peak.
HOLDING_MATRICES = ("textbook", "SDPA", "BigGAN-PyTorch", "ours: reference")
TEXTBOOK_MATRICES = {CORE_FORWARD: 2, CORE_TRAINING: 5, BLOCK_TRAINING: 5, BLOCK_R1: 12}
GAMMA = 0.7
LOGIT_STD = 3.0


@dataclass(frozen=True)
class AttentionCase(Case):
    """Attention at one shape. C gives E = C / 8 and Ev = C / 2; the queries are all H x H positions."""

    shape: Shape  # N, C, H
    pool_size: int  # 2 or 1
    dtype_name: str  # a key of DTYPES
    peer: Path | None = None  # a checkout of BigGAN-PyTorch
    names: tuple[str, ...] = ()  # the contenders, if not all

    @property
    def name(self) -> str:
        N, C, H = self.shape
        pooled = "pooled" if self.pool_size > 1 else "unpooled"
        return f"N{N} C{C} {H}x{H} {pooled} {self.dtype_name}"

    @property
    def tolerance(self) -> float:
        if self.dtype_name == "float32":
            return 5e-3
        return 0.1 if self.is_core else 0.3  # rounding moves the logits, and maxima of the pool

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of inputs and parameters."""
        return DTYPES[self.dtype_name]

    @property
    def entries(self) -> int:
        """How many entries the L x S matrices of the batch have."""
        return self.shape[0] * self.sizes["L"] * self.sizes["S"]

    @property
    def work(self) -> float:
        """What a case costs on a CPU, in entries that one pass over the matrices touches."""
        return (
            self.entries * WORK[self.suite] * (1.0 if self.dtype_name == "float32" else HALF_PRECISION_WORK)
        )

    @property
    def is_core(self) -> bool:
        """Whether this is attention alone, without the block around it."""
        return self.suite in (CORE_FORWARD, CORE_TRAINING)

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes by their letters."""
        N, C, H = self.shape
        keys = (H // self.pool_size) ** 2
        return {"N": N, "C": C, "H": H, "L": H * H, "S": keys, "E": max(1, C // 8), "Ev": max(1, C // 2)}

    def contenders(self) -> list[str]:
        if self.names:
            return list(self.names)
        small = torch.zeros(1, 1, 1)
        backends = list(functional.explain_backends(small, small, small))
        if not self.is_core:
            backends.insert(0, "fused")
        names = ["ours", *(f"ours: {backend}" for backend in backends), "textbook", "SDPA", "SDPA padded"]
        if self.device == "cuda":
            names += ["textbook compiled", "FlexAttention"]
            if not self.is_core:
                names += ["ours channels_last", "SDPA padded channels_last"]
        if not self.is_core:
            names.append("BigGAN-PyTorch")
        return names

    def first_run(self, contender: str, run: Run, row: Row) -> Outputs:
        """Record which backends served ours: forward's first, then double backward's."""
        if not contender.startswith("ours"):
            return run()
        with functional.record_backends() as served:
            try:
                return run()
            except ValueError as error:
                if "backend serves these inputs" not in str(error):
                    raise
                raise Refused(str(error)) from None
            finally:
                if contender.split()[0] == "ours" and served:
                    row["served_by"] = " + ".join(dict.fromkeys(served))

    def may_run_out(self, contender: str) -> bool:
        return contender in HOLDING_MATRICES

    def inputs(self) -> Any:
        """Return the block and x, or query, key and value as channels-first leaves; last the output's gradient."""
        if self.device == "cuda":
            torch.compiler.reset()  # else one function compiled for many shapes soon falls back to eager
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            drawn = torch.randn(*shape, generator=generator) * std
            return drawn.to(self.device, self.dtype)

        N, C, H = self.shape
        L, S, E, Ev = (self.sizes[letter] for letter in ("L", "S", "E", "Ev"))
        sharpness = math.sqrt(LOGIT_STD) / E**0.25
        if self.is_core:
            leaves = [normal(N, E, L, std=sharpness), normal(N, E, S, std=sharpness), normal(N, Ev, S)]
            for leaf in leaves:
                leaf.requires_grad_(self.suite == CORE_TRAINING)
            return [*leaves, normal(N, Ev, L)]
        block = SelfAttention2d(C, pool_size=self.pool_size, spectral_norm=False, gamma_init=GAMMA)
        block = block.to(self.device, self.dtype)
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                if parameter.dim() == 4:
                    std = (sharpness if name.startswith(("query", "key")) else 1.0) / parameter.size(1) ** 0.5
                    parameter.copy_(normal(*parameter.shape, std=std))
        return block, normal(N, C, H, H).requires_grad_(), normal(N, C, H, H)

    def prepare(self, contender: str, inputs: Any) -> Run:
        ours = contender.startswith("ours")
        self._check_memory(contender)
        backend = harness.backend_of(contender)
        if self.is_core:
            core = _ours(backend) if ours else _core(contender)
            return lambda: self._run_core(core, inputs)
        block, x, cotangent = inputs
        module: nn.Module
        if contender.endswith("channels_last"):
            x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
            cotangent = cotangent.contiguous(memory_format=torch.channels_last)
        if ours:
            mine: SelfAttention2d = copy.copy(block)  # the same parameters
            mine.backend = backend
            module = mine
        elif contender == "BigGAN-PyTorch":
            module = biggan_pytorch.peer_attention(block, self.peer)
        elif contender.startswith("textbook"):
            module = baselines.TextbookAttention(block)
            if contender.endswith("compiled"):
                module.compile(dynamic=False)
        else:
            module = baselines.TextbookAttention(block, _core(contender.removesuffix(" channels_last")))
        return lambda: self._run_block(module, x, cotangent)

    def expected(self, inputs: Any) -> Outputs:
        samples = self._checked_samples()
        oracle = _oracle if self.suite != BLOCK_R1 else _ours("reference")
        if self.is_core:
            leaves = [leaf.detach()[samples].double().requires_grad_(leaf.requires_grad) for leaf in inputs]
            return self._run_core(oracle, leaves)
        block, x, cotangent = inputs
        module = baselines.TextbookAttention(copy.deepcopy(block).double(), oracle)
        x = x.detach()[samples].double().requires_grad_()
        outputs = self._run_block(module, x, cotangent[samples].double())
        whole = len(samples) == self.shape[0]
        return {name: tensor for name, tensor in outputs.items() if whole or _is_per_sample(name)}

    def select(self, outputs: Outputs) -> Outputs:
        samples = self._checked_samples()
        return {name: x[samples] if _is_per_sample(name) else x for name, x in outputs.items()}

    def warm_up_case(self) -> Case:
        return replace(self, shape=(2, self.shape[1], 8))

    def floor_ms(self, rates: Mapping[str, float]) -> float | None:
        """Return the core's least time by bytes, matrix FLOPs and exponentials, whichever takes longest.

        None without the first two rates; exponentials count where their rate is known. FLOAT32_NOTE has the rate of
        float32's products.
        """
        if not self.is_core or not {"copy_bytes", f"matmul_flops_{self.dtype_name}"} <= set(rates):
            return None
        N, L, S, E, Ev = (self.sizes[letter] for letter in ("N", "L", "S", "E", "Ev"))
        tensors = N * (L * E + S * E + S * Ev + L * Ev) * self.dtype.itemsize
        # Backward reads all of them, the output's gradient and the log-sum-exp, and writes three gradients.
        again = 2 * tensors + N * L * 4
        forward = self._floor_s(rates, tensors, 2 * N * L * S * (E + Ev))
        if self.suite == CORE_FORWARD:
            return forward * 1e3
        return (forward + self._floor_s(rates, again, 2 * N * L * S * (3 * E + 2 * Ev))) * 1e3

    def _floor_s(self, rates: Mapping[str, float], moved_bytes: float, flops: float) -> float:
        return max(
            moved_bytes / rates["copy_bytes"],
            flops / rates[f"matmul_flops_{self.dtype_name}"],
            self.entries / rates["exponentials"] if "exponentials" in rates else 0.0,
        )

    def _check_memory(self, contender: str) -> None:
        """Refuse on the CPU what would hold whole matrices that do not fit (CUDA says so itself)."""
        if self.device != "cpu" or contender not in HOLDING_MATRICES:
            return
        needed_mib = self.entries * TEXTBOOK_MATRICES[self.suite] * 4 / report.MIB
        free_mib = harness.available_mib()
        if free_mib is not None and needed_mib > 0.7 * free_mib:
            raise Refused(f"needs about {needed_mib / 1024:.1f} GiB, and that is not free")

    def _checked_samples(self) -> list[int]:
        N = self.shape[0]
        if self.entries <= WHOLE_CHECK_ENTRIES:
            return list(range(N))
        return [N - 1] if N == 1 or self.entries // N > 2**27 else [0, N - 1]

    def _run_core(self, core: baselines.Core, inputs: Sequence[Tensor]) -> Outputs:
        *leaves, cotangent = inputs
        query, key, value = (leaf.transpose(1, 2) for leaf in leaves)
        if self.suite == CORE_FORWARD:
            with torch.no_grad():
                return {"y": core(query, key, value)}
        named = dict(zip(("query", "key", "value"), leaves, strict=True))
        return harness.outputs_and_grads(core(query, key, value), cotangent.transpose(1, 2), named)

    def _run_block(self, module: nn.Module, x: Tensor, cotangent: Tensor) -> Outputs:
        leaves = {"x": x, **_parameters(module)}
        y = module(x)
        if self.suite == BLOCK_TRAINING:
            return harness.outputs_and_grads(y, cotangent, leaves)
        (slope,) = torch.autograd.grad((y * cotangent).sum(), x, create_graph=True)
        penalty = slope.to(torch.promote_types(slope.dtype, torch.float32)).square().sum()
        found = harness.outputs_and_grads(penalty, torch.ones_like(penalty), leaves)
        return {**found, "y": y.detach(), "slope": slope.detach()}


def _is_per_sample(name: str) -> bool:
    return not name.startswith("grad_parameter_")


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters by names that all modules share: BigGAN's, also for ours."""
    same = {"query": "theta", "key": "phi", "value": "g", "out": "o"}
    firsts = ((name.split(".")[0], parameter) for name, parameter in module.named_parameters())
    return {f"parameter_{same.get(first, first)}": parameter for first, parameter in firsts}


def _ours(backend: str) -> baselines.Core:
    return lambda query, key, value: functional.attention(query, key, value, backend=backend)


def _core(contender: str) -> baselines.Core:
    makers: dict[str, Callable[[], baselines.Core]] = {
        "textbook": lambda: baselines.textbook_attention,
        "textbook compiled": lambda: torch.compile(baselines.textbook_attention, dynamic=False),
        "SDPA": lambda: baselines.sdpa,
        "SDPA padded": lambda: baselines.sdpa_padded,
        "FlexAttention": baselines.flex_attention,
    }
    return makers[contender]()


def _oracle(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the reference's result, by blocks of queries that are recomputed in backward."""
    blocks: list[Tensor] = [
        checkpoint(_ours("reference"), block, key, value, use_reentrant=False)
        for block in torch.split(query, 1024, dim=1)
    ]
    return torch.cat(blocks, dim=1)


def make_cases(options: argparse.Namespace) -> list[AttentionCase]:
    """Return the cases of a run, the most valuable first."""
    device = options.device
    grid = [(shape, dtype) for shape in CPU_SHAPES for dtype in ("float32", "bfloat16")]
    if options.quick:
        grid = [(shape, "float32") for shape in QUICK_SHAPES]
    elif device == "cuda":
        grid = [(shape, "bfloat16") for shape in CUDA_SHAPES]
        grid += [(shape, "float32") for shape in CUDA_FLOAT32_SHAPES]
    cases = [
        AttentionCase(suite, device, shape, pool_size, dtype, options.peer)
        for pool_size in ((2,) if options.quick else (2, 1))
        for shape, dtype in grid
        for suite in SUITES
    ]
    if device == "cuda" or options.quick:
        return cases
    # A time budget should reach pooled before unpooled, and half precision's blocks last of each.
    cases.sort(key=lambda case: (case.pool_size == 1, case.dtype_name != "float32" and not case.is_core))
    if not options.everything:
        cases = [case for case in cases if case.work <= MINUTES_OF_WORK]
    names = () if options.everything else ("ours",)  # the others need several GB
    return cases + [
        AttentionCase(suite, device, MEMORY_SHAPE, 1, "float32", names=names)
        for suite in (CORE_TRAINING, BLOCK_TRAINING)
    ]


def measure_rates() -> dict[str, float]:
    """Return the bytes copied, matrix FLOPs and exponentials that this GPU reaches in a second.

    What cannot be measured is missing, and exponentials where nvidia-smi does not tell the clock.
    """
    settings = Settings(max_rounds=5, min_rounds=3)
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    size = 8192
    halves = [torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    singles = [torch.randn(size, size, device="cuda") for _ in range(2)]
    runs: dict[str, Run] = {
        "copy": lambda: {"target": target.copy_(source)},
        "bfloat16": lambda: {"product": halves[0] @ halves[1]},
        "ieee": lambda: _product(*singles, allow_tf32=False),
        "tf32": lambda: _product(*singles, allow_tf32=True),
    }
    times_s = {}
    for name, run in runs.items():
        try:
            run()
        except RuntimeError as error:  # torch's, where TF32 was switched in its newer way
            print(f"No rate of {name}: {harness.reason_of(error)}")
        else:
            times_s[name] = harness.time_contenders({name: run}, {name: {}}, "cuda", settings)[name].median
    return make_rates(times_s, size, source.numel(), report.nvidia_smi("clocks.max.sm"))


def make_rates(times_s: Mapping[str, float], size: int, copied: int, clock: str | None) -> dict[str, float]:
    """Return the rates from the times of a copy and of products, and nvidia-smi's highest clock in MHz."""
    flops = {name: 2 * size**3 / time_s for name, time_s in times_s.items() if name != "copy"}
    rates = {f"matmul_flops_{name}": rate for name, rate in flops.items()}
    exact = [flops[name] / products for name, products in (("ieee", 1), ("tf32", 3)) if name in flops]
    if exact:
        rates["matmul_flops_float32"] = max(exact)
    if "copy" in times_s:
        rates["copy_bytes"] = 2 * copied / times_s["copy"]
    # nvidia-smi says "[N/A]" where the driver does not tell, as in some virtual machines.
    with contextlib.suppress(TypeError, ValueError):
        clock_hz = float(clock or "") * 1e6
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        # 16 special-function results a clock and multiprocessor, at the highest clock.
        rates["exponentials"] = multiprocessors * 16 * clock_hz
    return rates


def _product(left: Tensor, right: Tensor, *, allow_tf32: bool) -> Outputs:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    try:
        return {"product": left @ right}
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites; return 1 if a result was wrong or ours failed, 2 if the device is not there."""
    options = harness.parse("attention", __doc__, arguments, peer=True)
    # The float64 check of float32 cases means float32; torch's default for matmul stays.
    torch.backends.cudnn.allow_tf32 = False
    return harness.run_suite(options, make_cases(options), Settings(target_s=1.0), measure_rates).finish()


if __name__ == "__main__":
    raise SystemExit(main())
