"""ScaleFL: sequential block-wise training with a Curriculum Mentor and a Training Harmonizer.

Wu, Li, Tian et al., "Bridging Memory Gaps: Scaling Federated Learning for Heterogeneous Clients",
arXiv 2408.10826 (first version: NeuLite). Plain sequential block-wise training is the preset `sbt`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any, Literal

from scalefl.blocks import Blocks, Layer, Span, blocks_as_asked, blocks_by_hand, blocks_from_ends
from scalefl.caches import remembered
from scalefl.errors import ConfigError
from scalefl.harmonizer import Growth, Progress, RoundRobin, relative_movement
from scalefl.mentor import Mentor, MentorLoss
from scalefl.methods.common import initial_params, magnitude, make_plan
from scalefl.models.output import LAYERS, Layers, OutputSpec
from scalefl.models.spec import ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.params import Params, without_attachments
from scalefl.planner import budget_error, fit, least_of, output_module
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
            trains the longest span that fits its memory, around a block that moves on with the rounds; "all": each
            client trains all blocks in each round, in as few spans as fit, one after another.
        means: what clients may do to fit their memory: a ladder, or the name of one ("none", "micro-batches", "auto").
        mentor: the Curriculum Mentor; None trains on the task loss alone.
        growth: the order in which blocks have their turn: `RoundRobin`, `Sequential`, `Converged` or your own.
        coadapted_layers: weight layers before the block that train with it; as many as fit if spans are elastic, none
            if they follow one another in each round ("all").
        tails: whether the blocks after a span run too, frozen, where a client's memory holds that, so that it learns
            by the model's own loss, and the model's head with it; else an output module stands in for them.
        outputs: output modules: "light": with light layers for the missing blocks, and a norm after each; "plain":
            without norms, as the authors'; "bare": pooling and a classifier.
        parts: whether a client whose memory does not hold a block may train its layers part by part, in one round.
        server: what the server does with the mean.
    """

    work: LocalWork = LocalWork()
    blocks: int | tuple[str, ...] | Literal["memory"] = 4
    spans: Literal["single", "elastic", "all"] = "all"
    means: Ladder | LadderName = "auto"
    mentor: Mentor | None = Mentor()
    growth: Growth = RoundRobin()
    # Deviation: the authors co-adapt one convolution and its norm; 2 was better on validation data (docs/fidelity.md).
    coadapted_layers: int = 2
    # Deviation: the paper has output modules alone (docs/fidelity.md).
    tails: bool = True
    # Deviation: the authors' light layers have nothing between them; ours diverge so at usual rates.
    outputs: Literal["light", "plain", "bare"] = "light"
    parts: bool = True
    server: ServerOptimizer = Average()

    def __post_init__(self) -> None:
        if self.coadapted_layers < 0:
            raise ConfigError(f"coadapted_layers must be at least 0, not {self.coadapted_layers}")
        if isinstance(self.blocks, int) and self.blocks < 1:
            raise ConfigError(f"blocks = {self.blocks}: expected at least 1")
        if self.spans != "single" and not isinstance(self.growth, RoundRobin):
            raise ConfigError("growth other than round_robin needs spans = 'single': other clients are out of step")

    def init(self, model: ModelSpec, problem: Problem, *, seed: int, smallest_memory_bytes: int) -> ServerState:
        """The model's weights, and an output module after each block but the last."""
        blocks = self._first_blocks(model, problem, smallest_memory_bytes)
        params: dict[str, Any] = dict(initial_params(model, seed))
        if not self.tails:
            blocks.check_outputs()
        for block in range(len(blocks) - 1) if blocks.gives_labels else ():
            params |= self._output(blocks, block).initial(seed)  # type: ignore[union-attr]
        values = {"growth": Progress().to_json(), "ends": list(blocks.ends)}
        return ServerState(model, problem, params, round=0, seed=seed, aux=Aux(values=values))

    def menu(self, state: ServerState) -> list[Offer]:
        """Each block, and parts of it; each longer span too, unless spans are single."""
        blocks = self.blocks_of(state)
        longest = 1 if self.spans == "single" else len(blocks)
        spans = [s for s in blocks.spans() if len(s) <= longest]
        offers = [self._offer(blocks, span, tail) for span in spans for tail in self._ways(blocks, span.last)]
        return offers + [o for b in range(len(blocks)) for tiles in self.tilings(state, b) for o in tiles]

    def floor_bytes(self, state: ServerState) -> int:
        """What the block in turn takes at the least; unless spans are single, what the cheapest block takes."""
        return self.floor_within(state, 0)

    def floor_within(self, state: ServerState, enough_bytes: int) -> int:
        """See `Gates`: whole blocks come first, so that their parts are looked at only where those are too much."""
        blocks = self.blocks_of(state)
        stages = [self._progress(state).stage] if self.spans == "single" else range(len(blocks))
        ways = [(block, self._ways(blocks, block)) for block in stages]
        offers = [self._offer(blocks, _single(block), tail) for block, tails in ways for tail in tails]
        offers += [o for block, tails in ways for tiles in self.tilings(state, block)[-len(tails) :] for o in tiles]
        return least_of(tuple(offers), state.problem, self.objective, enough_bytes).cost.peak_bytes

    def plan(self, state: ServerState, cohort: Sequence[ClientInfo]) -> RoundPlan:
        """The block in turn for everybody; for each client the longest span around a block of its own; or all spans."""
        stage, num_blocks = self._progress(state).stage, len(self.blocks_of(state))
        # Elastic clients are out of step: so every block has its share of each round's clients, and the head in
        # particular does not spend whole rounds with the strongest clients alone.
        step = 1 if self.spans == "elastic" else 0
        wanted = {c.id: ((stage + step * c.id) % num_blocks, c.memory_bytes, magnitude(c.num_examples)) for c in cohort}
        fits = {want: self._choice(state, *want) for want in sorted(set(wanted.values()))}
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
        if isinstance(self.blocks, int):
            return blocks_as_asked(state.model, state.problem, self.blocks)
        if isinstance(self.blocks, tuple):
            return blocks_by_hand(state.model, state.problem, self.blocks)
        return blocks_from_ends(state.model, state.problem, tuple(state.aux.values["ends"]))

    def tilings(self, state: ServerState, block: int) -> list[list[Offer]]:
        """With `parts`: a block in halves of its layers, in quarters, …: largest parts first, with tails first."""
        blocks = self.blocks_of(state)
        groups = blocks.layer_groups(_single(block)) if self.parts else []
        found = []
        length = len(groups)
        while length > 1:
            length = -(-length // 2)
            parts = [_flat(groups[start : start + length]) for start in range(0, len(groups), length)]
            labels = [f"part {n + 1}/{len(parts)} of block {block + 1}" for n in range(len(parts))]
            for tail in self._ways(blocks, block):
                steps = [_span_step(self, blocks, _single(block), 0, tail=tail, layers=layers) for layers in parts]
                words, ladder = _words(blocks, block, tail), ladder_of(self.means)
                found.append(
                    [Offer(n + words, (("", s),), ladder, fallback=True) for n, s in zip(labels, steps, strict=True)]
                )
        return found

    def _choice(self, state: ServerState, stage: int, budget: int, num_examples: int) -> tuple[Choice, ...]:
        """The longest span that fits around the block in turn, or that block part by part; else of its neighbours.

        Deviation: the paper gives everybody the same block, and does not split blocks. With "all" spans a client has
        its say on every block in every round, as in FeDepth: a block that some clients train seldom hardly learns
        their labels.
        """
        if self.spans == "all":
            return self._all_blocks(state, budget, num_examples)
        blocks = self.blocks_of(state)
        spans = [_single(stage)] if self.spans == "single" else blocks.spans()
        turn = state.round // len(blocks)
        for distance in sorted({_distance(span, stage) for span in spans}):
            near = [span for span in spans if _distance(span, stage) == distance]
            if found := self._longest(state, near, budget, num_examples):
                return (found[turn % len(found)][1],)  # equals take turns
            for block in sorted({min(max(stage, span.first), span.last) for span in near}):
                if fits := self._part_by_part(state, block, budget, num_examples):
                    return fits
        return ()

    def _all_blocks(self, state: ServerState, budget: int, num_examples: int) -> tuple[Choice, ...]:
        """Front to back the longest span that fits, or a block part by part; what fits by no means is left out."""
        blocks = self.blocks_of(state)
        found: list[Choice] = []
        first = 0
        while first < len(blocks):
            from_here = [span for span in blocks.spans() if span.first == first]
            if fits := self._longest(state, from_here, budget, num_examples):
                ((span, choice),) = fits
                found.append(choice)
                first = span.last + 1
            else:
                found += self._part_by_part(state, first, budget, num_examples)
                first += 1
        return tuple(found)

    def _longest(
        self, state: ServerState, spans: Sequence[Span], budget: int, num_examples: int
    ) -> list[tuple[Span, Choice]]:
        """The longest of some spans that fit, all of one length: with their tails if any fits so."""
        blocks = self.blocks_of(state)
        for tail in self._ways(blocks):
            for length in sorted({len(span) for span in spans}, reverse=True):
                tried = [
                    (s, self._fits(state, self._offer(blocks, s, tail), budget, num_examples))
                    for s in spans
                    if len(s) == length
                ]
                if fits := [(span, choice) for span, choice in tried if choice]:
                    return fits
        return []

    def _part_by_part(self, state: ServerState, block: int, budget: int, num_examples: int) -> tuple[Choice, ...]:
        """The parts of a block, one after another in one round: the largest that all fit, else what trains most."""
        most: tuple[Choice, ...] = ()
        for tiles in self.tilings(state, block):
            found = (self._fits(state, tile, budget, num_examples) for tile in tiles)
            fits = tuple(choice for choice in found if choice)
            if len(fits) == len(tiles):
                return fits
            most = max(most, fits, key=lambda choices: _num_trained(state.params, choices))
        return most

    def _fits(self, state: ServerState, offer: Offer, budget: int, num_examples: int) -> Choice | None:
        """What is offered, if it fits, with the round's coefficients."""
        found = fit(offer, state.problem, self.objective, budget, round=state.round, num_examples=num_examples)
        return self._now(state, found) if found else None

    def _now(self, state: ServerState, choice: Choice) -> Choice:
        """The choice with the coefficients of the round."""
        if self.mentor is None:
            return choice
        blocks = self.blocks_of(state)
        end = next(b for b in range(len(blocks)) if blocks.cut(b) == choice.step.part.stop)
        coefficients = self.mentor.coefficients(end, len(blocks), state.round)
        return choice._replace(step=replace(choice.step, coefficients=coefficients))

    def _ways(self, blocks: Blocks, last: int = 0) -> tuple[bool, ...]:
        """Whether spans that end with a block are trained with their tails, best first; that of the model is empty."""
        ways = (True, False)[0 if self.tails else 1 : None if blocks.gives_labels else 1]
        return ways[:1] if blocks.cut(last) is None else ways

    def _offer(self, blocks: Blocks, span: Span, tail: bool) -> Offer:
        most = self.coadapted_layers if span.first and self.spans != "all" else 0
        # Elastic clients give co-adapted layers up before they give up a block.
        counts = [most] if self.spans == "single" else range(most, -1, -1)
        ways = tuple(
            ("" if n == most else f", {n} co-adapted", _span_step(self, blocks, span, n, tail=tail)) for n in counts
        )
        label = blocks.label(span) + _words(blocks, span.last, tail)
        return Offer(label, ways, ladder_of(self.means), fallback=self.tails and not tail)

    def _output(self, blocks: Blocks, block: int) -> OutputSpec | None:
        projection = self.mentor.projection if self.mentor else "none"
        layers: tuple[Layers, ...] = ("bare",) if self.outputs == "bare" else LAYERS
        work, normed = self.work.at_round(0), self.outputs == "light"
        return output_module(blocks, block, blocks.problem, work, projection, layers, normed=normed)

    def _progress(self, state: ServerState) -> Progress:
        return Progress(**state.aux.values["growth"])

    def _first_blocks(self, model: ModelSpec, problem: Problem, smallest_memory_bytes: int) -> Blocks:
        if self.blocks == "memory":
            return self._blocks_by_memory(model, problem, smallest_memory_bytes)
        return blocks_as_asked(model, problem, self.blocks)

    def _blocks_by_memory(self, model: ModelSpec, problem: Problem, budget: int) -> Blocks:
        """Each block in turn as long as its stage fits the budget: greedy, and so the fewest that can be."""
        possible = blocks_as_asked(model, problem, 1).partition.block_ends
        last = possible[-1]

        def fits(start: int, end: int) -> bool:
            return self._units(model, problem, start, end, last).cost.peak_bytes <= budget

        ends: list[int] = []
        while not ends or ends[-1] < last:
            start = ends[-1] + 1 if ends else 0
            left = [end for end in possible if end >= start]
            # The rest of the model first: it alone has no output module, and may fit where a shorter block does not.
            fitting = [last] if fits(start, last) else list(takewhile(partial(fits, start), left))
            if not fitting:
                floor = self._units(model, problem, start, left[0], last)
                what = f"unit {left[0] + 1} of {last + 1} of {model.name}"
                raise budget_error(what, floor, problem, self.objective(floor.step), budget)
            ends.append(fitting[-1])
        return blocks_from_ends(model, problem, tuple(ends))

    def _units(self, model: ModelSpec, problem: Problem, start: int, end: int, last: int) -> Choice:
        """Units `start` to `end` as a block, with least memory."""
        ends = sorted({*([start - 1] if start else []), end, last})
        blocks = blocks_from_ends(model, problem, tuple(ends))
        block = ends.index(end)
        offers = tuple(self._offer(blocks, _single(block), tail) for tail in self._ways(blocks, block))
        return least_of(offers, problem, self.objective)


def _single(block: int) -> Span:
    return Span(block, block)


def _distance(span: Span, block: int) -> int:
    return max(span.first - block, block - span.last, 0)


def _num_trained(params: Params, choices: Sequence[Choice]) -> int:
    return sum(params[name].numel() for name in frozenset().union(*(choice.step.trained for choice in choices)))


def _words(blocks: Blocks, last: int, tail: bool) -> str:
    """What tells offers with their tail from those without."""
    return " with tail" if tail and blocks.cut(last) is not None else ""


def _flat(groups: Sequence[tuple[Layer, ...]]) -> tuple[Layer, ...]:
    return tuple(layer for group in groups for layer in group)


@remembered(1024)
def _span_step(
    method: ScaleFL,
    blocks: Blocks,
    span: Span,
    coadapted_layers: int,
    *,
    tail: bool,
    layers: tuple[Layer, ...] | None = None,
) -> Step:
    """The step that trains a span, or some of its layers, before means are chosen for it.

    Its coefficients are the largest of the run, so that its cost holds for every round and is predicted once.
    """
    mentor, end = method.mentor, len(blocks) - 1 if tail else span.last
    return span_step(
        blocks,
        span,
        method._output(blocks, end),
        method.work.at_round(0),
        coefficients=mentor.largest_coefficients(end, len(blocks)) if mentor else (),
        coadapted_layers=coadapted_layers,
        layers=layers,
        tail=end > span.last,
        along=blocks.head if end > span.last and method.spans != "all" else (),
    )
