"""Self-attention: its core, the block, and R1 through the block, against what people use today.

``python -m benchmarks.bench_attention --help`` lists the options.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks import baselines, harness
from benchmarks.harness import Case, Outputs, Refused, Row, Run, Settings
from sagan_layers import SelfAttention2d, functional
from sagan_layers.ops import dispatch, reference
from sagan_layers.ops.reference import SelfAttentionWeights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CORE_FORWARD, CORE_TRAINING = "core forward", "core forward+backward"
BLOCK_TRAINING, BLOCK_R1 = "block forward+backward", "block R1"
SUITES = (CORE_FORWARD, CORE_TRAINING, BLOCK_TRAINING, BLOCK_R1)

Shape = tuple[int, int, int]  # N, C, H (= W)
# In the order of their worth: a time budget cuts from the end.
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
CPU_DEFAULT_WORK = 2**25 * 10
WORK = {CORE_FORWARD: 1.0, CORE_TRAINING: 3.0, BLOCK_TRAINING: 4.0, BLOCK_R1: 10.0}
HALF_PRECISION_WORK = 2.5
CPU_DEFAULT_MINUTES = 10.5
# The float64 result is of the whole batch up to this many entries, above of its first and last sample.
WHOLE_CHECK_ENTRIES = 2**20
# What holds whole matrices, and how many of them textbook code holds at its highest point.
HOLDING_MATRICES = ("textbook", "SDPA", "BigGAN-PyTorch", "ours: reference")
TEXTBOOK_MATRICES = {CORE_FORWARD: 2, CORE_TRAINING: 5, BLOCK_TRAINING: 5, BLOCK_R1: 12}
# Ours are float32 products out of three TF32 ones, which can beat cuBLAS without TF32.
FLOAT32_NOTE = (
    "Floors of float32 take as the rate of its products the faster of cuBLAS without TF32 and a third of its rate "
    "with TF32, as three TF32 products make one of nearly float32's accuracy."
)
GAMMA = 0.7
LOGIT_STD = 3.0


@dataclass(frozen=True)
class BlockInputs:
    """What a block runs on; ``cotangent`` is the gradient of the loss by the output."""

    block: SelfAttention2d
    x: Tensor
    cotangent: Tensor


@dataclass(frozen=True)
class AttentionCase(Case):
    """Attention at one shape. C gives E = C / 8 and Ev = C / 2; the queries are all H x H positions.

    Attributes:
        suite: one of SUITES.
        shape: N, C, H.
        pool_size: 2 or 1.
        dtype_name: a key of DTYPES.
        device: "cpu" or "cuda".
        backends: which of ours to time, "auto" or names; all if empty.
        peer: a checkout of BigGAN-PyTorch.
        only_ours: if not empty, the reason for which every other contender refuses.
    """

    suite: str
    shape: Shape
    pool_size: int
    dtype_name: str
    device: str
    backends: tuple[str, ...] = ()
    peer: Path | None = None
    only_ours: str = ""

    @property
    def name(self) -> str:
        """What the tables show."""
        N, C, H = self.shape
        pooled = "pooled" if self.pool_size > 1 else "unpooled"
        return f"N{N} C{C} {H}x{H} {pooled} {self.dtype_name}"

    @property
    def tolerance(self) -> float:
        """The largest relative error: half precision rounds the logits, and moves maxima of the pool."""
        if self.dtype_name == "float32":
            return 5e-3
        return 0.1 if self.is_core else 0.3

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of inputs and parameters."""
        return DTYPES[self.dtype_name]

    @property
    def entries(self) -> int:
        """How many entries the L x S matrices of the batch have."""
        return self.shape[0] * self.sizes["L"] * self.sizes["S"]

    @property
    def is_half(self) -> bool:
        """Whether the dtype is a 16-bit one."""
        return self.dtype.itemsize == 2

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

    def describe(self) -> Row:
        """Return the sizes and the dtype."""
        return {**self.sizes, "pool_size": self.pool_size, "dtype": self.dtype_name}

    def contenders(self) -> list[str]:
        """Return ours and the baselines; ``is_repeated`` leaves out the backend that "auto" takes."""
        known = [backend.name for backend in dispatch.ATTENTION_BACKENDS]
        asked = self.backends or ("auto", dispatch.FUSED, *known)
        names = ["ours"] if "auto" in asked else []
        # The whole block in its own kernels: the core alone has no such form.
        left_out = ("auto", dispatch.FUSED) if self.is_core else ("auto",)
        names += [f"ours: {backend}" for backend in asked if backend not in left_out]
        names += ["textbook", "SDPA", "SDPA padded"]
        if self.device == "cuda":
            names += ["textbook compiled", "FlexAttention"]
            if not self.is_core:
                names += ["ours channels_last", "SDPA padded channels_last"]
        if not self.is_core:
            names.append("BigGAN-PyTorch")
        return names

    def first_run(self, contender: str, run: Run, row: Row) -> Outputs:
        """Call the run, and record which backends served ours: forward's first, then double backward's."""
        with functional.record_backends() as served:
            try:
                return run()
            finally:
                if contender.split()[0] == "ours" and served:
                    row["served_by"] = " + ".join(dict.fromkeys(served))

    def is_repeated(self, contender: str, rows: Mapping[str, Row]) -> bool:
        """Return whether this is the backend that "auto" was seen to take."""
        taken = rows.get("ours", {}).get("served_by", "").split(" + ")[0]
        return bool(taken) and contender == f"ours: {taken}"

    def may_run_out(self, contender: str) -> bool:
        """Return whether the contender holds whole L x S matrices."""
        return contender in HOLDING_MATRICES

    def inputs(self) -> Any:
        """Return query, key and value as channels-first leaves, and the output's gradient; or BlockInputs."""
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
        return BlockInputs(block, normal(N, C, H, H).requires_grad_(), normal(N, C, H, H))

    def prepare(self, contender: str, inputs: Any) -> Run:
        """Return the run of one contender on these inputs."""
        ours = contender.startswith("ours")
        if self.only_ours and not ours:
            raise Refused(self.only_ours)
        self._check_memory(contender)
        if ours:
            backend = contender.split(": ")[1] if ": " in contender else "auto"
            if backend == dispatch.FUSED:
                self._check_fused(inputs)
            else:
                self._served_by(backend)
        if self.is_core:
            core = _ours(backend) if ours else _core(contender)
            return lambda: self._run_core(core, inputs)
        block, x, cotangent = inputs.block, inputs.x, inputs.cotangent
        module: nn.Module
        if contender.endswith("channels_last"):
            x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
            cotangent = cotangent.contiguous(memory_format=torch.channels_last)
        if ours:
            mine: SelfAttention2d = copy.copy(block)  # the same parameters
            mine.backend = backend
            module = mine
        elif contender == "BigGAN-PyTorch":
            module = baselines.peer_block(block, self.peer)
        elif contender == "textbook":
            module = baselines.TextbookBlock(block)
        elif contender == "textbook compiled":
            module = baselines.TextbookBlock(block)
            module.compile(dynamic=False)
        else:
            module = baselines.TextbookBlock(block, _core(contender.removesuffix(" channels_last")))
        return lambda: self._run_block(module, x, cotangent)

    def expected(self, inputs: Any) -> Outputs:
        """Return the float64 result of the whole batch, or of some of its samples."""
        samples = self._checked_samples()
        oracle = _oracle if self.suite != BLOCK_R1 else _ours("reference")
        if self.is_core:
            leaves = [leaf.detach()[samples].double().requires_grad_(leaf.requires_grad) for leaf in inputs]
            return self._run_core(oracle, leaves)
        module = baselines.TextbookBlock(copy.deepcopy(inputs.block).double(), oracle)
        x = inputs.x.detach()[samples].double().requires_grad_()
        outputs = self._run_block(module, x, inputs.cotangent[samples].double())
        whole = len(samples) == self.shape[0]
        return {name: tensor for name, tensor in outputs.items() if whole or _is_per_sample(name)}

    def select(self, outputs: Outputs) -> Outputs:
        """Return the samples that are compared, and the parameters' gradients."""
        samples = self._checked_samples()
        return {name: x[samples] if _is_per_sample(name) else x for name, x in outputs.items()}

    def warm_up_case(self) -> Case:
        """Return the same with two small images."""
        return replace(self, shape=(2, self.shape[1], 8))

    def floor_ms(self, rates: Mapping[str, float]) -> float | None:
        """Return the core's least time by bytes, matrix FLOPs and exponentials, whichever takes longest.

        None without the first two rates; exponentials are left out where their rate is not known. What the rate
        of float32's products is: FLOAT32_NOTE.
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

    def _served_by(self, backend: str) -> str:
        """Return the backend chosen for tensors such as the block makes; raise Refused if there is none."""
        N, L, S, E, Ev = (self.sizes[letter] for letter in ("N", "L", "S", "E", "Ev"))
        query, key, value = (
            torch.empty(N, width, length, device=self.device, dtype=self.dtype)
            .requires_grad_(self.suite != CORE_FORWARD)
            .transpose(1, 2)
            for width, length in ((E, L), (E, S), (Ev, S))
        )
        try:
            return functional.select_backend(query, key, value, backend=backend)
        except ValueError as error:
            raise Refused(str(error)) from None

    def _check_fused(self, inputs: BlockInputs) -> None:
        """Raise Refused with the reasons for which the block's own kernels cannot serve it."""
        block = inputs.block
        projections = (block.query, block.key, block.value, block.out)
        query, key, value, out = (
            parameter.flatten(1) for each in projections for parameter in each.parameters()
        )
        weights = SelfAttentionWeights(query, key, value, out, None, None, None, None, block.gamma)
        reasons = dispatch.reasons_against_fused(inputs.x, weights, self.pool_size)
        if reasons:
            raise Refused(f"{dispatch.FUSED}: {'; '.join(reasons)}")

    def _check_memory(self, contender: str) -> None:
        """Refuse on the CPU what would hold whole matrices that do not fit (CUDA says so itself)."""
        holds_matrices = contender in HOLDING_MATRICES or (
            contender == "ours" and self._served_by("auto") == "reference"
        )
        if self.device != "cpu" or not holds_matrices:
            return
        needed_mib = self.entries * TEXTBOOK_MATRICES[self.suite] * 4 / harness.MIB
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
        y = core(query, key, value)
        grads = torch.autograd.grad(y, leaves, cotangent.transpose(1, 2))
        names = ("grad_query", "grad_key", "grad_value")
        return {"y": y.detach(), **dict(zip(names, grads, strict=True))}

    def _run_block(self, module: nn.Module, x: Tensor, cotangent: Tensor) -> Outputs:
        parameters = list(module.parameters())
        y = module(x)
        if self.suite == BLOCK_TRAINING:
            found = {"y": y.detach()}
            grads = torch.autograd.grad(y, [x, *parameters], cotangent)
        else:
            (slope,) = torch.autograd.grad((y * cotangent).sum(), x, create_graph=True)
            found = {"y": y.detach(), "slope": slope.detach()}
            penalty = slope.to(functional.accumulation_dtype(slope.dtype)).square().sum()
            grads = torch.autograd.grad(penalty, [x, *parameters])
        # All modules have the same parameters, some in another order: told apart by what they are.
        names = ["grad_x", *_parameter_names(module)]
        return {**found, **dict(zip(names, grads, strict=True))}


def _is_per_sample(name: str) -> bool:
    return not name.startswith("grad_parameter_")


def _parameter_names(module: nn.Module) -> list[str]:
    """Return ours for theirs: BigGAN's names and ours for the same weights."""
    same = {"query": "theta", "key": "phi", "value": "g", "out": "o"}
    found = []
    for name, _ in module.named_parameters():
        first = name.split(".")[0]
        found.append(f"grad_parameter_{same.get(first, first)}")
    return found


def _ours(backend: str) -> baselines.Core:
    return lambda query, key, value: functional.attention(query, key, value, backend=backend)


def _core(contender: str) -> baselines.Core:
    if contender == "textbook compiled":
        return baselines.textbook_compiled()
    cores: dict[str, Callable[[], baselines.Core]] = {
        "textbook": lambda: baselines.textbook_attention,
        "SDPA": lambda: baselines.sdpa,
        "SDPA padded": lambda: baselines.sdpa_padded,
        "FlexAttention": baselines.flex_attention,
    }
    return cores[contender]()


def _oracle(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the reference's result, by blocks of queries that are recomputed in backward."""
    blocks: list[Tensor] = [
        checkpoint(reference.attention, block, key, value, 1.0, use_reentrant=False)
        for block in torch.split(query, 1024, dim=1)
    ]
    return torch.cat(blocks, dim=1)


def make_cases(
    device: str,
    *,
    quick: bool = False,
    backends: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    peer: Path | None = None,
) -> list[AttentionCase]:
    """Return every case for a device, the most telling shapes first."""
    if quick:
        grid = [(shape, dtype) for dtype in dtypes or ("float32",) for shape in QUICK_SHAPES]
        pools: tuple[int, ...] = (2,)
    elif device == "cuda":
        grid = [(shape, dtype) for shape in CUDA_SHAPES for dtype in dtypes or ("bfloat16",)]
        if not dtypes:
            grid += [(shape, "float32") for shape in CUDA_FLOAT32_SHAPES]
        pools = (2, 1)
    else:
        grid = [(shape, dtype) for shape in CPU_SHAPES for dtype in dtypes or ("float32", "bfloat16")]
        pools = (2, 1)
    cases = [
        AttentionCase(suite, shape, pool_size, dtype, device, tuple(backends), peer)
        for pool_size in pools
        for shape, dtype in grid
        for suite in SUITES
    ]
    # What a time budget should reach first: pooled before unpooled, half precision's blocks last of each.
    cases.sort(key=lambda case: (case.pool_size == 1, device == "cpu" and case.is_half and not case.is_core))
    if device == "cpu" and not quick:
        reason = "needs several GB at this size, left to --full"
        cases += [
            AttentionCase(suite, MEMORY_SHAPE, 1, "float32", device, ("auto",), None, reason)
            for suite in (CORE_TRAINING, BLOCK_TRAINING)
        ]
    return cases


def reason_to_skip(case: AttentionCase) -> str:
    """Return why the default settings leave a case out, empty if they do not."""
    work = case.entries * WORK[case.suite] * (HALF_PRECISION_WORK if case.is_half else 1.0)
    if case.device != "cpu" or case.only_ours or work <= CPU_DEFAULT_WORK:
        return ""
    return "minutes on few cores, left to --full"


def measure_rates() -> dict[str, float]:
    """Return what this GPU reaches: bytes copied, matrix FLOPs and exponentials, each in a second.

    What cannot be measured, or for exponentials is not told by nvidia-smi, is not among them.
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
    for name, run in list(runs.items()):
        try:
            run()
        except RuntimeError as error:  # torch's, where the switch of TF32 was set in its newer way
            print(f"No rate of {name}: {harness.reason_of(error)}")
            del runs[name]
    times_s = {
        name: timing.median_ms() / 1e3
        for name, timing in harness.time_contenders(runs, "cuda", settings).items()
        if timing.status == "ok"
    }
    return make_rates(times_s, size, source.numel(), harness.nvidia_smi("clocks.max.sm"))


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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_attention", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="two small shapes, under a minute")
    parser.add_argument(
        "--full", action="store_true", help="also the cases that take minutes and many GB each"
    )
    parser.add_argument("--out", type=Path, help="the JSON file; Markdown and plots are written beside it")
    parser.add_argument("--peer", type=Path, help="a checkout of BigGAN-PyTorch")
    parser.add_argument(
        "--backends", nargs="+", default=(), help='ours to time, "auto" or names; all by default'
    )
    parser.add_argument("--dtypes", nargs="+", default=(), choices=tuple(DTYPES))
    parser.add_argument("--only", type=re.compile, help='regular expression on "suite | case"')
    parser.add_argument("--minutes", type=float, help="start no case after so long")
    parser.add_argument("--graphs", action="store_true", help="also time CUDA graphs")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here.")
        return 2
    for name in options.backends:
        functional.check_block_backend(name)
    cases = make_cases(
        options.device,
        quick=options.quick,
        backends=options.backends,
        dtypes=options.dtypes,
        peer=options.peer.resolve() if options.peer else None,
    )
    if options.only:
        cases = [case for case in cases if options.only.search(f"{case.suite} | {case.name}")]
    if options.device == "cuda":
        # The float64 check of float32 cases means float32; torch's default for matmul is left alone.
        torch.backends.cudnn.allow_tf32 = False
    default_out = harness.ROOT / "benchmarks" / "results" / f"attention_{options.device}.json"
    results = harness.Results(options.out or default_out, options.device)
    settings = Settings(
        max_rounds=5 if options.quick else 15,
        target_s=0.3 if options.quick else 1.0,
        memory=not options.no_memory,
        graphs=options.graphs,
    )
    rates = None
    if options.device == "cuda":
        rates = measure_rates()
        results.set_rates(rates, FLOAT32_NOTE)
    kept: list[Case] = []
    for case in cases:
        if options.full:
            kept.append(replace(case, only_ours=""))
        elif reason := reason_to_skip(case):
            results.add(harness.skipped_rows(case, reason))
        else:
            kept.append(case)
    minutes = options.minutes
    if minutes is None:
        minutes = CPU_DEFAULT_MINUTES if options.device == "cpu" and not options.full else math.inf
    fault = harness.run_cases(kept, results, settings, rates=rates, budget_s=minutes * 60)
    if fault:
        print(fault)
    else:
        results.finish()
    for path in (results.path, *harness.write_report(results)):
        print(f"Wrote {path}")
    failed = harness.any_wrong(results.rows) or harness.any_of_ours_failed(results.rows)
    return 1 if fault or failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
