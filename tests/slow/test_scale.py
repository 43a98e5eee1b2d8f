"""Server memory does not grow with the clients of a round, nor with the population."""

from __future__ import annotations

import itertools
import resource
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from scalefl.engines.local import LocalEngine
from scalefl.loop import federate
from scalefl.problem import Batch
from scalefl.sampling import UniformSampler
from scalefl.units import MIB
from support import PROBLEM, WORK, Clients, examples_of, full_bytes, make_method, spec

pytestmark = pytest.mark.slow

MODEL = spec(width=8.0)  # 190 KiB: a hundred clients' updates would show


@dataclass(frozen=True)
class Generated:
    """Any number of clients over a generated source: nothing is stored for any of them."""

    num_clients: int
    problem = PROBLEM
    validation: Batch = None  # type: ignore[assignment]
    test: Batch = None  # type: ignore[assignment]

    def num_examples(self, client: int) -> int:
        return 2 + client % 2

    def label_counts(self, client: int) -> Tensor:
        return torch.bincount(self.examples(client)["label"], minlength=3)

    def examples(self, client: int) -> Batch:
        return examples_of(client, self.num_examples(client))


def highest_after(population: int, cohort: int) -> int:
    """The highest memory of this process so far, in bytes, after two rounds."""
    data = Generated(population)
    budgets = tuple(int(share * full_bytes(MODEL)) for share in (0.9, 1.1, 1.2))
    method = make_method("scalefl", blocks=["0", "1"], work=replace(WORK, batch_size=4))
    state = method.init(MODEL, PROBLEM, seed=0, smallest_memory_bytes=min(budgets))
    with LocalEngine(data, Clients(data, budgets)) as engine:
        for _, record in itertools.islice(federate(method, engine, UniformSampler(cohort), state), 2):
            assert sum(map(len, record.rungs.values())) == cohort and record.lost == []
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_memory_grows_with_neither_cohort_nor_population():
    """From small to large, so that growth shows in the highest mark; 900 clients' updates would be 150 MB."""
    model_bytes = sum(p.numel() * 4 for p in MODEL.build(0).parameters())
    assert 900 * model_bytes > 100 * MIB
    few = highest_after(1000, 100)
    many = highest_after(100_000, 100)
    crowd = highest_after(100_000, 1000)
    assert many - few < 8 * MIB
    # Tasks and records may cost a few kB for each of 900 further clients; their tensors nothing.
    assert crowd - many < 12 * MIB
