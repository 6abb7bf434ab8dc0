"""A log that cannot be altered unnoticed: each line carries the hash of the line before it and a signature.

The manifest of a plant (what left it) and the audit log of the centre are one each. Lines can be sealed. Beside the
chain lies its head, signed too: a chain that was cut at its end is shorter than its head says.
"""

import base64
import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from trunkline.errors import StorageError, TamperError
from trunkline.keys import now, sign, signed
from trunkline.sealing import Seal
from trunkline.storage import write_atomic

START = "0" * 64  # what the first line calls the hash of the line before it


@dataclass(frozen=True)
class Link:
    """One line: its number from 1, when it was written (ISO 8601, UTC), what it says, and its hash."""

    number: int
    at: str
    body: dict[str, Any]
    hash: str


class Chain:
    """An append-only file of signed, chained lines; several processes may append.

    Args:
        path: the file; its head is kept in `<path>.head`.
        purpose: a word the signatures are bound to: a line of one chain is none of another.
        seal: encrypts what the lines say; None leaves it readable.
    """

    def __init__(self, path: Path, purpose: str, seal: Seal | None = None) -> None:
        self.path = path
        self.purpose = purpose
        self.seal = seal

    def append(self, key: Ed25519PrivateKey, body: Mapping[str, Any]) -> Link:
        """Write one line durably.

        Raises:
            StorageError: it cannot be written (a full disk, say); the chain is as it was.
            TamperError: the chain is not as its head says, so nothing is built on it.
        """
        with self._locked() as file:
            number, before = self._end(file, key.public_key())
            number += 1
            at = now().isoformat(timespec="milliseconds")
            text = json.dumps(body, sort_keys=True)
            if self.seal is not None:
                text = base64.b64encode(self.seal.close(text.encode(), f"{self.purpose} {number}")).decode()
            found = _hash(number, at, before, text)
            line = {"n": number, "at": at, "before": before, "text": text, "hash": found}
            line["signature"] = sign(key, self.purpose, bytes.fromhex(found))
            size = file.seek(0, os.SEEK_END)
            try:
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                with contextlib.suppress(OSError):
                    file.truncate(size)
                raise StorageError(
                    f"{self.path}: could not be written ({error.strerror or error}). Free space, then try again."
                ) from error
            head = {"n": number, "hash": found}
            head["signature"] = sign(key, self.purpose + " head", f"{number} {found}".encode())
            write_atomic(self._head, json.dumps(head).encode())
            return Link(number, at, dict(body), found)

    def read(self, public: Ed25519PublicKey) -> Iterator[Link]:
        """The lines in order, each checked before it is yielded, and at the end that none is missing there.

        Raises:
            TamperError: the text names the first line that is not as it was written.
            StorageError: the file cannot be read, or is sealed with another key.
        """
        number, before = 0, START
        for line in self._lines():
            number += 1
            link = self._check(line, number, before, public)
            before = link.hash
            yield link
        told = self._told(public)
        if told is not None and number < told[0]:
            raise TamperError(
                f"{self.path}: ends with line {number}, and there were {told[0]}: lines were cut off its end."
            )
        if told is not None and number == told[0] and before != told[1]:
            raise TamperError(f"{self.path}: its last line is not the one that was written last.")
        if told is None and number:
            raise TamperError(f"{self._head}: is gone, so nobody can say whether lines are missing at the end.")

    def _check(self, line: bytes, number: int, before: str, public: Ed25519PublicKey) -> Link:
        place = f"{self.path}, line {number}"
        try:
            said = json.loads(line)
            n, at, prior, text, found, by = (said[key] for key in ("n", "at", "before", "text", "hash", "signature"))
        except (ValueError, KeyError, TypeError):
            raise TamperError(f"{place}: is not a line of a chain any more.") from None
        if n != number or prior != before:
            raise TamperError(f"{place}: does not follow the line before it: lines were removed, added or moved.")
        if _hash(n, at, prior, text) != found:
            raise TamperError(f"{place}: was altered (its hash does not match).")
        if not signed(public, self.purpose, bytes.fromhex(found), by):
            raise TamperError(f"{place}: was not written by the holder of the key (its signature does not match).")
        if self.seal is not None:
            text = self.seal.open(base64.b64decode(text), f"{self.purpose} {number}", place).decode()
        return Link(number, at, json.loads(text), found)

    def _lines(self) -> list[bytes]:
        try:
            return self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be read ({error.strerror}).") from None

    @property
    def _head(self) -> Path:
        return self.path.with_name(self.path.name + ".head")

    def _told(self, public: Ed25519PublicKey) -> tuple[int, str] | None:
        try:
            head = json.loads(self._head.read_bytes())
            number, found = int(head["n"]), str(head["hash"])
            if signed(public, self.purpose + " head", f"{number} {found}".encode(), str(head["signature"])):
                return number, found
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise TamperError(f"{self._head}: is not what was written.")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[Any]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be opened ({error.strerror}).") from None
        with os.fdopen(descriptor, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _end(self, file: Any, public: Ed25519PublicKey) -> tuple[int, str]:
        """Number and hash of the last line; a line cut short by a kill is taken away, one the head does not know yet stays."""
        size = file.seek(0, os.SEEK_END)
        tail = b""
        while size and tail.count(b"\n") < 2 and len(tail) < size:
            step = min(size - len(tail), max(4096, 2 * len(tail)))
            file.seek(size - len(tail) - step)
            tail = file.read(len(tail) + step)
        if tail and not tail.endswith(b"\n"):  # its write never ended, so its head was never written either
            whole = tail[: tail.rfind(b"\n") + 1]
            file.truncate(size - len(tail) + len(whole))
            file.flush()
            return self._end(file, public)
        told = self._told(public)
        if not tail:
            if told is not None:
                raise TamperError(f"{self.path}: is empty, and there were {told[0]} lines.")
            return 0, START
        last = json.loads(tail.splitlines()[-1])
        number, found = int(last["n"]), str(last["hash"])
        # a kill between line and head leaves the head one behind; anything else was not us
        if (told is None and number > 1) or (told is not None and not told[0] <= number <= told[0] + 1):
            raise TamperError(f"{self.path}: ends with line {number}; its head says {told[0] if told else 'nothing'}.")
        if told is not None and number == told[0] and found != told[1]:
            raise TamperError(f"{self.path}: its last line is not the one that was written last.")
        return number, found


def _hash(number: int, at: str, before: str, text: str) -> str:
    return hashlib.sha256(json.dumps([number, at, before, text]).encode()).hexdigest()
