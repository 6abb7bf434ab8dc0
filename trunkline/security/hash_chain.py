"""A log that cannot be altered unnoticed: each line carries the hash of the line before it and a signature.

The manifest of a plant (what left it) and the audit log of the server are one each. Lines can be sealed. Beside the
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
            line_number, before = self._find_end(file, key.public_key())
            if self._read_head(key.public_key()) != (line_number, before):
                # there is a head before there is a line, and it is never more than one line behind
                self._write_head(key, line_number, before)
            line_number += 1
            time = now().isoformat(timespec="milliseconds")
            text = json.dumps(body, sort_keys=True)
            if self.seal is not None:
                text = base64.b64encode(self.seal.close(text.encode(), f"{self.purpose} {line_number}")).decode()
            digest = _hash(line_number, time, before, text)
            line = _line(line_number, time, before, text, digest, sign(key, self.purpose, bytes.fromhex(digest)))
            size = file.seek(0, os.SEEK_END)
            try:
                left = line + b"\n"
                while left:  # a disk that fills up takes a part, and refuses the rest
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
                self._write_head(key, line_number, digest)
            except (OSError, StorageError) as error:
                if self._read_head(key.public_key()) != (
                    line_number,
                    digest,
                ):  # else it stands; its folder alone was not flushed
                    with contextlib.suppress(OSError):
                        file.truncate(size)
                cause = error.strerror if isinstance(error, OSError) else error
                raise StorageError(
                    f"{self.path}: could not be written ({cause}). Free space, then try again."
                ) from error
            return Link(line_number, time, dict(body), digest)

    def read(self, public: Ed25519PublicKey) -> Iterator[Link]:
        """The lines in order, each checked before it is yielded, and at the end that none is missing there.

        Raises:
            TamperError: the text names the first line that is not as it was written.
            StorageError: the file cannot be read.
            TrustError: a line is sealed with a key that is not here.
        """
        line_number, before, at_head = 0, START, START
        lines, head = self._read_content(public)
        for line in lines:
            line_number += 1
            link = self._check(line, line_number, before, public)
            before = link.hash
            if head is not None and line_number == head[0]:
                at_head = before
            yield link
        if head is None:
            if line_number:
                raise TamperError(
                    f"{self._head_path}: is gone, so nobody can say whether lines are missing after line {line_number}."
                )
            return
        if line_number < head[0]:
            raise TamperError(
                f"{self.path}: ends with line {line_number}, and there were {head[0]}: lines were cut off its end."
            )
        if at_head != head[1]:
            raise TamperError(f"{self.path}, line {head[0]}: is not the line that was written.")
        if line_number > head[0] + 1:
            raise TamperError(
                f"{self._head_path}: ends with line {head[0]}, and there are {line_number}: an older head was put in its location."
            )

    def _check(self, line: bytes, line_number: int, before: str, public: Ed25519PublicKey) -> Link:
        location = f"{self.path}, line {line_number}"
        n, time, prior, text, digest = self._parse_line(line, location, public)
        if n != line_number or prior != before:
            raise TamperError(f"{location}: does not follow the line before it: lines were removed, added or moved.")
        if not text.startswith("{"):
            if self.seal is None:
                raise TrustError(
                    f"{location}: is encrypted, and no seal.toml says by which key. Restore a backup of seal.toml."
                )
            text = self.seal.open(base64.b64decode(text), f"{self.purpose} {line_number}", location).decode()
        return Link(line_number, time, json.loads(text), digest)

    def _parse_line(self, line: bytes, location: str, public: Ed25519PublicKey) -> tuple[int, str, str, str, str]:
        """Number, time, hash before, text and hash of a line that the holder of the key wrote, to the byte."""
        try:
            record = json.loads(line)
            n, time, prior, text, digest, by = (
                record[key] for key in ("n", "at", "before", "text", "hash", "signature")
            )
            whole = _line(n, time, prior, text, digest, by) == line and str(by) == bytes.fromhex(by).hex()
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise TamperError(f"{location}: is not a line of a chain any more.")
        if _hash(n, time, prior, text) != digest:
            raise TamperError(f"{location}: was altered (its hash does not match).")
        if not is_signed(public, self.purpose, bytes.fromhex(digest), by):
            raise TamperError(f"{location}: was not written by the holder of the key (its signature does not match).")
        return n, time, prior, text, digest

    def _read_content(self, public: Ed25519PublicKey) -> tuple[list[bytes], tuple[int, str] | None]:
        """The whole lines and what the head says of them, with nobody writing in between.

        A last line without its end is of an append that was killed or failed; no caller has been told of it.
        """
        if not self.path.exists():
            return [], self._read_head(public)
        with self._locked(fcntl.LOCK_SH) as file:
            content: bytes = file.read()
            return content[: content.rfind(b"\n") + 1].split(b"\n")[:-1], self._read_head(public)

    def _write_head(self, key: Ed25519PrivateKey, line_number: int, digest: str) -> None:
        by = sign(key, self.purpose + " head", f"{line_number} {digest}".encode())
        write_atomic(self._head_path, json.dumps({"n": line_number, "hash": digest, "signature": by}).encode())

    @property
    def _head_path(self) -> Path:
        return self.path.with_name(self.path.name + ".head")

    def _read_head(self, public: Ed25519PublicKey) -> tuple[int, str] | None:
        try:
            data = self._head_path.read_bytes()
            head = json.loads(data)
            line_number, digest, by = (head[key] for key in ("n", "hash", "signature"))
            whole = json.dumps({"n": line_number, "hash": digest, "signature": by}).encode() == data
            whole = whole and type(line_number) is int and by == bytes.fromhex(by).hex()
            if whole and is_signed(public, self.purpose + " head", f"{line_number} {digest}".encode(), by):
                return line_number, str(digest)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise TamperError(f"{self._head_path}: is not what was written.")

    @contextlib.contextmanager
    def _locked(self, mode: int) -> Iterator[Any]:
        flags = os.O_RDWR | os.O_CREAT if mode == fcntl.LOCK_EX else os.O_RDONLY
        try:
            if mode == fcntl.LOCK_EX:
                self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be opened ({error.strerror}).") from None
        # without a buffer: what could not be written is not tried again when the file is closed
        with os.fdopen(descriptor, "r+b" if mode == fcntl.LOCK_EX else "rb", buffering=0) as file:
            fcntl.flock(file, mode)
            yield file

    def _find_end(self, file: Any, public: Ed25519PublicKey) -> tuple[int, str]:
        """Number and hash of the last line; a line cut short by a kill is taken away, one the head does not know yet stays."""
        size = file.seek(0, os.SEEK_END)
        tail = b""
        while size and tail.count(b"\n") < 2 and len(tail) < size:
            step = min(size - len(tail), max(4096, 2 * len(tail)))
            file.seek(size - len(tail) - step)
            tail = file.read(len(tail) + step)
        *lines, torn = tail.split(b"\n")
        head = self._read_head(public)
        if not lines:
            if head is not None and head[0]:
                raise TamperError(f"{self.path}: holds no line, and there were {head[0]}.")
            file.truncate(0)
            return 0, START
        line_number, _, before, _, digest = self._parse_line(lines[-1], f"{self.path}, its last line", public)
        # a kill between line and head leaves the head one behind; anything else was not us
        if head is None or not head[0] <= line_number <= head[0] + 1:
            raise TamperError(
                f"{self.path}: ends with line {line_number}; its head says {head[0] if head else 'nothing'}."
            )
        if head[1] != (digest if line_number == head[0] else before):
            raise TamperError(f"{self.path}: its last line, {line_number}, is not the one that was written.")
        if torn:  # its write never ended, so its head was never written either
            file.truncate(size - len(torn))
        return line_number, digest


def _line(line_number: int, time: str, before: str, text: str, digest: str, by: str) -> bytes:
    record = {"n": line_number, "at": time, "before": before, "text": text, "hash": digest, "signature": by}
    return json.dumps(record).encode()


def _hash(line_number: int, time: str, before: str, text: str) -> str:
    return hashlib.sha256(json.dumps([line_number, time, before, text]).encode()).hexdigest()
