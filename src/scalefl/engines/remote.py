"""The server's end of a distributed run: clients live on nodes that a `Link` reaches."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from scalefl.data.population import DeclaredPopulation
from scalefl.engines.codec import encode
from scalefl.engines.messages import (
    Failure,
    Lacking,
    Offer,
    Order,
    Parcel,
    Precision,
    Reply,
    Update,
    WhoAreYou,
    digest,
    expanded,
    halved,
    pack,
    unpack,
)
from scalefl.engines.worker import logged
from scalefl.errors import EmptyCohort, check_range
from scalefl.params import Params
from scalefl.problem import Problem
from scalefl.types import ClientInfo, ClientLoss, ClientTask, ClientUpdate, Method, Receipt

_log = logging.getLogger("scalefl")

_LOOK_SECONDS = 1.0
"""Between looks for nodes that are missing."""


class Answer(NamedTuple):
    """What came back for a message: a parcel, or why there is none, and whether nobody may have done what it asks."""

    message: str
    parcel: Parcel | None
    error: str = ""
    is_undone: bool = False


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
    """How long a server waits for its nodes.

    Args:
        deadline_seconds: for a round's answers; clients that have not answered by then are lost.
        quorum: share of a round's clients after whose answers the others are not waited for.
        min_clients: so many have to be there before a round starts.
        absence_seconds: for clients to be there, and for the node of a task to come back.
        meeting_seconds: for what new nodes offer.
        fresh_seconds: a node that has said nothing for so long is asked again what it offers.
        doubt_seconds: a node that is at a task for so long is asked whether it still is.
        poll_seconds: between looks for answers; up to five times as long where none come.
    """

    deadline_seconds: float = 3600.0
    quorum: float = 1.0
    min_clients: int = 1
    absence_seconds: float = 300.0
    meeting_seconds: float = 60.0
    fresh_seconds: float = 300.0
    doubt_seconds: float = 60.0
    poll_seconds: float = 0.2

    def __post_init__(self) -> None:
        for name in ("deadline", "absence", "meeting", "fresh", "doubt", "poll"):
            check_range(f"{name}_seconds", getattr(self, f"{name}_seconds"), 0.0)
        check_range("quorum", self.quorum, 0.0, 1.0)
        check_range("min_clients", self.min_clients, 1)


class _Crossing(NamedTuple):
    """A tensor as it travels, what to multiply it with where that is in half precision, and its digest."""

    tensor: Tensor
    scale: float | None
    digest: bytes


@dataclass
class _Sent:
    """A task that is out, last doubted at some time; or one whose first try came to trouble at some time."""

    task: ClientTask
    node: int
    params: Params
    crossing: Mapping[str, _Crossing]
    content: bytes
    bytes_down: int = 0
    is_whole: bool = False
    trouble: str = ""
    since: float = 0.0
    doubted: float = 0.0

    @property
    def digests(self) -> dict[str, bytes]:
        """Of all its tensors, as they travel."""
        return {name: found.digest for name, found in self.crossing.items()}


@dataclass
class _Peer:
    """What the server knows of a node: what it offers and when it said so, and the digests that it should have."""

    client: ClientInfo
    heard: float
    has: dict[str, bytes] = field(default_factory=dict)


class RemoteEngine:
    """Clients on nodes, each of which says itself what it offers.

    Args:
        link: reaches the nodes.
        problem: what is learned; nodes whose data is about something else refuse.
        patience: how long to wait.
        in_flight: tasks that are out at once; None: all of a round. Each holds its tensors where it waits.
        precision: of what travels.
        is_private: whether nodes are asked for nothing that their data would tell.
    """

    def __init__(
        self,
        link: Link,
        problem: Problem,
        patience: Patience | None = None,
        *,
        in_flight: int | None = None,
        precision: Precision = "exact",
        is_private: bool = False,
    ) -> None:
        self._link, self._problem, self._is_private = link, problem, is_private
        self._patience, self._in_flight, self._precision = patience or Patience(), in_flight, precision
        self._peers: dict[int, _Peer] = {}
        self._present: set[int] = set()
        self._asked: dict[str, tuple[int, float]] = {}
        self._mute: set[int] = set()

    def population(self) -> DeclaredPopulation:
        """The clients that are there now, with what they last said of themselves.

        Raises:
            EmptyCohort: there are fewer than `Patience.min_clients`, and no more have come in time.
        """
        give_up = time.monotonic() + self._patience.absence_seconds
        while True:
            self._look_around()
            clients = [self._peers[node].client for node in self._present if node in self._peers]
            if len(clients) >= self._patience.min_clients:
                return DeclaredPopulation(tuple(sorted(clients, key=lambda client: client.id)))
            if time.monotonic() >= give_up:
                raise EmptyCohort(
                    f"{len(clients)} of {len(self._present)} connected nodes have said what they offer; "
                    f"a round needs {self._patience.min_clients}"
                )
            time.sleep(min(_LOOK_SECONDS, self._patience.absence_seconds))

    def fit(self, method: Method, orders: Iterable[tuple[ClientTask, Params]]) -> Iterator[ClientUpdate | ClientLoss]:
        """Send the tasks out; updates come as nodes answer.

        What a node could not do because it went away, or because its process died, is sent to it again when it is
        back. A node does one message after another: if it answers a later question, and not its task, it has lost that.
        """
        round = _Round(method, time.monotonic() + self._patience.deadline_seconds, self._precision)
        nodes = {peer.client.id: node for node, peer in self._peers.items() if node in self._present}
        queue, pause = iter(orders), self._patience.poll_seconds / 2
        while not round.is_over:
            while not round.is_all and (self._in_flight is None or len(round.out) < self._in_flight):
                task, params = next(queue, (None, {}))
                if task is None:
                    round.is_all = True
                elif task.client_id not in nodes:
                    round.num_tasks += 1
                    yield _loss(task, "its node has left")
                else:
                    round.num_tasks += 1
                    self._send(round, self._prepared(round, task, nodes[task.client_id], params))
            if round.is_all and round.has_enough(self._patience.quorum):
                break
            answers = self._link.pull([*round.out, *round.questions])
            for answer in sorted(answers, key=lambda answer: answer.message in round.questions):
                yield from self._received(round, answer)
            yield from self._looked_after(round)
            pause = self._patience.poll_seconds if answers else min(2 * pause, 5 * self._patience.poll_seconds)
            if not answers:
                time.sleep(pause)
        why = "no answer by the deadline" if round.is_over else "not waited for: enough others answered"
        for sent in [*round.out.values(), *round.away]:
            yield _loss(sent.task, sent.trouble or why, Receipt(sent.bytes_down))
        for task, _ in queue:
            yield _loss(task, why)

    def _look_around(self) -> None:
        """See who is there; ask nodes that are new, or back, what they offer, and others that were not heard lately.

        Those that are new are waited for, unless they have been in vain before.
        """
        self._present, now = set(self._link.nodes()), time.monotonic()
        for node in self._peers.keys() - self._present:
            self._peers[node].heard = -math.inf
        heard = {node: self._peers[node].heard if node in self._peers else -math.inf for node in self._present}
        asked = {node for node, _ in self._asked.values()}
        for node in sorted(self._present - asked):
            if heard[node] < now - self._patience.fresh_seconds:
                self._asked[self._ask(node)] = node, now
        awaited = {node for node in self._present - self._mute if heard[node] == -math.inf}
        self._listen()
        while any(node in awaited for node, _ in self._asked.values()):
            if time.monotonic() >= now + self._patience.meeting_seconds:
                break
            time.sleep(self._patience.poll_seconds)
            self._listen()
        for name, (node, when) in list(self._asked.items()):
            if time.monotonic() >= when + self._patience.meeting_seconds:
                del self._asked[name]
                self._mute.add(node)
                if node in self._present:
                    _log.warning("node %d has not said what it offers", node)

    def _ask(self, node: int) -> str:
        """Ask a node what it offers; the question's name."""
        return self._link.push(node, pack(WhoAreYou(self._is_private)), round=None)

    def _listen(self) -> None:
        while self._asked and (answers := self._link.pull(list(self._asked))):
            for answer in answers:
                node, _ = self._asked.pop(answer.message)
                self._introduce(node, answer)

    def _introduce(self, node: int, answer: Answer) -> None:
        try:
            offer = unpack(_parcel(answer), Offer | Failure)
            if isinstance(offer, Failure):
                raise ValueError(offer.cause)
        except ValueError as error:
            _log.warning("node %d is left out: %s", node, error)
            self._mute.add(node)
            return
        others = (self._peers[n].client.id for n in self._present if n in self._peers and n != node)
        if offer.client.id in others:
            _log.warning("node %d is left out: another one is client %d already", node, offer.client.id)
            self._peers.pop(node, None)
            self._mute.add(node)
            return
        self._hear(node, offer.client)

    def _hear(self, node: int, client: ClientInfo) -> None:
        """Note what a node says of itself."""
        self._mute.discard(node)
        peer = self._peers.setdefault(node, _Peer(client, 0.0))
        peer.client, peer.heard = client, time.monotonic()

    def _prepared(self, round: _Round, task: ClientTask, node: int, params: Params) -> _Sent:
        objectives = tuple(round.method.objective(step) for step in task.steps)
        content = encode((task, objectives, self._problem))
        return _Sent(task, node, params, {name: round.crossing(t) for name, t in params.items()}, content)

    def _send(self, round: _Round, sent: _Sent) -> None:
        """Send a task with the tensors that its node lacks."""
        has = {} if sent.is_whole else self._peers[sent.node].has
        tensors = {name: found.tensor for name, found in sent.crossing.items() if has.get(name) != found.digest}
        scales = {name: found.scale for name, found in sent.crossing.items() if found.scale is not None}
        parcel = pack(Order(sent.content, sent.digests, scales, self._precision), tensors)
        sent.bytes_down += parcel.num_bytes
        sent.doubted = time.monotonic()
        round.out[self._link.push(sent.node, parcel, round=sent.task.round)] = sent

    def _received(self, round: _Round, answer: Answer) -> Iterator[ClientUpdate | ClientLoss]:
        if answer.message in round.questions:
            doubted = round.questions.pop(answer.message)
            if answer.parcel is not None and doubted in round.out:
                self._set_aside(round, doubted, "its node no longer knows of the task")
            return
        sent = round.out[answer.message]
        is_young = not sent.trouble or time.monotonic() < sent.since + self._patience.absence_seconds
        if answer.is_undone and is_young:
            self._set_aside(round, answer.message, answer.error)
            return
        del round.out[answer.message]
        done = self._understood(sent, answer)
        if done is None:
            self._send(round, sent)
            return
        round.num_updates += isinstance(done, ClientUpdate)
        yield done

    def _set_aside(self, round: _Round, message: str, trouble: str) -> None:
        """Take a task that came to nothing for one that is to be sent again."""
        sent = round.out.pop(message)
        if not sent.trouble:
            sent.trouble, sent.since = trouble, time.monotonic()
        round.away.append(sent)

    def _looked_after(self, round: _Round) -> Iterator[ClientLoss]:
        """Ask nodes that take long; send tasks again whose nodes are back; give up those that are away for too long."""
        now = time.monotonic()
        if now < round.next_look:
            return
        round.next_look = now + _LOOK_SECONDS
        for name, sent in round.out.items():
            if now >= sent.doubted + self._patience.doubt_seconds:
                sent.doubted = now
                round.questions[self._ask(sent.node)] = name
        if not round.away:
            return
        present = set(self._link.nodes())
        away, round.away = round.away, []
        for sent in away:
            if sent.node in present:
                self._send(round, sent)
            elif now < sent.since + self._patience.absence_seconds:
                round.away.append(sent)
            else:
                yield _loss(sent.task, sent.trouble, Receipt(sent.bytes_down))

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
        if isinstance(header, Update | Failure) and header.client is not None and header.client.id == peer.client.id:
            self._hear(sent.node, header.client)
        if isinstance(header, Failure):
            receipt = Receipt(sent.bytes_down, parcel.num_bytes, peak_bytes=header.peak_bytes)
            return _loss(task, header.cause, receipt, out_of_memory=header.out_of_memory)
        if not isinstance(header, Update) or (header.client_id, header.round) != (task.client_id, task.round):
            return _loss(task, f"it answered something else: {type(header).__name__}", receipt)
        try:
            params = expanded(parcel.tensors, header.scales, sent.params)
        except ValueError as error:
            return _loss(task, str(error), receipt)
        peer.has |= {name: found for name, found in sent.digests.items() if name not in task.moving}
        receipt = Receipt(sent.bytes_down, parcel.num_bytes, header.seconds, header.peak_bytes)
        return ClientUpdate(task.client_id, params, header.num_examples, header.metrics, receipt)


class _Round:
    """What is out in a round, and what has come."""

    def __init__(self, method: Method, give_up: float, precision: Precision) -> None:
        self.method, self._give_up, self._precision = method, give_up, precision
        self.next_look = 0.0
        self.out: dict[str, _Sent] = {}
        self.away: list[_Sent] = []
        self.questions: dict[str, str] = {}
        self.num_tasks = self.num_updates = 0
        self.is_all = False
        self._known = WeakTensorKeyDictionary()  # whose values must not hold the tensor itself

    @property
    def is_over(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() >= self._give_up

    def has_enough(self, quorum: float) -> bool:
        """Whether nobody is waited for any more."""
        return not (self.out or self.away) or self.num_updates >= max(1.0, quorum * self.num_tasks)

    def crossing(self, tensor: Tensor) -> _Crossing:
        """How a tensor travels that many clients may be sent: worked out once, and not kept longer than the tensor.

        Norms, biases and statistics stay exact: they are few, and a small one beside a large one would lose its digits.
        """
        if tensor not in self._known:
            is_exact = self._precision == "exact" or tensor.ndim < 2
            crossing, scale = (tensor, None) if is_exact else halved(tensor)
            half = None if scale is None else crossing
            self._known[tensor] = half, scale, digest(crossing)
        half, scale, found = self._known[tensor]
        return _Crossing(tensor if half is None else half, scale, found)


def _parcel(answer: Answer) -> Parcel:
    if answer.parcel is None:
        raise ValueError(answer.error)
    return answer.parcel


def _loss(task: ClientTask, cause: str, receipt: Receipt | None = None, *, out_of_memory: bool = False) -> ClientLoss:
    return logged(ClientLoss(task.client_id, task.round, cause, receipt or Receipt(), out_of_memory=out_of_memory))
