"""The figures that README and docs cite, out of the records in ``benchmarks/results``.

A page holds ``<!-- figure: NAME -->text<!-- /figure -->``. ``python -m benchmarks.figures`` writes the texts;
``--check`` exits with 1 where one is not what the records say.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.figure_tables import (
    BLOCK,
    CORE,
    DEMO,
    LOOP,
    MAPS_OF_G,
    NORM,
    NORM_RELU,
    POOLED_64,
    R1,
    SAGAN_128,
    SN,
    apart,
    attention_mib,
    attention_share,
    attention_table,
    by_size,
    campaigns_table,
    checkpointed,
    compiled_s,
    data_rate,
    data_table,
    errors,
    evaluation_table,
    golden_table,
    half_table,
    intra_fid_table,
    memory_ratios,
    memory_table,
    norm_memory,
    norm_ratios,
    norm_table,
    of_torch_sn,
    peers_table,
    released_table,
    resampling_mib,
    resampling_table,
    sigma_table,
    sn_table,
    speed_ups,
    speed_ups_in_one_process,
    step_memory_saved,
    step_runs,
    step_table,
    worst,
)
from benchmarks.records import FREED, percents, span, values
from benchmarks.report import ROOT

MARKER = re.compile(r"<!-- figure: (\S+) -->(.*?)<!-- /figure -->", re.DOTALL)

TEXTS: dict[str, Callable[[], str]] = {
    "attention.time": lambda: span(values("attention", CORE, POOLED_64, "ours", freed=FREED[:1])),
    "attention.time.kept": lambda: span(values("attention", CORE, POOLED_64, "ours", freed=FREED[1:])),
    "attention.memory": lambda: attention_share(CORE),
    "attention.r1.time": lambda: span(values("attention", R1, POOLED_64, "ours", freed=FREED[:1])),
    "attention.r1.time.kept": lambda: span(values("attention", R1, POOLED_64, "ours", freed=FREED[1:])),
    "attention.r1.memory": lambda: attention_share(R1),
    "attention.r1.mib": lambda: attention_mib(R1, "N8 C128 64x64 pooled float32", "ours"),
    "attention.r1.mib.textbook": lambda: attention_mib(R1, "N8 C128 64x64 pooled float32", "textbook"),
    "attention.128.mib": lambda: attention_mib(CORE, "N1 C64 128x128", "ours"),
    "attention.128.mib.textbook": lambda: attention_mib(CORE, "N1 C64 128x128", "textbook"),
    "attention.bfloat16.32": lambda: span(values("attention", CORE, " 32x32 pooled bfloat16", "ours")),
    "attention.bfloat16.16": lambda: span(values("attention", CORE, " (16x16|8x8) .*bfloat16", "ours")),
    "attention.small": lambda: span(values("attention", CORE, " (32x32|16x16|8x8) pooled float32", "ours")),
    "attention.worst": lambda: f"{max(values('attention', BLOCK, '', 'ours')):.2f}",
    "attention.table.core": lambda: attention_table(CORE),
    "attention.table.block": lambda: attention_table(BLOCK),
    "attention.table.r1": lambda: attention_table(R1),
    "sn.ours": lambda: percents(values("spectral_norm", SN, "", "ours: shared")),
    "sn.ours.batch8": lambda: percents(values("spectral_norm", SN, "batch 8", "ours: shared")),
    "sn.ours.batch2": lambda: percents(values("spectral_norm", SN, "batch 2", "ours: shared")),
    "sn.torch": lambda: percents(of_torch_sn()),
    "sn.torch.batch8": lambda: percents(of_torch_sn("batch 8")),
    "sn.torch.batch2": lambda: percents(of_torch_sn("batch 2")),
    "sn.table": sn_table,
    "norm.ours": lambda: span(norm_ratios("ours", NORM, NORM_RELU)),
    "norm.textbook": lambda: span(norm_ratios("textbook", NORM, NORM_RELU)),
    "norm.small": lambda: span(norm_ratios("ours", MAPS_OF_G, case="^4x1024x")),
    "norm.small.textbook": lambda: span(norm_ratios("textbook", MAPS_OF_G, case="^4x1024x")),
    "norm.memory": lambda: norm_memory("nn.BatchNorm2d"),
    "norm.memory.textbook": lambda: norm_memory("textbook"),
    "norm.table": norm_table,
    "resampling.3x3": lambda: span(speed_ups("3x3 convolution", "N4 float32$"), ".1f"),
    "resampling.3x3.median": lambda: f"{statistics.median(speed_ups('3x3 convolution', 'N4 float32$')):.1f}",
    "resampling.g": lambda: span(speed_ups("whole network", "^Generator.*N4 float32$"), ".1f"),
    "resampling.d": lambda: span(speed_ups("whole network", "^Discriminator.*N4 float32$"), ".1f"),
    "resampling.g.mib": lambda: resampling_mib("^Generator"),
    "resampling.d.mib": lambda: resampling_mib("^Discriminator"),
    "resampling.folded.worst": lambda: (
        f"{max(values('resampling', '3x3 convolution', '', 'ours: folded')):.1f}"
    ),
    "resampling.table": resampling_table,
    "step.speed.toggled": lambda: (
        f"{apart('BigGAN-PyTorch toggled', 'time_ms') / apart('ours', 'time_ms'):.1f}"
    ),
    "step.seconds": lambda: f"{apart('ours', 'time_ms') / 1000:.1f} s",
    "step.seconds.toggled": lambda: f"{apart('BigGAN-PyTorch toggled', 'time_ms') / 1000:.1f} s",
    "step.years": lambda: f"{apart('ours', 'time_ms') / 1000 / 4 * 256 * 1e6 / (365.25 * 86400):.1f} years",
    "step.memory.toggled": lambda: step_memory_saved("BigGAN-PyTorch toggled"),
    "step.one_process": lambda: span(speed_ups_in_one_process("BigGAN-PyTorch toggled"), ".1f"),
    "step.small": lambda: by_size("batch 1, 64|batch 4, 32"),
    "step.batch16": lambda: by_size("batch 16, 64"),
    "step.loop": lambda: percents(step_runs(DEMO, "the whole loop", "time_ratio", LOOP), ".1f"),
    "step.checkpointed.16": lambda: checkpointed("batch 16, 128 pixels, width 32"),
    "step.checkpointed.4": lambda: checkpointed(SAGAN_128),
    "step.compiled": lambda: f"{compiled_s('ours compiled'):.2f} s",
    "step.eager": lambda: f"{compiled_s('ours'):.2f} s",
    "step.table": step_table,
    "data.table": data_table,
    "data.fetch": lambda: data_rate("random batches, warm", "ours: packed, fetch"),
    "data.loader": lambda: data_rate("random batches, warm", "ours: packed, loader"),
    "data.process": lambda: data_rate("random batches, warm", "ours: packed, loader of 1 process"),
    "data.map": lambda: data_rate("random batches, warm", "numpy memory map"),
    "data.folder": lambda: data_rate("random batches, warm", "plain ImageFolder loader"),
    "data.fetch.cold": lambda: data_rate("random batches, cold", "ours: packed, fetch"),
    "data.map.cold": lambda: data_rate("random batches, cold", "numpy memory map"),
    "evaluation.table": evaluation_table,
    "evaluation.intra_fid": intra_fid_table,
    "memory.table": memory_table,
    "memory.ratios": lambda: span(memory_ratios(), ".2f"),
    "fuzz.table": campaigns_table,
    "golden.layers": lambda: worst(
        "test_golden.*(attention_output|outputs_and_u|conditional)", "^(y|second y)"
    ),
    "golden.statistics": lambda: worst("test_golden.*conditional", "^(mean|var)$"),
    "golden.iteration": lambda: span(
        [100 * error for error in errors("test_golden", "through the iteration")], ".1f", "%"
    ),
    "golden.iteration.explained": lambda: worst("test_golden.*except_for", "^grad weight$"),
    "golden.table": golden_table,
    "golden.table.networks": released_table,
    "peers.table": peers_table,
    "export.onnx": lambda: worst("test_export.*onnx", "ONNX"),
    "export.onnx.networks": lambda: worst("test_network_export", "ONNX"),
    "export.program": lambda: worst("test_(network_)?export", "torch.export"),
    "half.table": half_table,
    "sigma.table": sigma_table,
}


def pages() -> Iterator[Path]:
    """Return the pages that cite figures."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))


def written(text: str) -> str:
    """Return a page's text with every figure as the records have it.

    Raises:
        LookupError: if a name has no figure.
    """

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TEXTS:
            raise LookupError(f"no figure is called {name!r}: benchmarks/figures.py has {', '.join(TEXTS)}")
        return f"<!-- figure: {name} -->{TEXTS[name]()}<!-- /figure -->"

    return MARKER.sub(replace, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the figures into the pages; return 1 if ``--check`` finds a page that differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page differs")
    options = parser.parse_args(arguments)
    status = 0
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = written(text)
        if new != text:
            print(f"{'Differs' if options.check else 'Wrote'}: {page.relative_to(ROOT)}")
            status = int(options.check)
            if not options.check:
                page.write_text(new, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
