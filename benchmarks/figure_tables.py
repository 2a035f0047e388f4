"""Tables and numbers of README and docs, one section a suite, and the names that pages cite them by."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from functools import partial

from benchmarks.records import (
    FREED,
    cases,
    digits,
    exponent,
    fraction,
    last_with,
    pair,
    percents,
    record,
    span,
    table,
    values,
)
from benchmarks.report import Row

# Attention

POOLED_64 = r"64x64 pooled float32"
CORE, BLOCK, R1 = "core forward+backward", "block forward+backward", "block R1"


def attention_share(suite: str, case: str = POOLED_64) -> str:
    """Return our share of the textbook's peak memory."""
    ours, textbook = (
        values("attention", suite, case, who, "peak_mib", FREED[:1]) for who in ("ours", "textbook")
    )
    return fraction(ours, textbook)


def attention_table(suite: str) -> str:
    """Return times and memory of every case."""
    of = partial(pair, "attention", suite)
    contenders = ("ours", "SDPA", *(["SDPA padded"] if suite != R1 else []))
    rows = []
    for case in dict.fromkeys(case for state in FREED for case in cases("attention", suite, state)):
        n, c, side, pooling, dtype = case.split()
        title = f"{n[1:]}, {c[1:]}, {side.split('x')[0]}{', unpooled' if pooling == 'unpooled' else ''}"
        served = next(found[case] for state in FREED if case in (found := cases("attention", suite, state)))
        rows.append(
            [
                title,
                dtype,
                of(case, "textbook", "time_ms"),
                *(of(case, who) for who in contenders),
                *(f"{served[who]['peak_mib']:,.0f}" for who in ("textbook", "ours")),
                served["ours"]["served_by"],
            ]
        )
    heads = ["N, C, side", "dtype", "textbook ms", *contenders, "textbook MiB", "ours MiB", "served by"]
    return table(heads, rows, left=2)


# Spectral norm

SN, SN_CALL = "D forward+backward", "the call alone"
SN_TITLES = {
    "without SN": "without SN",
    "ours: shared": "**`shared_spectral_norm`**",
    "ours: per layer": "these layers without sharing",
    "torch parametrizations.spectral_norm": "`torch.nn.utils.parametrizations.spectral_norm`",
    "torch nn.utils.spectral_norm": "`torch.nn.utils.spectral_norm`",
    "BigGAN-PyTorch": "BigGAN-PyTorch",
}
TORCH_SN = tuple(SN_TITLES)[3:5]


def of_torch_sn(case: str = "") -> list[float]:
    """Return the ratios of both of torch's forms."""
    return [ratio for who in TORCH_SN for ratio in values("spectral_norm", SN, case, who)]


def sn_table() -> str:
    """Return the ratios of D with and without SN, and the time of the weights alone."""
    columns = [
        f"D 128x128 width 64 {layout} batch {n}" for layout in ("NCHW", "channels_last") for n in (8, 2)
    ]
    call = cases("spectral_norm", SN_CALL)["D 128x128 width 64 NCHW"]
    rows = []
    for who, title in SN_TITLES.items():
        column = "time_ms" if who == "without SN" else "time_ratio"
        cells = [pair("spectral_norm", SN, case, who, column) for case in columns]
        cells = [f"{cell} ms" if who == "without SN" else cell for cell in cells]
        rows.append([title, *cells, f"{call[who]['time_ms']:.0f} ms" if who in call else ""])
    heads = ["", *(case.removeprefix("D 128x128 width 64 ").replace(" b", ", b") for case in columns)]
    return table([*heads, "the weights alone"], rows)


# Conditional batch norm

NORM, NORM_RELU, MAPS_OF_G = "norm", "norm and ReLU", "norm and ReLU, maps of G"


def norm_ratios(contender: str, *suites: str, case: str = "") -> list[float]:
    """Return ratios to batch norm."""
    return [ratio for suite in suites for ratio in values("conditional_norm", suite, case, contender)]


def norm_table() -> str:
    """Return times relative to batch norm at every map."""
    rows = []
    for suite in (NORM, NORM_RELU, MAPS_OF_G):
        for case in cases("conditional_norm", suite):
            shape, dtype, layout = case.split()
            of = partial(pair, "conditional_norm", suite, case)
            ratios = [of(who) for who in ("ours", "textbook", "BigGAN-PyTorch")]
            what = "norm" if suite == NORM else "norm, ReLU"
            rows.append([shape, f"{dtype}, {layout}", what, of("nn.BatchNorm2d", "time_ms"), *ratios])
    heads = ["map", "", "", "`nn.BatchNorm2d` ms", "**ours**", "textbook", "BigGAN-PyTorch"]
    return table(heads, rows, left=3)


def norm_memory(contender: str) -> str:
    """Return the peak memory of the rows with ReLU relative to another contender's."""
    of = partial(values, "conditional_norm", NORM_RELU, "")
    ours, theirs = of("ours", "peak_mib"), of(contender, "peak_mib")
    return span([mine / other for mine, other in zip(ours, theirs, strict=True)], ".1f")


# Convolutions that resample


def speed_ups(suite: str, case: str) -> list[float]:
    """Return how many times faster than the two operations."""
    return [1 / ratio for ratio in values("resampling", suite, case, "ours")]


def resampling_table() -> str:
    """Return how many times faster each layer of G and D is."""
    columns = [("3x3", "float32"), ("3x3", "bfloat16"), ("1x1", "float32")]
    layers: dict[str, list[str]] = {}
    for kernel, dtype in columns:
        suite = f"{kernel} convolution"
        for case in cases("resampling", suite, "returned"):
            name, sizes, channels, *rest = case.split()
            if rest != ["N4", dtype]:
                continue
            layer = layers.setdefault(f"{name} {sizes.replace('->', ' to ')}", [])
            if kernel == "3x3" and not layer:
                layer.append(f"{channels[1:].replace('->', ' to ')}")
            elif kernel == "1x1" and channels[1:].replace("->", " to ") != layer[0]:
                layer[0] += f" (1x1: {channels[1:].replace('->', ' to ')})"
            numbers = [cases("resampling", suite, state).get(case, {}).get("ours", {}) for state in FREED]
            layer.append(
                "\u00a0/\u00a0".join(f"{1 / row['time_ratio']:.1f}" if row else "–" for row in numbers)
            )
    heads = ["layer", "channels", *(f"{kernel}, {dtype}" for kernel, dtype in columns)]
    return table(heads, ([name, *cells] for name, cells in layers.items()), left=2)


# The training step

STEP, APART, BY_SIZE, LOOP = "step", "step, in separate processes", "step, by size", "loop"
DEMO = "demo's networks, batch 32"
SAGAN_128 = "batch 4, 128 pixels, width 64"
STEP_CONTENDERS = ("ours", "textbook", "BigGAN-PyTorch", "BigGAN-PyTorch toggled")


def apart(contender: str, column: str) -> float:
    """Return a figure of the step in separate processes."""
    number: float = cases("step", APART)[SAGAN_128][contender][column]
    return number


def step_runs(case: str, contender: str, column: str, suite: str = STEP) -> list[float]:
    """Return a column of a contender over all runs of the step in one process, or of another suite."""
    return [
        found["contenders"][contender][column]
        for run in record("step_cpu")["runs"]
        for found in run["cases"]
        if (found["suite"], found["case"]) == (suite, case)
        and found["contenders"].get(contender, {}).get(column) is not None
    ]


def step_table() -> str:
    """Return time, rate and peak memory of the step."""
    in_one = {"float32": SAGAN_128, "bfloat16 autocast": f"{SAGAN_128}, bfloat16"}
    rows = [
        [
            "float32, in separate processes",
            *(f"{apart(who, 'time_ms') / 1000:.2f} s" for who in STEP_CONTENDERS),
        ],
        ["images a second", *(f"{apart(who, 'images_per_s'):.2f}" for who in STEP_CONTENDERS)],
    ]
    for dtype, case in in_one.items():
        seconds = [[ms / 1000 for ms in step_runs(case, who, "time_ms")] for who in STEP_CONTENDERS]
        rows.append([f"{dtype}, all in one process", *(span(each, ".2f", " s") for each in seconds)])
    for dtype, case in in_one.items():
        peaks = [step_runs(case, who, "peak_mib") for who in STEP_CONTENDERS]
        title = f"peak memory beyond weights and images, {dtype}"
        rows.append([title, *(span(each, ",.0f", " MiB") for each in peaks)])
    return table(["", "ours", "textbook", "BigGAN-PyTorch", "toggled"], rows)


def checkpointed(case: str) -> str:
    """Return a row's time and memory without and with checkpointing."""
    row = last_with("step", STEP, case, "ours checkpointed")
    plain, saved = row["ours"], row["ours checkpointed"]
    times = [each["time_ms"] / 1000 for each in (plain, saved)]
    return (
        f"{times[0]:.2f} s, **{times[1]:.2f} s** checkpointed ({times[1] / times[0]:.2f}x) | "
        f"{plain['peak_mib']:,.0f} MiB, **{saved['peak_mib']:,.0f} MiB**"
    )


def by_size(pattern: str) -> str:
    """Return our share of the textbook's time at some sizes."""
    return span(values("step", BY_SIZE, pattern, "ours", freed=FREED[:1]))


# Data, evaluation, hostile input


def data_table() -> str:
    """Return the rates of ``prepare``."""
    titles = {
        "Pillow alone": "Pillow alone: decode, crop, resize",
        "ours: folder": "from a folder",
        "ours: tars": "from tars",
        "ours: parquet": "from parquet",
    }
    (row,) = cases("data", "prepare").values()
    alone = row["Pillow alone"]["images_per_s"]
    rates = {title: row[who]["images_per_s"] for who, title in titles.items()}
    heads = ["`prepare`", "images/s", "of Pillow alone"]
    return table(heads, ([title, f"{rate:.0f}", f"{rate / alone:.2f}"] for title, rate in rates.items()))


def data_rate(suite: str, contender: str) -> str:
    """Return images a second, to two digits."""
    (row,) = cases("data", suite).values()
    return f"{float(format(row[contender]['images_per_s'], '.2g')):,.0f}"


def evaluation_table() -> str:
    """Return how far the metrics are from independent implementations."""
    rows = []
    for suite in dict.fromkeys(
        case["suite"] for run in record("evaluation_cpu")["runs"] for case in run["cases"]
    ):
        for case, contenders in cases("evaluation", suite).items():
            for who, row in contenders.items():
                if "difference" in row:
                    rows.append([f"{suite}, {case}", who, exponent(row["difference"])])
    return table(["figure", "against", "difference"], rows, left=2)


def memory_runs() -> dict[str, dict[str, Row]]:
    """Return the measured and the estimated memory of each run."""
    return cases("memory", "memory of a run")


def memory_ratios() -> list[float]:
    """Return the estimates as shares of what was measured."""
    return [rows["ours: estimate"]["process_ratio"] for rows in memory_runs().values()]


def memory_table() -> str:
    """Return estimate and measurement of each run."""
    rows = [
        [
            case,
            f"{rows['ours: estimate']['process_mib']:,.0f} MiB",
            f"{rows['measured']['process_mib']:,.0f} MiB",
            f"{rows['ours: estimate']['process_ratio']:.2f}",
        ]
        for case, rows in memory_runs().items()
    ]
    return table(["run", "estimate", "measured peak", "ratio"], rows)


def intra_fid_table() -> str:
    """Return the seconds that intra-FID takes."""
    rows = [
        [
            case.split("against ")[1].split(" reals")[0],
            *(f"{digits(row['all_classes_s'])} s" for row in found.values()),
        ]
        for case, found in cases("evaluation", "intra-FID").items()
    ]
    return table(["real images in a class", "ours", "direct, eigenvalues", "direct, `sqrtm`"], rows)


OUTCOMES = ("right", "clear", "undetectable", "unclear", "wrong", "hung")


def campaign(name: str) -> tuple[int, list[int]]:
    """Return the cases of a campaign over all its runs, and how many had each outcome."""
    runs = [run for title, run in record("fuzz").items() if title.split(",")[0] == name]
    counts = [sum(run["counts"].get(outcome, 0) for run in runs) for outcome in OUTCOMES]
    return sum(run["cases"] for run in runs), counts


def campaigns_table() -> str:
    """Return the outcomes of the campaigns of hostile input."""
    rows = []
    for name in ("calls", "contexts", "files", "kills"):
        number, counts = campaign(name)
        rows.append([name, f"{number:,}", *(f"{count:,}" for count in counts)])
    return table(["campaign", "cases", *OUTCOMES], rows)


# Numerics

GOLDEN_ROWS = {
    "`attention_random_u`": "attention_output_u_and_gradients_agree[random]",
    "`attention_converged_u`": "attention_output_u_and_gradients_agree[converged]",
    **{
        f"`spectral_norm_{kind}_{start}_u`": f"spectral_norm_outputs_and_u_agree[{kind}-{start}]"
        for kind in ("conv", "linear", "embedding")
        for start in ("random", "converged")
    },
    "`conditional_batch_norm`": "conditional_batch_norm_agrees_in_evaluation_and_in_training",
}
CONVERTED = "tests/examples/test_convert_networks.py"
RELEASED_ROWS = [
    ("G's image, training", "TestGenerator", "y_train"),
    ("G's image, evaluation", "TestGenerator", "y_eval"),
    ("G's u after one call, worst of 21 layers", "TestGenerator", "/u$"),
    ("D's logits, real and fake, no update of u", "TestDiscriminator.*gradient", "logits"),
    ("hinge loss of D", "TestDiscriminator.*gradient", "d_loss"),
    ("hinge loss of G", "TestDiscriminator.*gradient", "g_loss"),
    ("gradients of D's loss, worst of 42", "TestDiscriminator.*gradient", "model/"),
    ("D's logits on real from random u, with update", "TestDiscriminator.*frozen", "logits_real"),
    ("D's logits on fake after it, no update", "TestDiscriminator.*frozen", "logits_fake"),
    ("D's u after the updating call, worst of 23 layers", "TestDiscriminator.*frozen", "/u$"),
]
PEER_TITLES = {
    "biggan_pytorch_sagan": "BigGAN-PyTorch, SAGAN, 128 pixels",
    "biggan_pytorch_biggan": "BigGAN-PyTorch, shared embedding, hierarchical latents, 128",
    "biggan_pytorch_mybn": "BigGAN-PyTorch with its own batch norm (`mybn`), 32 (a)",
    "studiogan_128": "PyTorch-StudioGAN, 128",
    "studiogan_32": "PyTorch-StudioGAN, 32",
    "studiogan_biggan_64": "PyTorch-StudioGAN, its BigGAN, 64",
    "mimicry_128": "mimicry, 128",
    "mimicry_32": "mimicry, 32",
    "mmgeneration_128": "mmgeneration, 128 (b)",
    "mmgeneration_32": "mmgeneration, 32 (b)",
    "mmgeneration_32_relu_in_place": "mmgeneration, 32, ReLU in place",
    "mmgeneration_128_later_attention": "mmgeneration, 128, attention after a later block of D (c)",
    "heykeetae": "heykeetae, our layers in its networks, 64 (d)",
    "huggingface": "HuggingFace's BigGAN, our layers in its network, 32",
    "voletiv_128": "voletiv/self-attention-GAN-pytorch, 128",
    "sngan_projection_128": "sngan_projection (Chainer), 128",
}


def errors(test: str, what: str) -> list[float]:
    """Return the errors of all tests and comparisons that match two regular expressions."""
    return [
        error
        for name, found in record("numerics")["parity"].items()
        if re.search(test, name)
        for title, error in found.items()
        if re.search(what, title)
    ]


def worst(test: str, what: str = "") -> str:
    """Return the largest error, empty where there is none."""
    return exponent(max(found)) if (found := errors(test, what)) else ""


def golden_table() -> str:
    """Return the layers' errors against the released code."""
    rows = []
    for title, test in GOLDEN_ROWS.items():
        of = partial(worst, f"test_golden.*{re.escape(test)}$")
        cells = [of("^y"), of("second y"), of("^u"), of("^grad x"), of("^grad (?!x)")]
        rows.append([title, *cells])
    return table(["file", "output", "2nd call", "u after", "grad. of x", "grad. of parameters"], rows)


def released_table() -> str:
    """Return the whole networks' errors against the released code."""
    return table(
        ["what", "error"],
        ([title, worst(f"{CONVERTED}.*{test}", what)] for title, test, what in RELEASED_ROWS),
    )


def peers_table() -> str:
    """Return the errors of whole networks against other code bases."""
    rows = [
        [
            title,
            *(worst(f"(peer|takes).*{name}(\\]|s_weights)", what) for what in ("images", "logits", "losses")),
        ]
        for name, title in PEER_TITLES.items()
    ]
    return table(["code base", "images", "logits", "losses"], rows)


def half_table() -> str:
    """Return the errors of attention in half precision."""
    rows = [
        [
            row["dtype"],
            f"{row['std']}",
            f"{row['largest_logit']:.0f}",
            f"{row['logit_error']:.2g}",
            *(f"{100 * row[name]:.2g}%" for name in ("half_error", "our_error")),
        ]
        for row in record("numerics")["half_precision"]
    ]
    errors = (
        "error of a logit, half throughout",
        "error of the output, half throughout",
        "error of the output, this library",
    )
    return table(["dtype", "std of the logits", "largest logit", *errors], rows)


def sigma_table() -> str:
    """Return how fast the estimate of sigma gets near."""
    rows = record("numerics")["sigma"]
    cells = (
        [f"{row['channels']} to {row['channels']}, 3x3", *(f"{x:.3f}" for x in row["ratios"].values())]
        for row in rows
    )
    return table(["iterations", *rows[0]["ratios"]], cells)


def attention_mib(suite: str, case: str, contender: str) -> str:
    """Return the peak memory of a contender."""
    return span(values("attention", suite, case, contender, "peak_mib", FREED[:1]), ",.0f", " MiB")


def resampling_mib(network: str) -> str:
    """Return the peak memory of a network in our form and the textbook's."""
    ours, textbook = (
        max(values("resampling", "whole network", f"{network}.*N4 float32$", who, "peak_mib"))
        for who in ("ours", "textbook")
    )
    return f"{ours:.0f} MiB instead of {textbook:.0f}"


def step_memory_saved(contender: str) -> str:
    """Return how much less memory our step takes than another."""
    ours, theirs = (max(step_runs(SAGAN_128, who, "peak_mib")) for who in ("ours", contender))
    return f"{100 * (1 - ours / theirs):.0f}%"


def speed_ups_in_one_process(contender: str) -> list[float]:
    """Return how many times faster than another our step is, in every run that has both."""
    rows = [
        found["contenders"]
        for run in record("step_cpu")["runs"]
        for found in run["cases"]
        if (found["suite"], found["case"]) == (STEP, SAGAN_128) and contender in found["contenders"]
    ]
    return [row[contender]["time_ms"] / row["ours"]["time_ms"] for row in rows]


def compiled_s(contender: str) -> float:
    """Return the seconds of a step in the run that has the compiled one."""
    seconds: float = last_with("step", STEP, SAGAN_128, "ours compiled")[contender]["time_ms"] / 1000
    return seconds


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
