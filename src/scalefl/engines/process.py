"""Worker processes as the engine sees them: each with the task that it is at, started again when it dies."""

from __future__ import annotations

import contextlib
import functools
import logging
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from scalefl.engines.fork_server import Forked, ForkServer
from scalefl.engines.order import Assignment, Cap, Lesson, Order, key_of
from scalefl.engines.shared import Desk
from scalefl.engines.wire import Channel, InMemory
from scalefl.engines.worker import cap_hit, logged, says_out_of_memory
from scalefl.errors import ConfigError
from scalefl.measure import worker_environment
from scalefl.params import Params
from scalefl.problem import Batch
from scalefl.types import Adding, ClientLoss, ClientTask, ClientUpdate, Receipt

_log = logging.getLogger("scalefl")


class Given(NamedTuple):
    """A task with all that it needs; `again` if a worker has died over it, `is_told` if its update has been yielded."""

    task: ClientTask
    params: Params
    examples: Batch
    again: bool = False
    is_told: bool = False


Bundle = tuple[Given, ...]
"""Tasks that are done at once: equal ones, or one alone."""


class Member(NamedTuple):
    """One client of a job: where it works, if memory is shared, and how what comes of it is added up, if it is."""

    given: Given
    desk: Desk | None
    adding: Adding | None


class Job(NamedTuple):
    """A worker, and whose tasks it does at once."""

    worker: Worker
    members: tuple[Member, ...]

    @property
    def is_shared(self) -> bool:
        """Whether it works in memory that is shared."""
        return self.members[0].desk is not None

    def clear(self) -> None:
        """Nobody works on it or looks at what came of it any more."""
        for member in self.members:
            if member.desk is not None:
                member.desk.close()


_STDERR = 2
"""What users' code prints in workers goes there: the output may be JSON."""

Process = Forked | subprocess.Popen[bytes]


class Worker:
    """One process that trains, and the socket to it; starts again by itself when it has died.

    Args:
        threads, cap, device: of `LocalEngine`.
        forks: makes the process, if it can; else it is a fresh interpreter.
    """

    def __init__(self, threads: int, cap: Cap, device: torch.device, forks: ForkServer | None) -> None:
        self._arguments = [str(threads), cap, str(device)]
        self._cap, self._forks = cap, forks
        self._is_warm = False
        self.starts = 0
        self._start()

    def send(self, lesson: Lesson, cap_bytes: int | None, job: Job, *, is_ahead: bool) -> None:
        """Give it a task, which may be ahead of one that it is at; if it does not live to take it, `answer` tells."""
        self._cap_bytes = cap_bytes
        assignments = tuple(Assignment(m.given.task, m.desk.brief if m.desk else None, m.adding) for m in job.members)
        order = Order(lesson, cap_bytes, assignments)
        tensors = [] if job.is_shared else [job.members[0].given.examples, job.members[0].given.params]
        try:
            self.wait()
            self.channel.send(order, *tensors)
        except OSError:
            if is_ahead:  # it died over the other one: `answer` finds that
                return
            self._restart()  # it died idle: its successor gets the task
            with contextlib.suppress(OSError):  # it died too: the other end is closed, and `answer` finds that
                self.wait()
                self.channel.send(order, *tensors)

    def wait(self) -> None:
        """Wait until it has warmed up.

        Raises:
            ConfigError: it says that the system can't cap memory.
        """
        if self._is_warm:
            return
        self._is_warm = True
        with contextlib.suppress(EOFError, OSError):  # it died: `answer` finds that
            refusal = self.channel.receive().header
            if refusal is not None:
                raise ConfigError(f"engine.cap = 'hard': this system cannot cap a worker's memory ({refusal})")

    def answer(self, job: Job) -> list[ClientUpdate | ClientLoss | None]:
        """Its answers to what it was sent last; if it died over it, None the first time for a task, then a loss."""
        params = InMemory()
        try:
            incoming = self.channel.receive()
            if not job.is_shared and not isinstance(incoming.header[0], ClientLoss):
                incoming.receive(params)
        except (EOFError, OSError):
            return self._died(job)
        return [_answer(told, m, params) for told, m in zip(incoming.header, job.members, strict=True)]

    def stop(self) -> None:
        """End it, whatever it is doing."""
        self.channel.close()
        self._process.kill()
        with contextlib.suppress(OSError):
            self._process.wait()
        self._stderr.close()

    def _start(self) -> None:
        with contextlib.ExitStack() as undo:
            self._stderr = undo.enter_context(tempfile.TemporaryFile())
            self._process, connection = self._forked() or self._connected(self._fresh)
            undo.pop_all()  # they live as long as the process
        self.starts += 1
        self.channel = Channel(connection, key_of)
        self._is_warm = False

    def _forked(self) -> tuple[Process, socket.socket] | None:
        """None where that can't be."""
        if self._forks is None:
            return None
        start = functools.partial(self._forks.start, self._arguments, stderr=self._stderr.fileno())
        try:
            return self._connected(start)
        except OSError as error:
            _log.debug("a worker can't be forked: %s", error)
            return None

    def _fresh(self, connection: int) -> Process:
        """A new interpreter: it is no copy of this process, and does not import the caller's main script again."""
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "scalefl.engines.worker", str(connection), *self._arguments],
            pass_fds=(connection,),
            stdin=subprocess.DEVNULL,
            stdout=_STDERR,
            stderr=self._stderr,
            env=worker_environment(measured=self._cap != "none", capped=self._cap == "hard"),
        )

    def _connected(self, start: Callable[[int], Process]) -> tuple[Process, socket.socket]:
        """A process that is started with one end of a connection, and the other end."""
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as undo, theirs:
            undo.enter_context(ours)
            process = start(theirs.fileno())
            undo.pop_all()
        return process, ours

    def _restart(self) -> None:
        self.stop()
        self._start()

    def _died(self, job: Job) -> list[ClientUpdate | ClientLoss | None]:
        cause, said = self._obituary()
        self._restart()
        return [self._lost(member.given, cause, said) for member in job.members]

    def _lost(self, given: Given, cause: str, said: str) -> ClientLoss | None:
        if self._cap_bytes is not None and says_out_of_memory(said):
            return cap_hit(given.task, self._cap_bytes, Receipt(), said)
        if self._cap != "hard" and not given.again:  # under a cap, whatever killed it would have killed a real client
            _log.warning("client %d of round %d is asked again: %s", given.task.client_id, given.task.round + 1, cause)
            return None
        return logged(ClientLoss(given.task.client_id, given.task.round, cause, traceback=said))

    def _obituary(self) -> tuple[str, str]:
        """Why it died, in a line, and all that it said on the way."""
        try:
            code = self._process.wait()
            how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit status {code}"
        except OSError as error:
            how = str(error)
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip()
        last = said.splitlines()[-1:]
        return ": ".join(["its worker died", how, *last]), said


def _answer(told: Any, member: Member, params: Params) -> ClientUpdate | ClientLoss:
    """What a worker has told of a task; `params` are what it has sent beside."""
    if isinstance(told, ClientLoss):
        return logged(told)
    client_id, num_examples, metrics, receipt, is_added = told
    assert isinstance(receipt, Receipt)
    if is_added:
        params = {}
    elif member.desk is not None:
        params = member.desk.results()
    return ClientUpdate(client_id, params, num_examples, metrics, receipt, is_added=is_added)
