"""Use the installed package, and only an installed one; `wheel_smoke.py` runs this in a fresh environment."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import torch

import sagan_layers


def main() -> None:
    home = Path(sagan_layers.__file__).resolve().parent
    assert home.is_relative_to(Path(sys.prefix).resolve()), f"imported from {home}, not from {sys.prefix}"
    assert (home / "py.typed").is_file(), "py.typed is missing"
    version = importlib.metadata.version("sagan-layers")
    assert version == sagan_layers.__version__, (version, sagan_layers.__version__)
    missing = [name for name in sagan_layers.__all__ if not hasattr(sagan_layers, name)]
    assert not missing, f"names of __all__ that do not exist: {missing}"

    assert "sagan" not in sys.modules, "importing the layers imports the trainer"
    trainer = importlib.util.find_spec("sagan")
    assert trainer is not None, "the trainer is missing"
    assert Path(str(trainer.origin)).resolve().is_relative_to(Path(sys.prefix).resolve()), trainer.origin

    layer = sagan_layers.SelfAttention2d(16)
    images = torch.randn(2, 16, 8, 8, requires_grad=True)
    attended = layer(images)
    torch.testing.assert_close(attended, images)  # gamma starts at 0, so a fresh layer is the identity
    attended.sum().backward()
    assert images.grad is not None
    assert layer.gamma.grad is not None
    print(f"sagan_layers {version} works from {home}")


if __name__ == "__main__":
    main()
