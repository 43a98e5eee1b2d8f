"""What steps cost and which fit a budget: the client's own loop, run once on fake tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from scalefl.blocks import Blocks, Span, blocks_by_hand
from scalefl.client import train_batch
from scalefl.errors import BudgetError
from scalefl.memory import MIB, Cost, Ledger, predict
from scalefl.models.output import LAYERS, PROJECTIONS, OutputSpec, Projection, light_targets
from scalefl.models.spec import ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.parts import Resident, Taps
from scalefl.problem import Batch, Problem
from scalefl.sgd import SGD
from scalefl.types import LocalWork, Means, Objective, Step


@lru_cache(maxsize=4096)
def step_cost(step: Step, problem: Problem, objective: Objective) -> Cost:
    """Predicted cost of one optimizer step on a full batch: peak bytes by term, and FLOPs."""
    rows = step.work.batch_size
    micro = min(step.means.micro_batch_size or rows, rows)
    # Two micro-batches show every peak: the first runs without gradients, all later ones beside them.
    traced = rows if micro == rows else min(rows, 2 * micro)
    resident = _resident(step.part.model)
    held = resident.empty(step.part)

    def run(ledger: Ledger) -> None:
        with ledger.counting_as("weights"):
            params = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in held.items()}
        with resident.holding(step.part, params, step.trainable, step.moving) as (runner, trained):
            for p in trained.values():
                p.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    lambda p: ledger.file([_grad(p)], "gradients")
                )
            with ledger.counting_as("optimizer"):
                optimizer = SGD(trained, step.work)
            batch = problem.example(traced)
            train_batch(runner, optimizer, batch, problem, objective, replace(step.means, micro_batch_size=micro))

    cost = predict(run, traced)
    waiting = (rows - traced) * _row_bytes(problem)
    terms = tuple((term, size + (waiting if term == "activations" else 0)) for term, size in cost.terms)
    return Cost(cost.peak_bytes + waiting, terms, round(cost.flops * rows / traced), rows)


def fitting_means(
    step: Step, problem: Problem, objective: Objective, budget_bytes: int, smallest_micro_batch: int | None
) -> tuple[Step, Cost] | None:
    """The step with the largest micro-batch that fits the budget, and its cost; None if none fits.

    Args:
        step: what to do.
        problem: what is learned.
        objective: what the step minimises.
        budget_bytes: what the client may add to its worker.
        smallest_micro_batch: how far a batch may be split; None: not at all.
    """
    for size in _micro_sizes(step.work.batch_size, smallest_micro_batch):
        tried = replace(step, means=Means(micro_batch_size=size))
        cost = step_cost(tried, problem, objective)
        if cost.peak_bytes <= budget_bytes:
            return tried, cost
    return None


def cheapest(step: Step, problem: Problem, objective: Objective, smallest_micro_batch: int | None) -> tuple[Step, Cost]:
    """The step with the smallest allowed micro-batch, and its cost: the least memory that it can do with."""
    size = _micro_sizes(step.work.batch_size, smallest_micro_batch)[-1]
    tried = replace(step, means=Means(micro_batch_size=size))
    return tried, step_cost(tried, problem, objective)


def budget_error(what: str, cost: Cost, largest_bytes: int) -> BudgetError:
    """An error that says what a step needs, by term, and what is on offer."""
    terms = ", ".join(f"{term} {size / MIB:.1f}" for term, size in cost.terms)
    return BudgetError(
        f"{what} needs {cost.peak_bytes / MIB:.1f} MiB ({terms}); the largest budget on offer is "
        f"{largest_bytes / MIB:.1f} MiB. More blocks, smaller micro-batches, a smaller batch or momentum = 0 "
        "lower it"
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
) -> Step:
    """A step that trains a span of blocks, with the output module after it unless it ends the model."""
    part = blocks.part(span, output, coadapted_layers)
    trainable = blocks.trainable(span, coadapted_layers)
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

    def batch_terms(self, taps: Taps, batch: Batch, problem: Problem) -> Tensor | None:
        return taps.projected.mean()


def _micro_sizes(batch_size: int, smallest: int | None) -> list[int]:
    """The batch size and its halves down to `smallest`; the batch size alone for None."""
    sizes = [batch_size]
    while smallest is not None and sizes[-1] > max(smallest, 1):
        sizes.append(max(smallest, -(-sizes[-1] // 2)))
    return sizes


@lru_cache(maxsize=64)
def _resident(model: ModelSpec) -> Resident:
    return Resident(model)


def _row_bytes(problem: Problem) -> int:
    return sum(column.numel() * column.element_size() for column in problem.example(1).values())


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad
