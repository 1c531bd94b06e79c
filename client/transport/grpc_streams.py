"""Calls to a server over gRPC: a few connections, each with one long-lived stream."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import grpc.aio
import torch
from grpc_health.v1 import health_pb2

from expertd.client.transport.answer import answer
from expertd.client.transport.security import ClientSecurity
from expertd.proto import codec
from expertd.proto.base.errors import ExpertdError, ServerFault, Unavailable, error_from_status
from expertd.proto.base.tasks import Tasks
from expertd.proto.codec import ExecuteCall, ExecuteResult, RawResponse, Registration, ShardInfo

StreamCall = grpc.aio.StreamStreamCall[bytes, bytes]
CHUNK_BYTES = 4 << 20
RETRY_SECONDS = 0.1
KEEPALIVE_MS = 3000
"""Without traffic a server is asked for a sign of life, and given as long to answer."""


class GrpcTransport:
    """A few connections, each with one long-lived bidirectional stream."""

    shared_devices: frozenset[torch.device] = frozenset()

    def __init__(
        self,
        address: str,
        channels: int = 1,
        security: ClientSecurity | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self.address = address
        self.chunk_bytes = chunk_bytes
        self._security = security or ClientSecurity()
        self._channels = tuple(_Channel(address, self._security) for _ in range(channels))

    async def get_shard(self, timeout: float) -> ShardInfo:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while True:
            timeout = max(deadline - loop.time(), 0.001)
            metadata = self._security.metadata()
            try:
                # On every connection: one that is not back yet would fail the first call that is sent on it.
                answers = await asyncio.gather(
                    *(
                        channel.get_shard(codec.ShardRequest(), timeout=timeout, metadata=metadata)
                        for channel in self._channels
                    )
                )
                return codec.decode_shard(answers[0])
            except grpc.aio.AioRpcError as error:
                reason = _as_error(self.address, error)
            if not isinstance(reason, Unavailable) or loop.time() + RETRY_SECONDS >= deadline:
                raise reason
            await asyncio.sleep(RETRY_SECONDS)

    async def execute(self, call: ExecuteCall) -> ExecuteResult:
        channel = min(self._channels, key=lambda channel: channel.bytes_in_flight)
        return await answer(self.address, call, channel.exchange(call.request_id, codec.encode_call(call)))

    async def register_shared_memory(self, timeout: float) -> Registration:
        """Where to hand over memory. Raises `NotPermitted` when the server shares none with this process."""
        try:
            return await self._channels[0].register_shared_memory(
                codec.RegistrationRequest(), timeout=timeout, metadata=self._security.metadata()
            )
        except grpc.aio.AioRpcError as error:
            raise error_from_status(error.code(), str(error.details())) from None

    async def until_not_serving(self) -> Unavailable:
        request = health_pb2.HealthCheckRequest(service=codec.SERVICE)
        watch = self._channels[0].watch_health(request)
        try:
            async for answer in watch:
                if answer.status != health_pb2.HealthCheckResponse.SERVING:
                    break
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                # Another implementation of the contract: its calls have to tell.
                await asyncio.Event().wait()
            return Unavailable(f"{self.address}: the connection was lost: {error.details()}")
        finally:
            watch.cancel()
        return Unavailable(f"{self.address}: its health is not SERVING")

    async def close(self) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels))


class _Channel:
    """One connection; its stream is opened when first needed and again after it ended."""

    def __init__(self, address: str, security: ClientSecurity) -> None:
        self._address = address
        self._security = security
        self._channel = security.open_channel(
            address,
            options=[
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_send_message_length", -1),
                # A connection of its own: channels to one address would otherwise share one.
                ("grpc.use_local_subchannel_pool", 1),
                # A server that returns is found again soon.
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 500),
                # A server that is cut off or frozen closes no connection: ask it for signs of life.
                ("grpc.keepalive_time_ms", KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
                ("grpc.http2.max_pings_without_data", 0),
            ],
        )
        self.get_shard = self._channel.unary_unary(
            f"/{codec.SERVICE}/GetShard", codec.ShardRequest.SerializeToString, codec.ShardResponse.FromString
        )
        self.watch_health = self._channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        self.register_shared_memory = self._channel.unary_unary(
            f"/{codec.SERVICE}/RegisterSharedMemory",
            codec.RegistrationRequest.SerializeToString,
            codec.Registration.FromString,
        )
        self._execute_stream: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(
            f"/{codec.SERVICE}/ExecuteStream"
        )
        self._stream: _Stream | None = None
        self.bytes_in_flight = 0

    async def exchange(self, request_id: int, request: bytes) -> RawResponse:
        if self._stream is None or self._stream.ended:
            self._stream = _Stream(self._execute_stream(metadata=self._security.metadata()), self._address)
        self.bytes_in_flight += len(request)
        try:
            return await self._stream.exchange(request_id, request)
        finally:
            self.bytes_in_flight -= len(request)

    async def close(self) -> None:
        if self._stream is not None:
            await self._stream.close()
        await self._channel.close()


class _Stream:
    """One bidirectional call: requests out, responses matched to them by id."""

    def __init__(self, call: StreamCall, address: str) -> None:
        self._call = call
        self._address = address
        self._waiting: dict[int, asyncio.Future[RawResponse]] = {}
        self._writing = asyncio.Lock()
        self._tasks = Tasks()
        self._reader = self._tasks.start(self._read(), f"reading the answers of {address}")

    @property
    def ended(self) -> bool:
        return self._call.done() or self._reader.done()

    async def exchange(self, request_id: int, request: bytes) -> RawResponse:
        """Send `request` and wait for the response with its id."""
        future: asyncio.Future[RawResponse] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = future
        self._send(request, future)
        try:
            return await future
        except asyncio.CancelledError:
            self._send(codec.encode_cancellation(request_id))
            raise
        finally:
            del self._waiting[request_id]

    async def close(self) -> None:
        self._call.cancel()
        await self._tasks.settle()

    def _send(self, message: bytes, answer: asyncio.Future[RawResponse] | None = None) -> None:
        """Write `message` when those before it are written, unless nobody waits for its `answer` by then."""
        # A task of its own: gRPC cancels the whole stream when a write is cancelled half-way.
        self._tasks.start(self._write(message, answer), f"writing to {self._address}")

    async def _write(self, message: bytes, answer: asyncio.Future[RawResponse] | None) -> None:
        async with self._writing:
            if answer is not None and answer.done():
                return
            # Why the stream ended is for the reader to find out and to tell everyone who waits.
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError):
                await self._call.write(message)

    async def _read(self) -> None:
        """Hand responses to those who wait until the stream ends; then fail those still waiting."""
        ended: ExpertdError = Unavailable(f"{self._address}: its answers are not read any more")
        try:
            async for data in self._call:
                response = codec.parse_response(data)
                future = self._waiting.get(response.request_id)
                if future is not None and not future.done():
                    future.set_result(response)
            ended = Unavailable(f"{self._address}: the server ended the stream")
        except grpc.aio.AioRpcError as error:
            ended = _as_error(self._address, error)
        except ServerFault as error:
            # What else the stream carries cannot be trusted either.
            self._call.cancel()
            ended = ServerFault(f"{self._address}: {error}")
        except asyncio.CancelledError:
            ended = Unavailable(f"{self._address}: the connection was closed")
        finally:
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(ended.again())


def _as_error(address: str, error: grpc.aio.AioRpcError) -> ExpertdError:
    if error.code() == grpc.StatusCode.CANCELLED:
        # Not by this side: a server that ends cuts off what arrives too late for an answer.
        return Unavailable(f"{address}: cut off by the server: {error.details()}")
    return error_from_status(error.code(), f"{address}: {error.details()}")
