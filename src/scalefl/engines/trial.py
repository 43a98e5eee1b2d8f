"""Who trains a run's clients fastest on this machine, and how many of them at once: by a short measured trial."""

from __future__ import annotations

import contextlib
import heapq
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from scalefl.client import Residents, run_task
from scalefl.coords import extract
from scalefl.measure import SPARED_SHARE, spare_bytes
from scalefl.params import CPU, moved
from scalefl.problem import Batch, num_rows
from scalefl.types import ClientTask, Method, RoundPlan, ServerState, Step
from scalefl.vectorized import can_vectorize, run_vectorized

Auto = Literal["auto"]

WORKER_SECONDS = 2.0
"""How long workers take to start; they start side by side."""
WORKER_BYTES = 350 * 2**20
"""What a worker holds beside its task, if it shares nothing."""
GAIN, AT_ONCE_GAIN, GAIN_SECONDS = 0.9, 0.8, 2.0
"""More threads, or clients at once, are taken where they leave this much of a run's time at most, and save so much:
bits depend on them. Of clients at once more is asked: what lies in a core's caches here, workers side by side fetch
from memory. A tenth that a trial had promised of a small CNN was nothing in rounds.
"""
MOST_AT_ONCE = 32
_BATCHES, _LONG_SECONDS = 3, 0.5
_TURNS, _AT_ONCE_SECONDS = 2, 0.25
"""As many clients are tried at once as take so long one after another. Where that is not even two, no operation is so
small that to start it matters.
"""


class Crew(NamedTuple):
    """Who trains.

    Attributes:
        workers: processes beside the server's; 0: the server's own trains.
        threads: of each process that trains.
        why: in a line, for people.
        clients_at_once: how many with equal tasks share a vectorised run.
    """

    workers: int
    threads: int
    why: str = ""
    clients_at_once: int = 1


def num_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def most_workers(peak_bytes: int) -> int:
    """How many workers this machine has cores and memory for, one at least, if a task takes so much."""
    with contextlib.suppress(OSError):
        return max(1, min(num_cores(), spare_bytes() // (WORKER_BYTES + peak_bytes)))
    return num_cores()


def room_for(peak_bytes: int, device: torch.device = CPU) -> int:
    """How many such tasks a device has memory for at once, one at least."""
    with contextlib.suppress(OSError):
        return max(1, _spare_bytes(device) // max(peak_bytes, 1))
    return MOST_AT_ONCE


def _spare_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return spare_bytes()
    free, total = torch.cuda.mem_get_info(device)
    return max(0, free - int(SPARED_SHARE * total))


def by_trial(
    method: Method,
    state: ServerState,
    plan: RoundPlan,
    examples: Batch,
    *,
    rounds: int,
    most: int,
    workers: int | Auto = "auto",
    threads: int | Auto = "auto",
    clients_at_once: int | Auto = "auto",
    device: torch.device = CPU,
) -> Crew:
    """The crew that is done first with so many rounds like `plan`, by the time that its longest task takes a batch.

    Args:
        method, state, plan: of the round that comes.
        examples: of the client with the longest task.
        rounds: that are to come.
        most: workers that there may be.
        workers, threads, clients_at_once: what is settled of it; the others are then chosen to go with it.
        device: where clients train.
    """
    cores = num_cores()
    tried = _powers(cores // max(1, workers) if workers != "auto" else cores) if threads == "auto" else [threads]
    group = max(_groups(plan), key=lambda tasks: sum(map(plan.flops, tasks)), default=[])
    room = room_for(max(plan.costs[task.client_id].peak_bytes for task in group), device) if group else 1
    at_once = min(len(group), *((MOST_AT_ONCE, room) if clients_at_once == "auto" else (clients_at_once,)))
    costs = _Trial(method, state, plan, Residents(device, measured=False)).costs(examples, tried, group[:at_once])

    def run_seconds(crew: Crew) -> float:
        return rounds * costs.round_seconds(crew) + (WORKER_SECONDS if crew.workers else 0.0)

    crews = [
        Crew(count, each, clients_at_once=1 if clients_at_once == "auto" else clients_at_once)
        for each in tried
        for count in _numbers(most, cores // each, workers)
    ]
    usual = min((crew for crew in crews if crew.threads == tried[0]), key=run_seconds)
    if clients_at_once == "auto" and costs.at_once is not None:
        crews += [
            crew._replace(clients_at_once=size)
            for crew in crews
            if crew.threads == tried[0]
            for size in _sizes(len(group), max(crew.workers, 1), room)
        ]

    def is_worth_it(crew: Crew) -> bool:
        share = GAIN if crew.clients_at_once == usual.clients_at_once else AT_ONCE_GAIN
        return run_seconds(crew) <= min(share * run_seconds(usual), run_seconds(usual) - GAIN_SECONDS)

    best = min(filter(is_worth_it, crews), key=run_seconds, default=usual)
    return best._replace(why=f"{costs.told()}; a round {costs.round_seconds(best):.1f} s")


class AtOnce(NamedTuple):
    """What a step that clients share takes, of what a step of one of them alone takes.

    Attributes:
        start: however many they are.
        each: for each of them.
    """

    start: float
    each: float


class _Costs(NamedTuple):
    """What a trial has found.

    Attributes:
        plan: of the round that was tried.
        seconds: by threads, how long its longest task takes.
        at_once: what runs take that clients share; None where they can't, or it is not worth while to try.
    """

    plan: RoundPlan
    seconds: dict[int, float]
    at_once: AtOnce | None

    def round_seconds(self, crew: Crew) -> float:
        """How long a crew takes for the round; tasks take as much longer or shorter as their FLOPs are more or less."""
        each_flop = self.seconds[crew.threads] / self.plan.flops(self.plan.longest_first()[0])

        def alone(tasks: Iterable[ClientTask]) -> float:
            return each_flop * sum(map(self.plan.flops, tasks))

        bundles = _bundles(self.plan, crew.clients_at_once)
        parts = (_share_at_once(self.plan, bundle, self.at_once) * alone(bundle) for bundle in bundles)
        return makespan(parts, max(crew.workers, 1))

    def told(self) -> str:
        """In words."""
        found = ", ".join(f"{1000 * s:.0f} ms on {_counted(count, 'thread')}" for count, s in self.seconds.items())
        if self.at_once is not None:
            start, each = self.at_once
            shares = f"take {100 * each:.0f} % of that each, and {100 * start:.0f} % to start"
            found += f"; clients at once {shares if each < 1 else 'gain nothing'}"
        return f"the longest task takes {found}"


def _groups(plan: RoundPlan) -> list[list[ClientTask]]:
    """The tasks that can be done at once, the longest of each group first."""
    groups: dict[tuple[Step, ...], list[ClientTask]] = {}
    for task in plan.longest_first():
        if can_vectorize(task):
            groups.setdefault(task.steps, []).append(task)
    return list(groups.values())


def _bundles(plan: RoundPlan, size: int) -> list[list[ClientTask]]:
    """The tasks as an engine takes them that does so many at once."""
    groups = _groups(plan)
    apart = [[task] for task in plan.tasks if not can_vectorize(task)]
    return [*apart, *(group[i : i + size] for group in groups for i in range(0, len(group), size))]


def _share_at_once(plan: RoundPlan, bundle: Sequence[ClientTask], at_once: AtOnce | None) -> float:
    """How long tasks take at once, of how long they take one after another: by steps, of which whole batches share runs
    as far as each client has some, and what is left of clients shares one if it is of equal length.
    """
    if at_once is None or len(bundle) == 1:
        return 1.0
    size = bundle[0].steps[0].work.batch_size
    counts = [plan.clients[task.client_id].num_examples for task in bundle]
    whole = [count // size for count in counts]
    # A single one is left out of an epoch, unless it is all that there is.
    left = [0 if count % size == 1 < size < count else count % size for count in counts]
    runs = max(whole) + len({count for count in left if count})
    steps = sum(whole) + sum(1 for count in left if count)
    return (at_once.start * runs + at_once.each * steps) / max(steps, 1)


def _sizes(tasks: int, workers: int, room: int) -> set[int]:
    """How many tasks at once may be best: one run for each worker, or a few, if some tasks take longer than others."""
    each = [math.ceil(tasks / workers / runs) for runs in (1, 2, 4)]
    evenly = {math.ceil(count / math.ceil(count / MOST_AT_ONCE)) for count in each}
    return {size for size in (min(size, room // workers) for size in evenly) if size > 1}


def makespan(seconds: Iterable[float], workers: int) -> float:
    """How long workers take that take the longest task first, and then one after another."""
    free_at = [0.0] * workers
    for task in sorted(seconds, reverse=True):
        heapq.heapreplace(free_at, free_at[0] + task)
    return max(free_at)


def described(crew: Crew) -> str:
    """The crew in words."""
    threads = _counted(crew.threads, "thread")
    each = " each" if crew.workers > 1 else ""
    who = f"{_counted(crew.workers, 'worker')} of {threads}{each}" if crew.workers else f"this process, {threads}"
    if crew.clients_at_once > 1:
        who += f", {crew.clients_at_once} clients at once"
    return f"{who}: {crew.why}" if crew.why else who


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _numbers(most: int, side_by_side: int, settled: int | Auto) -> Sequence[int]:
    """The numbers of workers that may be best: none, or as many as run side by side."""
    if settled != "auto":
        return [settled]
    return [0, *(count for count in [min(most, side_by_side)] if count > 1)]


def _powers(cores: int) -> Sequence[int]:
    """1, 2, 4, … and all cores."""
    cores = max(cores, 1)
    return sorted({*(2**i for i in range(cores.bit_length()) if 2**i <= cores), cores})


def _some(task: ClientTask, examples: Batch, batches: int = _BATCHES) -> Batch:
    count = batches * task.steps[0].work.batch_size
    return {name: column[:count] for name, column in examples.items()}


class _Trial(NamedTuple):
    """Where tasks of a round are tried."""

    method: Method
    state: ServerState
    plan: RoundPlan
    residents: Residents

    def costs(self, examples: Batch, threads: Sequence[int], group: Sequence[ClientTask]) -> _Costs:
        """Try it.

        Args:
            examples: of the client with the longest task.
            threads: numbers of them; clients at once are tried on the first.
            group: tasks that can be done at once, as far as they may be.
        """
        task = self.plan.longest_first()[0]
        some = _some(task, examples)
        share = num_rows(some) / max(num_rows(examples), 1)
        seconds = {count: self.seconds(task, some, count) / share for count in threads}
        count = min(len(group), int(_AT_ONCE_SECONDS / max(seconds[threads[0]] * share, 1e-9)))
        at_once = self.at_once(group[0], some, count, threads[0]) if count > 1 else None
        return _Costs(self.plan, seconds, at_once)

    def seconds(self, task: ClientTask, examples: Batch, threads: int) -> float:
        """How long a client takes for its task with these examples; from one batch, if that takes long already."""
        first = _some(task, examples, batches=1)
        with _threads(threads):
            # The first time counts for nothing but its length: what is loaded and compiled then may take a second.
            tried = first if self._alone(task, first) > _LONG_SECONDS else examples
            return self._alone(task, tried) * num_rows(examples) / max(num_rows(tried), 1)

    def at_once(self, task: ClientTask, examples: Batch, count: int, threads: int) -> AtOnce | None:
        """What runs take that up to so many clients share; None if they can't."""
        params = self._params(task)

        def together(number: int) -> float:
            start = time.perf_counter()
            copies = [task] * number, [params] * number, [examples] * number
            run_vectorized(self.method, self.state.problem, self.residents, *copies)
            return time.perf_counter() - start

        with _threads(threads):
            try:
                together(1), together(count)  # warm up
                # In turn, and the least of each: what else happens on the machine only makes things slower.
                turns = [(self._alone(task, examples), together(1), together(count)) for _ in range(_TURNS)]
            except Exception:  # a model that can't
                return None
        alone, one, all_of_them = map(min, zip(*turns, strict=True))
        each = max(0.0, all_of_them - one) / alone / (count - 1)
        return AtOnce(max(0.0, one / alone - each), each)

    def _alone(self, task: ClientTask, examples: Batch) -> float:
        own = {name: t.clone() if name in task.moving else t for name, t in self._params(task).items()}
        start = time.perf_counter()
        run_task(self.method, self.state.problem, self.residents, task, own, examples)
        return time.perf_counter() - start

    def _params(self, task: ClientTask) -> dict[str, Tensor]:
        own = self.plan.own.get(task.client_id, {})
        return moved({**extract(self.state.params, self.plan.coords[task.client_id]), **own}, self.residents.device)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
