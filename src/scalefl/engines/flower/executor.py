"""Does the tasks of a SuperNode in this process, which stays.

A SuperNode with `--isolation process` leaves its tasks to whoever holds its secret. Flower's own executor starts a new
interpreter for each message, installs the app that came with the run, and loads it. This one is warm, and never looks
at the app: what a server sends is data here, read by `scalefl.engines.codec` with the node's own list.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import httpx
from flwr.app import Message, RecordDict
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto
from flwr.proto.node_pb2 import Node as FlowerNode
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, pull_and_inflate_object_from_tree
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

from scalefl.engines.flower.grid import from_records, to_records
from scalefl.engines.messages import Failure, Parcel, pack

_log = logging.getLogger("scalefl")

_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_COMPONENT = "flwr-clientapp"
_BACKOFF_SECONDS, _MESSAGE_SECONDS = 0.05, 2.0


class _Local(RuntimeHttpClient):
    """Speaks to this machine, which no proxy of the environment could find."""

    def __init__(self, base_url: str, **options: Any) -> None:
        super().__init__(base_url, **options)
        self._client.close()
        self._client = httpx.Client(timeout=self._client.timeout, follow_redirects=True, trust_env=False)


class _Task:
    """A task that was taken, and whose message may still be on its way to the SuperNode."""

    def __init__(self, client: RuntimeHttpClient) -> None:
        self._client = client
        given = client.PullTaskInput(PullTaskInputRequest())
        self._context = context_from_proto(given.context)
        self._ids = given.task_id, given.run.run_id, self._context.node_id
        trees = client.PullMessages(PullAppMessagesRequest()).message_object_trees
        if not trees:
            raise LookupError("a task without a message")
        self._tree = trees[0]
        self._heartbeat = HeartbeatSender(lambda: _still_there(client))
        self._heartbeat.start()

    def message(self, seconds: float) -> Message | None:
        """Its message; None if it has not come within so many seconds. The run's app is not looked at."""
        node, run_id = FlowerNode(node_id=self._context.node_id), self._context.run_id
        try:
            found: Message = pull_and_inflate_object_from_tree(
                self._tree,
                make_pull_object_fn_protobuf(self._client.PullObject, node, run_id),
                make_confirm_message_received_fn_protobuf(self._client.ConfirmMessageReceived, node, run_id),
                return_type=Message,
                max_time=seconds,
                # We ask at once, as tasks are made before messages have come: by default that would cost a second.
                initial_backoff=_BACKOFF_SECONDS,
            )
        except ObjectPullError:
            return None
        found.metadata.__dict__["_message_id"] = self._tree.object_id  # it is not part of what it names
        return found

    def reply(self, message: Message, content: RecordDict) -> None:
        """Answer, and be done."""
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = self._ids
        push_message(self._client, Message(content, reply_to=message), self._context)
        push_task_output(self._client, None, SubStatus.COMPLETED, "")

    def close(self) -> None:
        """Whatever has become of it."""
        self._heartbeat.stop()
        self._client.close()


class Executor:
    """Takes the tasks of the SuperNode at an address of this machine, one after another.

    Args:
        address: of its runtime API, as "127.0.0.1:9094".
        secret: the one that it was started with.
        answer: what to say to a message.
    """

    def __init__(self, address: str, secret: bytes, answer: Callable[[Parcel], Parcel]) -> None:
        self._address, self._answer = address, answer
        self._client = self._connected(
            SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({_ACQUIRE}))
        )
        self._task: _Task | None = None

    def step(self) -> bool:
        """Do a task, if there is one whose message is here; whether there was.

        Nothing that a SuperNode says, or does not say, ends this: whoever started it looks after it.
        """
        try:
            self._look()
            message = self._task.message(_MESSAGE_SECONDS) if self._task else None
            if self._task is None or message is None:
                return False
            self._task.reply(message, self._said(message.content))
        except Exception as error:
            _log.debug("the SuperNode at %s: %s: %s", self._address, type(error).__name__, error)
            self._drop()
            return False
        self._drop()
        return True

    def close(self) -> None:
        """Close the connection."""
        self._drop()
        self._client.close()

    def _look(self) -> None:
        """Take the next task, if there is one, in place of what is waited for.

        A SuperNode has one message after another done: if there is another task, the message of the one before will
        not come any more. That is so when the run was over, or its server restarted, while the message was fetched.
        """
        found = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        if found.HasField("task") and found.token:
            self._drop()
            with contextlib.ExitStack() as undo:
                client = self._connected(RuntimeTokenHttpInterceptor(found.token))
                undo.callback(client.close)
                self._task = _Task(client)
                undo.pop_all()

    def _drop(self) -> None:
        if self._task is not None:
            self._task.close()
            self._task = None

    def _said(self, records: RecordDict) -> RecordDict:
        try:
            asked = from_records(records)
        except ValueError as error:
            return to_records(pack(Failure(f"refused: {error}")))
        return to_records(self._answer(asked))

    def _connected(self, interceptor: ProtobufClientInterceptor) -> RuntimeHttpClient:
        return _Local.from_server_address(
            server_address=self._address,
            insecure=True,  # it listens on this machine's loopback only
            root_certificates=None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name=_COMPONENT), interceptor],
        )


def _still_there(client: RuntimeHttpClient) -> bool:
    """Tell the SuperNode that a task is being done. Flower's own heartbeat ends the process when the run is over."""
    with contextlib.suppress(httpx.HTTPError):
        client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
    return True
