"""What the same bytes cost without expertd: a bare gRPC echo, a raw socket, a memcpy.

The echo runs in a process of its own (`python -m expertd.client.tools.bench.floors`), as a server would, and answers
every request with as many bytes as the first eight bytes of the request ask for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import grpc.aio
import torch
import uvloop

from expertd.proto.base.malloc import keep_freed_memory

METHOD = "/expertd.floors/Echo"
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
HEADER = 8


@dataclass(frozen=True, slots=True)
class Exchange:
    """Bytes of one call: `parts` requests of `up` bytes, each answered with `down` bytes."""

    up: int
    down: int
    parts: int = 1

    @property
    def total_bytes(self) -> int:
        return (self.up + self.down) * self.parts

    def request(self) -> bytes:
        return self.down.to_bytes(HEADER, "little") + bytes(max(0, self.up - HEADER))


@dataclass(frozen=True, slots=True)
class EchoAddresses:
    grpc: str
    raw: tuple[str, int]


@contextlib.asynccontextmanager
async def running_echo() -> AsyncIterator[EchoAddresses]:
    """The echo process on free loopback ports."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "expertd.client.tools.bench.floors"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        ports = json.loads(await process.stdout.readline())
        yield EchoAddresses(f"127.0.0.1:{ports['grpc']}", ("127.0.0.1", ports["raw"]))
    finally:
        process.stdin.close()  # the echo ends with its standard input, also when this process dies
        await process.wait()


class GrpcFloor:
    """Exchanges over long-lived streams, one for each channel; parts are sent without waiting for answers."""

    def __init__(self, address: str, channels: int) -> None:
        options = [*UNLIMITED, ("grpc.use_local_subchannel_pool", 1)]
        self._channels = [grpc.aio.insecure_channel(address, options) for _ in range(channels)]
        self._streams: list[grpc.aio.StreamStreamCall[bytes, bytes]] = [
            channel.stream_stream(METHOD)() for channel in self._channels
        ]

    async def exchange(self, exchange: Exchange) -> None:
        request = exchange.request()
        shares = [exchange.parts // len(self._streams)] * len(self._streams)
        for index in range(exchange.parts % len(self._streams)):
            shares[index] += 1
        await asyncio.gather(*(self._run(index, request, share) for index, share in enumerate(shares) if share))

    async def _run(self, index: int, request: bytes, parts: int) -> None:
        stream = self._streams[index]

        async def send() -> None:
            for _ in range(parts):
                await stream.write(request)

        sending = asyncio.create_task(send())
        for _ in range(parts):
            await stream.read()
        await sending

    async def close(self) -> None:
        for stream in self._streams:
            stream.cancel()
        await asyncio.gather(*(channel.close() for channel in self._channels))


def raw_socket_seconds(address: tuple[str, int], exchange: Exchange, calls: int) -> list[float]:
    """Seconds of each of `calls` exchanges over one TCP connection.

    The echo answers no part before it has read all of it: one part is sent and then received, several are sent by a
    thread while answers are received.
    """
    request = exchange.request() * exchange.parts
    answer = bytearray(exchange.down * exchange.parts)
    seconds = []
    with socket.create_connection(address) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(max(exchange.up, HEADER).to_bytes(HEADER, "little"))
        for _ in range(calls):
            started = time.perf_counter()
            if exchange.parts == 1:
                connection.sendall(request)
                _receive_into(connection, memoryview(answer))
            else:
                sender = threading.Thread(target=connection.sendall, args=(request,))
                sender.start()
                _receive_into(connection, memoryview(answer))
                sender.join()
            seconds.append(time.perf_counter() - started)
    return seconds


def memcpy_seconds(exchange: Exchange, calls: int) -> list[float]:
    """Seconds of copying the same bytes once within this process."""
    source = torch.randint(0, 255, (exchange.total_bytes,), dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(calls):
        started = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - started)
    return seconds


def _receive_into(connection: socket.socket, view: memoryview) -> None:
    while view:
        count = connection.recv_into(view)
        if count == 0:
            raise ConnectionError("the peer closed the connection")
        view = view[count:]


async def _echo(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
    async for request in requests:
        await context.write(bytes(int.from_bytes(request[:HEADER], "little")))


def _serve_raw(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_serve_connection, args=(connection,), daemon=True).start()


def _serve_connection(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection, contextlib.suppress(ConnectionError):
        header = bytearray(HEADER)
        _receive_into(connection, memoryview(header))
        request = bytearray(int.from_bytes(header, "little"))
        answer = b""
        while True:
            _receive_into(connection, memoryview(request))
            # The same memory again, as a server's would be.
            if (length := int.from_bytes(request[:HEADER], "little")) != len(answer):
                answer = bytes(length)
            connection.sendall(answer)


async def _main() -> None:
    server = grpc.aio.server(options=UNLIMITED)
    handler: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {"Echo": grpc.stream_stream_rpc_method_handler(_echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("expertd.floors", handler),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve_raw, args=(listener,), daemon=True).start()
    print(json.dumps({"grpc": port, "raw": listener.getsockname()[1]}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(1)


if __name__ == "__main__":
    keep_freed_memory()
    uvloop.run(_main())
