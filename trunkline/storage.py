"""Files of state that survive a kill at any moment: written aside, fsynced, renamed, numbered, with a checksum.

The vault and the checkpoint both are a `Shelf`: one folder of numbered safetensors files, the last few kept. A damaged
file is passed over for the one before it, and the caller is told.

Where a folder is sealed (`trunkline/sealing.py`), what is private in it is encrypted as a whole, and sealed as its own
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

from trunkline.errors import StorageError, TrustError

FORMAT = 1
MAGIC = b"trunkline-sealed\x01"  # how a sealed file begins; what follows only trunkline/sealing.py knows
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
    """What storage needs of a seal; `trunkline.sealing.Seal` is one."""

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


class Shelf:
    """A folder of `round-000012.safetensors` files.

    Args:
        folder: made on first write.
        keep: how many of the newest stay.
        tell: called with a sentence when a damaged file is passed over.
        seal: encrypts every file; None: they are plain.
        place: the folder below the one that is sealed, which the files are bound to.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 3,
        tell: Callable[[str], None] = lambda text: None,
        seal: Sealing | None = None,
        place: str = "",
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.tell = tell
        self.seal = seal
        self.place = place

    def rounds(self) -> list[int]:
        """The rounds on the shelf, oldest first, damaged or not."""
        if not self.folder.is_dir():
            return []
        found = (re.fullmatch(r"round-(\d+)\.safetensors", path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, round: int) -> Path:
        return self.folder / f"round-{round:06d}.safetensors"

    def put(self, round: int, tensors: Mapping[str, NDArray[Any]], meta: Mapping[str, object]) -> None:
        """Write one round and forget the oldest beyond `keep`."""
        # safetensors stores raw memory: a strided view would be stored in the wrong order without the copy
        body = safetensors.numpy.save({name: np.asarray(array, order="C") for name, array in tensors.items()})
        header = json.dumps(
            {"format": FORMAT, "round": round, "sha256": hashlib.sha256(body).hexdigest(), "meta": meta}
        )
        line = header.encode()
        data = len(line).to_bytes(8, "little") + line + body
        write_private(self.path(round), data, self.seal, self._about(round))
        kept = [one for one in self.rounds() if one <= round]
        # a higher number is left from a run that went further and was resumed from here: it is no longer true
        for old in (*kept[: -self.keep], *(one for one in self.rounds() if one > round)):
            self.path(old).unlink(missing_ok=True)

    def get(self, round: int) -> tuple[Tensors, dict[str, object]]:
        """Tensors and meta of one round.

        Raises:
            StorageError: the file is absent, cut short or altered.
            TrustError: intact, and sealed with a key that is not here, or plain where it should be sealed.
        """
        path = self.path(round)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StorageError(f"{path}: cannot be read ({error.strerror}).") from error
        if self.seal is not None and not is_sealed(data):
            self._parse(data, path)  # rubbish is damage; what can be read is a plain file, and the seal refuses it
        return self._parse(_opened(data, path, self.seal, self._about(round)), path)

    @staticmethod
    def _parse(data: bytes, path: Path) -> tuple[Tensors, dict[str, object]]:
        try:
            size = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + size])
            body = data[8 + size :]
            if header["format"] != FORMAT:
                raise StorageError(
                    f"{path}: format {header['format']}; this Trunkline reads {FORMAT}. Update Trunkline to read it."
                )
            if hashlib.sha256(body).hexdigest() != header["sha256"]:
                raise StorageError(f"{path}: damaged (its checksum does not match).")
            return safetensors.numpy.load(body), header["meta"]
        except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise StorageError(f"{path}: damaged or unreadable ({type(error).__name__}: {error}).") from error

    def _about(self, round: int) -> str:
        return f"{self.place}/{self.path(round).name}"

    def newest(self, below: int | None = None, above: int = -1) -> tuple[int, Tensors, dict[str, object]] | None:
        """The newest intact round (above `above`, and below `below` if given), or None when the shelf holds none of them.

        Raises:
            StorageError: files are there, but none of them is intact.
            TrustError: the newest of them cannot be opened with the key at hand; it is not passed over.
        """
        candidates = [one for one in self.rounds() if one > above and (below is None or one < below)]
        for place, round in enumerate(reversed(candidates)):
            try:
                tensors, meta = self.get(round)
            except StorageError as error:
                older = candidates[: len(candidates) - place - 1]
                self.tell(f"{error} " + (f"Going back to round {older[-1]}." if older else "No older version is left."))
                continue
            return round, tensors, meta
        if candidates:
            raise StorageError(
                f"{self.folder}: none of its {len(candidates)} versions is intact. Restore a backup, or remove the folder to start afresh."
            )
        return None
