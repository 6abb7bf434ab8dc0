"""One connection of the gateway, on either side: bytes in order, with back-pressure; and those that wait for their next use."""

import asyncio
import contextlib
import re
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from trunkline.errors import TrunklineError

READ_AHEAD = 1 << 20  # bytes that wait unread before the peer is asked to pause
START = re.compile(rb"[A-Z]{1,16}(\Z| )")  # what any request starts with; anything else need not be waited for


class Denied(TrunklineError):
    """A request that is answered here and not passed on.

    Args:
        status: of HTTP; never 403, which a SuperNode takes for "this run has ended".
        kind: a word or two that are the same for all refusals of this sort: by it a log counts repetitions.
    """

    def __init__(self, status: int, text: str, kind: str) -> None:
        super().__init__(text)
        self.status, self.kind = status, kind


class Lost(TrunklineError):
    """The other end of a connection went away, or does nothing for too long."""

    def __init__(self, wire: "Wire", what: str, silent: bool = False) -> None:
        super().__init__(what)
        self.wire, self.silent = wire, silent


class Wire(asyncio.Protocol):
    """A connection as a queue of chunks; a chunk is what one read gave, and is not copied.

    `on_lost` is called once when the connection is gone.
    """

    transport: Any

    def __init__(self) -> None:
        self.on_lost: Callable[[], object] | None = None
        self.ended = self.gone = False
        self.since = time.monotonic()  # when it was last put back into a pool
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._paused = False
        self._blocked = False
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport  # asyncio's TLS transport is no asyncio.Transport by type
        self.transport.set_write_buffer_limits(high=READ_AHEAD)

    def data_received(self, data: bytes) -> None:
        self._chunks.append(data)
        self._size += len(data)
        if self._size > READ_AHEAD and not self._paused:
            self._paused = True
            self.transport.pause_reading()
        _wake(self._reader)

    def eof_received(self) -> None:
        self.ended = True
        _wake(self._reader)

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = self.gone = True
        _wake(self._reader)
        _wake(self._writer)
        if self.on_lost is not None:
            self.on_lost()

    def pause_writing(self) -> None:
        self._blocked = True

    def resume_writing(self) -> None:
        self._blocked = False
        _wake(self._writer)

    @property
    def quiet(self) -> bool:
        """Open, with nothing unread."""
        return not self.ended and not self._chunks

    async def receive(self, patience: float) -> bytes:
        """The next chunk.

        Raises:
            Lost: none came within `patience` seconds, or none will come.
        """
        if not self._chunks and not self.ended:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(patience):
                    await self._reader
            except TimeoutError:
                raise Lost(self, f"sent nothing for {patience:g} s", silent=True) from None
            finally:
                self._reader = None
        if not self._chunks:
            raise Lost(self, "closed the connection")
        data = self._chunks.popleft()
        self._size -= len(data)
        if self._paused and self._size < READ_AHEAD // 2:
            self._paused = False
            self.transport.resume_reading()
        return data

    def unread(self, data: bytes) -> None:
        if data:
            self._chunks.appendleft(data)
            self._size += len(data)

    async def send(self, data: bytes, patience: float) -> None:
        """Write, and wait while more than a megabyte is on its way.

        Raises:
            Lost: the other end is gone, or took nothing for `patience` seconds.
        """
        if self.ended:
            raise Lost(self, "closed the connection")
        self.transport.write(data)
        if self._blocked:
            self._writer = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(patience):
                    await self._writer
            except TimeoutError:
                raise Lost(self, f"took nothing for {patience:g} s", silent=True) from None
            finally:
                self._writer = None

    async def head(self, limit: int, first: float, rest: float, start: re.Pattern[bytes] | None = None) -> bytes:
        """All up to the empty line, which is part of it.

        Args:
            limit: bytes; first: seconds until its first byte; rest: seconds from there to its last one.
            start: what the head must begin with, so that nobody waits for the end of what cannot be one.

        Raises:
            Lost: it did not come; Denied: it is too large or cannot be one.
        """
        found = await self.receive(first)
        deadline = time.monotonic() + rest
        while (end := found.find(b"\r\n\r\n")) < 0:
            if len(found) > limit:
                break
            if (start is not None and not start.match(found)) or b"\n" in found.replace(b"\r\n", b""):
                raise Denied(400, "this is not an HTTP/1.1 request.", "not HTTP")
            try:
                found += await self.receive(max(0.0, deadline - time.monotonic()))
            except Lost as lost:
                if lost.silent:
                    raise Denied(408, f"the headers were not complete within {rest:g} s.", "slow headers") from None
                raise
        if end < 0 or end + 4 > limit:
            raise Denied(431, f"the headers are larger than the {limit:,} bytes that are taken here.", "headers")
        self.unread(found[end + 4 :])
        return found[: end + 4]

    async def linger(self, seconds: float) -> None:
        """Close so that an answer is read: what the peer still sends is thrown away for a while.

        A socket closed with unread bytes in it is reset, and with it goes the answer that says why.
        """
        try:
            async with asyncio.timeout(seconds):
                while not self.ended:
                    await self.receive(seconds)
        except (TimeoutError, Lost):
            pass
        self.close()

    async def shut(self, patience: float) -> None:
        """Close and wait until it is; after `patience` seconds, whether the other end agrees or not."""
        self.close()
        deadline = time.monotonic() + patience
        while not self.gone and time.monotonic() < deadline:
            self._writer = asyncio.get_running_loop().create_future()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - time.monotonic()):
                    await self._writer
        self.abort()

    def close(self) -> None:
        self.transport.close()

    def abort(self) -> None:
        self.transport.abort()


def _wake(future: "asyncio.Future[None] | None") -> None:
    if future is not None and not future.done():
        future.set_result(None)


async def copy(
    source: Wire, sink: Wire, length: int, patience: float, tap: Callable[[bytes], None] | None = None
) -> None:
    """Pass on exactly `length` bytes; `tap` sees them.

    Raises:
        Lost: one of the two; it says which.
    """
    while length:
        data = await source.receive(patience)
        if len(data) > length:
            source.unread(data[length:])
            data = data[:length]
        length -= len(data)
        if tap is not None:
            tap(data)
        await sink.send(data, patience)


class Pool:
    """Connections to the upstream that wait for their next request.

    Args:
        connect: makes a new one.
        keep_s: seconds one may wait; shorter than the upstream's own patience (uvicorn: 5 s), so that a request is never
            written to a connection that is just being closed.
    """

    def __init__(self, connect: Callable[[], Awaitable[Wire]], keep_s: float = 3.0, keep: int = 64) -> None:
        self.connect, self.keep_s, self.keep = connect, keep_s, keep
        self._idle: list[Wire] = []

    async def take(self) -> Wire:
        """Raises OSError, ssl.SSLError or TimeoutError where none can be made."""
        while self._idle:
            wire = self._idle.pop()
            if wire.quiet and time.monotonic() - wire.since < self.keep_s:
                return wire
            wire.close()
        return await self.connect()

    def give(self, wire: Wire) -> None:
        """Back for the next; only after a whole answer was read."""
        if wire.quiet and len(self._idle) < self.keep:
            wire.since = time.monotonic()
            self._idle.append(wire)
        else:
            wire.close()

    def prune(self) -> None:
        """Close what has waited too long."""
        stale = [wire for wire in self._idle if not wire.quiet or time.monotonic() - wire.since >= self.keep_s]
        self._idle = [wire for wire in self._idle if wire not in stale]
        for wire in stale:
            wire.close()

    def close(self) -> None:
        for wire in self._idle:
            wire.abort()
        self._idle.clear()


async def dial(address: tuple[str, int], context: ssl.SSLContext, patience: float) -> Wire:
    """A TLS connection to the upstream."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(patience):
        _, wire = await loop.create_connection(
            Wire, *address, ssl=context, server_hostname=address[0], ssl_shutdown_timeout=1.0
        )
    return wire


async def dial_unix(path: str, patience: float) -> Wire:
    """A connection to a socket of this machine."""
    async with asyncio.timeout(patience):
        _, wire = await asyncio.get_running_loop().create_unix_connection(Wire, path)
    return wire
