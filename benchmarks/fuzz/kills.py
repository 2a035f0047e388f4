"""Signals at random moments to `train`, its workers and processes, `prepare` and `evaluate`; then resuming."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.fuzz.files import SIDE, SMALL, locked, sound
from benchmarks.fuzz.outcomes import Campaign, Outcome, WrongError, outcome_of
from benchmarks.kill_and_resume import check_equal, descendants, start
from sagan.prepare.synthetic import SyntheticSet, write_folder

# A process that was signalled, or that lost another one, must have ended by then.
_END_S = 60.0
_WHOLE_S = 150.0
_TRAIN = (
    "train", *SMALL, "--iterations", "30", "--output.checkpoint-every", "5", "--output.log-every", "5",
    "--output.sample-every", "20", "--images.cache-mib", "0", "--auto-resume",
)  # fmt: skip
Arguments = tuple[object, ...]


class _EndedError(Exception):
    """What a process printed at its end, where it should not have been printed."""


def _train(workers: int) -> Callable[[Path, Path], Arguments]:
    def arguments(root: Path, out: Path) -> Arguments:
        return (*_TRAIN, "--data", root / "folder", "--out", out / "result", "--images.workers", workers)

    return arguments


def _prepare(root: Path, out: Path) -> Arguments:
    options = ("--resolution", SIDE, "--workers", 2, "--part-size", 8)
    return "prepare", "--source", root / "many", "--out", out / "result", *options


def _evaluate(root: Path, out: Path) -> Arguments:
    shared = ("--source", root / "run", "--proxy", "--device", "cpu", "--metrics", "fid", "kid")
    return "evaluate", *shared, "--count", 300, "--cache", out / "cache", "--out", out / "result"


# Of each kind: its command, the number of processes, and what is killed.
_KINDS: dict[str, tuple[Callable[[Path, Path], Arguments], int, str]] = {
    "train": (_train(0), 1, "all"),
    "train, 2 workers": (_train(2), 1, "all"),
    "train, a worker": (_train(2), 1, "one inside"),
    "train, 2 processes": (_train(0), 2, "all"),
    "train, a process of 2": (_train(0), 2, "one inside"),
    "prepare": (_prepare, 1, "all"),
    "prepare, a worker": (_prepare, 1, "one inside"),
    "evaluate": (_evaluate, 1, "all"),
}


def _wait(process: subprocess.Popen[bytes], family: list[int], seconds: float) -> int:
    """Wait for a process and all that it started; raise TimeoutError if one of them stays."""
    deadline = time.monotonic() + seconds
    while process.poll() is None or any(_lives(pid) for pid in family):
        if time.monotonic() > deadline:
            left = [pid for pid in family if _lives(pid)]
            for pid in {process.pid, *left, *descendants(process.pid)}:
                os.kill(pid, signal.SIGKILL)
            raise TimeoutError(f"no end within {seconds:.0f} s: {len(left)} processes left")
        time.sleep(0.05)
    return process.returncode


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _run(out: Path, arguments: Arguments, processes: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    process = start(out, *arguments, processes=processes, threads=1)
    if status := _wait(process, [], _WHOLE_S):
        raise _EndedError(f"exit status {status}: {(out / 'log.txt').read_text()[-300:]}")


@functools.cache
def _undisturbed(name: str, root: Path) -> tuple[Path, float]:
    """Return the folder of an undisturbed run, and its seconds."""
    arguments, processes, _ = _KINDS[name]
    out = root / "undisturbed" / name
    if not (done := out / "seconds").exists():
        began = time.monotonic()
        _run(out, arguments(root, out), processes)
        done.write_text(str(time.monotonic() - began))
    return out, float(done.read_text())


def _disturb(r: random.Random, out: Path, name: str, root: Path, seconds: float) -> str:
    """Start a command, send signals to it, and return what it printed."""
    arguments, processes, target = _KINDS[name]
    process = start(out, *arguments(root, out), processes=processes, threads=1)
    time.sleep(r.uniform(0.05, 1.0) ** 0.5 * seconds)
    family = descendants(process.pid)
    # Of torchrun, its processes are the ones; else the ones that decode.
    inside = [pid for pid in family if _lives(pid)]
    number = r.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
    if target == "one inside":
        targets, number = r.sample(inside, min(1, len(inside))), signal.SIGKILL
    else:
        # A terminal and a cluster signal all, an out-of-memory killer one.
        targets = [process.pid] if number != signal.SIGINT and r.random() < 0.5 else [process.pid, *inside]
    for _ in range(1 if number == signal.SIGKILL else r.choice((1, 1, 2, 3))):
        for pid in targets:
            if _lives(pid):
                os.kill(pid, number)
        time.sleep(r.uniform(0, 0.3))
    _wait(process, family, _WHOLE_S if target == "one inside" else _END_S)
    return (out / "log.txt").read_text(errors="replace")


def _compare(name: str, out: Path, want: Path) -> None:
    if name.startswith("train"):
        check_equal(want / "result", out / "result")
    elif name.startswith("prepare"):
        for file in ("images.npy", "labels.npy", "digests.npy", "names.txt"):
            if (out / "result" / file).read_bytes() != (want / "result" / file).read_bytes():
                raise WrongError(f"{file} differs")
    else:
        figures = [
            json.loads(next((each / "result").glob("*.json")).read_text())["figures"] for each in (out, want)
        ]
        if figures[0] != figures[1]:
            raise WrongError(f"figures {figures[0]}, not {figures[1]}")


def run_case(number: int, folder: Path) -> Outcome:
    """Kill one command at a random moment, run it again to its end, and compare with an undisturbed one."""
    name, r = [*_KINDS][number % len(_KINDS)], random.Random(number)
    out = folder / "killed"

    def run() -> Outcome:
        root = sound(folder)
        with locked(root / "lock"):
            if not (root / "many").exists():
                write_folder(root / "many", SyntheticSet(classes=4, images=80, val_images=0, scale=0.7))
        with locked(root / name):
            want, seconds = _undisturbed(name, root)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        try:
            printed = _disturb(r, out, name, root, seconds)
            _run(out, _KINDS[name][0](root, out), _KINDS[name][1])
        except TimeoutError as error:
            return Outcome("hung", name, f"{error}; {(out / 'log.txt').read_text()[-300:]}")
        try:
            _compare(name, out, want)
        except RuntimeError as error:  # of check_equal
            raise WrongError(str(error)) from error
        # Torchrun prints its own; ours have frames of the trainer.
        if any('imagenet_sagan.py", line' in part for part in printed.split("Traceback")[1:]):
            return Outcome("unclear", name, f"a traceback: ...{printed[-300:]}")
        return Outcome("right", name)

    return outcome_of(run, name)


KILLS = Campaign("kills", run_case, count=56, seconds=360, limit_s=400)
