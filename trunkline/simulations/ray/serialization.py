"""Messages as they travel between the processes of a simulation: array bytes beside the rest, and the same bytes once."""

import io
import pickle
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, RecordDict
from numpy.typing import NDArray

Buffer = NDArray[np.uint8]
SHARED_FROM = 16 * 1024  # bytes; less than this costs as little in every message as the look-up would
KEPT = 64 * 1024 * 1024  # bytes of shared content that are remembered, and always the newest
AT_ONCE = 1 << 16  # bytes compared in one step: the answer of a comparison is an array too, and a small one is reused


class _Pickler(pickle.Pickler):
    def reducer_override(self, one: Any) -> Any:
        if type(one) is Array:
            return _array, (one.dtype, one.shape, one.stype, pickle.PickleBuffer(one.data))
        return NotImplemented


def _array(dtype: str, shape: tuple[int, ...], stype: str, data: Any) -> Array:
    made = Array(dtype, shape, stype, b"")
    made.data = data  # Flower's constructor would take nothing but `bytes`
    return made


def pack(one: object) -> tuple[bytes, list[Buffer]]:
    """`one` without the bytes of its arrays, and these uncopied."""
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(one)
    return stream.getvalue(), [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]


def unpack(rest: bytes, buffers: Sequence[Any]) -> Any:
    """What was packed; its arrays are views of `buffers` and keep them where they are, as in the object store."""
    return pickle.loads(rest, buffers=[one if isinstance(one, bytes) else memoryview(one) for one in buffers])


class Shared:
    """One array content in the object store, for all the messages that have it; the driver holds no second copy.

    Args:
        number: names it towards the workers.
        reference: what a worker finds it by.
        buffers: the driver's view of it there.
    """

    def __init__(self, number: int, reference: Any, buffers: list[Buffer]) -> None:
        self.number = number
        self.reference = reference
        self.buffers = buffers
        self.nbytes = sum(buffer.nbytes for buffer in buffers)


def equal(some: Sequence[Buffer], others: Sequence[Buffer]) -> bool:
    return [one.nbytes for one in some] == [one.nbytes for one in others] and all(map(_same, some, others))


def _same(one: Buffer, other: Buffer) -> bool:
    starts = range(0, one.nbytes, AT_ONCE)
    return all(np.array_equal(one[start : start + AT_ONCE], other[start : start + AT_ONCE]) for start in starts)


class Sharing:
    """Finds what many messages have in common by their bytes, so that who makes them need not say so.

    Args:
        put: writes buffers to the store; returns what a worker finds them by, and the driver's view of them there.
    """

    def __init__(self, put: Callable[[list[Buffer]], tuple[Any, list[Buffer]]]) -> None:
        self._put = put
        self._known: list[Shared] = []
        self._made = 0
        self._last: tuple[weakref.ref[RecordDict], bytes, Shared] | None = None

    def packed(self, content: RecordDict) -> tuple[bytes, list[Buffer] | Shared, bool]:
        """`content` as it travels: all but its arrays, and these or what is shared of them; whether they are new here."""
        if self._last is not None and self._last[0]() is content:  # nobody changes what is in a message
            return self._last[1], self._last[2], False
        rest, buffers = pack(content)
        shared, new = self.find(buffers)
        if shared is None:
            return rest, buffers, True
        self._last = weakref.ref(content), rest, shared
        return rest, shared, new

    def find(self, buffers: list[Buffer]) -> tuple[Shared | None, bool]:
        """The stored content that equals `buffers`, and whether it is new; None where they are few bytes."""
        if sum(buffer.nbytes for buffer in buffers) < SHARED_FROM:
            return None, False
        for one in reversed(self._known):
            if equal(buffers, one.buffers):
                return one, False
        self._made += 1
        self._known.append(Shared(self._made, *self._put(buffers)))
        while len(self._known) > 1 and sum(one.nbytes for one in self._known) > KEPT:
            del self._known[0]
        return self._known[-1], True
