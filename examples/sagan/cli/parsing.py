"""The parser and the exit codes of all subcommands."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import tyro

from sagan.cli.options import Option, check_names, format_help, given_value, options_of
from sagan.errors import UserError
from sagan.names import program_file

T = TypeVar("T")
FAILED = 1  # while running: a full disk, NaNs, a lost process
BAD_USAGE = 2  # wrong options, files or folders
INTERRUPTED = 75  # stopped by a signal; a checkpoint is saved
COLLAPSED = 76  # stopped by a sign of collapse; a checkpoint is saved
HELP = ("-h", "--help", "--help-all")


def parse(kind: type[T], name: str, arguments: Sequence[str], default: T | None = None) -> T:
    """Parse the options of a subcommand; ``--help`` prints them and ends the program.

    Raises:
        UserError: for an option that is unknown, missing or wrong; the message names it.
    """
    options = options_of(kind, default)
    if any(each in HELP for each in arguments):
        print(format_help(kind, name, options, everything="--help-all" in arguments), end="")
        raise SystemExit(0)
    check_names(options, name, arguments)
    program = f"{program_file()} {name}"
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message), _wide_terminal():
            if default is None:
                found = tyro.cli(kind, prog=program, args=list(arguments))
            else:
                found = tyro.cli(kind, prog=program, args=list(arguments), default=default)
    except SystemExit:
        raise UserError(_explained(_unframed(message.getvalue()), options, arguments)) from None
    return cast(T, _at_home(found))


@contextlib.contextmanager
def _wide_terminal() -> Iterator[None]:
    """Keep the parser from breaking lines, and with them names of files."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def _unframed(text: str) -> str:
    """Return the parser's message without its title, and without the frame and colours that it has on some outputs."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    lines = [line.strip(" │╭╮╰╯") for line in plain.splitlines()]
    _, *rest = [line for line in lines if line.strip("─-")] or [""]
    return "\n".join(line for line in rest if not line.startswith("For full helptext"))


def _explained(text: str, options: Sequence[Option], arguments: Sequence[str]) -> str:
    """Return the parser's message, in our words where it names one value."""
    match = re.match(r"Error parsing (--\S+): ", text)
    option = next((each for each in options if match and match[1] in (each.flag, each.opposite)), None)
    if option is None:
        return in_options(text, options)
    expected = {"N": "a whole number", "X": "a number"}.get(option.metavar, option.metavar)
    return f"{option.flag}: expected {expected}, got {given_value(arguments, option.flag)!r}"


def in_options(text: str, options: Sequence[Option]) -> str:
    """Return the message of an error that begins with fields, such as ``d_steps:``, with options in their place."""
    match = re.match(r"(?:Error parsing (\S+): )?([a-z]\w*(?:\.\w+)*(?:, [a-z]\w*)*): ", text)
    if match is None:
        return re.sub(r"^Error parsing \S+: ", "", text)
    where, names = match.groups()
    flags = []
    for name in names.split(", "):
        path = f"{where}.{name}" if where else name
        found = [each for each in options if f".{each.path}".endswith(f".{path}") or each.flag == f"--{path}"]
        if not found:
            return text
        flags.append(min(found, key=lambda each: each.path.count(".")).flag)
    return f"{', '.join(flags)}: {text[match.end() :]}"


def _at_home(value: Any) -> Any:
    """Return options with ``~`` replaced in paths, as a shell does not in ``--out=~/run``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
        changed = {name: new for name, old in found.items() if (new := _at_home(old)) != old}
        return dataclasses.replace(value, **changed) if changed else value
    if isinstance(value, tuple):
        return tuple(_at_home(each) if isinstance(each, Path) else each for each in value)
    if isinstance(value, Path) or (isinstance(value, str) and value.startswith("~/")):
        return type(value)(os.path.expanduser(value))  # noqa: PTH111  (Path.expanduser raises for unknown users)
    return value
