"""Processes that do not start, cannot meet or end are named in one sentence, within seconds."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from command_line import python

from sagan import rendezvous
from sagan.errors import UserError
from sagan.rendezvous import LostProcessError, Rendezvous, launched

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Two of these processes talk for ever.
TALK = """
from sagan.distributed import init_world
with init_world("cpu") as world:
    while True:
        world.max_over_ranks(1)
        print("talks", flush=True)
"""


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A socket at MASTER_PORT that accepts connections and says nothing."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        yield server


def meet(count: int) -> list[Rendezvous]:
    found: dict[int, Rendezvous] = {}
    threads = [
        threading.Thread(target=lambda rank=rank: found.update({rank: Rendezvous(rank, count, start_s=20)}))
        for rank in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(count)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"RANK": "1"}, "expected WORLD_SIZE from 1 to 65535, got none"),
        ({"WORLD_SIZE": "2"}, "expected RANK from 0 to 1, got none"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "expected RANK from 0 to 1, got '2'"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "expected RANK from 0 to 1, got '-1'"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "expected WORLD_SIZE from 1 to 65535, got 'two'"),
        ({"WORLD_SIZE": "0"}, "expected WORLD_SIZE from 1 to 65535, got '0'"),
    ],
)
def test_a_wrong_environment_is_an_error(
    values: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    assert launched() == (0, 1)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"environment: {message}; start with torchrun"):
        launched()


@pytest.mark.parametrize(
    ("rank", "listens", "message"),
    [
        (0, False, "2 of 3 processes have not started: processes 1, 2"),
        (1, False, "no process 0 at 127.0.0.1, port [0-9]+ .Connection refused."),
        (1, True, "no answer as of process 0 from 127.0.0.1, port [0-9]+"),
    ],
)
def test_who_does_not_start_is_named_now_and_then_and_in_the_end(
    rank: int,
    listens: bool,
    message: str,
    listener: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not listens:
        listener.close()
    monkeypatch.setattr(rendezvous, "_SAY_AFTER_S", 0.1)
    with pytest.raises(UserError, match=f"^{message} after 1 s; start all with torchrun"):
        Rendezvous(rank, 3, start_s=1)
    assert capsys.readouterr().err.count(f"Process {rank} waits: ") == 1


@pytest.mark.usefixtures("listener")
def test_a_port_in_use_is_an_error_at_once() -> None:
    with pytest.raises(UserError, match="it is in use; choose another MASTER_PORT"):
        Rendezvous(0, 2)


def test_why_a_process_ended_reaches_the_others(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener.close()
    lost = RuntimeError("gloo: Connection closed by peer")
    monkeypatch.setattr(rendezvous, "_ANSWER_S", 0.3)
    zero, one, two = meet(3)
    assert zero.leave(lost) == "processes 1, 2 ended without a message, perhaps killed because memory ran out"
    assert two.leave(lost) == "process 1 ended without a message, perhaps killed because memory ran out"
    assert one.leave(OSError("disk full")) == ""
    assert zero.leave(lost) == two.leave(lost) == "process 1 failed: disk full"
    with pytest.raises(LostProcessError, match="process 1 failed: disk full"):
        Rendezvous(2, 3, start_s=5)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_in_seconds(victim: int, listener: socket.socket) -> None:
    listener.close()
    processes = [python(TALK, WORLD_SIZE=2, RANK=rank, LOCAL_RANK=rank) for rank in (0, 1)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "talks\n"
    start = time.monotonic()
    processes[victim].send_signal(signal.SIGKILL)
    other = processes[1 - victim]
    _, error = other.communicate(timeout=60)
    processes[victim].communicate()
    assert time.monotonic() - start < 20
    why = f"process {victim} ended without a message, perhaps killed because memory ran out"
    assert error.endswith(f"LostProcessError: process {1 - victim} ends, because {why}\n")
