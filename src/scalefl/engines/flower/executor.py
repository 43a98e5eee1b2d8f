"""Does the tasks of a SuperNode in this process, which stays.

A SuperNode with `--isolation process` leaves its tasks to whoever holds its secret. Flower's own executor starts a new
interpreter for each message, installs the app that came with the run, and loads it. This one is warm, and never looks
at the app: what a server sends is data here, read by `scalefl.engines.codec` with the node's own list.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

import httpx
from flwr.app import Context, Message, RecordDict
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
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
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
_BACKOFF_SECONDS = 0.05


class Executor:
    """Takes the tasks of the SuperNode at an address of this machine.

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

    def step(self) -> bool:
        """Do a task, if there is one; whether there was.

        A SuperNode that does not answer has none: whoever started it looks after it.
        """
        request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        try:
            found = self._client.AcquireTask(request)
            if not (found.HasField("task") and found.token):
                return False
            self._do(found.token)
        except httpx.HTTPError as error:
            _log.debug("the SuperNode at %s: %s", self._address, error)
            return False
        return True

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _do(self, token: str) -> None:
        client = self._connected(RuntimeTokenHttpInterceptor(token))
        heartbeat = HeartbeatSender(lambda: _still_there(client))
        try:
            heartbeat.start()
            message, context = _pulled(client)
            push_message(client, Message(self._said(message.content), reply_to=message), context)
            push_task_output(client, None, SubStatus.COMPLETED, "")
        finally:
            heartbeat.stop()
            client.close()

    def _said(self, records: RecordDict) -> RecordDict:
        try:
            asked = from_records(records)
        except ValueError as error:
            return to_records(pack(Failure(f"refused: {error}")))
        return to_records(self._answer(asked))

    def _connected(self, interceptor: ProtobufClientInterceptor) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(
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


def _pulled(client: RuntimeHttpClient) -> tuple[Message, Context]:
    """The message of a task, and what Flower says of the node. The app that came with the run is not looked at."""
    given = client.PullTaskInput(PullTaskInputRequest())
    context = context_from_proto(given.context)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = given.task_id, given.run.run_id, context.node_id
    trees = client.PullMessages(PullAppMessagesRequest()).message_object_trees
    if not trees:
        raise httpx.DecodingError("a task without a message")
    node = FlowerNode(node_id=context.node_id)
    message: Message = pull_and_inflate_object_from_tree(
        trees[0],
        make_pull_object_fn_protobuf(client.PullObject, node, context.run_id),
        make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, node, context.run_id),
        return_type=Message,
        # The SuperNode makes a task before it has all of its message, and we ask at once: a second's wait by default.
        initial_backoff=_BACKOFF_SECONDS,
    )
    message.metadata.__dict__["_message_id"] = trees[0].object_id  # it is not part of what it names
    return message, context
