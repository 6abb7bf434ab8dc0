"""A connection of the gateway, to a caller or to the SuperLink: bytes in order, with back-pressure; and a pool of them."""

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
REQUEST_START = re.compile(rb"[A-Z]{1,16}(\Z| )")  # of any request; the end of anything else need not be awaited


class Denied(TrunklineError):
    """A request that the gateway itself answers, with a refusal.

    Args:
        status: of HTTP; never 403, which a SuperNode takes for "this run has ended".
        kind: a word or two, the same for all refusals of this sort: the log counts repetitions by it.
    """

    def __init__(self, status: int, text: str, kind: str) -> None:
        super().__init__(text)
        self.status, self.kind = status, kind


class ConnectionLost(TrunklineError):
    """The other end of a connection closed it, or did nothing for too long (`silent`)."""

    def __init__(self, connection: "Connection", text: str, silent: bool = False) -> None:
        super().__init__(text)
        self.connection, self.silent = connection, silent


class Connection(asyncio.Protocol):
    """A connection as a queue of chunks; a chunk is the result of one read, and is not copied.

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
    def is_quiet(self) -> bool:
        """Open, with nothing unread."""
        return not self.ended and not self._chunks

    async def receive(self, patience: float) -> bytes:
        """The next chunk.

        Raises:
            ConnectionLost: none came within `patience` seconds, or none will come.
        """
        if not self._chunks and not self.ended:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(patience):
                    await self._reader
            except TimeoutError:
                raise ConnectionLost(self, f"sent nothing for {patience:g} s", silent=True) from None
            finally:
                self._reader = None
        if not self._chunks:
            raise ConnectionLost(self, "closed the connection")
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
            ConnectionLost: the other end is gone, or took nothing for `patience` seconds.
        """
        if self.ended:
            raise ConnectionLost(self, "closed the connection")
        self.transport.write(data)
        if self._blocked:
            self._writer = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(patience):
                    await self._writer
            except TimeoutError:
                raise ConnectionLost(self, f"took nothing for {patience:g} s", silent=True) from None
            finally:
                self._writer = None

    async def read_head(
        self, limit: int, first_s: float, complete_s: float, start: re.Pattern[bytes] | None = None
    ) -> bytes:
        """All up to and with the empty line.

        Args:
            limit: bytes; first_s: seconds until the first byte; complete_s: seconds from there to the last one.
            start: how the head must begin, so that the gateway does not wait for the end of what cannot be one.

        Raises:
            ConnectionLost: no head came. Denied: it is too large, or is none.
        """
        head = await self.receive(first_s)
        deadline = time.monotonic() + complete_s
        while (end := head.find(b"\r\n\r\n")) < 0:
            if len(head) > limit:
                break
            if (start is not None and not start.match(head)) or b"\n" in head.replace(b"\r\n", b""):
                raise Denied(400, "this is not an HTTP/1.1 request.", "not HTTP")
            try:
                head += await self.receive(max(0.0, deadline - time.monotonic()))
            except ConnectionLost as lost:
                if lost.silent:
                    raise Denied(
                        408, f"the headers were not complete within {complete_s:g} s.", "slow headers"
                    ) from None
                raise
        if end < 0 or end + 4 > limit:
            raise Denied(431, f"the headers are larger than the {limit:,} bytes that are taken here.", "headers")
        self.unread(head[end + 4 :])
        return head[: end + 4]

    async def linger(self, seconds: float) -> None:
        """Close so that the peer can read the answer: for a while, what it still sends is discarded.

        A socket closed with unread bytes in it is reset, and the answer with the reason is lost.
        """
        try:
            async with asyncio.timeout(seconds):
                while not self.ended:
                    await self.receive(seconds)
        except (TimeoutError, ConnectionLost):
            pass
        self.close()

    async def shut(self, patience: float) -> None:
        """Close, and wait for the other end to close too, `patience` seconds at most."""
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


async def relay(
    source: Connection, sink: Connection, length: int, patience: float, tap: Callable[[bytes], None] | None = None
) -> None:
    """Pass on exactly `length` bytes; `tap` gets them too.

    Raises:
        ConnectionLost: one of the two; its `connection` is the one.
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
        connect: makes a new connection.
        keep_s: seconds a connection may wait; less than the upstream's own limit (uvicorn: 5 s), so that a request is
            never written to a connection that is just being closed.
    """

    def __init__(self, connect: Callable[[], Awaitable[Connection]], keep_s: float = 3.0, keep: int = 64) -> None:
        self.connect, self.keep_s, self.keep = connect, keep_s, keep
        self._idle: list[Connection] = []

    async def take(self) -> Connection:
        """A connection for one request. Raises OSError, ssl.SSLError or TimeoutError where none can be made."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_quiet and time.monotonic() - connection.since < self.keep_s:
                return connection
            connection.close()
        return await self.connect()

    def give(self, connection: Connection) -> None:
        """Return a connection for the next request; only after a whole answer was read."""
        if connection.is_quiet and len(self._idle) < self.keep:
            connection.since = time.monotonic()
            self._idle.append(connection)
        else:
            connection.close()

    def prune(self) -> None:
        """Close connections that have waited too long."""
        stale = [
            connection
            for connection in self._idle
            if not connection.is_quiet or time.monotonic() - connection.since >= self.keep_s
        ]
        self._idle = [connection for connection in self._idle if connection not in stale]
        for connection in stale:
            connection.close()

    def close(self) -> None:
        for connection in self._idle:
            connection.abort()
        self._idle.clear()


async def dial(address: tuple[str, int], context: ssl.SSLContext, patience: float) -> Connection:
    """A TLS connection to the upstream."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(patience):
        _, connection = await loop.create_connection(
            Connection, *address, ssl=context, server_hostname=address[0], ssl_shutdown_timeout=1.0
        )
    return connection


async def dial_unix(path: str, patience: float) -> Connection:
    """A connection to a socket of this machine."""
    async with asyncio.timeout(patience):
        _, connection = await asyncio.get_running_loop().create_unix_connection(Connection, path)
    return connection
