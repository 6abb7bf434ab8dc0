"""The centre's audit log: who enrolled, invited, revoked, ran and released; chained and signed, see `chain`."""

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
    """Who acts here: account@host."""
    return f"{account_name()}@{socket.gethostname()}"[:120]


def note(state: Path, what: str, **about: object) -> None:
    """Write one line: what was done, by whom, and about what (JSON values).

    A centre that is no federation keeps no log.

    Raises:
        TamperError: the log is not as it was left; nothing is added to it.
        StorageError: it cannot be written.
    """
    if (state / "audit.key").exists():
        _chain(state).append(_key(state), {"what": what, "by": operator(), **about})


def read(state: Path) -> Iterator[Link]:
    """The lines in order, each verified.

    Raises:
        TamperError: the text names the first line that is not as it was written.
        TrustError: this centre keeps no log.
    """
    if not (state / "audit.key").exists():
        raise TrustError(f"{state}: no federation here, so no audit log. `trunkline server init` makes one.")
    return _chain(state).read(_key(state).public_key())


def _chain(state: Path) -> Chain:
    return Chain(state / AUDIT, "audit")


def _key(state: Path) -> Ed25519PrivateKey:
    seal, path = find_seal(state), state / "audit.key"
    if seal is None:
        raise TrustError(f"{state / 'seal.toml'}: gone. It names the key this federation is sealed with; restore it.")
    return load_key(seal.open(path.read_bytes(), "audit.key", str(path)), str(path))  # type: ignore[no-any-return]


def begin_anew(state: Path) -> Path:
    """Set a log aside that cannot be trusted any more, and begin another that says so; where the former one is now.

    Raises:
        TrustError: the log is intact, or there is none.
    """
    try:
        for _ in read(state):
            pass
    except TamperError as error:
        was = str(error)
    else:
        raise TrustError(f"{state / AUDIT}: is intact; there is no reason to begin another.")
    stamp = now().strftime("%Y%m%dT%H%M%S")
    aside = state / f"audit-{stamp}.jsonl"
    for path in (state / AUDIT, state / (AUDIT + ".head")):
        if path.exists():
            path.replace(aside if path.name == AUDIT else aside.with_name(aside.name + ".head"))
    note(state, "begin anew", former=aside.name, because=was)
    return aside


def show(state: Path, console: "Console") -> None:
    """The log as a table.

    Raises:
        TamperError: after the lines before the first that is not as it was written.
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
