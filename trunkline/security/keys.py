"""Keys, certificates and signatures, as both ends of a federation use them; every primitive is of `cryptography`.

A site has one key on NIST P-384: Flower knows the node by it, and its certificate is issued for it, so a certificate and a
node key that do not belong together can be told apart. Records and releases are signed with Ed25519.
"""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from cryptography.x509.oid import NameOID

from trunkline.errors import StorageError, TrustError
from trunkline.runtime.storage import write_atomic

MADE = datetime(2026, 1, 1, tzinfo=UTC)  # no Trunkline is older: a clock that says less was never set
SKEW_S = 5.0  # a clock this far ahead of the server's is refused by Flower; 305 s behind too


def now() -> datetime:
    """The present, in UTC: one place, so that a test can move it."""
    return datetime.now(UTC)


def new_site_key() -> EllipticCurvePrivateKey:
    """A fresh key on P-384, which Flower's node authentication takes too."""
    return generate_private_key(SECP384R1())


def write_site_key(path: Path, key: EllipticCurvePrivateKey) -> None:
    """A private key in OpenSSH's format, which Flower reads, for this account only."""
    write_atomic(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))


def key_pem(key: EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    """PKCS 8, not encrypted: seal it before it is written anywhere it should stay secret."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def load_key(pem: bytes, where: str) -> Any:
    """A private key from PKCS 8; `where` it came from is said in the error."""
    try:
        return load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise TrustError(f"{where}: not a private key in PEM ({error}).") from None


def spki(public: Any) -> bytes:
    """A public key in PEM (SubjectPublicKeyInfo): the very bytes Flower sends in its header, before base64."""
    return bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def key_id(public: Any) -> str:
    """sha256 of a public key as 64 hexadecimal digits: by this a key is known in every register and log."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(spki(public))
    return digest.finalize().hex()


def fingerprint(certificate: x509.Certificate) -> str:
    """sha256 of a certificate as 64 hexadecimal digits."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def group_digits(digits: str) -> str:
    """Hexadecimal digits in groups of four, for two people on the telephone."""
    return " ".join(digits[start : start + 4] for start in range(0, len(digits), 4)).upper()


def common_name(certificate: x509.Certificate) -> str:
    """Whom a certificate names; empty if nobody."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def load_certificate(pem: bytes, where: str) -> x509.Certificate:
    """A certificate from PEM; `where` it came from is said in the error."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise TrustError(f"{where}: not a certificate in PEM ({error}).") from None


def read_certificate(path: Path) -> x509.Certificate:
    """Raises TrustError when there is none, or not one."""
    return _load(path, lambda data: load_certificate(data, str(path)))  # type: ignore[no-any-return]


def is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether `authority`'s key signed `certificate`; says nothing of dates or use."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def time_left(certificate: x509.Certificate) -> timedelta:
    """How long it is still valid; negative after its end."""
    return certificate.not_valid_after_utc - now()


def needs_renewal(certificate: x509.Certificate) -> bool:
    """Whether it should be renewed: less than a third of its life is left."""
    return time_left(certificate) < (certificate.not_valid_after_utc - certificate.not_valid_before_utc) / 3


def check_clock(*certificates: x509.Certificate) -> None:
    """Refuse to do what depends on the time while the clock of this machine is plainly wrong.

    A machine whose battery is empty wakes up in 1970. Nothing would be valid yet by its clock, and what it made and signed
    would be over for everybody else; the remedy is the clock, and not another certificate.

    Args:
        certificates: those that lie on this machine, so they were made before now.

    Raises:
        TrustError: it is earlier than Trunkline itself, or than one of these.
    """
    by = max([MADE, *(certificate.not_valid_before_utc for certificate in certificates)])
    if now() < by:
        subject = "what lies here was made" if by > MADE else "Trunkline was made"
        raise TrustError(
            f"the clock of this machine says {_day(now())}, and {subject} on {_day(by)}: the clock is wrong. Set it (NTP), then try "
            "again. Nothing was changed; no key or certificate has to be made anew for this."
        )


def expiry_warning(certificate: x509.Certificate, whose: str, remedy: str) -> str:
    """A sentence when a certificate is due or over, or not valid yet by this clock; empty when all is well."""
    if now() < certificate.not_valid_before_utc:
        return (
            f"{whose} is valid from {_day(certificate.not_valid_before_utc)} on, and the clock here says {_day(now())}: "
            "set the clock (NTP)."
        )
    if time_left(certificate) < timedelta(0):
        return f"{whose} has expired on {_day(certificate.not_valid_after_utc)}. {remedy}"
    if needs_renewal(certificate):
        hours = time_left(certificate) / timedelta(hours=1)
        when = f"{hours / 24:.0f} days" if hours >= 48 else f"{hours:.1f} hours"
        return f"{whose} expires in {when}, on {_day(certificate.not_valid_after_utc)}. {remedy}"
    return ""


def skew_warning(server_time: datetime) -> str:
    """A sentence when this clock and the server's differ enough to matter; empty when all is well.

    Flower refuses what is signed more than 5 s in the future or 305 s in the past.
    """
    ahead = (now() - server_time).total_seconds()
    if abs(ahead) < SKEW_S / 2:
        return ""
    way = "ahead of" if ahead > 0 else "behind"
    return (
        f"the clock here is {abs(ahead):.0f} s {way} the server's; more than {SKEW_S:.0f} s ahead or 300 s behind is refused. "
        "Set both by NTP."
    )


def _day(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M UTC")


def new_signing_key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def sign(key: Ed25519PrivateKey, purpose: str, data: bytes) -> str:
    """A signature in hexadecimal digits, good for this purpose only: what was signed as one thing proves nothing else."""
    return key.sign(_bound(purpose, data)).hex()


def is_signed(public: Ed25519PublicKey, purpose: str, data: bytes, signature: str) -> bool:
    """Whether `signature` is of `data`, by the key behind `public`, for `purpose`."""
    try:
        public.verify(bytes.fromhex(signature), _bound(purpose, data))
    except (InvalidSignature, ValueError):
        return False
    return True


def _bound(purpose: str, data: bytes) -> bytes:
    return b"trunkline " + purpose.encode() + b"\0" + data


def load_public(pem: bytes, where: str) -> Any:
    """A public key from PEM; `where` it came from is said in the error."""
    try:
        return load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise TrustError(f"{where}: not a public key in PEM ({error}).") from None


def check_private(path: Path) -> None:
    """Raise TrustError when another account may read or replace `path`."""
    try:
        status = path.stat()
    except OSError as error:
        raise TrustError(f"{path}: {error.strerror}.") from None
    if status.st_mode & 0o077:
        raise TrustError(
            f"{path}: other accounts may read it (mode {status.st_mode & 0o777:o}). `chmod 600 {path}`, and if somebody may "
            "have read it already, make a new one."
        )
    if status.st_uid not in (os.getuid(), 0):
        raise TrustError(f"{path}: belongs to another account (uid {status.st_uid}). `chown` it to this one.")


def _load(path: Path, parse: Any, private: bool = False) -> Any:
    if private and path.exists():
        check_private(path)
    try:
        return parse(path.read_bytes())
    except FileNotFoundError:
        raise TrustError(f"{path}: no such file. Has this site joined? `trunkline client join`.") from None
    except (OSError, ValueError, UnsupportedAlgorithm, StorageError) as error:
        raise TrustError(f"{path}: cannot be read ({error}).") from None
