"""What the trainer asks of the system's allocator."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from sagan.train import allocator

# Faults while 64 MiB are allocated, written and freed ten times, after a first time.
SCRIPT = """
import resource, sys
import torch
from sagan.train.allocator import keep_freed_memory

if "keep" in sys.argv:
    assert keep_freed_memory()
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
EXAMPLES = Path(allocator.__file__).parents[2]


def faults(*arguments: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(EXAMPLES), "PATH": ""},
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_freed_memory_is_taken_again_with_fewer_faults() -> None:
    assert faults("keep") < 0.8 * faults()


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert allocator.keep_freed_memory() is False
