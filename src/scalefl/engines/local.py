"""Clients simulated on this machine: in this process, or in worker processes beside it."""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from multiprocessing.connection import wait
from operator import length_hint
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from scalefl.client import Residents
from scalefl.data import FederatedData
from scalefl.data.population import PopulationView
from scalefl.engines.fork_server import ForkServer
from scalefl.engines.gauge import device_of
from scalefl.engines.order import Cap, Lesson
from scalefl.engines.process import Bundle, Given, Job, Member, Worker
from scalefl.engines.shared import Arena, Board, Desk, Ledger, can_share
from scalefl.engines.worker import at_once, lost, run_safely
from scalefl.errors import ConfigError, check_range
from scalefl.measure import keep_freed_memory, usable_bytes, worker_environment
from scalefl.params import Params
from scalefl.problem import num_rows
from scalefl.types import (
    Adding,
    ClientInfo,
    ClientLoss,
    ClientTask,
    ClientUpdate,
    Method,
    Population,
    Reduction,
    Step,
)
from scalefl.vectorized import can_vectorize

ADDING_WORKERS = 4
"""From so many workers on, each adds its clients up itself.

To add a client with a layer of two million weights takes this process 2 to 3 ms, and a worker 60 to train it with 50
examples. For two workers it is no matter who adds; twenty would wait for this process.
"""


class _Queue:
    """What is to be done: one task is laid out before a worker falls free, so that it need not wait for that.

    Args:
        orders: drawn when needed; after those that are to be done again.
        lay_out: puts what a task works on into shared memory, if there is any.
    """

    def __init__(self, orders: Iterator[Bundle | ClientLoss], lay_out: Callable[[Given], Desk | None]) -> None:
        self._orders, self._lay_out = orders, lay_out
        self._again: list[Bundle | ClientLoss] = []
        self._next: list[tuple[Given, Desk | None]] = []
        self._losses: list[ClientLoss] = []

    def prepare(self) -> None:
        """Have the next task ready, or the next ones that are done at once."""
        while not self._next:
            order = self._again.pop() if self._again else next(self._orders, None)
            if order is None:
                return
            if isinstance(order, ClientLoss):
                self._losses.append(order)
            else:
                self._next = [(given, self._lay_out(given)) for given in order]
                if len(order) > 1 and not all(desk for _, desk in self._next):
                    self.close()  # what can't be shared is sent, one by one
                    self._again += [(given,) for given in order]

    def take(self) -> list[tuple[Given, Desk | None]]:
        """The next task, or the next ones that are done at once; none where all are done, or under way."""
        self.prepare()
        taken, self._next = self._next, []
        return taken

    def losses(self) -> list[ClientLoss]:
        """Clients whose data could not be had, each told once."""
        told, self._losses = self._losses, []
        return told

    def put_back(self, order: Given | ClientLoss) -> None:
        """It is to be done again, or told to be lost, if that can't be."""
        self._again.append(order if isinstance(order, ClientLoss) else (order,))

    def close(self) -> None:
        """What is laid out is not asked for."""
        for _, desk in self._next:
            if desk is not None:
                desk.close()
        self._next = []


class _Sums:
    """What workers add up themselves in a round: a ledger and the tasks in it for each.

    Args:
        arena: where ledgers lie.
        reduction: how updates enter, and where all goes in the end.
    """

    def __init__(self, arena: Arena, reduction: Reduction) -> None:
        self.adding = reduction.adding
        self._arena, self._merge = arena, reduction.merge
        self._ledgers: dict[Worker, Ledger] = {}
        self._tasks: dict[Worker, list[tuple[ClientTask, Params]]] = defaultdict(list)

    def ledger(self, worker: Worker) -> Ledger:
        """Of a worker, which may have been restarted.

        Raises:
            OSError: the system has no memory left.
        """
        if worker not in self._ledgers:
            self._ledgers[worker] = Ledger(self._arena)
        return self._ledgers[worker]

    def note(self, worker: Worker, member: Member, update: ClientUpdate) -> None:
        """A worker has added a client's update."""
        assert member.adding is not None
        weight = update.num_examples if member.adding.weight is None else member.adding.weight
        self._ledgers[worker].note(member.given.task.moving, weight)
        self._tasks[worker].append((member.given.task, member.given.params))

    def lost(self, worker: Worker) -> list[tuple[ClientTask, Params]]:
        """The tasks whose updates went with a worker that died: none, unless it was adding one, or about to tell."""
        ledger = self._ledgers.get(worker)
        return self._tasks.pop(worker, []) if ledger is not None and ledger.spoilt() else []

    def merge(self) -> None:
        """Everything is done."""
        for ledger in self._ledgers.values():
            for name, fine, weight in ledger.sums():
                self._merge(name, fine, weight)

    def close(self) -> None:
        """Give the memory back."""
        for ledger in self._ledgers.values():
            ledger.close()


def check_cap(cap: Cap, workers: int) -> None:
    """Refuse a cap without workers.

    Raises:
        ConfigError: says what to do.
    """
    if cap != "none" and workers < 1:
        raise ConfigError(f"engine.cap = {cap!r} needs workers >= 1: in this process there is the server too")


def check_at_once(cap: Cap, clients_at_once: int) -> None:
    """Refuse several clients at once where it is to be known what each takes.

    Raises:
        ConfigError: says what to do.
    """
    check_range("engine.clients_at_once", clients_at_once, 1)
    if cap != "none" and clients_at_once > 1:
        raise ConfigError(f"engine.cap = {cap!r} needs clients_at_once = 1: nobody can tell what each of several takes")


def offered(clients: Population, cap: Cap) -> Population:
    """The clients as methods see them: under a hard cap with the part of their budgets that may be planned with."""
    if cap != "hard":
        return clients

    def usable(client: ClientInfo) -> ClientInfo:
        return replace(client, memory_bytes=usable_bytes(client.memory_bytes))

    smallest, largest = clients.smallest_memory_bytes, clients.largest_memory_bytes
    return PopulationView(clients, usable, usable_bytes(smallest), usable_bytes(largest))


class LocalEngine:
    """Runs clients in this process (`workers = 0`) or in `workers` processes.

    The numbers do not depend on `workers`, only on `threads` and `clients_at_once`, since kernels choose their order
    of summation by them. A worker that dies costs its client, not the run, and without a hard cap only if it dies again
    over the same task. A context manager: it stops its workers at the end. On Linux, workers without a cap share this
    process's tensors.

    Args:
        data: every client's examples.
        clients: what the server knows of them.
        workers: processes; 0 runs clients in this one.
        threads: torch's threads for each process that trains.
        cap: "measured": workers give freed memory back, and tell what each client took; "hard": so too, and a client
            that asks its worker for more than its budget is refused, and lost.
        device: on which clients train, "cpu" or "cuda"; budgets are of its memory.
        clients_at_once: how many with equal tasks train in one vectorised run, where their model can; last bits differ.

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
        clients_at_once: int = 1,
    ) -> None:
        if workers < 0 or threads < 1:
            raise ConfigError(f"workers ({workers}) must be at least 0 and threads ({threads}) at least 1")
        check_cap(cap, workers)
        check_at_once(cap, clients_at_once)
        self._data, self._clients = data, clients
        self._threads, self._cap, self._at_once = threads, cap, clients_at_once
        self._device = device_of(device)
        self._residents = Residents(self._device, measured=False)
        self._held: dict[str, Tensor] = {}
        self._workers: list[Worker] = []
        self._forks: ForkServer | None = None
        self._lesson: Lesson | None = None
        self._num_workers = workers
        self._board = self._new_board()
        self._threads_before = torch.get_num_threads()

    def __enter__(self) -> Self:
        self._threads_before = torch.get_num_threads()
        with contextlib.ExitStack() as undo:
            undo.callback(self._stop)
            torch.set_num_threads(self._threads)
            if self._cap == "none":
                keep_freed_memory()
                self._forks = self._new_forks()  # it imports while the first round is planned
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
        return self._fit_here(method, orders) if self._num_workers == 0 else self._fit_beside(method, orders, None)

    def fit_into(
        self, method: Method, orders: Iterable[tuple[ClientTask, Params]], reduction: Reduction
    ) -> Iterator[ClientUpdate | ClientLoss]:
        """Run the tasks; where many workers share memory, they add up what comes of them, merged at the end."""
        if self._board is None or self._num_workers < ADDING_WORKERS:
            yield from self.fit(method, orders)
            return
        with contextlib.closing(_Sums(self._board.arena, reduction)) as sums:
            yield from self._fit_beside(method, orders, sums)
            sums.merge()

    def _fit_here(
        self, method: Method, orders: Iterable[tuple[ClientTask, Params]]
    ) -> Iterator[ClientUpdate | ClientLoss]:
        problem, residents = self._data.problem, self._residents
        for order in self._bundled(self._prepared(orders)):
            if isinstance(order, ClientLoss):
                yield order
                continue
            tasks, sent, data, *_ = zip(*order, strict=True)
            if len(order) > 1 and (done := at_once(method, problem, residents, tasks, sent, data)) is not None:
                yield from done
                continue
            for task, params, examples, *_ in order:
                # Frozen tensors stay the server's; what training changes is copied, where clients share memory in turn.
                own = {n: self._own_copy(n, t) if n in task.moving else t.to(self._device) for n, t in params.items()}
                yield run_safely(method, problem, residents, task, own, examples)

    def _bundled(self, prepared: Iterable[Given | ClientLoss]) -> Iterator[Bundle | ClientLoss]:
        """What can be done at once together, and the rest one by one; it does not depend on who does it."""
        waiting: dict[tuple[Step, ...], list[Given]] = defaultdict(list)
        for given in prepared:
            if isinstance(given, ClientLoss):
                yield given
            elif self._at_once == 1 or not can_vectorize(given.task) or not num_rows(given.examples):
                yield (given,)
            else:
                bundle = waiting[given.task.steps]
                bundle.append(given)
                if len(bundle) == self._at_once:
                    yield tuple(waiting.pop(given.task.steps))
        yield from map(tuple, waiting.values())

    def _own_copy(self, name: str, tensor: Tensor) -> Tensor:
        held = self._held.get(name)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = self._held[name] = torch.empty_like(tensor, device=self._device)
        return held.copy_(tensor)

    def _fit_beside(
        self, method: Method, orders: Iterable[tuple[ClientTask, Params]], sums: _Sums | None
    ) -> Iterator[ClientUpdate | ClientLoss]:
        workers, lesson = self._started(), self._lesson_of(method)
        queue = _Queue(self._bundled(self._prepared(orders)), self._desk)
        busy: dict[int, deque[Job]] = defaultdict(deque)
        proven: set[Worker] = set()
        try:
            for worker in workers:
                self._give(worker, lesson, queue, busy, sums)
            while busy:
                # So that no worker waits. But no task waits behind a worker's first one, which may take as long as all
                # others together; and the last ones go to whoever is free.
                ample = length_hint(orders) >= len(workers) * self._at_once
                for job in [jobs[0] for jobs in busy.values() if len(jobs) == 1]:
                    if job.worker in proven and job.is_shared and ample:
                        self._give(job.worker, lesson, queue, busy, sums)
                queue.prepare()
                yield from queue.losses()
                for ready in wait(list(busy)):
                    jobs = busy[ready]  # type: ignore[index]
                    job = jobs.popleft()
                    starts = job.worker.starts
                    with contextlib.ExitStack() as done:
                        done.callback(job.clear)
                        answers = job.worker.answer(job)
                        proven.add(job.worker)
                        for member, answer in zip(job.members, answers, strict=True):
                            if answer is None:
                                queue.put_back(member.given._replace(again=True))
                        if job.worker.starts != starts:
                            self._take_back(job.worker, jobs, queue, sums)
                        if not jobs:
                            del busy[ready]  # type: ignore[arg-type]
                        for member, answer in zip(job.members, answers, strict=True):
                            if sums is not None and isinstance(answer, ClientUpdate) and answer.is_added:
                                sums.note(job.worker, member, answer)
                        if not jobs:
                            self._give(job.worker, lesson, queue, busy, sums)
                        for member, answer in zip(job.members, answers, strict=True):
                            if answer is not None and not (member.given.is_told and isinstance(answer, ClientUpdate)):
                                yield answer
            yield from queue.losses()
        finally:
            queue.close()
            # The caller gave up in the middle: an answer to an old task must not meet the next round.
            for job in itertools.chain.from_iterable(busy.values()):
                job.worker.stop()
                job.clear()
                if job.worker in self._workers:  # the engine may have been left before its iterator was closed
                    self._workers.remove(job.worker)

    def _lesson_of(self, method: Method) -> Lesson:
        """The same object for the same method: workers are told once."""
        if self._lesson is None or self._lesson.method is not method:
            self._lesson = Lesson(method, self._data.problem)
        return self._lesson

    def _take_back(self, worker: Worker, jobs: deque[Job], queue: _Queue, sums: _Sums | None) -> None:
        """What a worker that died had been given beside, and what went with its sum, is to be done by others."""
        for job in jobs:
            for member in job.members:
                queue.put_back(member.given)
            job.clear()
        jobs.clear()
        # Only now: one that lives may be adding at this moment.
        for order in self._prepared(sums.lost(worker) if sums is not None else ()):
            queue.put_back(order if isinstance(order, ClientLoss) else order._replace(is_told=True))

    def _give(
        self, worker: Worker, lesson: Lesson, queue: _Queue, busy: dict[int, deque[Job]], sums: _Sums | None
    ) -> None:
        """Give a worker the next task, if there is one; it may be at another still."""
        taken = queue.take()
        if not taken:
            return
        members = tuple(Member(given, desk, self._adding(worker, given, desk, sums)) for given, desk in taken)
        # Where there is a cap, no memory is shared, and tasks are done one by one.
        cap_bytes = self._clients[taken[0][0].task.client_id].memory_bytes if self._cap == "hard" else None
        job, jobs = Job(worker, members), busy.get(worker.channel.fileno())
        worker.send(lesson, cap_bytes, job, is_ahead=bool(jobs))
        busy[worker.channel.fileno()].append(job)

    def _adding(self, worker: Worker, given: Given, desk: Desk | None, sums: _Sums | None) -> Adding | None:
        """How a worker is to add up what comes of a task; None where the server does."""
        if sums is None or desk is None:
            return None
        adding = sums.adding(given.task.client_id)
        if adding is not None:
            try:
                desk.add_to(sums.ledger(worker), given.params, given.task.moving)
            except OSError:  # no memory left to share
                return None
        return adding

    def _desk(self, given: Given) -> Desk | None:
        if self._board is None:
            return None
        try:
            return Desk(self._board, given.params, given.task.moving, given.examples)
        except OSError:  # no memory left to share: its tensors are sent
            return None

    def _started(self) -> list[Worker]:
        while len(self._workers) < self._num_workers:
            self._workers.append(Worker(self._threads, self._cap, self._device, self._forks))
        return list(self._workers)

    def _new_forks(self) -> ForkServer | None:
        """One worker has nobody to share with. CUDA is not for forks, and under a cap a worker is to be as it would be
        on a device.
        """
        if self._num_workers < 2 or self._cap != "none" or self._device.type != "cpu":
            return None
        return ForkServer.if_possible(worker_environment(measured=False))

    def _stop(self) -> None:
        torch.set_num_threads(self._threads_before)
        for worker in self._workers:
            worker.stop()
        self._workers.clear()
        if self._forks is not None:
            self._forks.stop()
            self._forks = None
        if self._board is not None:
            self._board.arena.close()
            self._board = self._new_board()  # the engine may be entered again

    def _new_board(self) -> Board | None:
        return Board(Arena()) if self._num_workers and self._cap == "none" and can_share() else None

    def _prepared(self, orders: Iterable[tuple[ClientTask, Params]]) -> Iterator[Given | ClientLoss]:
        """Orders with the client's examples; a client whose data fails is lost, not the run."""
        for task, params in orders:
            try:
                examples = self._data.examples(task.client_id)
            except Exception as error:
                yield lost(task, error)
            else:
                yield Given(task, params, examples)
