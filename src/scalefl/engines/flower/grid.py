"""A link over Flower's Grid, and a Grid whose nodes are in this process."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import msgspec
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from scalefl.engines.codec import Allowed
from scalefl.engines.local import LocalEngine
from scalefl.engines.messages import Parcel, Precision, tensor_of
from scalefl.engines.node import Node, TensorCache
from scalefl.engines.remote import Answer, Patience, RemoteEngine
from scalefl.errors import RoundFailed
from scalefl.params import bytes_of
from scalefl.problem import Problem

TASK, QUERY = "train.task", "query.offer"
FIRST_NODE = SUPERLINK_NODE_ID + 1
"""The first of the nodes in this process; others count on from it."""
_HEADER, _TENSORS = "header", "tensors"
_RAW = "raw"
"""How tensors are written: their bytes, as they lie in memory."""


class _Head(msgspec.Struct, array_like=True, frozen=True):
    """What is said of a tensor whose bytes are among those of others."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def to_records(parcel: Parcel) -> RecordDict:
    """A message as Flower carries it: all tensors as one array, since each array is a request of its own."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in parcel.tensors.items()}
    heads = [_Head(name, str(t.dtype).removeprefix("torch."), tuple(t.shape), t.nbytes) for name, t in tensors.items()]
    content = b"".join(map(bytes_of, tensors.values()))
    header = ConfigRecord({"content": parcel.header, "heads": msgspec.msgpack.encode(heads)})
    array = Array("uint8", (len(content),), _RAW, content)
    return RecordDict({_HEADER: header, _TENSORS: ArrayRecord({_TENSORS: array} if content else {})})


def from_records(records: RecordDict) -> Parcel:
    """A message that Flower has carried; its tensors have memory of their own.

    Raises:
        ValueError: it is none of ours.
    """
    header = records.config_records.get(_HEADER, ConfigRecord())
    content, heads = header.get("content"), header.get("heads")
    if not isinstance(content, bytes) or not isinstance(heads, bytes):
        raise ValueError("a message without a header")
    arrays = records.array_records.get(_TENSORS, ArrayRecord())
    left = memoryview(arrays[_TENSORS].data if _TENSORS in arrays else b"")
    tensors = {}
    try:
        for head in msgspec.msgpack.decode(heads, type=list[_Head]):
            tensors[head.name] = tensor_of(head.dtype, head.shape, left[: head.num_bytes])
            left = left[head.num_bytes :]
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from error
    if left:
        raise ValueError(f"{len(left)} bytes that belong to no tensor")
    return Parcel(content, tensors)


class GridLink:
    """Reaches nodes over a Grid."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def nodes(self) -> list[int]:
        """See `Link`."""
        return list(self._grid.get_node_ids())

    def push(self, node: int, parcel: Parcel, *, round: int | None) -> str:
        """See `Link`."""
        kind, group = (QUERY, "") if round is None else (TASK, str(round))
        names = list(self._grid.push_messages([Message(to_records(parcel), node, kind, group_id=group)]))
        if len(names) != 1 or not names[0]:
            raise RoundFailed(f"Flower did not take a message of {parcel.num_bytes} bytes for node {node}")
        return str(names[0])

    def pull(self, messages: Iterable[str]) -> list[Answer]:
        """See `Link`."""
        return [_answer(message) for message in self._grid.pull_messages(list(messages))]


def _answer(message: Message) -> Answer:
    name = message.metadata.reply_to_message_id
    if message.has_error():
        return Answer(name, None, f"Flower's error {message.error.code}: {message.error.reason}", is_undone=True)
    try:
        return Answer(name, from_records(message.content))
    except ValueError as error:
        return Answer(name, None, f"unreadable: {error}")


def client_app(node_of: Callable[[Context], Node]) -> ClientApp:
    """An app that passes messages on to the node of its context."""
    app = ClientApp()

    @app.train(TASK.partition(".")[2])
    @app.query(QUERY.partition(".")[2])
    def answer(message: Message, context: Context) -> Message:
        said = node_of(context).answer(from_records(message.content))
        return Message(to_records(said), reply_to=message)

    return app


class InProcessGrid(Grid):
    """Nodes in this process: a message is handled when its answer is asked for, one at a time.

    Args:
        app: what nodes run.
        contexts: node -> what its app is told of it.
    """

    def __init__(self, app: ClientApp, contexts: Mapping[int, Context]) -> None:
        self._app, self._contexts = app, contexts
        self._waiting: dict[str, Message] = {}
        self._run: Run | None = None
        # What Flower's own server process is told when it starts; messages cannot be made without.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SUPERLINK_NODE_ID

    def set_run(self, run: Run) -> None:
        """See `Grid`."""
        self._run = run

    @property
    def run(self) -> Run:
        """See `Grid`."""
        if self._run is None:
            raise RuntimeError("there is no run: this grid needs none")
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """See `Grid`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """See `Grid`."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See `Grid`."""
        names = []
        for message in messages:
            names.append(uuid4().hex)
            message.metadata.__dict__["_message_id"] = names[-1]  # as SuperLinks name them
            self._waiting[names[-1]] = message
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """See `Grid`: at most one answer."""
        for name in message_ids:
            if name in self._waiting:
                message = self._waiting.pop(name)
                return [self._app(message, self._contexts[message.metadata.dst_node_id])]
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """See `Grid`."""
        names = list(self.push_messages(messages))
        return [answer for name in names for answer in self.pull_messages([name])]


@contextlib.contextmanager
def in_process(
    engine: LocalEngine,
    problem: Problem,
    *,
    patience: Patience | None = None,
    precision: Precision = "exact",
    cache_bytes: int = 2**30,
    is_private: bool = False,
) -> Iterator[RemoteEngine]:
    """The clients of a local engine, each behind a node of its own, over a grid in this process.

    Args:
        engine: does the tasks.
        problem: what is learned.
        patience, precision: see `RemoteEngine`.
        cache_bytes: what nodes may keep on disk, all together: equal tensors are kept once.
        is_private: see `RemoteEngine`.
    """
    clients = engine.population()

    def engine_for(asked: Problem) -> LocalEngine:
        if asked != problem:
            raise ValueError(f"the run is about {asked}, this node's data about {problem}")
        return engine

    with tempfile.TemporaryDirectory(prefix="scalefl-") as folder, engine:
        cache = TensorCache(Path(folder), cache_bytes)

        def node_of(context: Context) -> Node:
            number = context.node_id - FIRST_NODE
            return Node(number, engine_for, lambda: clients[number], cache, Allowed(("*",)))

        contexts = {FIRST_NODE + i: Context(1, FIRST_NODE + i, {}, RecordDict(), {}) for i in range(len(clients))}
        link = GridLink(InProcessGrid(client_app(node_of), contexts))
        at_once = replace(patience or Patience(), poll_seconds=0.0)  # whoever asks for an answer has it made
        yield RemoteEngine(link, problem, at_once, in_flight=1, precision=precision, is_private=is_private)
