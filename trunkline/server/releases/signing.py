"""The key that signs the server's releases, in its state folder: release.key, release.crt, authority.crt."""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from trunkline.errors import StorageError, TrustError
from trunkline.runtime.storage import write_atomic
from trunkline.security.encryption import find_seal
from trunkline.security.keys import (
    certificate_pem,
    check_private,
    expiry_warning,
    key_id,
    key_pem,
    load_key,
    now,
    read_certificate,
)
from trunkline.security.signatures import RELEASES, Signature, check_certificate, sign_release

KEY, CERTIFICATE, AUTHORITY = "release.key", "release.crt", "authority.crt"
RENEW = "Let the authority issue another; releases signed before stay valid."


@dataclass(frozen=True)
class Signer:
    """A key that may sign releases, and the certificates that prove it."""

    key: Ed25519PrivateKey
    certificate: x509.Certificate
    authority: x509.Certificate

    def sign(self, card: str, arrays: str) -> Signature:
        """The signature of a release, with the present time.

        Args:
            card: sha256 of the text of its card. arrays: `signatures.digest_arrays` its arrays.

        Raises:
            TrustError: the certificate has expired; every verification would fail.
        """
        self.check(CERTIFICATE)
        return sign_release(self.key, self.certificate, card, arrays, now())

    def check(self, where: str) -> None:
        """Raise TrustError if a signature made now would not verify; `where` is the certificate's path, for the error."""
        if not self.certificate.not_valid_before_utc <= now() <= self.certificate.not_valid_after_utc:
            raise TrustError(f"{where}: {self.warning()}")
        check_certificate(where, self.certificate, self.authority, now())

    def warning(self) -> str:
        """A sentence if the certificate expires soon; empty when all is well."""
        return expiry_warning(self.certificate, "the certificate that releases are signed with", RENEW)


def find_signer(state: Path) -> Signer | None:
    """The signer of the server with this state folder; None if it has no release.key.

    Raises:
        TrustError, StorageError: the key exists and cannot be used; the text names the cause.
    """
    path = state / KEY
    if not path.exists():
        return None
    check_private(path)
    seal = find_seal(state)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror}).") from None
    key = load_key(seal.open(data, KEY, str(path)) if seal is not None else data, str(path))
    if not isinstance(key, Ed25519PrivateKey):
        raise TrustError(f"{path}: not an Ed25519 key. Restore a backup of it.")
    if missing := [name for name in (CERTIFICATE, AUTHORITY) if not (state / name).exists()]:
        raise TrustError(f"{state / missing[0]}: no such file, although {KEY} exists. Restore a backup of it.")
    certificate, authority = (read_certificate(state / name) for name in (CERTIFICATE, AUTHORITY))
    if key_id(certificate.public_key()) != key_id(key.public_key()):
        raise TrustError(
            f"{state / CERTIFICATE}: belongs to another key than {KEY}. Restore both from the same backup."
        )
    signer = Signer(key, certificate, authority)
    signer.check(str(state / CERTIFICATE))
    return signer


def write_signer(state: Path, key: Ed25519PrivateKey, certificate: x509.Certificate) -> None:
    """Write key and certificate for `find_signer`, the key sealed if the state is; authority.crt is not touched."""
    seal, data = find_seal(state), key_pem(key)
    write_atomic(state / KEY, seal.close(data, KEY) if seal is not None else data)
    write_atomic(state / CERTIFICATE, certificate_pem(certificate), mode=0o644)


def issue_release_certificate(
    authority_key: EllipticCurvePrivateKey, authority_cert: x509.Certificate, public: Ed25519PublicKey, days: int
) -> x509.Certificate:
    """A certificate for the key that signs releases, valid for that purpose only, from now for `days` days."""
    start = now().replace(microsecond=0)
    usage = x509.KeyUsage(
        digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=False, crl_sign=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, RELEASES)]))
        .issuer_name(authority_cert.subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=True)
        .sign(authority_key, SHA384())
    )
