"""Every private name of Flower that Trunkline uses, imported in one place.

Flower's public surface is its command lines, `flwr.app`, `flwr.serverapp` and `flwr.clientapp`. What Trunkline needs
beyond them (a grid without a SuperLink, a resident executor, submitting a run, a SuperNode that polls sooner) is
reached through names that Flower may change in any release. They are all here or patched in `processes`;
tests/flower/test_flower_canary.py reports which one moved.
"""

from importlib.metadata import version

EXPECTED = "1.41"  # the minor version whose private names are used below; peers must match it too


try:
    from flwr.app.message import make_message
    from flwr.app.metadata import Metadata
    from flwr.cli.build import build_fab_from_files
    from flwr.common.constant import ErrorCode, SubStatus
    from flwr.common.serde import context_from_proto, fab_to_proto, message_from_proto, user_config_to_proto
    from flwr.proto.control_pb2 import (
        ListNodesRequest,
        ListRunsRequest,
        RegisterNodeRequest,
        StartRunRequest,
        StopRunRequest,
        UnregisterNodeRequest,
    )
    from flwr.proto.fleet_pb2 import DeactivateNodeRequest, UnregisterNodeFleetRequest
    from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
    from flwr.proto.node_pb2 import Node
    from flwr.proto.runtime_pb2 import (
        AcquireTaskRequest,
        PullAppMessagesRequest,
        PullTaskInputRequest,
        PushTaskOutputRequest,
        SendTaskHeartbeatRequest,
    )
    from flwr.supercore.auth import load_superexec_auth_secret
    from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE, TaskType
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.fab import Fab
    from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
    from flwr.supercore.inflatable.inflatable_protobuf_utils import (
        make_confirm_message_received_fn_protobuf,
        make_pull_object_fn_protobuf,
    )
    from flwr.supercore.inflatable.inflatable_utils import (
        ObjectPullError,
        ObjectPushError,
        ObjectUnavailableError,
        inflate_object_from_contents,
        pull_and_inflate_object_from_tree,
    )
    from flwr.supercore.interceptors import (
        RuntimeTokenHttpInterceptor,
        RuntimeVersionHttpInterceptor,
        SuperExecAuthHttpInterceptor,
    )
    from flwr.supercore.run import Run, RunNotRunningException
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.supernode.runtime.run_clientapp import push_message
except ImportError as _error:
    raise ImportError(
        f"Flower {version('flwr')} is installed and trunkline/flower/private.py was written for {EXPECTED}: {_error}. "
        f"Install flwr=={EXPECTED}.*, or mend that file and tests/flower/test_flower_canary.py."
    ) from _error

__all__ = [
    "EXPECTED",
    "SYSTEM_MESSAGE_TYPE",
    "AcquireTaskRequest",
    "ConfirmMessageReceivedRequest",
    "ControlHttpClient",
    "DeactivateNodeRequest",
    "ErrorCode",
    "Fab",
    "ListNodesRequest",
    "ListRunsRequest",
    "Metadata",
    "Node",
    "ObjectPullError",
    "ObjectPushError",
    "ObjectUnavailableError",
    "PullAppMessagesRequest",
    "PullTaskInputRequest",
    "PushTaskOutputRequest",
    "RegisterNodeRequest",
    "Run",
    "RunNotRunningException",
    "RuntimeHttpClient",
    "RuntimeTokenHttpInterceptor",
    "RuntimeVersionHttpInterceptor",
    "SendTaskHeartbeatRequest",
    "StartRunRequest",
    "StopRunRequest",
    "SubStatus",
    "SuperExecAuthHttpInterceptor",
    "TaskIdentity",
    "TaskType",
    "UnregisterNodeFleetRequest",
    "UnregisterNodeRequest",
    "build_fab_from_files",
    "context_from_proto",
    "fab_to_proto",
    "inflate_object_from_contents",
    "iterate_object_tree",
    "load_superexec_auth_secret",
    "make_confirm_message_received_fn_protobuf",
    "make_message",
    "make_pull_object_fn_protobuf",
    "message_from_proto",
    "pull_and_inflate_object_from_tree",
    "push_message",
    "user_config_to_proto",
]
