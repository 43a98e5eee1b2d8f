"""A worker process: takes one task after another from a socket and answers with updates. It holds no data."""

from __future__ import annotations

import logging
import signal
import socket
import sys
import traceback

import torch

from scalefl.client import Residents, run_task
from scalefl.engines.wire import Channel, Incoming, InMemory
from scalefl.params import Params
from scalefl.problem import Batch, Problem
from scalefl.types import ClientLoss, ClientTask, ClientUpdate, Method

_log = logging.getLogger("scalefl")


def serve(channel: Channel, threads: int) -> None:
    """Answer until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the engine's to handle
    torch.set_num_threads(threads)
    residents = Residents()
    while True:
        try:
            incoming = channel.receive()
        except EOFError:
            return
        _send(channel, _answer(incoming, residents))


def _answer(incoming: Incoming, residents: Residents) -> ClientUpdate | ClientLoss:
    method, problem, task = incoming.header
    examples, params = InMemory(), InMemory()
    try:
        incoming.receive(examples)
        incoming.receive(params)
    except MemoryError as error:
        return lost(task, error)
    finally:
        incoming.discard()
    return run_safely(method, problem, residents, task, params, examples)


def _send(channel: Channel, answer: ClientUpdate | ClientLoss) -> None:
    if isinstance(answer, ClientUpdate):
        channel.send((answer.client_id, answer.num_examples, answer.metrics, answer.receipt), answer.params)
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


def logged(loss: ClientLoss) -> ClientLoss:
    """The same loss, told to whoever debugs: the run goes on without it, and its journal has the cause only."""
    _log.debug("round %d: client %d was lost: %s\n%s", loss.round + 1, loss.client_id, loss.cause, loss.traceback)
    return loss


if __name__ == "__main__":
    serve(Channel(socket.socket(fileno=int(sys.argv[1]))), int(sys.argv[2]))
