"""Looking for private bytes in recorded ones: as they are, and unpacked where something was packed.

A needle of numbers is every run of 16 bytes of it (4 float32 or 2 float64 side by side), in both byte orders; runs that
anybody could write by chance (zeros, small whole numbers, one value over and over) are left out and counted.
"""

import base64
import binascii
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

RUN = 16  # bytes
CLASSES = 32  # labels of a few classes side by side: fewer could be anything
CHANGES = 6  # at least, among these: a column that hardly changes says nothing by its order
MOST_UNPACKED = 64 << 20  # bytes, of all that was packed
BLOCK = 1 << 20  # places looked at together
DEEPEST = 2  # packed in packed
PACKED = {
    b"\x1f\x8b\x08": 31, b"PK\x03\x04": -15, **{bytes([0x78, second]): 15 for second in (0x01, 0x5E, 0x9C, 0xDA)}
}  # fmt: skip
BASE64, HEX = re.compile(rb"[A-Za-z0-9+/_-]{24,}"), re.compile(rb"[0-9a-fA-F]{32,}")
Hashes = NDArray[np.uint64]


@dataclass
class Runs:
    """The runs of some arrays, by length in bytes, as hashes of 64 bits.

    Args:
        left_out: runs that were too common to tell.
        values: numbers of all arrays.
    """

    by_length: dict[int, list[Hashes]] = field(default_factory=dict)
    left_out: int = 0
    values: int = 0

    def add(self, array: NDArray[Any], dtypes: tuple[str, ...] = ("<f4", ">f4", "<f8", ">f8")) -> Self:
        """Every run of an array's numbers in the order they lie in memory, as float32 and float64."""
        flat = np.asarray(array, dtype=np.float64).ravel()
        self.values += flat.size
        for dtype in dtypes:
            with np.errstate(over="ignore"):  # what float32 cannot hold is infinite there, and too common to tell
                self._add(flat.astype(dtype), RUN // np.dtype(dtype).itemsize, _telling)
        return self

    def add_classes(self, array: NDArray[Any]) -> Self:
        """Runs of CLASSES labels that are whole numbers, in every width they might travel in."""
        flat = np.asarray(array, dtype=np.float64).ravel()
        flat = flat[np.isfinite(flat)]
        self.values += flat.size
        for dtype in ("<f4", "<f8", "<i8", "<i4", "u1"):
            self._add(np.abs(flat).astype(dtype), CLASSES, _changing)
        return self

    def _add(self, flat: NDArray[Any], width: int, tells: Any) -> None:
        if flat.size < width:
            return
        windows = np.lib.stride_tricks.sliding_window_view(flat, width)
        kept = windows[tells(windows)]
        self.left_out += len(windows) - len(kept)
        if len(kept):
            rows = np.ascontiguousarray(kept).view(np.uint8).reshape(len(kept), -1)
            self.by_length.setdefault(rows.shape[1], []).append(_hash(rows.view("<u8")))

    @property
    def hashes(self) -> dict[int, Hashes]:
        return {length: np.unique(np.concatenate(parts)) for length, parts in self.by_length.items()}

    def __len__(self) -> int:
        return sum(len(one) for one in self.hashes.values())


def _telling(windows: NDArray[Any]) -> NDArray[np.bool_]:
    """Windows of numbers that do not come about by chance."""
    numbers = windows.astype(np.float64)
    plain = (np.isin(np.abs(numbers), (0.0, 1.0))) | ~np.isfinite(numbers)
    if windows.shape[1] == 2:  # of float64: both must be long numbers
        whole = plain | ((np.abs(numbers) < 65536) & (numbers == np.rint(numbers)))
        return np.asarray(~whole.any(axis=1) & (numbers[:, 0] != numbers[:, 1]))
    ordered = np.sort(numbers, axis=1)
    distinct = (np.diff(ordered, axis=1) != 0).sum(axis=1) + 1
    return np.asarray((distinct >= 3) & (plain.sum(axis=1) <= 1))


def _changing(windows: NDArray[Any]) -> NDArray[np.bool_]:
    return np.asarray((windows[:, 1:] != windows[:, :-1]).sum(axis=1) >= CHANGES)


def _hash(words: NDArray[Any]) -> Hashes:
    """(n, k) words of 8 bytes -> (n,) hashes."""
    found = np.zeros(len(words), np.uint64)
    for column in range(words.shape[1]):
        found = (found ^ words[:, column].astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        found ^= found >> np.uint64(29)
    return found


def _words_at_every_byte(data: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The 8 bytes from every place on, as one number each."""
    count = len(data) - 7
    words = np.empty(max(count, 0), np.uint64)
    for shift in range(min(8, max(count, 0))):
        own = data[shift : shift + 8 * ((len(data) - shift) // 8)]
        words[shift::8] = own.view("<u8")[: len(words[shift::8])]
    return words


class Haystack:
    """Recorded bytes and everything that could be unpacked from them.

    Args:
        streams: each searched by itself, such as one direction of one connection.
    """

    def __init__(self, streams: Iterable[bytes]) -> None:
        self.views = [("as it is", one) for one in streams if one]
        self.unpacked = 0
        budget = MOST_UNPACKED
        seen: set[bytes] = set()
        layer = [one for _, one in self.views]
        for _ in range(DEEPEST):
            inside: list[bytes] = []
            for data in layer:
                for how, one in _unpacked(data):
                    if one in seen or len(one) < 8 or budget < len(one):
                        continue
                    seen.add(one)
                    budget -= len(one)
                    inside.append(one)
                    self.views.append((how, one))
            self.unpacked += len(inside)
            layer = inside

    def places_of(self, needle: bytes) -> list[str]:
        """In which views a text or bytes is found."""
        return [how for how, data in self.views if needle in data]

    def share_of(self, runs: Runs) -> tuple[int, int]:
        """How many of these runs are found, and how many there are."""
        wanted = runs.hashes
        found = {length: np.zeros(len(hashes), np.bool_) for length, hashes in wanted.items()}
        for _, data in self.views:
            words = _words_at_every_byte(np.frombuffer(data, np.uint8))
            for length, hashes in wanted.items():
                for start in range(0, max(0, len(words) - (length - 8)), BLOCK):
                    end = min(start + BLOCK, len(words) - (length - 8))
                    columns = [words[start + shift : end + shift] for shift in range(0, length, 8)]
                    here = _hash(np.stack(columns, axis=1))
                    place = np.searchsorted(hashes, here).clip(max=len(hashes) - 1)
                    found[length][place[hashes[place] == here]] = True
        return sum(int(one.sum()) for one in found.values()), sum(len(one) for one in wanted.values())


def _unpacked(data: bytes) -> Iterator[tuple[str, bytes]]:
    for match in BASE64.finditer(data):
        text = match[0].replace(b"-", b"+").replace(b"_", b"/")
        for start in range(4):  # where the first group of four begins nobody knows
            whole = text[start : start + 4 * ((len(text) - start) // 4)]
            with_rest = text[start:] + b"=" * (-(len(text) - start) % 4)
            for one in dict.fromkeys((with_rest, whole)):
                try:
                    yield "base64", base64.b64decode(one)
                    break
                except binascii.Error:
                    continue
    for match in HEX.finditer(data):
        for start in range(2):
            text = match[0][start:]
            yield "hexadecimal", bytes.fromhex(text[: len(text) // 2 * 2].decode())
    for magic, mode in PACKED.items():
        place = data.find(magic)
        while place >= 0:
            start = place
            if (
                mode == -15 and len(data) >= place + 30
            ):  # a zip's file: the packed bytes lie behind name and extra field
                start += 30 + int.from_bytes(data[place + 26 : place + 28], "little")
                start += int.from_bytes(data[place + 28 : place + 30], "little")
            try:
                out = zlib.decompressobj(mode).decompress(data[start:], MOST_UNPACKED)
            except zlib.error:
                out = b""
            if out:
                yield "unpacked", out
            place = data.find(magic, place + 1)
