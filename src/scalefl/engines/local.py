"""Clients simulated on this machine: in this process, or in worker processes beside it."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from multiprocessing.connection import wait
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor

from scalefl.client import Residents
from scalefl.data import FederatedData
from scalefl.data.population import PopulationView
from scalefl.engines.gauge import device_of
from scalefl.engines.wire import Channel, InMemory
from scalefl.engines.worker import cap_hit, logged, lost, run_safely, says_out_of_memory
from scalefl.errors import ConfigError
from scalefl.measure import usable_bytes, worker_environment
from scalefl.params import Params
from scalefl.problem import Batch, Problem
from scalefl.types import ClientInfo, ClientLoss, ClientTask, ClientUpdate, Method, Population, Receipt

_Order = tuple[ClientTask, Params, Batch]


Cap = Literal["none", "hard"]
"""Whether a worker may take more than its client's budget."""


def check_cap(cap: Cap, workers: int) -> None:
    """Refuse a cap without workers.

    Raises:
        ConfigError: says what to do.
    """
    if cap == "hard" and workers < 1:
        raise ConfigError("engine.cap = 'hard' needs workers >= 1: a cap on this process would be one on the server")


def offered(clients: Population, cap: Cap) -> Population:
    """The clients as methods see them: under a hard cap with the part of their budgets that may be planned with."""
    if cap == "none":
        return clients

    def usable(client: ClientInfo) -> ClientInfo:
        return replace(client, memory_bytes=usable_bytes(client.memory_bytes))

    smallest, largest = clients.smallest_memory_bytes, clients.largest_memory_bytes
    return PopulationView(clients, usable, usable_bytes(smallest), usable_bytes(largest))


class LocalEngine:
    """Runs clients in this process (`workers = 0`) or in `workers` processes.

    The numbers do not depend on `workers`, only on `threads`, since kernels choose their order of summation by
    it. A worker that dies loses its task, not the run. A context manager: it stops its workers at the end.

    Args:
        data: every client's examples.
        clients: what the server knows of them.
        workers: processes; 0 runs clients in this one.
        threads: torch's threads for each process that trains.
        cap: "hard": a client that asks its worker for more than its budget is refused, and lost.
        device: on which clients train, "cpu" or "cuda"; budgets are of its memory.

    Raises:
        ConfigError: a value is out of range; a cap without workers; no such device; or, from the first use on, the
            system can't cap.
    """

    def __init__(
        self,
        data: FederatedData,
        clients: Population,
        *,
        workers: int = 0,
        threads: int = 1,
        cap: Cap = "none",
        device: str = "cpu",
    ) -> None:
        if workers < 0 or threads < 1:
            raise ConfigError(f"workers ({workers}) must be at least 0 and threads ({threads}) at least 1")
        check_cap(cap, workers)
        self._data, self._clients = data, clients
        self._threads, self._cap = threads, cap
        self._device = device_of(device)
        self._residents = Residents(self._device)
        self._held: dict[str, Tensor] = {}
        self._workers: list[_Worker] = []
        self._num_workers = workers
        self._threads_before = torch.get_num_threads()

    def __enter__(self) -> Self:
        self._threads_before = torch.get_num_threads()
        with contextlib.ExitStack() as undo:
            undo.callback(self._stop)
            torch.set_num_threads(self._threads)
            if self._cap == "hard":  # a system that can't should say so before anything is trained
                for worker in self._started():
                    worker.wait()
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def population(self) -> Population:
        """The clients, with what of their budgets may be planned with."""
        return offered(self._clients, self._cap)

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
            own = {n: self._own_copy(n, t) if n in task.moving else t.to(self._device) for n, t in params.items()}
            yield run_safely(method, self._data.problem, self._residents, task, own, examples)

    def _own_copy(self, name: str, tensor: Tensor) -> Tensor:
        held = self._held.get(name)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = self._held[name] = torch.empty_like(tensor, device=self._device)
        return held.copy_(tensor)

    def _fit_beside(
        self, method: Method, orders: Iterable[tuple[ClientTask, Params]]
    ) -> Iterator[ClientUpdate | ClientLoss]:
        workers = self._started()
        queue = self._prepared(orders)
        busy: dict[int, _Worker] = {}
        try:
            for worker in workers:
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
            cap_bytes = self._clients[task.client_id].memory_bytes if self._cap == "hard" else None
            worker.send(method, self._data.problem, task, cap_bytes, examples, params)
            busy[worker.channel.fileno()] = worker
            return

    def _started(self) -> list[_Worker]:
        while len(self._workers) < self._num_workers:
            self._workers.append(_Worker(self._threads, self._cap, self._device))
        return list(self._workers)

    def _stop(self) -> None:
        torch.set_num_threads(self._threads_before)
        for worker in self._workers:
            worker.stop()
        self._workers.clear()

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
    """One process that trains, and the socket to it; starts again by itself when it has died."""

    def __init__(self, threads: int, cap: Cap, device: torch.device) -> None:
        self._arguments = [str(threads), cap, str(device)]
        self._cap = cap
        self._is_warm = False
        self._start()

    def send(
        self, method: Method, problem: Problem, task: ClientTask, cap_bytes: int | None, examples: Batch, params: Params
    ) -> None:
        """Give it a task; if it does not live to take it, `answer` tells."""
        self._task, self._cap_bytes = task, cap_bytes
        message = (method, problem, task, cap_bytes), examples, params
        try:
            self.wait()
            self.channel.send(*message)
        except OSError:  # it died idle: its successor gets the task
            self._restart()
            with contextlib.suppress(OSError):  # it died too: the other end is closed, and `answer` finds that
                self.wait()
                self.channel.send(*message)

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

    def answer(self) -> ClientUpdate | ClientLoss:
        """Its answer; a record of the loss if it died over the task."""
        params = InMemory()
        try:
            incoming = self.channel.receive()
            if isinstance(incoming.header, ClientLoss):
                return logged(incoming.header)
            incoming.receive(params)
        except (EOFError, OSError):
            return self._lost()
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
            [sys.executable, "-m", "scalefl.engines.worker", str(theirs.fileno()), *self._arguments],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stderr=self._stderr,
            env=worker_environment(capped=self._cap == "hard"),
        )
        theirs.close()
        self.channel = Channel(ours)
        self._is_warm = False

    def _restart(self) -> None:
        self.stop()
        self._start()

    def _lost(self) -> ClientLoss:
        cause, said = self._obituary()
        self._restart()
        if self._cap_bytes is not None and says_out_of_memory(said):
            return cap_hit(self._task, self._cap_bytes, Receipt(), said)
        return logged(ClientLoss(self._task.client_id, self._task.round, cause, traceback=said))

    def _obituary(self) -> tuple[str, str]:
        """Why it died, in a line, and all that it said on the way."""
        code = self._process.wait()
        how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit status {code}"
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip()
        last = said.splitlines()[-1:]
        return ": ".join(["its worker died", how, *last]), said
