"""What a plant and the server say to one another when a plant joins, renews its certificate, or asks how things stand.

An invitation is a code. From the code both ends make the same key and the same self-signed certificate, so the code itself
is never sent: the plant proves in the TLS handshake that it has it, and the port stays shut to everybody who has neither a
code nor a certificate. The code also carries the fingerprint of the federation's authority, so the plant knows whom it
has reached.
"""

import base64
import binascii
import hashlib
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pydantic import Field

from trunkline.errors import TrustError
from trunkline.protocol.frozen import Frozen
from trunkline.security.keys import fingerprint

# the gateway answers these itself, by way of the registrar; all else it takes goes to Flower's fleet interface
AUTHORITY_PATH = "/v1/enrolment/authority"  # GET, an invitation or a certificate: {"authority": PEM}
JOIN_PATH = "/v1/enrolment/join"  # POST JoinRequest, an invitation -> Admission
RENEW_PATH = "/v1/enrolment/renew"  # POST RenewRequest, a certificate -> Admission
HELLO_PATH = "/v1/enrolment/hello"  # GET, a certificate -> Hello
SECRET, PREFIX = 16, 16  # bytes of a code: what only both ends know, and of the authority's fingerprint
LIMIT = 65_536  # bytes of any of these bodies


class AuthorityInfo(Frozen):
    """Down, to an invitation or a certificate: whose federation it is, and whom it was made for. Not to be trusted as it comes."""

    authority: str
    federation: str
    site: str


class JoinRequest(Frozen):
    """Up, once: a certificate request for the site's key (PEM), and the public key (PEM) that will sign its manifest."""

    request: str = Field(max_length=16_384)
    records: str = Field(max_length=4096)
    version: str = Field(max_length=32)


class JoinFile(Frozen):
    """A JoinRequest on its way by hand: which invitation it answers, and the signature that only its code can make."""

    invitation: str
    asked: JoinRequest
    signature: str


class RenewRequest(Frozen):
    """Up: a certificate request for the key that the site is known by."""

    request: str = Field(max_length=16_384)


class Admission(Frozen):
    """Down: what a site needs to be itself.

    Args:
        site: the name it was invited as.
        certificate: its own, PEM; authority: the federation's, PEM.
        federation: its name.
    """

    site: str
    federation: str
    certificate: str
    authority: str


class Hello(Frozen):
    """Down: how the server sees the site. `now`: ISO 8601, UTC, for the clock; `until`: when its certificate expires."""

    site: str
    now: str
    until: str
    version: str


@dataclass(frozen=True)
class Code:
    """An invitation as it is handed over.

    Args:
        secret: SECRET bytes; authority: the first PREFIX bytes of the sha256 of the authority's certificate.
    """

    secret: bytes
    authority: bytes

    @classmethod
    def new(cls, authority: x509.Certificate) -> "Code":
        return cls(secrets.token_bytes(SECRET), bytes.fromhex(fingerprint(authority))[:PREFIX])

    @classmethod
    def parse(cls, text: str) -> "Code":
        """A code as somebody typed it: blanks, dashes and case do not matter.

        Raises:
            TrustError: it is no code, or a letter is wrong.
        """
        plain = "".join(text.split()).replace("-", "").upper().replace("0", "O").replace("1", "I").replace("8", "B")
        try:
            data = base64.b32decode(plain + "=" * (-len(plain) % 8))
        except (binascii.Error, ValueError):
            data = b""
        secret, authority, check = data[:SECRET], data[SECRET : SECRET + PREFIX], data[SECRET + PREFIX :]
        if len(data) != SECRET + PREFIX + 2 or _check(secret + authority) != check:
            raise TrustError(
                "the code is incomplete or mistyped: it has 11 groups of 5 letters and digits, and the last ones prove the others. "
                "Copy it again from what `trunkline server invite` printed."
            )
        return cls(secret, authority)

    def __str__(self) -> str:
        text = (
            base64.b32encode(self.secret + self.authority + _check(self.secret + self.authority)).decode().rstrip("=")
        )
        return "-".join(text[start : start + 5] for start in range(0, len(text), 5))

    def names(self, authority: x509.Certificate) -> bool:
        """Whether this is the authority that the code was made by."""
        return bytes.fromhex(fingerprint(authority))[:PREFIX] == self.authority

    @property
    def key(self) -> Ed25519PrivateKey:
        derived = HKDF(hashes.SHA256(), 32, salt=self.authority, info=b"trunkline invitation").derive(self.secret)
        return Ed25519PrivateKey.from_private_bytes(derived)

    def certificate(self) -> x509.Certificate:
        """Self-signed, the same bytes at both ends: Ed25519 has no chance in it, and serial and dates are fixed.

        Its dates say nothing; when the code expires the server knows, and says so in words.
        """
        key = self.key
        public = key.public_key()
        digest = hashlib.sha256(public.public_bytes_raw()).digest()[:16]
        serial_number = int.from_bytes(digest, "big")
        # OpenSSL finds a trusted certificate by its subject: two that share one, and only the first is ever found
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.COMMON_NAME, "trunkline invitation"),
                x509.NameAttribute(NameOID.SERIAL_NUMBER, digest.hex()),
            ]
        )
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(public)
            .serial_number(serial_number | 1)
            .not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
            .not_valid_after(datetime(2120, 1, 1, tzinfo=UTC))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .sign(key, None)
        )


def _check(data: bytes) -> bytes:
    return hashlib.sha256(b"trunkline code" + data).digest()[:2]
