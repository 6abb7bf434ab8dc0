"""A proxy on loopback that keeps every byte which passes it, between a real client and a real server."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Self


class Recorder:
    """Listens on a free port of 127.0.0.1 and passes on to `target`, a port there. A context manager.

    Args:
        target: the server's port.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self._up: list[bytearray] = []  # one a connection
        self._down: list[bytearray] = []
        self._loop = asyncio.new_event_loop()
        self._open: asyncio.Event | None = None
        self._listening = threading.Event()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    @property
    def up(self) -> list[bytes]:
        """The bytes that the client has sent, one item a connection."""
        return [bytes(stream) for stream in self._up]

    @property
    def down(self) -> list[bytes]:
        """The bytes that the server has sent, one item a connection."""
        return [bytes(stream) for stream in self._down]

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold all bytes back, either way, until the block ends; they are not lost."""
        assert self._open is not None  # set before the port is known
        self._loop.call_soon_threadsafe(self._open.clear)
        try:
            yield
        finally:
            self._loop.call_soon_threadsafe(self._open.set)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._listening.wait(10.0):
            raise OSError("the recorder does not listen on 127.0.0.1")
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(10.0)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = int(server.sockets[0].getsockname()[1])
        self._listening.set()
        await self._ended.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up, down = bytearray(), bytearray()
        self._up.append(up)
        self._down.append(down)
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:  # the server does not listen yet: the client tries again
            writer.close()
            return
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(self._pump(reader, far_writer, up), self._pump(far_reader, writer, down))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: bytearray) -> None:
        assert self._open is not None
        try:
            while data := await reader.read(1 << 16):
                await self._open.wait()
                kept += data
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()
