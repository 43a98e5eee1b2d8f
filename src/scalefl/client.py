"""The client's local loop: the one place where training happens, whatever the method and wherever the client."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scalefl.models.spec import ModelSpec
from scalefl.params import CPU, LazyParams, Params, moved, num_bytes, select
from scalefl.parts import PartRunner, Resident, Taps
from scalefl.prefix import Prefix, from_input, prefix_of
from scalefl.problem import Batch, Problem, Weighted, num_rows, take
from scalefl.rng import RngState, derive, generator, rng_state, seeded, set_rng_state
from scalefl.sgd import SGD
from scalefl.types import OWN, ClientTask, ClientUpdate, Means, Method, Objective, Receipt, Step

Sums = dict[str, Weighted]
"""Metrics, summed over examples, with the weights to divide them by."""

EARLY_BYTES = 2**20
"""Of a parameter whose gradient is applied as soon as it is made, or is never made; for small ones that costs time."""


class Residents:
    """The skeletons that a worker keeps, one for each model that its tasks have named, and where it runs them.

    Args:
        device: where.
        measured: whether it matters that a task takes the memory that was predicted for its means, and not less.
    """

    def __init__(self, device: torch.device = CPU, *, measured: bool = True) -> None:
        self.device, self.measured = device, measured
        self._residents: dict[ModelSpec, Resident] = {}

    def __getitem__(self, model: ModelSpec) -> Resident:
        self.make(model)
        return self._residents[model]

    def make(self, model: ModelSpec) -> None:
        """Have the skeleton of a model ready."""
        if model not in self._residents:
            self._residents[model] = Resident(model)


def run_task(
    method: Method, problem: Problem, residents: Residents, task: ClientTask, params: Params, examples: Batch
) -> ClientUpdate:
    """Do what a client is asked to do in a round.

    Args:
        method: gives each step its objective.
        problem: what is learned.
        residents: the worker's skeletons.
        task: the steps.
        params: the tensors that the steps need, on the worker's device. Those in `task.moving` are changed in place:
            they must be the caller's own. Lazy ones are in memory while a step holds them.
        examples: the client's data, on the CPU; batches of it go to the device.
    """
    start = time.perf_counter()
    received = num_bytes(params)
    sums: Sums = {}
    with seeded(task.seed):
        # In private runs those without data are asked too, as nobody knows them; they move nothing.
        for number, step in enumerate(task.steps if num_rows(examples) else ()):
            seed = derive(task.seed, "step", number)
            with _in_memory(params, step):
                if step.collects:
                    _collect(residents, step, params, examples, problem, seed)
                    continue
                sums = _train(residents, step, params, examples, problem, method.objective(step), seed)
    upload: Params
    if isinstance(params, LazyParams):  # read tensor by tensor when it is sent
        params.keep(task.moving)
        upload = params
    else:
        upload = moved(select(params, sorted(task.moving)), CPU)
    return told_of(task, received, upload, num_rows(examples), sums, time.perf_counter() - start)


def told_of(
    task: ClientTask, received: int, upload: Params, num_examples: int, sums: Sums, seconds: float
) -> ClientUpdate:
    """What a client tells of a task that it has done.

    Args:
        task: private ones tell nothing but what has moved.
        received: bytes that it was sent.
        upload: what has moved.
        num_examples, sums, seconds: how many it has, their metrics, and how long it took.
    """
    if task.is_private:
        return ClientUpdate(task.client_id, upload, 1, {}, Receipt(received, num_bytes(upload)))
    metrics = {name: (float(value), float(weight)) for name, (value, weight) in sums.items()}
    return ClientUpdate(task.client_id, upload, num_examples, metrics, Receipt(received, num_bytes(upload), seconds))


def _in_memory(params: Params, step: Step) -> contextlib.AbstractContextManager[None]:
    """Inside the block, what the step holds is in memory."""
    if isinstance(params, LazyParams):
        return params.holding(held_by(step), step.moving | step.own)
    return contextlib.nullcontext()


def _train(
    residents: Residents,
    step: Step,
    params: Params,
    examples: Batch,
    problem: Problem,
    objective: Objective,
    seed: int,
) -> Sums:
    """Train through all epochs; return the last epoch's metrics."""
    sums: Sums = {}
    with contextlib.ExitStack() as stack:
        runner, trained = stack.enter_context(holding(residents[step.part.model], step, params))
        prefix = stack.enter_context(prefix_of(step, runner, examples, problem, residents.device))
        optimizer = make_optimizer(trained, step, params, early=not residents.measured)
        for epoch in range(step.work.epochs):
            told = epoch == step.work.epochs - 1
            for batch, rows in batches_of(examples, step.work.batch_size, derive(seed, "epoch", epoch), problem):
                batch = moved(batch, residents.device)
                found = train_batch(runner, optimizer, batch, problem, objective, step.means, prefix, rows, told=told)
                _accumulate(sums, found)
        optimizer.settle()
    return sums


def _collect(residents: Residents, step: Step, params: Params, examples: Batch, problem: Problem, seed: int) -> None:
    """Let norms see a client's examples once, shuffled, in batches of nearly equal size."""
    resident = residents[step.part.model]
    order = torch.randperm(num_rows(examples), generator=generator(seed, "order"))
    pieces = math.ceil(len(order) / step.largest_micro_batch)
    with holding(resident, step, params) as (runner, _), torch.no_grad(), runner.collecting():
        for rows in order.tensor_split(pieces):
            runner(moved(take(examples, rows), residents.device), problem)


def without_prefix(step: Step) -> bool:
    """Whether a step trains without holding its frozen prefix, whose tensors it asks for by name, unit by unit."""
    return step.means.prefix in ("streamed", "cached") and step.part.entry is not None


def held_by(step: Step) -> frozenset[str]:
    """The tensors that a step holds for as long as it trains."""
    own = step.part.own if without_prefix(step) else step.part.held
    return frozenset((*own, *step.part.output_names(), *step.own)).difference(*step.passing)


@contextlib.contextmanager
def holding(resident: Resident, step: Step, params: Params) -> Iterator[tuple[PartRunner, dict[str, nn.Parameter]]]:
    """Lay out what a step holds by its means, in the precision that they ask for."""
    means, device = step.means, params[min(step.moving)].device
    # Without its cache: that keeps the weights of the first step for as long as the block lasts.
    with (
        torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
        if means.bfloat16
        else contextlib.nullcontext(),
        resident.holding(
            step.part,
            params,
            step.trainable,
            step.moving,
            without_prefix=without_prefix(step),
            passing=step.passing,
            frozen_statistics=means.frozen_statistics,
        ) as held,
    ):
        yield held


def make_optimizer(trained: Mapping[str, nn.Parameter], step: Step, params: Params, *, early: bool = False) -> SGD:
    """The optimizer of a step. Gradients that are accumulated cannot be applied as they come.

    Where they can, they are if the means say so; those of large parameters also if it may be `early`: the same numbers,
    and a few per cent faster, since a gradient that has just been made is still in the processor's cache. Large weights
    of `Linear` layers move without one.
    """
    early = early and not step.means.recompute and not step.work.clip_norm
    least_bytes = 0 if step.means.free_gradients else EARLY_BYTES if early else None
    return SGD(
        trained,
        step.work,
        feddyn=step.feddyn,
        drift={name: params[OWN + name] for name in trained} if step.feddyn else None,
        in_backward=None if step.splits else least_bytes,
        in_layers=None if step.splits else EARLY_BYTES,
    )


def train_batch(
    runner: PartRunner,
    optimizer: SGD,
    batch: Batch,
    problem: Problem,
    objective: Objective,
    means: Means,
    prefix: Prefix = from_input,
    rows: Tensor | None = None,
    *,
    told: bool = True,
) -> Sums:
    """One optimizer step on one batch, in micro-batches where `means` says so; returns summed metrics.

    Args:
        runner, optimizer: what runs and what moves.
        batch: B examples.
        problem, objective: what is learned, and what is minimised.
        means: how.
        prefix: gives the frozen prefix's features; by default everything runs from the input.
        rows: which of the client's the examples are, [B]; only a cached prefix asks.
        told: whether anybody asks for metrics.
    """
    optimizer.zero_grad()
    rows = torch.arange(num_rows(batch)) if rows is None else rows
    micros = _micro_batches(batch, rows, means.micro_batch_size or num_rows(batch))
    sums: Sums = {}
    pull = None
    if len(micros) > 1 and objective.coupled:
        pull = _pull_of_batch(runner, batch, micros, problem, objective, prefix)
    divisor, total_weight = pull.weight if pull else num_rows(batch), 0.0
    for number, (micro, micro_rows) in enumerate(micros):
        if pull:
            set_rng_state(pull.rng_states[number])  # dropout as in the first pass
        taps = runner(micro, problem, prefix(micro, micro_rows), recompute=means.recompute)
        loss, weighed = objective.sample_terms(taps, micro, problem)
        weight = float(weighed)
        total_weight += weight
        if len(micros) == 1:
            divisor = weight
        value = loss / (divisor or 1)
        coupled = pull.on(taps, number) if pull else objective.batch_terms(taps, micro, problem) if weight else None
        if coupled is not None:
            value = value + coupled
        with optimizer.descending():
            value.backward()  # type: ignore[no-untyped-call]
            logits = taps.logits.detach()
            del taps, loss, coupled, value
            runner.complete_backward()
        if told:
            with torch.no_grad():
                _accumulate(sums, problem.metrics(logits, micro))
        del logits
    if total_weight not in (divisor, 0):
        # Weights were known only when all micro-batches had run.
        optimizer.scale_grad(divisor / total_weight)
    optimizer.step()
    optimizer.zero_grad()
    return sums


class _Pull(NamedTuple):
    """The gradient of the terms that couple samples, with respect to the taps of a whole batch.

    Attributes:
        gradients: tap -> its gradient for each micro-batch.
        weight: of the batch; any positive number, as for class weights.
        rng_states: torch's generator before each micro-batch.
    """

    gradients: Mapping[str, tuple[Tensor, ...]]
    weight: float
    rng_states: list[RngState]

    def on(self, taps: Taps, number: int) -> Tensor | None:
        """A scalar whose gradient with respect to a micro-batch's taps is its slice of the batch's."""
        terms: list[Tensor] = [(getattr(taps, name) * pieces[number]).sum() for name, pieces in self.gradients.items()]
        return sum(terms[1:], terms[0]) if terms else None


def _pull_of_batch(
    runner: PartRunner,
    batch: Batch,
    micros: Sequence[tuple[Batch, Tensor]],
    problem: Problem,
    objective: Objective,
    prefix: Prefix,
) -> _Pull:
    """First of two passes: run all micro-batches without a graph, then differentiate the batch's terms by their taps.

    nHSIC is no sum over samples. Exact where no layer couples samples either: batch norm does, in each micro-batch.
    """
    states, weight, start = [], 0.0, 0
    leaves: dict[str, Tensor] = {}
    with torch.no_grad(), runner.keep_statistics():
        for micro, rows in micros:
            states.append(rng_state())
            taps = runner(micro, problem, prefix(micro, rows))
            weight += float(objective.sample_terms(taps, micro, problem)[1])
            for name in ("x", *objective.coupled):
                piece = getattr(taps, name)
                if piece is None:
                    continue
                if name not in leaves:
                    # Room for the whole batch at once: to join pieces takes twice as much.
                    leaves[name] = piece.new_empty(num_rows(batch), *piece.shape[1:])
                leaves[name][start : start + len(rows)] = piece
            start += len(rows)
    for name in objective.coupled:
        leaves[name].requires_grad_()
    whole: dict[str, Any] = dict(leaves)
    terms = objective.batch_terms(replace(taps, **whole), batch, problem) if weight else None
    if terms is None:
        return _Pull({}, weight, states)
    found = torch.autograd.grad(terms, [leaves[name] for name in objective.coupled])
    lengths = [len(rows) for _, rows in micros]
    gradients = {name: torch.split(g, lengths) for name, g in zip(objective.coupled, found, strict=True)}
    return _Pull(gradients, weight, states)


def _accumulate(sums: Sums, more: Mapping[str, Weighted]) -> None:
    for name, (value, weight) in more.items():
        before = sums.get(name)
        sums[name] = (before[0] + value, before[1] + weight) if before else (value, weight)


def batches_of(examples: Batch, size: int, seed: int, problem: Problem) -> Iterator[tuple[Batch, Tensor]]:
    """Shuffled, augmented batches of one epoch and their rows; a single leftover is left out (see `LocalWork`)."""
    order = torch.randperm(num_rows(examples), generator=generator(seed, "order"))
    augmentation = generator(seed, "augmentation")
    for i, rows in enumerate(torch.split(order, size)):
        if len(rows) > 1 or i == 0 or size == 1:
            yield problem.augment(take(examples, rows), augmentation), rows


def _micro_batches(batch: Batch, rows: Tensor, size: int) -> list[tuple[Batch, Tensor]]:
    """Slices of nearly equal length, none longer than `size`; no example stays alone if `size` is 3 or more."""
    count = math.ceil(len(rows) / size)
    if count == 1:
        return [(batch, rows)]
    columns = {name: column.tensor_split(count) for name, column in batch.items()}
    places = rows.tensor_split(count)
    return [({name: pieces[i] for name, pieces in columns.items()}, places[i]) for i in range(count)]
