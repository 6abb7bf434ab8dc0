"""The SuperLink's control interface: submit, list and stop runs, register nodes."""

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import httpx

from trunkline.errors import DeploymentError
from trunkline.flower.app_archive import app_bytes
from trunkline.flower.grid import Scalar
from trunkline.flower.private import (
    ControlHttpClient,
    Fab,
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
    fab_to_proto,
    user_config_to_proto,
)


@contextlib.contextmanager
def answers(address: str, action: str, remedy: str) -> Iterator[None]:
    """Every way in which a call over HTTP can fail, as one DeploymentError."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        text = error.response.text[:300].strip()
        raise DeploymentError(
            f"{address}: {action} was refused ({error.response.status_code}: {text}). {remedy}"
        ) from error
    except (httpx.HTTPError, ValueError, OSError) as error:
        raise DeploymentError(f"{address}: {action} failed ({type(error).__name__}: {error}). {remedy}") from error


Answer = TypeVar("Answer")


def _control(address: str, ca: bytes | None, action: str, call: Callable[[ControlHttpClient], Answer]) -> Answer:
    remedy = "Is the server running there? `trunkline server status` tells."
    with answers(address, action, remedy), contextlib.closing(_control_client(address, ca)) as client:
        return call(client)


def _control_client(address: str, ca: bytes | None) -> ControlHttpClient:
    return ControlHttpClient.from_server_address(address, ca is None, ca, interceptors=[])


def submit(address: str, app_folder: Path, overrides: Mapping[str, Scalar], *, ca: bytes | None = None) -> int:
    """Start a run of the app in `app_folder` on the SuperLink at `address` (host:port); its run id.

    Args:
        overrides: values for keys that the app's own `[tool.flwr.app.config]` has; the SuperLink refuses others.
        ca: the certificate authority in PEM, for a server with TLS.

    Raises:
        DeploymentError: no SuperLink answers, or it refuses the run.
    """
    fab = app_bytes(app_folder)
    request = StartRunRequest(
        fab=fab_to_proto(Fab(hashlib.sha256(fab).hexdigest(), fab, {})),
        override_config=user_config_to_proto(dict(overrides)),
        federation="",
    )
    response = _control(address, ca, "submitting the run", lambda client: client.StartRun(request))
    if not response.HasField("run_id"):
        raise DeploymentError(f"{address}: the SuperLink did not start the run: {response.note or 'no reason given'}")
    return int(response.run_id)


def list_runs(address: str, *, limit: int = 20, ca: bytes | None = None) -> list[dict[str, Any]]:
    """The newest runs, newest first: run, status (as `run_status`), details, started (ISO 8601, empty before)."""
    response = _control(address, ca, "listing runs", lambda client: client.ListRuns(ListRunsRequest(limit=limit)))
    runs = sorted(response.run_dict.values(), key=lambda run: str(run.pending_at), reverse=True)
    return [
        {"run": run.run_id, "status": _status(run), "details": run.status.details, "started": run.running_at}
        for run in runs
    ]


def run_status(address: str, run_id: int, *, ca: bytes | None = None) -> tuple[str, str]:
    """Status (pending, starting, running, finished:completed, finished:failed or finished:stopped) and details."""
    response = _control(address, ca, "asking for a run", lambda client: client.ListRuns(ListRunsRequest(run_id=run_id)))
    if run_id not in response.run_dict:
        raise DeploymentError(f"{address}: no run {run_id} here. `trunkline server status` lists the runs.")
    run = response.run_dict[run_id]
    return _status(run), run.status.details


def _status(run: Any) -> str:
    return f"{run.status.status}:{run.status.sub_status}" if run.status.sub_status else str(run.status.status)


def stop_run(address: str, run_id: int, *, ca: bytes | None = None) -> None:
    _control(address, ca, "stopping the run", lambda client: client.StopRun(StopRunRequest(run_id=run_id)))


def list_nodes(address: str, *, ca: bytes | None = None) -> list[dict[str, Any]]:
    """The SuperNodes that registered: node (id), status (online, offline, ...), since (ISO 8601), key (PEM)."""
    response = _control(address, ca, "listing nodes", lambda client: client.ListNodes(ListNodesRequest()))
    return [
        {"node": info.node_id, "status": info.status, "since": info.last_activated_at, "key": info.public_key}
        for info in response.nodes_info
    ]


def register_node(address: str, public_key: bytes, name: str, *, ca: bytes | None = None) -> int:
    """Let the node with this key (PEM) in; its node id, the same again when it is known already."""
    request = RegisterNodeRequest(public_key=public_key, name=name)
    try:
        return int(_control(address, ca, "registering a node", lambda client: client.RegisterNode(request)).node_id)
    except DeploymentError:
        for node in list_nodes(address, ca=ca):
            if node["key"] == public_key and node["status"] != "unregistered":
                return int(node["node"])
        raise


def unregister_node(address: str, node: int, *, ca: bytes | None = None) -> None:
    """Shut the node out; its key can never be registered again."""
    _control(
        address, ca, "shutting a node out", lambda client: client.UnregisterNode(UnregisterNodeRequest(node_id=node))
    )


def environment(state: Path) -> dict[str, str]:
    """The environment of a Flower process we start: silent towards the internet, its files under `state`."""
    return {
        **os.environ,
        "FLWR_HOME": str(state / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",  # s; 1 by default, which every run would wait for at its start
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))),
        "PYTHONUNBUFFERED": "1",
    }
