"""How many workers of how many threads train a run's clients fastest on this machine: by a short measured trial."""

from __future__ import annotations

import contextlib
import heapq
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch

from scalefl.client import Residents, run_task
from scalefl.coords import extract
from scalefl.measure import spare_bytes
from scalefl.problem import Batch, num_rows
from scalefl.types import ClientTask, Method, RoundPlan, ServerState

Auto = Literal["auto"]

WORKER_SECONDS = 2.0
"""How long workers take to start; they start side by side."""
WORKER_BYTES = 350 * 2**20
"""What a worker holds beside its task."""
GAIN, GAIN_SECONDS = 0.9, 2.0
"""More threads are taken where they leave this much of a run's time at most, and save so much: bits depend on them."""
_BATCHES, _LONG_SECONDS = 3, 0.5


class Crew(NamedTuple):
    """Who trains.

    Attributes:
        workers: processes beside the server's; 0: the server's own trains.
        threads: of each process that trains.
        why: in a line, for people.
    """

    workers: int
    threads: int
    why: str = ""


def num_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def most_workers(peak_bytes: int) -> int:
    """How many workers this machine has cores and memory for, one at least, if a task takes so much."""
    with contextlib.suppress(OSError):
        return max(1, min(num_cores(), spare_bytes() // (WORKER_BYTES + peak_bytes)))
    return num_cores()


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
) -> Crew:
    """The crew that is done first with so many rounds like `plan`, by the time that its longest task takes a batch.

    Args:
        method, state, plan: of the round that comes.
        examples: of the client with the longest task.
        rounds: that are to come.
        most: workers that there may be.
        workers, threads: what is settled of it; the other is then chosen to go with it.
    """
    cores = num_cores()
    tried = _powers(cores // max(1, workers) if workers != "auto" else cores) if threads == "auto" else [threads]
    task = plan.longest_first()[0]
    some = _some(task, examples)
    share = num_rows(some) / max(num_rows(examples), 1)
    seconds = {count: _seconds(method, state, plan, task, some, count) / share for count in tried}
    longest = plan.flops(task)

    def round_seconds(crew: Crew) -> float:
        parts = [seconds[crew.threads] * plan.flops(t) / longest for t in plan.tasks]
        return makespan(parts, max(crew.workers, 1))

    def run_seconds(crew: Crew) -> float:
        return rounds * round_seconds(crew) + (WORKER_SECONDS if crew.workers else 0.0)

    crews = [Crew(count, each) for each in tried for count in _numbers(most, cores // each, workers)]
    few_threads = min((crew for crew in crews if crew.threads == tried[0]), key=run_seconds)
    best = min(crews, key=run_seconds)
    least, usual = run_seconds(best), run_seconds(few_threads)
    if least > GAIN * usual or usual - least < GAIN_SECONDS:
        best = few_threads
    found = ", ".join(f"{1000 * s:.0f} ms on {_counted(count, 'thread')}" for count, s in seconds.items())
    return best._replace(why=f"the longest task takes {found}; a round {round_seconds(best):.1f} s")


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
    return f"{who}: {crew.why}" if crew.why else who


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _numbers(most: int, at_once: int, settled: int | Auto) -> Sequence[int]:
    """The numbers of workers that may be best: none, or as many as run at once."""
    if settled != "auto":
        return [settled]
    return [0, *(count for count in [min(most, at_once)] if count > 1)]


def _powers(cores: int) -> Sequence[int]:
    """1, 2, 4, … and all cores."""
    cores = max(cores, 1)
    return sorted({*(2**i for i in range(cores.bit_length()) if 2**i <= cores), cores})


def _some(task: ClientTask, examples: Batch, batches: int = _BATCHES) -> Batch:
    count = batches * task.steps[0].work.batch_size
    return {name: column[:count] for name, column in examples.items()}


def _seconds(
    method: Method, state: ServerState, plan: RoundPlan, task: ClientTask, examples: Batch, threads: int
) -> float:
    """How long a client takes for its task with these examples; from one batch, if that takes long already."""
    residents = Residents(measured=False)
    params = {**extract(state.params, plan.coords[task.client_id]), **plan.own.get(task.client_id, {})}
    first = _some(task, examples, batches=1)

    def seconds(batch: Batch) -> float:
        own = {name: t.clone() if name in task.moving else t for name, t in params.items()}
        start = time.perf_counter()
        run_task(method, state.problem, residents, task, own, batch)
        return time.perf_counter() - start

    with _threads(threads):
        taken = seconds(first)  # warms up
        if taken > _LONG_SECONDS:
            return taken * num_rows(examples) / max(num_rows(first), 1)
        return seconds(examples)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
