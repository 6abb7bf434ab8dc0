"""A TCP proxy between plants and a gateway, a port a plant, whose lines can be made bad one by one.

TLS hides the messages, so none can be dropped or doubled alone. What a bad network does to them can be done all the same: a
connection that ends before the answer leaves the caller unsure whether it was heard, and he asks or sends again.
"""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

CHUNK = 1 << 16  # bytes
TRICKLE = 512  # bytes at once on a line that trickles
TRICKLE_PAUSE_S = 0.02  # between them: 25 kB/s
SPOKEN = 3  # chunks from the caller after which its handshake is over and it has asked something
LOSE_EVERY = 3  # answers: the first of so many is lost


@dataclass
class Line:
    """One plant's way to the centre; every fault is a plain field that both directions look at.

    Args:
        delay_s: each piece comes so much later.
        held: nothing goes through and nothing is closed; a connection is still taken.
        trickles: a few bytes at a time.
        losing: one answer in three ends its connection in place of arriving.
    """

    name: str
    port: int = 0
    delay_s: float = 0.0
    held: bool = False
    trickles: bool = False
    losing: bool = False
    answers: int = 0
    lost: int = 0
    open: set["Connection"] = field(default_factory=set)

    def restore(self) -> None:
        self.delay_s, self.held, self.trickles, self.losing = 0.0, False, False, False


class Connection:
    """Both ends of one connection through a line."""

    def __init__(self, *ends: asyncio.StreamWriter) -> None:
        self.ends = ends
        self.spoken = 0
        self.waits = False  # the caller has sent something since the last answer

    def reset(self) -> None:
        """Close both ends with RST, as a firewall that lost its table does."""
        for end in self.ends:
            with contextlib.suppress(OSError):
                own = end.get_extra_info("socket")
                own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.transport.abort()


class Proxy:
    """Runs in a thread of its own; the methods are for any thread.

    Args:
        upstream: port of the gateway on 127.0.0.1; it may be down now and then.
        names: of the plants.
    """

    def __init__(self, upstream: int, names: list[str]) -> None:
        self.upstream = upstream
        self.lines = {name: Line(name) for name in names}
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        for line in self.lines.values():
            self._wait(self._listen(line))

    def reset(self, name: str) -> int:
        """Cut every connection of a plant; how many there were."""
        return int(self._wait(self._cut(self.lines[name])))

    def close(self) -> None:
        self._wait(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10.0)

    async def _listen(self, line: Line) -> None:
        server = await asyncio.start_server(lambda *ends: self._serve(line, *ends), "127.0.0.1", 0)
        self._servers.append(server)
        line.port = server.sockets[0].getsockname()[1]

    async def _cut(self, line: Line) -> int:
        cut = list(line.open)
        for one in cut:
            one.reset()
        return len(cut)

    async def _end(self) -> None:
        for server in self._servers:
            server.close()
        for line in self.lines.values():
            await self._cut(line)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, line: Line, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        this = asyncio.current_task()
        assert this is not None
        self._tasks.add(this)
        this.add_done_callback(self._tasks.discard)
        try:
            there, away = await asyncio.open_connection("127.0.0.1", self.upstream)
        except OSError:
            Connection(writer).reset()
            return
        connection = Connection(writer, away)
        line.open.add(connection)
        try:
            await asyncio.gather(
                self._pump(line, connection, reader, away, self._asked),
                self._pump(line, connection, there, writer, self._answered),
            )
        except (OSError, asyncio.CancelledError):
            connection.reset()
        finally:
            line.open.discard(connection)
            for end in (writer, away):
                end.close()

    async def _pump(
        self,
        line: Line,
        connection: Connection,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        passes: Callable[[Line, Connection], bool],
    ) -> None:
        while data := await source.read(CHUNK):
            while line.held:
                await asyncio.sleep(0.05)
            if line.delay_s:
                await asyncio.sleep(line.delay_s)
            if not passes(line, connection):
                connection.reset()
                return
            for start in range(0, len(data), TRICKLE if line.trickles else CHUNK):
                size = TRICKLE if line.trickles else CHUNK
                target.write(data[start : start + size])
                await target.drain()
                if line.trickles:
                    await asyncio.sleep(TRICKLE_PAUSE_S)
        if target.can_write_eof() and not target.is_closing():
            with contextlib.suppress(OSError):
                target.write_eof()

    @staticmethod
    def _asked(line: Line, connection: Connection) -> bool:
        connection.spoken += 1
        connection.waits = True
        return True

    @staticmethod
    def _answered(line: Line, connection: Connection) -> bool:
        """Whether this piece of an answer may pass."""
        if not connection.waits or connection.spoken < SPOKEN:
            return True
        connection.waits = False
        line.answers += 1
        if line.losing and line.answers % LOSE_EVERY == 1:
            line.lost += 1
            return False
        return True
