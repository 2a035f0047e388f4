"""The configuration of a run, and the recipes.

A run is one frozen :class:`RunConfig`. A recipe is a function that returns a complete one. Options on the command
line replace single fields. Published results are for ImageNet at 128 pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sagan.contents import found_at, holds_run
from sagan.data import DataConfig
from sagan.errors import UserError, check_at_least, check_choices, shown
from sagan.evaluation.config import TrainingEvaluationConfig
from sagan.io import read_json
from sagan.networks import Mixer, NetworkConfig, map_resolutions
from sagan.schema import conform
from sagan.train.losses import LossName

CONFIG = "config.json"
_SMALLEST_ATTENTION = 8  # height of the smallest feature map that G applies attention to
Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam for both networks.

    Attributes:
        g_lr: learning rate of G.
        d_lr: learning rate of D; a different one makes this the two time-scale update rule (TTUR).
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
    """

    g_lr: float = 1e-4
    d_lr: float = 4e-4
    beta1: float = 0.0
    beta2: float = 0.9
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("g_lr", "d_lr", "eps"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}: expected above 0, got {getattr(self, name)}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise UserError(f"beta1, beta2: expected from 0 to below 1, got {self.beta1}, {self.beta2}")


@dataclass(frozen=True)
class StepConfig:
    """Speed and memory of an iteration. Only sync_batch_norm changes what is computed.

    Attributes:
        channels_last: use the channels-last memory format.
        compile: compile both updates with torch.compile; the first iterations take minutes.
        checkpoint_activations: save only each block's input for backward and recompute the rest: less memory, more
            time. Not together with compile.
        tf32: allow TF32 in float32 products on CUDA (with precision fp32).
        sync_batch_norm: compute G's batch statistics over all processes; the published recipes do not.
    """

    channels_last: bool = True
    compile: bool = False
    checkpoint_activations: bool = False
    tf32: bool = True
    sync_batch_norm: bool = False

    def __post_init__(self) -> None:
        if self.compile and self.checkpoint_activations:
            raise UserError("compile, checkpoint_activations: expected one at most, got both")


@dataclass(frozen=True)
class HealthConfig:
    """How a run reacts to NaNs, collapse and processes that disagree.

    Attributes:
        on_nonfinite: reaction to a NaN or an infinity in a gradient. The update is never applied; "stop" ends the
            run with a diagnosis, "skip" continues.
        most_skipped: iterations in a row that may be skipped before the run stops.
        on_collapse: reaction to a sign of collapse: "warn", "stop" (save a checkpoint and end the run) or "off".
        saturated_d_loss: a mean loss of D below this is a sign of collapse,
        saturated_logs: if it occurs in this many logs in a row.
        least_diversity: smallest diversity of the samples of a class, as a share of that of real images.
        rising_evaluations: evaluations in a row that may become worse.
        check_every: iterations between checks that all processes hold the same weights (each checkpoint checks too).
    """

    on_nonfinite: Literal["stop", "skip"] = "stop"
    most_skipped: int = 100
    on_collapse: Literal["warn", "stop", "off"] = "warn"
    saturated_d_loss: float = 0.01
    saturated_logs: int = 10
    least_diversity: float = 0.05
    rising_evaluations: int = 5
    check_every: int = 1000

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, 1, "most_skipped", "saturated_logs", "rising_evaluations", "check_every")
        if not 0 <= self.least_diversity < 1:
            raise UserError(f"least_diversity: expected from 0 to below 1, got {self.least_diversity}")


@dataclass(frozen=True)
class OutputConfig:
    """What a run writes, and how often.

    Attributes:
        log_every: iterations between logs, one line of metrics.jsonl each.
        sample_every: iterations between sample grids (always of the same latents) and attention maps.
        checkpoint_every: iterations between checkpoints.
        keep_checkpoints: number of latest checkpoints to keep, in addition to the best.
        grid_rows: classes in the grid.
        grid_columns: images of each class in the grid.
        tensorboard: write TensorBoard's files too (extra tensorboard).
        wandb: log to Weights & Biases too (extra wandb): project WANDB_PROJECT; WANDB_MODE=offline stays local.
    """

    log_every: int = 100
    sample_every: int = 1000
    checkpoint_every: int = 5000
    keep_checkpoints: int = 2
    grid_rows: int = 10
    grid_columns: int = 10
    tensorboard: bool = False
    wandb: bool = False

    def __post_init__(self) -> None:
        check_at_least(
            self, 1, *(each.name for each in fields(self) if each.name not in ("tensorboard", "wandb"))
        )


@dataclass(frozen=True)
class RunConfig:
    """One training run.

    Attributes:
        recipe: recipe that sets the other values; the program without arguments lists them.
        data: a prepared set, or the root of an image folder: DATA/train/<class>/*.JPEG or DATA/<class>/*.JPEG.
        out: folder to write the run to.
        iterations: number of updates of G.
        batch_size: images in each update, over all processes and accumulated parts.
        accumulation: number of parts that a batch is split into; their gradients are summed.
        d_steps: updates of D for each update of G.
        loss: "hinge" or "softplus".
        d_vectors_move_in_g_step: also update the power-iteration vectors of D's spectral normalisation in G's
            updates, as BigGAN-PyTorch does; the released code updates them on real batches only.
        ema_decay: decay of the moving average of G's weights; 0 for none.
        ema_start: iteration until which the average is a plain copy.
        precision: "fp32", or autocast to "bf16" or "fp16" (with a gradient scaler).
        device: "auto", "cpu", "cuda", "cuda:1", ...
        seed: seed of weights, latents, labels and the order of the images.
        network: the two networks.
        optimizer: Adam's settings.
        images: how images are read.
        step: speed and memory of an iteration.
        health: reaction to NaNs, collapse and processes that disagree.
        output: what is written, and how often.
        evaluation: what is measured, and how often; it also picks the best checkpoint.
    """

    recipe: str
    data: Path | None = None
    out: Path = Path("runs/sagan")
    iterations: int = 1_000_000
    batch_size: int = 256
    accumulation: int = 1
    d_steps: int = 1
    loss: LossName = "hinge"
    d_vectors_move_in_g_step: bool = False
    ema_decay: float = 0.0
    ema_start: int = 0
    precision: Precision = "fp32"
    device: str = "auto"
    seed: int = 0
    network: NetworkConfig = field(default_factory=NetworkConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    images: DataConfig = field(default_factory=DataConfig)
    step: StepConfig = field(default_factory=StepConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    evaluation: TrainingEvaluationConfig = field(default_factory=TrainingEvaluationConfig)

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, 1, "iterations", "batch_size", "accumulation", "d_steps")
        check_at_least(self, 0, "ema_start", "seed")
        if self.batch_size % self.accumulation:
            raise UserError(
                f"accumulation: expected a divisor of batch_size = {self.batch_size}, got {self.accumulation}"
            )
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay: expected from 0 to below 1, got {self.ema_decay}")
        for name, value in self.by_name().items():
            if isinstance(value, (int, float)) and not -(2**63) <= value < 2**63:  # NaN neither
                raise UserError(f"{name}: expected a finite number of 64 bits, got {shown(value)}")

    def to_dict(self) -> dict[str, Any]:
        """Return nested dictionaries of values that JSON can hold: lists for tuples, strings for paths."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return values

    def by_name(self) -> dict[str, Any]:
        """Return the same values by dotted name, such as ``network.resolution``."""
        return dict(_dotted(self.to_dict()))


def paper() -> RunConfig:
    """The ICML paper: hinge, 1:1 updates, SN in G and D, TTUR, attention at 32x32, no EMA.

    Published: FID 18.28, IS 51.43, intra-FID 83.7 after 1M iterations on 4 GPUs for about two weeks.
    """
    return RunConfig(recipe="paper")


def released_code() -> RunConfig:
    """The released TensorFlow code: the paper with Adam's default beta2, 0.999, and 2M iterations.

    Published: nothing.
    """
    run = paper()
    optimizer = replace(run.optimizer, beta2=0.999)
    return replace(run, recipe="released_code", iterations=2_000_000, optimizer=optimizer)


def best_known() -> RunConfig:
    """The default: BigGAN-PyTorch's SAGAN launch script as mmgeneration trained it.

    Published: FID 12.83, IS 69.5 after 826k of 1M iterations. Differences from the paper: beta2 0.999, epsilon 1e-8
    in SN, torch's batch-norm momentum and unbiased running variance, D's vectors updated in G's updates too, and a
    moving average of G's weights (0.999 from iteration 2000). These choices have not been ablated one by one.
    """
    run = paper()
    network = replace(
        run.network, sn_eps=1e-8, bn_momentum=0.1, last_bn_momentum=0.1, biased_running_var=False
    )
    return replace(
        run,
        recipe="best_known",
        d_vectors_move_in_g_step=True,
        ema_decay=0.999,
        ema_start=2000,
        network=network,
        optimizer=replace(run.optimizer, beta2=0.999),
    )


def sn_on_d_only() -> RunConfig:
    """Paper, figure 3, baseline: SN in D only, equal learning rates, 1:1 updates, no attention.

    Published: unstable; collapses early. The paper does not give the learning rate; this recipe uses 1e-4 for both.
    """
    run = sn_on_gd()
    return replace(run, recipe="sn_on_d_only", network=replace(run.network, g_spectral_norm=False))


def sn_on_gd() -> RunConfig:
    """Paper, figure 3: SN in G and D, equal learning rates, 1:1 updates, no attention.

    Published: degrades from about 260k iterations. The paper does not give the learning rate; this recipe uses 1e-4.
    """
    run = sn_on_gd_ttur()
    return replace(run, recipe="sn_on_gd", optimizer=replace(run.optimizer, d_lr=run.optimizer.g_lr))


def sn_on_gd_ttur() -> RunConfig:
    """Paper, figure 3, and table 1 "no attention": SN in G and D, and TTUR.

    Published: FID 22.96, IS 42.87.
    """
    run = paper()
    return replace(run, recipe="sn_on_gd_ttur", network=replace(run.network, g_attention=(), d_attention=()))


def table_1(mixer: Mixer, resolution: int) -> RunConfig:
    """Paper, table 1: attention, or a residual block with as many parameters, at one feature map of G and D.

    Published, FID / IS: attention 22.98 / 43.15 at 8, 22.14 / 45.94 at 16, 18.28 / 51.43 at 32, 18.65 / 52.52
    at 64; residual 42.13 / 23.17, 22.40 / 44.49, 27.33 / 38.50, 28.82 / 38.96.
    """
    run = paper()
    network = replace(run.network, mixer=mixer, g_attention=(resolution,), d_attention=(resolution,))
    return replace(run, recipe=f"{mixer}_{resolution}", network=network)


def digits() -> RunConfig:
    """The demo: scikit-learn's 1,797 handwritten digits at 32 pixels, minutes on two CPU cores.

    The paper's losses, layers and TTUR with a small width and batch. For the short run: higher learning rates, faster
    running averages, and an EMA for the samples. BigGAN's hierarchical latents keep the samples of a class apart.
    """
    return RunConfig(
        recipe="digits",
        out=Path("runs/demo"),
        iterations=1500,
        batch_size=32,
        ema_decay=0.99,
        ema_start=200,
        network=NetworkConfig(
            resolution=32,
            base_width=16,
            latent_dim=64,
            condition="embedding",
            embedding_dim=32,
            hierarchical_latents=True,
            g_attention=(16,),
            d_attention=(16,),
            bn_momentum=0.1,
            last_bn_momentum=0.1,
            biased_running_var=False,
            sn_eps=1e-8,
        ),
        optimizer=OptimizerConfig(g_lr=4e-4, d_lr=1.6e-3, beta2=0.99),
        output=OutputConfig(log_every=25, sample_every=250, checkpoint_every=500, keep_checkpoints=3),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "best_known": best_known,
    "paper": paper,
    "released_code": released_code,
    "sn_on_d_only": sn_on_d_only,
    "sn_on_gd": sn_on_gd,
    "sn_on_gd_ttur": sn_on_gd_ttur,
    **{f"attention_{size}": partial(table_1, "attention", size) for size in (8, 16, 32, 64)},
    **{f"residual_{size}": partial(table_1, "residual", size) for size in (8, 16, 32, 64)},
    "digits": digits,
}
DEFAULT_RECIPE = "best_known"


def at_resolution(config: RunConfig, resolution: int) -> RunConfig:
    """Return a configuration for images of another resolution.

    Attention stays at its feature maps if they exist there. Otherwise it moves to those of the same share of the image.
    Hierarchical latents become as many more as their equal chunks need.
    """
    network, before = config.network, config.network.resolution
    latents = network.latent_dim
    if network.hierarchical_latents:
        latents += -latents % len(map_resolutions(resolution))

    def moved(maps: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted({max(_SMALLEST_ATTENTION, each * resolution // before) for each in maps}))

    try:
        network = replace(network, resolution=resolution, latent_dim=latents)
    except UserError:  # raised again below if the resolution is the reason
        g_attention, d_attention = moved(network.g_attention), moved(network.d_attention)
        network = replace(
            network,
            resolution=resolution,
            latent_dim=latents,
            g_attention=g_attention,
            d_attention=d_attention,
        )
    return replace(config, network=network)


# By recipe and metric, on ImageNet at 128 pixels: Zhang et al., tables 1 and 2; best_known: mmgeneration's model page.
PUBLISHED: dict[str, dict[str, float]] = {
    "best_known": {"fid": 12.83, "is": 69.5},
    "paper": {"fid": 18.28, "is": 51.43, "intra-fid": 83.7},
    "sn_on_gd_ttur": {"fid": 22.96, "is": 42.87},
    "attention_8": {"fid": 22.98, "is": 43.15},
    "attention_16": {"fid": 22.14, "is": 45.94},
    "attention_32": {"fid": 18.28, "is": 51.43},
    "attention_64": {"fid": 18.65, "is": 52.52},
    "residual_8": {"fid": 42.13, "is": 23.17},
    "residual_16": {"fid": 22.40, "is": 44.49},
    "residual_32": {"fid": 27.33, "is": 38.50},
    "residual_64": {"fid": 28.82, "is": 38.96},
}


# NetworkConfig gained these fields later. Configurations without them mean the defaults.
_ADDED_FIELDS = (
    "g_channels", "d_channels", "d_last_blocks", "d_hidden_channels", "d_relu_before_blocks", "attention_bias",
    "upsampling", "condition", "embedding_dim", "hierarchical_latents", "sn_eps_mode", "sn_iterate_in_evaluation",
    "last_bn_eps",
)  # fmt: skip


def config_from_dict(values: Any, where: str = "") -> RunConfig:
    """Return the configuration that :meth:`RunConfig.to_dict` wrote; :class:`UserError` if it is none."""
    if isinstance(values, dict) and isinstance(values.get("network"), dict):
        added = {name: getattr(NetworkConfig, name) for name in _ADDED_FIELDS}
        values = {**values, "network": {**added, **values["network"]}}
    if isinstance(values, dict) and isinstance(values.get("output"), dict):
        values = {**values, "output": {"wandb": False, **values["output"]}}  # it was added later
    config: RunConfig = conform(values, RunConfig, where)
    return config


def read_config(folder: Path) -> RunConfig:
    """Return the configuration of the run in a folder; :class:`UserError` names its file if it has none."""
    path = folder / CONFIG
    if holds_run(folder) and not path.exists():
        raise UserError(f"found no {CONFIG} in the run's folder {folder}")
    if not path.is_file():
        raise UserError(f"expected the folder of a run with {CONFIG}, got {found_at(folder)}")
    try:
        return config_from_dict(read_json(path), "configuration")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def differences(one: RunConfig, other: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which two configurations differ, by dotted name, with both values."""
    others = other.by_name()
    return {name: (value, others[name]) for name, value in one.by_name().items() if value != others[name]}


def _dotted(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
