"""The one port of a server that is open to the outside.

The SuperLink trusts every caller that reaches it, so it listens on loopback. This process listens outside and asks every
caller for a certificate of the federation. It passes on the calls of a SuperNode and nothing else: ten paths, a head
built anew, a body of a known length. Joining and renewing go to the registrar.

python -m trunkline.server.gateway.gateway --state STATE --listen HOST:PORT --upstream 127.0.0.1:PORT
"""

import argparse
import asyncio
import contextlib
import resource
import signal
import socket
import ssl
import sys
from asyncio import sslproto
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trunkline.errors import DeploymentError, TrunklineError
from trunkline.runtime.incidents import Incidents
from trunkline.runtime.programs import print_line
from trunkline.security import keys
from trunkline.server.gateway.authentication import Peer, TlsContexts, explain_handshake_failure
from trunkline.server.gateway.connection import REQUEST_START, Connection, ConnectionLost, Denied
from trunkline.server.gateway.forwarding import Forwarder, build_refusal
from trunkline.server.gateway.http_headers import parse_request, printable
from trunkline.server.gateway.log_throttle import LogThrottle
from trunkline.server.gateway.routes import Limits
from trunkline.server.membership.registry import Registry

REFUSAL_S = 60.0  # between two incidents of one cause


@dataclass(eq=False)
class _Session:
    """A connection from outside; `busy`: a request of it is being answered."""

    connection: Connection
    peer: Peer
    busy: bool = False


@dataclass(eq=False)
class Gateway:
    """Listens until it is stopped.

    Args:
        state: folder of the federation: certificates, registry and the registrar's socket.
        listen: host and port; port 0: any free one, see `port`.
        upstream: the SuperLink, on loopback.
        emit: gets the lines of the log.
        report_refusal: gets a refusal for the server's incidents: at most one a minute and cause.
        tap: called with the site and every byte that is passed on for it: the head as it was built anew, then the body.

    Raises:
        DeploymentError: on `start`, when the certificates or the address cannot be used.
    """

    state: Path
    listen: tuple[str, int]
    upstream: tuple[str, int]
    limits: Limits = field(default_factory=Limits)
    emit: Callable[[str], None] = print_line
    report_refusal: Callable[[str], object] = lambda text: None
    tap: Callable[[str, bytes], None] | None = None

    def __post_init__(self) -> None:
        self._registry = Registry(self.state)
        self._contexts = TlsContexts(self.state, self._registry, self.emit)
        self._forwarder = Forwarder(
            self.state, self.upstream, self.limits, self._registry, self._contexts, self.emit, self.tap
        )
        self._log = LogThrottle(self.emit)
        self._refusals = LogThrottle(self.report_refusal)
        self._sessions: set[_Session] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._hosts: Counter[str] = Counter()
        self._background: list[asyncio.Task[None]] = []

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def open(self) -> int:
        """Connections from outside, handshakes included."""
        return self._hosts.total()

    async def start(self) -> None:
        self._contexts.for_callers()
        self._registry.read()
        try:
            self._listener = _bind(*self.listen)
        except OSError as error:
            raise DeploymentError(
                f"{self.listen[0]}:{self.listen[1]}: cannot listen here ({error.strerror or error}). Is another gateway running?"
            ) from None
        self._background = [asyncio.create_task(self._accept()), asyncio.create_task(self._sweep())]
        self.emit(f"listens on {self.listen[0]}:{self.port}; the SuperLink is at {self.upstream[0]}:{self.upstream[1]}")

    async def watch(self) -> None:
        """Never return; raise the error that ended a background task without which no caller is served."""
        await asyncio.gather(*self._background)

    async def stop(self, grace_s: float = 1.0) -> None:
        """Accept no more connections; requests that are being answered have `grace_s` seconds to end."""
        for task in self._background:
            task.cancel()
        self._listener.close()
        for session in self._sessions:
            if not session.busy:
                session.connection.abort()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace_s)
        for session in self._sessions:
            session.connection.abort()
        for task in self._tasks:
            task.cancel()
        self._forwarder.pool.close()
        await asyncio.gather(*self._background, *self._tasks, return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(self._listener)
            except OSError as error:
                self._log.log("gateway", "accept", f"cannot take a connection: {error}", self.limits.full_s)
                await asyncio.sleep(0.1)  # out of file descriptors, say: other connections must end first
                continue
            host, port = str(address[0]).removeprefix("::ffff:"), int(address[1])
            full = self.open >= self.limits.connections
            if full or self._hosts[host] >= self.limits.per_host:
                sock.close()
                source, limit = ("all", self.limits.connections) if full else (host, self.limits.per_host)
                text = f"{host}: not taken: {limit:,} connections are open from {source} already, and no more are taken"
                self._log.log(source, "too many connections", text, self.limits.full_s)
                continue
            with contextlib.suppress(OSError):  # without it a small answer waits 40 ms for an acknowledgement
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._hosts[host] += 1
            task = asyncio.create_task(self._serve_connection(sock, host, port))
            self._tasks.add(task)
            task.add_done_callback(lambda task, host=host: self._forget_task(task, host))  # type: ignore[misc]

    def _forget_task(self, task: "asyncio.Task[None]", host: str) -> None:
        self._tasks.discard(task)
        self._hosts[host] -= 1
        if not self._hosts[host]:
            del self._hosts[host]
        if not task.cancelled() and task.exception() is not None:
            error = task.exception()
            text = f"{host}: a defect of the gateway ended this connection: {type(error).__name__}: {error}"
            self._log.log(host, "defect", text, self.limits.quiet_s)

    async def _serve_connection(self, sock: socket.socket, host: str, port: int) -> None:
        """From the first byte to the last of one connection."""
        task = asyncio.current_task()
        assert task is not None
        connection = Connection()
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection,
                sock,
                ssl=self._contexts.for_callers(),
                ssl_handshake_timeout=self.limits.handshake_s,
                ssl_shutdown_timeout=self.limits.linger_s,
            )
        except (OSError, TimeoutError) as error:
            sock.close()
            cause = explain_handshake_failure(error)
            self._log.log(host, cause, f"{host}:{port}: not let in: {cause}", self.limits.quiet_s)
            if isinstance(error, ssl.SSLError):  # any other error: a scan, which only looks whether the port is open
                self._refusals.log("every caller", cause, f"{host}: not let in: {cause}", REFUSAL_S)
            return
        connection.on_lost = task.cancel  # a request whose caller has gone is not passed on further
        try:
            certificate = connection.transport.get_extra_info("ssl_object").getpeercert(True)
            session = _Session(connection, Peer.from_certificate(certificate, host, port))
            self._sessions.add(session)
            try:
                if not connection.gone:
                    await self._serve_requests(session)
            finally:
                self._sessions.discard(session)
        finally:
            connection.on_lost = None
            await connection.shut(self.limits.linger_s)

    async def _serve_requests(self, session: _Session) -> None:
        """One request after another."""
        connection, limits = session.connection, self.limits
        patience, is_first = limits.head_s, True
        while True:
            label = ""
            try:
                raw = await connection.read_head(limits.head, patience, limits.head_s, REQUEST_START)
                session.busy = True
                request = parse_request(raw)
                label = f"{printable(request.method, 16)} {printable(request.target, 80)}: "
                if not await self._forwarder.forward(connection, session.peer, request):
                    await connection.linger(limits.linger_s)
                    return
            except Denied as denied:
                await self._refuse(session, denied, label)
                return
            except ConnectionLost as lost:
                self._log_loss(session, lost, label, is_first)
                return
            session.busy, is_first, patience = False, False, limits.idle_s

    async def _refuse(self, session: _Session, denied: Denied, label: str) -> None:
        """Log a refusal, answer it, and close the connection."""
        peer = session.peer
        text = f"{peer.name} ({peer.address}): {denied.status}: {label}{denied}"
        self._log.log(peer.host, denied.kind, text, self.limits.quiet_s)
        if denied.status < 500:  # the daemon itself reports an absent SuperLink or registrar
            self._refusals.log("every caller", denied.kind, text, REFUSAL_S)
        with contextlib.suppress(ConnectionLost):
            await session.connection.send(build_refusal(denied), self.limits.body_s)
            await session.connection.linger(self.limits.linger_s)

    def _log_loss(self, session: _Session, lost: ConnectionLost, label: str, is_first: bool) -> None:
        is_caller = lost.connection is session.connection
        if is_caller and not (lost.silent and (session.busy or is_first)):
            return  # a used connection that its caller closes between two requests is normal
        peer, receiver = session.peer, "" if is_caller else "who answers "
        text = f"{peer.name} ({peer.address}): {label}{receiver}{lost}; the connection is closed"
        self._log.log(peer.host, "broken off", text, self.limits.quiet_s)

    async def _sweep(self) -> None:
        """From time to time: close idle connections of sites that were revoked, and forget what is old."""
        while True:
            await asyncio.sleep(self.limits.sweep_s)
            self._forwarder.pool.prune()
            self._forwarder.replays.prune()
            self._refusals.flush(REFUSAL_S)
            self._log.flush(max(self.limits.quiet_s, self.limits.sweep_s))
            for session in list(self._sessions):
                if session.busy:
                    continue
                try:
                    self._forwarder.identify(session.peer)
                except Denied as denied:
                    self.emit(f"{session.peer.name} ({session.peer.address}): an idle connection is closed: {denied}")
                    session.connection.close()


def _bind(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    is_dual = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
    listener = socket.create_server(address[:2], family=family, backlog=512, dualstack_ipv6=is_dual)
    listener.setblocking(False)
    return listener


def parse_address(text: str) -> tuple[str, int]:
    """host:port, with brackets around an IPv6 address."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise DeploymentError(f"{text!r}: not HOST:PORT. Write 0.0.0.0:9140, say.")
    return host.strip("[]"), int(port)


async def serve(state: Path, listen: tuple[str, int], upstream: tuple[str, int]) -> None:
    """Until SIGTERM or SIGINT."""
    incidents = Incidents(state)
    gateway = Gateway(
        state,
        listen,
        upstream,
        emit=lambda text: print_line(f"{keys.now():%Y-%m-%d %H:%M:%S} {text}"),
        report_refusal=lambda text: incidents.note("refusal", text, remedy="The gateway's log has each of them."),
    )
    ended = asyncio.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signal_number, ended.set)
    await gateway.start()
    tasks = {asyncio.create_task(ended.wait()), asyncio.create_task(gateway.watch())}
    done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    await gateway.stop()
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    for task in done:
        task.result()  # a defect ends the process, with its traceback: the daemon starts another


def send_tls_alerts() -> None:
    """Let a caller that the handshake refuses read the reason.

    OpenSSL has written its alert by then, and asyncio (3.11 to 3.14) drops it with the connection: a plant with an
    expired certificate would see no more than a closed connection. There is no setting for it, so asyncio's own class is
    replaced, in the gateway's process only. Should asyncio change inside, the alert is lost again and nothing else.
    """
    original: Any = sslproto.SSLProtocol

    class AlertingProtocol(original):  # type: ignore[misc]
        def _fatal_error(self, exc: BaseException, message: str = "Fatal error on transport") -> None:
            with contextlib.suppress(Exception):
                self._process_outgoing()
            super()._fatal_error(exc, message)

    sslproto.SSLProtocol = AlertingProtocol  # type: ignore[misc]


def main() -> int:
    parser = argparse.ArgumentParser(description="The port of a server that is open to the outside.")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--listen", required=True, metavar="HOST:PORT")
    parser.add_argument("--upstream", required=True, metavar="127.0.0.1:PORT")
    options = parser.parse_args()
    with contextlib.suppress(ValueError, OSError):  # two descriptors a connection; the usual 1,024 would be the limit
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    send_tls_alerts()
    try:
        asyncio.run(serve(options.state.resolve(), parse_address(options.listen), parse_address(options.upstream)))
    except TrunklineError as error:
        print_line(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
