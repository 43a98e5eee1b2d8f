"""Clients simulated on this machine: in this process, or in worker processes beside it."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from scalefl.client import Residents
from scalefl.data import FederatedData
from scalefl.engines.wire import Channel, InMemory
from scalefl.engines.worker import logged, lost, run_safely
from scalefl.errors import ConfigError
from scalefl.measure import worker_environment
from scalefl.params import Params
from scalefl.problem import Batch
from scalefl.types import ClientLoss, ClientTask, ClientUpdate, Method, Population, Receipt

_Order = tuple[ClientTask, Params, Batch]


class LocalEngine:
    """Runs clients in this process (`workers = 0`) or in `workers` processes.

    The numbers do not depend on `workers`, only on `threads`, since kernels choose their order of summation by
    it. A worker that dies loses its task, not the run. A context manager: it stops its workers at the end.

    Args:
        data: every client's examples.
        clients: what the server knows of them.
        workers: processes; 0 runs clients in this one.
        threads: torch's threads for each process that trains.
    """

    def __init__(self, data: FederatedData, clients: Population, *, workers: int = 0, threads: int = 1) -> None:
        if workers < 0 or threads < 1:
            raise ConfigError(f"workers ({workers}) must be at least 0 and threads ({threads}) at least 1")
        self._data, self._clients = data, clients
        self._threads = threads
        self._residents = Residents()
        self._held: dict[str, Tensor] = {}
        self._workers: list[_Worker] = []
        self._num_workers = workers
        self._threads_before = torch.get_num_threads()

    def __enter__(self) -> Self:
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.set_num_threads(self._threads_before)
        for worker in self._workers:
            worker.stop()
        self._workers.clear()

    def population(self) -> Population:
        """The clients."""
        return self._clients

    def fit(self, method: Method, orders: Iterable[tuple[ClientTask, Params]]) -> Iterator[ClientUpdate | ClientLoss]:
        """Run the tasks; results come as they are ready."""
        return self._fit_here(method, orders) if self._num_workers == 0 else self._fit_beside(method, orders)

    def _fit_here(
        self, method: Method, orders: Iterable[tuple[ClientTask, Params]]
    ) -> Iterator[ClientUpdate | ClientLoss]:
        for order in self._prepared(orders):
            if isinstance(order, ClientLoss):
                yield order
                continue
            task, params, examples = order
            # Frozen tensors stay the server's; what training changes is copied, into memory that clients share in turn.
            own = {name: self._own_copy(name, t) if name in task.moving else t for name, t in params.items()}
            yield run_safely(method, self._data.problem, self._residents, task, own, examples)

    def _own_copy(self, name: str, tensor: Tensor) -> Tensor:
        held = self._held.get(name)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = self._held[name] = torch.empty_like(tensor)
        return held.copy_(tensor)

    def _fit_beside(
        self, method: Method, orders: Iterable[tuple[ClientTask, Params]]
    ) -> Iterator[ClientUpdate | ClientLoss]:
        while len(self._workers) < self._num_workers:
            self._workers.append(_Worker(self._threads))
        queue = self._prepared(orders)
        busy: dict[int, _Worker] = {}
        try:
            for worker in self._workers:
                yield from self._give(worker, method, queue, busy)
            while busy:
                for ready in wait(list(busy)):
                    worker = busy.pop(ready)  # type: ignore[arg-type]
                    answer = worker.answer()
                    yield from self._give(worker, method, queue, busy)
                    yield answer
        finally:
            # The caller gave up in the middle: an answer to an old task must not meet the next round.
            for worker in busy.values():
                worker.stop()
                if worker in self._workers:  # the engine may have been left before its iterator was closed
                    self._workers.remove(worker)

    def _give(
        self,
        worker: _Worker,
        method: Method,
        queue: Iterator[_Order | ClientLoss],
        busy: dict[int, _Worker],
    ) -> Iterator[ClientLoss]:
        """Give a worker the next order; yield clients on the way whose data could not be had."""
        for order in queue:
            if isinstance(order, ClientLoss):
                yield order
                continue
            task, params, examples = order
            worker.send(task, (method, self._data.problem, task), examples, params)
            busy[worker.channel.fileno()] = worker
            return

    def _prepared(self, orders: Iterable[tuple[ClientTask, Params]]) -> Iterator[_Order | ClientLoss]:
        """Orders with the client's examples; a client whose data fails is lost, not the run."""
        for task, params in orders:
            try:
                examples = self._data.examples(task.client_id)
            except Exception as error:
                yield lost(task, error)
            else:
                yield task, params, examples


class _Worker:
    """One process that trains, and the pipe to it; starts again by itself when it has died."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._start()

    def send(self, task: ClientTask, header: Any, *groups: Params) -> None:
        """Give it a task; if it does not live to take it, `answer` tells."""
        self._task = task
        try:
            self.channel.send(header, *groups)
        except OSError:  # it died idle: its successor gets the task
            self._restart()
            with contextlib.suppress(OSError):  # it died too: the other end is closed, and `answer` finds that
                self.channel.send(header, *groups)

    def answer(self) -> ClientUpdate | ClientLoss:
        """Its answer; a record of the loss if it died over the task."""
        params = InMemory()
        try:
            incoming = self.channel.receive()
            if isinstance(incoming.header, ClientLoss):
                return logged(incoming.header)
            incoming.receive(params)
        except (EOFError, OSError):
            cause, said = self._obituary()
            self._restart()
            return logged(ClientLoss(self._task.client_id, self._task.round, cause, traceback=said))
        client_id, num_examples, metrics, receipt = incoming.header
        assert isinstance(receipt, Receipt)
        return ClientUpdate(client_id, params, num_examples, metrics, receipt)

    def stop(self) -> None:
        """End it, whatever it is doing."""
        self.channel.close()
        self._process.kill()
        self._process.wait()
        self._stderr.close()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        # The worker is a fresh interpreter, not a fork: forking a process that has run OpenMP threads is
        # unsafe, and a fresh one does not import the caller's main script again.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "scalefl.engines.worker", str(theirs.fileno()), str(self._threads)],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stderr=self._stderr,
            env=worker_environment(),
        )
        theirs.close()
        self.channel = Channel(ours)

    def _restart(self) -> None:
        self.stop()
        self._start()

    def _obituary(self) -> tuple[str, str]:
        """Why it died, in a line, and all that it said on the way."""
        code = self._process.wait()
        how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit status {code}"
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip()
        last = said.splitlines()[-1:]
        return ": ".join(["its worker died", how, *last]), said
