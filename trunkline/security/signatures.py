"""Why a release can be believed: a signature over all of it, the signer's certificate, and the authority that issued that.

The signature is of hashes, one of the card and one of the arrays, so that a reader can say which of the two was altered,
and both differ where the signature was taken from another file.
"""

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtendedKeyUsageOID
from pydantic import Field

from trunkline.errors import TamperError, TrustError
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.frozen import Frozen
from trunkline.security.keys import (
    certificate_pem,
    common_name,
    fingerprint,
    group_digits,
    is_issued_by,
    is_signed,
    load_certificate,
    sign,
)

RELEASES = "trunkline release"  # common name of a certificate that releases are signed with
PURPOSE = "release"
ODD = (
    UnsupportedAlgorithm,
    CryptographyDeprecationWarning,
    x509.InvalidVersion,
)  # of a certificate, besides ValueError


class Signature(Frozen):
    """What a signed release carries beside its card.

    Args:
        card: sha256 of the card's text; arrays: `digest_of` the arrays. Both hexadecimal.
        signed_at: ISO 8601, UTC.
        certificate: of the signer, PEM.
        value: Ed25519 over the three above, hexadecimal.
    """

    card: str = Field(pattern=r"^[0-9a-f]{64}$")
    arrays: str = Field(pattern=r"^[0-9a-f]{64}$")
    signed_at: str = Field(max_length=40)
    certificate: str = Field(max_length=16_384)
    value: str = Field(pattern=r"^[0-9a-f]{128}$")

    @property
    def statement(self) -> bytes:
        return _statement(self.card, self.arrays, self.signed_at)


Sign = Callable[[str, str], Signature]  # of the card's sha256 and `digest_of` the arrays


def _statement(card: str, arrays: str, signed_at: str) -> bytes:
    return hashlib.sha256(json.dumps([card, arrays, signed_at]).encode()).digest()


def digest_arrays(arrays: Arrays) -> str:
    """sha256 over the names in order, and names, dtypes, shapes and bytes."""
    return hashlib.sha256(json.dumps([list(arrays), arrays.digest()]).encode()).hexdigest()


def sign_release(
    key: Ed25519PrivateKey, certificate: x509.Certificate, card: str, arrays: str, moment: datetime
) -> Signature:
    """The signature of a release; equal arguments give equal bytes, as Ed25519 has no chance in it."""
    signed_at = moment.isoformat(timespec="seconds")
    value = sign(key, PURPOSE, _statement(card, arrays, signed_at))
    return Signature(
        card=card, arrays=arrays, signed_at=signed_at, certificate=certificate_pem(certificate).decode(), value=value
    )


@dataclass(frozen=True)
class Verdict:
    """Whether a release is what its federation's server signed.

    Args:
        text: the verdict as a sentence.
        problem: why it is not; None where it is right. A TamperError where the file contradicts its own signature.
        federation: whose authority issued the signer's certificate; only a claim while there is a problem.
        signed_at: when, ISO 8601, UTC; signer: sha256 of the certificate. Both empty where nobody signed.
    """

    text: str
    problem: TrustError | None = None
    federation: str = ""
    signed_at: str = ""
    signer: str = ""

    @property
    def right(self) -> bool:
        return self.problem is None

    @property
    def line(self) -> str:
        return f"{'Verified' if self.right else 'Not verified'}: {self.text}"

    def demand(self, authority: x509.Certificate | None, unsigned: bool) -> None:
        """Raise the problem, if it keeps the arrays from being used.

        What contradicts its own signature is never used. What nobody signed, or somebody else did, is used where there is no
        authority to check against, or `unsigned` says so.
        """
        if isinstance(self.problem, TamperError):
            raise self.problem
        if self.problem is not None and authority is not None and not unsigned:
            raise TrustError(
                f"{self.problem} Take a release of your own server; `--unsigned` uses this one all the same."
            )


def unsigned_verdict(where: str, cause: str = "nobody signed it") -> Verdict:
    """On a file that carries no signature."""
    text = f"{where}: {cause}, so anybody may have made or altered it."
    return Verdict(text, TrustError(text))


def verify_signature(
    where: str, signature: Signature, card: str, arrays: str, authority: x509.Certificate | None
) -> Verdict:
    """What a signature is worth.

    Args:
        where: the file, for texts.
        card: sha256 of the card's text as it is in the file; arrays: `digest_of` its arrays.
        authority: of the federation that should have signed; None: there is nothing to check against.
    """
    claim = Verdict("", signed_at=signature.signed_at)
    try:
        certificate, public, moment, issuer = _open(where, signature)
        claim = replace(claim, signer=fingerprint(certificate), federation=issuer)
        _check_hashes(where, signature, public, card, arrays)
        if authority is None:
            raise TrustError(
                f"{where}: signed on {_day(moment)}, by its own words for {issuer!r}, but there is nothing to check that against: "
                "this needs the federation's authority.crt."
            )
        check_certificate(where, certificate, authority, moment)
    except TrustError as error:
        return replace(claim, text=str(error), problem=error)
    federation = common_name(authority)
    until = _day(certificate.not_valid_after_utc)
    text = (
        f"{where}: as the server of {federation!r} signed it on {_day(moment)}, with certificate {group_digits(claim.signer[:16])} "
        f"(valid until {until})."
    )
    return replace(claim, text=text, federation=federation)


def _open(where: str, signature: Signature) -> tuple[x509.Certificate, Ed25519PublicKey | None, datetime, str]:
    """Certificate, its public key (None if that is of another kind), when it was signed, and who says to have issued it."""
    try:
        with warnings.catch_warnings():  # what cryptography only frowns at was not written by a server either
            warnings.simplefilter("error", CryptographyDeprecationWarning)
            certificate = load_certificate(signature.certificate.encode(), where)
            public = certificate.public_key()
        moment = datetime.fromisoformat(signature.signed_at)
        if moment.tzinfo is None:
            raise ValueError("its time has no zone")
        names = certificate.issuer.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    except (TrustError, ValueError, TypeError, *ODD) as error:
        raise TamperError(
            f"{where}: its signature is damaged or was altered ({error}). Fetch the file from the server again."
        ) from None
    return (
        certificate,
        public if isinstance(public, Ed25519PublicKey) else None,
        moment,
        str(names[0].value) if names else "",
    )


def _check_hashes(where: str, signature: Signature, public: Ed25519PublicKey | None, card: str, arrays: str) -> None:
    if public is not None and not is_signed(public, PURPOSE, signature.statement, signature.value):
        raise TamperError(
            f"{where}: its signature was not made with the key of its certificate: one of the two was altered. "
            "Do not use it; fetch the file from the server again."
        )
    altered = [
        part
        for part, digest, signed_digest in (("card", card, signature.card), ("arrays", arrays, signature.arrays))
        if digest != signed_digest
    ]
    if len(altered) == 2:
        raise TamperError(
            f"{where}: its signature is of another file. Do not use it; fetch the file from the server again."
        )
    if altered:
        raise TamperError(
            f"{where}: its {altered[0]} {'was' if altered == ['card'] else 'were'} altered after it was signed. Do not use it; "
            "fetch the file from the server again."
        )


def check_certificate(where: str, certificate: x509.Certificate, authority: x509.Certificate, moment: datetime) -> None:
    """Raise TrustError unless `authority` issued this certificate, for releases, and it was valid at `moment`."""
    name, issuers = common_name(authority), certificate.issuer.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    issuer = str(issuers[0].value) if issuers else ""
    if not is_issued_by(certificate, authority):
        other = f"another authority that calls itself {name!r} too" if issuer == name else f"{issuer!r}"
        raise TrustError(f"{where}: signed by another federation: its certificate is of {other}, expected {name!r}.")
    try:
        usage = list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        usage = []
    named = common_name(certificate)
    if (
        named != RELEASES
        or ExtendedKeyUsageOID.CODE_SIGNING not in usage
        or not isinstance(certificate.public_key(), Ed25519PublicKey)
    ):
        raise TrustError(
            f"{where}: its certificate is of {name!r}, for {named!r}, and not for signing releases: a site's or the gateway's key "
            "signed it, if anybody's. Tell the server's operator."
        )
    since, until = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not since <= moment <= until:
        raise TrustError(
            f"{where}: signed on {_day(moment)}, and its certificate is valid from {_day(since)} to {_day(until)}. "
            "The server has to renew it (`release.crt`) and sign again."
        )


def _day(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M UTC")
