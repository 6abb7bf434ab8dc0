"""Who may come in: the sites that enrolled and the invitations that are out, in one file of the centre's state folder.

Written by the registrar and the commands of the operator, read by the gateway at every request, so that a revocation holds
from the next request on.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import Field, ValidationError

from trunkline.errors import StorageError
from trunkline.protocol.frozen import Frozen
from trunkline.protocol.plan import SITE_NAME
from trunkline.runtime.storage import write_atomic

REGISTRY = "registry.json"


class Enrolled(Frozen):
    """One enrolment of a site; a site that enrols again gets another, and its former one is revoked.

    Args:
        key: `keys.key_id` of its public key; spki: that key in PEM, byte for byte as Flower sends it.
        records: the Ed25519 public key (PEM) that signs the site's manifest.
        serial: of its newest certificate, hexadecimal; until: when that expires (ISO 8601, UTC).
        certificate: the newest one, PEM: nginx knows a site by its fingerprint.
        node: Flower's node id; None until the SuperLink knows the key.
        revoked: when (ISO 8601); empty while it is welcome. reason: why, for whoever is turned away.
    """

    site: str = Field(pattern=SITE_NAME)
    key: str
    spki: str
    records: str
    serial: str
    certificate: str
    since: str
    until: str
    node: int | None = None
    revoked: str = ""
    reason: str = ""


class Invitation(Frozen):
    """One code that is or was out; the centre keeps what proves the code, not the code.

    Args:
        key: `keys.key_id` of the key made of the code; certificate: the self-signed one made of it, PEM.
        expires: ISO 8601; used: when, empty before; withdrawn likewise.
    """

    site: str = Field(pattern=SITE_NAME)
    key: str
    certificate: str
    made: str
    expires: str
    used: str = ""
    withdrawn: str = ""


class Book(Frozen):
    """All enrolments and invitations, oldest first."""

    format: int = 1
    enrolled: tuple[Enrolled, ...] = ()
    invitations: tuple[Invitation, ...] = ()

    def by_key(self, key: str) -> Enrolled | None:
        """The enrolment with this key, welcome or revoked."""
        return next((one for one in reversed(self.enrolled) if one.key == key), None)

    def site(self, name: str) -> Enrolled | None:
        """The newest enrolment of a site."""
        return next((one for one in reversed(self.enrolled) if one.site == name), None)

    def welcome(self) -> dict[str, Enrolled]:
        """Site -> its enrolment, of those that may come in."""
        return {one.site: one for one in self.enrolled if not one.revoked}

    def invitation(self, key: str) -> Invitation | None:
        return next((one for one in reversed(self.invitations) if one.key == key), None)

    def nodes(self) -> dict[int, str]:
        """Flower's node id -> site, of the welcome."""
        return {one.node: one.site for one in self.enrolled if one.node is not None and not one.revoked}


JOIN_AGAIN = "Ask the operator for a new invitation (`trunkline server invite`) and join with `trunkline client join`."


def turned_away(entry: Enrolled | None, name: str = "") -> str:
    """Why a key is not let in, for whoever is outside.

    Args:
        entry: its revoked enrolment; None: it has none. name: what its certificate calls it.
    """
    if entry is None:
        return f"{name + ': ' if name else ''}this certificate's key is not enrolled here. {JOIN_AGAIN}"
    why = f" ({entry.reason})" if entry.reason else ""
    return (
        f"{entry.site}: this certificate was revoked on {entry.revoked[:16].replace('T', ' ')} UTC{why}. {JOIN_AGAIN}"
    )


class Registry:
    """The file, read again whenever it has changed."""

    def __init__(self, state: Path) -> None:
        self.path = state / REGISTRY
        self._seen: tuple[int, int, int] | None = None
        self._book = Book()

    def read(self) -> Book:
        """Raises StorageError when the file is gone or damaged: then nobody is let in."""
        try:
            found = self.path.stat()
            mark = (found.st_mtime_ns, found.st_ino, found.st_size)
            if mark != self._seen:
                self._book = Book.model_validate_json(self.path.read_bytes())
                self._seen = mark
        except FileNotFoundError:
            raise StorageError(
                f"{self.path}: no such file. `trunkline server init` makes a federation; a backup restores one."
            ) from None
        except (OSError, ValidationError, ValueError) as error:
            raise StorageError(
                f"{self.path}: cannot be read ({type(error).__name__}). Restore a backup of it."
            ) from None
        return self._book

    def write(self, change: Callable[[Book], Book]) -> Book:
        """Change the book, one writer at a time; what `change` raises leaves it as it was."""
        with self._locked():
            book = change(self.read())
            write_atomic(self.path, json.dumps(book.model_dump(mode="json"), indent=1).encode())
            return book

    def make(self) -> None:
        """An empty book, for `server init`."""
        write_atomic(self.path, Book().model_dump_json().encode())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            descriptor = os.open(self.path.with_name(self.path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be changed ({error.strerror}).") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
