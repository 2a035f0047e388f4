"""The subcommand ``convert``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import tyro

from sagan.contents import found_at
from sagan.convert import load_network, save_network, settings_of
from sagan.distributed import World
from sagan.errors import UserError, check_is_new, check_out_folder
from sagan.io import atomic_write, open_regular
from sagan.names import program_name
from sagan.networks import Discriminator, Generator, NetworkConfig, discriminator_widths, generator_widths
from sagan.recipes import DEFAULT_RECIPE, RECIPES, RunConfig, config_from_dict, differences
from sagan.recognition import Converted, read_networks
from sagan.train.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from sagan.train.health import CollapseAlarm
from sagan.train.output import save_config
from sagan.train.state import average_of, check_values
from sagan.train.update import Trainer
from sagan.weight_files import read_weights
from sagan_layers.convert import CODE_BASES, CodeBase

_NETWORKS = [name for name, code_base in CODE_BASES.items() if code_base.generator is not None]


@dataclass(frozen=True)
class Settings:
    """What the shapes of weights do not tell, as fields of the networks; by default the other code base's.

    Attributes:
        sn_eps: epsilon of spectral normalisation.
        sn_eps_mode: "add" it to the norms, or "clamp" them to at least it.
        sn_iterate_in_evaluation: iterate from the stored vectors in evaluation too.
        bn_eps: epsilon of batch norm.
        last_bn_eps: epsilon of G's last batch norm.
        bn_momentum: momentum of the conditional batch norms, for training.
        last_bn_momentum: momentum of G's last batch norm, for training.
        biased_running_var: keep biased running variances, for training.
        d_relu_before_blocks: the ReLU before D's blocks reaches their shortcuts.
        upsampling: of G's blocks, "nearest" or "bilinear".
        g_attention: resolutions of G's attention, where names and shapes do not tell.
        d_attention: resolutions of D's attention, likewise.
    """

    sn_eps: float | None = None
    sn_eps_mode: Literal["add", "clamp"] | None = None
    sn_iterate_in_evaluation: bool | None = None
    bn_eps: float | None = None
    last_bn_eps: float | None = None
    bn_momentum: float | None = None
    last_bn_momentum: float | None = None
    biased_running_var: bool | None = None
    d_relu_before_blocks: bool | None = None
    upsampling: Literal["nearest", "bilinear"] | None = None
    g_attention: tuple[int, ...] | None = None
    d_attention: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Convert:
    """Make a run of another code base's weights, or write a run's weights for another code base.

    --from reads weights, works out the networks from names and shapes, and writes a run that the other commands take.
    --to writes G.pth, D.pth and, if the run has an average, G_ema.pth: state dicts in the other code base's names.
    Every entry must have its place; nothing is converted by halves.

    Attributes:
        from_code_base: the code base of the weights.
        to_code_base: the code base to write weights for.
        weights: file of G's weights, or of both networks': torch.save, .safetensors or .npz.
        d_weights: file of D's weights; without any, a new D is drawn.
        ema_weights: file of the moving average of G's weights; without any, it is G itself.
        class_names: text file with a class name in each line; numbers by default.
        settings: what shapes do not tell. With --from.
        source: folder of a run, or a checkpoint.
        out: folder to write to.
    """

    required: ClassVar[dict[str, str]] = {
        "from": "this or --to is required",
        "to": "this or --from is required",
        "weights": "required with --from",
        "source": "required with --to",
    }

    out: Path
    from_code_base: Annotated[str | None, tyro.conf.arg(name="from", metavar="NAME")] = None
    to_code_base: Annotated[str | None, tyro.conf.arg(name="to", metavar="NAME")] = None
    weights: Path | None = None
    d_weights: Path | None = None
    ema_weights: Path | None = None
    class_names: Path | None = None
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)
    source: Path | None = None


def run(command: Convert) -> int:
    """Run ``convert`` and return the exit code."""
    check_out_folder(command.out)
    if (command.from_code_base is None) == (command.to_code_base is None):
        raise UserError("from, to: expected one of them, got " + ("both" if command.to_code_base else "none"))
    check_is_new(command.out)
    if command.from_code_base is not None:
        return _convert_from(command, _code_base("from", command.from_code_base))
    assert command.to_code_base is not None
    return _convert_to(command, _code_base("to", command.to_code_base))


def _code_base(option: str, name: str) -> CodeBase:
    if name in CODE_BASES and name not in _NETWORKS:
        raise UserError(
            f"{option}: these networks cannot express those of {CODE_BASES[name].title}; "
            "sagan_layers.convert.load takes its blocks"
        )
    if name not in _NETWORKS:
        raise UserError(f"{option}: expected one of {', '.join(_NETWORKS)}; got {name!r}")
    return CODE_BASES[name]


def _convert_from(command: Convert, code_base: CodeBase) -> int:
    if command.weights is None:
        raise UserError("weights: expected a file with --from, got none")
    if command.source is not None:
        raise UserError("source: expected none with --from")
    for name in ("weights", "d_weights", "ema_weights"):
        path = getattr(command, name)
        if path is not None and not path.is_file():
            raise UserError(f"{name}: expected a file, got {found_at(path)}")
    overrides = {name: value for name, value in asdict(command.settings).items() if value is not None}
    weights, d_weights, ema_weights = (
        {} if path is None else read_weights(path)
        for path in (command.weights, command.d_weights, command.ema_weights)
    )
    networks = read_networks(code_base, weights, d_weights, ema_weights, **overrides)
    config = replace(
        RECIPES[DEFAULT_RECIPE](), network=networks.config, out=command.out, device="cpu", ema_start=0
    )
    names = _class_names(command.class_names, networks.config.num_classes or 0)
    _write_run(config, networks, names)
    print(_summary(code_base, networks, overrides))
    print(f"\nWritten to {command.out}, for sample, attention-maps, evaluate and, to go on training,")
    print("  " + shlex.join(_training_command(config)))
    return 0


def _write_run(config: RunConfig, networks: Converted, class_names: list[str]) -> None:
    """Write a run's folder with a checkpoint of iteration 0."""
    trainer = Trainer(
        config, torch.arange(max(1, config.network.num_classes or 0)), World(0, 1, torch.device("cpu"))
    )
    load_network(trainer.generator, networks.generator, networks.code_base)
    if networks.discriminator:
        load_network(trainer.discriminator, networks.discriminator, networks.code_base)
    assert trainer.average is not None
    average: Any = trainer.average.module
    average.load_state_dict(trainer.generator.state_dict())
    if networks.average:
        load_network(average, networks.average, networks.code_base)
    trainer.average.n_averaged.fill_(1)  # at 0 the first update would be a copy
    state = trainer.state_dict()
    check_values(state)
    save_config(config)
    save_checkpoint(
        config.out / "checkpoints",
        {
            **state,
            "fingerprint": "",
            "class_names": class_names,
            "best_score": None,
            "best_score_of": "",
            "alarm": CollapseAlarm(config.health).state_dict(),
        },
        keep=1,
    )


def _class_names(path: Path | None, count: int) -> list[str]:
    if path is None:
        return [str(number) for number in range(max(1, count))]
    with open_regular(path) as file:
        names = file.read().decode(errors="replace").splitlines()
    if len(names) != count:
        raise UserError(f"class_names: expected {count} lines, got {len(names)} in {path}")
    return names


def _summary(code_base: CodeBase, networks: Converted, overrides: Mapping[str, Any]) -> str:
    """Return a table of the networks: what the weights told, and what they did not."""
    values = asdict(networks.config)
    for name, widths in (("g_channels", generator_widths), ("d_channels", discriminator_widths)):
        values[name] = tuple(channels for _, channels in widths(networks.config))
    lines = [f"{code_base.title}'s networks. Their names and shapes tell:"]
    lines += [f"  {name:<26}{value}" for name, value in values.items() if name in networks.told]
    lines.append("They do not tell the following, which options set:")
    there = settings_of(code_base, networks.config.resolution, {})
    for option in fields(Settings):
        name = option.name
        if name not in networks.told:
            origin = "an option" if name in overrides else code_base.title if name in there else "the default"
            lines.append(f"  {name:<26}{values[name]} ({origin})")
    if not networks.discriminator:
        lines.append("No weights of D: a new one is drawn.")
    if not networks.average:
        lines.append("No moving average: it is G itself.")
    return "\n".join(lines)


def _training_command(config: RunConfig) -> list[str]:
    """Return the command that trains a run further; it names all settings of the networks."""
    command = [*shlex.split(program_name()), "train", "--resume", "--accept-changes"]
    command += ["--data", "DATA", "--out", str(config.out)]
    for name, (_, value) in differences(RECIPES[config.recipe](), config).items():
        if name in ("out", "device"):
            continue
        option = name.replace("_", "-")
        if isinstance(value, bool):
            group, _, flag = option.rpartition(".")
            command.append(f"--{group}.{flag}" if value else f"--{group}.no-{flag}")
        else:
            command += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
    return command


def _convert_to(command: Convert, code_base: CodeBase) -> int:
    if command.source is None:
        raise UserError("source: expected a run with --to, got none")
    given = {name: getattr(command, name) for name in ("weights", "d_weights", "ema_weights", "class_names")}
    wrong = [name for name, value in {**given, **asdict(command.settings)}.items() if value is not None]
    if wrong:
        raise UserError(f"{wrong[0]}: expected none with --to")
    state = load_checkpoint(find_checkpoint(command.source))
    config = config_from_dict(state["config"]).network
    tensors = {"G": state["generator"], "D": state["discriminator"]}
    if (average := average_of(state)) is not None:
        tensors["G_ema"] = average
    written = {}
    for name, each in tensors.items():
        network = Discriminator(config) if name == "D" else Generator(config)
        network.load_state_dict(each)
        written[name] = save_network(network, code_base)
    command.out.mkdir(parents=True, exist_ok=True)
    for name, entries in written.items():
        with atomic_write(command.out / f"{name}.pth") as file:
            torch.save(entries, file)
    print(f"{', '.join(f'{name}.pth' for name in written)} written to {command.out}, for {code_base.title}")
    own = _settings_of_its_own(config, settings_of(code_base, config.resolution, {}))
    if own:
        print(f"State dicts do not hold these settings, which are others there: {', '.join(own)}")
    return 0


def _settings_of_its_own(config: NetworkConfig, settings: Mapping[str, Any]) -> list[str]:
    """Return the settings of a configuration that are others in a code base with these."""
    ours, theirs = asdict(config), {**asdict(NetworkConfig()), **settings}
    for values in (ours, theirs):
        if values["last_bn_eps"] is None:
            values["last_bn_eps"] = values["bn_eps"]
    names = [option.name for option in fields(Settings)]
    told = {"g_attention", "d_attention"} - settings.keys()  # by the names of the entries
    return [f"{name} {ours[name]}" for name in names if name not in told and ours[name] != theirs[name]]
