"""The server's audit log: enrolments, invitations, revocations, runs and releases; chained and signed, see `hash_chain`."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from trunkline.errors import TamperError, TrustError
from trunkline.runtime.programs import account_name
from trunkline.security.encryption import find_seal
from trunkline.security.hash_chain import Chain, Link
from trunkline.security.keys import key_id, load_key, now

if TYPE_CHECKING:
    from rich.console import Console

AUDIT = "audit.jsonl"


def operator() -> str:
    """The account that runs this process: account@host."""
    return f"{account_name()}@{socket.gethostname()}"[:120]


def note(state: Path, event: str, **about: object) -> None:
    """Add one line: the event, the operator, and the details `about` it (JSON values).

    A server without a federation keeps no log.

    Raises:
        TamperError: the log was changed since its last line; nothing is added to it.
        StorageError: the log cannot be written.
    """
    if (state / "audit.key").exists():
        _chain(state).append(_key(state), {"what": event, "by": operator(), **about})


def read(state: Path) -> Iterator[Link]:
    """The lines in order, each verified.

    Raises:
        TamperError: the text names the first line that was changed.
        TrustError: this server keeps no log.
    """
    if not (state / "audit.key").exists():
        raise TrustError(f"{state}: no federation here, so no audit log. `trunkline server init` makes one.")
    return _chain(state).read(_key(state).public_key())


def _chain(state: Path) -> Chain:
    return Chain(state / AUDIT, "audit")


def _key(state: Path) -> Ed25519PrivateKey:
    seal, path = find_seal(state), state / "audit.key"
    if seal is None:
        raise TrustError(
            f"{state / 'seal.toml'}: missing. It names the key this federation is sealed with; restore it."
        )
    return load_key(seal.open(path.read_bytes(), "audit.key", str(path)), str(path))  # type: ignore[no-any-return]


def replace_tampered(state: Path) -> Path:
    """Rename a log that was tampered with, and begin another whose first line says so; the new path of the former log.

    Raises:
        TrustError: the log is intact, or there is none.
    """
    try:
        for _ in read(state):
            pass
    except TamperError as error:
        cause = str(error)
    else:
        raise TrustError(f"{state / AUDIT}: is intact; there is no reason to begin another.")
    stamp = now().strftime("%Y%m%dT%H%M%S")
    aside = state / f"audit-{stamp}.jsonl"
    for path in (state / AUDIT, state / (AUDIT + ".head")):
        if path.exists():
            path.replace(aside if path.name == AUDIT else aside.with_name(aside.name + ".head"))
    note(state, "begin anew", former=aside.name, because=cause)
    return aside


def show(state: Path, console: "Console") -> None:
    """The log as a table.

    Raises:
        TamperError: a line was changed; the intact lines before it are shown first.
    """
    from rich.table import Table

    table = Table("line", "when (UTC)", "what", "by", "about")
    for column in table.columns[3:]:
        column.overflow = "fold"
    count = 0
    try:
        for link in read(state):
            count += 1
            about = ", ".join(f"{key} {value}" for key, value in link.body.items() if key not in ("what", "by"))
            table.add_row(str(link.number), link.at[:19].replace("T", " "), link.body["what"], link.body["by"], about)
    finally:
        console.print(table)
    console.print(f"intact: {count} lines, signed by {key_id(_key(state).public_key())[:16]}", markup=False)
