"""Which clients take part in a round."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from scalefl.errors import EmptyCohort
from scalefl.rng import derive
from scalefl.types import ClientInfo, Population, ServerState
from scalefl.units import mib


class Sampler(Protocol):
    """Chooses the cohort of a round."""

    def __call__(self, population: Population, floor_bytes: int, state: ServerState) -> list[ClientInfo]:
        """Clients with data and at least `floor_bytes` of memory."""
        ...


@dataclass(frozen=True)
class UniformSampler:
    """`count` clients at random, without replacement, among those that can take part (all of them if fewer).

    Paper: ScaleFL, sections 3 and 4: 10 of 100 clients a round, of those whose budget holds the stage.
    """

    count: int

    def __call__(self, population: Population, floor_bytes: int, state: ServerState) -> list[ClientInfo]:
        """The round's cohort. Clients are looked at one by one until enough can take part.

        Raises:
            EmptyCohort: no client has both data and the memory.
        """
        cohort: list[ClientInfo] = []
        # Where not even the largest budget will do, a hundred million clients need not be asked.
        candidates = len(population) if floor_bytes <= population.largest_memory_bytes else 0
        for index in shuffled(candidates, derive(state.seed, "cohort", state.round)):
            if len(cohort) == self.count:
                break
            client = population[index]
            if client.num_examples > 0 and client.memory_bytes >= floor_bytes:
                cohort.append(client)
        if not cohort:
            raise EmptyCohort(f"round {state.round + 1}: {_why_nobody(population, floor_bytes, state)}")
        return cohort


def everybody(population: Population, floor_bytes: int, state: ServerState) -> list[ClientInfo]:
    """All clients with the memory, whether they have data or not: who may take part in a round of a private run.

    Raises:
        EmptyCohort: no client has the memory.
    """
    able = [client for i in range(len(population)) if (client := population[i]).memory_bytes >= floor_bytes]
    if not able:
        raise EmptyCohort(f"round {state.round + 1}: {_why_nobody(population, floor_bytes, state)}")
    return able


ASKED_CLIENTS = 1000
"""So many clients at most are asked why none can take part."""


def _why_nobody(population: Population, floor_bytes: int, state: ServerState) -> str:
    """Need and offer. Not the need by term: a gate knows bytes only (a run checks its budgets term by term before)."""
    asked = [population[i] for i in range(min(len(population), ASKED_CLIENTS))] if state.tightened else []
    with_data = [client for client in asked if client.num_examples > 0]
    most = max((client.memory_bytes for client in with_data), default=0)
    lowered = [client.id for client in with_data if client.id in state.tightened]
    if lowered and most < floor_bytes:
        return (
            f"taking part needs {mib(floor_bytes)} MiB, and {len(lowered)} of {len(with_data)} clients with data have "
            f"hit their memory caps, so that no more than {mib(most)} MiB is planned with for any of them: their tasks "
            'took more than was predicted. Larger budgets, or engine.cap = "measured", let the run go on'
        )
    offer = f"the largest of {len(population)} clients offers {mib(population.largest_memory_bytes)} MiB"
    if floor_bytes > population.largest_memory_bytes:
        return (
            f"taking part needs {mib(floor_bytes)} MiB; {offer}. More blocks, smaller micro-batches or a smaller "
            "batch lower the need"
        )
    return (
        f"no client has both {mib(floor_bytes)} MiB, which taking part needs, and at least one example; {offer}. "
        "Fewer clients, or another partition, give examples to those with memory"
    )


def shuffled(count: int, seed: int) -> Iterator[int]:
    """0 … count−1 in random order, holding only what has been drawn (a sparse Fisher-Yates shuffle)."""
    draw = random.Random(seed)
    moved: dict[int, int] = {}
    for i in range(count):
        j = draw.randrange(i, count)
        yield moved.get(j, j)
        moved[j] = moved.pop(i, i)
