"""The subcommand ``demo``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sagan.cli.parsing import INTERRUPTED
from sagan.demo.run import run_demo
from sagan.errors import check_out_folder
from sagan.recipes import RECIPES
from sagan.train.allocator import keep_freed_memory


@dataclass(frozen=True)
class Demo:
    """Train on scikit-learn's handwritten digits: minutes on two CPU cores, nothing to download.

    Attributes:
        out: folder to write to.
        iterations: number of updates of G.
        seed: seed of all random numbers of the run.
    """

    out: Path = Path("runs/demo")
    iterations: int = RECIPES["digits"]().iterations
    seed: int = 0


def run(command: Demo) -> int:
    """Run ``demo`` and return the exit code."""
    check_out_folder(command.out)
    config = replace(RECIPES["digits"](), out=command.out, iterations=command.iterations, seed=command.seed)
    keep_freed_memory()
    result, verdict = run_demo(config)
    if verdict is None:
        print(f"Stopped at iteration {result.iteration}; the same command resumes it.")
        return INTERRUPTED
    return 0
