"""The console output of a run: a progress bar on a terminal, else a line for each log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from sagan.recipes import RunConfig


class Console:
    """The console output of a run.

    Args:
        config: the run.
        iteration: iterations that are done already.
        enabled: False for silence.
    """

    def __init__(self, config: RunConfig, iteration: int, *, enabled: bool) -> None:
        self._enabled = enabled
        self._bar = tqdm(
            total=config.iterations,
            initial=iteration,
            unit="it",
            disable=None if enabled else True,  # None: except on a terminal
            dynamic_ncols=True,
        )

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def advance(self) -> None:
        """Count an iteration."""
        self._bar.update()

    def show_row(self, row: Mapping[str, Any]) -> None:
        """Show the main figures of a row of the log."""
        gammas = "  ".join(f"{name} {value:+.3f}" for name, value in row.items() if name.startswith("gamma"))
        text = f"D {row['d_loss']:.3f}  G {row['g_loss']:+.3f}  {gammas}  {row['images_per_s']:.0f} img/s"
        self._bar.set_postfix_str(text)
        if self._bar.disable:
            left = _duration(row["seconds_left"])
            self.print(f"iteration {row['iteration']:>7}  {text}  {left} left")

    def show_figures(self, iteration: int, figures: Mapping[str, float]) -> None:
        """Show the figures of an evaluation."""
        values = (f"{name.removeprefix('evaluation/')} {value:.5g}" for name, value in figures.items())
        self.print(f"iteration {iteration:>7}  {'  '.join(values)}")

    def print(self, text: str) -> None:
        """Print a line."""
        if self._enabled:
            self._bar.write(text) if not self._bar.disable else print(text, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
