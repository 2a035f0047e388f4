"""Compile every configuration of the Triton kernels without a GPU, and report what each needs of a chip.

    python -m benchmarks.kernel_resources            # all, writes results/kernel_resources.json and the docs' page
    python -m benchmarks.kernel_resources --docs     # only the page, from the JSON
    python -m benchmarks.kernel_resources --check --arch 90 --kernel forward --dtype bf16

A kernel file takes part by being named in ``KERNEL_MODULES`` and having ``compile_jobs()``, which yields
(kernel, signature, constexprs, tile with num_warps and num_stages, label). A type that ends in ":16" stands for a
pointer or number known to be a multiple of 16; pointers always are, as torch allocates them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "kernel_resources.json"
PAGE = ROOT / "docs" / "kernel_resources.md"
COMMAND = "python -m benchmarks.kernel_resources"
# A file that does not exist (yet) is passed over.
KERNEL_MODULES = (
    "sagan_layers.ops.attention_triton",
    "sagan_layers.ops.self_attention_triton",
    "sagan_layers.ops.conditional_norm_triton",
)
# These multiply no matrices.
WITHOUT_PRODUCTS = ("sagan_layers.ops.conditional_norm_triton",)


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
class Row:
    """What one configuration needs on one chip.

    Attributes:
        module: of the kernel.
        label: names the configuration.
        kernel: the Triton function's name.
        arch: compute capability times ten.
        tile: block sizes, warps and stages.
        registers: of a thread.
        spill_bytes: stack and local memory of a thread; kernels without arrays of their own have it from spills.
        shared_bytes: of a block.
        blocks_per_sm: how many fit at once.
        warps_per_sm: the warps of those.
        matrix_instructions: families in the machine code with their counts; sm_90 only.
    """

    module: str
    label: str
    kernel: str
    arch: int
    tile: dict[str, int]
    registers: int
    spill_bytes: int
    shared_bytes: int
    blocks_per_sm: int
    warps_per_sm: int
    matrix_instructions: dict[str, int]

    def complaints(self) -> list[str]:
        """Return what is wrong with this configuration."""
        found = []
        limit = CHIPS[self.arch].shared_kib_per_block * 1024
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes a thread")
        if self.shared_bytes > limit:
            found.append(f"needs {self.shared_bytes} bytes of shared memory, the chip has {limit}")
        if self.arch == 90 and not self.matrix_instructions and self.module not in WITHOUT_PRODUCTS:
            found.append("has no matrix instructions")
        return [f"sm_{self.arch} {self.label}: {what}" for what in found]


def kernel_modules() -> list[str]:
    """Return the kernel modules that exist."""
    return [name for name in KERNEL_MODULES if _source(name).exists()]


def source_hashes() -> dict[str, str]:
    """Return the SHA-256 of each kernel file."""
    return {name: hashlib.sha256(_source(name).read_bytes()).hexdigest() for name in kernel_modules()}


def _source(module: str) -> Path:
    return ROOT / Path(*module.split(".")).with_suffix(".py")


def all_jobs() -> Iterator[tuple[str, Any]]:
    """Yield (module, (kernel, signature, constexprs, tile, label)) for everything that launchers can choose."""
    for name in kernel_modules():
        for job in importlib.import_module(name).compile_jobs():
            yield name, job


def occupancy(chip: Chip, registers: int, shared_bytes: int, num_warps: int) -> int:
    """Return how many blocks fit on an SM at once."""
    # Registers are handed to a warp in 256s; each block takes 1 KiB of shared memory for the system.
    registers_per_warp = -(-registers * 32 // 256) * 256
    return min(
        chip.blocks,
        chip.warps // num_warps,
        chip.registers // (registers_per_warp * num_warps),
        chip.shared_kib * 1024 // (shared_bytes + 1024),
    )


def measure(module: str, job: tuple[Any, ...], arch: int) -> Row:
    """Compile one configuration and read what it needs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature, constexprs, tile, label = job
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.startswith("*") or kind.endswith(":16")
    }
    types = {name: kind.removesuffix(":16") for name, kind in signature.items()}
    source = ASTSource(kernel, types, constexprs, attributes)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage, instructions = _inspect(compiled.asm["cubin"], disassemble=arch == 90)
    warps = compiled.metadata.num_warps
    shared = compiled.metadata.shared
    blocks = occupancy(CHIPS[arch], usage["REG"], shared, warps)
    return Row(
        module,
        label,
        kernel.__name__,
        arch,
        asdict(tile),
        usage["REG"],
        usage["STACK"] + usage["LOCAL"],
        shared,
        blocks,
        blocks * warps,
        instructions,
    )


def _tool(name: str) -> str:
    spec = importlib.util.find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name)


def _inspect(cubin: bytes, disassemble: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Return cuobjdump's resource usage and the counts of matrix instructions."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", str(path)], check=True, capture_output=True, text=True
        ).stdout
        usage = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
        if not disassemble:
            return usage, {}
        code = subprocess.run(
            [_tool("nvdisasm"), "-c", str(path)], check=True, capture_output=True, text=True
        ).stdout
    return usage, dict(sorted(Counter(re.findall(r"\b(HGMMA|HMMA|DMMA)\b", code)).items()))


def markdown(rows: list[Row]) -> str:
    """Return the rows as a table, a line a configuration and chip."""
    lines = [
        "| configuration | chip | tile | registers | spill | shared KiB | blocks/SM | warps/SM | matrix |",
        "|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.label} | sm_{row.arch} | {_tile(row)} | {row.registers} | {row.spill_bytes} "
            f"| {row.shared_bytes / 1024:.1f} | {row.blocks_per_sm} | {row.warps_per_sm} | {_matrix(row)} |"
        )
    return "\n".join(lines)


def _tile(row: Row) -> str:
    return "x".join(str(size) for size in row.tile.values())


def _matrix(row: Row) -> str:
    return " ".join(f"{name} {count}" for name, count in row.matrix_instructions.items())


def page(record: dict[str, Any]) -> str:
    """Return the docs' page on what was recorded."""
    rows = [Row(**row) for row in record["rows"]]
    chips = ", ".join(f"sm_{arch} ({chip.name})" for arch, chip in CHIPS.items())
    spilling = sum(row.spill_bytes > 0 for row in rows)
    lines = [
        "# Kernel resources",
        "",
        "What each configuration of the Triton kernels that the launchers can choose needs of a chip. Made by",
        f"`{COMMAND}`, which compiles with Triton {record['triton']} for {chips} and reads the machine code.",
        "**Nothing on this page was run on a GPU**: these are registers and bytes, not times.",
        "",
        f"{len(rows) // len(CHIPS)} configurations on {len(CHIPS)} chips; {spilling} of these {len(rows)} "
        "spill registers.",
        "",
        "- *even*: NCHW feature maps whose sizes are multiples of 16, no masks. *masked*: channels adjacent, any",
        "  sizes.",
        "- A tile is the fields of the kernel file's `Tile` in order; the last two are warps and stages.",
        "- Blocks and warps are the most an SM holds at once, by registers and shared memory.",
        "- HGMMA are Hopper's matrix instructions for a group of four warps, HMMA those of one warp; how often",
        "  each stands in the code.",
        "",
        "## Summary",
        "",
        "| kernel | chip | configurations | registers | spill bytes | shared KiB | warps/SM |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    kernels = list(dict.fromkeys((row.module, row.kernel) for row in rows))
    for kernel in kernels:
        for arch in CHIPS:
            these = [row for row in rows if (row.module, row.kernel) == kernel and row.arch == arch]
            if these:
                lines.append(
                    f"| {_title(kernel[1])} | sm_{arch} | {len(these)} "
                    f"| {_range(row.registers for row in these)} "
                    f"| {max(row.spill_bytes for row in these)} "
                    f"| {_range(row.shared_bytes / 1024 for row in these)} "
                    f"| {_range(row.warps_per_sm for row in these)} |"
                )
    for module in dict.fromkeys(module for module, _ in kernels):
        path = _source(module).relative_to(ROOT)
        lines += ["", f"## {path.name} on sm_90"]
        for name in (name for other, name in kernels if other == module):
            lines += [
                "",
                f"### {_title(name)}",
                "",
                "| configuration | tile | registers | shared KiB | blocks/SM | warps/SM | matrix instructions |",
                "|---|---|---:|---:|---:|---:|---|",
            ]
            lines += [
                f"| {row.label} | {_tile(row)} | {row.registers} | {row.shared_bytes / 1024:.1f} "
                f"| {row.blocks_per_sm} | {row.warps_per_sm} | {_matrix(row)} |"
                for row in rows
                if row.arch == 90 and (row.module, row.kernel) == (module, name)
            ]
    return "\n".join(lines) + "\n"


def _title(kernel: str) -> str:
    return kernel.strip("_").removesuffix("_kernel").replace("_", " ")


def _range(numbers: Iterable[float]) -> str:
    found = [round(number) for number in numbers]
    low, high = min(found), max(found)
    return str(low) if low == high else f"{low} to {high}"


def _as_text(record: dict[str, Any]) -> str:
    """Return the record as JSON with a line a configuration."""
    rows = ",\n".join(json.dumps(row) for row in record["rows"])
    head = json.dumps({name: value for name, value in record.items() if name != "rows"}, indent=1)
    return f'{head[:-2]},\n "rows": [\n{rows}\n]}}\n'


def _measure_by_label(module: str, label: str, arch: int) -> Row:
    job = next(job for name, job in all_jobs() if name == module and job[4] == label)
    return measure(module, job, arch)


def main(arguments: list[str] | None = None) -> int:
    """Compile the selected configurations; return 1 if --check finds something wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, choices=sorted(CHIPS), action="append", help="default: all")
    parser.add_argument("--kernel", default="", help="only kernels whose module or name contains this")
    parser.add_argument("--dtype", default="", help="only this dtype: bf16, fp16, fp32")
    parser.add_argument("--label", action="append", help="only configurations whose label contains this")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail on spills and what does not fit"
    )
    parser.add_argument("--docs", action="store_true", help="compile nothing; write the page from the JSON")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    chosen = parser.parse_args(arguments)
    if chosen.docs:
        PAGE.write_text(page(json.loads(RESULTS.read_text())))
        return 0
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("unset TRITON_INTERPRET: interpreted kernels are not compiled")
    selected = [
        (module, label, arch)
        for module, (kernel, _, _, _, label) in all_jobs()
        for arch in (chosen.arch or sorted(CHIPS))
        if chosen.kernel in f"{module} {kernel.__name__}"
        and chosen.dtype in label
        and any(part in label for part in chosen.label or [""])
    ]
    if not selected:
        parser.error("nothing is selected")
    rows = []
    with ProcessPoolExecutor(chosen.jobs) as pool:
        for row in pool.map(_measure_by_label, *zip(*selected, strict=True)):
            rows.append(row)
            print(f"\r{len(rows)} of {len(selected)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(markdown(rows), flush=True)
    complaints = [complaint for row in rows for complaint in row.complaints()]
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    if chosen.check:
        return int(bool(complaints))
    if chosen.arch or chosen.kernel or chosen.dtype or chosen.label:
        print("a selection: nothing written", file=sys.stderr)
        return 0
    import triton

    RESULTS.parent.mkdir(exist_ok=True)
    record = {
        "triton": triton.__version__,
        "sources": source_hashes(),
        "rows": [asdict(row) for row in rows],
    }
    RESULTS.write_text(_as_text(record))
    PAGE.write_text(page(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
