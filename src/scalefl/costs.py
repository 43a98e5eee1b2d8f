"""What steps cost: the client's own loop, run once on fake tensors for all batch sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from scalefl.blocks import blocks_as_asked
from scalefl.caches import remembered
from scalefl.client import held_by, holding, make_optimizer, train_batch
from scalefl.disk_cache import kept
from scalefl.memory import (
    SPLIT,
    WHOLE,
    Array,
    Cost,
    Ledger,
    Profile,
    Slices,
    Symbols,
    cost_of,
    predict,
    profile,
    slices,
)
from scalefl.models.spec import ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.params import Params, is_attachment
from scalefl.parts import Features, Part, Resident, Taps
from scalefl.prefix import CHUNK, Prefix, from_input
from scalefl.problem import Batch, Problem, Weighted, num_rows
from scalefl.steps import full_step
from scalefl.tracing import fingerprint
from scalefl.types import OWN, LocalWork, Objective, PrefixMode, Step
from scalefl.units import TERMS, Term

WITHOUT_PREFIX: tuple[PrefixMode, ...] = ("streamed", "cached")
"""Ways to run a prefix in which training does not hold its tensors."""


def step_cost(step: Step, problem: Problem, objective: Objective) -> Cost:
    """Predicted cost of one optimizer step on a full batch: peak bytes by term, and FLOPs.

    The step and its frozen prefix are traced apart, once for all batch sizes, and put together here: while the
    prefix runs, the step waits with what it holds.
    """
    if step.collects:
        return _cost_of_collecting(step, problem)
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
    return cost_of(terms, flops, rows, found.unknown)


def _cost_of_collecting(step: Step, problem: Problem) -> Cost:
    """The cost of a step that trains nothing: one run in which norms collect statistics."""
    rows = step.largest_micro_batch
    part, moving = step.part, step.moving
    found = _collecting_profile(part, moving, problem)
    if found is None:
        return predict(_collecting(part, moving, problem, rows), rows)
    return cost_of(found.peak(rows, rows), found.total_flops(rows, rows), rows)


def in_turn(costs: Sequence[Cost]) -> Cost:
    """The cost of a task whose steps run one after another: the fullest of them, and the FLOPs of all.

    While one runs, the tensors of the others lie on disk.
    """
    unknown = tuple(sorted({name for cost in costs for name in cost.unknown}))
    highest = max(costs, key=lambda cost: cost.peak_bytes)
    return replace(highest, flops=sum(cost.flops for cost in costs), unknown=unknown)


def _while_prefix_runs(step: Step, waiting: Profile, prefix: Profile, micro: int) -> tuple[Array, float]:
    """Bytes by term while the frozen prefix runs, and its FLOPs for an example."""
    mode, rows = step.means.prefix, step.work.batch_size
    chunk = micro if mode == "resident" else min(CHUNK, micro)
    flops = prefix.total_flops(chunk, chunk) / chunk
    if mode == "cached":  # before the first batch, when there is nothing but weights
        return prefix.peak(chunk, chunk) + _laid_out(step), flops
    terms = waiting.waiting_peak(micro, rows) + prefix.peak(chunk, chunk) + _term("weights", _prefix_bytes(step))
    if mode != "resident" and micro > CHUNK:
        terms = terms + _term("activations", micro * feature_bytes(step.part))
    return terms, flops


def _laid_out(step: Step) -> Array:
    """Bytes of the weights that training from the prefix's features holds, by term."""
    sizes = sizes_of(step.part)
    found = np.zeros(len(TERMS), dtype=np.int64)
    for name in held_by(step) - step.own:
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
        memory_format=step.work.memory_format,
    )
    means = replace(step.means, micro_batch_size=None, prefix="resident")
    return replace(step, work=work, means=means, feddyn=float(step.feddyn > 0))


@remembered(4096)
def _profile(step: Step, problem: Problem, objective: Objective, splits: bool) -> Profile | None:
    """What training from the prefix's features takes; None where it can't run on fake tensors."""
    symbols = SPLIT if splits else WHOLE
    work = replace(step.work, batch_size=symbols.batch)
    means = replace(step.means, micro_batch_size=symbols.first, prefix="streamed")
    run = _traced(replace(step, work=work, means=means), problem, objective)
    return _kept_profile(step.part.model, problem, ("step", step, objective, splits), run, symbols)


def _kept_profile(
    model: ModelSpec, problem: Problem, facts: tuple[Any, ...], run: Callable[[Ledger], None], symbols: Symbols
) -> Profile | None:
    """The profile of `run`, of which `facts` are all that it depends on beside model and problem."""

    def make() -> dict[str, Any] | None:
        made = profile(run, symbols)
        return None if made is None else made.to_json()

    found = kept(fingerprint(model, problem), (problem, *facts), make)
    return None if found is None else Profile.from_json(found)


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
    return cost_of(terms, round(cost.flops * rows / traced), rows, cost.unknown)


def _traced(step: Step, problem: Problem, objective: Objective) -> Callable[[Ledger], None]:
    """The client's own loop over one batch, with the ledger told what is what."""
    resident = _resident(step.part.model)
    every, held = resident.empty(step.part), held_by(step)

    def run(ledger: Ledger) -> None:
        params = _Coming(every, ledger)
        params.hold(held)
        with holding(resident, step, params) as (runner, trained), _counting_outputs(runner.outputs, ledger):
            for name, p in trained.items():
                p.register_post_accumulate_grad_hook(_filing(ledger, name))  # type: ignore[no-untyped-call]
            with ledger.counting_as("copies"):
                params.update({OWN + name: torch.zeros_like(trained[name]) for name in trained if step.feddyn})
            optimizer = make_optimizer(trained, step, params)
            for name, tensor in optimizer.momentum.items():
                ledger.file([tensor], _term_of(name, "optimizer"))
            for name, tensor in optimizer.copies.items():
                ledger.file([tensor], _term_of(name, "copies"))
            with ledger.counting_as("activations"):
                batch = problem.example(step.work.batch_size)
            watched = _Watched(objective, ledger)
            looked_at = cast(Problem, _WatchedProblem(problem, ledger))
            train_batch(runner, optimizer, batch, looked_at, watched, step.means, _waiting(step.part, ledger))

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


@remembered(1024)
def _prefix_profile(part: Part, problem: Problem, *, streamed: bool) -> Profile | None:
    """What running the frozen prefix takes beside what is held: its weights only where they are streamed."""
    resident = _resident(part.model)
    bare = replace(part, output=None, exits=())
    empty = resident.empty(bare)

    def run(ledger: Ledger) -> None:
        params = _Coming(empty, ledger)
        params.hold(part.own if streamed else part.held)
        with resident.holding(bare, params, without_prefix=streamed) as (runner, _):
            ledger.forget()
            with ledger.counting_as("activations"):
                batch = problem.example(WHOLE.batch)
            ledger.forget()
            if streamed:
                runner.streamed_features(batch, problem)
            else:
                runner.prefix_features(batch, problem)

    return _kept_profile(part.model, problem, ("prefix", part, streamed), run, WHOLE)


@remembered(256)
def _collecting_profile(part: Part, moving: frozenset[str], problem: Problem) -> Profile | None:
    run = _collecting(part, moving, problem, WHOLE.batch)
    return _kept_profile(part.model, problem, ("collecting", part), run, WHOLE)


def _collecting(part: Part, moving: frozenset[str], problem: Problem, rows: int) -> Callable[[Ledger], None]:
    resident = _resident(part.model)

    def run(ledger: Ledger) -> None:
        params = _Coming(resident.empty(part), ledger)
        params.hold(part.held)
        with resident.holding(part, params, moving=moving) as (runner, _), torch.no_grad(), runner.collecting():
            with ledger.counting_as("activations"):
                batch = problem.example(rows)
            runner(batch, problem)

    return run


class _Coming(dict[str, Tensor]):
    """Tensors that are held, and others that come into being when they are asked for, as streamed ones do."""

    def __init__(self, empty: Params, ledger: Ledger) -> None:
        super().__init__()
        self._empty, self._ledger = empty, ledger

    def hold(self, names: Iterable[str]) -> None:
        """Keep these from now on."""
        # Sorted: a model is known again by its operations, of which these are the first.
        self.update((name, self[name]) for name in sorted(names) if name in self._empty)

    def __missing__(self, name: str) -> Tensor:
        like = self._empty[name]
        with self._ledger.counting_as(_term_of(name, "weights")):
            return torch.zeros(like.shape, dtype=like.dtype)


@dataclass(frozen=True)
class _Watched:
    """An objective that tells the ledger when the forward pass is over, and what the mentor's terms take."""

    objective: Objective
    ledger: Ledger

    @property
    def coupled(self) -> tuple[str, ...]:
        return self.objective.coupled

    def sample_terms(self, taps: Taps, batch: Batch, problem: Problem) -> Weighted:
        with self.ledger.reading():
            loss, weight = self.objective.sample_terms(taps, batch, problem)
            found = loss, float(weight)
        if torch.is_grad_enabled():
            self.ledger.settle()
        return found

    def batch_terms(self, taps: Taps, batch: Batch, problem: Problem) -> Tensor | None:
        with self.ledger.counting_as("mentor"):
            return self.objective.batch_terms(taps, batch, problem)


class _WatchedProblem:
    """A problem whose metrics may take numbers out of fake tensors."""

    def __init__(self, problem: Problem, ledger: Ledger) -> None:
        self._problem, self._ledger = problem, ledger

    def __getattr__(self, name: str) -> Any:
        return getattr(self._problem, name)

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, Weighted]:
        with self._ledger.reading():
            return {
                name: (value, float(weight)) for name, (value, weight) in self._problem.metrics(output, batch).items()
            }


@contextlib.contextmanager
def _counting_outputs(modules: Sequence[nn.Module], ledger: Ledger) -> Iterator[None]:
    """Inside the block, what output modules make is filed as their own."""
    running = contextlib.ExitStack()
    with contextlib.ExitStack() as hooks:
        for module in modules:
            before = module.register_forward_pre_hook(
                lambda *_: running.enter_context(ledger.counting_as("output_module"))
            )
            after = module.register_forward_hook(lambda *_: running.close())
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        yield


def _filing(ledger: Ledger, name: str) -> Callable[[Tensor], None]:
    def file(p: Tensor) -> None:
        if p.grad is not None:  # a layer that moves its weight itself makes none
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
    sizes = sizes_of(step.part)
    return sum(sizes[name] for name in set(step.part.held) - set(step.part.own))


@remembered(1024)
def sizes_of(part: Part) -> dict[str, int]:
    """Bytes of each tensor that a part needs."""
    return {name: t.numel() * t.element_size() for name, t in _resident(part.model).empty(part).items()}


def feature_bytes(part: Part) -> int:
    """Bytes of what the frozen prefix leaves for one example."""
    assert part.entry is not None
    kept = [part.entry.blank]
    if part.source_blank is not None and part.source is not None and part.entry.covers(part.source):
        kept.append(part.source_blank)
    return sum(blank.zeros(1).nbytes for blank in kept)


NEAR = 1.02
"""Estimates stay within so many times the truth."""


def may_fit(step: Step, problem: Problem, budget_bytes: int) -> bool:
    """Whether a step could fit a budget, by what is known before it is traced."""
    return estimate(step, problem) <= NEAR * budget_bytes


def estimate(step: Step, problem: Problem) -> int:
    """What a step takes at the least: what it must hold, and what its units take where the whole model trains."""
    sizes = sizes_of(step.part)
    trained = sum(sizes[name] for name in step.trainable)
    held = sum(sizes[name] for name in held_by(step) - step.own)
    held += trained * (bool(step.work.momentum) + step.splits)
    units = _units_of(step, problem)
    found = _slices(step.part.model, problem) if units else None
    return held if found is None or step.means.bfloat16 else held + _passing(step, units, found, problem)


def _passing(step: Step, units: range, found: Slices, problem: Problem) -> int:
    """About what the activations of a step come to: of the units that it trains all of."""
    rows = step.largest_micro_batch
    if not step.means.recompute:
        return found.peak(units, rows)
    # Each stretch between two starts runs alone, beside the tensors that those before it left.
    cuts = blocks_as_asked(step.part.model, problem, 1).partition.cuts
    if any(inner.cut not in cuts for inner in step.part.inner):
        return 0  # cut by hand inside a unit, of which nothing is known but the whole
    kept, start, highest = 0, units[0], 0
    for inner in step.part.inner:
        after = cuts.index(inner.cut) + 1
        if after > units[-1] + 1:
            break
        if start < after:
            highest = max(highest, kept + found.peak(range(start, after), rows))
            start = after
        kept += rows * inner.blank.zeros(1).nbytes
    rest = range(start, units[-1] + 1)
    return max(highest, kept + found.peak(rest, rows)) if rest else highest


def _units_of(step: Step, problem: Problem) -> range:
    """The first run of units of which a step trains all."""
    part, nothing = step.part, range(0)
    found = blocks_as_asked(part.model, problem, 1).partition
    if (part.entry and part.entry.cut not in found.cuts) or (part.stop and part.stop not in found.cuts):
        return nothing
    first = found.cuts.index(part.entry.cut) + 1 if part.entry else 0
    last = found.cuts.index(part.stop) if part.stop else found.num_units - 1
    partly = {found.unit_of[name] for name in found.parameters - step.trainable}
    while first <= last and first in partly:  # co-adapted layers
        first += 1
    end = next((unit for unit in range(first, last + 1) if unit in partly), last + 1)  # before a frozen tail
    # Alone, the last unit takes less than beside others: what it starts from needs no gradient, and is gone sooner.
    return nothing if part.entry and first == found.num_units - 1 else range(first, end)


@remembered(64)
def _slices(model: ModelSpec, problem: Problem) -> Slices | None:
    """What each unit of a model takes while it trains whole."""
    cuts = blocks_as_asked(model, problem, 1).partition.cuts
    step = full_step(model, problem, LocalWork(batch_size=WHOLE.batch, momentum=0))
    step = replace(step, part=replace(step.part, inner=()))
    run = _traced(step, problem, TaskLoss())

    def marked(ledger: Ledger) -> None:
        with _resident(model).marking(cuts, ledger.mark):
            run(ledger)

    def make() -> dict[str, Any] | None:
        made = slices(marked, WHOLE, len(cuts) + 1)
        return None if made is None else made.to_json()

    found = kept(fingerprint(model, problem), ("slices", step, problem), make)
    return None if found is None else Slices.from_json(found)


@remembered(64)
def _resident(model: ModelSpec) -> Resident:
    return Resident(model)
