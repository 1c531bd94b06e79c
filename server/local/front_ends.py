"""The front ends of a server: started, started again when they die, and drained with it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import pickle
import socket
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from subprocess import Popen, TimeoutExpired

import grpc.aio

from expertd.proto.base.loopback import UNIX
from expertd.proto.base.tasks import Tasks
from expertd.proto.lane.frames import Frames
from expertd.server.local.link import ANSWER, CALL, CONTROL, Settings
from expertd.server.options.config import Address, ServerConfig
from expertd.server.rpc.conversation import response_of
from expertd.server.rpc.incoming import Call, Executor, Incoming

log = logging.getLogger(__name__)
FIRST_DELAY, LONGEST_DELAY = 0.1, 10.0
"""Seconds from a front end's end to the next one's start, doubled while none comes to listen."""
DRAINED = "exit code 0"
"""How a front end ends that was told to."""
END_SECONDS = 2.0
"""From the end of its link to the end of its process."""


class FrontEnds:
    """Processes that listen on one port. Lives on the event loop."""

    def __init__(
        self, config: ServerConfig, max_message_bytes: int, executor: Executor, new_tasks: Callable[[], Tasks]
    ) -> None:
        """`executor` answers their calls."""
        self._config = config
        self._max_message_bytes = max_message_bytes
        self._executor = executor
        self._links: set[_Link] = set()
        self._keepers = new_tasks()
        self._changed = asyncio.Event()
        self._stopping = asyncio.Event()

    @property
    def listening(self) -> int:
        """How many listen now."""
        return sum(link.listens for link in self._links)

    def add_port(self, server: grpc.aio.Server, address: Address) -> int:
        """Take the port at `address` for the front ends, and have `server` answer them on `self.socket` instead.

        Raises OSError when something listens on the port.
        """
        family, kind, _, _, place = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as alone:
            # One that does not share finds out whether anybody else is there.
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(place)
            port: int = alone.getsockname()[1]
        self._reserved = socket.socket(family, kind)
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._reserved.bind((place[0], port, *place[2:]))
        # Of this user's alone.
        self._folder = tempfile.TemporaryDirectory(prefix="expertd-")
        self.socket = Path(self._folder.name) / "server"
        server.add_insecure_port(f"{UNIX}{self.socket}")
        self._listen = dataclasses.replace(address, port=port)
        return port

    async def listen(self) -> None:
        settings = Settings(self._config, self._listen, str(self.socket), self._max_message_bytes)
        for number in range(self._config.front_ends):
            self._keepers.keep(partial(self._keep, number, settings), f"keeping front end {number}")

    async def until_listening(self) -> None:
        while self.listening < self._config.front_ends:
            await self._changed.wait()
            self._changed.clear()

    def disconnect(self) -> None:
        """All of them end and begin anew."""
        for link in self._links:
            link.frames.close()

    async def drain(self, seconds: float) -> None:
        """Have them say GOAWAY and do so; then they end."""
        self._stopping.set()
        for link in self._links:
            link.drain(seconds)
        await self._keepers.settle(seconds + END_SECONDS)
        await self._keepers.close()

    async def close(self) -> None:
        self._reserved.close()
        self._folder.cleanup()

    async def _keep(self, number: int, settings: Settings) -> None:
        """Have one front end at all times."""
        delay = FIRST_DELAY
        while not self._stopping.is_set():
            try:
                listened, end = await self._live(settings)
            except OSError as error:
                listened, end = False, str(error)
            if self._stopping.is_set():
                if end != DRAINED:
                    log.warning("front end %d ended: %s", number, end)
                return
            delay = FIRST_DELAY if listened else min(2 * delay, LONGEST_DELAY)
            log.error("front end %d ended: %s; another one starts in %g s", number, end, delay)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)

    async def _live(self, settings: Settings) -> tuple[bool, str]:
        """The life of one front end: whether it came to listen, and how it ended. Raises OSError at its start."""
        process, connection = await _start(settings)
        link = _Link(self._executor, settings.max_frame_bytes, self._changed.set)
        self._links.add(link)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: link.frames, connection)
            if self._stopping.is_set():
                link.drain(0.0)
            await link.ended
        finally:
            self._links.discard(link)
            link.frames.close()
            code = await _end(process)
        return link.listens, f"exit code {code}"


class _Link:
    """The server's end of the link to one front end."""

    def __init__(self, executor: Executor, max_frame_bytes: int, on_listening: Callable[[], None]) -> None:
        self._executor = executor
        self._on_listening = on_listening
        self._calls: dict[int, Call] = {}
        self.frames = Frames(self._on_frame, self._on_end, max_frame_bytes)
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.listens = False

    def drain(self, seconds: float) -> None:
        self.frames.send(ANSWER.pack(CONTROL) + str(seconds).encode())

    def _on_frame(self, frame: bytes) -> None:
        number, length = CALL.unpack_from(frame)
        if number == CONTROL:
            self.listens = True
            self._on_listening()
        elif number in self._calls:
            self._calls[number].cancel()
        elif length:
            # Without names it cancels a call whose answer it crossed.
            names, message = str(frame[CALL.size : CALL.size + length], "utf-8"), frame[CALL.size + length :]
            caller, _, identity = names.partition("\n")
            incoming = Incoming(message, caller, identity=identity)
            self._calls[number] = call = self._executor.submit(incoming)
            call.answer.add_done_callback(partial(self._answered, number))

    def _answered(self, number: int, answer: asyncio.Future[bytes]) -> None:
        call = self._calls.pop(number)
        self.frames.send(ANSWER.pack(number) + response_of(call))

    def _on_end(self, error: Exception | None) -> None:
        for call in self._calls.values():
            call.cancel()
        self.ended.set_result(None)


async def _start(settings: Settings) -> tuple[Popen[bytes], socket.socket]:
    """A new front end: its process, and the connection to it."""
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            # -P: the folder that the server happens to be in is no place to import from.
            command = (sys.executable, "-P", "-m", "expertd.server.local.front_end")
            # The library's own way, not the event loop's: that one copies the page tables of all that is mapped here.
            process = await asyncio.to_thread(lambda: Popen(command, stdin=theirs.fileno()))
        ours.send(pickle.dumps(settings))
        ours.setblocking(False)
    except BaseException:
        ours.close()
        raise
    return process, ours


async def _end(process: Popen[bytes]) -> int:
    """The exit code of a front end whose link has ended; by force when it takes long."""
    try:
        return await asyncio.to_thread(process.wait, END_SECONDS)
    except (TimeoutExpired, asyncio.CancelledError):
        process.kill()
        return await asyncio.to_thread(process.wait)
