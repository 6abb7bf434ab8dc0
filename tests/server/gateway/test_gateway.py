"""The gateway lets in whom the book welcomes, for what a SuperNode needs, and says in words why it lets nobody else in."""

import asyncio
import base64
import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from tests.server.federation import (
    PULL,
    WAIT_S,
    Behind,
    Federation,
    Member,
    Running,
    answers,
    issue,
    registrar,
    running,
    superlink,
    until,
)
from trunkline.errors import DeploymentError
from trunkline.security import keys
from trunkline.security.enrolment import AUTHORITY_PATH, HELLO_PATH, JOIN_PATH, LIMIT, RENEW_PATH
from trunkline.server.gateway.authentication import Replays
from trunkline.server.gateway.connection import Denied
from trunkline.server.gateway.gateway import Gateway, parse_address, serve
from trunkline.server.gateway.log_throttle import LogThrottle
from trunkline.server.gateway.routes import FLEET

P384 = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973  # its order


@pytest.fixture
def upstream(federation: Federation, behind: Behind) -> Iterator[int]:
    with superlink(federation, behind) as port:
        yield port


@pytest.fixture
def gateway(federation: Federation, upstream: int) -> Iterator[Running]:
    with running(federation, upstream) as found:
        yield found


def refused(gateway: Running, member: Member, **versions: ssl.TLSVersion) -> None:
    """A handshake that comes to nothing; with TLS 1.3 the client hears of it when it reads."""
    with (
        pytest.raises(OSError),
        socket.create_connection(("127.0.0.1", gateway.port), timeout=WAIT_S) as plain,
        member.context(**versions).wrap_socket(plain, server_hostname="127.0.0.1") as sock,
    ):
        sock.sendall(member.raw())
        if not sock.recv(1):
            raise ConnectionError
    assert gateway.gateway._sessions == set()


def test_a_call_arrives_whole_and_built_anew(federation: Federation, behind: Behind, gateway: Running) -> None:
    site = federation.site()
    behind.answer = lambda one: (
        200,
        {"content-type": "application/protobuf", "server": "uvicorn", "x-own": "1"},
        one.body[::-1],
    )
    body = os.urandom(6_000_000)
    headers = {
        "content-type": "application/protobuf",
        "cookie": "a=b",
        "x-trunkline-certificate": "forged",
        "x-forwarded-for": "::1",
    }
    with gateway.client(site) as client:
        answer = client.post(PULL, content=body, headers={**headers, **(signed := site.signed())})
    assert answer.status_code == 200
    assert answer.content == body[::-1]
    assert set(answer.headers) == {"content-type", "content-length", "date"}, (
        "what the SuperLink runs on is its own affair"
    )
    (one,) = behind.arrived
    assert (one.method, one.path, one.body) == ("POST", PULL, body)
    expected = {**signed, "content-type": "application/protobuf", "content-length": "6000000"}
    expected |= {"accept": "*/*", "accept-encoding": one.get("accept-encoding"), "host": one.get("host")}
    assert dict(one.headers) == expected


def test_what_flowers_own_client_sends_is_what_arrives(federation: Federation, behind: Behind, upstream: int) -> None:
    from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
    from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    site = federation.site()
    behind.answer = lambda one: (
        200,
        {"content-type": "application/protobuf"},
        PullMessagesResponse().SerializeToString(),
    )
    context = site.context()
    context.load_verify_locations(cadata=keys.certificate_pem(federation.loopback).decode())
    interceptors = [
        RuntimeVersionHttpInterceptor("SuperNode"),
        NodeAuthHttpInterceptor(site.key, site.key.public_key()),
    ]
    with running(federation, upstream) as gateway:
        for port in (upstream, gateway.port):
            with FleetHttpClient(f"https://127.0.0.1:{port}", verify=context, interceptors=interceptors) as client:
                client.PullMessages(PullMessagesRequest())
    straight, through = behind.arrived
    fresh = {"host", "connection", "user-agent", "flwr-timestamp", "flwr-signature"}
    assert {k: v for k, v in straight.headers if k not in fresh} == {k: v for k, v in through.headers if k not in fresh}
    assert {"flwr-timestamp", "flwr-signature", "flwr-public-key", "flwr-package-version"} <= dict(
        through.headers
    ).keys()
    assert straight.body == through.body


def test_a_body_is_never_whole_in_memory(federation: Federation, behind: Behind, gateway: Running) -> None:
    """As much as the buffers between them hold, and no more, leaves a caller while the SuperLink does not read."""
    site = federation.site()
    size = 32 << 20  # of which sockets hold some 20 MB, and on a busy machine more
    behind.hold.clear()
    with gateway.connect(site) as sock:
        sock.sendall(site.raw(body=b"", **{"content-length": str(size)}))
        sock.settimeout(0.5)
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < size:
                sent += sock.send(bytes(1 << 14))
        assert sent < size * 0.95
        behind.hold.set()
        sock.settimeout(WAIT_S)
        # what the timeout left half written is not known to be sent: the caller has gone
    until(lambda: gateway.gateway.open == 0, "the connection to end")
    until(lambda: behind.cut_short == 1, "the SuperLink to notice")
    assert behind.arrived == []


@pytest.mark.parametrize(
    "who", ["nobody", "stranger", "expired", "early", "old TLS", "plain", "noise", "silent", "gone", "server"]
)
def test_a_handshake_that_fails_is_told_in_words(federation: Federation, upstream: int, who: str) -> None:
    day = timedelta(days=1)
    words = {
        "nobody": "showed no client certificate. Only a site that has joined",
        "stranger": "its certificate is of another authority, or of a code that is unknown here. Ask the operator",
        "expired": "its certificate has expired. Ask the operator for a new invitation",
        "early": "its certificate is not valid yet. Set the clocks",
        "old TLS": "offers no TLS 1.3",
        "plain": "speaks plain HTTP; this port takes TLS only",
        "noise": "does not speak TLS",
        "silent": "did not finish the TLS handshake in time",
        "gone": "closed the connection during the TLS handshake",
        "server": "its certificate is not good here: unsuitable certificate purpose",
    }[who]
    with running(federation, upstream, handshake_s=0.3 if who == "silent" else 10.0) as gateway:
        site = federation.site()
        if who == "nobody":
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.load_verify_locations(cadata=keys.certificate_pem(federation.authority).decode())
            with httpx.Client(verify=context) as client, pytest.raises(httpx.TransportError):
                client.get(f"https://127.0.0.1:{gateway.port}/health")
        elif who == "stranger":
            # the same name as the federation's authority, another key
            site.certificate = issue(site.key, site.name, (keys.new_site_key(), "authority"))
            refused(gateway, site)
        elif who == "expired":
            refused(gateway, federation.site("old", until=keys.now() - day))
        elif who == "early":
            refused(gateway, federation.site("new", since=keys.now() + day))
        elif who == "server":
            key = (federation.state / "server.key").read_bytes()
            site.key, site.certificate = keys.load_key(key, ""), keys.read_certificate(federation.state / "server.crt")
            refused(gateway, site)
        elif who == "old TLS":
            refused(gateway, site, highest=ssl.TLSVersion.TLSv1_2)
        else:
            with socket.create_connection(("127.0.0.1", gateway.port), timeout=WAIT_S) as sock:
                if who == "plain":
                    sock.sendall(b"GET /health HTTP/1.1\r\nhost: centre\r\n\r\n")
                if who == "noise":
                    sock.sendall(bytes(range(200)))
                if who != "gone":
                    gateway.said("not let in")
        assert gateway.said(words).startswith("127.0.0.1:")
        until(lambda: gateway.gateway.open == 0, "nothing to be left open")


def test_a_certificate_and_another_sites_key_do_not_go_together(
    federation: Federation, behind: Behind, gateway: Running
) -> None:
    press, kiln = federation.site("press-07"), federation.site("kiln-02")
    with gateway.client(press) as client:
        answer = client.post(PULL, headers=kiln.signed())
        bare = client.post(PULL)
    assert answer.status_code == bare.status_code == 401
    assert "press-07: the header flwr-public-key does not hold the key of this certificate" in answer.text
    assert "press-07 (127.0.0.1:" in gateway.said("flwr-public-key")
    assert behind.arrived == []


def test_a_certificate_of_the_federation_is_not_enough(
    federation: Federation, behind: Behind, gateway: Running
) -> None:
    ghost = federation.member("ghost")
    with gateway.client(ghost) as client:
        for path in (PULL, "/health", HELLO_PATH, JOIN_PATH):
            answer = client.post(path, headers=ghost.signed())
            assert answer.status_code == 401
            assert "ghost: this certificate's key is not enrolled here. Ask the operator" in answer.text
    assert behind.arrived == []


def test_a_revocation_holds_from_the_next_request_of_a_live_connection(
    federation: Federation, behind: Behind, upstream: int
) -> None:
    site, other = federation.site("press-07"), federation.site("kiln-02")
    with running(federation, upstream, sweep_s=60.0) as gateway, gateway.connect(site) as sock:
        sock.sendall(site.raw())
        assert answers(sock)[0][0] == 200
        federation.revoke(site, "sold to another company")
        sock.sendall(site.raw())
        ((status, headers, text),) = answers(sock, 2)
        assert (status, headers["connection"]) == (401, "close")
        day = f"{keys.now():%Y-%m-%d}"
        assert f"press-07: this certificate was revoked on {day}" in text
        assert "(sold to another company). Ask the operator for a new invitation" in text
        assert sock.recv(1) == b"", "the connection is closed"
        assert len(behind.arrived) == 1
        with gateway.client(other) as client:
            assert client.post(PULL, headers=other.signed()).status_code == 200


def test_an_idle_connection_of_a_revoked_site_is_closed(federation: Federation, gateway: Running) -> None:
    site, other = federation.site("press-07"), federation.site("kiln-02")
    with gateway.connect(site) as sock, gateway.connect(other) as kept:
        until(lambda: gateway.gateway.open == 2, "both to be in")
        federation.revoke(site)
        assert sock.recv(1) == b""
        gateway.said("an idle connection is closed: press-07: this certificate was revoked")
        kept.sendall(other.raw())
        assert answers(kept)[0][0] == 200


def test_a_certificate_that_expires_during_a_connection_is_told_so(
    federation: Federation, upstream: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = federation.site()
    with running(federation, upstream, sweep_s=60.0) as gateway, gateway.connect(site) as sock:
        sock.sendall(site.raw())
        assert answers(sock)[0][0] == 200
        later = keys.now() + timedelta(days=31)
        monkeypatch.setattr(keys, "now", lambda: later)
        sock.sendall(site.raw())
        ((status, _, text),) = answers(sock)
        assert status == 401
        assert f"press-07: this certificate expired on {site.certificate.not_valid_after_utc:%Y-%m-%d}" in text


def test_an_invitation_used_expired_or_open_reaches_the_registrar_and_nothing_else(
    federation: Federation, behind: Behind, gateway: Running
) -> None:
    desk = Behind(answer=lambda one: (410, {"content-type": "application/json"}, b'{"detail": "this code was used"}'))
    week = keys.now() - timedelta(days=7)
    codes = [
        federation.invite("press-07"),
        federation.invite("kiln-02", made=week),
        federation.invite("oven-1", used=week.isoformat()),
    ]
    with registrar(federation, desk):
        for code in codes:
            with gateway.client(code) as client:
                answer = client.post(
                    JOIN_PATH, content=b"{}", headers={"X-Trunkline-Certificate": "forged", "X-Trunkline-Peer": "me"}
                )
                assert (answer.status_code, answer.json()) == (410, {"detail": "this code was used"})
                for path in (PULL, *FLEET):
                    answer = client.post(path)
                    assert answer.status_code == 401
                    assert f"{code.name}: an invitation opens only joining" in answer.text
                assert client.get("/health").status_code == 401
                assert client.get(AUTHORITY_PATH).status_code == 410
    assert [one.path for one in desk.arrived] == [JOIN_PATH, AUTHORITY_PATH] * 3
    for one, code in zip(desk.arrived[::2], codes, strict=True):
        assert base64.b64decode(one.get("x-trunkline-certificate")) == code.certificate.public_bytes(keys.Encoding.DER)
        assert one.get("x-trunkline-peer").startswith("127.0.0.1:")
        assert len([name for name, _ in one.headers if name.startswith("x-trunkline")]) == 2
    assert behind.arrived == []


def test_a_code_is_forgotten_after_ninety_days(federation: Federation, gateway: Running) -> None:
    refused(gateway, federation.invite("press-07", made=keys.now() - timedelta(days=91)))
    gateway.said("of a code that is unknown here")


def test_a_site_asks_how_it_stands_and_renews_but_does_not_join_again(federation: Federation, gateway: Running) -> None:
    site, desk = federation.site(), Behind()
    with registrar(federation, desk), gateway.client(site) as client:
        assert client.get(HELLO_PATH).status_code == 200
        assert client.post(RENEW_PATH, content=b"{}").text == "answer to {}"
        assert client.get(AUTHORITY_PATH).status_code == 200
        answer = client.post(JOIN_PATH, content=b"{}")
        assert answer.status_code == 401
        assert "press-07: joining takes the certificate of an invitation" in answer.text
        answer = client.post(RENEW_PATH, content=bytes(LIMIT + 1))
        assert answer.status_code == 413
        assert "65,537 bytes; 65,536 are taken" in answer.text
        assert client.post(RENEW_PATH, content=bytes(LIMIT)).status_code == 200
    assert gateway.said("press-07 (127.0.0.1:").endswith(f"200: GET {HELLO_PATH}")


def test_without_a_registrar_joining_waits_and_calls_go_on(federation: Federation, gateway: Running) -> None:
    site = federation.site()
    with gateway.client(site) as client:
        answer = client.get(HELLO_PATH)
        assert answer.status_code == 503
        assert (
            "the registrar does not answer; joining and renewing wait until it does. Calls of sites go on."
            in answer.text
        )
        assert client.post(PULL, headers=site.signed()).status_code == 200


PATHS = [
    "/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/openapi.json", "/", "*", "/v1/fleet/register-node",
    "/v1/fleet/unregister-node", "/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run", "//v1/fleet/get-run",
    "/v1//fleet/get-run", "/v1/fleet/get-run/", "/v1/fleet/get-run?x=1", "/v1/fleet/get-run#x", "/v1/fleet/get%2drun",
    "/v1/fleet/GET-RUN", "/v1/fleet/get-run;x", "http://127.0.0.1/v1/fleet/get-run", "/v1/fleet/./get-run", "/health/../docs",
    "/v1/fleet\\get-run",
]  # fmt: skip


def test_no_other_path_exists_however_it_is_written(federation: Federation, behind: Behind, gateway: Running) -> None:
    site = federation.site()
    for path in PATHS:
        with gateway.connect(site) as sock:
            sock.sendall(site.raw(path))
            ((status, _, text),) = answers(sock)
            assert (path, status, text) == (path, 404, "press-07: there is nothing at this path.\n")
    assert behind.arrived == []
    assert "404: POST /v1/control/start-run: press-07: there is" in gateway.said("there is nothing at this path")


BODY = "content-length: 5\r\n"
MALFORMED = {
    "chunked": (BODY.replace(BODY, "transfer-encoding: chunked\r\n"), 411, "Transfer-Encoding is not taken here"),
    "both": (BODY + "transfer-encoding: chunked\r\n", 400, "Transfer-Encoding is not taken here"),
    "no length": ("", 411, "say how long the body is"),
    "two lengths": (BODY + BODY, 400, "the header content-length comes twice"),
    "two different": (BODY + "Content-Length: 6\r\n", 400, "the header content-length comes twice"),
    "a list": ("content-length: 5, 5\r\n", 400, "Content-Length is not a number"),
    "signed": ("content-length: +5\r\n", 400, "Content-Length is not a number"),
    "negative": ("content-length: -5\r\n", 400, "Content-Length is not a number"),
    "hexadecimal": ("content-length: 0x5\r\n", 400, "Content-Length is not a number"),
    "underscore": ("content-length: 1_0\r\n", 400, "Content-Length is not a number"),
    "huge": (f"content-length: {10**11}\r\n", 413, "the body has 100,000,000,000 bytes; 33,554,432 are taken here"),
    "one too many": (f"content-length: {(32 << 20) + 1}\r\n", 413, "33,554,433 bytes"),
    "expect": (BODY + "expect: 100-continue\r\n", 417, "Expect is not taken"),
    "upgrade": (BODY + "connection: upgrade\r\nupgrade: websocket\r\n", 400, "Upgrade is not taken"),
    "folded": (BODY + "accept: a\r\n b\r\n", 400, "do not continue"),
    "blank before colon": ("content-length : 5\r\n", 400, "not an HTTP/1.1 request"),
    "bare line feed": (BODY + "accept: a\nx: y\r\n", 400, "lines of a request end in CR LF"),
    "bare return": (BODY + "accept: a\rx: y\r\n", 400, "lines of a request end in CR LF"),
    "nul": (BODY + "accept: a\0b\r\n", 400, "not an HTTP/1.1 request"),
    "no colon": (BODY + "accept\r\n", 400, "not an HTTP/1.1 request"),
    "two hosts": (BODY + "host: other\r\n", 400, "the header host comes twice"),
    "two keys": (BODY + "flwr-public-key: AAAA\r\n", 400, "the header flwr-public-key comes twice"),
    "too many": (BODY + f"x-long: {'a' * 40_000}\r\n", 431, "the headers are larger than the 32,768 bytes"),
}  # fmt: skip


def test_what_could_be_read_in_two_ways_is_refused(federation: Federation, behind: Behind, gateway: Running) -> None:
    site = federation.site()
    for name, (lines, expected, words) in MALFORMED.items():
        head = "".join(f"{k}: {v}\r\n" for k, v in {"host": "c", **site.signed()}.items())
        with gateway.connect(site) as sock:
            sock.sendall(f"POST {PULL} HTTP/1.1\r\n{head}{lines}\r\nhello".encode())
            ((status, headers, text),) = answers(sock, 2)
            assert (name, status, headers["connection"]) == (name, expected, "close")
            assert words in text, name
    assert behind.arrived == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (f"GET {PULL} HTTP/1.1", 405), (f"PUT {PULL} HTTP/1.1", 405), ("POST /health HTTP/1.1", 405),
        ("CONNECT centre:443 HTTP/1.1", 404), (f"POST {PULL} HTTP/1.0", 400), (f"POST {PULL} HTTP/2.0", 400),
        (f"POST {PULL}", 400), (f"POST  {PULL} HTTP/1.1", 400), ("PRI * HTTP/2.0", 400), ("\r\nGET /health HTTP/1.1", 400),
        (f"post {PULL} HTTP/1.1", 405), ("GET /health HTTP/1.1\r\ncontent-length: 5", 413),
    ],
)  # fmt: skip
def test_methods_and_versions(
    federation: Federation, behind: Behind, gateway: Running, line: str, expected: int
) -> None:
    site = federation.site()
    with gateway.connect(site) as sock:
        sock.sendall(f"{line}\r\nhost: c\r\n\r\n".encode())
        assert [status for status, _, _ in answers(sock, 2)] == [expected]
    assert behind.arrived == []


def test_a_health_check_is_passed_on_without_identity_headers(
    federation: Federation, behind: Behind, gateway: Running
) -> None:
    site = federation.site()
    with gateway.client(site) as client:
        assert client.get("/health").status_code == 200
    assert (behind.arrived[0].method, behind.arrived[0].path) == ("GET", "/health")


def test_pipelined_requests_are_answered_in_their_order_until_one_is_bad(
    federation: Federation, behind: Behind, gateway: Running
) -> None:
    site = federation.site()
    with gateway.connect(site) as sock:
        sock.sendall(site.raw(body=b"one") + site.raw(body=b"two") + site.raw("/docs") + site.raw(body=b"three"))
        found = answers(sock, 5)
    assert [(status, text) for status, _, text in found[:2]] == [(200, "answer to one"), (200, "answer to two")]
    assert [status for status, _, _ in found] == [200, 200, 404]
    assert [one.body for one in behind.arrived] == [b"one", b"two"]


def test_the_body_of_a_request_is_never_read_as_another_request(
    federation: Federation, behind: Behind, gateway: Running
) -> None:
    site = federation.site()
    inner = site.raw(body=b"inner")
    with gateway.connect(site) as sock:
        sock.sendall(site.raw(body=inner) + site.raw(body=b"after"))
        assert len(answers(sock, 2)) == 2
    assert [one.body for one in behind.arrived] == [inner, b"after"]


def test_a_signature_is_good_for_one_call(federation: Federation, behind: Behind, gateway: Running) -> None:
    site = federation.site()
    used = site.signed()
    r, s = decode_dss_signature(base64.b64decode(used["flwr-signature"]))
    twin = base64.b64encode(encode_dss_signature(r, P384 - s)).decode()  # as valid as the first, and other bytes
    with gateway.client(site) as client:
        assert client.post(PULL, headers=used).status_code == 200
        for headers in (used, used | {"flwr-signature": twin}):
            for path in (PULL, "/v1/fleet/push-messages"):
                answer = client.post(path, headers=headers)
                assert answer.status_code == 401
                assert (
                    "press-07: this signature was used before. Somebody may be repeating captured headers"
                    in answer.text
                )
        for broken in ("", "AAAA", "not base64"):
            answer = client.post(PULL, headers=used | {"flwr-signature": broken})
            assert (answer.status_code, "absent or damaged" in answer.text) == (401, True)
        assert client.post(PULL, headers=site.signed()).status_code == 200
    assert len(behind.arrived) == 2


def test_what_was_signed_before_a_restart_is_not_taken(federation: Federation, behind: Behind, upstream: int) -> None:
    site = federation.site()
    captured = site.signed()
    with running(federation, upstream) as gateway, gateway.client(site) as client:
        answer = client.post(PULL, headers=captured)
        assert answer.status_code == 503, "a SuperNode tries again, with a fresh signature"
        assert "before this gateway started" in answer.text
    assert behind.arrived == []


def test_signatures_are_forgotten_when_they_are_too_old_and_bounded_before(federation: Federation) -> None:
    now = [0.0]
    replays = Replays(keep_s=0.2, cap=3, clock=lambda: now[0])
    calls = [site.signed() for site in [federation.member("press-07")] for _ in range(4)]

    def check(call: dict[str, str], key: str = "k") -> None:
        replays.check("press-07", key, call["flwr-signature"].encode(), call["flwr-timestamp"].encode())

    for call in calls[:3]:
        check(call)
    with pytest.raises(Denied, match="more than 3 calls") as denied:
        check(calls[3])
    assert denied.value.status == 503
    check(calls[3], "another site's key")
    with pytest.raises(Denied, match="used before"):
        check(calls[0])
    now[0] = 0.25
    replays.prune()
    assert replays._seen == {}
    check(calls[3])


@pytest.mark.parametrize("where", ["head", "body", "nothing", "idle"])
def test_who_dawdles_is_sent_away(federation: Federation, behind: Behind, upstream: int, where: str) -> None:
    site = federation.site()
    with running(federation, upstream, head_s=0.3, body_s=0.3, idle_s=0.3) as gateway, gateway.connect(site) as sock:
        request = site.raw(body=b"hello")
        if where == "idle":
            sock.sendall(request)
            assert answers(sock)[0][0] == 200
        started = time.monotonic()
        for byte in request[:300] if where == "head" else ():  # 6 s, never silent and never done
            if any("not complete" in line for line in gateway.lines):
                break
            with contextlib.suppress(OSError):
                sock.sendall(bytes([byte]))
            time.sleep(0.02)
        if where == "body":
            sock.sendall(request[:-2])
        found = answers(sock)
        assert time.monotonic() - started < 5
        if where in ("head", "body"):
            words = {
                "head": "the headers were not complete within 0.3 s",
                "body": "press-07: sent nothing for 0.3 s of the body",
            }
            assert (found[0][0], words[where] in found[0][2]) == (408, True)
            gateway.said(words[where])
        else:
            assert found == []
        if where == "nothing":
            gateway.said("sent nothing for 0.3 s; the connection is closed")
        until(lambda: gateway.gateway.open == 0, "the connection to end")
    assert len(behind.arrived) == (where == "idle")


def test_a_superlink_that_is_away_is_waited_for(federation: Federation, behind: Behind) -> None:
    site = federation.site()
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    with running(federation, port) as gateway, gateway.client(site) as client:
        answer = client.post(PULL, headers=site.signed())
        assert (answer.status_code, "the SuperLink cannot be reached" in answer.text) == (502, True)
        for _ in range(
            3
        ):  # it restarts between two calls, and the connection that waited for the next one is of no use
            with superlink(federation, behind, port):
                assert client.post(PULL, headers=site.signed()).status_code == 200
                assert client.post(PULL, headers=site.signed()).status_code == 200
            until(
                lambda: not any(connection.is_quiet for connection in gateway.gateway._forwarder.pool._idle),
                "the gateway to notice",
            )
        assert client.post(PULL, headers=site.signed()).status_code == 502
        assert behind.connections == 3, "one each time, for both calls"


def test_a_refusal_is_read_although_the_body_was_on_its_way(federation: Federation, upstream: int) -> None:
    site = federation.site()
    federation.revoke(site)
    with running(federation, upstream, linger_s=3.0) as gateway:
        for _ in range(5):
            with gateway.client(site) as client:
                answer = client.post(PULL, content=bytes(8_000_000), headers=site.signed())
                assert (answer.status_code, "was revoked on" in answer.text) == (401, True)


def test_a_caller_who_leaves_is_not_answered_for_any_longer(
    federation: Federation, behind: Behind, gateway: Running
) -> None:
    site = federation.site()
    behind.hold.clear()
    with gateway.connect(site) as sock:
        sock.sendall(site.raw())
        until(lambda: behind.connections == 1, "the call to be under way")
    until(lambda: gateway.gateway.open == 0, "the connection to end, although the SuperLink has not answered")
    behind.hold.set()


def test_who_is_not_the_superlink_gets_nothing(federation: Federation, behind: Behind, upstream: int) -> None:
    """Another process on the loopback port, with a certificate of the same name."""
    site = federation.site()
    other = issue(keys.new_site_key(), "loopback", usage=keys.x509.oid.ExtendedKeyUsageOID.SERVER_AUTH)
    (federation.state / "loopback.crt").write_bytes(keys.certificate_pem(other))
    with running(federation, upstream) as gateway, gateway.client(site) as client:
        answer = client.post(PULL, headers=site.signed())
        assert answer.status_code == 502
        assert "CERTIFICATE_VERIFY_FAILED" in answer.text
    assert behind.arrived == []


def test_an_early_answer_is_passed_on_and_a_broken_one_is_not(
    federation: Federation, behind: Behind, gateway: Running
) -> None:
    site = federation.site()
    with gateway.client(site) as client:
        behind.answer = lambda one: (403, {"content-type": "application/json"}, b'{"detail": "run not running"}')
        answer = client.post(PULL, headers=site.signed())
        assert (answer.status_code, answer.json()["detail"]) == (403, "run not running"), (
            "Flower's own words reach Flower"
        )
        behind.answer = lambda one: (200, {"content-length": "50"}, b"short")
        with pytest.raises(httpx.TransportError):
            client.post(PULL, headers=site.signed(), timeout=0.5)
        behind.answer = lambda one: (200, {"content-length": "x"}, b"short")
        answer = client.post(PULL, headers=site.signed())
        assert (answer.status_code, "does not speak HTTP" in answer.text) == (502, True)


def server_seen(gateway: Running, site: Member) -> str:
    with gateway.connect(site) as sock:
        der = sock.getpeercert(binary_form=True)
        assert der is not None
        return keys.fingerprint(keys.x509.load_der_x509_certificate(der))


def test_a_new_server_certificate_holds_from_the_next_connection(federation: Federation, gateway: Running) -> None:
    site = federation.site()
    before = server_seen(gateway, site)
    with gateway.connect(site) as kept:
        after = keys.fingerprint(federation.new_server_certificate())
        assert server_seen(gateway, site) == after != before
        kept.sendall(site.raw())
        assert answers(kept)[0][0] == 200
        gateway.said("the next connection uses the new ones")


def test_half_a_new_certificate_changes_nothing_and_is_said_once(federation: Federation, gateway: Running) -> None:
    site = federation.site()
    before = server_seen(gateway, site)
    key = (federation.state / "server.key").read_bytes()
    federation.new_server_certificate(with_key=False)
    assert server_seen(gateway, site) == server_seen(gateway, site) == before
    assert len([line for line in gateway.lines if "do not fit together" in line]) == 1
    assert "The former certificate stays in use" in gateway.said("do not fit together")
    assert key == (federation.state / "server.key").read_bytes()
    after = federation.new_server_certificate()
    assert server_seen(gateway, site) == keys.fingerprint(after)


def test_a_damaged_book_lets_nobody_in(federation: Federation, behind: Behind, gateway: Running) -> None:
    site = federation.site()
    with gateway.client(site) as client:
        assert client.post(PULL, headers=site.signed()).status_code == 200
        federation.registry.path.write_text("{")
        answer = client.post(PULL, headers=site.signed())
        assert (answer.status_code, "nobody is let in now" in answer.text) == (503, True)
    assert len(behind.arrived) == 1


@pytest.mark.parametrize("limit", ["per_host", "connections"])
def test_more_connections_than_there_may_be_are_not_taken(federation: Federation, upstream: int, limit: str) -> None:
    site = federation.site()
    with running(federation, upstream, **{limit: 3}) as gateway:
        taken = [gateway.connect(site) for _ in range(3)]
        for _ in range(4):
            with pytest.raises(OSError):
                gateway.connect(site).close()
        assert gateway.gateway.open == 3
        said = [line for line in gateway.lines if "not taken" in line]
        assert said == [
            f"127.0.0.1: not taken: 3 connections are open from {'127.0.0.1' if limit == 'per_host' else 'all'} already, and no more are taken"
        ]
        taken.pop().close()
        until(lambda: gateway.gateway.open == 2, "one to end")
        with gateway.client(site) as client:
            assert client.post(PULL, headers=site.signed()).status_code == 200
        for sock in taken:
            sock.close()


def test_what_leaves_a_plant_can_be_recorded_to_the_byte(federation: Federation, behind: Behind, upstream: int) -> None:
    press, kiln = federation.site("press-07"), federation.site("kiln-02")
    seen: list[tuple[str, bytes]] = []
    with running(federation, upstream, tap=lambda site, data: seen.append((site, data))) as gateway:
        for site, body in ((press, os.urandom(3_000_000)), (kiln, b"small")):
            with gateway.client(site) as client:
                client.post(PULL, content=body, headers=site.signed())
            told = b"".join(data for name, data in seen if name == site.name)
            head, _, rest = told.partition(b"\r\n\r\n")
            assert rest == body == behind.arrived[-1].body
            arrived = [f"{k}: {v}".encode() for k, v in behind.arrived[-1].headers]
            assert head.split(b"\r\n") == [f"POST {PULL} HTTP/1.1".encode(), *arrived]


def test_a_peer_that_repeats_itself_does_not_fill_the_log() -> None:
    lines: list[str] = []
    now = [0.0]
    throttle = LogThrottle(lines.append, cap=3, clock=lambda: now[0])
    for _ in range(500):
        throttle.log("10.0.0.7", "no certificate", "10.0.0.7: showed none", 0.2)
    throttle.log("10.0.0.7", "path", "10.0.0.7: 404", 0.2)
    assert lines == ["10.0.0.7: showed none", "10.0.0.7: 404"]
    now[0] = 0.25
    throttle.log("10.0.0.7", "no certificate", "10.0.0.7: showed none", 0.2)
    assert lines[-1] == "10.0.0.7: showed none (and 499 times more since the last such line)"
    throttle.log("10.0.0.7", "no certificate", "10.0.0.7: showed none", 0.2)
    now[0] = 0.5
    throttle.flush(0.2)
    assert lines[-1] == "10.0.0.7: no certificate: 1 times more"
    for index in range(50):
        throttle.log(f"10.0.1.{index}", "path", "404", 60.0)
    assert len(throttle._last) == 3


def test_a_log_line_cannot_be_forged(federation: Federation, gateway: Running) -> None:
    site = federation.site()
    with gateway.connect(site) as sock:
        sock.sendall(site.raw("/a\x1b[2Jb\x7f" + "c" * 500))
        assert answers(sock)[0][0] in (400, 404)
    until(lambda: any("press-07 (" in line for line in gateway.lines), "the line")
    line = next(line for line in gateway.lines if "press-07 (" in line)
    assert line.isprintable()
    assert len(line) < 300


def test_a_state_folder_too_deep_for_a_socket_is_named(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 90)
    with pytest.raises(DeploymentError, match=r"registrar\.sock: too long for a unix socket .* shorter path"):
        Gateway(deep, ("127.0.0.1", 0), ("127.0.0.1", 1))


def test_addresses() -> None:
    assert parse_address("0.0.0.0:9140") == ("0.0.0.0", 9140)
    assert parse_address("[::1]:9140") == ("::1", 9140)
    for wrong in ("9140", "host", "host:", ":1", "host:99999", "host:x"):
        with pytest.raises(DeploymentError, match="not HOST:PORT"):
            parse_address(wrong)


def command(federation: Federation, port: int, listen: int) -> list[str]:
    return [
        *(sys.executable, "-m", "trunkline.server.gateway.gateway", "--state", str(federation.state)),
        *("--listen", f"127.0.0.1:{listen}", "--upstream", f"127.0.0.1:{port}"),
    ]


def test_the_command_serves_and_ends_within_three_seconds(
    federation: Federation, behind: Behind, upstream: int
) -> None:
    site = federation.site()
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    process = subprocess.Popen(command(federation, upstream, port), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert f"listens on 127.0.0.1:{port}; the SuperLink is at 127.0.0.1:{upstream}" in process.stdout.readline()
        with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=site.context(), timeout=WAIT_S) as client:
            assert client.post(PULL, headers=site.signed()).status_code == 200
            sock = site.context().wrap_socket(
                socket.create_connection(("127.0.0.1", port)), server_hostname="127.0.0.1"
            )
            sock.sendall(site.raw()[:-2])  # a call under way, and one that is idle, and one that has said nothing
            with socket.create_connection(("127.0.0.1", port)):
                started = time.monotonic()
                process.send_signal(signal.SIGTERM)
                assert process.wait(WAIT_S) == 0
                assert time.monotonic() - started < 3
            sock.close()
    finally:
        process.kill()
        process.communicate(timeout=WAIT_S)


def test_a_defect_in_a_part_of_it_ends_the_whole(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather that the daemon starts another than a port that takes nobody."""

    async def broken(self: Gateway) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Gateway, "_accept", broken)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(asyncio.wait_for(serve(federation.state, ("127.0.0.1", 0), ("127.0.0.1", 1)), WAIT_S))


def test_the_command_says_what_is_missing(federation: Federation) -> None:
    (federation.state / "server.key").unlink()
    found = subprocess.run(command(federation, 1, 0), capture_output=True, text=True, timeout=30, check=False)
    assert found.returncode == 1
    assert "server.crt, server.key, authority.crt, registry.json in" in found.stdout
    assert "`trunkline server init` makes them" in found.stdout
    assert "Traceback" not in found.stderr
