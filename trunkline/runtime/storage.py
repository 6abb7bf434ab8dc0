"""Files of state that survive a kill at any moment: written aside, fsynced, renamed, numbered, with a checksum.

The vault and the checkpoint both are a `Shelf`: one folder of numbered safetensors files, the last few kept. A damaged
file is passed over for the one before it, and the caller is told. A file that is intact and not for its reader (of another
run, another site, a newer Trunkline) is never passed over, and never written over either.

A file of the shelf, format 2: 8 bytes, the length of the header (little-endian); the header, JSON; a safetensors file; 32
bytes, the SHA-256 of all that is before them. Later formats keep the first two and the last of these four, so that damage
can be told from news. Format 1 had a checksum of the third part only, in its header, and said neither `kind` nor `owner`.

Where a folder is sealed (`trunkline/security/encryption.py`), what is private in it is encrypted as a whole, and sealed as its own
place below the folder: put anywhere else, it does not open.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

import trunkline
from trunkline.errors import ForeignState, StorageError, TrustError

FORMAT = 2
DIGEST = 32  # bytes of SHA-256
SET_ASIDE = ".damaged"  # what a damaged file is called once another takes its place
WHOSE = {"checkpoint": "run", "vault": "site", "question": "site"}  # kind -> what its owner is
MAGIC = b"trunkline-sealed\x01"  # how a sealed file begins; what follows only trunkline/security/encryption.py knows
Tensors = dict[str, NDArray[Any]]


def write_atomic(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Put `data` at `path` so that a reader sees the old bytes or the new ones, and a crash leaves one of the two.

    Raises:
        StorageError: the disk is full, read-only or gone; what was at `path` is untouched.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself must survive a power cut
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):  # the folder itself may be gone or read-only: the first error says it
            aside.unlink(missing_ok=True)
        raise StorageError(
            f"{path}: could not be written ({error.strerror or error}). The version before it is intact. "
            f"Free space or mend {path.parent}, then start again: it goes on from there."
        ) from error


class Sealing(Protocol):
    """What storage needs of a seal; `trunkline.security.encryption.Seal` is one."""

    def close(self, data: bytes, about: str) -> bytes: ...

    def open(self, data: bytes, about: str, where: str) -> bytes: ...


def is_sealed(data: bytes) -> bool:
    return data[: len(MAGIC)] == MAGIC


def write_private(path: Path, data: bytes, seal: Sealing | None, about: str, mode: int = 0o600) -> None:
    """`write_atomic`; with a seal encrypted as `about`, and file and new folders are for this account only.

    Raises:
        StorageError: as `write_atomic`.
    """
    if seal is None:
        write_atomic(path, data, mode)
        return
    try:
        for parent in [one for one in reversed(path.parents) if not one.exists()]:
            parent.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{path}: could not be written ({error.strerror}). Mend {path.parent}.") from None
    write_atomic(path, seal.close(data, about))


def read_private(path: Path, seal: Sealing | None, about: str) -> bytes:
    """What `write_private` was given.

    Raises:
        OSError: there is no such file, or it cannot be read.
        TrustError: sealed with a key that is not here, or plain where it should be sealed.
        StorageError: altered, or sealed as something else.
    """
    return _opened(path.read_bytes(), path, seal, about)


def _opened(data: bytes, path: Path, seal: Sealing | None, about: str) -> bytes:
    if seal is not None:
        return seal.open(data, about, str(path))
    if is_sealed(data):
        raise TrustError(
            f"{path}: is encrypted, and no seal.toml above it says by which key. Nothing was changed. Restore a backup of seal.toml."
        )
    return data


Header = dict[str, Any]


def _from_1(header: Header) -> Header:
    """Format 1 said neither what a file is nor whose: its meta tells a checkpoint, and that one's run."""
    meta = header["meta"]
    kind = "checkpoint" if "names" in meta else "vault" if "question" in meta else ""
    owner = str(meta.get("key", "")) if kind == "checkpoint" else ""  # "": nobody knows
    return {"format": 2, "kind": kind, "owner": owner, "round": header["round"], "by": "", "meta": meta}


MIGRATIONS: dict[int, Callable[[Header], Header]] = {1: _from_1}  # format -> how its header becomes that of the next


class Shelf:
    """A folder of `round-000012.safetensors` files.

    Args:
        folder: made on first write.
        keep: how many of the newest stay.
        tell: called with a sentence when a damaged file is passed over.
        seal: encrypts every file; None: they are plain.
        place: the folder below the one that is sealed, which the files are bound to.
        kind: what lies here, a key of `WHOSE`; "": anything.
        owner: the run or site it is of; "": not known, so that of no file is asked for. A file of another is refused.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 3,
        tell: Callable[[str], None] = lambda text: None,
        seal: Sealing | None = None,
        place: str = "",
        kind: str = "",
        owner: str = "",
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.tell = tell
        self.seal = seal
        self.place = place
        self.kind = kind
        self.owner = owner
        self._damaged: set[int] = set()  # that were found to be

    def rounds(self) -> list[int]:
        """The rounds on the shelf, oldest first, damaged or not."""
        if not self.folder.is_dir():
            return []
        found = (re.fullmatch(r"round-(\d+)\.safetensors", path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, round: int) -> Path:
        return self.folder / f"round-{round:06d}.safetensors"

    def put(self, round: int, tensors: Mapping[str, NDArray[Any]], meta: Mapping[str, object]) -> None:
        """Write one round and forget the oldest beyond `keep`. A damaged file in its place is set aside.

        Raises:
            StorageError: as `write_atomic`. ForeignState: a file of another is in the way; nothing is changed.
        """
        there = self.rounds()
        before = [one for one in there if one < round]
        # a higher number is left from a run that went further and was resumed from here: it is no longer true
        over = [*before[: max(0, len(before) + 1 - self.keep)], *(one for one in there if one > round)]
        for one in {*over, round} & set(there):
            self._check_head(one)
        # safetensors stores raw memory: a strided view would be stored in the wrong order without the copy
        body = safetensors.numpy.save({name: np.asarray(array, order="C") for name, array in tensors.items()})
        header = {
            "format": FORMAT, "kind": self.kind, "owner": self.owner, "round": round, "by": trunkline.__version__, "meta": meta,
        }  # fmt: skip
        line = json.dumps(header).encode()
        data = len(line).to_bytes(8, "little") + line + body
        data += hashlib.sha256(data).digest()
        if round in self._damaged & set(there):
            self._set_aside(round)
        write_private(self.path(round), data, self.seal, self._about(round))
        for old in over:
            self._set_aside(old) if old in self._damaged else self.path(old).unlink(missing_ok=True)

    def get(self, round: int) -> tuple[Tensors, dict[str, object]]:
        """Tensors and meta of one round.

        Raises:
            StorageError: the file is absent, cut short or altered.
            ForeignState: intact, and of another owner or kind, or of a newer format.
            TrustError: intact, and sealed with a key that is not here, or plain where it should be sealed.
        """
        header, tensors = self._read(round)
        self._check_owner(header, self.path(round))
        return tensors, header["meta"]

    def _read(self, round: int) -> tuple[Header, Tensors]:
        path = self.path(round)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StorageError(f"{path}: cannot be read ({error.strerror}).") from error
        if self.seal is not None and not is_sealed(data):
            _parse(data, path)  # rubbish is damage; what can be read is a plain file, and the seal refuses it
        return _parse(_opened(data, path, self.seal, self._about(round)), path)

    def _check_owner(self, header: Header, path: Path) -> None:
        kind, owner = header["kind"], header["owner"]
        if self.kind and kind not in ("", self.kind):
            raise ForeignState(
                f"{path}: is a file of the kind {kind!r}, and should be of the kind {self.kind!r}. Somebody copied it here; "
                "nothing was changed. Move it away."
            )
        if self.owner and owner not in ("", self.owner):
            what = WHOSE.get(self.kind, "owner")
            raise ForeignState(
                f"{path}: is of {what} {owner!r}, and this is {what} {self.owner!r}. "
                + (
                    "Two plants share a state folder, or theirs were swapped; nothing was trained or changed. Give each the "
                    "state folder it had (--state), or put the `name` in site.toml back."
                    if what == "site"
                    else "Nothing was changed. Go on with the run it is of (--resume), or give this one another --out."
                )
            )

    def check(self) -> None:
        """Raise ForeignState when a file here is another's; what is damaged or cannot be opened is for who needs it to say.

        Plain files are told by their headers; of sealed ones the newest is opened.
        """
        for round in self.rounds() if self.seal is None else self.rounds()[-1:]:
            self._check_head(round)

    def _check_head(self, round: int) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            header = self._head(round)
            if header["kind"] in ("", self.kind) and header["owner"] in ("", self.owner):
                return
        try:  # another's, or damaged, or sealed: the whole file says
            self.get(round)
        except ForeignState:
            raise
        except (StorageError, TrustError):
            pass

    def _head(self, round: int) -> Header:
        """Of a plain file, not checked by its checksum; anything may be raised by one that is damaged or sealed."""
        path = self.path(round)
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return _migrated(json.loads(file.read(min(size, path.stat().st_size))))

    def passed_over(self, round: int) -> None:
        """Remember that this file is damaged: what takes its place will not destroy it."""
        self._damaged.add(round)

    def _set_aside(self, round: int) -> None:
        """Keep a damaged file for whoever wants to know what happened to it, where no reader looks for one."""
        with contextlib.suppress(OSError):
            self.path(round).replace(self.path(round).with_suffix(SET_ASIDE))

    def _about(self, round: int) -> str:
        return f"{self.place}/{self.path(round).name}"

    def newest(self, below: int | None = None, above: int = -1) -> tuple[int, Tensors, dict[str, object]] | None:
        """The newest intact round (above `above`, and below `below` if given), or None when the shelf holds none of them.

        Raises:
            StorageError: files are there, but none of them is intact.
            ForeignState: the newest of them that is intact is not for this reader.
            TrustError: the newest of them cannot be opened with the key at hand; it is not passed over.
        """
        candidates = [one for one in self.rounds() if one > above and (below is None or one < below)]
        for place, round in enumerate(reversed(candidates)):
            try:
                tensors, meta = self.get(round)
            except ForeignState:
                raise
            except StorageError as error:
                self.passed_over(round)
                older = candidates[: len(candidates) - place - 1]
                self.tell(f"{error} " + (f"Going back to round {older[-1]}." if older else "No older version is left."))
                continue
            return round, tensors, meta
        if candidates:
            raise StorageError(
                f"{self.folder}: none of its {len(candidates)} versions is intact. Restore a backup, or remove the folder to start afresh."
            )
        return None

    def owners(self) -> list[str]:
        """Whose the intact files here are, as far as they say so, oldest first."""
        found: dict[str, None] = {}
        for round in self.rounds():
            with contextlib.suppress(StorageError):
                found[self._read(round)[0]["owner"]] = None
        return [owner for owner in found if owner]


def _migrated(header: Header) -> Header:
    for step in range(header["format"], FORMAT):
        header = MIGRATIONS[step](header)
    return header


def _parse(data: bytes, path: Path) -> tuple[Header, Tensors]:
    """Header, as of the newest format, and tensors of a file of any."""
    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        found = header["format"]
        if found == 1:
            body = data[8 + size :]
            whole = hashlib.sha256(body).hexdigest() == header["sha256"]
        else:
            body = data[8 + size : -DIGEST]
            whole = hashlib.sha256(data[:-DIGEST]).digest() == data[-DIGEST:]
        if not whole:
            raise StorageError(f"{path}: damaged (its checksum does not match).")
        if found > FORMAT:
            by = f"Trunkline {header.get('by') or 'newer than this'}"
            raise ForeignState(
                f"{path}: format {found}, written by {by}; this is Trunkline {trunkline.__version__} and reads up to {FORMAT}. "
                f"Update this Trunkline; nothing was changed."
            )
        return _migrated(header), safetensors.numpy.load(body)
    except (ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise StorageError(f"{path}: damaged or unreadable ({type(error).__name__}: {error}).") from error
