"""The local Runtime interface of a SuperNode, as the executor uses it."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict

from trunkline.errors import ContractError, DeploymentError
from trunkline.flower.app_archive import fab_digest
from trunkline.flower.control import answers
from trunkline.flower.grid import stamp
from trunkline.flower.private import (
    AcquireTaskRequest,
    Metadata,
    Node,
    ObjectPullError,
    ObjectPushError,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    RuntimeHttpClient,
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SendTaskHeartbeatRequest,
    SubStatus,
    SuperExecAuthHttpInterceptor,
    TaskIdentity,
    TaskType,
    context_from_proto,
    load_superexec_auth_secret,
    make_confirm_message_received_fn_protobuf,
    make_message,
    make_pull_object_fn_protobuf,
    message_from_proto,
    pull_and_inflate_object_from_tree,
    push_message,
)
from trunkline.flower.records import pack

TASK_TYPES = tuple(str(kind) for kind in TaskType)
CLIENT_APP = str(TaskType.CLIENT_APP)


class NodeRuntime:
    """The door of a SuperNode (`--isolation process`) to the one worker that shares its secret.

    Args:
        address: host:port of the SuperNode's local Runtime API.
        secret: the file given to both as `--superexec-auth-secret-file`.
    """

    def __init__(self, address: str, secret: Path) -> None:
        self.address = address
        try:
            master = load_superexec_auth_secret(secret_file=str(secret))
        except ValueError as error:
            raise DeploymentError(f"{error}. The client daemon makes this file when it starts.") from None
        if master is None or len(master) < 32:
            raise DeploymentError(
                f"{secret}: the secret has fewer than 32 bytes. Remove it; the daemon makes a new one."
            )
        signing = SuperExecAuthHttpInterceptor(
            master_secret=master, protected_methods={"/flwr.proto.Runtime/AcquireTask"}
        )
        self._client = _runtime_client(address, signing)

    def acquire(self) -> tuple[str, str] | None:
        """Token and type of the next task, of whichever type: one left unclaimed would block the node for ever."""
        with answers(self.address, "asking for a task", "The SuperNode may be restarting."):
            response = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=TASK_TYPES))
        if not (response.HasField("task") and response.token):
            return None
        return response.token, str(response.task.type)


def _runtime_client(address: str, *interceptors: Any) -> RuntimeHttpClient:
    stamped = [RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), *interceptors]
    return RuntimeHttpClient.from_server_address(address, True, None, interceptors=stamped)


JOURNALLED = (
    "run_id",
    "message_id",
    "src_node_id",
    "dst_node_id",
    "reply_to_message_id",
    "group_id",
    "created_at",
    "ttl",
    "message_type",
    "src_task_id",
    "dst_task_id",
)


class NodeTask:
    """One claimed task, from its input to its output. Every method raises DeploymentError when the SuperNode is gone.

    Order of use: `pull_input`, `pull_envelope`, `pull_message`, `push`, `finish`; `beat` from any thread meanwhile.
    After a restart, `resume` with the journalled envelope stands in for the pulls.
    """

    def __init__(self, address: str, token: str) -> None:
        self.address = address
        self.context: Context | None = None
        self.digest = ""  # of the app the run names: see `fab_digest`
        self._envelope: Message | None = None
        self._tree: Any = None
        self._client = _runtime_client(address, RuntimeTokenHttpInterceptor(token))

    @contextlib.contextmanager
    def _asking(self, action: str) -> Iterator[None]:
        with answers(self.address, action, "The task is lost if its token has expired; the server sends it again."):
            yield

    def pull_input(self) -> None:
        """The run's context, and the digest of its app, which stays inert bytes."""
        with self._asking("pulling a task's input"):
            pulled = self._client.PullTaskInput(PullTaskInputRequest())
        self.context = context_from_proto(pulled.context)
        self.digest = fab_digest(pulled.fab.content)
        TaskIdentity.task_id, TaskIdentity.run_id = pulled.task_id, pulled.run.run_id
        TaskIdentity.node_id = self.context.node_id

    def pull_envelope(self) -> dict[str, Any]:
        """The message's metadata, as JSON-able values to journal: enough to answer it with an error later."""
        with self._asking("pulling a task's message"):
            pulled = self._client.PullMessages(PullAppMessagesRequest())
        if len(pulled.messages_list) != 1 or len(pulled.message_object_trees) != 1:
            raise DeploymentError(f"{self.address}: a task came with {len(pulled.messages_list)} messages; expected 1")
        metadata = message_from_proto(pulled.messages_list[0]).metadata
        self._tree = pulled.message_object_trees[0]
        fields = {name: getattr(metadata, name) for name in JOURNALLED}
        fields["message_id"] = self._tree.object_id  # what the SuperNode will look for in the reply
        self.resume(fields)
        return fields

    def resume(self, fields: Mapping[str, Any]) -> None:
        """Go on from a journalled envelope."""
        try:
            self._envelope = make_message(metadata=Metadata(**fields), content=RecordDict())
        except TypeError as error:
            raise DeploymentError(
                f"a journalled envelope cannot be read ({error}); the server sends the task again"
            ) from None
        metadata = self._envelope.metadata
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, metadata.run_id, metadata.dst_node_id

    @property
    def envelope(self) -> Message:
        """The message without its content: what an error replies to even when the content cannot be read."""
        if self._envelope is None:
            raise DeploymentError("a task has no message yet")
        return self._envelope

    def pull_message(self) -> Message:
        """The whole message.

        Raises:
            ContractError: its bytes are not a message.
        """
        metadata = self.envelope.metadata
        node = Node(node_id=metadata.dst_node_id)
        with self._asking("pulling a message's content"):
            try:
                message = pull_and_inflate_object_from_tree(
                    self._tree,
                    make_pull_object_fn_protobuf(self._client.PullObject, node, metadata.run_id),
                    make_confirm_message_received_fn_protobuf(
                        self._client.ConfirmMessageReceived, node, metadata.run_id
                    ),
                    return_type=Message,
                    # a task is there before its content, which the SuperNode is still fetching: Flower's first pause
                    # of 1 s would cost most rounds that second, and its 500 tries are too few for a slow line
                    initial_backoff=0.05,
                    backoff_cap=1.0,
                    max_tries_per_object=10_000,
                )
            except (ObjectPullError, ValueError, TypeError, KeyError, IndexError) as error:
                raise ContractError(f"the message's content cannot be read ({type(error).__name__})") from error
        stamp(message, metadata.message_id)
        return message

    def beat(self) -> None:
        """Say that the task is alive; its token expires 60 s after the last beat."""
        with self._asking("a heartbeat"):
            self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())

    def push(self, reply: Message) -> None:
        """Hand the SuperNode the reply; until it has one it serves nobody else."""
        metadata = self.envelope.metadata
        if reply.has_content():
            reply.content = pack(reply.content)
        to = Context(metadata.run_id, metadata.dst_node_id, {}, RecordDict(), {})
        with self._asking("handing over a reply"):
            try:
                push_message(self._client, reply, to)
            except ObjectPushError as error:
                raise ValueError(str(error)) from error

    def finish(self, completed: bool, details: str = "") -> None:
        """End the task. The context stays in this process: private state is kept in files, not in the SuperNode."""
        status = SubStatus.COMPLETED if completed else SubStatus.FAILED
        with self._asking("ending a task"):
            self._client.PushTaskOutput(PushTaskOutputRequest(context=None, sub_status=status, details=details[:500]))

    def close(self) -> None:
        self._client.close()
