"""Which steps fit a budget, and by which means."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from scalefl.blocks import Blocks, Span
from scalefl.caches import remembered
from scalefl.costs import estimate, feature_bytes, may_fit, step_cost
from scalefl.errors import BudgetError
from scalefl.memory import Cost
from scalefl.models.output import LAYERS, PROJECTIONS, Layers, OutputSpec, Projection, light_targets
from scalefl.objectives import TaskLoss
from scalefl.parts import Taps
from scalefl.problem import Batch, Problem
from scalefl.steps import span_step
from scalefl.types import AUTO, Choice, Ladder, LocalWork, Means, Objective, Offer, PrefixMode, Step
from scalefl.units import mib


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


def fitting_collection(step: Step, problem: Problem, budget_bytes: int) -> Choice | None:
    """The largest batches in which a client's norms can collect statistics within a budget; None if none fits."""
    sizes = AUTO.micro_sizes(step.work.batch_size)
    found = (_collection(step, problem, size) for size in sizes)
    return next((choice for choice in found if choice.cost.peak_bytes <= budget_bytes), None)


def least_collection(step: Step, problem: Problem) -> Choice:
    """The batches in which collecting needs least memory."""
    return _collection(step, problem, AUTO.micro_sizes(step.work.batch_size)[-1])


def _collection(step: Step, problem: Problem, size: int) -> Choice:
    variant = replace(step, means=Means(micro_batch_size=size))
    return Choice(variant, step_cost(variant, problem, TaskLoss()), "statistics")


def least(offer: Offer, problem: Problem, objective: Callable[[Step], Objective]) -> Choice:
    """The way to do what is offered that needs least memory."""
    return least_of((offer,), problem, objective)


@remembered(4096)
def least_of(
    offers: tuple[Offer, ...], problem: Problem, objective: Callable[[Step], Objective], enough_bytes: int = 0
) -> Choice:
    """The way to do any of the offers that needs least memory; or the first that needs no more than is enough."""
    best: Choice | None = None
    for offer in offers:
        if best is not None and best.cost.peak_bytes <= enough_bytes:
            break
        words, step = offer.ways[-1]
        below = None if best is None else best.cost.peak_bytes
        found = _cheapest(step, problem, objective(step), offer.ladder, below, enough_bytes)
        if found is not None:
            best = Choice(*found, offer.label + words)
    assert best is not None, "there is no offer"
    return best


@remembered(4096)
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
        num_examples: the client's, by which features on disk are sized; 0: of no client yet, then they fit.
    """
    tiers: dict[tuple[int, ...], list[Step]] = {}
    for variant in _variants(step, problem, ladder, round, num_examples):
        tiers.setdefault(_tier(variant, objective), []).append(variant)
    for tier in sorted(tiers):
        fits = [
            (variant, cost)
            for variant in tiers[tier]
            if may_fit(variant, problem, budget_bytes)
            and (cost := step_cost(variant, problem, objective)).peak_bytes <= budget_bytes
        ]
        if fits:
            return min(fits, key=lambda pair: _loss(*pair))
    return None


def _tier(step: Step, objective: Objective) -> tuple[int, ...]:
    """What a step loses by its means, as far as is known before it is traced; less is better."""
    means = step.means
    more_passes = means.recompute or (step.splits and bool(objective.coupled))
    return (means.bfloat16 + means.frozen_statistics, step.couples, more_passes, means.free_gradients)


def cheapest(step: Step, problem: Problem, objective: Objective, ladder: Ladder) -> tuple[Step, Cost]:
    """The step by those of the allowed means that need least memory, and its cost."""
    found = _cheapest(step, problem, objective, ladder, None)
    assert found is not None
    return found


@remembered(4096)
def _cheapest(
    step: Step,
    problem: Problem,
    objective: Objective,
    ladder: Ladder,
    below_bytes: int | None,
    enough_bytes: int = 0,
) -> tuple[Step, Cost] | None:
    """As `cheapest`, or what needs no more than is enough; None where nothing needs less than `below_bytes`.

    What cannot is not traced.
    """
    best: tuple[Step, Cost] | None = None
    for variant in _least_variants(step, problem, ladder):
        if best is not None and best[1].peak_bytes <= enough_bytes:
            break
        limit = below_bytes if best is None else best[1].peak_bytes
        if limit is not None and not may_fit(variant, problem, limit):
            continue
        cost = step_cost(variant, problem, objective)
        if limit is None or cost.peak_bytes < limit:
            best = (variant, cost)
    return best


def _least_variants(step: Step, problem: Problem, ladder: Ladder) -> list[Step]:
    """Those of a step's variants that may need least memory, the likeliest first."""
    variants = list(_variants(step, problem, ladder, 0, 0))
    sizes = _micro_sizes(step, problem, ladder)
    allowed = {variant.means for variant in variants}

    def thriftier(means: Means) -> bool:
        more = {replace(means, free_gradients=True), replace(means, stream_frozen=True)}
        return not allowed.isdisjoint(more - {means})

    found = [
        variant
        for variant in variants
        # Smaller micro-batches never take more: of those that split, the smallest. Nor does it to free or to stream.
        if variant.means.micro_batch_size in (sizes[0], sizes[-1]) and not thriftier(variant.means)
    ]
    return sorted(found, key=lambda variant: estimate(variant, problem))


def _variants(step: Step, problem: Problem, ladder: Ladder, round: int, num_examples: int) -> Iterator[Step]:
    """The step by all means that a ladder allows and that make a difference to it."""
    frozen = [False]
    if ladder.frozen_statistics is not None and round >= ladder.frozen_statistics and step.statistics:
        frozen.append(True)
    for means in (
        Means(size, recompute, prefix, free, bfloat16, frozen_statistics, stream)
        for size in _micro_sizes(step, problem, ladder)
        for recompute in (_either(ladder.recompute) if step.part.inner else [False])
        for stream in (_either(ladder.stream_frozen) if recompute and any(step.frozen) else [False])
        for prefix in _prefixes(step, problem, ladder, num_examples)
        for free in (_either(ladder.free_gradients) if not step.work.clip_norm else [False])
        for bfloat16 in _either(ladder.bfloat16)
        for frozen_statistics in frozen
    ):
        if means.free_gradients and (means.micro_batch_size or 0) < step.work.batch_size:
            continue  # accumulated gradients are needed together
        moving = step.moving - step.statistics if means.frozen_statistics else step.moving
        yield replace(step, means=means, moving=moving)


def _micro_sizes(step: Step, problem: Problem, ladder: Ladder) -> list[int]:
    """Micro-batches that may be tried, largest first: none but the batch where the loss compares its examples."""
    coupled = getattr(problem, "couples_examples", False)
    return [step.work.batch_size] if coupled else ladder.micro_sizes(step.work.batch_size)


def _either(rung: bool | str) -> list[bool]:
    return [False, True] if rung == "auto" else [bool(rung)]


def _prefixes(step: Step, problem: Problem, ladder: Ladder, num_examples: int) -> list[PrefixMode]:
    if step.part.entry is None:
        return ["resident"]
    # Features are those of the examples as they are: augmentation would freeze one random draw of them.
    on_disk = num_examples * feature_bytes(step.part)
    can_cache = not problem.augments and on_disk <= ladder.cache_bytes
    if ladder.prefix == "cached":
        return ["cached" if can_cache else "streamed"]
    if ladder.prefix != "auto":
        return [ladder.prefix]
    return ["resident", "chunked", "streamed", *(["cached"] if can_cache else [])]  # type: ignore[list-item]


DISK = {"resident": 0, "chunked": 0, "cached": 1, "streamed": 2}


def _loss(step: Step, cost: Cost) -> tuple[int, ...]:
    """What a step of a tier loses: FLOPs, then traffic with the disk, then small micro-batches."""
    traffic = DISK[step.means.prefix] + DISK["streamed"] * step.means.stream_frozen
    return (cost.flops, traffic, -(step.means.micro_batch_size or 0))


def budget_error(
    what: str, floor: Choice, problem: Problem, objective: Objective, largest_bytes: int, margin_bytes: int = 0
) -> BudgetError:
    """An error that says what the least on offer needs, by term, and what would lower it.

    Args:
        what: it is, for people.
        floor: how it is done with least memory.
        problem, objective: of its step.
        largest_bytes: the largest budget.
        margin_bytes: what of it may not be planned with.
    """
    margin = f", of which a hard cap keeps {mib(margin_bytes)} MiB as a margin" if margin_bytes else ""
    terms = ", ".join(f"{term} {mib(size)}" for term, size in floor.cost.terms if size)
    lower = [f"{words} ({mib(peak)} MiB)" for words, peak in _lower(floor, problem, objective)]
    if floor.step.part.inner:
        lower.append("training in (more) blocks")
    return BudgetError(
        f"{what} needs {mib(floor.cost.peak_bytes)} MiB ({terms}); the largest budget on offer is "
        f"{mib(largest_bytes)} MiB{margin}. What would lower it: {', '.join(lower) or 'nothing but a smaller model'}"
    )


def _lower(floor: Choice, problem: Problem, objective: Objective) -> list[tuple[str, int]]:
    """Changes that lower a step's peak by more than a hundredth, each with what is left; the last has all of them."""
    step = floor.step
    half = max(step.work.batch_size // 2, 1)
    changes: list[tuple[str, Callable[[Step], Step]]] = [
        ("momentum = 0", lambda s: replace(s, work=replace(s.work, momentum=0))),
        (f"batch_size = {half}", lambda s: replace(s, work=replace(s.work, batch_size=half))),
        ('means = "auto"', lambda s: cheapest(s, problem, objective, AUTO)[0]),
        ("bfloat16, an approximation,", lambda s: replace(s, means=replace(s.means, bfloat16=True))),
    ]
    found, together = [], step
    for words, change in changes:
        peak = step_cost(change(step), problem, objective).peak_bytes
        if peak < 0.99 * floor.cost.peak_bytes:
            found.append((words, peak))
            together = change(together)
    if len(found) > 1:
        found.append(("all of these", step_cost(together, problem, objective).peak_bytes))
    return found


@remembered(256)
def output_module(
    blocks: Blocks,
    block: int,
    problem: Problem,
    work: LocalWork,
    projection: Projection,
    layers: Sequence[Layers] = LAYERS,
    *,
    normed: bool = False,
) -> OutputSpec | None:
    """The output module after a block, with one of the `layers`, `normed` or not; None after the last.

    The closest stand-in whose stage costs no more, in FLOPs and in peak, than training the same block with the
    part that it stands in for: with the projection that is asked for if one can have it, else with a narrower one.
    Where nothing costs so little, the module with the lowest peak.

    Raises:
        ConfigError: the model says more than one thing of an example, which no output module can.

    Deviation: the authors hold output modules to no limit, and do not say how they predict a peak; ours is traced.
    """
    cut = blocks.cut(block)
    if cut is None:
        return None
    blocks.check_outputs()
    later = blocks.partition.shapes_after(blocks.ends[block])
    spec = OutputSpec(cut.module, cut.shape, light_targets(cut.shape, later), problem.num_classes, normed=normed)
    through = span_step(blocks, Span(block, len(blocks) - 1), None, work)
    limit = step_cost(through, problem, TaskLoss())
    narrower = PROJECTIONS[PROJECTIONS.index(projection) :]
    candidates = [replace(spec, layers=kind, projection=head) for head in narrower for kind in layers]
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
