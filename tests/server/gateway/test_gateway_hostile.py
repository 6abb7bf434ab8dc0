"""Ten thousand broken requests: the gateway neither falls nor hangs, and nothing broken reaches the SuperLink."""

import contextlib
import hashlib
import random
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

from tests.server.federation import PULL, WAIT_S, Behind, Federation, Member, answers, running, superlink, until
from trunkline.server.gateway.routes import FLEET, FORWARDED

REQUESTS, WORKERS, SEED = 10_000, 20, 20_261_126
ALLOWED = {name.decode() for name in FORWARDED} | {"host", "content-length"}


def flip(draw: random.Random, raw: bytes) -> bytes:
    data = bytearray(raw)
    for _ in range(draw.randint(1, 8)):
        data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data)


def flip_head(draw: random.Random, raw: bytes) -> bytes:
    head, mark, body = raw.partition(b"\r\n\r\n")
    return flip(draw, head) + mark + body


def truncate(draw: random.Random, raw: bytes) -> bytes:
    return raw[: draw.randrange(len(raw))]


def insert(draw: random.Random, raw: bytes) -> bytes:
    at = draw.randrange(len(raw))
    what = draw.choice(
        [b"\n", b"\r", b"\0", b"\r\n", b"\r\n\r\n", b" ", b"\t", b":", b"%", b"\xff", draw.randbytes(40)]
    )
    return raw[:at] + what + raw[at:]


def header_twice(draw: random.Random, raw: bytes) -> bytes:
    lines = raw.split(b"\r\n")
    end = lines.index(b"")
    lines.insert(draw.randrange(1, end + 1), draw.choice(lines[1:end]))
    return b"\r\n".join(lines)


def header_gone(draw: random.Random, raw: bytes) -> bytes:
    lines = raw.split(b"\r\n")
    del lines[draw.randrange(1, lines.index(b""))]
    return b"\r\n".join(lines)


def add(draw: random.Random, raw: bytes) -> bytes:
    line = draw.choice(
        [
            *(b"transfer-encoding: chunked", b"Transfer-Encoding: identity", b"transfer-encoding : chunked", b"te: trailers"),
            *(b"content-length: 0", b"Content-Length: 9", b"connection: upgrade", b"upgrade: h2c", b"expect: 100-continue"),
            *(b"x-trunkline-certificate: AAAA", b"x-forwarded-for: 127.0.0.1", b" folded: 1", b": empty", b"x-long: " + b"a" * 40_000),
        ]
    )  # fmt: skip
    return raw.replace(b"\r\n\r\n", b"\r\n" + line + b"\r\n\r\n", 1)


def lie(draw: random.Random, raw: bytes) -> bytes:
    head, _, rest = raw.partition(b"content-length: ")
    size, mark, tail = rest.partition(b"\r\n")
    said = draw.choice(
        [int(size) + draw.randint(-20, 50), 10 ** draw.randint(1, 30), -1, draw.choice(["", "x", "0x10", "1e3", "٣"])]
    )
    return head + b"content-length: " + str(said).encode() + mark + tail


def elsewhere(draw: random.Random, raw: bytes) -> bytes:
    paths = [
        b"/v1/control/start-run",
        b"/v1/fleet/../control/start-run",
        b"/docs",
        b"//v1/fleet/get-run",
        b"/v1/fleet/register-node",
    ]
    return raw.replace(raw.split(b" ")[1], draw.choice(paths), 1)


def method(draw: random.Random, raw: bytes) -> bytes:
    return draw.choice([b"GET", b"PUT", b"CONNECT", b"post", b"HEAD", b"P" * 50]) + raw[4:]


def noise(draw: random.Random, raw: bytes) -> bytes:
    return draw.randbytes(draw.randint(1, 3000))


MUTATIONS: list[Callable[[random.Random, bytes], bytes]] = [
    *(flip, flip_head, flip_head, truncate, insert, insert, header_twice, header_gone, add, add, lie, lie, elsewhere, method, noise)
]  # fmt: skip


def client_hello(site: Member) -> bytes:
    """The first bytes of a real handshake."""
    out = ssl.MemoryBIO()
    client = site.context().wrap_bio(ssl.MemoryBIO(), out, server_hostname="127.0.0.1")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return out.read()


class Attacker(threading.Thread):
    """One share of the requests, drawn from its own seed; what it sent intact, and what it was answered."""

    def __init__(self, number: int, site: Member, port: int) -> None:
        super().__init__(daemon=True)
        self.site, self.port, self.number = site, port, number
        self.intact: dict[bytes, str] = {}
        self.unanswered: list[bytes] = []
        self.statuses: Counter[int] = Counter()
        self.sent = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        draw = random.Random(SEED + self.number)
        context, hello = self.site.context(), client_hello(self.site)
        try:
            while self.sent < REQUESTS // WORKERS:
                if draw.random() < 0.2:
                    self.knock(draw, hello)
                else:
                    self.call(draw, context)
        except BaseException as error:
            self.error = error

    def knock(self, draw: random.Random, hello: bytes) -> None:
        """No handshake, or a broken one."""
        what = draw.choice([noise, flip, truncate])(draw, hello)
        self.sent += 1
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S) as sock:
            sock.sendall(what)
            sock.settimeout(0.01)
            sock.recv(1000)

    def call(self, draw: random.Random, context: ssl.SSLContext) -> None:
        """Perhaps some intact requests, then a broken one; behind it, an intact one that must not be confused by it."""
        good = []
        for _ in range(draw.choice([0, 0, 0, 1, 2])):
            body = draw.randbytes(draw.choice([8, 300, 20_000])) + b"%d:%d" % (self.number, self.sent + len(good))
            path = draw.choice(FLEET)
            good.append(self.site.raw(path, body))
            self.intact[hashlib.sha256(body).digest()] = path
        raw = self.site.raw(
            draw.choice(FLEET), draw.randbytes(draw.choice([0, 50, 3000])), **draw.choice([{}, {"accept": "*/*"}])
        )
        bad = draw.choice(MUTATIONS)(draw, raw)
        behind = self.site.raw(body=b"behind") if draw.random() < 0.5 else b""
        self.sent += len(good) + 1
        with contextlib.ExitStack() as stack:
            plain = stack.enter_context(socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S))
            sock = stack.enter_context(context.wrap_socket(plain, server_hostname="127.0.0.1"))
            with contextlib.suppress(OSError):
                sock.sendall(b"".join(good) + bad + behind)
            found = answers(sock, len(good)) if good else []
            assert [status for status, _, _ in found] == [200] * len(good), found
            sock.settimeout(0.05)  # a length that is too large is waited for, and nobody is going to send the rest
            for status, _, _ in answers(sock, 1):
                self.statuses[status] += 1


@pytest.mark.processes
@pytest.mark.slow
def test_ten_thousand_broken_requests(tmp_path: Path) -> None:
    federation, behind = Federation(tmp_path), Behind()
    # a smaller curve than sites have: what is tried here is not the arithmetic, and it is most of the time
    sites = [federation.site(f"press-{number}", generate_private_key(SECP256R1())) for number in range(WORKERS)]
    started = time.monotonic()
    with (
        superlink(federation, behind) as port,
        running(federation, port, head_s=1.0, body_s=1.0, idle_s=1.0, handshake_s=2.0) as gateway,
    ):
        attackers = [Attacker(number, site, gateway.port) for number, site in enumerate(sites)]
        for one in attackers:
            one.start()
        for one in attackers:
            one.join(max(0.1, 200 - (time.monotonic() - started)))
            assert not one.is_alive(), f"after {one.sent} requests"
            assert one.error is None, repr(one.error)
        with gateway.client(sites[0]) as client:
            assert client.post(PULL, content=b"proper", headers=sites[0].signed()).text == "answer to proper"
        until(lambda: gateway.gateway.open == 0, "every connection to end")
        assert sum(one.sent for one in attackers) >= REQUESTS
    statuses = sum((one.statuses for one in attackers), Counter[int]())
    assert {400, 401, 404, 405, 411, 413, 431} <= statuses.keys(), statuses
    assert not {403, 500} & statuses.keys(), statuses

    names = {f"press-{number}" for number in range(WORKERS)}
    headers = {site.signed()["flwr-public-key"] for site in sites}
    seen: Counter[bytes] = Counter()
    signatures: Counter[str | None] = Counter()
    for one in behind.arrived:
        assert one.method == "POST"
        assert one.path in FLEET
        assert {name for name, _ in one.headers} <= ALLOWED
        assert len({name for name, _ in one.headers}) == len(one.headers)
        assert one.get("flwr-public-key") in headers
        assert one.get("content-length") == str(len(one.body))
        signatures[one.get("flwr-signature")] += 1
        seen[hashlib.sha256(one.body).digest()] += 1
    assert max(signatures.values()) == 1
    for attacker in attackers:
        for digest, path in attacker.intact.items():
            assert seen[digest] == 1, f"an intact call to {path} arrived {seen[digest]} times"
    # the centre's incidents hold each cause once a minute, however often it came
    minutes = 1 + (time.monotonic() - started) // 60
    assert 3 <= len(gateway.notes) <= 30 * minutes, gateway.notes
    # what was said about each peer names a site or an address, never what was sent
    assert all(line.isprintable() and len(line) < 400 for line in gateway.lines)
    assert any(name in line for name in names for line in gateway.lines)
    print(
        f"{sum(one.sent for one in attackers)} requests, {len(behind.arrived)} arrived, {time.monotonic() - started:.0f} s, {statuses}"
    )
