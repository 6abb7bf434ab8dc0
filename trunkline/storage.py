"""Files of state that survive a kill at any moment: written aside, fsynced, renamed, numbered, with a checksum.

The vault and the checkpoint both are a `Shelf`: one folder of numbered safetensors files, the last few kept. A damaged
file is passed over for the one before it, and the caller is told.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from trunkline.errors import StorageError

FORMAT = 1
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


class Shelf:
    """A folder of `round-000012.safetensors` files.

    Args:
        folder: made on first write.
        keep: how many of the newest stay.
        tell: called with a sentence when a damaged file is passed over.
    """

    def __init__(self, folder: Path, keep: int = 3, tell: Callable[[str], None] = lambda text: None) -> None:
        self.folder = folder
        self.keep = keep
        self.tell = tell

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
        write_atomic(self.path(round), len(line).to_bytes(8, "little") + line + body)
        kept = [one for one in self.rounds() if one <= round]
        # a higher number is left from a run that went further and was resumed from here: it is no longer true
        for old in (*kept[: -self.keep], *(one for one in self.rounds() if one > round)):
            self.path(old).unlink(missing_ok=True)

    def get(self, round: int) -> tuple[Tensors, dict[str, object]]:
        """Tensors and meta of one round.

        Raises:
            StorageError: the file is absent, cut short or altered.
        """
        path = self.path(round)
        try:
            data = path.read_bytes()
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
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise StorageError(f"{path}: damaged or unreadable ({type(error).__name__}: {error}).") from error

    def newest(self, below: int | None = None, above: int = -1) -> tuple[int, Tensors, dict[str, object]] | None:
        """The newest intact round (above `above`, and below `below` if given), or None when the shelf holds none of them.

        Raises:
            StorageError: files are there, but none of them is intact.
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
