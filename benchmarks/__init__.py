"""Benchmarks of sagan_layers and of the trainer; not part of the installed package."""

import sys
from pathlib import Path

# Where the trainer is, which is not installed either.
sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
