"""A port that answers HTTP on a thread of its own, whatever the rest of the process does and whoever connects."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import socket
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import urlsplit

from expertd.server.options.config import Address

log = logging.getLogger(__name__)
MOST_CONNECTIONS = 64
"""At once; one more closes the oldest, for an answer is a matter of milliseconds."""
PENDING = 1024
"""Connections that the kernel keeps until there is time for them: whoever finds no room there comes a second later."""
REQUEST_BYTES = 16 << 10
SECONDS = 10.0
"""For a request to arrive, and again for its answer to be taken."""


@dataclass(frozen=True, slots=True)
class Request:
    """What somebody wants to read."""

    path: str
    query: str
    headers: dict[str, str]
    """By their names in lower case."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What there is to read."""

    status: HTTPStatus
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def encode(self, *, with_body: bool) -> bytes:
        length, only = ("Content-Length", str(len(self.body))), ("Connection", "close")
        lines = (f"{name}: {value}\r\n" for name, value in (*self.headers, length, only))
        head = f"HTTP/1.1 {self.status} {self.status.phrase}\r\n{''.join(lines)}\r\n".encode()
        return head + self.body if with_body else head


class HttpPort:
    """One request a connection, GET or HEAD."""

    def __init__(self, address: Address, answer: Callable[[Request], Awaitable[Answer]]) -> None:
        self.address = address
        self._answer = answer
        self._open: dict[asyncio.StreamWriter, None] = {}

    def start(self) -> None:
        """Listen. Raises OSError."""
        host, port = self.address.host, self.address.port
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.create_server(place[:2], family=family)
        self.address = dataclasses.replace(self.address, port=listening.getsockname()[1])
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(
            target=self._loop.run_until_complete, args=(self._run(listening),), name="http-port", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._loop.close()

    async def _run(self, listening: socket.socket) -> None:
        server = await asyncio.start_server(self._serve, sock=listening, limit=REQUEST_BYTES, backlog=PENDING)
        await self._stopping.wait()
        # First, since asyncio forgets, open, what it has accepted and not made a connection of by `close`.
        asyncio.get_running_loop().remove_reader(listening)
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for connection in self._open:
                connection.transport.abort()
            await asyncio.wait(others, timeout=0.05)
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open[writer] = None
        if len(self._open) > MOST_CONNECTIONS:
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.transport.abort()
        try:
            with contextlib.suppress(OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
                async with asyncio.timeout(SECONDS):
                    head = await reader.readuntil(b"\r\n\r\n")
                writer.write(await self._respond(head))
                async with asyncio.timeout(SECONDS):
                    await writer.drain()
        finally:
            await _close(writer)
            self._open.pop(writer, None)

    async def _respond(self, head: bytes) -> bytes:
        first, *rest = head.decode("latin-1").split("\r\n")
        method, _, target = first.partition(" ")
        if method not in ("GET", "HEAD"):
            return Answer(HTTPStatus.METHOD_NOT_ALLOWED, (("Allow", "GET, HEAD"),), b"").encode(with_body=True)
        try:
            url = urlsplit(target.partition(" ")[0])
        except ValueError:
            # Such as a bracket that is not closed.
            return Answer(HTTPStatus.BAD_REQUEST, (), b"").encode(with_body=True)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
        try:
            answer = await self._answer(Request(url.path, url.query, headers))
        except Exception:
            log.exception("%s cannot be answered", url.path)
            answer = Answer(HTTPStatus.INTERNAL_SERVER_ERROR, (), b"")
        return answer.encode(with_body=method == "GET")


async def _close(writer: asyncio.StreamWriter) -> None:
    """Close a connection once its answer is taken, or without that."""
    writer.close()
    with contextlib.suppress(OSError):
        try:
            async with asyncio.timeout(SECONDS):
                await writer.wait_closed()
        except TimeoutError:
            writer.transport.abort()
            await writer.wait_closed()
