"""How a plant becomes a member: keys made here, a certificate fetched with a code, and kept fresh.

The private key never leaves the state folder. What is sent is a certificate request, over TLS 1.3 with a client
certificate made of the code, to a server whose authority the code names.
"""

import contextlib
import json
import shutil
import socket
import ssl
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from pydantic import BaseModel, Field, ValidationError

import trunkline
from trunkline.client.state.at_rest import seal_state
from trunkline.client.state.identity import Identity, records_key
from trunkline.config.site import read_site
from trunkline.errors import TrustError
from trunkline.flower.processes import client_context
from trunkline.protocol.frozen import Frozen
from trunkline.runtime.storage import write_atomic
from trunkline.security.encryption import find_seal, make_seal
from trunkline.security.enrolment import (
    AUTHORITY_PATH,
    HELLO_PATH,
    JOIN_PATH,
    RENEW_PATH,
    Admission,
    AuthorityInfo,
    Code,
    Hello,
    JoinFile,
    JoinRequest,
    RenewRequest,
)
from trunkline.security.keys import (
    certificate_pem,
    check_clock,
    common_name,
    fingerprint,
    is_issued_by,
    key_id,
    key_pem,
    load_certificate,
    load_key,
    new_site_key,
    now,
    read_certificate,
    sign,
    spki,
    write_site_key,
)

TIMEOUT_S = 20.0
ALERT_S = 3.0
MEMBERSHIP = "federation.json"
PENDING = "pending.key"  # of a request that went out as a file and is not answered yet
Body = TypeVar("Body", bound=BaseModel)


class Membership(Frozen):
    """What a site remembers of its federation: name, the site's own name there, host:port of the centre."""

    federation: str
    site: str
    server: str = Field(default="", description="empty until it is known, after joining by files")


@dataclass(frozen=True)
class Joined:
    """What joining brought, to be shown."""

    membership: Membership
    certificate: x509.Certificate
    authority: x509.Certificate


def read_membership(state: Path) -> Membership:
    """Raises TrustError when this site has not joined."""
    path = Identity.of(state).folder / MEMBERSHIP
    try:
        return Membership.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise TrustError(
            f"{state}: this site has joined no federation. `trunkline client join HOST:PORT --code CODE`."
        ) from None
    except (OSError, ValidationError) as error:
        raise TrustError(f"{path}: cannot be read ({type(error).__name__}). Join again.") from None


def join(site_dir: Path, state: Path, server: str, code: Code, key: str | None = None) -> Joined:
    """Fetch a certificate from the centre at `server` (host:port) with an invitation.

    Args:
        key: source of the key that seals the state folder, see `sealing`; made if there is none.

    Raises:
        TrustError: the centre cannot be reached, is another, or refuses the code; an identity that was here stays.
    """
    named = _sealed(site_dir, state, key)
    with _invited(code) as (certificate, secret):
        # nobody is trusted yet: the answer is believed only where it is the authority that the code names
        first = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        first.check_hostname, first.verify_mode = False, ssl.CERT_NONE
        first.minimum_version = ssl.TLSVersion.TLSv1_3
        first.load_cert_chain(certificate, secret)
        known = _get(server, AUTHORITY_PATH, first, AuthorityInfo)
        authority = load_certificate(known.authority.encode(), server)
        if not code.names(authority):
            raise TrustError(
                f"{server}: its authority has the fingerprint {fingerprint(authority)[:32]}..., and the code was made by another. "
                "This is not the server that invited you, or somebody is between: nothing was sent. Check the address."
            )
        if known.site != named:
            raise TrustError(
                f"the code is for {known.site!r}, and {site_dir / 'site.toml'} says name = {named!r}. Use the code of this site, or "
                "change the name; the code is not used up."
            )
        second = _trusting(authority)
        second.load_cert_chain(certificate, secret)
        fresh = new_site_key()
        admitted = _post(server, JOIN_PATH, second, _request(fresh, named, state), Admission)
    return _install(state, admitted, authority, fresh, server)


def write_request(site_dir: Path, state: Path, code: Code, out: Path, key: str | None = None) -> None:
    """The same by files, for a plant that cannot reach the centre: what it would have sent, signed with the code's key.

    The site's new private key waits in the state folder for `accept_admission`.
    """
    named = _sealed(site_dir, state, key)
    fresh = new_site_key()
    write_atomic(Identity.of(state).folder / PENDING, key_pem(fresh))
    asked = _request(fresh, named, state)
    text = asked.model_dump_json()
    file = JoinFile(
        invitation=key_id(code.key.public_key()), asked=asked, signature=sign(code.key, "join", text.encode())
    )
    write_atomic(out, file.model_dump_json(indent=1).encode())


def accept_admission(site_dir: Path, state: Path, code: Code, file: Path, server: str = "") -> Joined:
    """Take up what the operator made of a request file.

    Raises:
        TrustError: it is of another federation than the code, of another request, or no admission.
    """
    check_clock()
    pending = Identity.of(state).folder / PENDING
    if not pending.exists():
        raise TrustError(
            f"{pending}: no request is waiting here. `trunkline client join ... --request FILE` makes one."
        )
    try:
        admitted = Admission.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise TrustError(f"{file}: not an admission ({type(error).__name__}). Ask the operator for it again.") from None
    authority = load_certificate(admitted.authority.encode(), str(file))
    if not code.names(authority):
        raise TrustError(
            f"{file}: was made by another authority than the code. Use the answer to this site's own request."
        )
    if admitted.site != (named := read_site(site_dir).name):
        raise TrustError(f"{file}: is for {admitted.site!r}; {site_dir / 'site.toml'} says name = {named!r}.")
    joined = _install(state, admitted, authority, load_key(pending.read_bytes(), str(pending)), server)
    pending.unlink()
    return joined


def renew(state: Path, server: str | None = None) -> x509.Certificate:
    """Another certificate for the same key.

    Raises:
        TrustError: the centre cannot be reached or refuses; the certificate that was here stays.
    """
    identity = Identity.of(state)
    key = load_key(identity.key.read_bytes(), str(identity.key))
    membership = read_membership(state)
    _check_dates(identity)
    request = RenewRequest(request=_csr(key, membership.site))
    admitted = _post(server or membership.server, RENEW_PATH, client_context(identity.folder), request, Admission)
    certificate = load_certificate(admitted.certificate.encode(), "the centre's answer")
    _check(certificate, read_certificate(identity.authority), key, membership.site)
    write_atomic(identity.certificate, certificate_pem(certificate))
    return certificate


def hello(state: Path, server: str | None = None) -> tuple[Hello, datetime]:
    """How the centre sees this site, and the centre's time as it was answered.

    Raises:
        TrustError: it cannot be reached, or turns this site away; the text is the centre's own where it gave one.
    """
    identity = Identity.of(state)
    _check_dates(identity)
    said = _get(server or read_membership(state).server, HELLO_PATH, client_context(identity.folder), Hello)
    try:
        return said, datetime.fromisoformat(said.now)
    except ValueError:
        raise TrustError(f"the centre says it is {said.now!r}, which is no time. Update Trunkline there.") from None


def _sealed(site_dir: Path, state: Path, key: str | None) -> str:
    """The site's name; its state is sealed from here on, and what lay there in the clear too."""
    check_clock()
    site = read_site(site_dir)
    if find_seal(state) is None:
        seal_state(state, key, tuple(site.tasks))
    else:
        make_seal(state, key)  # checks that it is the key in use
    return site.name


def _check_dates(identity: Identity) -> None:
    """A certificate that is not valid is turned away in the handshake, without a word; this is the word."""
    certificate = read_certificate(identity.certificate)
    check_clock(certificate)
    over = certificate.not_valid_after_utc
    if over < now():
        raise TrustError(
            f"this site's certificate has expired on {over:%Y-%m-%d %H:%M UTC} by the clock here, so the centre lets nobody in with it. "
            "Ask the operator for a new invitation (`trunkline server invite`) and join with `trunkline client join`."
        )


def _request(key: EllipticCurvePrivateKey, site: str, state: Path) -> JoinRequest:
    records = spki(records_key(state, find_seal(state)).public_key()).decode()
    return JoinRequest(request=_csr(key, site), records=records, version=trunkline.__version__)


def _csr(key: EllipticCurvePrivateKey, site: str) -> str:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
    made = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA384())
    return made.public_bytes(Encoding.PEM).decode()


def _check(certificate: x509.Certificate, authority: x509.Certificate, key: Any, site: str) -> None:
    if key_id(certificate.public_key()) != key_id(key.public_key()):
        raise TrustError(
            "the centre's certificate is for another key than the one made here. Nothing was changed; join again."
        )
    if not is_issued_by(certificate, authority) or common_name(certificate) != site:
        raise TrustError(
            f"the centre's certificate is not {site}'s, or not by its authority. Nothing was changed; join again."
        )


def _install(
    state: Path, admitted: Admission, authority: x509.Certificate, key: EllipticCurvePrivateKey, server: str
) -> Joined:
    """Put an identity in place; a former one is kept aside, so that nothing is lost by a mistake."""
    certificate = load_certificate(admitted.certificate.encode(), "the centre's answer")
    _check(certificate, authority, key, admitted.site)
    identity = Identity.of(state)
    files = [identity.key, identity.node_key, identity.certificate, identity.authority, identity.folder / MEMBERSHIP]
    if identity.joined:
        aside = identity.folder / f"former-{now().strftime('%Y%m%dT%H%M%S')}"
        aside.mkdir(mode=0o700)
        for file in files:
            if file.exists():
                shutil.copy2(file, aside / file.name)
    membership = Membership(federation=admitted.federation, site=admitted.site, server=server)
    write_atomic(identity.folder / MEMBERSHIP, membership.model_dump_json(indent=1).encode())
    write_atomic(identity.authority, certificate_pem(authority))
    write_site_key(identity.node_key, key)
    write_atomic(identity.key, key_pem(key))
    write_atomic(identity.certificate, certificate_pem(certificate))  # last: only with it has the site joined
    return Joined(membership, certificate, authority)


@contextlib.contextmanager
def _invited(code: Code) -> Iterator[tuple[Path, Path]]:
    """The code's certificate and key as files, which is how TLS takes them; gone with the block."""
    with tempfile.TemporaryDirectory(prefix="trunkline-") as folder:  # mode 0700
        certificate, secret = Path(folder) / "code.crt", Path(folder) / "code.key"
        write_atomic(secret, key_pem(code.key))
        write_atomic(certificate, certificate_pem(code.certificate()))
        yield certificate, secret


def _trusting(authority: x509.Certificate) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=certificate_pem(authority).decode())
    return context


def _get(server: str, path: str, context: ssl.SSLContext, kind: type[Body]) -> Body:
    return _call("GET", server, path, context, None, kind)


def _post(server: str, path: str, context: ssl.SSLContext, body: BaseModel, kind: type[Body]) -> Body:
    return _call("POST", server, path, context, body.model_dump_json().encode(), kind)


def _call(method: str, server: str, path: str, context: ssl.SSLContext, body: bytes | None, kind: type[Body]) -> Body:
    try:
        with httpx.Client(verify=context, timeout=TIMEOUT_S) as client:  # follows no redirect
            answer = client.request(method, f"https://{server}{path}", content=body)
    except httpx.HTTPError as error:
        raise TrustError(_unreachable(server, error, context)) from None
    except httpx.InvalidURL:
        raise TrustError(f"{server}: expected host:port, such as centre.example.com:9140.") from None
    if answer.status_code != 200:
        raise TrustError(f"{server}: {_said(answer)}")
    try:
        return kind.model_validate_json(answer.content)
    except ValidationError:
        raise TrustError(
            f"{server}: its answer cannot be read. Is that a Trunkline centre, and as new as this?"
        ) from None


def _said(answer: httpx.Response) -> str:
    with contextlib.suppress(ValueError, AttributeError, TypeError):
        return str(json.loads(answer.content)["error"])[:1000]
    return f"answered {answer.status_code}: {answer.text[:300].strip()}"


ALERTS = {  # as OpenSSL words what the other side, or this one, found wrong in a handshake
    "certificate_required": "the centre wants a client certificate and got none. Join first.",
    "unknown_ca": "the centre does not know who signed this certificate: it is another federation's, or a code it never made or has forgotten.",
    "certificate_expired": "by the centre's clock this site's certificate has expired. Compare the two clocks (NTP); if both are right, ask the operator for a new invitation.",
    "bad_certificate": "by the centre's clock this site's certificate is not valid yet: the clock there is behind, or here it was ahead. Set both by NTP.",
    "certificate_revoked": "this site's certificate was revoked. Ask the operator for a new invitation.",
    "self-signed certificate": "the server is not of this site's federation (its certificate is by another authority).",
    "unable to get local issuer": "the server is not of this site's federation (its certificate is by another authority).",
    "certificate has expired": "the server's certificate has expired, or the clock here is wrong.",
    "not yet valid": "the server's certificate is not valid yet: the clock here is behind.",
    "hostname mismatch": "the server's certificate is not for this name. Use the address that the operator gave, or have it added (`server init --host`).",
    "ip address mismatch": "the server's certificate is not for this address. Use the name that the operator gave.",
    "wrong_version_number": "what answers there speaks no TLS: it is not a Trunkline gateway.",
    "wrong version number": "what answers there speaks no TLS: it is not a Trunkline gateway.",
    "protocol_version": "what answers there speaks no TLS 1.3.",
}


def _unreachable(server: str, error: Exception, context: ssl.SSLContext) -> str:
    text = str(error)
    if isinstance(error, httpx.ReadError | httpx.RemoteProtocolError | httpx.WriteError):
        # TLS 1.3 turns a client away after the client's side is done; what it says then is lost when a request crosses it
        text = _alert(server, context) or text
    lowered = text.lower()
    for sign_of, words in ALERTS.items():
        if sign_of in lowered or sign_of.replace("_", " ") in lowered:
            return f"{server}: {words}"
    if isinstance(error, httpx.ReadError | httpx.RemoteProtocolError | httpx.WriteError):
        return f"{server}: the connection was closed without an answer. The centre's gateway log says why."
    return (
        f"{server}: cannot be reached ({type(error).__name__}: {text}). Is the centre running, and the way to it open?"
    )


def _alert(server: str, context: ssl.SSLContext) -> str:
    """What a server that hangs up says when it is only listened to; empty if nothing."""
    host, _, port = server.rpartition(":")
    try:
        with (
            socket.create_connection((host.strip("[]"), int(port)), timeout=ALERT_S) as raw,
            context.wrap_socket(raw, server_hostname=host.strip("[]")) as secured,
        ):
            secured.recv(1)
    except (OSError, ValueError) as error:
        return str(error)
    return ""
