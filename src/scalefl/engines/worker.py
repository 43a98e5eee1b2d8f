"""A worker process: takes one task after another from a socket and answers with updates. It holds no data."""

from __future__ import annotations

import contextlib
import gc
import logging
import signal
import socket
import sys
import traceback
from dataclasses import replace
from typing import cast

import torch

from scalefl.aggregate import FINE_LIMIT, add_fine, check
from scalefl.client import Residents, run_task
from scalefl.engines.gauge import Gauge, NoGauge, cap_refusal, device_of, gauge_of
from scalefl.engines.order import Cap, Order
from scalefl.engines.shared import Brief, Reader
from scalefl.engines.spool import MappedExamples, TaskParams
from scalefl.engines.wire import Channel, Incoming
from scalefl.errors import BadUpdate
from scalefl.models.skeleton import tensors
from scalefl.models.spec import ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.params import CPU, Params, moved
from scalefl.parts import Part
from scalefl.problem import Batch, Classification, Column, Problem
from scalefl.types import Adding, ClientLoss, ClientTask, ClientUpdate, LocalWork, Method, Objective, Receipt, Step
from scalefl.units import mib

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
        brief = incoming.header.brief
        if brief is not None:
            _send(channel, _answer_in_place(incoming.header, brief, residents, reader))
            continue
        with contextlib.ExitStack() as files:
            _send(channel, _answer(incoming, residents, gauge, files))


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


def _answer_in_place(order: Order, brief: Brief, residents: Residents, reader: Reader) -> ClientUpdate | ClientLoss:
    """What comes of a task whose tensors lie in shared memory; so does what it uploads."""
    own = reader.read(brief.own)
    params = reader.read(brief.params)
    for name, tensor in own.items():
        tensor.copy_(params[name])
    laid = moved({**params, **own}, residents.device)
    examples = reader.read(brief.examples)
    answer = run_safely(order.method, order.problem, residents, order.task, laid, examples)
    if isinstance(answer, ClientLoss):
        return answer
    for name, tensor in answer.params.items():
        if tensor is not own[name]:  # it has been on another device
            own[name].copy_(tensor)
    if order.adding is None:
        return replace(answer, params={})
    return _added(replace(answer, params=own), order, order.adding, brief, params, reader)


def _added(
    update: ClientUpdate, order: Order, adding: Adding, brief: Brief, sent: Params, reader: Reader
) -> ClientUpdate | ClientLoss:
    """The update without its tensors: they have been added up, or are large, and left to the server to add."""
    assert brief.steps is not None
    try:
        sizes = check(order.task, update, sent, adding.num_examples)
    except BadUpdate as error:
        return logged(ClientLoss(update.client_id, order.task.round, f"{error.name}: {error.why}", update.receipt))
    if max(sizes.values()) > FINE_LIMIT:
        return replace(update, params={})
    weight = update.num_examples if adding.weight is None else adding.weight
    sums, steps = reader.read(brief.sums), reader.read({"": brief.steps})[""]
    steps.add_(1)
    for name, total in sums.items():
        add_fine(total, update.params[name], weight, adding.scale)
    steps.add_(1)
    return replace(update, params={}, is_added=True)


def _answer(
    incoming: Incoming, residents: Residents, gauge: Gauge, files: contextlib.ExitStack
) -> ClientUpdate | ClientLoss:
    """What comes of a task; what it uploads lies in `files` as long as they are open."""
    method, problem, task, cap_bytes, *_ = incoming.header
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


def _send(channel: Channel, answer: ClientUpdate | ClientLoss) -> None:
    if isinstance(answer, ClientUpdate):
        about = (answer.client_id, answer.num_examples, answer.metrics, answer.receipt, answer.is_added)
        channel.send(about, answer.params)
    else:
        channel.send(answer)


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
    return logged(ClientLoss(task.client_id, task.round, cause, traceback=trace))


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


if __name__ == "__main__":
    _descriptor, _threads, _cap, _device = sys.argv[1:]
    serve(Channel(socket.socket(fileno=int(_descriptor))), int(_threads), device_of(_device), cast(Cap, _cap))
