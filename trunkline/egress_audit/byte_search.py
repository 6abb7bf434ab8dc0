"""Search recorded bytes for private ones: as they are, and unpacked where something was packed.

Private numbers are searched for as every run of 16 bytes of them (4 float32 or 2 float64 side by side), in both byte
orders. Runs that could occur by chance (zeros, small whole numbers, one value over and over) are left out and counted.
"""

import base64
import binascii
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

RUN = 16  # bytes
CLASSES = 32  # labels of a few classes side by side: fewer could occur by chance
CHANGES = 6  # at least, among these: a column that hardly changes cannot be recognised by its order
MOST_UNPACKED = 64 << 20  # bytes, of all that was packed
BLOCK = 1 << 20  # offsets searched in one step
DEEPEST = 2  # layers of packing that are opened
PACKED = {
    b"\x1f\x8b\x08": 31, b"PK\x03\x04": -15, **{bytes([0x78, second]): 15 for second in (0x01, 0x5E, 0x9C, 0xDA)}
}  # fmt: skip
BASE64, HEX = re.compile(rb"[A-Za-z0-9+/_-]{24,}"), re.compile(rb"[0-9a-fA-F]{32,}")
Hashes = NDArray[np.uint64]


@dataclass
class NumberRuns:
    """The runs of some arrays, by length in bytes, as hashes of 64 bits.

    Args:
        left_out: runs that were too common to be evidence.
        values: how many numbers all arrays hold.
    """

    by_length: dict[int, list[Hashes]] = field(default_factory=dict)
    left_out: int = 0
    values: int = 0

    def add(self, array: NDArray[Any], dtypes: tuple[str, ...] = ("<f4", ">f4", "<f8", ">f8")) -> Self:
        """Add every run of an array's numbers, of any shape, in the order they lie in memory, as float32 and float64."""
        flat = np.asarray(array, dtype=np.float64).ravel()
        self.values += flat.size
        for dtype in dtypes:
            with np.errstate(
                over="ignore"
            ):  # what float32 cannot hold is infinite there, and too common to be evidence
                self._add(flat.astype(dtype), RUN // np.dtype(dtype).itemsize, _distinctive)
        return self

    def add_classes(self, array: NDArray[Any]) -> Self:
        """Add the runs of CLASSES whole-number labels of an array of any shape, in every width they might travel in."""
        flat = np.asarray(array, dtype=np.float64).ravel()
        flat = flat[np.isfinite(flat)]
        self.values += flat.size
        for dtype in ("<f4", "<f8", "<i8", "<i4", "u1"):
            self._add(np.abs(flat).astype(dtype), CLASSES, _varied)
        return self

    def _add(self, flat: NDArray[Any], width: int, is_distinctive: Callable[[NDArray[Any]], NDArray[np.bool_]]) -> None:
        if flat.size < width:
            return
        windows = np.lib.stride_tricks.sliding_window_view(flat, width)
        kept = windows[is_distinctive(windows)]
        self.left_out += len(windows) - len(kept)
        if len(kept):
            rows = np.ascontiguousarray(kept).view(np.uint8).reshape(len(kept), -1)
            self.by_length.setdefault(rows.shape[1], []).append(_hash(rows.view("<u8")))

    @property
    def hashes(self) -> dict[int, Hashes]:
        return {length: np.unique(np.concatenate(parts)) for length, parts in self.by_length.items()}

    def __len__(self) -> int:
        return sum(len(hashes) for hashes in self.hashes.values())


def _distinctive(windows: NDArray[Any]) -> NDArray[np.bool_]:
    """(n, width) numbers -> (n,): whether each window is unlikely to occur by chance."""
    numbers = windows.astype(np.float64)
    plain = (np.isin(np.abs(numbers), (0.0, 1.0))) | ~np.isfinite(numbers)
    if windows.shape[1] == 2:  # of float64: both must be long numbers
        whole = plain | ((np.abs(numbers) < 65536) & (numbers == np.rint(numbers)))
        return np.asarray(~whole.any(axis=1) & (numbers[:, 0] != numbers[:, 1]))
    ordered = np.sort(numbers, axis=1)
    distinct = (np.diff(ordered, axis=1) != 0).sum(axis=1) + 1
    return np.asarray((distinct >= 3) & (plain.sum(axis=1) <= 1))


def _varied(windows: NDArray[Any]) -> NDArray[np.bool_]:
    return np.asarray((windows[:, 1:] != windows[:, :-1]).sum(axis=1) >= CHANGES)


def _hash(words: NDArray[Any]) -> Hashes:
    """(n, k) words of 8 bytes -> (n,) hashes."""
    hashes = np.zeros(len(words), np.uint64)
    for column in range(words.shape[1]):
        hashes = (hashes ^ words[:, column].astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return hashes


def _words_at_every_byte(data: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """(n,) bytes -> (n - 7,): the 8 bytes from every offset on, as one number each."""
    count = len(data) - 7
    words = np.empty(max(count, 0), np.uint64)
    for shift in range(min(8, max(count, 0))):
        whole_words = data[shift : shift + 8 * ((len(data) - shift) // 8)]
        words[shift::8] = whole_words.view("<u8")[: len(words[shift::8])]
    return words


class RecordedBytes:
    """Recorded bytes and everything that could be unpacked from them.

    Args:
        streams: each is searched by itself, such as one direction of one connection.
    """

    def __init__(self, streams: Iterable[bytes]) -> None:
        self.views = [("as it is", stream) for stream in streams if stream]
        self.unpacked = 0
        budget = MOST_UNPACKED
        seen: set[bytes] = set()
        layer = [data for _, data in self.views]
        for _ in range(DEEPEST):
            inside: list[bytes] = []
            for data in layer:
                for packing, content in _unpack(data):
                    if content in seen or len(content) < 8 or budget < len(content):
                        continue
                    seen.add(content)
                    budget -= len(content)
                    inside.append(content)
                    self.views.append((packing, content))
            self.unpacked += len(inside)
            layer = inside

    def views_with(self, pattern: bytes) -> list[str]:
        """The views that contain `pattern`, each by how it was packed."""
        return [packing for packing, data in self.views if pattern in data]

    def count(self, runs: NumberRuns) -> tuple[int, int]:
        """How many of these runs the recorded bytes contain, and how many runs there are."""
        wanted = runs.hashes
        hits = {length: np.zeros(len(hashes), np.bool_) for length, hashes in wanted.items()}
        for _, data in self.views:
            words = _words_at_every_byte(np.frombuffer(data, np.uint8))
            for length, hashes in wanted.items():
                for start in range(0, max(0, len(words) - (length - 8)), BLOCK):
                    end = min(start + BLOCK, len(words) - (length - 8))
                    columns = [words[start + shift : end + shift] for shift in range(0, length, 8)]
                    recorded = _hash(np.stack(columns, axis=1))
                    index = np.searchsorted(hashes, recorded).clip(max=len(hashes) - 1)
                    hits[length][index[hashes[index] == recorded]] = True
        return sum(int(hit.sum()) for hit in hits.values()), sum(len(hashes) for hashes in wanted.values())


def _unpack(data: bytes) -> Iterator[tuple[str, bytes]]:
    for match in BASE64.finditer(data):
        text = match[0].replace(b"-", b"+").replace(b"_", b"/")
        for start in range(4):  # the first group of four may begin at any of them
            whole = text[start : start + 4 * ((len(text) - start) // 4)]
            with_rest = text[start:] + b"=" * (-(len(text) - start) % 4)
            for candidate in dict.fromkeys((with_rest, whole)):
                try:
                    yield "base64", base64.b64decode(candidate)
                    break
                except binascii.Error:
                    continue
    for match in HEX.finditer(data):
        for start in range(2):
            text = match[0][start:]
            yield "hexadecimal", bytes.fromhex(text[: len(text) // 2 * 2].decode())
    for magic, mode in PACKED.items():
        offset = data.find(magic)
        while offset >= 0:
            start = offset
            if mode == -15 and len(data) >= offset + 30:  # in a zip, the packed bytes lie behind name and extra field
                start += 30 + int.from_bytes(data[offset + 26 : offset + 28], "little")
                start += int.from_bytes(data[offset + 28 : offset + 30], "little")
            try:
                out = zlib.decompressobj(mode).decompress(data[start:], MOST_UNPACKED)
            except zlib.error:
                out = b""
            if out:
                yield "unpacked", out
            offset = data.find(magic, offset + 1)
