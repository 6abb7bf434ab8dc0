"""The enrolled sites and the invitations of a federation, in one file of the server's state folder.

The registrar and the operator's commands write it. The gateway reads it at every request, so a revocation takes effect at
the next request.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from trunkline.errors import StorageError
from trunkline.protocol.frozen import Frozen
from trunkline.protocol.plan import SITE_NAME
from trunkline.runtime.storage import write_atomic
from trunkline.security.keys import now

REGISTRY = "registry.json"


class Enrolled(Frozen):
    """One enrolment of a site. A site that enrols again gets a new one, and its former enrolment is revoked.

    Args:
        key: `keys.key_id` of its public key. spki: that key in PEM, byte for byte as Flower sends it.
        records: the Ed25519 public key (PEM) that signs the site's manifest.
        serial: of its newest certificate, hexadecimal. until: when that expires (ISO 8601, UTC).
        certificate: the newest one, PEM; nginx identifies a site by its fingerprint.
        node: Flower's node id; None until the SuperLink has registered the key.
        revoked: when (ISO 8601); empty while the site is admitted. reason: cause of the revocation, shown to the site.
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
    """One invitation code. The server keeps the certificate that proves the code, not the code.

    Args:
        key: `keys.key_id` of the key derived from the code. certificate: self-signed by that key, PEM.
        made, expires: ISO 8601. used, withdrawn: when; empty until then.
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
        """The enrolment with this key, admitted or revoked."""
        return next((entry for entry in reversed(self.enrolled) if entry.key == key), None)

    def site(self, name: str) -> Enrolled | None:
        """The newest enrolment of a site."""
        return next((entry for entry in reversed(self.enrolled) if entry.site == name), None)

    def welcome(self) -> dict[str, Enrolled]:
        """Site -> its enrolment, of the sites that are not revoked."""
        return {entry.site: entry for entry in self.enrolled if not entry.revoked}

    def invitation(self, key: str) -> Invitation | None:
        return next((invitation for invitation in reversed(self.invitations) if invitation.key == key), None)

    def nodes(self) -> dict[int, str]:
        """Flower's node id -> site, of the sites that are not revoked."""
        return {entry.node: entry.site for entry in self.enrolled if entry.node is not None and not entry.revoked}


JOIN_AGAIN = "Ask the operator for a new invitation (`trunkline server invite`) and join with `trunkline client join`."


def explain_denial(entry: Enrolled | None, name: str = "") -> str:
    """The cause why the gateway refuses a key, as a sentence for its site.

    Args:
        entry: its revoked enrolment; None: the key is not enrolled. name: the site's name in its certificate.
    """
    if entry is None:
        return f"{name + ': ' if name else ''}this certificate's key is not enrolled here. {JOIN_AGAIN}"
    reason = f" ({entry.reason})" if entry.reason else ""
    return f"{entry.site}: this certificate was revoked on {entry.revoked[:16].replace('T', ' ')} UTC{reason}. {JOIN_AGAIN}"


class Registry:
    """The registry's file, read again whenever it has changed."""

    def __init__(self, state: Path) -> None:
        self.path = state / REGISTRY
        self._mark: tuple[int, int, int] | None = None
        self._book = Book()

    def read(self) -> Book:
        """Raises StorageError when the file is missing or damaged; the gateway then admits nobody."""
        try:
            status = self.path.stat()
            mark = (status.st_mtime_ns, status.st_ino, status.st_size)
            if mark != self._mark:
                self._book = Book.model_validate_json(self.path.read_bytes())
                self._mark = mark
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
        """Change the book, one writer at a time; if `change` raises, the book stays as it was."""
        with self._locked():
            book = change(self.read())
            write_atomic(self.path, json.dumps(book.model_dump(mode="json"), indent=1).encode())
            return book

    def create(self) -> None:
        """Write an empty book, for `server init`."""
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


def list_sites(state: Path) -> list[dict[str, Any]]:
    """Every site that was ever enrolled or invited, by name: site, state, since, until, node, key, note."""
    book = Registry(state).read()
    moment = now().isoformat(timespec="seconds")
    names = {entry.site for entry in book.enrolled} | {invitation.site for invitation in book.invitations}
    return [_site_row(book, name, moment) for name in sorted(names)]


def _site_row(book: Book, name: str, moment: str) -> dict[str, Any]:
    row: dict[str, Any] = {"site": name, "state": "", "since": "", "until": "", "node": None, "key": "", "note": ""}
    entry = book.site(name)
    if entry is not None:
        row |= {"since": entry.since, "until": entry.until, "node": entry.node, "key": entry.key}
        row["state"] = "revoked" if entry.revoked else "enrolled"
        row["note"] = f"on {entry.revoked}: {entry.reason}" if entry.revoked else ""
        if not entry.revoked and entry.until < moment:
            row |= {"state": "expired", "note": "invite it again"}
    invitation = next((code for code in reversed(book.invitations) if code.site == name), None)
    if invitation is not None and not (invitation.used or invitation.withdrawn):
        expired = invitation.expires < moment
        code = f"code {'expired' if expired else 'out until'} {invitation.expires}"
        row["state"] = row["state"] or ("not joined" if expired else "invited")
        row["note"] = "; ".join(note for note in (row["note"], code) if note)
    row["state"] = row["state"] or "not joined"
    return row
