"""The round loop: a generator that the caller drives. Saving, evaluating and stopping are the caller's."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Self

from scalefl.aggregate import Total, check, largest
from scalefl.coords import extract, take, within
from scalefl.data.population import PopulationView
from scalefl.errors import BadUpdate, EmptyCohort, RoundFailed
from scalefl.params import Params, select
from scalefl.privacy import Mechanism, NoisyTotal, check_plan, check_private
from scalefl.record import PrivateRecord, RoundRecord, Tally
from scalefl.sampling import Sampler
from scalefl.types import (
    Adding,
    ClientInfo,
    ClientLoss,
    ClientTask,
    ClientUpdate,
    Collects,
    Coords,
    Engine,
    Method,
    Population,
    Reduces,
    RoundPlan,
    ServerState,
    floor_of,
)
from scalefl.units import mib

_log = logging.getLogger("scalefl")

TIGHTER = 0.9
"""Of the predicted peak of a task that hit a memory cap, what its client is planned with from then on."""


def federate(
    method: Method,
    engine: Engine,
    sample: Sampler,
    state: ServerState,
    *,
    is_looked_at: Callable[[int], bool] = lambda round: True,
    privacy: Mechanism | None = None,
) -> Iterator[tuple[ServerState, RoundRecord | PrivateRecord]]:
    """Yield the state and the record after each round, for as long as the caller keeps asking.

    Args:
        method, engine, sample: who does what, where, and with whom.
        state: where to go on from.
        is_looked_at: whether the model of that round will be measured or used: a method whose norms' statistics are
            collected once weights are done collects them then.
        privacy: protects each client's data: those of `sample` may take part, and each does by a toss of its own.

    Raises:
        EmptyCohort: no client can take part in the next round.
        RoundFailed: every client of a round was lost, and not all for memory; the state yielded before is still good.
        ConfigError: the method needs more of clients than a private run lets them tell.
    """
    if privacy:
        check_private(method, state)
    while True:
        start = time.perf_counter()
        clients = engine.population()
        known = _untold(clients) if privacy else _less(clients, state.tightened)
        cohort = sample(known, floor_of(method, state, known), state)
        plan = method.plan(state, cohort)
        if not plan.tasks:
            raise EmptyCohort(f"round {state.round + 1}: none of {len(cohort)} selected clients can do its task")
        if privacy:
            state, told = _private_round(method, engine, privacy, state, plan)
            yield state, told
            continue
        total = _total(state, plan)
        tally = _reduce(method, engine, state, plan, total)
        if not tally.updates and all(loss.out_of_memory for loss in tally.losses.values()):
            # Planned again, for less: a round that raised would be the same when the run is resumed.
            state = replace(state, tightened=_tightened(state, plan, tally))
            continue
        if not tally.updates:
            raise RoundFailed(f"round {state.round + 1}: all {len(plan.tasks)} clients were lost: {tally.causes()}")
        after = method.aggregate(state, plan, total)
        _check_finite(state, after)
        state = replace(after, tightened=_tightened(state, plan, tally))
        record = tally.record(plan, state.round, time.perf_counter() - start)
        if isinstance(method, Collects) and is_looked_at(state.round):
            state, record = _collected(method, engine, sample, state, record)
        yield state, record


def _private_round(
    method: Method, engine: Engine, privacy: Mechanism, state: ServerState, plan: RoundPlan
) -> tuple[ServerState, PrivateRecord]:
    """The state after a round of which nothing is known but a noised sum, and a record of no more than that.

    Args:
        method, engine, privacy, state: as in `federate`.
        plan: for everybody who may take part. The method never sees who did; nor does it matter to the round how many
            did, or were lost: budgets are not tightened, and a round without anybody is noise.
    """
    check_plan(plan, state)
    plan = replace(plan, is_uniform=True)
    total, drawn = privacy.total(state, plan), privacy.drawn(state, plan)
    tally = _reduce(method, engine, state, replace(plan, tasks=drawn), total)
    if tally.losses and not tally.updates:
        _log.warning("round %d: all clients that took part were lost: %s", state.round + 1, tally.causes())
    after = method.aggregate(state, plan, total)
    _check_finite(state, after)
    after = replace(after, releases=state.releases + 1)
    peak_bytes = max(plan.costs[task.client_id].peak_bytes for task in plan.tasks)
    return after, PrivateRecord(after.round, plan.stage, peak_bytes, privacy.spent(after.releases))


def _collected(
    method: Collects, engine: Engine, sample: Sampler, state: ServerState, record: RoundRecord
) -> tuple[ServerState, RoundRecord]:
    """The state with its norms' statistics, from the clients that come next and can run the model; and the record.

    Raises:
        EmptyCohort: nobody can.
    """
    start, floor = time.perf_counter(), method.collection_floor_bytes(state)
    if floor is None:
        return state, record
    cohort = sample(_less(engine.population(), state.tightened), floor, state)
    plan = method.collection(state, cohort)
    total = _total(state, plan)
    tally = _reduce(method, engine, state, plan, total)
    if not tally.updates:
        return state, replace(record, lost=[*record.lost, *tally.lost(plan)])
    # Nobody's budget is tightened: what was too much here says nothing of training.
    state = method.collected(state, plan, total)
    return state, record.with_collection(tally.record(plan, state.round, time.perf_counter() - start))


def _less(clients: Population, tightened: Mapping[int, int]) -> PopulationView:
    """The population, without the part of their budgets that clients have been seen not to have."""

    def less(client: ClientInfo) -> ClientInfo:
        most = tightened.get(client.id, client.memory_bytes)
        return replace(client, memory_bytes=min(client.memory_bytes, most))

    smallest = min([clients.smallest_memory_bytes, *tightened.values()])
    return PopulationView(clients, less, smallest, clients.largest_memory_bytes)


def _untold(clients: Population) -> PopulationView:
    """The population of a private run: nobody tells how much data it has, or of which labels."""
    smallest, largest = clients.smallest_memory_bytes, clients.largest_memory_bytes
    return PopulationView(clients, lambda client: client.untold, smallest, largest)


def _tightened(state: ServerState, plan: RoundPlan, tally: Tally) -> Mapping[int, int]:
    """By client, what may be planned with from now on: less than what was too much for it."""
    too_much = {i: plan.costs[i].peak_bytes for i, loss in tally.losses.items() if loss.out_of_memory}
    return {**state.tightened, **{i: int(TIGHTER * peak_bytes) for i, peak_bytes in sorted(too_much.items())}}


def _check_finite(before: ServerState, after: ServerState) -> None:
    """Refuse a state that a server optimizer has driven out of range: updates themselves are checked one by one."""
    for name, tensor in after.params.items():
        if tensor is not before.params.get(name) and not math.isfinite(largest(tensor)):
            raise RoundFailed(
                f"round {after.round}: {name} is no longer finite after the server's step: lower server.lr"
            )


def _total(state: ServerState, plan: RoundPlan) -> Total:
    return Total(state.params, sum(_weight(plan, client.num_examples) for client in plan.clients.values()))


def _weight(plan: RoundPlan, num_examples: int) -> int:
    return 1 if plan.is_uniform else num_examples


def _reduce(method: Method, engine: Engine, state: ServerState, plan: RoundPlan, total: Total | NoisyTotal) -> Tally:
    """Add updates up as they come: the server holds no client's tensors for longer than that takes."""
    tally = Tally()
    tasks = {task.client_id: task for task in plan.tasks}
    for answer in _answers(method, engine, _Orders(state, plan), plan, total):
        if isinstance(answer, ClientLoss):
            if answer.has_spoilt:
                raise RoundFailed(f"round {state.round + 1}: client {answer.client_id}: {answer.cause}")
            tally.lose(_explained(answer, plan))
            continue
        if answer.is_added:
            tally.add(answer)
            continue
        task, coords = tasks[answer.client_id], plan.coords[answer.client_id]
        try:
            own = plan.own.get(task.client_id, {})
            expected = {**extract(state.params, {n: coords[n] for n in task.moving if n not in own}), **own}
            sizes = check(task, answer, expected, plan.clients[answer.client_id].num_examples)
        except BadUpdate as error:
            tally.lose(ClientLoss(answer.client_id, task.round, f"{error.name}: {error.why}", answer.receipt))
            continue
        if own and isinstance(total, Total):
            total.keep(answer.client_id, select(answer.params, own))
        shared = {name: t for name, t in answer.params.items() if name not in own}
        params, coords = _counting(shared, coords, plan.counting.get(answer.client_id, {}))
        total.add(params, _weight(plan, answer.num_examples), coords, sizes)
        tally.add(answer)
    return tally


def _answers(
    method: Method,
    engine: Engine,
    orders: _Orders,
    plan: RoundPlan,
    total: Total | NoisyTotal,
) -> Iterator[ClientUpdate | ClientLoss]:
    if isinstance(engine, Reduces) and isinstance(total, Total):
        return engine.fit_into(method, orders, _Reduction(plan, total))
    return engine.fit(method, orders)


class _Orders:
    """A round's tasks, longest first, each with its tensors, which are taken from the state when it is drawn."""

    def __init__(self, state: ServerState, plan: RoundPlan) -> None:
        self._params, self._plan = state.params, plan
        self._left = plan.longest_first()[::-1]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[ClientTask, Params]:
        if not self._left:
            raise StopIteration
        task = self._left.pop()
        return task, {
            **extract(self._params, self._plan.coords[task.client_id]),
            **self._plan.own.get(task.client_id, {}),
        }

    def __length_hint__(self) -> int:
        return len(self._left)


class _Reduction:
    """A round's total, for engines that add up themselves what needs no knowledge of the plan."""

    def __init__(self, plan: RoundPlan, total: Total) -> None:
        self._plan, self._total = plan, total
        self.merge = total.merge

    def adding(self, client_id: int) -> Adding | None:
        """See `Reduction`."""
        plan = self._plan
        windows = (*plan.coords[client_id].values(), *plan.counting.get(client_id, {}).values())
        if plan.own.get(client_id) or any(window is not None for window in windows):
            return None
        num_examples = plan.clients[client_id].num_examples
        return Adding(1 if plan.is_uniform else None, num_examples, self._total.scale)


def _counting(params: Params, coords: Coords, counting: Coords) -> tuple[Params, Coords]:
    """The tensors of an update without what does not count, and where they lie in the global ones."""
    windows = {name: window for name, window in counting.items() if window is not None}
    if not windows:
        return params, coords
    kept = {name: take(params[name], window) for name, window in windows.items()}
    return {**params, **kept}, {**coords, **{name: within(coords[name], window) for name, window in windows.items()}}


def _explained(loss: ClientLoss, plan: RoundPlan) -> ClientLoss:
    """The same loss; its cause says what was predicted, if that was too little. What was measured is in its receipt."""
    if not loss.out_of_memory:
        return loss
    return replace(loss, cause=f"{loss.cause}, predicted {mib(plan.costs[loss.client_id].peak_bytes)} MiB")
