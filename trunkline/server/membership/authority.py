"""The federation's own certificate authority: made by `server init`, its key sealed, opened by the registrar and the operator only.

authority.crt, authority.key   signs everything below; the key is sealed
server.crt, server.key         what plants see at the gateway; rotated without a restart
loopback.crt, loopback.key     between the centre's own parts, on 127.0.0.1 only
release.crt, release.key       signs released trunks; the key is sealed
audit.key                      signs the audit log; sealed
registry.json, federation.json who may come in; name, addresses and lifetimes
"""

import contextlib
import ipaddress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
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
    key_id,
    key_pem,
    load_key,
    load_public,
    new_signing_key,
    new_site_key,
    now,
    read_certificate,
    signed,
    spki,
)
from trunkline.server.membership import audit_log as audit
from trunkline.server.membership.registry import Book, Enrolled, Invitation, Registry, turned_away
from trunkline.server.releases.signing import issue_release_certificate, write_signer

SLACK = timedelta(minutes=5)  # certificates hold from a little before now: a plant's clock may be behind
AUTHORITY_DAYS = 3650
KEPT = timedelta(days=90)  # how long a code that is over is remembered, so that who tries it is told why
FEDERATION = "federation.json"


class Federation(Frozen):
    """What `server init` was told: name, names and addresses in the server's certificate, days certificates are valid."""

    name: str = Field(min_length=1, max_length=64)
    hosts: tuple[str, ...]
    site_days: float = Field(default=365.0, gt=0.0)
    server_days: float = Field(default=180.0, gt=0.0)


def is_federation(state: Path) -> bool:
    return (state / FEDERATION).exists()


def read_federation(state: Path) -> Federation:
    """Raises TrustError when `server init` has not been here, or its file is damaged."""
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
    """Make a federation in `state`; its authority's certificate.

    Args:
        hosts: names and addresses by which plants reach the server.
        key: source of the key that seals what is secret here, see `sealing`.

    Raises:
        TrustError: there is one already: nothing is ever made over it; or the clock is wrong.
    """
    check_clock()  # what it made would be over before anybody joined
    if is_federation(state) or _was_whole(state):
        raise TrustError(
            f"{state}: a federation is here already ({FEDERATION}). Choose another --state; nothing was changed."
        )
    federation = Federation(name=name, hosts=hosts, site_days=site_days, server_days=server_days)
    for host in hosts:
        _alternative(host)
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    state.chmod(0o700)
    seal = make_seal(state, key)
    root = new_site_key()
    authority = _authority(root, name)
    write_atomic(state / "authority.key", seal.close(key_pem(root), "authority.key"))
    write_atomic(state / "authority.crt", certificate_pem(authority), mode=0o644)
    signing = new_signing_key()
    write_signer(state, signing, issue_release_certificate(root, authority, signing.public_key(), AUTHORITY_DAYS))
    write_atomic(state / "audit.key", seal.close(key_pem(new_signing_key()), "audit.key"))
    _loopback(state)
    Registry(state).make()
    # last: a federation whose making was cut short is made anew
    made = Authority(state, federation, root, authority)
    made.rotate_server("the federation was made")
    write_atomic(state / FEDERATION, federation.model_dump_json(indent=1).encode())
    audit.note(state, "init", federation=name, authority=fingerprint(authority), hosts=list(hosts))
    return authority


def _was_whole(state: Path) -> bool:
    """Whether what is here was a federation once, and not one whose making was cut short."""
    return (state / audit.AUDIT).exists()  # begun when all else was there


@dataclass(frozen=True)
class Authority:
    """The authority with its key open. Only the registrar and the operator's own commands hold one."""

    state: Path
    federation: Federation
    key: EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def open(cls, state: Path) -> "Authority":
        """Raises TrustError or StorageError when the key that seals it is missing or another, or the clock is wrong."""
        federation = read_federation(state)
        seal = find_seal(state)
        if seal is None:
            raise TrustError(
                f"{state / 'seal.toml'}: gone. It names the key this federation is sealed with; restore it."
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
        """A code for `site`; a code that is out for it already is withdrawn.

        Raises:
            TrustError: that is no name for a site.
        """
        code = Code.new(self.certificate)
        proof = code.certificate()
        moment = now()
        try:
            made = Invitation(
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

        def put(book: Book) -> Book:
            kept = [
                one.model_copy(update={"withdrawn": made.made})
                if one.site == site and not (one.used or one.withdrawn)
                else one
                for one in book.invitations
                if one.made > (moment - KEPT).isoformat()
            ]
            return book.model_copy(update={"invitations": (*kept, made)})

        self.registry.write(put)
        audit.note(self.state, "invite", site=site, expires=made.expires)
        return code, made

    def admit(self, asked: JoinRequest, invitation_key: str, peer: str) -> Admission:
        """Enrol the site that a code was made for, with the key it asks for.

        Asked again with the same code and key (an answer that got lost), the same certificate is given again.

        Raises:
            TrustError: the code is unknown, used, withdrawn or over, or the request is not right; nothing was changed.
        """
        public = _requested(asked.request)
        records = load_public(asked.records.encode(), "the request's `records`")
        if not isinstance(records, Ed25519PublicKey):
            raise TrustError("the request's `records` is no Ed25519 key. Update Trunkline at the site.")
        key, admitted, again = key_id(public), [], []

        def put(book: Book) -> Book:
            moment = now()
            invited = book.invitation(invitation_key)
            if invited is None:
                raise TrustError("this certificate is no invitation of this federation. Ask the operator for a code.")
            site, known = invited.site, book.by_key(key)
            if (
                invited.used
                and known is not None
                and known.site == site
                and not known.revoked
                and known.since == invited.used
            ):
                admitted.append(known)
                again.append(True)
                return book
            if invited.used:
                raise TrustError(
                    f"{site}: this code was used on {invited.used}. A code works once; ask the operator for another."
                )
            if invited.withdrawn:
                raise TrustError(f"{site}: this code was withdrawn on {invited.withdrawn}. Use the newer one.")
            if invited.expires < moment.isoformat(timespec="seconds"):
                raise TrustError(f"{site}: this code expired on {invited.expires}. Ask the operator for another.")
            if known is not None:
                raise TrustError(
                    f"{site}: its key is known already, as {known.site}. Join again; that makes a new key."
                )
            certificate = self._site_certificate(public, site)
            since = moment.isoformat(timespec="seconds")
            entry = Enrolled(
                site=site, key=key, spki=spki(public).decode(), records=asked.records, since=since, **_told(certificate)
            )
            admitted.append(entry)
            former = [
                one.model_copy(update={"revoked": since, "reason": "it enrolled again with another key"})
                if one.site == site and not one.revoked
                else one
                for one in book.enrolled
            ]
            spent = [
                one.model_copy(update={"used": since}) if one.key == invitation_key else one for one in book.invitations
            ]
            return book.model_copy(update={"enrolled": (*former, entry), "invitations": tuple(spent)})

        self.registry.write(put)
        entry: Enrolled = admitted[0]
        if not again:
            audit.note(
                self.state, "enrol", site=entry.site, key=key, serial=entry.serial, peer=peer, version=asked.version
            )
        return Admission(
            site=entry.site,
            federation=self.federation.name,
            certificate=entry.certificate,
            authority=certificate_pem(self.certificate).decode(),
        )

    def admit_file(self, file: Path) -> Admission:
        """The same for a request that came by hand.

        Raises:
            TrustError: it cannot be read, or was not made with the code it names.
        """
        try:
            came = JoinFile.model_validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            raise TrustError(
                f"{file}: not a request to join ({type(error).__name__}). Ask the site for it again."
            ) from None
        invited = self.registry.read().invitation(came.invitation)
        if invited is None:
            raise TrustError(f"{file}: answers no invitation of this federation. `trunkline server sites` lists them.")
        public: Any = x509.load_pem_x509_certificate(invited.certificate.encode()).public_key()
        if not signed(public, "join", came.asked.model_dump_json().encode(), came.signature):
            raise TrustError(f"{file}: was altered, or not made with {invited.site}'s code. Ask the site for it again.")
        return self.admit(came.asked, came.invitation, peer=f"file {file.name}")

    def renew(self, request: str, key: str) -> Admission:
        """Another certificate for a key that is welcome.

        Raises:
            TrustError: it is not, or the request is for another key.
        """
        public = _requested(request)
        if key_id(public) != key:
            raise TrustError(
                "the request is for another key than the certificate it came with. To change keys, join again."
            )
        renewed = []

        def put(book: Book) -> Book:
            entry = book.by_key(key)
            if entry is None or entry.revoked:
                raise TrustError(turned_away(entry))
            certificate = self._site_certificate(public, entry.site)
            renewed.append(entry.model_copy(update=_told(certificate)))
            return book.model_copy(
                update={"enrolled": tuple(renewed[0] if one is entry else one for one in book.enrolled)}
            )

        self.registry.write(put)
        entry = renewed[0]
        audit.note(self.state, "renew", site=entry.site, serial=entry.serial, until=entry.until)
        return Admission(
            site=entry.site,
            federation=self.federation.name,
            certificate=entry.certificate,
            authority=certificate_pem(self.certificate).decode(),
        )

    def rotate_server(self, why: str) -> x509.Certificate:
        """A new key and certificate for the gateway, which takes them up at its next connection."""
        key = new_site_key()
        names = [*dict.fromkeys([*self.federation.hosts, "localhost", "127.0.0.1"])]
        certificate = _sign(
            _builder(_name(self.federation.hosts[0] if self.federation.hosts else "localhost"), key.public_key(), self.federation.server_days)
            .add_extension(x509.SubjectAlternativeName([_alternative(one) for one in names]), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False),
            self.key, self.certificate,
        )  # fmt: skip
        write_atomic(self.state / "server.key", key_pem(key))
        write_atomic(self.state / "server.crt", certificate_pem(certificate), mode=0o644)
        if is_federation(self.state):
            audit.note(self.state, "rotate server certificate", why=why, fingerprint=fingerprint(certificate))
        return certificate

    def _site_certificate(self, public: EllipticCurvePublicKey, site: str) -> x509.Certificate:
        return _sign(
            _builder(_name(site), public, self.federation.site_days).add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
            ),
            self.key, self.certificate,
        )  # fmt: skip


def revoke(state: Path, site: str, reason: str) -> Enrolled:
    """Turn a site away from its next request on; needs no key, so that it can be done in a hurry.

    Raises:
        TrustError: no such site, or it is revoked already.
    """
    found = []

    def put(book: Book) -> Book:
        entry = book.site(site)
        if entry is None:
            names = ", ".join(sorted({one.site for one in book.enrolled})) or "none"
            raise TrustError(f"{site}: no such site here. Enrolled: {names}.")
        if entry.revoked:
            raise TrustError(f"{site}: was revoked on {entry.revoked} already ({entry.reason}).")
        moment = now().isoformat(timespec="seconds")
        found.append(entry.model_copy(update={"revoked": moment, "reason": reason}))
        invitations = tuple(
            one.model_copy(update={"withdrawn": moment})
            if one.site == site and not (one.used or one.withdrawn)
            else one
            for one in book.invitations
        )
        enrolled = tuple(found[0] if one is entry else one for one in book.enrolled)
        return book.model_copy(update={"enrolled": enrolled, "invitations": invitations})

    Registry(state).write(put)
    audit.note(state, "revoke", site=site, reason=reason)
    return found[0]


def warnings(state: Path) -> list[str]:
    """What will stop working soon, in sentences; empty when all is well."""
    found = [
        expiry_warning(read_certificate(state / "server.crt"), "the server's certificate", "`trunkline server rotate`."),
        expiry_warning(
            read_certificate(state / "authority.crt"), "the federation's authority",
            "Make a new federation and enrol the sites there; nothing can be signed after that day.",
        ),
        *(
            expiry_warning(x509.load_pem_x509_certificate(one.certificate.encode()), f"{site}'s certificate",
                           "The site renews it by itself when it is online; else invite it again.")
            for site, one in sorted(Registry(state).read().welcome().items())
        ),
    ]  # fmt: skip
    return [one for one in found if one]


def _requested(pem: str) -> EllipticCurvePublicKey:
    """The key a certificate request proves to hold."""
    try:
        asked = x509.load_pem_x509_csr(pem.encode())
        right = asked.is_signature_valid
        public: Any = asked.public_key()
    except (ValueError, TypeError):
        raise TrustError("the certificate request is not one in PEM. Update Trunkline at the site.") from None
    if not right or not isinstance(public, EllipticCurvePublicKey) or not isinstance(public.curve, SECP384R1):
        raise TrustError("the certificate request is not signed by a key on P-384. Update Trunkline at the site.")
    return public


def _told(certificate: x509.Certificate) -> dict[str, Any]:
    return {
        "serial": f"{certificate.serial_number:x}",
        "until": certificate.not_valid_after_utc.isoformat(timespec="seconds"),
        "certificate": certificate_pem(certificate).decode(),
    }


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _builder(subject: x509.Name, public: Any, days: float) -> x509.CertificateBuilder:
    moment = now()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(moment - min(SLACK, timedelta(days=days)))
        .not_valid_after(moment + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _sign(builder: x509.CertificateBuilder, key: EllipticCurvePrivateKey, issuer: x509.Certificate) -> x509.Certificate:
    builder = builder.issuer_name(issuer.subject).add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False
    )
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )


def _authority(key: EllipticCurvePrivateKey, name: str) -> x509.Certificate:
    """Self-signed; it signs certificates and nothing else, and nothing it signed may sign."""
    subject = _name(name)  # releases are told by it
    return (
        _builder(subject, key.public_key(), AUTHORITY_DAYS)
        .issuer_name(subject)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(False, False, False, False, False, True, True, False, False), critical=True)
        .sign(key, hashes.SHA384())
    )


def _loopback(state: Path) -> None:
    """A certificate of its own for the centre's inner traffic: no plant trusts it, and it is valid nowhere else."""
    key = new_site_key()
    subject = _name("trunkline loopback")
    certificate = (
        _builder(subject, key.public_key(), AUTHORITY_DAYS)
        .issuer_name(subject)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([_alternative("127.0.0.1"), _alternative("localhost")]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(True, False, False, False, False, True, False, False, False), critical=True)
        .sign(key, hashes.SHA384())
    )
    write_atomic(state / "loopback.key", key_pem(key))
    write_atomic(state / "loopback.crt", certificate_pem(certificate), mode=0o644)


def _alternative(host: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    try:
        return x509.DNSName(host.encode("idna").decode())
    except (UnicodeError, ValueError):
        raise TrustError(f"host {host!r}: expected a name such as centre.example.com, or an address.") from None


def sites(state: Path) -> list[dict[str, Any]]:
    """Every site that was ever enrolled or invited, newest enrolment first in words: site, state, since, until, node."""
    book = Registry(state).read()
    moment = now().isoformat(timespec="seconds")
    names = dict.fromkeys([*(one.site for one in book.enrolled), *(one.site for one in book.invitations)])
    found = []
    for name in sorted(names):
        entry = book.site(name)
        row: dict[str, Any] = {"site": name, "state": "", "since": "", "until": "", "node": None, "key": "", "note": ""}
        if entry is not None:
            row |= {"since": entry.since, "until": entry.until, "node": entry.node, "key": entry.key}
            row["state"] = "revoked" if entry.revoked else "enrolled"
            row["note"] = f"on {entry.revoked}: {entry.reason}" if entry.revoked else ""
            if not entry.revoked and entry.until < moment:
                row |= {"state": "expired", "note": "invite it again"}
        out = next((one for one in reversed(book.invitations) if one.site == name), None)
        if out is not None and not (out.used or out.withdrawn):
            over = out.expires < moment
            said = f"code {'expired' if over else 'out until'} {out.expires}"
            row["state"] = row["state"] or ("invited" if not over else "not joined")
            row["note"] = "; ".join(one for one in (row["note"], said) if one)
        row["state"] = row["state"] or "not joined"
        found.append(row)
    return found
