"""How a site joins a federation: it makes its keys, fetches a certificate with an invitation code, and renews it.

The private key never leaves the state folder. The site sends a certificate request over TLS 1.3, with a client certificate
derived from the code, to a server whose authority the code names.
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
PENDING = "pending.key"  # key of a request that was written to a file and has no answer yet
Body = TypeVar("Body", bound=BaseModel)


class Membership(Frozen):
    """A site's federation: its name, the site's own name in it, and host:port of the server."""

    federation: str
    site: str
    server: str = Field(default="", description="empty after joining by files, until it is given")


@dataclass(frozen=True)
class Joined:
    """The result of joining, to be shown."""

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
    """Fetch a certificate from the server at `server` (host:port) with an invitation.

    Args:
        key: source of the key that seals the state folder, see `security/encryption`; made if there is none.

    Raises:
        TrustError: the server cannot be reached, is another one, or refuses the code; an earlier identity stays.
    """
    site = _sealed(site_dir, state, key)
    with _invited(code) as (certificate, secret):
        # no server is trusted yet: the answer must be the authority that the code names
        first = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        first.check_hostname, first.verify_mode = False, ssl.CERT_NONE
        first.minimum_version = ssl.TLSVersion.TLSv1_3
        first.load_cert_chain(certificate, secret)
        server_info = _get(server, AUTHORITY_PATH, first, AuthorityInfo)
        authority = load_certificate(server_info.authority.encode(), server)
        if not code.names(authority):
            raise TrustError(
                f"{server}: its authority has the fingerprint {fingerprint(authority)[:32]}..., and the code was made by another. "
                "This is not the server that invited you, or the connection is intercepted. Nothing was sent. Check the address."
            )
        if server_info.site != site:
            raise TrustError(
                f"the code is for {server_info.site!r}, and {site_dir / 'site.toml'} says name = {site!r}. Use the code of this site, or "
                "change the name; the code is not used up."
            )
        second = _trusting(authority)
        second.load_cert_chain(certificate, secret)
        fresh = new_site_key()
        admitted = _post(server, JOIN_PATH, second, _request(fresh, site, state), Admission)
    return _install(state, admitted, authority, fresh, server)


def write_request(site_dir: Path, state: Path, code: Code, out: Path, key: str | None = None) -> None:
    """Write the request to join to a file, signed with the code's key, for a site that cannot reach the server.

    The site's new private key stays in the state folder until `accept_admission`.
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
    """Install the admission that the operator made from a request file.

    Raises:
        TrustError: the file is of another federation than the code, of another request, or no admission.
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
        TrustError: the server cannot be reached or refuses; the present certificate stays.
    """
    identity = Identity.of(state)
    key = load_key(identity.key.read_bytes(), str(identity.key))
    membership = read_membership(state)
    _check_dates(identity)
    request = RenewRequest(request=_csr(key, membership.site))
    admitted = _post(server or membership.server, RENEW_PATH, client_context(identity.folder), request, Admission)
    certificate = load_certificate(admitted.certificate.encode(), "the server's answer")
    _check(certificate, read_certificate(identity.authority), key, membership.site)
    write_atomic(identity.certificate, certificate_pem(certificate))
    return certificate


def hello(state: Path, server: str | None = None) -> tuple[Hello, datetime]:
    """The server's answer about this site, and the server's time.

    Raises:
        TrustError: the server cannot be reached, or refuses this site; the text is the server's own if it gave one.
    """
    identity = Identity.of(state)
    _check_dates(identity)
    answer = _get(server or read_membership(state).server, HELLO_PATH, client_context(identity.folder), Hello)
    try:
        return answer, datetime.fromisoformat(answer.now)
    except ValueError:
        raise TrustError(
            f"the server's time is {answer.now!r}, which is not ISO 8601. Update Trunkline at the server."
        ) from None


def _sealed(site_dir: Path, state: Path, key: str | None) -> str:
    """Seal the state folder, including the files that were in it unencrypted; the site's name."""
    check_clock()
    site = read_site(site_dir)
    if find_seal(state) is None:
        seal_state(state, key, tuple(site.tasks))
    else:
        make_seal(state, key)  # checks that it is the key in use
    return site.name


def _check_dates(identity: Identity) -> None:
    """Raise TrustError if the certificate is not valid: the TLS handshake would fail without a cause."""
    certificate = read_certificate(identity.certificate)
    check_clock(certificate)
    expiry = certificate.not_valid_after_utc
    if expiry < now():
        raise TrustError(
            f"this site's certificate has expired on {expiry:%Y-%m-%d %H:%M UTC} by the clock of this machine, so the server refuses it. "
            "Ask the operator for a new invitation (`trunkline server invite`) and join with `trunkline client join`."
        )


def _request(key: EllipticCurvePrivateKey, site: str, state: Path) -> JoinRequest:
    records = spki(records_key(state, find_seal(state)).public_key()).decode()
    return JoinRequest(request=_csr(key, site), records=records, version=trunkline.__version__)


def _csr(key: EllipticCurvePrivateKey, site: str) -> str:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA384())
    return request.public_bytes(Encoding.PEM).decode()


def _check(certificate: x509.Certificate, authority: x509.Certificate, key: Any, site: str) -> None:
    if key_id(certificate.public_key()) != key_id(key.public_key()):
        raise TrustError(
            "the server's certificate is for another key than the one made here. Nothing was changed; join again."
        )
    if not is_issued_by(certificate, authority) or common_name(certificate) != site:
        raise TrustError(
            f"the server's certificate is not {site}'s, or not by its authority. Nothing was changed; join again."
        )


def _install(
    state: Path, admitted: Admission, authority: x509.Certificate, key: EllipticCurvePrivateKey, server: str
) -> Joined:
    """Write the new identity; a former one is copied to a folder of its own, so that a mistake loses nothing."""
    certificate = load_certificate(admitted.certificate.encode(), "the server's answer")
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
    """The code's certificate and key as files, as TLS needs them; deleted at the end of the block."""
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
        raise TrustError(f"{server}: expected host:port, such as server.example.com:9140.") from None
    if answer.status_code != 200:
        raise TrustError(f"{server}: {_error_text(answer)}")
    try:
        return kind.model_validate_json(answer.content)
    except ValidationError:
        raise TrustError(f"{server}: its answer cannot be read. Is it a Trunkline server of this version?") from None


def _error_text(answer: httpx.Response) -> str:
    with contextlib.suppress(ValueError, AttributeError, TypeError):
        return str(json.loads(answer.content)["error"])[:1000]
    return f"answered {answer.status_code}: {answer.text[:300].strip()}"


ALERTS = {  # OpenSSL's texts for a failed handshake -> the cause for a person
    "certificate_required": "the server requires a client certificate and got none. Join first.",
    "unknown_ca": "the server does not know the signer of this certificate: it is of another federation, or of a code that is unknown or too old.",
    "certificate_expired": "by the server's clock this site's certificate has expired. Compare the two clocks (NTP); if both are right, ask the operator for a new invitation.",
    "bad_certificate": "by the server's clock this site's certificate is not valid yet: one of the two clocks is wrong. Set both by NTP.",
    "certificate_revoked": "this site's certificate was revoked. Ask the operator for a new invitation.",
    "self-signed certificate": "the server is not of this site's federation (its certificate is by another authority).",
    "unable to get local issuer": "the server is not of this site's federation (its certificate is by another authority).",
    "certificate has expired": "the server's certificate has expired, or the clock of this machine is wrong.",
    "not yet valid": "the server's certificate is not valid yet: the clock of this machine is behind.",
    "hostname mismatch": "the server's certificate is not for this name. Use the address that the operator gave, or have it added (`server init --host`).",
    "ip address mismatch": "the server's certificate is not for this address. Use the name that the operator gave.",
    "wrong_version_number": "this address does not answer with TLS: it is not a Trunkline gateway.",
    "wrong version number": "this address does not answer with TLS: it is not a Trunkline gateway.",
    "protocol_version": "this address does not answer with TLS 1.3.",
}


def _unreachable(server: str, error: Exception, context: ssl.SSLContext) -> str:
    text = str(error)
    if isinstance(error, httpx.ReadError | httpx.RemoteProtocolError | httpx.WriteError):
        # TLS 1.3 refuses a client after the client's handshake; a request sent meanwhile loses the cause
        text = _alert(server, context) or text
    lowered = text.lower()
    for alert, cause in ALERTS.items():
        if alert in lowered or alert.replace("_", " ") in lowered:
            return f"{server}: {cause}"
    if isinstance(error, httpx.ReadError | httpx.RemoteProtocolError | httpx.WriteError):
        return f"{server}: the connection was closed without an answer. The log of the server's gateway has the cause."
    return f"{server}: cannot be reached ({type(error).__name__}: {text}). Is the server running, and the network path open?"


def _alert(server: str, context: ssl.SSLContext) -> str:
    """The TLS alert of a server that closes the connection, read without sending a request; empty if none."""
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
