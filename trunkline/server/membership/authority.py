"""The federation's own certificate authority: `server init` makes it, and only the registrar and the operator open its key.

authority.crt, authority.key   signs everything below; the key is sealed
server.crt, server.key         the certificate of the gateway; rotated without a restart
loopback.crt, loopback.key     between the server's own processes, on 127.0.0.1 only
release.crt, release.key       signs released trunks; the key is sealed
audit.key                      signs the audit log; sealed
registry.json                  the enrolled sites and the invitations
federation.json                name, addresses and lifetimes
"""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import Field, ValidationError

from trunkline.errors import TrustError
from trunkline.protocol.frozen import Frozen
from trunkline.runtime.storage import write_atomic
from trunkline.security.encryption import find_seal, make_seal
from trunkline.security.enrolment import Admission, Code, JoinFile, JoinRequest
from trunkline.security.keys import (
    certificate_pem,
    check_clock,
    expiry_warning,
    fingerprint,
    is_signed,
    key_id,
    key_pem,
    load_key,
    load_public,
    new_signing_key,
    new_site_key,
    now,
    read_certificate,
    spki,
)
from trunkline.server.membership import audit_log as audit
from trunkline.server.membership.certificates import (
    AUTHORITY_DAYS,
    alternative_name,
    issue_server_certificate,
    issue_site_certificate,
    make_authority,
    make_loopback,
    read_requested_key,
)
from trunkline.server.membership.registry import Book, Enrolled, Invitation, Registry, explain_denial
from trunkline.server.releases.signing import issue_release_certificate, write_signer

KEPT = timedelta(days=90)  # how long an expired code stays in the registry, so that its refusal names the cause
FEDERATION = "federation.json"


class Federation(Frozen):
    """The settings of `server init`: name, hosts of the server's certificate, days that certificates are valid."""

    name: str = Field(min_length=1, max_length=64)
    hosts: tuple[str, ...]
    site_days: float = Field(default=365.0, gt=0.0)
    server_days: float = Field(default=180.0, gt=0.0)


def is_federation(state: Path) -> bool:
    return (state / FEDERATION).exists()


def read_federation(state: Path) -> Federation:
    """Raises TrustError when `server init` has not made a federation here, or its file is damaged."""
    try:
        return Federation.model_validate_json((state / FEDERATION).read_bytes())
    except FileNotFoundError:
        raise TrustError(f"{state}: no federation here. `trunkline server init --state {state}` makes one.") from None
    except (OSError, ValidationError) as error:
        raise TrustError(f"{state / FEDERATION}: cannot be read ({error}). Restore a backup of it.") from None


def init(
    state: Path, name: str, hosts: tuple[str, ...], key: str | None = None,
    site_days: float = 365.0, server_days: float = 180.0,
) -> x509.Certificate:  # fmt: skip
    """Make a federation in `state`; the certificate of its authority.

    Args:
        hosts: names and addresses by which plants reach the server.
        key: source of the key that seals the secrets of the state folder, see `security/encryption`.

    Raises:
        TrustError: `state` has a federation already, which is never overwritten; or the clock is wrong.
    """
    check_clock()  # a wrong clock would make certificates that have expired already
    if is_federation(state) or _was_complete(state):
        raise TrustError(
            f"{state}: a federation exists already ({FEDERATION}). Choose another --state; nothing was changed."
        )
    federation = Federation(name=name, hosts=hosts, site_days=site_days, server_days=server_days)
    for host in hosts:
        alternative_name(host)  # refuses a host that no certificate can name
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    state.chmod(0o700)
    seal = make_seal(state, key)
    root = new_site_key()
    authority = make_authority(root, name)
    write_atomic(state / "authority.key", seal.close(key_pem(root), "authority.key"))
    write_atomic(state / "authority.crt", certificate_pem(authority), mode=0o644)
    signing = new_signing_key()
    write_signer(state, signing, issue_release_certificate(root, authority, signing.public_key(), AUTHORITY_DAYS))
    write_atomic(state / "audit.key", seal.close(key_pem(new_signing_key()), "audit.key"))
    _write_loopback(state)
    Registry(state).create()
    Authority(state, federation, root, authority).rotate_server("the federation was made")
    # last: after an interruption `init` starts again
    write_atomic(state / FEDERATION, federation.model_dump_json(indent=1).encode())
    audit.note(state, "init", federation=name, authority=fingerprint(authority), hosts=list(hosts))
    return authority


def _was_complete(state: Path) -> bool:
    """Whether `init` has finished here once."""
    return (state / audit.AUDIT).exists()  # its last step begins the log


@dataclass(frozen=True)
class Authority:
    """The authority with its key open. Only the registrar and the operator's own commands hold one."""

    state: Path
    federation: Federation
    key: EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def open(cls, state: Path) -> "Authority":
        """Raises TrustError or StorageError when the sealing key is missing or wrong, or the clock is wrong."""
        federation = read_federation(state)
        seal = find_seal(state)
        if seal is None:
            raise TrustError(
                f"{state / 'seal.toml'}: missing. It names the key this federation is sealed with; restore it."
            )
        path = state / "authority.key"
        key = load_key(seal.open(path.read_bytes(), "authority.key", str(path)), str(path))
        certificate = read_certificate(state / "authority.crt")
        check_clock(certificate)
        return cls(state, federation, key, certificate)

    @property
    def registry(self) -> Registry:
        return Registry(self.state)

    def invite(self, site: str, hours: float) -> tuple[Code, Invitation]:
        """A new code for `site`; an unused earlier code for it is withdrawn.

        Raises:
            TrustError: `site` is no valid name for a site.
        """
        code = Code.new(self.certificate)
        proof = code.certificate()
        moment = now()
        try:
            invitation = Invitation(
                site=site,
                key=key_id(proof.public_key()),
                certificate=certificate_pem(proof).decode(),
                made=moment.isoformat(timespec="seconds"),
                expires=(moment + timedelta(hours=hours)).isoformat(timespec="seconds"),
            )
        except ValidationError:
            raise TrustError(
                f"site {site!r}: a name is letters, digits, dot, dash and underscore, at most 64."
            ) from None

        def add(book: Book) -> Book:
            kept = [
                other.model_copy(update={"withdrawn": invitation.made})
                if other.site == site and not (other.used or other.withdrawn)
                else other
                for other in book.invitations
                if other.made > (moment - KEPT).isoformat()
            ]
            return book.model_copy(update={"invitations": (*kept, invitation)})

        self.registry.write(add)
        audit.note(self.state, "invite", site=site, expires=invitation.expires)
        return code, invitation

    def admit(self, asked: JoinRequest, invitation_key: str, peer: str) -> Admission:
        """Enrol the site that a code was made for, with the key of its request.

        The same request with the same code gets the same certificate again: the first answer may have been lost.

        Raises:
            TrustError: the code is unknown, used, withdrawn or expired, or the request is invalid; nothing was changed.
        """
        public = read_requested_key(asked.request)
        records = load_public(asked.records.encode(), "the request's `records`")
        if not isinstance(records, Ed25519PublicKey):
            raise TrustError("the request's `records` is no Ed25519 key. Update Trunkline at the site.")
        key = key_id(public)
        admitted: list[Enrolled] = []
        is_new = True

        def enrol(book: Book) -> Book:
            nonlocal is_new
            moment = now().isoformat(timespec="seconds")
            invitation = book.invitation(invitation_key)
            if invitation is None:
                raise TrustError("this certificate is no invitation of this federation. Ask the operator for a code.")
            site, known_entry = invitation.site, book.by_key(key)
            if (
                known_entry is not None
                and not known_entry.revoked
                and known_entry.site == site
                and known_entry.since == invitation.used
            ):
                admitted.append(known_entry)
                is_new = False
                return book
            _check_invitation(invitation, moment)
            if known_entry is not None:
                raise TrustError(
                    f"{site}: its key is known already, as {known_entry.site}. Join again; that makes a new key."
                )
            certificate = self._certify(public, site)
            entry = Enrolled(
                site=site, key=key, spki=spki(public).decode(), records=asked.records, since=moment,
                **_certificate_fields(certificate),
            )  # fmt: skip
            admitted.append(entry)
            former = [
                other.model_copy(update={"revoked": moment, "reason": "it enrolled again with another key"})
                if other.site == site and not other.revoked
                else other
                for other in book.enrolled
            ]
            invitations = tuple(
                other.model_copy(update={"used": moment}) if other.key == invitation_key else other
                for other in book.invitations
            )
            return book.model_copy(update={"enrolled": (*former, entry), "invitations": invitations})

        self.registry.write(enrol)
        entry = admitted[0]
        if is_new:
            audit.note(
                self.state, "enrol", site=entry.site, key=key, serial=entry.serial, peer=peer, version=asked.version
            )
        return self._admission(entry)

    def admit_file(self, file: Path) -> Admission:
        """Enrol a site by a request that came as a file.

        Raises:
            TrustError: the file cannot be read, or was not made with the code it names.
        """
        try:
            request = JoinFile.model_validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            raise TrustError(
                f"{file}: not a request to join ({type(error).__name__}). Ask the site for it again."
            ) from None
        invitation = self.registry.read().invitation(request.invitation)
        if invitation is None:
            raise TrustError(f"{file}: answers no invitation of this federation. `trunkline server sites` lists them.")
        public: Any = x509.load_pem_x509_certificate(invitation.certificate.encode()).public_key()
        if not is_signed(public, "join", request.asked.model_dump_json().encode(), request.signature):
            raise TrustError(
                f"{file}: was altered, or not made with {invitation.site}'s code. Ask the site for it again."
            )
        return self.admit(request.asked, request.invitation, peer=f"file {file.name}")

    def renew(self, request: str, key: str) -> Admission:
        """Another certificate for an enrolled key.

        Raises:
            TrustError: the key is not enrolled, or the request is for another key.
        """
        public = read_requested_key(request)
        if key_id(public) != key:
            raise TrustError(
                "the request is for another key than the certificate it came with. To change keys, join again."
            )
        renewed: list[Enrolled] = []

        def replace(book: Book) -> Book:
            entry = book.by_key(key)
            if entry is None or entry.revoked:
                raise TrustError(explain_denial(entry))
            renewed.append(entry.model_copy(update=_certificate_fields(self._certify(public, entry.site))))
            return book.model_copy(
                update={"enrolled": tuple(renewed[0] if other is entry else other for other in book.enrolled)}
            )

        self.registry.write(replace)
        entry = renewed[0]
        audit.note(self.state, "renew", site=entry.site, serial=entry.serial, until=entry.until)
        return self._admission(entry)

    def rotate_server(self, reason: str) -> x509.Certificate:
        """A new key and certificate for the gateway, which loads them at its next connection."""
        key = new_site_key()
        certificate = issue_server_certificate(
            key.public_key(), self.federation.hosts, self.federation.server_days, self.key, self.certificate
        )
        write_atomic(self.state / "server.key", key_pem(key))
        write_atomic(self.state / "server.crt", certificate_pem(certificate), mode=0o644)
        if is_federation(self.state):
            audit.note(self.state, "rotate server certificate", why=reason, fingerprint=fingerprint(certificate))
        return certificate

    def _certify(self, public: EllipticCurvePublicKey, site: str) -> x509.Certificate:
        return issue_site_certificate(public, site, self.federation.site_days, self.key, self.certificate)

    def _admission(self, entry: Enrolled) -> Admission:
        return Admission(
            site=entry.site,
            federation=self.federation.name,
            certificate=entry.certificate,
            authority=certificate_pem(self.certificate).decode(),
        )


def revoke(state: Path, site: str, reason: str) -> Enrolled:
    """Refuse a site from its next request on. No key is needed, so that a revocation never has to wait for one.

    Raises:
        TrustError: the site is not enrolled, or is revoked already.
    """
    revoked: list[Enrolled] = []

    def change(book: Book) -> Book:
        entry = book.site(site)
        if entry is None:
            names = ", ".join(sorted({enrolled.site for enrolled in book.enrolled})) or "none"
            raise TrustError(f"{site}: no such site here. Enrolled: {names}.")
        if entry.revoked:
            raise TrustError(f"{site}: was revoked on {entry.revoked} already ({entry.reason}).")
        moment = now().isoformat(timespec="seconds")
        revoked.append(entry.model_copy(update={"revoked": moment, "reason": reason}))
        invitations = tuple(
            invitation.model_copy(update={"withdrawn": moment})
            if invitation.site == site and not (invitation.used or invitation.withdrawn)
            else invitation
            for invitation in book.invitations
        )
        enrolled = tuple(revoked[0] if other is entry else other for other in book.enrolled)
        return book.model_copy(update={"enrolled": enrolled, "invitations": invitations})

    Registry(state).write(change)
    audit.note(state, "revoke", site=site, reason=reason)
    return revoked[0]


def warnings(state: Path) -> list[str]:
    """A sentence for each certificate that expires soon; empty when all is well."""
    sentences = [
        expiry_warning(read_certificate(state / "server.crt"), "the server's certificate", "`trunkline server rotate`."),
        expiry_warning(
            read_certificate(state / "authority.crt"), "the federation's authority",
            "Make a new federation and enrol the sites there; nothing can be signed after that day.",
        ),
        *(
            expiry_warning(x509.load_pem_x509_certificate(entry.certificate.encode()), f"{site}'s certificate",
                           "The site renews it by itself when it is online; else invite it again.")
            for site, entry in sorted(Registry(state).read().welcome().items())
        ),
    ]  # fmt: skip
    return [sentence for sentence in sentences if sentence]


def _check_invitation(invitation: Invitation, moment: str) -> None:
    """Raise TrustError unless the code can be used at `moment` (ISO 8601)."""
    site = invitation.site
    if invitation.used:
        raise TrustError(
            f"{site}: this code was used on {invitation.used}. A code works once; ask the operator for another."
        )
    if invitation.withdrawn:
        raise TrustError(f"{site}: this code was withdrawn on {invitation.withdrawn}. Use the newer one.")
    if invitation.expires < moment:
        raise TrustError(f"{site}: this code expired on {invitation.expires}. Ask the operator for another.")


def _certificate_fields(certificate: x509.Certificate) -> dict[str, Any]:
    """The fields of `Enrolled` that come from its certificate."""
    return {
        "serial": f"{certificate.serial_number:x}",
        "until": certificate.not_valid_after_utc.isoformat(timespec="seconds"),
        "certificate": certificate_pem(certificate).decode(),
    }


def _write_loopback(state: Path) -> None:
    key = new_site_key()
    write_atomic(state / "loopback.key", key_pem(key))
    write_atomic(state / "loopback.crt", certificate_pem(make_loopback(key)), mode=0o644)
