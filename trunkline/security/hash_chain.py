"""A log that cannot be altered unnoticed: each line carries the hash of the line before it and a signature.

The manifest of a plant (what left it) and the audit log of the centre are one each. Lines can be sealed. Beside the
chain lies its head, signed too: a chain that was cut at its end is shorter than its head says. Only one who cuts the chain
and puts an older head of it back goes unnoticed here; that takes a look at a copy kept elsewhere.
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

from trunkline.errors import StorageError, TamperError, TrustError
from trunkline.runtime.storage import write_atomic
from trunkline.security.encryption import Seal
from trunkline.security.keys import is_signed, now, sign

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
        seal: encrypts what the lines say; None leaves it readable. Lines from before a seal stay readable, and verify.
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
        with self._locked(fcntl.LOCK_EX) as file:
            number, before = self._end(file, key.public_key())
            if self._told(key.public_key()) != (number, before):
                # there is a head before there is a line, and it is never more than one line behind
                self._tell(key, number, before)
            number += 1
            at = now().isoformat(timespec="milliseconds")
            text = json.dumps(body, sort_keys=True)
            if self.seal is not None:
                text = base64.b64encode(self.seal.close(text.encode(), f"{self.purpose} {number}")).decode()
            found = _hash(number, at, before, text)
            line = _line(number, at, before, text, found, sign(key, self.purpose, bytes.fromhex(found)))
            size = file.seek(0, os.SEEK_END)
            try:
                left = line + b"\n"
                while left:  # a disk that fills up takes a part, and refuses the rest
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
                self._tell(key, number, found)
            except (OSError, StorageError) as error:
                if self._told(key.public_key()) != (number, found):  # else it stands; its folder alone was not flushed
                    with contextlib.suppress(OSError):
                        file.truncate(size)
                what = error.strerror if isinstance(error, OSError) else error
                raise StorageError(
                    f"{self.path}: could not be written ({what}). Free space, then try again."
                ) from error
            return Link(number, at, dict(body), found)

    def read(self, public: Ed25519PublicKey) -> Iterator[Link]:
        """The lines in order, each checked before it is yielded, and at the end that none is missing there.

        Raises:
            TamperError: the text names the first line that is not as it was written.
            StorageError: the file cannot be read.
            TrustError: a line is sealed with a key that is not here.
        """
        number, before, at_head = 0, START, START
        lines, told = self._content(public)
        for line in lines:
            number += 1
            link = self._check(line, number, before, public)
            before = link.hash
            if told is not None and number == told[0]:
                at_head = before
            yield link
        if told is None:
            if number:
                raise TamperError(
                    f"{self._head}: is gone, so nobody can say whether lines are missing after line {number}."
                )
            return
        if number < told[0]:
            raise TamperError(
                f"{self.path}: ends with line {number}, and there were {told[0]}: lines were cut off its end."
            )
        if at_head != told[1]:
            raise TamperError(f"{self.path}, line {told[0]}: is not the line that was written.")
        if number > told[0] + 1:
            raise TamperError(
                f"{self._head}: ends with line {told[0]}, and there are {number}: an older head was put in its place."
            )

    def _check(self, line: bytes, number: int, before: str, public: Ed25519PublicKey) -> Link:
        place = f"{self.path}, line {number}"
        n, at, prior, text, found = self._written(line, place, public)
        if n != number or prior != before:
            raise TamperError(f"{place}: does not follow the line before it: lines were removed, added or moved.")
        if not text.startswith("{"):
            if self.seal is None:
                raise TrustError(
                    f"{place}: is encrypted, and no seal.toml says by which key. Restore a backup of seal.toml."
                )
            text = self.seal.open(base64.b64decode(text), f"{self.purpose} {number}", place).decode()
        return Link(number, at, json.loads(text), found)

    def _written(self, line: bytes, place: str, public: Ed25519PublicKey) -> tuple[int, str, str, str, str]:
        """Number, time, hash before, text and hash of a line that the holder of the key wrote, to the byte."""
        try:
            said = json.loads(line)
            n, at, prior, text, found, by = (said[key] for key in ("n", "at", "before", "text", "hash", "signature"))
            whole = _line(n, at, prior, text, found, by) == line and str(by) == bytes.fromhex(by).hex()
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise TamperError(f"{place}: is not a line of a chain any more.")
        if _hash(n, at, prior, text) != found:
            raise TamperError(f"{place}: was altered (its hash does not match).")
        if not is_signed(public, self.purpose, bytes.fromhex(found), by):
            raise TamperError(f"{place}: was not written by the holder of the key (its signature does not match).")
        return n, at, prior, text, found

    def _content(self, public: Ed25519PublicKey) -> tuple[list[bytes], tuple[int, str] | None]:
        """The whole lines and what the head says of them, with nobody writing in between.

        A last line without its end is of an append that was killed or failed; nobody was told it is there.
        """
        if not self.path.exists():
            return [], self._told(public)
        with self._locked(fcntl.LOCK_SH) as file:
            content: bytes = file.read()
            return content[: content.rfind(b"\n") + 1].split(b"\n")[:-1], self._told(public)

    def _tell(self, key: Ed25519PrivateKey, number: int, found: str) -> None:
        by = sign(key, self.purpose + " head", f"{number} {found}".encode())
        write_atomic(self._head, json.dumps({"n": number, "hash": found, "signature": by}).encode())

    @property
    def _head(self) -> Path:
        return self.path.with_name(self.path.name + ".head")

    def _told(self, public: Ed25519PublicKey) -> tuple[int, str] | None:
        try:
            data = self._head.read_bytes()
            head = json.loads(data)
            number, found, by = (head[key] for key in ("n", "hash", "signature"))
            whole = json.dumps({"n": number, "hash": found, "signature": by}).encode() == data
            whole = whole and type(number) is int and by == bytes.fromhex(by).hex()
            if whole and is_signed(public, self.purpose + " head", f"{number} {found}".encode(), by):
                return number, str(found)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise TamperError(f"{self._head}: is not what was written.")

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[Any]:
        flags = os.O_RDWR | os.O_CREAT if how == fcntl.LOCK_EX else os.O_RDONLY
        try:
            if how == fcntl.LOCK_EX:
                self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be opened ({error.strerror}).") from None
        # without a buffer: what could not be written is not tried again when the file is closed
        with os.fdopen(descriptor, "r+b" if how == fcntl.LOCK_EX else "rb", buffering=0) as file:
            fcntl.flock(file, how)
            yield file

    def _end(self, file: Any, public: Ed25519PublicKey) -> tuple[int, str]:
        """Number and hash of the last line; a line cut short by a kill is taken away, one the head does not know yet stays."""
        size = file.seek(0, os.SEEK_END)
        tail = b""
        while size and tail.count(b"\n") < 2 and len(tail) < size:
            step = min(size - len(tail), max(4096, 2 * len(tail)))
            file.seek(size - len(tail) - step)
            tail = file.read(len(tail) + step)
        *lines, torn = tail.split(b"\n")
        told = self._told(public)
        if not lines:
            if told is not None and told[0]:
                raise TamperError(f"{self.path}: holds no line, and there were {told[0]}.")
            file.truncate(0)
            return 0, START
        number, _, before, _, found = self._written(lines[-1], f"{self.path}, its last line", public)
        # a kill between line and head leaves the head one behind; anything else was not us
        if told is None or not told[0] <= number <= told[0] + 1:
            raise TamperError(f"{self.path}: ends with line {number}; its head says {told[0] if told else 'nothing'}.")
        if told[1] != (found if number == told[0] else before):
            raise TamperError(f"{self.path}: its last line, {number}, is not the one that was written.")
        if torn:  # its write never ended, so its head was never written either
            file.truncate(size - len(torn))
        return number, found


def _line(number: int, at: str, before: str, text: str, found: str, by: str) -> bytes:
    said = {"n": number, "at": at, "before": before, "text": text, "hash": found, "signature": by}
    return json.dumps(said).encode()


def _hash(number: int, at: str, before: str, text: str) -> str:
    return hashlib.sha256(json.dumps([number, at, before, text]).encode()).hexdigest()
