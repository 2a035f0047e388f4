"""A run's metrics: a line of JSON each, TensorBoard's files where it is installed, and reading them back."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from sagan.errors import UserError

METRICS = "metrics.jsonl"


class RunLog:
    """Appends rows of metrics to ``metrics.jsonl`` and, if asked and installed, to TensorBoard's files.

    Args:
        out: the run's folder.
        iteration: where the run goes on from: later rows are dropped, since it will write them again.
        tensorboard: whether to write TensorBoard's files in ``out/tensorboard``.
    """

    def __init__(self, out: Path, iteration: int, *, tensorboard: bool) -> None:
        out.mkdir(parents=True, exist_ok=True)
        path = out / METRICS
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _iteration_of(line) <= iteration]
            path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a")
        self._board: Any = None
        if tensorboard and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(out / "tensorboard", purge_step=iteration + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        """Write a row; it must have an "iteration". Numbers that are not finite become null."""
        plain = {name: _jsonable(value) for name, value in row.items()}
        self._file.write(json.dumps(plain) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in plain.items():
                if name != "iteration" and isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, row["iteration"])
            self._board.flush()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """Return the rows of a run, by iteration; a torn last line is left out.

    Raises:
        UserError: if there are none.
    """
    path = out / METRICS
    if not path.is_file():
        raise UserError(f"expected the folder of a run with {METRICS}, found none at {path}")
    rows = []
    for line in path.read_text().splitlines():
        if math.isfinite(_iteration_of(line)):
            rows.append(json.loads(line))
    return rows


def series(rows: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Return the iterations and values of one metric, where it has a number."""
    found = [(row["iteration"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
    return [float(iteration) for iteration, _ in found], [float(value) for _, value in found]


def _jsonable(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _iteration_of(line: str) -> float:
    """Return the iteration of a line of metrics; of one that a crash has torn, infinity."""
    try:
        return float(json.loads(line)["iteration"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf
