"""What can only be found out with the model and the data together: looked at before the first round of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from scalefl.client import Residents, run_task
from scalefl.coords import extract
from scalefl.data import FederatedData
from scalefl.effects import effects
from scalefl.errors import ConfigError, DataError, ScaleFLError
from scalefl.models.spec import ModelSpec
from scalefl.problem import Batch, Problem, num_rows, take
from scalefl.rng import seeded
from scalefl.types import ClientTask, Method, RoundPlan, ServerState, Step

NUM_CLIENTS = 1000
"""So many clients are looked at, at most."""
NUM_EXAMPLES = 8
"""Of a client, that a task is rehearsed with."""
TOLERANCE = 1e-3
"""By which the loss of a batch may differ from that of its parts through rounding."""


def check_vocabulary(model: ModelSpec, problem: Problem, data: FederatedData, *, of_clients: bool) -> None:
    """Refuse token ids that the model has no embedding for, in the rows of clients or in those of the server.

    Raises:
        DataError: names the column, where the value is, and how many embeddings there are.
    """
    for column, size in effects(model, problem).vocabularies:
        for where, batch in _clients(data) if of_clients else _held_out(data):
            values = batch[column].flatten(1) if batch[column].ndim > 1 else batch[column].unsqueeze(1)
            wrong = ((values < 0) | (values >= size)).nonzero()
            if len(wrong):
                row, place = wrong[0].tolist()
                raise DataError(
                    f"column {column!r}: {where}, row {row} holds {int(values[row, place])} at position {place}; the "
                    f"embedding of model {model.name} has {size} rows, for ids from 0 to {size - 1}"
                )


def _held_out(data: FederatedData) -> Iterator[tuple[str, Batch]]:
    """The server's rows, with words for where they are."""
    for name, batch in (("the validation data", data.validation), ("the test data", data.test)):
        if num_rows(batch):
            yield name, batch


def _clients(data: FederatedData) -> Iterator[tuple[str, Batch]]:
    """The rows of so many clients at most, with words for where they are."""
    for client in range(min(data.num_clients, NUM_CLIENTS)):
        if data.num_examples(client):
            yield f"the data of client {client}", data.examples(client)


def with_coupling(model: ModelSpec, problem: Problem, examples: Batch) -> Problem:
    """The problem, knowing whether its loss couples the examples of a batch.

    Args:
        model: gives the outputs.
        problem: to try: on a batch at once, and in two parts.
        examples: of the data.

    Raises:
        ConfigError: its loss is not one of a batch, or it couples examples and has no way to say so.
    """
    examples = take(examples, torch.arange(min(num_rows(examples), NUM_EXAMPLES)))
    if getattr(problem, "couples_examples", False) or num_rows(examples) < 3:
        return problem
    output, whole = _loss(model, problem, examples)
    first, count = num_rows(examples) // 3, num_rows(examples)
    rows = (torch.arange(first), torch.arange(first, count))
    parts = [problem.loss(output[part], take(examples, part)) for part in rows]
    apart = sum(float(loss) for loss, _ in parts) / (sum(float(weight) for _, weight in parts) or 1)
    if abs(whole - apart) <= TOLERANCE * max(abs(whole), abs(apart), 1e-6):
        return problem
    if is_dataclass(problem) and any(field.name == "couples_examples" for field in fields(problem)):
        return cast(Problem, replace(cast(Any, problem), couples_examples=True))
    raise ConfigError(
        f"the loss of {type(problem).__name__} on {num_rows(examples)} examples is {whole:.4g}, and {apart:.4g} on the "
        "same in two parts: it is no sum over examples, and micro-batches would train on another one. Give the problem "
        "an attribute `couples_examples = True`: clients then keep whole batches"
    )


def _loss(model: ModelSpec, problem: Problem, examples: Batch) -> tuple[Tensor, float]:
    module = model.build(0).eval()
    args, kwargs = problem.inputs({name: column.clone() for name, column in examples.items()})
    with seeded(0), torch.no_grad():
        try:
            output = problem.output(module(*args, **kwargs))
            loss, weight = problem.loss(output, examples)
            problem.metrics(output, examples)
        except ScaleFLError:
            raise
        except Exception as error:
            raise ConfigError(
                f"model {model.name} and its loss do not run on {num_rows(examples)} examples of the data: "
                f"{_said(error)}"
            ) from error
    if len(output) != num_rows(examples):
        raise ConfigError(
            f"model {model.name} returns {list(output.shape)} for {num_rows(examples)} examples: the first dimension "
            "has to count examples"
        )
    return output, float(loss) / (float(weight) or 1)


def rehearse(method: Method, state: ServerState, plan: RoundPlan, data: FederatedData, device: torch.device) -> None:
    """Do what the first round asks of clients, each kind of task once, on a few examples and copies of all tensors.

    Raises:
        ConfigError: a task fails: with the cause, and what it was.
    """
    residents, done = Residents(device), set[tuple[Step, ...]]()
    for task in plan.tasks:
        if task.steps in done:
            continue
        done.add(task.steps)
        examples = data.examples(task.client_id) if data.num_clients > task.client_id else data.validation
        examples = examples if num_rows(examples) else data.validation
        params = extract(state.params, plan.coords[task.client_id]) | dict(plan.own.get(task.client_id, {}))
        copies = {name: t.to(device, copy=True) for name, t in params.items()}
        try:
            run_task(method, data.problem, residents, _short(task), copies, _few(task, examples))
        except Exception as error:
            raise ConfigError(
                f"{plan.rungs[task.client_id]} of model {state.model.name} does not train on {NUM_EXAMPLES} examples "
                f"of the data: {_said(error)}"
            ) from error


def _short(task: ClientTask) -> ClientTask:
    return replace(task, steps=tuple(replace(step, work=replace(step.work, epochs=1)) for step in task.steps))


def _few(task: ClientTask, examples: Batch) -> Batch:
    count = min(num_rows(examples), NUM_EXAMPLES, *(step.work.batch_size for step in task.steps))
    return take(examples, torch.arange(count))


def _said(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return first if isinstance(error, ScaleFLError) else f"{type(error).__name__}: {first}"
