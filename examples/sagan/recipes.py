"""A run's whole configuration, and the recipes that make one.

A run is one frozen :class:`RunConfig`. A recipe is a function that returns it complete; what a user changes on
the command line replaces single fields. Published results are of ImageNet at 128 pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sagan.data import DataConfig
from sagan.errors import UserError
from sagan.evaluation.config import TrainingEvaluationConfig
from sagan.networks import NetworkConfig

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam for both networks.

    Attributes:
        g_lr: learning rate of G.
        d_lr: learning rate of D (two time-scale update rule when different).
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
    """How an iteration is computed: speed and memory. What is computed changes with sync_batch_norm alone.

    Attributes:
        channels_last: memory format of weights and feature maps.
        compile: compile both passes with torch.compile; the first iterations take minutes.
        checkpoint_activations: keep each block's input alone for backward, and compute the rest again: less
            memory for more time. Not together with compile.
        tf32: let float32 products on CUDA round their factors to TF32 (in the precision fp32).
        sync_batch_norm: G's batch statistics over all processes; the published recipes do without.
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
    """What a run does about its own faults.

    Attributes:
        on_nonfinite: what happens at a NaN or an infinity in a gradient. The update is never applied; the run
            stops with a diagnosis ("stop"), or goes on ("skip").
        most_skipped: iterations in a row that may be skipped before the run stops nevertheless.
        on_collapse: what happens at a sign of collapse: "warn" says so, "stop" saves and ends the run, "off".
        saturated_d_loss: a mean loss of D below this is a sign,
        saturated_logs: when it is seen in so many logs in a row.
        least_diversity: how little samples of one class may differ, as a share of what real images do.
        rising_evaluations: evaluations in a row that may become worse.
        check_every: iterations between checks that all processes hold the same numbers (with each checkpoint
            they are checked anyway).
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
        for name in ("most_skipped", "saturated_logs", "rising_evaluations", "check_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.least_diversity < 1:
            raise UserError(f"least_diversity: expected from 0 to below 1, got {self.least_diversity}")
        for name, choices in (("on_nonfinite", ("stop", "skip")), ("on_collapse", ("warn", "stop", "off"))):
            if getattr(self, name) not in choices:
                raise UserError(f"{name}: expected one of {choices}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class OutputConfig:
    """What a run writes, and how often (in iterations).

    Attributes:
        log_every: metrics, one line of metrics.jsonl each.
        sample_every: a PNG grid of fixed latents, and one of where G's attention looks.
        checkpoint_every: a checkpoint.
        keep_checkpoints: how many of the last checkpoints stay (the best one stays besides).
        grid_rows: classes in the grid.
        grid_columns: images of each class in the grid.
        tensorboard: write TensorBoard's files too, where it is installed.
    """

    log_every: int = 100
    sample_every: int = 1000
    checkpoint_every: int = 5000
    keep_checkpoints: int = 2
    grid_rows: int = 10
    grid_columns: int = 10
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.name != "tensorboard" and getattr(self, each.name) < 1:
                raise UserError(f"{each.name}: expected at least 1, got {getattr(self, each.name)}")


@dataclass(frozen=True)
class RunConfig:
    """One training run.

    Attributes:
        recipe: name of the recipe that the other values come from; imagenet_sagan.py without arguments lists them.
        data: a set that prepare made, or root of the images: DATA/train/<class>/*.JPEG or DATA/<class>/*.JPEG.
        out: folder that the run writes to.
        iterations: number of updates of G.
        batch_size: images in each update, over all accumulated parts.
        accumulation: parts that a batch is split into; gradients are summed before an update.
        d_steps: updates of D for each update of G.
        loss: "hinge" or "softplus".
        d_vectors_move_in_g_step: whether D's spectral normalisation also moves in G's update, as
            BigGAN-PyTorch's does; the released code's moves on the real batch only.
        ema_decay: decay of the moving average of G's weights; 0 for none.
        ema_start: iteration until which the average is a plain copy.
        precision: "fp32", or autocast to "bf16" or "fp16" (with a gradient scaler).
        device: "auto", "cpu", "cuda", "cuda:1", ...
        seed: of weights, latents, labels and the order of the images.
        network: the two networks.
        optimizer: Adam's settings.
        images: how images are read.
        step: how an iteration is computed.
        health: what the run does about its own faults.
        output: what is written when.
        evaluation: what is measured when; the best checkpoint is kept by it.
    """

    recipe: str
    data: Path | None = None
    out: Path = Path("runs/sagan")
    iterations: int = 1_000_000
    batch_size: int = 256
    accumulation: int = 1
    d_steps: int = 1
    loss: Literal["hinge", "softplus"] = "hinge"
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
        for name in ("iterations", "batch_size", "accumulation", "d_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.batch_size % self.accumulation:
            raise UserError(
                f"accumulation: expected a divisor of batch_size = {self.batch_size}, got {self.accumulation}"
            )
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay: expected from 0 to below 1, got {self.ema_decay}")
        if self.ema_start < 0:
            raise UserError(f"ema_start: expected at least 0, got {self.ema_start}")
        for name, choices in (("loss", ("hinge", "softplus")), ("precision", ("fp32", "bf16", "fp16"))):
            if getattr(self, name) not in choices:
                raise UserError(f"{name}: expected one of {choices}, got {getattr(self, name)!r}")
        if self.seed < 0:
            raise UserError(f"seed: expected at least 0, got {self.seed}")

    def to_dict(self) -> dict[str, Any]:
        """Return nested dictionaries of values that JSON can hold."""
        values: dict[str, Any] = _plain(asdict(self))
        return values


def paper() -> RunConfig:
    """The ICML paper: hinge, 1:1 updates, SN in G and D, TTUR, attention at 32x32, no EMA.

    Published: FID 18.28, IS 51.43, intra-FID 83.7 after 1M iterations on 4 GPUs for about two weeks.
    """
    return RunConfig(recipe="paper")


def released_code() -> RunConfig:
    """The released TensorFlow code: the paper with Adam's beta2 left at 0.999 and 2M steps.

    Published: nothing.
    """
    run = paper()
    return replace(
        run,
        recipe="released_code",
        iterations=2_000_000,
        optimizer=replace(run.optimizer, beta2=0.999),
    )


def best_known() -> RunConfig:
    """The SAGAN launch script of BigGAN-PyTorch as mmgeneration trained it: the default.

    Published: FID 12.83, IS 69.5 after 826k of 1M iterations. Against the paper: beta2 0.999, epsilon 1e-8 in
    SN, torch's batch-norm momentum and unbiased running variance, D's vectors move in G's update too, and an
    average of G's weights (0.999 from iteration 2000). These choices were not ablated one by one.
    """
    run = paper()
    return replace(
        run,
        recipe="best_known",
        d_vectors_move_in_g_step=True,
        ema_decay=0.999,
        ema_start=2000,
        network=replace(
            run.network, sn_eps=1e-8, bn_momentum=0.1, last_bn_momentum=0.1, biased_running_var=False
        ),
        optimizer=replace(run.optimizer, beta2=0.999),
    )


def sn_on_d_only() -> RunConfig:
    """Paper, figure 3, baseline: SN in D alone, equal learning rates, 1:1 updates, no attention.

    Published: unstable; collapses early. The paper does not give the learning rate; 1e-4 is taken for both.
    """
    run = sn_on_gd()
    return replace(run, recipe="sn_on_d_only", network=replace(run.network, g_spectral_norm=False))


def sn_on_gd() -> RunConfig:
    """Paper, figure 3: SN in G and D, equal learning rates, 1:1 updates, no attention.

    Published: degrades from about 260k iterations. The paper does not give the learning rate; 1e-4 is taken.
    """
    run = sn_on_gd_ttur()
    return replace(run, recipe="sn_on_gd", optimizer=replace(run.optimizer, d_lr=run.optimizer.g_lr))


def sn_on_gd_ttur() -> RunConfig:
    """Paper, figure 3, and table 1 "no attention": SN in G and D, and TTUR.

    Published: FID 22.96, IS 42.87.
    """
    run = paper()
    return replace(run, recipe="sn_on_gd_ttur", network=replace(run.network, g_attention=(), d_attention=()))


def table_1(mixer: Literal["attention", "residual"], resolution: int) -> RunConfig:
    """Paper, table 1: attention, or a residual block of equal parameter count, at one feature map of G and D.

    Published, FID / IS: attention 22.98 / 43.15 at 8, 22.14 / 45.94 at 16, 18.28 / 51.43 at 32, 18.65 / 52.52
    at 64; residual 42.13 / 23.17, 22.40 / 44.49, 27.33 / 38.50, 28.82 / 38.96.

    Args:
        mixer: "attention" or "residual".
        resolution: 8, 16, 32 or 64.
    """
    run = paper()
    network = replace(run.network, mixer=mixer, g_attention=(resolution,), d_attention=(resolution,))
    return replace(run, recipe=f"{mixer}_{resolution}", network=network)


def digits() -> RunConfig:
    """The demo: scikit-learn's 1,797 handwritten digits at 32 pixels, minutes on two CPU cores.

    The paper's losses, layers and TTUR at a small width, batch and a shorter horizon: higher learning rates,
    faster running averages, an EMA for the samples.
    """
    return RunConfig(
        recipe="digits",
        out=Path("runs/demo"),
        iterations=1200,
        batch_size=32,
        ema_decay=0.99,
        ema_start=200,
        network=NetworkConfig(
            resolution=32,
            base_width=16,
            latent_dim=64,
            g_attention=(16,),
            d_attention=(16,),
            bn_momentum=0.1,
            last_bn_momentum=0.1,
            biased_running_var=False,
            sn_eps=1e-8,
        ),
        optimizer=OptimizerConfig(g_lr=4e-4, d_lr=1.6e-3, beta2=0.99),
        output=OutputConfig(log_every=25, sample_every=250, checkpoint_every=500),
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


@dataclass(frozen=True)
class Published:
    """What was published for a recipe, of ImageNet at 128 pixels.

    Attributes:
        fid: Frechet Inception Distance.
        inception_score: mean.
        intra_fid: mean FID of the classes.
    """

    fid: float | None = None
    inception_score: float | None = None
    intra_fid: float | None = None


# Zhang et al., table 1 and table 2; of best_known, mmgeneration's model page.
PUBLISHED: dict[str, Published] = {
    "best_known": Published(12.83, 69.5),
    "paper": Published(18.28, 51.43, 83.7),
    "sn_on_gd_ttur": Published(22.96, 42.87),
    "attention_8": Published(22.98, 43.15),
    "attention_16": Published(22.14, 45.94),
    "attention_32": Published(18.28, 51.43),
    "attention_64": Published(18.65, 52.52),
    "residual_8": Published(42.13, 23.17),
    "residual_16": Published(22.40, 44.49),
    "residual_32": Published(27.33, 38.50),
    "residual_64": Published(28.82, 38.96),
}


def config_from_dict(values: dict[str, Any]) -> RunConfig:
    """Return the configuration that :meth:`RunConfig.to_dict` wrote.

    Raises:
        UserError: if a field is missing, unknown or out of range.
    """
    nested = {
        "network": NetworkConfig,
        "optimizer": OptimizerConfig,
        "images": DataConfig,
        "step": StepConfig,
        "health": HealthConfig,
        "output": OutputConfig,
        "evaluation": TrainingEvaluationConfig,
    }
    arguments = _fields_of(RunConfig, values)
    for name, kind in nested.items():
        arguments[name] = kind(**_fields_of(kind, arguments[name]))
    arguments["out"] = Path(arguments["out"])
    arguments["data"] = None if arguments["data"] is None else Path(arguments["data"])
    return RunConfig(**arguments)


def differences(one: RunConfig, other: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which two configurations differ, by dotted name, with both values."""
    return dict(_differences(one.to_dict(), other.to_dict(), ""))


def _differences(one: dict[str, Any], other: dict[str, Any], prefix: str) -> Any:
    for name, value in one.items():
        if isinstance(value, dict):
            yield from _differences(value, other[name], f"{prefix}{name}.")
        elif value != other[name]:
            yield prefix + name, (value, other[name])


def _fields_of(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    assert is_dataclass(kind)
    wanted = {each.name for each in fields(kind)}
    if set(values) != wanted:
        raise UserError(
            f"{kind.__name__}: unknown {sorted(set(values) - wanted)}, missing {sorted(wanted - set(values))}"
        )
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value
