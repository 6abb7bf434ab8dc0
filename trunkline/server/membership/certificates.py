"""The certificates of a federation: the authority's own, and what it issues to sites, to the gateway and to loopback."""

import contextlib
import ipaddress
from datetime import timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from trunkline.errors import TrustError
from trunkline.security.keys import now

SLACK = timedelta(minutes=5)  # certificates are valid from a little before now: a plant's clock may be behind
AUTHORITY_DAYS = 3650


def make_authority(key: EllipticCurvePrivateKey, name: str) -> x509.Certificate:
    """The self-signed certificate of a federation. It signs certificates only, and none that may sign in turn."""
    subject = _subject(name)  # a release names its federation by this subject
    return (
        _builder(subject, key.public_key(), AUTHORITY_DAYS)
        .issuer_name(subject)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(False, False, False, False, False, True, True, False, False), critical=True)
        .sign(key, hashes.SHA384())
    )


def make_loopback(key: EllipticCurvePrivateKey) -> x509.Certificate:
    """A self-signed certificate for the traffic between the server's own processes; no plant trusts it."""
    subject = _subject("trunkline loopback")
    return (
        _builder(subject, key.public_key(), AUTHORITY_DAYS)
        .issuer_name(subject)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([alternative_name("127.0.0.1"), alternative_name("localhost")]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(True, False, False, False, False, True, False, False, False), critical=True)
        .sign(key, hashes.SHA384())
    )


def issue_server_certificate(
    public: EllipticCurvePublicKey, hosts: tuple[str, ...], days: float,
    authority_key: EllipticCurvePrivateKey, authority: x509.Certificate,
) -> x509.Certificate:  # fmt: skip
    """The gateway's certificate, for `hosts` and this machine."""
    names = [*dict.fromkeys([*hosts, "localhost", "127.0.0.1"])]
    builder = (
        _builder(_subject(hosts[0] if hosts else "localhost"), public, days)
        .add_extension(x509.SubjectAlternativeName([alternative_name(name) for name in names]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )
    return _issue(builder, authority_key, authority)


def issue_site_certificate(
    public: EllipticCurvePublicKey, site: str, days: float,
    authority_key: EllipticCurvePrivateKey, authority: x509.Certificate,
) -> x509.Certificate:  # fmt: skip
    """A site's certificate: good for a TLS client, and for nothing else."""
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = _builder(_subject(site), public, days).add_extension(usage, critical=False)
    return _issue(builder, authority_key, authority)


def read_requested_key(pem: str) -> EllipticCurvePublicKey:
    """The public key of a certificate request, which the request proves to hold.

    Raises:
        TrustError: `pem` is no request, or not signed by a key on P-384.
    """
    try:
        request = x509.load_pem_x509_csr(pem.encode())
        is_valid = request.is_signature_valid
        public: Any = request.public_key()
    except (ValueError, TypeError):
        raise TrustError("the certificate request is not one in PEM. Update Trunkline at the site.") from None
    if not is_valid or not isinstance(public, EllipticCurvePublicKey) or not isinstance(public.curve, SECP384R1):
        raise TrustError("the certificate request is not signed by a key on P-384. Update Trunkline at the site.")
    return public


def alternative_name(host: str) -> x509.GeneralName:
    """An address or a host name, as a certificate lists it; raises TrustError if it is neither."""
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    try:
        return x509.DNSName(host.encode("idna").decode())
    except (UnicodeError, ValueError):
        raise TrustError(f"host {host!r}: expected a name such as server.example.com, or an address.") from None


def _subject(text: str) -> x509.Name:
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


def _issue(
    builder: x509.CertificateBuilder, key: EllipticCurvePrivateKey, issuer: x509.Certificate
) -> x509.Certificate:
    builder = builder.issuer_name(issuer.subject).add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False
    )
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )
