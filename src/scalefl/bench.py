"""How fast this machine trains: standard workloads beside a bare PyTorch loop, and some rounds of a run."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalefl.bookkeeping import is_due
from scalefl.client import Residents
from scalefl.config import Config
from scalefl.conversion import convert
from scalefl.costs import step_cost
from scalefl.data import Devices, MemoryClass
from scalefl.data.population import SimulatedPopulation
from scalefl.engines.gauge import device_of
from scalefl.engines.local import LocalEngine
from scalefl.engines.trial import Crew, by_trial, makespan, most_workers
from scalefl.evaluate import evaluate
from scalefl.experiment import Experiment
from scalefl.loop import federate
from scalefl.methods import PRESETS
from scalefl.methods.fedavg import FedAvg
from scalefl.methods.scalefl import ScaleFL
from scalefl.models.spec import ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.params import Params
from scalefl.problem import Batch, Classification, Column, num_rows
from scalefl.record import RoundRecord
from scalefl.rng import generator
from scalefl.runner import engine_of, first_state, rounds_after
from scalefl.sampling import UniformSampler
from scalefl.steps import full_step
from scalefl.types import (
    ClientLoss,
    ClientTask,
    ClientUpdate,
    Engine,
    LocalWork,
    Method,
    Population,
    RoundPlan,
    ServerState,
    floor_of,
)

T = TypeVar("T")

LEAST_ROUNDS = 3
"""So many are timed at least, after one that warms up: two would have no median."""
_RUN_ROUNDS = 100
"""For which a workload's crew is chosen: the start of workers is a cost of the run."""
_PARTS = 5
"""Into which the time for `WORKLOADS` goes: the rounds of each, and those beside the bare loop of two."""
_PLANS = 8
"""Rounds of a run that are planned to see what later ones take."""
_SHORT_SECONDS = 1.0
"""An evaluation that takes less is done twice: what is compiled the first time is soon forgotten in a run."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What synthetic clients do in a round.

    Args:
        name, about: for people.
        model, method: what is trained, and how.
        clients: how many there are.
        examples: that each of them has.
        cohort: how many take part in a round.
        compared: how many take part in a round beside the bare loop; 0: no such loop does the same.
        memory: of each client, as a part of what full training takes.
    """

    name: str
    about: str
    model: ModelSpec
    method: Method
    clients: int
    examples: int
    cohort: int
    compared: int
    memory: str = "200%"


_RESNET = ModelSpec.of("scalefl.models.resnet:resnet10", width=0.25, norm="group")
_RESNET_WORK = LocalWork(batch_size=32, lr=0.05, weight_decay=0)
_PAPER = {key: value for key, value in PRESETS["scalefl-paper"].items() if key != "name"}
_FIRST_BLOCK = {**_PAPER, "growth": {"kind": "sequential", "rounds": 10**6}}
"""The paper's mode, with rounds that are all alike."""

WORKLOADS = (
    Workload(
        name="CNN",
        about="two convolutions, by FedAvg: 20 clients a round, 50 examples each, batches of 10, SGD without momentum",
        model=ModelSpec.of("scalefl.models.cnn:cnn"),
        method=FedAvg(work=LocalWork(batch_size=10, lr=0.1, momentum=0, weight_decay=0)),
        clients=100,
        examples=50,
        cohort=20,
        compared=10,
    ),
    Workload(
        name="ResNet-10",
        about="16 channels and GroupNorm, by FedAvg: 4 clients a round, 500 examples each, batches of 32, momentum 0.9",
        model=_RESNET,
        method=FedAvg(work=_RESNET_WORK),
        clients=16,
        examples=500,
        cohort=4,
        compared=2,
    ),
    Workload(
        name="ResNet-10, block 1",
        about="the same clients train the first of four blocks, as in the paper (scalefl-paper)",
        model=_RESNET,
        method=replace(convert(_FIRST_BLOCK, ScaleFL, "method"), work=_RESNET_WORK),
        clients=16,
        examples=500,
        cohort=4,
        compared=0,
    ),
)
"""CIFAR-shaped; light enough for a minute on a laptop, and the same on each machine."""


class SyntheticClients:
    """CIFAR-shaped noise with labels; all in memory, as a bare loop would hold it."""

    def __init__(self, clients: int, examples: int) -> None:
        draw = generator(0, "synthetic clients")
        self._x = torch.randint(0, 256, (clients, examples, 3, 32, 32), dtype=torch.uint8, generator=draw)
        self._y = torch.randint(0, 10, (clients, examples), generator=draw)
        self.problem = Classification(10, (Column("image", (3, 32, 32), "uint8"),))
        self.num_clients = clients

    @property
    def validation(self) -> Batch:
        """Some client's."""
        return self.examples(0)

    @property
    def test(self) -> Batch:
        """Some client's."""
        return self.examples(0)

    def num_examples(self, client: int) -> int:
        """All have as many."""
        return self._x.shape[1]

    def label_counts(self, client: int) -> Tensor:
        """How many examples it has of each label, [K]."""
        return torch.bincount(self._y[client], minlength=10)

    def examples(self, client: int) -> Batch:
        """Its rows."""
        return {"image": self._x[client], "label": self._y[client]}


class Federation:
    """A workload with its clients, before the first round."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.data = SyntheticClients(workload.clients, workload.examples)
        full = step_cost(
            full_step(workload.model, self.data.problem, workload.method.work), self.data.problem, TaskLoss()
        )
        device = MemoryClass(
            name="all", share=1.0, memory=workload.memory, flops_per_second=1e9, bandwidth_bytes_per_second=1e6
        )
        self.clients = SimulatedPopulation(self.data, Devices(classes=(device,)), full.peak_bytes, seed=0)
        least = self.clients.smallest_memory_bytes
        self.state = workload.method.init(workload.model, self.data.problem, seed=0, smallest_memory_bytes=least)

    def crew(self) -> Crew:
        """Who trains fastest here, by trial."""
        method, state, cohort = self.workload.method, self.state, self.workload.cohort
        plan = method.plan(state, UniformSampler(cohort)(self.clients, floor_of(method, state, self.clients), state))
        most = min(most_workers(max(cost.peak_bytes for cost in plan.costs.values())), cohort)
        examples = self.data.examples(plan.longest_first()[0].client_id)
        return by_trial(method, state, plan, examples, rounds=_RUN_ROUNDS, most=most)

    def rounds(self, cohort: int, crew: Crew) -> Generator[Params]:
        """The weights after each round of so many clients, without end."""
        with LocalEngine(
            self.data,
            self.clients,
            workers=crew.workers,
            threads=crew.threads,
            clients_at_once=crew.clients_at_once,
        ) as engine:
            for state, _ in federate(self.workload.method, engine, UniformSampler(cohort), self.state):
                yield state.params

    def bare_rounds(self, cohort: int) -> Generator[Params]:
        """The same without this package: one model, torch's SGD, and a running mean."""
        model, work, weights = self.workload.model.build(0), self.workload.method.work, dict(self.state.params)
        for round in itertools.count():
            chosen = torch.randperm(self.data.num_clients, generator=generator(0, "bare cohort", round))
            total = {name: torch.zeros_like(t) for name, t in weights.items()}
            for client in chosen[:cohort].tolist():
                _train_bare(model, weights, work, self.data.examples(client))
                for name, t in model.state_dict().items():
                    total[name] += t / cohort
            weights = total
            yield weights

    def pairs(self, cohort: int, rounds: int = 1) -> Generator[tuple[float, float]]:
        """Seconds of so many rounds and of as many bare ones, in turn, on one thread of this process."""
        # While the engine is open, this process has its number of threads.
        with closing(self.rounds(cohort, Crew(0, 1))) as ours, closing(self.bare_rounds(cohort)) as bare:
            next(ours), next(bare)  # warm up
            for turn in itertools.count():
                if turn % 2:  # who goes first alternates
                    bare_seconds = _seconds(bare, rounds)
                    yield _seconds(ours, rounds), bare_seconds
                else:
                    yield _seconds(ours, rounds), _seconds(bare, rounds)


def _train_bare(model: nn.Module, weights: Params, work: LocalWork, examples: Batch) -> None:
    model.load_state_dict(weights)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=work.lr, momentum=work.momentum, weight_decay=work.weight_decay)
    draw = generator(0, "bare batches")
    orders = (torch.randperm(num_rows(examples), generator=draw) for _ in range(work.epochs))
    for rows in itertools.chain.from_iterable(torch.split(order, work.batch_size) for order in orders):
        x = examples["image"][rows].float().div_(255).sub_(0.5).div_(0.5)
        loss = F.cross_entropy(model(x), examples["label"][rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _seconds(rounds: Iterator[Params], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        next(rounds)
    return time.perf_counter() - start


def timed(values: Iterable[T]) -> Iterator[tuple[float, T]]:
    """Values, and how long each has taken to come."""
    start = time.perf_counter()
    for value in values:
        yield time.perf_counter() - start, value
        start = time.perf_counter()


def drawn(values: Iterator[T], seconds: float, least: int, most: int | None = None) -> list[T]:
    """What comes in so many seconds, and at least and at most so many values."""
    found, end = [], time.perf_counter() + seconds
    for value in itertools.islice(values, most):
        found.append(value)
        if len(found) >= least and time.perf_counter() >= end:
            break
    return found


class Spread(NamedTuple):
    """What some rounds took."""

    median: float
    least: float
    most: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Of some values, one at least."""
        return cls(statistics.median(values), min(values), max(values), len(values))


class Overhead(NamedTuple):
    """What rounds take over bare ones: the ratio of the medians, and the least and the most of the pairs' own."""

    ratio: float
    least: float
    most: float
    pairs: int
    seconds: float
    bare_seconds: float

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> Self:
        """From interleaved seconds of ours and bare ones."""
        ratios = [ours / bare for ours, bare in pairs]
        seconds, bare_seconds = (statistics.median(column) for column in zip(*pairs, strict=True))
        return cls(seconds / bare_seconds, min(ratios), max(ratios), len(pairs), seconds, bare_seconds)


@dataclass(frozen=True)
class Throughput:
    """What a workload has come to.

    Args:
        workload: which.
        crew: who trained.
        seconds: of a round.
        overhead: over a bare loop; None where there is none.
    """

    workload: Workload
    crew: Crew
    seconds: Spread
    overhead: Overhead | None

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        workload = self.workload
        samples = workload.cohort * workload.examples * workload.method.work.epochs
        return {
            "name": workload.name,
            "about": workload.about,
            "crew": self.crew._asdict(),
            "clients_per_round": workload.cohort,
            "samples_per_round": samples,
            "round_seconds": self.seconds._asdict(),
            "rounds_per_second": 1 / self.seconds.median,
            "samples_per_second": samples / self.seconds.median,
            "overhead": self.overhead._asdict() if self.overhead else None,
        }


def throughput(workload: Workload, seconds: float) -> Throughput:
    """Measure a workload, as its share of so many seconds for all of them; at least `LEAST_ROUNDS` rounds."""
    federation, share = Federation(workload), seconds / _PARTS
    crew = federation.crew()
    with closing(federation.rounds(workload.cohort, crew)) as rounds:
        next(rounds)  # workers start, kernels are compiled
        taken = [taken for taken, _ in drawn(timed(rounds), share, LEAST_ROUNDS)]
    overhead = None
    if workload.compared:
        with closing(federation.pairs(workload.compared)) as pairs:
            overhead = Overhead.of(drawn(pairs, share, LEAST_ROUNDS))
    return Throughput(workload, crew, Spread.of(taken), overhead)


class Planned(NamedTuple):
    """What is known of a round before it happens: what it trains, and the FLOPs of the worker that has most to do."""

    stage: str
    flops: float


@dataclass(frozen=True)
class Forecast:
    """What a whole run will take.

    Args:
        rounds, round_seconds: how many, and the mean of each.
        evaluations, evaluation_seconds: on validation data; so too.
        start_seconds: before the first round: assembling, trying out who trains, and what the first takes more.
        assumes: of rounds that were not measured.
    """

    rounds: int
    round_seconds: float
    evaluations: int
    evaluation_seconds: float
    start_seconds: float
    assumes: str

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.start_seconds + self.rounds * self.round_seconds + self.evaluations * self.evaluation_seconds

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "seconds": self.seconds, "hours": self.seconds / 3600}


@dataclass(frozen=True)
class Preview:
    """What some rounds of a run have come to, and what all of them will.

    Args:
        config: of the run, with who trained.
        crew: who, and why.
        seconds: of a round.
        samples_per_second: examples that clients trained on, in each epoch; None where they do not tell.
        idle_share: of what workers could have trained, the part in which they did not; None where they do not tell.
        num_lost: tasks that were lost.
        forecast: of all rounds.
    """

    config: Config
    crew: Crew
    seconds: Spread
    samples_per_second: float | None
    idle_share: float | None
    num_lost: int
    forecast: Forecast

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "name": self.config.name,
            "method": self.config.method.get("name", "scalefl"),
            "engine": self.config.engine.name,
            "crew": self.crew._asdict(),
            "round_seconds": self.seconds._asdict(),
            "samples_per_second": self.samples_per_second,
            "idle_share": self.idle_share,
            "num_lost": self.num_lost,
            "forecast": self.forecast.to_json(),
        }


class _Watched:
    """An engine of which it is known how long its clients trained."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.training_seconds = 0.0

    def population(self) -> Population:
        """See `Engine`."""
        return self._engine.population()

    def fit(self, method: Method, orders: Iterable[tuple[ClientTask, Params]]) -> Iterator[ClientUpdate | ClientLoss]:
        """See `Engine`."""
        for answer in self._engine.fit(method, orders):
            self.training_seconds += answer.receipt.seconds
            yield answer


def preview(config: Config, seconds: float) -> Preview:
    """Train the first rounds of a run for about so many seconds, two at least if it has them; nothing is kept.

    Raises:
        ScaleFLError: as the run would.
    """
    start = time.perf_counter()
    experiment = Experiment(config)
    experiment.check_clients()
    state = first_state(experiment)
    settled = experiment.settle_engine()
    settings, rounds = experiment.config.engine, experiment.config.rounds
    assert settings.workers != "auto" and settings.threads != "auto" and settings.clients_at_once != "auto"
    with engine_of(experiment) as engine:
        watched = _Watched(engine)
        next(rounds_after(state, experiment, watched, experiment.privacy))  # workers start, kernels are compiled
        start_seconds, watched.training_seconds = time.perf_counter() - start, 0.0
        going = timed(rounds_after(state, experiment, watched, experiment.privacy))
        done = drawn(going, seconds, min(2, rounds), rounds)
        evaluation_seconds = _evaluation_seconds(experiment, done[-1][1][0])
    taken, records = [taken for taken, _ in done], [record for _, (_, record) in done]
    told = [record for record in records if isinstance(record, RoundRecord)]  # clients of private runs tell nothing
    num_samples = sum(record.num_examples for record in told) * config.work.epochs
    at_once = 1 if settings.name == "flower" else max(settings.workers, 1)  # nodes in one process take turns
    round_seconds, assumes = foreseen(
        taken,
        [record.stage for record in records],
        _planned(experiment, state, range(len(done)), at_once),
        _planned(experiment, state, _spread(rounds), at_once),
    )
    return Preview(
        config=experiment.config,
        crew=settled or Crew(settings.workers, settings.threads, clients_at_once=settings.clients_at_once),
        seconds=Spread.of(taken),
        samples_per_second=num_samples / sum(taken) if told else None,
        idle_share=1 - watched.training_seconds / at_once / sum(taken) if told else None,
        num_lost=sum(len(record.lost) for record in told),
        forecast=Forecast(
            rounds,
            round_seconds,
            sum(is_due(round, config.evaluation.every, rounds) for round in range(rounds + 1)),
            evaluation_seconds,
            max(0.0, start_seconds - statistics.median(taken)),
            assumes,
        ),
    )


def _evaluation_seconds(experiment: Experiment, state: ServerState) -> float:
    residents = Residents(device_of(experiment.config.engine.device))
    for _ in range(2):
        start = time.perf_counter()
        model, params = experiment.method.deploy(state)
        evaluate(residents, model, params, experiment.problem, experiment.data.validation)
        seconds = time.perf_counter() - start
        if seconds > _SHORT_SECONDS:
            break
    return seconds


def _spread(rounds: int) -> list[int]:
    """Some rounds, evenly over a run."""
    return sorted({(2 * i + 1) * rounds // (2 * _PLANS) for i in range(_PLANS)})


def _planned(experiment: Experiment, state: ServerState, rounds: Iterable[int], at_once: int) -> list[Planned]:
    """What the method would do in other rounds from this state; without those in which nobody could take part."""
    plans = [experiment.planned(replace(state, round=round)) for round in rounds]
    return [Planned(plan.stage, _longest_flops(plan, at_once)) for plan in plans if plan]


def _longest_flops(plan: RoundPlan, workers: int) -> float:
    return makespan((plan.flops(task) for task in plan.tasks), workers)


def foreseen(
    seconds: Sequence[float], stages: Sequence[str], planned: Sequence[Planned], later: Sequence[Planned]
) -> tuple[float, str]:
    """The mean seconds of a run's rounds, and what that assumes.

    Args:
        seconds, stages: of the rounds that were measured: how long, and what they trained.
        planned: the same rounds, planned from the state before the first: by a method that goes by what came before,
            or by none, others than those that were done.
        later: rounds all over the run, planned so too.
    """
    count = f"{len(seconds)} round{'' if len(seconds) == 1 else 's'}"
    flops = sum(plan.flops for plan in planned)
    if [plan.stage for plan in planned] != list(stages) or not flops or not later:
        trained = ", ".join(dict.fromkeys(stages))
        return statistics.fmean(seconds), (
            f"that the rounds to come take what the {count} measured here took on average ({trained}): what they will "
            "train depends on the rounds before them"
        )
    per_flop = sum(seconds) / flops
    trained = ", ".join(dict.fromkeys(plan.stage for plan in later))
    return per_flop * statistics.fmean(plan.flops for plan in later), (
        f"that time goes with the predicted FLOPs of what clients train, planned for {len(later)} rounds of the run "
        f"({trained}) and measured in {count}"
    )
