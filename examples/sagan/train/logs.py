"""A run's metrics: rows of JSON and TensorBoard's files, reading them back, and how fast training goes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sagan.errors import UserError
from sagan.io import atomic_write_text
from sagan.recipes import RunConfig

T = TypeVar("T")

METRICS = "metrics.jsonl"


class RunLog:
    """Appends rows of metrics to ``metrics.jsonl`` and to TensorBoard's files.

    Args:
        out: the run's folder.
        iteration: where the run resumes: later rows are dropped, because it will write them again.
        tensorboard: whether to write ``out/tensorboard``, if TensorBoard is installed.
        enabled: False on ranks that write nothing.
    """

    def __init__(self, out: Path, iteration: int, *, tensorboard: bool, enabled: bool = True) -> None:
        self._file: Any = None
        self._board: Any = None
        if not enabled:
            return
        out.mkdir(parents=True, exist_ok=True)
        path = out / METRICS
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _iteration_of(line) <= iteration]
            atomic_write_text(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a")
        if tensorboard and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(out / "tensorboard", purge_step=iteration + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        """Write a row; it must have an "iteration". NaN and infinities become null."""
        if self._file is None:
            return
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

    def __exit__(self, *error: object) -> None:
        for each in (self._file, self._board):
            if each is not None:
                each.close()


class Throughput:
    """Rates of training since the last log.

    Args:
        config: the run.
        iteration: iterations that are done already.
    """

    def __init__(self, config: RunConfig, iteration: int) -> None:
        self._config = config
        self._iteration = iteration
        self._start = time.perf_counter()
        self._waited_s = 0.0

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield from ``batches``, and measure how long they take."""
        while True:
            start = time.perf_counter()
            batch = next(batches)
            self._waited_s += time.perf_counter() - start
            yield batch

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of a ``with`` block."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def rates(self, iteration: int) -> dict[str, float]:
        """Return images/s, the share of time spent waiting for data, and the seconds to the end."""
        now = time.perf_counter()
        seconds = max(now - self._start, 1e-9)
        done = iteration - self._iteration
        rates = {
            "images_per_s": done * self._config.batch_size / seconds,
            "data_wait_share": self._waited_s / seconds,
            "seconds_left": (self._config.iterations - iteration) * seconds / max(done, 1),
        }
        self._iteration, self._start, self._waited_s = iteration, now, 0.0
        return rates


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """Return the rows of a run by iteration, without a torn last line.

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
    """Return the iterations and values of one metric, in rows where it is a number."""
    found = [(row["iteration"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
    return [float(iteration) for iteration, _ in found], [float(value) for _, value in found]


def _jsonable(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _iteration_of(line: str) -> float:
    """Return the iteration of a line of metrics; infinity if a crash has torn the line."""
    try:
        return float(json.loads(line)["iteration"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf
