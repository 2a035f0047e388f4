"""Compile every configuration of the Triton kernels without a GPU, and report what each needs of a chip.

    python -m benchmarks.kernel_resources            # all, writes results/kernel_resources.json and .md
    python -m benchmarks.kernel_resources --page     # only the .md, from the JSON
    python -m benchmarks.kernel_resources --check --arch 90 --only 'forward .*bf16'

A kernel file is measured if ``KERNEL_MODULES`` names it and it has ``compile_jobs()``, which yields (kernel, signature,
constexprs, tile with num_warps and num_stages, label). A type that ends in ":16" is a pointer or number known to be a
multiple of 16; pointers always are, as torch allocates them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "kernel_resources.json"
PAGE = RESULTS.with_suffix(".md")
COMMAND = "python -m benchmarks.kernel_resources"
KERNEL_MODULES = (
    "sagan_layers.attention.triton_launch",
    "sagan_layers.attention.fused_triton_launch",
    "sagan_layers.conditional_norm.triton_kernels",
)
# These multiply no matrices.
WITHOUT_PRODUCTS = ("sagan_layers.conditional_norm.triton_kernels",)


@dataclass(frozen=True)
class Chip:
    """What one SM has (CUDA C++ programming guide, table of technical specifications)."""

    name: str
    shared_kib_per_block: int
    shared_kib: int
    registers: int = 65536
    warps: int = 64
    blocks: int = 32


CHIPS = {
    80: Chip("A100", 163, 164),
    90: Chip("H100", 227, 228),
    100: Chip("B200", 227, 228),
}


@dataclass(frozen=True)
class Usage:
    """What one configuration needs on one chip."""

    registers: int  # of a thread
    spill_bytes: int  # stack and local memory of a thread; a kernel without arrays has it from spills alone
    shared_bytes: int  # of a block

    def blocks_per_sm(self, chip: Chip, num_warps: int) -> int:
        """Return how many blocks fit on an SM at once."""
        # A warp's registers are allocated in units of 256; the system reserves 1 KiB of shared memory per block.
        registers_per_warp = -(-self.registers * 32 // 256) * 256
        return min(
            chip.blocks,
            chip.warps // num_warps,
            chip.registers // (registers_per_warp * num_warps),
            chip.shared_kib * 1024 // (self.shared_bytes + 1024),
        )


@dataclass(frozen=True)
class Configuration:
    """One configuration of a kernel, and what it needs."""

    module: str  # of the kernel
    kernel: str  # the Triton function's name
    label: str  # names the configuration
    tile: dict[str, int]  # block sizes, warps and stages
    usage: dict[int, Usage]  # by compute capability times ten
    matrix_instructions: dict[str, int]  # families in the machine code for sm_90 with their counts

    def complaints(self) -> list[str]:
        """Return what is wrong with this configuration."""
        found = []
        for arch, usage in self.usage.items():
            limit = CHIPS[arch].shared_kib_per_block * 1024
            if usage.spill_bytes:
                found.append(f"sm_{arch} {self.label}: spills {usage.spill_bytes} bytes a thread")
            if usage.shared_bytes > limit:
                needed = f"needs {usage.shared_bytes} bytes of shared memory, the chip has {limit}"
                found.append(f"sm_{arch} {self.label}: {needed}")
        if 90 in self.usage and not self.matrix_instructions and self.module not in WITHOUT_PRODUCTS:
            found.append(f"sm_90 {self.label}: has no matrix instructions")
        return found

    def occupancy(self, arch: int) -> tuple[int, int]:
        """Return how many blocks, and how many warps, fit on an SM at once."""
        blocks = self.usage[arch].blocks_per_sm(CHIPS[arch], self.tile["num_warps"])
        return blocks, blocks * self.tile["num_warps"]

    def cells(self, arch: int) -> str:
        """Return the cells of the tables on one chip, after the label."""
        usage, (blocks, warps) = self.usage[arch], self.occupancy(arch)
        tile = "x".join(map(str, self.tile.values()))
        matrix = " ".join(f"{name} {count}" for name, count in self.matrix_instructions.items() if arch == 90)
        return f"{tile} | {usage.registers} | {usage.shared_bytes / 1024:.1f} | {blocks} | {warps} | {matrix}"


def source_hashes() -> dict[str, str]:
    """Return the SHA-256 of each file that holds kernels, launchers or what they share."""
    files = sorted(ROOT.glob("sagan_layers/**/*triton_*.py"))
    return {str(file.relative_to(ROOT)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def all_jobs() -> Iterator[tuple[str, Any]]:
    """Yield (module, (kernel, signature, constexprs, tile, label)) for everything that launchers can choose."""
    for name in KERNEL_MODULES:
        for job in importlib.import_module(name).compile_jobs():
            yield name, job


def measure(module: str, label: str, arch: int) -> tuple[Usage, dict[str, int]]:
    """Compile one configuration; return what it needs, and its matrix instructions for sm_90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    job = next(job for name, job in all_jobs() if name == module and job[4] == label)
    kernel, signature, constexprs, tile, _ = job
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.startswith("*") or kind.endswith(":16")
    }
    types = {name: kind.removesuffix(":16") for name, kind in signature.items()}
    source = ASTSource(kernel, types, constexprs, attributes)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    assert compiled.metadata.num_warps == tile.num_warps
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        found = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _output_of("cuobjdump", "-res-usage", cubin))
        code = _output_of("nvdisasm", "-c", cubin) if arch == 90 else ""
    counts = {name: int(number) for name, number in found}
    instructions = Counter(re.findall(r"\b(HGMMA|HMMA|DMMA)\b", code))
    usage = Usage(counts["REG"], counts["STACK"] + counts["LOCAL"], compiled.metadata.shared)
    return usage, dict(sorted(instructions.items()))


def _output_of(tool: str, option: str, cubin: Path) -> str:
    """Return what a tool that comes with Triton prints about machine code."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, option, cubin], check=True, capture_output=True, text=True).stdout


def page(record: dict[str, Any]) -> str:
    """Return the page on what was recorded."""
    found = configurations(record)
    chips = ", ".join(f"sm_{arch} ({chip.name})" for arch, chip in CHIPS.items())
    usages = [usage for each in found for usage in each.usage.values()]
    lines = [
        "# Kernel resources",
        "",
        "What each configuration of the Triton kernels that the launchers can choose needs of a chip. Made by",
        f"`{COMMAND}`, which compiles with Triton {record['triton']} for {chips} and reads the machine code.",
        "**Nothing on this page was run on a GPU**: these are registers and bytes, not times.",
        "",
        f"{len(found)} configurations on {len(CHIPS)} chips; {sum(each.spill_bytes > 0 for each in usages)} of these "
        f"{len(usages)} spill registers.",
        "",
        "- *even*: NCHW feature maps whose sizes are multiples of 16, no masks. *masked*: channels adjacent, any",
        "  sizes.",
        "- A tile is the fields of the kernel file's `Tile` in order; the last two are warps and stages.",
        "- Blocks and warps are the most an SM holds at once, by registers and shared memory.",
        "- HGMMA are Hopper's matrix instructions for a group of four warps, HMMA those of one warp; the number is how",
        "  often each occurs in the code.",
        "",
        "## Summary",
        "",
        "| kernel | chip | configurations | registers | spill bytes | shared KiB | warps/SM |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    kernels: dict[tuple[str, str], list[Configuration]] = {}
    for each in found:
        kernels.setdefault((each.module, each.kernel), []).append(each)
    for (_, kernel), these in kernels.items():
        for arch in CHIPS:
            on_chip = [each.usage[arch] for each in these]
            registers = _range(usage.registers for usage in on_chip)
            spill_bytes = max(usage.spill_bytes for usage in on_chip)
            shared_kib = _range(usage.shared_bytes / 1024 for usage in on_chip)
            warps = _range(each.occupancy(arch)[1] for each in these)
            needs = f"{registers} | {spill_bytes} | {shared_kib} | {warps}"
            lines.append(f"| {_title(kernel)} | sm_{arch} | {len(these)} | {needs} |")
    for module in dict.fromkeys(module for module, _ in kernels):
        lines += ["", f"## {module} on sm_90"]
        for (_, kernel), these in kernels.items():
            if these[0].module == module:
                lines += ["", f"### {_title(kernel)}", ""]
                lines += [
                    _header("configuration"),
                    *(f"| {each.label} | {each.cells(90)} |" for each in these),
                ]
    return "\n".join(lines) + "\n"


def _header(*first: str) -> str:
    names = " | ".join(first)
    columns = "tile | registers | shared KiB | blocks/SM | warps/SM | matrix instructions"
    return f"| {names} | {columns} |\n|{'---|' * (len(first) + 1)}---:|---:|---:|---:|---|"


def _title(kernel: str) -> str:
    return kernel.strip("_").removesuffix("_kernel").replace("_", " ")


def _range(numbers: Iterable[float]) -> str:
    found = [round(number) for number in numbers]
    low, high = min(found), max(found)
    return str(low) if low == high else f"{low} to {high}"


def configurations(record: dict[str, Any]) -> list[Configuration]:
    """Return what a record holds."""
    return [
        Configuration(**{**row, "usage": {int(arch): Usage(*each) for arch, each in row["usage"].items()}})
        for row in record["configurations"]
    ]


def _as_text(found: list[Configuration]) -> str:
    """Return the record as JSON with a line a configuration."""
    import triton

    rows = [
        {**vars(each), "usage": {arch: astuple(usage) for arch, usage in each.usage.items()}}
        for each in found
    ]
    head = json.dumps({"triton": triton.__version__, "sources": source_hashes()}, indent=1)
    lines = ",\n".join(json.dumps(row) for row in rows)
    return f'{head[:-2]},\n "configurations": [\n{lines}\n]}}\n'


def main(arguments: list[str] | None = None) -> int:
    """Compile the selected configurations; return 1 if --check finds something wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, choices=sorted(CHIPS), action="append", help="default: all")
    parser.add_argument("--only", type=re.compile, help='regular expression on "module kernel label"')
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail on spills and what does not fit"
    )
    parser.add_argument("--page", action="store_true", help="compile nothing; write the page from the JSON")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    chosen = parser.parse_args(arguments)
    if chosen.page:
        PAGE.write_text(page(json.loads(RESULTS.read_text())))
        return 0
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("unset TRITON_INTERPRET: interpreted kernels are not compiled")
    jobs = {
        (module, label): (kernel.__name__, asdict(tile))
        for module, (kernel, _, _, tile, label) in all_jobs()
        if chosen.only is None or chosen.only.search(f"{module} {kernel.__name__} {label}")
    }
    if not jobs:
        parser.error("nothing is selected")
    archs = chosen.arch or sorted(CHIPS)
    tasks = [(module, label, arch) for module, label in jobs for arch in archs]
    measured = {}
    with ProcessPoolExecutor(chosen.jobs) as pool:
        for task, result in zip(tasks, pool.map(measure, *zip(*tasks, strict=True)), strict=True):
            measured[task] = result
            print(f"\r{len(measured)} of {len(tasks)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    found = []
    print(_header("configuration", "chip"))
    for (module, label), (kernel, tile) in jobs.items():
        results = {arch: measured[module, label, arch] for arch in archs}
        usage = {arch: result[0] for arch, result in results.items()}
        instructions = results[90][1] if 90 in archs else {}
        found.append(Configuration(module, kernel, label, tile, usage, instructions))
        for arch in archs:
            print(f"| {label} | sm_{arch} | {found[-1].cells(arch)} |")
    complaints = [complaint for each in found for complaint in each.complaints()]
    print("\n".join(complaints), file=sys.stderr, flush=True)
    if chosen.check:
        return int(bool(complaints))
    if chosen.arch or chosen.only:
        print("a selection: nothing written", file=sys.stderr)
        return 0
    text = _as_text(found)
    RESULTS.write_text(text)
    PAGE.write_text(page(json.loads(text)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
