"""Messages as they travel between the processes of a simulation: array bytes beside the rest, and the same bytes once."""

import io
import pickle
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, RecordDict
from numpy.typing import NDArray

Buffer = NDArray[np.uint8]  # (bytes,)
SHARED_FROM = 16 * 1024  # bytes; less than this costs as little in every message as the look-up would
KEPT = 64 * 1024 * 1024  # bytes of shared content that are remembered, and always the newest
COMPARED_BYTES = 1 << 16  # in one step: the result of a comparison is an array too, and a small one is reused


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if type(value) is Array:
            return _array, (value.dtype, value.shape, value.stype, pickle.PickleBuffer(value.data))
        return NotImplemented


def _array(dtype: str, shape: tuple[int, ...], stype: str, data: Any) -> Array:
    array = Array(dtype, shape, stype, b"")
    array.data = data  # Flower's constructor would take nothing but `bytes`
    return array


def pack(value: object) -> tuple[bytes, list[Buffer]]:
    """`value` pickled without the bytes of its arrays, and these bytes uncopied, one buffer an array."""
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(value)
    return stream.getvalue(), [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]


def unpack(body: bytes, buffers: Sequence[Any]) -> Any:
    """The value that was packed. Its arrays are views of `buffers` and keep them where they are, as in the object store."""
    return pickle.loads(
        body, buffers=[buffer if isinstance(buffer, bytes) else memoryview(buffer) for buffer in buffers]
    )


class SharedContent:
    """One array content in the object store, for all the messages that have it; the driver holds no second copy.

    Args:
        key: identifies it towards the workers.
        reference: by which a worker gets it from the object store.
        buffers: the driver's view of it there.
    """

    def __init__(self, key: int, reference: Any, buffers: list[Buffer]) -> None:
        self.key = key
        self.reference = reference
        self.buffers = buffers
        self.nbytes = sum(buffer.nbytes for buffer in buffers)


def equal(first: Sequence[Buffer], second: Sequence[Buffer]) -> bool:
    """Whether both lists hold the same bytes, buffer by buffer."""
    sizes_equal = [buffer.nbytes for buffer in first] == [buffer.nbytes for buffer in second]
    return sizes_equal and all(map(_equal_buffers, first, second))


def _equal_buffers(first: Buffer, second: Buffer) -> bool:
    starts = range(0, first.nbytes, COMPARED_BYTES)
    return all(
        np.array_equal(first[start : start + COMPARED_BYTES], second[start : start + COMPARED_BYTES])
        for start in starts
    )


class ContentStore:
    """Stores array content that many messages share once. It compares bytes, so that a sender need not say what is shared.

    Args:
        put: writes buffers to the object store; returns their reference there, and the driver's view of them.
    """

    def __init__(self, put: Callable[[list[Buffer]], tuple[Any, list[Buffer]]]) -> None:
        self._put = put
        self._contents: list[SharedContent] = []
        self._count = 0
        self._last: tuple[weakref.ref[RecordDict], bytes, SharedContent] | None = None

    def pack(self, content: RecordDict) -> tuple[bytes, list[Buffer] | SharedContent, bool]:
        """`content` as it travels: all but its arrays; their bytes or the shared content; and whether these are new here."""
        if self._last is not None and self._last[0]() is content:  # no code changes the content of a message
            return self._last[1], self._last[2], False
        body, buffers = pack(content)
        shared, new = self.find(buffers)
        if shared is None:
            return body, buffers, True
        self._last = weakref.ref(content), body, shared
        return body, shared, new

    def find(self, buffers: list[Buffer]) -> tuple[SharedContent | None, bool]:
        """The stored content that equals `buffers`, and whether it is new; None where they are few bytes."""
        if sum(buffer.nbytes for buffer in buffers) < SHARED_FROM:
            return None, False
        for content in reversed(self._contents):
            if equal(buffers, content.buffers):
                return content, False
        self._count += 1
        self._contents.append(SharedContent(self._count, *self._put(buffers)))
        while len(self._contents) > 1 and sum(content.nbytes for content in self._contents) > KEPT:
            del self._contents[0]
        return self._contents[-1], True
