"""The nginx configuration stands for the gateway: a real nginx, on loopback, under the same calls."""

import base64
import contextlib
import shutil
import socket
import ssl
import subprocess
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.server.federation import (
    PULL,
    WAIT_S,
    Behind,
    Federation,
    Member,
    answers,
    issue,
    registrar,
    superlink,
    until,
)
from tests.server.gateway.test_gateway import PATHS
from trunkline.security import keys
from trunkline.security.enrolment import AUTHORITY_PATH, HELLO_PATH, JOIN_PATH, LIMIT, RENEW_PATH
from trunkline.server.gateway.nginx import nginx_config

NGINX = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
pytestmark = pytest.mark.skipif(
    NGINX is None, reason="no nginx is installed here (Debian: apt-get install nginx-light)"
)


@dataclass
class Nginx:
    federation: Federation
    port: int
    upstream: int
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def file(self) -> Path:
        return self.federation.state / "nginx.conf"

    def write(self) -> None:
        self.file.write_text(
            nginx_config(self.federation.state, f"127.0.0.1:{self.port}", f"127.0.0.1:{self.upstream}")
        )

    def start(self) -> None:
        assert NGINX is not None
        self.write()
        log = (self.federation.state / "nginx.log").open("wb")
        self.process = subprocess.Popen([NGINX, "-c", str(self.file)], stdout=log, stderr=log)
        log.close()
        until(self.accepts, f"nginx to listen: {(self.federation.state / 'nginx.log').read_text()}")

    def accepts(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.federation.state / "nginx.log").read_text()
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", self.port)) == 0

    def reload(self) -> None:
        """As the operator does after a change: a new file, then a signal."""
        assert NGINX is not None
        self.write()
        subprocess.run([NGINX, "-c", str(self.file), "-s", "reload"], check=True, capture_output=True, timeout=WAIT_S)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()  # the master ends its workers
            try:
                self.process.wait(WAIT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(WAIT_S)

    def client(self, member: Member) -> httpx.Client:
        return httpx.Client(base_url=f"https://127.0.0.1:{self.port}", verify=member.context(), timeout=WAIT_S)

    @contextlib.contextmanager
    def connect(self, member: Member) -> Iterator[ssl.SSLSocket]:
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S) as plain,
            member.context().wrap_socket(plain, server_hostname="127.0.0.1") as sock,
        ):
            yield sock


@pytest.fixture
def nginx(federation: Federation, behind: Behind) -> Iterator[Nginx]:
    """Not started yet: the book is written first."""
    with superlink(federation, behind) as upstream, socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
        one.close()
        found = Nginx(federation, port, upstream)
        try:
            yield found
        finally:
            found.stop()


def test_a_call_arrives_as_through_the_gateway(federation: Federation, behind: Behind, nginx: Nginx) -> None:
    site = federation.site()
    nginx.start()
    behind.answer = lambda one: (200, {"content-type": "application/protobuf"}, one.body[::-1])
    body = bytes(range(256)) * 20_000  # a chunk as Flower sends it
    headers = {
        "content-type": "application/protobuf",
        "cookie": "a=b",
        "x-trunkline-certificate": "forged",
        "x-forwarded-for": "::1",
    }
    with nginx.client(site) as client:
        answer = client.post(PULL, content=body, headers={**headers, **(signed := site.signed())})
        assert client.get("/health").status_code == 200
    assert (answer.status_code, answer.content) == (200, body[::-1])
    one = behind.arrived[0]
    assert (one.method, one.path, one.body) == ("POST", PULL, body)
    expected = {**signed, "content-type": "application/protobuf", "content-length": str(len(body)), "accept": "*/*"}
    assert dict(one.headers) == expected | {
        "accept-encoding": one.get("accept-encoding"),
        "host": f"127.0.0.1:{nginx.upstream}",
    }


def test_who_has_no_certificate_of_the_federation_hears_nothing(
    federation: Federation, behind: Behind, nginx: Nginx
) -> None:
    site = federation.site()
    nginx.start()
    stranger = Member(
        "x", site.key, issue(site.key, "x", (keys.new_site_key(), "authority")), site.folder, site.authority
    )
    old = federation.member("old", until=keys.now() - keys.timedelta(days=1))
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nobody.load_verify_locations(cadata=keys.certificate_pem(federation.authority).decode())
    for context in (stranger.context(), old.context(), nobody, site.context(ssl.TLSVersion.TLSv1_2)):
        with (
            socket.create_connection(("127.0.0.1", nginx.port), timeout=WAIT_S) as plain,
            contextlib.suppress(OSError),
            context.wrap_socket(plain, server_hostname="127.0.0.1") as sock,
        ):
            sock.sendall(site.raw())
            assert sock.recv(100) == b""
    with socket.create_connection(("127.0.0.1", nginx.port), timeout=WAIT_S) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nhost: c\r\n\r\n")
        assert plain.recv(100) == b""
    assert behind.arrived == []


def test_only_the_enrolled_and_only_with_their_own_key(federation: Federation, behind: Behind, nginx: Nginx) -> None:
    press, kiln, ghost = federation.site("press-07"), federation.site("kiln-02"), federation.member("ghost")
    nginx.start()
    with nginx.client(press) as client:
        answer = client.post(PULL, headers=kiln.signed())
        assert (answer.status_code, "does not hold the key of this certificate" in answer.text) == (401, True)
        assert client.post(PULL).status_code == 401
        signed = press.signed()
        assert (
            client.post(PULL, headers=signed | {"flwr-public-key": signed["flwr-public-key"].swapcase()}).status_code
            == 401
        )
        assert client.post(PULL, headers=press.signed()).status_code == 200
    with nginx.client(ghost) as client:
        answer = client.post(PULL, headers=ghost.signed())
        assert (answer.status_code, "not enrolled here. Ask the operator" in answer.text) == (401, True)
    assert len(behind.arrived) == 1


def test_a_revocation_holds_after_a_reload_and_says_why(federation: Federation, behind: Behind, nginx: Nginx) -> None:
    press, kiln = federation.site("press-07"), federation.site("kiln-02")
    nginx.start()
    with nginx.client(press) as client:
        assert client.post(PULL, headers=press.signed()).status_code == 200
    federation.revoke(press, 'sold; "$who" } left')
    nginx.reload()

    def told() -> bool:
        with nginx.client(press) as client:  # the worker of before may still take a connection
            answer = client.post(PULL, headers=press.signed())
        return (
            answer.status_code == 401
            and "press-07: this certificate was revoked on" in answer.text
            and "(sold;   who    left)" in answer.text
        )

    until(told, "the new workers")
    with nginx.client(kiln) as client:
        assert client.post(PULL, headers=kiln.signed()).status_code == 200


def test_invitations_reach_the_registrar_with_their_certificate(
    federation: Federation, behind: Behind, nginx: Nginx
) -> None:
    site, desk = federation.site(), Behind()
    codes = [federation.invite(f"new-{number}") for number in range(3)]
    nginx.start()
    with registrar(federation, desk):
        forged = {
            "X-Trunkline-Certificate": "forged",
            "X-Trunkline-Certificate-Pem": "forged",
            "X-Trunkline-Peer": "me",
        }
        for caller, path in [*((code, JOIN_PATH) for code in codes), (site, RENEW_PATH)]:
            with nginx.client(caller) as client:
                assert client.post(path, content=b"{}", headers=forged).status_code == 200
                assert client.get(AUTHORITY_PATH).status_code == 200
                assert client.post(JOIN_PATH if caller is site else RENEW_PATH, content=b"{}").status_code == 401
                assert client.post(path, content=bytes(LIMIT + 1)).status_code == 413
                if caller is not site:
                    assert client.post(PULL).status_code == 401
                    assert client.get("/health").status_code == 401
            one = desk.arrived[-2]
            pem = urllib.parse.unquote(one.get("x-trunkline-certificate-pem") or "")
            assert keys.load_certificate(pem.encode(), "header") == caller.certificate
            assert one.get("x-trunkline-certificate") is None
            assert (one.get("x-trunkline-peer") or "").startswith("127.0.0.1:")
    with nginx.client(site) as client:
        answer = client.get(HELLO_PATH)
        assert (answer.status_code, "the registrar does not answer" in answer.text) == (503, True)
    assert behind.arrived == []


def test_no_other_path_exists_however_it_is_written(federation: Federation, behind: Behind, nginx: Nginx) -> None:
    site = federation.site()
    nginx.start()
    for path in PATHS:
        if path.startswith("http://"):
            continue  # nginx takes the path out of it; it is the same path
        with nginx.connect(site) as sock:
            sock.sendall(site.raw(path))
            assert (path, answers(sock)[0][0]) in [(path, 404), (path, 400)]
    assert behind.arrived == []


def test_what_could_be_read_in_two_ways_is_refused(federation: Federation, behind: Behind, nginx: Nginx) -> None:
    site = federation.site()
    nginx.start()
    body = "content-length: 5\r\n"
    for lines, expected in {
        "transfer-encoding: chunked\r\n": (411,),
        body + "transfer-encoding: chunked\r\n": (400, 411),
        "": (411,),
        body + body: (400,),
        f"content-length: {(32 << 20) + 1}\r\n": (413,),
        body + "expect: 100-continue\r\n": (417,),
        body + "connection: upgrade\r\nupgrade: websocket\r\n": (400,),
        body + f"x-long: {'a' * 40_000}\r\n": (400, 431, 494),
    }.items():
        head = "".join(f"{k}: {v}\r\n" for k, v in {"host": "c", **site.signed()}.items())
        with nginx.connect(site) as sock:
            sock.sendall(f"POST {PULL} HTTP/1.1\r\n{head}{lines}\r\nhello".encode())
            found = answers(sock)
            assert found[0][0] in expected, (lines[:60], found)
    for line in (f"GET {PULL} HTTP/1.1", f"POST {PULL} HTTP/1.0", "POST /health HTTP/1.1"):
        with nginx.connect(site) as sock:
            sock.sendall(f"{line}\r\nhost: c\r\n\r\n".encode())
            assert answers(sock)[0][0] in (400, 405)
    assert behind.arrived == []


def test_a_signature_twice_in_a_minute_is_refused(federation: Federation, behind: Behind, nginx: Nginx) -> None:
    site = federation.site()
    nginx.start()
    used = site.signed()
    with nginx.client(site) as client:
        assert [client.post(PULL, headers=used).status_code for _ in range(3)] == [200, 503, 503]
        assert [client.post(PULL, headers=site.signed()).status_code for _ in range(20)] == [200] * 20
    assert len(behind.arrived) == 21


def test_a_superlink_that_is_away_or_another_gets_nothing(federation: Federation, behind: Behind, nginx: Nginx) -> None:
    site = federation.site()
    other = issue(keys.new_site_key(), "loopback", usage=keys.x509.oid.ExtendedKeyUsageOID.SERVER_AUTH)
    right = (federation.state / "loopback.crt").read_bytes()
    (federation.state / "loopback.crt").write_bytes(keys.certificate_pem(other))
    nginx.start()
    with nginx.client(site) as client:
        assert client.post(PULL, headers=site.signed()).status_code == 502
    assert behind.arrived == []
    (federation.state / "loopback.crt").write_bytes(right)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        nginx.upstream = one.getsockname()[1]
    nginx.stop()
    nginx.start()
    with nginx.client(site) as client:
        assert client.post(PULL, headers=site.signed()).status_code == 502


def test_header_of_the_key_is_what_flower_sends(federation: Federation) -> None:
    site = federation.site()
    text = nginx_config(federation.state, "[::1]:9140", "127.0.0.1:9141")
    assert base64.b64encode(keys.spki(site.key.public_key())).decode() in text
    assert "listen [::1]:9140 ssl" in text
    assert "403" not in text.replace("never 403", "")
