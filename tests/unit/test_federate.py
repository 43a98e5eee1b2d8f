"""The round loop when clients, workers and callers misbehave; and what the server holds meanwhile."""

from __future__ import annotations

import itertools
import logging
import random
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scalefl.client import Residents, run_task
from scalefl.coords import extract
from scalefl.engines.local import LocalEngine
from scalefl.errors import ConfigError, EmptyCohort, RoundFailed
from scalefl.loop import federate
from scalefl.measure import resident_bytes
from scalefl.methods.fedavg import FedAvg
from scalefl.models.spec import ModelSpec
from scalefl.params import Params
from scalefl.sampling import UniformSampler
from scalefl.types import ClientInfo, ClientLoss, ClientTask, ClientUpdate, Method, Population, ServerState
from support import (
    ABORTS,
    PROBLEM,
    RAISES,
    Clients,
    MadeData,
    children,
    comparable,
    copied,
    full_bytes,
    identical,
    kill_workers,
    make_method,
    tiny,
    waited,
    workers_of,
)

# With or without one of the first six, the sum's next power of 2 is the same: 64.
SIZES = [9, 12, 10, 8, 11, 14, 8, 8, 8]
SPOILT = {6: RAISES, 7: float("nan"), 8: ABORTS}
DATA = MadeData(SIZES, spoilt=SPOILT)
CAUSES = {6: "ValueError: the camera is", 7: "holds NaN", 8: "signal 6 (SIGABRT)"}
MODEL = ModelSpec.of("support:deadly")
CLIENTS = Clients(DATA, (10 * full_bytes(),))


class Chosen:
    """A sampler that takes the clients it was told to."""

    def __init__(self, *ids: int) -> None:
        self.ids = ids

    def __call__(self, population: Population, floor_bytes: int, state: ServerState) -> list[ClientInfo]:
        return [population[i] for i in self.ids]


def start(model: ModelSpec = MODEL, method: Method | None = None) -> ServerState:
    return (method or FedAvg()).init(model, PROBLEM, seed=3, smallest_memory_bytes=0)


def one_round(engine: Any, *ids: int, state: ServerState | None = None, method: Method | None = None):
    method = method or make_method("fedavg")
    return next(federate(method, engine, Chosen(*ids), state or start()))


class Unreadable(MadeData):
    """Client 3's data cannot be read."""

    def examples(self, client: int):
        if client == 3:
            raise OSError("the card was pulled out")
        return super().examples(client)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_client_whose_data_fails_is_recorded_and_left_out(shared, workers):
    data = Unreadable(SIZES, spoilt=SPOILT)
    with LocalEngine(data, CLIENTS, workers=workers) as engine:
        state, record = one_round(engine, 3, 0, 1, 2, 5)
    (lost,) = record.lost
    assert (lost["client"], lost["cause"]) == (3, "OSError: the card was pulled out")
    assert identical(state.params, one_round(shared[0], 0, 1, 2, 5)[0].params)


@pytest.fixture(scope="module")
def shared() -> Iterator[dict[int, LocalEngine]]:
    """One engine in this process and one with two workers, that must survive everything below."""
    with LocalEngine(DATA, CLIENTS) as here, LocalEngine(DATA, CLIENTS, workers=2) as beside:
        yield {0: here, 2: beside}


# Without workers an abort ends the run, as it ends any program.
@pytest.mark.parametrize(("workers", "bad"), [(0, 6), (0, 7), (2, 6), (2, 7), (2, 8)])
def test_a_client_that_fails_is_recorded_and_left_out(shared, workers, bad):
    state, record = one_round(shared[workers], 0, 1, bad, 2, 5)
    assert [loss["client"] for loss in record.lost] == [bad]
    assert CAUSES[bad] in record.lost[0]["cause"] and "\n" not in record.lost[0]["cause"]
    wanted, without = one_round(shared[0], 0, 1, 2, 5)
    assert identical(state.params, wanted.params)
    moved = {"bytes_down": without.bytes_down, "bytes_up": without.bytes_up}
    assert record.bytes_down >= without.bytes_down, "what a lost client was sent has crossed too"
    assert replace(comparable(record), lost=[], **moved) == comparable(without)
    # The engine goes on: the next round has all its workers.
    again, record = one_round(shared[workers], 0, 1, 3, 5, state=state)
    assert record.lost == []
    assert identical(again.params, one_round(shared[0], 0, 1, 3, 5, state=wanted)[0].params)


def test_a_client_over_which_a_worker_dies_is_asked_once_more(shared, caplog):
    with caplog.at_level(logging.WARNING, "scalefl"):
        _, record = one_round(shared[2], 0, 8, 2)
    assert [loss["client"] for loss in record.lost] == [8]
    assert [message.split(":")[0] for message in caplog.messages] == ["client 8 of round 1 is asked again"]


@pytest.mark.parametrize(
    ("workers", "bad", "said"), [(0, 6, "in forward"), (1, 6, "in forward"), (1, 8, "Fatal Python error: Aborted")]
)
def test_debug_messages_say_where_a_client_failed(workers, bad, said, caplog, monkeypatch):
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")
    with caplog.at_level(logging.DEBUG, "scalefl"), LocalEngine(DATA, CLIENTS, workers=workers) as engine:
        _, record = one_round(engine, bad, 0)
    assert f"client {bad} was lost" in caplog.text and said in caplog.text
    keys = {"client", "cause", "predicted_peak_bytes", "measured_peak_bytes"}
    assert record.lost[0].keys() == keys, "the journal has no tracebacks: they name files of a machine"


@pytest.mark.parametrize(("workers", "bad"), [(0, (6, 7)), (2, (8, 6))])
def test_a_round_that_loses_everybody_keeps_the_state(shared, workers, bad):
    state = start()
    before = copied(state.params)
    with pytest.raises(RoundFailed, match="round 1: all 2 clients were lost") as caught:
        one_round(shared[workers], *bad, state=state)
    assert all(CAUSES[i] in str(caught.value) for i in bad)
    assert identical(state.params, before) and state.round == 0
    after, _ = one_round(shared[workers], 3, 4, 5, state=state)
    assert identical(after.params, one_round(shared[0], 3, 4, 5)[0].params)


def test_clients_who_cannot_do_anything():
    method = make_method("scalefl", blocks=["1", "2"])
    with LocalEngine(DATA, Clients(DATA, (100,))) as engine, pytest.raises(EmptyCohort, match="none of 2"):
        one_round(engine, 0, 1, state=start(method=method), method=method)


# Stopping in the middle.


def orders_of(state: ServerState, engine: LocalEngine, ids: Sequence[int]) -> tuple[Method, list[Any]]:
    method = make_method("fedavg")
    plan = method.plan(state, [engine.population()[i] for i in ids])
    return method, [(task, extract(state.params, plan.coords[task.client_id])) for task in plan.tasks]


@pytest.mark.parametrize(("workers", "answers"), [(0, 0), (0, 1), (2, 0), (2, 1)])
def test_a_caller_that_stops_in_the_middle_leaves_the_engine_usable(shared, workers, answers):
    """Answers to tasks that nobody waits for any more must not turn up in the next round."""
    engine, state = shared[workers], start()
    method, orders = orders_of(state, engine, range(5))
    going = engine.fit(method, iter(orders))
    for _ in range(answers):
        assert isinstance(next(going), ClientUpdate)
    going.close()
    after, record = one_round(engine, 5, 1, 2, 3, state=state)
    assert record.lost == []
    assert identical(after.params, one_round(shared[0], 5, 1, 2, 3, state=state)[0].params)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupt_in_the_middle_of_a_round(shared, workers):
    """Ctrl-C while the server draws the next order: it comes through, and the next round is as ever."""
    engine, state = shared[workers], start()

    class Interrupted:
        def population(self) -> Population:
            return engine.population()

        def fit(self, method: Method, orders: Iterable[Any]) -> Iterator[Any]:
            def stopping() -> Iterator[Any]:
                yield from itertools.islice(orders, 3)
                raise KeyboardInterrupt

            return engine.fit(method, stopping())

    before = copied(state.params)
    with pytest.raises(KeyboardInterrupt):
        one_round(Interrupted(), 0, 1, 2, 3, 4, state=state)
    assert identical(state.params, before)
    after, _ = one_round(engine, 0, 1, 2, 3, state=state)
    assert identical(after.params, one_round(shared[0], 0, 1, 2, 3, state=state)[0].params)


def test_closing_the_loop_between_rounds(shared):
    rounds = federate(make_method("fedavg"), shared[2], UniformSampler(3), start())
    state, _ = next(rounds)
    rounds.close()
    following, _ = next(federate(make_method("fedavg"), shared[2], UniformSampler(3), state))
    assert following.round == 2


# Workers.


def test_a_worker_killed_while_idle_is_replaced(shared):
    one_round(shared[2], 0, 1, 2)
    killed = kill_workers(shared[2])
    for worker in shared[2]._workers:
        wait([worker.channel])  # with all its threads, so that its pipe is closed
    state, record = one_round(shared[2], 1, 2, 3)
    assert record.lost == []
    assert len(workers_of(shared[2])) == len(killed) == 2 and not set(killed) & set(workers_of(shared[2]))
    assert identical(state.params, one_round(shared[0], 1, 2, 3)[0].params)


@pytest.mark.parametrize("workers", [1, 2])
def test_no_worker_outlives_the_engine_and_threads_are_as_before(workers):
    before, threads = set(children()), torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), LocalEngine(DATA, CLIENTS, workers=workers, threads=2) as engine:
        assert torch.get_num_threads() == 2
        method, orders = orders_of(start(), engine, range(3))
        going = engine.fit(method, iter(orders))
        next(going)
        assert set(children()) > before
        raise ZeroDivisionError
    going.close()  # late, as where a traceback has kept it alive
    waited(lambda: set(children()) <= before)
    assert torch.get_num_threads() == threads


def test_more_workers_than_clients(shared):
    state, record = one_round(shared[2], 4)
    assert sorted(itertools.chain(*record.rungs.values())) == [4]
    assert identical(state.params, one_round(shared[0], 4)[0].params)


@pytest.mark.parametrize(("workers", "threads"), [(-1, 1), (0, 0)])
def test_impossible_engines_are_refused(workers, threads):
    with pytest.raises(ConfigError, match="workers"):
        LocalEngine(DATA, CLIENTS, workers=workers, threads=threads)


def test_a_model_that_cannot_be_sent_is_named(shared):
    """A factory inside a function exists in this process only."""
    model = ModelSpec.of(lambda: tiny(norm="group"))
    with pytest.raises(ConfigError, match="workers = 0"):
        one_round(shared[2], 0, state=start(model))
    assert one_round(shared[0], 0, state=start(model))[0].round == 1


def test_a_module_instead_of_a_factory_costs_workers_its_memory_once(shared):
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 20_000), nn.ReLU(), nn.Linear(20_000, 3))
    state, method = start(ModelSpec.of(module)), make_method("fedavg", population="all")
    state, _ = one_round(shared[2], *range(6), state=state, method=method)
    settled = sum(map(resident_bytes, workers_of(shared[2])))
    for _ in range(7):
        state, _ = one_round(shared[2], *range(6), state=state, method=method)
    grown = sum(map(resident_bytes, workers_of(shared[2]))) - settled
    assert grown < 15 * sum(p.numel() * 4 for p in module.parameters()), "42 tasks"


def test_models_with_buffers_of_their_own_do_not_depend_on_workers(shared):
    """A buffer that the user's forward changes: averaged or left alone, but the same wherever clients run."""
    model = ModelSpec.of("test_federate:counting")
    states = [one_round(shared[w], 0, 1, 2, state=start(model))[0] for w in (0, 2)]
    assert identical(states[0].params, states[1].params)


class Counter(nn.Module):
    """Counts its calls in a buffer, as some normalisations and quantisers do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return x + 0.01 * self.calls


def counting() -> nn.Module:
    return nn.Sequential(*tiny(), Counter())


# Engines of ten lines: the seam.


class Shuffling:
    """Answers in another order than it was asked."""

    def __init__(self, shuffle: int) -> None:
        self._shuffle = shuffle

    def population(self) -> Population:
        return CLIENTS

    def fit(self, method: Method, orders: Iterable[tuple[ClientTask, Params]]) -> Iterator[ClientUpdate | ClientLoss]:
        answers = [
            run_task(method, PROBLEM, Residents(), task, copied(params), DATA.examples(task.client_id))
            for task, params in orders
        ]
        yield from random.Random(self._shuffle).sample(answers, len(answers))


@pytest.mark.parametrize("shuffle", range(3))
def test_the_order_of_answers_changes_nothing(shared, shuffle):
    state, record = one_round(Shuffling(shuffle), *range(6))
    wanted, expected = one_round(shared[0], *range(6))
    assert identical(state.params, wanted.params)
    assert comparable(record) == comparable(expected)


class Tampering:
    """Changes the answers of client 1."""

    def __init__(self, engine: LocalEngine, change: Callable[[ClientUpdate], ClientUpdate | ClientLoss]) -> None:
        self._engine, self._change = engine, change

    def population(self) -> Population:
        return self._engine.population()

    def fit(self, method: Method, orders: Iterable[Any]) -> Iterator[ClientUpdate | ClientLoss]:
        for answer in self._engine.fit(method, orders):
            yield self._change(answer) if answer.client_id == 1 else answer


NAME = "3.5.bias"  # the classifier's


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda u: ClientLoss(1, 0, "went away"), "went away"),
        (lambda u: replace(u, num_examples=0), "0 is not a weight"),
        (lambda u: replace(u, num_examples=10**9), "1000000000 is not a weight"),
        (lambda u: replace(u, params={**u.params, "evil": torch.ones(1)}), "evil: not asked for"),
        (lambda u: replace(u, params={n: t for n, t in u.params.items() if n != NAME}), f"{NAME}: missing"),
        (lambda u: replace(u, params={**u.params, NAME: torch.ones(1, 3)}), f"{NAME}: torch.float32 (1, 3)"),
        (lambda u: replace(u, params={**u.params, NAME: u.params[NAME].double()}), f"{NAME}: torch.float64"),
        (lambda u: replace(u, params={**u.params, NAME: u.params[NAME] / 0}), f"{NAME}: holds"),
    ],
)
def test_bad_updates_are_kept_out(shared, change, cause):
    state, record = one_round(Tampering(shared[0], change), 0, 1, 2, 3, 5)
    assert [loss["client"] for loss in record.lost] == [1]
    assert cause in record.lost[0]["cause"]
    assert identical(state.params, one_round(shared[0], 0, 2, 3, 5)[0].params)


# What the server holds.


class Watching:
    """Notes how many orders are out, and how many clients' answers are alive, whenever an order is drawn."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self.drawn = self.answered = self.most_out = self.most_alive = 0
        self._answers: list[weakref.ref[ClientUpdate]] = []

    def population(self) -> Population:
        return self._engine.population()

    def fit(self, method: Method, orders: Iterable[Any]) -> Iterator[ClientUpdate | ClientLoss]:
        answers = self._engine.fit(method, self._counted(orders))
        for answer in answers:
            self.answered += 1
            self._answers.append(weakref.ref(answer))
            self._note()
            yield answer
            del answer

    def _counted(self, orders: Iterable[Any]) -> Iterator[Any]:
        for order in orders:
            self.drawn += 1
            self._note()
            yield order

    def _note(self) -> None:
        self.most_out = max(self.most_out, self.drawn - self.answered)
        self.most_alive = max(self.most_alive, sum(answer() is not None for answer in self._answers))


@pytest.mark.parametrize("workers", [0, 2])
def test_orders_are_drawn_as_workers_fall_free(shared, workers):
    watching = Watching(shared[workers])
    for _ in range(2):
        one_round(watching, *range(6))
    assert watching.drawn == watching.answered == 12
    assert watching.most_out <= max(workers, 1) + 1
    assert watching.most_alive <= 2, "the server holds answers that it has added up"
