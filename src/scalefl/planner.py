"""What steps cost and which fit a budget: the client's own loop, run once on fake tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor, nn

from scalefl.blocks import Blocks, Layer, Span, blocks_by_hand
from scalefl.client import holding, make_optimizer, train_batch
from scalefl.errors import BudgetError, UncuttableModel
from scalefl.memory import SPLIT, WHOLE, Array, Cost, Ledger, Profile, Slices, cost_of, predict, profile, slices
from scalefl.models.output import LAYERS, PROJECTIONS, OutputSpec, Projection, light_targets
from scalefl.models.spec import ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.params import Params, is_attachment
from scalefl.partition import partition
from scalefl.parts import Features, Part, Resident, Taps
from scalefl.prefix import CHUNK, Prefix, from_input
from scalefl.problem import Batch, Problem, num_rows
from scalefl.types import Choice, Ladder, LocalWork, Means, Objective, Offer, PrefixMode, Step
from scalefl.units import MIB, TERMS, Term

WITHOUT_PREFIX: tuple[PrefixMode, ...] = ("streamed", "cached")
"""Ways to run a prefix in which training does not hold its tensors."""


def step_cost(step: Step, problem: Problem, objective: Objective) -> Cost:
    """Predicted cost of one optimizer step on a full batch: peak bytes by term, and FLOPs.

    The step and its frozen prefix are traced apart, once for all batch sizes, and put together here: while the
    prefix runs, the step waits with what it holds.
    """
    rows = step.work.batch_size
    micro = step.largest_micro_batch
    found = _profile(_canonical(step), problem, objective, step.splits)
    streamed = step.means.prefix in WITHOUT_PREFIX
    prefix = None if step.part.entry is None else _prefix_profile(step.part, problem, streamed=streamed)
    if found is None or (step.part.entry is not None and prefix is None):
        return _cost_for_real(step, problem, objective, micro)
    terms, flops = found.peak(micro, rows), found.total_flops(micro, rows)
    if prefix is not None:
        before, of_prefix = _while_prefix_runs(step, found, prefix, micro)
        terms = terms + _term("weights", _prefix_bytes(step))
        terms = before if before.sum() > terms.sum() else terms
        passes = 2 if step.splits and objective.coupled else 1
        flops += round(of_prefix * rows * (1 / step.work.epochs if step.means.prefix == "cached" else passes))
    return cost_of(terms, flops, rows)


def _while_prefix_runs(step: Step, waiting: Profile, prefix: Profile, micro: int) -> tuple[Array, float]:
    """Bytes by term while the frozen prefix runs, and its FLOPs for an example."""
    mode, rows = step.means.prefix, step.work.batch_size
    chunk = micro if mode == "resident" else min(CHUNK, micro)
    flops = prefix.total_flops(chunk, chunk) / chunk
    if mode == "cached":  # before the first batch, when there is nothing but weights
        return prefix.peak(chunk, chunk) + _laid_out(step.part), flops
    terms = waiting.waiting_peak(micro, rows) + prefix.peak(chunk, chunk) + _term("weights", _prefix_bytes(step))
    if mode != "resident" and micro > CHUNK:
        terms = terms + _term("activations", micro * _feature_bytes(step.part))
    return terms, flops


def _laid_out(part: Part) -> Array:
    """Bytes of the weights that training from the prefix's features holds, by term."""
    sizes, names = _sizes_of(part), (*part.own, *(part.output.names() if part.output else ()))
    found = np.zeros(len(TERMS), dtype=np.int64)
    for name in names:
        found += _term(_term_of(name, "weights"), sizes[name])
    return found


def _canonical(step: Step) -> Step:
    """The step without what its profile does not depend on."""
    work = LocalWork(
        batch_size=1,
        lr=1,
        momentum=float(step.work.momentum > 0),
        weight_decay=float(step.work.weight_decay > 0),
        clip_norm=float(step.work.clip_norm > 0),
        prox=float(step.work.prox > 0),
    )
    means = replace(step.means, micro_batch_size=None, prefix="resident")
    return replace(step, work=work, means=means)


@lru_cache(maxsize=4096)
def _profile(step: Step, problem: Problem, objective: Objective, splits: bool) -> Profile | None:
    """What training from the prefix's features takes; None where it can't run on fake tensors."""
    symbols = SPLIT if splits else WHOLE
    work = replace(step.work, batch_size=symbols.batch)
    means = replace(step.means, micro_batch_size=symbols.first, prefix="streamed")
    run = _traced(replace(step, work=work, means=means), problem, objective)
    return profile(run, symbols)


def _cost_for_real(step: Step, problem: Problem, objective: Objective, micro: int) -> Cost:
    """The cost of a model whose control flow depends on data: its step done for real, on zeros, from its input."""
    rows = step.work.batch_size
    # Two micro-batches show every peak: the first runs without gradients, all later ones beside them.
    traced = rows if micro == rows else min(rows, 2 * micro)
    part = replace(step.part, entry=None, prefix=(), own=step.part.held)
    work, means = replace(step.work, batch_size=traced), replace(step.means, micro_batch_size=micro)
    cost = predict(_traced(replace(step, part=part, work=work, means=means), problem, objective), traced)
    waiting = (rows - traced) * sum(c.numel() * c.element_size() for c in problem.example(1).values())
    terms = np.array([size for _, size in cost.terms]) + _term("activations", waiting)
    return cost_of(terms, round(cost.flops * rows / traced), rows)


def _traced(step: Step, problem: Problem, objective: Objective) -> Callable[[Ledger], None]:
    """The client's own loop over one batch, with the ledger told what is what."""
    resident = _resident(step.part.model)
    held = {*step.part.own, *(step.part.output.names() if step.part.output else ())}
    empty = {name: t for name, t in resident.empty(step.part).items() if name in held}

    def run(ledger: Ledger) -> None:
        params = _zeros(empty, ledger)
        with holding(resident, step, params) as (runner, trained), _counting_output(runner.output, ledger):
            for name, p in trained.items():
                p.register_post_accumulate_grad_hook(_filing(ledger, name))  # type: ignore[no-untyped-call]
            optimizer = make_optimizer(trained, step)
            for name, tensor in optimizer.momentum.items():
                ledger.file([tensor], _term_of(name, "optimizer"))
            for name, tensor in optimizer.copies.items():
                ledger.file([tensor], _term_of(name, "copies"))
            with ledger.counting_as("activations"):
                batch = problem.example(step.work.batch_size)
            watched = _Watched(objective, ledger)
            train_batch(runner, optimizer, batch, problem, watched, step.means, _waiting(step.part, ledger))

    return run


def _waiting(part: Part, ledger: Ledger) -> Prefix:
    """A prefix whose run is traced elsewhere."""
    entry = part.entry
    if entry is None:
        return from_input
    source = part.source_blank if part.source is not None and entry.covers(part.source) else None

    def features(count: int) -> Features:
        ledger.wait()
        return Features(entry.blank.zeros(count), source.zeros(count) if source else None)

    return lambda batch, rows: partial(features, num_rows(batch))


@lru_cache(maxsize=1024)
def _prefix_profile(part: Part, problem: Problem, *, streamed: bool) -> Profile | None:
    """What running the frozen prefix takes beside what is held: its weights only where they are streamed."""
    resident = _resident(part.model)
    bare = replace(part, output=None)
    empty = resident.empty(bare)
    names = part.own if streamed else part.held

    def run(ledger: Ledger) -> None:
        held = _zeros({name: empty[name] for name in names}, ledger)
        with resident.holding(bare, held, without_prefix=streamed) as (runner, _):
            ledger.forget()
            with ledger.counting_as("activations"):
                batch = problem.example(WHOLE.batch)
            ledger.forget()
            if streamed:
                runner.streamed_features(batch, problem, _Coming(empty, ledger))
            else:
                runner.prefix_features(batch, problem)

    return profile(run, WHOLE)


class _Coming(dict[str, Tensor]):
    """Tensors that come into being when they are asked for, as those of a streamed prefix do."""

    def __init__(self, empty: dict[str, Tensor], ledger: Ledger) -> None:
        super().__init__(empty)
        self._ledger = ledger

    def __getitem__(self, name: str) -> Tensor:
        with self._ledger.counting_as("weights"):
            return torch.zeros(super().__getitem__(name).shape, dtype=super().__getitem__(name).dtype)


@dataclass(frozen=True)
class _Watched:
    """An objective that tells the ledger when the forward pass is over, and what the mentor's terms take."""

    objective: Objective
    ledger: Ledger

    @property
    def coupled(self) -> tuple[str, ...]:
        return self.objective.coupled

    def sample_terms(self, taps: Taps, batch: Batch, problem: Problem) -> tuple[Tensor, int]:
        found = self.objective.sample_terms(taps, batch, problem)
        if torch.is_grad_enabled():
            self.ledger.settle()
        return found

    def batch_terms(self, taps: Taps, batch: Batch, problem: Problem) -> Tensor | None:
        with self.ledger.counting_as("mentor"):
            return self.objective.batch_terms(taps, batch, problem)


def _zeros(empty: Params, ledger: Ledger) -> dict[str, Tensor]:
    found = {}
    for name, t in empty.items():
        with ledger.counting_as(_term_of(name, "weights")):
            found[name] = torch.zeros(t.shape, dtype=t.dtype)
    return found


@contextlib.contextmanager
def _counting_output(module: nn.Module | None, ledger: Ledger) -> Iterator[None]:
    """Inside the block, what the output module makes is filed as its own."""
    if module is None:
        yield
        return
    running = contextlib.ExitStack()
    before = module.register_forward_pre_hook(lambda *_: running.enter_context(ledger.counting_as("output_module")))
    after = module.register_forward_hook(lambda *_: running.close())
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _filing(ledger: Ledger, name: str) -> Callable[[Tensor], None]:
    def file(p: Tensor) -> None:
        assert p.grad is not None
        ledger.file([p.grad], _term_of(name, "gradients"))

    return file


def _term_of(name: str, term: Term) -> Term:
    return "output_module" if is_attachment(name) else term


def _term(term: Term, size: int) -> Array:
    found = np.zeros(len(TERMS), dtype=np.int64)
    found[TERMS.index(term)] = size
    return found


def _prefix_bytes(step: Step) -> int:
    """Weights of the prefix that are held while training runs."""
    if step.means.prefix in WITHOUT_PREFIX:
        return 0
    sizes = _sizes_of(step.part)
    return sum(sizes[name] for name in set(step.part.held) - set(step.part.own))


@lru_cache(maxsize=1024)
def _sizes_of(part: Part) -> dict[str, int]:
    """Bytes of each tensor that a part needs."""
    return {name: t.numel() * t.element_size() for name, t in _resident(part.model).empty(part).items()}


def _feature_bytes(part: Part) -> int:
    """Of one example."""
    assert part.entry is not None
    kept = [part.entry.blank]
    if part.source_blank is not None and part.source is not None and part.entry.covers(part.source):
        kept.append(part.source_blank)
    return sum(blank.zeros(1).nbytes for blank in kept)


def fit(
    offer: Offer,
    problem: Problem,
    objective: Callable[[Step], Objective],
    budget_bytes: int,
    *,
    round: int = 0,
    num_examples: int = 0,
) -> Choice | None:
    """The best way to do what is offered within a budget; None if there is none. See `fitting_means`."""
    for words, step in offer.ways:
        found = fitting_means(
            step, problem, objective(step), budget_bytes, offer.ladder, round=round, num_examples=num_examples
        )
        if found is not None:
            return Choice(*found, offer.label + words)
    return None


def least(offer: Offer, problem: Problem, objective: Callable[[Step], Objective]) -> Choice:
    """The way to do what is offered that needs least memory."""
    return least_of((offer,), problem, objective)


@lru_cache(maxsize=4096)
def least_of(offers: tuple[Offer, ...], problem: Problem, objective: Callable[[Step], Objective]) -> Choice:
    """The way to do any of the offers that needs least memory."""
    best: Choice | None = None
    for offer in offers:
        # Most co-adapted layers take most: the last way first, so that it rules out the others.
        for words, step in reversed(offer.ways):
            below = None if best is None else best.cost.peak_bytes
            found = _cheapest(step, problem, objective(step), offer.ladder, below)
            if found is not None:
                best = Choice(*found, offer.label + words)
    assert best is not None, "there is no offer"
    return best


@lru_cache(maxsize=4096)
def fitting_means(
    step: Step,
    problem: Problem,
    objective: Objective,
    budget_bytes: int,
    ladder: Ladder,
    *,
    round: int = 0,
    num_examples: int = 0,
) -> tuple[Step, Cost] | None:
    """The step by the means that fit the budget and lose least, and its cost; None if none fits.

    Exact means come before approximate ones, then fewer FLOPs, then less traffic with the disk.

    Args:
        step: what to do.
        problem: what is learned.
        objective: what the step minimises.
        budget_bytes: what the client may add to its worker.
        ladder: the means that it may use.
        round: rounds done, by which statistics may be frozen.
        num_examples: the client's, by which features on disk are sized; 0: unknown, then nothing is cached.
    """
    tiers: dict[tuple[int, ...], list[Step]] = {}
    for variant in _variants(step, problem, ladder, round, num_examples):
        tiers.setdefault(_tier(variant, objective), []).append(variant)
    for tier in sorted(tiers):
        fits = [
            (variant, cost)
            for variant in tiers[tier]
            if _may_fit(variant, problem, budget_bytes)
            and (cost := step_cost(variant, problem, objective)).peak_bytes <= budget_bytes
        ]
        if fits:
            return min(fits, key=lambda pair: _loss(*pair))
    return None


def _tier(step: Step, objective: Objective) -> tuple[int, ...]:
    """What a step loses by its means, as far as is known before it is traced; less is better."""
    means = step.means
    couples = step.splits and bool(step.statistics) and not means.frozen_statistics
    more_passes = means.recompute or (step.splits and bool(objective.coupled))
    return (means.bfloat16 + means.frozen_statistics, couples, more_passes, means.free_gradients)


def cheapest(step: Step, problem: Problem, objective: Objective, ladder: Ladder) -> tuple[Step, Cost]:
    """The step by those of the allowed means that need least memory, and its cost."""
    found = _cheapest(step, problem, objective, ladder, None)
    assert found is not None
    return found


@lru_cache(maxsize=4096)
def _cheapest(
    step: Step, problem: Problem, objective: Objective, ladder: Ladder, below_bytes: int | None
) -> tuple[Step, Cost] | None:
    """As `cheapest`; None where nothing needs less than `below_bytes`. What cannot is not traced."""
    # A single example: what fits on disk for no client at all is not the least.
    sizes = ladder.micro_sizes(step.work.batch_size)
    best: tuple[Step, Cost] | None = None
    # Smaller micro-batches never take more: of those that split, the smallest. It comes first, as what most need.
    for variant in sorted(
        (v for v in _variants(step, problem, ladder, 0, 1) if v.means.micro_batch_size in (sizes[0], sizes[-1])),
        key=lambda v: v.means.micro_batch_size or 0,
    ):
        limit = below_bytes if best is None else best[1].peak_bytes
        if limit is not None and not _may_fit(variant, problem, limit):
            continue
        cost = step_cost(variant, problem, objective)
        if limit is None or cost.peak_bytes < limit:
            best = (variant, cost)
    return best


def _variants(step: Step, problem: Problem, ladder: Ladder, round: int, num_examples: int) -> Iterator[Step]:
    """The step by all means that a ladder allows and that make a difference to it."""
    frozen = [False]
    if ladder.frozen_statistics is not None and round >= ladder.frozen_statistics and step.statistics:
        frozen.append(True)
    for means in (
        Means(size, recompute, prefix, free, bfloat16, frozen_statistics)
        for size in ladder.micro_sizes(step.work.batch_size)
        for recompute in (_either(ladder.recompute) if step.part.inner else [False])
        for prefix in _prefixes(step, problem, ladder, num_examples)
        for free in (_either(ladder.free_gradients) if not step.work.clip_norm else [False])
        for bfloat16 in _either(ladder.bfloat16)
        for frozen_statistics in frozen
    ):
        if means.free_gradients and (means.micro_batch_size or 0) < step.work.batch_size:
            continue  # accumulated gradients are needed together
        moving = step.moving - step.statistics if means.frozen_statistics else step.moving
        yield replace(step, means=means, moving=moving)


NEAR = 1.2
"""Means whose estimate is above so many times the budget are not traced: estimates stay within that of the truth."""


def _may_fit(step: Step, problem: Problem, budget_bytes: int) -> bool:
    """Whether a step could fit a budget: by what it must hold, and by what its units take where all train."""
    sizes = _sizes_of(step.part)
    own = sum(sizes[name] for name in (*step.part.own, *(step.part.output.names() if step.part.output else ())))
    trained = sum(sizes[name] for name in step.trainable)
    held = own + _prefix_bytes(step) + trained * (bool(step.work.momentum) + step.splits)
    if held > budget_bytes:
        return False
    units = _units_of(step, problem)
    found = _slices(step.part.model, problem) if units else None
    if units is None or found is None or step.means.bfloat16:
        return True
    passing = found.peak(*units, step.largest_micro_batch, recompute=step.means.recompute)
    return held + passing <= NEAR * budget_bytes


def _units_of(step: Step, problem: Problem) -> tuple[int, int] | None:
    """The first and last unit of what a step trains; None where it does not train all of whole units."""
    part = step.part
    try:
        found = partition(part.model, problem)
    except UncuttableModel:
        return None
    if (part.entry and part.entry.cut not in found.cuts) or (part.stop and part.stop not in found.cuts):
        return None
    first = found.cuts.index(part.entry.cut) + 1 if part.entry else 0
    last = found.cuts.index(part.stop) if part.stop else found.num_units - 1
    whole = {name for name in found.parameters if first <= found.unit_of[name] <= last}
    return (first, last) if whole <= step.trainable else None


@lru_cache(maxsize=64)
def _slices(model: ModelSpec, problem: Problem) -> Slices | None:
    """What each unit of a model takes while it trains whole."""
    cuts = partition(model, problem).cuts
    step = full_step(model, problem, LocalWork(batch_size=WHOLE.batch, momentum=0))
    step = replace(step, part=replace(step.part, inner=()))
    run = _traced(step, problem, TaskLoss())

    def marked(ledger: Ledger) -> None:
        with _resident(model).marking(cuts, ledger.mark):
            run(ledger)

    return slices(marked, WHOLE, len(cuts) + 1)


def _either(rung: bool | str) -> list[bool]:
    return [False, True] if rung == "auto" else [bool(rung)]


def _prefixes(step: Step, problem: Problem, ladder: Ladder, num_examples: int) -> list[PrefixMode]:
    if step.part.entry is None:
        return ["resident"]
    # Features are those of the examples as they are: augmentation would freeze one random draw of them.
    on_disk = num_examples * _feature_bytes(step.part)
    can_cache = not problem.augments and 0 < on_disk <= ladder.cache_bytes
    if ladder.prefix == "cached":
        return ["cached" if can_cache else "streamed"]
    if ladder.prefix != "auto":
        return [ladder.prefix]
    return ["resident", "chunked", "streamed", *(["cached"] if can_cache else [])]  # type: ignore[list-item]


DISK = {"resident": 0, "chunked": 0, "cached": 1, "streamed": 2}


def _loss(step: Step, cost: Cost) -> tuple[int, ...]:
    """What a step of a tier loses: FLOPs, then traffic with the disk, then small micro-batches."""
    return (cost.flops, DISK[step.means.prefix], -(step.means.micro_batch_size or 0))


def budget_error(what: str, cost: Cost, largest_bytes: int) -> BudgetError:
    """An error that says what a step needs, by term, and what is on offer."""
    terms = ", ".join(f"{term} {size / MIB:.1f}" for term, size in cost.terms if size)
    return BudgetError(
        f"{what} needs {cost.peak_bytes / MIB:.1f} MiB ({terms}); the largest budget on offer is "
        f'{largest_bytes / MIB:.1f} MiB. More blocks, means = "auto", a smaller batch or momentum = 0 lower it'
    )


def full_step(model: ModelSpec, problem: Problem, work: LocalWork) -> Step:
    """Training of the whole model."""
    blocks = blocks_by_hand(model, problem, ())
    return span_step(blocks, blocks.whole, None, work)


def span_step(
    blocks: Blocks,
    span: Span,
    output: OutputSpec | None,
    work: LocalWork,
    *,
    coefficients: tuple[tuple[str, float], ...] = (),
    coadapted_layers: int = 0,
    layers: tuple[Layer, ...] | None = None,
) -> Step:
    """A step that trains a span of blocks, with the output module after it unless it ends the model.

    Args:
        blocks, span: what runs.
        output: the output module; None where the span ends the model.
        work, coefficients: of the step.
        coadapted_layers: weight layers before the span that train with it.
        layers: those of the span that train; None: all.
    """
    if layers is None:
        part, trainable = blocks.part(span, output, coadapted_layers), blocks.trainable(span, coadapted_layers)
    else:
        part, trainable = blocks.part_of_layers(span, output, layers), blocks.trainable_of(layers)
    if output is not None:
        trainable |= frozenset(output.names())
    moving = trainable | blocks.statistics((*part.active, *part.straddling))
    return Step(part, trainable, moving, coefficients, work)


@lru_cache(maxsize=256)
def output_module(
    blocks: Blocks, block: int, problem: Problem, work: LocalWork, projection: Projection
) -> OutputSpec | None:
    """The output module after a block; None after the last.

    The closest stand-in whose stage costs no more, in FLOPs and in peak, than training the same block with the
    part that it stands in for: with the projection that is asked for if one can have it, else with a narrower one.
    Where nothing costs so little, the module with the lowest peak.

    Deviation: the authors hold output modules to no limit, and do not say how they predict a peak; ours is traced.
    """
    cut = blocks.cut(block)
    if cut is None:
        return None
    later = blocks.partition.shapes_after(blocks.ends[block])
    spec = OutputSpec(cut.module, cut.shape, light_targets(cut.shape, later), problem.num_classes)
    through = span_step(blocks, Span(block, len(blocks) - 1), None, work)
    limit = step_cost(through, problem, _WithProjection())
    narrower = PROJECTIONS[PROJECTIONS.index(projection) :]
    candidates = [replace(spec, layers=layers, projection=head) for head in narrower for layers in LAYERS]
    costs = {}
    for candidate in candidates:
        step = span_step(blocks, Span(block, block), candidate, work)
        cost = costs[candidate] = step_cost(step, problem, _WithProjection())
        if cost.flops <= limit.flops and cost.peak_bytes <= limit.peak_bytes:
            return candidate
    # A part may be smaller than any classifier after the block. Then the cheapest stands in for it, over the limit:
    # nothing cheaper trains the block alone, and each client's budget is held against the true cost anyway.
    return min(candidates, key=lambda candidate: (costs[candidate].peak_bytes, costs[candidate].flops))


@dataclass(frozen=True)
class _WithProjection(TaskLoss):
    """The task loss, and a gradient through the projection head, which only the mentor's label term gives it."""

    @property
    def coupled(self) -> tuple[str, ...]:
        return ("projected",)

    def batch_terms(self, taps: Taps, batch: Batch, problem: Problem) -> Tensor | None:
        return taps.projected.mean()


@lru_cache(maxsize=64)
def _resident(model: ModelSpec) -> Resident:
    return Resident(model)
