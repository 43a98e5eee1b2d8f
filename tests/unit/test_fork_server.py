"""Workers that are forked from one process: they share its memory, say why they died, and live without it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from scalefl.engines.fork_server import ForkServer
from scalefl.engines.local import LocalEngine
from scalefl.measure import worker_environment
from support import (
    Clients,
    MadeData,
    comparable,
    full_bytes,
    identical,
    kill_workers,
    make_method,
    play,
    waited,
    workers_of,
)

DATA = MadeData([9, 12, 10, 8])
CLIENTS = Clients(DATA, (10 * full_bytes(),))


def memory(pid: int) -> dict[str, int]:
    """In KiB, by the system's words."""
    lines = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]]
    return {name.rstrip(":"): int(size) for name, size, *_ in lines}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def wanted():
    with LocalEngine(DATA, CLIENTS) as here:
        return play(make_method("fedavg"), here, 2)


def test_workers_share_what_was_imported():
    with LocalEngine(DATA, CLIENTS, workers=2) as engine:
        play(make_method("fedavg"), engine, 1)
        for worker in engine._workers:
            held = memory(worker._process.pid)
            private = held["Private_Dirty"] + held["Private_Clean"]
            assert private < held["Rss"] / 3, held


def test_without_a_fork_server_numbers_are_the_same(wanted, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with LocalEngine(DATA, CLIENTS, workers=2) as engine:
        states, records = play(make_method("fedavg"), engine, 2)
        assert engine._forks is None
    assert identical(states[-1].params, wanted[0][-1].params)
    assert [comparable(record) for record in records] == [comparable(record) for record in wanted[1]]


@pytest.mark.parametrize("dies", ["the fork server", "it and its workers", "it before the first worker"])
def test_a_fork_server_that_is_killed_costs_nothing(wanted, dies):
    """Its workers live on, and others are fresh interpreters."""
    with LocalEngine(DATA, CLIENTS, workers=2) as engine:
        assert engine._forks is not None
        if dies != "it before the first worker":
            play(make_method("fedavg"), engine, 1)
        os.kill(engine._forks._process.pid, signal.SIGKILL)
        if dies == "it and its workers":
            killed = kill_workers(engine)
            waited(lambda: not any(map(is_alive, killed)))
        states, (record,) = play(make_method("fedavg"), engine, 1)
    assert record.lost == []
    assert identical(states[-1].params, wanted[0][1].params)


@pytest.fixture
def server():
    server = ForkServer(worker_environment(measured=False))
    yield server
    server.stop()


def test_what_a_worker_says_at_its_end_is_heard(server, tmp_path):
    with (tmp_path / "said").open("wb+") as said, Path(os.devnull).open() as nothing:
        worker = server.start(["one", "none", "cpu"], nothing.fileno(), said.fileno())
        assert worker.wait() == worker.wait() == 1, "an exit status, as often as one asks"
        said.seek(0)
        assert b"Traceback" in (told := said.read()) and b"Error" in told
        worker.kill()  # its number may be another's now


def test_who_is_interrupted_while_a_worker_starts_takes_no_answer_for_another(wanted):
    """As by Ctrl-C, while the fork server imports: its late answers must not be read as others."""

    class Interrupted(socket.socket):
        def recv(self, *_sizes):
            raise KeyboardInterrupt

    with LocalEngine(DATA, CLIENTS, workers=2) as engine:
        forks = engine._forks
        usual, forks._socket = forks._socket, Interrupted(fileno=forks._socket.detach())
        with pytest.raises(KeyboardInterrupt):
            play(make_method("fedavg"), engine, 1)
        assert usual.fileno() == forks._socket.fileno() == -1, "nobody asks again"
        states, (record,) = play(make_method("fedavg"), engine, 1)
        assert record.lost == [] and len(workers_of(engine)) == 2
    assert identical(states[-1].params, wanted[0][1].params)


def test_who_ignores_the_end_of_children_hears_of_it():
    """A program may be started so."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        server = ForkServer(worker_environment(measured=False))
    finally:
        signal.signal(signal.SIGCHLD, before)
    with Path(os.devnull).open() as nothing:
        worker = server.start(["1", "none", "cpu"], nothing.fileno(), nothing.fileno())
    worker.kill()
    assert worker.wait() != 0
    server.stop()


def test_an_interrupt_is_not_for_the_fork_server(server):
    with Path(os.devnull).open() as nothing:
        first = server.start(["1", "none", "cpu"], nothing.fileno(), nothing.fileno())
        os.kill(server._process.pid, signal.SIGINT)
        second = server.start(["1", "none", "cpu"], nothing.fileno(), nothing.fileno())
        assert first.pid != second.pid
        second.kill()
        assert first.wait() > 0 and second.wait() != 0


def test_who_can_not_fork_says_so(server, monkeypatch):
    with pytest.raises(OSError, match="No child process"):
        server.wait(1)
    server._process.kill()
    with Path(os.devnull).open() as nothing, pytest.raises(OSError):
        server.start(["1", "none", "cpu"], nothing.fileno(), nothing.fileno())


ENGINE = """
import time
from support import children
from test_fork_server import CLIENTS, DATA, LocalEngine, make_method, play
with LocalEngine(DATA, CLIENTS, workers=2) as engine:
    play(make_method("fedavg"), engine, 1)
    print(*children(), flush=True)
    time.sleep(600)
"""


def test_nobody_outlives_a_killed_engine():
    path = os.pathsep.join(sys.path)
    program = [sys.executable, "-c", ENGINE]
    with subprocess.Popen(program, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}, text=True) as engine:
        assert engine.stdout is not None
        pids = list(map(int, engine.stdout.readline().split()))
        assert len(pids) == 3
        engine.kill()
    waited(lambda: not any(map(is_alive, pids)))


@pytest.mark.parametrize("settings", [{"workers": 1}, {"workers": 2, "cap": "measured"}, {}], ids=str)
def test_who_has_nobody_to_share_with_needs_none(settings):
    with LocalEngine(DATA, CLIENTS, **settings) as engine:
        assert engine._forks is None
