"""The executor beside the interface that Flower's SuperNode serves: Flower's own, on a port of this machine."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import uvicorn
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory

from scalefl.deployment.programs import free_port
from scalefl.engines.flower.executor import Executor
from scalefl.engines.flower.grid import TASK, to_records
from scalefl.engines.messages import Parcel
from support import identical

pytestmark = pytest.mark.timeout(15)  # a node that waits for what will not come waits for hours

NODE, RUN = 7, 3
APP = b"an app that is not looked at"


@dataclass
class SuperNode:
    """As much of one as an executor sees."""

    port: int
    secret: bytes
    factory: NodeStateFactory

    def __post_init__(self) -> None:
        self.state = self.factory.state()
        self.state.set_node_id(NODE)
        self.fab = self.state.store_fab(Fab("", APP, {}))

    def give(self, content: RecordDict, run_id: int = RUN, *, has_come: bool = True) -> Message:
        """Have a message done, as a SuperNode does; where it `has_come`, with its content."""
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, SUPERLINK_NODE_ID
        run = Run.create_empty(run_id)
        run.fab_hash, run.series_id = self.fab, run_id
        self.state.store_run(run)
        self.state.set_run_series_context(run_id, Context(run_id, NODE, {}, RecordDict(), {}))
        assert self.state.create_task(task_type="flwr-clientapp", run_id=run_id, fab_hash=self.fab) is not None
        message = Message(content, NODE, TASK)
        message.metadata.__dict__["_message_id"] = message.object_id
        self.state.object_store.preregister(run_id, get_object_tree(message))
        self.state.store_message(message)
        if has_come:
            self.come(message)
        return message

    def come(self, message: Message) -> None:
        """The content of a message is here."""
        for name, found in get_all_nested_objects(message).items():
            self.state.object_store.put(name, found.deflate())

    def replies(self) -> list[str]:
        """The messages that were answered."""
        return [m.metadata.reply_to_message_id for m in self.state.get_messages_legacy(is_reply=True)]


@pytest.fixture
def node() -> Iterator[SuperNode]:
    factory = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
    found = SuperNode(free_port(), secrets.token_bytes(32), factory)
    app = create_app(state_factory=factory, superexec_auth_secret=found.secret)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=found.port, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield found
    server.should_exit = True
    thread.join(10)


ASKED: list[Parcel] = []


def answer(parcel: Parcel) -> Parcel:
    ASKED.append(parcel)
    return Parcel(b"said", {"t": torch.arange(3)})


@pytest.fixture
def executor(node) -> Iterator[Executor]:
    ASKED.clear()
    made = Executor(f"127.0.0.1:{node.port}", node.secret, answer)
    yield made
    made.close()


def steps(executor: Executor, count: int) -> list[bool]:
    return [executor.step() for _ in range(count)]


def test_a_message_is_answered(node, executor):
    assert not executor.step(), "there is none yet"
    sent = Parcel(b"asked", {"w": torch.randn(3, 2)})
    message = node.give(to_records(sent))
    assert steps(executor, 2) == [True, False]
    assert ASKED[0].header == b"asked" and identical(ASKED[0].tensors, sent.tensors)
    assert node.replies() == [message.metadata.message_id]


def test_a_message_that_takes_long_is_waited_for(node, executor, monkeypatch):
    monkeypatch.setattr("scalefl.engines.flower.executor._MESSAGE_SECONDS", 0.1)
    message = node.give(to_records(Parcel(b"asked", {})), has_come=False)
    assert steps(executor, 2) == [False, False]
    node.come(message)
    assert executor.step() and node.replies() == [message.metadata.message_id]


def test_a_message_that_never_comes_does_not_keep_the_next_from_being_answered(node, executor, monkeypatch):
    """As when its run was over, or the server was restarted, while the SuperNode fetched it."""
    monkeypatch.setattr("scalefl.engines.flower.executor._MESSAGE_SECONDS", 0.1)
    node.give(to_records(Parcel(b"old", {})), has_come=False)
    assert not executor.step()
    message = node.give(to_records(Parcel(b"new", {})), run_id=RUN + 1)
    assert executor.step()
    assert [parcel.header for parcel in ASKED] == [b"new"] and node.replies() == [message.metadata.message_id]


def test_a_message_that_is_not_ours_is_answered_so(node, executor):
    node.give(RecordDict({"config": ConfigRecord({"lr": 0.1})}))
    assert executor.step() and ASKED == []
    (reply,) = node.state.get_messages_legacy(is_reply=True)
    tree = node.state.object_store.get_object_tree(reply.metadata.message_id)
    contents = [node.state.object_store.get(part.object_id) or b"" for part in iterate_object_tree(tree)]
    assert any(b"a message without a header" in content for content in contents)


def test_a_supernode_that_is_away_or_knows_another_secret_gives_no_task(node):
    node.give(to_records(Parcel(b"asked", {})))
    for port, secret in ((free_port(), node.secret), (node.port, b"another" * 5)):
        stranger = Executor(f"127.0.0.1:{port}", secret, answer)
        assert steps(stranger, 2) == [False, False]
        stranger.close()
    assert node.replies() == []
