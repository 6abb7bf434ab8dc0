"""What a site is known by, under `STATE/identity`: its key, its certificate, its federation's authority, and the key that signs
its records. None of the private keys ever leaves the folder.
"""

from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from trunkline.errors import TrustError
from trunkline.runtime.storage import write_atomic
from trunkline.security.encryption import Seal
from trunkline.security.keys import check_private, key_pem, load_key, new_signing_key, read_certificate

RECORDS = "records.key"


@dataclass(frozen=True)
class Identity:
    """The files of a site that has joined.

    Args:
        folder: `STATE/identity`.
    """

    folder: Path

    @classmethod
    def of(cls, state: Path) -> "Identity":
        return cls(state / "identity")

    @property
    def key(self) -> Path:
        """PKCS 8, for TLS; `node_key` is the same key as Flower reads it."""
        return self.folder / "site.key"

    @property
    def node_key(self) -> Path:
        return self.folder / "site.ssh"

    @property
    def certificate(self) -> Path:
        return self.folder / "site.crt"

    @property
    def authority(self) -> Path:
        """The federation's certificate authority: whom it signed is the server, or a release of the server."""
        return self.folder / "authority.crt"

    @property
    def joined(self) -> bool:
        return self.certificate.exists() and self.authority.exists()

    def read_authority(self) -> x509.Certificate | None:
        """The federation's authority; None where this site never joined one."""
        return read_certificate(self.authority) if self.authority.exists() else None


def records_key(state: Path, seal: Seal | None) -> Ed25519PrivateKey:
    """The key that signs this site's manifest; made when first asked for, sealed where the state is.

    Raises:
        TrustError, StorageError: it is there and cannot be used; it is never replaced by another.
    """
    path = Identity.of(state).folder / RECORDS
    if not path.exists():
        key = new_signing_key()
        data = key_pem(key)
        write_atomic(path, seal.close(data, RECORDS) if seal is not None else data)
        return key
    check_private(path)
    data = path.read_bytes()
    found = load_key(seal.open(data, RECORDS, str(path)) if seal is not None else data, str(path))
    if not isinstance(found, Ed25519PrivateKey):
        raise TrustError(f"{path}: not an Ed25519 key. Restore a backup of it.")
    return found
