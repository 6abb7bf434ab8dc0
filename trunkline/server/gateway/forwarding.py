"""One request through the gateway: who asks for what, to which process it goes, and the answer back."""

import base64
import functools
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import h11

from trunkline.errors import StorageError, TrunklineError
from trunkline.server.gateway.authentication import Caller, Peer, Replays, TlsContexts, identify_caller
from trunkline.server.gateway.connection import Connection, ConnectionLost, Denied, Pool, dial, dial_unix, relay
from trunkline.server.gateway.http_headers import Request, build_request_head, read_answer_head
from trunkline.server.gateway.routes import (
    CERTIFICATE,
    FORWARDED,
    PEER,
    RETURNED,
    Limits,
    Route,
    make_routes,
    socket_path,
)
from trunkline.server.membership.registry import Book, Registry

EARLY_ANSWER_S = 1.0  # for the answer of a process that stopped reading the body


@dataclass
class _Exchange:
    """One request under way, and the connection that it was passed on to."""

    caller: Connection
    upstream: Connection
    request: Request
    site: str
    receiver: str  # for texts: the SuperLink or the registrar
    is_sent: bool = False  # the whole body was passed on
    is_answering: bool = False  # the answer's head has been sent to the caller
    is_reusable: bool = False  # the connection to the SuperLink can serve another request


class Forwarder:
    """Checks a caller's request and passes it on: to the registrar, or to the SuperLink.

    Args:
        state: folder of the federation, with the registrar's socket.
        upstream: the SuperLink, on loopback.
        emit: gets a line for each answer of the registrar and each session of a site.
        tap: called with the site and every byte that is passed on for it: the head as it was built anew, then the body.
    """

    def __init__(
        self,
        state: Path,
        upstream: tuple[str, int],
        limits: Limits,
        registry: Registry,
        contexts: TlsContexts,
        emit: Callable[[str], None],
        tap: Callable[[str, bytes], None] | None = None,
    ) -> None:
        self.upstream, self.limits, self.registry, self.emit, self.tap = upstream, limits, registry, emit, tap
        self.pool = Pool(lambda: dial(upstream, contexts.for_superlink(), 10.0))
        self.replays = Replays()
        self._socket_path = str(socket_path(state))
        self._routes = make_routes(limits)

    def identify(self, peer: Peer) -> Caller:
        """The caller behind a certificate, by the registry as it is now.

        Raises:
            Denied: it is unknown, revoked or expired, or the registry cannot be read.
        """
        return identify_caller(self._read_registry(), peer)

    async def forward(self, caller: Connection, peer: Peer, request: Request) -> bool:
        """Answer one request; whether the connection may serve another.

        Raises:
            Denied: the request is refused, or the process that should answer it cannot be reached.
            ConnectionLost: one of the two connections, in the middle of the request or the answer.
        """
        route, site = self._check(peer, request)
        head, parser = build_request_head(request.method, request.target, self._headers(route, peer, request))
        receiver = "registrar" if route.registrar else "SuperLink"
        exchange = _Exchange(caller, await self._reach(route.registrar), request, site, receiver)
        try:
            status = await self._relay(exchange, head, parser)
        except ConnectionLost as lost:
            if exchange.is_answering or lost.connection is caller:
                raise  # the caller has gone, or has half an answer already
            text = f"the {receiver} {lost}. Try again."
            raise Denied(504 if lost.silent else 502, text, f"{receiver} lost") from None
        finally:
            if exchange.is_reusable and not route.registrar:
                self.pool.give(exchange.upstream)
            else:
                exchange.upstream.abort()
        if route.registrar or request.target.endswith("activate-node"):
            self.emit(f"{site} ({peer.address}): {status}: {request.method} {request.target}")
        return exchange.is_sent and not request.is_last

    async def _relay(self, exchange: _Exchange, head: bytes, parser: h11.Connection) -> int:
        """Pass on the request, then the answer; the answer's status."""
        caller, upstream, limits = exchange.caller, exchange.upstream, self.limits
        tap = None if self.tap is None else functools.partial(self.tap, exchange.site)
        if tap is not None:
            tap(head)
        try:
            await upstream.send(head, limits.body_s)
            await relay(caller, upstream, exchange.request.length or 0, limits.body_s, tap)
            exchange.is_sent = True
        except ConnectionLost as lost:
            if lost.connection is caller:
                if lost.silent:
                    text = f"{exchange.site}: {lost} of the body that it announced."
                    raise Denied(408, text, "slow body") from None
                raise
            # the SuperLink may have answered before the end of the body, with a refusal say: the answer counts
        wait_s = limits.answer_s if exchange.is_sent else EARLY_ANSWER_S
        status, headers, length = await read_answer_head(upstream, parser, wait_s)
        lines = [f"HTTP/1.1 {status} {phrase(status)}", f"content-length: {length}"]
        lines += [f"{name.decode()}: {headers[name].decode('latin-1')}" for name in RETURNED if name in headers]
        if not exchange.is_sent or exchange.request.is_last:
            lines.append("connection: close")
        exchange.is_answering = True
        await caller.send("\r\n".join([*lines, "", ""]).encode("latin-1"), limits.body_s)
        await relay(upstream, caller, length, limits.body_s)
        exchange.is_reusable = exchange.is_sent and b"close" not in headers.get(b"connection", b"").lower()
        return status

    def _headers(self, route: Route, peer: Peer, request: Request) -> list[tuple[bytes, bytes]]:
        headers = [(name, request.headers[name]) for name in FORWARDED if name in request.headers]
        if route.registrar:
            headers += [
                (b"host", b"registrar"),
                (CERTIFICATE.encode(), base64.b64encode(peer.der)),
                (PEER.encode(), peer.address.encode()),
            ]
        else:
            headers.append((b"host", f"{self.upstream[0]}:{self.upstream[1]}".encode()))
        if route.method == "POST":
            headers.append((b"content-length", b"%d" % (request.length or 0)))
        return headers

    def _check(self, peer: Peer, request: Request) -> tuple[Route, str]:
        """The route of a request, and the site that sends it.

        Raises:
            Denied: there is no such route, or this caller may not use it, or not like this.
        """
        caller = self.identify(peer)  # before the caller learns which paths exist
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
            self._check_signature(caller.site, peer, request)
        return route, caller.site

    def _check_signature(self, site: str, peer: Peer, request: Request) -> None:
        if request.headers.get(b"flwr-public-key", b"") != peer.header:
            raise Denied(
                401,
                f"{site}: the header flwr-public-key does not hold the key of this certificate. A SuperNode signs with the key "
                "that its certificate is for: start it with `trunkline client start`, or join again.",
                "another key",
            )
        signature, timestamp = (request.headers.get(name, b"") for name in (b"flwr-signature", b"flwr-timestamp"))
        self.replays.check(site, peer.key, signature, timestamp)

    def _read_registry(self) -> Book:
        try:
            return self.registry.read()
        except StorageError as error:
            raise Denied(503, f"nobody is let in now: {error}", "registry") from None

    async def _reach(self, registrar: bool) -> Connection:
        """A connection to the process that answers.

        Raises:
            Denied: 502 or 503, which a SuperNode takes for "try again".
        """
        try:
            return await dial_unix(self._socket_path, 5.0) if registrar else await self.pool.take()
        except (OSError, TimeoutError, TrunklineError) as error:
            if registrar:
                text = "the registrar does not answer; joining and renewing wait until it does. Calls of sites go on. Try again."
                raise Denied(503, text, "registrar absent") from None
            cause = f" ({error})" if isinstance(error, ssl.SSLError | TrunklineError) else ""
            text = f"the SuperLink cannot be reached{cause}; it may be starting. Try again."
            raise Denied(502, text, "upstream") from None


def phrase(status: int) -> str:
    """The words of an HTTP status."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Answer"


def build_refusal(denied: Denied) -> bytes:
    """A whole answer with the reason of a refusal."""
    body = (str(denied) + "\n").encode()
    lines = [
        f"HTTP/1.1 {denied.status} {phrase(denied.status)}",
        "content-type: text/plain; charset=utf-8",
        f"content-length: {len(body)}",
        "connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body
