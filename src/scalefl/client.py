"""The client's local loop: the one place where training happens, whatever the method and wherever the client."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from scalefl.models.spec import ModelSpec
from scalefl.params import Params, num_bytes, select
from scalefl.parts import PartRunner, Resident
from scalefl.problem import Batch, Problem, num_rows, take
from scalefl.rng import derive, generator, seeded
from scalefl.sgd import SGD
from scalefl.types import ClientTask, ClientUpdate, Means, Method, Objective, Receipt, Step


class Residents:
    """The skeletons that a worker keeps, one for each model that its tasks have named."""

    def __init__(self) -> None:
        self._residents: dict[ModelSpec, Resident] = {}

    def __getitem__(self, model: ModelSpec) -> Resident:
        if model not in self._residents:
            self._residents[model] = Resident(model)
        return self._residents[model]


def run_task(
    method: Method, problem: Problem, residents: Residents, task: ClientTask, params: Params, examples: Batch
) -> ClientUpdate:
    """Do what a client is asked to do in a round.

    Args:
        method: gives each step its objective.
        problem: what is learned.
        residents: the worker's skeletons.
        task: the steps.
        params: the tensors that the steps need. Those in `task.moving` are changed in place: they must be the
            caller's own.
        examples: the client's data.
    """
    start = time.perf_counter()
    received = num_bytes(params)
    metrics: dict[str, tuple[float, float]] = {}
    with seeded(task.seed):
        for number, step in enumerate(task.steps):
            seed = derive(task.seed, "step", number)
            metrics = _train(residents, step, params, examples, problem, method.objective(step), seed)
    upload = select(params, sorted(task.moving))
    receipt = Receipt(received, num_bytes(upload), time.perf_counter() - start)
    return ClientUpdate(task.client_id, upload, num_rows(examples), metrics, receipt)


def _train(
    residents: Residents,
    step: Step,
    params: Params,
    examples: Batch,
    problem: Problem,
    objective: Objective,
    seed: int,
) -> dict[str, tuple[float, float]]:
    """Train through all epochs; return the last epoch's loss and accuracy as (sum, weight)."""
    sums: dict[str, list[Tensor | int]] = {}
    with residents[step.part.model].holding(step.part, params, step.trainable, step.moving) as (runner, trained):
        optimizer = SGD(trained, step.work)
        for epoch in range(step.work.epochs):
            sums = {}
            for batch in _batches(examples, step.work.batch_size, derive(seed, "epoch", epoch), problem):
                for name, (value, weight) in train_batch(
                    runner, optimizer, batch, problem, objective, step.means
                ).items():
                    entry = sums.setdefault(name, [0, 0])
                    entry[0] = entry[0] + value
                    entry[1] = entry[1] + weight
    return {name: (float(value), float(weight)) for name, (value, weight) in sums.items()}


def train_batch(
    runner: PartRunner, optimizer: SGD, batch: Batch, problem: Problem, objective: Objective, means: Means
) -> dict[str, tuple[Tensor, int]]:
    """One optimizer step on one batch, in micro-batches where `means` says so; returns summed metrics.

    Terms that couple samples are computed in each micro-batch and weighted by its share of the batch's weight.
    """
    optimizer.zero_grad()
    rows = num_rows(batch)
    sums: dict[str, tuple[Tensor, int]] = {}
    total_weight = 0
    for micro in _micro_batches(batch, means.micro_batch_size or rows):
        taps = runner(micro, problem)
        loss, weight = objective.sample_terms(taps, micro, problem)
        total_weight += weight
        # Weights are known only when all micro-batches have run: divide by rows now, correct below.
        objective_value = loss / rows
        # Deviation: nHSIC is not a sum over samples; in micro-batches this is the mean of their own values.
        coupled = objective.batch_terms(taps, micro, problem)
        if coupled is not None:
            objective_value = objective_value + coupled * (weight / rows)
        objective_value.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            _accumulate(sums, problem.metrics(taps.logits.detach(), micro))
    if total_weight != rows and total_weight > 0:
        optimizer.scale_grad(rows / total_weight)
    optimizer.step()
    optimizer.zero_grad()
    return sums


def _accumulate(sums: dict[str, tuple[Tensor, int]], more: Mapping[str, tuple[Tensor, int]]) -> None:
    for name, (value, weight) in more.items():
        before, weight_before = sums.get(name, (torch.zeros_like(value), 0))
        sums[name] = (before + value, weight_before + weight)


def _batches(examples: Batch, size: int, seed: int, problem: Problem) -> Iterator[Batch]:
    """Shuffled, augmented batches of one epoch; a single leftover example is left out (see `LocalWork`)."""
    order = torch.randperm(num_rows(examples), generator=generator(seed, "order"))
    augmentation = generator(seed, "augmentation")
    for i, rows in enumerate(torch.split(order, size)):
        if len(rows) > 1 or i == 0 or size == 1:
            yield problem.augment(take(examples, rows), augmentation)


def _micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    """Slices of nearly equal length, none longer than `size`; no example stays alone if `size` is 3 or more."""
    count = math.ceil(num_rows(batch) / size)
    columns = {name: column.tensor_split(count) for name, column in batch.items()}
    for i in range(count):
        yield {name: pieces[i] for name, pieces in columns.items()}
