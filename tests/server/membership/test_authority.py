"""The authority and its registrar: who is let in, once, as whom; and what is said to everybody else."""

import asyncio
import base64
import json
import urllib.parse
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

import trunkline.security.keys
from trunkline.client.agent.join import _csr
from trunkline.errors import StorageError, TamperError, TrustError
from trunkline.runtime.storage import write_atomic
from trunkline.security.enrolment import AUTHORITY_PATH, HELLO_PATH, JOIN_PATH, RENEW_PATH, Admission, Code, JoinRequest
from trunkline.security.keys import (
    is_issued_by,
    key_id,
    load_certificate,
    needs_renewal,
    new_signing_key,
    new_site_key,
    read_certificate,
    spki,
)
from trunkline.server.gateway import registrar
from trunkline.server.gateway.registrar import build_app
from trunkline.server.gateway.routes import CERTIFICATE, CERTIFICATE_PEM
from trunkline.server.membership import audit_log as audit
from trunkline.server.membership import authority
from trunkline.server.membership.authority import Authority
from trunkline.server.membership.registry import Registry


@pytest.fixture
def centre(tmp_path: Path) -> Authority:
    authority.init(tmp_path / "s", "north", ("centre.example", "10.0.0.5"), key=f"file:{tmp_path / 'key'}")
    return Authority.open(tmp_path / "s")


def asking(key: EllipticCurvePrivateKey | None = None, site: str = "press-07") -> JoinRequest:
    records = spki(new_signing_key().public_key()).decode()
    return JoinRequest(request=_csr(key or new_site_key(), site), records=records, version="0.1.0")


def key_of(code: Code) -> str:
    return key_id(code.key.public_key())


def test_what_is_made_is_sealed_and_made_once(centre: Authority, tmp_path: Path) -> None:
    for name in ("authority.key", "release.key", "audit.key"):
        data = (centre.state / name).read_bytes()
        assert b"PRIVATE" not in data and data.startswith(b"trunkline-sealed")
    assert centre.state.stat().st_mode & 0o077 == 0
    before = {path: path.read_bytes() for path in centre.state.iterdir() if path.is_file()}
    with pytest.raises(TrustError, match="exists already"):
        authority.init(centre.state, "south", ())
    assert {path: path.read_bytes() for path in centre.state.iterdir() if path.is_file()} == before
    (tmp_path / "key").unlink()
    with pytest.raises(TrustError, match=r"key file is gone.*nothing was changed"):
        Authority.open(centre.state)


def test_a_making_that_was_cut_short_is_made_anew_and_a_lost_file_makes_no_new_federation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "s"
    with monkeypatch.context() as patch:

        def full(path: Path, data: bytes, mode: int = 0o600) -> None:
            if path.name == "federation.json":  # it is written last
                raise StorageError("the disk is full")
            write_atomic(path, data, mode)

        patch.setattr(authority, "write_atomic", full)
        with pytest.raises(StorageError):
            authority.init(state, "north", (), key=f"file:{tmp_path / 'key'}")
    made = authority.init(state, "north", ())
    assert Authority.open(state).certificate == made
    (state / "federation.json").unlink()
    with pytest.raises(TrustError, match="exists already"):
        authority.init(state, "north", ())


def test_a_superlink_that_has_forgotten_a_site_is_told_of_it_again(
    centre: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _ = centre.invite("press-07", 1.0)
    centre.admit(asking(), key_of(code), "test")
    nodes: dict[int, bytes] = {}

    def register(address: str, public: bytes, name: str, *, ca: bytes) -> int:
        number = 7 + len(nodes)
        nodes[number] = public
        return number

    listed = [{"node": 7, "status": "offline"}]
    monkeypatch.setattr(registrar, "register_node", register)
    monkeypatch.setattr(registrar, "list_nodes", lambda address, *, ca: listed)
    registrar.reconcile(centre, "", b"")
    registrar.forget_unknown(centre, "", b"")
    assert centre.registry.read().nodes() == {7: "press-07"}
    listed.clear()
    registrar.forget_unknown(centre, "", b"")
    assert centre.registry.read().nodes() == {}
    registrar.reconcile(centre, "", b"")
    assert centre.registry.read().nodes() == {8: "press-07"}


def test_the_authority_signs_and_what_it_signs_may_not(centre: Authority) -> None:
    code, _ = centre.invite("press-07", 1.0)
    admitted = centre.admit(asking(), key_of(code), "test")
    site = load_certificate(admitted.certificate.encode(), "answer")
    server = read_certificate(centre.state / "server.crt")
    usage = {ExtendedKeyUsageOID.CLIENT_AUTH: site, ExtendedKeyUsageOID.SERVER_AUTH: server}
    for kind, certificate in usage.items():
        assert is_issued_by(certificate, centre.certificate)
        found = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(found) == [kind], "a site cannot pass for the server, nor the server for a site"
        assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["centre.example", "localhost"]
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.5", "127.0.0.1"]


def test_a_code_works_once_and_its_answer_can_be_asked_for_again(centre: Authority) -> None:
    code, _ = centre.invite("press-07", 1.0)
    asked = asking()
    first = centre.admit(asked, key_of(code), "test")
    assert centre.admit(asked, key_of(code), "test") == first, "the answer got lost on its way"
    with pytest.raises(TrustError, match=r"press-07: this code was used on .* A code works once"):
        centre.admit(asking(), key_of(code), "test")
    assert [link.body["what"] for link in audit.read(centre.state)] == ["init", "invite", "enrol"]


def test_codes_that_are_over_withdrawn_or_unknown_let_nobody_in(
    centre: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, _ = centre.invite("press-07", 1.0)
    new, _ = centre.invite("press-07", 1.0)
    with pytest.raises(TrustError, match="was withdrawn"):
        centre.admit(asking(), key_of(old), "test")
    with pytest.raises(TrustError, match="no invitation of this federation"):
        centre.admit(asking(), key_of(Code(bytes(16), bytes(16))), "test")
    real = trunkline.security.keys.now
    monkeypatch.setattr(authority, "now", lambda: real() + timedelta(hours=2))
    with pytest.raises(TrustError, match=r"press-07: this code expired on .* Ask the operator for another"):
        centre.admit(asking(), key_of(new), "test")
    assert not centre.registry.read().enrolled


def forged_request() -> str:
    """A request for a key whose holder never asked: the signature is another's."""
    good, other = (x509.load_pem_x509_csr(_csr(new_site_key(), "press-07").encode()) for _ in range(2))
    der = good.public_bytes(Encoding.DER)
    body = der.replace(good.tbs_certrequest_bytes, other.tbs_certrequest_bytes)
    return (
        "-----BEGIN CERTIFICATE REQUEST-----\n"
        + base64.b64encode(body).decode()
        + "\n-----END CERTIFICATE REQUEST-----\n"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"request": "hello"}, "not one in PEM"),
        ({"request": _csr(generate_private_key(SECP256R1()), "press-07")}, "not signed by a key on P-384"),
        ({"request": forged_request()}, "not signed by a key on P-384"),
        ({"records": "hello"}, "not a public key in PEM"),
        ({"records": spki(new_site_key().public_key()).decode()}, "no Ed25519 key"),
    ],
)
def test_a_request_that_is_not_right_uses_no_code_up(centre: Authority, change: dict[str, str], words: str) -> None:
    code, _ = centre.invite("press-07", 1.0)
    with pytest.raises(TrustError, match=words):
        centre.admit(asking().model_copy(update=change), key_of(code), "test")
    assert not centre.registry.read().enrolled
    centre.admit(asking(), key_of(code), "test")


def test_a_key_belongs_to_one_site_for_ever(centre: Authority) -> None:
    key = new_site_key()
    one, _ = centre.invite("press-07", 1.0)
    centre.admit(asking(key), key_of(one), "test")
    authority.revoke(centre.state, "press-07", "lost")
    for site in ("press-07", "kiln-02"):
        code, _ = centre.invite(site, 1.0)
        with pytest.raises(TrustError, match=r"its key is known already, as press-07\. Join again"):
            centre.admit(asking(key), key_of(code), "test")


def test_who_enrols_again_replaces_himself_and_nobody_else(centre: Authority) -> None:
    for site in ("press-07", "kiln-02", "press-07"):
        code, _ = centre.invite(site, 1.0)
        centre.admit(asking(site=site), key_of(code), "test")
    book = centre.registry.read()
    assert [bool(one.revoked) for one in book.enrolled] == [True, False, False]
    assert sorted(book.welcome()) == ["kiln-02", "press-07"]
    assert book.site("press-07") == book.enrolled[2]


def test_only_a_welcome_key_gets_another_certificate_and_only_for_itself(centre: Authority) -> None:
    key = new_site_key()
    code, _ = centre.invite("press-07", 1.0)
    first = centre.admit(asking(key), key_of(code), "test")
    own = key_id(key.public_key())
    renewed = centre.renew(_csr(key, "press-07"), own)
    assert renewed.certificate != first.certificate
    assert centre.registry.read().by_key(own).certificate == renewed.certificate  # type: ignore[union-attr]
    with pytest.raises(TrustError, match="for another key"):
        centre.renew(_csr(new_site_key(), "press-07"), own)
    authority.revoke(centre.state, "press-07", "sold")
    with pytest.raises(TrustError, match=r"press-07: this certificate was revoked on .*\(sold\)"):
        centre.renew(_csr(key, "press-07"), own)


def test_revoking_needs_no_key_and_names_what_it_cannot_find(centre: Authority, tmp_path: Path) -> None:
    code, _ = centre.invite("press-07", 1.0)
    centre.admit(asking(), key_of(code), "test")
    with pytest.raises(TrustError, match=r"kiln-02: no such site here\. Enrolled: press-07"):
        authority.revoke(centre.state, "kiln-02", "")
    authority.revoke(centre.state, "press-07", "sold")
    with pytest.raises(TrustError, match=r"was revoked on .* already"):
        authority.revoke(centre.state, "press-07", "")


def test_a_damaged_register_lets_nobody_in_and_is_not_written_over(centre: Authority) -> None:
    path = centre.state / "registry.json"
    path.write_text("{")
    with pytest.raises(StorageError, match="Restore a backup"):
        Registry(centre.state).read()
    with pytest.raises(StorageError, match="Restore a backup"):
        centre.invite("press-07", 1.0)
    assert path.read_text() == "{"


def test_what_ends_soon_is_said_ahead_of_time(centre: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _ = centre.invite("press-07", 1.0)
    centre.admit(asking(), key_of(code), "test")
    assert authority.warnings(centre.state) == []
    real = trunkline.security.keys.now
    monkeypatch.setattr(trunkline.security.keys, "now", lambda: real() + timedelta(days=170))
    (server,) = authority.warnings(centre.state)
    assert server.startswith("the server's certificate expires in 10 days") and "trunkline server rotate" in server
    assert needs_renewal(read_certificate(centre.state / "server.crt"))
    monkeypatch.setattr(trunkline.security.keys, "now", lambda: real() + timedelta(days=366))
    assert any("press-07's certificate has expired" in one for one in authority.warnings(centre.state))


def test_the_audit_log_shows_an_altered_line_and_can_begin_anew(centre: Authority) -> None:
    centre.invite("press-07", 1.0)
    path = centre.state / "audit.jsonl"
    path.write_bytes(path.read_bytes().replace(b"press-07", b"press-08"))
    with pytest.raises(TamperError, match="line 2"):
        list(audit.read(centre.state))
    aside = audit.replace_tampered(centre.state)
    assert b"press-08" in aside.read_bytes()
    (line,) = audit.read(centre.state)
    assert line.body["what"] == "begin anew" and "line 2" in line.body["because"]
    with pytest.raises(TrustError, match="is intact"):
        audit.replace_tampered(centre.state)


def call(centre: Authority) -> Callable[..., Any]:
    app = build_app(centre, "127.0.0.1:1", b"")

    async def send(method: str, path: str, headers: dict[str, str], body: bytes) -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://registrar") as client:
            return await client.request(method, path, headers=headers, content=body)

    def ask(method: str, path: str, certificate: x509.Certificate | None, body: bytes = b"", pem: bool = False) -> Any:
        headers = {}
        if certificate is not None and not pem:
            headers[CERTIFICATE] = base64.b64encode(certificate.public_bytes(Encoding.DER)).decode()
        elif certificate is not None:
            headers[CERTIFICATE_PEM] = urllib.parse.quote(certificate.public_bytes(Encoding.PEM).decode())
        return asyncio.run(send(method, path, headers, body))

    return ask


@pytest.mark.parametrize("pem", [False, True])
def test_the_registrar_answers_who_holds_what(centre: Authority, pem: bool) -> None:
    ask = call(centre)
    code, _ = centre.invite("press-07", 1.0)
    key = new_site_key()
    known = ask("GET", AUTHORITY_PATH, code.certificate(), pem=pem).json()
    assert known["site"] == "press-07" and code.names(load_certificate(known["authority"].encode(), "answer"))
    answer = ask("POST", JOIN_PATH, code.certificate(), asking(key).model_dump_json().encode(), pem=pem)
    own = load_certificate(Admission.model_validate_json(answer.content).certificate.encode(), "answer")
    hello = ask("GET", HELLO_PATH, own, pem=pem).json()
    assert hello["site"] == "press-07"
    renewed = ask("POST", RENEW_PATH, own, json.dumps({"request": _csr(key, "press-07")}).encode(), pem=pem)
    assert renewed.status_code == 200


def test_the_registrar_says_in_words_what_is_wrong(centre: Authority) -> None:
    ask = call(centre)
    code, _ = centre.invite("press-07", 1.0)
    stranger = Code(bytes(16), bytes(16)).certificate()
    for certificate, words in ((None, "no client certificate"), (stranger, "not enrolled here")):
        answer = ask("GET", AUTHORITY_PATH, certificate)
        assert answer.status_code == 401 and words in answer.json()["error"]
    answer = ask("POST", JOIN_PATH, code.certificate(), b"{}")
    assert answer.status_code == 401 and "request: Field required" in answer.json()["error"]
    assert ask("POST", JOIN_PATH, code.certificate(), b"x" * 70_000).status_code == 413
    assert ask("GET", JOIN_PATH, code.certificate()).status_code == 405
    assert ask("GET", "/docs", code.certificate()).status_code == 404
