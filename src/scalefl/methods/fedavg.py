"""FedAvg: every client trains the whole model (McMahan et al., AISTATS 2017), under a memory gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from scalefl.methods.common import initial_params, make_plan
from scalefl.models.spec import ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.params import Params, without_attachments
from scalefl.planner import budget_error, fit, least
from scalefl.problem import Problem
from scalefl.server_optimizers import Average, ServerOptimizer, apply_mean
from scalefl.steps import full_step
from scalefl.types import (
    Aux,
    Choice,
    ClientInfo,
    Ladder,
    LadderName,
    LocalWork,
    Objective,
    Offer,
    RoundPlan,
    ServerState,
    Step,
    Totals,
    ladder_of,
)

WIDTH_STEPS = 32
"""`all_small` looks for its width among multiples of 1/32."""


@dataclass(frozen=True, kw_only=True)
class FedAvg:
    """FedAvg and its populations.

    Paper: McMahan et al., algorithm 1. Deviation: the gate, and "all_small", are for clients with little memory.

    Args:
        work: what each client does.
        population: "exclusive": clients whose memory holds training of the whole model; "all": every client,
            as if memory were no matter (an upper reference that no real system reaches); "all_small": every
            client, with the widest model that the weakest one can train.
        means: what clients may do to fit their memory: a ladder, or the name of one ("none", "micro-batches", "auto").
        server: what the server does with the mean.
    """

    work: LocalWork = LocalWork()
    population: Literal["exclusive", "all", "all_small"] = "exclusive"
    means: Ladder | LadderName = "none"
    server: ServerOptimizer = Average()

    def init(self, model: ModelSpec, problem: Problem, *, seed: int, smallest_memory_bytes: int) -> ServerState:
        """The model at its width, with its initial weights."""
        if self.population == "all_small":
            model = self._widest(model, problem, smallest_memory_bytes)
        return ServerState(model, problem, initial_params(model, seed), round=0, seed=seed)

    def menu(self, state: ServerState) -> list[Offer]:
        """The whole model."""
        return [self._offer(state.model, state.problem)]

    def floor_bytes(self, state: ServerState) -> int:
        """What training the whole model takes at the least; 0 for "all"."""
        return 0 if self.population == "all" else self._least(state.model, state.problem).cost.peak_bytes

    def plan(self, state: ServerState, cohort: Sequence[ClientInfo]) -> RoundPlan:
        """The whole model for everybody."""
        offer, problem = self._offer(state.model, state.problem), state.problem
        budgets = {client.memory_bytes for client in cohort}
        fits = {
            budget: fit(offer, problem, self.objective, budget, round=state.round)
            or least(offer, problem, self.objective)
            for budget in budgets
        }
        chosen = {client.id: (fits[client.memory_bytes],) for client in cohort}
        return make_plan(state, "full", cohort, chosen, self.work)

    def objective(self, step: Step) -> Objective:
        """The problem's loss."""
        return TaskLoss()

    def aggregate(self, state: ServerState, plan: RoundPlan, total: Totals) -> ServerState:
        """The weighted mean, through the server optimizer."""
        params, history = apply_mean(self.server, state, plan, total)
        return replace(state, params=params, round=state.round + 1, aux=Aux(history, state.aux.values))

    def deploy(self, state: ServerState) -> tuple[ModelSpec, Params]:
        """The model as it is."""
        return state.model, without_attachments(state.params)

    def _offer(self, model: ModelSpec, problem: Problem) -> Offer:
        step = full_step(model, problem, self.work.at_round(0))
        return Offer("full", (("", step),), ladder_of(self.means))

    def _least(self, model: ModelSpec, problem: Problem) -> Choice:
        return least(self._offer(model, problem), problem, self.objective)

    def _widest(self, model: ModelSpec, problem: Problem, budget_bytes: int) -> ModelSpec:
        """The widest model whose training fits, by bisection: more width never takes less memory."""
        if self._least(model, problem).cost.peak_bytes <= budget_bytes:
            return model
        low, high = 0, WIDTH_STEPS
        while high - low > 1:
            middle = (low + high) // 2
            fits = self._least(model.at_width(middle / WIDTH_STEPS), problem).cost.peak_bytes <= budget_bytes
            low, high = (middle, high) if fits else (low, middle)
        if low == 0:
            least = self._least(model.at_width(1 / WIDTH_STEPS), problem)
            what = f"{model.name} at width 1/{WIDTH_STEPS}"
            raise budget_error(what, least, problem, TaskLoss(), budget_bytes)
        return model.at_width(low / WIDTH_STEPS)
