"""ScaleFL: sequential block-wise training with a Curriculum Mentor and a Training Harmonizer.

Wu, Li, Tian et al., "Bridging Memory Gaps: Scaling Federated Learning for Heterogeneous Clients",
arXiv 2408.10826 (first version: NeuLite). Plain sequential block-wise training is the preset `sbt`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal

from scalefl.blocks import Blocks, Layer, Span, blocks_as_asked, blocks_by_count, blocks_by_hand, blocks_from_ends
from scalefl.errors import ConfigError
from scalefl.harmonizer import Growth, Progress, RoundRobin, relative_movement
from scalefl.mentor import Mentor, MentorLoss
from scalefl.methods.common import initial_params, magnitude, make_plan
from scalefl.models.output import LAYERS, Layers, OutputSpec
from scalefl.models.spec import ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.params import Params, without_attachments
from scalefl.planner import budget_error, cheapest, fit, fitting_together, least_of, output_module
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
class ScaleFL:
    """ScaleFL.

    Args:
        work: what each client does.
        blocks: how many blocks; or the module paths after which to cut; or "memory": as few as let the weakest
            client train each.
        spans: "single": all clients of a round train the block in turn (the paper); "elastic": each client
            trains the longest span that fits its memory, around a block that moves on with the rounds.
        means: what clients may do to fit their memory: a ladder, or the name of one ("none", "micro-batches", "auto").
        mentor: the Curriculum Mentor; None trains on the task loss alone.
        growth: the order in which blocks have their turn: `RoundRobin`, `Sequential`, `Converged` or your own.
        coadapted_layers: weight layers before the block that train with it; with elastic spans, as many as fit.
        outputs: output modules: "light": with light layers for the missing blocks; "bare": pooling and a classifier.
        parts: whether a client whose memory does not hold a block may train its layers part by part, in one round.
        server: what the server does with the mean.
    """

    work: LocalWork = LocalWork()
    blocks: int | tuple[str, ...] | Literal["memory"] = 4
    spans: Literal["single", "elastic"] = "elastic"
    means: Ladder | LadderName = "auto"
    mentor: Mentor | None = Mentor()
    growth: Growth = RoundRobin()
    # Deviation: the authors co-adapt one convolution and its norm; 2 was better on validation data (docs/fidelity.md).
    coadapted_layers: int = 2
    outputs: Literal["light", "bare"] = "light"
    parts: bool = True
    server: ServerOptimizer = Average()

    def __post_init__(self) -> None:
        if self.coadapted_layers < 0:
            raise ConfigError(f"coadapted_layers must be at least 0, not {self.coadapted_layers}")
        if isinstance(self.blocks, int) and self.blocks < 1:
            raise ConfigError(f"blocks = {self.blocks}: expected at least 1")
        if self.spans == "elastic" and not isinstance(self.growth, RoundRobin):
            raise ConfigError("growth other than round_robin needs spans = 'single': elastic clients are out of step")

    def init(self, model: ModelSpec, problem: Problem, *, seed: int, smallest_memory_bytes: int) -> ServerState:
        """The model's weights, and an output module after each block but the last."""
        blocks = self._first_blocks(model, problem, smallest_memory_bytes)
        params: dict[str, Any] = dict(initial_params(model, seed))
        for block in range(len(blocks) - 1):
            params |= self._output(blocks, block, problem).initial(seed)  # type: ignore[union-attr]
        values = {"growth": Progress().to_json(), "ends": list(blocks.ends)}
        return ServerState(model, problem, params, round=0, seed=seed, aux=Aux(values=values))

    def menu(self, state: ServerState) -> list[Offer]:
        """Each block, and parts of it; with elastic spans each longer span too."""
        blocks = self.blocks_of(state)
        longest = 1 if self.spans == "single" else len(blocks)
        spans = [s for s in blocks.spans() if len(s) <= longest]
        offers = [self._offer(state, span) for span in spans]
        return offers + [o for b in range(len(blocks)) for tiles in self.tilings(state, b)[1:] for o in tiles]

    def floor_bytes(self, state: ServerState) -> int:
        """What the block in turn takes at the least; with elastic spans, what the cheapest block takes."""
        blocks = self.blocks_of(state)
        stages = [self._progress(state).stage] if self.spans == "single" else range(len(blocks))
        tilings = [self.tilings(state, block) for block in stages]
        offers = [offer for found in tilings for tiles in (found[0], found[-1]) for offer in tiles]
        return least_of(tuple(offers), state.problem, self.objective).cost.peak_bytes

    def plan(self, state: ServerState, cohort: Sequence[ClientInfo]) -> RoundPlan:
        """The block in turn for everybody; or for each client the longest span that fits around a block of its own."""
        stage, num_blocks = self._progress(state).stage, len(self.blocks_of(state))
        # With elastic spans clients are out of step: so every block has its share of each round's clients, and the
        # head in particular does not spend whole rounds with the strongest clients alone.
        step = 0 if self.spans == "single" else 1
        wanted = {c.id: ((stage + step * c.id) % num_blocks, c.memory_bytes, magnitude(c.num_examples)) for c in cohort}
        turn = state.round // num_blocks
        fits = {want: self._choice(state, turn, *want) for want in sorted(set(wanted.values()))}
        chosen = {c.id: found for c in cohort if (found := fits[wanted[c.id]])}
        label = f"block {stage + 1}" if self.spans == "single" else "spans"
        return make_plan(state, label, cohort, chosen, self.work)

    def objective(self, step: Step) -> Objective:
        """The mentor's objective for the span's end; the task loss without a mentor."""
        if self.mentor is None:
            return TaskLoss()
        weights = dict(step.coefficients)
        return MentorLoss(self.mentor, weights["lambda"], weights["gamma"])

    def aggregate(self, state: ServerState, plan: RoundPlan, total: Totals) -> ServerState:
        """The weighted mean of what moved; then the next block's turn."""
        params, history = apply_mean(self.server, state, plan, total)
        blocks, progress = self.blocks_of(state), self._progress(state)
        movement = relative_movement(state.params, params, blocks.trainable(_single(progress.stage)))
        progress = self.growth.advance(progress, len(blocks), movement)
        values = {**state.aux.values, "growth": progress.to_json()}
        return replace(state, params=params, round=state.round + 1, aux=Aux(history, values))

    def deploy(self, state: ServerState) -> tuple[ModelSpec, Params]:
        """The whole model, without output modules."""
        return state.model, without_attachments(state.params)

    def blocks_of(self, state: ServerState) -> Blocks:
        """The blocks of a run."""
        if isinstance(self.blocks, tuple):
            return blocks_by_hand(state.model, state.problem, self.blocks)
        return blocks_from_ends(state.model, state.problem, tuple(state.aux.values["ends"]))

    def tilings(self, state: ServerState, block: int) -> list[list[Offer]]:
        """A block whole; then, with `parts`, in halves of its layers, in quarters, …: the largest parts first."""
        blocks = self.blocks_of(state)
        groups = blocks.layer_groups(_single(block)) if self.parts else []
        found = [[self._offer(state, _single(block))]]
        length = len(groups)
        while length > 1:
            length = -(-length // 2)
            parts = [_flat(groups[start : start + length]) for start in range(0, len(groups), length)]
            labels = [f"part {n + 1}/{len(parts)} of block {block + 1}" for n in range(len(parts))]
            steps = [_span_step(self, blocks, _single(block), state.problem, 0, layers) for layers in parts]
            ladder = ladder_of(self.means)
            found.append([Offer(n, (("", s),), ladder, fallback=True) for n, s in zip(labels, steps, strict=True)])
        return found

    def stage_step(self, blocks: Blocks, span: Span, problem: Problem, coadapted_layers: int | None = None) -> Step:
        """The step that trains a span, before means are chosen for it; by default with all co-adapted layers.

        Its coefficients are the largest of the run, so that its cost holds for every round and is predicted once.
        """
        layers = self.coadapted_layers if coadapted_layers is None else coadapted_layers
        return _span_step(self, blocks, span, problem, layers)

    def _choice(self, state: ServerState, turn: int, stage: int, budget: int, num_examples: int) -> tuple[Choice, ...]:
        """The longest span that fits around the block in turn, or that block part by part; else of its neighbours.

        Deviation: the paper gives everybody the same block, and does not split blocks.
        """
        blocks = self.blocks_of(state)
        spans = [_single(stage)] if self.spans == "single" else blocks.spans()
        for distance in sorted({_distance(span, stage) for span in spans}):
            near = [span for span in spans if _distance(span, stage) == distance]
            for length in sorted({len(span) for span in near}, reverse=True):
                offers = [self._offer(state, span) for span in near if len(span) == length]
                if fits := self._fits(state, offers, num_examples, budget):
                    return (fits[turn % len(fits)],)  # equals take turns
            for block in sorted({min(max(stage, span.first), span.last) for span in near}):
                if fits := self._part_by_part(state, block, budget, num_examples):
                    return fits
        return ()

    def _part_by_part(self, state: ServerState, block: int, budget: int, num_examples: int) -> tuple[Choice, ...]:
        """The parts of a block, one after another in one round: the largest that all fit, else what fits of any."""
        most: tuple[Choice, ...] = ()
        for tiles in self.tilings(state, block)[1:]:
            fits = fitting_together(partial(self._fits, state, tiles, num_examples), budget)
            if len(fits) == len(tiles):
                return fits
            most = fits or most
        return most

    def _fits(self, state: ServerState, offers: Sequence[Offer], num_examples: int, budget: int) -> tuple[Choice, ...]:
        """Those of some offers that fit, with the round's coefficients."""
        found = (
            fit(offer, state.problem, self.objective, budget, round=state.round, num_examples=num_examples)
            for offer in offers
        )
        return tuple(self._now(state, choice) for choice in found if choice)

    def _now(self, state: ServerState, choice: Choice) -> Choice:
        """The choice with the coefficients of the round."""
        if self.mentor is None:
            return choice
        blocks = self.blocks_of(state)
        end = next(b for b in range(len(blocks)) if blocks.cut(b) == choice.step.part.stop)
        coefficients = self.mentor.coefficients(end, len(blocks), state.round)
        return choice._replace(step=replace(choice.step, coefficients=coefficients))

    def _offer(self, state: ServerState, span: Span) -> Offer:
        blocks, most = self.blocks_of(state), self.coadapted_layers if span.first else 0
        # Elastic clients give co-adapted layers up before they give up a block.
        counts = [most] if self.spans == "single" else range(most, -1, -1)
        ways = [
            ("" if n == most else f", {n} co-adapted", self.stage_step(blocks, span, state.problem, n)) for n in counts
        ]
        return Offer(blocks.label(span), tuple(ways), ladder_of(self.means))

    def _output(self, blocks: Blocks, block: int, problem: Problem) -> OutputSpec | None:
        projection = self.mentor.projection if self.mentor else "none"
        layers: tuple[Layers, ...] = LAYERS if self.outputs == "light" else ("bare",)
        return output_module(blocks, block, problem, self.work.at_round(0), projection, layers)

    def _progress(self, state: ServerState) -> Progress:
        return Progress(**state.aux.values["growth"])

    def _first_blocks(self, model: ModelSpec, problem: Problem, smallest_memory_bytes: int) -> Blocks:
        if self.blocks == "memory":
            return self._blocks_by_memory(model, problem, smallest_memory_bytes)
        return blocks_as_asked(model, problem, self.blocks)

    def _blocks_by_memory(self, model: ModelSpec, problem: Problem, budget: int) -> Blocks:
        """Each block in turn as long as its stage fits the budget: greedy, and so the fewest that can be."""
        last = blocks_by_count(model, problem, 1).ends[0]

        def fits(start: int, end: int) -> bool:
            return self._units(model, problem, start, end, last).cost.peak_bytes <= budget

        ends: list[int] = []
        while not ends or ends[-1] < last:
            start = ends[-1] + 1 if ends else 0
            # The rest of the model first: it alone has no output module, and may fit where a shorter block does not.
            end = last if fits(start, last) else start - 1
            while end < last and fits(start, end + 1):
                end += 1
            if end < start:
                floor = self._units(model, problem, start, start, last)
                what = f"unit {start + 1} of {last + 1} of {model.name}"
                raise budget_error(what, floor, problem, self.objective(floor.step), budget)
            ends.append(end)
        return blocks_from_ends(model, problem, tuple(ends))

    def _cheapest(self, blocks: Blocks, span: Span, problem: Problem) -> Choice:
        layers = 0 if self.spans == "elastic" or not span.first else self.coadapted_layers
        step = self.stage_step(blocks, span, problem, layers)
        return Choice(*cheapest(step, problem, self.objective(step), ladder_of(self.means)), blocks.label(span))

    def _units(self, model: ModelSpec, problem: Problem, start: int, end: int, last: int) -> Choice:
        """Units `start` to `end` as a block, with least memory."""
        ends = sorted({*([start - 1] if start else []), end, last})
        blocks = blocks_from_ends(model, problem, tuple(ends))
        return self._cheapest(blocks, _single(ends.index(end)), problem)


def _single(block: int) -> Span:
    return Span(block, block)


def _distance(span: Span, block: int) -> int:
    return max(span.first - block, block - span.last, 0)


def _flat(groups: Sequence[tuple[Layer, ...]]) -> tuple[Layer, ...]:
    return tuple(layer for group in groups for layer in group)


@lru_cache(maxsize=1024)
def _span_step(
    method: ScaleFL,
    blocks: Blocks,
    span: Span,
    problem: Problem,
    coadapted_layers: int,
    layers: tuple[Layer, ...] | None = None,
) -> Step:
    mentor = method.mentor
    return span_step(
        blocks,
        span,
        method._output(blocks, span.last, problem),
        method.work.at_round(0),
        coefficients=mentor.largest_coefficients(span.last, len(blocks)) if mentor else (),
        coadapted_layers=coadapted_layers,
        layers=layers,
    )
