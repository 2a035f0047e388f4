"""The state of a run that a checkpoint holds, and the check that a file holds one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from sagan.errors import UserError, check_finite, shown
from sagan.networks import Discriminator, Generator
from sagan.recipes import RunConfig, config_from_dict
from sagan.schema import check_names, conform
from sagan.train.health import AlarmState, GuardState
from sagan.train.means import Sums

StateDict = dict[str, Any]
_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


class AdamState(TypedDict):
    """The state of an optimizer."""

    state: dict[int, dict[str, Any]]  # the moments of each parameter
    param_groups: list[Any]  # not read: the configuration has the learning rate and the like


class TrainerState(TypedDict):
    """What :class:`sagan.train.update.Trainer` restores. Values are tensors, plain values, lists and dictionaries."""

    config: dict[str, Any]  # RunConfig.to_dict()
    iteration: int  # iterations done
    batches_drawn: int  # parts of batches drawn from the loader
    generator: StateDict
    discriminator: StateDict
    average: StateDict | None  # torch's AveragedModel of G; None without a moving average
    g_optimizer: AdamState
    d_optimizer: AdamState
    scaler: dict[str, float]  # torch's GradScaler; empty except in fp16
    torch_rng: Tensor  # torch's generator on the CPU, the same on every rank
    cuda_rng: Tensor | None  # torch's generator on the GPU, if the run uses one
    means: Sums  # of rank 0's measurements since the last log
    means_of_processes: list[Sums]  # "means" of every rank, as numbers
    guard: GuardState  # consecutive iterations with a skipped update, and the first of them
    skipped: int  # updates skipped since the last log
    labels_in_use: Tensor  # int64 [K], classes with images


class RunState(TrainerState):
    """The contents of a checkpoint, except its format and version."""

    fingerprint: str  # of the images
    class_names: list[str]  # by label
    best_score: float | None  # score of best.pt; less is better
    best_score_of: str  # kind of that score
    alarm: AlarmState  # state of the collapse alarm


def check_state(state: Any) -> RunState:
    """Return a state with which a run can resume.

    Raises:
        UserError: if it is none. The message names the field and what was expected: another type, shape, name or
            range, or finite weights.
    """
    conform(state, RunState)
    checked: RunState = state
    config = config_from_dict(state["config"], "config")
    _check_plain_values(checked, config)
    tensors: dict[str, Tensor] = {}
    for name, expected in expected_tensors(config).items():
        found = _tensors(checked, name)
        if found or state["iteration"] or name not in ("g_optimizer", "d_optimizer"):  # no moments yet
            check_tensors(found, expected, name)
        tensors |= {f"{name}.{inner}": each for inner, each in found.items()}
    _check_apart(tensors)
    check_values(checked)
    return checked


def check_values(state: TrainerState) -> None:
    """Raise :class:`UserError` if a weight or a moment is not finite, or below 0 where none is."""
    for field in ("generator", "discriminator", "average", "g_optimizer", "d_optimizer"):
        for inner, tensor in _tensors(state, field).items():
            name = f"{field}.{inner}"
            check_finite(name, tensor)
            if name.endswith(("exp_avg_sq", "running_var", "n_averaged", "step")) and bool(
                (tensor < 0).any()
            ):
                raise UserError(f"{name}: expected at least 0, got {tensor.min().item():g}")


def average_of(state: TrainerState) -> StateDict | None:
    """Return the moving average of G as a state dict of G; None without one."""
    average = state["average"]
    if average is None:
        return None
    return {name.removeprefix("module."): average[name] for name in average if name != "n_averaged"}


def expected_tensors(config: RunConfig) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a state with this configuration by field and name, on the meta device: without memory."""
    try:
        with torch.device("meta"):
            networks: dict[str, nn.Module] = {
                "generator": Generator(config.network),
                "discriminator": Discriminator(config.network),
            }
            step, counter = torch.empty((), dtype=torch.float32), torch.empty((), dtype=torch.int64)
    except UserError as error:
        raise UserError(f"config.network.{error}") from None
    except (RuntimeError, TypeError, ValueError):  # more than 2^63 bytes
        raise UserError("config.network: expected sizes that fit into memory, got larger ones") from None
    fields = {name: dict(network.state_dict()) for name, network in networks.items()}
    if config.ema_decay:
        average = {f"module.{name}": tensor for name, tensor in fields["generator"].items()}
        fields["average"] = {"n_averaged": counter, **average}
    for name, network in networks.items():
        fields[f"{name[0]}_optimizer"] = {
            f"state.{number}.{moment}": step if moment == "step" else parameter
            for number, parameter in enumerate(network.parameters())
            for moment in ("step", "exp_avg", "exp_avg_sq")
        }
    return fields


def check_tensors(found: Mapping[str, Any], expected: Mapping[str, Tensor], where: str) -> None:
    """Raise :class:`UserError` if tensors have other names, shapes or dtypes than expected."""
    check_names(found, expected, where)
    for name, like in expected.items():
        wanted, got = f"{like.dtype} {list(like.shape)}", _described(found[name])
        if wanted != got:
            raise UserError(f"{where}.{name}: expected {wanted}, got {got}")


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return shown(value)
    if value.is_nested or value.layout is not torch.strided or value.device.type != "cpu":
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        return f"a {kind} tensor on {value.device}"
    if not _is_dense(value):
        return f"a tensor with the strides {list(value.stride())}, not with each element once"
    return f"{value.dtype} {list(value.shape)}"


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements are side by side, each once, in any order of the dimensions, such as channels last.

    Updates in place of others, as those of ``expand``, crash.
    """
    squeezed = tensor.squeeze()
    order = sorted(range(squeezed.dim()), key=squeezed.stride, reverse=True)
    return squeezed.permute(order).is_contiguous()


def _check_apart(tensors: Mapping[str, Tensor]) -> None:
    """Raise :class:`UserError` if tensors share elements: an update of one would change the other."""
    end, before = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        if tensor.numel() and tensor.data_ptr() < end:
            raise UserError(f"{name}: expected elements of its own, got those of {before}")
        end, before = max(end, tensor.data_ptr() + tensor.nbytes), name


def _tensors(state: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Return what a field has for :func:`expected_tensors`."""
    value = state[field]
    if not field.endswith("optimizer"):
        return value or {}
    return {
        f"state.{i}.{name}": each for i, moments in value["state"].items() for name, each in moments.items()
    }


def _check_plain_values(state: RunState, config: RunConfig) -> None:
    names, labels, classes = state["class_names"], state["labels_in_use"], config.network.num_classes
    is_vector = _described(labels).startswith("torch.int64 [") and labels.dim() == 1 and len(labels) > 0
    in_order = is_vector and bool((labels.diff() > 0).all()) and 0 <= labels[0] <= labels[-1] < len(names)
    cuda, guard, alarm, score = state["cuda_rng"], state["guard"], state["alarm"], state["best_score"]
    scaler = state["scaler"]
    scaler_names = _SCALER if config.precision == "fp16" else set()
    for field, expected, holds in (
        ("iteration", "from 0 to 999,999,999", 0 <= state["iteration"] < 10**9),
        ("batches_drawn", "from 0 to 10^12", 0 <= state["batches_drawn"] <= 10**12),
        ("skipped", "at least 0", state["skipped"] >= 0),
        ("guard", "in_a_row from 0 and since from -1", guard["in_a_row"] >= 0 and guard["since"] >= -1),
        ("alarm", "counts from 0", min(alarm["saturated_logs"], alarm["rising"]) >= 0),
        ("best_score", "a finite number", score is None or math.isfinite(score)),
        ("class_names", f"{classes} names", classes in (0, len(names))),
        ("labels_in_use", f"ascending labels below {len(names)} [int64]", in_order),
        ("average", "None without config.ema_decay", state["average"] is None or config.ema_decay > 0),
        ("torch_rng", "a state of torch's generator", _is_cpu_generator(state["torch_rng"])),
        ("cuda_rng", "16 bytes", cuda is None or _described(cuda) == "torch.uint8 [16]"),
        ("scaler", f"the values {sorted(scaler_names)}", scaler.keys() == scaler_names),
        ("scaler", "finite numbers from 0", all(0 <= each < math.inf for each in scaler.values())),
        ("means", "numbers, and as many sums as counts", _are_means([state["means"]])),
        ("means_of_processes", "the same sums in each", _are_means(state["means_of_processes"])),
    ):
        if not holds:
            value: Any = state[field]  # type: ignore[literal-required]
            raise UserError(f"{field}: expected {expected}, got {_described(value)}")


def _is_cpu_generator(value: Tensor) -> bool:
    try:
        torch.Generator().set_state(value)
    except (RuntimeError, TypeError):
        return False
    return True


def _are_means(means: list[Sums]) -> bool:
    """Whether sums and counts are numbers, of the same measurements everywhere."""
    groups: list[dict[str, Any]] = [group for each in means for group in (each["sums"], each["counts"])]
    values = [value for group in groups for value in group.values()]
    return all(group.keys() == groups[0].keys() for group in groups) and all(map(_is_number, values))


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return _described(value) in ("torch.float64 []", "torch.int64 []")
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)
