"""ProFL: blocks are trained in turn until they hardly move on: first from back to front, then from front to back.

Wu, Li, Xu, "Breaking the Memory Wall for Heterogeneous Federated Learning via Progressive Training", KDD 2025
(arXiv 2404.13349).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from torch import Tensor

from scalefl.blocks import Blocks, Span, blocks_as_asked
from scalefl.errors import check_range
from scalefl.methods.common import first_that_fits, initial_params, make_plan
from scalefl.models.output import OutputSpec
from scalefl.models.spec import ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.params import Params, is_attachment, real, without_attachments
from scalefl.planner import least, output_module
from scalefl.problem import Problem
from scalefl.server_optimizers import Average, ServerOptimizer, apply_mean
from scalefl.steps import span_step
from scalefl.types import (
    Aux,
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

START = "start."
"""What the tensors of the block in turn were when its window began."""


class Turn(msgspec.Struct, frozen=True):
    """Whose turn it is: the position in the order of blocks, its rounds, quiet windows in a row, and the path so far.

    Args:
        position: in `ProFL.order`.
        rounds: of this turn.
        quiet: windows in a row in which the block hardly moved on.
        in_window: rounds of the window so far.
        path: Σ ‖Δθ‖ over them.
    """

    position: int = 0
    rounds: int = 0
    quiet: int = 0
    in_window: int = 0
    path: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ProFL:
    """ProFL.

    Paper: section 3. Shrinking trains blocks T … 2, and so their first weights and the output modules behind them;
    growing trains blocks 1 … T. A turn ends when the block's effective movement, ‖Σ Δθ‖ / Σ ‖Δθ‖ over a window of
    rounds, stays low. Deviation: while shrinking, the blocks before the one in turn stand there frozen, at their first
    weights, where the paper trains light layers in their place; and output modules learn with their block, where the
    paper distils the later blocks into them.

    Args:
        work: what each client does.
        blocks: how many, or the module paths after which to cut.
        shrinking: whether growing is prepared by shrinking.
        threshold: of the effective movement.
        window: rounds over which it is taken.
        patience: windows in a row that end a turn.
        longest: rounds after which a turn ends anyway.
        means: what clients may do to fit their memory: a ladder, or the name of one ("none", "micro-batches", "auto").
        server: what the server does with the mean.
    """

    work: LocalWork = LocalWork()
    blocks: int | tuple[str, ...] = 4
    shrinking: bool = True
    threshold: float = 0.3
    window: int = 5
    patience: int = 1
    longest: int = 50
    means: Ladder | LadderName = "none"
    server: ServerOptimizer = Average()

    def __post_init__(self) -> None:
        check_range("threshold", self.threshold, 0.0)
        for key in ("window", "patience", "longest"):
            check_range(key, getattr(self, key), 1)

    def init(self, model: ModelSpec, problem: Problem, *, seed: int, smallest_memory_bytes: int) -> ServerState:
        """The model's weights, and an output module after each block but the last."""
        blocks, params = blocks_as_asked(model, problem, self.blocks), initial_params(model, seed)
        for block in range(len(blocks) - 1):
            params |= self._output(blocks, block).initial(seed)  # type: ignore[union-attr]
        return ServerState(model, problem, params, round=0, seed=seed, aux=Aux(values=_plain(Turn())))

    def menu(self, state: ServerState) -> list[Offer]:
        """Each block."""
        blocks = self._blocks(state)
        return [self._offer(blocks, block) for block in range(len(blocks))]

    def floor_bytes(self, state: ServerState) -> int:
        """What the block in turn takes at the least."""
        return least(self._offer_of(state), state.problem, self.objective).cost.peak_bytes

    def plan(self, state: ServerState, cohort: Sequence[ClientInfo]) -> RoundPlan:
        """The block in turn for everybody."""
        offer = self._offer_of(state)
        found = first_that_fits([offer], state, self.objective, cohort)
        chosen = {id: (choice,) for id, choice in found.items()}
        shrinks = self._turn(state).position < len(self.order(state)) - len(self._blocks(state))
        label = f"{'shrinking' if shrinks else 'growing'}: {offer.label}"
        return make_plan(state, label, cohort, chosen, self.work)

    def objective(self, step: Step) -> Objective:
        """The problem's loss."""
        return TaskLoss()

    def aggregate(self, state: ServerState, plan: RoundPlan, total: Totals) -> ServerState:
        """The weighted mean; then the next turn, if the block hardly moves on."""
        params, history = apply_mean(self.server, state, plan, total)
        names = sorted(name for name in self._offer_of(state).step.trainable if not is_attachment(name))
        turn, start = self._after_round(state, params, names)
        history = {name: t for name, t in history.items() if not name.startswith(START)} | start
        return replace(state, params=params, round=state.round + 1, aux=Aux(history, _plain(turn)))

    def deploy(self, state: ServerState) -> tuple[ModelSpec, Params]:
        """The whole model, without output modules."""
        return state.model, without_attachments(state.params)

    def order(self, state: ServerState) -> list[int]:
        """The blocks in the order of their turns."""
        last = len(self._blocks(state)) - 1
        return [*(range(last, 0, -1) if self.shrinking else ()), *range(last + 1)]

    def _after_round(self, state: ServerState, params: Params, names: Sequence[str]) -> tuple[Turn, dict[str, Tensor]]:
        """Whose turn comes, and what its window started from; nothing where that is the weights as they will be."""
        turn = self._turn(state)
        start = {n: state.aux.tensors.get(START + n, state.params[n]) for n in names}
        path = turn.path + _distance(state.params, params, names)
        turn = Turn(turn.position, turn.rounds + 1, turn.quiet, turn.in_window + 1, path)
        if turn.in_window == self.window:
            moved_on = _distance(start, params, names) / max(path, 1e-300)
            turn = Turn(turn.position, turn.rounds, turn.quiet + 1 if moved_on < self.threshold else 0)
        is_over = turn.quiet >= self.patience or turn.rounds >= self.longest
        if is_over and turn.position + 1 < len(self.order(state)):
            turn = Turn(turn.position + 1)
        return turn, {START + n: t for n, t in start.items()} if turn.in_window else {}

    def _offer_of(self, state: ServerState) -> Offer:
        return self._offer(self._blocks(state), self.order(state)[self._turn(state).position])

    def _offer(self, blocks: Blocks, block: int) -> Offer:
        span = Span(block, block)
        step = span_step(blocks, span, self._output(blocks, block), self.work.at_round(0))
        return Offer(blocks.label(span), (("", step),), ladder_of(self.means))

    def _output(self, blocks: Blocks, block: int) -> OutputSpec | None:
        return output_module(blocks, block, blocks.problem, self.work.at_round(0), "none")

    def _blocks(self, state: ServerState) -> Blocks:
        return blocks_as_asked(state.model, state.problem, self.blocks)

    def _turn(self, state: ServerState) -> Turn:
        return Turn(**state.aux.values)


def _plain(turn: Turn) -> dict[str, Any]:
    return msgspec.structs.asdict(turn)


def _distance(before: Params, after: Params, names: Sequence[str]) -> float:
    """‖after − before‖ over `names`."""
    return math.sqrt(sum(float((real(after[n]).double() - real(before[n]).double()).square().sum()) for n in names))
