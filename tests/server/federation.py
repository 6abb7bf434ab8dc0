"""A small federation with real keys and certificates, a SuperLink that records, a registrar that records, and the gateway between."""

import asyncio
import base64
import contextlib
import http.server
import ipaddress
import json
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from trunkline.security import keys
from trunkline.security.enrolment import Code
from trunkline.server.gateway.gateway import Gateway
from trunkline.server.gateway.routes import SOCKET, Limits
from trunkline.server.membership.registry import Book, Enrolled, Invitation, Registry

PULL = "/v1/fleet/pull-messages"
WAIT_S = 10.0


def until(true: Callable[[], Any], what: str, seconds: float = WAIT_S) -> None:
    """Wait for something that happens in another thread."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def issue(
    key: EllipticCurvePrivateKey,
    name: str,
    issuer: tuple[EllipticCurvePrivateKey, str] | None = None,
    usage: x509.ObjectIdentifier | None = ExtendedKeyUsageOID.CLIENT_AUTH,
    since: datetime | None = None,
    until: datetime | None = None,
) -> x509.Certificate:
    """A certificate; without `usage`, an authority's; without `issuer`, self-signed."""
    signer, by = issuer or (key, name)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, by)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(since or keys.now() - timedelta(days=2))
        .not_valid_after(until or keys.now() + timedelta(days=30))
        .add_extension(x509.BasicConstraints(usage is None, 0 if usage is None else None), critical=True)
    )
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        here = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        builder = builder.add_extension(x509.SubjectAlternativeName([here]), critical=False)
    return builder.sign(signer, hashes.SHA256())


@dataclass
class Member:
    """Who calls: a site, or whoever holds an invitation."""

    name: str
    key: Any
    certificate: x509.Certificate
    folder: Path
    authority: x509.Certificate

    @property
    def pem(self) -> Path:
        path = self.folder / f"{keys.fingerprint(self.certificate)}.pem"
        if not path.exists():
            path.write_bytes(keys.key_pem(self.key) + keys.certificate_pem(self.certificate))
        return path

    def context(self, highest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=keys.certificate_pem(self.authority).decode())
        context.load_cert_chain(self.pem)
        context.maximum_version = highest
        return context

    def signed(self) -> dict[str, str]:
        """Flower's identity headers, fresh."""
        stamp = keys.now().isoformat()
        how = (ECDSA(hashes.SHA256()),) if isinstance(self.key, EllipticCurvePrivateKey) else ()
        signature = self.key.sign(stamp.encode(), *how)
        return {
            "flwr-public-key": base64.b64encode(keys.spki(self.key.public_key())).decode(),
            "flwr-timestamp": stamp,
            "flwr-signature": base64.b64encode(signature).decode(),
        }

    def raw(self, path: str = PULL, body: bytes = b"hello", extra: str = "", **headers: str) -> bytes:
        """A whole request as bytes, signed."""
        lines = {"host": "centre", "content-length": str(len(body)), **self.signed(), **headers}
        return (
            f"POST {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + extra + "\r\n"
        ).encode() + body


class Federation:
    """The files of a centre's state folder."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "s"
        self.members = folder / "m"
        self.state.mkdir()
        self.members.mkdir()
        self.key = generate_private_key(SECP256R1())
        self.authority = issue(self.key, "authority", usage=None)
        self.registry = Registry(self.state)
        self.registry.create()
        (self.state / "authority.crt").write_bytes(keys.certificate_pem(self.authority))
        self.new_server_certificate()
        self.loopback_key = generate_private_key(SECP256R1())
        self.loopback = issue(self.loopback_key, "loopback", usage=ExtendedKeyUsageOID.SERVER_AUTH)
        (self.state / "loopback.crt").write_bytes(keys.certificate_pem(self.loopback))

    def new_server_certificate(self, *, with_key: bool = True) -> x509.Certificate:
        key = generate_private_key(SECP256R1())
        certificate = issue(key, "centre", (self.key, "authority"), ExtendedKeyUsageOID.SERVER_AUTH)
        if with_key:
            (self.state / "server.key").write_bytes(keys.key_pem(key))
        (self.state / "server.crt").write_bytes(keys.certificate_pem(certificate))
        return certificate

    def member(self, name: str, key: Any = None, **dates: datetime) -> Member:
        """A certificate of this federation, which the book does not know."""
        key = key or keys.new_site_key()
        return Member(name, key, issue(key, name, (self.key, "authority"), **dates), self.members, self.authority)

    def site(self, name: str = "press-07", key: Any = None, **dates: datetime) -> Member:
        """A member in the book."""
        member = self.member(name, key, **dates)
        entry = Enrolled(
            site=name,
            key=keys.key_id(member.key.public_key()),
            spki=keys.spki(member.key.public_key()).decode(),
            records="",
            serial=f"{member.certificate.serial_number:x}",
            certificate=keys.certificate_pem(member.certificate).decode(),
            since=keys.now().isoformat(),
            until=member.certificate.not_valid_after_utc.isoformat(),
        )
        self.registry.write(lambda book: book.model_copy(update={"enrolled": (*book.enrolled, entry)}))
        return member

    def revoke(self, member: Member, reason: str = "sold") -> None:
        def change(book: Book) -> Book:
            update = {"revoked": keys.now().isoformat(), "reason": reason}
            return book.model_copy(
                update={
                    "enrolled": tuple(
                        one.model_copy(update=update) if one.site == member.name else one for one in book.enrolled
                    )
                }
            )

        self.registry.write(change)

    def invite(self, name: str, made: datetime | None = None, used: str = "") -> Member:
        code = Code.new(self.authority)
        made = made or keys.now()
        entry = Invitation(
            site=name,
            key=keys.key_id(code.key.public_key()),
            certificate=keys.certificate_pem(code.certificate()).decode(),
            made=made.isoformat(),
            expires=(made + timedelta(hours=1)).isoformat(),
            used=used,
        )
        self.registry.write(lambda book: book.model_copy(update={"invitations": (*book.invitations, entry)}))
        return Member(name, code.key, code.certificate(), self.members, self.authority)


@dataclass
class Arrived:
    """One whole request that came through."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes

    def get(self, name: str) -> str | None:
        return dict(self.headers).get(name)


@dataclass
class Behind:
    """What the SuperLink, or the registrar, does and has seen.

    Args:
        answer: status, headers and body for a request; hold: a body is not read while it is clear.
    """

    arrived: list[Arrived] = field(default_factory=list)
    cut_short: int = 0
    connections: int = 0
    answer: Callable[[Arrived], tuple[int, dict[str, str], bytes]] = lambda one: (
        200,
        {},
        b"answer to " + one.body[:20],
    )
    hold: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.hold.set()

    def handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        behind = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30

            def setup(self) -> None:
                behind.connections += 1
                super().setup()

            def do_POST(self) -> None:
                behind.hold.wait(30)
                size = int(self.headers["content-length"] or 0)
                body = self.rfile.read(size)
                if len(body) < size:
                    behind.cut_short += 1
                    self.close_connection = True
                    return
                one = Arrived(self.command, self.path, [(k.lower(), v) for k, v in self.headers.items()], body)
                behind.arrived.append(one)
                status, headers, answer = behind.answer(one)
                self.send_response(status)
                for name, value in {"content-length": str(len(answer)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_PUT = do_CONNECT = do_HEAD = do_POST  # noqa: N815

            def log_message(self, *args: object) -> None:
                pass

        return Handler


class _Threading(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, family: int, address: Any, handler: Any, context: ssl.SSLContext | None = None) -> None:
        self.address_family, self.context = family, context
        self.open: set[socket.socket] = set()
        super().__init__(address, handler)

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self.context is not None:
            request.settimeout(10)
            request = self.context.wrap_socket(request, server_side=True)
        self.open.add(request)
        try:
            super().finish_request(request, client_address or ("unix", 0))
        finally:
            self.open.discard(request)
            request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the gateway lets go of a connection as it likes


@contextlib.contextmanager
def serving(server: _Threading) -> Iterator[_Threading]:
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        for one in list(server.open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        thread.join(10)


@contextlib.contextmanager
def superlink(federation: Federation, behind: Behind, port: int = 0) -> Iterator[int]:
    """A TLS server with the loopback certificate; its port."""
    pair = federation.members / "loopback.pem"
    pair.write_bytes(keys.key_pem(federation.loopback_key) + keys.certificate_pem(federation.loopback))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair)
    _Threading.allow_reuse_address = True
    with serving(_Threading(socket.AF_INET, ("127.0.0.1", port), behind.handler(), context)) as server:
        yield server.server_address[1]


@contextlib.contextmanager
def registrar(federation: Federation, behind: Behind) -> Iterator[None]:
    with serving(_Threading(socket.AF_UNIX, str(federation.state / SOCKET), behind.handler())):
        yield


@dataclass
class Running:
    """A gateway in a thread of its own."""

    gateway: Gateway
    port: int
    lines: list[str]
    notes: list[str] = field(default_factory=list)

    def client(self, member: Member) -> httpx.Client:
        return httpx.Client(base_url=f"https://127.0.0.1:{self.port}", verify=member.context(), timeout=WAIT_S)

    def connect(self, member: Member) -> ssl.SSLSocket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)
        return member.context().wrap_socket(sock, server_hostname="127.0.0.1")

    def said(self, words: str) -> str:
        """The first line of the log with these words, waited for."""
        until(lambda: any(words in line for line in self.lines), f"{words!r} in the log, which has {self.lines}")
        return next(line for line in self.lines if words in line)


@contextlib.contextmanager
def running(federation: Federation, upstream: int, tap: Any = None, **limits: float) -> Iterator[Running]:
    """The gateway with these limits; the shortest pauses, so that no test waits."""
    lines: list[str] = []
    notes: list[str] = []
    values: dict[str, Any] = {"sweep_s": 0.1, "linger_s": 0.05, **limits}
    gateway = Gateway(
        federation.state,
        ("127.0.0.1", 0),
        ("127.0.0.1", upstream),
        Limits(**values),
        emit=lines.append,
        report_refusal=notes.append,
        tap=tap,
    )
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(gateway.start(), loop).result(WAIT_S)
        try:
            yield Running(gateway, gateway.port, lines, notes)
        finally:
            asyncio.run_coroutine_threadsafe(gateway.stop(0.2), loop).result(WAIT_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WAIT_S)
        loop.close()
    defects = [line for line in lines if "a defect of the gateway" in line]
    assert not defects, defects


def answers(sock: ssl.SSLSocket, count: int = 1) -> list[tuple[int, dict[str, str], str]]:
    """Status, headers and text of the next answers; fewer where the connection ends before."""
    file = sock.makefile("rb")
    found = []
    with contextlib.suppress(OSError):
        while len(found) < count and (line := file.readline()):
            headers = {}
            while (header := file.readline()) not in (b"\r\n", b""):
                name, _, value = header.decode().partition(":")
                headers[name.lower()] = value.strip()
            body = file.read(int(headers.get("content-length", 0)))
            found.append((int(line.split()[1]), headers, body.decode("utf-8", "replace")))
    file.close()
    return found


def parsed(text: str) -> Any:
    return json.loads(text)
