"""Run what pages show: a sandbox for shell blocks, and the process that runs their commands.

``python tests/pasted.py SOCKET`` is that process. It imports torch and the trainer once and forks for each command, so
that a page with many commands takes seconds. ``bash`` runs the blocks as they stand; its ``python``, ``pip`` and so on
are the stand-ins that :class:`Sandbox` writes, which send their arguments here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TRAINER = "examples/imagenet_sagan.py"
NAMES = ("python", "python3", "pip", "torchrun", "make", "sbatch", "git", "sagan")

SMALL_RUN = (
    *("--iterations", "2", "--batch-size", "4", "--accumulation", "1", "--network.base-width", "4"),
    *("--network.latent-dim", "8", "--precision", "fp32", "--device", "cpu", "--images.workers", "0"),
    *("--output.grid-rows", "2", "--output.grid-columns", "2", "--output.log-every", "1"),
)
# What is added to commands that would take long, and why. Everything else of a line stays as printed.
ADDED: dict[str, tuple[str, ...]] = {
    "train": SMALL_RUN,  # days
    "demo": ("--iterations", "2"),  # minutes
    "evaluate": ("--count", "20", "--device", "cpu"),  # hours
    "sample": ("--count", "4", "--device", "cpu"),  # 50,000 images
    # Thousands of images.
    "make-images": ("--classes", "3", "--images", "4", "--val-images", "2", "--scale", "0.3"),
}
PARSED = ("compare",)  # its runs need figures, which take hours


def shortened(command: Sequence[str]) -> list[str]:
    """Return the arguments of the trainer with those of ``ADDED``."""
    name, *options = command
    added = list(ADDED.get(name, ()))
    if name == "train":
        out = Path(options[options.index("--out") + 1])
        if "--evaluation.inception-weights" in options:  # hours; the command evaluate runs in full
            added += ["--evaluation.every", "0"]
        elif "--evaluation.every" in options:
            added += ["--evaluation.every", "1", "--evaluation.count", "20"]
        if (out / "config.json").exists() and "--resume" not in options:  # another way to make the same run
            added += ["--dry-run"]
    return [name, *options, *added]


@contextlib.contextmanager
def parsers_only() -> Iterator[None]:
    """End a program with code 0 as soon as its parser has accepted the arguments."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *arguments: Any) -> None:
        parse(self, *arguments)
        raise SystemExit(0)

    argparse.ArgumentParser.parse_args = parse_and_stop  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_args = parse  # type: ignore[method-assign]


def run_trainer(command: Sequence[str], *, parse_only: bool = False) -> None:
    """Run a command of the trainer, or its parser alone."""
    from sagan.cli import main as program

    if parse_only or command[0] in PARSED:
        kind, _ = program.COMMANDS[command[0]]
        program.COMMANDS[command[0]] = (kind, lambda parsed: 0)
    sys.argv = [TRAINER, *shortened(command)]
    runpy.run_path(str(ROOT / TRAINER), run_name="__main__")


def run_python(arguments: Sequence[str]) -> None:
    """Run ``python``: the trainer in full, other modules as far as their parser."""
    first, *rest = arguments
    if first in (TRAINER, "-m") and (first == TRAINER or rest[0] == "sagan"):
        run_trainer(rest if first == TRAINER else rest[1:])
    elif first == "-m" and rest[0] == "venv":
        make_environment(Path(rest[1]))
    elif first == "-m":
        sys.argv = rest
        with parsers_only():
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        exec(rest[0], {"__name__": "__main__"})
    else:
        raise SystemExit(f"python {first}: expected the trainer, -m or -c")


def run_torchrun(arguments: Sequence[str]) -> None:
    """Parse the command line of ``torchrun``, then run its program in this one process."""
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(list(arguments))
    if parsed.training_script != ("sagan" if parsed.module else TRAINER):
        raise SystemExit(f"torchrun: expected {TRAINER}, got {parsed.training_script}")
    command = parsed.training_script_args
    run_trainer(command, parse_only=parsed.nnodes != "1:1" or command[0] == "evaluate")


def run_pip(arguments: Sequence[str]) -> None:
    """Parse the command line of ``pip``, and look up the extras that it names."""
    from pip._internal.cli.main_parser import parse_command
    from pip._internal.commands import create_command

    name, rest = parse_command(list(arguments))
    options, packages = create_command(name).parse_args(rest)
    project = (ROOT / "pyproject.toml").read_text()
    for file in options.constraints:
        Path(file).read_text()
    for package in [*packages, *options.editables]:
        name, _, extras = package.partition("[")
        for extra in filter(None, extras.rstrip("]").split(",")):
            if name in (".", "sagan-layers") and not re.search(rf"^{extra} = ", project, re.M):
                raise SystemExit(f"pip: there is no extra {extra!r}")


def make_environment(folder: Path) -> None:
    """Make what pages use of a virtual environment: the stand-ins, and a script to activate it."""
    bin_folder = folder / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "activate").touch()
    for name in NAMES:
        (bin_folder / name).symlink_to(Path(os.environ["PASTED_BIN"]) / name)


def run(name: str, arguments: Sequence[str]) -> None:
    """Run one command line in this process."""
    if name in ("python", "python3"):
        run_python(arguments)
    elif name == "sagan":
        run_trainer(arguments)
    elif name == "torchrun":
        run_torchrun(arguments)
    elif name == "pip":
        run_pip(arguments)
    elif name == "make":  # without running the targets
        raise SystemExit(subprocess.call([os.environ["PASTED_MAKE"], "-n", *arguments], cwd=ROOT))
    elif name == "sbatch":
        raise SystemExit(subprocess.call(["bash", "-n", arguments[0]]))
    elif name == "git":
        command, address, *folder = arguments
        if command != "clone":
            raise SystemExit(f"git {command}: expected clone")
        copy_of_checkout(Path(*(folder or [address.rpartition("/")[2]])))


def copy_of_checkout(folder: Path) -> None:
    """Make a folder that looks like the checkout."""
    folder.mkdir()
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("runs", "data", "made", "dist"):
            (folder / path.name).symlink_to(path)


def serve(address: str) -> None:
    """Run each command that arrives in a process of its own."""
    import torch

    import sagan.cli.main  # noqa: F401 (every command begins faster)

    torch.set_num_threads(1)
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen()
    print("ready", flush=True)
    while True:
        connection, _ = server.accept()
        if os.fork() == 0:
            break
        connection.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)
    with connection, connection.makefile("rw") as stream:
        request = json.loads(stream.readline())
        output = Path(request["output"]).open("a")  # noqa: SIM115 (stays open until this process ends)
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)
        os.chdir(request["folder"])
        os.environ.update(request["environment"])
        code: Any = 0
        try:
            run(request["name"], request["arguments"])
        except SystemExit as error:
            code = error.code or 0
            if not isinstance(code, int):
                print(code, file=sys.stderr)
                code = 1
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        print(code, file=stream, flush=True)
    os._exit(0)


STAND_IN = """\
#!{python} -IS
import json, os, socket, sys
values = dict(output={output!r}, environment={environment!r})
request = dict(values, name={name!r}, arguments=sys.argv[1:], folder=os.getcwd())
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
stream = connection.makefile("rw")
print(json.dumps(request), file=stream, flush=True)
sys.exit(int(stream.readline() or 70))
"""


class Sandbox:
    """A folder that looks like a checkout, in which blocks of a page run."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.output = folder / "checkout", folder / "output.txt"
        copy_of_checkout(self.folder)
        bin_folder = folder / "bin"
        bin_folder.mkdir()
        own = {"PASTED_BIN": str(bin_folder), "PASTED_MAKE": shutil.which("make") or "make"}
        own |= {"XDG_CACHE_HOME": str(folder / "cache")}
        for name in NAMES:
            path = bin_folder / name
            values = {"python": sys.executable, "name": name, "output": str(self.output)}
            path.write_text(STAND_IN.format(**values, environment=own, address=address))
            path.chmod(0o755)
        self.environment = {**os.environ, "PATH": f"{bin_folder}:/usr/bin:/bin"}

    def run(self, block: str) -> str:
        """Run a shell block; ``AssertionError`` with all that it printed if a command fails."""
        self.output.write_text("")
        done = subprocess.run(
            ["bash", "-e", "-x", "-c", block],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        printed = self.output.read_text()
        assert done.returncode == 0, f"{done.stdout}{done.stderr}{printed}"
        return printed


if __name__ == "__main__":
    serve(sys.argv[1])
