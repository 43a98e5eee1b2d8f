"""Clients with equal tasks, trained at once: one run over the weights of all of them, by torch.func.vmap.

Where a model is small, starting an operation takes longer than doing it; for many clients at once it is started once.
The mathematics is that of `client.run_task` for each; last bits differ, since other kernels do it.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor, nn

from scalefl.client import Residents, Sums, batches_of, holding, told_of, without_prefix
from scalefl.params import CPU, Params, moved, num_bytes
from scalefl.parts import PartRunner, Resident
from scalefl.prefix import Prefix, prefix_of
from scalefl.problem import Batch, Problem, num_rows
from scalefl.rng import derive, undrawn
from scalefl.sgd import SGD
from scalefl.torch_private import without_vmap_loops
from scalefl.types import OWN, ClientTask, ClientUpdate, Method, Objective, Step

Metrics = dict[str, tuple[Tensor, Tensor]]
"""Summed over each client's examples, with the weights to divide them by: [K] each."""


def can_vectorize(task: ClientTask) -> bool:
    """Whether a task's means let clients share a run; whether its model does, only a try can tell."""
    return all(map(_is_plain, task.steps))


def _is_plain(step: Step) -> bool:
    means = step.means
    in_pieces = step.splits or means.recompute or without_prefix(step) or means.prefix == "chunked"
    return not (in_pieces or means.bfloat16 or step.collects)


def run_vectorized(
    method: Method,
    problem: Problem,
    residents: Residents,
    tasks: Sequence[ClientTask],
    params: Sequence[Params],
    examples: Sequence[Batch],
) -> list[ClientUpdate]:
    """Do what K clients are asked to do, which has to be the same for all.

    Args:
        method, problem, residents: as for `client.run_task`.
        tasks: equal in their steps; each one `can_vectorize`.
        params: the tensors that each needs; none of them is changed.
        examples: each client's, one at least.

    Raises:
        RuntimeError: something in the model or the problem can't be vectorised: random numbers, numbers that are
            taken out of tensors, operations that torch knows for one client at a time only.
    """
    start = time.perf_counter()
    # Those with more whole batches come first: whoever has one more lies before all that have not, without a gap.
    places = sorted(range(len(tasks)), key=lambda i: -num_rows(examples[i]))
    sent, data = [params[i] for i in places], [examples[i] for i in places]
    own = {name: _stacked([each[name] for each in sent], residents.device) for name in sorted(tasks[0].moving)}
    metrics: Metrics = {}
    for number, step in enumerate(tasks[0].steps):
        seeds = [derive(tasks[i].seed, "step", number) for i in places]
        with undrawn():
            metrics = _Group(residents, step, sent, own).train(method.objective(step), problem, data, seeds)
    uploads, updates = moved(own, CPU), {}
    seconds = (time.perf_counter() - start) / len(tasks)
    for row, i in enumerate(places):
        upload = {name: t[row] for name, t in uploads.items()}
        sums: Sums = {name: (values[row], float(weights[row])) for name, (values, weights) in metrics.items()}
        updates[i] = told_of(tasks[i], num_bytes(params[i]), upload, num_rows(examples[i]), sums, seconds)
    return [updates[i] for i in range(len(tasks))]


class _Group:
    """K clients at a step. What they do not share lies in tensors [K, …], a row for each.

    Args:
        residents, step: where they train, and what.
        params: what each was sent.
        own: what moves, [K, …]; changed in place.
    """

    def __init__(self, residents: Residents, step: Step, params: Sequence[Params], own: Params) -> None:
        self._resident, self._device, self._step = residents[step.part.model], residents.device, step
        trained = {name: nn.Parameter(own[name]) for name in sorted(step.trainable)}
        drift = {name: own[OWN + name] for name in trained} if step.feddyn else None
        self._optimizer = SGD(trained, step.work, feddyn=step.feddyn, drift=drift)
        self._of_first: dict[int, SGD] = {}
        self._rest = {name: own[name] for name in sorted(step.statistics)}
        self._shared: dict[str, Tensor] = {}
        changeable = self._resident.changeable(step.part)
        for name in (name for name in step.part.names() if name not in step.moving):
            each = [p[name] for p in params]
            if _is_one(each) and name not in changeable:
                self._shared[name] = each[0].to(self._device)
            else:
                self._rest[name] = _stacked(each, self._device)

    def train(self, objective: Objective, problem: Problem, examples: Sequence[Batch], seeds: Sequence[int]) -> Metrics:
        """Train through all epochs; return the metrics of the last one."""
        step, metrics = self._step, Metrics()
        first = {name: t[0] for name, t in {**self._rest, **self._optimizer.parameters}.items()}
        with contextlib.ExitStack() as stack:
            stack.enter_context(without_vmap_loops())
            runner, _ = stack.enter_context(holding(self._resident, step, {**self._shared, **first}))
            prefix = stack.enter_context(prefix_of(step, runner, examples[0], problem, self._device))
            run = _Run(self._resident, step, runner, prefix, objective, problem)
            stack.callback(runner.exchange, {})  # what moves lies in rows, and comes back from there
            stack.callback(self._resident.exchange, step.part, first)
            for epoch in range(step.work.epochs):
                run.tells = epoch == step.work.epochs - 1
                of_epoch = [derive(seed, "epoch", epoch) for seed in seeds]
                for rows, batch in _runs(examples, step.work.batch_size, of_epoch, problem):
                    for name, found in self._train(run, rows, moved(batch, self._device)).items():
                        if name not in metrics:
                            metrics[name] = found[0].new_zeros(len(examples)), torch.zeros(len(examples))
                        values, weights = metrics[name]
                        values[rows] += found[0]
                        weights[rows] += found[1].float().cpu()
            self._optimizer.settle()
        return metrics

    def _train(self, run: _Run, rows: list[int], batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """An optimizer step of some clients, each on its batch of columns [clients, B, …]; summed metrics of each."""
        # The first ones are used where they lie; others are copied, and put back.
        first = rows == list(range(len(rows)))
        where = slice(len(rows)) if first else torch.tensor(rows, device=self._device)
        if not first:
            optimizer = self._optimizer.of_rows(where)
        elif len(rows) in self._of_first:
            optimizer = self._of_first[len(rows)]
        else:
            optimizer = self._of_first[len(rows)] = self._optimizer.of_rows(where)
        rest = {name: t[where] for name, t in self._rest.items()}
        losses, metrics = torch.func.vmap(run)({**rest, **optimizer.parameters}, batch)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(where, Tensor):
            self._optimizer.put_back(where, optimizer)
            for name, t in rest.items():
                self._rest[name][where] = t
        return metrics


@dataclass
class _Run:
    """One client's run with a batch, as vmap sees it.

    Attributes:
        tells: whether anybody asks for metrics.
    """

    resident: Resident
    step: Step
    runner: PartRunner
    prefix: Prefix
    objective: Objective
    problem: Problem
    tells: bool = False

    def __call__(self, values: Params, batch: Batch) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """The loss, and summed metrics with their weights."""
        self.resident.exchange(self.step.part, values)
        self.runner.exchange(values)
        taps = self.runner(batch, self.problem, self.prefix(batch, _NO_ROWS))
        self.runner.take_in()
        loss, weight = self.objective.sample_terms(taps, batch, self.problem)
        if isinstance(weight, Tensor):  # of each client: none of them is looked at
            loss, has_weight = loss / weight.where(weight != 0, 1), True
        else:
            loss, has_weight = loss / (weight or 1), bool(weight)
        coupled = self.objective.batch_terms(taps, batch, self.problem) if has_weight else None
        if coupled is not None:
            loss = loss + coupled
        metrics = self.problem.metrics(taps.logits.detach(), batch) if self.tells else {}
        return loss, {name: (value, torch.as_tensor(weight)) for name, (value, weight) in metrics.items()}


_NO_ROWS = torch.arange(0)
"""Only a cached prefix asks which rows of the client's a batch is made of, and such clients train one by one."""


def _runs(
    examples: Sequence[Batch], size: int, seeds: Sequence[int], problem: Problem
) -> Iterator[tuple[list[int], Batch]]:
    """An epoch: the whole batches of all clients, as far as each has some; at its end what is left of each, by length.

    Yields:
        Rows of the clients whose batches are run at once, and columns [clients, B, …].
    """
    batches = [batches_of(each, size, seed, problem) for each, seed in zip(examples, seeds, strict=True)]
    left: dict[int, dict[int, Batch]] = defaultdict(dict)
    for tick in zip_longest(*batches):
        whole: dict[int, Batch] = {}
        for row, found in enumerate(tick):
            if found is not None:
                batch, _ = found
                (whole if num_rows(batch) == size else left[num_rows(batch)])[row] = batch
        if whole:
            yield _joined(whole)
    yield from map(_joined, left.values())


def _joined(batches: Mapping[int, Batch]) -> tuple[list[int], Batch]:
    """Batches of equal length, by row, as one."""
    first, *_ = batches.values()
    return list(batches), {name: torch.stack([batch[name] for batch in batches.values()]) for name in first}


def _stacked(each: Sequence[Tensor], device: torch.device) -> Tensor:
    """The tensors of K clients as rows of a new one, [K, …]."""
    if _is_one(each):
        one = each[0].to(device)
        return one.expand(len(each), *one.shape).clone(memory_format=torch.contiguous_format)
    return torch.stack(list(each)).to(device)


def _is_one(each: Sequence[Tensor]) -> bool:
    """Whether all clients were sent the same tensor."""
    first = _lies(each[0])
    return all(t is each[0] or _lies(t) == first for t in each)


def _lies(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
