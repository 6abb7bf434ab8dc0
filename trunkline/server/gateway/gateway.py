"""The one port of a centre that the outside sees.

The SuperLink trusts whoever reaches it, so it listens on loopback. This process listens outside, asks everybody for a
certificate of the federation, and passes on what a SuperNode has to say and nothing else: ten paths, a head built anew,
a body of a known length. Joining and renewing go to the registrar.

python -m trunkline.server.gateway.gateway --state STATE --listen HOST:PORT --upstream 127.0.0.1:PORT
"""

import argparse
import asyncio
import base64
import contextlib
import functools
import resource
import signal
import socket
import ssl
import sys
from asyncio import sslproto
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from trunkline.errors import DeploymentError, StorageError, TrunklineError
from trunkline.runtime.incidents import Incidents
from trunkline.runtime.programs import print_line
from trunkline.security import keys
from trunkline.server.gateway.authentication import Caller, Peer, Replays, Trust, admit, handshake_words
from trunkline.server.gateway.connection import START, Denied, Lost, Pool, Wire, copy, dial, dial_unix
from trunkline.server.gateway.http_headers import Request, answer_head, parse_request, plain, request_head
from trunkline.server.gateway.log_throttle import Hush
from trunkline.server.gateway.routes import CERTIFICATE, FORWARDED, PEER, RETURNED, Limits, Route, routes, socket_path
from trunkline.server.membership.registry import Book, Registry

REFUSED_S = 60.0  # between two incidents of one cause


@dataclass(eq=False)
class _Visit:
    wire: Wire
    peer: Peer
    busy: bool = False


@dataclass(eq=False)
class Gateway:
    """Listens until it is stopped.

    Args:
        state: folder of the federation: certificates, registry and the registrar's socket.
        listen: host and port; port 0: any free one, see `port`.
        upstream: the SuperLink, on loopback.
        tell: gets the lines of the log.
        note: gets a refusal for the centre's incidents, one a minute and cause at most, however many there are.
        tap: called with the site and every byte that is passed on for it: the head as it was built anew, then the body.

    Raises:
        DeploymentError: on `start`, when the certificates or the address cannot be used.
    """

    state: Path
    listen: tuple[str, int]
    upstream: tuple[str, int]
    limits: Limits = field(default_factory=Limits)
    tell: Callable[[str], None] = print_line
    note: Callable[[str], object] = lambda text: None
    tap: Callable[[str, bytes], None] | None = None

    def __post_init__(self) -> None:
        self._socket_path = str(socket_path(self.state))
        self._routes = routes(self.limits)
        self._registry = Registry(self.state)
        self._trust = Trust(self.state, self._registry, self.tell)
        self._hush = Hush(self.tell)
        self._refusals = Hush(self.note)
        self._replays = Replays()
        self._pool = Pool(lambda: dial(self.upstream, self._trust.upstream(), 10.0))
        self._visits: set[_Visit] = set()
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
        self._trust.outside()
        self._registry.read()
        try:
            self._listener = _bind(*self.listen)
        except OSError as error:
            raise DeploymentError(
                f"{self.listen[0]}:{self.listen[1]}: cannot listen here ({error.strerror or error}). Is another gateway running?"
            ) from None
        self._background = [asyncio.create_task(self._accept()), asyncio.create_task(self._sweep())]
        self.tell(f"listens on {self.listen[0]}:{self.port}; the SuperLink is at {self.upstream[0]}:{self.upstream[1]}")

    async def watch(self) -> None:
        """Returns never; raises what ended a part without which nobody is served."""
        await asyncio.gather(*self._background)

    async def stop(self, grace_s: float = 1.0) -> None:
        """Take no more; calls that are being answered have `grace_s` seconds to end."""
        for task in self._background:
            task.cancel()
        self._listener.close()
        for visit in self._visits:
            if not visit.busy:
                visit.wire.abort()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace_s)
        for visit in self._visits:
            visit.wire.abort()
        for task in self._tasks:
            task.cancel()
        self._pool.close()
        await asyncio.gather(*self._background, *self._tasks, return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(self._listener)
            except OSError as error:
                self._hush.say("gateway", "accept", f"cannot take a connection: {error}", self.limits.full_s)
                await asyncio.sleep(0.1)  # out of file descriptors, say: others must end first
                continue
            host, port = str(address[0]).removeprefix("::ffff:"), int(address[1])
            full = self.open >= self.limits.connections
            if full or self._hosts[host] >= self.limits.per_host:
                sock.close()
                who, most = ("all", self.limits.connections) if full else (host, self.limits.per_host)
                text = f"{host}: not taken: {most:,} connections are open from {who} already, and no more are taken"
                self._hush.say(who, "too many connections", text, self.limits.full_s)
                continue
            with contextlib.suppress(OSError):  # without it a small answer waits 40 ms for an acknowledgement
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._hosts[host] += 1
            task = asyncio.create_task(self._welcome(sock, host, port))
            self._tasks.add(task)
            task.add_done_callback(lambda task, host=host: self._ended(task, host))  # type: ignore[misc]

    def _ended(self, task: "asyncio.Task[None]", host: str) -> None:
        self._tasks.discard(task)
        self._hosts[host] -= 1
        if not self._hosts[host]:
            del self._hosts[host]
        if not task.cancelled() and task.exception() is not None:
            error = task.exception()
            text = f"{host}: a defect of the gateway ended this connection: {type(error).__name__}: {error}"
            self._hush.say(host, "defect", text, self.limits.quiet_s)

    async def _welcome(self, sock: socket.socket, host: str, port: int) -> None:
        """From the first byte to the last of one connection."""
        this = asyncio.current_task()
        assert this is not None
        wire = Wire()
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: wire,
                sock,
                ssl=self._trust.outside(),
                ssl_handshake_timeout=self.limits.handshake_s,
                ssl_shutdown_timeout=self.limits.linger_s,
            )
        except (OSError, TimeoutError) as error:
            sock.close()
            words = handshake_words(error)
            self._hush.say(host, words, f"{host}:{port}: not let in: {words}", self.limits.quiet_s)
            if isinstance(error, ssl.SSLError):  # else somebody only looked whether the port is open
                self._refusals.say("every caller", words, f"{host}: not let in: {words}", REFUSED_S)
            return
        wire.on_lost = this.cancel  # what is being asked for nobody any more is not asked further
        try:
            visit = _Visit(wire, Peer.of(wire.transport.get_extra_info("ssl_object").getpeercert(True), host, port))
            self._visits.add(visit)
            try:
                if not wire.gone:
                    await self._converse(visit)
            finally:
                self._visits.discard(visit)
        finally:
            wire.on_lost = None
            await wire.shut(self.limits.linger_s)

    async def _converse(self, visit: _Visit) -> None:
        """One request after another."""
        wire, limits = visit.wire, self.limits
        patience, first = limits.head_s, True
        while True:
            what = ""
            try:
                raw = await wire.head(limits.head, patience, limits.head_s, START)
                visit.busy = True
                request = parse_request(raw)
                what = f"{plain(request.method, 16)} {plain(request.target, 80)}: "
                if not await self._serve(visit, request):
                    await wire.linger(limits.linger_s)
                    return
            except Denied as denied:
                text = f"{visit.peer.name} ({visit.peer.address}): {denied.status}: {what}{denied}"
                self._hush.say(visit.peer.host, denied.kind, text, limits.quiet_s)
                if denied.status < 500:  # that a part of the centre is absent is told by who watches it
                    self._refusals.say("every caller", denied.kind, text, REFUSED_S)
                with contextlib.suppress(Lost):
                    await wire.send(_refusal(denied), limits.body_s)
                    await wire.linger(limits.linger_s)
                return
            except Lost as lost:
                # a connection that was used, and is let go between two calls, is nothing to tell
                if lost.wire is not wire or (lost.silent and (visit.busy or first)):
                    text = f"{visit.peer.name} ({visit.peer.address}): {what}{'' if lost.wire is wire else 'who answers '}{lost}; the connection is closed"
                    self._hush.say(visit.peer.host, "broken off", text, limits.quiet_s)
                return
            visit.busy, first, patience = False, False, limits.idle_s

    async def _serve(self, visit: _Visit, request: Request) -> bool:
        """Answer one request; whether the connection may go on."""
        route, caller = self._check(visit.peer, request)
        headers = [(name, request.headers[name]) for name in FORWARDED if name in request.headers]
        if route.registrar:
            headers += [
                (b"host", b"registrar"),
                (CERTIFICATE.encode(), base64.b64encode(visit.peer.der)),
                (PEER.encode(), visit.peer.address.encode()),
            ]
        else:
            headers.append((b"host", f"{self.upstream[0]}:{self.upstream[1]}".encode()))
        if route.method == "POST":
            headers.append((b"content-length", b"%d" % (request.length or 0)))
        head, parser = request_head(request.method, request.target, headers)
        up = await self._reach(route.registrar)
        tap = None if self.tap is None else functools.partial(self.tap, caller.site)
        if tap is not None:
            tap(head)
        behind = "registrar" if route.registrar else "SuperLink"
        whole = answering = pooled = False
        try:
            try:
                await up.send(head, self.limits.body_s)
                await copy(visit.wire, up, request.length or 0, self.limits.body_s, tap)
                whole = True
            except Lost as lost:
                if lost.wire is visit.wire:
                    if lost.silent:
                        raise Denied(
                            408, f"{caller.site}: {lost} of the body that it announced.", "slow body"
                        ) from None
                    raise
                # the SuperLink may have answered before the end of the body, with a refusal say: the answer counts
            status, found, length = await answer_head(up, parser, self.limits.answer_s if whole else 1.0)
            keep = whole and not request.last
            lines = [f"HTTP/1.1 {status} {_phrase(status)}", f"content-length: {length}"]
            lines += [f"{name.decode()}: {found[name].decode('latin-1')}" for name in RETURNED if name in found]
            lines += [] if keep else ["connection: close"]
            answering = True
            await visit.wire.send("\r\n".join([*lines, "", ""]).encode("latin-1"), self.limits.body_s)
            await copy(up, visit.wire, length, self.limits.body_s)
            pooled = whole and not route.registrar and b"close" not in found.get(b"connection", b"").lower()
        except Lost as lost:
            if answering or lost.wire is visit.wire:
                raise  # nothing can be said any more, or not in the middle of an answer
            raise Denied(504 if lost.silent else 502, f"the {behind} {lost}. Try again.", f"{behind} lost") from None
        finally:
            if pooled:
                self._pool.give(up)
            else:
                up.abort()
        if route.registrar or request.target.endswith("activate-node"):
            self.tell(f"{caller.site} ({visit.peer.address}): {status}: {request.method} {request.target}")
        return keep

    def _check(self, peer: Peer, request: Request) -> tuple[Route, Caller]:
        """Who asks for what.

        Raises:
            Denied: it does not exist, or not for this caller, or not like this.
        """
        caller = admit(self._book(), peer)  # before anything about paths is told
        route = self._routes.get(request.target)
        if route is None:
            raise Denied(404, f"{caller.site}: there is nothing at this path.", "path")
        if request.method != route.method:
            raise Denied(405, f"{caller.site}: this path takes {route.method} only.", "method")
        if not (route.invited if caller.invited else route.site):
            text = (
                f"{caller.site}: an invitation opens only joining (`trunkline client join`)."
                if caller.invited
                else f"{caller.site}: joining takes the certificate of an invitation, and this is a site's. It has joined already."
            )
            raise Denied(401, text, "not for this certificate")
        length = request.length
        if length is None and route.body:
            raise Denied(411, f"{caller.site}: say how long the body is (Content-Length).", "content-length")
        if length and length > route.body:
            raise Denied(413, f"{caller.site}: the body has {length:,} bytes; {route.body:,} are taken here.", "body")
        if route.signed:
            if request.headers.get(b"flwr-public-key", b"") != peer.header:
                raise Denied(
                    401,
                    f"{caller.site}: the header flwr-public-key does not hold the key of this certificate. A SuperNode signs with the key "
                    "that its certificate is for: start it with `trunkline client start`, or join again.",
                    "another key",
                )
            self._replays.check(
                caller.site,
                peer.key,
                request.headers.get(b"flwr-signature", b""),
                request.headers.get(b"flwr-timestamp", b""),
            )
        return route, caller

    def _book(self) -> Book:
        try:
            return self._registry.read()
        except StorageError as error:
            raise Denied(503, f"nobody is let in now: {error}", "registry") from None

    async def _reach(self, registrar: bool) -> Wire:
        """A connection to who answers.

        Raises:
            Denied: 502 or 503, which a SuperNode takes for "try again".
        """
        try:
            return await dial_unix(self._socket_path, 5.0) if registrar else await self._pool.take()
        except (OSError, TimeoutError, TrunklineError) as error:
            if registrar:
                text = "the registrar does not answer; joining and renewing wait until it does. Calls of sites go on. Try again."
                raise Denied(503, text, "registrar absent") from None
            why = f" ({error})" if isinstance(error, ssl.SSLError | TrunklineError) else ""
            raise Denied(
                502, f"the SuperLink cannot be reached{why}; it may be starting. Try again.", "upstream"
            ) from None

    async def _sweep(self) -> None:
        """Now and then: close what is idle and no longer welcome, and forget what is old."""
        while True:
            await asyncio.sleep(self.limits.sweep_s)
            self._pool.prune()
            self._replays.prune()
            self._refusals.flush(REFUSED_S)
            self._hush.flush(max(self.limits.quiet_s, self.limits.sweep_s))
            for visit in list(self._visits):
                if visit.busy:
                    continue
                try:
                    admit(self._book(), visit.peer)
                except Denied as denied:
                    self.tell(f"{visit.peer.name} ({visit.peer.address}): an idle connection is closed: {denied}")
                    visit.wire.close()


def _bind(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    both = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
    listener = socket.create_server(address[:2], family=family, backlog=512, dualstack_ipv6=both)
    listener.setblocking(False)
    return listener


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Answer"


def _refusal(denied: Denied) -> bytes:
    body = (str(denied) + "\n").encode()
    lines = [
        f"HTTP/1.1 {denied.status} {_phrase(denied.status)}",
        "content-type: text/plain; charset=utf-8",
        f"content-length: {len(body)}",
        "connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def address(text: str) -> tuple[str, int]:
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
        tell=lambda text: print_line(f"{keys.now():%Y-%m-%d %H:%M:%S} {text}"),
        note=lambda text: incidents.note("refusal", text, remedy="The gateway's log has each of them."),
    )
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    await gateway.start()
    parts = {asyncio.create_task(ended.wait()), asyncio.create_task(gateway.watch())}
    done, waiting = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
    await gateway.stop()
    for part in waiting:
        part.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    for part in done:
        part.result()  # a defect ends the process, with its traceback: the daemon starts another


def speak_alerts() -> None:
    """Let a caller whom the handshake turns away read why.

    OpenSSL has written its alert by then, and asyncio (3.11 to 3.14) drops it with the connection: a plant with an expired
    certificate would see nothing but a closed door. There is no setting for it, so asyncio's own class is replaced, in the
    gateway's process only; should its insides change, the alert is lost again and nothing else.
    """
    own: Any = sslproto.SSLProtocol

    class Speaking(own):  # type: ignore[misc]
        def _fatal_error(self, exc: BaseException, message: str = "Fatal error on transport") -> None:
            with contextlib.suppress(Exception):
                self._process_outgoing()
            super()._fatal_error(exc, message)

    sslproto.SSLProtocol = Speaking  # type: ignore[misc]


def main() -> int:
    parser = argparse.ArgumentParser(description="The port of a centre that the outside sees.")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--listen", required=True, metavar="HOST:PORT")
    parser.add_argument("--upstream", required=True, metavar="127.0.0.1:PORT")
    options = parser.parse_args()
    with contextlib.suppress(ValueError, OSError):  # two descriptors a connection; the usual 1,024 would be the limit
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    speak_alerts()
    try:
        asyncio.run(serve(options.state.resolve(), address(options.listen), address(options.upstream)))
    except TrunklineError as error:
        print_line(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
