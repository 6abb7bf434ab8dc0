"""Federations for tests: an authority, and a centre's state folder with a key that signs releases."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.x509.oid import NameOID

from trunkline.protocol.arrays import Arrays
from trunkline.protocol.plan import TrunkSpec
from trunkline.release import Card, Figure, GuardUsed, Lineage, Participation
from trunkline.security.keys import certificate_pem, new_signing_key
from trunkline.server.releases.signing import AUTHORITY, issue_release_certificate, write_signer


def named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


@dataclass(frozen=True)
class Federation:
    """An authority on P-384 and the Ed25519 key that its centre signs with."""

    key: EllipticCurvePrivateKey
    authority: x509.Certificate
    release: Ed25519PrivateKey

    @classmethod
    def of(cls, name: str) -> "Federation":
        key, start = generate_private_key(SECP384R1()), datetime.now(UTC) - timedelta(days=1000)
        authority = (
            x509.CertificateBuilder()
            .subject_name(named(name))
            .issuer_name(named(name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + timedelta(days=7300))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(key, SHA384())
        )
        return cls(key, authority, new_signing_key())

    def certificate(self, days: int = 90) -> x509.Certificate:
        return issue_release_certificate(self.key, self.authority, self.release.public_key(), days)

    def centre(self, state: Path, days: int = 90) -> Path:
        """A state folder as the authority's maker leaves it."""
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        (state / AUTHORITY).write_bytes(certificate_pem(self.authority))
        write_signer(state, self.release, self.certificate(days))
        return state

    def join(self, state: Path) -> Path:
        """A plant's state folder, as far as who has joined is told by it."""
        (state / "identity").mkdir(parents=True)
        (state / "identity" / AUTHORITY).write_bytes(certificate_pem(self.authority))
        return state


def small(seed: int = 0) -> tuple[Arrays, Card]:
    """Two arrays, the second first by name, and a card with all there is in one."""
    random = np.random.default_rng(seed)
    arrays = Arrays(
        {
            "trunk.b.weight": random.normal(size=(3, 2)).astype(np.float32),
            "trunk.a.bias": random.normal(size=4).astype(np.float32),
        }
    )
    lineage = Lineage(
        rounds=7,
        parts=(
            Participation(sites=("plant-1", "plant-3"), rounds=7, contract="c0" * 32, version="1.2.0"),
            Participation(sites=("plant-2",), rounds=6, contract="c0" * 32, version="1.2.0"),
        ),
        versions={"trunkline": "1.2.0", "torch": "2.9.0", "numpy": "2.3.0", "flwr": "1.41.0"},
        protocol=2,
        site_schema=1,
        figures={"validation_loss": Figure(round=7, sites=3, mean=0.25 + seed)},
        guards=(GuardUsed(name="clip", parameters={"norm": 1.5}), GuardUsed(name="noise")),
        budget={"epsilon": 3.0, "delta": 1e-5, "accountant": "rdp"},
        digest=arrays.digest(),
        created="2026-05-01T10:00:00+00:00",
    )
    card = Card(
        run="press",
        key="press-20260501-100000",
        rounds=7,
        seed=3,
        strategy="fedavg",
        trunk=TrunkSpec(),
        lend=("trunk",),
        window=8,
        sites=("plant-1", "plant-2", "plant-3"),
        tasks=(),
        channels=None,
        versions=("1.2.0",),
        lineage=lineage,
    )
    return arrays, card
