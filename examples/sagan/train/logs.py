"""A run's metrics: in its folder, in loggers and on the console; and how fast training goes."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from sagan.contents import found_at
from sagan.errors import FailureError, UserError, is_finite
from sagan.io import atomic_write_text, open_regular
from sagan.names import printable
from sagan.recipes import RunConfig
from sagan.schema import conform
from sagan.train.loggers import Logger

T = TypeVar("T")

METRICS = "metrics.jsonl"

logger = logging.getLogger(__name__)


class RunLog:
    """Appends rows of metrics to ``metrics.jsonl``, and sends them and pictures to loggers.

    Rows after ``iteration``, where the run resumes, are dropped, because it will write them again.
    """

    def __init__(
        self, out: Path, iteration: int, loggers: Sequence[Logger] = (), *, enabled: bool = True
    ) -> None:
        self._file: Any = None
        self._loggers = [*loggers]
        if not enabled:
            return
        out.mkdir(parents=True, exist_ok=True)
        path = out / METRICS
        if path.exists():
            earlier = [json.dumps(row) + "\n" for row in read_rows(path) if row["iteration"] <= iteration]
            atomic_write_text(path, "".join(earlier))
        self._file = path.open("a")

    def write(self, row: Mapping[str, Any]) -> None:
        """Write a row; it must have an "iteration". NaN and infinities become null.

        Raises:
            FailureError: if the disk is full, for example.
        """
        if self._file is None:
            return
        plain = {name: _jsonable(value) for name, value in row.items()}
        try:
            self._file.write(json.dumps(plain) + "\n")
            self._file.flush()
        except OSError as error:
            raise FailureError(
                f"{self._file.name} could not be written ({error}); checkpoints are intact, and --resume continues "
                "from the latest"
            ) from error
        numbers = {
            name: value
            for name, value in plain.items()
            if name != "iteration" and isinstance(value, (int, float))
        }
        if numbers:
            self._tell(lambda each: each.log_row(row["iteration"], numbers))

    def show(self, iteration: int, pictures: Mapping[str, Path]) -> None:
        """Send pictures to the loggers."""
        self._tell(lambda each: each.log_images(iteration, pictures))

    def _tell(self, log: Callable[[Logger], None]) -> None:
        for each in [*self._loggers]:
            try:
                log(each)
            except Exception as error:  # of other people's code
                self._loggers.remove(each)
                logger.warning("%s failed and gets no more of this run: %r", type(each).__name__, error)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        self._tell(lambda each: each.close())
        if self._file is not None:
            with contextlib.suppress(OSError):  # every row was flushed, or the run ends with its error
                self._file.close()


class Console:
    """The console output of a run: a progress bar on a terminal, else a line for each log."""

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


class Throughput:
    """Rates of training since the last log."""

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
    """Return the rows of a run, as :func:`read_rows`."""
    path = out / METRICS
    if not path.is_file():
        raise UserError(f"source: expected the folder of a run with {METRICS}, got {found_at(out)}")
    return read_rows(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file by iteration. Damaged ones, as a crash tears the last, are logged."""
    with open_regular(path) as file:
        lines = file.read().decode(errors="replace").splitlines()
    rows = [_row(line) for line in lines]
    if damaged := [number for number, row in enumerate(rows, 1) if row is None]:
        logger.warning(
            "%s: skipped %d damaged lines, the first is line %d",
            printable(str(path)),
            len(damaged),
            damaged[0],
        )
    return [row for row in rows if row is not None]


def series(rows: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Return the iterations and values of one metric: NaN where it was not finite, nothing if it never was."""
    found = [
        (float(row["iteration"]), float(row[name]) if is_finite(row[name]) else math.nan)
        for row in rows
        if name in row
    ]
    if all(math.isnan(value) for _, value in found):
        return [], []
    return [iteration for iteration, _ in found], [value for _, value in found]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _jsonable(value: Any) -> Any:
    return None if isinstance(value, float) and not is_finite(value) else value


def _row(line: str) -> dict[str, Any] | None:
    """Return the row in a line; None unless it has an iteration, and otherwise numbers, texts and nulls."""
    try:
        row: dict[str, Any] = conform(json.loads(line), dict[str, float | str | None], "row")
        conform(row["iteration"], int, "iteration")
    except (ValueError, LookupError, RecursionError):
        return None
    return row
