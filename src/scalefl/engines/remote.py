"""The server's end of a distributed run: clients live on nodes that a `Link` reaches."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from scalefl.engines.codec import encode
from scalefl.engines.messages import (
    Failure,
    Lacking,
    Offer,
    Order,
    Parcel,
    Reply,
    Update,
    WhoAreYou,
    digest,
    pack,
    unpack,
)
from scalefl.engines.worker import logged
from scalefl.errors import EmptyCohort, check_range
from scalefl.params import Params
from scalefl.problem import Problem
from scalefl.types import ClientInfo, ClientLoss, ClientTask, ClientUpdate, Method, Population, Receipt

_log = logging.getLogger("scalefl")


class Answer(NamedTuple):
    """What came back for a message: a parcel, or why there is none."""

    message: str
    parcel: Parcel | None
    error: str = ""


class Link(Protocol):
    """Carries messages to nodes, and their answers back."""

    def nodes(self) -> list[int]:
        """The nodes that are there now."""
        ...

    def push(self, node: int, parcel: Parcel, *, round: int | None) -> str:
        """Send a message to a node, about a round if it asks for a task; returns the message's name."""
        ...

    def pull(self, messages: Iterable[str]) -> list[Answer]:
        """What has come back for these messages since it was asked last; may be nothing."""
        ...


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a server waits.

    Args:
        deadline_seconds: for a round's answers; clients that have not answered by then are lost.
        quorum: share of a round's clients after whose answers the others are not waited for.
        poll_seconds: between looks for answers.
        meeting_seconds: for what new nodes offer.
    """

    deadline_seconds: float = 3600.0
    quorum: float = 1.0
    poll_seconds: float = 0.2
    meeting_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("deadline_seconds", "quorum", "poll_seconds", "meeting_seconds"):
            check_range(name, getattr(self, name), 0.0)


@dataclass
class _Sent:
    """A task that is out."""

    task: ClientTask
    node: int
    params: Params
    digests: dict[str, bytes]
    content: bytes
    bytes_down: int = 0
    is_whole: bool = False


@dataclass
class _Peer:
    """What the server knows of a node: what it offers, and the digests of tensors that it should have."""

    client: ClientInfo
    has: dict[str, bytes] = field(default_factory=dict)


class RemoteEngine:
    """Clients on nodes, each of which says itself what it offers.

    Args:
        link: reaches the nodes.
        problem: what is learned; nodes whose data is about something else refuse.
        patience: how long to wait.
        in_flight: tasks that are out at once; None: all of a round. Each holds its tensors where it waits.
        is_private: whether nodes are asked for nothing that their data would tell.
    """

    def __init__(
        self,
        link: Link,
        problem: Problem,
        patience: Patience | None = None,
        *,
        in_flight: int | None = None,
        is_private: bool = False,
    ) -> None:
        self._link, self._problem = link, problem
        self._patience, self._in_flight = patience or Patience(), in_flight
        self._is_private = is_private
        self._peers: dict[int, _Peer] = {}

    def population(self) -> Population:
        """The clients that are there now: who has left is forgotten, who is new is asked.

        Raises:
            EmptyCohort: nobody is.
        """
        present = set(self._link.nodes())
        self._peers = {node: peer for node, peer in self._peers.items() if node in present}
        self._meet(sorted(present - self._peers.keys()))
        if not self._peers:
            raise EmptyCohort(f"none of {len(present)} connected nodes has said what it offers")
        return _Declared(tuple(sorted((peer.client for peer in self._peers.values()), key=lambda c: c.id)))

    def fit(self, method: Method, orders: Iterable[tuple[ClientTask, Params]]) -> Iterator[ClientUpdate | ClientLoss]:
        """Send the tasks out; updates come as nodes answer."""
        give_up = time.monotonic() + self._patience.deadline_seconds
        nodes = {peer.client.id: node for node, peer in self._peers.items()}
        queue = iter(orders)
        out: dict[str, _Sent] = {}
        num_updates, num_tasks, is_all = 0, 0, False
        while time.monotonic() < give_up:
            while not is_all and (self._in_flight is None or len(out) < self._in_flight):
                task, params = next(queue, (None, {}))
                is_all = task is None
                if task is None:
                    break
                num_tasks += 1
                if task.client_id not in nodes:
                    yield _loss(task, "its node has left")
                    continue
                sent = self._prepared(method, task, nodes[task.client_id], params)
                out[self._send(sent)] = sent
            if is_all and (not out or num_updates >= self._patience.quorum * num_tasks):
                break
            answers = self._link.pull(list(out))
            for answer in answers:
                sent = out.pop(answer.message)
                done = self._understood(sent, answer)
                if done is None:
                    out[self._send(sent)] = sent
                    continue
                num_updates += isinstance(done, ClientUpdate)
                yield done
            if not answers:
                time.sleep(self._patience.poll_seconds)
        why = "no answer by the deadline" if time.monotonic() >= give_up else "not waited for: enough others answered"
        for sent in out.values():
            yield _loss(sent.task, why)
        for task, _ in queue:
            yield _loss(task, why)

    def _meet(self, nodes: list[int]) -> None:
        """Ask new nodes what they offer; those that do not say so in time are asked again in the next round."""
        asked = {self._link.push(node, pack(WhoAreYou(self._is_private)), round=None): node for node in nodes}
        give_up = time.monotonic() + self._patience.meeting_seconds
        while asked and time.monotonic() < give_up:
            answers = self._link.pull(list(asked))
            for answer in answers:
                self._introduce(asked.pop(answer.message), answer)
            if not answers:
                time.sleep(self._patience.poll_seconds)
        for node in asked.values():
            _log.warning("node %d has not said what it offers", node)

    def _introduce(self, node: int, answer: Answer) -> None:
        try:
            offer = unpack(_parcel(answer), Offer)
        except ValueError as error:
            _log.warning("node %d is left out: %s", node, error)
            return
        if any(peer.client.id == offer.client.id for peer in self._peers.values()):
            _log.warning("node %d is left out: another one is client %d already", node, offer.client.id)
            return
        self._peers[node] = _Peer(offer.client)

    def _prepared(self, method: Method, task: ClientTask, node: int, params: Params) -> _Sent:
        objectives = tuple(method.objective(step) for step in task.steps)
        content = encode((task, objectives, self._problem))
        return _Sent(task, node, params, {name: digest(t) for name, t in params.items()}, content)

    def _send(self, sent: _Sent) -> str:
        """Send a task with the tensors that its node lacks; returns the message's name."""
        has = {} if sent.is_whole else self._peers[sent.node].has
        tensors = {name: t for name, t in sent.params.items() if has.get(name) != sent.digests[name]}
        parcel = pack(Order(sent.content, sent.digests), tensors)
        sent.bytes_down += parcel.num_bytes
        return self._link.push(sent.node, parcel, round=sent.task.round)

    def _understood(self, sent: _Sent, answer: Answer) -> ClientUpdate | ClientLoss | None:
        """What a node has made of its task; None where it needs to be sent all tensors."""
        task, peer = sent.task, self._peers[sent.node]
        try:
            parcel = _parcel(answer)
            header: Reply = unpack(parcel, Reply)
        except ValueError as error:
            return _loss(task, str(error), Receipt(sent.bytes_down))
        receipt = Receipt(sent.bytes_down, parcel.num_bytes)
        if isinstance(header, Lacking) and not sent.is_whole:
            sent.is_whole, peer.has = True, {}
            return None
        if isinstance(header, Failure):
            receipt = Receipt(sent.bytes_down, parcel.num_bytes, peak_bytes=header.peak_bytes)
            return _loss(task, header.cause, receipt, out_of_memory=header.out_of_memory)
        if not isinstance(header, Update) or (header.client_id, header.round) != (task.client_id, task.round):
            return _loss(task, f"it answered something else: {type(header).__name__}", receipt)
        peer.has |= {name: found for name, found in sent.digests.items() if name not in task.moving}
        receipt = Receipt(sent.bytes_down, parcel.num_bytes, header.seconds, header.peak_bytes)
        return ClientUpdate(task.client_id, parcel.tensors, header.num_examples, header.metrics, receipt)


@dataclass(frozen=True)
class _Declared:
    """The clients as their nodes describe them."""

    clients: tuple[ClientInfo, ...]

    @property
    def smallest_memory_bytes(self) -> int:
        return min(client.memory_bytes for client in self.clients)

    @property
    def largest_memory_bytes(self) -> int:
        return max(client.memory_bytes for client in self.clients)

    def __len__(self) -> int:
        return len(self.clients)

    def __getitem__(self, index: int) -> ClientInfo:
        return self.clients[index]


def _parcel(answer: Answer) -> Parcel:
    if answer.parcel is None:
        raise ValueError(answer.error)
    return answer.parcel


def _loss(task: ClientTask, cause: str, receipt: Receipt | None = None, *, out_of_memory: bool = False) -> ClientLoss:
    return logged(ClientLoss(task.client_id, task.round, cause, receipt or Receipt(), out_of_memory=out_of_memory))
