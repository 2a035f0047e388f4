"""Run commands of the trainer in this process, and read what they write."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import sagan
from sagan.cli import main as program

# Options of ``train`` for networks of milliseconds.
SMALL = (
    *("--device", "cpu", "--batch-size", 4, "--network.resolution", 32, "--network.base-width", 1),
    *("--network.latent-dim", 4, "--network.g-attention", 16, "--network.d-attention", 8),
    *("--output.grid-columns", 2, "--ignore-memory"),
)


def main(*arguments: object) -> int:
    """Run a command and return its exit code."""
    return program.main([str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    """Run a command that succeeds and return what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(*arguments) == 0
    return printed.getvalue()


def refused(*arguments: object, code: int = 2) -> str:
    """Run a command that fails with an exit code, 2 if its options or files are wrong, and return its message."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        assert main(*arguments) == code
    return printed.getvalue()


def python(program: str, *arguments: object, **environment: object) -> subprocess.Popen[str]:
    """Start a program that may import the trainer."""
    path = os.pathsep.join([str(Path(sagan.__file__).parents[1]), *filter(None, sys.path)])
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **{name: str(value) for name, value in environment.items()}},
    )


def read_png(path: Path) -> Tensor:
    """Return uint8 [3, height, width]."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
