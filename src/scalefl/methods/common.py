"""What methods share: initial tensors, and plans in which clients hold whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from scalefl.coords import whole
from scalefl.costs import in_turn
from scalefl.models.skeleton import tensors
from scalefl.models.spec import ModelSpec
from scalefl.planner import fit
from scalefl.rng import derive
from scalefl.types import (
    Choice,
    ClientInfo,
    ClientTask,
    Coords,
    LocalWork,
    Objective,
    Offer,
    RoundPlan,
    ServerState,
    Step,
)


def initial_params(model: ModelSpec, seed: int) -> dict[str, Tensor]:
    """The model's own initial weights and buffers, drawn from the run's seed."""
    return {name: t.clone() for name, t in tensors(model.build(derive(seed, "model"))).items()}


def magnitude(num_examples: int) -> int:
    """A number of examples, rounded up: it only decides whether a prefix's features fit on disk."""
    return 1 << num_examples.bit_length()


def first_that_fits(
    offers: Sequence[Offer],
    state: ServerState,
    objective: Callable[[Step], Objective],
    cohort: Sequence[ClientInfo],
) -> dict[int, Choice]:
    """For each client the first of some offers that fits it; clients that none fits are not among them."""
    wanted = {client.id: (client.memory_bytes, magnitude(client.num_examples)) for client in cohort}
    found: dict[tuple[int, int], Choice | None] = {}
    for budget, count in set(wanted.values()):
        fits = (fit(offer, state.problem, objective, budget, round=state.round, num_examples=count) for offer in offers)
        found[budget, count] = next((choice for choice in fits if choice), None)
    return {id: choice for id, want in wanted.items() if (choice := found[want])}


def make_plan(
    state: ServerState,
    stage: str,
    cohort: Sequence[ClientInfo],
    chosen: Mapping[int, tuple[Choice, ...]],
    work: LocalWork,
    coords_of: Callable[[int, ModelSpec], Coords] | None = None,
) -> RoundPlan:
    """A plan in which each client of `chosen` does its steps in turn, at the round's rate.

    Args:
        state, stage, cohort: of the round.
        chosen: what each client does.
        work: of the run.
        coords_of: where the tensors of a client's model lie in the global ones; None: they are whole.
    """
    work_now = work.at_round(state.round)
    tasks, coords, costs = [], {}, {}
    steps = {do: tuple(replace(choice.step, work=work_now) for choice in do) for do in set(chosen.values())}
    names = {do: whole(name for choice in do for name in choice.step.part.names()) for do in steps}
    for client in cohort:
        if client.id not in chosen:
            continue
        do = chosen[client.id]
        seed = derive(state.seed, "task", state.round, client.id)
        tasks.append(ClientTask(client.id, state.round, steps[do], seed))
        coords[client.id] = names[do]
        if coords_of is not None:
            windows = coords_of(client.id, do[0].step.part.model)
            coords[client.id] = {name: windows.get(name) for name in names[do]}
        costs[client.id] = in_turn([choice.cost for choice in do])
    rungs = {id: " + ".join(choice.rung for choice in do) for id, do in chosen.items()}
    return RoundPlan(stage, tuple(tasks), coords, costs, rungs, {client.id: client for client in cohort})
