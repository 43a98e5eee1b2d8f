"""The round loop: a generator that the caller drives. Saving, evaluating and stopping are the caller's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from scalefl.aggregate import Total, check
from scalefl.coords import extract, take, within
from scalefl.errors import BadUpdate, EmptyCohort, RoundFailed
from scalefl.params import Params, select
from scalefl.record import RoundRecord, Tally
from scalefl.sampling import Sampler
from scalefl.types import (
    ClientInfo,
    ClientLoss,
    Collects,
    Coords,
    Engine,
    Method,
    Population,
    RoundPlan,
    ServerState,
)
from scalefl.units import mib

TIGHTER = 0.9
"""Of the predicted peak of a task that hit a memory cap, what its client is planned with from then on."""


def federate(
    method: Method,
    engine: Engine,
    sample: Sampler,
    state: ServerState,
    *,
    is_looked_at: Callable[[int], bool] = lambda round: True,
) -> Iterator[tuple[ServerState, RoundRecord]]:
    """Yield the state and the record after each round, for as long as the caller keeps asking.

    Args:
        method, engine, sample: who does what, where, and with whom.
        state: where to go on from.
        is_looked_at: whether the model of that round will be measured or used: a method whose norms' statistics are
            collected once weights are done collects them then.

    Raises:
        EmptyCohort: no client can take part in the next round.
        RoundFailed: every client of a round was lost, and not all for memory; the state yielded before is still good.
    """
    while True:
        start = time.perf_counter()
        cohort = sample(_Tightened(engine.population(), state.tightened), method.floor_bytes(state), state)
        plan = method.plan(state, cohort)
        if not plan.tasks:
            raise EmptyCohort(f"round {state.round + 1}: none of {len(cohort)} selected clients can do its task")
        total, tally = _reduce(method, engine, state, plan)
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
    cohort = sample(_Tightened(engine.population(), state.tightened), floor, state)
    plan = method.collection(state, cohort)
    total, tally = _reduce(method, engine, state, plan)
    if not tally.updates:
        return state, replace(record, lost=[*record.lost, *tally.lost(plan)])
    # Nobody's budget is tightened: what was too much here says nothing of training.
    state = method.collected(state, plan, total)
    return state, record.with_collection(tally.record(plan, state.round, time.perf_counter() - start))


@dataclass(frozen=True)
class _Tightened:
    """The population, without the part of their budgets that clients have been seen not to have."""

    clients: Population
    tightened: Mapping[int, int]

    @property
    def smallest_memory_bytes(self) -> int:
        return min([self.clients.smallest_memory_bytes, *self.tightened.values()])

    @property
    def largest_memory_bytes(self) -> int:
        return self.clients.largest_memory_bytes

    def __len__(self) -> int:
        return len(self.clients)

    def __getitem__(self, index: int) -> ClientInfo:
        client = self.clients[index]
        most = self.tightened.get(client.id, client.memory_bytes)
        return replace(client, memory_bytes=min(client.memory_bytes, most))


def _tightened(state: ServerState, plan: RoundPlan, tally: Tally) -> Mapping[int, int]:
    """By client, what may be planned with from now on: less than what was too much for it."""
    too_much = {i: plan.costs[i].peak_bytes for i, loss in tally.losses.items() if loss.out_of_memory}
    return {**state.tightened, **{i: int(TIGHTER * peak_bytes) for i, peak_bytes in sorted(too_much.items())}}


def _check_finite(before: ServerState, after: ServerState) -> None:
    """Refuse a state that a server optimizer has driven out of range: updates themselves are checked one by one."""
    for name, tensor in after.params.items():
        if tensor is not before.params.get(name) and not bool(torch.isfinite(tensor).all()):
            raise RoundFailed(
                f"round {after.round}: {name} is no longer finite after the server's step: lower server.lr"
            )


def _reduce(method: Method, engine: Engine, state: ServerState, plan: RoundPlan) -> tuple[Total, Tally]:
    """Add updates up as they come: the server holds no client's tensors for longer than that takes."""
    weights = [1 if plan.is_uniform else client.num_examples for client in plan.clients.values()]
    total = Total(state.params, sum(weights))
    tally = Tally()
    tasks = {task.client_id: task for task in plan.tasks}
    orders = (
        (task, {**extract(state.params, plan.coords[task.client_id]), **plan.own.get(task.client_id, {})})
        for task in plan.tasks
    )
    for answer in engine.fit(method, orders):
        if isinstance(answer, ClientLoss):
            tally.lose(_explained(answer, plan))
            continue
        task, coords = tasks[answer.client_id], plan.coords[answer.client_id]
        try:
            own = plan.own.get(task.client_id, {})
            expected = {**extract(state.params, {n: coords[n] for n in task.moving if n not in own}), **own}
            sizes = check(task, answer, expected, plan.clients[answer.client_id].num_examples)
        except BadUpdate as error:
            tally.lose(ClientLoss(answer.client_id, task.round, f"{error.name}: {error.why}", answer.receipt))
            continue
        weight = 1 if plan.is_uniform else answer.num_examples
        if own:
            total.keep(answer.client_id, select(answer.params, own))
        shared = {name: t for name, t in answer.params.items() if name not in own}
        params, coords = _counting(shared, coords, plan.counting.get(answer.client_id, {}))
        total.add(params, weight, coords, sizes)
        tally.add(answer)
    return total, tally


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
