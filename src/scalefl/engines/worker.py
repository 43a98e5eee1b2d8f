"""A worker process: takes one task after another from a socket and answers with updates. It holds no data."""

from __future__ import annotations

import contextlib
import gc
import logging
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from scalefl.aggregate import FINE_LIMIT, add_fine, check
from scalefl.client import Residents, run_task
from scalefl.engines.gauge import Gauge, NoGauge, cap_refusal, device_of, gauge_of
from scalefl.engines.order import Assignment, Cap, Order, key_of
from scalefl.engines.shared import Reader
from scalefl.engines.spool import MappedExamples, TaskParams
from scalefl.engines.wire import Channel, Incoming
from scalefl.errors import BadUpdate, FrozenTensorWritten
from scalefl.models.skeleton import tensors
from scalefl.models.spec import ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.params import CPU, Params, moved, real
from scalefl.parts import Part
from scalefl.problem import Batch, Classification, Column, Problem
from scalefl.types import Adding, ClientLoss, ClientTask, ClientUpdate, LocalWork, Method, Objective, Receipt, Step
from scalefl.units import mib
from scalefl.vectorized import run_vectorized

_log = logging.getLogger("scalefl")


def serve(channel: Channel, threads: int, device: torch.device, cap: Cap) -> None:
    """Say why memory can't be capped, where it is to be; then answer until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the engine's to handle
    torch.set_num_threads(threads)
    if cap != "none":
        warm_up(threads, device)
    channel.send(cap_refusal(device) if cap == "hard" else None)
    residents, reader = Residents(device, measured=cap != "none"), Reader()
    gauge = NoGauge() if cap == "none" else gauge_of(device)
    while True:
        try:
            incoming = channel.receive()
        except EOFError:
            return
        if incoming.header.assignments[0].brief is not None:
            channel.send([_told(answer) for answer in _answers_in_place(incoming.header, residents, reader)])
            continue
        with contextlib.ExitStack() as files:
            answer = _answer(incoming, residents, gauge, files)
            channel.send([_told(answer)], *([answer.params] if isinstance(answer, ClientUpdate) else []))


_LINEAR = (
    (256, 256, 256),
    (512, 192, 768),
    (1040, 768, 192),
    (2048, 1024, 1024),
    (32, 4096, 512),
    (512, 4096, 1024),
    (64, 4096, 4096),
)
"""Rows, inputs and outputs of linear layers after which MKL, found by trying, has all the buffers that it keeps."""


def warm_up(threads: int, device: torch.device = CPU) -> None:
    """Do a tiny task as any other: what torch loads and keeps in a first step comes before budgets are counted."""
    torch.set_num_threads(threads)
    for rows, inputs, outputs in _LINEAR:
        torch.nn.functional.linear(
            torch.ones(rows, inputs, requires_grad=True), torch.ones(outputs, inputs, requires_grad=True)
        ).sum().backward()  # type: ignore[no-untyped-call]
    problem = Classification(2, (Column("x", (3, 16, 16), "float32"),))
    model = ModelSpec.of("scalefl.models.resnet:resnet10", num_classes=2, width=0.0625)
    params = {name: t.clone() for name, t in moved(tensors(model.build(0)), device).items()}
    part = Part(model, stop=None, output=None, feature=None, source=None, active=("",), held=tuple(params))
    trained = frozenset(name for name, t in params.items() if name.endswith(("weight", "bias")))
    task = ClientTask(0, 0, (Step(part, trained, trained, (), LocalWork(batch_size=64)),), 0)
    run_task(cast(Method, _Rehearsal()), problem, Residents(device), task, params, problem.example(64))


class _Rehearsal:
    """As much of a method as a client asks for."""

    def objective(self, step: Step) -> Objective:
        return TaskLoss()


def _answers_in_place(order: Order, residents: Residents, reader: Reader) -> list[ClientUpdate | ClientLoss]:
    """What comes of tasks whose tensors lie in shared memory; so does what they upload."""
    tables = [_Table(assignment, reader) for assignment in order.assignments]
    tasks = [assignment.task for assignment in order.assignments]
    answers: Sequence[ClientUpdate | ClientLoss] | None = None
    if len(tables) > 1:
        sent, examples = [table.params for table in tables], [table.examples for table in tables]
        answers = at_once(*order.lesson, residents, tasks, sent, examples)
    if answers is None:
        answers = [_in_place(order, table, residents) for table in tables]
    return [_done(answer, table, reader) for answer, table in zip(answers, tables, strict=True)]


class _Table:
    """What one task works on in shared memory."""

    def __init__(self, assignment: Assignment, reader: Reader) -> None:
        assert assignment.brief is not None
        self.task, self.brief, self.adding = assignment
        self.params, self.own = reader.tensors(assignment.brief.params), reader.tensors(assignment.brief.own)
        self.examples = {name: reader.tensor(sheet) for name, sheet in assignment.brief.examples.items()}


def _in_place(order: Order, table: _Table, residents: Residents) -> ClientUpdate | ClientLoss:
    for name, tensor in table.own.items():
        tensor.copy_(table.params[name])
    laid = moved({**table.params, **table.own}, residents.device)
    return run_safely(*order.lesson, residents, table.task, laid, table.examples)


def _done(answer: ClientUpdate | ClientLoss, table: _Table, reader: Reader) -> ClientUpdate | ClientLoss:
    """The answer, whose tensors have been added up, or lie where the server reads them."""
    if isinstance(answer, ClientLoss):
        return answer
    for name, tensor in answer.params.items():
        if tensor is not table.own[name]:  # it has been on another device, or trained with others'
            table.own[name].copy_(tensor)
    if table.adding is None:
        return replace(answer, params={})
    return _added(replace(answer, params=table.own), table, table.adding, reader)


def _added(update: ClientUpdate, table: _Table, adding: Adding, reader: Reader) -> ClientUpdate | ClientLoss:
    """The update without its tensors: they have been added up, or are large, and left to the server to add."""
    assert table.brief is not None and table.brief.steps is not None
    try:
        sizes = check(table.task, update, table.params, adding.num_examples)
    except BadUpdate as error:
        return logged(ClientLoss(update.client_id, table.task.round, f"{error.name}: {error.why}", update.receipt))
    if max(sizes.values()) > FINE_LIMIT:
        return replace(update, params={})
    weight = update.num_examples if adding.weight is None else adding.weight
    sums, steps = reader.tensors(table.brief.sums), reader.tensor(table.brief.steps)
    steps.add_(1)
    add_fine([*sums.values()], [real(update.params[name]) for name in sums], weight, adding.scale)
    steps.add_(1)
    return replace(update, params={}, is_added=True)


def _answer(
    incoming: Incoming, residents: Residents, gauge: Gauge, files: contextlib.ExitStack
) -> ClientUpdate | ClientLoss:
    """What comes of a task; what it uploads lies in `files` as long as they are open."""
    (method, problem), cap_bytes, ((task, *_),) = incoming.header
    try:
        try:
            # Examples and the code of the model are what a client has anyway: the task is what comes on top.
            for step in task.steps:
                residents[step.part.model]
            examples = MappedExamples()
            incoming.receive(examples)
            gc.collect()
            gauge.start()
            params = files.enter_context(contextlib.closing(TaskParams(task, residents.device)))
            with gauge.limited(cap_bytes):
                incoming.receive(params)
                update = run_task(method, problem, residents, task, params, examples)
        finally:
            incoming.discard()
    except Exception as error:
        receipt = Receipt(peak_bytes=gauge.added_peak_bytes())
        if cap_bytes is not None and (isinstance(error, MemoryError) or says_out_of_memory(str(error))):
            return cap_hit(task, cap_bytes, receipt, "".join(traceback.format_exception(error)))
        return replace(lost(task, error), receipt=receipt)
    receipt = replace(update.receipt, peak_bytes=gauge.added_peak_bytes())
    if cap_bytes is not None and (receipt.peak_bytes or 0) > cap_bytes:
        return cap_hit(task, cap_bytes, receipt)  # by shared memory, which no limit of the system counts
    return replace(update, receipt=receipt)


def _told(answer: ClientUpdate | ClientLoss) -> Any:
    """What is told of a task beside its tensors."""
    if isinstance(answer, ClientLoss):
        return answer
    return answer.client_id, answer.num_examples, answer.metrics, answer.receipt, answer.is_added


def at_once(
    method: Method,
    problem: Problem,
    residents: Residents,
    tasks: Sequence[ClientTask],
    params: Sequence[Params],
    examples: Sequence[Batch],
) -> list[ClientUpdate] | None:
    """`run_vectorized`; None where that fails, and the clients have to be trained one by one."""
    try:
        return run_vectorized(method, problem, residents, tasks, params, examples)
    except Exception as error:
        _log.debug("%d clients can't be trained at once: %s", len(tasks), error)
        return None


def run_safely(
    method: Method, problem: Problem, residents: Residents, task: ClientTask, params: Params, examples: Batch
) -> ClientUpdate | ClientLoss:
    """`run_task`, with any failure of the client turned into a record of it."""
    try:
        return run_task(method, problem, residents, task, params, examples)
    except Exception as error:
        return lost(task, error)


def lost(task: ClientTask, error: Exception) -> ClientLoss:
    """The record of a client that an exception has cost."""
    lines = str(error).strip().splitlines() or [""]
    cause, trace = f"{type(error).__name__}: {lines[0]}", "".join(traceback.format_exception(error))
    has_spoilt = isinstance(error, FrozenTensorWritten)
    return logged(ClientLoss(task.client_id, task.round, cause, traceback=trace, has_spoilt=has_spoilt))


def cap_hit(task: ClientTask, cap_bytes: int, receipt: Receipt, trace: str = "") -> ClientLoss:
    """The record of a client that asked for more memory than its budget."""
    cause = f"memory cap hit: budget {mib(cap_bytes)} MiB"
    return logged(ClientLoss(task.client_id, task.round, cause, receipt, trace, out_of_memory=True))


_OUT_OF_MEMORY = ("can't allocate memory", "Cannot allocate memory", "not enough memory", "out of memory", "bad_alloc")
_ONEDNN_OUT_OF_MEMORY = ("could not create a", "could not execute a primitive")


def says_out_of_memory(text: str) -> bool:
    """Whether an error's text, or a process's last words, mean that it was refused memory: under a cap, its budget."""
    return any(words in text for words in (*_OUT_OF_MEMORY, *_ONEDNN_OUT_OF_MEMORY))


def logged(loss: ClientLoss) -> ClientLoss:
    """The same loss, told to whoever debugs: the run goes on without it, and its journal has the cause only."""
    _log.debug("round %d: client %d was lost: %s\n%s", loss.round + 1, loss.client_id, loss.cause, loss.traceback)
    return loss


def main(connection: int, threads: str, cap: str, device: str) -> None:
    """A worker's process, from the descriptor of its connection on."""
    del sys.argv[1:]  # a user's module may look for arguments of its own there
    serve(Channel(socket.socket(fileno=connection), key_of), int(threads), device_of(device), cast(Cap, cap))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
