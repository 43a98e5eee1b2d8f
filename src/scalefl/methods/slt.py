"""SLT: blocks are trained in turn at full width and then frozen; what comes behind trains along, narrow.

Pfeiffer, Khalili, Henkel, "Aggregating Capacity in FL through Successive Layer Training for
Computationally-Constrained Devices", NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from scalefl.blocks import Blocks, Span, blocks_as_asked, blocks_by_hand
from scalefl.caches import remembered
from scalefl.coords import extract
from scalefl.errors import ConfigError, check_range
from scalefl.methods.common import first_that_fits, initial_params, make_plan
from scalefl.models.mixed import narrower_behind
from scalefl.models.spec import ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.params import Params
from scalefl.planner import least
from scalefl.problem import Problem
from scalefl.server_optimizers import Average, ServerOptimizer, apply_mean
from scalefl.steps import span_step
from scalefl.types import (
    Aux,
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
from scalefl.widths import check_sliceable, windows

WIDTH_STEPS = 32
"""Widths are looked for among multiples of 1/32."""


@dataclass(frozen=True, kw_only=True)
class SLT:
    """SLT.

    Paper: section 3. Everybody does the same: at each stage the width behind the block is the largest with which the
    weakest client can train, and the least where it can't at any. Rounds are shared out between stages by the
    parameters that they train. Deviation: blocks, where the paper goes layer by layer; means beside them, if asked for.

    Args:
        work: what each client does.
        blocks: what is trained in turn: how many, or the module paths after which to cut.
        rounds: how many are shared out; 0: as many as `work.lr_rounds`. Later ones go to the last stage.
        means: what clients may do to fit their memory: a ladder, or the name of one ("none", "micro-batches", "auto").
        server: what the server does with the mean.
    """

    work: LocalWork = LocalWork()
    blocks: int | tuple[str, ...] = 4
    rounds: int = 0
    means: Ladder | LadderName = "none"
    server: ServerOptimizer = Average()

    def __post_init__(self) -> None:
        check_range("rounds", self.rounds, 0)

    def init(self, model: ModelSpec, problem: Problem, *, seed: int, smallest_memory_bytes: int) -> ServerState:
        """The model's weights, the width of each stage, and the round in which it starts.

        Raises:
            ConfigError: neither `rounds` nor `work.lr_rounds` says how long the run is.
            UnsliceableModel: the model cannot be narrower behind one of the cuts.
        """
        total = self.rounds or self.work.lr_rounds
        if not total:
            raise ConfigError(
                "slt shares rounds out between its stages: say how many as method.rounds or work.lr_rounds"
            )
        blocks = blocks_as_asked(model, problem, self.blocks)
        widths: list[float] = []
        while not widths or widths[-1] < 1:  # from where all that is left fits at full width, it trains together
            widths.append(self._width(blocks, len(widths), smallest_memory_bytes))
        weights = [self._trained(blocks, stage, width) for stage, width in enumerate(widths)]
        values = {"widths": widths, "starts": _shared_out(total, weights)}
        return ServerState(model, problem, initial_params(model, seed), round=0, seed=seed, aux=Aux(values=values))

    def menu(self, state: ServerState) -> list[Offer]:
        """Each stage."""
        blocks = blocks_as_asked(state.model, state.problem, self.blocks)
        return [self._offer(blocks, stage, width) for stage, width in enumerate(state.aux.values["widths"])]

    def floor_bytes(self, state: ServerState) -> int:
        """What the stage takes at the least."""
        return least(self._offer_of(state), state.problem, self.objective).cost.peak_bytes

    def plan(self, state: ServerState, cohort: Sequence[ClientInfo]) -> RoundPlan:
        """The stage for everybody."""
        offer = self._offer_of(state)
        found = first_that_fits([offer], state, self.objective, cohort)
        chosen = {id: (choice,) for id, choice in found.items()}

        def coords_of(client_id: int, model: ModelSpec) -> Coords:
            return windows(state.model, model)

        return make_plan(state, offer.label, cohort, chosen, self.work, coords_of)

    def objective(self, step: Step) -> Objective:
        """The problem's loss."""
        return TaskLoss()

    def aggregate(self, state: ServerState, plan: RoundPlan, total: Totals) -> ServerState:
        """The weighted mean."""
        params, history = apply_mean(self.server, state, plan, total)
        return replace(state, params=params, round=state.round + 1, aux=Aux(history, state.aux.values))

    def deploy(self, state: ServerState) -> tuple[ModelSpec, Params]:
        """The model that the last round trained: behind the block in turn it is narrow, and whole at the end."""
        blocks = blocks_as_asked(state.model, state.problem, self.blocks)
        stage = _stage(state, max(state.round - 1, 0))
        model = _model(blocks, stage, state.aux.values["widths"][stage])
        return model, extract(state.params, windows(state.model, model))

    def _offer_of(self, state: ServerState) -> Offer:
        stage = _stage(state, state.round)
        blocks = blocks_as_asked(state.model, state.problem, self.blocks)
        return self._offer(blocks, stage, state.aux.values["widths"][stage])

    def _offer(self, blocks: Blocks, stage: int, width: float) -> Offer:
        step = self._step(blocks, stage, width)
        behind = f" ({width:g} wide behind)" if width < 1 else ""
        label = f"{blocks.label(Span(stage, len(blocks) - 1 if width == 1 else stage))}{behind}"
        return Offer(label, (("", step),), ladder_of(self.means), is_stage=True)

    def _step(self, blocks: Blocks, stage: int, width: float) -> Step:
        cuts = [cut.module for block in range(len(blocks) - 1) if (cut := blocks.cut(block))]
        mixed = blocks_by_hand(_model(blocks, stage, width), blocks.problem, tuple(cuts))
        return span_step(mixed, Span(stage, len(blocks) - 1), None, self.work.at_round(0))

    def _trained(self, blocks: Blocks, stage: int, width: float) -> int:
        """Parameters that a stage trains."""
        step = self._step(blocks, stage, width)
        own = step.part.model.skeleton().named_parameters()
        return sum(p.numel() for name, p in own if name in step.trainable)

    def _width(self, blocks: Blocks, stage: int, budget: int) -> float:
        """The largest width behind the block in turn that fits, by bisection: more width never takes less memory.

        Where none fits, the least, for those clients that it fits; and behind the last block there is nothing.
        """
        if stage == len(blocks) - 1:
            return 1.0
        if self._least_bytes(blocks, stage, 1.0) <= budget:
            return 1.0
        low, high = 0, WIDTH_STEPS
        while high - low > 1:
            middle = (low + high) // 2
            fits = self._least_bytes(blocks, stage, middle / WIDTH_STEPS) <= budget
            low, high = (middle, high) if fits else (low, middle)
        return max(low, 1) / WIDTH_STEPS

    def _least_bytes(self, blocks: Blocks, stage: int, width: float) -> int:
        found = least(self._offer(blocks, stage, width), blocks.problem, self.objective)
        return found.cost.peak_bytes


def _stage(state: ServerState, round: int) -> int:
    starts: list[int] = state.aux.values["starts"]
    return sum(start <= round for start in starts) - 1


def _shared_out(rounds: int, weights: Sequence[int]) -> list[int]:
    """The round in which each stage starts: rounds in proportion to its weight, one at least."""
    starts, passed = [0], 0
    for number, weight in enumerate(weights[:-1], 1):
        passed += weight
        starts.append(max(round(rounds * passed / sum(weights)), starts[-1] + 1, number))
    return starts


@remembered(256)
def _model(blocks: Blocks, stage: int, width: float) -> ModelSpec:
    """The model, narrower behind the block in turn."""
    if width == 1.0:
        return blocks.model
    last, unit_of, problem = blocks.ends[stage], blocks.partition.unit_of, blocks.problem
    behind = {name.rpartition(".")[0] for name, unit in unit_of.items() if unit > last}

    def run(module: object) -> None:
        args, kwargs = problem.inputs(problem.example(2))
        module(*args, **kwargs)  # type: ignore[operator]

    found = narrower_behind(blocks.model, sorted(behind), width, run)
    check_sliceable(blocks.model, found)
    return found
