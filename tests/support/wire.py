"""A proxy on this machine in front of a server: what the network does to a connection, each direction alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Literal

from expertd.proto.base.loopback import UNIX

Direction = Literal["requests", "replies"]
Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]
READ_BYTES = 1 << 18


class Wire:
    """Carries bytes between callers and the server at `target`, unless it is told otherwise.

    What is held is late, not lost: as with dropped packets, which are sent again until one arrives.
    """

    def __init__(self, target: str) -> None:
        """`target` is `host:port` or `unix:PATH`, and may be changed for connections to come."""
        self.target = target
        self.delay = 0.0
        """Seconds that everything takes longer, in both directions."""
        self.address = ""
        self._passing = {"requests": asyncio.Event(), "replies": asyncio.Event()}
        for passing in self._passing.values():
            passing.set()
        self._cut = 0
        self._carrying: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def carrying(self, listen: str = "") -> AsyncIterator[Wire]:
        """Listen on a free port, or at `listen`, which is `unix:PATH`."""
        if listen:
            server = await asyncio.start_unix_server(self._accept, listen.removeprefix(UNIX))
            self.address = listen
        else:
            server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
            self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            await self._end()

    @contextlib.contextmanager
    def silent(self, direction: Direction) -> Iterator[None]:
        """Nothing passes in one direction, of connections to come neither."""
        self._passing[direction].clear()
        try:
            yield
        finally:
            self._passing[direction].set()

    @contextlib.asynccontextmanager
    async def cut(self) -> AsyncIterator[None]:
        """All connections end, and new ones end at once."""
        self._cut += 1
        try:
            await self._end()
            yield
        finally:
            self._cut -= 1

    async def _end(self) -> None:
        for task in self._carrying:
            task.cancel()
        await asyncio.gather(*self._carrying, return_exceptions=True)
        # What was aborted is closed in the loop's next turn.
        await asyncio.sleep(0.01)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Not in the task that accepted: asyncio would report its cancellation as an error.
        task = asyncio.create_task(self._carry((reader, writer)))
        self._carrying.add(task)
        # Of a task that is cancelled before it begins, nothing is ever run.
        task.add_done_callback(lambda _: writer.transport.abort())
        task.add_done_callback(self._carrying.discard)

    async def _carry(self, caller: Ends) -> None:
        """The life of a connection: it ends with either of its ends."""
        server: Ends | None = None
        try:
            if self._cut:
                return
            server = await self._dial()
            pumps = [
                asyncio.create_task(self._pump(caller[0], server[1], "requests")),
                asyncio.create_task(self._pump(server[0], caller[1], "replies")),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            return
        finally:
            for _, writer in (caller, *([server] if server else [])):
                writer.transport.abort()

    async def _dial(self) -> Ends:
        if self.target.startswith(UNIX):
            return await asyncio.open_unix_connection(self.target.removeprefix(UNIX))
        host, _, port = self.target.rpartition(":")
        return await asyncio.open_connection(host, int(port))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(READ_BYTES):
                await asyncio.sleep(self.delay)
                await self._passing[direction].wait()
                writer.write(data)
                await writer.drain()
            # The end of a connection is a packet too.
            await self._passing[direction].wait()
