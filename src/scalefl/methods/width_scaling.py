"""What HeteroFL and FedRolex share: each client trains a narrower model, made of a window of each global tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from scalefl.errors import ConfigError, check_range
from scalefl.methods.common import first_that_fits, initial_params, make_plan
from scalefl.models.scaler import with_scaler
from scalefl.models.spec import ModelSpec
from scalefl.norm_statistics import centred, collectable
from scalefl.objectives import OwnClasses, TaskLoss
from scalefl.params import Params, without_attachments
from scalefl.planner import fitting_collection, least_collection, least_of
from scalefl.problem import Problem
from scalefl.server_optimizers import Average, ServerOptimizer, apply_mean
from scalefl.steps import collecting_step, full_step
from scalefl.types import (
    Aux,
    Choice,
    ClientInfo,
    Coords,
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
from scalefl.widths import Units, check_sliceable, class_rows, windows


@dataclass(frozen=True, kw_only=True)
class WidthScaling(ABC):
    """Each client trains the widest model that fits it; each coordinate is the mean over those that hold it.

    Args:
        work: what each client does.
        rates: the widths that clients choose from, as shares of the global model's.
        means: what clients may do to fit their memory: a ladder, or the name of one ("none", "micro-batches", "auto").
        statistics: of batch norms: "collected": clients send none with their updates, and those of the global model
            are collected once its weights are done; "running": the mean of what clients send, like weights.
        scaler: whether what enters a norm is divided by the rate while a client trains.
        own_classes: whether logits of classes that a client does not hold are 0 while it trains, and the rows of the
            head that belong to them do not count.
        clip_norm: largest norm of the gradient, where the run's work sets none; 0 turns clipping off.
        server: what the server does with the mean.
    """

    work: LocalWork = LocalWork()
    rates: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125, 0.0625)
    means: Ladder | LadderName = "none"
    statistics: Literal["collected", "running"] = "collected"
    scaler: bool = True
    own_classes: bool = True
    clip_norm: float = 1.0
    server: ServerOptimizer = Average()

    def __post_init__(self) -> None:
        if not self.rates or not all(0 < rate <= 1 for rate in self.rates):
            raise ConfigError(f"rates = {list(self.rates)}: expected shares above 0 and up to 1, one at least")
        check_range("clip_norm", self.clip_norm, 0.0)

    @abstractmethod
    def units(self, state: ServerState, client_id: int) -> Units:
        """Which units of the wide model a client trains in this round."""

    def init(self, model: ModelSpec, problem: Problem, *, seed: int, smallest_memory_bytes: int) -> ServerState:
        """The model at its full width, with its initial weights.

        Raises:
            UnsliceableModel: its factory takes no width, or a narrower model is no slice of it.
        """
        for rate in self.rates:
            check_sliceable(model, model.at_width(rate))
        return ServerState(model, problem, initial_params(model, seed), round=0, seed=seed)

    def menu(self, state: ServerState) -> list[Offer]:
        """The model at each width, widest first."""
        return [self._offer(state, rate) for rate in sorted(set(self.rates), reverse=True)]

    def floor_bytes(self, state: ServerState) -> int:
        """What training at the cheapest width takes at the least."""
        return least_of(tuple(self.menu(state)), state.problem, self.objective).cost.peak_bytes

    def plan(self, state: ServerState, cohort: Sequence[ClientInfo]) -> RoundPlan:
        """The widest model that fits, for each client."""
        widest = first_that_fits(self.menu(state), state, self.objective, cohort)
        chosen = {c.id: (self._for(c, widest[c.id]),) for c in cohort if c.id in widest}

        def coords_of(client_id: int, model: ModelSpec) -> Coords:
            return windows(state.model, model, self.units(state, client_id))

        plan = make_plan(state, "widths", cohort, chosen, self._work, coords_of)
        counting = {c.id: self._counting(state, c) for c in cohort if c.id in chosen}
        return replace(plan, counting=counting, is_uniform=True)

    def objective(self, step: Step) -> Objective:
        """The problem's loss, over the client's own classes."""
        return TaskLoss() if step.classes is None else OwnClasses(step.classes)

    def aggregate(self, state: ServerState, plan: RoundPlan, total: Totals) -> ServerState:
        """The mean of each coordinate over the clients that hold it, all alike."""
        params, history = apply_mean(self.server, state, plan, total)
        return replace(state, params=params, round=state.round + 1, aux=Aux(history))

    def deploy(self, state: ServerState) -> tuple[ModelSpec, Params]:
        """The model at its full width."""
        return state.model, without_attachments(state.params)

    def collection_floor_bytes(self, state: ServerState) -> int | None:
        """What one run of the full model takes at the least; None where its norms have no statistics."""
        step = collecting_step(state.model, state.problem, self.work)
        if self.statistics == "running" or step is None:
            return None
        return least_collection(step, state.problem).cost.peak_bytes

    def collection(self, state: ServerState, cohort: Sequence[ClientInfo]) -> RoundPlan:
        """One run of the full model over each client's data, without gradients."""
        step = collecting_step(state.model, state.problem, self.work)
        assert step is not None
        chosen = {
            client.id: (found,)
            for client in cohort
            if (found := fitting_collection(step, state.problem, client.memory_bytes))
        }
        return make_plan(state, "statistics", cohort, chosen, step.work)

    def collected(self, state: ServerState, plan: RoundPlan, total: Totals) -> ServerState:
        """The state with what was collected."""
        found = centred(state.model.skeleton(), total.mean(state.params))
        return replace(state, params={**state.params, **found})

    @property
    def _work(self) -> LocalWork:
        return self.work if self.work.clip_norm else replace(self.work, clip_norm=self.clip_norm)

    def _offer(self, state: ServerState, rate: float) -> Offer:
        model = state.model.at_width(rate)
        if self.scaler and rate < 1:
            model = with_scaler(model, rate)
        step = full_step(model, state.problem, self._work.at_round(0))
        later = collectable(model.skeleton()) & step.statistics if self.statistics == "collected" else frozenset()
        if later:
            # Norms see their own batch all the same, which micro-batches change.
            step = replace(step, moving=step.moving - later, part=replace(step.part, couples=True))
        return Offer(f"width {rate:g}", (("", step),), ladder_of(self.means))

    def _for(self, client: ClientInfo, choice: Choice) -> Choice:
        return choice._replace(step=replace(choice.step, classes=client.classes if self.own_classes else None))

    def _counting(self, state: ServerState, client: ClientInfo) -> Coords:
        if client.classes is None or not self.own_classes:
            return {}
        rows = torch.tensor(client.classes)
        names = class_rows(state.model, state.problem)
        return {name: (rows, *[None] * (state.params[name].ndim - 1)) for name in names}
