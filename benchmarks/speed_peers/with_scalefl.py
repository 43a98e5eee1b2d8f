"""FedAvg by ScaleFL's Python API, on two workers.

python with_scalefl.py FOLDER
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from resident import turns
from spans import Spans
from task import Task

from scalefl.client import Residents
from scalefl.data import Dataset, Devices, MemoryClass, PartitionedData
from scalefl.data.population import SimulatedPopulation
from scalefl.engines.local import LocalEngine
from scalefl.engines.trial import Crew, by_trial
from scalefl.evaluate import evaluate
from scalefl.loop import federate
from scalefl.methods.fedavg import FedAvg
from scalefl.models.spec import ModelSpec
from scalefl.problem import Batch, Classification, Column
from scalefl.types import ClientInfo, LocalWork, Population, ServerState

WORKERS = 2
ROUNDS = 100
"""Of a run for which it would be worth while to find out how many clients should train at once."""


@dataclass(frozen=True)
class GivenCohorts:
    """A sampler that takes the users that it is told to."""

    task: Task

    def __call__(self, population: Population, floor_bytes: int, state: ServerState) -> list[ClientInfo]:
        """The round's cohort."""
        return [population[user] for user in self.task.cohort(state.round)]


class Run:
    """A federated run that goes on when asked to."""

    def __init__(self, task: Task) -> None:
        settings = task.settings
        model = ModelSpec.of(settings["factory"], **dict(settings["arguments"]))
        data = federated(task)
        everything = MemoryClass(
            name="all", share=1.0, memory=10.0, flops_per_second=1e9, bandwidth_bytes_per_second=1e6
        )
        clients = SimulatedPopulation(data, Devices(classes=(everything,)), 2**40, seed=0)
        names = ("batch_size", "epochs", "lr", "momentum")
        lies = "channels_last" if os.environ.get("CHANNELS_LAST") else "contiguous"
        work = LocalWork(weight_decay=0, memory_format=lies, **{name: settings[name] for name in names})
        firsts = tuple(settings["firsts"])
        self._method = Spans(work=work, firsts=firsts) if firsts else FedAvg(work=work)
        state = self._method.init(model, data.problem, seed=0, smallest_memory_bytes=2**40)
        self._task, self._data, self._clients = task, data, clients
        self._state = replace(state, params=task.start())

    def serve(self) -> None:
        """Do what is asked for."""
        sample = GivenCohorts(self._task)
        crew = self._tried(sample) if os.environ.get("AT_ONCE") else Crew(WORKERS, 1)
        with LocalEngine(
            self._data,
            self._clients,
            workers=crew.workers,
            threads=crew.threads,
            clients_at_once=crew.clients_at_once,
        ) as engine:
            states = federate(self._method, engine, sample, self._state)
            for rounds in turns(self._score, "torch", "scalefl"):
                self._advance(states, rounds)

    def _tried(self, sample: GivenCohorts) -> Crew:
        """As many clients at once as are fastest."""
        plan = self._method.plan(self._state, sample(self._clients, 0, self._state))
        examples = self._data.examples(plan.longest_first()[0].client_id)
        settled = {"most": WORKERS, "workers": WORKERS, "threads": 1}
        return by_trial(self._method, self._state, plan, examples, rounds=ROUNDS, **settled)

    def _advance(self, states: Iterator, rounds: int) -> None:
        for _ in range(rounds):
            self._state, record = next(states)
            if record.lost:
                raise SystemExit(f"clients were lost: {record.lost}")

    def _score(self) -> dict[str, float]:
        return evaluate(Residents(), *self._method.deploy(self._state), self._data.problem, self._data.test)


def federated(task: Task) -> PartitionedData:
    """The users as ScaleFL's clients."""
    problem = Classification(10, (Column("image", (3, 32, 32), "uint8"),))
    train = {"image": task.images, "label": task.labels}
    test: Batch = dict(zip(("image", "label"), task.test, strict=True))
    rows = torch.arange(len(task.labels))
    users = [rows[task.rows(user)] for user in range(len(task.sizes))]
    return PartitionedData(Dataset(problem, train, test), users, rows[:0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    Run(Task(Path(sys.argv[1]))).serve()
