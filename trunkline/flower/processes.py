"""Flower's own SuperNode and ServerApp processes, with changes made in those processes only."""

import contextlib
import json
import logging
import os
import ssl
import sys
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

from trunkline.flower.private import (
    DeactivateNodeRequest,
    RuntimeVersionHttpInterceptor,
    SubStatus,
    UnregisterNodeFleetRequest,
)

IDLE_POLL_S, FAST_POLL_S, FAST_FOR_S = 3.0, 0.2, 60.0  # one poll costs the SuperLink about 11 ms of a core
logger = logging.getLogger(__name__)


def supernode_main(key_file: Path | None = None, identity: Path | None = None) -> None:
    """Flower's own `flower-supernode` with changes made in this process only.

    It polls every 0.2 s within a minute of a message and every 3 s otherwise, where stock Flower waits 3 s always. A
    restart after a kill signs off its former self at once: stock Flower would leave that one "online" for a minute, and a
    round would wait for it. A message that arrived by half is forgotten
    (`whole_or_nothing`). No redirect is followed: the server does not decide where a plant's answers go.

    Args:
        key_file: where it keeps the node and key with which it signs off a former session.
        identity: folder of a site that has joined (`authority.crt`, `site.crt`, `site.key`): TLS 1.3 with its certificate,
            which is read again when it has been renewed. Without it the node registers itself with a key of the day.
    """
    from flwr.supernode.cli import flower_supernode

    # sys.modules, because the package has a function of the same name as this module
    loop = sys.modules["flwr.supernode.start_client_internal"]
    last = [time.monotonic()]

    def sleep(seconds: float) -> None:
        if seconds >= IDLE_POLL_S:  # the idle poll: nothing was waiting
            seconds = FAST_POLL_S if time.monotonic() - last[0] < FAST_FOR_S else seconds
        else:  # the wait for a reply: a task is in flight
            last[0] = time.monotonic()
            seconds = min(seconds, FAST_POLL_S)
        time.sleep(seconds)

    loop.time = types.SimpleNamespace(sleep=sleep, time=time.time)  # type: ignore[attr-defined]
    loop._pull_and_store_message = whole_or_nothing(loop._pull_and_store_message)  # type: ignore[attr-defined]
    if identity is not None:
        _be(identity, key_file)
    elif key_file is not None:
        _remember_node(key_file)
    try:
        flower_supernode()
        logger.error("the SuperNode gave its connection up and ends; a daemon starts another")
    except Exception:
        logger.exception("the SuperNode ends")
    # a handshake that failed (a clock that was wrong for a moment, say) ends it for good, but for a thread that serves its
    # local interface: the process would live on, look well, and do nothing
    logging.shutdown()
    os._exit(1)


def whole_or_nothing(pull: Callable[..., int | None]) -> Callable[..., int | None]:
    """Flower's own `_pull_and_store_message`, which leaves nothing behind of a message whose run ended while it came.

    Flower 1.41 keeps the task and the empty envelope then. A worker that takes the task asks for a content that never
    comes, and for hours nothing of any other run is answered.
    """

    def pulled(*, state: Any, object_store: Any, receive: Callable[[], Any], **options: Any) -> int | None:
        received_metadata: list[Any] = []

        def receiving() -> Any:
            if (received := receive()) is not None:
                received_metadata.append(received[0].metadata)
            return received

        run = pull(state=state, object_store=object_store, receive=receiving, **options)
        if run is None and received_metadata:
            state.delete_messages(message_ids=[received_metadata[0].message_id])
            object_store.delete(received_metadata[0].message_id)
            for task in state.get_tasks(run_ids=[received_metadata[0].run_id]):
                cause = "the run ended while this message came"
                state.finish_task(task.task_id, SubStatus.FAILED, cause)  # one that has finished stays as it is
        return run

    return pulled


def _straight(client: Any) -> None:
    """A client of Flower's as it comes follows redirects, to plain HTTP too."""
    client._client.follow_redirects = False


def client_context(identity: Path) -> ssl.SSLContext:
    """TLS 1.3 as a site that has joined: its certificate, and nobody trusted but its federation's authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(identity / "authority.crt")
    context.load_cert_chain(identity / "site.crt", identity / "site.key")
    return context


def _be(identity: Path, key_file: Path | None) -> None:
    """Make Flower's fleet client speak with the site's certificate, always the newest."""
    from flwr.supernode.fleet_http_client import FleetHttpClient

    certificate = identity / "site.crt"

    class JoinedClient(FleetHttpClient):
        def __init__(self, base_url: str, **options: Any) -> None:
            self._mark = certificate.stat().st_mtime_ns
            super().__init__(base_url, **{**options, "verify": client_context(identity)})
            _straight(self)

        def _unary_unary(self, **call: Any) -> Any:
            if (mark := certificate.stat().st_mtime_ns) != self._mark:
                # not closed: a heartbeat of another thread may be on it, and it goes with its last user
                self._client = httpx.Client(verify=client_context(identity), timeout=self._client.timeout)
                self._mark = mark
                logger.warning("the site's certificate was renewed; it is used from now on")
            return super()._unary_unary(**call)

        def ActivateNode(self, request: Any) -> Any:  # noqa: N802 - Flower's name
            if key_file is not None and key_file.exists():
                with contextlib.suppress(httpx.HTTPError, ValueError, KeyError, OSError):
                    former = int(json.loads(key_file.read_bytes())["node"])
                    self.DeactivateNode(DeactivateNodeRequest(node_id=former))
                    logger.warning("signed off the former session of this site, node %d", former)
                key_file.unlink(missing_ok=True)
            response = super().ActivateNode(request)
            if key_file is not None:
                _keep(key_file, {"node": response.node_id})
            return response

        def DeactivateNode(self, request: Any) -> Any:  # noqa: N802
            response = super().DeactivateNode(request)
            if key_file is not None:
                key_file.unlink(missing_ok=True)
            return response

    _put_in_place(FleetHttpClient=JoinedClient)


def _put_in_place(**ours: Any) -> None:
    """Replace names of the module that a SuperNode speaks to the fleet interface through."""
    from flwr.supernode import fleet_http_connection as connection

    for name, replacement in ours.items():
        getattr(connection, name)  # a name that has moved must fail here, not be set in vain
        setattr(connection, name, replacement)


def _keep(path: Path, record: Mapping[str, Any]) -> None:
    aside = path.with_suffix(".new")
    with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:  # noqa: PTH123 - a mode
        json.dump(record, file)
    aside.replace(path)


def _remember_node(key_file: Path) -> None:
    """Keep key and id of a self-registered node in `key_file`; whom a start finds there is signed off first."""
    from flwr.supercore.primitives.asymmetric import bytes_to_private_key, generate_key_pairs, private_key_to_bytes
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    pair = generate_key_pairs()

    class RememberingClient(FleetHttpClient):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            _straight(self)

        def RegisterNode(self, request: Any) -> Any:  # noqa: N802 - Flower's name, called again until it succeeds
            if key_file.exists():
                self._sign_off()
                key_file.unlink(missing_ok=True)
            return super().RegisterNode(request)

        def ActivateNode(self, request: Any) -> Any:  # noqa: N802
            response = super().ActivateNode(request)
            _keep(key_file, {"node": response.node_id, "key": private_key_to_bytes(pair[0]).decode()})
            return response

        def UnregisterNode(self, request: Any) -> Any:  # noqa: N802
            response = super().UnregisterNode(request)
            key_file.unlink(missing_ok=True)
            return response

        def _sign_off(self) -> None:
            interceptors: Any = self._interceptors
            try:
                record = json.loads(key_file.read_bytes())
                key = bytes_to_private_key(record["key"].encode())
                self._interceptors = (
                    RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                    NodeAuthHttpInterceptor(key, key.public_key()),
                )
                self.DeactivateNode(DeactivateNodeRequest(node_id=record["node"]))
                super().UnregisterNode(UnregisterNodeFleetRequest(node_id=record["node"]))
                logger.warning("signed off the former session of this site, node %d", record["node"])
            except (httpx.HTTPStatusError, ValueError, KeyError, OSError) as error:  # it is gone, or was never there
                logger.warning("could not sign off a former session (%s)", type(error).__name__)
            finally:
                self._interceptors = interceptors

    _put_in_place(generate_key_pairs=lambda: pair, FleetHttpClient=RememberingClient)


def serverapp_main(check: Callable[[bytes], None]) -> None:
    """Flower's own `flwr-serverapp`, which hands a run's app archive to `check` before anything of it is unpacked.

    Args:
        check: raises for an app that is not to run; the run then ends as failed, with the error as its details.
    """
    from flwr.superlink.cli.flwr_serverapp import flwr_serverapp

    # sys.modules, because the package has a function of the same name as this module
    module: Any = sys.modules["flwr.superlink.runtime.run_serverapp"]
    install = module.install_from_fab

    def checked(fab: Any, *arguments: Any, **options: Any) -> Any:
        check(bytes(fab))
        return install(fab, *arguments, **options)

    module.install_from_fab = checked
    flwr_serverapp()


if __name__ == "__main__":
    if sys.argv[1:2] != ["supernode"]:
        sys.exit(
            "usage: python -m trunkline.flower.processes supernode [--node-file FILE] [--identity DIR] FLAGS OF flower-supernode"
        )
    _options: dict[str, Path] = {}
    _flags = sys.argv[2:]
    while _flags[:1] in (["--node-file"], ["--identity"]):
        _options[_flags[0]] = Path(_flags[1])
        _flags = _flags[2:]
    sys.argv = ["flower-supernode", *_flags]
    supernode_main(_options.get("--node-file"), _options.get("--identity"))
