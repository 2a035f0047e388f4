"""The options of a subcommand, as its help lists them; read from its dataclass, as the parser reads them."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
import shutil
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from sagan.errors import UserError
from sagan.names import program_file

_POSITIONAL = get_args(tyro.conf.Positional[int])[1]
_KINDS: dict[Any, str] = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
_WIDEST = 100


@dataclasses.dataclass(frozen=True)
class Option:
    """An option, or a positional argument, of a subcommand.

    Attributes:
        path: dotted name of its field, such as ``run.network.g_attention``.
        flag: what is typed, such as ``--network.g-attention``.
        opposite: what turns a switch off; "" for others.
        metavar: stands for the value; "" for a switch.
        help: what it does.
        default: its value without the option; ``dataclasses.MISSING`` if it must be given.
        group: what the options of one dataclass have in common; "" outside of groups.
        required: when it must be given, in words; "" if never.
    """

    path: str
    flag: str
    opposite: str
    metavar: str
    help: str
    default: Any
    group: str
    required: str

    @property
    def description(self) -> str:
        """What it does, and what it is by default."""
        text = self.help if self.help.endswith("...") else self.help.removesuffix(".")
        if self.required:
            return f"{text} ({self.required})"
        if self.default is None or self.default is False or self.default in ((), ""):
            return text
        values = self.default if isinstance(self.default, tuple) else (self.default,)
        return f"{text} (default: {'on' if self.default is True else ' '.join(map(str, values))})"


def options_of(kind: type, default: Any = None) -> list[Option]:
    """Return the options of a dataclass, whose defaults those of an instance may replace."""
    return list(_options(kind, default, "", "", "", getattr(kind, "required", {})))


def _options(
    kind: type, default: Any, path: str, prefix: str, group: str, required: Mapping[str, str]
) -> Iterator[Option]:
    hints, texts = get_type_hints(kind, include_extras=True), _field_texts(kind)
    for field in dataclasses.fields(kind):
        hint: Any = hints[field.name]
        marks: list[Any] = []
        if get_origin(hint) is Annotated:
            hint, *marks = get_args(hint)
        named = next(
            (each for mark in marks if (each := getattr(mark, "name", None)) is not None), field.name
        )
        value = getattr(default, field.name) if default is not None else _default(field)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            value = None if value is dataclasses.MISSING else value
            inner = f"{prefix}{named}." if named else prefix
            text = texts[field.name].rstrip(".") if named else group
            yield from _options(hint, value, f"{path}{field.name}.", inner.replace("_", "-"), text, required)
            continue
        name = named.replace("_", "-")
        is_switch, is_positional = hint is bool, _POSITIONAL in marks
        metavar = next((each for mark in marks if (each := getattr(mark, "metavar", None))), None)
        yield Option(
            path=f"{path}{field.name}",
            flag=named if is_positional else f"--{prefix}{name}",
            opposite=f"--{prefix}no-{name}" if is_switch else "",
            metavar="" if is_switch else metavar or _metavar(hint),
            help=texts[field.name],
            default=value,
            group=group,
            required=required.get(prefix + name, "required" if value is dataclasses.MISSING else ""),
        )


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _metavar(hint: Any) -> str:
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return f"{{{','.join(map(str, arguments))}}}"
    if get_origin(hint) in (Union, types.UnionType):
        return _metavar(next(each for each in arguments if each is not type(None)))
    if get_origin(hint) is tuple:
        return f"{_metavar(arguments[0])} ..."
    return "{True,False}" if hint is bool else _KINDS[hint]


def _field_texts(kind: type) -> dict[str, str]:
    """Return what the docstrings of a dataclass and its bases say of the fields."""
    texts = {}
    for each in reversed(kind.__mro__):
        _, _, attributes = (inspect.cleandoc(each.__doc__ or "")).partition("\nAttributes:\n")
        for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE):
            texts[name] = " ".join(text.split())
    return texts


def format_help(kind: type, name: str, options: Sequence[Option], *, everything: bool) -> str:
    """Return the help of a subcommand: of ``kind.common`` only, if it has that, unless everything is asked for."""
    program = f"{program_file()} {name}"
    common = [each for flag in getattr(kind, "common", ()) for each in options if each.flag == flag]
    groups = {"most used" if common else "options": common}
    for option in options if everything or not common else ():
        if option not in common:
            groups.setdefault(option.group or "options", []).append(option)
    hidden = len(options) - sum(map(len, groups.values()))
    needed = [f"{each.flag} {each.metavar}" for each in options if each.required.split(",")[0] == "required"]
    width = min(shutil.get_terminal_size().columns, _WIDEST) - 2
    parser = argparse.ArgumentParser(
        prog=program,
        usage=" ".join([program, *needed, "[options]"]),
        description=inspect.cleandoc(kind.__doc__ or "")
        .partition("\nAttributes:\n")[0]
        .strip()
        .replace("``", ""),
        epilog=f"{hidden} more options: {program} --help-all" if hidden else "",
        add_help=False,
        formatter_class=lambda prog: _Formatter(prog, max_help_position=30, width=width),
    )
    for title, members in groups.items():
        section = parser.add_argument_group(title[0].upper() + title[1:])
        for option in members:
            text = option.description.replace("%", "%%")
            if not option.opposite:
                section.add_argument(option.flag, metavar=option.metavar, help=text)
            elif option.default is True:
                section.add_argument(option.flag, option.opposite, action="store_true", help=text)
            else:
                section.add_argument(option.flag, action="store_true", help=text)
    return parser.format_help()


class _Formatter(argparse.HelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Wrap each paragraph."""
        return "\n\n".join(
            super(_Formatter, self)._fill_text(each, width, indent) for each in text.split("\n\n")
        )


# Names that other programs give to options, and those of ours.
_OTHER_NAMES = {
    **dict.fromkeys(("--size", "--image-size", "--img-size"), ("--resolution", "--network.resolution")),
    **dict.fromkeys(("--epochs", "--steps", "--max-steps"), ("--iterations",)),
    **dict.fromkeys(("--input", "--run", "--checkpoint", "--ckpt", "--model"), ("--source",)),
    **dict.fromkeys(("--output", "--outdir", "--output-dir", "--logdir"), ("--out",)),
    **dict.fromkeys(("--dataset", "--data-dir", "--data-path"), ("--data",)),
    **dict.fromkeys(("--num-images", "--num-samples", "--n"), ("--count",)),
    **dict.fromkeys(("--lr", "--learning-rate"), ("--optimizer.d-lr", "--optimizer.g-lr")),
    **dict.fromkeys(("--trunc", "--psi"), ("--truncation", "--truncations")),
    **dict.fromkeys(("--amp", "--fp16", "--bf16", "--mixed-precision"), ("--precision",)),
}


def check_names(options: Sequence[Option], name: str, arguments: Sequence[str]) -> None:
    """Raise :class:`UserError` for an option that does not exist, or a required one that is missing."""
    known = {flag for each in options for flag in (each.flag, each.opposite) if flag}
    given = [flag_of(each) for each in arguments if re.match(r"--\w", each)]
    for flag in given:
        if flag not in known:
            ends = [each for each in known if each.rpartition(".")[2] == flag[2:]]
            ends = ends or [each for each in _OTHER_NAMES.get(flag, ()) if each in known]
            near = sorted(ends) or difflib.get_close_matches(flag, known, n=2)
            advice = f"did you mean {' or '.join(near)}? " if near else ""
            raise UserError(
                f"unknown option {flag}; {advice}{program_file()} {name} --help-all lists all options"
            )
    for option in options:
        if (
            option.default is dataclasses.MISSING
            and option.flag not in given
            and option.flag.startswith("--")
        ):
            raise UserError(f"{option.flag} {option.metavar} is required: {option.help}")


def flag_of(argument: str) -> str:
    """Return the option's name in an argument such as ``--batch_size=3``."""
    return argument.partition("=")[0].replace("_", "-")


def given_value(arguments: Sequence[str], flag: str) -> str | None:
    """Return the value of an option, the last one given, before the parser has looked at it; None without it."""
    found = None
    for number, argument in enumerate(arguments):
        if not argument.startswith("--") or flag_of(argument) != flag:
            continue
        _, equals, value = argument.partition("=")
        if equals:
            found = value
        elif number + 1 < len(arguments):
            found = arguments[number + 1]
    return found
