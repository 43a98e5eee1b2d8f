"""FeDepth: each client cuts the model by its own memory, and trains its blocks one after another in a round.

Zhang et al., "Memory-adaptive Depth-wise Heterogenous Federated Learning", arXiv 2303.04887. A block that does not
end the model is trained through a skip head: its feature, pooled, goes straight to a classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from scalefl.blocks import Blocks, Span, blocks_as_asked
from scalefl.caches import remembered
from scalefl.methods.common import initial_params, magnitude, make_plan
from scalefl.models.output import OutputSpec
from scalefl.models.spec import ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.params import Params, without_attachments
from scalefl.planner import fit, least_of
from scalefl.problem import Problem
from scalefl.server_optimizers import Average, ServerOptimizer, apply_mean
from scalefl.steps import span_step
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


@dataclass(frozen=True, kw_only=True)
class FeDepth:
    """FeDepth.

    Paper: section 3, "depth-wise sequential learning"; a block that no means make small enough is skipped ("partial
    training"). Deviation: the skip heads are classifiers of their own, one for each cut, where the paper pads the
    pooled feature with zeros and feeds the model's own head; and clients choose among `blocks` fixed cuts.

    Args:
        work: what each client does, with each of its blocks.
        blocks: the finest blocks, of which a client trains as many at once as it can: how many, or the module paths
            after which to cut.
        means: what clients may do to fit their memory: a ladder, or the name of one ("none", "micro-batches", "auto").
        server: what the server does with the mean.
    """

    work: LocalWork = LocalWork()
    blocks: int | tuple[str, ...] = 4
    means: Ladder | LadderName = "none"
    server: ServerOptimizer = Average()

    def init(self, model: ModelSpec, problem: Problem, *, seed: int, smallest_memory_bytes: int) -> ServerState:
        """The model's weights, and a skip head after each block but the last."""
        blocks, params = blocks_as_asked(model, problem, self.blocks), initial_params(model, seed)
        for block in range(len(blocks) - 1):
            params |= _skip_head(blocks, block).initial(seed)  # type: ignore[union-attr]
        return ServerState(model, problem, params, round=0, seed=seed)

    def menu(self, state: ServerState) -> list[Offer]:
        """Every span of blocks: what a client trains at once."""
        blocks = blocks_as_asked(state.model, state.problem, self.blocks)
        return [self._offer(blocks, span) for span in blocks.spans()]

    def floor_bytes(self, state: ServerState) -> int:
        """What the cheapest block takes at the least."""
        blocks = blocks_as_asked(state.model, state.problem, self.blocks)
        single = tuple(self._offer(blocks, Span(block, block)) for block in range(len(blocks)))
        return least_of(single, state.problem, self.objective).cost.peak_bytes

    def plan(self, state: ServerState, cohort: Sequence[ClientInfo]) -> RoundPlan:
        """For each client its own blocks, front to back."""
        wanted = {c.id: (c.memory_bytes, magnitude(c.num_examples)) for c in cohort}
        found = {
            (budget, num_examples): self._own_blocks(state, num_examples, budget)
            for budget, num_examples in set(wanted.values())
        }
        chosen = {client.id: found[wanted[client.id]] for client in cohort if found[wanted[client.id]]}
        return make_plan(state, "own blocks", cohort, chosen, self.work)

    def objective(self, step: Step) -> Objective:
        """The problem's loss, of the model's own head or of the skip head."""
        return TaskLoss()

    def aggregate(self, state: ServerState, plan: RoundPlan, total: Totals) -> ServerState:
        """The weighted mean over those that trained a tensor."""
        params, history = apply_mean(self.server, state, plan, total)
        return replace(state, params=params, round=state.round + 1, aux=Aux(history))

    def deploy(self, state: ServerState) -> tuple[ModelSpec, Params]:
        """The whole model, without skip heads."""
        return state.model, without_attachments(state.params)

    def _own_blocks(self, state: ServerState, num_examples: int, budget: int) -> tuple[Choice, ...]:
        """Blocks from the first on, each as long as fits; those that fit by no means are left out."""
        blocks = blocks_as_asked(state.model, state.problem, self.blocks)
        found: list[Choice] = []
        first = 0
        while first < len(blocks):
            for last in reversed(range(first, len(blocks))):
                offer = self._offer(blocks, Span(first, last))
                choice = fit(offer, state.problem, self.objective, budget, round=state.round, num_examples=num_examples)
                if choice is not None:
                    found.append(choice)
                    break
            first = last + 1
        return tuple(found)

    def _offer(self, blocks: Blocks, span: Span) -> Offer:
        step = span_step(blocks, span, _skip_head(blocks, span.last), self.work.at_round(0))
        return Offer(blocks.label(span), (("", step),), ladder_of(self.means))


@remembered(1024)
def _skip_head(blocks: Blocks, block: int) -> OutputSpec | None:
    cut = blocks.cut(block)
    if cut is None:
        return None
    blocks.check_outputs()
    return OutputSpec(cut.module, cut.shape, (), blocks.problem.num_classes, layers="bare")
