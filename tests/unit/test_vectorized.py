"""Equal tasks of several clients in one run: as each alone, up to rounding, whoever does it; or one by one."""

from __future__ import annotations

import errno
import random
from dataclasses import replace

import pytest
import torch
from torch import nn

import scalefl.engines.local
import scalefl.engines.shared
from scalefl.client import Residents, run_task
from scalefl.engines.local import LocalEngine
from scalefl.engines.worker import at_once
from scalefl.methods.fedavg import FedAvg
from scalefl.models.spec import ModelSpec
from scalefl.types import ClientTask, ClientUpdate, Means
from scalefl.vectorized import can_vectorize, run_vectorized
from support import (
    ABORTS,
    PROBLEM,
    RAISES,
    WORK,
    Clients,
    MadeData,
    copied,
    full_bytes,
    identical,
    make_method,
    play,
    spec,
)

SIZES = [18, 24, 10, 8, 17, 24, 3, 16]
DATA = MadeData(SIZES)
CLIENTS = Clients(DATA, (10 * full_bytes(),))
TWICE = replace(WORK, epochs=2, prox=0.1)


def moves(before, after, names=None):
    """Everything that has moved, in one vector."""
    return torch.cat([(after[n].double() - before[n].double()).flatten() for n in sorted(names or before)])


def near(found, wanted) -> bool:
    return bool((found - wanted).norm() <= 1e-4 * wanted.norm())


def given(method, model=None):
    """Tasks of clients that do the first thing on the menu, what they are sent, and their data."""
    state = method.init(model or spec(), PROBLEM, seed=0, smallest_memory_bytes=2**40)
    step = method.menu(state)[0].step
    sent = {name: state.params[name] for name in step.part.names()}
    tasks = [ClientTask(i, 3, (step,), seed=100 + i) for i in range(len(SIZES))]
    return tasks, [sent] * len(tasks), [DATA.examples(i) for i in range(len(SIZES))]


def one_by_one(method, tasks, params, examples):
    residents = Residents(measured=False)
    return [
        run_task(method, PROBLEM, residents, task, {n: t.clone() for n, t in sent.items()}, mine)
        for task, sent, mine in zip(tasks, params, examples, strict=True)
    ]


@pytest.fixture
def bundles(monkeypatch) -> list[int]:
    """How many clients each vectorised run in this process had, that came to its end."""
    found: list[int] = []

    def noting(method, problem, residents, tasks, *rest):
        updates = at_once(method, problem, residents, tasks, *rest)
        found.append(0 if updates is None else len(tasks))
        return updates

    monkeypatch.setattr(scalefl.engines.local, "at_once", noting)
    return found


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_each_client_of_a_group_gets_what_it_gets_alone(norm, clip_norm):
    method = FedAvg(work=replace(TWICE, clip_norm=clip_norm))
    tasks, params, examples = given(method, spec(norm=norm))
    before = copied(params[0])
    found = run_vectorized(method, PROBLEM, Residents(measured=False), tasks, params, examples)
    wanted = one_by_one(method, tasks, params, examples)
    assert identical(params[0], before), "what was sent is not changed"
    assert [update.client_id for update in found] == list(range(len(SIZES)))
    for mine, alone in zip(found, wanted, strict=True):
        assert near(moves(before, mine.params, alone.params), moves(before, alone.params, alone.params))
        assert mine.num_examples == alone.num_examples
        assert mine.receipt.bytes_up == alone.receipt.bytes_up and mine.receipt.bytes_down == alone.receipt.bytes_down
        assert mine.metrics.keys() == alone.metrics.keys() == {"loss", "accuracy"}
        for name, (value, weight) in alone.metrics.items():
            assert mine.metrics[name] == (pytest.approx(value, rel=1e-4), weight)
        for name in alone.params:
            assert mine.params[name].dtype == alone.params[name].dtype, name


def test_clients_do_not_feel_each_other():
    """The others hold other data, and one has gone to infinity."""
    method = FedAvg(work=WORK)
    tasks, params, examples = given(method)
    first = run_vectorized(method, PROBLEM, Residents(measured=False), tasks, params, examples)
    examples[2] = {**examples[2], "x": torch.full_like(examples[2]["x"], float("inf"))}
    again = run_vectorized(method, PROBLEM, Residents(measured=False), tasks, params, examples)
    for i, (one, other) in enumerate(zip(first, again, strict=True)):
        assert identical(one.params, other.params) == (i != 2)
    assert not all(bool(t.isfinite().all()) for t in again[2].params.values())


def test_who_does_it_makes_no_difference(monkeypatch):
    method, states = make_method("scalefl"), []
    for workers in (0, 1, 2, 3):
        monkeypatch.setattr(scalefl.engines.local, "ADDING_WORKERS", 3)
        with LocalEngine(DATA, CLIENTS, workers=workers, clients_at_once=3) as engine:
            after, records = play(method, engine, 3, cohort=8)
            states.append(after[-1])
            assert all(record.lost == [] for record in records)
    assert all(identical(state.params, states[0].params) for state in states)
    with LocalEngine(DATA, CLIENTS) as alone:
        after, _ = play(method, alone, 3, cohort=8)
    assert not identical(after[-1].params, states[0].params), "or nothing was done at once"


@pytest.mark.parametrize("means", [Means(micro_batch_size=4), Means(recompute=True), Means(bfloat16=True)], ids=str)
def test_what_clients_do_in_pieces_they_do_alone(means):
    method = FedAvg(work=WORK)
    tasks, *_ = given(method)
    (step,) = tasks[0].steps
    assert can_vectorize(tasks[0])
    assert not can_vectorize(replace(tasks[0], steps=(step, replace(step, means=means))))


def unbatched() -> nn.Module:
    """A model with an operation that vmap would call for each client in turn."""
    return nn.Sequential(*spec().build(0), Bumps())


class Bumps(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.special.log_ndtr(x)


def careless() -> nn.Module:
    """A model that takes numbers out of tensors."""
    return nn.Sequential(Peeks(), *spec().build(0))


class Peeks(nn.Module):
    def forward(self, x):
        return x if float(x.mean()) < 100 else -x


def fickle() -> nn.Module:
    """A model that draws from Python's generator, which vmap does not see."""
    return nn.Sequential(Skips(), *spec().build(0))


class Skips(nn.Module):
    def forward(self, x):
        return x if random.random() < 0.5 else 1.5 * x


MODELS = {
    "draws": ModelSpec.of("test_vectorized:fickle"),
    "dropout": spec(dropout=0.5),
    "item": ModelSpec.of("test_vectorized:careless"),
    "no rule": ModelSpec.of("test_vectorized:unbatched"),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_model_that_cannot_is_trained_one_by_one(model, workers, bundles):
    data = MadeData([10] * 6)
    clients = Clients(data, (10 * full_bytes(model),))
    with LocalEngine(data, clients) as alone, LocalEngine(data, clients, workers=workers, clients_at_once=3) as engine:
        wanted, _ = play(make_method("fedavg"), alone, 2, model=model, cohort=6)
        found, records = play(make_method("fedavg"), engine, 2, model=model, cohort=6)
    assert identical(found[-1].params, wanted[-1].params), "to the bit"
    assert all(record.lost == [] for record in records)
    assert bundles == ([] if workers else [0] * 4)


@pytest.mark.parametrize(
    ("workers", "mark"),
    [(0, RAISES), (2, RAISES), (2, ABORTS), (3, ABORTS)],
    ids=["here", "beside", "dies", "dies adding"],
)
def test_one_bad_client_costs_itself_alone(workers, mark, monkeypatch):
    monkeypatch.setattr(scalefl.engines.local, "ADDING_WORKERS", 3)
    data = MadeData([10] * 6, spoilt={4: mark})
    model = ModelSpec.of("support:deadly")
    clients = Clients(data, (10 * full_bytes(model),))
    with LocalEngine(data, clients, workers=workers, clients_at_once=3) as engine:
        _, records = play(make_method("fedavg"), engine, 2, model=model, cohort=6)
    assert [[loss["client"] for loss in record.lost] for record in records] == [[4], [4]]
    assert all(record.num_examples == 50 for record in records)


def test_without_memory_to_share_they_are_trained_one_by_one(monkeypatch):
    with LocalEngine(DATA, CLIENTS) as alone:
        wanted, _ = play(make_method("fedavg"), alone, 2, cohort=8)

    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(scalefl.engines.shared.os, "posix_fallocate", full)
    with LocalEngine(DATA, CLIENTS, workers=2, clients_at_once=3) as engine:
        found, records = play(make_method("fedavg"), engine, 2, cohort=8)
    assert identical(found[-1].params, wanted[-1].params) and all(record.lost == [] for record in records)


def test_tasks_that_differ_do_not_share_a_run(bundles):
    """Rows of nobody, and steps of others: budgets that hold half the batch, and those that hold all."""
    data = MadeData([9, 12, 10, 8, 0, 8])
    budgets = (10 * full_bytes(), 10 * full_bytes(), int(0.8 * full_bytes()))
    method = make_method("fedavg", means="micro-batches")
    with LocalEngine(data, Clients(data, budgets), clients_at_once=3) as engine:
        state = method.init(spec(), PROBLEM, seed=0, smallest_memory_bytes=min(budgets))
        plan = method.plan(state, [engine.population()[i] for i in range(6)])
        orders = [(task, {n: t.clone() for n, t in state.params.items()}) for task in plan.tasks]
        answers = list(engine.fit(method, orders))
    assert sorted(answer.client_id for answer in answers) == [0, 1, 2, 3, 4, 5]
    assert all(isinstance(answer, ClientUpdate) for answer in answers)
    assert bundles == [3], "0, 1 and 3; 4 has no data, 2 and 5 have less memory"
