"""What signals do to a program outside training; test_resume.py and test_commands.py hold the rest."""

from __future__ import annotations

import os
import signal

import pytest
from command_line import python

# The exception comes in a callback that cannot raise it.
IN_A_CALLBACK = """
import os, sys, time
from sagan import signals

class Dying:
    def __del__(self):
        os.kill(os.getpid(), int(sys.argv[1]))
        for _ in range(1000):
            pass

signals.start_program()
with signals.program():
    Dying()
    time.sleep(60)
"""
# The handlers of the parent would end, or not end, a worker of a pool.
IN_A_CHILD = """
import os, signal, sys
from sagan import signals

signals.start_program()
with signals.program():
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), int(sys.argv[1]))
        os._exit(7)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256)
"""


def run(program: str, number: signal.Signals) -> tuple[int, str]:
    process = python(program, int(number))
    _, error = process.communicate(timeout=50)
    return process.returncode, error


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_callback_that_may_not_raise_is_not_lost(number: signal.Signals) -> None:
    assert run(IN_A_CALLBACK, number) == (128 + number, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals of POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 7), (signal.SIGTERM, 256 - signal.SIGTERM)])
def test_forked_workers_end_when_their_parent_says_so_and_not_at_ctrl_c(
    number: signal.Signals, code: int
) -> None:
    assert run(IN_A_CHILD, number) == (code, "")
