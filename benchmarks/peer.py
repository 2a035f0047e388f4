"""A checkout of BigGAN-PyTorch, whose modules run beside ours."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from benchmarks.harness import Refused


def import_peer(checkout: Path | None, name: str) -> ModuleType:
    """Return a module of the checkout.

    Args:
        checkout: its folder.
        name: of the module, such as "layers".

    Raises:
        Refused: if there is no checkout, or no such module in it.
    """
    if checkout is None:
        raise Refused("no checkout of BigGAN-PyTorch was given (--peer PATH)")
    if not (checkout / f"{name}.py").is_file():
        raise Refused(f"there is no {name}.py in {checkout}")
    sys.path.insert(0, str(checkout))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(checkout))
