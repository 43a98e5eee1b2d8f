"""Who takes part: the gate, fairness, and populations that no memory could hold."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from dataclasses import dataclass, field

import pytest

from scalefl.errors import EmptyCohort
from scalefl.sampling import UniformSampler
from scalefl.types import ClientInfo, ServerState
from scalefl.units import MIB
from support import PROBLEM, global_rng, spec


@dataclass
class Made:
    """Clients whose memory cycles through `budgets`, and whose data through `sizes`; notes who was looked at."""

    size: int
    budgets: tuple[int, ...] = (10 * MIB, 20 * MIB, 40 * MIB)
    sizes: tuple[int, ...] = (5,)
    seen: list[int] = field(default_factory=list)

    @property
    def smallest_memory_bytes(self) -> int:
        return min(self.budgets)

    @property
    def largest_memory_bytes(self) -> int:
        return max(self.budgets)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> ClientInfo:
        if not 0 <= index < self.size:
            raise IndexError(index)
        self.seen.append(index)
        return ClientInfo(index, self.sizes[index % len(self.sizes)], self.budgets[index % len(self.budgets)])


def state(round: int = 0, seed: int = 0) -> ServerState:
    return ServerState(spec(), PROBLEM, {}, round, seed)


def drawn(count: int, population: Made, floor: int = 0, round: int = 0, seed: int = 0) -> list[int]:
    return [client.id for client in UniformSampler(count)(population, floor, state(round, seed))]


@pytest.mark.parametrize("floor", [0, 10 * MIB, 10 * MIB + 1, 20 * MIB, 40 * MIB])
def test_the_floor_is_respected(floor):
    population = Made(30)
    able = {i for i in range(30) if population[i].memory_bytes >= floor}
    for round in range(5):
        chosen = drawn(4, population, floor, round)
        assert len(chosen) == len(set(chosen)) == 4
        assert able.issuperset(chosen)
    assert set(drawn(100, population, floor)) == able, "all that can, where fewer can than are asked for"


def test_clients_without_data_are_passed_over():
    population = Made(40, sizes=(0, 0, 3, 1))
    for round in range(5):
        assert all(i % 4 >= 2 for i in drawn(8, population, round=round))
    assert sorted(drawn(40, population)) == [i for i in range(40) if i % 4 >= 2]


def test_without_replacement_and_in_no_fixed_order():
    cohorts = [drawn(12, Made(12), round=r) for r in range(20)]
    assert all(sorted(cohort) == list(range(12)) for cohort in cohorts)
    assert len({tuple(cohort) for cohort in cohorts}) == 20


def test_a_function_of_seed_and_round_that_leaves_the_global_generators_alone():
    before = global_rng()
    assert drawn(5, Made(1000), round=3, seed=8) == drawn(5, Made(1000), round=3, seed=8)
    assert drawn(5, Made(1000), round=3, seed=8) != drawn(5, Made(1000), round=4, seed=8)
    assert drawn(5, Made(1000), round=3, seed=8) != drawn(5, Made(1000), round=3, seed=9)
    assert global_rng() == before


def test_uniform_among_those_that_can():
    """χ² over 12 eligible clients of 24, 3 at a time in 2000 rounds: mean about 8, 1e-6 tail under 45."""
    population, counts, pairs = Made(24, budgets=(10, 30)), Counter(), Counter()
    for round in range(2000):
        cohort = drawn(3, population, 20, round)
        counts.update(cohort)
        pairs[tuple(sorted(cohort[:2]))] += 1
    assert counts.keys() == set(range(1, 24, 2))
    expected = 2000 * 3 / 12
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 45
    # No pair of clients goes together more than chance would have it: 66 pairs.
    assert len(pairs) == 66
    assert sum((n - 2000 / 66) ** 2 / (2000 / 66) for n in pairs.values()) < 65 + 6 * (2 * 65) ** 0.5


def test_the_first_drawn_is_uniform_too():
    counts = Counter(drawn(1, Made(10), seed=seed)[0] for seed in range(3000))
    assert sum((counts[i] - 300) ** 2 / 300 for i in range(10)) < 45


def test_a_population_that_cannot_be_held():
    """10⁸ clients as objects would take gigabytes; only those that were looked at cost anything."""
    population = Made(10**8)
    tracemalloc.start()
    try:
        cohort = drawn(1000, population, 15 * MIB)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(set(cohort)) == 1000
    assert len(population.seen) < 2000, "two in three can take part"
    assert peak < 4 * MIB
    assert max(cohort) > 9 * 10**7 and min(cohort) < 10**7


def test_nobody_can_take_part():
    with pytest.raises(EmptyCohort) as caught:
        drawn(3, Made(50), floor=64 * MIB + MIB // 2, round=6)
    said = str(caught.value)
    assert "round 7" in said and "needs 64.5 MiB" in said and "largest of 50 clients offers 40.0 MiB" in said
    assert "blocks" in said and "example" not in said, "data would not help"


@pytest.mark.parametrize(("sizes", "floor"), [((0,), 0), ((5, 5, 0), 30 * MIB)])
def test_nobody_with_the_memory_has_data(sizes, floor):
    with pytest.raises(EmptyCohort, match=r"at least one example; .* offers 40\.0 MiB.* partition") as caught:
        drawn(3, Made(48, sizes=sizes), floor=floor)
    assert "blocks" not in str(caught.value), "the memory suffices"


def test_a_large_population_in_which_nobody_can_is_told_at_once():
    """The largest budget says it: 10⁸ clients need not be asked one by one."""
    population = Made(10**8)
    with pytest.raises(EmptyCohort, match="100000000"):
        drawn(3, population, floor=41 * MIB)
    assert len(population.seen) < 10
